"""The whole model equals Hugging Face's in logits, gradients and log-probs, on one device and on a mesh of eight."""

import copy
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as Spec
from layerwise import first_difference
from oracle import (
    PAIRS,
    assert_close,
    assert_trees_close,
    by_row,
    gradients,
    hf_logits,
    image_prompts,
    multimodal_pair,
    normal,
    pair,
    pixels,
    random_lora,
    sharded,
    tensor,
    text_pair,
)
from tiny_models import IMAGE_ID, tiny_multimodal_config
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from gemma3 import model
from gemma3.files.published import CONFIGS
from gemma3.lora import Policy
from gemma3.mesh import DATA, on_one_device, sum_over_data
from gemma3.params import Params, init_params, param_shapes

ROWS = Spec(DATA)


def prompts_of(name: str):
    """Ragged prompts longer than the window, with images where the model reads them."""
    ids, images = image_prompts()
    return (ids, images) if name in ("images", "narrow") else (np.where(ids == IMAGE_ID, 9, ids), None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embedding_equals_hugging_face(dtype):
    """sqrt(48) = 6.928 is rounded to the dtype of the table first (6.9375 in bfloat16), so rows agree bit for bit."""
    module = Gemma3TextScaledWordEmbedding(11, 48, 0, embed_scale=48**0.5)
    module.weight.data = tensor(normal(0, 11, 48))
    module = module.to(getattr(torch, dtype))
    ids = np.array([[3, 1, 10], [0, 7, 3]])
    table = jnp.asarray(module.weight.detach().float().numpy(), dtype)
    ours = on_one_device(model.embed)(table, ids)
    assert ours.dtype == dtype
    assert_close(ours, module(tensor(ids)), atol=1e-6 if dtype == "float32" else 0.0)


@pytest.mark.parametrize(
    ("width", "factor"),
    [(640, 25.25), (1152, 34.0), (2560, 50.5), (3840, 62.0), (5376, 73.5), (2304, 48.0), (3584, 59.75), (4608, 68.0)],
)
def test_embedding_factor_in_bfloat16_at_every_published_width(width, factor):
    row = on_one_device(model.embed)(jnp.ones((2, width), jnp.bfloat16), np.array([0]))
    assert (row == factor).all()


def test_soft_tokens_go_where_hugging_face_scatters_them():
    """Two images, none, one, and one at the very start; text keeps its embedding."""
    ids, images = image_prompts()
    x, soft = normal(1, *ids.shape, 48), normal(2, 4, 4, 48)
    where = (tensor(ids) == IMAGE_ID)[..., None].expand(-1, -1, 48)
    theirs = tensor(x).masked_scatter(where, tensor(soft))
    assert_close(model.insert_soft_tokens(x, ids, by_row(soft, images), IMAGE_ID), theirs, atol=0.0)


@pytest.mark.parametrize("name", PAIRS)
def test_logits_equal_hugging_face(name):
    """0, 1 and 2 images in one batch; a window smaller than an image ("narrow"); Gemma 2 with caps that bite."""
    hf, config, params = PAIRS[name]()
    ids, images = prompts_of(name)
    real = ids != 0
    theirs = hf_logits(hf, ids, images).detach().numpy()
    ours = model.forward(params, ids, images, config=config)
    assert ours.shape == (4, 21, 384) and ours.dtype == jnp.float32
    assert theirs.std() > 0.1
    assert_close(ours[real], theirs[real])


def test_a_prompt_alone_has_the_logits_it_has_in_a_batch():
    _, config, params = multimodal_pair()
    ids, images = image_prompts()
    together = model.forward(params, ids, images, config=config)
    alone = model.forward(params, ids[2:3, :16], images[2:3], config=config)
    assert_close(together[2:3, :16], alone)


@pytest.mark.parametrize("name", ["text", "images", "gemma2"])
def test_layerwise_finds_no_difference_between_equal_models(name):
    assert first_difference(PAIRS[name](), *prompts_of(name)) is None


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("vision_tower.embeddings.patch_embedding", "vision embedding"),
        ("vision_tower.encoder.layers.1.mlp.fc1", "vision layer 1"),
        ("multi_modal_projector.mm_soft_emb_norm", "projector"),
        ("language_model.layers.3.self_attn.k_norm", "layer 3"),
        ("language_model.layers.5.mlp.up_proj", "layer 5"),
        ("language_model.norm", "final norm"),
    ],
)
def test_layerwise_names_the_first_layer_that_differs(module, layer):
    changed = copy.deepcopy(multimodal_pair().hf)
    weight = changed.model.get_submodule(module).weight
    weight.data += 1e-2
    assert first_difference(multimodal_pair()._replace(hf=changed), *image_prompts()) == layer


