"""One real GRPO step on the embedded nano model, told as a story: in the terminal, and as a page.

    python train.py --explain explain.html [--seed N]

The story is explain.md. Its numbers are made here by the functions of training, which each chapter names. The model,
the dataset and the reward are train.py's defaults.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from grpo import algorithm
from grpo.algorithm import LossBatch
from grpo.groups import Groups, collect
from grpo.pages.page import Cell, check_folder, new_figure, write_page
from grpo.pages.story import Chapter, Formula, Image, Plot, Table, Tokens, as_page, read_story, show
from grpo.reader import Row
from grpo.run.cli import flag_name
from grpo.run.settings import Settings, resolve_defaults
from grpo.run.setup import prepare
from grpo.trainer import Trainer
from grpo.update import Trainable, TrainState, update

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "One step of GRPO, told with its own numbers"
GOOD, BAD = "#2e9e56", "#d9534f"  # readable on white and on black
NUMBER_OF_TRIES = 200  # questions, of which about one in four will do
LEAST_OF_EACH = 3  # right completions in the group, and as many wrong ones

# One group, so that every number of the step can be shown, and the paper's loss. Five updates on the same samples, at a
# learning rate that moves a few tokens of most groups out of the clip range, and no group far away.
STORY = {
    "prompts_per_step": 1,
    "loss_type": "grpo",
    "beta": 0.04,
    "use_bias_correction_kl": False,
    "num_iterations": 5,
    "learning_rate": 2e-4,
    "lr_scheduler": "constant",
    "warmup_steps": 0,
}


class Taken(NamedTuple):
    """Everything about one step of G completions, padded to C tokens, and U updates; all arrays are on the host."""

    trainer: Trainer
    groups: Groups  # only one group
    tried: int  # questions, including the one that was taken
    alike: int  # questions passed over whose completions all got equal rewards
    ids: np.ndarray  # int32[G, C]
    mask: np.ndarray  # bool[G, C]
    advantages: np.ndarray  # float32[G]
    logps: np.ndarray  # float32[U + 1, G, C], before each update and after the last one
    ref_logps: np.ndarray  # float32[G, C], the base model's
    metrics: list[dict[str, float]]  # of each update

    @property
    def rewards(self) -> np.ndarray:
        return self.groups.rewards[0]

    @property
    def correct(self) -> np.ndarray:
        return self.groups.correct[0]

    @property
    def pieces(self) -> list[list[str]]:
        """The tokens of each completion as text that fits on a line."""
        texts = [self.trainer.reader.tokenizer.pieces(ids[mask]) for ids, mask in zip(self.ids, self.mask, strict=True)]
        return [[piece.replace("\n", "⏎").replace("<0x0A>", "⏎") for piece in text] for text in texts]

    def ratio(self, number: int) -> np.ndarray:
        """The importance ratio float32[G, C] after `number` updates."""
        return np.asarray(algorithm.importance_ratio(self.logps[number], self.logps[0], self.mask))

    def clipped(self, number: int) -> np.ndarray:
        """Where the ratio after `number` updates has left the clip range in its advantage's direction: bool[G, C]."""
        low, high = algorithm.clipped(self.ratio(number), self.advantages[:, None], self.trainer.learner.loss)
        return np.asarray(low | high)


def is_telling(trainer: Trainer, groups: Groups) -> bool:
    """Whether a group makes a story: about an image, with some right and some wrong completions."""
    right = int(groups.correct[0].sum())
    enough = LEAST_OF_EACH <= right <= trainer.settings.num_generations - LEAST_OF_EACH
    return enough and len(groups.rows[0].prompt.images) > 0


def find_group(trainer: Trainer, trainable: Trainable, rows: Iterator[Row]) -> tuple[Groups, int, int]:
    """The first telling group, how many questions it took, and how many of them got equal rewards throughout."""
    policy, alike = trainer.policy(trainable), 0
    for number in range(NUMBER_OF_TRIES):
        groups = collect(trainer, policy, rows, number)
        if is_telling(trainer, groups):
            return groups, number + 1, alike
        alike += int(algorithm.zero_std_groups(groups.rewards).sum())
    raise ValueError(
        f"--seed {trainer.settings.seed}: none of the first {NUMBER_OF_TRIES} questions got {LEAST_OF_EACH} right and "
        f"{LEAST_OF_EACH} wrong completions; choose another seed"
    )


