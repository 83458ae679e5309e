"""Attention masks, and grouped-query attention over several sets of keys.

A mask is True where a query (row) may see a key (column). An example with window 3 and a prompt of five tokens; tokens
2 and 3 belong to one image. On the left is the mask of a local layer, on the right that of a global one:

        local            global
      0 1 2 3 4        0 1 2 3 4
    0 1 . . . .      0 1 . . . .
    1 1 1 . . .      1 1 1 . . .
    2 1 1 1 1 .      2 1 1 1 1 .      an image token also sees the rest of its own image
    3 . 1 1 1 .      3 1 1 1 1 .
    4 . . 1 1 1      4 1 1 1 1 1      and text sees what lies before it, within the window
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class KeyValues(NamedTuple):
    """Rotated keys, and values: [Q, K, S, H] of a prompt, shared by its completions, or [Q, K, G, S, H] of completions.

    The sampler merges the leading axes of the second kind: [Q · K · G, S, H].
    """

    k: jax.Array
    v: jax.Array


def number_images(ids: jax.Array, image_token_id: int | None) -> jax.Array:
    """Number the contiguous runs of image tokens in each prompt 1, 2, ..., and text 0: int32[Q, P]."""
    is_image = ids == (-1 if image_token_id is None else image_token_id)
    starts = is_image & ~jnp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(is_image, jnp.cumsum(starts, axis=1), 0)


def prompt_mask(valid: jax.Array, image_numbers: jax.Array, window: jax.Array) -> jax.Array:
    """The mask within a prompt, bool[Q, 1, P, P]: (causal or in the same image) and within the window.

    valid: bool[Q, P], False on padding; image_numbers: int32[Q, P] from `number_images`; window: int32[].
    """
    positions = jnp.arange(valid.shape[1])
    distance = positions[:, None] - positions[None, :]  # [P, P], query minus key
    same_image = (image_numbers[:, :, None] == image_numbers[:, None, :]) & (image_numbers[:, :, None] > 0)
    return ((distance >= 0)[None] | same_image)[:, None] & ((distance < window)[None] & valid[:, None, :])[:, None]


def shared_mask(
    positions: jax.Array, prompt_lengths: jax.Array, starts: jax.Array, num_keys: int, window: jax.Array
) -> jax.Array:
    """The mask of a completion's tokens on its prompt's keys, bool[Q, 1, T, S]: no padding, within the window.

    positions: int32[Q, 1, T] of the queries, counted from the start of the prompt; prompt_lengths: int32[Q];
    starts: int32[Q], the position of the first of the `num_keys` keys.
    """
    keys = (starts[:, None] + jnp.arange(num_keys)[None])[:, None, None, :]
    return (keys < prompt_lengths[:, None, None, None]) & (positions[..., None] - keys < window)


def own_mask(queries: jax.Array, keys: jax.Array, window: jax.Array) -> jax.Array:
    """The mask of a completion's tokens on its own keys, bool[1, 1, T, S]: causal, within the window.

    queries: int32[T] and keys: int32[S] hold each token's t; a negative key is an empty slot.
    """
    distance = queries[:, None] - keys[None, :]
    return ((distance >= 0) & (distance < window) & (keys >= 0)[None, :])[None, None]


def by_head(x: jax.Array) -> jax.Array:
    """Bring projected keys or values [Q, G, T, K, H] into the axis order of `KeyValues`, [Q, K, G, T, H]."""
    return jnp.einsum("QGTKH->QKGTH", x)


def attend(
    q: jax.Array, sets: Sequence[tuple[KeyValues, jax.Array]], *, scale: float, softcap: float | None
) -> jax.Array:
    """One softmax over the union of several sets of keys: softmax(scale * q · [k₁, k₂, ...]ᵀ) · [v₁, v₂, ...].

    This equals attention over the concatenated keys exactly, but a prompt's keys are not repeated for each of its G
    completions. Query head n uses key/value head n // R. Scores and the softmax are float32.

    q: [Q, G, T, N, H]; each set: KeyValues and a mask that broadcasts to bool[Q, G, T, S]. In the first set's KeyValues
    K is an axis of its own. Returns [Q, G, T, N, H]. A query that may see no key at all (padding) gets finite values
    without meaning.
    """
    *rows, heads, head_dim = q.shape
    kv_heads = sets[0][0].k.shape[1]
    q = jnp.einsum("QGTKRH->QKGRTH", q.reshape(*rows, kv_heads, heads // kv_heads, head_dim))

    # Queries that share keys are joined in one axis J: G·R·T of them for a prompt's keys, R·T for a completion's own.
    # Both products are then plain batched matrix products: no compiler has to copy keys or values into another order.
    def scores(keys: jax.Array, mask: jax.Array) -> jax.Array:  # float32[Q, K, G, R, T, S]
        queries = q.reshape(*keys.shape[:-2], -1, head_dim)
        s = scale * jnp.einsum("...JH,...SH->...JS", queries, keys, preferred_element_type=jnp.float32)
        s = s.reshape(*q.shape[:-1], -1)
        if softcap is not None:
            s = softcap * jnp.tanh(s / softcap)
        return jnp.where(mask[:, None, :, None], s, jnp.finfo(jnp.float32).min)

    def mixed(shares: jax.Array, values: jax.Array) -> jax.Array:  # float32[Q, K, G, R, T, H]
        shares = shares.astype(values.dtype).reshape(*values.shape[:-2], -1, values.shape[-2])
        out = jnp.einsum("...JS,...SH->...JH", shares, values, preferred_element_type=jnp.float32)
        return out.reshape(q.shape)

    all_scores = [scores(kv.k, mask) for kv, mask in sets]
    highest = jnp.stack([s.max(axis=-1, keepdims=True) for s in all_scores]).max(axis=0)
    shares = [jnp.exp(s - jax.lax.stop_gradient(highest)) for s in all_scores]
    total = sum(s.sum(axis=-1, keepdims=True) for s in shares)
    out = sum(mixed(s, kv.v) for s, (kv, _) in zip(shares, sets, strict=True)) / total
    return jnp.einsum("QKGRTH->QGTKRH", out).reshape(*rows, heads, head_dim).astype(q.dtype)
