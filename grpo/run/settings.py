"""Every flag of train.py: what it does, its default, and what depends on the model, the dataset and the machine.

A flag has TRL's name where TRL has one, and PEFT's for LoRA.
"""

import math
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from data.prompt import WORDINGS
from gemma3.config import Config
from gemma3.files.config_json import read_config
from gemma3.files.hub import resolve
from gemma3.files.published import CONFIGS, NANO
from gemma3.filters import Sampling
from gemma3.lora import TARGETS, LoraConfig
from gemma3.mesh import DATA
from grpo.algorithm import IMPORTANCE_SAMPLING_LEVELS, LOSS_TYPES, SCALE_REWARDS, LossConfig
from grpo.run.cli import check_least, flag
from grpo.run.trackers import TRACKERS

# Found for the nano model on the embedded task: for an adapter, and for all language weights.
NANO_LEARNING_RATES = (1e-3, 3e-4)


@dataclass(frozen=True)
class Settings:
    """Every flag and its default. None: the default depends on model, data or machine, see `resolve_defaults`."""

    objective: str = flag("grpo", "what to optimise: rewards, or a dataset's solutions", ["grpo", "sft"], topic="Run")
    out: Path | None = flag(None, "run directory (default runs/DATE-MODEL-DATA)")
    steps: int = flag(100, "optimizer steps over fresh prompts", least=1)
    seed: int = flag(0, "seeds data order, initialisation and sampling", least=0)
    resume: Path | None = flag(None, "continue the run in this directory, with its settings")
    resume_step: int | None = flag(None, "continue from this saved step instead of the newest")
    save_every: int = flag(20, "steps between checkpoints", least=1)
    keep: int = flag(2, "checkpoints to keep", least=1)
    eval_every: int = flag(0, "steps between evaluations on held-out examples; 0: only before and after", least=0)
    eval_limit: int = flag(384, "held-out examples to evaluate on; 0: all", least=0)
    eval_batch: int = flag(128, "examples at a time in evaluation", least=1)
    log: str | None = flag(None, "a tracker to send metrics to as well", TRACKERS)
    explain: Path | None = flag(None, "train nothing; explain one step of nano, in the terminal and on this page")

    model: str = flag("nano", "nano, scratch (a new nano), a directory, or a name: google/gemma-3-4b-it", topic="Model")
    adapter: Path | None = flag(None, "PEFT adapter to start from, with its rank, scale and targets")
    dtype: str | None = flag(
        None, "dtype of the frozen weights (default bfloat16; float32 on a CPU)", ["bfloat16", "float32"]
    )
    lora_r: int = flag(16, "LoRA rank; 0 trains all language weights", least=0)
    lora_alpha: float = flag(32.0, "LoRA scale is alpha / r")
    lora_rslora: bool = flag(False, "LoRA scale is alpha / sqrt(r)")
    lora_targets: tuple[str, ...] = flag(TARGETS, "projections that get an adapter")
    lora_vision: bool = flag(False, "adapt the vision tower's projections too")
    train_vision: bool = flag(False, "with --lora-r 0, train the vision tower too")

    data: str = flag("synthetic", "mathvista, gsm8k, synthetic, or a .jsonl, .parquet or .json file", topic="Data")
    eval_data: str | None = flag(None, "held-out dataset (default: the held-out part of --data)")
    wording: str | None = flag(None, "how prompts are worded (default instructed; nano on synthetic: bare)", WORDINGS)
    format: str = flag("answer", "tags the model answers in", ["answer", "solution"])
    reward: str | None = flag(None, "weighted parts, a preset, or my.py:function (default answer=1,format=0.5)")
    max_prompt_length: int | None = flag(
        None, "tokens; longer are left out (default 512; nano on synthetic: 32)", least=1
    )
    pan_and_scan: bool = flag(False, "show long images in crops too")
    skip_missing_images: bool = flag(False, "leave out rows without their image")

    prompts_per_step: int = flag(16, "distinct prompts in a step", topic="Sampling", least=1)
    num_generations: int = flag(8, "completions of each prompt", least=1)
    max_completion_length: int | None = flag(None, "tokens (default 512; nano on synthetic: 56)", least=2)
    temperature: float = flag(1.0, "of sampling, and used for all log-probs")
    top_k: int = flag(0, "sample from the k likeliest tokens; 0: all, which the algorithm assumes")
    top_p: float = flag(1.0, "sample from the likeliest tokens of this total probability")
    dynamic_sampling: int = flag(
        0, "sample at most this many further batches, to replace groups of equal rewards", least=0
    )

    loss_type: str = flag("dapo", "how tokens are weighted and clipped", LOSS_TYPES, topic="Algorithm")
    importance_sampling_level: str = flag(
        "token", "level of the importance ratio; gspo: sequence", IMPORTANCE_SAMPLING_LEVELS
    )
    advantage: str = flag("group", "baseline: the mean of the group, or of its others", ["group", "leave-one-out"])
    scale_rewards: str = flag("group", "the rewards whose standard deviation divides --advantage group", SCALE_REWARDS)
    epsilon: float = flag(0.2, "the ratio is clipped at 1 - epsilon; cispo has no lower clip")
    epsilon_high: float | None = flag(
        None, "and at 1 + epsilon_high (default: epsilon; for cispo the largest weight, 5)"
    )
    delta: float | None = flag(None, "upper clip of the ratio where the advantage is negative")
    beta: float = flag(0.0, "weight of the KL to the base model")
    use_bias_correction_kl: bool = flag(True, "weigh the KL by the ratio")
    mask_truncated_completions: bool = flag(False, "leave completions without an end out of the loss")
    importance_sampling_clip_max: float | None = flag(None, "cap of the weights trainer / sampler")
    num_iterations: int = flag(1, "updates on each batch of samples", least=1)

    learning_rate: float | None = flag(
        None, "peak (default 1e-5; with --lora-r 0 1e-6; nano on synthetic: 1e-3, 3e-4)", topic="Optimizer", least=0
    )
    lr_scheduler: str = flag("cosine", "after warm-up: to a tenth, or constant", ["cosine", "constant"])
    warmup_steps: int = flag(10, "updates of linear warm-up", least=0)
    weight_decay: float = flag(0.0, "of AdamW", least=0)
    adam_beta2: float = flag(0.99, "of AdamW")
    max_grad_norm: float = flag(1.0, "clip the gradient's global norm")
    micro_batch: int | None = flag(
        None, "prompts at a time in the gradient, per data shard (default 1; nano on synthetic: all)", least=1
    )

    mesh: str = flag("1,1", "devices: DATA,TENSOR", topic="Devices")
    virtual_devices: int = flag(0, "simulate this many devices on a CPU, in each process", least=0)
    coordinator: str | None = flag(None, "HOST:PORT of process 0, of several processes (default: as a cluster says)")
    num_processes: int | None = flag(None, "how many processes there are")
    process_id: int | None = flag(None, "number of this process, from 0")
    plan: str | None = flag(None, "run nothing; print what a step needs on a TPU such as v5e:2x4, or here: cpu or gpu")

    @property
    def sampling(self) -> Sampling:
        group = 1 if self.objective == "sft" else self.num_generations
        return Sampling(self.temperature, self.top_k, self.top_p, group, self.max_completion_length)


