"""Who may attend to whom, and grouped-query attention over several sets of keys.

A mask is True where a query (row) may see a key (column). Window 3, a prompt of five tokens of which 2 and 3 are one
image's, drawn for a local layer and a global one:

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
    """Keys (rotated) and values: [Q, K, S, H] shared by a prompt's completions, or [Q, K, G, S, H] each row's own.

    The sampler keeps a row's own with the leading axes merged, [Q · K · G, S, H].
    """

    k: jax.Array
    v: jax.Array


def image_blocks(ids: jax.Array, image_token_id: int | None) -> jax.Array:
    """Number each contiguous run of image tokens 1, 2, ... in its row, and text 0: int32[Q, P]."""
    is_image = ids == (-1 if image_token_id is None else image_token_id)
    starts = is_image & ~jnp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(is_image, jnp.cumsum(starts, axis=1), 0)


def prompt_mask(valid: jax.Array, blocks: jax.Array, window: jax.Array) -> jax.Array:
    """A prompt's tokens among themselves, bool[Q, 1, P, P]: (causal or in the same image) and within the window.

    valid: bool[Q, P], False on padding; blocks: int32[Q, P] from `image_blocks`; window: int32[].
    """
    index = jnp.arange(valid.shape[1])
    distance = index[:, None] - index[None, :]  # [P, P], query minus key
    same_image = (blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] > 0)
    return ((distance >= 0)[None] | same_image)[:, None] & ((distance < window)[None] & valid[:, None, :])[:, None]


def shared_mask(
    positions: jax.Array, lengths: jax.Array, starts: jax.Array, num_keys: int, window: jax.Array
) -> jax.Array:
    """A completion's tokens on its prompt's keys, bool[Q, 1, T, S]: the real ones, within the window.

    positions: int32[Q, 1, T] of the queries, counted from the start of the prompt; lengths: int32[Q] of the prompts;
    starts: int32[Q], the position of the first of the `num_keys` keys.
    """
    keys = (starts[:, None] + jnp.arange(num_keys)[None])[:, None, None, :]
    return (keys < lengths[:, None, None, None]) & (positions[..., None] - keys < window)


def own_mask(queries: jax.Array, keys: jax.Array, window: jax.Array) -> jax.Array:
    """A completion's tokens on its own keys, bool[1, 1, T, S]: causal, within the window.

    queries: int32[T] and keys: int32[S] are places within the completion; a negative place holds nothing.
    """
    distance = queries[:, None] - keys[None, :]
    return ((distance >= 0) & (distance < window) & (keys >= 0)[None, :])[None, None]


def by_head(x: jax.Array) -> jax.Array:
    """Projected keys or values [Q, G, T, K, H] in the order of `KeyValues`, [Q, K, G, T, H]."""
    return jnp.einsum("QGTKH->QKGTH", x)


def attend(
    q: jax.Array, sets: Sequence[tuple[KeyValues, jax.Array]], *, scale: float, softcap: float | None
) -> jax.Array:
    """One softmax over the union of several sets of keys: softmax(scale * q · [k₁, k₂, ...]ᵀ) · [v₁, v₂, ...].

    Exactly what attention over the concatenated keys would give, without repeating a prompt's keys for each of its G
    completions. Query head n uses key/value head n // R. Scores and the softmax are float32.

    q: [Q, G, T, N, H]; each set: its KeyValues, the first with K as an axis, and a mask that broadcasts to
    bool[Q, G, T, S]. Returns [Q, G, T, N, H]. A query that may see no key at all (padding) gets finite values without
    meaning.
    """
    *rows, heads, head_dim = q.shape
    kv_heads = sets[0][0].k.shape[1]
    q = jnp.einsum("QGTKRH->QKGRTH", q.reshape(*rows, kv_heads, heads // kv_heads, head_dim))

    # Queries that share their keys are joined in one axis J: G·R·T of them on a prompt's, R·T on a row's own. So these
    # are plain batched matrix products, for which no compiler has to copy the keys and values into another order.
    def scores(keys: jax.Array, mask: jax.Array) -> jax.Array:  # float32[Q, K, G, R, T, S]
        queries = q.reshape(*keys.shape[:-2], -1, head_dim)
        s = scale * jnp.einsum("...JH,...SH->...JS", queries, keys, preferred_element_type=jnp.float32)
        s = s.reshape(*q.shape[:-1], -1)
        if softcap is not None:
            s = softcap * jnp.tanh(s / softcap)
        return jnp.where(mask[:, None, :, None], s, jnp.finfo(jnp.float32).min)

    def weighted(weights: jax.Array, values: jax.Array) -> jax.Array:  # float32[Q, K, G, R, T, H]
        weights = weights.astype(values.dtype).reshape(*values.shape[:-2], -1, values.shape[-2])
        out = jnp.einsum("...JS,...SH->...JH", weights, values, preferred_element_type=jnp.float32)
        return out.reshape(q.shape)

    all_scores = [scores(kv.k, mask) for kv, mask in sets]
    highest = jnp.stack([s.max(axis=-1, keepdims=True) for s in all_scores]).max(axis=0)
    weights = [jnp.exp(s - jax.lax.stop_gradient(highest)) for s in all_scores]
    total = sum(w.sum(axis=-1, keepdims=True) for w in weights)
    out = sum(weighted(w, kv.v) for w, (kv, _) in zip(weights, sets, strict=True)) / total
    return jnp.einsum("QKGRTH->QGTKRH", out).reshape(*rows, heads, head_dim).astype(q.dtype)
