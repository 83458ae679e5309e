"""What is split how, the collectives against numpy, and what is refused, in the words a user reads."""

from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as Spec

from gemma3.files.published import CONFIGS, NANO
from gemma3.lora import LoraConfig, init_lora
from gemma3.mesh import (
    DATA,
    TENSOR,
    Model,
    copy_to_tensor,
    gather_over_data,
    make_mesh,
    max_over_tensor,
    min_over_tensor,
    own_kv_heads,
    split_axes,
    sum_over_data,
    sum_over_tensor,
    tensor_shard,
)
from gemma3.params import Params, init_params, param_shapes
from grpo.run.devices import check_mesh


@pytest.mark.parametrize("name", ["gemma-3-1b-it", "gemma-3-4b-it", "gemma-3-12b-pt", "gemma-3-27b-it", "gemma-2-9b"])
@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (4, 2)])
def test_published_models_split_evenly(name, shape):
    """Every axis divides, and a device stores an eighth of the language model, but more of k and v if K < tensor."""
    config, (data, tensor), mesh = CONFIGS[name], shape, make_mesh(*shape)
    model, params = Model(config, mesh), param_shapes(config)
    check_mesh(model)

    def share(x, spec: Spec) -> int:
        parts = [mesh.shape[axis] if axis else 1 for axis in spec]
        assert all(size % n == 0 for size, n in zip(x.shape, parts, strict=False)), (x.shape, spec)
        return x.size // int(np.prod(parts))

    stored = sum(jax.tree.leaves(jax.tree.map(share, params, model.specs(params)).text))
    total = sum(x.size for x in jax.tree.leaves(params.text))
    kv = params.text.blocks.k.size + params.text.blocks.v.size
    kv_stored = kv / data / (tensor if config.num_kv_heads >= tensor else 1)
    assert stored == pytest.approx((total - kv) / 8 + kv_stored, rel=0.002)  # norms are whole on every device


def test_key_value_heads_are_whole_where_there_are_fewer_than_shards():
    params = param_shapes(NANO)
    for shape, split in (((2, 1), TENSOR), ((2, 4), None)):
        blocks = Model(NANO, make_mesh(*shape)).specs(params).text.blocks
        assert blocks.k == blocks.v == Spec(None, DATA, split, None)
        assert blocks.q == Spec(None, DATA, TENSOR, None)


def test_an_adapter_is_split_as_its_layer():
    """A has the weight's input axes and B its output axes, as their shapes show; in the vision tower too."""
    config = replace(NANO, num_kv_heads=4)
    lora = jax.eval_shape(partial(init_lora, config=config, lora=LoraConfig(r=3, vision=True)), jax.random.key(0))
    weights, specs = map(Model(config, make_mesh(2, 4)).specs, (param_shapes(config), lora))
    parts = (weights.text, specs.blocks, lora.blocks), (weights.vision, specs.vision, lora.vision)
    for whole, adapters, shapes in parts:
        for name, pair in adapters._asdict().items():
            joined = (*pair.a[:-1], *pair.b[2:])  # without the rank, and B's second L
            assert joined == tuple(getattr(whole.blocks, name)), name
            assert (pair.a[-1], pair.b[1]) == (None, None)
            arrays = getattr(shapes, name)
            assert len(arrays.a.shape) == len(pair.a) and len(arrays.b.shape) == len(pair.b)


def test_gathering_joins_what_is_stored_in_parts():
    """On mesh 4,2 each shard holds a quarter of an axis, and all of it after the gather; blocks go layer by layer."""
    mesh, params = make_mesh(4, 2), init_params(jax.random.key(0), NANO)
    specs = Model(NANO, mesh).specs(params)
    joined_specs = jax.tree.map(lambda spec: Spec(*(None if axis == DATA else axis for axis in spec)), specs)

    def join(params):
        rest = [gather_over_data(part._replace(blocks=None)) for part in params]
        blocks = [jax.lax.map(gather_over_data, part.blocks) for part in params]
        return Params(*(part._replace(blocks=stack) for part, stack in zip(rest, blocks, strict=True)))

    gather = jax.shard_map(join, mesh=mesh, in_specs=(specs,), out_specs=joined_specs, check_vma=False)
    for ours, stored in zip(jax.tree.leaves(jax.jit(gather)(params)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, stored)

    def layer_shapes(blocks):
        joined = gather_over_data(jax.tree.map(lambda x: x[0], blocks))
        assert joined.q.shape == (64, 2, 16) and joined.down.shape == (128, 64) and joined.q_norm.shape == (16,)
        return joined.q

    blocks, block_specs = params.text.blocks, specs.text.blocks
    first = jax.shard_map(
        layer_shapes, mesh=mesh, in_specs=(block_specs,), out_specs=Spec(None, TENSOR, None), check_vma=False
    )
    np.testing.assert_array_equal(jax.jit(first)(blocks), blocks.q[0])


def over_mesh(function, data: int, tensor: int, x, in_specs: Spec, out_specs: Spec) -> np.ndarray:
    mesh = make_mesh(data, tensor)
    return np.asarray(jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs))(x))


