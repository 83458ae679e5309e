"""Sampling draws what Hugging Face draws greedily, and else from the model's own distribution, the same on every mesh.

One tiny model with pictures serves most tests: 8 query heads on 2 key/value heads, a window of 8, two stop ids.
"""

import os
import pickle
import socket
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import Pair, assert_close, load, pair, pixel_values, pixels
from scipy import stats
from tiny_models import IMAGE_ID, tiny_model, tiny_multimodal_config, tiny_text_config
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from benchmarks import roofline
from gemma3.attention import KeyValues
from gemma3.config import CONFIGS
from gemma3.lora import LoraConfig, init_lora
from gemma3.mesh import DATA, TENSOR, make_mesh, on_one_device, partition_specs, topology_mesh
from gemma3.model import completion_stats, pack_images, param_shapes
from gemma3.sample import (
    Prompts,
    Samples,
    Sampling,
    cache_bytes,
    choose,
    choose_gather,
    decoding_bytes,
    device_memory,
    empty_caches,
    encode,
    filter_logits,
    prompt_caches,
    sample,
)

MAX_PROMPT, LENGTH, GROUP, WINDOW = 24, 19, 3, 8
GREEDY, FREE = Sampling(temperature=0.0), Sampling()
FORBIDDEN = [0, 2, 377, 378, IMAGE_ID]  # pad, bos and what stands for a picture
ALLOWED = ~np.isin(np.arange(384), FORBIDDEN)
STOP_IDS = (1, 106)


@cache
def stopping_pair() -> Pair:
    """A model that stops now and then: the rows of both stop ids are longer than others, so their logits vary more."""
    hf = tiny_model(tiny_multimodal_config(num_attention_heads=8, num_hidden_layers=6))
    with torch.no_grad():
        hf.get_input_embeddings().weight[list(STOP_IDS)] *= 1.7
    config, params = load(hf)
    return Pair(hf, replace(config, stop_ids=STOP_IDS), params)


@cache
def adapter():
    """A LoRA adapter that changes the model: B is not zero."""
    lora = init_lora(jax.random.key(1), stopping_pair().config, LoraConfig(r=3))
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), lora)


def ragged_prompts(lengths, num_pictures, seed: int = 0) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Right-padded prompts [Q, P] of random text, with so many pictures each, and the pictures."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((len(lengths), MAX_PROMPT), np.int32)
    pictures = list(pixels(sum(num_pictures), seed=seed))
    for row, length, count in zip(ids, lengths, num_pictures, strict=True):
        row[:length] = rng.integers(3, 377, length)
        row[0] = 2
        for i in range(count):
            row[2 + 8 * i : 8 + 8 * i] = [377, *[IMAGE_ID] * 4, 378]
    return ids, [[pictures.pop() for _ in range(count)] for count in num_pictures]


# Shorter than the window, as long, and longer, with 0, 1 and 2 pictures.
PROMPTS = ragged_prompts([5, 24, 8, 19, 23, 13, 9, 17], [0, 2, 0, 2, 1, 1, 0, 0])


def placed(tree, config, mesh):
    """Parameters split over the mesh as they are stored."""
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(put, tree, partition_specs(tree, config, mesh))


def draw(
    pair: Pair,
    prompts=PROMPTS,
    *,
    mesh=(1, 1),
    lora=None,
    sampling: Sampling = FREE,
    allowed=ALLOWED,
    index=None,
    gather_once: bool = True,
    group: int = GROUP,
    length: int = LENGTH,
) -> Samples:
    ids, pictures = prompts
    mesh = make_mesh(*mesh)
    params, lora = (placed(tree, pair.config, mesh) for tree in (pair.params, lora))
    packed = pack_images(pictures, ids, pair.config, at_least=2)
    soft = None if packed is None else encode(params, packed, config=pair.config, mesh=mesh)
    index = np.arange(len(ids)) if index is None else index
    samples = sample(
        params,
        lora,
        Prompts(ids, soft, index),
        jax.random.key(7),
        allowed,
        config=pair.config,
        mesh=mesh,
        num_generations=group,
        max_completion_length=length,
        sampling=sampling,
        gather_once=gather_once,
    )
    return jax.device_get(samples)


@cache
def greedy() -> Samples:
    return draw(stopping_pair(), sampling=GREEDY)


@cache
def adapted(mesh=(1, 1), gather_once: bool = True) -> Samples:
    """Completions of `PROMPTS` drawn from the whole vocabulary with the adapter."""
    return draw(stopping_pair(), mesh=mesh, lora=adapter(), gather_once=gather_once)


