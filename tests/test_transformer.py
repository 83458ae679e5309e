"""One block and the stack equal Hugging Face's, and `extend` after `prefill` equals one pass over repeated prompts."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import PAIRS, assert_close, assert_trees_close, drawn, multimodal_pair, normal, one, random_lora, tensor
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model

from gemma3 import transformer
from gemma3.attention import KeyValues, attend, prompt_mask
from gemma3.files.published import CONFIGS
from gemma3.lora import LoraBlock, Policy
from gemma3.mesh import on_one_device
from gemma3.params import Params, Text


def test_layer_kinds_of_gemma_3_27b():
    """Every sixth layer is global: unbounded, base 1e6, positions divided by 8; the others see 1024 keys, base 1e4."""
    kinds = transformer.layer_kinds(CONFIGS["gemma-3-27b-it"])
    assert kinds.window.shape == (62,) and kinds.inverse_frequencies.shape == (62, 64)
    is_global = kinds.window == np.iinfo(np.int32).max
    np.testing.assert_array_equal(np.flatnonzero(is_global), range(5, 62, 6))
    assert (kinds.window[~is_global] == 1024).all()
    pair_of_dims = np.arange(64) / 64
    expected = np.where(is_global[:, None], 1e6**-pair_of_dims / 8, 1e4**-pair_of_dims)
    np.testing.assert_allclose(kinds.inverse_frequencies, expected, rtol=1e-6)


def test_layer_kinds_of_gemma_2_alternate_and_share_one_rope():
    kinds = transformer.layer_kinds(CONFIGS["gemma-2-2b-it"])
    np.testing.assert_array_equal(kinds.window == 4096, np.arange(26) % 2 == 0)
    assert (kinds.inverse_frequencies == kinds.inverse_frequencies[:1]).all()
    assert kinds.inverse_frequencies[0, 64] == np.float32(0.01)


@pytest.mark.parametrize(("model", "layer"), [("text", 0), ("text", 5), ("gemma2", 0), ("gemma2", 1)])
def test_a_block_equals_hugging_face(model, layer):
    """A local layer, a global one, and Gemma 2's two, without q/k norm and with capped scores."""
    hf, config, params = PAIRS[model]()
    w, kind = one(params.text.blocks, layer), one(transformer.layer_kinds(config), layer)
    x, positions = normal(layer, 2, 13, config.hidden_size), np.arange(13)[None, None]
    mask = prompt_mask(jnp.ones((2, 13), bool), jnp.zeros((2, 13), jnp.int32), kind.window)

    rotation = [tensor(x), tensor(positions[0])]
    rotation = hf.model.rotary_emb(*rotation, *([] if model == "gemma2" else [config.layer_types[layer]]))
    hf_mask = torch.zeros(2, 1, 13, 13).masked_fill(~tensor(mask), torch.finfo(torch.float32).min)
    theirs = hf.model.layers[layer](tensor(x), position_embeddings=rotation, attention_mask=hf_mask)

    def run(w, x):
        def attention(q, k, v):
            sets = [(KeyValues(k[:, :, 0], v[:, :, 0]), mask)]
            return attend(q, sets, scale=config.query_scale, softcap=config.attention_softcap), None

        layer = transformer.Layer(w, LoraBlock(), kind)
        return transformer.block(layer, x, positions, attention, config=config)[0]

    assert_close(on_one_device(run)(w, x[:, None])[:, 0], theirs, atol=2e-5)


PROMPT_LENGTHS = np.array([17, 5, 11])
IMAGE_NUMBERS = np.zeros((3, 17), np.int32)  # two images in the first prompt, one in the last, whose window is 8 (or 3)
IMAGE_NUMBERS[0, 2:6], IMAGE_NUMBERS[0, 9:13], IMAGE_NUMBERS[2, 6:10] = 1, 2, 1
VALID = np.arange(17) < PROMPT_LENGTHS[:, None]


@pytest.mark.parametrize("model", PAIRS)
def test_the_stack_equals_hugging_face(model):
    """Ragged prompts, longer than the window; with images, which see themselves both ways, also where they are larger
    than the window. Hugging Face's stack ends with the final norm, a hook takes what comes before."""
    hf, config, params = PAIRS[model]()
    text = hf.model.language_model if config.vision else hf.model
    image_numbers = IMAGE_NUMBERS if config.vision else np.zeros_like(IMAGE_NUMBERS)
    x = normal(7, 3, 17, 48)
    mask = tensor(VALID).long()
    if config.vision:
        mask = create_masks_for_vision_model(text.config, tensor(x), mask, None, None, tensor(image_numbers).long() - 1)
    raw = []
    handle = text.layers[-1].register_forward_hook(lambda _, __, output: raw.append(output))
    text(inputs_embeds=tensor(x), attention_mask=mask, use_cache=False)
    handle.remove()
    ours, kv = on_one_device(transformer.prefill, config=config)(Policy(params), x, VALID, image_numbers)
    assert kv.k.shape == kv.v.shape == (config.num_layers, 3, 2, 17, 16)
    theirs = raw[0].detach().numpy()[VALID]
    assert_close(ours[VALID], theirs, atol=5e-6 * np.abs(theirs).max())


