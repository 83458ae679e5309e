"""Drawing completions: each prompt is read once, then one compiled loop extends all of its group, token by token.

Everything runs in one `shard_map`, and the loop ends as soon as every row has stopped. The same code that trains draws
the samples, so the log-probs agree.

Randomness is keyed by (key, prompt index, completion, place, token id) and by nothing else: a completion is the same
whatever shares its batch, on every mesh and on any number of processes. Keying it by token id is what lets a device
that holds a part of the vocabulary draw just its part of the noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gemma3.attention import KeyValues, attend, own_mask, shared_mask
from gemma3.config import Config
from gemma3.layers import rms_norm
from gemma3.lora import Lora
from gemma3.mesh import (
    DATA,
    TENSOR,
    gather_over_data,
    max_over_tensor,
    min_over_tensor,
    partition_specs,
    sum_over_data,
    sum_over_later_shards,
    sum_over_tensor,
    tensor_shard,
    zeros_varying,
)
from gemma3.model import Params, embed, encode_images, logits_of, read_prompts, token_stats
from gemma3.transformer import LayerKind, block, layer_kinds, layer_weights


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: temperature 0 is greedy, top_k 0 and top_p 1 leave the whole vocabulary."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"--temperature {self.temperature}: it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k}: it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: it must lie in (0, 1]; 1 is off")


# (place, index int32[Q / data], tokens int32[Q / data, G]) to whether to go on: see `sample`.
OnToken = Callable[[np.ndarray, np.ndarray, np.ndarray], np.bool_]


class Prompts(NamedTuple):
    """A batch of prompts, split over `data`."""

    ids: jax.Array  # int32[Q, P], right-padded; a row of padding only is not sampled
    soft: jax.Array | None  # [Q, A, M, D] soft tokens of each prompt's pictures; None without pictures
    index: jax.Array  # int32[Q], what keys each prompt's randomness
    pixels: jax.Array | None = None  # uint8[Q, A, h, w, 3], kept where the vision tower is trained or adapted


class Samples(NamedTuple):
    """What was drawn. Ids after a row's first stop token are the pad id."""

    completion_ids: jax.Array  # int32[Q, G, C]
    completion_mask: jax.Array  # bool[Q, G, C], True through the first stop token
    logps: jax.Array  # float32[Q, G, C], of the whole distribution at the sampling temperature: the trainer's log-probs
    finished: jax.Array  # bool[Q, G], whether the row drew a stop token
    steps: jax.Array  # int32[], tokens the loop drew for its longest row


