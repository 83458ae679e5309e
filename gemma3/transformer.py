"""One decoder block, the stack as one `lax.scan`, and the two functions that run the stack: `prefill` and `extend`.

A prompt is read once by `prefill`, which returns its keys and values; `extend` runs the G completions of each prompt
against them. Repeating the prompt G times would give exactly the same numbers and gradients.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma3.attention import KeyValues, attend, by_head, own_mask, prompt_mask, shared_mask
from gemma3.config import Config
from gemma3.layers import gated_mlp, project, rms_norm, rope
from gemma3.lora import LoraBlock, Policy
from gemma3.mesh import copy_to_tensor, gather_over_data, own_kv_heads, sum_over_tensor
from gemma3.params import Block


class LayerKind(NamedTuple):
    """The numbers in which local and global layers differ; stacked over L."""

    window: jax.Array  # int32[]: how many keys a query sees, itself included
    inverse_frequencies: jax.Array  # float32[H/2]


def layer_kinds(config: Config) -> LayerKind:
    """The window and rope frequencies base^(-2i/H) / factor of every layer, [L] and [L, H/2]."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    local_frequencies = config.local_rope_base**-exponents
    global_frequencies = config.global_rope_base**-exponents / config.global_rope_factor
    unbounded = np.iinfo(np.int32).max
    return LayerKind(
        window=np.array([config.sliding_window if local else unbounded for local in config.is_local], np.int32),
        inverse_frequencies=np.array(
            [local_frequencies if local else global_frequencies for local in config.is_local], np.float32
        ),
    )


class Layer(NamedTuple):
    """One layer, ready for use."""

    w: Block
    lora: LoraBlock
    kind: LayerKind


def ready(layer: Layer, config: Config) -> Layer:
    """One layer of a shard's stacks, with its weights joined over `data`, and k and v cut to the heads it needs."""
    w, lora = gather_over_data((layer.w, layer.lora))
    own = partial(own_kv_heads, num_kv_heads=config.num_kv_heads, axis=1)
    pairs = {name: pair and replace(pair, b=own(pair.b)) for name, pair in (("k", lora.k), ("v", lora.v))}
    return layer._replace(w=w._replace(k=own(w.k), v=own(w.v)), lora=lora._replace(**pairs))


def block(
    layer: Layer,
    x: jax.Array,
    positions: jax.Array,
    attention: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, object]],
    *,
    config: Config,
) -> tuple[jax.Array, object]:
    """One decoder block: x + norm(attention(norm(x))), then x + norm(mlp(norm(x))).

    x: [Q, G, T, D]; positions: int32[Q, 1, T]. `attention` is given rotated queries [Q, G, T, N, H] and keys and values
    [Q, K, G, T, H]. It returns the mixed values and whatever the caller wants to keep of keys and values.
    """
    (w, lora, kind), eps = layer, config.norm_eps
    h = copy_to_tensor(rms_norm(w.pre_attention_norm, x, eps))
    q, k, v = project(w.q, h, lora.q), project(w.k, h, lora.k), project(w.v, h, lora.v)
    if config.qk_norm:
        q, k = rms_norm(w.q_norm, q, eps), rms_norm(w.k_norm, k, eps)
    q = rope(q, positions, kind.inverse_frequencies)
    k = rope(k, positions, kind.inverse_frequencies)
    mixed, kept = attention(q, by_head(k), by_head(v))
    # Each tensor shard holds some of the heads, and below some of the MLP's width: their parts are summed.
    h = sum_over_tensor(project(w.o, mixed, lora.o, axes=2))
    x = x + rms_norm(w.post_attention_norm, h, eps)

    h = copy_to_tensor(rms_norm(w.pre_mlp_norm, x, eps))
    h = sum_over_tensor(gated_mlp(w, h, lora))
    return x + rms_norm(w.post_mlp_norm, h, eps), kept


def stack(policy: Policy, config: Config) -> Layer:
    """All layers, each array with the axis L."""
    lora = policy.lora.blocks if policy.lora else LoraBlock()
    return Layer(policy.params.text.blocks, lora, layer_kinds(config))


def _scan(policy: Policy, x: jax.Array, run: Callable, extra, config: Config):
    """Call `run(layer, x, extra)` for every layer of the stack; `extra` is cut along L, as the weights are.

    Only each layer's input is kept for the backward pass; the rest, gathered weights included, is computed again.
    """

    @jax.checkpoint
    def one_layer(x, per_layer):
        layer, extra = per_layer
        return run(ready(layer, config), x, extra)

    return jax.lax.scan(one_layer, x, (stack(policy, config), extra))


def prefill(
    policy: Policy, x: jax.Array, valid: jax.Array, image_numbers: jax.Array, *, config: Config
) -> tuple[jax.Array, KeyValues]:
    """Run the stack over prompts. x: [Q, P, D] embeddings, right-padded; valid: bool[Q, P]; image_numbers: int32[Q, P].

    Returns the last block's output [Q, P, D], and the keys and values of every layer, [L, Q, K, P, H].
    """
    positions = jnp.arange(x.shape[1])[None, None]

    def run(layer: Layer, x: jax.Array, _):
        mask = prompt_mask(valid, image_numbers, layer.kind.window)

        def attention(q, k, v):
            kv = KeyValues(k[:, :, 0], v[:, :, 0])  # a prompt is a group of one
            return attend(q, [(kv, mask)], scale=config.query_scale, softcap=config.attention_softcap), kv

        return block(layer, x, positions, attention, config=config)

    x, kv = _scan(policy, x[:, None], run, None, config)
    return x[:, 0], kv


def extend(
    policy: Policy, x: jax.Array, prompt_kv: KeyValues, prompt_lengths: jax.Array, *, config: Config
) -> jax.Array:
    """Run the stack over completions. Each completion sees its prompt, and itself causally.

    x: [Q, G, T, D] embeddings; prompt_kv: [L, Q, K, P, H] from `prefill`; prompt_lengths: int32[Q]. Returns the last
    block's output [Q, G, T, D].
    """
    t = jnp.arange(x.shape[2])  # each token's place in its completion
    positions = prompt_lengths[:, None, None] + t[None, None]  # [Q, 1, T]

    def run(layer: Layer, x: jax.Array, prompt_kv: KeyValues):
        window, num_keys = layer.kind.window, prompt_kv.k.shape[2]
        on_prompt = shared_mask(positions, prompt_lengths, jnp.zeros_like(prompt_lengths), num_keys, window)
        on_own = own_mask(t, t, window)

        def attention(q, k, v):
            sets = [(prompt_kv, on_prompt), (KeyValues(k, v), on_own)]
            return attend(q, sets, scale=config.query_scale, softcap=config.attention_softcap), None

        return block(layer, x, positions, attention, config=config)

    return _scan(policy, x, run, prompt_kv, config)[0]
