"""reward/gsm8k.py: the strict and the flexible reading of lm-evaluation-harness."""

import pytest

from data.example import Example
from data.gsm8k import load
from reward.gsm8k import flexible_answer, is_correct, strict_answer


def truth(answer):
    return Example(id="1", question="q", answer=answer, answer_type="integer")


@pytest.mark.parametrize(
    ("completion", "strict", "flexible"),
    [
        ("2 + 2 = 4\n#### 4", "4", "4"),
        ("#### 4 or #### 5", "4", "5"),
        ("#### $18", None, "$18"),
        ("2+3=5. (Step 4)", None, "4"),
        ("10-7", None, "-7"),
        ("It costs $1,080.", None, "$1,080."),
        ("none at all", None, None),
    ],
)
def test_values_are_read_by_the_harness_rules(completion, strict, flexible):
    assert strict_answer(completion) == strict
    assert flexible_answer(completion) == flexible


def test_strict_reads_the_answer_block_of_our_formats():
    assert strict_answer("<reasoning>1</reasoning><answer> 4 </answer>", "answer") == "4"
    assert strict_answer("<SOLUTION>4</SOLUTION>", "solution") == "4"
    assert strict_answer("<answer>4", "answer") is None
    assert strict_answer("#### 4", "answer") is None


@pytest.mark.parametrize(
    ("value", "answer", "correct"),
    [
        ("$1,080.", "1080", True),
        ("18.,", "18", True),
        ("18.0", "18", False),
        ("-3", "3", False),
        (None, "3", False),
    ],
)
def test_values_are_compared_as_cleaned_text(value, answer, correct):
    assert is_correct(value, truth(answer)) is correct


def test_the_published_solutions_are_right_by_their_marker(shared_data):
    for example in load(shared_data / "gsm8k", "test"):
        completion = f"{example.reference}\n#### {example.answer}"
        assert is_correct(strict_answer(completion), example) and is_correct(flexible_answer(completion), example)
