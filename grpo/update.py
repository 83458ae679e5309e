"""Log-probs, loss, gradient and one optimizer step, over micro-batches of prompts, under the same mesh as sampling.

What is trained is an adapter (`Lora`) on frozen weights, or the language model (`Text`), or with the vision tower all
of the weights (`Params`), which are then kept in float32. The optimizer is optax's, applied to global arrays: its norms
are those of the whole model, on any mesh.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gemma3.config import Config
from gemma3.lora import Lora
from gemma3.mesh import DATA, max_over_data, partition_specs, shardings, sum_over_data
from gemma3.model import Params, Text, TokenStats, completion_stats, encode_images
from gemma3.sample import Prompts
from grpo.algorithm import LossBatch, LossConfig, loss_metrics, objective, sum_and_count

Trainable = Lora | Text | Params


def policy(trainable: Trainable, frozen: Params, dtype: jnp.dtype) -> tuple[Params, Lora | None]:
    """The model that `trainable` makes of the frozen weights; weights trained in float32 compute in `dtype`."""
    if isinstance(trainable, Lora):
        return frozen, trainable
    trained = jax.tree.map(lambda x: x.astype(dtype), trainable)
    return trained if isinstance(trained, Params) else Params(trained, frozen.vision), None


def make_schedule(learning_rate: float, steps: int, *, warmup_steps: int, schedule: str) -> optax.Schedule:
    """The rate of each update: linear warm-up, then "cosine" to a tenth or "constant"."""
    if schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, warmup_steps, max(steps, warmup_steps + 1), 0.1 * learning_rate
        )
    else:
        rate = optax.join_schedules(
            [optax.linear_schedule(0.0, learning_rate, warmup_steps), optax.constant_schedule(learning_rate)],
            [warmup_steps],
        )
    # The first step of a warm-up would have a rate of 0 and waste its samples.
    return lambda count: rate(count + 1)


def make_optimizer(
    rate: optax.Schedule, *, weight_decay: float, adam_beta2: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm."""
    adamw = optax.adamw(rate, b1=0.9, b2=adam_beta2, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)


def init_optimizer(
    optimizer: optax.GradientTransformation, trainable: Trainable, config: Config, mesh: Mesh
) -> optax.OptState:
    """The optimizer's state before the first step, split as what it trains is."""
    where = shardings(jax.eval_shape(optimizer.init, trainable), config, mesh)
    return jax.jit(optimizer.init, out_shardings=where)(trainable)


def _cut(tree, size: int):
    """Cut every array along its first axis into micro-batches of `size` prompts."""
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), tree)


def _join(tree):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _soft_tokens(prompts: Prompts, params: Params, lora: Lora | None, config: Config) -> jax.Array | None:
    """Each prompt's soft tokens: those it was sampled with, or where the tower changes, this policy's own."""
    return prompts.soft if prompts.pixels is None else encode_images(prompts.pixels, params, lora, config=config)


@partial(jax.jit, static_argnames=("config", "mesh", "temperature", "micro_batch"))
def score(
    params: Params,
    lora: Lora | None,
    prompts: Prompts,
    completion_ids: jax.Array,
    *,
    config: Config,
    mesh: Mesh,
    temperature: float,
    micro_batch: int,
) -> TokenStats:
    """Log-probs and entropies of given completions, each [Q, G, C]: of the old policy, or with lora=None the reference.

    micro_batch: prompts at a time on each data shard.
    """

    def body(params, lora, prompts, completion_ids):
        def one(part):
            prompts, completions = part
            soft = _soft_tokens(prompts, params, lora, config)
            ids = prompts.ids
            return completion_stats(ids, soft, completions, params, lora, temperature=temperature, config=config)

        return _join(jax.lax.map(one, _cut((prompts, completion_ids), micro_batch)))

    in_specs = (
        partition_specs(params, config, mesh),
        partition_specs(lora, config, mesh),
        jax.tree.map(lambda _: P(DATA), prompts),
        P(DATA),
    )
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=P(DATA))(params, lora, prompts, completion_ids)


def largest_difference(batch: LossBatch) -> dict[str, jax.Array]:
    """The metric that is no mean: how far the trainer's log-prob of a token is from the sampler's, at most."""
    if batch.sampler_logps is None:
        return {}
    difference = jnp.where(batch.completion_mask, jnp.abs(batch.old_logps - batch.sampler_logps), 0.0)
    return {"sampling/sampling_logp_difference/max": difference.max()}


