"""SigLIP (arXiv 2303.15343) as Gemma 3 uses it, and the projector that turns its patches into soft tokens.

Plain pre-norm ViT: learned positions, biases everywhere, full attention, no class token and no pooling head. Images
are split over all devices, so only the weights are communicated here.
"""

import jax
import jax.numpy as jnp

from gemma3.config import Config, VisionConfig
from gemma3.layers import project, rms_norm
from gemma3.lora import LoraPair, LoraVisionBlock, Policy
from gemma3.mesh import gather_over_data
from gemma3.params import Vision, VisionBlock


def _last_axis(vector: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(vector, range(like.ndim - vector.ndim))


def layer_norm(scale: jax.Array, bias: jax.Array, x: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
    return (normed * _last_axis(scale, x) + _last_axis(bias, x)).astype(x.dtype)


def linear(
    weight: jax.Array, bias: jax.Array, x: jax.Array, pair: LoraPair | None = None, *, axes: int = 1
) -> jax.Array:
    y = project(weight, x, pair, axes=axes)
    return y + _last_axis(bias, y)


def patchify(pixels: jax.Array, patch_size: int) -> jax.Array:
    """Cut images [I, h, w, c] into patches [I, T, patch * patch * c], row by row, each flattened as (y, x, c)."""
    images, height, width, channels = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    x = pixels.reshape(images, rows, patch_size, columns, patch_size, channels)
    return jnp.einsum("IyaxbC->IyxabC", x).reshape(images, rows * columns, -1)


def vision_attention(w: VisionBlock, x: jax.Array, lora: LoraVisionBlock) -> jax.Array:
    """Full multi-head attention over an image's patches, x: [I, T, E].

    Queries are taken a few at a time: the scores of all 4096 patches at once would be 1 GiB an image in float32.
    """
    q = linear(w.query, w.query_bias, x, lora.query)
    k = linear(w.key, w.key_bias, x, lora.key)
    v = linear(w.value, w.value_bias, x, lora.value)
    scale = q.shape[-1] ** -0.5

    @jax.checkpoint
    def attend(q: jax.Array) -> jax.Array:  # one patch's queries, [I, n, e]
        scores = scale * jnp.einsum("Ine,ISne->InS", q, k, preferred_element_type=jnp.float32)
        shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("InS,ISne->Ine", shares, v)

    mixed = jnp.moveaxis(jax.lax.map(attend, jnp.moveaxis(q, 1, 0), batch_size=256), 0, 1)
    return linear(w.out, w.out_bias, mixed, lora.out, axes=2)


def vision_mlp(w: VisionBlock, x: jax.Array, lora: LoraVisionBlock) -> jax.Array:
    h = linear(w.fc1, w.fc1_bias, x, lora.fc1)
    return linear(w.fc2, w.fc2_bias, jax.nn.gelu(h, approximate=True), lora.fc2)


def vision_block(w: VisionBlock, x: jax.Array, lora: LoraVisionBlock, eps: float) -> jax.Array:
    x = x + vision_attention(w, layer_norm(w.norm1_scale, w.norm1_bias, x, eps), lora)
    return x + vision_mlp(w, layer_norm(w.norm2_scale, w.norm2_bias, x, eps), lora)


def embed_patches(w: Vision, pixels: jax.Array, patch_size: int) -> jax.Array:
    """uint8 [I, h, w, 3] to [I, T, E]: values to [-1, 1], patches, a linear map, learned positions."""
    x = pixels.astype(jnp.float32) / 127.5 - 1.0
    x = patchify(x, patch_size).astype(w.patch_kernel.dtype)
    return linear(w.patch_kernel, w.patch_bias, x) + w.position[None]


def vision_tower(w: Vision, pixels: jax.Array, lora: LoraVisionBlock, config: VisionConfig) -> jax.Array:
    """The tower's last hidden state, after its final norm: [I, T, E]."""

    @jax.checkpoint
    def one_layer(x, per_layer):
        block, pairs = gather_over_data(per_layer)
        return vision_block(block, x, pairs, config.norm_eps), None

    x, _ = jax.lax.scan(one_layer, embed_patches(w, pixels, config.patch_size), (w.blocks, lora))
    return layer_norm(w.post_norm_scale, w.post_norm_bias, x, config.norm_eps)


def project_patches(w: Vision, x: jax.Array, config: VisionConfig) -> jax.Array:
    """Mean-pool patches [I, T, E] to a square of M, normalise, and map to the language model's width: [I, M, D]."""
    side, pool = config.tokens_per_side, config.patches_per_side // config.tokens_per_side
    x = x.reshape(x.shape[0], side, pool, side, pool, -1).mean(axis=(2, 4)).reshape(x.shape[0], side * side, -1)
    return jnp.einsum("IME,ED->IMD", rms_norm(w.soft_norm, x, config.norm_eps), w.projector)


def soft_tokens(policy: Policy, pixels: jax.Array, *, config: Config) -> jax.Array:
    """Images uint8[I, h, w, 3] to soft tokens [I, M, D], which stand in a prompt where its image tokens are."""
    vision = policy.params.vision
    w = gather_over_data(vision._replace(blocks=None))._replace(blocks=vision.blocks)
    lora = (policy.lora and policy.lora.vision) or LoraVisionBlock()
    return project_patches(w, vision_tower(w, pixels, lora, config.vision), config.vision)
