"""The embedded task: unseen combinations, true answers, images that show what they should, a teacher with a bias."""

import io
import re
from collections import Counter, defaultdict
from random import Random

import numpy as np
import pytest
from PIL import Image

from data.prompt import demonstration
from data.synthetic import draw_dots, is_held_out, pairs, synthetic

IMAGE_KINDS = ("red", "blue", "total", "more")
TEXT_KINDS = ("gets", "gives")
KINDS = IMAGE_KINDS + TEXT_KINDS
ANSWER = {
    "red": lambda a, b: a,
    "blue": lambda a, b: b,
    "total": lambda a, b: a + b,
    "more": lambda a, b: a - b,
    "gets": lambda a, b: a + b,
    "gives": lambda a, b: a - b,
}

SIGN = {"total": "+", "more": "-", "gets": "+", "gives": "-"}


@pytest.fixture(scope="module")
def train():
    return synthetic("train", 4001, 5, teacher="hasty")


@pytest.fixture(scope="module")
def test():
    return synthetic("test", 1999, 5)


def combination(example) -> tuple[str, int, int]:
    return tuple(example.metadata[key] for key in ("question", "a", "b"))


def said(completion: str) -> tuple[str, int]:
    """The reasoning and the answer of a completion, which is nothing but these two in their tags."""
    match = re.fullmatch(r"<reasoning>([^<>]+)</reasoning>\s*<answer>(-?\d+)</answer>", completion)
    return match[1], int(match[2])


def counted(reasoning: str) -> tuple[str, str]:
    """The first and the last term of the counting at the end of a reasoning: "3+2" and "5+0" of "3+2=4+1=5+0".

    Each term must be worth as much as the one before, and have one step less to go.
    """
    terms = reasoning.split()[-1].split("=")
    parts = [re.fullmatch(r"(-?\d+)([+-])(\d+)", term).groups() for term in terms]
    to_go = [int(rest) for _, _, rest in parts]
    assert to_go == list(range(to_go[0], to_go[-1] - 1, -1))
    assert len({int(number) + int(sign + rest) for number, sign, rest in parts}) == 1
    return terms[0], terms[-1]


def several_dots(examples) -> set[bytes]:
    """The images of three dots or more: of images with fewer dots there are so few that some recur by chance."""
    return {e.images[0] for e in examples if e.images and e.metadata["a"] + e.metadata["b"] > 2}


def count_dots(png: bytes) -> tuple[int, int]:
    """The numbers of red and of blue dots, counted as connected regions of one colour."""
    pixels = np.asarray(Image.open(io.BytesIO(png))).astype(int)
    red = (pixels[..., 0] > 200) & (pixels[..., 1] < 100)
    blue = (pixels[..., 2] > 200) & (pixels[..., 1] < 100)
    return number_of_regions(red), number_of_regions(blue)


def number_of_regions(mask: np.ndarray) -> int:
    left = {tuple(place) for place in np.argwhere(mask)}
    regions = 0
    while left:
        regions += 1
        reached = [left.pop()]
        while reached:
            y, x = reached.pop()
            neighbours = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= neighbours
            reached += neighbours
    return regions


def test_no_combination_is_in_both_splits(train, test):
    assert not {combination(e) for e in train} & {combination(e) for e in test}


