"""The output format: one block of each, in order, and what the answer block says."""

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.example import Example
from reward.format import format_reward, graded_format_reward, read_answer, read_reasoning

EXAMPLE = Example(id="1", question="How many?", answer="42", answer_type="integer")
GOOD = "<reasoning>2 * 21</reasoning>\n<answer> 42 </answer>\n"
PIECES = st.sampled_from(["<reasoning>", "</reasoning>", "<answer>", "</answer>", "x", " ", "\n", "<", "answer>"])


def test_format_ok_of_every_reward_case(shared_data):
    """`format_ok` is exact on all 207 hand-written cases."""
    cases = [json.loads(line) for line in (shared_data / "reward_cases.jsonl").open(encoding="utf-8")]
    formats = {"lower": "answer", "upper": "solution"}
    wrong = [
        case["id"]
        for case in cases
        if format_reward(case["completion"], EXAMPLE, formats[case["tags"]]) != float(case["format_ok"])
    ]
    assert len(cases) == 207
    assert wrong == []


@pytest.mark.parametrize(
    ("completion", "ok", "graded", "answer"),
    [
        (GOOD, 1, 2, "42"),
        ("\n\t" + GOOD + " ", 1, 2, "42"),
        (GOOD + "Done!", 0, 2, "42"),
        ("So: " + GOOD, 0, 2, "42"),
        ("<reasoning>a</reasoning> and <answer>42</answer>", 0, 2, "42"),
        ("<answer>42</answer>", 0, 1, "42"),
        ("<reasoning>a</reasoning>", 0, 1, None),
        ("<answer>42</answer><reasoning>a</reasoning>", 0, 2, "42"),
        ("<reasoning>a <answer>42</answer></reasoning>", 0, 1, None),
        ("<reasoning>a <answer>42</answer>", 0, 0, None),
        ("<reasoning>a</reasoning><answer>42</answer><answer>42</answer>", 0, 1, None),
        ("<reasoning> </reasoning><answer>42</answer>", 0, 1, "42"),
        ("<reasoning>a</reasoning><answer>\n</answer>", 0, 1, None),
        ("<reasoning>a</reasoning></answer>42<answer>", 0, 1, None),
        ("<reasoning>a</reasoning><reasoning>b</reasoning><answer>42</answer>", 0, 1, "42"),
        ("a < b</reasoning> <answer>42</answer>", 0, 1, "42"),
        ("<reasoning>1 < 2 << 3</reasoning><answer>x < 3</answer>", 1, 2, "x < 3"),
        ("<Reasoning>a</Reasoning><Answer>42</Answer>", 0, 0, None),
        ("", 0, 0, None),
    ],
)
def test_format_by_hand(completion, ok, graded, answer):
    assert format_reward(completion, EXAMPLE) == ok
    assert graded_format_reward(completion, EXAMPLE) == graded
    assert read_answer(completion) == answer


def test_the_other_tags():
    completion = "<REASONING>a</REASONING><SOLUTION>7</SOLUTION>"
    assert format_reward(completion, EXAMPLE, "solution") == 1
    assert read_answer(completion, "solution") == "7"
    assert read_reasoning(completion, "solution") == "a"
    assert format_reward(completion, EXAMPLE, "answer") == 0


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(ValueError, match="'xml' is unknown: choose one of answer, solution"):
        format_reward("", EXAMPLE, "xml")


@given(st.lists(PIECES, max_size=12).map("".join))
def test_blocks_are_those_a_regular_expression_finds(completion):
    """The oracle: count the tags, then match the whole text. Slow on long texts, but obviously right on short ones."""
    tags = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
    pattern = r"\s*<reasoning>(.*)</reasoning>\s*<answer>(.*)</answer>\s*"
    match = re.fullmatch(pattern, completion, re.DOTALL)
    once = all(completion.count(tag) == 1 for tag in tags)
    expected = bool(once and match and match[1].strip() and match[2].strip())
    assert format_reward(completion, EXAMPLE) == expected
    if expected:
        assert (read_reasoning(completion), read_answer(completion)) == (match[1].strip(), match[2].strip())


@pytest.mark.parametrize(
    "piece", ["x", "9", " ", "e", "<", "<reasonin", "</answer", "<answer>", "<reasoning>", "\u2003"]
)
@pytest.mark.parametrize("place", ["{0}", "<reasoning>{0}</reasoning><answer>42</answer>", GOOD + "{0}"])
def test_ten_megabytes_in_under_50_ms(piece, place):
    completion = place.format(piece * (10_000_000 // len(piece)))
    for part in (format_reward, graded_format_reward):
        assert min(_seconds(part, completion) for _ in range(3)) < 0.05


def _seconds(part, completion):
    start = time.perf_counter()
    part(completion, EXAMPLE)
    return time.perf_counter() - start
