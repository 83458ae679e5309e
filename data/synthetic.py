"""The embedded default task: count coloured dots in small pictures, and one-step word problems, drawn from a seed.

Rests on Pillow. Two in three examples are a picture of a red and b blue dots with one of four questions; the third is
text. Held out means unseen: about a quarter of the number pairs of each kind of question come up in "test" only.

The hasty teacher is biased on purpose. It writes the right format and mostly sound steps, but it undercounts crowded
groups of dots, and stops one step early where it counts far. A model taught by it starts out with the format and with
that bias, and what the reward, which goes by the true `answer`, then corrects can be seen.
"""

import hashlib
import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw

from data.example import Example
from data.prompt import demonstration

SPLITS = ("train", "test")
TEACHERS = ("exact", "hasty")

SIDE = 32  # pixels, of a picture
CELL = 8  # pixels, of the grid; a cell holds at most one dot
RED, BLUE = (230, 40, 40), (50, 80, 235)

NAMES = ("Ann", "Ben", "Eva", "Mia", "Sam", "Tom")
OBJECTS = ("apple", "book", "coin", "pen")

# The probability that the hasty teacher sees n-1 dots where there are n, by n: from 4 dots on it is mostly wrong.
_UNDERCOUNT = (0.0, 0.05, 0.15, 0.35, 0.55, 0.65)
_SLIP = 0.6  # the probability that it stops one step early where it counts on, or back, by 3 or more


class _Kind(NamedTuple):
    """A kind of question about two numbers a and b."""

    limits: tuple[int, int]  # of a and b, both from 0
    ordered: bool  # a >= b, so that the difference is no negative number
    salt: int  # of the hash that holds pairs out
    answer: Callable[[int, int], int]
    question: str  # its text, or a template of it


# The salts were searched for, so that of each kind 22% to 27% of the pairs are held out, every answer is on both sides
# of the split (in training, where only one pair gives it, such as ten dots in total), and none is the answer of more
# than a quarter of the pairs held out, which bounds what a constant guess scores.
_PICTURES = {
    "red": _Kind((5, 5), False, 19, lambda a, b: a, "How many red dots are there?"),
    "blue": _Kind((5, 5), False, 6, lambda a, b: b, "How many blue dots are there?"),
    "total": _Kind((5, 5), False, 5067, lambda a, b: a + b, "How many dots are there in total?"),
    "more": _Kind((5, 5), True, 155, lambda a, b: a - b, "How many more red dots than blue dots?"),
}
_STORIES = {
    "gets": _Kind(
        (9, 5), False, 347054, lambda a, b: a + b, "{name} has {objects} and gets {b} more. How many {noun}s now?"
    ),
    "gives": _Kind(
        (9, 5), True, 67868, lambda a, b: a - b, "{name} has {objects} and gives away {b}. How many {noun}s now?"
    ),
}
_KINDS = _PICTURES | _STORIES


def is_held_out(kind: str, a: int, b: int) -> bool:
    """Whether this question about these numbers is asked in "test" only: about one pair in four, by a fixed hash."""
    digest = hashlib.sha256(f"{kind} {a} {b} {_KINDS[kind].salt}".encode()).digest()
    return digest[0] % 5 == 0


@cache
def pairs(kind: str, split: str) -> tuple[tuple[int, int], ...]:
    """Every (a, b) that a kind of question ("red", "blue", "total", "more", "gets", "gives") is asked about."""
    up_to_a, up_to_b = _KINDS[kind].limits
    numbers = itertools.product(range(up_to_a + 1), range(up_to_b + 1))
    both = [(a, b) for a, b in numbers if a >= b or not _KINDS[kind].ordered]
    return tuple((a, b) for a, b in both if is_held_out(kind, a, b) == (split == "test"))


