"""One update equals TRL, PEFT and torch's AdamW; micro-batches and meshes change nothing; bad numbers change nothing.

One tiny model with pictures serves most tests: a local and a global layer, prompts with 0, 1 and 2 pictures, ragged
completions of which one is empty, old log-probs of another policy. Another, of text, has one key/value head.
"""

import copy
import itertools
import tempfile
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from oracle import (
    Pair,
    assert_close,
    assert_trees_close,
    normal,
    pair,
    picture_prompts,
    pixel_values,
    random_lora,
    tensor,
)
from peft import PeftModel
from test_algorithm import make_trl_trainer, trl_advantages
from tiny_models import IMAGE_ID, tiny_multimodal_config, tiny_text_config
from trl.trainer.utils import add_fused_lm_head

from gemma3.config import Config
from gemma3.files.adapter import load_adapter, save_adapter
from gemma3.lora import Lora
from gemma3.mesh import make_mesh, on_one_device, shardings
from gemma3.model import Params, completion_stats, encode_images, pack_images
from gemma3.sample import Prompts
from grpo.algorithm import LOSS_TYPES, LossBatch, LossConfig, group_advantages, token_weights
from grpo.rollout import Prompt, place_prompts, split_over_data
from grpo.update import Trainable, init_optimizer, loss_and_grad, make_optimizer, make_schedule, policy, score, update

Q, G, C = 8, 3, 5
MAX_COMPLETION_LENGTH = 7  # longer than C, as when all completions of a batch end early
LENGTHS = np.array([[5, 2, 4], [1, 0, 3], [5, 3, 2], [4, 5, 1], [2, 2, 5], [3, 4, 1], [5, 5, 3], [1, 2, 3]])
MASK = np.arange(C) < LENGTHS[..., None]
COMPLETIONS = np.where(MASK, np.random.default_rng(5).integers(3, 377, (Q, G, C)), 0).astype(np.int32)
REWARDS = np.array(
    [[1, 0, 0.5], [0, 0, 1.5], [np.nan, 1, 0], [2, 1, 1], [0, 0, 2], [1, 0.5, 0], [0, 1, 0.5], [1, 0, 1]], np.float32
)
TEMPERATURE = 0.7
LOSS = LossConfig(loss_type="dapo", epsilon=0.2, epsilon_high=0.28, beta=0.04)
LEARNING_RATE = 1e-3
ADAM = {"weight_decay": 0.1, "adam_beta2": 0.99, "max_grad_norm": 0.1}
OPTIMIZER = make_optimizer(lambda count: LEARNING_RATE, **ADAM)
MESHES = [(1, 1), (2, 1), (1, 2), (2, 4), (8, 1), (4, 2)]
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}


@cache
def tiny() -> Pair:
    return pair(tiny_multimodal_config(**TWO_LAYERS))


@cache
def one_head() -> Pair:
    """A text model whose single key/value head every tensor shard holds."""
    return pair(tiny_text_config(num_key_value_heads=1, **TWO_LAYERS))


@cache
def prompts_and_pictures() -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """The oracle's four prompts, and then backwards with other words and their pictures upside down."""
    ids, pictures = picture_prompts()
    other_words = np.where((ids > 10) & (ids < 50), ids + 50, ids)
    turned = [[picture[::-1] for picture in own] for own in pictures]
    return np.concatenate([ids, other_words[::-1]]), pictures + turned[::-1]


def placed(tree, config: Config, mesh):
    """A copy of parameters, as training stores them: the update may reuse its memory."""
    return jax.device_put(jax.tree.map(lambda x: jnp.array(x), tree), shardings(tree, config, mesh))


class Inputs(NamedTuple):
    """What an update starts from."""

    trainable: Trainable
    frozen: Params
    prompts: Prompts
    completion_ids: jax.Array


