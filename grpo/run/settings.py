"""Every flag of train.py: what it does, its default, and what depends on the model, the dataset and the machine.

Names are TRL's where TRL has one, and PEFT's for LoRA.
"""

import json
import math
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path

import jax
from jax.sharding import Mesh

from gemma3.config import CONFIGS, NANO, Config
from gemma3.files.config_json import read_config
from gemma3.files.hub import resolve
from gemma3.lora import TARGETS
from gemma3.mesh import DATA
from grpo.algorithm import IMPORTANCE_SAMPLING_LEVELS, LOSS_TYPES, SCALE_REWARDS, LossConfig
from grpo.run.cli import flag
from grpo.run.trackers import TRACKERS

WORDINGS = ("instructed", "role", "hint", "query", "bare")
# Found for the nano model on the embedded task: an adapter, and all weights.
NANO_LEARNING_RATES = (1e-3, 3e-4)

# The least that a number may be; what the algorithm, the sampler and LoRA ask of theirs is said there.
LEAST = (
    dict.fromkeys(
        (
            *("steps", "save_every", "keep", "eval_batch", "max_prompt_length"),
            *("prompts_per_step", "num_generations", "num_iterations", "micro_batch"),
        ),
        1,
    )
    | {"max_completion_length": 2}
    | dict.fromkeys(
        (
            *("seed", "eval_every", "eval_limit", "lora_r", "dynamic_sampling", "warmup_steps", "learning_rate"),
            *("weight_decay", "virtual_devices"),
        ),
        0,
    )
)


