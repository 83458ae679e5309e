"""One step of training: draw groups of completions, reward them, compare within each group, update.

What a completion is worth and how an example is asked are callables of the caller: nothing here knows a dataset or a
reward. Supervised training on given solutions is the same step without the drawing.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gemma3.config import Config
from gemma3.lora import Lora
from gemma3.model import Params
from gemma3.sample import Prompts, Sampling
from gemma3.tokenizer import Tokenizer
from grpo.algorithm import (
    LossBatch,
    LossConfig,
    clipped,
    group_advantages,
    importance_ratio,
    leave_one_out_advantages,
    mask_truncated,
    token_weights,
    zero_std_groups,
)
from grpo.rollout import Rollout, Row, place_prompts, roll_out, split_over_data, take_rows
from grpo.run.processes import exchange, held_rows, on_any_process, rows_on_host
from grpo.run.settings import Settings
from grpo.update import Trainable, policy, score, update

# Of so many prompts of a step samples.jsonl holds every token, and the pictures are kept: there to be looked at.
SHOWN_PROMPTS = 2


@dataclass(frozen=True)
class Step:
    """What one step of training needs and does not change."""

    settings: Settings
    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    frozen: Params
    optimizer: optax.GradientTransformation
    loss: LossConfig | None  # None is supervised training
    scorer: Callable  # (completions, examples, num_tokens=, finished=, prompts=) -> .total and .parts, by part's name
    is_right: Callable[[str, Any], bool]  # (completion, example)
    solution: Callable[[Any], str]  # what supervised training teaches for an example
    render: Callable[[Any], str]  # the prompt of an example, for people to read
    allowed: jax.Array  # bool[V]
    max_images: int
    micro_batch: int

    @property
    def compute(self) -> dict:
        """The static settings of every function that runs the model."""
        return {
            "config": self.config,
            "mesh": self.mesh,
            "temperature": self.settings.temperature,
            "micro_batch": self.micro_batch,
        }

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.settings.dtype)

    def place(self, rows: list[Row], params: Params, lora: Lora | None) -> Prompts:
        return place_prompts(
            [row.prompt for row in rows],
            [row.place for row in rows],
            params,
            lora,
            config=self.config,
            mesh=self.mesh,
            max_prompt_length=self.settings.max_prompt_length,
            max_images=self.max_images,
            keep_pixels=self.settings.train_vision or (lora is not None and lora.vision is not None),
        )

    def update(
        self,
        trainable: Trainable,
        opt_state: optax.OptState,
        prompts: Prompts,
        completion_ids: jax.Array,
        batch: LossBatch,
    ) -> tuple[Trainable, optax.OptState, dict[str, jax.Array], jax.Array]:
        """`grpo.update.update` with this step's model, loss and optimizer."""
        return update(
            trainable,
            opt_state,
            self.frozen,
            prompts,
            completion_ids,
            batch,
            optimizer=self.optimizer,
            dtype=self.dtype,
            loss=self.loss,
            **self.compute,
        )


class Scored(NamedTuple):
    """A rollout with its rewards, on every process's host but for the rollout's arrays."""

    rows: list[Row]
    rollout: Rollout
    completions: list[list[str]]  # [Q][G]
    rewards: np.ndarray  # float32[Q, G], NaN where nothing could be scored
    parts: dict[str, np.ndarray]  # each part's [Q, G]
    correct: np.ndarray  # bool[Q, G]
    lengths: np.ndarray  # int[Q, G] in tokens, the stop token included; 0 fills a group up to G
    finished: np.ndarray  # bool[Q, G]
    seconds: float  # that rewarding took


