"""The diagnosis: a healthy log is fine, and each illness is found, with its number and a flag that exists."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from grpo.pages import diagnosis
from grpo.pages.diagnosis import diagnose
from grpo.run.settings import Settings

GAP = "sampling/sampling_logp_difference"


def healthy(steps: int = 40) -> list[dict]:
    """A run that learns, with noise of a known size."""
    return [
        {
            "step": step + 1,
            "reward": 0.5 + 0.02 * step + 0.03 * (-1) ** step,
            "accuracy": 0.3 + 0.01 * step,
            "frac_reward_zero_std": 0.25,
            "completions/clipped_ratio": 0.0,
            "rewards/format/mean": 0.95,
            "kl": 0.002 * step,
            "clip_ratio/region_mean": 0.03,
            "entropy": 0.9 - 0.01 * step,
            "lora_norm": 15.0 + 0.01 * step,
            f"{GAP}/mean": 0.008,
            f"{GAP}/max": 0.4,
            "grad_norm": 0.2 + 0.05 * (step % 3),
            "loss": -0.01,
        }
        for step in range(steps)
    ]


def changed(**names) -> list[dict]:
    """The healthy log, but with functions of the line's number, from 0, for some metrics."""
    lines = healthy()
    for i, line in enumerate(lines):
        line.update({name: change(i) for name, change in names.items()})
    return lines


def found(metrics: list[dict]) -> dict[str, diagnosis.Finding]:
    return {finding.name: finding for finding in diagnose(metrics)}


def test_every_rule_speaks_of_a_healthy_run_and_finds_it_fine():
    findings = diagnose(healthy())
    assert len(findings) == len(diagnosis.RULES)
    assert [finding for finding in findings if not finding.fine] == []


ILLNESSES = [
    ({"reward": lambda i: 0.7 + 0.1 * (-1) ** i}, "Reward, first", "0.700 to 0.700", "--learning-rate"),
    ({"accuracy": lambda i: 0.0}, "Right completions", "0.0% to 0.0%", "--objective sft"),
    ({"accuracy": lambda i: 0.6 - 0.01 * i}, "Right completions", "56.5% to 24.5%", "--reward answer=2"),
    ({"frac_reward_zero_std": lambda i: 0.75}, "Groups", "75%", "--dynamic-sampling"),
    ({"completions/clipped_ratio": lambda i: 0.4}, "Completions cut", "40%", "--max-completion-length"),
    ({"rewards/format/mean": lambda i: 0.25}, "Format", "0.25 of 1", "--wording instructed"),
    ({"kl": lambda i: 0.1 * i}, "KL", "3.55", "--beta"),
    ({"clip_ratio/region_mean": lambda i: 0.3}, "Clipped", "30.0%", "--num-iterations"),
    ({"entropy": lambda i: 0.5**i}, "Entropy", "to 0.000", "--epsilon-high"),
    ({"entropy": lambda i: 0.1 + 0.1 * i}, "Entropy", "0.450 to 3.650", "--learning-rate"),
    ({"lora_norm": lambda i: 15.0}, "Norm of the adapter", "+0.00%", "--lora-alpha"),
    ({"lora_norm": lambda i: 15.0 + i}, "Norm of the adapter", "+260.00%", "--weight-decay"),
    ({f"{GAP}/mean": lambda i: 0.2}, "Sampler", "mean 0.2, largest 0.4", "--importance-sampling-clip-max"),
    ({"grad_norm": lambda i: 30.0 if i == 20 else 0.2}, "Gradient", "median 0.2, largest 30", "--max-grad-norm"),
    ({"grad_norm": lambda i: None if i == 20 else 0.2}, "Gradient", "1 not finite", "--learning-rate"),
    ({"grad_norm": lambda i: 0.0}, "Gradient", "median 0", "equal rewards"),
]


@pytest.mark.parametrize(("changes", "name", "number", "advice"), ILLNESSES, ids=[f"{c[1]}: {c[2]}" for c in ILLNESSES])
def test_an_illness_is_found_with_its_number_and_what_to_try(changes, name, number, advice):
    ill = [finding for finding in diagnose(changed(**changes)) if not finding.fine]
    assert [finding.name.startswith(name) for finding in ill] == [True]
    assert number in ill[0].number
    assert advice in ill[0].advice


def test_equal_groups_and_low_entropy_of_a_task_that_is_learned_are_fine():
    learned = changed(accuracy=lambda i: 0.99, frac_reward_zero_std=lambda i: 0.9, entropy=lambda i: 0.5**i)
    assert all(finding.fine for finding in diagnose(learned))
    assert "harder --data" in found(learned)["Groups whose rewards are all equal"].advice


def test_the_verdict_is_about_the_end_of_a_run():
    recovered = changed(**{"completions/clipped_ratio": lambda i: 0.9 if i < 20 else 0.0})
    assert found(recovered)["Completions cut at the length limit"].fine


def test_metrics_that_are_absent_or_not_finite_are_not_judged():
    assert diagnose([]) == []
    assert diagnose([{"step": 1}]) == []
    names = set(healthy()[0]) - {"grad_norm", "loss"}
    assert diagnose([{"step": 1} | dict.fromkeys(names)]) == []
    assert list(found([{"step": 1, "loss": 2.0, "grad_norm": 0.5, "entropy": 1.0}])) == ["Entropy", "Gradient norm"]


def test_a_few_steps_are_too_few_to_call_a_reward_flat():
    flat = changed(reward=lambda i: 0.7)
    assert not found(flat[:20])["Reward, first fifth to last fifth"].fine
    assert "Reward, first fifth to last fifth" not in found(flat[:19])


def test_every_flag_that_is_named_exists():
    files = [Path(diagnosis.__file__).with_suffix(suffix) for suffix in (".py", ".toml")]
    named = set(re.findall(r"--([a-z][a-z-]+)", "".join(path.read_text(encoding="utf-8") for path in files)))
    assert len(named) > 15
    assert named <= {entry.name.replace("_", "-") for entry in fields(Settings)}
