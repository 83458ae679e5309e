"""MathVista's official scoring: normalisation and verdict, the breakdown, the repository's result files.

Follows evaluation/calculate_score.py of github.com/lupantech/MathVista at 53d5258 rule by rule, loopholes included: it
pays for hedging and for the nearest spelling, so it reports accuracies and must not serve as a reward.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.example import Example
from reward.mathvista_extract import extract

# "current" is the repository's code. "published" is the older scorer behind the scores the repository stores.
SCORERS = ("current", "published")
SCORE_KEYS = ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills")


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance of two strings, in characters, case-sensitive."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
        previous = row
    return previous[-1]


def _choice(extraction: str, choices: Sequence[str]) -> str:
    extraction = extraction.strip()
    if bracketed := re.search(r"\(([a-zA-Z])\)", extraction):
        extraction = bracketed.group(1).upper()
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    if extraction in letters:
        return choices[letters.index(extraction)]
    return min(choices, key=lambda choice: edit_distance(extraction, choice))


def normalise(extraction: str, example: Example, *, scorer: str = "current") -> str | None:
    """The official prediction for an extraction, as text in the form of `example.answer`; None where there is none.

    Multiple choice: the choice named by the first letter in round brackets or by a bare capital, else the choice of
    smallest edit distance, the first of several. Integer: truncated toward zero. Float: Python's rounding to
    `example.precision`. List: the text itself.

    `scorer="published"` reads integers without passing through a float, so "2.0" gives None. Raises ValueError for an
    unknown scorer or a question that MathVista has no rule for.
    """
    if scorer not in SCORERS:
        raise ValueError(f"scorer is {scorer!r}; it must be one of {', '.join(SCORERS)}")
    if example.question_type == "multi_choice":
        return _choice(extraction, example.choices)
    if example.answer_type == "list":
        return extraction
    try:
        if example.answer_type == "integer":
            return str(int(extraction) if scorer == "published" else int(float(extraction)))
        if example.answer_type == "float" and example.precision is not None:
            return str(round(float(extraction), example.precision))
    except (ValueError, OverflowError):
        return None
    raise ValueError(
        f"example {example.id} has answer type {example.answer_type!r} and precision {example.precision}, which "
        "MathVista's scorer has no rule for; it needs integer, float with a precision, list, or multiple choice"
    )


def verdict(prediction: str | None, example: Example) -> bool:
    """Whether a normalised prediction equals the answer, as strings, exactly: "7" is not "7.0"."""
    return prediction == example.answer


def score(response: str, example: Example, *, scorer: str = "current") -> dict[str, Any]:
    """The extraction, prediction and verdict of one response, under the repository's key names."""
    extraction = extract(response, example)
    prediction = normalise(extraction, example, scorer=scorer)
    return {
        "response": response,
        "extraction": extraction,
        "prediction": prediction,
        "true_false": verdict(prediction, example),
    }


def _accuracy(verdicts: Sequence[bool]) -> dict[str, float | int]:
    return {"accuracy": sum(verdicts) / len(verdicts), "correct": sum(verdicts), "total": len(verdicts)}


def _values(example: Example, key: str) -> list[str]:
    """The values of `key` under which an example counts: at most one, or for skills several."""
    if key in ("question_type", "answer_type"):
        return [getattr(example, key)]
    value = example.metadata.get(key)
    if value is None:
        return []
    return list(value) if key == "skills" else [value]


def breakdown(examples: Sequence[Example], verdicts: Sequence[bool]) -> dict[str, Any]:
    """Accuracy over all examples and for each value of each of `SCORE_KEYS`, in the official score file's layout.

    `{"average": cell, key: {value: cell}}` with cell `{"accuracy": fraction, "correct": int, "total": int}`, values
    highest accuracy first. An example with several skills counts under each. Keys that no example has stay empty, so
    other datasets can be broken down too. Raises ValueError for no examples or unequal lengths.
    """
    if not examples or len(examples) != len(verdicts):
        raise ValueError(
            f"{len(examples)} examples and {len(verdicts)} verdicts; give one verdict per example, at least one"
        )
    scores: dict[str, Any] = {"average": _accuracy(verdicts)}
    for key in SCORE_KEYS:
        groups: dict[str, list[bool]] = {}
        for example, correct in zip(examples, verdicts, strict=True):
            for value in _values(example, key):
                groups.setdefault(value, []).append(correct)
        cells = {value: _accuracy(group) for value, group in groups.items()}
        scores[key] = dict(sorted(cells.items(), key=lambda item: item[1]["accuracy"], reverse=True))
    return scores


def write_output(path: Path, examples: Sequence[Example], results: Sequence[dict[str, Any]]) -> None:
    """Writes the repository's output file: for each pid, one object with the problem and the result of `score`."""
    records = {}
    for example, result in zip(examples, results, strict=True):
        problem = {
            "question": example.question,
            "image": f"images/{example.id}.jpg",
            "choices": list(example.choices) or None,
            "unit": example.unit,
            "precision": example.precision,
            "answer": example.answer,
            "question_type": example.question_type,
            "answer_type": example.answer_type,
            "pid": example.id,
            "metadata": example.metadata,
            "query": example.query,
        }
        records[example.id] = problem | result
    Path(path).write_text(json.dumps(records, indent=4), encoding="utf-8")


def write_scores(path: Path, scores: dict[str, Any], *, scorer: str = "current") -> None:
    """Writes the repository's score file from `breakdown`'s result.

    The current code writes fractions; the published files hold percent as text, "34.8" for the average and "48.70"
    elsewhere.
    """
    if scorer == "published":
        percent = {
            key: {value: cell | {"accuracy": f"{100 * cell['accuracy']:.2f}"} for value, cell in scores[key].items()}
            for key in SCORE_KEYS
        }
        average = scores["average"] | {"accuracy": str(round(100 * scores["average"]["accuracy"], 2))}
        scores = {"average": average} | percent
    Path(path).write_text(json.dumps(scores, indent=4), encoding="utf-8")
