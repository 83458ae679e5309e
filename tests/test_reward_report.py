"""Figures against numbers worked by hand, and against the counts that MathVista's authors publish."""

import io
import math
import re

import pytest
from rich.console import Console

from data.example import Example
from data.mathvista import load
from reward.report import (
    Result,
    by_metadata,
    completion_is_correct,
    figure,
    gsm8k_figures,
    over_samples,
    preference_accuracy,
    score_mathvista,
    spoken,
    summary,
    table,
)
from reward.statistics import wilson_interval

CHOICE = Example("c", "q", "blue", question_type="multi_choice", choices=("red", "blue", "green"))


def judged(example: Example, *answers: str | None) -> list[Result]:
    """A sample for each answer, in our answer block; None is a completion without one, cut at the length limit."""
    texts = ["so" if a is None else f"<reasoning>so</reasoning><answer>{a}</answer>" for a in answers]
    return [
        Result(
            example,
            text,
            completion_is_correct(text, example, "answer"),
            answer is not None,
            answer is not None,
            len(text),
        )
        for text, answer in zip(texts, answers, strict=True)
    ]


def integer(answer: str, id: str = "i", **metadata: str) -> Example:
    return Example(id, "How many?", answer, answer_type="integer", metadata=metadata)


def accuracies(figures: dict[str, dict]) -> dict[str, float]:
    return {name: found["accuracy"] for name, found in figures.items()}


def test_a_figure_is_the_mean_over_examples_with_wilsons_interval():
    assert figure([1, 0.5, 0]) == {"accuracy": 0.5, "interval": list(wilson_interval(1.5, 3)), "n": 3}
    with pytest.raises(ValueError, match="give 0 <= correct <= total with total above 0"):
        figure([])


def test_an_example_counts_once_however_many_samples_it_has():
    """Of two examples one is right in 3 of 4 samples, one in 1 of 4: accuracy 1/2 with n=2, not n=8."""
    found = summary([judged(integer("3"), "3", "3", "4", "3"), judged(integer("5"), "3", "5", None, None)])
    assert (found["accuracy"], found["n"]) == (0.5, 2)
    assert found["interval"] == list(wilson_interval(1, 2))
    assert (found["format_rate"], found["truncated"]) == (0.75, 0.25)
    lengths = 6 * len("<reasoning>so</reasoning><answer>3</answer>") + 2 * len("so")
    assert found["mean_tokens"] == lengths / 8
    assert spoken("base", found).startswith("base: 50.0% (95% interval 9.5% to 90.5%, n=2), well-formed 75.0%, cut ")


def test_pass_at_powers_of_two_and_maj():
    """With c right of 6: pass@2 = 1 - C(6-c,2)/15, pass@4 = 1 - C(6-c,4)/15; 6 is no power of two."""
    results = [judged(integer("3"), "3", "1", "1", "2", "3", "3"), judged(integer("5"), "4", "4", "4", "5", None, None)]
    found = accuracies(over_samples(results, "answer"))
    assert list(found) == ["pass@1", "pass@2", "pass@4", "maj@6"]
    assert found["pass@1"] == pytest.approx((3 / 6 + 1 / 6) / 2)
    assert found["pass@2"] == pytest.approx(((1 - 3 / 15) + (1 - 10 / 15)) / 2)
    assert found["pass@4"] == pytest.approx((1 + (1 - 5 / 15)) / 2)
    assert found["maj@6"] == 0.5


@pytest.mark.parametrize(
    ("example", "answers", "majority"),
    [
        (CHOICE, ("A", "(a)", "red", "B", "blue"), 0.0),
        (CHOICE, ("A", "red", "B", "(b)", "blue"), 1.0),
        (CHOICE, ("A", "B"), 0.5),
        (CHOICE, (None, None, "B"), 1.0),
        (CHOICE, ("Perhaps", "perhaps", "B"), 0.0),
        (integer("1200"), ("1,200", "1200.0", "7", "7", "**1200**"), 1.0),
        (integer("1200"), ("7", "7.0", "+7", "1200", "1,200"), 0.0),
        (Example("t", "Who?", "Ada Lovelace"), ("Byron", "byron", "Ada Lovelace"), 0.0),
    ],
)
def test_equal_answers_are_one_vote(example, answers, majority):
    """However they are written; a completion without an answer has no vote; a tie counts by its share."""
    found = over_samples([judged(example, *answers)], "answer")
    assert found[f"maj@{len(answers)}"]["accuracy"] == majority