def given_completions(step: Step, rows: list[Row], texts: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32[Q, G, C] and mask of completions that were not sampled, each ended as the model ends its turn."""
    s = step.settings
    group = 1 if s.objective == "sft" else s.num_generations
    ids = np.full((len(rows), group, s.max_completion_length), step.config.pad_id, np.int32)
    for row, own, of_row in zip(rows, texts, ids, strict=True):
        if len(own) > group:
            raise ValueError(
                f"example {row.example.id} brings {len(own)} completions; --num-generations {group} is too few"
            )
        for text, line in zip(own, of_row, strict=False):
            tokens = [*step.tokenizer.encode(text), step.config.stop_ids[-1]][: len(line)]
            line[: len(tokens)] = tokens
    return ids, ids != step.config.pad_id


def draw(step: Step, params: Params, lora: Lora | None, rows: list[Row], number: int) -> Rollout:
    """The completions of a step's prompts: sampled, but for rows that bring their own."""
    s = step.settings
    prompts = step.place(rows, params, lora)
    given = np.array([bool(row.example.completions) for row in rows])
    # An empty prompt is not sampled. It is placed as the others are, or sampling would be compiled again.
    asked = jnp.where(given[:, None], step.config.pad_id, prompts.ids)
    asked = jax.lax.with_sharding_constraint(asked, prompts.ids.sharding)
    rollout = roll_out(
        params,
        lora,
        prompts._replace(ids=asked, pixels=None),
        jax.random.fold_in(jax.random.key(s.seed), number),
        step.allowed,
        config=step.config,
        mesh=step.mesh,
        num_generations=s.num_generations,
        max_completion_length=s.max_completion_length,
        sampling=Sampling(s.temperature, s.top_k, s.top_p),
    )._replace(prompts=prompts)
    if not given.any():
        return rollout
    ids, mask = given_completions(step, rows, [list(row.example.completions) for row in rows])
    ended = np.isin(ids, step.config.stop_ids).any(axis=-1)
    own = given[:, None, None]
    ids = jnp.where(own, ids, rollout.completion_ids)
    logps = score(params, lora, prompts, ids, **step.compute).logps
    return rollout._replace(
        completion_ids=ids,
        completion_mask=jnp.where(own, mask, rollout.completion_mask),
        sampler_logps=jnp.where(own, logps, rollout.sampler_logps),
        finished=jnp.where(given[:, None], ended, rollout.finished),
    )


def judge_rollout(step: Step, rows: list[Row], rollout: Rollout) -> Scored:
    """Decode the completions and reward them, each process those it holds; rows that bring their own rewards keep them.

    FloatingPointError where the model's log-probs are not finite, so that what it drew means nothing.
    """
    held = sorted(held_rows(len(rows), step.mesh))
    drawn = (rollout.completion_ids, rollout.completion_mask, rollout.finished, rollout.sampler_logps)
    ids, mask, finished, logps = (rows_on_host(array)[held] for array in drawn)
    if on_any_process(not np.isfinite(logps[mask]).all()):
        raise FloatingPointError("the model's log-probs are not finite")
    started = time.perf_counter()
    tokenizer, shape, lengths = step.tokenizer, mask.shape[:2], mask.sum(axis=-1)
    texts = [[tokenizer.decode(i[m]) for i, m in zip(*group, strict=True)] for group in zip(ids, mask, strict=True)]
    repeated = [rows[q].example for q in held for _ in range(shape[1])]
    flat = [text for group in texts for text in group]
    scores = step.scorer(
        flat,
        repeated,
        num_tokens=lengths.reshape(-1).tolist(),
        finished=finished.reshape(-1).tolist(),
        prompts=[step.render(example) for example in repeated],
    )
    rewards = np.array(scores.total, np.float32).reshape(shape)
    for q, of_row in zip(held, rewards, strict=True):
        if own := rows[q].example.completion_rewards:
            of_row[: len(own)] = own
    parts = {name: np.array(values, np.float32).reshape(shape) for name, values in scores.parts.items()}
    for values in (rewards, *parts.values()):
        values[lengths == 0] = np.nan  # what fills a group up to G
    correct = [step.is_right(text, example) for text, example in zip(flat, repeated, strict=True)]

    def together(values: np.ndarray | list) -> list:
        """What each process knows of the rows it holds, of all rows in order."""
        by_row = exchange(dict(zip(held, values if isinstance(values, list) else values.tolist(), strict=True)))
        return [by_row[q] for q in range(len(rows))]

    return Scored(
        rows,
        rollout,
        completions=together(texts),
        rewards=np.array(together(rewards), np.float32),
        parts={name: np.array(together(values), np.float32) for name, values in parts.items()},
        correct=np.array(together(np.array(correct).reshape(shape))),
        lengths=np.array(together(lengths)),
        finished=np.array(together(finished)),
        seconds=time.perf_counter() - started,
    )


def collect(step: Step, params: Params, lora: Lora | None, rows: Iterator[Row], number: int) -> tuple[Scored, int]:
    """One step's rewarded completions, and how many prompts they took.

    With --dynamic-sampling, groups whose rewards are all equal make room for those of further prompts (DAPO,
    arXiv 2503.14476, section 3.2), until all groups teach something or that many further batches were drawn.
    """
    size, batches = step.settings.prompts_per_step, []
    for _ in range(1 + step.settings.dynamic_sampling):
        batch = list(itertools.islice(rows, size))
        batches.append(judge_rollout(step, batch, draw(step, params, lora, batch, number)))
        rewards = np.concatenate([scored.rewards for scored in batches])
        dull = np.asarray(zero_std_groups(rewards))
        if (~dull).sum() >= size:
            break
    if len(batches) == 1:
        return batches[0], size
    chosen = np.sort(np.argsort(dull, kind="stable")[:size])

    def pick(lists):
        joined = [item for items in lists for item in items]
        return [joined[i] for i in chosen]

    scored = Scored(
        rows=pick(scored.rows for scored in batches),
        rollout=take_rows([scored.rollout for scored in batches], chosen),
        completions=pick(scored.completions for scored in batches),
        rewards=rewards[chosen],
        parts={name: np.concatenate([s.parts[name] for s in batches])[chosen] for name in batches[0].parts},
        **{
            name: np.concatenate([getattr(scored, name) for scored in batches])[chosen]
            for name in ("correct", "lengths", "finished")
        },
        seconds=sum(scored.seconds for scored in batches),
    )
    return scored, size * len(batches)


def log_probs(step: Step, params: Params, lora: Lora | None, rollout: Rollout) -> jax.Array:
    """The log-probs of a rollout's tokens under some policy, float32[Q, G, C]."""
    return score(params, lora, rollout.prompts, rollout.completion_ids, **step.compute).logps


def mean_and_std(values: np.ndarray) -> tuple[float, float]:
    """Of those that are known: not NaN, as is a part of the reward that could not judge a completion."""
    known = values[~np.isnan(values)]
    return known.mean() if known.size else np.nan, known.std(ddof=1) if known.size > 1 else np.nan


def group_metrics(scored: Scored) -> dict[str, float]:
    """What rewards and completions say about a step, under TRL's names."""
    present = scored.lengths > 0
    lengths, ended = scored.lengths[present], scored.lengths[scored.finished]
    metrics = {
        "frac_reward_zero_std": np.mean(np.asarray(zero_std_groups(scored.rewards))),
        "accuracy": scored.correct[present].mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1.0 - len(ended) / len(lengths),
        "completions/mean_terminated_length": ended.mean() if len(ended) else np.nan,
        "num_tokens": lengths.sum(),
    }
    metrics["reward"], metrics["reward_std"] = mean_and_std(scored.rewards)
    for name, values in scored.parts.items():
        metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = mean_and_std(values)
    return {name: float(value) for name, value in metrics.items()}


def describe_tokens(step: Step, scored: Scored, batch: LossBatch, logps: jax.Array) -> dict[int, list[dict]]:
    """Of the first prompts that this process holds, each completion's tokens: as pieces, the sampler's log-prob of
    each, its ratio in the last update, whose policy had `logps`, and whether that was clipped.
    """
    rollout, old = scored.rollout, logps if batch.old_logps is None else batch.old_logps
    arrays = (rollout.completion_ids, rollout.completion_mask, rollout.sampler_logps, logps, old, batch.advantages)
    arrays = [rows_on_host(array) for array in arrays]
    tokens = {}
    here = [q for q in sorted(held_rows(len(scored.rows), step.mesh)) if scored.rows[q].prompt is not None]
    for q in here[:SHOWN_PROMPTS]:
        ids, mask, sampler_logps, new, old, advantages = (array[q] for array in arrays)
        ratio = importance_ratio(new, old, mask, level=step.loss.ratio_level)
        ratio = jnp.broadcast_to(ratio, mask.shape)
        low, high = clipped(ratio, advantages[:, None], step.loss)
        ratio, beyond = np.asarray(ratio), np.asarray(low | high)
        tokens[q] = [
            {
                "tokens": step.tokenizer.pieces(ids[g][m]),
                "logps": sampler_logps[g][m],
                "ratios": ratio[g][m],
                "clipped": beyond[g][m],
            }
            for g, m in enumerate(mask)
        ]
    return tokens


def describe(step: Step, scored: Scored, advantages: np.ndarray, tokens: dict[int, list[dict]]) -> list[dict]:
    """The lines of samples.jsonl: each prompt, and its completions with rewards by part and advantage.

    Those in `tokens` come with their tokens, and with their pictures, uint8[h, w, 3].
    """
    groups = []
    for q, row in enumerate(scored.rows):
        completions = [
            {
                "text": text,
                "reward": scored.rewards[q, g],
                "rewards": {name: values[q, g] for name, values in scored.parts.items()},
                "correct": scored.correct[q, g],
                "advantage": advantages[q, g],
                "finished": scored.finished[q, g],
            }
            for g, text in enumerate(scored.completions[q])
        ]
        group = {"id": row.example.id, "prompt": step.render(row.example), "answer": row.example.answer}
        if q in tokens:
            group["pictures"] = row.prompt.pictures
            completions = [whole | parts for whole, parts in zip(completions, tokens[q], strict=True)]
        groups.append(group | {"completions": completions})
    return groups


def grpo_step(step: Step, trainable: Trainable, opt_state, rows: Iterator[Row], number: int):
    """One step of GRPO: draw groups, reward them, compare within each group, update."""
    s, started = step.settings, time.perf_counter()
    params, lora = policy(trainable, step.frozen, step.dtype)
    scored, drawn = collect(step, params, lora, rows, number)
    rollout, sampled = scored.rollout, time.perf_counter()

    if s.advantage == "leave-one-out":
        advantages = leave_one_out_advantages(scored.rewards)
    else:
        advantages = group_advantages(scored.rewards, scale_rewards=s.scale_rewards)
    mask = rollout.completion_mask
    if s.mask_truncated_completions:
        mask = mask_truncated(mask, rollout.finished)
    batch = LossBatch(
        advantages=split_over_data(advantages, step.mesh),
        completion_mask=mask,
        weights=token_weights(s.loss_type, mask, max_completion_length=s.max_completion_length),
        # Samples used once are from the policy itself: its log-probs in the first update are the old ones.
        old_logps=log_probs(step, params, lora, rollout) if s.num_iterations > 1 else None,
        ref_logps=log_probs(step, step.frozen, None, rollout) if s.beta else None,
        sampler_logps=rollout.sampler_logps,
    )
    del params, lora  # of whole weights in training a second copy, which the update makes for itself
    updates = []
    for _ in range(s.num_iterations):
        trainable, opt_state, metrics, logps = step.update(
            trainable, opt_state, rollout.prompts, rollout.completion_ids, batch
        )
        updates.append(metrics)
    updates = jax.device_get(updates)
    metrics = {name: float(np.mean([of_one[name] for of_one in updates])) for name in updates[0]}
    metrics["finite"] = float(min(of_one["finite"] for of_one in updates))
    metrics |= group_metrics(scored) | {"prompts_drawn": drawn}
    metrics["lora_norm" if isinstance(trainable, Lora) else "weight_norm"] = float(optax.global_norm(trainable))
    ended, rolling = time.perf_counter(), sampled - started - scored.seconds
    metrics |= {"time/rollout": rolling, "time/reward": scored.seconds, "time/update": ended - sampled}
    metrics |= {"step_time": ended - started, "tokens_per_second": metrics["num_tokens"] / rolling}
    tokens = describe_tokens(step, scored, batch, logps)
    return trainable, opt_state, metrics, describe(step, scored, np.asarray(advantages), tokens)


def sft_step(step: Step, trainable: Trainable, opt_state, rows: Iterator[Row]):
    """One step of supervised training: raise the log-probs of the dataset's own solutions."""
    s, started = step.settings, time.perf_counter()
    batch_rows = list(itertools.islice(rows, s.prompts_per_step))
    prompts = step.place(batch_rows, *policy(trainable, step.frozen, step.dtype))
    texts = [[step.solution(row.example)] for row in batch_rows]
    ids, mask = given_completions(step, batch_rows, texts)
    put = lambda array: split_over_data(array, step.mesh)  # noqa: E731
    weights = token_weights("dapo", jnp.asarray(mask), max_completion_length=s.max_completion_length)
    batch = LossBatch(put(np.zeros(mask.shape[:2], np.float32)), put(mask), put(weights), old_logps=None)
    trainable, opt_state, metrics, _ = step.update(trainable, opt_state, prompts, put(ids), batch)
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    metrics["completions/mean_length"] = float(mask.sum() / len(batch_rows))
    metrics["step_time"] = time.perf_counter() - started
    return trainable, opt_state, metrics
