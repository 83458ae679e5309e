"""Moving tensors between safetensors files and (sharded) arrays; knows nothing of any model.

A layout says how a stored tensor becomes our array, in the notation of einops: "(N H) D -> D N H" means that the file
holds a matrix whose rows are N heads of H, and that the array has the axes D, N, H. It serves for writing too.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gemma3.files.writing import write_json

_CHUNK_BYTES = 2**25  # how much of a file is in memory at once, beside the array it is copied to
_FLOATS = ("F64", "F32", "F16", "BF16")


class Stored(NamedTuple):
    """A tensor in a file: where it is, and its shape and dtype there."""

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
    """The tensors in a safetensors file. ValueError if it is damaged or holds anything but plain floats."""
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
    # The file is opened again for each piece: closing it frees the mapped pages, which would add up to the whole file.
    with _opened(tensor.path) as file:
        return file.get_slice(tensor.name)[where]


def _sides(layout: str) -> list[list[str]]:
    """ "(N H) D -> D N H" to [["NH", "D"], ["D", "N", "H"]]."""
    sides = [re.findall(r"\([^)]*\)|\w", side) for side in layout.split("->")]
    return [[re.sub(r"\W", "", group) for group in side] for side in sides]


def stored_shape(layout: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that a tensor has in the file, from a layout such as "(N H) D -> D N H"."""
    return tuple(math.prod(sizes[axis] for axis in group) for group in _sides(layout)[0])


def read_into(out: np.ndarray, tensor: Stored, layout: str, sizes: Mapping[str, int], ranges: Sequence[range]) -> None:
    """Copy a part of a stored tensor into `out`, in pieces, and cast it to the dtype of `out`.

    ranges: the part, one range for each axis of our whole array; `out` has their lengths. A range may leave out a part
    of its axis only if the axis is not joined to others in the array and comes first in its group in the file.
    """
    stored, ours = _sides(layout)
    part = {axis: range(size) for axis, size in sizes.items()}
    part |= {group: axis_range for group, axis_range in zip(ours, ranges, strict=True) if len(group) == 1}
    stored_axes, our_axes = "".join(stored), "".join(ours)
    target = out.reshape([len(part[axis]) for axis in our_axes])  # a view: only joined axes are separated
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
    """An empty array at a multiple of 64 bytes: a CPU device uses such memory as it is, and would copy any other."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def filled(
    shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding, fill: Callable[[np.ndarray, list[range]], None]
) -> jax.Array:
    """Make an array by calling `fill(out, ranges)` for each device's part, so that no process holds the whole."""

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
    """Write model.safetensors, or an index and shards of at most `max_shard_bytes`; one shard is in memory at once."""
    by_name, parameters = {tensor.name: tensor for tensor in tensors}, 0
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        arrays = {name: by_name[name].make() for name in names}
        save_file(arrays, directory / file, metadata={"format": "pt"})
        parameters += sum(array.size for array in arrays.values())
    if split.is_sharded:
        metadata = {"total_parameters": parameters} | split.metadata
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        write_json(directory / "model.safetensors.index.json", index)