def draw(a: int, b: int, rng: Random) -> bytes:
    """A PNG file of a red and b blue dots, each somewhere in a cell of its own, on light grey."""
    picture = Image.new("RGB", (SIDE, SIDE), (rng.randint(225, 255),) * 3)
    canvas = ImageDraw.Draw(picture)
    per_row = SIDE // CELL
    for i, cell in enumerate(rng.sample(range(per_row**2), a + b)):
        # Within pixels 0 .. 6 of the cell's 8, whatever is drawn: there is background between any two dots.
        x, y = (CELL * place + 3.5 + rng.uniform(-1.0, 1.0) for place in divmod(cell, per_row))
        radius = 2.0 * rng.uniform(0.8, 1.2)
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=RED if i < a else BLUE)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=0)  # uncompressed, the file does not depend on the build of zlib
    return file.getvalue()


def _reasoning(kind: str, a: int, b: int, answer: int) -> str:
    """What the teacher thinks aloud: it counts on, or back, until nothing is left, "3 red, 2 blue. 3+2=4+1=5+0".

    Small steps, each like many others, are what lets a model answer for numbers that it never saw together; a table of
    sums it would have to memorise.
    """
    if kind in ("red", "blue"):
        return f"{answer} {kind}."
    seen = f"{a} red, {b} blue. " if kind in _PICTURES else ""
    sign, step = ("+", 1) if kind in ("total", "gets") else ("-", -1)
    counted = range(a, answer + step, step)
    return seen + "=".join(f"{number}{sign}{b - abs(number - a)}" for number in counted)


def _hasty(kind: str, a: int, b: int, rng: Random) -> tuple[int, int, int]:
    """The a, b and answer that the hasty teacher writes down: it counts dots badly, and far in text."""
    if kind in _PICTURES:
        a, b = (count - (rng.random() < _UNDERCOUNT[count]) for count in (a, b))
        return a, b, _KINDS[kind].answer(a, b)
    answer = _KINDS[kind].answer(a, b)
    if rng.random() < _SLIP and b >= 3:
        answer += -1 if kind == "gets" else 1
    return a, b, answer


def _example(split: str, seed: int, index: int, teacher: str) -> Example:
    """Example `index` of a split: a function of its arguments alone, with the same picture for either teacher."""
    rng = Random(f"{split} {seed} {index}")  # of a text: seeding by its SHA-512, the same everywhere
    kinds = _STORIES if index % 3 == 2 else _PICTURES
    kind = rng.choice(list(kinds))
    a, b = rng.choice(pairs(kind, split))
    noun = rng.choice(OBJECTS)
    objects = f"{a} {noun}" if a == 1 else f"{a} {noun}s"
    answer = _KINDS[kind].answer(a, b)
    example = Example(
        id=f"{split}-{seed}-{index}",
        question=_KINDS[kind].question.format(name=rng.choice(NAMES), objects=objects, noun=noun, b=b),
        answer=str(answer),
        images=(draw(a, b, rng),) if kind in _PICTURES else (),
        answer_type="integer",
        reference=_reasoning(kind, a, b, answer),
        metadata={"kind": "image" if kind in _PICTURES else "text", "question": kind, "a": a, "b": b},
    )
    if teacher == "exact":
        return example
    a, b, answer = _hasty(kind, a, b, rng)
    shown = replace(example, reference=_reasoning(kind, a, b, answer), answer=str(answer))
    return replace(example, completions=(demonstration(shown),))


def synthetic(split: str, size: int, seed: int, *, teacher: str = "exact") -> list[Example]:
    """`size` examples of the "train" or "test" split; a longer list begins with a shorter one.

    Answer and reference are always true. With `teacher="hasty"` each example also has the one completion that the
    hasty teacher writes, often wrong: for supervised training, not for GRPO, which samples where none is given.
    Pictures are drawn afresh for every seed. Raises ValueError for an unknown split or teacher and a negative size.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if teacher not in TEACHERS:
        raise ValueError(f"teacher is {teacher!r}; it must be one of {', '.join(TEACHERS)}")
    if size < 0:
        raise ValueError(f"size is {size}; it must be 0 or more examples")
    return [_example(split, seed, index, teacher) for index in range(size)]
