"""Datasets as lists of `Example`: `load_dataset` takes a known name, a file or a folder, and finds out what it holds.

Reading order: example.py, files.py, prompt.py, then one file per dataset.
"""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq

from data import gsm8k, jsonl, mathvista
from data.example import Example
from data.files import find

# Names that need no file: their dataset is downloaded.
NAMES = {"mathvista": "mathvista", mathvista.REPOSITORY: "mathvista", "gsm8k": "gsm8k", gsm8k.REPOSITORY: "gsm8k"}
# What --data may be. There is no file of "synthetic", so `data.synthetic` makes it.
KNOWN = (
    f"synthetic, the embedded task; the names {', '.join(NAMES)}; a folder or parquet file of MathVista or GSM8K; "
    "MathVista's testmini.json; or a .jsonl file with question and answer in each row"
)


def _parquet_kind(path: Path) -> str | None:
    try:
        columns = set(pq.read_schema(path).names)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file ({error}); download it again") from error
    if columns >= mathvista.COLUMNS:
        return "mathvista"
    return "gsm8k" if columns >= {"question", "answer"} else None


def _jsonl_kind(path: Path) -> str:
    """GSM8K if the first row has a question, an answer with a "#### N" line and nothing else; else our own format."""
    with path.open("rb") as lines:
        first = next((line for line in lines if line.strip()), b"")
    try:
        row = json.loads(first)
    except ValueError:  # jsonl.load reports it with its line number
        return "jsonl"
    is_gsm8k = isinstance(row, dict) and row.keys() == {"question", "answer"} and isinstance(row["answer"], str)
    return "gsm8k" if is_gsm8k and gsm8k.ANSWER.fullmatch(row["answer"]) else "jsonl"


def _json_kind(path: Path) -> str | None:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    first = next(iter(records.values()), None) if isinstance(records, dict) else None
    return "mathvista" if isinstance(first, dict) and first.keys() >= {"pid", "question", "image"} else None


def _folder_kind(path: Path) -> str | None:
    """The kind of the first MathVista or GSM8K file in a folder; a .jsonl of our own must be given as a file."""
    for pattern in ("*.parquet", "testmini.json", "*.jsonl"):
        for file in find(path, pattern):
            found = kind(file)
            if found in ("mathvista", "gsm8k"):
                return found
    return None


def kind(name_or_path: str | Path) -> str:
    """Which dataset a name, file or folder is: "mathvista", "gsm8k" or "jsonl", by what it holds.

    A path that exists comes before a name. Raises ValueError, listing what is known, for anything else.
    """
    path = Path(name_or_path)
    if path.is_dir():
        found = _folder_kind(path)
    elif path.is_file():
        by_suffix = {".parquet": _parquet_kind, ".jsonl": _jsonl_kind, ".json": _json_kind}
        found = by_suffix[path.suffix](path) if path.suffix in by_suffix else None
    else:
        found = NAMES.get(str(name_or_path))
    if found is None:
        what = "holds no known dataset" if path.exists() else "is no known dataset and no file or folder"
        raise ValueError(f"{str(name_or_path)!r} {what}; known are {KNOWN}")
    return found


def load_dataset(name_or_path: str | Path, split: str = "all", *, skip_missing_images: bool = False) -> list[Example]:
    """The examples of a dataset given by name, file or folder, in file order.

    `split` is "train", "test" or "all". Train and test never share an example: they are the published splits where a
    dataset has them (GSM8K by name or folder), else a fixed 80:20 division (`data.files.in_split`). Rows without their
    image are an error unless `skip_missing_images`. Raises ValueError for what cannot be read or holds bad rows,
    RuntimeError for a failed download.
    """
    found = kind(name_or_path)
    path = Path(name_or_path) if Path(name_or_path).exists() else None
    if found == "mathvista":
        return mathvista.load(path, split, skip_missing_images=skip_missing_images)
    if found == "gsm8k":
        return gsm8k.load(path, split)
    return jsonl.load(path, split, skip_missing_images=skip_missing_images)