def hidden_of_extend(policy, x, completions, *, config):
    """Each prompt once: [Q, G, T, D]."""
    hidden, kv = transformer.prefill(policy, x, VALID, IMAGE_NUMBERS, config=config)
    return transformer.extend(policy, completions, kv, jnp.asarray(PROMPT_LENGTHS), config=config), hidden


def hidden_of_repetition(policy, x, completions, *, config):
    """The same from one pass over [prompt | completion], the prompt repeated for each of its completions."""
    _, g, t, d = completions.shape
    width = x.shape[1] + t
    both = jnp.concatenate([jnp.repeat(x[:, None], g, axis=1), completions], axis=2)
    positions = np.arange(width)[None, :]
    length = PROMPT_LENGTHS[:, None]
    # Position s of the joined sequence holds prompt token s, or completion token s - length, kept behind all P of them.
    source = np.minimum(np.where(positions < length, positions, positions - length + x.shape[1]), width - 1)
    joined = jnp.take_along_axis(both, jnp.asarray(source)[:, None, :, None], axis=2).reshape(-1, width, d)
    valid = np.repeat(positions < length + t, g, axis=0)
    image_numbers = np.repeat(np.pad(IMAGE_NUMBERS, ((0, 0), (0, t))), g, axis=0)
    hidden, _ = transformer.prefill(policy, joined, valid, image_numbers, config=config)
    hidden = hidden.reshape(-1, g, width, d)
    own = jnp.asarray(length + np.arange(t))[:, None, :, None]
    return jnp.take_along_axis(hidden, own, axis=2), hidden[:, 0, : x.shape[1]]


@cache
def values_and_gradients(function, config):
    """Both outputs, and the gradient of a fixed weighting of both, on a mesh of one device."""

    def run(policy, x, completions, weights, prompt_weights):
        def loss(*arguments):
            hidden, prompt = function(*arguments, config=config)
            return (hidden * weights).sum() + (prompt * prompt_weights).sum(), (hidden, prompt)

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(policy, x, completions)

    return on_one_device(run)


@pytest.mark.parametrize(("group", "adapted"), [(1, False), (3, True)])
def test_extend_after_prefill_equals_one_pass_over_repeated_prompts(group, adapted):
    """Values and gradients, of the embeddings, every block weight and every adapter: ragged prompts with images, and
    completions of 11 tokens, longer than the window of 8, so that later ones have left the prompt behind."""
    _, config, params = multimodal_pair()
    only_blocks = Params(Text(None, params.text.blocks, None), None)  # no other weight takes part
    policy = Policy(only_blocks, random_lora(config) if adapted else None)
    x, completions = normal(1, 3, 17, 48), normal(2, 3, group, 11, 48)
    weights, prompt_weights = normal(3, *completions.shape), normal(4, *x.shape) * VALID[..., None]
    arguments = policy, x, completions, weights, prompt_weights
    (_, ours), our_gradients = values_and_gradients(hidden_of_extend, config)(*arguments)
    (_, theirs), their_gradients = values_and_gradients(hidden_of_repetition, config)(*arguments)
    assert_close(ours[0], theirs[0], atol=3e-5)
    assert_close(ours[1][VALID], theirs[1][VALID], atol=3e-5)
    assert_trees_close(our_gradients, their_gradients)


def test_completions_of_a_group_do_not_see_each_other():
    _, config, params = multimodal_pair()
    x, completions = normal(1, 3, 17, 48), normal(2, 3, 3, 11, 48)
    run = on_one_device(hidden_of_extend, config=config)
    before = run(Policy(params), x, completions)[0]
    changed = completions.copy()
    changed[:, 1, 4:] += 1.0
    after = run(Policy(params), x, changed)[0]
    same = np.abs(np.asarray(after - before)).max(axis=(0, 3)) == 0
    np.testing.assert_array_equal(
        same,
        drawn("""
            1 1 1 1 1 1 1 1 1 1 1
            1 1 1 1 . . . . . . .
            1 1 1 1 1 1 1 1 1 1 1
        """),
    )
