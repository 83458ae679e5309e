"""grpo.pages.story: every kind of block, in the terminal and on the page."""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from grpo.pages import story
from grpo.pages.page import Cell
from grpo.update import update

PROJECT = Path(__file__).parents[1]
BLOCKS = [
    "a < b & c",
    story.Formula("x = 1 < 2", "a paper, equation 3"),
    story.Table(("name", "number"), [("a & b", Cell("+1.5", "good")), ("c", Cell(2))]),
    story.Tokens("row 1", ["<b>", " is", " 3"], np.array([1.0, 1.5, 0.5]), np.array([False, False, True])),
    story.Image(np.full((4, 3, 3), 7, np.uint8), "a grey image"),
    story.Plot(Figure(), "an empty plot"),
    story.Code([update]),
]


def printed(blocks, **console):
    file = io.StringIO()
    story.show([story.Chapter("Title", blocks)], Console(file=file, width=100, highlight=False, **console))
    return file.getvalue()


def test_where_sees_through_jit_and_decorators():
    file, line = story.where(update).split()[0].split(":")
    assert file == "grpo/update.py"
    assert (PROJECT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1].startswith("def update(")


def test_an_image_in_a_terminal_has_the_images_colours():
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 1] = (230, 40, 40)
    drawn = story.half_blocks(pixels)
    assert drawn.plain == "▀▀▀"
    assert [str(span.style) for span in drawn.spans][1] == "rgb(230,40,40) on rgb(0,0,0)"


def test_every_kind_of_block_is_printed_as_plain_text_where_there_is_no_terminal():
    text = printed(BLOCKS)
    assert "\x1b" not in text
    for part in ("a < b & c", "x = 1 < 2", "a paper, equation 3", "a & b", "+1.5", "<b> is 3", "[a grey image]"):
        assert part in text
    assert f"→ {story.where(update)}" in text and "empty plot" not in text


def test_a_terminal_gets_colours_by_what_became_of_a_token():
    text = printed([BLOCKS[3]], force_terminal=True, color_system="standard")
    assert "\x1b[32m is\x1b[0m" in text and "\x1b[4;31m 3\x1b[0m" in text and "\x1b[31m<b>" not in text


def test_an_image_is_drawn_only_where_there_is_colour():
    assert printed([BLOCKS[4]], force_terminal=True).count("▀") == 2 * 3  # 4 rows of pixels, 3 columns
    assert "▀" not in printed([BLOCKS[4]], force_terminal=True, no_color=True)


def test_columns_of_numbers_are_right_aligned_and_texts_left():
    lines = printed([story.Table(("text", "number"), [("a", "1.25"), ("bcd", "-10.5%")])]).splitlines()
    first, second = (next(line for line in lines if line.startswith(start)) for start in ("a ", "bcd"))
    assert first.rstrip().endswith("  1.25") and len(first.rstrip()) == len(second.rstrip())


def test_every_kind_of_block_is_on_the_page_and_its_text_is_escaped():
    page = story.as_page("A & B", [story.Chapter("One < Two", BLOCKS)])
    for part in (
        *("<h1>A &amp; B</h1>", "<h2>One &lt; Two</h2>", "<p>a &lt; b &amp; c</p>", "x = 1 &lt; 2"),
        *("<td>a &amp; b</td>", '<td class="good">+1.5</td>', "<td>2</td>", "&lt;b&gt;", 'alt="a grey image"'),
        *('aria-label="an empty plot"', "<svg", f"<code>{story.where(update)}</code>", "def update("),
    ):
        assert part in page


@pytest.mark.parametrize(("ratio", "tone", "share"), [(1.0, "bad", 0), (1.1, "good", 14), (0.5, "bad", 60)])
def test_a_tokens_background_is_as_strong_as_its_log_ratio(ratio, tone, share):
    tokens = story.Tokens("", ["x", "x"], np.array([ratio, ratio]), np.array([False, True]))
    free, clipped = re.findall("<span.*?>x</span>", story.as_page("", [story.Chapter("", [tokens])]))
    assert f"var(--{tone}) {share}%" in free and f"var(--{tone}) {share}%" in clipped
    assert 'class="clipped"' in clipped and "clipped" not in free


TEXT = """
The opening, of {count} lines
in a paragraph.

# 1. About {who.name}

{block}

    x = {count} < 2
    | a paper, equation {count}

Text with {numbers[half]:+.2f} in it,

{text}

# 2. The end

    y  =  3

{blocks}

→ grpo.update.update
→ grpo.pages.story.Code.named
"""


def test_a_story_is_read_from_text_with_its_values_filled_in():
    """A value that stands alone is a block, or several, or text; a value is never read for placeholders itself."""
    table, code = BLOCKS[2], BLOCKS[6]
    values = {"count": 2, "who": SimpleNamespace(name="{a} <b>"), "numbers": {"half": 0.5}, "text": "{count}"}
    opening, first, second = story.read_story(TEXT, values | {"block": table, "blocks": [code, table, "more"]})
    assert opening == ("", ["The opening, of 2 lines in a paragraph."])
    assert first.title == "1. About {a} <b>"
    assert first.blocks == [
        table,
        story.Formula("x = 2 < 2", "a paper, equation 2"),
        "Text with +0.50 in it,",
        "{count}",
    ]
    functions = story.Code([update, story.Code.named])
    assert second == ("2. The end", [story.Formula("y  =  3"), code, table, "more", functions])


def test_a_value_that_is_not_given_is_named():
    for text in ("the {missing}", "{missing}", "# {missing}", "    x = {missing}"):
        with pytest.raises(KeyError, match="missing"):
            story.read_story(text, {})