def assert_same(ours: Samples, expected: Samples) -> None:
    np.testing.assert_array_equal(ours.completion_ids, expected.completion_ids)
    np.testing.assert_array_equal(ours.completion_mask, expected.completion_mask)
    np.testing.assert_array_equal(ours.finished, expected.finished)
    assert_close(ours.logps, expected.logps)


@torch.no_grad()
def hf_greedy(pair: Pair, ids: np.ndarray, pictures) -> tuple[np.ndarray, np.ndarray]:
    """Hugging Face's greedy completions [Q, C], 0 after a stop id, and the logits [Q, C, V] of each step."""
    left = np.stack([np.roll(row, (row == 0).sum()) for row in ids])
    inputs = {"input_ids": torch.from_numpy(left).long()}
    inputs["attention_mask"] = (inputs["input_ids"] != 0).long()
    if flat := [picture for row in pictures for picture in row]:
        inputs["pixel_values"] = pixel_values(np.stack(flat))
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE_ID).long()
    out = pair.hf.generate(
        **inputs,
        max_new_tokens=LENGTH,
        do_sample=False,
        eos_token_id=list(pair.config.stop_ids),
        pad_token_id=0,
        suppress_tokens=FORBIDDEN,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, ids.shape[1] :].numpy(), torch.stack(out.logits, dim=1).numpy()


def assert_equals_hf_greedy(samples: Samples, pair: Pair, prompts) -> None:
    """Ids, masks and log-probs of every row of every group; no step may be too close to call."""
    ids, logits = hf_greedy(pair, *prompts)
    steps = ids.shape[1]
    stopped = np.isin(ids, pair.config.stop_ids)
    mask = np.cumsum(stopped, axis=1) - stopped == 0  # through the first stop id
    top = np.sort(np.where(ALLOWED, logits, -np.inf), axis=-1)[mask]
    assert (top[:, -1] - top[:, -2]).min() > 1e-4
    logps = np.take_along_axis(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True), ids[..., None], axis=-1)
    assert samples.steps == steps
    for g in range(samples.completion_ids.shape[1]):
        np.testing.assert_array_equal(samples.completion_ids[:, g, :steps], ids)
        np.testing.assert_array_equal(samples.completion_mask[:, g, :steps], mask)
        np.testing.assert_array_equal(samples.finished[:, g], stopped.any(axis=1))
        assert_close(samples.logps[:, g, :steps], np.where(mask, logps[..., 0], 0.0))


def test_greedy_completions_equal_hugging_face_token_by_token():
    """Ragged prompts with 0, 1 and 2 pictures, some longer than the window, as are some completions; both stop ids."""
    samples = greedy()
    assert_equals_hf_greedy(samples, stopping_pair(), PROMPTS)
    lengths = samples.completion_mask[:, 0].sum(axis=1)
    last = np.take_along_axis(samples.completion_ids[:, 0], lengths[:, None] - 1, axis=1)
    assert set(STOP_IDS) < set(last.ravel().tolist())
    assert lengths.max() == LENGTH > 2 * WINDOW and not samples.finished.all()


@cache
def one_head_pair() -> Pair:
    return pair(tiny_text_config(num_key_value_heads=1, num_hidden_layers=6))


@pytest.mark.parametrize(("mesh", "rows"), [((1, 4), 3), ((1, 2), 3), ((2, 4), 4), ((4, 2), 4)], ids=str)
def test_greedy_with_one_key_value_head_equals_hugging_face(mesh, rows):
    """K = 1: each tensor shard reads the same head. Text only, and where `data` is 1 not a multiple of anything."""
    prompts = ragged_prompts([11, 3, 21, 6][:rows], [0] * rows, seed=3)
    samples = draw(one_head_pair(), prompts, mesh=mesh, sampling=GREEDY, group=1)
    assert_equals_hf_greedy(samples, one_head_pair(), prompts)


@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
def test_log_probs_equal_those_of_one_forward_pass(lora):
    """The sampler's log-prob of each token is the trainer's."""
    params, config = stopping_pair().params, stopping_pair().config
    samples = adapted() if lora else greedy()
    ids, pictures = PROMPTS
    soft = encode(params, pack_images(pictures, ids, config), config=config, mesh=make_mesh(1, 1))
    forward = on_one_device(completion_stats, config=config)
    logps = forward(ids, soft, samples.completion_ids, params, adapter() if lora else None).logps
    assert_close(samples.logps, np.where(samples.completion_mask, logps, 0.0))
    if lora:
        without = forward(ids, soft, samples.completion_ids, params, None).logps
        assert np.abs(np.where(samples.completion_mask, logps - without, 0.0)).max() > 0.1


