"""Every flag of eval.py, and what its --ckpt is: a run, an adapter, or a model."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from gemma3.config import Config
from gemma3.files.adapter import load_adapter
from gemma3.files.weights import load_checkpoint
from gemma3.lora import Lora
from gemma3.model import Params
from gemma3.sample import Sampling
from grpo.run.cli import flag
from grpo.run.settings import WORDINGS, Settings, resolve_defaults

STRATEGIES = {
    "greedy": Sampling(temperature=0.0),
    "conservative": Sampling(temperature=0.4, top_k=32, top_p=0.9),
    "standard": Sampling(temperature=1.0, top_k=64, top_p=0.95),  # generation_config.json of Google's Gemma 3
    "creative": Sampling(temperature=1.4, top_k=128, top_p=0.98),
}
# The ways to use a model instead of measuring it, and the flags that only measuring reads.
USES = ("chat", "prompt", "batch", "examples")
_MEASURING = ("data", "split", "limit", "pictures", "skip_missing_images", "scorer", "reward", "num_samples", "out")

# Wordings that a dataset has for its own problems, and the nearest for anybody's question.
_OWN_WORDING = {"hint": "instructed", "query": "bare"}
# Tokens of a conversation, or of a question, where nothing else was asked for.
MAX_CONVERSATION = 4096


@dataclass(frozen=True)
class EvalSettings:
    """Every flag of eval.py; None is what the run was trained with, or train.py's default."""

    ckpt: str = flag("nano", "run directory, PEFT adapter, model directory or name", "Model")
    base: bool | None = flag(
        None, "the base model too, beside what was trained from it (default: in an evaluation yes, else no)", "Model"
    )
    model: str | None = flag(None, "base model (default: the one that the run or the adapter names)", "Model")
    dtype: str | None = flag(
        None, "of the weights (default bfloat16, on a CPU float32)", "Model", ["bfloat16", "float32"]
    )

    chat: bool = flag(False, "talk to the model; /help there lists the commands", "Using it")
    prompt: str | None = flag(None, "answer this question", "Using it")
    image: tuple[str, ...] = flag((), "pictures that go with --prompt", "Using it")
    batch: Path | None = flag(None, "answer a file of questions: one a line, or .jsonl", "Using it")
    output: Path | None = flag(
        None, "of --batch, which goes on where an earlier one stopped (default answers.json)", "Using it"
    )
    examples: bool = flag(False, "answer built-in problems of several kinds", "Using it")
    compare_strategies: bool = flag(False, "answer --prompt or --examples by every --strategy", "Using it")

    data: str | None = flag(None, "as in train.py (default: what the run was evaluated on, or synthetic)", "Data")
    split: str | None = flag(
        None, "part of the dataset (default: all, or what the run did not train on)", "Data", ["test", "all"]
    )
    limit: int = flag(0, "at most this many examples; 0: all, of synthetic 384", "Data")
    wording: str | None = flag(None, "of the prompt, as in train.py", "Data", WORDINGS)
    format: str | None = flag(None, "tags the model answers in", "Data", ["answer", "solution"])
    pictures: str = flag(
        "given", "shown as they are, blank, or another example's", "Data", ["given", "blank", "shuffled"]
    )
    max_prompt_length: int | None = flag(
        None, "tokens; longer prompts are left out (default as in training; using the model, up to 4096)", "Data"
    )
    pan_and_scan: bool | None = flag(None, "show long pictures in crops too", "Data")
    skip_missing_images: bool | None = flag(None, "leave out rows without their picture", "Data")

    scorer: str = flag(
        "current", "MathVista's official one, or that behind its published scores", "Scoring", ["current", "published"]
    )
    reward: str | None = flag(None, "compared with the preferences of rows that bring completions", "Scoring")

    max_completion_length: int | None = flag(None, "tokens", "Sampling")
    temperature: float = flag(0.0, "0 is greedy", "Sampling")
    strategy: str | None = flag(None, "temperature, top-k and top-p by a name", "Sampling", list(STRATEGIES))
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
        if self.num_samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"--num-samples {self.num_samples}: greedy samples of an example are all alike; add --temperature 1"
            )
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        uses = [f"--{name}" for name in USES if getattr(self, name) not in (None, False)]
        if len(uses) > 1:
            raise ValueError(f"{uses[0]} and {uses[1]} are different ways to use a model; give one of them")
        if self.image and self.prompt is None:
            raise ValueError("--image goes with --prompt; in --chat type /image, in a --batch .jsonl give it an image")
        if self.output and not self.batch:
            raise ValueError("--output goes with --batch; --out is where an evaluation writes")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("--prompt is empty; give a question")
        if self.prompt in WORDINGS:
            raise ValueError(f"--prompt {self.prompt}: it is the question here; the flag for how to word is --wording")
        if self.strategy and self.temperature:
            raise ValueError(
                f"--strategy {self.strategy} and --temperature {self.temperature:g} contradict; give one of them"
            )
        if self.compare_strategies and uses not in (["--prompt"], ["--examples"]):
            raise ValueError("--compare-strategies needs a --prompt, or --examples, to answer")
        if self.compare_strategies and (self.strategy or self.temperature):
            raise ValueError("--compare-strategies answers by every strategy; leave --strategy and --temperature out")
        if self.chat and self.base:
            raise ValueError("--chat talks to one model; leave --base out, or compare by --prompt")
        if uses and self.wording in _OWN_WORDING:
            raise ValueError(f"--wording {self.wording} is for a dataset's problems; with {uses[0]} use another")
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name in _MEASURING if uses else ():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"--{name.replace('_', '-')} is for evaluating; leave it out with {uses[0]}")

    @property
    def use(self) -> str | None:
        """The one of `USES` that was asked for; None is an evaluation."""
        return next((name for name in USES if getattr(self, name) not in (None, False)), None)

    @property
    def sampling(self) -> Sampling:
        """How a token is chosen."""
        return STRATEGIES[self.strategy] if self.strategy else Sampling(self.temperature)

    @property
    def strategies(self) -> dict[str, Sampling]:
        """What --prompt and --examples are answered by."""
        if self.compare_strategies:
            return STRATEGIES
        return {self.strategy or ("sampled" if self.temperature else "greedy"): self.sampling}


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


def resolve_use(settings: EvalSettings, run: dict, model: str, config: Config) -> EvalSettings:
    """Fill in what using a model needs and was not given: as in its run, or else as train.py would train it."""
    defaults = asdict(resolve_defaults(Settings(model=model)))
    trained = defaults | run
    like = {name: trained[name] for name in ("format", "max_completion_length", "pan_and_scan")} | {
        "base": False,
        "dtype": defaults["dtype"],
        "wording": _OWN_WORDING.get(trained["wording"], trained["wording"]),
        "max_prompt_length": min(MAX_CONVERSATION, config.max_positions),
    }
    return replace(settings, **{name: value for name, value in like.items() if getattr(settings, name) is None})


def load_models(
    models: dict[str, tuple[str, Path | None]], dtype: str, config: Config, mesh: Mesh
) -> Iterator[tuple[str, Params, Lora | None]]:
    """Each model by its name. Weights that several share are read once, and let go before others are read."""
    for model, named in itertools.groupby(models.items(), key=lambda item: item[1][0]):
        _, params = load_checkpoint(model, jnp.dtype(dtype), mesh)
        for name, (_, adapter) in named:
            yield name, params, load_adapter(adapter, config, mesh) if adapter else None
        del params
