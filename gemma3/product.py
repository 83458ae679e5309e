"""The product of activations and a weight, with a handwritten gradient that reads every array in its memory order."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, w: jax.Array, axes: int) -> jax.Array:
    """x · w: the last `axes` axes of x are contracted with the first ones of w, in their order.

    The gradient of w is xᵀ · g. JAX's own rule is (gᵀ · x)ᵀ: a CPU transposes g for it, and computes g again to do so.
    """
    return jnp.tensordot(x, w, axes)


def _forward(x, w, axes: int) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array]]:
    # Only the gradient of a weight needs x, and frozen weights have none.
    return product(x.value, w.value, axes), (x.value if w.perturbed else None, w.value)


def _backward(axes: int, kept: tuple[jax.Array | None, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    x, w = kept
    outputs = list(range(axes, w.ndim))
    of_x = jnp.tensordot(g, w, (list(range(-len(outputs), 0)), outputs))
    if x is None:
        return of_x, None
    tokens = list(range(x.ndim - axes))
    return of_x, jnp.tensordot(x, g, (tokens, tokens))


product.defvjp(_forward, _backward, symbolic_zeros=True)
