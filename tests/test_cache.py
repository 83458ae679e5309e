"""The memory that keys and values take while sampling, against the arrays and by hand, and the weights beside them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from oracle import pair
from tiny_models import tiny_multimodal_config

from gemma3.attention import KeyValues
from gemma3.cache import empty_caches, prompt_caches
from gemma3.files.published import CONFIGS
from gemma3.filters import Sampling
from gemma3.mesh import Model, make_mesh, on_one_device
from gemma3.params import param_shapes
from grpo.run.memory import cache_bytes, choose_gather, decoding_bytes, device_memory


@pytest.mark.parametrize(("prompt_length", "length"), [(24, 19), (5, 19), (24, 3)])
def test_cache_bytes_are_those_of_the_arrays(prompt_length, length):
    """Prompts and completions longer and shorter than the window of 8; and by hand: five local layers, one global."""
    config = pair(tiny_multimodal_config(num_hidden_layers=6)).config
    prompts, group, dtype = 7, 3, jnp.bfloat16
    kv = KeyValues(*(jax.ShapeDtypeStruct((6, prompts, 2, prompt_length, 16), dtype),) * 2)

    def caches(kv, lengths):
        of_prompts = [cache.kv for cache in prompt_caches(kv, lengths, config)]
        return of_prompts, empty_caches(config, (prompts, group), length, kv)

    arrays = jax.eval_shape(on_one_device(caches), kv, jax.ShapeDtypeStruct((prompts,), jnp.int32))
    sampling = Sampling(num_generations=group, max_completion_length=length)
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    assert cache_bytes(config, prompts, prompt_length, sampling, itemsize=2) == total
    tokens = prompts * (5 * min(prompt_length, 8) + prompt_length) + prompts * group * (5 * min(length, 8) + length)
    assert total == 2 * 2 * 16 * 2 * tokens


def test_decoding_bytes_by_hand():
    """12b in bfloat16: weights in eight parts (the vision tower in four), half the language model, half the caches.

    Enough rows move on to a loop of a quarter of them: 8 x 8 to 8 x 2.
    """
    config, sampling = CONFIGS["gemma-3-12b-it"], Sampling(num_generations=8, max_completion_length=512)
    count = partial(decoding_bytes, param_shapes(config, jnp.bfloat16), prompt_length=512, sampling=sampling)
    text, vision = 11_766_034_176, 12_187_325_040 - 11_766_034_176
    expected = 2 * (text / 8 + vision / 4) + 2 * text / 2 + cache_bytes(config, 2, 512, sampling, 2) / 2
    assert count(Model(config, make_mesh(4, 2)), num_prompts=8) == pytest.approx(expected, rel=1e-3)
    by_layer = text - 1_006_878_720  # all but the embedding, which is whole along data and need not be joined
    caches = cache_bytes(config, 8, 512, sampling, 2) + cache_bytes(
        config, 8, 512, replace(sampling, num_generations=2), 2
    )
    unjoined = 2 * (text / 8 + vision) + 2 * by_layer / 8 + caches / 8
    assert count(Model(config, make_mesh(1, 8)), num_prompts=8) == pytest.approx(unjoined, rel=1e-3)


def test_weights_are_joined_once_where_they_fit():
    """A tenth of the memory is left free; the returned sentence has the figures."""
    assert choose_gather(9 * 2**30, 10 * 2**30) == (
        True,
        "decoding joins the weights once a rollout and needs 9.00 GiB of 10.00 a device",
    )
    once, why = choose_gather(9 * 2**30 + 1, 10 * 2**30)
    assert not once and "one layer's weights at a time" in why and "9.00 GiB of 10.00" in why
    assert choose_gather(2**40, None)[0]
    assert device_memory() is None
