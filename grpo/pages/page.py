"""One self-contained HTML page: no network, no script but its own, light or dark as the reader's system is.

Text becomes markup only through `escape`; pictures and plots are put into the page itself.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f6f7f9; --line: #d8dce2; --text: #1b1f24; --dim: #5c6670;
  --accent: #0b6bcb; --good: #1a7f37; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --card: #1d2126; --line: #363c44; --text: #e6e9ec;
  --dim: #98a2ad; --accent: #6cb2ff; --good: #57c278; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.25rem; margin-top: 2.2rem; } h3 { font-size: 1.05rem; }
a { color: var(--accent); } .dim { color: var(--dim); } .good { color: var(--good); } .bad { color: var(--bad); }
pre, code { font: 0.86em/1.5 ui-monospace, monospace; white-space: pre-wrap; }
pre { background: var(--card); padding: 0.6rem 0.8rem; border-radius: 6px; margin: 0.5rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 0.8rem; margin: 0.8rem 0; }
.card pre { background: var(--back); }
.grid { display: grid; gap: 0.8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; overflow-wrap: break-word; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } th { color: var(--dim); font-weight: 600; }
img, svg { max-width: 100%; height: auto; } svg { fill: currentColor; }
img.picture { image-rendering: pixelated; border-radius: 4px; }
"""

# What matplotlib would add to each plot: two links and a date, 1 kB.
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def page(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """The whole document; `body` is markup, `style` and `script` what this page needs beyond the common style."""
    script = f"<script>{script}</script>" if script else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}{style}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n{script}</body></html>\n"
    )


class Cell(NamedTuple):
    """A cell of a table with a class of the common style: "good", "bad" or "dim"."""

    text: Any
    kind: str = ""


def _cell(cell: Any) -> str:
    if isinstance(cell, Cell) and cell.kind:
        return f'<td class="{cell.kind}">{escape(str(cell.text))}</td>'
    return f"<td>{escape(str(cell.text if isinstance(cell, Cell) else cell))}</td>"


def write_page(path: Path, document: str) -> None:
    """Write or replace a page: a reader sees the old one or the new. ValueError where the folder does not exist."""
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}; make it or name another")
    new = path.with_name(f".{path.name}.new")
    new.write_text(document, encoding="utf-8")
    new.replace(path)


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of texts, numbers and `Cell`s, which are escaped."""
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    lines = ("".join(map(_cell, row)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def picture(source: bytes | np.ndarray | Image.Image, *, most: int = 320, alt: str = "") -> str:
    """A picture as an <img> that holds its own data: a file's bytes, uint8[h, w, 3] or a Pillow image.

    One with a side over `most` pixels is shrunk. Raises what Pillow raises for bytes that are no picture.
    """
    if isinstance(source, bytes):
        source = Image.open(io.BytesIO(source))
    image = Image.fromarray(source) if isinstance(source, np.ndarray) else source.convert("RGB")
    image.thumbnail((most, most))
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="picture" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def plot(figure: Any, alt: str = "") -> str:
    """A matplotlib figure as inline SVG that fits the page's width; its texts stay texts, in the page's font."""
    # Only where a figure is shown: loading matplotlib takes a second.
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata=_NO_METADATA)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    return f'<div role="img" aria-label="{escape(alt)}">{svg}</div>'