def inputs(kind: str, mesh, model=tiny) -> Inputs:
    """What is trained: an adapter or the language model; or the vision tower too, from the pictures themselves."""
    _, config, params = model()
    trainable, frozen = {
        "adapter": (random_lora(config), params),
        "adapter of both towers": (random_lora(config, vision=config.vision is not None), params),
        "text": (params.text, Params(None, params.vision)),
        "all weights": (params, Params(None, None)),
    }[kind]
    ids, pictures = prompts_and_pictures()
    if config.vision is None:
        pictures = [[]] * Q
    prompts = place_prompts(
        [Prompt(row[row != 0].tolist(), own) for row, own in zip(ids, pictures, strict=True)],
        range(Q),
        placed(params, config, mesh),
        None,
        config=config,
        mesh=mesh,
        max_prompt_length=ids.shape[1],
        max_images=max(map(len, pictures)),
        keep_pixels=kind in ("adapter of both towers", "all weights"),
    )
    trainable, frozen = (placed(tree, config, mesh) for tree in (trainable, frozen))
    return Inputs(trainable, frozen, prompts, split_over_data(COMPLETIONS, mesh))


@cache
def scored(mesh_shape, micro_batch: int, adapted: bool):
    mesh = make_mesh(*mesh_shape)
    given, config = inputs("adapter", mesh), tiny().config
    lora = given.trainable if adapted else None
    compute = {"config": config, "mesh": mesh, "temperature": TEMPERATURE, "micro_batch": micro_batch}
    return jax.device_get(score(given.frozen, lora, given.prompts, given.completion_ids, **compute))


def loss_batch(loss_type: str, mesh, **changes) -> LossBatch:
    """Samples of another policy, so far off that both ends of the clip range are passed, and of another sampler."""
    old_logps = scored((1, 1), Q, True).logps + 0.4 * normal(1, Q, G, C)
    batch = LossBatch(
        advantages=np.asarray(group_advantages(REWARDS)),
        completion_mask=MASK,
        weights=np.asarray(token_weights(loss_type, MASK, max_completion_length=MAX_COMPLETION_LENGTH)),
        old_logps=old_logps,
        ref_logps=scored((1, 1), Q, False).logps,
        sampler_logps=old_logps + np.where(MASK, 0.3 * normal(2, Q, G, C), 9.0).astype(np.float32),
    )
    return jax.tree.map(partial(split_over_data, mesh=mesh), batch._replace(**changes))


@pytest.mark.parametrize(
    ("mesh", "micro_batch", "adapted"),
    [((1, 1), Q, True), ((1, 1), Q, False), ((1, 1), 1, True), ((2, 4), 1, True)],
)
def test_scores_are_those_of_the_model_on_any_mesh_and_in_any_micro_batches(mesh, micro_batch, adapted):
    _, config, params = tiny()
    ids, pictures = prompts_and_pictures()
    pixels = pack_images(pictures, ids, config)
    soft = on_one_device(partial(encode_images, config=config))(pixels, params)
    whole = on_one_device(partial(completion_stats, temperature=TEMPERATURE, config=config))
    expected = whole(ids, soft, COMPLETIONS, params, random_lora(config) if adapted else None)
    found = scored(mesh, micro_batch, adapted)
    assert_close(found.logps[MASK], expected.logps[MASK])
    assert_close(found.entropy[MASK], expected.entropy[MASK])


class Result(NamedTuple):
    """What comes of a batch, on the host."""

    loss: jax.Array
    gradient: Trainable
    metrics: dict[str, jax.Array]
    logps: jax.Array
    trained: Trainable | None = None  # as it is after the update


STATIC = ("config", "mesh", "dtype", "loss", "temperature", "micro_batch")
compiled_loss_and_grad = jax.jit(loss_and_grad, static_argnames=STATIC)


def loss_gradient_and_metrics(micro_batch: int, loss_type: str = "dapo", **changes) -> Result:
    """Of the adapter on one device, with the token weights of a loss type."""
    mesh = make_mesh(1, 1)
    results = compiled_loss_and_grad(
        *inputs("adapter", mesh),
        loss_batch(loss_type, mesh, **changes),
        config=tiny().config,
        mesh=mesh,
        dtype=jnp.dtype("float32"),
        loss=LossConfig(beta=0.04, importance_sampling_clip_max=1.5),
        temperature=TEMPERATURE,
        micro_batch=micro_batch,
    )
    return Result(*jax.device_get(results))


