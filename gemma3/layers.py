"""The small layers of Gemma: RMSNorm, rotary embeddings, projections with an optional LoRA pair, the gated MLP.

Norms and rotations are computed in float32 and return the dtype of their input, as Hugging Face's do.
"""

import jax
import jax.numpy as jnp

from gemma3.lora import LoraBlock, LoraPair
from gemma3.mesh import copy_to_shards_of
from gemma3.params import Block
from gemma3.product import product


def rms_norm(weight: jax.Array, x: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x²) + eps) * (1 + weight) over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467).

    Gemma stores the scale minus one, so a weight of zero is the identity.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
    scale = 1.0 + weight.astype(jnp.float32)
    return (normed * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def rope(x: jax.Array, positions: jax.Array, inverse_frequencies: jax.Array) -> jax.Array:
    """Rotate each pair (x[i], x[i + H/2]) by the angle position * inverse_frequencies[i] (RoFormer, arXiv 2104.09864).

    A pair takes one number from each half of a head, not two neighbours: the checkpoints expect this.

    x: [..., T, heads, H]; positions: int32[..., T]; inverse_frequencies: float32[H/2]. Returns x's shape and dtype.
    """
    angles = positions[..., None, None].astype(jnp.float32) * jnp.expand_dims(
        inverse_frequencies, range(positions.ndim + 1)
    )  # [..., T, 1, H/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def project(weight: jax.Array, x: jax.Array, pair: LoraPair | None = None, *, axes: int = 1) -> jax.Array:
    """x · W, plus scale * (x · A) · B where there is a LoRA pair (arXiv 2106.09685, section 4.1).

    The last `axes` axes of x are contracted with the first ones of W. The pair is kept in float32, used in x's dtype.

    weight: [*inputs, *outputs]; x: [..., *inputs]; pair.a: [*inputs, r]; pair.b: [r, *outputs].
    """
    y = product(x, copy_to_shards_of(x, weight), axes)
    if pair is None:
        return y
    a, b = (copy_to_shards_of(x, factor.astype(x.dtype)) for factor in (pair.a, pair.b))
    return y + pair.scale * product(product(x, a, axes), b, 1)


def gated_mlp(w: Block, x: jax.Array, lora: LoraBlock) -> jax.Array:
    """(gelu(x · gate) * (x · up)) · down with the tanh form of gelu (GeGLU, arXiv 2002.05202).

    F is split over `tensor`, so the result is this shard's part of a sum over the shards.
    """
    gate = project(w.gate, x, lora.gate)
    up = project(w.up, x, lora.up)
    return project(w.down, jax.nn.gelu(gate, approximate=True) * up, lora.down)
