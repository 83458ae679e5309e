"""MathVista: the published Hugging Face parquet files, or the repository's JSON beside its images/ folder.

Schema: github.com/lupantech/MathVista at 53d5258 and the dataset card of AI4Math/MathVista. Rests on
pyarrow; images stay encoded, and on the disk.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as pq

from data.example import Example
from data.files import StoredImage, download, find, in_split, store_image
from data.prompt import official_query

REPOSITORY = "AI4Math/MathVista"
COLUMNS = {
    *("pid", "question", "image", "decoded_image", "choices", "unit", "precision"),
    *("answer", "question_type", "answer_type", "metadata"),
}
TRAINING_NOTICE = (
    "Note: MathVista's licence allows its use as a test set and prohibits training on it "
    "(github.com/lupantech/MathVista, section License); this run trains on part of it because you asked for that."
)
# Rows that are read at once: only their images are in memory.
_BATCH_ROWS = 32
_BUFFER_BYTES = 2**20


def _parquet_rows(path: Path) -> Iterator[tuple[dict[str, Any], bytes | None]]:
    """Each row of a parquet file with its encoded image, None where the row has none."""
    # By default Arrow reads ahead, and keeps what it read: the whole file in the end.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES) as file:
        if missing := COLUMNS - set(file.schema_arrow.names):
            raise ValueError(f"{path} is not MathVista: it lacks the columns {', '.join(sorted(missing))}")
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                yield row, (row.pop("decoded_image") or {}).get("bytes")
    pyarrow.default_memory_pool().release_unused()


def _json_rows(path: Path) -> Iterator[tuple[dict[str, Any], Path | None]]:
    """Each record of the repository's JSON with the path of its image, None where there is no such file."""
    for row in json.loads(path.read_text(encoding="utf-8")).values():
        image = path.parent / "images" / Path(row["image"]).name
        yield row, image if image.is_file() else None


def _files(folder: Path) -> list[Path]:
    """The testmini files in a folder: parquet if there are any, else JSON, else parquet files of any name."""
    for pattern in ("testmini*.parquet", "testmini.json", "*.parquet"):
        if found := find(folder, pattern):
            return found
    raise ValueError(f"{folder} holds no *.parquet and no testmini.json; give the folder or file of {REPOSITORY}")


def _example(row: dict[str, Any], image: Path | StoredImage | None) -> Example:
    precision = row["precision"]
    example = Example(
        id=row["pid"],
        question=row["question"],
        answer=row["answer"],
        images=() if image is None else (image,),
        question_type=row["question_type"],
        answer_type=row["answer_type"],
        choices=tuple(row["choices"] or ()),
        precision=None if precision is None else int(precision),  # parquet stores a float
        unit=row["unit"],
        query=row.get("query"),
        metadata=row["metadata"],
    )
    return example if example.query is not None else replace(example, query=official_query(example))


def load(path: Path | None = None, split: str = "all", *, skip_missing_images: bool = False) -> list[Example]:
    """MathVista's examples in file order, from a parquet or JSON file, a folder of them, or downloaded (None).

    `split` is "all", or "train" or "test" by `data.files.in_split` of the pid: our own division, since none is
    published. Images stay encoded and out of memory: those of a parquet file are copied to an unnamed temporary file,
    those of a JSON file are paths. The query is rebuilt if the file has none.

    Raises ValueError if rows of the split lack their image, naming the first and the count, unless
    `skip_missing_images` leaves them out, and if no row is left. Raises RuntimeError if the disk is full.
    """
    path = path or download(REPOSITORY, "data/testmini-*.parquet")
    examples, missing, images = [], [], tempfile.TemporaryFile()  # noqa: SIM115 - the examples close it
    for file in _files(path) if path.is_dir() else [path]:
        for row, image in _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file):
            if not in_split(row["pid"], split):
                continue
            if image is None:
                missing.append(f"pid {row['pid']} of {file} ({row['image']})")
            if isinstance(image, bytes):
                image = store_image(images, image)
            if image is not None or not skip_missing_images:
                examples.append(_example(row, image))
    if missing and not skip_missing_images:
        raise ValueError(
            f"{len(missing)} of {len(examples)} rows have no image, the first is {missing[0]}: unpack images.zip "
            f"of {REPOSITORY} beside the file, use the parquet files, or pass --skip-missing-images"
        )
    if not examples:
        raise ValueError(f"{path} has no row with an image in split {split!r}; use the parquet files of {REPOSITORY}")
    return examples
