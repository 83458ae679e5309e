"""Log-probs, loss, gradient and one optimizer step, over micro-batches of prompts, under the same mesh as sampling.

Training changes an adapter (`Lora`) on frozen weights, or the language model (`Text`), or all weights, the vision
tower's included (`Params`). What is trained is kept in float32. The optimizer is optax's and works on global arrays:
its norms are those of the whole model, on any mesh.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as Spec

from gemma3.lora import Lora, Policy
from gemma3.mesh import DATA, Model, max_over_data, sum_over_data
from gemma3.model import completion_stats, encode_images
from gemma3.params import Params, Text
from gemma3.sample import PromptBatch
from grpo.algorithm import LossBatch, LossConfig, grpo_loss, loss_metrics, sum_and_count

Trainable = Lora | Text | Params


class TrainState(NamedTuple):
    """What training changes."""

    trainable: Trainable
    opt_state: optax.OptState


@dataclass(frozen=True)
class Learner:
    """What an update is compiled for. Hashable, so it can be a static argument of `jax.jit`."""

    model: Model
    optimizer: optax.GradientTransformation
    loss: LossConfig | None  # None is supervised training: -Σ token_weights · log π
    dtype: jnp.dtype  # in which whole weights compute; they are trained in float32
    temperature: float
    micro_batch: int  # prompts at a time on each data shard


def policy_of(trainable: Trainable, frozen: Params, dtype: jnp.dtype) -> Policy:
    """The policy made of `trainable` and the frozen weights; whole weights, trained in float32, are cast to `dtype`."""
    if isinstance(trainable, Lora):
        return Policy(frozen, trainable)
    trained = jax.tree.map(lambda x: x.astype(dtype), trainable)
    return Policy(trained if isinstance(trained, Params) else Params(trained, frozen.vision))


def init_state(trainable: Trainable, optimizer: optax.GradientTransformation, model: Model) -> TrainState:
    """The state before the first step. The optimizer's state is split over the mesh as the trained arrays are."""
    where = model.shardings(jax.eval_shape(optimizer.init, trainable))
    return TrainState(trainable, jax.jit(optimizer.init, out_shardings=where)(trainable))


def _cut(tree, size: int):
    """Cut every array along its first axis into micro-batches of `size` prompts."""
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)


def _join(tree):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _soft_tokens(policy: Policy, prompts: PromptBatch, model: Model) -> jax.Array | None:
    """Each prompt's soft tokens: those it was sampled with or, if the vision tower changes, this policy's own."""
    return prompts.soft if prompts.pixels is None else encode_images(policy, prompts.pixels, config=model.config)


@partial(jax.jit, static_argnames=("model", "temperature", "micro_batch"))
def completion_logps(
    policy: Policy,
    prompts: PromptBatch,
    completion_ids: jax.Array,
    *,
    model: Model,
    temperature: float,
    micro_batch: int,
) -> jax.Array:
    """Log-probs float32[Q, G, C] of given completions, int32[Q, G, C]: of the old policy, or of the reference.

    micro_batch: prompts at a time on each data shard.
    """

    def body(policy, prompts, completion_ids):
        def of_part(part):
            prompts, completion_ids = part
            soft, how = _soft_tokens(policy, prompts, model), {"temperature": temperature, "config": model.config}
            return completion_stats(policy, prompts.ids, soft, completion_ids, **how).logps

        return _join(jax.lax.map(of_part, _cut((prompts, completion_ids), micro_batch)))

    in_specs = (model.specs(policy), Spec(DATA), Spec(DATA))
    on_mesh = jax.shard_map(body, mesh=model.mesh, in_specs=in_specs, out_specs=Spec(DATA))
    return on_mesh(policy, prompts, completion_ids)


def largest_difference(batch: LossBatch) -> dict[str, jax.Array]:
    """The one metric that is a maximum: the largest distance between trainer's and sampler's log-prob of a token."""
    if batch.sampler_logps is None:
        return {}
    difference = jnp.where(batch.completion_mask, jnp.abs(batch.old_logps - batch.sampler_logps), 0.0)
    return {"sampling/sampling_logp_difference/max": difference.max()}


