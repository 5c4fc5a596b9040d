"""A report as one HTML page that contains its images, with the same images as PNGs beside it."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from utils import write_atomically, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
h1,h2{line-height:1.2}h2{margin-top:2.5em;border-top:1px solid #ccc;padding-top:1em}
img{max-width:100%;height:auto;display:block;margin:.5em 0}figure{margin:1.5em 0}figcaption{color:#444}
.verdict{font-size:1.1em;background:#f2f6fa;border-left:4px solid #0072b2;padding:.4em .8em;margin:.6em 0}
nav a{margin-right:1.2em}
table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}
th,td{border:1px solid #ccc;padding:.25em .6em;text-align:left;vertical-align:top}th{background:#f4f4f4}"""


class ReportImage(NamedTuple):
    """A figure with the name of its file, its heading, and a caption."""

    name: str
    title: str
    figure: "Figure"
    caption: str


class Section(NamedTuple):
    """A section of the page: its title, HTML, and images."""

    title: str
    content: str
    images: Iterable[ReportImage]


def write_page(sections: Sequence[Section], folder: Path) -> Path:
    """Write report.html and the PNGs into `folder`; returns the page's path. Raises UserError where it cannot."""
    links, body = [], []
    for number, section in enumerate(sections):
        title = html.escape(section.title)
        links.append(f'<a href="#part{number}">{title}</a>')
        body.append(f'<h2 id="part{number}">{title}</h2>\n{section.content}\n')
        for image in section.images:
            buffer = io.BytesIO()
            image.figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
            data, heading = buffer.getvalue(), html.escape(image.title)
            write_atomically(folder / f"{number}_{image.name}.png", lambda path, data=data: path.write_bytes(data))
            tag = f'<img alt="{heading}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
            caption = f"<figcaption>{html.escape(image.caption)}</figcaption>"
            body.append(f"<figure><h3>{heading}</h3>{tag}{caption}</figure>\n")
    page = folder / "report.html"
    write_text(page, PAGE.format(style=STYLE, contents="\n".join(links), body="".join(body)))
    return page


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Adversarial augmentation: report</title><style>{style}</style></head><body>
<h1>What the adversary did</h1>
<nav>{contents}</nav>
{body}
</body></html>
"""
