"""A report as one HTML page that holds its pictures, and their PNGs beside it."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from augmentations import OPS, row_of
from utils import write_atomically, write_text

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
h1,h2{line-height:1.2}h2{margin-top:2.5em;border-top:1px solid #ccc;padding-top:1em}
img{max-width:100%;height:auto;display:block;margin:.5em 0}figure{margin:1.5em 0}figcaption{color:#444}
table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}
th,td{border:1px solid #ccc;padding:.25em .6em;text-align:left;vertical-align:top}th{background:#f4f4f4}"""


class Picture(NamedTuple):
    """A figure with its file's name, its heading, and what is to be seen in it."""

    name: str
    title: str
    figure: Any
    words: str


class Part(NamedTuple):
    """A part of the page: its title, HTML, and pictures."""

    title: str
    content: str
    pictures: Iterable[Picture]


def write_page(parts: Sequence[Part], folder: Path) -> Path:
    """Write report.html and the PNGs into `folder`; returns the page's path. Raises UserError where that cannot be."""
    sections = []
    for number, (title, content, pictures) in enumerate(parts):
        shown = "".join(embedded(picture, folder, number) for picture in pictures)
        sections.append(f'<h2 id="part{number}">{html.escape(title)}</h2>\n{content}\n{shown}')
    links = (f'<li><a href="#part{n}">{html.escape(part.title)}</a></li>' for n, part in enumerate(parts))
    page = folder / "report.html"
    body = "\n".join(sections)
    write_text(page, PAGE.format(style=STYLE, contents="".join(links), body=body))
    return page


def embedded(picture: Picture, folder: Path, number: int) -> str:
    """Write a picture's PNG, and give it as a part of the page."""
    buffer = io.BytesIO()
    picture.figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    data = buffer.getvalue()
    write_atomically(folder / f"{number}_{picture.name}.png", lambda path: path.write_bytes(data))
    image = f'<img alt="{html.escape(picture.title)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
    caption = f"<figcaption>{html.escape(picture.words)}</figcaption>"
    return f"<figure><h3>{html.escape(picture.title)}</h3>{image}{caption}</figure>\n"


def levels_table() -> str:
    """What levels mean, for the default ten."""
    rows = []
    for op in OPS:
        if op.low is None:
            rows.append((op.name, "-", "-", "-", "has no strength"))
            continue
        level = neutral_level(op.name, 10)
        changes_nothing = "-" if level is None else f"{level:g}" if level == int(level) else "between 4 and 5"
        sign = "±" if op.signed else ""
        rows.append((op.name, f"{sign}{op.low:g}", f"{sign}{op.high:g}", changes_nothing, op.unit))
    return html_table(("operation", "level 0", "level 9", "changes nothing at level", "unit"), rows)


def neutral_level(name: str, levels: int) -> float | None:
    """The level, perhaps between two, at which an operation changes nothing."""
    op = OPS[row_of(name)]
    return None if op.neutral is None else (op.neutral - op.low) / (op.high - op.low) * (levels - 1)


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Adversarial augmentation: report</title><style>{style}</style></head><body>
<h1>What the adversary did</h1>
<p>While an image classifier is trained, an adversary changes its training images, and learns to make them hard for
it. It works with <b>policies</b>. M policies are in use at a time, and every image of a batch is seen once under
each. A policy is made of sub-policies; for every image one of them is drawn. A sub-policy is a few <b>operations</b>
one after the other, such as a rotation, each at a <b>level</b>. The adversary is a small network, the controller,
that writes policies and is rewarded by the classifier's loss under them: what was hard becomes more likely. An
<b>interval</b> is the time between two such updates, often an epoch, which is one pass over the training images.</p>
<ul>{contents}</ul>
{body}
</body></html>
"""