def take_step(trainer: Trainer, state: TrainState, rows: Iterator[Row], say: Callable[[str], None]) -> Taken:
    """Find a group and train on it `num_iterations` times, as `grpo_step` does, and keep what the story shows."""
    say("compiling the sampler, which takes most of the time, and sampling groups ...")
    groups, tried, alike = find_group(trainer, state.trainable, rows)
    prompts, (ids, mask, *_), learner = groups.prompts, groups.completions, trainer.learner
    advantages = algorithm.group_advantages(groups.rewards)
    say("compiling what computes log-probs and gradients ...")
    old_logps = trainer.logps(trainer.policy(state.trainable), prompts, ids)
    ref_logps = trainer.logps(trainer.reference, prompts, ids)
    length = trainer.settings.max_completion_length
    weights = algorithm.token_weights(learner.loss.loss_type, mask, max_completion_length=length)
    batch = LossBatch(advantages, mask, weights, old_logps, ref_logps=ref_logps)
    logps, metrics = [], []
    for _ in range(trainer.settings.num_iterations):
        state, of_one, before = update(state, trainer.frozen, prompts, ids, batch, learner=learner)
        logps.append(before)
        metrics.append({name: float(value) for name, value in of_one.items()})
    logps.append(trainer.logps(trainer.policy(state.trainable), prompts, ids))
    host = jax.device_get((ids, mask, jnp.asarray(advantages), jnp.stack(logps), ref_logps))
    ids, mask, advantages, logps, ref_logps = host
    return Taken(trainer, groups, tried, alike, ids[0], mask[0], advantages[0], logps[:, 0], ref_logps[0], metrics)


def toned(value: float, text: str) -> Cell:
    return Cell(text, "good" if value > 0 else "bad" if value < 0 else "")


def context(taken: Taken, g: int, t: int) -> str:
    """The end of the text before a token."""
    text = "".join(taken.pieces[g][:t])
    return text if len(text) <= 16 else "…" + text[-15:]


def surrogate(taken: Taken, ratio: jax.Array, advantages: jax.Array) -> jax.Array:
    """ℓ of tokens with these ratios and advantages."""
    loss = taken.trainer.learner.loss
    return algorithm.clipped_surrogate(ratio, advantages, epsilon=loss.epsilon, epsilon_high=loss.clip_high)


def plot_advantages(taken: Taken) -> "Figure":
    figure, axes = new_figure(6.8, 2.8, columns=2)
    numbers = np.arange(1, len(taken.rewards) + 1)
    colours = [GOOD if right else BAD for right in taken.correct]
    mean = taken.rewards.mean()
    for axis, values, title in ((axes[0], taken.rewards, "reward r"), (axes[1], taken.advantages, "advantage Â")):
        axis.bar(numbers, values, color=colours)
        axis.set_title(title)
        axis.set_xlabel("completion")
        axis.set_xticks(numbers)
    axes[0].axhline(mean, color="gray", linestyle="--")
    axes[0].annotate(f"mean {mean:.4f}", (numbers[-1], mean), (0, 3), textcoords="offset points", ha="right")
    axes[1].axhline(0, color="gray", linewidth=1)
    return figure


