"""Supervised training on given solutions: a step of GRPO without sampling, where all tokens weigh the same."""

import itertools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from data.example import Example
from data.prompt import demonstration
from grpo.algorithm import LossBatch, token_weights
from grpo.groups import given_completions
from grpo.reader import Row, rounded_up
from grpo.rollout import put_prompts, split_over_data
from grpo.step import StepResult
from grpo.trainer import Trainer
from grpo.update import TrainState, update


def solution(example: Example, format: str) -> str:
    """What supervised training teaches: the best (or first) completion of an example, or its reference solution."""
    if example.completion_rewards:
        return example.completions[int(np.argmax(example.completion_rewards))]
    return example.completions[0] if example.completions else demonstration(example, format)


def sft_step(trainer: Trainer, state: TrainState, rows: Iterator[Row], step: int) -> StepResult:
    """One step of supervised training: raise the log-probs of the dataset's own solutions."""
    s, reader, started = trainer.settings, trainer.reader, time.perf_counter()
    rows = list(itertools.islice(rows, s.prompts_per_step))
    policy = trainer.policy(state.trainable)
    prompts = put_prompts(policy, rows, reader, keep_pixels=trainer.keeps_pixels(policy))
    texts = [[solution(row.example, reader.format)] for row in rows]
    ids, mask = given_completions(rows, texts, reader, (1, s.max_completion_length))
    longest = rounded_up(int(mask.sum(axis=-1).max()), s.max_completion_length)
    ids, mask = ids[..., :longest], mask[..., :longest]
    weights = token_weights("dapo", jnp.asarray(mask), max_completion_length=s.max_completion_length)
    arrays = (ids, np.zeros(mask.shape[:2], np.float32), mask, weights)
    ids, *parts = (split_over_data(array, reader.model.mesh) for array in arrays)
    batch = LossBatch(*parts, old_logps=None)
    state, metrics, _ = update(state, trainer.frozen, prompts, ids, batch, learner=trainer.learner)
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    metrics["completions/mean_length"] = float(mask.sum() / len(rows))
    return StepResult(state, metrics | {"step_time": time.perf_counter() - started})