def loss_and_grad(
    trainable: Trainable,
    frozen: Params,
    prompts: Prompts,
    completion_ids: jax.Array,
    batch: LossBatch,
    *,
    config: Config,
    mesh: Mesh,
    dtype: jnp.dtype,
    loss: LossConfig | None,
    temperature: float,
    micro_batch: int,
) -> tuple[jax.Array, Trainable, dict[str, jax.Array], jax.Array]:
    """The loss of a whole batch, its gradient, its metrics, and the policy's log-probs float32[Q, G, C].

    The batch is cut into micro-batches of prompts; since `objective` is a sum with weights fixed beforehand, the parts'
    losses and gradients add up to the whole's. batch.old_logps None means that these samples are used once, by the
    policy that drew them: the old log-probs are then its own. loss None is supervised training, -Σ weights · log π.
    """

    def micro_loss(trainable, frozen, part):
        prompts, completions, batch = part
        params, lora = policy(trainable, frozen, dtype)
        soft = _soft_tokens(prompts, params, lora, config)
        stats = completion_stats(prompts.ids, soft, completions, params, lora, temperature=temperature, config=config)
        entropy = {"entropy": sum_and_count(stats.entropy, batch.completion_mask)}
        if loss is None:
            return sum_over_data(-(batch.weights * stats.logps).sum()), (sum_over_data(entropy), {}, stats.logps)
        if batch.old_logps is None:
            batch = batch._replace(old_logps=jax.lax.stop_gradient(stats.logps))
        sums = loss_metrics(stats.logps, batch, loss) | entropy
        maxima = largest_difference(batch)
        seen = sum_over_data(sums), max_over_data(maxima), stats.logps
        return sum_over_data(objective(stats.logps, batch, loss)), seen

    def body(trainable, frozen, prompts, completion_ids, batch):
        def add(grads, part):
            value, new = jax.value_and_grad(micro_loss, has_aux=True)(trainable, frozen, part)
            return jax.tree.map(jnp.add, grads, new), value

        parts = _cut((prompts, completion_ids, batch), micro_batch)
        grads, (values, (sums, maxima, logps)) = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trainable), parts)
        value, sums = jax.tree.map(lambda x: x.sum(axis=0), (values, sums))
        means = {name: total / jnp.maximum(count, 1) for name, (total, count) in sums.items()}
        return value, grads, means | jax.tree.map(jnp.max, maxima), _join(logps)

    trainable_specs = partition_specs(trainable, config, mesh)
    in_specs = (
        trainable_specs,
        partition_specs(frozen, config, mesh),
        jax.tree.map(lambda _: P(DATA), prompts),
        P(DATA),
        jax.tree.map(lambda _: P(DATA), batch),
    )
    out_specs = (P(), trainable_specs, P(), P(DATA))
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(
        trainable, frozen, prompts, completion_ids, batch
    )


@partial(
    jax.jit,
    static_argnames=("optimizer", "config", "mesh", "dtype", "loss", "temperature", "micro_batch"),
    donate_argnames=("trainable", "opt_state"),
)
def update(
    trainable: Trainable,
    opt_state: optax.OptState,
    frozen: Params,
    prompts: Prompts,
    completion_ids: jax.Array,
    batch: LossBatch,
    *,
    optimizer: optax.GradientTransformation,
    **static,
) -> tuple[Trainable, optax.OptState, dict[str, jax.Array], jax.Array]:
    """One optimizer step on one batch; arguments as in `loss_and_grad`. Weights and optimizer state are donated.

    Returns both of them anew, the metrics, and the log-probs float32[Q, G, C] of the policy as it was.

    Where the loss or the gradient is not finite nothing is changed, and the metric "finite" is 0.
    """
    value, grads, metrics, logps = loss_and_grad(trainable, frozen, prompts, completion_ids, batch, **static)
    norm = optax.global_norm(grads)
    updates, new_state = optimizer.update(grads, opt_state, trainable)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)

    def keep(new, old):
        # Pinned to where they were, or the next step would be compiled again for another layout.
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        return jax.lax.with_sharding_constraint(kept, shardings(old, static["config"], static["mesh"]))

    metrics |= {"loss": value, "grad_norm": norm, "finite": finite.astype(jnp.float32)}
    return keep(optax.apply_updates(trainable, updates), trainable), keep(new_state, opt_state), metrics, logps
