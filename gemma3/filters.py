"""How a token is chosen from logits: temperature, top-k, top-p and chance, with the vocabulary split over `tensor`."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma3.mesh import (
    gather_over_tensor,
    max_over_tensor,
    min_over_tensor,
    num_tensor_shards,
    own_places,
    sum_over_data,
    tensor_shard,
)

_NONE = jnp.iinfo(jnp.int32).max  # stands for no id, where the lowest over shards is taken


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


def num_blocks(vocab_size: int) -> int:
    """Into how many equal blocks of neighbouring ids a vocabulary is cut: about as many as a block has ids.

    It is 512 for 262,144 ids and 1088 for 262,208. It does not depend on the mesh, whose shards hold whole blocks.
    """
    shards = math.gcd(vocab_size, 64)
    possible = [n for n in range(shards, vocab_size + 1, shards) if vocab_size % n == 0]
    return min(possible, key=lambda n: abs(math.log(n * n / vocab_size)))


def by_block(x: jax.Array) -> jax.Array:
    """Cut what this shard holds of the vocabulary, [..., V / tensor], into its blocks, [..., blocks / tensor, n]."""
    shards = num_tensor_shards()
    return x.reshape(*x.shape[:-1], num_blocks(x.shape[-1] * shards) // shards, -1)


def _join_shards(x: jax.Array) -> jax.Array:
    """Concatenate what the tensor shards hold along the last axis."""
    return jnp.moveaxis(gather_over_tensor(jnp.moveaxis(x, -1, 0)), 0, -1)


class Ranked(NamedTuple):
    """An id of each row with its logit. Ids rank by their logits; of equal ones, the higher id is above."""

    logit: jax.Array  # float32[Q, G]
    id: jax.Array  # int32[Q, G]


class Vocabulary(NamedTuple):
    """What this shard holds of the vocabulary."""

    logits: jax.Array  # float32[Q, G, blocks / tensor, n]
    allowed: jax.Array  # bool[blocks / tensor, n], False on ids that must not be sampled

    @property
    def ids(self) -> jax.Array:
        """int32[Q, G, blocks / tensor, n]."""
        block, place = (jax.lax.broadcasted_iota(jnp.int32, self.logits.shape, axis) for axis in (2, 3))
        return (tensor_shard() * self.logits.shape[2] + block) * self.logits.shape[3] + place

    @property
    def left(self) -> jax.Array:
        """The logits, -inf where not allowed."""
        return jnp.where(self.allowed[None, None], self.logits, -jnp.inf)

    @property
    def highest(self) -> jax.Array:
        """The highest logit that is allowed, over all shards: float32[Q, G]."""
        return max_over_tensor(self.left.max(axis=(2, 3)))


def _highest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    return jax.lax.top_k(x, min(k, x.shape[-1]))


def below_top_k(vocabulary: Vocabulary, k: int) -> Ranked:
    """What the k highest logits rank above, and those that tie with the k-th.

    The k highest lie in the k blocks whose maxima are highest, so only these are searched.
    """
    blocks = _highest(vocabulary.left.max(axis=3), k)[1]
    in_blocks = jnp.take_along_axis(vocabulary.left, blocks[..., None], axis=2).reshape(*blocks.shape[:2], -1)
    highest = _highest(_join_shards(_highest(in_blocks, k)[0]), k)[0][..., -1]
    return Ranked(highest, jnp.full_like(highest, -1, jnp.int32))


def _weights(left: jax.Array, ids: jax.Array, highest: jax.Array, above: Ranked | None) -> jax.Array:
    """exp(logit - highest logit) of the ids that rank above one of each row, or of all; 0 elsewhere: [Q, G, ...]."""
    spread = lambda x: jnp.expand_dims(x, range(2, left.ndim))  # noqa: E731
    weights = jnp.exp(left - spread(highest))
    if above is None:
        return weights
    logit, id = spread(above.logit), spread(above.id)
    return jnp.where((left > logit) | ((left == logit) & (ids > id)), weights, 0.0)


def block_masses(vocabulary: Vocabulary, above: Ranked | None = None) -> jax.Array:
    """The sum of `_weights` over each block, on all shards: float32[Q, G, blocks]."""
    return _join_shards(_weights(vocabulary.left, vocabulary.ids, vocabulary.highest, above).sum(axis=3))


def _pick(weights: jax.Array, keys: jax.Array) -> jax.Array:
    """A place in each row, sampled in proportion to its weight: int32[Q, G] of float32[Q, G, n] and PRNG keys [Q, G].

    It is the first place at which the running sum exceeds a uniform number (the inverse of the cumulative
    distribution). The sums are of integers, weights in units of 2^-31 of the total: exact in whatever order they are
    added, and as fine behind a large weight as before it. A sum of float32 near 1 would round away what is below 6e-8.
    """
    shares = jnp.round(weights * (2.0**31 / weights.sum(axis=-1, keepdims=True))).astype(jnp.uint32)
    running = jnp.cumsum(shares, axis=-1)
    uniform = jax.vmap(jax.vmap(lambda key, total: jax.random.randint(key, (), 0, total, jnp.uint32)))
    return (running > uniform(keys, running[..., -1])[..., None]).argmax(axis=-1)


def _sample_once(vocabulary: Vocabulary, masses: jax.Array, keys: jax.Array, above: Ranked | None) -> Ranked:
    """Sample an id in proportion to its probability, above one of each row or of all; masses: their `block_masses`."""
    keys = jax.vmap(jax.vmap(jax.random.split))(keys)
    block = _pick(masses, keys[..., 0])
    own, held = own_places(block, vocabulary.logits.shape[2])
    logits = jnp.take_along_axis(vocabulary.logits, own[..., None, None], axis=2)[..., 0, :]  # of one block, [Q, G, n]
    left = jnp.where(vocabulary.allowed[own], logits, -jnp.inf)
    ids = block[..., None] * left.shape[2] + jax.lax.broadcasted_iota(jnp.int32, left.shape, 2)
    place = _pick(_weights(left, ids, vocabulary.highest, above), keys[..., 1])[..., None]
    logit, id = (jnp.take_along_axis(x, place, axis=2)[..., 0] for x in (left, ids))
    return Ranked(max_over_tensor(jnp.where(held, logit, -jnp.inf)), min_over_tensor(jnp.where(held, id, _NONE)))


def sample_id(vocabulary: Vocabulary, keys: jax.Array, top_p: float = 1.0, above: Ranked | None = None) -> Ranked:
    """Sample one id per row in proportion to its probability; keys: PRNG keys [Q, G].

    The usual way on accelerators, the argmax of logits plus Gumbel noise, needs a random number for every id of the
    vocabulary, which can cost more than the model. Two are enough: one samples a block of ids in proportion to the sum
    of their probabilities, the other an id of that block. Over a split vocabulary only the blocks' sums travel. Blocks
    do not depend on the mesh, and so a sampled id does not.

    `above` leaves only the ids that rank above one of each row. `top_p` leaves only the nucleus of these: the fewest
    highest ids whose probability sums to at least top_p (arXiv 1904.09751), so those for which all that rank above sum
    to less. It is sampled by rejection: an id outside of it is sampled again, among those above it. Each attempt reads
    the logits once, where a search for the nucleus, or a sort, would read them many times. If ids tie at the nucleus's
    edge, the highest are in it; Hugging Face sorts upwards, and with a stable sort would keep the same ones. torch's
    need not be stable, so there any of them may stay.
    """
    masses = block_masses(vocabulary, above)
    first = _sample_once(vocabulary, masses, keys, above)
    if top_p == 1:
        return first
    nucleus = top_p * masses.sum(axis=-1)

    def outside(masses: jax.Array) -> jax.Array:
        return masses.sum(axis=-1) >= nucleus

    def again(state: tuple[jax.Array, Ranked, jax.Array]) -> tuple[jax.Array, Ranked, jax.Array]:
        attempt, found, masses = state
        fold = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, attempt)))
        new = _sample_once(vocabulary, masses, fold(keys), found)
        found = jax.tree.map(lambda new, old: jnp.where(outside(masses), new, old), new, found)
        return attempt + 1, found, block_masses(vocabulary, found)

    # All devices go on until all are done, since they exchange sums.
    unfinished = lambda state: sum_over_data(outside(state[2]).sum()) > 0  # noqa: E731
    return jax.lax.while_loop(unfinished, again, (jnp.int32(2), first, block_masses(vocabulary, first)))[1]


def choose_token(logits: jax.Array, allowed: jax.Array, keys: jax.Array, sampling: Sampling) -> Ranked:
    """The next token of each row: the likeliest at temperature 0, otherwise sampled.

    Top-k and top-p are applied in Hugging Face's order. logits: float32[Q, G, V / tensor], divided by a temperature
    above 0; allowed: bool[V / tensor], False on ids that must not be sampled; keys: PRNG keys [Q, G].
    """
    vocabulary = Vocabulary(by_block(logits), by_block(allowed))
    if sampling.temperature == 0:
        highest = vocabulary.highest
        best = vocabulary.left == highest[..., None, None]
        return Ranked(highest, min_over_tensor(jnp.where(best, vocabulary.ids, _NONE).min(axis=(2, 3))))
    above = below_top_k(vocabulary, sampling.top_k) if sampling.top_k else None
    return sample_id(vocabulary, keys, sampling.top_p, above)