@pytest.mark.parametrize("name", ["text", "images", "gemma2"])
def test_gradients_of_a_language_model_loss_equal_torch_autograd(name):
    """For every parameter, text and vision; the loss is the mean of -log p(next token) over real tokens."""
    hf, config, params = PAIRS[name]()
    ids, images = prompts_of(name)
    targets = ids[:, 1:]
    counted = (targets != 0).astype(np.float32)
    logps = hf_logits(hf, ids, images)[:, :-1].log_softmax(-1)
    chosen = logps.gather(-1, tensor(targets).long()[..., None])[..., 0]
    loss = -(chosen * tensor(counted)).sum() / counted.sum()

    def ours(params, ids, pixels):
        soft = None if pixels is None else model.encode_images(Policy(params), pixels, config=config)
        hidden = model.read_prompts(Policy(params), ids, soft, config=config).hidden[:, :-1]
        logits = model.logits_of(params.text.embedding, hidden, config=config)
        logps = model.token_stats(logits, ids[:, 1:]).logps
        return -(logps * counted).sum() / counted.sum()

    packed = model.pack_images(images, ids, config) if images else None
    value, gradient = on_one_device(jax.value_and_grad(ours))(params, ids, packed)
    assert_close(value, loss)
    assert_trees_close(gradient, gradients(hf, loss))


GROUP, STEPS, TEMPERATURE = 3, 11, 0.7
COMPLETIONS = np.random.default_rng(8).integers(3, 370, (4, GROUP, STEPS)).astype(np.int32)


def joined(ids: np.ndarray, images):
    """One right-padded row for each completion, behind a copy of its prompt and images; and the positions of the logits
    of the completion's tokens, [Q * G, C]."""
    lengths = (ids != 0).sum(axis=1)
    rows = np.zeros((len(ids) * GROUP, ids.shape[1] + STEPS), np.int32)
    for row, (q, g) in zip(rows, np.ndindex(len(ids), GROUP), strict=True):
        row[: lengths[q]] = ids[q, : lengths[q]]
        row[lengths[q] : lengths[q] + STEPS] = COMPLETIONS[q, g]
    positions = np.repeat(lengths, GROUP)[:, None] - 1 + np.arange(STEPS)
    return rows, images and [row for row in images for _ in range(GROUP)], positions


@cache
def hf_stats(name: str) -> tuple[np.ndarray, np.ndarray]:
    """log_softmax of Hugging Face's full logits over the temperature, at the completions, and its entropy."""
    rows, images, positions = joined(*prompts_of(name))
    with torch.no_grad():
        logits = hf_logits(PAIRS[name]().hf, rows, images) / TEMPERATURE
    logps = logits[torch.arange(len(rows))[:, None], tensor(positions)].log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    chosen = logps.gather(-1, tensor(COMPLETIONS).long().reshape(-1, STEPS)[..., None])[..., 0]
    return chosen.numpy().reshape(COMPLETIONS.shape), entropy.numpy().reshape(COMPLETIONS.shape)


def our_stats(name: str, **settings) -> model.TokenStats:
    _, config, params = PAIRS[name]()
    ids, images = prompts_of(name)
    packed = model.pack_images(images, ids, config) if images else None

    def run(policy, ids, pixels):
        soft = None if pixels is None else model.encode_images(policy, pixels, config=config)
        return model.completion_stats(policy, ids, soft, COMPLETIONS, config=config, **settings)

    return on_one_device(run)(Policy(params), ids, packed)


