"""Side by side on one machine: this project, transformers' generate, TRL with PEFT, PrefixGrouper, Tunix and gemma.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.peers --python tunix=PATH --python gemma=PATH        # everything
    python -m benchmarks.peers update-text step-image --repeats 5             # some parts
    python -m benchmarks.peers --quick                                        # toy sizes: does it run?

Worker processes run one after another with the same random weights, prompts, lengths, precision (float32 on a CPU,
bfloat16 on a GPU) and number of threads; nothing stops a completion early. Sampling is at temperature 1 without top-k
or top-p, as GRPO's; the greedy parts are there to compare tokens. Each table says whether the work was the same as
ours: how many tokens were drawn and how many different ones, the share of equal greedy tokens, or the loss and
gradient norm of the first update. Let the machine be idle: where another process takes turns, torch's threads wait
for one another in every operation, and its times can grow a hundredfold.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.peer_job import Job, write_job

ROOT = Path(__file__).parents[1]
PIP = "pip install -r benchmarks/requirements.txt"


class System(NamedTuple):
    """A system to measure: its worker, and what it needs."""

    worker: str
    packages: tuple[str, ...]
    pip: str = PIP
    changes: dict[str, Any] = {}  # noqa: RUF012  fields of the job


SYSTEMS = {
    "ours": System("peer_ours", ("jax",)),
    "ours, 2G": System("peer_ours", ("jax",)),
    "transformers": System("peer_torch", ("torch", "transformers", "trl", "peft")),
    "trl": System("peer_torch", ("torch", "transformers", "trl", "peft")),
    "trl, checkpointing": System("peer_torch", ("torch", "transformers", "trl", "peft"), PIP, {"checkpointing": True}),
    "prefix-grouper": System("peer_prefix", ("prefix-grouper", "torch", "transformers", "trl", "peft")),
    "tunix": System("peer_tunix", ("google-tunix", "jax", "flax"), "pip install google-tunix, in its own environment"),
    "gemma": System("peer_gemma", ("gemma", "safetensors", "jax", "flax"), "benchmarks/requirements.txt says how"),
}


class Part(NamedTuple):
    """One table: a kind of work, its shape, the systems, and what multiples of our time and memory we want to see."""

    kind: str  # "sampling", "update" or "step"
    images: bool
    systems: tuple[str, ...]
    prompts: int  # Q
    prompt_length: int  # P
    length: int  # C
    time: dict[str, str] = {}  # noqa: RUF012
    memory: dict[str, str] = {}  # noqa: RUF012
    greedy: bool = False
    vocab_size: int | None = None  # None: that of --vocab-size


TEXT, IMAGE = (2, 256, 64), (1, 300, 128)  # Q, P, C
SAMPLERS = ("ours", "transformers")  # Tunix and gemma are measured on text alone
TRAINERS = ("ours", "trl", "trl, checkpointing", "prefix-grouper")
TEXT_SAMPLERS, TEXT_TRAINERS = (*SAMPLERS, "tunix", "gemma"), (*TRAINERS, "tunix")
PUBLISHED = 262144  # the vocabulary of every published Gemma 3
UPDATE = {"trl": "≥ 4", "prefix-grouper": "≥ 1.5"}
PARTS = {
    "sampling-text": Part("sampling", False, TEXT_SAMPLERS, *TEXT, {"transformers": "≥ 4", "tunix": "≥ 3"}),
    "sampling-image": Part("sampling", True, SAMPLERS, *IMAGE),
    "sampling-text-greedy": Part("sampling", False, TEXT_SAMPLERS, *TEXT, greedy=True),
    "sampling-image-greedy": Part("sampling", True, SAMPLERS, *IMAGE, greedy=True),
    "sampling-text-262k": Part("sampling", False, TEXT_SAMPLERS, *TEXT, {"transformers": "≥ 4"}, vocab_size=PUBLISHED),
    "update-text": Part("update", False, TEXT_TRAINERS, *TEXT, UPDATE, {"trl": "≥ 3"}),
    "update-image": Part("update", True, TRAINERS, *IMAGE, UPDATE | {"trl": "≥ 5"}),
    "update-text-262k": Part("update", False, TEXT_TRAINERS, *TEXT, vocab_size=PUBLISHED),
    "step-text": Part("step", False, ("ours", "trl", "tunix"), *TEXT, {"trl": "≥ 5"}),
    "step-image": Part("step", True, ("ours", "trl"), *IMAGE, {"trl": "≥ 5"}),
    "group-cost": Part("update", False, ("ours", "ours, 2G"), 2, 1024, 64, {"ours, 2G": "≤ 1.5"}),
}


def make_job(name: str, system: str, directory: Path, args: argparse.Namespace) -> Job:
    part = PARTS[name]
    group = args.group * (2 if system == "ours, 2G" else 1)
    prompt_length, length = (n // 8 if args.quick else n for n in (part.prompt_length, part.length))
    vocab_size = 512 if args.quick else part.vocab_size or args.vocab_size
    model = directory / f"{'image' if part.images else 'text'}-{vocab_size}"
    return Job(
        part=part.kind,
        model=str(model),
        adapter=f"{model}-adapter",
        batch=str(directory / f"{name}-{group}.npz"),
        result=str(directory / f"{name}-{system}.json"),
        vocab_size=vocab_size,
        images=part.images,
        quick=args.quick,
        prompts=args.prompts or part.prompts,
        group=group,
        prompt_length=prompt_length,
        length=length,
        repeats=args.repeats,
        device=args.device,
        temperature=0.0 if part.greedy else 1.0,
        **SYSTEMS[system].changes,
    )


def environment(args: argparse.Namespace) -> dict[str, str]:
    """The environment of all workers: the same number of threads, set in two ways, and no access to the hub.

    glibc's malloc by default gives each large tensor fresh pages and takes them back, which slows torch; not here.
    """
    threads = str(args.threads)
    return os.environ | {
        "JAX_PLATFORMS": "cpu" if args.device == "cpu" else "cuda",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "MALLOC_MMAP_THRESHOLD_": str(16 * 2**30),
        "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_worker(python: str, arguments: list[str], args: argparse.Namespace) -> str | None:
    """Run one worker to its end; return what went wrong, or None."""
    cores = sorted(os.sched_getaffinity(0))[: args.threads]  # XLA starts as many threads as it may use cores

    def confine() -> None:
        os.sched_setaffinity(0, cores)
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, the worker is what ends

    done = subprocess.run(
        [python, "-m", *arguments],
        cwd=ROOT,
        env=environment(args),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        preexec_fn=confine,
    )
    if done.returncode == 0:
        return None
    if done.returncode == -9:
        return "killed: not enough memory?"
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def versions(python: str, packages: tuple[str, ...]) -> dict[str, str] | None:
    """The installed packages' versions, as that interpreter sees them; None where one is missing."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {packages!r}}}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def measure(name: str, system: str, directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Times and results of one system's part, or {"error": why there are none}."""
    python = args.python.get(SYSTEMS[system].worker.removeprefix("peer_"), sys.executable)
    found = versions(python, SYSTEMS[system].packages)
    if found is None:
        return {"error": f"not installed: {SYSTEMS[system].pip}"}
    job = make_job(name, system, directory, args)
    path = directory / "job.json"
    write_job(path, job)
    if not Path(job.batch).exists():
        own = args.python.get("ours", sys.executable)
        if error := run_worker(own, ["benchmarks.peer_ours", str(path), "prepare"], args):
            return {"error": f"no batch: {error}"}
        write_job(path, job)
    error = run_worker(python, [f"benchmarks.{SYSTEMS[system].worker}", str(path)], args)
    return {"error": error} if error else json.loads(Path(job.result).read_text()) | {"versions": found}


def same_work(part: Part, tokens: int, result: dict[str, Any], ours: dict[str, Any]) -> str:
    """In a few words, whether a system did what ours did; `tokens` is how many were to be drawn."""
    if part.kind == "step":
        other = "" if result.get("same_prompts", True) else ", OTHER PROMPTS"
        return f"{result['drawn']} of {tokens} tokens{other}"
    if part.kind == "sampling":
        drawn = [token for row in result["tokens"] for token in row]
        if not part.greedy:
            return f"{len(drawn)} of {tokens} tokens, {len(set(drawn))} different"
        equal = [a == b for a, b in zip(drawn, (token for row in ours["tokens"] for token in row), strict=True)]
        return f"{sum(equal) / len(equal):.1%} of tokens"
    text = f"loss {result['loss']:+.5f}"
    if result is ours:
        return f"{text}, norm {result['grad_norm']:.5f}"
    text += f" ({result['loss'] - ours['loss']:+.0e})"
    if "grad_norm" in result:
        text += f", norm {result['grad_norm'] / ours['grad_norm'] - 1:+.0e}"
    return text


def figures(part: Part, tokens: int, system: str, result: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """One system's table row without its name; compared with ours if ours was measured."""
    seconds, peak = result["seconds"], result["peak_bytes"]
    middle = statistics.median(seconds)
    slower = larger = same = "?"
    if "error" not in ours:
        slower = f"{middle / statistics.median(ours['seconds']):.2f}"
        larger = f"{peak / ours['peak_bytes']:.2f}"
        same = "" if system == "ours, 2G" else same_work(part, tokens, result, ours)
    return [
        f"{result['from_start']:.1f}",
        f"{result['first']:.2f}",
        f"{middle:.2f}",
        f"{min(seconds):.2f} - {max(seconds):.2f}",
        "" if part.kind == "update" else f"{tokens / middle:.0f}",
        slower,
        part.time.get(system, ""),
        f"{peak / 1e9:.2f}",
        larger,
        part.memory.get(system, ""),
        same,
    ]