def _ordered(x: jax.Array) -> jax.Array:
    """float32 to uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(values: jax.Array, weights: jax.Array, target: float) -> jax.Array:
    """The highest value v for which the weights of all values >= v sum to at least `target`: uint32[..., 1].

    Found bit by bit, so it is exact, needs no sort, and of a vocabulary in parts only sums are communicated.
    values: uint32[..., V / tensor]; weights: float32, same shape.
    """

    def try_bit(i, found):
        candidate = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        weight = sum_over_tensor(jnp.where(values >= candidate, weights, 0.0).sum(axis=-1, keepdims=True))
        return jnp.where(weight >= target, candidate, found)

    # A sum of zeros has the type of the sums in the loop: the same on every tensor shard.
    start = sum_over_tensor((0.0 * weights).sum(axis=-1, keepdims=True)).astype(jnp.uint32)
    return jax.lax.fori_loop(0, 32, try_bit, start)


def top_k_filter(logits: jax.Array, k: int) -> jax.Array:
    """-inf below the k-th highest logit; ties with it survive. logits: float32[..., V / tensor]."""
    values = _ordered(logits)
    return jnp.where(values >= _threshold(values, jnp.ones_like(logits), k), logits, -jnp.inf)


def top_p_filter(logits: jax.Array, p: float) -> jax.Array:
    """-inf outside the nucleus: the fewest highest tokens whose probability sums to at least p (arXiv 1904.09751).

    Of the tokens that tie at the edge as many stay as are needed, those with the highest ids: what Hugging Face's
    upward sort does where it keeps the order of equals. torch's need not, so there any of them may stay.
    """
    values = _ordered(logits)
    shifted = jnp.exp(logits - max_over_tensor(logits.max(axis=-1, keepdims=True)))
    probs = shifted / sum_over_tensor(shifted.sum(axis=-1, keepdims=True))
    edge = _threshold(values, probs, p)
    above = sum_over_tensor(jnp.where(values > edge, probs, 0.0).sum(axis=-1, keepdims=True))
    tied = jnp.where(values == edge, probs, 0.0)
    upwards = jnp.cumsum(tied[..., ::-1], axis=-1)[..., ::-1]
    later = upwards - tied + sum_over_later_shards(tied.sum(axis=-1, keepdims=True))
    keep = (values > edge) | ((values == edge) & (above + later < p))
    return jnp.where(keep, logits, -jnp.inf)


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Temperature (above 0), then top-k, then top-p, in Hugging Face's order: -inf on what cannot be drawn."""
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = top_k_filter(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = top_p_filter(logits, sampling.top_p)
    return logits


def _gumbel(key: jax.Array, ids: jax.Array) -> jax.Array:
    """Standard Gumbel noise for each of `ids`, float32 of their shape; an id's noise does not depend on the others."""
    return jax.vmap(lambda i: jax.random.gumbel(jax.random.fold_in(key, i)))(ids)


def choose(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """Draw one id per row from the filtered distribution, or the likeliest id at temperature 0: int32[Q, G].

    A draw from a softmax is the argmax of its logits plus Gumbel noise, and an argmax over a vocabulary in parts needs
    one maximum. logits: float32[Q, G, V / tensor], -inf where forbidden; keys: PRNG keys [Q, G].
    """
    first_id = tensor_shard() * logits.shape[-1]
    own_ids = first_id + jnp.arange(logits.shape[-1])
    if sampling.temperature > 0:
        logits = filter_logits(logits, sampling) + jax.vmap(jax.vmap(partial(_gumbel, ids=own_ids)))(keys)
    highest = logits.max(axis=-1)
    winner = max_over_tensor(highest)
    last = jnp.iinfo(jnp.int32).max
    return min_over_tensor(jnp.where(highest == winner, first_id + logits.argmax(axis=-1), last)).astype(jnp.int32)


class PromptCache(NamedTuple):
    """One layer's keys and values of the prompts, as the token loop reads them: of a local layer the last window's."""

    kv: KeyValues  # [Q, K, S, H]
    starts: jax.Array  # int32[Q], the position of the first one


def prompt_cache(kv: KeyValues, lengths: jax.Array, window: int | None) -> PromptCache:
    """Keep of each prompt's keys [Q, K, P, H] the last `window`, or all of them."""
    if window is None or window >= kv.k.shape[2]:
        return PromptCache(kv, jnp.zeros_like(lengths))
    starts = jnp.maximum(lengths - window, 0)
    places = (starts[:, None] + jnp.arange(window)[None])[:, None, :, None]
    return PromptCache(KeyValues(*(jnp.take_along_axis(x, places, axis=2) for x in kv)), starts)


def prompt_caches(kv: KeyValues, lengths: jax.Array, config: Config) -> list[PromptCache]:
    """`prompt_cache` of every layer; kv: [L, Q, K, P, H] of `prefill`."""
    windows = [config.sliding_window if local else None for local in config.is_local]
    return [prompt_cache(KeyValues(kv.k[i], kv.v[i]), lengths, window) for i, window in enumerate(windows)]


def cache_slots(config: Config, length: int) -> list[int]:
    """How many tokens of `length` each layer keeps: all of them on global layers, a window's on local ones."""
    return [min(length, config.sliding_window) if local else length for local in config.is_local]


def empty_caches(config: Config, rows: tuple[int, int], length: int, like: KeyValues) -> list[KeyValues]:
    """Each layer's keys and values of `rows` = (Q, G) completions, [Q · K · G, S, H], before any token is drawn.

    The three axes are one, since around an axis of 1, as Q or K often is, XLA copies a cache for every token that it
    writes, on a CPU. The heads and the dtype are those of `like`, keys and values [..., K, S, H] of this shard.
    """
    heads, _, head_dim = like.k.shape[-3:]
    sequences = math.prod(rows) * heads
    zeros = lambda slots: zeros_varying((sequences, slots, head_dim), like.k.dtype, DATA, TENSOR)  # noqa: E731
    return [KeyValues(zeros(slots), zeros(slots)) for slots in cache_slots(config, length)]


def write(cache: jax.Array, new: jax.Array, place: jax.Array) -> jax.Array:
    """Put a token's keys or values [Q, K, G, 1, H] into a cache [Q · K · G, S, H], a ring: place t in slot t mod S."""
    new = new.reshape(-1, 1, new.shape[-1])
    return jax.lax.dynamic_update_slice_in_dim(cache, new, place % cache.shape[1], axis=1)


def cache_bytes(config: Config, prompts: int, group: int, prompt_length: int, length: int, itemsize: int) -> int:
    """Bytes of keys and values while sampling, on one device that holds all heads:

    2 · K · H · itemsize · Σ_layers ( Q · min(P, W_l) + Q · G · min(C, W_l) ),  W_l the layer's window or infinity.
    """
    per_layer = zip(cache_slots(config, prompt_length), cache_slots(config, length), strict=True)
    tokens = sum(prompts * of_prompt + prompts * group * own for of_prompt, own in per_layer)
    return 2 * config.num_kv_heads * config.head_dim * itemsize * tokens


def decode(
    x: jax.Array,
    place: jax.Array,
    layers: list,
    prompts: list[PromptCache],
    caches: list[KeyValues],
    lengths: jax.Array,
    *,
    config: Config,
    lora_scale: float,
) -> tuple[jax.Array, list[KeyValues]]:
    """Run the stack over one new token of every row. x: [Q, G, 1, D]; place: int32[], the token's in its completion.

    layers: per layer a function returning its weights and adapters. Returns the last block's output and the caches with
    the token added.
    """
    positions = (lengths + place)[:, None, None]
    new_caches = []
    kinds = layer_kinds(config)
    for i, (weights, prompt, cache) in enumerate(zip(layers, prompts, caches, strict=True)):
        kind = LayerKind(kinds.window[i], kinds.inverse_frequencies[i])
        slots = cache.k.shape[1]
        places = place - (place - jnp.arange(slots)) % slots  # the newest place each slot holds; negative: none yet
        on_prompt = shared_mask(positions, lengths, prompt.starts, prompt.kv.k.shape[2], kind.window)
        on_own = own_mask(place[None], places, kind.window)

        def attention(q, k, v, prompt=prompt, cache=cache, on_prompt=on_prompt, on_own=on_own):
            own = KeyValues(write(cache.k, k, place), write(cache.v, v, place))
            sets = [(prompt.kv, on_prompt), (own, on_own)]
            return attend(q, sets, scale=config.query_scale, softcap=config.attention_softcap), own

        w, adapters = weights(x)
        x, own = block(x, w, adapters, kind, positions, attention, config=config, lora_scale=lora_scale)
        new_caches.append(own)
    return x, new_caches


class Fixed(NamedTuple):
    """What the token loop reads and never changes, on one device."""

    embedding: jax.Array  # [V / tensor, D], joined over `data`
    final_norm: jax.Array  # [D]
    layers: list[Callable]  # per layer a function returning its weights and adapters, given the hidden state
    prompts: list[PromptCache]
    lengths: jax.Array  # int32[Q]
    row_keys: jax.Array  # PRNG keys [Q, G]
    allowed: jax.Array  # bool[V / tensor]


class Loop(NamedTuple):
    """What a step of the token loop changes."""

    place: jax.Array  # int32[]: how many tokens have been drawn
    token: jax.Array  # int32[Q, G]: the last of them
    done: jax.Array  # bool[Q, G]
    ids: jax.Array  # int32[Q, G, C]
    mask: jax.Array  # bool[Q, G, C]
    logps: jax.Array  # float32[Q, G, C]
    caches: list[KeyValues]  # per layer [Q · K · G, S, H]
    stopped: jax.Array | None = None  # bool[], where the caller listens: whether it wants no more


def tell(loop: Loop, index: jax.Array, on_token: OnToken) -> Loop:
    """Hand this device's newest tokens to the host, and ask it whether to go on; one device's no stops all of them.

    The loop depends on the answer, so the host is asked in the order of the places.
    """
    go_on = io_callback(on_token, jax.ShapeDtypeStruct((), jnp.bool_), loop.place - 1, index, loop.token)
    return loop._replace(stopped=sum_over_tensor(sum_over_data((~go_on).astype(jnp.int32))) > 0)


def draw(hidden: jax.Array, loop: Loop, fixed: Fixed, *, config: Config, sampling: Sampling) -> Loop:
    """Draw each row's next token from the hidden states [Q, G, D] that predict it; stopped rows get padding."""
    logits = logits_of(hidden, fixed.embedding, config=config)
    keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, loop.place)))(fixed.row_keys)
    chosen = choose(jnp.where(fixed.allowed[None, None], logits, -jnp.inf), keys, sampling)
    stats = token_stats(logits / (sampling.temperature or 1.0), chosen, fixed.embedding)
    token = jnp.where(loop.done, config.pad_id, chosen)
    put = partial(jax.lax.dynamic_update_index_in_dim, index=loop.place, axis=2)
    return Loop(
        place=loop.place + 1,
        token=token,
        done=loop.done | (token[..., None] == jnp.array(config.stop_ids)[None, None]).any(axis=-1),
        ids=put(loop.ids, token),
        mask=put(loop.mask, ~loop.done),
        logps=put(loop.logps, jnp.where(loop.done, 0.0, stats.logps)),
        caches=loop.caches,
        stopped=loop.stopped,
    )


