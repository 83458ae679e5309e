"""SigLIP (arXiv 2303.15343) as Gemma 3 uses it, and the projector that turns its patches into soft tokens.

Plain pre-norm ViT: learned positions, biases everywhere, full attention, no class token and no pooling head. Pictures
are split over all devices, so nothing is communicated here but the weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma3.config import Config, VisionConfig
from gemma3.layers import project, rms_norm
from gemma3.lora import Lora, LoraVisionBlock
from gemma3.mesh import gather_over_data


class VisionBlock(NamedTuple):
    """Weights of the encoder blocks, stacked over L. n heads of e dims; f is the MLP width."""

    norm1_scale: jax.Array  # [E]
    norm1_bias: jax.Array  # [E]
    query: jax.Array  # [E, n, e]
    query_bias: jax.Array  # [n, e]
    key: jax.Array  # [E, n, e]
    key_bias: jax.Array  # [n, e]
    value: jax.Array  # [E, n, e]
    value_bias: jax.Array  # [n, e]
    out: jax.Array  # [n, e, E]
    out_bias: jax.Array  # [E]
    norm2_scale: jax.Array  # [E]
    norm2_bias: jax.Array  # [E]
    fc1: jax.Array  # [E, f]
    fc1_bias: jax.Array  # [f]
    fc2: jax.Array  # [f, E]
    fc2_bias: jax.Array  # [E]


class Vision(NamedTuple):
    """The vision tower and the projector."""

    patch_kernel: jax.Array  # [patch * patch * c, E]
    patch_bias: jax.Array  # [E]
    position: jax.Array  # [T, E], one row per patch
    blocks: VisionBlock
    post_norm_scale: jax.Array  # [E]
    post_norm_bias: jax.Array  # [E]
    soft_norm: jax.Array  # [E]
    projector: jax.Array  # [E, D]


def _last_axis(vector: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(vector, range(like.ndim - vector.ndim))


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
    return (normed * _last_axis(scale, x) + _last_axis(bias, x)).astype(x.dtype)


def linear(
    x: jax.Array, weight: jax.Array, bias: jax.Array, adapter=None, scale: float = 0.0, *, axes: int = 1
) -> jax.Array:
    y = project(x, weight, adapter, scale, axes=axes)
    return y + _last_axis(bias, y)


def patchify(pixels: jax.Array, patch_size: int) -> jax.Array:
    """Cut pictures [I, h, w, c] into patches [I, T, patch * patch * c], row by row, each flattened as (y, x, c)."""
    images, height, width, channels = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    x = pixels.reshape(images, rows, patch_size, columns, patch_size, channels)
    return jnp.einsum("IyaxbC->IyxabC", x).reshape(images, rows * columns, -1)


def vision_attention(
    x: jax.Array, w: VisionBlock, adapters: LoraVisionBlock | None = None, lora_scale: float = 0.0
) -> jax.Array:
    """Full multi-head attention over an image's patches, x: [I, T, E].

    Queries are taken a few at a time: the scores of all 4096 patches at once would be 1 GiB an image in float32.
    """
    q = linear(x, w.query, w.query_bias, adapters and adapters.query, lora_scale)
    k = linear(x, w.key, w.key_bias, adapters and adapters.key, lora_scale)
    v = linear(x, w.value, w.value_bias, adapters and adapters.value, lora_scale)
    scale = q.shape[-1] ** -0.5

    @jax.checkpoint
    def attend(q):  # one patch's queries, [I, n, e]
        scores = scale * jnp.einsum("Ine,ISne->InS", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("InS,ISne->Ine", weights, v)

    mixed = jnp.moveaxis(jax.lax.map(attend, jnp.moveaxis(q, 1, 0), batch_size=256), 0, 1)
    return linear(mixed, w.out, w.out_bias, adapters and adapters.out, lora_scale, axes=2)


def vision_mlp(
    x: jax.Array, w: VisionBlock, adapters: LoraVisionBlock | None = None, lora_scale: float = 0.0
) -> jax.Array:
    h = linear(x, w.fc1, w.fc1_bias, adapters and adapters.fc1, lora_scale)
    h = jax.nn.gelu(h, approximate=True)
    return linear(h, w.fc2, w.fc2_bias, adapters and adapters.fc2, lora_scale)


def vision_block(
    x: jax.Array, w: VisionBlock, eps: float, adapters: LoraVisionBlock | None = None, lora_scale: float = 0.0
) -> jax.Array:
    x = x + vision_attention(layer_norm(x, w.norm1_scale, w.norm1_bias, eps), w, adapters, lora_scale)
    return x + vision_mlp(layer_norm(x, w.norm2_scale, w.norm2_bias, eps), w, adapters, lora_scale)


def embed_patches(pixels: jax.Array, w: Vision, patch_size: int) -> jax.Array:
    """uint8 [I, h, w, 3] to [I, T, E]: values to [-1, 1], patches, a linear map, learned positions."""
    x = pixels.astype(jnp.float32) / 127.5 - 1.0
    x = patchify(x, patch_size).astype(w.patch_kernel.dtype)
    return linear(x, w.patch_kernel, w.patch_bias) + w.position[None]


def encode(pixels: jax.Array, w: Vision, config: VisionConfig, lora: Lora | None = None) -> jax.Array:
    """The tower's last hidden state, after its final norm: [I, T, E]."""
    x = embed_patches(pixels, w, config.patch_size)

    @jax.checkpoint
    def step(x, per_layer):
        layer, adapters = gather_over_data(per_layer, layer=True)
        return vision_block(x, layer, config.norm_eps, adapters, lora.scale if lora else 0.0), None

    x, _ = jax.lax.scan(step, x, (w.blocks, lora and lora.vision))
    return layer_norm(x, w.post_norm_scale, w.post_norm_bias, config.norm_eps)


def project_patches(x: jax.Array, w: Vision, config: VisionConfig) -> jax.Array:
    """Mean-pool patches [I, T, E] to a square of M, normalise, and map to the language model's width: [I, M, D]."""
    side, pool = config.tokens_per_side, config.patches_per_side // config.tokens_per_side
    x = x.reshape(x.shape[0], side, pool, side, pool, -1).mean(axis=(2, 4)).reshape(x.shape[0], side * side, -1)
    return jnp.einsum("IME,ED->IMD", rms_norm(x, w.soft_norm, config.norm_eps), w.projector)


def soft_tokens(pixels: jax.Array, vision: Vision, lora: Lora | None = None, *, config: Config) -> jax.Array:
    """Pictures uint8[I, h, w, 3] to soft tokens [I, M, D], which stand in a prompt where its image tokens are."""
    w = gather_over_data(vision._replace(blocks=None))._replace(blocks=vision.blocks)
    return project_patches(encode(pixels, w, config.vision, lora), w, config.vision)