def show(name: str, results: dict[str, Any], args: argparse.Namespace, console: Console) -> None:
    """Print one part's table, with the systems that have been measured."""
    part = PARTS[name]
    job = make_job(name, "ours", Path(), args)
    shape = f"Q={job.prompts} G={job.group} P={job.prompt_length}{' with an image' * job.images} C={job.length}"
    shape += f" V={job.vocab_size}"
    table = Table(title=f"{name}: {shape}, {args.device}, {job.dtype}, {args.threads} threads", title_justify="left")
    columns = ["system", "start to first, s", "first call, s", "later, s", "min - max", "tokens/s", "x ours", "wanted"]
    for column in [*columns, "peak, GB", "x ours", "wanted", "the same work?"]:
        table.add_column(column, justify="left" if column in ("system", "the same work?") else "right")
    tokens, ours = job.prompts * job.group * job.length, results.get("ours", {"error": "not measured"})
    for system, result in results.items():
        if "error" in result:
            table.add_row(system, *[""] * 10, result["error"])
        else:
            table.add_row(system, *figures(part, tokens, system, result, ours))
    console.print(table)


def interpreter(text: str) -> tuple[str, str]:
    """NAME=PATH of --python."""
    name, _, path = text.partition("=")
    workers = ("ours", "torch", "prefix", "tunix", "gemma")
    if name not in workers or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH with a NAME of {', '.join(workers)}")
    return name, os.path.abspath(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; all of them if none")
    parser.add_argument("--quick", action="store_true", help="toy sizes, in two minutes: no numbers worth reading")
    parser.add_argument("--repeats", type=int, default=3, help="calls after the first, of which the median is taken")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompts", type=int, help="Q; each part's own if not given")
    parser.add_argument("--group", type=int, default=8, help="G")
    parser.add_argument("--vocab-size", type=int, default=32768, help="of the parts whose name ends without one")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    python = "the interpreter of a system with an environment of its own; may be given again"
    parser.add_argument("--python", type=interpreter, action="append", default=[], metavar="NAME=PATH", help=python)
    parser.add_argument("--out", type=Path, default=Path("peers.json"), help="every number, written as it comes")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    args.parts, args.python = args.parts or list(PARTS), dict(args.python)
    return args


def main() -> None:
    args = parse()
    results: dict[str, dict[str, Any]] = {}
    settings = {name: value for name, value in vars(args).items() if name not in ("python", "out")}
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "settings": settings,
        "results": results,
    }
    console = Console(width=200)
    try:
        with tempfile.TemporaryDirectory() as directory:
            for name in args.parts:
                results[name] = {}
                for system in PARTS[name].systems:
                    print(f"{name}: {system} ...", file=sys.stderr, flush=True)
                    results[name][system] = measure(name, system, Path(directory), args)
                    args.out.write_text(json.dumps(record, indent=1))
                show(name, results[name], args, console)
    except KeyboardInterrupt:
        show(name, results[name], args, console)
        sys.exit(130)


if __name__ == "__main__":
    main()