def step(loop: Loop, fixed: Fixed, *, config: Config, sampling: Sampling, lora_scale: float) -> Loop:
    """Read every row's last token and draw the next one."""
    x = embed(loop.token, fixed.embedding)[:, :, None]
    x, caches = decode(
        x,
        loop.place - 1,
        fixed.layers,
        fixed.prompts,
        loop.caches,
        fixed.lengths,
        config=config,
        lora_scale=lora_scale,
    )
    hidden = rms_norm(x[:, :, 0], fixed.final_norm, config.norm_eps)
    return draw(hidden, loop._replace(caches=caches), fixed, config=config, sampling=sampling)


def _layer_readers(params: Params, lora: Lora | None, config: Config, gather_once: bool) -> list[Callable]:
    """Per layer a function of the hidden state that returns its weights: joined here, or each time it is called."""
    stack = (params.text.blocks, lora and lora.blocks)

    def weights_of(i: int, after: jax.Array | None = None):
        stacked, _ = jax.lax.optimization_barrier((stack, after))
        w, adapters = jax.tree.map(lambda x: x[i], stacked)
        return layer_weights(w, config), layer_weights(adapters, config)

    def reader(i: int) -> Callable:
        if gather_once:
            joined = weights_of(i)
            return lambda x: joined
        # The barrier makes the gather depend on the token, or the compiler would lift it out of the loop.
        return lambda x: weights_of(i, x)

    return [reader(i) for i in range(config.num_layers)]


