"""Replacing files and directories as a whole: a reader sees the old one or the new one, never a mixture."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def replace_file(path: Path, content: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write or replace a file of strict JSON."""
    replace_file(path, (json.dumps(content, ensure_ascii=False, allow_nan=False, indent=2) + "\n").encode())


@contextmanager
def replaced_directory(directory: Path | str, marker: str) -> Iterator[Path]:
    """A new directory to write into, which takes the place of `directory` once everything is written.

    A crash leaves `directory` as it was or, in the instant between two renames, under the name `.<name>.<pid>.old`. The
    old directory is deleted with all that it holds. So ValueError if it is not empty and lacks the file `marker`: then
    it is not an earlier version.
    """
    directory = Path(directory).resolve()
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir()) and not (directory / marker).is_file()):
        raise ValueError(f"{directory} exists and has no {marker}, so it is not overwritten; pass a new directory")
    new, old = (directory.with_name(f".{directory.name}.{os.getpid()}.{age}") for age in ("new", "old"))
    new.mkdir(parents=True)
    try:
        yield new
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