def plot_clip(taken: Taken, number: int) -> "Figure":
    loss = taken.trainer.learner.loss
    ratio, beyond = taken.ratio(number), taken.clipped(number)
    figure, axis = new_figure(6.8, 3.4)
    furthest = max(0.4, 1.1 * np.abs(ratio[taken.mask] - 1).max())
    grid = np.linspace(max(0.0, 1 - furthest), 1 + furthest, 200, dtype=np.float32)
    for advantage, colour in ((taken.advantages.max(), GOOD), (taken.advantages.min(), BAD)):
        axis.plot(grid, -np.asarray(surrogate(taken, grid, jnp.full_like(grid, advantage))), color=colour, linewidth=1)
    every = np.broadcast_to(taken.advantages[:, None], ratio.shape)
    height = -np.asarray(surrogate(taken, ratio, every))
    colours = np.where(every > 0, GOOD, BAD)
    for shown, marker, label in ((taken.mask & ~beyond, "o", "free"), (taken.mask & beyond, "x", "clipped")):
        axis.scatter(ratio[shown], height[shown], c=colours[shown], marker=marker, label=label, s=36)
    axis.axvspan(1 - loss.epsilon, 1 + loss.clip_high, color="gray", alpha=0.15, linewidth=0)
    axis.set_xlabel("ratio ρ   (grey: the clip range)")
    axis.set_ylabel("min(ρ Â, clip(ρ) Â)")
    axis.set_title(f"this group's tokens as update {number + 1} saw them; green: Â above 0, red: below", fontsize=10)
    axis.legend(frameon=False, labelcolor="gray")
    return figure


def plot_effect(taken: Taken) -> "Figure":
    figure, axis = new_figure(6.8, 3.2)
    sums = np.where(taken.mask, taken.logps, 0.0).sum(axis=-1)  # [U + 1, G]
    for g, right in enumerate(taken.correct):
        axis.plot(sums[:, g] - sums[0, g], color=GOOD if right else BAD, marker="o", markersize=3, alpha=0.7)
    axis.axhline(0, color="gray", linewidth=1)
    axis.set_xticks(range(len(sums)))
    axis.set_xlabel("updates   (green: right completions, red: wrong ones)")
    axis.set_ylabel("change of log π(oᵢ)")
    return figure


def completion_table(taken: Taken) -> Table:
    probabilities = np.exp(np.where(taken.mask, taken.logps[0], 0.0).sum(axis=-1))
    columns = zip(taken.groups.texts[0], taken.mask.sum(axis=-1), probabilities, strict=True)
    rows = [(f"{g}: " + text.replace("\n", "⏎"), int(n), f"{p:.2g}") for g, (text, n, p) in enumerate(columns, 1)]
    return Table(("completion (⏎ is a new line)", "tokens", "probability"), rows)


def reward_table(taken: Taken) -> Table:
    parts = taken.groups.parts
    columns = [taken.rewards, *(values[0] for values in parts.values())]
    rows = [
        (g, *(f"{value:g}" for value in values), f"{reward:g}", verdict(correct))
        for g, (reward, *values, correct) in enumerate(zip(*columns, taken.correct, strict=True), 1)
    ]
    return Table(("#", *parts, "reward r", ""), rows)


def verdict(correct: bool) -> Cell:
    return Cell("right", "good") if correct else Cell("wrong", "bad")


def advantage_numbers(taken: Taken) -> dict[str, Any]:
    """The advantages worked by hand, with numpy's mean and standard deviation."""
    rewards = taken.rewards.astype(np.float64)
    mean, std, size = rewards.mean(), rewards.std(ddof=1), len(rewards)
    values, counts = (found[::-1].tolist() for found in np.unique(rewards, return_counts=True))
    counted = list(zip(values, counts, strict=True))
    worked = [
        f"{count} of {size}:  Â = ({value:g} - {mean:.4f}) / ({std:.4f} + {algorithm.STD_EPSILON:g}) = "
        f"{taken.advantages[rewards == value][0]:+.4f}"
        for value, count in counted
    ]
    return {
        "mean": mean,
        "std": std,
        "std_epsilon": algorithm.STD_EPSILON,
        "summands": " + ".join(f"{value:g}" for value in rewards),
        "squares": " + ".join(f"{count} · ({value:g} - {mean:.4f})²" for value, count in counted),
        "worked_advantages": list(map(Formula, worked)),
    }


def update_table(taken: Taken) -> Table:
    headings = ("update", "loss", "gradient norm", "mean ρ", f"clipped of {taken.mask.sum()} tokens", "KL to base")
    formats = {
        "loss": "{:+.5f}",
        "grad_norm": "{:.4f}",
        "ratio/mean": "{:.4f}",
        "clip_ratio/region_mean": "{:.1%}",
        "kl": "{:.6f}",
    }
    rows = [[layout.format(of_one[name]) for name, layout in formats.items()] for of_one in taken.metrics]
    return Table(headings, [(number, *row) for number, row in enumerate(rows, 1)])


