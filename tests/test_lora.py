"""Adapters equal PEFT's: how they start, what they add to each projection, and their gradients."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from oracle import (
    assert_close,
    assert_trees_close,
    hf_logits,
    image_prompts,
    load,
    multimodal_pair,
    random_lora,
    tensor,
    text_pair,
)
from tiny_models import tiny_model, tiny_multimodal_config, tiny_text_config

from gemma3 import model
from gemma3.files.published import CONFIGS
from gemma3.lora import TARGETS, VISION_TARGETS, Lora, LoraConfig, Policy, init_lora, merge
from gemma3.mesh import on_one_device
from gemma3.params import param_shapes

IDS = np.random.default_rng(0).integers(3, 370, (2, 19)).astype(np.int32)
HF_NAMES = {name: f"{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj" for name in TARGETS} | {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


@cache
def peft_model(rslora: bool = False) -> torch.nn.Module:
    """The tiny text model with PEFT's fresh adapter on every projection."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": [f"{name}_proj" for name in TARGETS]}
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_model(tiny_text_config()), peft.LoraConfig(use_rslora=rslora, **settings))


def peft_pair(adapted: torch.nn.Module, name: str, layer: int) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """PEFT's A [r, inputs] and B [outputs, r] of one projection."""
    model = adapted.base_model.model.model
    tower = model.vision_tower.encoder if name in VISION_TARGETS else getattr(model, "language_model", model)
    module = tower.layers[layer].get_submodule(HF_NAMES[name])
    return module.lora_A["default"].weight, module.lora_B["default"].weight


def copy_to_peft(lora: Lora, adapted: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, pair in lora.pairs.items():
            for layer in range(len(pair.a)):
                a, b = peft_pair(adapted, name, layer)
                a.copy_(tensor(pair.a[layer]).flatten(0, -2).T)
                b.copy_(tensor(pair.b[layer]).flatten(1).T)


def peft_gradients(blocks, adapted: torch.nn.Module):
    """The gradients that torch has left in PEFT's parameters, shaped as the pairs of `blocks`."""
    expected = {}
    for name, like in blocks._asdict().items():
        pairs = [peft_pair(adapted, name, layer) for layer in range(len(like.a))]
        a = np.stack([a.grad.numpy().T.reshape(like.a.shape[1:]) for a, _ in pairs])
        b = np.stack([b.grad.numpy().T.reshape(like.b.shape[1:]) for _, b in pairs])
        expected[name] = replace(like, a=a, b=b)
    return type(blocks)(**expected)


def test_an_adapter_starts_as_pefts_does():
    """A is uniform within 1/sqrt(inputs), where `o` has all heads' dims as inputs; B is zero; both are float32."""
    lora = init_lora(jax.random.key(0), text_pair().config, LoraConfig(r=4, alpha=8.0))
    for name, pair in lora.blocks._asdict().items():
        theirs = np.stack([peft_pair(peft_model(), name, layer)[0].detach().numpy() for layer in range(8)])
        ours = np.asarray(pair.a).reshape(8, -1, 4)
        bound = ours.shape[1] ** -0.5
        assert ours.swapaxes(1, 2).shape == theirs.shape and pair.a.dtype == jnp.float32
        assert 0.97 * bound < np.abs(ours).max() <= bound
        assert 0.97 * bound < np.abs(theirs).max() <= bound
        np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.1)
        assert (pair.b == 0).all()


def test_the_projections_and_layers_of_an_adapter_start_differently():
    lora = init_lora(jax.random.key(0), multimodal_pair().config, LoraConfig(r=4, vision=True))
    pairs = [*lora.blocks, *lora.vision]
    first = [np.asarray(pair.a).ravel()[:12] * np.prod(pair.a.shape[1:-1]) ** 0.5 for pair in pairs]
    assert len(np.unique(np.round(first, 5))) == len(TARGETS + VISION_TARGETS) * 12
    assert (lora.blocks.q.a[0] != lora.blocks.q.a[1]).any()