def loss_and_grad(
    trainable: Trainable,
    frozen: Params,
    prompts: PromptBatch,
    completion_ids: jax.Array,
    batch: LossBatch,
    *,
    learner: Learner,
) -> tuple[jax.Array, Trainable, dict[str, jax.Array], jax.Array]:
    """The loss of a whole batch, its gradient, its metrics, and the policy's log-probs float32[Q, G, C].

    The batch is cut into micro-batches of prompts; since `grpo_loss` is a sum with weights fixed beforehand, the parts'
    losses and gradients add up to the whole's. If batch.old_logps is None, these samples are used once, by the policy
    that sampled them: its own log-probs are the old ones.
    """
    model, loss = learner.model, learner.loss

    def micro_loss(trainable, frozen, part):
        prompts, completion_ids, batch = part
        policy = policy_of(trainable, frozen, learner.dtype)
        soft, how = _soft_tokens(policy, prompts, model), {"temperature": learner.temperature, "config": model.config}
        stats = completion_stats(policy, prompts.ids, soft, completion_ids, **how)
        entropy = {"entropy": sum_and_count(stats.entropy, batch.completion_mask)}
        if loss is None:
            return sum_over_data(-(batch.token_weights * stats.logps).sum()), (sum_over_data(entropy), {}, stats.logps)
        if batch.old_logps is None:
            batch = batch._replace(old_logps=jax.lax.stop_gradient(stats.logps))
        sums = loss_metrics(stats.logps, batch, loss) | entropy
        maxima = largest_difference(batch)
        seen = sum_over_data(sums), max_over_data(maxima), stats.logps
        return sum_over_data(grpo_loss(stats.logps, batch, loss)), seen

    def body(trainable, frozen, prompts, completion_ids, batch):
        def add(grads, part):
            value, new = jax.value_and_grad(micro_loss, has_aux=True)(trainable, frozen, part)
            return jax.tree.map(jnp.add, grads, new), value

        parts = _cut((prompts, completion_ids, batch), learner.micro_batch)
        grads, (values, (sums, maxima, logps)) = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trainable), parts)
        value, sums = jax.tree.map(lambda x: x.sum(axis=0), (values, sums))
        means = {name: total / jnp.maximum(count, 1) for name, (total, count) in sums.items()}
        return value, grads, means | jax.tree.map(jnp.max, maxima), _join(logps)

    trained = model.specs(trainable)
    in_specs = (trained, model.specs(frozen), Spec(DATA), Spec(DATA), Spec(DATA))
    out_specs = (Spec(), trained, Spec(), Spec(DATA))
    on_mesh = jax.shard_map(body, mesh=model.mesh, in_specs=in_specs, out_specs=out_specs)
    return on_mesh(trainable, frozen, prompts, completion_ids, batch)


@partial(jax.jit, static_argnames="learner", donate_argnames="state")
def update(
    state: TrainState,
    frozen: Params,
    prompts: PromptBatch,
    completion_ids: jax.Array,
    batch: LossBatch,
    *,
    learner: Learner,
) -> tuple[TrainState, dict[str, jax.Array], jax.Array]:
    """One optimizer step on one batch; arguments as in `loss_and_grad`. The state is donated.

    Returns the new state, the metrics, and the log-probs float32[Q, G, C] of the policy before the update. If the loss
    or the gradient is not finite, the state does not change, and the metric "finite" is 0.
    """
    loss, grads, metrics, logps = loss_and_grad(
        state.trainable, frozen, prompts, completion_ids, batch, learner=learner
    )
    norm = optax.global_norm(grads)
    updates, opt_state = learner.optimizer.update(grads, state.opt_state, state.trainable)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new = TrainState(optax.apply_updates(state.trainable, updates), opt_state)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
    # The arrays keep their sharding; otherwise the next step would be compiled again for another one.
    kept = jax.lax.with_sharding_constraint(kept, learner.model.shardings(state))
    return kept, metrics | {"loss": loss, "grad_norm": norm, "finite": finite.astype(jnp.float32)}, logps
