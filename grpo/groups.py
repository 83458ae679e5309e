"""Sample groups of completions, reward them and, if asked to, replace groups that teach nothing."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma3.lora import Policy
from gemma3.sample import Completions, PromptBatch, completions_of
from grpo.algorithm import zero_std_groups
from grpo.reader import Reader, Row, rounded_up
from grpo.rollout import put_prompts, roll_out, take_rows
from grpo.run.processes import held_rows, of_all_rows, on_any_process, rows_on_host
from grpo.trainer import Trainer
from reward.report import completion_is_correct


class Groups(NamedTuple):
    """The completions of a step's prompts, rewarded. Every process knows all of it, except for arrays on the mesh."""

    rows: list[Row]
    prompts: PromptBatch
    completions: Completions
    texts: list[list[str]]  # [Q][G], the completions' texts
    rewards: np.ndarray  # float32[Q, G], NaN where nothing could be rewarded
    parts: dict[str, np.ndarray]  # the reward's unweighted parts by name, each [Q, G]
    correct: np.ndarray  # bool[Q, G]
    lengths: np.ndarray  # int[Q, G], tokens of each completion with its stop token; 0 where a group has fewer than G
    finished: np.ndarray  # bool[Q, G]
    num_sampled: int  # how many prompts were sampled to get these groups
    started: float  # seconds on the clock when sampling began
    ended: float  # seconds on the clock when all completions were rewarded
    rewarding: float  # how many of the seconds between them the rewards took


def given_completions(rows: Sequence[Row], texts: Sequence[Sequence[str]], reader: Reader, shape: tuple[int, int]):
    """Tokens int32[Q, G, C] and mask of completions that were not sampled; shape: (G, C)."""
    ids = np.full((len(rows), *shape), reader.model.config.pad_id, np.int32)
    for row, own, of_row in zip(rows, texts, ids, strict=True):
        if len(own) > shape[0]:
            raise ValueError(
                f"example {row.example.id} brings {len(own)} completions; --num-generations {shape[0]} is too few"
            )
        for text, line in zip(own, of_row, strict=False):
            tokens = reader.completion(text)[: len(line)]
            line[: len(tokens)] = tokens
    return ids, ids != reader.model.config.pad_id


def sample_groups(trainer: Trainer, policy: Policy, rows: Sequence[Row], step: int) -> tuple[PromptBatch, Completions]:
    """The completions of a step's prompts: sampled, except where a row brings its own."""
    config, sampling = trainer.reader.model.config, trainer.settings.sampling
    prompts = put_prompts(policy, rows, trainer.reader, keep_pixels=trainer.keeps_pixels(policy))
    given = np.array([bool(row.example.completions) for row in rows])
    # An empty prompt is not sampled. The ids keep their sharding; otherwise sampling would be compiled again.
    asked = jnp.where(given[:, None], config.pad_id, prompts.ids)
    asked = prompts._replace(ids=jax.lax.with_sharding_constraint(asked, prompts.ids.sharding), pixels=None)
    key = jax.random.fold_in(jax.random.key(trainer.settings.seed), step)
    sampled = roll_out(policy, asked, key, trainer.reader, sampling=sampling)
    if not given.any():
        return prompts, sampled
    shape = (sampling.num_generations, sampling.max_completion_length)
    ids, _ = given_completions(rows, [row.example.completions for row in rows], trainer.reader, shape)
    given = given[:, None, None]
    ids = jnp.where(given, ids, sampled.ids)
    return prompts, completions_of(ids, jnp.where(given, trainer.logps(policy, prompts, ids), sampled.logps), config)


