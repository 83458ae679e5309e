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

from gemma3.filters import Sampling, choose_token, filter_logits
from gemma3.mesh import TENSOR, make_mesh

FORBIDDEN = [0, 2, 377, 378, IMAGE_ID]  # pad, bos and what stands for an image
ALLOWED = ~np.isin(np.arange(384), FORBIDDEN)


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
    ours = jax.shard_map(
        partial(filter_logits, sampling=sampling), mesh=make_mesh(1, shards), in_specs=split, out_specs=split
    )
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


def test_samples_at_a_temperature_fit_the_filtered_distribution():
    """24,000 samples with every filter on, of a vocabulary in eight parts."""
    sampling = Sampling(1.5, top_k=50, top_p=0.9)
    logits = np.random.default_rng(1).standard_normal((1, 1, 384), np.float32)
    keys = jax.random.split(jax.random.key(3), (1, 24_000))
    rows = lambda logits: jnp.broadcast_to(logits, (1, 24_000, logits.shape[-1]))  # noqa: E731
    sampled = jax.shard_map(
        lambda logits, keys: choose_token(rows(logits), keys, sampling),
        mesh=make_mesh(1, 8),
        in_specs=(Spec(None, None, TENSOR), Spec()),
        out_specs=Spec(),
    )
    counts = np.bincount(np.asarray(jax.jit(sampled)(logits, keys)).ravel(), minlength=384)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(1.5), TopKLogitsWarper(50), TopPLogitsWarper(0.9)])
    probs = torch.softmax(warpers(None, torch.from_numpy(logits[0])), dim=-1).double().numpy()[0]
    kept = probs > 0
    assert (counts[kept] > 0).all() and (counts[~kept] == 0).all()
    assert chi_square(counts, probs / probs.sum()) > 0.001


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
