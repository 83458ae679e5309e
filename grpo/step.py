"""One step of GRPO, in the order of the paper's Algorithm 1."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax

from gemma3.lora import Lora
from grpo.algorithm import LossBatch, group_advantages, leave_one_out_advantages, mask_truncated, token_weights
from grpo.groups import Groups, collect, group_metrics
from grpo.reader import Row
from grpo.rollout import split_over_data
from grpo.trainer import Trainer
from grpo.update import TrainState, update


class StepResult(NamedTuple):
    """The result of a step: the new state, its metrics, and the data it learned from, for people to look at."""

    state: TrainState
    metrics: dict[str, float]  # "finite" is 0 where an update was not applied
    groups: Groups | None = None
    advantages: jax.Array | None = None  # float32[Q, G], known to every process
    batch: LossBatch | None = None
    logps: jax.Array | None = None  # float32[Q, G, C], of the policy before the last update


def advantages_of(rewards: np.ndarray, baseline: str, scale_rewards: str) -> jax.Array:
    if baseline == "leave-one-out":
        return leave_one_out_advantages(rewards)
    return group_advantages(rewards, scale_rewards=scale_rewards)


def grpo_step(trainer: Trainer, state: TrainState, rows: Iterator[Row], step: int) -> StepResult:
    """One step of GRPO (DeepSeekMath, arXiv 2402.03300, Algorithm 1, lines 5 to 11). Its samples are used μ times."""
    s, policy = trainer.settings, trainer.policy(state.trainable)
    groups = collect(trainer, policy, rows, step)
    prompts, (ids, mask, sampler_logps, finished) = groups.prompts, groups.completions
    advantages = advantages_of(groups.rewards, s.advantage, s.scale_rewards)
    if s.mask_truncated_completions:
        mask = mask_truncated(mask, finished)
    batch = LossBatch(
        advantages=split_over_data(advantages, trainer.reader.model.mesh),
        completion_mask=mask,
        token_weights=token_weights(s.loss_type, mask, max_completion_length=s.max_completion_length),
        # If samples are used once, the policy of the update is the one that sampled: `update` computes these itself.
        old_logps=trainer.logps(policy, prompts, ids) if s.num_iterations > 1 else None,
        ref_logps=trainer.logps(trainer.reference, prompts, ids) if s.beta else None,
        sampler_logps=sampler_logps,
    )
    del policy  # when whole weights are trained, this is a second copy, and `update` makes its own
    updates = []
    for _ in range(s.num_iterations):
        state, metrics, logps = update(state, trainer.frozen, prompts, ids, batch, learner=trainer.learner)
        updates.append(metrics)
    return StepResult(state, step_metrics(state, groups, updates), groups, advantages, batch, logps)


def step_metrics(state: TrainState, groups: Groups, updates: Sequence[dict[str, jax.Array]]) -> dict[str, float]:
    """A step's metrics, under TRL's names: means over its updates, the metrics of its groups, and seconds."""
    updates = jax.device_get(updates)
    metrics = {name: float(np.mean([of_one[name] for of_one in updates])) for name in updates[0]}
    metrics["finite"] = float(min(of_one["finite"] for of_one in updates))
    metrics |= group_metrics(groups)
    name = "lora_norm" if isinstance(state.trainable, Lora) else "weight_norm"
    metrics[name] = float(optax.global_norm(state.trainable))
    now, rolling = time.perf_counter(), groups.ended - groups.started - groups.rewarding
    metrics |= {"time/rollout": rolling, "time/reward": groups.rewarding, "time/update": now - groups.ended}
    return metrics | {"step_time": now - groups.started, "tokens_per_second": metrics["num_tokens"] / rolling}