@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7, top_k=5, top_p=0.9),
        Sampling(1.3, top_k=1),
        Sampling(2.0, top_k=40),
        Sampling(1.0, top_k=10_000, top_p=0.5),
        Sampling(0.9, top_p=0.97),
        Sampling(1.0, top_p=1e-6),
    ],
    ids=str,
)
@pytest.mark.parametrize("ties", [False, True])
def test_filters_keep_what_hugging_face_keeps(sampling, ties, shards, monkeypatch):
    """The kept ids, and their probabilities, of a vocabulary in one part and in eight; with ties, most logits are tied.

    Which of the tokens tied at the edge of the nucleus stay is left open by torch's sort: there the ids are compared
    with a sort that keeps the order of equals, and the kept logits with the sort as it is.
    """
    logits = 3 * np.random.default_rng(5).standard_normal((7, 384), np.float32)
    logits = np.where(ALLOWED, np.round(logits) if ties else logits, -np.inf)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    as_it_is = warpers(None, torch.from_numpy(logits)).numpy()
    monkeypatch.setattr(torch, "sort", partial(torch.sort, stable=True))
    theirs = warpers(None, torch.from_numpy(logits)).numpy()
    split = P(None, TENSOR)
    ours = jax.shard_map(
        partial(filter_logits, sampling=sampling), mesh=make_mesh(1, shards), in_specs=split, out_specs=split
    )
    ours = np.asarray(jax.jit(ours)(logits))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(np.sort(ours), np.sort(as_it_is), rtol=1e-6)
    assert np.isfinite(theirs).sum() < np.isfinite(logits).sum()
    assert_close(jax.nn.softmax(ours), torch.softmax(torch.from_numpy(theirs), dim=-1), atol=1e-6)


def chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    """The p-value of counts drawn from `probs`; ids expected fewer than 10 times are counted as one."""
    expected = probs * counts.sum()
    bins = np.cumsum(expected >= 10) * (expected >= 10)  # 0 for the rare
    found, wanted = np.bincount(bins, counts), np.bincount(bins, expected)
    return stats.chisquare(found[wanted > 0], wanted[wanted > 0]).pvalue


@pytest.mark.parametrize("mesh", [(1, 1), (1, 8)])
def test_sampled_frequencies_fit_the_model(mesh):
    """24,000 completions of one token, from Hugging Face's distribution of it without the forbidden ids."""
    prompts = (PROMPTS[0][3:4], PROMPTS[1][3:4])
    samples = draw(stopping_pair(), prompts, mesh=mesh, group=24_000, length=1)
    _, logits = hf_greedy(stopping_pair(), *prompts)
    probs = np.exp(np.where(ALLOWED, logits[0, 0].astype(np.float64), -np.inf))
    probs /= probs.sum()
    counts = np.bincount(samples.completion_ids.ravel(), minlength=384)
    assert not counts[FORBIDDEN].any()
    assert chi_square(counts, probs) > 0.001
    assert chi_square(counts[ALLOWED], np.roll(probs[ALLOWED], 1)) < 1e-9


def test_draws_at_a_temperature_fit_the_filtered_distribution():
    """24,000 draws with every filter on, of a vocabulary in eight parts."""
    sampling = Sampling(1.5, top_k=50, top_p=0.9)
    logits = np.random.default_rng(1).standard_normal((1, 1, 384), np.float32)
    keys = jax.random.split(jax.random.key(3), (1, 24_000))
    rows = lambda logits: jnp.broadcast_to(logits, (1, 24_000, logits.shape[-1]))  # noqa: E731
    drawn = jax.shard_map(
        lambda logits, keys: choose(rows(logits), keys, sampling),
        mesh=make_mesh(1, 8),
        in_specs=(P(None, None, TENSOR), P()),
        out_specs=P(),
    )
    counts = np.bincount(np.asarray(jax.jit(drawn)(logits, keys)).ravel(), minlength=384)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(1.5), TopKLogitsWarper(50), TopPLogitsWarper(0.9)])
    probs = torch.softmax(warpers(None, torch.from_numpy(logits[0])), dim=-1).double().numpy()[0]
    kept = probs > 0
    assert (counts[kept] > 0).all() and (counts[~kept] == 0).all()
    assert chi_square(counts, probs / probs.sum()) > 0.001


