"""What the parent `peers.py` and its workers share: the job, the batch, and how a call is timed.

Rests on numpy alone, so that a worker can run in a peer's own environment. A worker is `python -m
benchmarks.peer_NAME JOB.json`; it does the job's part and writes a JSON file of what it measured.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

# One update, the same in every system: AdamW after clipping by the global norm.
LEARNING_RATE, ADAM_BETA2, MAX_GRAD_NORM = 1e-5, 0.999, 1.0
# DAPO's loss (a mean over all tokens) with a KL term, which TRL, Tunix and this project all have.
EPSILON, BETA = 0.2, 0.04
LORA_R = LORA_ALPHA = 16
PAD, EOS, BOS = 0, 1, 2
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<boi>", "<eoi>", "<image>")  # the id of each is its place here
START_OF_IMAGE, END_OF_IMAGE, IMAGE = 4, 5, 6


@dataclass(frozen=True)
class Job:
    """One worker's work."""

    part: str  # "sampling", "update" or "step"
    model: str  # a Hugging Face directory
    adapter: str  # a PEFT directory: what training starts from
    batch: str  # an .npz file, see `load_batch`
    result: str  # where the JSON file goes
    vocab_size: int
    images: bool  # whether each prompt has one
    quick: bool  # a model of toy size
    prompts: int  # Q
    group: int  # G
    prompt_length: int  # P
    length: int  # C
    repeats: int
    device: str  # "cpu" or "gpu"
    started: float = 0.0  # time.time() at which the parent started the worker
    temperature: float = 1.0  # 0.0: greedy
    checkpointing: bool = False  # for TRL: whether it recomputes each layer in the backward pass

    @property
    def dtype(self) -> str:
        """Accelerators are built for bfloat16; on a CPU it is emulated, and XLA and torch do this differently."""
        return "float32" if self.device == "cpu" else "bfloat16"


def write_job(path: Path, job: Job) -> None:
    path.write_text(json.dumps(asdict(replace(job, started=time.time()))))


def read_job() -> Job:
    return Job(**json.loads(Path(sys.argv[1]).read_text()))


def load_batch(job: Job) -> dict[str, np.ndarray]:
    """prompt_ids int32[Q, P], without padding; pixels uint8[Q, h, w, 3] where prompts have an image; and for updates
    completion_ids int32[Q, G, C], advantages float32[Q, G], old_logps and ref_logps float32[Q, G, C].
    """
    with np.load(job.batch) as arrays:
        return dict(arrays)


def words(ids: Iterable[int]) -> str:
    """Ids as text, one word a token: every system needs a tokenizer to train, and this is the simplest."""
    return " ".join(SPECIAL[i] if i < len(SPECIAL) else str(i) for i in map(int, ids))


def reward(completion: str) -> float:
    """Cheap, and different from one completion to the next."""
    return float(completion.count("7"))


def peak_bytes() -> int:
    """The most memory this process has held. Not getrusage's, which starts from what the parent held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise ValueError("/proc/self/status names no VmHWM; run the benchmark on Linux")


def now() -> tuple[float, float]:
    """The time, and the processor time that this process has used, in seconds."""
    return time.time(), time.process_time()


def times_between(job: Job, moments: list[tuple[float, float]]) -> dict[str, Any]:
    """Seconds of the first call (with compilation), of each later one, and from the process's start to the first's end.

    Processor seconds are more reliable on a busy machine: they grow little when other work takes its turn.
    """
    first, *seconds = np.diff([wall for wall, _ in moments]).tolist()
    _, *processor = np.diff([used for _, used in moments]).tolist()
    return {"first": first, "from_start": moments[1][0] - job.started, "seconds": seconds, "cpu_seconds": processor}


def measure(job: Job, call: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What the first `call` returned, and the times of this one and of `job.repeats` further ones.

    `call` must not return before its work is done.
    """
    moments = [now()]
    first = call()
    moments.append(now())
    for _ in range(job.repeats):
        call()
        moments.append(now())
    return first, times_between(job, moments)


def write_result(job: Job, times: dict[str, Any], memory: int | None = None, **seen: Any) -> None:
    """`seen` is what the parent compares: tokens, loss, grad_norm, drawn (tokens a step). memory=None: the host's."""
    result = times | seen | {"peak_bytes": peak_bytes() if memory is None else memory}
    Path(job.result).write_text(json.dumps(result))
