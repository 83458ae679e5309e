"""The small layers equal Hugging Face's modules of the same name, and numbers that can be checked by hand."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import assert_close, normal, tensor
from tiny_models import randomize, tiny_text_config
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3MLP,
    Gemma3RMSNorm,
    Gemma3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from gemma3.files.config_json import config_from_dict
from gemma3.layers import gated_mlp, project, rms_norm, rope
from gemma3.lora import LoraBlock, LoraPair
from gemma3.transformer import layer_kinds


def test_rms_norm_by_hand():
    """[3, 4] has mean square 12.5; a weight of 0 is the identity scale and 1 doubles."""
    x = jnp.array([[3.0, 4.0]])
    assert_close(rms_norm(jnp.array([0.0, 1.0]), x, 0.0), np.array([[3.0, 8.0]]) / 12.5**0.5, atol=1e-6)


def test_rms_norm_adds_eps_inside_the_root():
    """Inputs as small as the eps: sqrt(1e-6 + 1e-6), not 1e-3 + 1e-6."""
    assert_close(rms_norm(jnp.zeros(2), jnp.full((1, 2), 1e-3), 1e-6), np.full((1, 2), 0.5**0.5), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_equals_hugging_face(dtype):
    """In bfloat16 bit for bit: the scale too is applied in float32, and the result is rounded once."""
    module = randomize(Gemma3RMSNorm(dim=13), seed=1).to(getattr(torch, dtype))
    x = tensor(normal(0, 3, 5, 13)).to(getattr(torch, dtype))
    ours = rms_norm(
        jnp.asarray(module.weight.detach().float().numpy(), dtype), jnp.asarray(x.float().numpy(), dtype), module.eps
    )
    assert ours.dtype == dtype
    assert_close(ours, module(x), atol=1e-6 if dtype == "float32" else 0.0)


def test_rope_rotates_halves_against_each_other():
    """Two pairs, (x0, x2) by 90 degrees a position and (x1, x3) by none."""
    x = jnp.arange(1.0, 5.0).reshape(1, 1, 4)
    turned = rope(x, jnp.array([1]), jnp.array([np.pi / 2, 0.0], np.float32))
    assert_close(turned, np.array([[[-3.0, 2.0, 1.0, 4.0]]]), atol=1e-6)


POSITIONS = np.array([[0, 1, 7, 8, 511, 131071, 3], [5, 4, 1000, 2, 0, 0, 77]], np.int32)


@pytest.mark.parametrize("factor", [None, 8.0])
@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_rope_equals_hugging_face_at_given_positions(kind, factor):
    """Local layers (base 1e4, never scaled) and global ones (base 1e6, with and without the factor 8), unordered
    positions. Angles reach 131071 radians, where float32 itself has steps of 0.008: both must round alike."""
    scaling = {"rope_type": "default"} if factor is None else {"rope_type": "linear", "factor": factor}
    hf_config = tiny_text_config(
        rope_parameters={
            "full_attention": scaling | {"rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    )
    config = config_from_dict(hf_config.to_dict())
    frequencies = layer_kinds(config).inverse_frequencies[config.layer_types.index(kind)]
    q, k = normal(1, 2, 7, 4, 16), normal(2, 2, 7, 2, 16)
    cos, sin = Gemma3RotaryEmbedding(hf_config)(tensor(q), tensor(POSITIONS).long(), kind)
    hf_q, hf_k = apply_rotary_pos_emb(tensor(q).transpose(1, 2), tensor(k).transpose(1, 2), cos, sin)
    near = POSITIONS < 10_000
    for ours, theirs in ((rope(q, POSITIONS, frequencies), hf_q), (rope(k, POSITIONS, frequencies), hf_k)):
        theirs = theirs.transpose(1, 2).numpy()
        assert_close(np.asarray(ours)[near], theirs[near], atol=2e-5)
        assert_close(ours, theirs, atol=2e-3)


def test_rope_of_a_score_depends_on_the_distance_only():
    q, k = normal(1, 1, 1, 6), normal(2, 1, 1, 6)
    frequencies = np.array([1.0, 0.1, 0.01], np.float32)
    score = lambda i, j: (rope(q, jnp.array([i]), frequencies) * rope(k, jnp.array([j]), frequencies)).sum()  # noqa: E731
    assert_close(score(9, 4), score(105, 100), atol=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_rope_rotates_in_float32_whatever_the_dtype():
    x = jnp.asarray(normal(0, 5, 1, 4), jnp.bfloat16)
    positions, frequencies = jnp.arange(300, 305), np.array([1.0, 0.5], np.float32)
    ours = rope(x, positions, frequencies)
    assert ours.dtype == jnp.bfloat16
    assert_close(ours, rope(x.astype(jnp.float32), positions, frequencies).astype(jnp.bfloat16), atol=0.0)


class Mlp(NamedTuple):
    gate: object
    up: object
    down: object


def test_gated_mlp_equals_hugging_face():
    """The tolerance tells the tanh form of gelu from the exact one, which is off by 5e-4."""
    module = randomize(Gemma3MLP(tiny_text_config()), seed=2)
    w = Mlp(*(getattr(module, name).weight.detach().numpy().T for name in ("gate_proj", "up_proj", "down_proj")))
    x = normal(3, 2, 5, 48)
    assert_close(gated_mlp(w, x, LoraBlock()), module(tensor(x)))


@pytest.mark.parametrize(
    ("equation", "inputs", "outputs"),
    [("...D,DNH->...NH", (5,), (2, 3)), ("...NH,NHD->...D", (2, 3), (5,)), ("...D,DF->...F", (5,), (7,))],
)
def test_a_projection_with_an_adapter_is_one_with_the_updated_weight(equation, inputs, outputs):
    x, w, a, b = normal(0, 11, 13, *inputs), normal(1, *inputs, *outputs), normal(2, *inputs, 3), normal(3, 3, *outputs)
    update = (a.reshape(-1, 3) @ b.reshape(3, -1)).reshape(w.shape)
    ours = project(w, x, LoraPair(a, b, 0.25), axes=len(inputs))
    assert_close(ours, np.einsum(equation, x, w + 0.25 * update), atol=2e-5)
    assert_close(project(w, x, axes=len(inputs)), np.einsum(equation, x, w), atol=2e-5)


@pytest.mark.parametrize(
    ("equation", "inputs", "outputs"),
    [("...D,DNH->...NH", (5,), (2, 3)), ("...NH,NHD->...D", (2, 3), (5,)), ("...D,DF->...F", (5,), (7,))],
)
def test_the_gradients_of_a_projection_are_those_of_the_updated_weight(equation, inputs, outputs):
    """For x and W as JAX differentiates einsum, for A and B by the chain rule through W + scale * A · B."""
    shapes = (11, 13, *inputs), (*inputs, *outputs), (*inputs, 3), (3, *outputs)
    arrays = [normal(i, *shape) for i, shape in enumerate(shapes)]

    def plain(x, w, a, b):
        return jnp.einsum(equation, x, w + 0.25 * (a.reshape(-1, 3) @ b.reshape(3, -1)).reshape(w.shape))

    ours, pull = jax.vjp(lambda x, w, a, b: project(w, x, LoraPair(a, b, 0.25), axes=len(inputs)), *arrays)
    g = normal(9, *ours.shape)
    jax.tree.map(partial(assert_close, atol=1e-4), pull(g), jax.vjp(plain, *arrays)[1](g))


def test_an_adapter_is_used_in_the_dtype_of_its_input():
    x, w = jnp.ones((2, 5), jnp.bfloat16), jnp.ones((5, 7), jnp.bfloat16)
    pair = LoraPair(jnp.ones((5, 3), jnp.float32), jnp.ones((3, 7), jnp.float32), 0.5)
    assert jax.eval_shape(lambda: project(w, x, pair)).dtype == jnp.bfloat16
