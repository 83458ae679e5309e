"""The small layers of Gemma: RMSNorm, rotary positions, projections with an optional LoRA adapter, the gated MLP.

Norms and rotations are computed in float32 and return the dtype of their input, as Hugging Face's do.
"""

from functools import partial

import jax
import jax.numpy as jnp

from gemma3.mesh import copy_to_shards_of


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x²) + eps) * (1 + weight) over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467).

    Gemma stores the scale minus one, so a weight of zero is the identity.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
    scale = 1.0 + weight.astype(jnp.float32)
    return (normed * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def rope(x: jax.Array, positions: jax.Array, inverse_frequencies: jax.Array) -> jax.Array:
    """Rotate each pair (x[i], x[i + H/2]) by the angle position * inverse_frequencies[i] (RoFormer, arXiv 2104.09864).

    The halves are rotated against each other, not neighbouring pairs, as the checkpoints expect.

    x: [..., T, heads, H]; positions: int32[..., T]; inverse_frequencies: float32[H/2]. Returns x's shape and dtype.
    """
    angles = positions[..., None, None].astype(jnp.float32) * jnp.expand_dims(
        inverse_frequencies, range(positions.ndim + 1)
    )  # [..., T, 1, H/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: jax.Array, axes: int) -> jax.Array:
    """x · w over the last `axes` of x and the first ones of w, in their order: all is read as it lies in memory.

    The gradient of w is xᵀ · g. JAX's own is (gᵀ · x)ᵀ, for which a CPU transposes g, and computes it again to do so.
    """
    return jnp.tensordot(x, w, axes)


def _product_forward(x, w, axes: int) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array]]:
    # Frozen weights have no gradient, and only theirs needs x.
    return _product(x.value, w.value, axes), (x.value if w.perturbed else None, w.value)


def _product_backward(
    axes: int, kept: tuple[jax.Array | None, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    x, w = kept
    outputs = list(range(axes, w.ndim))
    of_x = jnp.tensordot(g, w, (list(range(-len(outputs), 0)), outputs))
    if x is None:
        return of_x, None
    tokens = list(range(x.ndim - axes))
    return of_x, jnp.tensordot(x, g, (tokens, tokens))


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def project(x: jax.Array, weight: jax.Array, adapter, scale: float, *, axes: int = 1) -> jax.Array:
    """x · W, plus scale * (x · A) · B where an adapter (A, B) is given (LoRA, arXiv 2106.09685, section 4.1).

    The last `axes` of x, its inputs, meet the first ones of W. The adapter is kept in float32 and used in x's dtype.

    x: [..., *inputs]; weight: [*inputs, *outputs]; adapter.a: [*inputs, r]; adapter.b: [r, *outputs].
    """
    y = _product(x, copy_to_shards_of(x, weight), axes)
    if adapter is None:
        return y
    a, b = (copy_to_shards_of(x, part.astype(x.dtype)) for part in adapter)
    return y + scale * _product(_product(x, a, axes), b, 1)


def gated_mlp(x: jax.Array, w, adapters, scale: float) -> jax.Array:
    """(gelu(x · gate) * (x · up)) · down with the tanh form of gelu (GeGLU, arXiv 2002.05202).

    `w` and `adapters` have fields gate, up: [D, F] and down: [F, D]. With F split over `tensor` the result is this
    shard's part of a sum.
    """
    gate = project(x, w.gate, adapters and adapters.gate, scale)
    up = project(x, w.up, adapters and adapters.up, scale)
    return project(jax.nn.gelu(gate, approximate=True) * up, w.down, adapters and adapters.down, scale)
