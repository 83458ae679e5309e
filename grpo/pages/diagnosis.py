"""Why is my reward flat? Rules over the metrics of a run, each with its number, a verdict and what to try.

A rule is a function of the lines of metrics.jsonl, which have TRL's names; `RULES` lists all rules. Their bounds are
rules of thumb: they say where to look first, and prove nothing. Plain Python.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf, sqrt
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any, NamedTuple

Metrics = Sequence[Mapping[str, Any]]  # one mapping a step, oldest first; None is a number that was not finite


class Finding(NamedTuple):
    name: str
    number: str
    fine: bool  # False: look here
    advice: str  # what it means, and which flags of train.py to try


def values(metrics: Metrics, name: str) -> list[float]:
    """The known values of a metric, step by step."""
    return [line[name] for line in metrics if line.get(name) is not None]


def ends(metrics: Metrics, name: str) -> tuple[float | None, float | None]:
    """The means over the first and over the last fifth of the steps; None where the metric is absent."""
    known = values(metrics, name)
    size = max(1, len(known) // 5)
    return (fmean(known[:size]), fmean(known[-size:])) if known else (None, None)


def end(metrics: Metrics, name: str) -> float | None:
    return ends(metrics, name)[1]


def reward_rise(metrics: Metrics) -> Finding | None:
    """Whether the last fifth is above the first by more than twice the standard error of their difference."""
    known = values(metrics, "reward")
    size = len(known) // 5
    if size < 4:
        return None
    first, last = known[:size], known[-size:]
    change, error = fmean(last) - fmean(first), sqrt((variance(first) + variance(last)) / size)
    rises = change > 2 * error
    advice = "It rises by more than twice the noise between steps."
    if not rises:
        advice = (
            "Flat, within twice the noise between steps, or falling. The rows marked below say why; where none is, try "
            "a higher --learning-rate, more --steps, or larger --prompts-per-step against the noise."
        )
    return Finding("Reward, first fifth to last fifth", f"{fmean(first):.3f} to {fmean(last):.3f}", rises, advice)


def right_answers(metrics: Metrics) -> Finding | None:
    """Whether anything is right, and whether the reward rises at the cost of right answers."""
    first, last = ends(metrics, "accuracy")
    if last is None:
        return None
    number, name = f"{first:.1%} to {last:.1%}", "Right completions"
    if last < 0.02:
        advice = (
            "Hardly any completion is right, and what is never sampled cannot be reinforced. Teach the task first with "
            "--objective sft, take easier questions or a larger --model, or give partial credit in --reward."
        )
        return Finding(name, number, False, advice)
    rise = reward_rise(metrics)
    if rise and rise.fine and last < first:
        advice = (
            "The reward rises and right answers do not: another part of the reward pays better. Look at its parts, and "
            "weigh the answer more, as in --reward answer=2,format=0.5."
        )
        return Finding(name, number, False, advice)
    return Finding(name, number, True, "Right and wrong are judged as in the evaluation.")


def equal_groups(metrics: Metrics) -> Finding | None:
    """The share of groups that teach nothing."""
    share, right = end(metrics, "frac_reward_zero_std"), end(metrics, "accuracy") or 0.0
    if share is None:
        return None
    advice = "In such a group every advantage is 0, so that it teaches nothing."
    if share > 0.5 and right >= 0.9:
        advice += " Most are right throughout: these questions are learned, and harder --data would teach more."
    elif share > 0.5:
        advice += (
            " Sample more alternatives with a larger --num-generations or a higher --temperature, replace such groups "
            "with --dynamic-sampling 2, or give partial credit in --reward."
        )
    return Finding("Groups whose rewards are all equal", f"{share:.0%}", share <= 0.5 or right >= 0.9, advice)


_BOUNDS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def within_bound(metrics: Metrics, rule: str) -> Finding | None:
    """A rule of diagnosis.toml: whether the mean over the last fifth is within its bounds."""
    bound = _BOUNDS[rule]
    value, advice = end(metrics, bound["metric"]), bound["meaning"]
    if value is None:
        return None
    fine = bound.get("least", -inf) <= value <= bound.get("most", inf)
    if not fine:
        advice += f" {bound['advice']}"
    return Finding(bound["name"], bound["layout"].format(value), fine, advice)


def distance(metrics: Metrics) -> Finding | None:
    """The KL to the base model, nats a token."""
    if end(metrics, "kl") is None and values(metrics, "reward"):
        return Finding("KL to the base model", "not measured", True, "It is measured where --beta is above 0.")
    return within_bound(metrics, "distance")


def entropy(metrics: Metrics) -> Finding | None:
    """Whether the policy has stopped exploring, or dissolves into noise."""
    first, last = ends(metrics, "entropy")
    if last is None:
        return None
    advice = "Nats a token: how much of a choice the policy still has. It falls as a task is learned."
    collapsed = last < 0.1 * first and (end(metrics, "accuracy") or 0.0) < 0.9
    dissolves = last > 2 * first and last > 0.5
    if collapsed:
        advice += (
            " Here it fell before the task was learned: raise --epsilon-high (0.28 in DAPO) or --temperature, or lower "
            "--learning-rate."
        )
    if dissolves:
        advice += " Here it grows: the policy dissolves into noise. Lower --learning-rate or raise --beta."
    return Finding("Entropy", f"{first:.3f} to {last:.3f}", not (collapsed or dissolves), advice)


def weights_move(metrics: Metrics) -> Finding | None:
    """How much the norm of what is trained has grown."""
    name = next((name for name in ("lora_norm", "weight_norm") if values(metrics, name)), None)
    if name is None:
        return None
    norms = values(metrics, name)
    growth = norms[-1] / norms[0] - 1 if norms[0] else 0.0
    advice = "Whole weights grow little; an adapter, half of which starts at zero, grows."
    still = name == "lora_norm" and len(norms) >= 20 and abs(growth) < 1e-4
    if still:
        advice += " Here it has hardly moved: raise --learning-rate or --lora-alpha."
    if growth > 1:
        advice += " Here it has more than doubled: lower --learning-rate, or add --weight-decay."
    what = "Norm of the adapter" if name == "lora_norm" else "Norm of the weights"
    return Finding(what, f"{norms[0]:.4g} to {norms[-1]:.4g} ({growth:+.2%})", not still and growth <= 1, advice)


def sampler_gap(metrics: Metrics) -> Finding | None:
    """How far apart the log-probs of sampler and trainer are, which should belong to the same policy."""
    most = max(values(metrics, "sampling/sampling_logp_difference/max"), default=None)
    found = within_bound(metrics, "sampler_gap")
    return found and found._replace(number=found.number + ("" if most is None else f", largest {most:.2g}"))


def gradient(metrics: Metrics) -> Finding | None:
    """Whether gradients are finite, not all zero, and without spikes."""
    norms = values(metrics, "grad_norm")
    lost = sum(line.get(name, 0.0) is None for line in metrics for name in ("grad_norm", "loss"))
    if not norms and not lost:
        return None
    if lost:
        advice = "Numbers that are not finite were met, and such an update is not applied. Lower --learning-rate."
        return Finding("Gradient norm", f"{lost} not finite", False, advice)
    usual, most = median(norms), max(norms)
    number, spikes = f"median {usual:.3g}, largest {most:.3g}", most > 20 * usual
    if usual < 1e-8:
        return Finding("Gradient norm", number, False, "No gradient, so no learning: all groups have equal rewards.")
    advice = "Clipped to --max-grad-norm before each update."
    if spikes:
        advice += " It spikes: lower that bound or --learning-rate, raise --warmup-steps or --prompts-per-step."
    return Finding("Gradient norm", number, not spikes, advice)


RULES: tuple[Callable[[Metrics], Finding | None], ...] = (
    reward_rise,
    right_answers,
    equal_groups,
    partial(within_bound, rule="unfinished"),
    partial(within_bound, rule="well_formed"),
    entropy,
    distance,
    partial(within_bound, rule="clip_share"),
    weights_move,
    sampler_gap,
    gradient,
)


def diagnose(metrics: Metrics) -> list[Finding]:
    """What the rules find in the lines of metrics.jsonl; a rule says nothing if the run lacks its metric."""
    return [finding for rule in RULES if (finding := rule(metrics)) is not None]
