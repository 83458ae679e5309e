"""Several processes of one run: each reads and rewards the prompts whose rows lie on its devices, process 0 writes.

Rests on `jax.distributed`. All processes make the same calls in the same order, or they would wait for one another; so
whatever decides what comes next is exchanged first. With one process nothing here communicates.
"""

import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import msgpack
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma3.mesh import DATA
from grpo.run.settings import Settings

# A process that is gone without its connections being closed, its machine having failed, is missed after so long.
_HEARTBEAT_SECONDS = 60
_JOIN_SECONDS = 300
# What is gathered at once on its way to process 0, so that no device has to hold more than this of a split array.
_PIECE_BYTES = 2**28


def _await_first(coordinator: str) -> None:
    """Return when process 0 listens; RuntimeError if it does not. jax would abort where this says what is wrong."""
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
    """Join the other processes: at the given address, or as the cluster says that this process finds itself in.

    To be called before jax touches any device. Processes but the first print nothing more on stdout. ValueError where
    only some of the three are given, RuntimeError where no one answers at the address.
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
    """All processes' records, of whatever msgpack holds; where two have the same key the earlier process's counts."""
    if jax.process_count() == 1:
        return dict(records)
    packed = np.frombuffer(msgpack.packb(dict(records)), np.uint8)
    longest = int(process_allgather(np.array([packed.size])).max())
    # A power of two: each new length would be compiled anew.
    padded = np.zeros(max(4096, 1 << (longest - 1).bit_length()), np.uint8)
    padded[: packed.size] = packed
    together = {}
    for content in reversed(process_allgather(padded)):
        unpacker = msgpack.Unpacker(strict_map_key=False, max_buffer_size=0)
        unpacker.feed(content.tobytes())
        together |= next(unpacker)
    return together


def agree(settings: Settings) -> Settings:
    """The first process's run directory for all; ValueError where they were started with different flags."""
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


def held_rows(count: int, mesh: Mesh) -> set[int]:
    """Which of `count` rows, split over `data` and filled up to a multiple of it, this process holds."""
    rows = -(-count // mesh.shape[DATA]) * mesh.shape[DATA]
    parts = NamedSharding(mesh, P(DATA)).addressable_devices_indices_map((rows,)).values()
    return {row for (part,) in parts for row in range(*part.indices(rows)) if row < count}


def rows_on_host(array: jax.Array) -> np.ndarray:
    """An array split over `data` on the host: the rows that this process holds, the others 0."""
    rows = np.zeros(array.shape, array.dtype)
    for shard in array.addressable_shards:
        rows[shard.index] = shard.data
    return rows


def to_first(tree):
    """A pytree of arrays as process 0 can write it, whole on its host; the other processes help and get nothing."""
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
    """Around all that follows `connect`: where one process stops for whatever reason, the others stop too, and say so.

    A process that fails leaves at once, without waiting for the others as jax would; the connections it closes make
    their next collective fail. One that is cut off is missed by its heartbeat, and jax then ends the others.
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