def moved_tokens(taken: Taken) -> list[Tokens | Table]:
    """The tokens of the best and the worst completion, and in each the three whose log-prob changed most."""
    last, blocks = len(taken.metrics), []
    ratio, clipped_after = taken.ratio(last), taken.clipped(last)
    headings = ("after the text", "token", "π_old", *(f"after {number}" for number in range(1, last + 1)), "ρ")
    for name, g in (("right", int(taken.advantages.argmax())), ("wrong", int(taken.advantages.argmin()))):
        own, pieces = taken.mask[g], taken.pieces[g]
        label = f"Completion {g + 1}, {name}, Â = {taken.advantages[g]:+.4f}, after {last} updates"
        blocks.append(Tokens(label, pieces, ratio[g][own], clipped_after[g][own]))
        change = np.where(own, np.abs(taken.logps[-1, g] - taken.logps[0, g]), 0.0)
        rows = []
        for t in sorted(np.argsort(-change)[:3].tolist()):
            path = [f"{p:.4f}" for p in np.exp(taken.logps[:, g, t])]
            rho = float(ratio[g, t])
            rows.append((context(taken, g, t), pieces[t], *path, toned(round(rho - 1, 2), f"{rho:.3f}")))
        blocks.append(Table(headings, rows))
    return blocks


def clipped_tokens(taken: Taken, number: int) -> list[str | Table]:
    """The tokens furthest out of the clip range after `number` updates, each after the same text only once."""
    loss, ratio, beyond = taken.trainer.learner.loss, taken.ratio(number), taken.clipped(number)
    seen: dict[tuple[str, ...], tuple[int, int]] = {}
    for g, t in sorted(zip(*np.nonzero(beyond), strict=True), key=lambda token: -abs(np.log(ratio[token]))):
        seen.setdefault((*taken.pieces[g][: t + 1],), (g, t))
    if not seen:
        return [f"No token of this group was out of the range when update {number + 1} saw it. Try another seed."]
    rows = []
    for g, t in list(seen.values())[:6]:
        rho, advantage = float(ratio[g, t]), float(taken.advantages[g])
        bounded = float(np.clip(rho, 1 - loss.epsilon, 1 + loss.clip_high))
        least = -float(surrogate(taken, jnp.float32(rho), jnp.float32(advantage)))
        numbers = (rho * advantage, bounded * advantage, least)
        row = (g + 1, context(taken, g, t), taken.pieces[g][t], toned(advantage, f"{advantage:+.3f}"))
        rows.append((*row, f"{rho:.3f}", f"{bounded:.3f}", *(f"{value:+.3f}" for value in numbers)))
    share = f"{beyond.sum()} of {taken.mask.sum()} tokens are clipped as update {number + 1} saw it"
    headings = ("#", "after the text", "token", "Â", "ρ", "clip(ρ)", "ρ Â", "clip(ρ) Â", "minimum")
    return [f"{share}; the same token after the same text is shown once:", Table(headings, rows)]


def kl_numbers(taken: Taken) -> dict[str, Any]:
    """The token that went furthest from the base model, and the mean over all."""
    number = len(taken.metrics)
    k3 = np.asarray(algorithm.kl_k3(taken.logps[number], taken.ref_logps, taken.mask))
    g, t = np.unravel_index(k3.argmax(), k3.shape)
    new, ref = taken.logps[number, g, t], taken.ref_logps[g, t]
    inverse, texts = float(np.exp(ref - new)), {"piece": taken.pieces[g][t], "context": context(taken, g, t)}
    numbers = {"ref": np.exp(ref), "new": np.exp(new), "inverse": inverse, "log": ref - new, "k3": k3[g, t]}
    return {"furthest": SimpleNamespace(number=g + 1, **texts, **numbers), "mean_k3": k3[taken.mask].mean()}


