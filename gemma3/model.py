"""Token ids and images to hidden states, logits and per-token log-probs.

The vocabulary is split over `tensor`: a lookup costs one sum over the shards, `token_stats` a maximum and three sums.
Only `forward` makes the logits of all positions; it is for looking at the model, not for training it.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma3 import transformer
from gemma3.attention import KeyValues, number_images
from gemma3.config import Config
from gemma3.layers import rms_norm
from gemma3.lora import Policy
from gemma3.mesh import (
    gather_over_data,
    gather_over_tensor,
    max_over_tensor,
    num_tensor_shards,
    on_one_device,
    own_places,
    sum_over_tensor,
    tensor_shard,
)
from gemma3.params import Params
from gemma3.vision import soft_tokens

_MAX_CHUNK_LOGITS = 2**25  # logits that may exist at once on a device: 128 MiB of float32


class Prefix(NamedTuple):
    """A batch of prompts, read once."""

    hidden: jax.Array  # [Q, P, D] after the final norm
    kv: KeyValues  # [L, Q, K, P, H]
    lengths: jax.Array  # int32[Q], of the prompts

    @property
    def last_hidden(self) -> jax.Array:
        """[Q, D]: the state that predicts the first token of a completion."""
        last = jnp.maximum(self.lengths - 1, 0)
        return jnp.take_along_axis(self.hidden, last[:, None, None], axis=1)[:, 0]


def joined_embedding(params: Params) -> jax.Array:
    """This shard's rows of the embedding table, [V / tensor, D], joined over `data`."""
    return gather_over_data(params.text._replace(blocks=None)).embedding


