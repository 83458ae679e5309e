"""Keys and values of prompts and completions while sampling, and the memory they take.

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
from gemma3.filters import Sampling
from gemma3.mesh import DATA, TENSOR, Model, zeros_varying
from gemma3.params import Params


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


def write(cache: jax.Array, new: jax.Array, t: jax.Array) -> jax.Array:
    """Put the keys or values [Q, K, G, 1, H] of token t into a cache [Q · K · G, S, H]."""
    new = new.reshape(-1, 1, new.shape[-1])
    return jax.lax.dynamic_update_slice_in_dim(cache, new, t % cache.shape[1], axis=1)


def held_tokens(slots: int, t: jax.Array) -> jax.Array:
    """The token in each slot once token t is written, int32[S]: a row of the table above; negative: none yet."""
    return t - (t - jnp.arange(slots)) % slots


def cache_bytes(config: Config, num_prompts: int, prompt_length: int, sampling: Sampling, itemsize: int) -> int:
    """Bytes of keys and values while sampling, on one device that holds all heads:

    2 · K · H · itemsize · Σ_layers ( Q · min(P, W_l) + Q · G · min(C, W_l) ),  W_l the layer's window or infinity.
    """
    own = cache_slots(config, sampling.max_completion_length)
    shared = cache_slots(config, prompt_length)
    tokens = num_prompts * (sum(shared) + sampling.num_generations * sum(own))
    return 2 * config.num_kv_heads * config.head_dim * itemsize * tokens


def decoding_bytes(params: Params, model: Model, num_prompts: int, prompt_length: int, sampling: Sampling) -> int:
    """Bytes that `sample` needs on each device: stored weights, a copy of the language model's by layer, and caches.

    params: arrays or shapes; num_prompts: Q of the whole batch.
    """
    data, tensor = model.mesh.shape[DATA], model.mesh.shape[TENSOR]
    specs = model.specs(params)

    def bytes_of(tree, specs, parts: dict[str, int]) -> int:
        shares = jax.tree.map(lambda spec: math.prod(parts.get(axis, 1) for axis in spec), specs)
        return sum(jax.tree.leaves(jax.tree.map(lambda x, share: x.size * x.dtype.itemsize // share, tree, shares)))

    stored = bytes_of(params, specs, {DATA: data, TENSOR: tensor})
    joined = bytes_of(params.text.blocks, specs.text.blocks, {TENSOR: tensor})
    if data > 1:
        joined += bytes_of(params.text.embedding, specs.text.embedding, {TENSOR: tensor})
    itemsize = params.text.embedding.dtype.itemsize
    caches = cache_bytes(model.config, -(-num_prompts // data), prompt_length, sampling, itemsize)
    return stored + joined + caches // min(tensor, model.config.num_kv_heads)


def device_memory() -> int | None:
    """Bytes of memory on one device, or None on a backend that does not report it, such as the CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def choose_gather(needed: int, memory: int | None) -> tuple[bool, str]:
    """`gather_once` for `sample`, True if `needed` (from `decoding_bytes`) fits in `memory`, and a sentence about it.

    Both are bytes on one device; `memory` None (not known) counts as enough. A tenth is left for everything else.
    """
    if memory is None:
        return True, f"decoding joins the weights once a rollout and needs {needed / 2**30:.2f} GiB a device"
    share = f"{needed / 2**30:.2f} GiB of {memory / 2**30:.2f} a device"
    if needed <= 0.9 * memory:
        return True, f"decoding joins the weights once a rollout and needs {share}"
    return False, (
        "decoding joins one layer's weights at a time, for every token, which is slower: "
        f"joined at once they would need {share}; a longer tensor axis needs less"
    )
