"""What --ckpt may be, and how bad flags of eval.py are refused."""

import json
import re

import pytest

from grpo.eval_settings import EvalSettings, find_models


def make_run(path, trained: str | None, config: bool = True):
    path.mkdir()
    (path / "metrics.jsonl").write_text("")
    if config:
        (path / "config.json").write_text(json.dumps({"settings": {"model": "org/base", "data": "gsm8k"}}))
    if trained:
        (path / trained).mkdir()
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
    with pytest.raises(ValueError, match="a: the adapter does not name its base model; give it with --model"):
        find_models(str(make_adapter(tmp_path / "a", None)), None, with_base=True)
    with pytest.raises(ValueError, match="org/model is no run and no adapter, so --model has no use; leave it out"):
        find_models("org/model", "org/base", with_base=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_samples": 0}, "--num-samples 0: it must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0: it must be at least 1"),
        ({"max_completion_length": 0}, "--max-completion-length 0: it must be at least 1"),
        ({"limit": -1}, "--limit -1: it must be 0 or more"),
        ({"temperature": -0.5}, "--temperature -0.5: it must be 0 or more"),
        ({"num_samples": 4}, "--num-samples 4: greedy samples of an example are all alike; add --temperature 1"),
    ],
)
def test_bad_flags_are_named(flags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        EvalSettings(**flags)
