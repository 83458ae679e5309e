"""Self-contained HTML pages from the templates beside this file: no network, no script but their own.

Built on Jinja, which escapes all text from models and datasets. Images and plots are part of the page itself.
"""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from PIL import Image

from gemma3.files.writing import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Cell(NamedTuple):
    """A cell of a table with a class of the common style: "good", "bad" or "dim"."""

    text: Any
    kind: str = ""


def image_tag(source: bytes | np.ndarray, *, alt: str) -> Markup:
    """An <img> that holds the data of an image, given as a file's bytes or uint8[h, w, 3].

    An image with a side over 320 pixels is shrunk. Bytes that are no image raise the error that Pillow raises.
    """
    opened = Image.open(io.BytesIO(source)).convert("RGB") if isinstance(source, bytes) else Image.fromarray(source)
    opened.thumbnail((320, 320))
    file = io.BytesIO()
    opened.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return Markup(f'<img class="image" alt="{escape(alt)}" src="data:image/png;base64,{data}">')


def new_figure(width: float, height: float, columns: int = 1) -> tuple["Figure", Any]:
    """A figure of so many inches and its axes, one or a row of several, without pyplot's global state."""
    # Loading matplotlib takes a second, which no other command should wait for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot(figure: "Figure", alt: str) -> Markup:
    """A matplotlib figure as inline SVG that fits the page's width; its texts stay texts, in the page's font."""
    from matplotlib import rc_context

    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # without it two links and a date, 1 kB
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata=no_metadata)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    return Markup(f'<div role="img" aria-label="{escape(alt)}">{svg}</div>')


def render(template: str, **values: Any) -> str:
    """A page made from a template in templates/ and the values that it shows."""
    folder = FileSystemLoader(Path(__file__).with_name("templates"))
    pages = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"image_tag": image_tag, "plot": plot}
    return pages.get_template(template).render(values)


def check_folder(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}; make it or name another")


def write_page(path: Path, document: str) -> None:
    """Write or replace a page. ValueError where the folder does not exist."""
    check_folder(path)
    replace_file(path, document.encode())
