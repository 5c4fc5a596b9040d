"""Tables of text, aligned for a terminal or as Markdown."""

import re
from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Rows of text under a header, with a title and notes."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def render(table: Table, form: str = "table") -> str:
    """A table as aligned text or as Markdown."""
    if form == "markdown":
        lines = [f"| {' | '.join(row)} |" for row in (table.header, ["---"] * len(table.header), *table.rows)]
        return "\n".join([table.title, "", *lines, *(f"\n{note}" for note in table.notes)])
    columns = []
    for header, *cells in zip(table.header, *table.rows, strict=True):
        width = max(map(len, (header, *cells)))
        of_numbers = all(re.fullmatch(r"[-+.,\d ]*", cell) for cell in cells)
        columns.append([cell.rjust(width) if of_numbers else cell.ljust(width) for cell in (header, *cells)])
    lines = ("  ".join(row).rstrip() for row in zip(*columns, strict=True))
    return "\n".join([table.title, "", *lines, *table.notes])
