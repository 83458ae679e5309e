"""Prompts with and without images on a mesh, what is sampled for them, and rows of several batches put together."""

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec
from oracle import assert_close, pixels

from gemma3.files.published import NANO
from gemma3.filters import Sampling
from gemma3.lora import LoraConfig, Policy, init_lora
from gemma3.mesh import DATA, Model, make_mesh, on_one_device
from gemma3.model import completion_stats, encode_images
from gemma3.params import init_params
from gemma3.sample import Completions, PromptBatch
from grpo.reader import Prompt, Reader, Row, rounded_up
from grpo.rollout import put_prompts, roll_out, take_rows

CONFIG = replace(NANO, num_layers=2, layer_types=("sliding_attention", "full_attention"))
IMAGE = [6, 7, 7, 7, 7, 8]
A, B, C = pixels(3, CONFIG.vision.image_size)
PROMPTS = [
    Prompt([2, 31, *IMAGE, 32, *IMAGE, 33], [A, B]),
    Prompt([2, 41, 42], []),
    Prompt([2, *IMAGE, 51, 52, 53, 54], [C]),
]
INDEX = [11, 3, 7]
ROWS = [Row(index, None, prompt) for index, prompt in zip(INDEX, PROMPTS, strict=True)]
LENGTH = 17  # the longest prompt has 15
ALLOWED = np.isin(np.arange(CONFIG.vocab_size), [1, 5, *range(60, 66)])  # few, so that some rows stop early


@cache
def policy(mesh) -> Policy:
    """Parameters, and an adapter of both towers that does something, on the mesh."""
    lora = init_lora(jax.random.key(1), CONFIG, LoraConfig(r=3, vision=True))
    lora = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), lora)
    both = Policy(init_params(jax.random.key(0), CONFIG), lora)
    return jax.device_put(both, Model(CONFIG, mesh).shardings(both))


def reader(mesh, max_images: int = 2) -> Reader:
    model, tokenizer = Model(CONFIG, mesh), SimpleNamespace(never_sampled=~ALLOWED)
    return Reader(model, tokenizer, "bare", "answer", max_prompt_length=LENGTH, max_images=max_images)


def put(rows=ROWS, mesh=(2, 1), max_images: int = 2, **settings) -> PromptBatch:
    mesh = make_mesh(*mesh)
    return put_prompts(policy(mesh), rows, reader(mesh, max_images), **settings)


@cache
def sampled(mesh=(2, 1), places: tuple[int, ...] = (0, 1, 2), key: int = 0) -> Completions:
    prompts, mesh = put([ROWS[i] for i in places], mesh), make_mesh(*mesh)
    sampling = Sampling(num_generations=3, max_completion_length=5)
    return roll_out(policy(mesh), prompts, jax.random.key(key), reader(mesh), sampling=sampling)


def test_prompts_are_padded_on_the_right_and_filled_up_to_the_data_axis():
    prompts = put()
    assert prompts.ids.shape == (4, LENGTH) and prompts.ids.dtype == jnp.int32
    for row, prompt in zip(np.asarray(prompts.ids), [*PROMPTS, Prompt([], [])], strict=True):
        np.testing.assert_array_equal(row, prompt.ids + [CONFIG.pad_id] * (LENGTH - len(prompt.ids)))
    np.testing.assert_array_equal(prompts.index, [*INDEX, 0])
    split = NamedSharding(make_mesh(2, 1), Spec(DATA))
    assert all(x.sharding.is_equivalent_to(split, x.ndim) for x in jax.tree.leaves(prompts))
    assert put(mesh=(1, 1)).ids.shape == (3, LENGTH)


def test_each_prompt_gets_the_soft_tokens_of_its_own_images_in_order():
    """The prompts have two, no and one image, and room for two each. The tower's adapter is used."""
    prompts = put()
    assert prompts.soft.shape == (4, 2, 4, CONFIG.hidden_size) and prompts.pixels is None
    encoder = on_one_device(partial(encode_images, config=CONFIG))
    adapted = policy(make_mesh(1, 1))
    found, images = np.asarray(prompts.soft)[[0, 0, 2], [0, 1, 0]], np.stack([A, B, C])[:, None]
    assert_close(found, encoder(adapted, images)[:, 0])
    assert np.abs(found - encoder(Policy(adapted.params), images)[:, 0]).max() > 0.05


