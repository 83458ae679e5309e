"""What a told computation is made of, drawn twice: in the terminal by rich, and on a page.

A story is a list of chapters, and a chapter of blocks: paragraphs (str), formulas, tables, tokens, pictures, plots, and
the functions that computed its numbers, whose file and line are looked up as they are now.
"""

import inspect
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from grpo.pages import page
from grpo.pages.page import Cell

PROJECT = Path(__file__).resolve().parents[2]


class Formula(NamedTuple):
    text: str
    source: str = ""


class Table(NamedTuple):
    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]  # of texts, numbers and `Cell`s


class Tokens(NamedTuple):
    """A completion, its tokens tinted by what became of their probability."""

    label: str
    pieces: Sequence[str]
    ratio: np.ndarray  # of each token; above 1 it has grown likelier
    clipped: np.ndarray


class Picture(NamedTuple):
    pixels: np.ndarray  # uint8[h, w, 3]
    alt: str


class Plot(NamedTuple):
    """For the page only."""

    figure: Figure
    alt: str


class Code(NamedTuple):
    functions: Sequence[Callable]  # what computed the numbers of the chapter


class Chapter(NamedTuple):
    title: str
    blocks: list


def where(function: Callable) -> str:
    """The file and line of a function, as it is now: "grpo/algorithm.py:54 group_advantages"."""
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    line = first + next(i for i, text in enumerate(lines) if text.lstrip().startswith("def "))
    path = Path(inspect.getsourcefile(function)).resolve().relative_to(PROJECT)
    return f"{path.as_posix()}:{line} {function.__qualname__}"


def rich_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> RichTable:
    styles = {"good": "green", "bad": "red", "dim": "dim", "": ""}
    drawn = RichTable(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for heading, first in zip(headings, rows[0], strict=True):
        text = str(first.text if isinstance(first, Cell) else first)
        is_number = text.lstrip("+-").rstrip("%").replace(".", "").isdigit()
        drawn.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        cells = (cell if isinstance(cell, Cell) else Cell(cell) for cell in row)
        drawn.add_row(*(Text(str(cell.text), styles[cell.kind]) for cell in cells))
    return drawn


def half_blocks(pixels: np.ndarray) -> Text:
    """A picture in coloured characters, two pixels in each, at most 48 of them wide."""
    step = -(-max(pixels.shape[:2]) // 48)
    shown = pixels[::step, ::step]
    picture = Text(no_wrap=True)
    for upper, lower in zip(shown[::2], shown[1::2], strict=False):
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            picture.append("▀", f"rgb({','.join(map(str, above))}) on rgb({','.join(map(str, below))})")
        picture.append("\n")
    return picture


def in_terminal(block: Any) -> Any:
    """A block as rich prints it; None for what only a page can show."""
    match block:
        case str():
            return Text(block)
        case Formula(text, source):
            lines = [Text(text, "bold"), *([Text(source, "dim")] if source else [])]
            return Padding(Group(*lines), (0, 0, 0, 4))
        case Table(headings, rows):
            return rich_table(headings, rows)
        case Tokens(label, pieces, ratio, clipped):
            line = Text()
            for piece, rho, beyond in zip(pieces, ratio, clipped, strict=True):
                style = "green" if rho > 1.02 else "red" if rho < 0.98 else ""
                line.append(piece, f"{style} underline" if beyond else style)
            return Group(Text(f"{label} (underlined: clipped)"), Padding(line, (0, 0, 0, 4)))
        case Picture(pixels, _):
            return half_blocks(pixels)
        case Code(functions):
            return Text("\n".join(f"→ {where(function)}" for function in functions), "cyan")
        case Plot():
            return None


def show(story: list[Chapter], console: Console) -> None:
    """Print the story; colour is the console's to decide."""
    for chapter in story:
        if chapter.title:
            console.print(Panel(Text(chapter.title, "bold"), border_style="dim"))
        for block in chapter.blocks:
            drawn = in_terminal(block)
            if isinstance(block, Picture) and (console.no_color or not console.is_terminal):
                drawn = Text(f"[{block.alt}]")
            if drawn is not None:
                console.print(drawn)
                console.print()


_STYLE = """
.formula { background: var(--card); border-left: 3px solid var(--accent); padding: 0.4rem 0.8rem; margin: 0.5rem 0;
  font: 0.95em/1.6 ui-monospace, monospace; white-space: pre-wrap; }
.formula small { display: block; color: var(--dim); }
.tokens span { white-space: pre-wrap; border-radius: 3px; } .tokens .clipped { outline: 2px solid var(--accent); }
.tokens { font: 0.95em/1.9 ui-monospace, monospace; }
img.picture { width: 14rem; } details { margin: 0.3rem 0; } summary { color: var(--accent); cursor: pointer; }
summary code { font-size: 0.9em; } body { max-width: 54rem; }
"""


def tinted(piece: str, ratio: float, is_clipped: bool) -> str:
    """A token with a background as strong as its log-ratio."""
    tone = "good" if ratio > 1 else "bad"
    share = min(60.0, 150.0 * abs(np.log(ratio)))
    frame = ' class="clipped"' if is_clipped else ""
    colour = f"color-mix(in srgb, var(--{tone}) {share:.0f}%, transparent)"
    return f'<span{frame} style="background: {colour}" title="ρ = {ratio:.4f}">{escape(piece)}</span>'


def unfolded(function: Callable) -> str:
    """Where a function stands, which opens to its code."""
    code = inspect.getsource(inspect.unwrap(function))
    return f"<details><summary><code>{escape(where(function))}</code></summary><pre>{escape(code)}</pre></details>"


def on_page(block: Any) -> str:
    """A block as HTML."""
    match block:
        case str():
            return f"<p>{escape(block)}</p>"
        case Formula(text, source):
            source = f"<small>{escape(source)}</small>" if source else ""
            return f'<div class="formula">{escape(text)}{source}</div>'
        case Table(headings, rows):
            return page.table(headings, rows)
        case Tokens(label, pieces, ratio, clipped):
            spans = "".join(map(tinted, pieces, ratio.tolist(), clipped.tolist()))
            return f'<p>{escape(label)} <span class="dim">(framed: clipped)</span></p><p class="tokens">{spans}</p>'
        case Picture(pixels, alt):
            return page.picture(pixels, alt=alt)
        case Code(functions):
            return "".join(map(unfolded, functions))
        case Plot(figure, alt):
            return page.plot(figure, alt)


def as_page(title: str, story: list[Chapter]) -> str:
    """The story as one self-contained HTML page."""
    chapters = []
    for chapter in story:
        heading = f"<h2>{escape(chapter.title)}</h2>" if chapter.title else ""
        chapters.append(f"<section>{heading}{''.join(map(on_page, chapter.blocks))}</section>")
    return page.page(title, "\n".join(chapters), style=_STYLE)