@pytest.mark.parametrize(
    ("mesh", "gather_once"),
    [((2, 1), True), ((1, 2), True), ((2, 4), True), ((8, 1), False), ((4, 2), False), ((1, 8), True)],
    ids=str,
)
def test_completions_are_the_same_on_every_mesh(mesh, gather_once):
    """Prompts, heads, key/value heads and vocabulary split or not; weights joined before the loop or in it."""
    assert_same(adapted(mesh, gather_once), adapted())
    assert len(np.unique(adapted().completion_ids.reshape(-1, LENGTH), axis=0)) == GROUP * len(PROMPTS[0])


def test_a_completion_does_not_depend_on_the_batch():
    """A prompt sampled alone, and the prompts in another order, draw what they drew."""
    ids, pictures = PROMPTS
    alone = draw(stopping_pair(), (ids[3:4], pictures[3:4]), lora=adapter(), index=np.array([3]))
    longest = int(alone.steps)
    assert_same(alone, jax.tree.map(lambda x: x[3:4] if x.ndim else alone.steps, adapted()))
    assert alone.completion_mask[..., longest:].sum() == 0
    order = np.array([5, 2, 7, 0, 3, 6, 1, 4])
    turned = draw(stopping_pair(), (ids[order], [pictures[i] for i in order]), lora=adapter(), index=order)
    assert_same(turned, jax.tree.map(lambda x: x[order] if x.ndim else x, adapted()))


def test_another_key_index_or_completion_draws_other_tokens():
    """Nothing is drawn twice: rows that differ only in what keys their randomness differ."""
    ids, pictures = PROMPTS
    same_prompt = draw(
        stopping_pair(), (np.repeat(ids[3:4], 8, axis=0), [pictures[3]] * 8), lora=adapter(), index=np.arange(3, 11)
    )
    np.testing.assert_array_equal(same_prompt.completion_ids[0], adapted().completion_ids[3])
    assert len(np.unique(same_prompt.completion_ids.reshape(-1, LENGTH), axis=0)) == 8 * GROUP


def test_each_place_has_its_own_randomness():
    """Among eight ids that never end a row, a row repeats its token no more often than it meets its neighbour's."""
    allowed = np.isin(np.arange(384), [20, 33, 150, 200, 250, 310, 350, 383])
    ids = draw(stopping_pair(), lora=adapter(), allowed=allowed).completion_ids
    repeats = (ids[..., 1:] == ids[..., :-1]).mean()
    meetings = (ids[..., 1:] == np.roll(ids, 1, axis=1)[..., :-1]).mean()
    assert abs(repeats - meetings) < 0.08  # 432 pairs each: a standard error of 0.02


def test_one_compilation_serves_prompts_of_all_lengths():
    greedy()
    compiled = sample._cache_size()
    for seed, lengths in enumerate([[3] * 8, [24] * 8, range(2, 10)], start=10):
        prompts = ragged_prompts(lengths, [0] * 8, seed=seed)
        drawn = draw(stopping_pair(), prompts, sampling=GREEDY)
        assert drawn.completion_mask[..., 0].all()
    assert sample._cache_size() == compiled


def test_the_loop_ends_with_the_longest_completion_and_draws_only_what_is_allowed():
    """With eight ids allowed, both stop ids among them, every row stops early: the loop runs no step more."""
    allowed = np.isin(np.arange(384), [*STOP_IDS, 20, 33, 150, 200, 310, 383])
    samples = draw(stopping_pair(), lora=adapter(), allowed=allowed)
    ids, mask = samples.completion_ids, samples.completion_mask
    assert samples.finished.all() and samples.steps == mask.sum(axis=-1).max() < LENGTH
    assert set(np.unique(ids[mask])) <= set(np.flatnonzero(allowed))
    last = np.take_along_axis(ids, mask.sum(axis=-1, keepdims=True) - 1, axis=-1)
    assert set(np.unique(last)) == set(STOP_IDS)
    assert (ids[~mask] == 0).all() and (samples.logps[~mask] == 0).all()


def test_forbidden_ids_are_never_drawn():
    """Of 456 greedy and free draws none is padding, bos or a picture's; the log-prob still counts their share."""
    for samples in (greedy(), adapted()):
        assert not np.isin(samples.completion_ids[samples.completion_mask], FORBIDDEN).any()