@pytest.mark.parametrize("vision", [False, True])
def test_a_fresh_adapter_is_the_base_model(vision):
    """Up to the different rounding of two programs."""
    _, config, params = multimodal_pair()
    ids, images = image_prompts()
    lora = init_lora(jax.random.key(0), config, LoraConfig(r=4, vision=vision))
    with_adapter = model.forward(Policy(params, lora), ids, images, config=config)
    assert_close(with_adapter, model.forward(params, ids, images, config=config), atol=5e-6)


WEIGHTS = np.random.default_rng(3).standard_normal((*IDS.shape, 384), np.float32)


@cache
def gradient_of_weighted_logits():
    _, config, params = text_pair()

    def loss(lora):
        hidden = model.read_prompts(Policy(params, lora), IDS, None, config=config).hidden
        return (model.logits_of(params.text.embedding, hidden, config=config) * WEIGHTS).sum()

    return on_one_device(jax.grad(loss))


def test_an_adapted_model_equals_pefts_in_logits_and_gradients():
    """The same A, and a B that is not zero, on every projection."""
    adapted, (_, config, params) = peft_model(), text_pair()
    lora = random_lora(config, r=4, alpha=8.0)
    copy_to_peft(lora, adapted)
    theirs = hf_logits(adapted, IDS)
    base = model.forward(params, IDS, config=config)
    assert np.abs(theirs.detach().numpy() - base).max() > 0.1, "the adapter does something"
    assert_close(model.forward(Policy(params, lora), IDS, config=config), theirs)

    (theirs * tensor(WEIGHTS)).sum().backward()
    expected = Lora(peft_gradients(lora.blocks, adapted))
    assert_trees_close(gradient_of_weighted_logits()(lora), expected)


def test_an_adapted_vision_tower_equals_pefts_in_logits_and_gradients():
    """Adapters of both towers, and prompts with images."""
    _, config, params = multimodal_pair()
    ids, images = image_prompts()
    real, packed = ids != 0, model.pack_images(images, ids, config)
    weights = np.random.default_rng(3).standard_normal((*ids.shape, 384), np.float32) * real[..., None]
    lora = random_lora(config, vision=True)
    targets = r".*language_model.*_proj|.*vision_tower.*(_proj|fc1|fc2)"
    base = tiny_model(tiny_multimodal_config())
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    copy_to_peft(lora, adapted)
    theirs = hf_logits(adapted, ids, images)
    ours = model.forward(Policy(params, lora), ids, images, config=config)
    assert_close(ours[real], theirs[torch.from_numpy(real)])
    text_only = model.forward(Policy(params, Lora(lora.blocks)), ids, images, config=config)
    assert np.abs(ours - text_only)[real].max() > 0.02, "the tower's adapter does something"

    def loss(lora):
        policy = Policy(params, lora)
        soft = model.encode_images(policy, packed, config=config)
        hidden = model.read_prompts(policy, ids, soft, config=config).hidden
        return (model.logits_of(params.text.embedding, hidden, config=config) * weights).sum()

    (theirs * tensor(weights)).sum().backward()
    expected = Lora(peft_gradients(lora.blocks, adapted), peft_gradients(lora.vision, adapted))
    assert_trees_close(on_one_device(jax.grad(loss))(lora), expected)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_the_scale_is_pefts(rslora, scale):
    """alpha / r, and alpha / sqrt(r) with rank stabilisation, for r = 4 and alpha = 8."""
    layer = peft_model(rslora).base_model.model.model.layers[0].self_attn.q_proj
    assert LoraConfig(r=4, alpha=8.0, rslora=rslora).scale == layer.scaling["default"] == scale


def test_at_the_start_only_b_has_a_gradient():
    lora = init_lora(jax.random.key(0), text_pair().config, LoraConfig(r=4, alpha=8.0))
    for name, pair in gradient_of_weighted_logits()(lora).blocks._asdict().items():
        assert (pair.a == 0).all(), name
        assert (np.abs(pair.b).reshape(8, -1).max(axis=1) > 0).all(), name


@pytest.mark.parametrize("vision", [False, True])
def test_merging_equals_applying(vision):
    """Ragged prompts with images."""
    _, config, params = multimodal_pair()
    ids, images = image_prompts()
    lora = random_lora(config, vision=vision)
    applied = model.forward(Policy(params, lora), ids, images, config=config)
    merged, real = merge(params, lora), ids != 0
    assert (merged.vision is params.vision) == (not vision)
    assert np.abs(applied - model.forward(params, ids, images, config=config))[real].max() > 0.1
    assert_close(model.forward(merged, ids, images, config=config)[real], applied[real])


