"""Filters keep what Hugging Face's keep, with a vocabulary in one part and in eight; samples fit what they keep."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as Spec
from oracle import assert_close
from scipy import stats
from tiny_models import IMAGE_ID
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gemma3.filters import Ranked, Sampling, Vocabulary, below_top_k, block_masses, by_block, choose_token
from gemma3.mesh import TENSOR, gather_over_tensor, make_mesh, tensor_shard

FORBIDDEN = [0, 2, 377, 378, IMAGE_ID]  # pad, bos and what stands for an image
ALLOWED = ~np.isin(np.arange(384), FORBIDDEN)


def kept(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits float32[B, V / tensor] that `choose_token` can choose, -inf elsewhere: every id is asked about."""
    whole = gather_over_tensor(logits.T / sampling.temperature).T
    ids = jnp.broadcast_to(jnp.arange(384), whole.shape)
    rows = jnp.broadcast_to(logits[:, None] / sampling.temperature, (*ids.shape, logits.shape[-1]))
    vocabulary = Vocabulary(by_block(rows), by_block(jnp.ones(logits.shape[-1], bool)))
    above, left = None, True
    if sampling.top_k:
        above = below_top_k(vocabulary, sampling.top_k)
        left = whole >= above.logit
    kept_mass = sampling.top_p * block_masses(vocabulary, above).sum(axis=-1)
    left &= block_masses(vocabulary, Ranked(whole, ids)).sum(axis=-1) < kept_mass
    own = jax.lax.dynamic_slice_in_dim(left, tensor_shard() * logits.shape[-1], logits.shape[-1], axis=1)
    return jnp.where(own, logits / sampling.temperature, -jnp.inf)


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
    """The kept ids and their probabilities, with a vocabulary in one part and in eight; `ties` makes most logits tied.

    torch's sort leaves open which of the tokens that are tied at the edge of the nucleus stay. So the kept ids are
    compared with a stable sort, and the kept logits with the sort as it is.
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
    split = Spec(None, TENSOR)
    ours = jax.shard_map(partial(kept, sampling=sampling), mesh=make_mesh(1, shards), in_specs=split, out_specs=split)
    ours = np.asarray(jax.jit(ours)(logits))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(np.sort(ours), np.sort(as_it_is), rtol=1e-6)
    assert np.isfinite(theirs).sum() < np.isfinite(logits).sum()
    assert_close(jax.nn.softmax(ours), torch.softmax(torch.from_numpy(theirs), dim=-1), atol=1e-6)


def chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    """The p-value of counts sampled from `probs`; ids expected fewer than 10 times are counted as one."""
    expected = probs * counts.sum()
    bins = np.cumsum(expected >= 10) * (expected >= 10)  # 0 for the rare
    found, wanted = np.bincount(bins, counts), np.bincount(bins, expected)
    return stats.chisquare(found[wanted > 0], wanted[wanted > 0]).pvalue


def counts_of(logits: np.ndarray, sampling: Sampling, samples: int, shards: int = 1) -> np.ndarray:
    """How often each id of logits float32[V] was chosen, int[V]."""
    at_once = 500

    def choose(logits, keys):
        rows = jnp.broadcast_to(logits / sampling.temperature, (1, at_once, logits.shape[-1]))
        allowed = jnp.ones(logits.shape, bool)
        return jax.lax.map(lambda keys: choose_token(rows, allowed, keys[None], sampling).id, keys)

    choose = jax.shard_map(choose, mesh=make_mesh(1, shards), in_specs=(Spec(TENSOR), Spec()), out_specs=Spec())
    ids = jax.jit(choose)(logits, jax.random.split(jax.random.key(3), (samples // at_once, at_once)))
    return np.bincount(np.asarray(ids).ravel(), minlength=len(logits))


def peaked(vocab_size: int) -> np.ndarray:
    """Logits of three likely ids among ids of probability 1e-6; every seventh id is forbidden."""
    probs = np.full(vocab_size, 1e-6)
    probs[::7] = 0
    probs[[100, 101, vocab_size // 2]] = [0.6, 0.2, 0]
    probs[vocab_size // 2] = 1 - probs.sum()
    with np.errstate(divide="ignore"):
        return np.log(probs).astype(np.float32)


CASES = {
    "whole vocabulary": (np.random.default_rng(1).standard_normal(384), Sampling()),
    "every filter": (np.random.default_rng(1).standard_normal(384), Sampling(1.5, top_k=50, top_p=0.9)),
    "rare ids": (peaked(4096), Sampling()),
    "rare ids, one block": (peaked(4095), Sampling()),
    "one id left": (np.where(np.arange(384) == 77, 0.0, -np.inf), Sampling()),
    "top-k": (np.random.default_rng(2).standard_normal(2048), Sampling(top_k=600)),
    "top-p": (np.random.default_rng(2).standard_normal(128), Sampling(top_p=0.5)),
    "narrow top-p": (np.random.default_rng(2).standard_normal(64), Sampling(top_p=0.05)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_million_samples_fit_the_filtered_distribution(case):
    """By chi-square against Hugging Face's filters in float64. Ids of probability 1e-6 are counted in eight groups."""
    logits, sampling = CASES[case]
    counts = counts_of(logits.astype(np.float32), sampling, 1_000_000)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    warpers.append(TopKLogitsWarper(sampling.top_k or len(logits)))
    warpers.append(TopPLogitsWarper(sampling.top_p))
    probs = torch.softmax(warpers(None, torch.from_numpy(logits.astype(np.float64))[None]), dim=-1).numpy()[0]
    assert counts[probs == 0].sum() == 0 and counts.sum() == 1_000_000
    rare = (probs > 0) & (probs < 1e-5)
    groups = np.where(rare, np.arange(len(probs)) * 8 // len(probs), 8 + np.arange(len(probs)))
    found, expected = np.bincount(groups, counts), 1_000_000 * np.bincount(groups, probs)
    assert (expected > 0).sum() == 1 or stats.chisquare(found[expected > 0], expected[expected > 0]).pvalue > 0.001


def test_the_same_ids_are_chosen_of_a_vocabulary_in_eight_parts():
    logits, sampling = CASES["every filter"]
    counts = [counts_of(logits.astype(np.float32), sampling, 20_000, shards) for shards in (1, 8)]
    np.testing.assert_array_equal(*counts)


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