def reward_groups(
    trainer: Trainer, rows: list[Row], prompts: PromptBatch, completions: Completions, started: float
) -> Groups:
    """Decode and reward the completions, each process its own part; rows that bring their own rewards keep them.

    FloatingPointError if the model's log-probs are not finite: what it sampled then means nothing.
    """
    reader, held = trainer.reader, held_rows(len(rows), trainer.reader.model.mesh)
    own = Completions(*(rows_on_host(array)[held] for array in completions))
    if on_any_process(not np.isfinite(own.logps).all()):
        raise FloatingPointError("the model's log-probs are not finite")
    sampled = time.perf_counter()
    lengths, texts = own.mask.sum(axis=-1), reader.texts(own.ids, own.mask)
    flat = [text for group in texts for text in group]
    examples = [rows[q].example for q in held for _ in range(lengths.shape[1])]
    found = trainer.reward(
        flat,
        examples,
        num_tokens=lengths.reshape(-1).tolist(),
        finished=own.finished.reshape(-1).tolist(),
        prompts=[reader.render(example) for example in examples],
    )
    columns = [np.array(values, np.float32) for values in (found.total, *found.parts.values())]
    rewards, *parts = (values.reshape(lengths.shape) for values in columns)
    for q, of_row in zip(held, rewards, strict=True):
        if given := rows[q].example.completion_rewards:
            of_row[: len(given)] = given
    for values in (rewards, *parts):
        values[lengths == 0] = np.nan  # where a group has fewer than G completions
    correct = [
        completion_is_correct(text, example, reader.format) for text, example in zip(flat, examples, strict=True)
    ]
    correct = np.array(correct).reshape(lengths.shape)
    texts, rewards, correct, lengths, finished, *parts = of_all_rows(
        held, texts, rewards, correct, lengths, own.finished, *parts
    )
    parts, ended = dict(zip(found.parts, parts, strict=True)), time.perf_counter()
    return Groups(
        *(rows, prompts, completions, texts, rewards, parts, correct, lengths, finished),
        **{"num_sampled": len(rows), "started": started, "ended": ended, "rewarding": ended - sampled},
    )


def choose_groups(batches: Sequence[Groups], chosen: Sequence[int]) -> Groups:
    """The chosen groups of several batches; `chosen` counts the groups through all batches in order."""

    def pick(parts: Iterable[Sequence]) -> list:
        joined = [row for part in parts for row in part]
        return [joined[i] for i in chosen]

    prompts, completions = take_rows([(groups.prompts, groups.completions) for groups in batches], chosen)
    of_host = ("rewards", "correct", "lengths", "finished")
    arrays = {name: np.array(pick(getattr(groups, name) for groups in batches)) for name in of_host}
    return batches[0]._replace(
        rows=pick(groups.rows for groups in batches),
        prompts=prompts,
        completions=completions,
        texts=pick(groups.texts for groups in batches),
        parts={name: np.array(pick(groups.parts[name] for groups in batches)) for name in batches[0].parts},
        num_sampled=sum(groups.num_sampled for groups in batches),
        ended=batches[-1].ended,
        rewarding=sum(groups.rewarding for groups in batches),
        **arrays,
    )


def cut_to_longest(groups: Groups) -> Groups:
    """Cut the arrays of tokens behind the longest completion, at one of a few sizes: what follows costs no more."""
    ids, mask, logps, finished = groups.completions
    longest = rounded_up(int(groups.lengths.max()), ids.shape[2])
    return groups._replace(completions=Completions(*(x[..., :longest] for x in (ids, mask, logps)), finished))


def collect(trainer: Trainer, policy: Policy, rows: Iterator[Row], step: int) -> Groups:
    """One step's groups of completions, rewarded.

    With --dynamic-sampling N, groups of further prompts replace those whose rewards are all equal (DAPO,
    arXiv 2503.14476, section 3.2), until all groups teach something or N further batches were sampled.
    """
    size, batches = trainer.settings.prompts_per_step, []
    for _ in range(1 + trainer.settings.dynamic_sampling):
        started, batch = time.perf_counter(), list(itertools.islice(rows, size))
        prompts, completions = sample_groups(trainer, policy, batch, step)
        batches.append(reward_groups(trainer, batch, prompts, completions, started))
        dull = np.concatenate([np.asarray(zero_std_groups(groups.rewards)) for groups in batches])
        if (~dull).sum() >= size:
            break
    chosen = np.sort(np.argsort(dull, kind="stable")[:size])
    return cut_to_longest(batches[0] if len(batches) == 1 else choose_groups(batches, chosen))


def mean_and_std(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation without NaN, the value of a part of the reward that could not judge a completion."""
    known = values[~np.isnan(values)]
    return known.mean() if known.size else np.nan, known.std(ddof=1) if known.size > 1 else np.nan


def group_metrics(groups: Groups) -> dict[str, float]:
    """A step's metrics of its rewards and completions, under TRL's names."""
    present = groups.lengths > 0
    lengths, ended = groups.lengths[present], groups.lengths[groups.finished]
    metrics = {
        "frac_reward_zero_std": np.mean(np.asarray(zero_std_groups(groups.rewards))),
        "accuracy": groups.correct[present].mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1.0 - len(ended) / len(lengths),
        "completions/mean_terminated_length": ended.mean() if len(ended) else np.nan,
        "num_tokens": lengths.sum(),
    }
    metrics["reward"], metrics["reward_std"] = mean_and_std(groups.rewards)
    for name, values in groups.parts.items():
        metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = mean_and_std(values)
    return {name: float(value) for name, value in metrics.items()} | {"prompts_drawn": groups.num_sampled}