def embed(embedding: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of the table times sqrt(D), int32[...] to [..., D]; `embedding` is this shard's rows [V / tensor, D].

    The factor is rounded to the weights' dtype first, as Hugging Face's is: 50.5 instead of 50.596 for 4b in bfloat16.
    """
    local, hit = own_places(ids, embedding.shape[0])
    x = sum_over_tensor(jnp.where(hit[..., None], embedding[local], 0))
    return x * jnp.sqrt(float(embedding.shape[1])).astype(embedding.dtype)


def insert_soft_tokens(x: jax.Array, ids: jax.Array, soft: jax.Array, image_token_id: int) -> jax.Array:
    """Put each row's soft tokens where its ids are image tokens, in order. x: [Q, P, D]; soft: [Q, A, M, D].

    Soft tokens are not multiplied by sqrt(D). Those beyond a row's image tokens stand for no image and are ignored.
    """
    is_image = ids == image_token_id
    soft = soft.reshape(soft.shape[0], -1, soft.shape[-1])
    order = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, soft.shape[1] - 1)
    return jnp.where(is_image[..., None], jnp.take_along_axis(soft, order[..., None], axis=1), x).astype(x.dtype)


def encode_images(policy: Policy, pixels: jax.Array, *, config: Config) -> jax.Array:
    """The soft tokens [Q, A, M, D] of each prompt's images, uint8[Q, A, h, w, 3].

    The images of a data shard are dealt out to its tensor shards, each of which runs the whole tower on its share.
    """
    flat = pixels.reshape(-1, *pixels.shape[2:])  # [I, h, w, 3]
    shards = num_tensor_shards()
    share = -(-flat.shape[0] // shards)
    flat = jnp.pad(flat, ((0, share * shards - flat.shape[0]), (0, 0), (0, 0), (0, 0)))
    own = jax.lax.dynamic_slice_in_dim(flat, tensor_shard() * share, share)
    soft = gather_over_tensor(soft_tokens(policy, own, config=config))
    return soft[: pixels.shape[0] * pixels.shape[1]].reshape(*pixels.shape[:2], *soft.shape[1:])


def read_prompts(policy: Policy, ids: jax.Array, soft: jax.Array | None, *, config: Config) -> Prefix:
    """Read prompts once. ids: int32[Q, P], right-padded with the pad id; soft: [Q, A, M, D] or None."""
    x = embed(joined_embedding(policy.params), ids)
    if soft is not None:
        x = insert_soft_tokens(x, ids, soft, config.image_token_id)
    valid = ids != config.pad_id
    image_numbers = number_images(ids, config.image_token_id)
    x, kv = transformer.prefill(policy, x, valid, image_numbers, config=config)
    return Prefix(rms_norm(policy.params.text.final_norm, x, config.norm_eps), kv, valid.sum(axis=1))


def logits_of(embedding: jax.Array, hidden: jax.Array, *, config: Config) -> jax.Array:
    """float32[..., V / tensor]: this shard's logits of hidden states [..., D] after the final norm."""
    logits = jnp.einsum("...D,VD->...V", hidden, embedding, preferred_element_type=jnp.float32)
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    return logits


class TokenStats(NamedTuple):
    """Each token's log-prob, and the entropy of the distribution that it was, or could have been, sampled from."""

    logps: jax.Array  # float32, log-prob of the token
    entropy: jax.Array  # float32, of the whole distribution, in nats; no gradient


def log_normaliser(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The highest logit, and log Σ exp(logit - highest), of float32[..., V / tensor]: float32[...] each.

    A log-prob is the logit minus both. The highest, subtracted first, leaves small numbers, and so a smaller error.
    """
    highest = max_over_tensor(jax.lax.stop_gradient(logits).max(axis=-1))
    return highest, jnp.log(sum_over_tensor(jnp.exp(logits - highest[..., None]).sum(axis=-1)))


def token_stats(logits: jax.Array, ids: jax.Array) -> TokenStats:
    """Log-softmax at the given ids, with the vocabulary split over `tensor`. logits: float32[..., V / tensor]."""
    highest, log_total = log_normaliser(logits)
    own, held = own_places(ids, logits.shape[-1])
    chosen = jnp.take_along_axis(logits, own[..., None], axis=-1)[..., 0] - highest
    logps = sum_over_tensor(jnp.where(held, chosen, 0.0)) - log_total
    shifted, log_total = jax.lax.stop_gradient((logits - highest[..., None], log_total))
    mean = sum_over_tensor((jnp.exp(shifted) * shifted).sum(axis=-1)) / jnp.exp(log_total)
    return TokenStats(logps, log_total - mean)


def logit_chunks(tokens: int, num_logits: int) -> tuple[int, int]:
    """The number of chunks, and the number of tokens in each, if each token has `num_logits`.

    The chunks are as equal as possible, since the padding of the last one is computed too.
    """
    chunks = -(-tokens // max(1, _MAX_CHUNK_LOGITS // num_logits))
    return chunks, -(-tokens // chunks)


def completion_stats(
    policy: Policy,
    ids: jax.Array,
    soft: jax.Array | None,
    completion_ids: jax.Array,
    *,
    temperature: float = 1.0,
    config: Config,
) -> TokenStats:
    """log softmax(logits / temperature) of every completion token, and the entropy there: [Q, G, C].

    The log-probs of the policy, the old policy and the reference all come from this function. The logits are computed
    one chunk of tokens at a time, and again in the backward pass.

    ids: int32[Q, P]; completion_ids: int32[Q, G, C]. Values at padding have no meaning and must be masked.
    """
    prefix = read_prompts(policy, ids, soft, config=config)
    embedding = joined_embedding(policy.params)
    q, g, c = completion_ids.shape
    x = embed(embedding, completion_ids[:, :, :-1])
    x = transformer.extend(policy, x, prefix.kv, prefix.lengths, config=config)
    x = rms_norm(policy.params.text.final_norm, x, config.norm_eps)
    first = jnp.broadcast_to(prefix.last_hidden[:, None, None], (q, g, 1, x.shape[-1]))
    hidden = jnp.concatenate([first, x], axis=2).reshape(q * g * c, -1)

    @jax.checkpoint
    def chunk_stats(chunk):
        chunk_hidden, chunk_ids = chunk
        return token_stats(logits_of(embedding, chunk_hidden, config=config) / temperature, chunk_ids)

    chunks, at_once = logit_chunks(q * g * c, embedding.shape[0])
    padding = chunks * at_once - q * g * c
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(chunks, at_once, -1)
    targets = jnp.pad(completion_ids.reshape(-1), (0, padding)).reshape(chunks, at_once)
    stats = jax.lax.map(chunk_stats, (hidden, targets))
    return jax.tree.map(lambda x: x.reshape(-1)[: q * g * c].reshape(q, g, c), stats)


def pack_images(
    images: Sequence[Sequence[np.ndarray]], ids: np.ndarray, config: Config, at_least: int = 0
) -> np.ndarray | None:
    """The rows' images as uint8[Q, A, h, w, 3], with black ones up to A; None if A is 0, or for a text-only model.

    A is the largest number of images in a row, but no less than `at_least`. ValueError if a row does not have M image
    tokens for each image, an image has the wrong shape or dtype, or a text-only model is given images.
    """
    if config.vision is None:
        if any(len(row) for row in images):
            raise ValueError(f"a {config.model_type} model reads no images, and {sum(map(len, images))} were given")
        return None
    size, per_image = config.vision.image_size, config.vision.tokens_per_image
    pixels = np.zeros((len(images), max([at_least, *map(len, images)]), size, size, 3), np.uint8)
    for q, (row, row_ids) in enumerate(zip(images, ids, strict=True)):
        tokens = int((row_ids == config.image_token_id).sum())
        if tokens != len(row) * per_image:
            raise ValueError(
                f"row {q} has {len(row)} images and {tokens} image tokens; "
                f"each image needs {per_image}, {len(row) * per_image} in all"
            )
        for a, image in enumerate(row):
            if image.shape != (size, size, 3) or image.dtype != np.uint8:
                raise ValueError(
                    f"an image of row {q} is {image.dtype}{list(image.shape)}; "
                    f"load_image(path, {size}) makes the uint8[{size}, {size}, 3] this model reads"
                )
            pixels[q, a] = image
    return pixels if pixels.size else None


def _all_logits(policy: Policy, ids: jax.Array, pixels: jax.Array | None, *, config: Config) -> jax.Array:
    soft = None if pixels is None else encode_images(policy, pixels, config=config)
    hidden = read_prompts(policy, ids, soft, config=config).hidden
    return logits_of(policy.params.text.embedding, hidden, config=config)


@cache
def _forward(config: Config):
    return on_one_device(_all_logits, config=config)


def forward(
    policy: Policy | Params, ids: jax.Array, images: Sequence[Sequence[np.ndarray]] | None = None, *, config: Config
) -> jax.Array:
    """The logits of every position, float32[B, T, V].

    policy: the weights, by themselves or with an adapter; ids: int32[B, T], right-padded with the pad id; images: for
    each row a list of uint8[h, w, 3], as `load_image` makes them, or None. The ids show where an image's tokens are:
    these attend to each other in both directions.
    """
    ids = np.asarray(ids, np.int32)
    pixels = pack_images(images if images is not None else [[]] * len(ids), ids, config)
    policy = policy if isinstance(policy, Policy) else Policy(policy)
    return _forward(config)(policy, ids, pixels)