def assert_same(found: Result, expected: Result) -> None:
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert_trees_close(found.gradient, expected.gradient)
    assert found.metrics.keys() == expected.metrics.keys()
    for name in expected.metrics:
        np.testing.assert_allclose(found.metrics[name], expected.metrics[name], rtol=2e-5, atol=1e-6, err_msg=name)
    assert_close(found.logps[MASK], expected.logps[MASK])


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_change_neither_loss_nor_gradient_nor_metrics(loss_type):
    """With every normaliser; that the parts of each surrogate add up is shown where the losses are."""
    whole = loss_gradient_and_metrics(Q, loss_type)
    for micro_batch in (1, 4):
        assert_same(loss_gradient_and_metrics(micro_batch, loss_type), whole)


def test_samples_without_old_log_probs_are_the_policys_own():
    """None stands for the log-probs of the policy itself, from the same pass: ratio 1, and the same gradient."""
    own = loss_gradient_and_metrics(Q, old_logps=None)
    given = loss_gradient_and_metrics(Q, old_logps=scored((1, 1), Q, True).logps)
    assert_same(own, given)
    assert own.metrics["ratio/mean"] == 1 and own.metrics["clip_ratio/region_mean"] == 0


def one_update(kind: str, mesh, batch: LossBatch, state=None, *, loss: LossConfig | None = LOSS, model=tiny):
    """What goes in, and what comes out of `update`; `state` is the trainable and optimizer state to go on from.

    One prompt at a time on each data shard of a mesh, and all at once on one device.
    """
    given, config = inputs(kind, mesh, model), model().config
    trainable, opt_state = state or (given.trainable, init_optimizer(OPTIMIZER, given.trainable, config, mesh))
    results = update(
        trainable,
        opt_state,
        *given[1:],
        batch,
        optimizer=OPTIMIZER,
        config=config,
        mesh=mesh,
        dtype=jnp.dtype("float32"),
        loss=loss,
        temperature=TEMPERATURE,
        micro_batch=Q if mesh.size == 1 else 1,
    )
    return (trainable, opt_state), results


@cache
def updated(kind: str, mesh_shape, model=tiny) -> Result:
    """What one update makes, the gradient read off the optimizer: Adam's first moment is a tenth of it, clipped.

    The second moments are not zero, as after other steps: a first step would be the gradient's sign, and its rounding.
    """
    mesh, config = make_mesh(*mesh_shape), model().config
    batch, loss = loss_batch("dapo", mesh), LOSS
    if model is one_head:  # the old log-probs and the reference's are of the other model
        batch, loss = batch._replace(old_logps=None, ref_logps=None, sampler_logps=None), LossConfig()
    trainable = inputs(kind, mesh, model).trainable
    state = init_optimizer(OPTIMIZER, trainable, config, mesh)
    nu = jax.tree.map(lambda x: jnp.full_like(x, 1e-8), optax.tree_utils.tree_get(state, "nu"))
    state = optax.tree_utils.tree_set(state, nu=nu)
    _, results = one_update(kind, mesh, batch, (trainable, state), loss=loss, model=model)
    trained, state, metrics, logps = jax.device_get(results)
    unclipped = 10 * max(1, metrics["grad_norm"] / ADAM["max_grad_norm"])
    gradient = jax.tree.map(lambda x: unclipped * x, optax.tree_utils.tree_get(state, "mu"))
    return Result(metrics["loss"], gradient, metrics, logps, trained)


