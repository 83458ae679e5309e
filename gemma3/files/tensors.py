"""Moving tensors between safetensors files and (sharded) arrays; knows nothing of any model.

How a stored tensor and an array of ours differ is written as einops would: "(N H) D -> D N H" says that the file holds
a matrix whose rows are N heads of H, and the array has the three axes D, N, H. Both directions are read off that.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_CHUNK_BYTES = 2**25  # how much of a file is in memory at once, beside the array it is copied to
_FLOATS = ("F64", "F32", "F16", "BF16")


class Stored(NamedTuple):
    """Where a tensor lies, and its shape and dtype there."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # one of _FLOATS


@contextmanager
def _opened(path: Path):
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing, damaged or not a safetensors file ({error}); fetch it again") from error


def list_tensors(path: Path) -> list[Stored]:
    """What a safetensors file holds; ValueError where it is damaged, or holds numbers that are not plain floats."""
    with _opened(path) as file:
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (the file is no mapping)
        for name, tensor in stored.items():
            if tensor.get_dtype() not in _FLOATS:
                raise ValueError(
                    f"{path} stores {name} as {tensor.get_dtype()}; only {', '.join(_FLOATS)} can be read, "
                    "so pass a checkpoint that is not quantised"
                )
        return [Stored(path, name, tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in stored.items()]


def _read(tensor: Stored, where: tuple[slice, ...]) -> np.ndarray:
    # Opened anew for each piece: closing the file gives back the mapped pages, which would add up to the whole file.
    with _opened(tensor.path) as file:
        return file.get_slice(tensor.name)[where]


def _groups(side: str) -> list[str]:
    """ "(N H) D" to ["NH", "D"]."""
    return [re.sub(r"\W", "", group) for group in re.findall(r"\([^)]*\)|\w", side)]


def _sides(layout: str) -> tuple[list[str], list[str]]:
    stored, ours = layout.split("->")
    return _groups(stored), _groups(ours)


def stored_shape(layout: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape in the file, of a layout such as "(N H) D -> D N H"."""
    return tuple(math.prod(sizes[axis] for axis in group) for group in _sides(layout)[0])


def read_into(out: np.ndarray, tensor: Stored, layout: str, sizes: Mapping[str, int], ranges: Sequence[range]) -> None:
    """Copy a part of a stored tensor into `out`, in pieces, casting to its dtype.

    ranges: the part, one range for each axis of the whole array of ours; `out` has their lengths. Of axes that are
    joined in the file or in the array only the first in the file may be split.
    """
    stored, ours = _sides(layout)
    part = {axis: range(size) for axis, size in sizes.items()}
    part |= {group: axis_range for group, axis_range in zip(ours, ranges, strict=True) if len(group) == 1}
    stored_axes, our_axes = "".join(stored), "".join(ours)
    target = out.reshape([len(part[axis]) for axis in our_axes])  # a view: nothing but joined axes is taken apart
    target = target.transpose([our_axes.index(axis) for axis in stored_axes])
    rows = part[stored_axes[0]]
    at_once = max(1, _CHUNK_BYTES // (target[:1].size * 4))
    for start in range(rows.start, rows.stop, at_once):
        part[stored_axes[0]] = chunk = range(start, min(start + at_once, rows.stop))
        inner = [math.prod(sizes[axis] for axis in group[1:]) for group in stored]
        where = tuple(
            slice(part[group[0]].start * n, part[group[0]].stop * n) for group, n in zip(stored, inner, strict=True)
        )
        values = _read(tensor, where).reshape([len(part[axis]) for axis in stored_axes])
        target[chunk.start - rows.start : chunk.stop - rows.start] = values


def to_stored(array: np.ndarray, layout: str, sizes: Mapping[str, int]) -> np.ndarray:
    """An array of ours as the file holds it, contiguous."""
    stored, ours = _sides(layout)
    our_axes = "".join(ours)
    apart = np.asarray(array).reshape([sizes[axis] for axis in our_axes])
    turned = apart.transpose([our_axes.index(axis) for axis in "".join(stored)])
    return np.ascontiguousarray(turned.reshape(stored_shape(layout, sizes)))


def same_values(one: Stored, other: Stored) -> bool:
    """Whether two stored matrices are equal, read a few rows at a time."""
    if one.shape != other.shape:
        return False
    rows, at_once = one.shape[0], max(1, _CHUNK_BYTES // (4 * one.shape[1]))
    pieces = [(slice(start, min(start + at_once, rows)), slice(None)) for start in range(0, rows, at_once)]
    return all(np.array_equal(_read(one, piece), _read(other, piece)) for piece in pieces)


def _aligned_empty(shape: Sequence[int], dtype) -> np.ndarray:
    """Memory at a multiple of 64 bytes, which a CPU device adopts; it would copy what lies elsewhere."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def place(
    shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding, fill: Callable[[np.ndarray, list[range]], None]
) -> jax.Array:
    """Make an array of which each device's part is written by `fill(out, ranges)`, so that no one holds the whole."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(*axis.indices(size)) for axis, size in zip(index, shape.shape, strict=True)]
        out = _aligned_empty([len(axis) for axis in ranges], shape.dtype)
        fill(out, ranges)
        return out

    return jax.make_array_from_callback(shape.shape, sharding, part)


class Unwritten(NamedTuple):
    """A tensor to be written: its size is known before its values are made."""

    name: str
    nbytes: int
    make: Callable[[], np.ndarray]


def write_tensors(directory: Path, tensors: Sequence[Unwritten], max_shard_bytes: int) -> None:
    """Write model.safetensors, or shards of at most so many bytes with their index; one shard is in memory at once."""
    shards: list[list[Unwritten]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    many = len(shards) > 1
    files = [
        f"model-{i:05}-of-{len(shards):05}.safetensors" if many else "model.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    total = {"total_parameters": 0, "total_size": 0}
    for file, shard in zip(files, shards, strict=True):
        arrays = {tensor.name: tensor.make() for tensor in shard}
        total["total_parameters"] += sum(array.size for array in arrays.values())
        total["total_size"] += sum(array.nbytes for array in arrays.values())
        save_file(arrays, directory / file, metadata={"format": "pt"})
    if many:
        weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        write_json(directory / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replaced_directory(directory: Path | str, marker: str) -> Iterator[Path]:
    """A new sibling to write into, which takes the place of `directory` once everything is written.

    A crash leaves `directory` as it was or, in the instant between two renames, beside it as `.<name>.<pid>.old`. What
    is replaced goes as a whole, so ValueError if it is not empty and lacks the file `marker`: it is then something
    else than an earlier version.
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