def model_config(model: str) -> Config:
    """The config of a model: built in for a published name, else read from the files that `resolve` finds."""
    if model == "scratch":
        return NANO
    published = CONFIGS.get(model.removeprefix("google/"))
    return published if published and not Path(model).is_dir() else read_config(resolve(model))


def resolve_defaults(settings: Settings) -> Settings:
    """Fill in what depends on the model, the dataset and the machine; ValueError for contradictory settings."""
    embedded = settings.data == "synthetic" and model_config(settings.model).hidden_size == NANO.hidden_size
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
    check_least(settings)
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


def lora_config(settings: Settings) -> LoraConfig | None:
    """The adapter that the flags describe, None for whole weights; ValueError if there can be no such adapter."""
    s = settings
    return LoraConfig(s.lora_r, s.lora_alpha, s.lora_rslora, s.lora_targets, s.lora_vision) if s.lora_r else None


def loss_config(settings: Settings) -> LossConfig | None:
    """The loss that the flags describe, None for supervised training; ValueError if there can be no such loss."""
    loss = LossConfig(**{entry.name: getattr(settings, entry.name) for entry in fields(LossConfig)})
    return None if settings.objective == "sft" else loss


def check_batch(settings: Settings, mesh: Mesh) -> int:
    """The micro-batch of one data shard; ValueError if the prompts of a step cannot be divided evenly."""
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