def _sample_shard(
    params: Params,
    lora: Lora | None,
    prompts: Prompts,
    key: jax.Array,
    allowed: jax.Array,
    *,
    config: Config,
    group: int,
    length: int,
    sampling: Sampling,
    gather_once: bool,
    on_token: OnToken | None,
) -> Samples:
    prefix = read_prompts(prompts.ids, prompts.soft, params, lora, config=config)
    fold = jax.random.fold_in
    fixed = Fixed(
        embedding=gather_over_data(params.text._replace(blocks=None)).embedding,
        final_norm=params.text.final_norm,
        layers=_layer_readers(params, lora, config, gather_once),
        prompts=prompt_caches(prefix.kv, prefix.lengths, config),
        lengths=prefix.lengths,
        row_keys=jax.vmap(lambda i: jax.vmap(lambda g: fold(fold(key, i), g))(jnp.arange(group)))(prompts.index),
        allowed=allowed,
    )
    rows = (prompts.ids.shape[0], group)
    start = Loop(
        place=jnp.int32(0),
        token=zeros_varying(rows, jnp.int32, DATA),
        done=jnp.broadcast_to((prefix.lengths == 0)[:, None], rows),
        ids=zeros_varying((*rows, length), jnp.int32, DATA) + config.pad_id,
        mask=zeros_varying((*rows, length), jnp.bool_, DATA),
        logps=zeros_varying((*rows, length), jnp.float32, DATA),
        caches=empty_caches(config, rows, length, prefix.kv),
    )

    def unfinished(loop: Loop) -> jax.Array:
        more = (loop.place < length) & (sum_over_data((~loop.done).sum()) > 0)
        return more if loop.stopped is None else more & ~loop.stopped

    def heard(loop: Loop) -> Loop:
        return loop if on_token is None else tell(loop, prompts.index, on_token)

    def advance(loop: Loop) -> Loop:
        lora_scale = lora.scale if lora is not None else 0.0
        return heard(step(loop, fixed, config=config, sampling=sampling, lora_scale=lora_scale))

    first = jnp.broadcast_to(prefix.last_hidden[:, None], (*rows, prefix.hidden.shape[-1]))
    first = heard(draw(first, start, fixed, config=config, sampling=sampling))
    end = jax.lax.while_loop(unfinished, advance, first)
    return Samples(end.ids, end.mask, end.logps, end.done & ~start.done, end.place)


_STATIC = ("config", "mesh", "num_generations", "max_completion_length", "sampling", "gather_once", "on_token")


