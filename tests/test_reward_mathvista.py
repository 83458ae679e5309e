"""reward/mathvista.py against the real score vectors, and against numbers worked by hand."""

import json
import os
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.example import Example
from data.mathvista import load
from reward.mathvista import (
    SCORE_KEYS,
    SCORERS,
    breakdown,
    edit_distance,
    normalise,
    score,
    verdict,
    write_output,
    write_scores,
)


def choice(*choices, answer=None):
    return Example(id="1", question="q", answer=answer or choices[0], question_type="multi_choice", choices=choices)


def free(answer_type, answer="1", precision=None):
    return Example(id="1", question="q", answer=answer, answer_type=answer_type, precision=precision)


def from_row(row):
    fields = ("question_type", "answer_type", "precision", "answer")
    return Example(id=row["pid"], question="", choices=tuple(row["choices"] or ()), **{f: row[f] for f in fields})


@pytest.mark.parametrize(("scorer", "prefix"), [("current", ""), ("published", "published_")])
def test_predictions_and_verdicts_equal_the_official_ones_on_all_score_vectors(shared_data, scorer, prefix):
    lines = (shared_data / "mathvista" / "score_vectors.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 5578
    for row in rows:
        example = from_row(row)
        prediction = normalise(row["extraction"], example, scorer=scorer)
        assert prediction == row[prefix + "prediction"], row
        assert verdict(prediction, example) == row[prefix + "true_false"], row


def test_every_verdict_that_a_clone_of_mathvista_stores_is_ours():
    """MATHVISTA=CLONE python -m pytest tests/test_reward_mathvista.py -k clone. Most were made by the older scorer."""
    if "MATHVISTA" not in os.environ:
        pytest.skip("MATHVISTA does not name a clone of https://github.com/lupantech/MathVista")
    clone = Path(os.environ["MATHVISTA"])
    problems = json.loads((clone / "data" / "testmini.json").read_text(encoding="utf-8"))
    examples = {pid: from_row(row) for pid, row in problems.items()}
    count, older = 0, 0
    for path in sorted(clone.glob("results/*/output_*.json")):
        for pid, row in json.loads(path.read_text(encoding="utf-8")).items():
            if pid in examples and "true_false" in row:
                ours = {scorer: normalise(str(row["extraction"]), examples[pid], scorer=scorer) for scorer in SCORERS}
                found = {(prediction, verdict(prediction, examples[pid])) for prediction in ours.values()}
                assert (row["prediction"], row["true_false"]) in found, (path, pid)
                count, older = count + 1, older + (row["prediction"] == ours["published"])
    print(f"{count} verdicts, all ours, {older} of them by the published scorer")
    assert count > 20_000 and older > 0.999 * count


@pytest.mark.parametrize(
    ("extraction", "choices", "prediction"),
    [
        ("(A) or (B)", ("x", "y"), "x"),
        ("", ("Yes", "No"), "No"),
        ("N/A", ("Yes", "No"), "No"),
        ("106", ("97", "102", "107", "122"), "102"),
        (" B ", ("x", "y"), "y"),
        ("(b)", ("x", "y"), "y"),
        ("B.", ("Bx", "B!"), "Bx"),
        ("c", ("a", "b", "cd"), "a"),
    ],
)
def test_the_official_rules_for_choices_holes_included(extraction, choices, prediction):
    assert normalise(extraction, choice(*choices)) == prediction


@pytest.mark.parametrize(
    ("extraction", "current", "published"),
    [
        ("4.9", "4", None),
        ("-0.5", "0", None),
        ("1e3", "1000", None),
        ("1_0", "10", "10"),
        ("７", "7", "7"),
        (" 7 ", "7", "7"),
        ("1,234", None, None),
        ("$5", None, None),
        ("5%", None, None),
        ("nan", None, None),
        ("inf", None, None),
        ("9" * 400, None, "9" * 400),
        ("9" * 5000, None, None),
    ],
)
def test_the_official_rules_for_integers(extraction, current, published):
    assert normalise(extraction, free("integer")) == current
    assert normalise(extraction, free("integer"), scorer="published") == published


@pytest.mark.parametrize(
    ("extraction", "precision", "prediction"),
    [
        ("7", 1, "7.0"),
        ("2.675", 2, "2.67"),
        ("0.25", 1, "0.2"),
        ("-0.04", 1, "-0.0"),
        ("nan", 1, "nan"),
        ("1e999", 1, "inf"),
        ("", 1, None),
    ],
)
def test_the_official_rules_for_floats(extraction, precision, prediction):
    assert normalise(extraction, free("float", precision=precision)) == prediction


def test_lists_are_compared_as_they_are_written():
    example = free("list", answer="[2014, 2016]")
    assert verdict(normalise("[2014, 2016]", example), example)
    assert not verdict(normalise("[2014,2016]", example), example)


def test_unknown_scorers_and_kinds_of_question_are_refused():
    with pytest.raises(ValueError, match=r"'old'.*current, published"):
        normalise("1", free("integer"), scorer="old")
    with pytest.raises(ValueError, match="answer type 'text'"):
        normalise("1", free("text"))
    with pytest.raises(ValueError, match="precision None"):
        normalise("1", free("float"))


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_is_the_recursive_definition(a, b):
    @cache
    def distance(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert edit_distance(a, b) == distance(len(a), len(b))


def test_a_response_is_scored_from_text_to_verdict():
    example = free("integer", answer="12")
    assert score("So the answer is 12.", example) == {
        "response": "So the answer is 12.",
        "extraction": "12",
        "prediction": "12",
        "true_false": True,
    }


def metadata(task, skills):
    same = {"language": "english", "source": "x", "category": "c", "context": "t", "grade": "g"}
    return same | {"task": task, "skills": skills}


EXAMPLES = [
    Example(id="1", question="q", answer="1", answer_type="integer", metadata=metadata("a", ["s", "t"])),
    Example(id="2", question="q", answer="1", answer_type="integer", metadata=metadata("b", ["s"])),
    Example(id="3", question="q", answer="1", answer_type="integer", metadata=metadata("b", ["t"])),
]


def test_the_breakdown_counts_each_skill_and_sorts_by_accuracy():
    scores = breakdown(EXAMPLES, [False, True, True])
    assert scores["average"] == {"accuracy": 2 / 3, "correct": 2, "total": 3}
    assert list(scores["task"].items()) == [
        ("b", {"accuracy": 1.0, "correct": 2, "total": 2}),
        ("a", {"accuracy": 0.0, "correct": 0, "total": 1}),
    ]
    assert scores["skills"] == {value: {"accuracy": 0.5, "correct": 1, "total": 2} for value in ("s", "t")}
    assert scores["answer_type"] == {"integer": scores["average"]}
    assert list(scores) == ["average", *SCORE_KEYS]


def test_the_breakdown_of_other_data_leaves_unknown_keys_empty():
    scores = breakdown([free("integer")], [True])
    assert scores["source"] == scores["skills"] == {} and scores["question_type"]["free_form"]["total"] == 1
    with pytest.raises(ValueError, match="1 examples and 2 verdicts"):
        breakdown([free("integer")], [True, False])


def test_score_files_hold_fractions_now_and_percent_text_as_published(tmp_path):
    scores = breakdown(EXAMPLES, [False, True, True])
    write_scores(tmp_path / "s.json", scores)
    assert json.loads((tmp_path / "s.json").read_text()) == scores
    write_scores(tmp_path / "s.json", scores, scorer="published")
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["average"] == {"accuracy": "66.67", "correct": 2, "total": 3}
    assert written["task"]["b"]["accuracy"] == "100.00"
    half = breakdown(EXAMPLES[:2], [True, False])
    write_scores(tmp_path / "s.json", half, scorer="published")
    assert json.loads((tmp_path / "s.json").read_text())["average"]["accuracy"] == "50.0"


def test_the_output_file_is_the_problem_record_with_the_result(tmp_path, shared_data):
    examples = load(shared_data / "mathvista" / "testmini_standin.parquet")[:7]
    results = [score("The answer is 3.", example) for example in examples]
    write_output(tmp_path / "o.json", examples, results)
    written = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))
    official = json.loads((shared_data / "mathvista" / "testmini.json").read_text(encoding="utf-8"))
    assert list(written) == [str(i) for i in range(1, 8)]
    for example, result in zip(examples, results, strict=True):
        assert written[example.id] == official[example.id] | {"query": example.query} | result
