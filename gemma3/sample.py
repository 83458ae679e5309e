"""Sampling completions: each prompt is read once, then one compiled loop extends its whole group, token by token.

Everything runs in one `shard_map`. Once the completions that go on fit in a quarter of the rows, they move to a smaller
loop, and the longest of them ends the last. Sampling runs the model code of training, so the log-probs agree.

Randomness is keyed by (key, the prompt's index, completion, t) and by nothing else: but for rounding, a completion does
not depend on the rest of its batch, the mesh or the number of processes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jax.sharding import PartitionSpec as Spec

from gemma3.attention import KeyValues, attend, own_mask, shared_mask
from gemma3.cache import PromptCache, empty_caches, held_tokens, prompt_caches, write
from gemma3.config import Config
from gemma3.filters import Sampling, choose_token
from gemma3.layers import rms_norm
from gemma3.lora import Policy
from gemma3.mesh import DATA, TENSOR, Model, max_over_data, sum_over_data, sum_over_tensor, zeros_varying
from gemma3.model import embed, joined_embedding, log_normaliser, logits_of, read_prompts
from gemma3.transformer import Layer, block, ready, stack

# (t, index int32[Q / data], tokens int32[Q / data, G]) -> whether to go on: see `sample`.
OnToken = Callable[[np.ndarray, np.ndarray, np.ndarray], np.bool_]


class PromptBatch(NamedTuple):
    """Prompts on the mesh, split over `data`."""

    ids: jax.Array  # int32[Q, P], right-padded; a prompt that is all padding is not sampled
    soft: jax.Array | None  # [Q, A, M, D] soft tokens of each prompt's images; None without images
    index: jax.Array  # int32[Q], each prompt's number in the stream it comes from; it keys the randomness
    pixels: jax.Array | None = None  # uint8[Q, A, h, w, 3], kept where the vision tower is trained or adapted


class Completions(NamedTuple):
    """Sampled completions, split over `data`. Ids after a completion's first stop token are the pad id."""

    ids: jax.Array  # int32[Q, G, C]
    mask: jax.Array  # bool[Q, G, C], True through the first stop token
    logps: jax.Array  # float32[Q, G, C], under the whole distribution at the sampling temperature, as the trainer's are
    finished: jax.Array  # bool[Q, G], whether the completion ended with a stop token


def completions_of(ids: jax.Array, logps: jax.Array, config: Config) -> Completions:
    """What the ids alone tell: the pad id is never sampled, so all others are in a completion; a stop id ends it."""
    return Completions(ids, ids != config.pad_id, logps, jnp.isin(ids, np.array(config.stop_ids)).any(axis=-1))


class Fixed(NamedTuple):
    """What a token loop reads and never changes, on one device."""

    embedding: jax.Array  # [V / tensor, D], joined over `data`
    final_norm: jax.Array  # [D]
    layers: list[Callable[[jax.Array], Layer]]  # functions of the hidden state, see `_layers`
    prompts: list[PromptCache]
    prompt_lengths: jax.Array  # int32[Q]
    completion_keys: jax.Array  # PRNG keys [Q, G]
    allowed: jax.Array  # bool[V / tensor]


class Loop(NamedTuple):
    """What each turn of a token loop changes. In a smaller loop Q and G are its bundles and the rows of each."""

    t: jax.Array  # int32[]: how many tokens have been sampled
    done: jax.Array  # bool[Q, G]
    place: jax.Array  # int32[Q, G]: which row of `ids` is this completion's; B, none, where a bundle is not full
    ids: jax.Array  # int32[B, C], of all completions, those that have left the loop as well
    logps: jax.Array  # float32[B, C]
    caches: list[KeyValues]  # per layer [Q · K · G, S, H]
    stopped: jax.Array | None = None  # bool[], whether the caller wants no more; None if it does not listen