@partial(jax.jit, static_argnames=_STATIC)
def sample(
    params: Params,
    lora: Lora | None,
    prompts: Prompts,
    key: jax.Array,
    allowed: jax.Array,
    *,
    config: Config,
    mesh: Mesh,
    num_generations: int,
    max_completion_length: int,
    sampling: Sampling = Sampling(),
    gather_once: bool = True,
    on_token: OnToken | None = None,
) -> Samples:
    """Draw `num_generations` completions of each prompt, of at most `max_completion_length` tokens.

    key: the PRNG key of this step; allowed: bool[V], False on ids that must never be drawn (pad, bos, image tokens,
    rows without a piece). Compiled once for all prompts of one padded length. The log-probs returned are those of the
    whole distribution at the sampling temperature, before top-k, top-p and `allowed`, so that they compare with
    `completion_stats`; at temperature 0 they are those of temperature 1.

    Frozen weights stored in parts over `data` are joined once, before the token loop, and lie there a second time, one
    array a layer. `gather_once=False` takes one layer at a time inside it instead: it needs the memory of one layer,
    and moves all weights for every token. `choose_gather` chooses.

    `on_token` listens: every device calls it after each token with the token's place, `prompts.index` of the rows it
    holds and their tokens, and it answers whether to go on; rows that it cuts short are unfinished. Devices that hold
    parts of the same rows all call it. It is static: another function object is another compilation.
    """
    body = partial(
        _sample_shard,
        config=config,
        group=num_generations,
        length=max_completion_length,
        sampling=sampling,
        gather_once=gather_once,
        on_token=on_token,
    )
    in_specs = (
        partition_specs(params, config, mesh),
        partition_specs(lora, config, mesh),
        jax.tree.map(lambda _: P(DATA), prompts),
        P(),
        P(TENSOR),
    )
    out_specs = Samples(P(DATA), P(DATA), P(DATA), P(DATA), P())
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(params, lora, prompts, key, allowed)


def decoding_bytes(
    params: Params, *, config: Config, mesh: Mesh, prompts: int, group: int, prompt_length: int, length: int
) -> int:
    """Bytes that `sample` needs on each device: the weights as stored, the language model's again by layer, the caches.

    params: arrays or shapes; prompts: Q of the whole batch.
    """
    data, tensor = mesh.shape[DATA], mesh.shape[TENSOR]
    specs = partition_specs(params, config, mesh)

    def bytes_of(tree, specs, parts: dict[str, int]) -> int:
        shares = jax.tree.map(lambda spec: math.prod(parts.get(axis, 1) for axis in spec), specs)
        return sum(jax.tree.leaves(jax.tree.map(lambda x, share: x.size * x.dtype.itemsize // share, tree, shares)))

    stored = bytes_of(params, specs, {DATA: data, TENSOR: tensor})
    joined = bytes_of(params.text.blocks, specs.text.blocks, {TENSOR: tensor})
    if data > 1:
        joined += bytes_of(params.text.embedding, specs.text.embedding, {TENSOR: tensor})
    itemsize = params.text.embedding.dtype.itemsize
    caches = cache_bytes(config, -(-prompts // data), group, prompt_length, length, itemsize)
    return stored + joined + caches // min(tensor, config.num_kv_heads)


def choose_gather(needed: int, memory: int | None) -> tuple[bool, str]:
    """`gather_once` for `sample`, and a sentence that says so: whether `needed`, of `decoding_bytes`, fits in `memory`.

    Both are bytes of one device; memory is None where `device_memory` does not know it. A tenth is left for the rest.
    """
    if memory is None:
        return True, f"decoding joins the weights once a rollout and needs {needed / 2**30:.2f} GiB a device"
    share = f"{needed / 2**30:.2f} GiB of {memory / 2**30:.2f} a device"
    if needed <= 0.9 * memory:
        return True, f"decoding joins the weights once a rollout and needs {share}"
    return False, (
        "decoding joins one layer's weights at a time, for every token, which is slower: "
        f"joined at once they would need {share}; a longer tensor axis needs less"
    )


def device_memory() -> int | None:
    """Bytes of memory on one device, or None on a backend that does not say, such as the CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def peak_memory() -> int | None:
    """The most bytes that one device of this process has held so far, or None on a backend that does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


@partial(jax.jit, static_argnames=("config", "mesh"))
def encode(params: Params, pixels: jax.Array, lora: Lora | None = None, *, config: Config, mesh: Mesh) -> jax.Array:
    """The soft tokens [Q, A, M, D] of each prompt's pictures, uint8[Q, A, h, w, 3]."""
    specs = (P(DATA), partition_specs(params, config, mesh), partition_specs(lora, config, mesh))
    body = partial(encode_images, config=config)
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(DATA))(pixels, params, lora)
