"""The embedded default task: count coloured dots in small images, and one-step word problems, made from a seed.

Rests on Pillow. Two in three examples are an image of a red and b blue dots with one of four questions; the third is
text. Held out means unseen: for each kind of question, about a quarter of the number pairs come up in "test" only.

The hasty teacher is biased on purpose. It writes the right format and mostly sound steps, but it undercounts crowded
groups of dots and often stops a long count in text one step early. A model taught by it starts with the format and with
that bias. The reward knows the true `answer`, so the training can be seen to correct the bias.
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

SIDE = 32  # pixels, of an image
CELL = 8  # pixels, of the grid; a cell holds at most one dot
RED, BLUE = (230, 40, 40), (50, 80, 235)

NAMES = ("Ann", "Ben", "Eva", "Mia", "Sam", "Tom")
OBJECTS = ("apple", "book", "coin", "pen")

# For each n, the probability that the hasty teacher sees n-1 dots instead of n: from 4 dots on it is mostly wrong.
_UNDERCOUNT = (0.0, 0.05, 0.15, 0.35, 0.55, 0.65)
_SLIP = 0.6  # the probability that it stops one step early when it counts on, or back, by 3 or more


class _Kind(NamedTuple):
    """A kind of question about two numbers a and b."""

    limits: tuple[int, int]  # of a and b, both from 0
    ordered: bool  # a >= b, so that the difference is not negative
    salt: int  # of the hash that decides which pairs are held out
    answer: Callable[[int, int], int]
    question: str  # its text, or a template of it


# The salts were found by a search. For each kind, 22% to 27% of the pairs are held out; every answer is on both sides
# of the split (an answer that only one pair gives, such as ten dots in total, is in training); and no answer belongs to
# more than a quarter of the held-out pairs, which bounds the accuracy of a constant guess.
_IMAGES = {
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
_KINDS = _IMAGES | _STORIES


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


def draw_dots(a: int, b: int, rng: Random) -> bytes:
    """A PNG file of a red and b blue dots, each somewhere in a cell of its own, on light grey."""
    image = Image.new("RGB", (SIDE, SIDE), (rng.randint(225, 255),) * 3)
    canvas = ImageDraw.Draw(image)
    per_row = SIDE // CELL
    for i, cell in enumerate(rng.sample(range(per_row**2), a + b)):
        # Every dot stays within pixels 0 .. 6 of its cell's 8, so there is background between any two dots.
        x, y = (CELL * place + 3.5 + rng.uniform(-1.0, 1.0) for place in divmod(cell, per_row))
        radius = 2.0 * rng.uniform(0.8, 1.2)
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=RED if i < a else BLUE)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=0)  # uncompressed, the file does not depend on the build of zlib
    return file.getvalue()


def _reasoning(kind: str, a: int, b: int, answer: int) -> str:
    """The teacher's reasoning: it counts on, or back, until nothing is left, as in "3 red, 2 blue. 3+2=4+1=5+0".

    Small steps that are much alike let a model answer for numbers that it never saw together. Without them it would
    have to memorise a table of sums.
    """
    if kind in ("red", "blue"):
        return f"{answer} {kind}."
    seen = f"{a} red, {b} blue. " if kind in _IMAGES else ""
    sign, step = ("+", 1) if kind in ("total", "gets") else ("-", -1)
    counted = range(a, answer + step, step)
    return seen + "=".join(f"{number}{sign}{b - abs(number - a)}" for number in counted)


def _hasty(kind: str, a: int, b: int, rng: Random) -> tuple[int, int, int]:
    """The a, b and answer that the hasty teacher writes down: it miscounts dots and stops long counts in text early."""
    if kind in _IMAGES:
        a, b = (count - (rng.random() < _UNDERCOUNT[count]) for count in (a, b))
        return a, b, _KINDS[kind].answer(a, b)
    answer = _KINDS[kind].answer(a, b)
    if rng.random() < _SLIP and b >= 3:
        answer += -1 if kind == "gets" else 1
    return a, b, answer


def _example(split: str, seed: int, index: int, teacher: str) -> Example:
    """Example `index` of a split: a function of its arguments alone, with the same image for either teacher."""
    rng = Random(f"{split} {seed} {index}")  # a text seeds by its SHA-512, the same everywhere
    kinds = _STORIES if index % 3 == 2 else _IMAGES
    kind = rng.choice(list(kinds))
    a, b = rng.choice(pairs(kind, split))
    noun = rng.choice(OBJECTS)
    objects = f"{a} {noun}" if a == 1 else f"{a} {noun}s"
    answer = _KINDS[kind].answer(a, b)
    example = Example(
        id=f"{split}-{seed}-{index}",
        question=_KINDS[kind].question.format(name=rng.choice(NAMES), objects=objects, noun=noun, b=b),
        answer=str(answer),
        images=(draw_dots(a, b, rng),) if kind in _IMAGES else (),
        answer_type="integer",
        reference=_reasoning(kind, a, b, answer),
        metadata={"kind": "image" if kind in _IMAGES else "text", "question": kind, "a": a, "b": b},
    )
    if teacher == "exact":
        return example
    a, b, answer = _hasty(kind, a, b, rng)
    shown = replace(example, reference=_reasoning(kind, a, b, answer), answer=str(answer))
    return replace(example, completions=(demonstration(shown),))


def synthetic(split: str, size: int, seed: int, *, teacher: str = "exact") -> list[Example]:
    """`size` examples of the "train" or "test" split; a longer list begins with a shorter one.

    Answer and reference are always true. With `teacher="hasty"` each example also has the one completion that the
    hasty teacher writes, often a wrong one. Use it for supervised training only: GRPO samples if none is given.
    Every seed draws new images. Raises ValueError for an unknown split or teacher and a negative size.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if teacher not in TEACHERS:
        raise ValueError(f"teacher is {teacher!r}; it must be one of {', '.join(TEACHERS)}")
    if size < 0:
        raise ValueError(f"size is {size}; it must be 0 or more examples")
    return [_example(split, seed, index, teacher) for index in range(size)]