def effect_numbers(taken: Taken) -> dict[str, Any]:
    """How the log-prob of each completion changed."""
    before, after = (np.where(taken.mask, taken.logps[i], 0.0).sum(axis=-1) for i in (0, -1))
    change, correct = after - before, taken.correct
    rows = [
        (
            *(g + 1, verdict(correct[g]), f"{taken.advantages[g]:+.4f}", f"{before[g]:.4f}", f"{after[g]:.4f}"),
            *(toned(change[g], f"{change[g]:+.4f}"), f"{np.exp(change[g]):.2f} times"),
        )
        for g in range(len(change))
    ]
    return {
        "effect": Table(("#", "", "Â", "log π before", "after", "change", "now as likely"), rows),
        "right_change": change[correct].mean(),
        "wrong_change": change[~correct].mean(),
        "risen": f"{(change[correct] > 0).sum()} of {correct.sum()} rose",
        "fallen": f"{(change[~correct] < 0).sum()} of {(~correct).sum()} fell",
    }


def tell(taken: Taken) -> list[Chapter]:
    """The whole story: explain.md with this step's numbers."""
    trainer, row, loss = taken.trainer, taken.groups.rows[0], taken.trainer.learner.loss
    passed, usual, pixels = taken.tried - 1, resolve_defaults(Settings()), row.prompt.images[0]
    weights = trainer.reward.reward_weights
    settings = [(flag_name(name), f"{getattr(trainer.settings, name)}", f"{getattr(usual, name)}") for name in STORY]
    values = {
        "num_weights": sum(x.size for x in jax.tree.leaves(trainer.frozen)),
        "image": Image(pixels, f"the image, {len(pixels)} by {len(pixels[0])} pixels, as the model sees it"),
        "example": row.example,
        "prompt_tokens": len(row.prompt.ids),
        "soft_tokens": row.prompt.ids.count(trainer.reader.model.config.image_token_id),
        "least": LEAST_OF_EACH,
        "tried": taken.tried,
        "seed": trainer.settings.seed,
        "passed_over": f" In {taken.alike} of the {passed} before it all completions got equal rewards." * bool(passed),
        "group": len(taken.rewards),
        "temperature": trainer.settings.temperature,
        "completions": completion_table(taken),
        "reward_formula": " + ".join(f"{weight:g} · {name}" for name, weight in weights.items()),
        "rewards": reward_table(taken),
        "plot_of_advantages": Plot(plot_advantages(taken), "Reward and advantage of each completion"),
        "beta": loss.beta,
        "first": taken.metrics[0],
        "num_updates": len(taken.metrics),
        "updates": update_table(taken),
        "tokens": moved_tokens(taken),
        "low": 1 - loss.epsilon,
        "high": 1 + loss.clip_high,
        "clipped_tokens": clipped_tokens(taken, len(taken.metrics) - 1),
        "plot_of_clip": Plot(
            plot_clip(taken, len(taken.metrics) - 1),
            "The surrogate against the ratio, and where this group's tokens stand",
        ),
        "num_tokens": int(taken.mask.sum()),
        "plot_of_effect": Plot(
            plot_effect(taken), "The log-prob of each completion after each update, less that before the first"
        ),
        "usual": usual,
        "settings": Table(("flag", "in this story", "train.py's default"), settings),
    }
    values |= advantage_numbers(taken) | kl_numbers(taken) | effect_numbers(taken)
    return read_story(Path(__file__).with_suffix(".md").read_text(encoding="utf-8"), values)


def explain(settings: Settings) -> None:
    """Take one step with this seed and tell it, in the terminal and on the page that --explain names."""
    if settings != Settings(explain=settings.explain, seed=settings.seed):
        raise ValueError(
            "--explain tells a step of nano, with settings of its own; leave all other flags but --seed out"
        )
    check_folder(settings.explain)
    told = resolve_defaults(Settings(seed=settings.seed, eval_limit=1, **STORY))
    console = Console(highlight=False)
    say = partial(console.print, style="dim")
    say("reading the nano model and its questions ...")
    trainer, data, state = prepare(told)
    order = np.random.default_rng(settings.seed).permutation(len(data.train)).tolist()
    rows = (Row(index, data.train[i], trainer.reader(data.train[i])) for index, i in enumerate(order))
    story = tell(take_step(trainer, state, rows, say))
    show(story, console)
    write_page(settings.explain, as_page(TITLE, story))
    console.print(f"The same as a page, with plots and the code: {settings.explain}")