def assert_same_update(kind: str, mesh, model=tiny) -> None:
    before = jax.device_get(inputs(kind, make_mesh(1, 1), model).trainable)
    found, expected = updated(kind, mesh, model), updated(kind, (1, 1), model)
    assert_same(found, expected)
    for new, want, old in zip(*map(jax.tree.leaves, (found.trained, expected.trained, before)), strict=True):
        assert np.abs(want - old).max() > 1e-5
        np.testing.assert_allclose(new, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
def test_a_mesh_changes_neither_loss_nor_gradient_nor_new_weights(mesh):
    """Nor metrics nor log-probs. An adapter, with pictures: two key/value heads, split or shared by two shards."""
    assert_same_update("adapter", mesh)


@pytest.mark.parametrize(
    ("kind", "mesh"), [*(("all weights", mesh) for mesh in MESHES[1:]), ("adapter of both towers", (2, 4))], ids=str
)
def test_a_mesh_changes_nothing_where_the_vision_tower_is_trained(kind, mesh):
    assert_same_update(kind, mesh)


@pytest.mark.parametrize(("kind", "mesh"), [*(("text", mesh) for mesh in MESHES[1:]), ("adapter", (4, 2))], ids=str)
def test_a_mesh_changes_nothing_with_one_key_value_head_for_all_shards(kind, mesh):
    """Each tensor shard has the whole of the head's weights, and of their gradient only its query heads' part."""
    assert_same_update(kind, mesh, one_head)


def test_without_the_vision_tower_the_language_model_has_the_gradient_it_has_with_it():
    both, text = updated("all weights", (2, 4)), updated("text", (2, 4))
    others = {"grad_norm": optax.global_norm(both.gradient.text)}
    assert_same(text, both._replace(gradient=both.gradient.text, metrics=both.metrics | others))


def test_the_log_probs_of_an_update_are_those_of_a_score():
    """Of the policy as it was; the adapter changes them."""
    logps = updated("adapter", (2, 4)).logps
    assert_close(logps[MASK], scored((1, 1), Q, True).logps[MASK])
    assert np.abs(logps - scored((1, 1), Q, False).logps)[MASK].max() > 0.1


def test_metrics_are_of_the_whole_batch():
    """Means over all tokens and the one largest difference, also from micro-batches on a mesh; what is masked aside."""
    metrics = updated("adapter", (2, 4)).metrics
    difference = np.abs(0.3 * normal(2, Q, G, C))
    np.testing.assert_allclose(metrics["sampling/sampling_logp_difference/mean"], difference[MASK].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["sampling/sampling_logp_difference/max"], difference[MASK].max(), rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], scored((1, 1), Q, True).entropy[MASK].mean(), rtol=1e-5)
    ratio = np.exp(-0.4 * normal(1, Q, G, C))
    np.testing.assert_allclose(metrics["ratio/mean"], ratio[MASK].mean(), rtol=1e-5)


class Reference(NamedTuple):
    """What TRL, PEFT and torch make of the same update."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    lora: Lora


def repeated_prompts() -> dict:
    """TRL's inputs: each prompt and its pictures G times, padded on the left."""
    ids, pictures = prompts_and_pictures()
    left = np.stack([np.roll(row, (row == 0).sum()) for row in ids]).repeat(G, axis=0)
    per_row = [own for own in pictures for _ in range(G)]
    joined = torch.from_numpy(np.concatenate([left, COMPLETIONS.reshape(Q * G, C)], axis=1))
    return {
        "prompt_ids": torch.from_numpy(left).long(),
        "prompt_mask": torch.from_numpy(left != 0).long(),
        "completion_ids": torch.from_numpy(COMPLETIONS.reshape(Q * G, C)).long(),
        "completion_mask": torch.from_numpy(MASK.reshape(Q * G, C)).long(),
        "token_type_ids": (joined == IMAGE_ID).long(),
        "pixel_values": pixel_values(np.stack([picture for row in per_row for picture in row])),
        "num_images": [len(row) for row in per_row],
    }


