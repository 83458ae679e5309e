"""GSM8K: JSON Lines as published in github.com/openai/grade-school-math, or the Hugging Face parquet files.

An answer is a worked solution with <<48/2=24>> calculator notes, then a last line "#### N" with N an integer.
"""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data.example import Example
from data.files import download, in_split, refuse_bad_rows

REPOSITORY = "openai/gsm8k"
ANSWER = re.compile(r"(?P<solution>.*?)\s*#### (?P<value>-?[0-9][0-9,]*)\s*", re.DOTALL)
_CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")


def _example(row: Any, id: str) -> Example:
    row = json.loads(row) if isinstance(row, bytes) else row
    if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in ("question", "answer")):
        raise ValueError("it is not an object with the texts question and answer")
    match = ANSWER.fullmatch(row["answer"])
    if match is None:
        raise ValueError("its answer does not end in '#### N' with an integer N")
    return Example(
        id=id,
        question=row["question"],
        answer=match["value"].replace(",", ""),
        answer_type="integer",
        reference=_CALCULATOR_NOTE.sub("", match["solution"]),
    )


def _examples(path: Path) -> list[Example]:
    """The examples of one file, with ids such as "train-17" for its row 17; one ValueError names all bad rows."""
    if path.suffix == ".parquet":
        rows = pq.read_table(path, columns=["question", "answer"]).to_pylist()
    else:
        rows = path.read_bytes().splitlines()
    name, examples, problems = path.stem.partition("-")[0], [], []
    for number, row in enumerate(rows, start=1):
        try:
            examples.append(_example(row, f"{name}-{number}"))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    refuse_bad_rows(path, problems)
    return examples


def _published(folder: Path, split: str) -> list[Example]:
    """The examples of one published split, from JSON Lines or parquet files in a folder, or parquet in its main/."""
    for pattern in (f"{split}.jsonl", f"{split}-*.parquet", f"main/{split}-*.parquet"):
        if found := sorted(folder.glob(pattern)):
            return [example for file in found for example in _examples(file)]
    raise ValueError(
        f"{folder} holds neither {split}.jsonl nor {split}-*.parquet; give the folder or file of {REPOSITORY}"
    )


def load(path: Path | None = None, split: str = "all") -> list[Example]:
    """GSM8K's examples in file order, from a folder with both published splits, downloaded (None), or from one file.

    `split` is "train" or "test" as published, or "all" for train and then test. A single file is divided by
    `data.files.in_split` of the id. References are the solutions without calculator notes and without their last line.
    """
    if path is not None and path.is_file():
        return [example for example in _examples(path) if in_split(example.id, split)]
    folder = path or download(REPOSITORY, "main/*.parquet")
    if split != "all":
        return _published(folder, split)
    return _published(folder, "train") + _published(folder, "test")
