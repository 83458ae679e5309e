"""Token ids and pictures to hidden states, logits and per-token log-probs.

The vocabulary is split over `tensor`: a lookup and a softmax each cost one sum. Logits of all positions never exist
but in `forward`, which is for looking at the model, not for training it.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma3 import transformer
from gemma3.attention import KeyValues, image_blocks
from gemma3.config import Config
from gemma3.layers import rms_norm
from gemma3.lora import Lora
from gemma3.mesh import (
    gather_over_data,
    gather_over_tensor,
    max_over_tensor,
    num_tensor_shards,
    on_one_device,
    sum_over_tensor,
    tensor_shard,
)
from gemma3.transformer import Block
from gemma3.vision import Vision, VisionBlock, soft_tokens

_MAX_CHUNK_LOGITS = 2**25  # logits that may exist at once on a device: 128 MiB of float32


class Text(NamedTuple):
    """The language model. The embedding table is the output layer too."""

    embedding: jax.Array  # [V, D]
    blocks: Block  # stacked over L
    final_norm: jax.Array  # [D]


class Params(NamedTuple):
    """A model's weights; `vision` is None in a text-only one."""

    text: Text
    vision: Vision | None


class Prefix(NamedTuple):
    """A batch of prompts once read."""

    hidden: jax.Array  # [Q, P, D] after the final norm
    kv: KeyValues  # [L, Q, K, P, H]
    lengths: jax.Array  # int32[Q]

    @property
    def last_hidden(self) -> jax.Array:
        """[Q, D]: the state that predicts the first token of a completion."""
        last = jnp.maximum(self.lengths - 1, 0)
        return jnp.take_along_axis(self.hidden, last[:, None, None], axis=1)[:, 0]