def test_a_row_of_padding_is_not_sampled():
    """An empty row fills a batch up: it draws nothing, and the others draw what they drew."""
    ids, pictures = PROMPTS
    empty = draw(stopping_pair(), (np.where(np.arange(8)[:, None] == 2, 0, ids), pictures), lora=adapter())
    assert not any(x[2].any() for x in (empty.completion_mask, empty.completion_ids, empty.finished))
    others = np.arange(8) != 2
    np.testing.assert_array_equal(empty.completion_ids[others], adapted().completion_ids[others])


@pytest.mark.parametrize(("prompt_length", "length"), [(24, 19), (5, 19), (24, 3)])
def test_cache_bytes_are_those_of_the_arrays(prompt_length, length):
    """Prompts and completions longer and shorter than the window of 8; and by hand: five local layers, one global."""
    config = stopping_pair().config
    prompts, dtype = 7, jnp.bfloat16
    kv = KeyValues(*(jax.ShapeDtypeStruct((6, prompts, 2, prompt_length, 16), dtype),) * 2)

    def caches(kv, lengths):
        of_prompts = [cache.kv for cache in prompt_caches(kv, lengths, config)]
        return of_prompts, empty_caches(config, (prompts, GROUP), length, kv)

    arrays = jax.eval_shape(on_one_device(caches), kv, jax.ShapeDtypeStruct((prompts,), jnp.int32))
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    assert cache_bytes(config, prompts, GROUP, prompt_length, length, itemsize=2) == total
    tokens = prompts * (5 * min(prompt_length, 8) + prompt_length) + prompts * GROUP * (5 * min(length, 8) + length)
    assert total == 2 * 2 * 16 * 2 * tokens


def test_decoding_bytes_by_hand():
    """12b in bfloat16: weights in eight parts (the vision tower in four), half the language model, half the caches."""
    config = CONFIGS["gemma-3-12b-it"]
    count = partial(
        decoding_bytes, param_shapes(config, jnp.bfloat16), config=config, group=8, prompt_length=512, length=512
    )
    text, vision = 11_766_034_176, 12_187_325_040 - 11_766_034_176
    expected = 2 * (text / 8 + vision / 4) + 2 * text / 2 + cache_bytes(config, 2, 8, 512, 512, 2) / 2
    assert count(mesh=make_mesh(4, 2), prompts=8) == pytest.approx(expected, rel=1e-3)
    by_layer = text - 1_006_878_720  # whole along data, the embedding need not be joined
    unjoined = 2 * (text / 8 + vision) + 2 * by_layer / 8 + cache_bytes(config, 8, 8, 512, 512, 2) / 8
    assert count(mesh=make_mesh(1, 8), prompts=8) == pytest.approx(unjoined, rel=1e-3)