def test_collectives_over_the_named_axis():
    """Over 2 by 4 shards of one number each."""
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    per_row = partial(over_mesh, data=2, tensor=4, x=x, in_specs=Spec(DATA, TENSOR), out_specs=Spec(DATA, None))
    np.testing.assert_allclose(per_row(sum_over_tensor), x.sum(1, keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(per_row(max_over_tensor), x.max(1, keepdims=True))
    np.testing.assert_array_equal(per_row(min_over_tensor), x.min(1, keepdims=True))
    over_rows = over_mesh(sum_over_data, 2, 4, x, Spec(DATA, TENSOR), Spec(None, TENSOR))
    np.testing.assert_allclose(over_rows, x.sum(0, keepdims=True), rtol=1e-6)


def test_the_gradient_of_a_copy_is_summed_over_the_shards_that_used_it_once():
    """Each of four shards uses x more than once, in its own way; the gradient has all of these uses, and one psum."""
    x = np.array([0.5, -2.0], np.float32)

    def gradient(x):
        def loss(x):
            h = copy_to_tensor(x)
            return sum_over_tensor((tensor_shard() * h[0] + 10 * h[1] + h[0] ** 2).sum())

        return jax.grad(loss)(x)

    found = jax.shard_map(gradient, mesh=make_mesh(1, 4), in_specs=Spec(), out_specs=Spec())
    np.testing.assert_allclose(jax.jit(found)(x), [0 + 1 + 2 + 3 + 4 * 2 * 0.5, 4 * 10], rtol=1e-6)
    assert jax.jit(found).lower(x).as_text().count("stablehlo.all_reduce") == 1


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_each_shard_gets_the_key_value_head_of_its_query_heads(kv_heads):
    """Eight query heads over four shards, two each: query head n uses key/value head n // (8 / K)."""
    weight = np.arange(kv_heads, dtype=np.float32)[None].repeat(3, axis=0)  # [D, K], each head its own number
    spec = Spec(None, TENSOR) if kv_heads >= 4 else Spec(None, None)

    def own(weight):
        heads = own_kv_heads(weight, kv_heads, axis=1)
        return heads + 0 * tensor_shard()  # differs between shards, whatever the input's split

    ours = over_mesh(own, 1, 4, weight, spec, Spec(None, TENSOR))
    needed = np.arange(8).reshape(4, 2) // (8 // kv_heads)  # [shards, query heads of each]
    for shard, heads in enumerate(np.split(ours[0], 4)):
        np.testing.assert_array_equal(heads, np.unique(needed[shard]))


def refusal(call) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    message = "--mesh 3,4 needs 12 devices and there are 8; --virtual-devices 12 simulates them on a CPU"
    assert refusal(lambda: make_mesh(3, 4)) == message
    assert refusal(lambda: make_mesh(0, 4)) == "--mesh 0,4: both numbers must be at least 1"


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({}, (1, 8), "cannot split the query heads, 4, into 8 parts; choose a tensor axis that divides 4"),
        ({"intermediate_size": 258}, (2, 4), "cannot split the MLP width, 258, into 4 parts; choose a tensor axis"),
        ({"vocab_size": 446}, (2, 4), "cannot split the vocabulary's blocks, 2, into 4 parts; choose a tensor axis"),
        ({"hidden_size": 63}, (2, 2), "cannot split the model width, 63, into 2 parts; choose a data axis"),
        ({"vision": replace(NANO.vision, hidden_size=68)}, (8, 1), "cannot split the vision width, 68, into 8 parts"),
        ({"num_heads": 12, "num_kv_heads": 3}, (1, 4), "cannot share 3 key/value heads over 4 parts"),
    ],
)
def test_a_model_that_does_not_divide_is_refused_with_the_numbers(changes, shape, message):
    model = Model(replace(NANO, **changes), make_mesh(*shape))
    assert f"--mesh {shape[0]},{shape[1]} {message}" in refusal(lambda: check_mesh(model))


def divides(config, data: int, tensor: int) -> bool:
    """Whether every array of the model and its adapter splits evenly, and the query heads of each tensor shard find
    their key/value heads on it."""
    model = Model(config, AbstractMesh((data, tensor), (DATA, TENSOR)))
    lora = LoraConfig(r=3, vision=config.vision is not None)
    arrays = param_shapes(config), jax.eval_shape(partial(init_lora, config=config, lora=lora), jax.random.key(0))
    splits = zip(*map(jax.tree.leaves, (arrays, model.specs(arrays))), strict=True)
    if any(n % model.mesh.shape[axis] for x, spec in splits for n, axis in zip(x.shape, spec, strict=False) if axis):
        return False
    needed = np.arange(config.num_heads).reshape(tensor, -1) * config.num_kv_heads // config.num_heads
    held = max(1, config.num_kv_heads // tensor)
    return all(len(np.unique(heads)) == held for heads in needed)


@pytest.mark.parametrize("name", ["nano", "gemma-3-1b-it", "gemma-3-4b-it", "gemma-3-27b-it", "gemma-2-2b"])
def test_exactly_the_meshes_that_cannot_split_a_model_are_refused(name):
    """Up to 256 devices along `data` and 32 along `tensor`, also numbers that are no power of two."""
    config, refused = CONFIGS[name], set()
    shapes = set(product((1, 2, 3, 4, 6, 8, 9, 12, 16, 32, 64, 256), (1, 2, 3, 4, 6, 8, 16, 32)))
    for shape in shapes:
        try:
            check_mesh(Model(config, AbstractMesh(shape, (DATA, TENSOR))))
        except ValueError:
            refused.add(shape)
    assert refused == {shape for shape in shapes if not divides(config, *shape)}
    assert 0 < len(refused) < len(shapes)


def test_the_rule_splits_every_array_that_is_not_small():
    """A parameter that it leaves alone would silently be held whole by every device."""
    paths = jax.tree_util.tree_flatten_with_path(param_shapes(NANO, jnp.bfloat16))[0]
    for path, x in paths:
        name = path[-1].name
        small = "norm" in name or "bias" in name
        assert any(split_axes(name)) != small, (name, x.shape)