@pytest.mark.parametrize("name", PAIRS)
def test_completion_stats_equal_log_softmax_of_hugging_faces_full_logits(name):
    """Prompts read once, G = 3 completions longer than the window, against one pass over each joined sequence."""
    logps, entropy = hf_stats(name)
    ours = our_stats(name, temperature=TEMPERATURE)
    assert ours.logps.shape == ours.entropy.shape == (4, GROUP, STEPS)
    assert_close(ours.logps, logps)
    assert_close(ours.entropy, entropy)


@pytest.mark.parametrize("at_once", [1, 5])
def test_completion_stats_do_not_depend_on_how_many_tokens_are_taken_at_once(monkeypatch, at_once):
    """132 tokens: one by one, and in chunks of 5 of which the last is padded."""
    monkeypatch.setattr(model, "_MAX_CHUNK_LOGITS", 384 * at_once + 1)
    logps, entropy = hf_stats("text")
    ours = our_stats("text", temperature=TEMPERATURE)
    assert_close(ours.logps, logps)
    assert_close(ours.entropy, entropy)


def test_token_stats_of_extreme_logits_are_finite():
    """A certain token has log-prob 0 and no entropy; two equal ones have log-prob -log 2 and entropy log 2."""
    logits = jnp.array([[1e4, -1e4, -1e4], [1e4, 1e4, -1e4], [-1e4, -1e4, 1e4]])
    stats = on_one_device(model.token_stats)(logits, jnp.array([0, 1, 0]))
    assert_close(stats.logps, np.array([0.0, -np.log(2), -2e4]))
    assert_close(stats.entropy, np.array([0.0, np.log(2), 0.0]))


def read_once(policy, ids, pixels, completion_ids, config):
    soft = model.encode_images(policy, pixels, config=config)
    return model.completion_stats(policy, ids, soft, completion_ids, temperature=TEMPERATURE, config=config)


def read_joined(policy, ids, pixels, positions, completion_ids, config):
    """The same from plain logits of each joined sequence."""
    soft = model.encode_images(policy, pixels, config=config)
    hidden = model.read_prompts(policy, ids, soft, config=config).hidden
    hidden = jnp.take_along_axis(hidden, positions[..., None], axis=1)
    logits = model.logits_of(model.joined_embedding(policy.params), hidden, config=config) / TEMPERATURE
    return model.token_stats(logits, completion_ids)


@cache
def stats_and_gradients(function, config, mesh):
    """Stats, and the gradient of a weighting of the log-probs with respect to every parameter and every adapter."""

    def run(policy, weights, *inputs):
        def loss(policy):
            stats = function(policy, *inputs, config=config)
            return sum_over_data((stats.logps * weights).sum()), stats

        (_, stats), gradient = jax.value_and_grad(loss, has_aux=True)(policy)
        return stats, gradient

    policy = Policy(param_shapes(config), jax.eval_shape(lambda: random_lora(config)))
    inputs = 4 if function is read_once else 5
    return sharded(run, policy, config, mesh, in_specs=(ROWS,) * inputs, out_specs=(ROWS, "params"))


@cache
def read_once_case(kv_heads: int, mesh: tuple[int, int]):
    _, config, params = multimodal_pair() if kv_heads == 2 else single_kv_head_pair()
    ids, images = image_prompts()
    weights = normal(6, *COMPLETIONS.shape)
    packed = model.pack_images(images, ids, config)
    run = stats_and_gradients(read_once, config, mesh)
    policy = jax.tree.map(np.asarray, Policy(params, random_lora(config)))  # on no device yet
    return run(policy, weights, ids, packed, COMPLETIONS)


@cache
def single_kv_head_pair():
    return pair(tiny_multimodal_config(num_key_value_heads=1))