@dataclass(frozen=True)
class Settings:
    """Every flag and its default; None is one that depends on model, data or machine, see `resolve_defaults`."""

    objective: str = flag("grpo", "what to optimise: rewards, or a dataset's solutions", "Run", ["grpo", "sft"])
    out: Path | None = flag(None, "run directory (default runs/DATE-MODEL-DATA)", "Run")
    steps: int = flag(100, "optimizer steps over fresh prompts", "Run")
    seed: int = flag(0, "seeds data order, initialisation and sampling", "Run")
    resume: Path | None = flag(None, "continue the run in this directory, with its settings", "Run")
    resume_step: int | None = flag(None, "continue from this saved step instead of the newest", "Run")
    save_every: int = flag(20, "steps between checkpoints", "Run")
    keep: int = flag(2, "checkpoints to keep", "Run")
    eval_every: int = flag(0, "steps between evaluations on held-out examples; 0: only before and after", "Run")
    eval_limit: int = flag(384, "held-out examples to evaluate on; 0: all", "Run")
    eval_batch: int = flag(128, "examples at a time in evaluation", "Run")
    log: str | None = flag(None, "a tracker to send metrics to as well", "Run", TRACKERS)

    model: str = flag("nano", "nano, a directory, a name such as google/gemma-3-4b-it, or scratch: a new nano", "Model")
    adapter: Path | None = flag(None, "PEFT adapter to start from, with its rank, scale and targets", "Model")
    dtype: str | None = flag(
        None, "of the frozen weights (default bfloat16, on a CPU float32)", "Model", ["bfloat16", "float32"]
    )
    lora_r: int = flag(16, "LoRA rank; 0 trains all language weights", "Model")
    lora_alpha: float = flag(32.0, "LoRA scale is alpha / r", "Model")
    lora_rslora: bool = flag(False, "LoRA scale is alpha / sqrt(r)", "Model")
    lora_targets: tuple[str, ...] = flag(TARGETS, "projections that get an adapter", "Model")
    lora_vision: bool = flag(False, "adapt the vision tower's projections too", "Model")
    train_vision: bool = flag(False, "with --lora-r 0, train the vision tower too", "Model")

    data: str = flag("synthetic", "mathvista, gsm8k, synthetic, or a .jsonl, .parquet or .json file", "Data")
    eval_data: str | None = flag(None, "held-out dataset (default: the held-out part of --data)", "Data")
    wording: str | None = flag(None, "of the prompt (default instructed; for nano on synthetic bare)", "Data", WORDINGS)
    format: str = flag("answer", "tags the model answers in", "Data", ["answer", "solution"])
    reward: str | None = flag(None, "weighted parts, a preset, or my.py:function (default answer=1,format=0.5)", "Data")
    max_prompt_length: int | None = flag(
        None, "tokens; longer prompts are left out (default 512; for nano on synthetic 32)", "Data"
    )
    pan_and_scan: bool = flag(False, "show long pictures in crops too", "Data")
    skip_missing_images: bool = flag(False, "leave out rows without their picture", "Data")

    prompts_per_step: int = flag(16, "distinct prompts in a step", "Sampling")
    num_generations: int = flag(8, "completions of each prompt", "Sampling")
    max_completion_length: int | None = flag(None, "tokens (default 512; for nano on synthetic 56)", "Sampling")
    temperature: float = flag(1.0, "of sampling, and of all log-probs", "Sampling")
    top_k: int = flag(0, "sample from the k likeliest tokens; 0: all, which the algorithm assumes", "Sampling")
    top_p: float = flag(1.0, "sample from the likeliest tokens of this total probability", "Sampling")
    dynamic_sampling: int = flag(0, "at most this many further batches to replace groups of equal rewards", "Sampling")

    loss_type: str = flag("dapo", "how tokens are weighed, and clipped", "Algorithm", LOSS_TYPES)
    importance_sampling_level: str = flag(
        "token", "of the ratio; gspo is always sequence", "Algorithm", IMPORTANCE_SAMPLING_LEVELS
    )
    advantage: str = flag(
        "group", "baseline: the group's mean, or that of the others", "Algorithm", ["group", "leave-one-out"]
    )
    scale_rewards: str = flag(
        "group", "whose standard deviation divides advantages of --advantage group", "Algorithm", SCALE_REWARDS
    )
    epsilon: float = flag(0.2, "clip range below; cispo has none", "Algorithm")
    epsilon_high: float | None = flag(
        None, "clip range above (default: as below; for cispo the largest weight, 5)", "Algorithm"
    )
    delta: float | None = flag(None, "upper clip of the ratio where the advantage is negative", "Algorithm")
    beta: float = flag(0.0, "weight of the KL to the base model", "Algorithm")
    use_bias_correction_kl: bool = flag(True, "weigh the KL by the ratio", "Algorithm")
    mask_truncated_completions: bool = flag(False, "leave completions without an end out of the loss", "Algorithm")
    importance_sampling_clip_max: float | None = flag(None, "cap of sampler/trainer importance weights", "Algorithm")
    num_iterations: int = flag(1, "updates on each batch of samples", "Algorithm")

    learning_rate: float | None = flag(
        None, "peak (default 1e-5; with --lora-r 0 1e-6; for nano on synthetic 1e-3, 3e-4)", "Optimizer"
    )
    lr_scheduler: str = flag("cosine", "after warm-up: to a tenth, or constant", "Optimizer", ["cosine", "constant"])
    warmup_steps: int = flag(10, "updates of linear warm-up", "Optimizer")
    weight_decay: float = flag(0.0, "of AdamW", "Optimizer")
    adam_beta2: float = flag(0.99, "of AdamW", "Optimizer")
    max_grad_norm: float = flag(1.0, "clip the gradient's global norm", "Optimizer")
    micro_batch: int | None = flag(
        None, "prompts at a time in the gradient, per data shard (default 1; for nano on synthetic all)", "Optimizer"
    )

    mesh: str = flag("1,1", "devices: DATA,TENSOR", "Devices")
    virtual_devices: int = flag(0, "simulate this many devices on a CPU, in each process", "Devices")
    coordinator: str | None = flag(None, "HOST:PORT of process 0 of several (default: as a cluster says)", "Devices")
    num_processes: int | None = flag(None, "how many there are", "Devices")
    process_id: int | None = flag(None, "which one this is, from 0", "Devices")
    plan: str | None = flag(
        None, "run nothing; print what a step needs on a TPU such as v5e:2x4, or on cpu or gpu, those here", "Devices"
    )


def model_config(model: str) -> Config:
    """The config of a model: of a published name without its files, else read from where `resolve` finds it."""
    if model == "scratch":
        return NANO
    published = CONFIGS.get(model.removeprefix("google/"))
    return published if published and not Path(model).is_dir() else read_config(resolve(model))


def _is_nano(model: str) -> bool:
    return model_config(model).hidden_size == NANO.hidden_size


