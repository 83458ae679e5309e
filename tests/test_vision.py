"""The vision tower and projector equal Hugging Face's modules of the same name, with the same weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import assert_close, multimodal_pair, normal, one, pair, pixel_values, pixels, tensor
from tiny_models import tiny_multimodal_config

from gemma3 import vision
from gemma3.lora import LoraVisionBlock, Policy
from gemma3.mesh import on_one_device

X = normal(0, 3, 16, 32)  # three images of 4 x 4 patches


@pytest.fixture(scope="module")
def tower():
    return multimodal_pair().hf.model.vision_tower


@pytest.fixture(scope="module")
def params():
    return multimodal_pair().params.vision


def test_patchify_reads_row_by_row():
    """A 2 x 4 image of two patches, one channel: left square, then right square."""
    image = jnp.arange(8.0).reshape(1, 2, 4, 1)
    np.testing.assert_array_equal(vision.patchify(image, 2), [[[0, 1, 4, 5], [2, 3, 6, 7]]])


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_layer_norm_equals_torch(size):
    """Also where the variance is as small as the eps."""
    scale, bias, x = normal(1, 7), normal(2, 7), size * normal(3, 2, 5, 7)
    theirs = torch.nn.functional.layer_norm(tensor(x), (7,), tensor(scale), tensor(bias), 1e-6)
    assert_close(vision.layer_norm(scale, bias, x, 1e-6), theirs)


def test_patch_embedding_equals_hugging_face(tower, params):
    """Values reach several units here: 2e-5 is the noise of a convolution against a matrix product."""
    images = pixels(3)
    assert_close(vision.embed_patches(params, images, 14), tower.embeddings(pixel_values(images)), atol=2e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_equals_hugging_face(tower, params, layer):
    theirs = tower.encoder.layers[layer].self_attn(tensor(X))[0]
    assert_close(vision.vision_attention(one(params.blocks, layer), X, LoraVisionBlock()), theirs)


def test_mlp_equals_hugging_face(tower, params):
    assert_close(vision.vision_mlp(one(params.blocks, 1), X, LoraVisionBlock()), tower.encoder.layers[1].mlp(tensor(X)))


def test_layer_equals_hugging_face(tower, params):
    theirs = tower.encoder.layers[1](tensor(X), None)
    assert_close(vision.vision_block(one(params.blocks, 1), X, LoraVisionBlock(), 1e-6), theirs)


def test_tower_equals_hugging_face(tower, params):
    """`vision_tower` ends after the final norm, as Hugging Face's last_hidden_state does."""
    images = pixels(3)
    encode = on_one_device(partial(vision.vision_tower, lora=LoraVisionBlock(), config=multimodal_pair().config.vision))
    assert_close(encode(params, images), tower(pixel_values=pixel_values(images)).last_hidden_state)


def test_projector_equals_hugging_face(params):
    hf, config, _ = multimodal_pair()
    ours = vision.project_patches(params, X, config.vision)
    assert ours.shape == (3, 4, 48)
    assert_close(ours, hf.model.multi_modal_projector(tensor(X)))


def test_projector_pools_neighbouring_squares():
    """The patches of one 2 x 2 square make one soft token: with an identity projector, their normalised mean."""
    config = multimodal_pair().config.vision
    x = np.zeros((1, 4, 4, 32), np.float32)
    x[0, 2:, :2, 0] = 1.0  # the lower left square: the third of four tokens
    w = multimodal_pair().params.vision._replace(soft_norm=jnp.zeros(32), projector=jnp.eye(32))
    pooled = np.asarray(vision.project_patches(w, x.reshape(1, 16, 32), config))
    np.testing.assert_array_equal(np.abs(pooled).max(axis=-1) > 0, [[False, False, True, False]])


def test_soft_tokens_equal_hugging_face():
    hf, config, params = multimodal_pair()
    images = pixels(5, seed=3)
    theirs = hf.model.get_image_features(pixel_values(images)).pooler_output
    assert_close(on_one_device(vision.soft_tokens, config=config)(Policy(params), images), theirs)


@pytest.mark.parametrize("patches_per_side", [20, 32])
def test_attention_over_more_patches_than_are_taken_at_once(patches_per_side):
    """400 patches, which no power of two divides far, and 1024: values and gradients equal Hugging Face's."""
    size = 2 * patches_per_side
    hf_config = tiny_multimodal_config()
    hf_config.vision_config.image_size, hf_config.vision_config.patch_size = size, 2
    hf_config.mm_tokens_per_image = 16
    hf, _, params = pair(hf_config)
    x = normal(4, 1, patches_per_side**2, 32)
    w, weights = one(params.vision.blocks, 0), normal(5, *x.shape)
    ours, pull_back = jax.vjp(jax.jit(lambda x: vision.vision_attention(w, x, LoraVisionBlock())), x)
    inputs = tensor(x).requires_grad_()
    theirs = hf.model.vision_tower.encoder.layers[0].self_attn(inputs)[0]
    assert_close(ours, theirs)
    (gradient,) = torch.autograd.grad(theirs, inputs, tensor(weights))
    assert_close(pull_back(weights)[0], gradient)