def decode(
    fixed: Fixed, x: jax.Array, t: jax.Array, caches: list[KeyValues], *, config: Config
) -> tuple[jax.Array, list[KeyValues]]:
    """Run the stack over token t of every completion. x: [Q, G, 1, D]; t: int32[].

    Returns the last block's output and the caches with the token added.
    """
    positions = (fixed.prompt_lengths + t)[:, None, None]
    new_caches = []
    for layer_after, prompt, cache in zip(fixed.layers, fixed.prompts, caches, strict=True):
        layer = layer_after(x)
        window, num_keys = layer.kind.window, prompt.kv.k.shape[2]
        on_prompt = shared_mask(positions, fixed.prompt_lengths, prompt.starts, num_keys, window)
        on_own = own_mask(t[None], held_tokens(cache.k.shape[1], t - 1), window)
        on_itself = own_mask(t[None], t[None], window)

        def attention(q, k, v, prompt=prompt, cache=cache, on_prompt=on_prompt, on_own=on_own, on_itself=on_itself):
            sets = [(prompt.kv, on_prompt), (cache, on_own), (KeyValues(k, v), on_itself)]
            mixed = attend(q, sets, scale=config.query_scale, softcap=config.attention_softcap)
            return mixed, KeyValues(write(cache.k, k, t, mixed), write(cache.v, v, t, mixed))

        x, own = block(layer, x, positions, attention, config=config)
        new_caches.append(own)
    return x, new_caches


def ask_host(loop: Loop, index: jax.Array, on_token: OnToken) -> Loop:
    """Hand this device's newest tokens to the host, and ask it whether to go on; a no to one device stops all of them.

    The loop depends on the answer, so the host is asked in the order of the tokens.
    """
    newest = loop.ids[:, loop.t - 1].reshape(len(index), -1)
    go_on = io_callback(on_token, jax.ShapeDtypeStruct((), jnp.bool_), loop.t - 1, index, newest)
    return loop._replace(stopped=sum_over_tensor(sum_over_data((~go_on).astype(jnp.int32))) > 0)


def sample_token(fixed: Fixed, loop: Loop, hidden: jax.Array, *, config: Config, sampling: Sampling) -> Loop:
    """Sample each completion's next token from the hidden states [Q, G, D] that predict it, or pad where it stopped."""
    logits = logits_of(fixed.embedding, hidden, config=config) / (sampling.temperature or 1.0)
    keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, loop.t)))(fixed.completion_keys)
    chosen = choose_token(logits, fixed.allowed, keys, sampling)
    highest, log_total = log_normaliser(logits)
    token = jnp.where(loop.done, config.pad_id, chosen.id)

    def put(all_tokens: jax.Array, new: jax.Array) -> jax.Array:
        return all_tokens.at[loop.place, loop.t].set(new, mode="drop")

    return loop._replace(
        t=loop.t + 1,
        done=loop.done | (token[..., None] == jnp.array(config.stop_ids)[None, None]).any(axis=-1),
        ids=put(loop.ids, token),
        logps=put(loop.logps, jnp.where(loop.done, 0.0, chosen.logit - highest - log_total)),
    )


def next_token(fixed: Fixed, loop: Loop, *, config: Config, sampling: Sampling) -> Loop:
    """Read every completion's last token and sample the next one."""
    x = embed(fixed.embedding, loop.ids[loop.place, loop.t - 1])[:, :, None]
    x, caches = decode(fixed, x, loop.t - 1, loop.caches, config=config)
    hidden = rms_norm(fixed.final_norm, x[:, :, 0], config.norm_eps)
    return sample_token(fixed, loop._replace(caches=caches), hidden, config=config, sampling=sampling)