@pytest.mark.parametrize("kind", KINDS)
def test_about_a_quarter_of_the_pairs_is_held_out(kind):
    """Every pair is on one side, 22% to 27% in test. The choice is fixed: shipped weights must not have seen these."""
    both = pairs(kind, "train") + pairs(kind, "test")
    up_to_a, up_to_b = (5, 5) if kind in IMAGE_KINDS else (9, 5)
    ordered = kind in ("more", "gives")
    assert sorted(both) == [(a, b) for a in range(up_to_a + 1) for b in range(up_to_b + 1) if a >= b or not ordered]
    sizes = {"red": (8, 36), "blue": (8, 36), "total": (9, 36), "more": (5, 21), "gets": (15, 60), "gives": (12, 45)}
    assert (len(pairs(kind, "test")), len(both)) == sizes[kind]
    assert all(is_held_out(kind, a, b) for a, b in pairs(kind, "test"))
    first_held_out = {
        "red": ((0, 0), (1, 2), (2, 4)),
        "blue": ((0, 5), (1, 1), (2, 1)),
        "total": ((0, 2), (1, 0), (1, 2)),
        "more": ((2, 1), (3, 0), (3, 3)),
        "gets": ((0, 1), (0, 3), (1, 1)),
        "gives": ((1, 0), (2, 2), (3, 1)),
    }
    assert pairs(kind, "test")[:3] == first_held_out[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_in_both_splits(kind):
    """Except one that only one pair gives: it is in training. No answer is that of more than 1/4 of the test pairs."""
    answers = {split: Counter(ANSWER[kind](a, b) for a, b in pairs(kind, split)) for split in ("train", "test")}
    single = {answer for answer, count in (answers["train"] + answers["test"]).items() if count == 1}
    assert set(answers["train"]) == set(answers["train"] + answers["test"])
    assert set(answers["test"]) == set(answers["train"]) - single
    assert single == {"red": set(), "blue": set(), "total": {0, 10}, "more": {5}, "gets": {0, 14}, "gives": {9}}[kind]
    assert max(answers["test"].values()) <= 0.25 * answers["test"].total()


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_count_is_in_both_splits(split):
    """Each number of red and of blue dots, 0 to 5, is shown on either side, and so is each operand in text."""
    for kinds, up_to_a, up_to_b in ((IMAGE_KINDS, 5, 5), (TEXT_KINDS, 9, 5)):
        shown = [pair for kind in kinds for pair in pairs(kind, split)]
        assert {a for a, _ in shown} == set(range(up_to_a + 1))
        assert {b for _, b in shown} == set(range(up_to_b + 1))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_combination_is_drawn_about_equally_often(split, request):
    """Two images for one text, then all kinds equally often, then all pairs of a kind: within 5 standard deviations."""
    examples = request.getfixturevalue(split)
    size = len(examples)
    assert sum(e.metadata["kind"] == "text" for e in examples) == size // 3
    counts = Counter(combination(e) for e in examples)
    for kind in KINDS:
        # Two thirds shared by four kinds, one third by two: a sixth of the examples for each kind.
        each = size / 6 / len(pairs(kind, split))
        for a, b in pairs(kind, split):
            assert abs(counts[kind, a, b] - each) < 5 * each**0.5 + 1


def test_answers_are_true(train, test):
    """Answer and reference agree with the numbers of the example; the question names them in a text problem only."""
    for example in train + test:
        kind, a, b = combination(example)
        answer = ANSWER[kind](a, b)
        assert example.answer == str(answer) and example.answer_type == "integer"
        assert example.metadata["kind"] == ("image" if kind in IMAGE_KINDS else "text")
        assert re.findall(r"\d+", example.question) == ([str(a), str(b)] if kind in TEXT_KINDS else [])
        reasoning, given = said(demonstration(example))
        assert given == answer and reasoning == example.reference
        if kind in ("red", "blue"):
            assert reasoning == f"{answer} {kind}."
        else:
            sign = SIGN[kind]
            assert counted(reasoning) == (f"{a}{sign}{b}", f"{answer}{sign}0")
            assert reasoning.startswith(f"{a} red, {b} blue. ") == (kind in IMAGE_KINDS)


def test_wording():
    """One example of each kind, word for word."""
    found = {}
    for example in synthetic("train", 60, 0):
        found.setdefault(example.metadata["question"], example)
    assert {kind: (e.question, e.reference) for kind, e in found.items()} == {
        "red": ("How many red dots are there?", "0 red."),
        "blue": ("How many blue dots are there?", "5 blue."),
        "total": ("How many dots are there in total?", "3 red, 2 blue. 3+2=4+1=5+0"),
        "more": ("How many more red dots than blue dots?", "1 red, 1 blue. 1-1=0-0"),
        "gets": ("Ann has 3 coins and gets 2 more. How many coins now?", "3+2=4+1=5+0"),
        "gives": ("Ben has 9 coins and gives away 4. How many coins now?", "9-4=8-3=7-2=6-1=5-0"),
    }


def test_one_is_singular():
    questions = {e.question for e in synthetic("train", 3000, 1) if e.metadata["kind"] == "text"}
    assert any(" has 1 book " in question for question in questions)
    assert not any(" has 1 books " in question for question in questions)


def test_images_show_the_dots(test):
    """Counting the coloured regions of 300 images gives a and b: dots neither touch nor leave the image."""
    images = [e for e in test if e.images][:300]
    for example in images:
        assert count_dots(example.images[0]) == (example.metadata["a"], example.metadata["b"])


def test_crowded_images_fit():
    """Ten dots, drawn 200 times, stay ten separate regions of a 32 x 32 RGB image."""
    for seed in range(200):
        png = draw_dots(5, 5, Random(seed))
        image = Image.open(io.BytesIO(png))
        assert (image.size, image.mode, image.format) == ((32, 32), "RGB", "PNG")
        assert count_dots(png) == (5, 5)


def test_texts_have_no_image(train):
    assert all(len(e.images) == (e.metadata["kind"] == "image") for e in train)


def test_same_seed_same_bytes(train):
    """A longer list begins with the shorter one of its seed, byte for byte, for any teacher; another seed differs."""
    again = synthetic("train", 100, 5, teacher="hasty")
    assert again == train[:100]
    exact = synthetic("train", 100, 5)
    assert [(e.question, e.answer, e.images) for e in exact] == [(e.question, e.answer, e.images) for e in again]
    assert not several_dots(synthetic("train", 1000, 6)) & several_dots(train)


def test_no_image_is_in_both_splits(train, test):
    """Except images of 0 to 2 dots, of which there are only few. No image comes twice in a split either."""
    assert not several_dots(train) & several_dots(test)
    several = [e for e in train if e.images and e.metadata["a"] + e.metadata["b"] > 2]
    assert len(several_dots(train)) == len(several)


def test_one_image_is_fixed():
    """The pixel rows of an image with one red and one blue dot: a change of what a seed draws is noticed here."""
    pixels = np.asarray(Image.open(io.BytesIO(draw_dots(1, 1, Random(0)))))
    letters = {(230, 40, 40): "r", (50, 80, 235): "b", (252, 252, 252): "."}
    rows = ["".join(letters[tuple(pixel)] for pixel in row) for row in pixels.tolist()]
    assert rows == [
        "..........................rrrr..",
        *[".........................rrrrrr."] * 3,
        "..........................rrrr..",
        *["................................"] * 21,
        "..........................bbb...",
        *[".........................bbbbb.."] * 3,
        "..........................bbb...",
        "................................",
    ]


def test_ids_are_unique_and_stable(train, test):
    ids = [e.id for e in train + test + synthetic("test", 50, 6)]
    assert len(set(ids)) == len(ids)
    assert [e.id for e in synthetic("test", 2, 7)] == ["test-7-0", "test-7-1"]


def test_the_exact_teacher_leaves_completions_to_the_policy(test):
    assert all(e.completions == () for e in test)


def test_the_hasty_teacher_undercounts(train):
    """It reports n or n-1 dots, at the documented rates within five standard deviations; from there it counts right."""
    reports = defaultdict(list)
    for example in (e for e in train if e.images):
        kind, a, b = combination(example)
        reasoning, answer = said(example.completions[0])
        counts = {colour: int(n) for n, colour in re.findall(r"(\d+) (red|blue)", reasoning)}
        assert answer == ANSWER[kind](counts.get("red"), counts.get("blue"))
        if kind in ("total", "more"):
            sign = SIGN[kind]
            assert counted(reasoning) == (f"{counts['red']}{sign}{counts['blue']}", f"{answer}{sign}0")
        for colour, n in counts.items():
            true = a if colour == "red" else b
            assert true - n in (0, 1)
            reports[true].append(true - n)
    for n, rate in enumerate((0.0, 0.05, 0.15, 0.35, 0.55, 0.65)):
        assert abs(np.mean(reports[n]) - rate) <= 5 * (rate * (1 - rate) / len(reports[n])) ** 0.5


def test_the_hasty_teacher_stops_early_in_text_problems(train):
    """It counts b steps from a, but one step less in 60% of the problems with b of 3 or more, and answers that."""
    slips = []
    for example in (e for e in train if not e.images):
        kind, a, b = combination(example)
        reasoning, answer = said(example.completions[0])
        first, last = counted(reasoning)
        assert " " not in reasoning and first == f"{a}{SIGN[kind]}{b}"
        number, missing = map(int, last.split(SIGN[kind]))
        assert number == answer
        if b >= 3:
            assert missing in (0, 1)
            slips.append(missing)
        else:
            assert missing == 0
    assert abs(np.mean(slips) - 0.6) < 5 * (0.24 / len(slips)) ** 0.5


def test_the_hasty_teacher_is_right_about_two_times_in_three(train):
    """So a model taught by it starts with room to learn."""
    right = np.mean([said(e.completions[0])[1] == int(e.answer) for e in train])
    assert 0.55 < right < 0.72


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("all", 3, 0), "split is 'all'; it must be one of train, test"),
        (("train", -1, 0), "size is -1; it must be 0 or more"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        synthetic(*arguments)


def test_an_unknown_teacher_is_named():
    with pytest.raises(ValueError, match="teacher is 'bad'; it must be one of exact, hasty"):
        synthetic("train", 1, 0, teacher="bad")