def test_merging_equals_pefts_merge_and_unload():
    _, config, params = text_pair()
    adapted = peft.get_peft_model(
        tiny_model(tiny_text_config()),
        peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj"], init_lora_weights=False),
    )
    lora = init_lora(jax.random.key(0), config, LoraConfig(r=3, alpha=6.0, targets=("q", "o")))
    assert list(lora.pairs) == ["q", "o"]
    pairs = {}
    for name in ("q", "o"):
        like, both = getattr(lora.blocks, name), [peft_pair(adapted, name, layer) for layer in range(8)]
        pairs[name] = replace(
            like,
            a=np.stack([a.detach().numpy().T.reshape(like.a.shape[1:]) for a, _ in both]),
            b=np.stack([b.detach().numpy().T.reshape(like.b.shape[1:]) for _, b in both]),
        )
    ours = merge(params, Lora(lora.blocks._replace(**pairs))).text.blocks
    theirs = load(adapted.merge_and_unload())[1].text.blocks
    for name, weight in ours._asdict().items():
        assert_close(weight, getattr(theirs, name), atol=1e-6)
    assert (ours.q != params.text.blocks.q).any() and (ours.k == params.text.blocks.k).all()


def test_merging_rounds_once():
    """bfloat16 weights: the sum is formed in float32, so an update below a weight's own rounding is not lost early."""
    _, config, params = text_pair()
    lora = random_lora(config)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    exact = merge(jax.tree.map(lambda x: x.astype(jnp.float32), rounded), lora).text.blocks
    ours = merge(rounded, lora).text.blocks
    assert ours.q.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours.down, exact.down.astype(jnp.bfloat16))


def test_merging_into_donated_weights_needs_no_second_model():
    """For 4b, by the compiled program's own figures: all weights stay in place, with two layers in float32 beside them.
    In bfloat16 a CPU also copies one stack at a time."""
    config = CONFIGS["gemma-3-4b-it"]
    lora = jax.eval_shape(lambda: init_lora(jax.random.key(0), config, LoraConfig(vision=True)))
    layer = config.hidden_size * config.intermediate_size
    for dtype, copied in ((jnp.float32, 0), (jnp.bfloat16, 2 * config.num_layers * layer)):
        params = param_shapes(config, dtype)
        memory = jax.jit(merge, donate_argnums=0).lower(params, lora).compile().memory_analysis()
        assert memory.alias_size_in_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
        assert memory.temp_size_in_bytes < copied + 2.1 * 4 * layer


PARAMETER_COUNTS = {
    "gemma-3-270m-it": 3_796_992,
    "gemma-3-1b-it": 13_045_760,
    "gemma-3-4b-it": 29_802_496,
    "gemma-3-12b-it": 65_470_464,
    "gemma-3-27b-it": 113_516_544,
    "gemma-2-2b-it": 20_766_720,
}


@pytest.mark.parametrize("name", PARAMETER_COUNTS)
def test_parameter_counts_at_rank_16(name):
    """r * (inputs + outputs) summed over the seven projections and all layers."""
    shapes = jax.eval_shape(lambda: init_lora(jax.random.key(0), CONFIGS[name], LoraConfig()))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == PARAMETER_COUNTS[name]


def test_ranks_and_targets_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"--lora-r 0: the rank must be at least 1"):
        LoraConfig(r=0)
    with pytest.raises(ValueError, match=r"--lora-targets names embed; choose among q, k, v, o, gate, up, down"):
        LoraConfig(targets=("q", "embed"))
    with pytest.raises(ValueError, match=r"--lora-targets names nothing"):
        LoraConfig(targets=())


def test_a_model_without_a_vision_tower_has_none_to_adapt():
    with pytest.raises(ValueError, match="--lora-vision adapts the vision tower, and a gemma3_text model has none"):
        init_lora(jax.random.key(0), text_pair().config, LoraConfig(vision=True))
