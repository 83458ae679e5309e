"""Anybody's data: a JSON Lines file with one problem per line.

Every line is an object with `question` (text) and `answer` (text, number or list; optional if there is a `rubric`,
a `reference` or completions), and optionally:

    id            text or a whole number; if absent, the line number
    image, images a path, or a list of paths, relative to the file and below its folder
    choices       2 to 26 texts; the answer is then one of them, or its letter
    answer_type   "text", "integer", "float" or "list"; if absent, read off the answer
    precision     decimals to which a float answer is judged; if absent, as many as the answer is written with
    unit, reference, query    texts
    rubric        a list of texts
    completions   2 or more texts, which replace sampling for this row; rewards, as many numbers, may go with them
    chosen, rejected          texts: the same as completions with the rewards 1 and 0

Any further field becomes metadata.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from data.example import Example
from data.files import in_split, inside, refuse_bad_rows

ANSWER_TYPES = ("text", "integer", "float", "list")
_FIELDS = {
    *("id", "question", "answer", "image", "images", "choices", "answer_type", "precision", "unit", "reference"),
    *("query", "rubric", "completions", "rewards", "chosen", "rejected"),
}


class _MissingImage(ValueError):
    """A row names an image that is not there."""


def _text(row: dict[str, Any], field: str) -> str | None:
    value = row.get(field)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise ValueError(f"{field} is {value!r}; it must be text")
    return value


def _texts(row: dict[str, Any], field: str) -> tuple[str, ...]:
    value = row.get(field) or []
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise ValueError(f"{field} is {value!r}; it must be a list of texts")
    return tuple(value)


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))  # JSON's true is an int to isinstance


def _images(row: dict[str, Any], folder: Path) -> tuple[Path, ...]:
    if row.get("image") and row.get("images"):
        raise ValueError("both image and images are given; use one of them")
    single = _text(row, "image")
    paths = []
    for name in (single,) if single else _texts(row, "images"):
        paths.append(inside(folder, name))
        if not paths[-1].is_file():
            raise _MissingImage(f"image {name!r} is not in {folder}")
    return tuple(paths)


def _answer(row: dict[str, Any], choices: tuple[str, ...], needed: bool) -> str:
    """The answer as text: for multiple choice the text of the choice, whether the row gives that or its letter."""
    value = row.get("answer")
    if value is None:
        if needed and not any(row.get(field) for field in ("rubric", "reference", "completions", "chosen")):
            raise ValueError("answer is missing; give one, or a rubric, a reference or completions")
        return ""
    if not (isinstance(value, list) or _is_number(value) or (isinstance(value, str) and value.strip())):
        raise ValueError(f"answer is {value!r}; it must be text, a finite number or a list")
    answer = str(value).strip()
    if choices and answer not in choices:
        index = ord(answer) - ord("A") if len(answer) == 1 else -1
        if not 0 <= index < len(choices):
            raise ValueError(f"answer {answer!r} is neither one of the {len(choices)} choices nor the letter of one")
        return choices[index]
    return answer


def _answer_type(row: dict[str, Any], answer: str, choices: tuple[str, ...]) -> tuple[str, int | None]:
    """(type, precision): as the row states them, else as the answer is written, so that "1.50" is ("float", 2)."""
    kind, precision = row.get("answer_type"), row.get("precision")
    if kind is not None and kind not in ANSWER_TYPES:
        raise ValueError(f"answer_type is {kind!r}; it must be one of {', '.join(ANSWER_TYPES)}")
    if precision is not None and not (_is_number(precision) and precision == int(precision) and 0 <= precision <= 15):
        raise ValueError(f"precision is {precision!r}; it must be a whole number of decimals from 0 to 15")
    decimals = re.fullmatch(r"-?\d*\.(\d{1,15})", answer)
    if kind is None:
        if choices:
            kind = "text"
        elif precision is not None or decimals:
            kind = "float"
        elif isinstance(row.get("answer"), list):
            kind = "list"
        else:
            kind = "integer" if re.fullmatch(r"-?\d+", answer) else "text"
    if precision is None and kind == "float" and decimals:
        precision = len(decimals.group(1))
    return kind, None if precision is None else int(precision)


def _completions(row: dict[str, Any]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    if ("chosen" in row) != ("rejected" in row):
        raise ValueError("only one of chosen and rejected is given; a preference needs both")
    if "chosen" in row and "completions" in row:
        raise ValueError("both chosen and completions are given; use one of them")
    if "chosen" in row:
        pair = (_text(row, "chosen"), _text(row, "rejected"))
        if None in pair:
            raise ValueError("chosen or rejected is null; both must be text")
        return pair, (1.0, 0.0)
    completions, rewards = _texts(row, "completions"), row.get("rewards") or []
    if len(completions) == 1:
        raise ValueError("completions holds 1 text; a group needs 2 or more to compare")
    if not isinstance(rewards, list) or not all(map(_is_number, rewards)):
        raise ValueError(f"rewards is {rewards!r}; it must be a list of finite numbers")
    if rewards and len(rewards) != len(completions):
        raise ValueError(f"rewards holds {len(rewards)} numbers for {len(completions)} completions; give one for each")
    return completions, tuple(map(float, rewards))


def _example(row: Any, number: int, folder: Path, needs_answer: bool) -> Example:
    if not isinstance(row, dict):
        raise ValueError(f"it holds {type(row).__name__}, not an object with question and answer")
    if _text(row, "question") is None:
        raise ValueError("question is missing")
    choices = _texts(row, "choices")
    if choices and not 2 <= len(choices) <= 26:
        raise ValueError(f"choices holds {len(choices)} texts; it must hold 2 to 26")
    answer = _answer(row, choices, needs_answer)
    answer_type, precision = _answer_type(row, answer, choices)
    completions, rewards = _completions(row)
    return Example(
        id=str(row["id"]) if type(row.get("id")) is int else _text(row, "id") or str(number),
        question=row["question"],
        answer=answer,
        images=_images(row, folder),
        question_type="multi_choice" if choices else "free_form",
        answer_type=answer_type,
        choices=choices,
        precision=precision,
        unit=_text(row, "unit"),
        query=_text(row, "query"),
        reference=_text(row, "reference"),
        rubric=_texts(row, "rubric"),
        completions=completions,
        completion_rewards=rewards,
        metadata={key: value for key, value in row.items() if key not in _FIELDS},
    )


def load(
    path: Path, split: str = "all", *, skip_missing_images: bool = False, needs_answers: bool = True
) -> list[Example]:
    """The examples of a JSON Lines file in file order; `split` "train" or "test" divides them by a hash of the id.

    With `needs_answers=False` a row may be a question and nothing else: its answer is then "".

    Raises one ValueError for all bad rows together, each with its line number: invalid JSON, a field missing or of the
    wrong kind, an id used twice, an image outside the file's folder, or an image that does not exist (such rows are
    left out with `skip_missing_images`).
    """
    examples: dict[str, Example] = {}
    problems = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            example = _example(json.loads(line.decode("utf-8-sig")), number, path.parent, needs_answers)
            if example.id in examples:
                raise ValueError(f"id {example.id!r} was used before")
            examples[example.id] = example
        except _MissingImage as error:
            if not skip_missing_images:
                problems.append(f"line {number}: {error} (or pass --skip-missing-images)")
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: it is not JSON ({error.msg} at character {error.pos + 1})")
        except (ValueError, OverflowError, RecursionError) as error:
            problems.append(f"line {number}: {error}")
    refuse_bad_rows(path, problems)
    if not examples:
        raise ValueError(f"{path} holds no rows; write one JSON object with question and answer per line")
    return [example for example in examples.values() if in_split(example.id, split)]