def resolve_defaults(settings: Settings) -> Settings:
    """Fill in what depends on the model, the dataset and the machine; ValueError for settings that contradict."""
    embedded = settings.data == "synthetic" and _is_nano(settings.model)
    defaults = {
        "dtype": "float32" if jax.default_backend() == "cpu" else "bfloat16",
        "wording": "bare" if embedded else "instructed",
        "reward": "answer=1,format=0.5",
        "max_prompt_length": 32 if embedded else 512,
        "max_completion_length": 56 if embedded else 512,
        "learning_rate": NANO_LEARNING_RATES[settings.lora_r == 0] if embedded else 1e-5 if settings.lora_r else 1e-6,
        "micro_batch": settings.prompts_per_step if embedded else 1,
        "out": Path("runs", f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(settings.model).name}-{Path(settings.data).stem}"),
    }
    settings = replace(settings, **{name: value for name, value in defaults.items() if getattr(settings, name) is None})
    for name, least in LEAST.items():
        value = getattr(settings, name)
        if not least <= value < math.inf:
            finite = "finite and " if isinstance(value, float) else ""
            raise ValueError(f"--{name.replace('_', '-')} {value}: it must be {finite}at least {least}")
    if not settings.max_grad_norm > 0:
        raise ValueError(f"--max-grad-norm {settings.max_grad_norm:g}: it must be above 0; inf clips nothing")
    if not 0 <= settings.adam_beta2 < 1:
        raise ValueError(f"--adam-beta2 {settings.adam_beta2:g}: it must be at least 0 and below 1")
    if settings.objective == "grpo" and settings.num_generations == 1:
        raise ValueError("--num-generations 1: a group of one has nothing to compare with; use at least 2")
    if not 0 < settings.temperature < math.inf:
        raise ValueError(
            f"--temperature {settings.temperature:g}: log-probs are divided by it, and greedy completions of a group "
            "are all alike; use one above 0, such as 1"
        )
    if settings.train_vision and settings.lora_r:
        raise ValueError(
            f"--train-vision trains whole weights, and --lora-r {settings.lora_r} an adapter; add --lora-r 0"
        )
    if settings.lora_vision and not settings.lora_r:
        raise ValueError("--lora-vision adds adapters, and --lora-r 0 trains whole weights; use --train-vision instead")
    return settings


def loss_config(settings: Settings) -> LossConfig | None:
    """What the flags say about the loss, None for supervised training; ValueError where they cannot be."""
    loss = LossConfig(**{entry.name: getattr(settings, entry.name) for entry in fields(LossConfig)})
    return None if settings.objective == "sft" else loss


def mesh_shape(text: str) -> tuple[int, int]:
    """The two numbers of --mesh DATA,TENSOR."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--mesh {text}: give two numbers, DATA,TENSOR, such as 2,4")
    return int(parts[0]), int(parts[1])


def check_batch(settings: Settings, mesh: Mesh) -> int:
    """The micro-batch of one data shard; ValueError where the prompts of a step do not divide."""
    prompts, data = settings.prompts_per_step, mesh.shape[DATA]
    if prompts % data:
        raise ValueError(
            f"--prompts-per-step {prompts} cannot be split over the data axis of --mesh {settings.mesh}; "
            f"use a multiple of {data}"
        )
    micro_batch = min(settings.micro_batch, prompts // data)
    if micro_batch < 1 or (prompts // data) % micro_batch:
        raise ValueError(
            f"--micro-batch {settings.micro_batch} does not divide the {prompts // data} prompts of a data shard "
            f"(--prompts-per-step {prompts}, --mesh {settings.mesh})"
        )
    return micro_batch


def git_commit() -> str | None:
    """The commit of this code, or None where it is no git checkout or there is no git."""
    if shutil.which("git") is None:
        return None
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return git.stdout.strip() or None


def described(settings: Settings) -> dict:
    """What config.json of a run holds: the resolved flags, and what they ran on."""
    packages = ("jax", "jaxlib", "numpy", "optax", "sentencepiece", "pillow", "safetensors")
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    return {
        "settings": flags,
        "command": " ".join(["python", *sys.argv]),
        "packages": {name: version(name) for name in packages},
        "git": git_commit(),
        "devices": f"{len(jax.devices())} {jax.devices()[0].device_kind}",
    }


def spelled_out(settings: Settings) -> str:
    """The resolved flags by topic, for the terminal."""
    topics = {}
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        shown = ",".join(value) if isinstance(value, tuple) else value
        topics.setdefault(entry.metadata["group"], []).append(f"{entry.name}={shown}")
    indent = " " * 11
    return "\n".join(
        textwrap.fill(f"{topic:<11}{'  '.join(values)}", width=110, subsequent_indent=indent, break_on_hyphens=False)
        for topic, values in topics.items()
    )


def stored_settings(run: Path) -> Settings:
    """The settings that a run was started with, to continue it; ValueError where there is no such run."""
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"--resume {run}: there is no run, since {path} does not exist")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["settings"]
        typed = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        adapter = typed["adapter"] and Path(typed["adapter"])
        of_this_start = dict.fromkeys(("resume_step", "coordinator", "num_processes", "process_id"))
        return Settings(**typed | of_this_start | {"out": run, "adapter": adapter, "resume": run})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--resume {run}: {path} is damaged or of another version ({error})") from error