def test_figures_by_metadata():
    results = [
        judged(integer("1", kind="text"), "1"),
        judged(integer("2", kind="image"), "2"),
        judged(integer("3", kind="image"), "4"),
    ]
    assert by_metadata(results, ["kind"]) == {"kind": {"image": figure([1, 0]), "text": figure([1])}}


def test_gsm8k_strict_reads_the_answer_block_or_the_marker_and_flexible_the_last_number():
    example = integer("18")
    texts = ("<reasoning>18</reasoning><answer>18</answer>", "so 18", "#### 18", "<answer>18</answer> or 20")
    results = [[Result(example, text, False, False, True, 1)] for text in texts]
    assert accuracies(gsm8k_figures(results, "answer")) == {"strict": 0.5, "flexible": 0.75}
    assert accuracies(gsm8k_figures(results, None)) == {"strict": 0.25, "flexible": 0.75}


def test_mathvistas_breakdown_has_the_published_counts(shared_data):
    """Of 1,000 problems, the free-form ones get right answers and the others a wrong choice: 46%, by known counts."""
    examples = load(shared_data / "mathvista" / "testmini_standin.parquet")
    wrong = {e.id: next((c for c in e.choices if c != e.answer), None) for e in examples}
    found = score_mathvista([judged(e, wrong[e.id] or e.answer) for e in examples], "current")
    figures = found.figures
    assert (figures["all"]["accuracy"], figures["all"]["n"]) == (0.46, 1000)
    assert accuracies(figures["question_type"]) == {"free_form": 1.0, "multi_choice": 0.0}
    assert {name: cell["n"] for name, cell in figures["task"].items()} == {
        "figure question answering": 269,
        "geometry problem solving": 208,
        "math word problem": 186,
        "visual question answering": 179,
        "textbook question answering": 158,
    }
    assert figures["skills"]["logical reasoning"]["n"] == 37 and len(figures["source"]) == 31
    assert figures["all"]["interval"] == list(wilson_interval(460, 1000))
    assert [record["true_false"] for record in found.records] == [not e.choices for e in examples]


def test_mathvistas_two_scorers_differ_where_they_do():
    """An integer written "2.0" is one only to the current scorer."""
    results = [judged(integer("2"), "2.0")]
    assert score_mathvista(results, "current").figures["all"]["accuracy"] == 1.0
    assert score_mathvista(results, "published").figures["all"]["accuracy"] == 0.0


def group(*rewards: float) -> Example:
    return Example("g", "q", "", completions=("x",) * len(rewards), completion_rewards=rewards)


@pytest.mark.parametrize(
    ("rewards", "scores", "accuracy"),
    [
        ((1, 0), (-3.0, -4.0), 1.0),
        ((1, 0), (-4.0, -3.0), 0.0),
        ((0, 1), (-4.0, -3.0), 1.0),
        ((1, 0), (-3.0, -3.0), 0.5),
        # Three pairs: 2 over 1 right, 2 over 0 wrong, 1 over 0 wrong.
        ((2, 1, 0), (-2.0, -3.0, -1.0), 1 / 3),
        # The two of reward 1 are no pair.
        ((1, 1, 0), (-2.0, -5.0, -4.0), 0.5),
        # A completion with NaN is in no pair.
        ((2, 1, 0), (math.nan, 5.0, 4.0), 1.0),
    ],
)
def test_preference_accuracy_by_hand(rewards, scores, accuracy):
    assert preference_accuracy([group(*rewards)], [scores])["accuracy"] == pytest.approx(accuracy)


def test_examples_without_a_comparable_pair_are_left_out():
    examples = [group(1, 0), group(1, 1), group(1, 0)]
    found = preference_accuracy(examples, [(0.0, 1.0), (0.0, 1.0), (math.nan, 0.0)])
    assert (found["accuracy"], found["n"]) == (0.0, 1)
    assert preference_accuracy([group(1, 1)], [(0.0, 1.0)]) is None


def test_the_table_shows_models_side_by_side():
    """Plain aligned text where the output is no terminal; MathVista's language and source are left to the file."""
    model = figure([1, 0]) | {
        "mathvista": {"all": figure([0]), "question_type": {"free form": figure([1])}, "source": {"x": figure([1])}},
        "preference": {"policy": figure([1]), "reward": None},
    }
    out = io.StringIO()
    Console(file=out, width=120).print(table({"base": model, "adapter": model | figure([1, 1])}))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "mathvista",
        "mathvista question type",
        "preference",
    ]
    assert lines[0].split() == ["n", "base", "adapter"]
    assert re.split(r"\s{2,}", lines[1])[1:] == ["accuracy", "2", "50.0% (9.5 to 90.5)", "100.0% (34.2 to 100.0)"]
    assert "\x1b" not in out.getvalue()
