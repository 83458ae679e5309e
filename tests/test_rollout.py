"""Prompts with and without pictures on a mesh, what is drawn for them, and rows of several rollouts put together."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close, pixels

from gemma3.config import NANO
from gemma3.lora import LoraConfig, init_lora
from gemma3.mesh import DATA, make_mesh, on_one_device, shardings
from gemma3.model import completion_stats, encode_images, init_params
from gemma3.sample import Sampling
from grpo.rollout import Prompt, Rollout, place_prompts, roll_out, take_rows

CONFIG = replace(NANO, num_layers=2, layer_types=("sliding_attention", "full_attention"))
IMAGE = [6, 7, 7, 7, 7, 8]
A, B, C = pixels(3, CONFIG.vision.image_size)
PROMPTS = [
    Prompt([2, 31, *IMAGE, 32, *IMAGE, 33], [A, B]),
    Prompt([2, 41, 42], []),
    Prompt([2, *IMAGE, 51, 52, 53, 54], [C]),
]
INDEX = [11, 3, 7]
LENGTH = 17  # the longest prompt has 15
ALLOWED = np.isin(np.arange(CONFIG.vocab_size), [1, 5, *range(60, 66)])  # few, so that some rows stop early


@cache
def model(mesh):
    """Parameters, and an adapter of both towers that does something, on the mesh."""
    lora = init_lora(jax.random.key(1), CONFIG, LoraConfig(r=3, vision=True))
    lora = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), lora)
    both = init_params(jax.random.key(0), CONFIG), lora
    return jax.device_put(both, shardings(both, CONFIG, mesh))


def place(prompts=PROMPTS, index=INDEX, mesh=(2, 1), **changes):
    mesh = make_mesh(*mesh)
    settings = {"config": CONFIG, "mesh": mesh, "max_prompt_length": LENGTH, "max_images": 2} | changes
    return place_prompts(prompts, index, *model(mesh), **settings)


@cache
def drawn(mesh=(2, 1), places: tuple[int, ...] = (0, 1, 2), key: int = 0) -> Rollout:
    prompts = place([PROMPTS[i] for i in places], [INDEX[i] for i in places], mesh)
    mesh = make_mesh(*mesh)
    settings = {"num_generations": 3, "max_completion_length": 5, "sampling": Sampling()}
    return roll_out(*model(mesh), prompts, jax.random.key(key), ALLOWED, config=CONFIG, mesh=mesh, **settings)


def test_prompts_are_padded_on_the_right_and_filled_up_to_the_data_axis():
    prompts = place()
    assert prompts.ids.shape == (4, LENGTH) and prompts.ids.dtype == jnp.int32
    for row, prompt in zip(np.asarray(prompts.ids), [*PROMPTS, Prompt([], [])], strict=True):
        np.testing.assert_array_equal(row, prompt.ids + [CONFIG.pad_id] * (LENGTH - len(prompt.ids)))
    np.testing.assert_array_equal(prompts.index, [*INDEX, 0])
    split = NamedSharding(make_mesh(2, 1), P(DATA))
    assert all(x.sharding.is_equivalent_to(split, x.ndim) for x in jax.tree.leaves(prompts))
    assert place(mesh=(1, 1)).ids.shape == (3, LENGTH)


def test_each_prompt_gets_the_soft_tokens_of_its_own_pictures_in_order():
    """Two, none and one: room for two in every row. The tower's adapter is used."""
    prompts = place()
    assert prompts.soft.shape == (4, 2, 4, CONFIG.hidden_size) and prompts.pixels is None
    encoder = on_one_device(partial(encode_images, config=CONFIG))
    params, lora = model(make_mesh(1, 1))
    found, pictures = np.asarray(prompts.soft)[[0, 0, 2], [0, 1, 0]], np.stack([A, B, C])[:, None]
    assert_close(found, encoder(pictures, params, lora)[:, 0])
    assert np.abs(found - encoder(pictures, params)[:, 0]).max() > 0.05


def test_pictures_are_kept_only_where_they_are_asked_for():
    kept = place(keep_pixels=True).pixels
    assert kept.shape == (4, 2, 32, 32, 3) and kept.dtype == jnp.uint8
    np.testing.assert_array_equal(np.asarray(kept)[[0, 0, 2], [0, 1, 0]], [A, B, C])
    text = place(PROMPTS[1:2], [3], max_images=0, keep_pixels=True)
    assert text.soft is None and text.pixels is None


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([Prompt([2] * 18, [])], "a prompt has 18 tokens, more than --max-prompt-length 17"),
        ([PROMPTS[1], Prompt(PROMPTS[2].ids, [])], "row 1 has 0 pictures and 4 image tokens"),
        ([PROMPTS[0]._replace(pictures=[A])], "row 0 has 1 pictures and 8 image tokens"),
        ([Prompt([2, 41], [A])], "row 0 has 1 pictures and 0 image tokens"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompts, sentence):
    with pytest.raises(ValueError, match=sentence):
        place(prompts, range(len(prompts)))


def test_every_prompt_but_a_filler_gets_a_group_and_its_log_probs_are_the_trainers():
    rollout, mesh = drawn(), make_mesh(1, 1)
    mask, finished = np.asarray(rollout.completion_mask), np.asarray(rollout.finished)
    assert rollout.completion_ids.shape == (4, 3, 5)
    assert mask[:3, :, 0].all() and not mask[3].any() and not finished[3].any()
    np.testing.assert_array_equal(rollout.lengths, mask.sum(axis=-1))
    stopped = np.isin(rollout.completion_ids, CONFIG.stop_ids).any(axis=-1)
    np.testing.assert_array_equal(finished, stopped)
    assert 0 < stopped[:3].sum() < 9, "some rows should stop and some not"
    stats = on_one_device(partial(completion_stats, config=CONFIG))
    prompts = place(mesh=(1, 1))
    params, lora = model(mesh)
    expected = stats(prompts.ids, prompts.soft, np.asarray(rollout.completion_ids)[:3], params, lora)
    assert_close(np.asarray(rollout.sampler_logps)[mask], expected.logps[mask[:3]])


def test_completions_depend_on_the_prompts_place_and_the_steps_key_alone():
    """Not on what shares the batch, and not on the mesh; another key draws others."""
    whole = drawn()
    part = drawn((1, 1), (2, 0))
    np.testing.assert_array_equal(part.completion_ids, np.asarray(whole.completion_ids)[[2, 0]])
    other = drawn(key=1)
    assert (np.asarray(other.completion_ids) != np.asarray(whole.completion_ids)).any()


def test_rows_of_several_rollouts_are_counted_through_them():
    """Row 5 is row 1 of the second rollout, which has rows 4 to 7."""
    first, second = drawn(), drawn(key=1)
    taken = take_rows([first, second], [0, 2, 5, 6])

    def same(found, a, b):
        expected = np.concatenate([np.asarray(a)[[0, 2]], np.asarray(b)[[1, 2]]])
        np.testing.assert_array_equal(found, expected)
        assert found.sharding.is_equivalent_to(NamedSharding(make_mesh(2, 1), P(DATA)), found.ndim)

    jax.tree.map(same, taken, first, second)
    assert taken.prompts.pixels is None
