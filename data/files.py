"""What the datasets share: the split by hash, paths that stay in their folder, images kept on the disk, reports of
bad rows, downloads.
"""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import IO, NamedTuple

SPLITS = ("train", "test", "all")
_SHOWN_PROBLEMS = 5


def in_split(id: str, split: str) -> bool:
    """Whether the example of this id belongs to `split`: about 80% to "train", 20% to "test", each to "all".

    The first 8 bytes of sha256(id), read as a big-endian integer, modulo 5: 0 is "test". So an example stays on its
    side however its dataset grows, is ordered or is filtered. Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    is_test = int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") % 5 == 0
    return split == "all" or is_test == (split == "test")


def find(folder: Path, pattern: str) -> list[Path]:
    """The files matching `pattern` in `folder`, sorted; else those one level below, as repositories lay them out."""
    return sorted(folder.glob(pattern)) or sorted(folder.glob(f"*/{pattern}"))


def inside(folder: Path, relative: str) -> Path:
    """The absolute path of `relative` in `folder`, links followed; ValueError if it lies outside `folder`."""
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"path {relative!r} leaves {folder}; keep files in that folder and name them relative to it")
    return path


class StoredImage(NamedTuple):
    """An encoded image within a file of many images, which stays open as long as one of them is in use.

    It is read like a `Path`, by `read_bytes()`. Any number of threads may read at once: they share no file position.
    """

    file: IO[bytes]
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        return os.pread(self.file.fileno(), self.size, self.offset)


def store_image(file: IO[bytes], content: bytes) -> StoredImage:
    """Append an encoded image to `file`, a `tempfile.TemporaryFile()`: it has no name and is deleted with the process.

    Raises RuntimeError if the disk is full; the environment variable TMPDIR chooses another one.
    """
    try:
        offset = file.seek(0, os.SEEK_END)
        file.write(content)
        file.flush()  # pread does not see what is still in the buffer
    except OSError as error:
        raise RuntimeError(
            f"images cannot be written to a temporary file in {tempfile.gettempdir()} ({error.strerror}); "
            "set TMPDIR to a folder with more room"
        ) from error
    return StoredImage(file, offset, len(content))


def refuse_bad_rows(path: Path, problems: list[str]) -> None:
    """Raises one ValueError that shows the first few of `problems` and counts them; returns if there are none."""
    if not problems:
        return
    shown = "; ".join(problems[:_SHOWN_PROBLEMS])
    more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    raise ValueError(
        f"{path} has {len(problems)} bad row{'s' if len(problems) > 1 else ''}, correct them: {shown}{more}"
    )


def download(repository: str, pattern: str) -> Path:
    """The local folder of a Hugging Face dataset repository, with the files matching `pattern` fetched if need be.

    Raises RuntimeError, which says what to do instead, if they can neither be downloaded nor found in the cache.
    """
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns=[pattern]))
    except (ImportError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"could not download {repository} ({reason}): pip install huggingface_hub and check the network, or "
            f"fetch {pattern} from https://huggingface.co/datasets/{repository} and give --data its folder"
        ) from error
