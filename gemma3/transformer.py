"""One decoder block, the stack as one `lax.scan`, and the two calls everything is made of: `prefill` and `extend`.

A prompt is read once by `prefill`, which returns its keys and values; `extend` runs the G completions of each prompt
against them. Repeating the prompt G times would give exactly the same numbers and gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma3.attention import KeyValues, attend, by_head, own_mask, prompt_mask, shared_mask
from gemma3.config import Config
from gemma3.layers import gated_mlp, project, rms_norm, rope
from gemma3.mesh import copy_to_tensor, gather_over_data, own_kv_heads, sum_over_tensor


class Block(NamedTuple):
    """Weights of the decoder blocks, stacked: each array has a leading axis L. q_norm, k_norm are None in Gemma 2."""

    pre_attention_norm: jax.Array  # [D]
    q: jax.Array  # [D, N, H]
    k: jax.Array  # [D, K, H]
    v: jax.Array  # [D, K, H]
    o: jax.Array  # [N, H, D]
    q_norm: jax.Array | None  # [H]
    k_norm: jax.Array | None  # [H]
    post_attention_norm: jax.Array  # [D]
    pre_mlp_norm: jax.Array  # [D]
    gate: jax.Array  # [D, F]
    up: jax.Array  # [D, F]
    down: jax.Array  # [F, D]
    post_mlp_norm: jax.Array  # [D]


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


def block(
    x: jax.Array,
    w: Block,
    adapters,
    kind: LayerKind,
    positions: jax.Array,
    attention: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, object]],
    *,
    config: Config,
    lora_scale: float,
) -> tuple[jax.Array, object]:
    """One decoder block: x + norm(attention(norm(x))), then x + norm(mlp(norm(x))).

    x: [Q, G, T, D]; w, adapters: one layer's; positions: int32[Q, 1, T]. `attention` is given rotated queries
    [Q, G, T, N, H] and keys and values [Q, K, G, T, H], and returns the mix of values and whatever the caller wants to
    keep of the keys.
    """
    eps = config.norm_eps
    h = copy_to_tensor(rms_norm(x, w.pre_attention_norm, eps))
    q = project(h, w.q, adapters and adapters.q, lora_scale)
    k = project(h, w.k, adapters and adapters.k, lora_scale)
    v = project(h, w.v, adapters and adapters.v, lora_scale)
    if config.qk_norm:
        q, k = rms_norm(q, w.q_norm, eps), rms_norm(k, w.k_norm, eps)
    q = rope(q, positions, kind.inverse_frequencies)
    k = rope(k, positions, kind.inverse_frequencies)
    mixed, kept = attention(q, by_head(k), by_head(v))
    # Each tensor shard holds some of the heads, and below some of the MLP's width: their parts are summed.
    h = sum_over_tensor(project(mixed, w.o, adapters and adapters.o, lora_scale, axes=2))
    x = x + rms_norm(h, w.post_attention_norm, eps)

    h = copy_to_tensor(rms_norm(x, w.pre_mlp_norm, eps))
    h = sum_over_tensor(gated_mlp(h, w, adapters, lora_scale))
    x = x + rms_norm(h, w.post_mlp_norm, eps)
    return x, kept


def layer_weights(blocks, config: Config):
    """One layer's weights (or adapters), ready for use: joined over `data`, of k and v the heads this shard needs."""
    w = gather_over_data(blocks, layer=True)
    if isinstance(w, Block):
        return w._replace(k=own_kv_heads(w.k, config.num_kv_heads, 1), v=own_kv_heads(w.v, config.num_kv_heads, 1))
    own = lambda pair: pair and pair._replace(b=own_kv_heads(pair.b, config.num_kv_heads, 1))  # noqa: E731
    return w and w._replace(k=own(w.k), v=own(w.v))


def _scan(layer: Callable, x: jax.Array, blocks: Block, lora, extra, config: Config):
    """Run `layer(x, weights, adapters, kind, extra)` over the stack.

    Only each layer's input is kept for the backward pass; the rest, gathered weights included, is computed again.
    """

    @jax.checkpoint
    def step(x, per_layer):
        w, adapters, kind, extra = per_layer
        return layer(x, layer_weights(w, config), layer_weights(adapters, config), kind, extra)

    return jax.lax.scan(step, x, (blocks, lora and lora.blocks, layer_kinds(config), extra))


def prefill(
    x: jax.Array, blocks: Block, lora, valid: jax.Array, image_blocks: jax.Array, *, config: Config
) -> tuple[jax.Array, KeyValues]:
    """Run the stack over prompts. x: [Q, P, D] embeddings, right-padded; valid: bool[Q, P]; image_blocks: int32[Q, P].

    Returns the last block's output [Q, P, D], and the keys and values of every layer, [L, Q, K, P, H].
    """
    positions = jnp.arange(x.shape[1])[None, None]

    def layer(x, w, adapters, kind, _):
        mask = prompt_mask(valid, image_blocks, kind.window)

        def attention(q, k, v):
            kv = KeyValues(k[:, :, 0], v[:, :, 0])  # a prompt is a group of one
            return attend(q, [(kv, mask)], scale=config.query_scale, softcap=config.attention_softcap), kv

        return block(x, w, adapters, kind, positions, attention, config=config, lora_scale=lora.scale if lora else 0.0)

    x, kv = _scan(layer, x[:, None], blocks, lora, None, config)
    return x[:, 0], kv


def extend(x: jax.Array, blocks: Block, lora, prompt: KeyValues, lengths: jax.Array, *, config: Config) -> jax.Array:
    """Run the stack over completions, each row seeing its prompt, and itself causally.

    x: [Q, G, T, D] embeddings; prompt: KeyValues of `prefill`, [L, Q, K, P, H]; lengths: int32[Q] of the prompts.
    Returns the last block's output [Q, G, T, D].
    """
    places = jnp.arange(x.shape[2])
    positions = lengths[:, None, None] + places[None, None]  # [Q, 1, T]

    def layer(x, w, adapters, kind, prompt):
        on_prompt = shared_mask(positions, lengths, jnp.zeros_like(lengths), prompt.k.shape[2], kind.window)
        on_own = own_mask(places, places, kind.window)

        def attention(q, k, v):
            sets = [(prompt, on_prompt), (KeyValues(k, v), on_own)]
            return attend(q, sets, scale=config.query_scale, softcap=config.attention_softcap), None

        return block(x, w, adapters, kind, positions, attention, config=config, lora_scale=lora.scale if lora else 0.0)

    return _scan(layer, x, blocks, lora, prompt, config)[0]
