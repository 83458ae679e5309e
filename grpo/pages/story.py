"""The parts of a story about a computation. It is shown twice: in the terminal by rich, and on a page.

A story is a list of chapters, and a chapter is a list of blocks: paragraphs (str), formulas, tables, tokens, images,
plots, and the functions that computed its numbers, whose file and line are looked up when the story is shown.
"""

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console, Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from grpo.pages.page import Cell, render

PROJECT = Path(__file__).resolve().parents[2]


class Formula(NamedTuple):
    text: str
    source: str = ""


class Table(NamedTuple):
    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]  # of texts, numbers and `Cell`s


class Tokens(NamedTuple):
    """A completion whose tokens are tinted by how their probability changed."""

    label: str
    pieces: Sequence[str]
    ratio: np.ndarray  # of each token; above 1 the token has grown likelier
    clipped: np.ndarray

    def tinted(self) -> Iterator[tuple[str, str, float, bool]]:
        """Each token with a background as strong as its log-ratio, its ratio, and whether it was clipped."""
        for piece, ratio, clipped in zip(self.pieces, self.ratio.tolist(), self.clipped.tolist(), strict=True):
            tone, share = "good" if ratio > 1 else "bad", min(60.0, 150.0 * abs(np.log(ratio)))
            yield piece, f"color-mix(in srgb, var(--{tone}) {share:.0f}%, transparent)", ratio, clipped


class Image(NamedTuple):
    pixels: np.ndarray  # uint8[h, w, 3]
    alt: str


class Plot(NamedTuple):
    """For the page only."""

    figure: Any  # of matplotlib
    alt: str


class Code(NamedTuple):
    functions: Sequence[Callable]  # what computed the numbers of the chapter

    def named(self) -> list[tuple[str, str]]:
        """The file and line of each function, and its source."""
        return [(where(function), inspect.getsource(inspect.unwrap(function))) for function in self.functions]


class Chapter(NamedTuple):
    title: str
    blocks: list


def _blocks(paragraph: str, values: Mapping[str, Any]) -> list:
    """The blocks that a paragraph of a story stands for."""
    lines = paragraph.splitlines()
    if re.fullmatch(r"\{\w+\}", paragraph) and not isinstance(found := values[paragraph[1:-1]], str):
        return found if isinstance(found, list) else [found]
    if paragraph.startswith("→ "):
        return [Code([pkgutil.resolve_name(line[2:]) for line in lines])]
    if paragraph.startswith("    "):
        formula, *source = (line.strip().removeprefix("| ").format_map(values) for line in lines)
        return [Formula(formula, *source)]
    return [" ".join(lines).format_map(values)]


def read_story(text: str, values: Mapping[str, Any]) -> list[Chapter]:
    """Read a story. In its text {name} stands for a value; as a paragraph of its own it may stand for blocks.

    "# " begins a chapter; an indented line is a formula; "| " below it begins its source; "→ " names a function.
    """
    chapters = [Chapter("", [])]
    for paragraph in text.strip("\n").split("\n\n"):
        if paragraph.startswith("# "):
            chapters.append(Chapter(paragraph[2:].format_map(values), []))
        else:
            chapters[-1].blocks.extend(_blocks(paragraph, values))
    return chapters


def where(function: Callable) -> str:
    """The file and line of a function, as it is now: "grpo/algorithm.py:54 group_advantages"."""
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    line = first + next(i for i, text in enumerate(lines) if text.lstrip().startswith("def "))
    path = Path(inspect.getsourcefile(function)).resolve().relative_to(PROJECT)
    return f"{path.as_posix()}:{line} {function.__qualname__}"


def rich_table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> RichTable:
    styles = {"good": "green", "bad": "red", "dim": "dim", "": ""}
    table = RichTable(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for heading, first in zip(headings, rows[0], strict=True):
        text = str(first.text if isinstance(first, Cell) else first)
        is_number = text.lstrip("+-").rstrip("%").replace(".", "").isdigit()
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        cells = (cell if isinstance(cell, Cell) else Cell(cell) for cell in row)
        table.add_row(*(Text(str(cell.text), styles[cell.kind]) for cell in cells))
    return table


def half_blocks(pixels: np.ndarray) -> Text:
    """An image in coloured characters, each of two pixels; a line has at most 48 characters."""
    step = -(-max(pixels.shape[:2]) // 48)
    shown, lines = pixels[::step, ::step].tolist(), []
    for upper, lower in zip(shown[::2], shown[1::2], strict=False):
        cells = zip(upper, lower, strict=True)
        styles = (f"rgb({r},{g},{b}) on rgb({u},{v},{w})" for (r, g, b), (u, v, w) in cells)
        lines.append(Text.assemble(*(("▀", style) for style in styles), no_wrap=True))
    return Text("\n").join(lines)


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
        case Image(pixels, _):
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
            shown = in_terminal(block)
            if isinstance(block, Image) and (console.no_color or not console.is_terminal):
                shown = Text(f"[{block.alt}]")
            if shown is not None:
                console.print(shown)
                console.print()


def as_page(title: str, story: list[Chapter]) -> str:
    """The story as one self-contained HTML page."""
    return render("story.html", title=title, story=story)
