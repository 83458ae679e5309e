"""Every flag of eval.py, and what its --ckpt is: a run, an adapter, or a model."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from data import kind
from data.prompt import WORDINGS
from gemma3.config import Config
from gemma3.files.adapter import load_adapter
from gemma3.files.weights import load_checkpoint
from gemma3.filters import Sampling
from gemma3.lora import Policy
from gemma3.mesh import Model
from grpo.run.cli import check_least, flag, flag_name
from grpo.run.log import read_json
from grpo.run.settings import Settings, resolve_defaults
from grpo.use.evaluate import trained_on

STRATEGIES = {
    "greedy": Sampling(temperature=0.0),
    "conservative": Sampling(temperature=0.4, top_k=32, top_p=0.9),
    "standard": Sampling(temperature=1.0, top_k=64, top_p=0.95),  # generation_config.json of Google's Gemma 3
    "creative": Sampling(temperature=1.4, top_k=128, top_p=0.98),
}
# What eval.py can do besides measuring a model, and the flags that only measuring reads.
USES = ("chat", "prompt", "batch", "examples", "export", "report")
_MEASURING = ("data", "split", "limit", "images", "skip_missing_images", "scorer", "reward", "num_generations")

# Wordings that a dataset has for its own problems, each with the nearest wording for any other question.
_OWN_WORDING = {"hint": "instructed", "query": "bare"}
# The most tokens of a conversation or a question, unless --max-prompt-length says otherwise.
MAX_CONVERSATION = 4096


@dataclass(frozen=True)
class EvalSettings:
    """Every flag of eval.py. None stands for what the run was trained with, or for train.py's default."""

    ckpt: str = flag("nano", "run directory, PEFT adapter, model directory or name", topic="Model")
    base: bool | None = flag(
        None, "show the base model beside the trained one (default: yes in an evaluation, else no)"
    )
    model: str | None = flag(None, "base model (default: the one that the run or the adapter names)")
    dtype: str | None = flag(
        None,
        "of the weights (default bfloat16; float32 on a CPU; of --export that of the model's files)",
        ["bfloat16", "float32", "float16"],
    )

    chat: bool = flag(False, "talk to the model; /help there lists the commands", topic="Using it")
    prompt: str | None = flag(None, "answer this question")
    image: tuple[str, ...] = flag((), "images that go with --prompt")
    batch: Path | None = flag(None, "answer a file of questions: one a line, or .jsonl")
    output: Path | None = flag(None, "file for the answers of --batch; a restart continues it (default answers.json)")
    examples: bool = flag(False, "answer built-in problems of several kinds")
    compare_strategies: bool = flag(False, "answer --prompt or --examples by every --strategy")
    export: Path | None = flag(None, "write the model, its adapter merged in, to this folder for other programs")
    adapter_only: bool = flag(False, "with --export, write the PEFT adapter alone")
    report: tuple[str, ...] = flag((), "write the page of a run again, or one that compares several")

    data: str | None = flag(None, "as in train.py (default: what the run was evaluated on, or synthetic)", topic="Data")
    split: str | None = flag(None, "part of the data (default: all, or what the run did not train on)", ["test", "all"])
    limit: int = flag(0, "at most this many examples; 0: all (384 of synthetic)", least=0)
    wording: str | None = flag(None, "how prompts are worded, as in train.py", WORDINGS)
    format: str | None = flag(None, "tags the model answers in", ["answer", "solution"])
    images: str = flag("given", "show the given ones, blank ones, or another example's", ["given", "blank", "shuffled"])
    max_prompt_length: int | None = flag(
        None, "tokens; longer prompts are left out (default as in training; using the model, up to 4096)", least=1
    )
    pan_and_scan: bool | None = flag(None, "show long images in crops too")
    skip_missing_images: bool | None = flag(None, "leave out rows without their image")

    scorer: str = flag(
        "current",
        "MathVista's official scorer as it is, or the one behind its published scores",
        ["current", "published"],
        topic="Scoring",
    )
    reward: str | None = flag(None, "reward to compare with the preferences in rows that bring completions")

    max_completion_length: int | None = flag(None, "tokens", topic="Sampling", least=1)
    temperature: float = flag(0.0, "0 is greedy", least=0)
    strategy: str | None = flag(None, "temperature, top-k and top-p by a name", list(STRATEGIES))
    num_generations: int = flag(1, "completions of each example; from 2 on for pass@k and maj@k", least=1)
    batch_size: int = flag(128, "examples at a time", least=1)
    seed: int = flag(0, "of sampling, and of shuffling images")

    out: Path | None = flag(
        None, "where to write the figures (default: eval.json, in the run if it is one), or the --report", topic="Run"
    )
    mesh: str = flag("1,1", "devices: DATA,TENSOR", topic="Devices")
    virtual_devices: int = flag(0, "simulate this many devices on a CPU")

    def __post_init__(self):
        check_least(self)
        if self.num_generations > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"--num-generations {self.num_generations}: greedy completions of an example are all alike; "
                "add --temperature 1"
            )
        uses = [f"--{name}" for name in USES if getattr(self, name) not in (None, False, ())]
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
        if self.base and (self.chat or self.export):
            raise ValueError(f"{uses[0]} takes one model; leave --base out, or compare by --prompt")
        if uses and self.wording in _OWN_WORDING:
            raise ValueError(f"--wording {self.wording} is for a dataset's problems; with {uses[0]} use another")
        if self.adapter_only and not self.export:
            raise ValueError("--adapter-only goes with --export, the folder to write")
        if self.adapter_only and self.dtype:
            raise ValueError(f"--dtype {self.dtype} is of merged weights; leave it or --adapter-only out")
        if self.dtype == "float16" and not self.export:
            raise ValueError("--dtype float16 is for --export: its range is too small to run Gemma 3 in; use bfloat16")
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name in (*_MEASURING, *(() if self.report else ("out",))) if uses else ():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{flag_name(name)} is for evaluating; leave it out with {uses[0]}")

    @property
    def use(self) -> str | None:
        """The one of `USES` that was asked for; None is an evaluation."""
        return next((name for name in USES if getattr(self, name) not in (None, False, ())), None)

    @property
    def sampling(self) -> Sampling:
        sampling = STRATEGIES[self.strategy] if self.strategy else Sampling(self.temperature)
        return self._with_sizes(sampling)

    def _with_sizes(self, sampling: Sampling) -> Sampling:
        length = self.max_completion_length or sampling.max_completion_length
        return replace(sampling, num_generations=self.num_generations, max_completion_length=length)

    @property
    def strategies(self) -> dict[str, Sampling]:
        """The ways of sampling, by name, in which --prompt and --examples are answered."""
        if self.compare_strategies:
            return {name: self._with_sizes(sampling) for name, sampling in STRATEGIES.items()}
        return {self.strategy or ("sampled" if self.temperature else "greedy"): self.sampling}