def param_shapes(config: Config, dtype=jnp.float32) -> Params:
    """Every parameter as a `jax.ShapeDtypeStruct`: nothing is allocated."""
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_layers
    heads, kv_heads, h = config.num_heads, config.num_kv_heads, config.head_dim

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    norm, head_norm = array(layers, d), array(layers, h) if config.qk_norm else None
    blocks = Block(
        pre_attention_norm=norm,
        q=array(layers, d, heads, h),
        k=array(layers, d, kv_heads, h),
        v=array(layers, d, kv_heads, h),
        o=array(layers, heads, h, d),
        q_norm=head_norm,
        k_norm=head_norm,
        post_attention_norm=norm,
        pre_mlp_norm=norm,
        gate=array(layers, d, f),
        up=array(layers, d, f),
        down=array(layers, f, d),
        post_mlp_norm=norm,
    )
    text = Text(array(config.vocab_size, d), blocks, array(d))
    if config.vision is None:
        return Params(text, None)
    v = config.vision
    e, n, layers = v.hidden_size, v.num_heads, v.num_layers
    width, head, head_bias = array(layers, e), array(layers, e, n, e // n), array(layers, n, e // n)
    vision = Vision(
        patch_kernel=array(v.patch_size**2 * 3, e),
        patch_bias=array(e),
        position=array(v.patches_per_side**2, e),
        blocks=VisionBlock(
            norm1_scale=width,
            norm1_bias=width,
            query=head,
            query_bias=head_bias,
            key=head,
            key_bias=head_bias,
            value=head,
            value_bias=head_bias,
            out=array(layers, n, e // n, e),
            out_bias=width,
            norm2_scale=width,
            norm2_bias=width,
            fc1=array(layers, e, v.intermediate_size),
            fc1_bias=array(layers, v.intermediate_size),
            fc2=array(layers, v.intermediate_size, e),
            fc2_bias=width,
        ),
        post_norm_scale=array(e),
        post_norm_bias=array(e),
        soft_norm=array(e),
        projector=array(e, d),
    )
    return Params(text, vision)


def init_params(key: jax.Array, config: Config, dtype=jnp.float32) -> Params:
    """Random weights to train from nothing: matrices N(0, 1/inputs), the embedding N(0, 1/D), norms the identity."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config, dtype))

    def init(index: int, path, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].name
        if "norm" in name or "bias" in name:
            return jnp.ones(shape.shape, dtype) if name.endswith("scale") else jnp.zeros(shape.shape, dtype)
        inputs = {"embedding": shape.shape[-1], "position": shape.shape[-1] * 4}.get(name)
        if inputs is None:
            stacked = path[1].name == "blocks"
            input_axes = 2 if name in ("o", "out") else 1
            inputs = np.prod(shape.shape[stacked : stacked + input_axes])
        return (jax.random.normal(jax.random.fold_in(key, index), shape.shape) * inputs**-0.5).astype(dtype)

    return jax.tree.unflatten(tree, [init(i, path, shape) for i, (path, shape) in enumerate(leaves)])


def _own_ids(ids: jax.Array, embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ids counted from the first row of this shard's part of the vocabulary, and whether they lie in it."""
    rows = embedding.shape[0]
    local = ids - tensor_shard() * rows
    return jnp.clip(local, 0, rows - 1), (local >= 0) & (local < rows)


def embed(ids: jax.Array, embedding: jax.Array) -> jax.Array:
    """Rows of the table times sqrt(D), int32[...] to [..., D]; `embedding` is this shard's rows [V / tensor, D].

    The factor is rounded to the weights' dtype first, as Hugging Face's is: 50.5 instead of 50.596 for 4b in bfloat16.
    """
    local, hit = _own_ids(ids, embedding)
    x = sum_over_tensor(jnp.where(hit[..., None], embedding[local], 0))
    return x * jnp.sqrt(float(embedding.shape[1])).astype(embedding.dtype)


def place_soft_tokens(x: jax.Array, ids: jax.Array, soft: jax.Array, image_token_id: int) -> jax.Array:
    """Put each row's soft tokens where its ids are image tokens, in order. x: [Q, P, D]; soft: [Q, A, M, D].

    Soft tokens are not multiplied by sqrt(D). Those beyond a row's image tokens stand for no picture and are ignored.
    """
    is_image = ids == image_token_id
    rows = soft.reshape(soft.shape[0], -1, soft.shape[-1])
    order = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, rows.shape[1] - 1)
    return jnp.where(is_image[..., None], jnp.take_along_axis(rows, order[..., None], axis=1), x).astype(x.dtype)


def encode_images(pixels: jax.Array, params: Params, lora: Lora | None = None, *, config: Config) -> jax.Array:
    """The soft tokens [Q, A, M, D] of each prompt's pictures, uint8[Q, A, h, w, 3].

    The pictures of a data shard are dealt out to its tensor shards, each of which runs the whole tower on its share.
    """
    flat = pixels.reshape(-1, *pixels.shape[2:])  # [I, h, w, 3]
    shards = num_tensor_shards()
    share = -(-flat.shape[0] // shards)
    flat = jnp.pad(flat, ((0, share * shards - flat.shape[0]), (0, 0), (0, 0), (0, 0)))
    own = jax.lax.dynamic_slice_in_dim(flat, tensor_shard() * share, share)
    soft = gather_over_tensor(soft_tokens(own, params.vision, lora, config=config))
    return soft[: pixels.shape[0] * pixels.shape[1]].reshape(*pixels.shape[:2], *soft.shape[1:])


def read_prompts(
    ids: jax.Array, soft: jax.Array | None, params: Params, lora: Lora | None, *, config: Config
) -> Prefix:
    """Read prompts once. ids: int32[Q, P], right-padded with the pad id; soft: [Q, A, M, D] or None."""
    embedding = gather_over_data(params.text._replace(blocks=None)).embedding
    x = embed(ids, embedding)
    if soft is not None:
        x = place_soft_tokens(x, ids, soft, config.image_token_id)
    valid = ids != config.pad_id
    blocks_of_images = image_blocks(ids, config.image_token_id)
    x, kv = transformer.prefill(x, params.text.blocks, lora, valid, blocks_of_images, config=config)
    return Prefix(rms_norm(x, params.text.final_norm, config.norm_eps), kv, valid.sum(axis=1))


def logits_of(hidden: jax.Array, embedding: jax.Array, *, config: Config) -> jax.Array:
    """float32[..., V / tensor]: this shard's logits of hidden states [..., D] after the final norm."""
    logits = jnp.einsum("...D,VD->...V", hidden, embedding, preferred_element_type=jnp.float32)
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    return logits


class TokenStats(NamedTuple):
    """What is known of each token from the distribution it was, or could have been, drawn from."""

    logps: jax.Array  # float32, log-prob of the token
    entropy: jax.Array  # float32, of the whole distribution, in nats; no gradient


def token_stats(logits: jax.Array, ids: jax.Array, embedding: jax.Array) -> TokenStats:
    """Log-softmax at the given ids, with the vocabulary split over `tensor`. logits: float32[..., V / tensor]."""
    highest = max_over_tensor(jax.lax.stop_gradient(logits).max(axis=-1))
    shifted = logits - highest[..., None]
    total = sum_over_tensor(jnp.exp(shifted).sum(axis=-1))
    local, hit = _own_ids(ids, embedding)
    chosen = jnp.take_along_axis(shifted, local[..., None], axis=-1)[..., 0]
    logps = sum_over_tensor(jnp.where(hit, chosen, 0.0)) - jnp.log(total)
    fixed = jax.lax.stop_gradient(shifted)
    mean = sum_over_tensor((jnp.exp(fixed) * fixed).sum(axis=-1)) / jax.lax.stop_gradient(total)
    return TokenStats(logps, jnp.log(jax.lax.stop_gradient(total)) - mean)


def logit_chunks(tokens: int, rows: int) -> tuple[int, int]:
    """How many chunks of how many tokens each, with logits of `rows` words for each token.

    The chunks are as equal as can be, since what pads the last one is computed too.
    """
    chunks = -(-tokens // max(1, _MAX_CHUNK_LOGITS // rows))
    return chunks, -(-tokens // chunks)


def completion_stats(
    ids: jax.Array,
    soft: jax.Array | None,
    completion_ids: jax.Array,
    params: Params,
    lora: Lora | None,
    *,
    temperature: float = 1.0,
    config: Config,
) -> TokenStats:
    """log softmax(logits / temperature) of every completion token, and its entropy: [Q, G, C].

    The one function behind the policy's, the old policy's and the reference's log-probs. The logits are computed a
    chunk of tokens at a time, and again in the backward pass.

    ids: int32[Q, P]; completion_ids: int32[Q, G, C]. Values at padding have no meaning and must be masked.
    """
    prefix = read_prompts(ids, soft, params, lora, config=config)
    embedding = gather_over_data(params.text._replace(blocks=None)).embedding
    q, g, c = completion_ids.shape
    x = embed(completion_ids[:, :, :-1], embedding)
    x = transformer.extend(x, params.text.blocks, lora, prefix.kv, prefix.lengths, config=config)
    x = rms_norm(x, params.text.final_norm, config.norm_eps)
    first = jnp.broadcast_to(prefix.last_hidden[:, None, None], (q, g, 1, x.shape[-1]))
    hidden = jnp.concatenate([first, x], axis=2).reshape(q * g * c, -1)

    @jax.checkpoint
    def chunk_stats(chunk):
        chunk_hidden, chunk_ids = chunk
        return token_stats(logits_of(chunk_hidden, embedding, config=config) / temperature, chunk_ids, embedding)

    chunks, at_once = logit_chunks(q * g * c, embedding.shape[0])
    padding = chunks * at_once - q * g * c
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(chunks, at_once, -1)
    targets = jnp.pad(completion_ids.reshape(-1), (0, padding)).reshape(chunks, at_once)
    stats = jax.lax.map(chunk_stats, (hidden, targets))
    return jax.tree.map(lambda x: x.reshape(-1)[: q * g * c].reshape(q, g, c), stats)


def pack_images(
    images: Sequence[Sequence[np.ndarray]], ids: np.ndarray, config: Config, at_least: int = 0
) -> np.ndarray | None:
    """Each row's pictures as uint8[Q, A, h, w, 3], rows with fewer than A filled with black; None where there are none.

    A is the most that a row has, or `at_least`. ValueError where a row's pictures and its image tokens, M for each
    picture, do not agree, or a size is wrong.
    """
    if config.vision is None:
        if any(len(row) for row in images):
            raise ValueError(f"a {config.model_type} model reads no pictures, and {sum(map(len, images))} were given")
        return None
    size, per_image = config.vision.image_size, config.vision.tokens_per_image
    pixels = np.zeros((len(images), max([at_least, *map(len, images)]), size, size, 3), np.uint8)
    for index, (row, row_ids) in enumerate(zip(images, ids, strict=True)):
        tokens = int((row_ids == config.image_token_id).sum())
        if tokens != len(row) * per_image:
            raise ValueError(
                f"row {index} has {len(row)} pictures and {tokens} image tokens; "
                f"each picture needs {per_image}, {len(row) * per_image} in all"
            )
        for place, picture in enumerate(row):
            if picture.shape != (size, size, 3) or picture.dtype != np.uint8:
                raise ValueError(
                    f"a picture of row {index} is {picture.dtype}{list(picture.shape)}; "
                    f"load_image(path, {size}) makes the uint8[{size}, {size}, 3] this model reads"
                )
            pixels[index, place] = picture
    return pixels if pixels.size else None


def _all_logits(ids, pixels, params: Params, lora: Lora | None, *, config: Config) -> jax.Array:
    soft = None if pixels is None else encode_images(pixels, params, lora, config=config)
    hidden = read_prompts(ids, soft, params, lora, config=config).hidden
    return logits_of(hidden, params.text.embedding, config=config)


@cache
def _forward(config: Config):
    return on_one_device(_all_logits, config=config)


def forward(
    params: Params,
    ids: jax.Array,
    images: Sequence[Sequence[np.ndarray]] | None = None,
    *,
    config: Config,
    lora: Lora | None = None,
) -> jax.Array:
    """The logits of every position, float32[B, T, V].

    ids: int32[B, T], right-padded with the pad id; images: each row's pictures, a list of uint8[h, w, 3] as
    `load_image` makes them, or None. Image tokens attend to each other both ways: their places are read off the ids.
    """
    ids = np.asarray(ids, np.int32)
    pixels = pack_images(images if images is not None else [[]] * len(ids), ids, config)
    return _forward(config)(ids, pixels, params, lora)