def test_weights_are_joined_once_where_they_fit():
    """A tenth of the memory is left free; the sentence has the figures."""
    assert choose_gather(9 * 2**30, 10 * 2**30) == (
        True,
        "decoding joins the weights once a rollout and needs 9.00 GiB of 10.00 a device",
    )
    once, why = choose_gather(9 * 2**30 + 1, 10 * 2**30)
    assert not once and "one layer's weights at a time" in why and "9.00 GiB of 10.00" in why
    assert choose_gather(2**40, None)[0]
    assert device_memory() is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "--temperature -0.5: it must be 0 (greedy) or more"),
        ({"top_k": -1}, "--top-k -1: it must be 0 (off) or more"),
        ({"top_p": 0.0}, "--top-p 0.0: it must lie in (0, 1]; 1 is off"),
        ({"top_p": 1.5}, "--top-p 1.5: it must lie in (0, 1]; 1 is off"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError) as refusal:
        Sampling(**settings)
    assert str(refusal.value) == message


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, which holds the TPU compiler, is not installed")
def test_the_decode_loop_fits_a_tpu(monkeypatch):
    """1b compiled by the TPU compiler for eight v5e chips, mesh 2,4: at most `decoding_bytes` a chip, 1.2 GiB of 16.

    Joined in the loop instead, only a few layers' weights are held at once: a chip's share of all is 0.32 GiB.
    """
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    config, mesh = CONFIGS["gemma-3-1b-it"], topology_mesh("v5e:2x4", 2, 4)
    prompts, group, prompt_length, length = 8, 8, 512, 512

    def array(shape, dtype, spec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    shapes = param_shapes(config, jnp.bfloat16)
    params = jax.tree.map(lambda x, spec: array(x.shape, x.dtype, spec), shapes, partition_specs(shapes, config, mesh))
    ids, index = array((prompts, prompt_length), jnp.int32, P(DATA)), array((prompts,), jnp.int32, P(DATA))
    key = array((), jax.random.key(0).dtype, P())
    allowed = array((config.vocab_size,), jnp.bool_, P(TENSOR))

    def bytes_a_chip(gather_once: bool) -> int:
        lowered = sample.lower(
            params,
            None,
            Prompts(ids, None, index),
            key,
            allowed,
            config=config,
            mesh=mesh,
            num_generations=group,
            max_completion_length=length,
            gather_once=gather_once,
        )
        memory = lowered.compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    sizes = {"prompts": prompts, "group": group, "prompt_length": prompt_length, "length": length}
    bound = decoding_bytes(shapes, config=config, mesh=mesh, **sizes)
    assert bytes_a_chip(gather_once=True) <= bound < 1.2 * 2**30
    layers = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes.text.blocks)) // 4
    assert bytes_a_chip(gather_once=False) <= bound - 0.8 * layers


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, which holds the TPU compiler, is not installed")
def test_a_decode_step_moves_little_more_than_it_must(monkeypatch):
    """4b on eight v5e chips: at most 1.10 of the bytes of the weights and of all keys and values, each once."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    row = roofline.count(CONFIGS["gemma-3-4b-it"], roofline.Setting())
    assert row.least == pytest.approx(2.58e9, rel=0.01)
    assert row.least < row.moved <= 1.10 * row.least


# One of two processes: it holds half of the devices, and saves the rows that lie on them.
WORKER = """
import pickle
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gemma3.mesh import DATA, TENSOR, make_mesh, shardings
from gemma3.sample import Prompts, sample

address, rank, folder = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, num_processes=2, process_id=int(rank))
assert (jax.local_device_count(), jax.device_count()) == (4, 8)
with open(f"{folder}/inputs.pickle", "rb") as file:
    config, params, lora, ids, allowed, sizes = pickle.load(file)
mesh = make_mesh(2, 4)
put = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
split = lambda x, *axes: put(x, NamedSharding(mesh, P(*axes)))
params, lora = (jax.tree.map(put, tree, shardings(tree, config, mesh)) for tree in (params, lora))
prompts = Prompts(split(ids, DATA), None, split(np.arange(len(ids)), DATA))
key = jax.random.wrap_key_data(split(np.asarray(jax.random.key_data(jax.random.key(7)))))
samples = sample(params, lora, prompts, key, split(allowed, TENSOR), config=config, mesh=mesh, **sizes)
for name in ("completion_ids", "completion_mask", "logps", "finished"):
    for shard in getattr(samples, name).addressable_shards:
        if shard.replica_id == 0:
            np.save(f"{folder}/{name}.{rank}.{shard.index[0].start or 0}.npy", shard.data)
np.save(f"{folder}/steps.{rank}.npy", samples.steps.addressable_data(0))
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_draw_what_one_does(tmp_path):
    """Mesh 2,4 over two processes of four devices each, prompts and stored weights split between them."""
    pair, (ids, pictures) = stopping_pair(), ragged_prompts([5, 24, 8, 19, 23, 13, 9, 17], [0] * 8)
    expected = draw(pair, (ids, pictures), mesh=(2, 4), lora=adapter())
    sizes = {"num_generations": GROUP, "max_completion_length": LENGTH}
    inputs = (pair.config, *jax.device_get((pair.params, adapter())), ids, ALLOWED, sizes)
    (tmp_path / "inputs.pickle").write_bytes(pickle.dumps(inputs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(rank), str(tmp_path)], cwd=Path(__file__).parents[1], env=env
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()

    def joined(name: str) -> np.ndarray:
        """Both processes' rows, each having saved its own half."""
        (first,), (second,) = (tmp_path.glob(f"{name}.{rank}.*.npy") for rank in range(2))
        assert [first.name, second.name] == [f"{name}.0.0.npy", f"{name}.1.4.npy"]
        return np.concatenate([np.load(first), np.load(second)])

    for name in ("completion_ids", "completion_mask", "finished"):
        np.testing.assert_array_equal(joined(name), getattr(expected, name))
    np.testing.assert_allclose(joined("logps"), expected.logps, rtol=0, atol=1e-5)
    assert [np.load(tmp_path / f"steps.{rank}.npy") for rank in range(2)] == [expected.steps] * 2