class Found(NamedTuple):
    """What --ckpt stands for."""

    models: dict[str, tuple[str, Path | None]]  # name in the figures to (model, adapter or None)
    run: dict  # the settings of the run, empty if --ckpt is no run


def _named_base(adapter: Path) -> str:
    path = adapter / "adapter_config.json"
    base = read_json(path).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path} does not name the base model; give it with --model")
    return base


def find_models(ckpt: str, model: str | None, with_base: bool) -> Found:
    """The models of `ckpt`: a run, one of its checkpoints, an adapter, a model directory or a name. The base comes
    before the model trained from it. ValueError if `ckpt` holds no model, or if `model` is not the base of anything.
    """
    path, run = Path(ckpt), {}
    adapter = next((at for at in (path, path / "adapter") if (at / "adapter_config.json").is_file()), None)
    whole = path / "model" if (path / "model").is_dir() else path
    if (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"--ckpt {ckpt}: this run has lost its config.json; give its adapter or model instead")
        if adapter is None and whole == path:
            raise ValueError(f"--ckpt {ckpt}: this run has saved nothing yet")
        run = read_json(path / "config.json")["settings"]
    if adapter is None and path.is_dir() and not [*whole.glob("*.safetensors"), *whole.glob("*.bin")]:
        raise ValueError(f"{ckpt} holds no adapter and no weights; pass a run that has saved, an adapter or a model")
    if adapter is None and model and not (run and with_base):
        raise ValueError(f"--ckpt {ckpt} is a whole model, so --model {model} has no use; leave it out")
    base = model or run.get("model") or (adapter and _named_base(adapter))
    trained = {"adapter": (base, adapter)} if adapter else {"model": (str(whole) if path.is_dir() else ckpt, None)}
    return Found(({"base": (base, None)} if with_base and base else {}) | trained, run)


def resolve_use(settings: EvalSettings, run: dict, model: str, config: Config) -> EvalSettings:
    """Fill in what using a model needs and was not given: as in its run, or else train.py's defaults for the model."""
    defaults = asdict(resolve_defaults(Settings(model=model)))
    trained = defaults | run
    like = {name: trained[name] for name in ("format", "max_completion_length", "pan_and_scan")} | {
        "base": False,
        "dtype": defaults["dtype"],
        "wording": _OWN_WORDING.get(trained["wording"], trained["wording"]),
        "max_prompt_length": min(MAX_CONVERSATION, config.max_positions),
    }
    return replace(settings, **{name: value for name, value in like.items() if getattr(settings, name) is None})


def resolve_settings(settings: EvalSettings, run: dict) -> EvalSettings:
    """Fill in what was not given: as in training if the data is the run's, else train.py's defaults for the data.

    ValueError for an unknown dataset.
    """
    data = settings.data or run.get("eval_data") or run.get("data") or "synthetic"
    if data != "synthetic":
        kind(data)
    like = asdict(resolve_defaults(Settings(data=data, format=run.get("format", "answer"))))
    if data in (run.get("data"), run.get("eval_data")):
        like |= {name: value for name, value in run.items() if name not in ("dtype", "data", "out")}
    like |= {
        "data": data,
        "base": True,
        "split": "test" if data == "synthetic" or trained_on(data, run) else "all",
        "out": Path(settings.ckpt if run else ".", "eval.json"),
    }
    missing = [name for name, value in asdict(settings).items() if value is None and name in like and name != "model"]
    return replace(settings, **{name: like[name] for name in missing})


def load_models(models: dict[str, tuple[str, Path | None]], dtype: str, model: Model) -> Iterator[tuple[str, Policy]]:
    """Each model with its name. Weights that several models share are read once, and freed before others are read."""
    for directory, named in itertools.groupby(models.items(), key=lambda item: item[1][0]):
        _, params = load_checkpoint(directory, jnp.dtype(dtype), model.mesh)
        for name, (_, adapter) in named:
            yield name, Policy(params, load_adapter(adapter, model.config, model.mesh) if adapter else None)
        del params