@cache
def reference_update() -> Reference:
    hf, config, _ = tiny()
    hf = copy.deepcopy(hf)
    with tempfile.TemporaryDirectory() as directory:
        hf.save_pretrained(directory)
        save_adapter(f"{directory}/before", config, random_lora(config), directory)
        add_fused_lm_head(hf, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
        model = PeftModel.from_pretrained(hf, f"{directory}/before", is_trainable=True).train()
        trainer = make_trl_trainer(model, LOSS)
        given = repeated_prompts()
        joined = [torch.cat([given[f"prompt_{part}"], given[f"completion_{part}"]], dim=1) for part in ("ids", "mask")]
        pictures = {name: given[name] for name in ("pixel_values", "num_images", "token_type_ids")}
        with torch.no_grad(), model.disable_adapter():
            reference, _, _ = trainer._get_per_token_logps_and_entropies(model, *joined, C, **pictures)
        given |= {
            "advantages": torch.from_numpy(trl_advantages(REWARDS, "group")[0].reshape(-1)),
            "num_items_in_batch": torch.tensor(MASK.sum()),
            "old_per_token_logps": tensor(loss_batch("dapo", make_mesh(1, 1)).old_logps).flatten(0, 1),
            "ref_per_token_logps": reference,
        }
        loss = trainer._compute_loss(model, given)
        loss.backward()
        parameters = [p for p in model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, ADAM["max_grad_norm"])
        settings = {"lr": LEARNING_RATE, "weight_decay": ADAM["weight_decay"]}
        torch.optim.AdamW(parameters, betas=(0.9, ADAM["adam_beta2"]), **settings).step()
        model.save_pretrained(f"{directory}/after")
        metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
        return Reference(loss.item(), norm.item(), metrics, load_adapter(f"{directory}/after", config))


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)], ids=str)
def test_a_whole_update_equals_trl_with_peft_and_torch_adamw(mesh):
    """The same model, adapter, pictures, completions, rewards and old log-probs: the same loss, norm and new adapter.

    The reference log-probs are each side's own, with the adapter off. The norm is above the limit, so it is clipped.
    """
    expected, config = reference_update(), tiny().config
    mesh = make_mesh(*mesh)
    _, (lora, _, metrics, _) = one_update("adapter", mesh, loss_batch("dapo", mesh))
    assert metrics["finite"] == 1 and expected.grad_norm > ADAM["max_grad_norm"]
    np.testing.assert_allclose(metrics["loss"], expected.loss, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected.grad_norm, rtol=1e-4)
    shared = expected.metrics.keys() & metrics.keys()
    assert {"kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean"} <= shared
    for name in shared:
        np.testing.assert_allclose(metrics[name], expected.metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)
    old = random_lora(config)
    for name in expected.lora.blocks._fields:
        for ours, theirs, before in zip(*(getattr(x.blocks, name) for x in (lora, expected.lora, old)), strict=True):
            assert np.abs(np.asarray(theirs) - np.asarray(before)).max() > 5e-4, name
            assert_close(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)], ids=str)
def test_updates_are_compiled_once_and_reuse_the_memory_they_are_given(mesh):
    mesh = make_mesh(*mesh)
    batch = loss_batch("dapo", mesh)
    _, (*state, _, _) = one_update("adapter", mesh, batch)
    compiled = update._cache_size()
    for _ in range(2):
        given, (*state, _, _) = one_update("adapter", mesh, batch, state)
        assert all(x.is_deleted() for x in jax.tree.leaves(given))
    assert update._cache_size() == compiled


def test_a_loss_that_is_not_finite_changes_nothing_and_is_reported():
    mesh = make_mesh(1, 1)
    good = loss_batch("dapo", mesh)
    bad = good._replace(advantages=good.advantages.at[2, 1].set(jnp.nan))
    _, (*state, metrics, _) = one_update("adapter", mesh, good)
    assert metrics["finite"] == 1
    before = jax.tree.map(np.array, state)
    _, (*after, metrics, _) = one_update("adapter", mesh, bad, state)
    assert metrics["finite"] == 0 and np.isnan(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, after))
    _, (*recovered, metrics, _) = one_update("adapter", mesh, good, after)
    assert metrics["finite"] == 1 and not np.array_equal(before[0].blocks.q.b, recovered[0].blocks.q.b)