def smaller_sizes(prompts: int, group: int, limit: int) -> list[tuple[int, int]]:
    """The sizes of the loops after that of Q x G rows: bundles x rows in each, about a quarter of the last, at least 8.

    Fewer rows would take as long, since a step reads all weights. Each loop is compiled, which takes as long as many
    steps: with a limit of less than 128 tokens there are no further loops.
    """
    sizes = []
    while prompts * group >= 32 and limit >= 128:
        bundle = -(-group // 4)
        prompts, group = -(-prompts * group // (4 * bundle)), bundle
        sizes.append((prompts, group))
    return sizes


def bundles_needed(done: jax.Array, size: int) -> jax.Array:
    """int32[Q]: how many bundles of `size` rows the completions of each prompt need that have not stopped."""
    return -(-(~done).sum(axis=1) // size)


def to_fewer_rows(fixed: Fixed, loop: Loop, bundles: int, size: int) -> tuple[Fixed, Loop]:
    """Move the completions that have not stopped from Q x G rows to `bundles` x `size`.

    A bundle's rows share a prompt, whose keys are still read once for all of them; a prompt may need several bundles.
    """
    (q, g), going, needed = loop.done.shape, ~loop.done, bundles_needed(loop.done, size)
    target = (jnp.cumsum(needed) - needed)[:, None] * size + jnp.cumsum(going, axis=1) - 1
    target = jnp.where(going, target, bundles * size)  # outside: dropped, like what is cut short and finds no room

    def moved(x: jax.Array, otherwise: int) -> jax.Array:
        return jnp.full(bundles * size, otherwise, x.dtype).at[target].set(x, mode="drop").reshape(bundles, size)

    # Where a bundle is not full, any completion will do.
    prompt, completion = jnp.divmod(moved(jnp.arange(q * g).reshape(q, g), 0), g)

    def moved_cache(cache: jax.Array) -> jax.Array:
        by_row = cache.reshape(q, -1, g, *cache.shape[1:])[prompt, :, completion]  # [bundles, size, K, S, H]
        return by_row.swapaxes(1, 2).reshape(-1, *cache.shape[1:])

    prompts, lengths = jax.tree.map(lambda x: x[prompt[:, 0]], (fixed.prompts, fixed.prompt_lengths))
    keys, place = fixed.completion_keys[prompt, completion], moved(loop.place, len(loop.ids))
    fixed = fixed._replace(prompts=prompts, prompt_lengths=lengths, completion_keys=keys)
    return fixed, loop._replace(done=moved(loop.done, True), place=place, caches=jax.tree.map(moved_cache, loop.caches))


def _layers(policy: Policy, config: Config, gather_once: bool) -> list[Callable[[jax.Array], Layer]]:
    """For each layer a function of the hidden state that returns the layer ready: joined here, or at every call."""
    stacked = stack(policy, config)

    def joined(i: int, after: jax.Array | None = None) -> Layer:
        # The barrier makes the gather depend on `after`; otherwise the compiler would lift it out of the loop.
        (w, lora), _ = jax.lax.optimization_barrier(((stacked.w, stacked.lora), after))
        w, lora, kind = jax.tree.map(lambda x: x[i], (w, lora, stacked.kind))
        return ready(Layer(w, lora, kind), config)

    if gather_once:
        layers = [joined(i) for i in range(config.num_layers)]
        return [lambda x, layer=layer: layer for layer in layers]
    return [partial(joined, i) for i in range(config.num_layers)]


def _sample_shard(
    policy: Policy,
    prompts: PromptBatch,
    key: jax.Array,
    allowed: jax.Array,
    *,
    config: Config,
    sampling: Sampling,
    gather_once: bool,
    on_token: OnToken | None,
) -> Completions:
    """`sample` on one device, with this device's part of every array.

    prompts: ids int32[Q / data, P]; allowed: bool[V / tensor]. Returns [Q / data, G, C].
    """
    prefix = read_prompts(policy, prompts.ids, prompts.soft, config=config)
    rows, limit = (len(prompts.ids), sampling.num_generations), sampling.max_completion_length  # (Q / data, G), C
    fold, completions = jax.random.fold_in, jnp.arange(sampling.num_generations)
    fixed = Fixed(
        embedding=joined_embedding(policy.params),
        final_norm=policy.params.text.final_norm,
        layers=_layers(policy, config, gather_once),
        prompts=prompt_caches(prefix.kv, prefix.lengths, config),
        prompt_lengths=prefix.lengths,
        completion_keys=jax.vmap(lambda i: jax.vmap(lambda g: fold(fold(key, i), g))(completions))(prompts.index),
        allowed=allowed,
    )
    empty = zeros_varying((math.prod(rows), limit), jnp.int32, DATA)
    loop = Loop(
        t=jnp.int32(0),
        done=jnp.broadcast_to((prefix.lengths == 0)[:, None], rows),
        place=jnp.arange(math.prod(rows)).reshape(rows),
        ids=empty + config.pad_id,
        logps=empty.astype(jnp.float32),
        caches=empty_caches(config, rows, limit, prefix.kv),
    )

    def asked(loop: Loop) -> Loop:
        return loop if on_token is None else ask_host(loop, prompts.index, on_token)

    def sample_until(fixed: Fixed, loop: Loop, bundles: int, size: int) -> Loop:
        """Sample until `bundles` of `size` rows have room for what has not stopped, on every device."""
        turn = lambda loop: asked(next_token(fixed, loop, config=config, sampling=sampling))  # noqa: E731

        def crowded(loop: Loop) -> jax.Array:
            more = (loop.t < limit) & (max_over_data(bundles_needed(loop.done, size).sum()) > bundles)
            return more if loop.stopped is None else more & ~loop.stopped

        return jax.lax.while_loop(crowded, turn, loop)

    first = jnp.broadcast_to(prefix.last_hidden[:, None], (*rows, prefix.hidden.shape[-1]))  # [Q / data, G, D]
    loop = asked(sample_token(fixed, loop, first, config=config, sampling=sampling))
    for bundles, size in smaller_sizes(*rows, limit):
        fixed, loop = to_fewer_rows(fixed, sample_until(fixed, loop, bundles, size), bundles, size)
    end = sample_until(fixed, loop, 0, 1)  # with no room at all: until every completion has stopped
    return completions_of(end.ids.reshape(*rows, limit), end.logps.reshape(*rows, limit), config)


@partial(jax.jit, static_argnames=("model", "sampling", "gather_once", "on_token"))
def sample(
    policy: Policy,
    prompts: PromptBatch,
    key: jax.Array,
    allowed: jax.Array,
    *,
    model: Model,
    sampling: Sampling,
    gather_once: bool = True,
    on_token: OnToken | None = None,
) -> Completions:
    """Sample G completions of each prompt, of at most C tokens, as `sampling` says.

    key: the PRNG key of this step; allowed: bool[V], False on ids that must never be sampled (pad, bos, image tokens,
    rows without a piece). Compiled once for all prompts of one padded length. The log-probs returned are those of the
    whole distribution at the sampling temperature, before top-k, top-p and `allowed`, so they can be compared with
    those of `completion_stats`; at temperature 0 they are those of temperature 1.

    By default, the weights stored in parts over `data` are joined once, before the token loop, as a second copy with
    one array per layer. `gather_once=False` joins one layer at a time inside the loop instead: it needs memory for one
    layer only, but moves all weights for every token. `choose_gather` chooses.

    `on_token` listens: after each token, every device calls it with t, `prompts.index` of its prompts and their tokens.
    It returns whether to go on; completions that it cuts short are unfinished. Devices that hold parts of the same
    prompts all call it. It is static: another function object means another compilation.
    """
    static = {"config": model.config, "sampling": sampling, "gather_once": gather_once, "on_token": on_token}
    in_specs = (model.specs(policy), Spec(DATA), Spec(), Spec(TENSOR))
    body = partial(_sample_shard, **static)
    return jax.shard_map(body, mesh=model.mesh, in_specs=in_specs, out_specs=Spec(DATA))(policy, prompts, key, allowed)
