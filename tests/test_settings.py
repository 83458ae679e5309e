"""The flags of train.py: what is filled in if nothing was given, and what is refused before anything starts."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from gemma3.mesh import make_mesh
from grpo.run.settings import NANO_LEARNING_RATES, Settings, check_batch, resolve_defaults

LEAST = {entry.name: entry.metadata["least"] for entry in fields(Settings) if entry.metadata["least"] is not None}


def test_nothing_is_left_open():
    """Only flags for which None has a meaning stay None, and --eval-data, which names another dataset."""
    resolved = resolve_defaults(Settings())
    assert {name for name, value in vars(resolved).items() if value is None} == {
        *("resume", "resume_step", "adapter", "eval_data", "epsilon_high", "delta", "importance_sampling_clip_max"),
        *("log", "explain", "plan", "coordinator", "num_processes", "process_id"),
    }
    assert resolved.out.parts[0] == "runs" and resolved.out.name.endswith("-nano-synthetic")
    assert (resolved.wording, resolved.learning_rate, resolved.dtype) == ("bare", NANO_LEARNING_RATES[0], "float32")


def test_defaults_depend_on_the_data_and_on_what_is_trained():
    adapter = resolve_defaults(Settings(data="gsm8k"))
    assert (adapter.wording, adapter.max_prompt_length, adapter.learning_rate) == ("instructed", 512, 1e-5)
    assert resolve_defaults(Settings(data="gsm8k", lora_r=0)).learning_rate == 1e-6


def test_what_was_given_stays():
    given = resolve_defaults(Settings())
    given = replace(given, out=Path("a"), learning_rate=0.5, max_prompt_length=7, micro_batch=3, dtype="bfloat16")
    assert resolve_defaults(given) == given


@pytest.mark.parametrize("name", LEAST)
def test_a_number_below_the_least_is_refused(name):
    flag, least = "--" + name.replace("_", "-"), LEAST[name]
    with pytest.raises(ValueError, match=rf"^{flag} {least - 1}: it must be at least {least}$"):
        resolve_defaults(Settings(**{name: least - 1}))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"num_generations": 1}, "--num-generations 1: a group of one has nothing to compare with; use at least 2"),
        ({"temperature": 0.0}, "--temperature 0: log-probs are divided by it"),
        ({"temperature": float("nan")}, "--temperature nan: "),
        ({"learning_rate": float("nan")}, "--learning-rate nan: it must be finite and at least 0"),
        ({"learning_rate": float("inf")}, "--learning-rate inf: "),
        ({"max_grad_norm": 0.0}, "--max-grad-norm 0: it must be above 0; inf clips nothing"),
        ({"adam_beta2": 1.0}, "--adam-beta2 1: it must be at least 0 and below 1"),
        ({"train_vision": True}, "--train-vision trains whole weights, and --lora-r 16 an adapter; add --lora-r 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, sentence):
    with pytest.raises(ValueError) as refusal:
        resolve_defaults(Settings(**given))
    assert str(refusal.value).startswith(sentence)


def test_supervised_training_needs_no_group():
    assert resolve_defaults(Settings(objective="sft", num_generations=1)).num_generations == 1


def test_the_micro_batch_is_that_of_a_data_shard():
    settings = resolve_defaults(Settings(prompts_per_step=12, micro_batch=5, mesh="2,1"))
    with pytest.raises(ValueError, match="--micro-batch 5 does not divide the 6 prompts of a data shard"):
        check_batch(settings, make_mesh(2, 1))
    assert check_batch(replace(settings, micro_batch=3), make_mesh(2, 1)) == 3
    assert check_batch(replace(settings, micro_batch=99), make_mesh(2, 1)) == 6
    with pytest.raises(ValueError, match="--prompts-per-step 12 cannot be split over the data axis"):
        check_batch(settings, make_mesh(5, 1))
