"""Keys and values of prompts and completions while sampling.

A global layer keeps all tokens of a completion, a local layer only those of the last window. They lie in a ring of S
slots: token t is written to slot t mod S. With a window of 4 (S = 4), the slots hold after each token:

          slot 0 1 2 3
    t = 0      0 . . .
    t = 1      0 1 . .
    t = 2      0 1 2 .
    t = 3      0 1 2 3
    t = 4      4 1 2 3      token 4 replaces token 0, which no later query sees
    t = 5      4 5 2 3

The order of keys does not matter to attention: each key was rotated by its own position, and the mask knows its t.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma3.attention import KeyValues
from gemma3.config import Config
from gemma3.mesh import DATA, TENSOR, zeros_varying


class PromptCache(NamedTuple):
    """One layer's keys and values of the prompts, for the token loop; a local layer keeps only the last window."""

    kv: KeyValues  # [Q, K, S, H]
    starts: jax.Array  # int32[Q], the position of the first key


def prompt_cache(kv: KeyValues, lengths: jax.Array, window: int | None) -> PromptCache:
    """Keep the last `window` of each prompt's keys, or all of them without a window; kv: [Q, K, P, H]."""
    if window is None or window >= kv.k.shape[2]:
        return PromptCache(kv, jnp.zeros_like(lengths))
    starts = jnp.maximum(lengths - window, 0)
    positions = (starts[:, None] + jnp.arange(window)[None])[:, None, :, None]
    return PromptCache(KeyValues(*(jnp.take_along_axis(x, positions, axis=2) for x in kv)), starts)


def prompt_caches(kv: KeyValues, lengths: jax.Array, config: Config) -> list[PromptCache]:
    """`prompt_cache` of every layer; kv: [L, Q, K, P, H] from `prefill`."""
    windows = [config.sliding_window if local else None for local in config.is_local]
    return [prompt_cache(KeyValues(kv.k[i], kv.v[i]), lengths, window) for i, window in enumerate(windows)]


def cache_slots(config: Config, length: int) -> list[int]:
    """How many of `length` tokens each layer keeps: all of them in a global layer, at most a window in a local one."""
    return [min(length, config.sliding_window) if local else length for local in config.is_local]


def empty_caches(config: Config, rows: tuple[int, int], length: int, like: KeyValues) -> list[KeyValues]:
    """Each layer's keys and values of `rows` = (Q, G) completions, [Q · K · G, S, H], before any token is sampled.

    Q, K and G are merged into one axis: beside an axis of size 1, as Q and K often are, XLA on a CPU copies the whole
    cache for each token it writes. Heads and dtype are taken from `like`, this shard's keys and values [..., K, S, H].
    """
    heads, _, head_dim = like.k.shape[-3:]
    sequences = math.prod(rows) * heads
    zeros = lambda slots: zeros_varying((sequences, slots, head_dim), like.k.dtype, DATA, TENSOR)  # noqa: E731
    return [KeyValues(zeros(slots), zeros(slots)) for slots in cache_slots(config, length)]


def write(cache: jax.Array, new: jax.Array, t: jax.Array, after: jax.Array) -> jax.Array:
    """Put the keys or values [Q, K, G, 1, H] of token t into a cache [Q · K · G, S, H], `after` was computed from it.

    XLA writes in place where it sees that nothing reads the old cache later. Otherwise a CPU would copy the whole
    cache, for each token. So the slot is made to depend on `after`: as long as that is not NaN, t stays t.
    """
    t += jnp.isnan(after.reshape(-1)[0]).astype(jnp.int32)
    new = new.reshape(-1, 1, new.shape[-1])
    return jax.lax.dynamic_update_slice_in_dim(cache, new, t % cache.shape[1], axis=1)


def held_tokens(slots: int, t: jax.Array) -> jax.Array:
    """The token in each slot once token t is written, int32[S]: a row of the table above; negative: none yet."""
    return t - (t - jnp.arange(slots)) % slots
