"""One real GRPO step on the embedded nano model, told as a story: in the terminal, and as a page.

    python -m grpo.pages.explain [--page explain.html] [--seed N]

Every number is what the functions of training return, and each chapter names the line that computes it. The model, the
dataset and the reward are those of train.py, whose `prepare` is imported in `main` only: beneath it this file knows, as
all of grpo, the model alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from gemma3.model import read_prompts
from gemma3.sample import sample
from grpo import algorithm
from grpo.algorithm import (
    LossBatch,
    clipped,
    clipped_surrogate,
    group_advantages,
    importance_ratio,
    kl_k3,
    token_weights,
    zero_std_groups,
)
from grpo.pages.page import Cell, write_page
from grpo.pages.story import Chapter, Code, Formula, Picture, Plot, Table, Tokens, as_page, show
from grpo.rollout import Row
from grpo.run.cli import clean_errors, flag, parse
from grpo.run.settings import Settings, resolve_defaults
from grpo.step import Scored, Step, collect, judge_rollout, log_probs
from grpo.update import Trainable, loss_and_grad, policy, score, update

TITLE = "One step of GRPO, told with its own numbers"
PAPER = "DeepSeekMath, arXiv 2402.03300"
GOOD, BAD = "#2e9e56", "#d9534f"  # to be read on white and on black
NUMBER_OF_TRIES = 200  # questions, of which about one in four will do
LEAST_OF_EACH = 3  # right completions in the group, and wrong ones

# One group, so that every number of the step can be shown, and the paper's loss. Four updates on the same samples, at a
# rate at which most groups see a few tokens leave the clip range and none is torn away.
STORY = {
    "prompts_per_step": 1,
    "loss_type": "grpo",
    "beta": 0.04,
    "use_bias_correction_kl": False,
    "num_iterations": 4,
    "learning_rate": 2e-4,
    "lr_scheduler": "constant",
    "warmup_steps": 0,
}


@dataclass(frozen=True)
class ExplainSettings:
    """The flags of this command."""

    page: Path | None = flag(None, "also write it as a page with plots, such as explain.html", "Output")
    seed: int = flag(0, "another seed asks other questions and draws other completions", "Output")


class Taken(NamedTuple):
    """What one step was made of. G completions padded to C tokens, U updates; all arrays are on the host."""

    step: Step
    scored: Scored
    tried: int  # questions, with the one that was taken
    alike: int  # of those passed over, how many got equal rewards for all their completions
    ids: np.ndarray  # int32[G, C]
    mask: np.ndarray  # bool[G, C]
    advantages: np.ndarray  # float32[G]
    logps: np.ndarray  # float32[U + 1, G, C], before each update, and after the last
    ref_logps: np.ndarray  # float32[G, C], the base model's
    metrics: list[dict[str, float]]  # of each update

    @property
    def rewards(self) -> np.ndarray:
        return self.scored.rewards[0]

    @property
    def right(self) -> np.ndarray:
        return self.scored.correct[0]

    @property
    def pieces(self) -> list[list[str]]:
        """The tokens of each completion as text that fits on a line."""
        texts = [self.step.tokenizer.pieces(ids[mask]) for ids, mask in zip(self.ids, self.mask, strict=True)]
        return [[piece.replace("\n", "⏎").replace("<0x0A>", "⏎") for piece in text] for text in texts]

    def ratio(self, number: int) -> np.ndarray:
        """The importance ratio float32[G, C] after `number` updates."""
        return np.asarray(importance_ratio(self.logps[number], self.logps[0], self.mask))

    def clipped(self, number: int) -> np.ndarray:
        """Where the ratio after `number` updates has left the clip range with its advantage: bool[G, C]."""
        low, high = clipped(self.ratio(number), self.advantages[:, None], self.step.loss)
        return np.asarray(low | high)


def is_telling(step: Step, scored: Scored) -> bool:
    """Whether a group makes a story: about a picture, with some right and some wrong completions."""
    right = int(scored.correct[0].sum())
    enough = LEAST_OF_EACH <= right <= step.settings.num_generations - LEAST_OF_EACH
    return enough and len(scored.rows[0].prompt.pictures) > 0


def find_group(step: Step, trainable: Trainable, rows: Iterator[Row]) -> tuple[Scored, int, int]:
    """The first telling group, how many questions it took, and how many of these got equal rewards for all."""
    params, lora = policy(trainable, step.frozen, step.dtype)
    alike = 0
    for number in range(NUMBER_OF_TRIES):
        scored, _ = collect(step, params, lora, rows, number)
        if is_telling(step, scored):
            return scored, number + 1, alike
        alike += int(zero_std_groups(scored.rewards).sum())
    raise ValueError(
        f"--seed {step.settings.seed}: none of the first {NUMBER_OF_TRIES} questions got {LEAST_OF_EACH} right and "
        f"{LEAST_OF_EACH} wrong completions; choose another seed"
    )


def take_step(step: Step, trainable: Trainable, opt_state, rows: Iterator[Row], say: Callable[[str], None]) -> Taken:
    """Find a group and train on it, `num_iterations` times, as `grpo_step` does, keeping what there is to see."""
    say("compiling the sampler, which takes most of the time, and drawing groups ...")
    scored, tried, alike = find_group(step, trainable, rows)
    rollout, mask = scored.rollout, scored.rollout.completion_mask
    advantages = group_advantages(scored.rewards)
    say("compiling what computes log-probs and gradients ...")
    old_logps = log_probs(step, *policy(trainable, step.frozen, step.dtype), rollout)
    ref_logps = log_probs(step, step.frozen, None, rollout)
    weights = token_weights(step.loss.loss_type, mask, max_completion_length=step.settings.max_completion_length)
    batch = LossBatch(advantages, mask, weights, old_logps, ref_logps=ref_logps)
    logps, metrics = [], []
    for _ in range(step.settings.num_iterations):
        trainable, opt_state, of_one, before = step.update(
            trainable, opt_state, rollout.prompts, rollout.completion_ids, batch
        )
        logps.append(before)
        metrics.append({name: float(value) for name, value in of_one.items()})
    logps.append(log_probs(step, *policy(trainable, step.frozen, step.dtype), rollout))
    host = jax.device_get((rollout.completion_ids, mask, jnp.asarray(advantages), jnp.stack(logps), ref_logps))
    ids, mask, advantages, logps, ref_logps = host
    return Taken(step, scored, tried, alike, ids[0], mask[0], advantages[0], logps[:, 0], ref_logps[0], metrics)


def toned(value: float, text: str) -> Cell:
    return Cell(text, "good" if value > 0 else "bad" if value < 0 else "")


def verdict(is_right: bool) -> Cell:
    return Cell("right", "good") if is_right else Cell("wrong", "bad")


def one_line(text: str) -> str:
    return text.replace("\n", "⏎")


def context(taken: Taken, g: int, t: int) -> str:
    """The end of the text before a token."""
    text = "".join(taken.pieces[g][:t])
    return text if len(text) <= 16 else "…" + text[-15:]


def counted(values: np.ndarray) -> list[tuple[float, int]]:
    """The distinct values, the highest first, and how often each comes."""
    distinct_values, counts = np.unique(values, return_counts=True)
    return list(zip(distinct_values[::-1].tolist(), counts[::-1].tolist(), strict=True))


def distinct(taken: Taken, places: Sequence[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """Of places (completion, token) at most so many, no two of which are the same token after the same text."""
    seen = {}
    for g, t in places:
        seen.setdefault((*taken.pieces[g][: t + 1],), (g, t))
    return list(seen.values())[:most]


def largest_moves(taken: Taken, g: int, most: int = 3) -> list[int]:
    """The tokens of a completion whose log-prob changed most, in reading order."""
    change = np.where(taken.mask[g], np.abs(taken.logps[-1, g] - taken.logps[0, g]), 0.0)
    return sorted(np.argsort(-change)[:most].tolist())


def probabilities(taken: Taken, number: int = 0) -> np.ndarray:
    """Of each whole completion after `number` updates: float[G]."""
    return np.exp(np.where(taken.mask, taken.logps[number], 0.0).sum(axis=-1))


def token_loss(taken: Taken, g: int, t: int, number: int) -> float:
    """ℓ of one token after `number` updates."""
    ratio, advantage = jnp.float32(taken.ratio(number)[g, t]), jnp.float32(taken.advantages[g])
    loss = taken.step.loss
    return float(clipped_surrogate(ratio, advantage, epsilon=loss.epsilon, epsilon_high=loss.clip_high))


def new_figure(rows: int = 1, columns: int = 1, height: float = 2.8) -> tuple[Figure, Any]:
    figure = Figure(figsize=(6.8, height), layout="constrained")
    axes = figure.subplots(rows, columns)
    for axis in np.atleast_1d(axes).flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_advantages(taken: Taken) -> Figure:
    figure, axes = new_figure(columns=2)
    places = np.arange(1, len(taken.rewards) + 1)
    colours = [GOOD if right else BAD for right in taken.right]
    mean = taken.rewards.mean()
    for axis, values, title in ((axes[0], taken.rewards, "reward r"), (axes[1], taken.advantages, "advantage Â")):
        axis.bar(places, values, color=colours)
        axis.set_title(title)
        axis.set_xlabel("completion")
        axis.set_xticks(places)
    axes[0].axhline(mean, color="gray", linestyle="--")
    axes[0].annotate(f"mean {mean:.4f}", (places[-1], mean), (0, 3), textcoords="offset points", ha="right")
    axes[1].axhline(0, color="gray", linewidth=1)
    return figure


def plot_clip(taken: Taken, number: int) -> Figure:
    loss = taken.step.loss
    ratio, beyond = taken.ratio(number), taken.clipped(number)
    figure, axis = new_figure(height=3.4)
    furthest = max(0.4, 1.1 * np.abs(ratio[taken.mask] - 1).max())
    grid = np.linspace(max(0.0, 1 - furthest), 1 + furthest, 200, dtype=np.float32)
    surrogate = partial(clipped_surrogate, epsilon=loss.epsilon, epsilon_high=loss.clip_high)
    for advantage, colour in ((taken.advantages.max(), GOOD), (taken.advantages.min(), BAD)):
        axis.plot(grid, -np.asarray(surrogate(grid, jnp.full_like(grid, advantage))), color=colour, linewidth=1)
    every = np.broadcast_to(taken.advantages[:, None], ratio.shape)
    height = -np.asarray(surrogate(ratio, every))
    colours = np.where(every > 0, GOOD, BAD)
    for shown, marker, label in ((taken.mask & ~beyond, "o", "free"), (taken.mask & beyond, "x", "clipped")):
        axis.scatter(ratio[shown], height[shown], c=colours[shown], marker=marker, label=label, s=36)
    axis.axvspan(1 - loss.epsilon, 1 + loss.clip_high, color="gray", alpha=0.15, linewidth=0)
    axis.set_xlabel("ratio ρ   (grey: the clip range)")
    axis.set_ylabel("min(ρ Â, clip(ρ) Â)")
    axis.set_title(f"this group's tokens as update {number + 1} saw them; green: Â above 0, red: below", fontsize=10)
    axis.legend(frameon=False, labelcolor="gray")
    return figure


def plot_effect(taken: Taken) -> Figure:
    figure, axis = new_figure(height=3.2)
    sums = np.where(taken.mask, taken.logps, 0.0).sum(axis=-1)  # [U + 1, G]
    for g, right in enumerate(taken.right):
        axis.plot(sums[:, g] - sums[0, g], color=GOOD if right else BAD, marker="o", markersize=3, alpha=0.7)
    axis.axhline(0, color="gray", linewidth=1)
    axis.set_xticks(range(len(sums)))
    axis.set_xlabel("updates   (green: right completions, red: wrong ones)")
    axis.set_ylabel("change of log π(oᵢ)")
    return figure


def tell_question(taken: Taken) -> Chapter:
    row, step = taken.scored.rows[0], taken.step
    ids = np.array(row.prompt.ids)
    height, width, _ = row.prompt.pictures[0].shape
    soft, passed = int((ids == step.config.image_token_id).sum()), taken.tried - 1
    return Chapter(
        "1. A question with a checkable answer",
        [
            Picture(row.prompt.pictures[0], f"the picture, {height} by {width} pixels, as the model sees it"),
            f"Question: {row.example.question}",
            f"Right answer: {row.example.answer}. The model never sees it. The reward does.",
            f"The model reads {len(ids)} tokens. {soft} of them stand for the picture: they are vectors that the "
            "vision tower makes of it. The question is read once, however many completions are drawn.",
            f"It was chosen. This story wants a picture, and at least {LEAST_OF_EACH} right and {LEAST_OF_EACH} wrong "
            f"completions. Question {taken.tried} of seed {step.settings.seed} is the first that has them."
            + (f" In {taken.alike} of the {passed} before it all completions got equal rewards." if passed else ""),
            Code([read_prompts]),
        ],
    )


def tell_group(taken: Taken) -> Chapter:
    group = len(taken.rewards)
    rows = [
        (f"{g + 1}: {one_line(text)}", int(n), f"{p:.2g}")
        for g, (text, n, p) in enumerate(
            zip(taken.scored.completions[0], taken.mask.sum(axis=-1), probabilities(taken), strict=True)
        )
    ]
    return Chapter(
        f"2. A group of {group} completions",
        [
            f"The policy answers the question {group} times, each token drawn by chance, at temperature "
            f"{taken.step.settings.temperature:g}. A small model often repeats itself.",
            Table(("completion (⏎ is a new line)", "tokens", "probability"), rows),
            "The probability of a completion is the product of those of its tokens, its end included.",
            Code([sample]),
        ],
    )


def tell_rewards(taken: Taken) -> Chapter:
    scorer = taken.step.scorer
    formula = " + ".join(f"{weight:g} · {name}" for name, weight in scorer.weights.items())
    parts = taken.scored.parts
    rows = [
        (g + 1, *(f"{values[0, g]:g}" for values in parts.values()), f"{reward:g}", verdict(taken.right[g]))
        for g, reward in enumerate(taken.rewards)
    ]
    return Chapter(
        "3. Rewards: text in, numbers out",
        [
            "There is no reward model. A function reads each text: is the answer right, is the form kept?",
            Formula(f"rᵢ = {formula}"),
            Table(("#", *parts, "reward r", ""), rows),
            Code([type(scorer).__call__, getattr(taken.step.is_right, "func", taken.step.is_right), judge_rollout]),
        ],
    )


def tell_advantages(taken: Taken) -> Chapter:
    rewards = taken.rewards.astype(np.float64)
    group, mean = len(rewards), rewards.mean()
    std = rewards.std(ddof=1)
    squares = " + ".join(f"{count} · ({value:g} - {mean:.4f})²" for value, count in counted(rewards))
    worked = [
        f"{count} of {group}:  Â = ({value:g} - {mean:.4f}) / ({std:.4f} + {algorithm.STD_EPSILON:g}) = "
        f"{taken.advantages[rewards == value][0]:+.4f}"
        for value, count in counted(rewards)
    ]
    return Chapter(
        "4. Advantages: better or worse than the group",
        [
            "PPO asks a critic, a second network, what reward was to be expected. GRPO has no critic. The group itself "
            "says what was to be expected: its mean.",
            Formula(
                f"Âᵢ = (rᵢ - mean(r)) / (std(r) + {algorithm.STD_EPSILON:g})",
                f"{PAPER}, section 4.1.2, there without the {algorithm.STD_EPSILON:g}",
            ),
            Formula(f"mean(r) = ({' + '.join(f'{x:g}' for x in rewards)}) / {group} = {mean:.4f}"),
            Formula(f"std(r)  = √( ({squares}) / ({group} - 1) ) = {std:.4f}"),
            *map(Formula, worked),
            "Every token of a completion gets its completion's advantage. They sum to zero: what some gain others lose."
            " Had all rewards been equal, all advantages would be 0, and the group would teach nothing.",
            Plot(plot_advantages(taken), "Reward and advantage of each completion"),
            Code([group_advantages]),
        ],
    )


def tell_loss(taken: Taken) -> Chapter:
    first, loss, group = taken.metrics[0], taken.step.loss, len(taken.rewards)
    return Chapter(
        "5. The loss, before anything has changed",
        [
            "For each token, compare the policy in training with the policy that drew the token:",
            Formula("ρ = π_θ(token) / π_old(token)", f"{PAPER}, equation 3"),
            "At the first update they are the same policy. So every ρ is 1, and each token's loss is just -Â:",
            Formula("ℓ = -min( ρ Â, clip(ρ, 1-ε, 1+ε) Â ) = -Â      where ρ = 1", f"{PAPER}, equation 3, times -1"),
            "The loss is the mean over completions of the mean over their tokens, with a leash to the base model:",
            Formula(
                f"L = 1/{group} Σᵢ 1/|oᵢ| Σₜ (ℓ + {loss.beta:g} k3)      |oᵢ|: tokens of completion i; k3: chapter 9",
                f"{PAPER}, equation 3",
            ),
            Formula(f"L = -mean(Â) + {loss.beta:g} · 0 = 0      up to rounding: it came out as {first['loss']:.1e}"),
            "A loss of zero is no sign of trouble. What trains is its gradient: to raise log π where Â is above 0, and "
            f"to lower it where Â is below. The gradient's norm here is {first['grad_norm']:.4f}.",
            Code([importance_ratio, algorithm.objective, loss_and_grad]),
        ],
    )


def tell_updates(taken: Taken) -> Chapter:
    rows = [
        (
            number,
            f"{of_one['loss']:+.5f}",
            f"{of_one['grad_norm']:.4f}",
            f"{of_one['ratio/mean']:.4f}",
            f"{of_one['clip_ratio/region_mean']:.1%}",
            f"{of_one['kl']:.6f}",
        )
        for number, of_one in enumerate(taken.metrics, 1)
    ]
    tokens = int(taken.mask.sum())
    return Chapter(
        f"6. {len(rows)} updates on the same samples",
        [
            "Drawing is dear, so samples may be used more than once. From the second update on the policy is no longer "
            "the one that drew them. That is what ρ corrects, and what the clip bounds.",
            Table(("update", "loss", "gradient norm", "mean ρ", f"clipped of {tokens} tokens", "KL to base"), rows),
            "Each row is what the update saw, before it changed the weights. The samples are not drawn again: a loss "
            "that no longer falls only says that these few samples have given what the clip allows.",
            Code([update]),
        ],
    )


def tell_tokens(taken: Taken) -> Chapter:
    last = len(taken.metrics)
    ratio = taken.ratio(last)
    blocks = [
        "Most tokens are all but certain and stay so. The policy chooses at a few places only: where it counts. "
        "Green tokens grew likelier, red ones less likely.",
    ]
    for name, g in (("right", int(taken.advantages.argmax())), ("wrong", int(taken.advantages.argmin()))):
        own = taken.mask[g]
        label = f"Completion {g + 1}, {name}, Â = {taken.advantages[g]:+.4f}, after {last} updates"
        blocks.append(Tokens(label, taken.pieces[g], ratio[g][own], taken.clipped(last)[g][own]))
        rows = []
        for t in largest_moves(taken, g):
            path = np.exp(taken.logps[:, g, t])
            shown = [f"{p:.4f}" for p in path]
            rows.append(
                (
                    context(taken, g, t),
                    taken.pieces[g][t],
                    *shown,
                    toned(round(float(ratio[g, t]) - 1, 2), f"{ratio[g, t]:.3f}"),
                )
            )
        after = [f"after {number}" for number in range(1, last + 1)]
        blocks.append(Table(("after the text", "token", "π_old", *after, "ρ"), rows))
    blocks.append(
        "A token that right and wrong completions share, after the same text, is pulled both ways: the sum decides."
    )
    return Chapter("7. Old and new probabilities", [*blocks, Code([score, importance_ratio])])


def tell_clip(taken: Taken) -> Chapter:
    loss, number = taken.step.loss, len(taken.metrics) - 1
    low, high = 1 - loss.epsilon, 1 + loss.clip_high
    ratio, beyond = taken.ratio(number), taken.clipped(number)
    at_once = f"as update {number + 1} saw it"
    blocks = [
        "Nothing is gained by moving a token's ρ out of the clip range. Where the minimum takes the clipped side, ℓ no "
        "longer depends on the policy, and its gradient is exactly 0. Only the leash still pulls on such a token.",
        Formula(f"ℓ = -min( ρ Â, clip(ρ, {low:g}, {high:g}) Â )", f"{PAPER}, equation 3, times -1"),
    ]
    places = sorted(zip(*np.nonzero(beyond), strict=True), key=lambda place: -abs(np.log(ratio[place])))
    rows = []
    for g, t in distinct(taken, places, most=6):
        rho, advantage = float(ratio[g, t]), float(taken.advantages[g])
        bounded = float(np.clip(rho, low, high))
        rows.append(
            (
                g + 1,
                context(taken, g, t),
                taken.pieces[g][t],
                toned(advantage, f"{advantage:+.3f}"),
                f"{rho:.3f}",
                f"{bounded:.3f}",
                f"{rho * advantage:+.3f}",
                f"{bounded * advantage:+.3f}",
                f"{-token_loss(taken, g, t, number):+.3f}",
            )
        )
    if rows:
        share = f"{int(beyond.sum())} of {int(taken.mask.sum())} tokens are clipped {at_once}"
        blocks += [
            f"{share}; the same token after the same text is shown once:",
            Table(("#", "after the text", "token", "Â", "ρ", "clip(ρ)", "ρ Â", "clip(ρ) Â", "minimum"), rows),
        ]
    else:
        blocks.append(f"In this group no token has left the range, {at_once}. Another seed shows some.")
    blocks += [
        "The clip bounds one direction only: a token whose ρ moved against its advantage keeps its gradient, "
        "so a mistake can be taken back.",
        Plot(plot_clip(taken, number), "The surrogate against the ratio, and where this group's tokens stand"),
        Code([clipped_surrogate, clipped]),
    ]
    return Chapter("8. Where the clip bites", blocks)


def tell_kl(taken: Taken) -> Chapter:
    number = len(taken.metrics)
    k3 = np.asarray(kl_k3(taken.logps[number], taken.ref_logps, taken.mask))
    g, t = np.unravel_index(k3.argmax(), k3.shape)
    new, ref = taken.logps[number, g, t], taken.ref_logps[g, t]
    inverse = float(np.exp(ref - new))
    return Chapter(
        "9. The leash: KL to the base model",
        [
            "The loss also holds the policy near the model it started from, π_ref. One number per token estimates "
            "how far it has gone. It is never negative, and 0 where nothing changed:",
            Formula("k3 = π_ref/π_θ - log(π_ref/π_θ) - 1", f"{PAPER}, section 4.1.1"),
            f"The token that went furthest is “{taken.pieces[g][t]}” after “{context(taken, g, t)}” in completion "
            f"{g + 1}:",
            Formula(f"π_ref/π_θ = {np.exp(ref):.4f} / {np.exp(new):.4f} = {inverse:.4f}"),
            Formula(f"k3 = {inverse:.4f} - ({ref - new:+.4f}) - 1 = {k3[g, t]:.4f}"),
            f"The mean over all {int(taken.mask.sum())} tokens is {k3[taken.mask].mean():.6f} after {number} updates. "
            f"The loss counts it β = {taken.step.loss.beta:g} times. The base model is the same weights without the "
            "adapter: no second copy is kept.",
            Code([kl_k3]),
        ],
    )


def tell_effect(taken: Taken) -> Chapter:
    before, after = (np.where(taken.mask, taken.logps[i], 0.0).sum(axis=-1) for i in (0, -1))
    change = after - before
    rows = [
        (
            g + 1,
            verdict(taken.right[g]),
            f"{taken.advantages[g]:+.4f}",
            f"{before[g]:.4f}",
            f"{after[g]:.4f}",
            toned(change[g], f"{change[g]:+.4f}"),
            f"{np.exp(change[g]):.2f} times",
        )
        for g in range(len(change))
    ]
    rises, falls = change[taken.right] > 0, change[~taken.right] < 0
    return Chapter(
        "10. What the gradient did",
        [
            "The log-prob of a whole completion is the sum over its tokens. It should rise where the advantage was "
            "above 0, and fall where it was below.",
            Formula("log π(oᵢ) = Σₜ log π(oᵢₜ | question, oᵢ,<ₜ)"),
            Table(("#", "", "Â", "log π before", "after", "change", "now as likely"), rows),
            f"Right completions: {change[taken.right].mean():+.4f} on average, {rises.sum()} of {rises.size} rose. "
            f"Wrong ones: {change[~taken.right].mean():+.4f}, {falls.sum()} of {falls.size} fell.",
            Plot(plot_effect(taken), "The log-prob of each completion after each update, less that before the first"),
            Code([update, log_probs]),
        ],
    )


def tell_rest(taken: Taken) -> Chapter:
    usual = resolve_defaults(Settings())
    rows = [
        (f"--{name.replace('_', '-')}", f"{getattr(taken.step.settings, name)}", f"{getattr(usual, name)}")
        for name in STORY
    ]
    return Chapter(
        "11. And a whole training run?",
        [
            f"It is this step, {usual.steps} times, with other questions each time: python train.py. For the story "
            "some settings differ from its defaults:",
            Table(("flag", "in this story", "train.py's default"), rows),
            "With one update on each batch of samples ρ is always 1 and nothing is clipped.",
        ],
    )


def tell(taken: Taken) -> list[Chapter]:
    """The whole story."""
    weights = sum(x.size for x in jax.tree.leaves(taken.step.frozen))
    opening = [
        "PPO trains two networks: a policy, and a critic that guesses what reward is to be expected. GRPO, Group "
        "Relative Policy Optimization, trains the policy alone. It draws a group of completions of the same question "
        "and asks which were better than the group's average.",
        f"What follows is one step on the embedded nano model of {weights:,} weights, with an adapter on it. Nothing "
        "is made up: every number comes out of the code whose file and line stand at the end of its chapter.",
    ]
    tellers = (
        *(tell_question, tell_group, tell_rewards, tell_advantages, tell_loss, tell_updates),
        *(tell_tokens, tell_clip, tell_kl, tell_effect, tell_rest),
    )
    return [Chapter("", opening), *(teller(taken) for teller in tellers)]


def main() -> None:
    flags = parse(ExplainSettings, prog="python -m grpo.pages.explain", description=__doc__.splitlines()[0])
    if flags.page and not flags.page.absolute().parent.is_dir():
        raise ValueError(f"--page {flags.page}: there is no directory {flags.page.parent}; make it first")
    # The one import from above: it brings the dataset and the reward.
    from train import prepare

    console = Console(highlight=False)
    say = partial(console.print, style="dim")
    settings = resolve_defaults(Settings(seed=flags.seed, eval_limit=1, **STORY))
    say("reading the nano model and its questions ...")
    setup = prepare(settings)
    order = np.random.default_rng(flags.seed).permutation(len(setup.examples)).tolist()
    rows = (Row(place, setup.examples[i], setup.reader(setup.examples[i])) for place, i in enumerate(order))
    story = tell(take_step(setup.step, setup.trainable, setup.opt_state, rows, say))
    show(story, console)
    if flags.page:
        write_page(flags.page, as_page(TITLE, story))
        console.print(f"The same as a page, with plots and the code: {flags.page}")
    else:
        console.print("As a page, with plots and the code: python -m grpo.pages.explain --page explain.html")


if __name__ == "__main__":
    with clean_errors():
        main()
