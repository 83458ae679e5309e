"""What --ckpt may be, and how bad flags of eval.py are refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gemma3.files.published import CONFIGS, NANO
from gemma3.filters import Sampling
from grpo.use.eval_settings import STRATEGIES, EvalSettings, find_models, resolve_settings, resolve_use


def make_run(path, trained: str | None, config: bool = True):
    path.mkdir()
    (path / "metrics.jsonl").write_text("")
    if config:
        (path / "config.json").write_text(json.dumps({"settings": {"model": "org/base", "data": "gsm8k"}}))
    if trained:
        (path / trained).mkdir()
        (path / trained / {"adapter": "adapter_config.json", "model": "model.safetensors"}[trained]).write_text("{}")
    return path


def make_adapter(path, base: str | None):
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return path


def test_a_run_is_its_adapter_beside_its_base(tmp_path):
    run = make_run(tmp_path / "run", "adapter")
    found = find_models(str(run), None, with_base=True)
    assert found.models == {"base": ("org/base", None), "adapter": ("org/base", run / "adapter")}
    assert list(found.models) == ["base", "adapter"] and found.run["data"] == "gsm8k"
    assert list(find_models(str(run), None, with_base=False).models) == ["adapter"]
    assert find_models(str(run), "other", with_base=True).models["adapter"] == ("other", run / "adapter")


def test_a_run_of_whole_weights_is_its_model_beside_its_base(tmp_path):
    run = make_run(tmp_path / "run", "model")
    found = find_models(str(run), None, with_base=True)
    assert found.models == {"base": ("org/base", None), "model": (str(run / "model"), None)}


def test_an_adapter_is_itself_beside_the_base_it_names(tmp_path):
    adapter = make_adapter(tmp_path / "a", "org/base")
    found = find_models(str(adapter), None, with_base=True)
    assert found.models == {"base": ("org/base", None), "adapter": ("org/base", adapter)} and found.run == {}


def test_a_model_is_alone():
    assert find_models("org/model", None, with_base=True).models == {"model": ("org/model", None)}


def test_a_bad_ckpt_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="empty: this run has saved nothing yet"):
        find_models(str(make_run(tmp_path / "empty", None)), None, with_base=True)
    with pytest.raises(ValueError, match=r"lost: this run has lost its config\.json; give its adapter or model"):
        find_models(str(make_run(tmp_path / "lost", "adapter", config=False)), None, with_base=True)
    with pytest.raises(ValueError, match=r"a/adapter_config\.json does not name the base model; give it with --model"):
        find_models(str(make_adapter(tmp_path / "a", None)), None, with_base=True)
    with pytest.raises(ValueError, match="org/model is a whole model, so --model org/base has no use; leave it out"):
        find_models("org/model", "org/base", with_base=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_generations": 0}, "--num-generations 0: it must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0: it must be at least 1"),
        ({"max_completion_length": 0}, "--max-completion-length 0: it must be at least 1"),
        ({"limit": -1}, "--limit -1: it must be at least 0"),
        ({"temperature": -0.5}, "--temperature -0.5: it must be finite and at least 0"),
        (
            {"num_generations": 4},
            "--num-generations 4: greedy completions of an example are all alike; add --temperature 1",
        ),
        ({"chat": True, "batch": Path("q")}, "--chat and --batch are different ways to use a model; give one of them"),
        ({"prompt": "2+2?", "examples": True}, "--prompt and --examples are different ways to use a model"),
        ({"image": ("a.png",)}, "--image goes with --prompt; in --chat type /image, in a --batch .jsonl give it an"),
        ({"image": ("a.png",), "chat": True}, "--image goes with --prompt"),
        ({"output": Path("a")}, "--output goes with --batch; --out is where an evaluation writes"),
        ({"prompt": " "}, "--prompt is empty; give a question"),
        ({"prompt": "bare"}, "--prompt bare: it is the question here; the flag for how to word is --wording"),
        ({"strategy": "greedy", "temperature": 0.5}, "--strategy greedy and --temperature 0.5 contradict; give one"),
        ({"compare_strategies": True}, "--compare-strategies needs a --prompt, or --examples, to answer"),
        ({"compare_strategies": True, "chat": True}, "--compare-strategies needs a --prompt, or --examples, to answer"),
        (
            {"compare_strategies": True, "examples": True, "strategy": "greedy"},
            "leave --strategy and --temperature out",
        ),
        ({"chat": True, "base": True}, "--chat takes one model; leave --base out, or compare by --prompt"),
        ({"export": Path("out"), "base": True}, "--export takes one model; leave --base out"),
        ({"chat": True, "wording": "hint"}, "--wording hint is for a dataset's problems; with --chat use another"),
        ({"chat": True, "data": "gsm8k"}, "--data is for evaluating; leave it out with --chat"),
        (
            {"batch": Path("q"), "num_generations": 2, "temperature": 1.0},
            "--num-generations is for evaluating; leave it out",
        ),
        (
            {"num_generations": 4, "strategy": "greedy"},
            "--num-generations 4: greedy completions of an example are all alike",
        ),
        ({"adapter_only": True}, "--adapter-only goes with --export, the folder to write"),
        (
            {"export": Path("out"), "adapter_only": True, "dtype": "float32"},
            "--dtype float32 is of merged weights; leave it or --adapter-only out",
        ),
        (
            {"dtype": "float16"},
            "--dtype float16 is for --export: its range is too small to run Gemma 3 in; use bfloat16",
        ),
        ({"chat": True, "dtype": "float16"}, "--dtype float16 is for --export"),
        ({"export": Path("out"), "chat": True}, "--chat and --export are different ways to use a model; give one of"),
        ({"export": Path("out"), "data": "gsm8k"}, "--data is for evaluating; leave it out with --export"),
        ({"export": Path("out"), "out": Path("a")}, "--out is for evaluating; leave it out with --export"),
        ({"export": Path("out"), "report": ("a",)}, "--export and --report are different ways to use a model"),
        ({"report": ("a", "b"), "limit": 3}, "--limit is for evaluating; leave it out with --report"),
    ],
)
def test_bad_flags_are_named(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EvalSettings(**flags)


def test_how_a_model_is_used_is_told_by_one_flag():
    uses = {"chat": True, "prompt": "2+2?", "batch": Path("q"), "examples": True, "export": Path("o"), "report": ("a",)}
    assert [EvalSettings(**{name: value}).use for name, value in uses.items()] == list(uses)
    assert EvalSettings().use is None
    assert EvalSettings(report=("a", "b"), out=Path("page.html")).use == "report"
    assert EvalSettings(export=Path("o"), dtype="float16").use == "export"


def test_strategies_are_ways_of_sampling_by_name():
    """They go from greedy to wild; a temperature that the user gives is a strategy too."""
    temperatures = [sampling.temperature for sampling in STRATEGIES.values()]
    assert list(STRATEGIES) == ["greedy", "conservative", "standard", "creative"]
    assert temperatures == sorted(temperatures) and temperatures[0] == 0
    assert STRATEGIES["standard"] == Sampling(1.0, 64, 0.95)
    assert EvalSettings(strategy="creative").sampling == STRATEGIES["creative"]
    assert EvalSettings(prompt="2+2?").strategies == {"greedy": Sampling(0.0)}
    assert EvalSettings(prompt="2+2?", temperature=0.5).strategies == {"sampled": Sampling(0.5)}
    assert EvalSettings(prompt="2+2?", compare_strategies=True).strategies == STRATEGIES


def test_ways_of_sampling_have_the_sizes_that_are_asked_for():
    sized = Sampling(0.5, num_generations=3, max_completion_length=20)
    assert EvalSettings(temperature=0.5, num_generations=3, max_completion_length=20).sampling == sized
    of_all = EvalSettings(prompt="2+2?", compare_strategies=True, max_completion_length=20).strategies
    assert of_all == {name: replace(sampling, max_completion_length=20) for name, sampling in STRATEGIES.items()}


def test_a_model_is_used_as_it_was_trained():
    """Except for how much it may read, and for wordings that only a dataset's problems have."""
    run = {
        "wording": "hint",
        "format": "solution",
        "max_completion_length": 88,
        "max_prompt_length": 77,
        "data": "gsm8k",
    }
    own = resolve_use(EvalSettings(chat=True), run | {"dtype": "bfloat16"}, "nano", CONFIGS["gemma-3-4b-it"])
    assert (own.wording, own.format, own.max_completion_length) == ("instructed", "solution", 88)
    assert (own.max_prompt_length, own.pan_and_scan, own.dtype, own.data) == (4096, False, "float32", None)
    assert resolve_use(EvalSettings(chat=True), {"wording": "query"}, "nano", NANO).wording == "bare"
    given = EvalSettings(chat=True, wording="role", format="answer", max_prompt_length=66)
    nano = resolve_use(given, run, "nano", NANO)
    assert (nano.wording, nano.format, nano.max_prompt_length) == ("role", "answer", 66)
    alone = resolve_use(EvalSettings(examples=True), {}, "nano", NANO)
    assert (alone.wording, alone.max_completion_length, alone.max_prompt_length) == ("bare", 56, 2048)


def test_what_is_not_given_is_as_the_run_was_trained():
    run = {"data": "gsm8k", "wording": "role", "format": "solution", "max_prompt_length": 77, "reward": "format"}
    run |= {"max_completion_length": 88, "pan_and_scan": True, "dtype": "bfloat16", "out": "elsewhere", "seed": 9}
    own = resolve_settings(EvalSettings(ckpt="RUN", max_prompt_length=66), run)
    assert (own.data, own.split, own.wording, own.format) == ("gsm8k", "test", "role", "solution")
    assert (own.max_prompt_length, own.max_completion_length, own.pan_and_scan) == (66, 88, True)
    assert (own.dtype, own.seed, str(own.out)) == ("float32", 0, "RUN/eval.json")
    other = resolve_settings(EvalSettings(ckpt="RUN", data="mathvista"), run)
    assert (other.split, other.wording, other.format, other.max_prompt_length) == ("all", "instructed", "solution", 512)
    model = resolve_settings(EvalSettings(), {})
    assert (model.data, model.split, model.wording, str(model.out)) == ("synthetic", "test", "bare", "eval.json")
