"""Several processes of one run: each reads and rewards the prompts whose rows lie on its devices; process 0 writes.

Built on `jax.distributed`. All processes must make the same calls in the same order, or they would wait for one
another. So they first exchange whatever decides what comes next. With one process nothing here communicates.
"""

import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import msgpack
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from gemma3.mesh import DATA

Settings = TypeVar("Settings")  # a dataclass with a field `out`

# A process whose machine fails closes no connections. After so long without a heartbeat jax takes it for gone.
_HEARTBEAT_SECONDS = 60
_JOIN_SECONDS = 300
# A split array goes to process 0 in pieces of about this size, so that no device has to hold more of it at once.
_PIECE_BYTES = 2**28


def _await_first(coordinator: str) -> None:
    """Return when process 0 listens; RuntimeError if it does not. jax itself would abort without a clear message."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + _JOIN_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"--coordinator {coordinator}: process 0 does not answer there ({error}); check the address, and "
                    f"start all processes within {_JOIN_SECONDS / 60:.0f} minutes"
                ) from error
        time.sleep(0.5)


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other processes, at the given address or as the cluster of this process says.

    Call it before jax touches any device. Afterwards only the first process prints on stdout. ValueError if only some
    of the three arguments are given, RuntimeError if no one answers at the address.
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"{', '.join(missing)} is missing: {', '.join(given)} go together, or none for a cluster's own"
        )
    if not missing and not 0 <= process_id < num_processes:
        raise ValueError(f"--process-id {process_id}: it must be from 0 to {num_processes - 1}, --num-processes less 1")
    if not missing and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"--coordinator {coordinator}: give the address of process 0 as HOST:PORT")
    if not missing:
        print(f"process {process_id} of {num_processes} waits for the others at {coordinator}", flush=True)
        if process_id:
            _await_first(coordinator)
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except ValueError as error:
        if missing and "coordinator_address should be defined" in str(error):
            return  # jax finds no cluster: this process is the only one
        raise
    if not is_first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def exchange(records: Mapping[int, Any]) -> dict[int, Any]:
    """The records of all processes, made of what msgpack holds; if two share a key, the earlier process's counts."""
    if jax.process_count() == 1:
        return dict(records)
    packed = np.frombuffer(msgpack.packb(dict(records)), np.uint8)
    longest = int(process_allgather(np.array([packed.size])).max())
    # A power of two, since each new length is compiled anew.
    padded = np.zeros(max(4096, 1 << (longest - 1).bit_length()), np.uint8)
    padded[: packed.size] = packed
    together = {}
    for content in reversed(process_allgather(padded)):
        unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=0)
        unpacker.feed(content.tobytes())
        together |= next(unpacker)
    return together


def agree(settings: Settings) -> Settings:
    """The settings with the first process's run directory; ValueError if processes were given different flags."""
    own = {name: str(value) for name, value in asdict(settings).items() if name != "process_id"}
    everyone = exchange({jax.process_index(): own})
    for process, theirs in sorted(everyone.items()):
        for name, value in theirs.items():
            if name != "out" and value != everyone[0][name]:
                raise ValueError(
                    f"process {process} was started with --{name.replace('_', '-')} {value} and process 0 with "
                    f"{everyone[0][name]}; give all the same flags but --process-id"
                )
    return replace(settings, out=Path(everyone[0]["out"]))


def on_any_process(flag: bool) -> bool:
    return flag if jax.process_count() == 1 else bool(process_allgather(np.array([flag])).any())


def held_rows(count: int, mesh: Mesh) -> list[int]:
    """Which rows this process holds, in order: `count` rows are padded to a multiple of `data` and split over it."""
    rows = -(-count // mesh.shape[DATA]) * mesh.shape[DATA]
    parts = NamedSharding(mesh, Spec(DATA)).addressable_devices_indices_map((rows,)).values()
    return sorted({row for (part,) in parts for row in range(*part.indices(rows)) if row < count})


def rows_on_host(array: jax.Array) -> np.ndarray:
    """An array split over `data`, on the host: rows that this process does not hold are 0."""
    rows = np.zeros(array.shape, array.dtype)
    for shard in array.addressable_shards:
        rows[shard.index] = shard.data
    return rows


def of_all_rows(held: Sequence[int], *columns: Sequence) -> list:
    """Columns with an entry for each row in `held`, joined with those of all other processes, in the rows' order.

    A list, of values that msgpack can hold, stays a list; an array stays an array of its dtype.
    """
    own = zip(*(column.tolist() if isinstance(column, np.ndarray) else column for column in columns), strict=True)
    together = [entries for _, entries in sorted(exchange(dict(zip(held, own, strict=True))).items())]
    return [
        np.array(found, column.dtype) if isinstance(column, np.ndarray) else list(found)
        for column, found in zip(columns, zip(*together, strict=True), strict=True)
    ]


def to_first(tree):
    """A pytree of arrays, whole on the host of process 0, which can write it. The other processes help and get None."""
    if jax.process_count() == 1:
        return tree

    def whole(x: jax.Array) -> np.ndarray | None:
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0)) if is_first() else None
        at_once = min(len(x), max(1, _PIECE_BYTES * len(x) // x.nbytes))
        out = np.empty(x.shape, x.dtype) if is_first() else None
        for start in range(0, len(x), at_once):
            start = min(start, len(x) - at_once)
            piece = process_allgather(jax.lax.dynamic_slice_in_dim(x, start, at_once), tiled=True)
            if is_first():
                out[start : start + at_once] = piece
        return out

    return jax.tree.map(whole, tree)


@contextmanager
def stopping_together() -> Iterator[None]:
    """Around all that follows `connect`: if one process stops, for whatever reason, the others stop too and say so.

    A process that fails exits at once, while jax would wait for the others. This closes its connections, which makes
    the next collective of the others fail. If a process is cut off, its heartbeat is missing, and jax ends the others.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            reason = str(error).strip().splitlines()[0]
            message = (
                f"error: process {jax.process_index()} lost another one, whose own output says why ({reason}); "
                "start all of them again, with --resume and the run's directory to go on from its last save"
            )
        else:
            message = "" if isinstance(error, SystemExit) else traceback.format_exc()
        print(message, file=sys.stderr, flush=True)
        os._exit(error.code if isinstance(error, SystemExit) else 1)