def test_gradients_through_prompts_read_once_equal_those_through_repeated_sequences():
    """Gradients of every text, vision and adapter weight: nothing is lost if a prompt is not repeated."""
    _, config, params = multimodal_pair()
    ids, images = image_prompts()
    rows, repeated, positions = joined(ids, images)
    completions = COMPLETIONS.reshape(-1, STEPS)
    stats, gradient = read_once_case(2, (1, 1))
    full = stats_and_gradients(read_joined, config, (1, 1))
    full_stats, full_gradient = full(
        Policy(params, random_lora(config)),
        normal(6, *COMPLETIONS.shape).reshape(-1, STEPS),
        rows,
        model.pack_images(repeated, rows, config),
        positions,
        completions,
    )
    assert_close(stats.logps.reshape(-1, STEPS), full_stats.logps)
    assert_close(stats.entropy.reshape(-1, STEPS), full_stats.entropy)
    assert_trees_close(gradient, full_gradient)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_a_mesh_changes_neither_values_nor_gradients(kv_heads):
    """Mesh 2,4 splits prompts, stored weights, heads, vocabulary and images. Two devices share each of two key/value
    heads, or all four share one."""
    stats, gradient = read_once_case(kv_heads, (1, 1))
    mesh_stats, mesh_gradient = read_once_case(kv_heads, (2, 4))
    assert_close(mesh_stats.logps, stats.logps)
    assert_close(mesh_stats.entropy, stats.entropy)
    assert_trees_close(mesh_gradient, gradient)


def test_entropy_has_no_gradient():
    _, config, params = text_pair()
    ids, _ = prompts_of("text")

    def entropy(text):
        policy = Policy(Params(text, None))
        return model.completion_stats(policy, ids, None, COMPLETIONS, config=config).entropy.sum()

    gradient = on_one_device(jax.grad(entropy))(params.text)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


PARAMETER_COUNTS = {
    "gemma-3-270m-it": 268_098_176,
    "gemma-3-1b-it": 999_885_952,
    "gemma-3-4b-it": 4_300_079_472,
    "gemma-3-12b-it": 12_187_325_040,
    "gemma-3-27b-it": 27_432_406_640,
    "gemma-2-2b-it": 2_614_341_888,
    "gemma-2-9b-it": 9_241_705_984,
    "gemma-2-27b-it": 27_227_128_320,
}


@pytest.mark.parametrize("name", PARAMETER_COUNTS)
def test_parameter_counts_of_published_sizes(name):
    """What transformers counts of each published model, the tied output layer once."""
    shapes = param_shapes(CONFIGS[name])
    count = lambda tree: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(shapes) == PARAMETER_COUNTS[name]
    if shapes.vision is not None:
        assert count(shapes.vision) == 416_866_032 + 1152 * CONFIGS[name].hidden_size + 1152


def test_initial_parameters_keep_the_size_of_their_inputs():
    """Every matrix maps unit inputs to unit outputs, so a fresh model's logits are neither flat nor saturated."""
    config = CONFIGS["nano"]
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), config)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, param_shapes(config))
    for name, inputs in {"q": 64, "o": 64, "gate": 64, "down": 256}.items():
        assert abs(float(getattr(params.text.blocks, name).std()) * inputs**0.5 - 1) < 0.05, name
    assert (params.vision.blocks.norm1_scale == 1).all() and (params.vision.blocks.fc1_bias == 0).all()
    assert (params.text.blocks.q_norm == 0).all()
    ids = np.random.default_rng(0).integers(9, 448, (2, 40))
    assert 0.5 < float(model.forward(params, ids, config=config).std()) < 2.0


def refused(images, ids, config) -> str:
    with pytest.raises(ValueError) as error:
        model.pack_images(images, np.array(ids), config)
    return str(error.value)


def test_images_that_do_not_fit_the_ids_are_refused():
    config, (image,) = multimodal_pair().config, pixels(1)
    ids = [[2, *[IMAGE_ID] * 4, 5], [2, 3, 4, 5, 6, 7]]
    assert "row 1 has 1 images and 0 image tokens" in refused([[image], [image]], ids, config)
    assert "row 0 has 2 images and 4 image tokens; each image needs 4, 8 in all" in refused(
        [[image, image], []], ids, config
    )
    assert "uint8[28, 56, 3]" in refused([[image[:28]], []], ids, config)
    assert "float32[56, 56, 3]" in refused([[image.astype(np.float32)], []], ids, config)
    assert "reads no images, and 1 were given" in refused([[image], []], ids, text_pair().config)


def test_forward_of_ids_without_images_takes_none():
    """A multimodal model on plain text: no tower is run, and an empty list per row means the same."""
    _, config, params = multimodal_pair()
    ids = np.array([[2, 11, 12, 13]])
    none = model.forward(params, ids, config=config)
    np.testing.assert_array_equal(none, model.forward(params, ids, [[]], config=config))