def test_supervised_training_minimises_the_negative_log_likelihood_of_its_tokens():
    mesh = make_mesh(1, 1)
    batch = loss_batch("dapo", mesh, sampler_logps=None, ref_logps=None, old_logps=None)
    _, (*state, metrics, _) = one_update("text", mesh, batch, loss=None)
    given, losses = inputs("text", mesh), [float(metrics["loss"])]
    compute = {"config": tiny().config, "mesh": mesh, "temperature": TEMPERATURE, "micro_batch": Q}
    params, lora = policy(given.trainable, given.frozen, jnp.dtype("float32"))
    logps = np.asarray(score(params, lora, given.prompts, given.completion_ids, **compute).logps)
    np.testing.assert_allclose(losses[0], -logps[MASK].mean(), rtol=1e-5)
    for _ in range(3):
        _, (*state, metrics, _) = one_update("text", mesh, batch, state, loss=None)
        losses.append(float(metrics["loss"]))
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def test_policy_computes_trained_weights_in_the_dtype_of_the_model():
    _, config, params = tiny()
    lora, bfloat16 = random_lora(config), jnp.dtype("bfloat16")
    assert policy(lora, params, bfloat16) == (params, lora)
    trained, no_lora = policy(params.text, Params(None, params.vision), bfloat16)
    assert no_lora is None and trained.vision is params.vision
    assert {x.dtype for x in jax.tree.leaves(trained.text)} == {bfloat16}
    everything, _ = policy(params, Params(None, None), bfloat16)
    assert isinstance(everything, Params) and {x.dtype for x in jax.tree.leaves(everything)} == {bfloat16}


def rates(**settings) -> np.ndarray:
    """The learning rate of each step, read off what Adam does to a weight whose gradient never changes."""
    optimizer = make_optimizer(make_schedule(**settings), weight_decay=0.0, adam_beta2=0.99, max_grad_norm=10.0)
    weight, gradient = jnp.zeros(()), jnp.ones(())
    state, found = optimizer.init(weight), []
    for _ in range(settings["steps"] + 2):
        change, state = optimizer.update(gradient, state, weight)
        found.append(-float(change))
    return np.array(found)


def test_the_rate_warms_up_from_a_first_step_that_is_not_zero_and_decays_to_a_tenth():
    found = rates(learning_rate=0.5, steps=12, warmup_steps=4, schedule="cosine")
    np.testing.assert_allclose(found[:4], [0.125, 0.25, 0.375, 0.5], rtol=1e-4)
    assert (np.diff(found[3:12]) < 0).all()
    progress = np.arange(9) / 8
    expected = 0.05 + 0.45 * (1 + np.cos(np.pi * progress)) / 2
    np.testing.assert_allclose(found[3:12], expected, rtol=1e-4)
    np.testing.assert_allclose(found[11:], 0.05, rtol=1e-4)


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_a_constant_rate_stays_after_its_warm_up(warmup_steps):
    found = rates(learning_rate=0.5, steps=6, warmup_steps=warmup_steps, schedule="constant")
    np.testing.assert_allclose(found[:warmup_steps], 0.5 * np.arange(1, warmup_steps + 1) / 3, rtol=1e-4)
    np.testing.assert_allclose(found[warmup_steps:], 0.5, rtol=1e-4)


def test_a_run_shorter_than_its_warm_up_keeps_warming_up():
    found = rates(learning_rate=0.5, steps=2, warmup_steps=10, schedule="cosine")
    np.testing.assert_allclose(found, 0.05 * np.arange(1, 5), rtol=1e-4)


def test_gradients_are_clipped_by_the_norm_of_them_all():
    """Two weights of gradient 3 and 4 get 0.6 and 0.8, of which Adam's first moment holds a tenth."""
    optimizer = make_optimizer(lambda count: LEARNING_RATE, **ADAM | {"max_grad_norm": 1.0})
    weights = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    _, state = optimizer.update({"a": jnp.float32(3), "b": jnp.float32(4)}, optimizer.init(weights), weights)
    first_moment = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose([first_moment["a"], first_moment["b"]], [0.06, 0.08], rtol=1e-5)
