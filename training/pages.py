"""Pages that explain themselves: pictures with a few sentences each, in one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { width: 100%; height: auto; } h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
p { max-width: 44rem; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
"""


@dataclass(frozen=True)
class Picture:
    """A figure with what one sees in it. name: of its PNG file."""

    name: str
    heading: str
    text: str
    figure: Figure


@dataclass(frozen=True)
class Grid:
    """A table of figures: the first row is its heading."""

    heading: str
    text: str
    rows: Sequence[Sequence[str]]


def write_page(out: Path, title: str, intro: str, parts: Sequence[Picture | Grid], *, dpi: int = 80) -> Path:
    """Write `index.html`, whole in itself, and beside it each picture as PNG. -> the page.

    Raises OSError where it cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(intro)}</p>"]
    for part in parts:
        body += [f"<h2>{html.escape(part.heading)}</h2>", f"<p>{html.escape(part.text)}</p>"]
        if isinstance(part, Picture):
            content = png(part.figure, dpi)
            (out / f"{part.name}.png").write_bytes(content)
            data = base64.b64encode(content).decode()
            body.append(f'<img alt="{html.escape(part.heading)}" src="data:image/png;base64,{data}">')
        else:
            body.append(_table(part.rows))
    page = out / "index.html"
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    page.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n')
    return page


def png(figure: Figure, dpi: int) -> bytes:
    """The same bytes for the same figure: no time, no version. In 200 colours: a third of the size, and looks alike."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    Image.open(drawn).convert("RGB").quantize(200).save(small, format="png", optimize=True)
    return small.getvalue()


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True)
    )
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
