"""How a token is chosen from logits: temperature, top-k, top-p and chance, with the vocabulary split over `tensor`."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from gemma3.mesh import max_over_tensor, min_over_tensor, sum_over_later_shards, sum_over_tensor, tensor_shard


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled. Hashable, so it can be a static argument of `jax.jit`."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 leaves the whole vocabulary
    top_p: float = 1.0  # 1 leaves the whole vocabulary
    num_generations: int = 1  # G, completions of each prompt
    max_completion_length: int = 512  # C, in tokens

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"--temperature {self.temperature}: it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k}: it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: it must lie in (0, 1]; 1 is off")


def _ordered(x: jax.Array) -> jax.Array:
    """Map float32 to uint32 so that the order is kept."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(values: jax.Array, masses: jax.Array, target: float) -> jax.Array:
    """The highest value v for which the masses of all values >= v sum to at least `target`: uint32[..., 1].

    It is found bit by bit. So it is exact, there is no sort, and the vocabulary's shards exchange nothing but sums.
    values: uint32[..., V / tensor]; masses: float32, same shape.
    """

    def try_bit(i, found):
        candidate = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        mass = sum_over_tensor(jnp.where(values >= candidate, masses, 0.0).sum(axis=-1, keepdims=True))
        return jnp.where(mass >= target, candidate, found)

    # A sum of zeros has the type of the sums in the loop: the same on every tensor shard.
    start = sum_over_tensor((0.0 * masses).sum(axis=-1, keepdims=True)).astype(jnp.uint32)
    return jax.lax.fori_loop(0, 32, try_bit, start)


def top_k_filter(logits: jax.Array, k: int) -> jax.Array:
    """-inf below the k-th highest logit; ties with it survive. logits: float32[..., V / tensor]."""
    values = _ordered(logits)
    return jnp.where(values >= _threshold(values, jnp.ones_like(logits), k), logits, -jnp.inf)


def top_p_filter(logits: jax.Array, p: float) -> jax.Array:
    """-inf outside the nucleus: the fewest highest tokens whose probability sums to at least p (arXiv 1904.09751).

    If tokens tie at the edge, only as many as needed stay: those with the highest ids. Hugging Face sorts upwards, and
    with a stable sort would keep the same ones; torch's sort need not be stable, so there any of them may stay.
    """
    values = _ordered(logits)
    shifted = jnp.exp(logits - max_over_tensor(logits.max(axis=-1, keepdims=True)))
    probs = shifted / sum_over_tensor(shifted.sum(axis=-1, keepdims=True))
    edge = _threshold(values, probs, p)
    above = sum_over_tensor(jnp.where(values > edge, probs, 0.0).sum(axis=-1, keepdims=True))
    tied = jnp.where(values == edge, probs, 0.0)
    upwards = jnp.cumsum(tied[..., ::-1], axis=-1)[..., ::-1]
    later = upwards - tied + sum_over_later_shards(tied.sum(axis=-1, keepdims=True))
    keep = (values > edge) | ((values == edge) & (above + later < p))
    return jnp.where(keep, logits, -jnp.inf)


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Temperature (above 0), then top-k, then top-p, in Hugging Face's order: -inf on what cannot be sampled."""
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = top_k_filter(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = top_p_filter(logits, sampling.top_p)
    return logits


def _gumbel(key: jax.Array, ids: jax.Array) -> jax.Array:
    """Standard Gumbel noise for each of `ids`, float32 of their shape; an id's noise does not depend on the others."""
    return jax.vmap(lambda i: jax.random.gumbel(jax.random.fold_in(key, i)))(ids)


def choose_token(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Sample one id per row from the filtered distribution, or take the likeliest at temperature 0: int32[Q, G].

    The argmax of logits plus Gumbel noise is a sample of their softmax. Over a split vocabulary, an argmax needs only a
    maximum and a minimum. logits: float32[Q, G, V / tensor], -inf where forbidden; keys: PRNG keys [Q, G].
    """
    first_id = tensor_shard() * logits.shape[-1]
    own_ids = first_id + jnp.arange(logits.shape[-1])
    if sampling.temperature > 0:
        logits = filter_logits(logits, sampling) + jax.vmap(jax.vmap(partial(_gumbel, ids=own_ids)))(keys)
    highest = logits.max(axis=-1)
    winner = max_over_tensor(highest)
    last = jnp.iinfo(jnp.int32).max
    return min_over_tensor(jnp.where(highest == winner, first_id + logits.argmax(axis=-1), last)).astype(jnp.int32)