def test_images_are_kept_only_where_they_are_asked_for():
    kept = put(keep_pixels=True).pixels
    assert kept.shape == (4, 2, 32, 32, 3) and kept.dtype == jnp.uint8
    np.testing.assert_array_equal(np.asarray(kept)[[0, 0, 2], [0, 1, 0]], [A, B, C])
    text = put(ROWS[1:2], max_images=0, keep_pixels=True)
    assert text.soft is None and text.pixels is None


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([Prompt([2] * 18, [])], "the prompt has 18 tokens, more than --max-prompt-length 17"),
        ([PROMPTS[1], Prompt(PROMPTS[2].ids, [])], "row 1 has 0 images and 4 image tokens"),
        ([PROMPTS[0]._replace(images=[A])], "row 0 has 1 images and 8 image tokens"),
        ([Prompt([2, 41], [A])], "row 0 has 1 images and 0 image tokens"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts, sentence):
    with pytest.raises(ValueError, match=sentence):
        put([Row(index, None, prompt) for index, prompt in enumerate(prompts)])


def test_every_prompt_but_a_filler_gets_a_group_and_its_log_probs_are_the_trainers():
    completions, mesh = sampled(), make_mesh(1, 1)
    ids, mask, finished = (np.asarray(x) for x in (completions.ids, completions.mask, completions.finished))
    assert ids.shape == (4, 3, 5)
    assert mask[:3, :, 0].all() and not mask[3].any() and not finished[3].any()
    stopped = np.isin(ids, CONFIG.stop_ids).any(axis=-1)
    np.testing.assert_array_equal(finished, stopped)
    assert 0 < stopped[:3].sum() < 9, "some rows should stop and some not"
    stats = on_one_device(partial(completion_stats, config=CONFIG))
    prompts = put(mesh=(1, 1))
    expected = stats(policy(mesh), prompts.ids, prompts.soft, ids[:3])
    assert_close(np.asarray(completions.logps)[mask], expected.logps[mask[:3]])


def test_completions_depend_on_the_prompts_index_and_the_steps_key_alone():
    """They do not depend on the rest of the batch or on the mesh; another key gives others."""
    whole = sampled()
    part = sampled((1, 1), (2, 0))
    np.testing.assert_array_equal(part.ids, np.asarray(whole.ids)[[2, 0]])
    other = sampled(key=1)
    assert (np.asarray(other.ids) != np.asarray(whole.ids)).any()


def test_rows_of_several_batches_are_counted_through_them():
    """Row 5 is row 1 of the second batch, which has rows 4 to 7."""
    first, second = (put(), sampled()), (put(), sampled(key=1))
    taken = take_rows([first, second], [0, 2, 5, 6])

    def same(found, a, b):
        expected = np.concatenate([np.asarray(a)[[0, 2]], np.asarray(b)[[1, 2]]])
        np.testing.assert_array_equal(found, expected)
        assert found.sharding.is_equivalent_to(NamedSharding(make_mesh(2, 1), Spec(DATA)), found.ndim)

    jax.tree.map(same, taken, first, second)
    assert taken[0].pixels is None


def test_sizes_are_few_and_waste_at_most_a_fifth():
    sizes = [rounded_up(length, 10_000) for length in range(1, 10_001)]
    assert sorted(set(sizes))[:9] == [32, 40, 48, 56, 64, 80, 96, 112, 128] and len(set(sizes)) == 34
    assert all(length <= size for length, size in zip(range(1, 10_001), sizes, strict=True))
    assert min(length / size for length, size in zip(range(33, 10_001), sizes[32:], strict=True)) > 0.8
    assert [rounded_up(length, 500) for length in (1, 499, 500)] == [32, 500, 500]
