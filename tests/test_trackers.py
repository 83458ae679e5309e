"""Trackers get each step's finite numbers under their names; one that is missing is named with its pip line."""

import sys
from types import SimpleNamespace

import pytest

from grpo.run.trackers import TRACKERS, tracker

METRICS = {"reward": 0.25, "rewards/format/mean": 1.5, "kl": float("nan")}


def test_tensorboard_reads_what_was_written(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    track = tracker("tensorboard", tmp_path, {})
    track(1, METRICS)
    track(2, METRICS | {"reward": 0.5, "kl": 3.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {
        name: [(e.step, float(e.tensor_proto.float_val[0])) for e in events.Tensors(name)]
        for name in events.Tags()["tensors"]
    }
    assert found == {"reward": [(1, 0.25), (2, 0.5)], "rewards/format/mean": [(1, 1.5), (2, 1.5)], "kl": [(2, 3.0)]}


def test_wandb_is_given_the_run_and_its_numbers(tmp_path, monkeypatch):
    calls = []

    def init(**given):
        calls.append(given)
        return SimpleNamespace(log=lambda metrics, step: calls.append((step, metrics)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    track = tracker("wandb", tmp_path / "night", {"seed": 3})
    track(7, METRICS)
    assert calls[0]["id"] == "night" and calls[0]["config"] == {"seed": 3} and calls[0]["resume"] == "allow"
    assert calls[1:] == [(7, {"reward": 0.25, "rewards/format/mean": 1.5})]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_named_with_its_pip_line(name, tmp_path, monkeypatch):
    for module in [loaded for loaded in sys.modules if loaded.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"--log {name}: it is not installed .*; pip install {name}"):
        tracker(name, tmp_path, {})


def test_none_writes_nothing(tmp_path):
    tracker(None, tmp_path, {})(1, METRICS)
    assert not list(tmp_path.iterdir())
