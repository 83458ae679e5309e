"""Every flag of eval.py, and what its --ckpt is: a run, an adapter, or a model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from grpo.cli import flag
from grpo.settings import PROMPTS


@dataclass(frozen=True)
class EvalSettings:
    """Every flag of eval.py; None is what the run was trained with, or train.py's default."""

    ckpt: str = flag("nano", "run directory, PEFT adapter, model directory or name", "Model")
    base: bool = flag(True, "evaluate the base model too, beside what was trained from it", "Model")
    model: str | None = flag(None, "base model (default: the one that the run or the adapter names)", "Model")
    dtype: str | None = flag(
        None, "of the weights (default bfloat16, on a CPU float32)", "Model", ["bfloat16", "float32"]
    )

    data: str | None = flag(None, "as in train.py (default: what the run was evaluated on, or synthetic)", "Data")
    split: str | None = flag(
        None, "part of the dataset (default: all, or what the run did not train on)", "Data", ["test", "all"]
    )
    limit: int = flag(0, "at most this many examples; 0: all, of synthetic 384", "Data")
    prompt: str | None = flag(None, "wording of the prompt", "Data", PROMPTS)
    format: str | None = flag(None, "tags the model answers in", "Data", ["answer", "solution"])
    pictures: str = flag(
        "given", "shown as they are, blank, or another example's", "Data", ["given", "blank", "shuffled"]
    )
    max_prompt_length: int | None = flag(None, "tokens; longer prompts are left out", "Data")
    pan_and_scan: bool | None = flag(None, "show long pictures in crops too", "Data")
    skip_missing_images: bool | None = flag(None, "leave out rows without their picture", "Data")

    scorer: str = flag(
        "current", "MathVista's official one, or that behind its published scores", "Scoring", ["current", "published"]
    )
    reward: str | None = flag(None, "compared with the preferences of rows that bring completions", "Scoring")

    max_completion_length: int | None = flag(None, "tokens", "Sampling")
    temperature: float = flag(0.0, "0 is greedy", "Sampling")
    num_samples: int = flag(1, "completions of each example; from 2 on for pass@k and maj@k", "Sampling")
    batch_size: int = flag(128, "examples at a time", "Sampling")
    seed: int = flag(0, "of sampling, and of shuffling pictures", "Sampling")

    out: Path | None = flag(None, "where to write the figures (default: eval.json, in the run if it is one)", "Run")
    mesh: str = flag("1,1", "devices: DATA,TENSOR", "Devices")
    virtual_devices: int = flag(0, "simulate this many devices on a CPU", "Devices")

    def __post_init__(self):
        for name in ("num_samples", "batch_size", "max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: it must be at least 1")
        if self.limit < 0 or self.temperature < 0:
            name, value = ("limit", self.limit) if self.limit < 0 else ("temperature", self.temperature)
            raise ValueError(f"--{name} {value}: it must be 0 or more")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"--num-samples {self.num_samples}: greedy samples of an example are all alike; add --temperature 1"
            )


class Found(NamedTuple):
    """What --ckpt is."""

    models: dict[str, tuple[str, Path | None]]  # name in the figures to (model, adapter or None)
    run: dict  # the settings of the run, empty where it is none


def find_models(ckpt: str, model: str | None, with_base: bool) -> Found:
    """The models to evaluate of a run, an adapter, a model directory or a name, the base before what came of it."""
    path, run = Path(ckpt), {}
    adapter = whole = None
    if (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"--ckpt {ckpt}: this run has lost its config.json; give its adapter or model instead")
        run = json.loads((path / "config.json").read_text())["settings"]
        model = model or run["model"]
        adapter, whole = (path / name if (path / name).is_dir() else None for name in ("adapter", "model"))
        if not (adapter or whole):
            raise ValueError(f"--ckpt {ckpt}: this run has saved nothing yet")
    elif (path / "adapter_config.json").is_file():
        adapter = path
        model = model or json.loads((path / "adapter_config.json").read_text()).get("base_model_name_or_path")
        if not model:
            raise ValueError(f"--ckpt {ckpt}: the adapter does not name its base model; give it with --model")
    else:
        if model:
            raise ValueError(f"--ckpt {ckpt} is no run and no adapter, so --model has no use; leave it out")
        return Found({"model": (ckpt, None)}, run)
    base = {"base": (model, None)} if with_base else {}
    return Found(base | ({"adapter": (model, adapter)} if adapter else {"model": (str(whole), None)}), run)
