"""Why is my reward flat? Rules over the metrics of a run, each with its number, a verdict and what to try.

A rule is a function of the lines of metrics.jsonl, under TRL's names; `RULES` is the table of them. Their bounds are
rules of thumb: where to look first, no proof. Plain Python.
"""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from statistics import fmean, median, variance
from typing import Any, NamedTuple

Metrics = Sequence[Mapping[str, Any]]  # one mapping a step, oldest first; None is a number that was not finite


class Finding(NamedTuple):
    """What one rule says."""

    name: str
    number: str
    fine: bool  # or else: look here
    advice: str  # what it means, and which flags of train.py to try


def values(metrics: Metrics, name: str) -> list[float]:
    """What is known of a metric, step by step."""
    return [line[name] for line in metrics if line.get(name) is not None]


def _fifth(known: Sequence[float]) -> int:
    return max(1, len(known) // 5)


def beginning(metrics: Metrics, name: str) -> float | None:
    """The mean over the first fifth of the steps; None where the metric is absent."""
    known = values(metrics, name)
    return fmean(known[: _fifth(known)]) if known else None


def end(metrics: Metrics, name: str) -> float | None:
    """The mean over the last fifth of the steps; None where the metric is absent."""
    known = values(metrics, name)
    return fmean(known[-_fifth(known) :]) if known else None


def reward_rise(metrics: Metrics) -> Finding | None:
    """Whether the last fifth is above the first by more than twice the standard error of their difference."""
    known = values(metrics, "reward")
    size = _fifth(known)
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
    first, last = beginning(metrics, "accuracy"), end(metrics, "accuracy")
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
    return Finding(name, number, True, "Judged by the code that judges the evaluation.")


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
            " Draw more alternatives with a larger --num-generations or a higher --temperature, replace such groups "
            "with --dynamic-sampling 2, or give partial credit in --reward."
        )
    return Finding("Groups whose rewards are all equal", f"{share:.0%}", share <= 0.5 or right >= 0.9, advice)


def unfinished(metrics: Metrics) -> Finding | None:
    """The share of completions that were cut."""
    share = end(metrics, "completions/clipped_ratio")
    if share is None:
        return None
    advice = "A completion that is cut seldom reaches its answer."
    if share > 0.1:
        advice += (
            " Raise --max-completion-length, or leave such completions out of the loss with "
            "--mask-truncated-completions."
        )
    return Finding("Completions cut at the length limit", f"{share:.0%}", share <= 0.1, advice)


def well_formed(metrics: Metrics) -> Finding | None:
    """The mean of the reward's format part."""
    rate = end(metrics, "rewards/format/mean")
    if rate is None:
        return None
    advice = "An answer outside its tags is not found, and counts as wrong."
    if rate < 0.8:
        advice += (
            " Ask for the tags with --wording instructed, reward them more, as in --reward answer=1,format=1, or teach "
            "them first with --objective sft."
        )
    return Finding("Format reward", f"{rate:.2f} of 1", rate >= 0.8, advice)


def distance(metrics: Metrics) -> Finding | None:
    """The KL to the base model, nats a token."""
    kl = end(metrics, "kl")
    if kl is None:
        if not values(metrics, "reward"):
            return None
        return Finding("KL to the base model", "not measured", True, "It is measured where --beta is above 0.")
    advice = "Nats a token: how far the policy has gone from where it began."
    if kl > 0.5:
        advice += " Far: text may decay while the reward rises. Raise --beta or lower --learning-rate."
    return Finding("KL to the base model", f"{kl:.3g}", kl <= 0.5, advice)


def clip_share(metrics: Metrics) -> Finding | None:
    """The share of tokens that the clip leaves without a gradient."""
    share = end(metrics, "clip_ratio/region_mean")
    if share is None:
        return None
    advice = "Tokens without a gradient, their ratio being out of the clip range."
    if share > 0.2:
        advice += " Lower --learning-rate or --num-iterations, or widen the range with --epsilon-high."
    return Finding("Clipped tokens", f"{share:.1%}", share <= 0.2, advice)


def entropy(metrics: Metrics) -> Finding | None:
    """Whether the policy has stopped exploring, or dissolves."""
    first, last = beginning(metrics, "entropy"), end(metrics, "entropy")
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
    """How far the log-probs of sampler and trainer lie apart, which the algorithm takes to be the same policy's."""
    gap = end(metrics, "sampling/sampling_logp_difference/mean")
    if gap is None:
        return None
    most = max(values(metrics, "sampling/sampling_logp_difference/max"), default=gap)
    advice = "Nats a token between sampler and trainer, which should be one policy; bfloat16 gives about 0.01."
    if gap > 0.05:
        advice += " Bound its effect with --importance-sampling-clip-max 2, and see whether --dtype float32 closes it."
    return Finding("Sampler/trainer gap", f"mean {gap:.2g}, largest {most:.2g}", gap <= 0.05, advice)


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
    unfinished,
    well_formed,
    entropy,
    distance,
    clip_share,
    weights_move,
    sampler_gap,
    gradient,
)


def diagnose(metrics: Metrics) -> list[Finding]:
    """What the rules find in the lines of metrics.jsonl; those whose metric a run does not have say nothing."""
    return [finding for rule in RULES if (finding := rule(metrics)) is not None]
