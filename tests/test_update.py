"""One update equals TRL, PEFT and torch's AdamW; micro-batches and meshes change nothing; bad numbers change nothing.

One tiny model with images serves most tests: a local and a global layer, prompts with 0, 1 and 2 images, ragged
completions of which one is empty, old log-probs of another policy. Another, of text, has one key/value head.
"""

import copy
import itertools
import tempfile
from dataclasses import replace
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
    image_prompts,
    normal,
    pair,
    pixel_values,
    random_lora,
    tensor,
)
from peft import PeftModel
from test_algorithm import make_trl_trainer, trl_advantages
from tiny_models import IMAGE_ID, tiny_multimodal_config, tiny_text_config
from trl.trainer.utils import add_fused_lm_head

from gemma3.files.adapter import load_adapter, save_adapter
from gemma3.lora import Lora, Policy
from gemma3.mesh import Model, make_mesh, on_one_device
from gemma3.model import TokenStats, completion_stats, encode_images, pack_images
from gemma3.params import Params
from gemma3.sample import PromptBatch
from grpo.algorithm import LOSS_TYPES, LossBatch, LossConfig, group_advantages, token_weights
from grpo.reader import Prompt, Reader, Row
from grpo.rollout import put_prompts, split_over_data
from grpo.run.settings import Settings
from grpo.run.setup import make_learner
from grpo.update import Learner, Trainable, TrainState, completion_logps, init_state, loss_and_grad, policy_of, update

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
SETTINGS = Settings(
    **ADAM,
    learning_rate=LEARNING_RATE,
    lr_scheduler="constant",
    warmup_steps=0,
    epsilon_high=0.28,
    beta=0.04,
    temperature=TEMPERATURE,
    dtype="float32",
    prompts_per_step=Q,
    micro_batch=1,
)
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
def prompts_and_images() -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """The oracle's four prompts, then the same in reverse order with other words and their images upside down."""
    ids, images = image_prompts()
    other_words = np.where((ids > 10) & (ids < 50), ids + 50, ids)
    turned = [[image[::-1] for image in own] for own in images]
    return np.concatenate([ids, other_words[::-1]]), images + turned[::-1]


def placed(tree, model: Model):
    """A copy of parameters, as training stores them: the update may reuse its memory."""
    return jax.device_put(jax.tree.map(lambda x: jnp.array(x), tree), model.shardings(tree))


@cache
def learner_of(model: Model, **changes) -> Learner:
    """The learner of `SETTINGS`: one prompt at a time on each data shard of a mesh, all at once on one device."""
    settings = replace(SETTINGS, micro_batch=Q if model.mesh.size == 1 else 1)
    return replace(make_learner(settings, model), **changes)


class Inputs(NamedTuple):
    """What an update starts from."""

    trainable: Trainable
    frozen: Params
    prompts: PromptBatch
    completion_ids: jax.Array


def inputs(kind: str, mesh, which=tiny) -> Inputs:
    """kind: what is trained: an adapter or the language model, or also the vision tower, from the images themselves."""
    _, config, params = which()
    model = Model(config, mesh)
    trainable, frozen = {
        "adapter": (random_lora(config), params),
        "adapter of both towers": (random_lora(config, vision=config.vision is not None), params),
        "text": (params.text, Params(None, params.vision)),
        "all weights": (params, Params(None, None)),
    }[kind]
    ids, images = prompts_and_images()
    if config.vision is None:
        images = [[]] * Q
    prompts = [Prompt(row[row != 0].tolist(), own) for row, own in zip(ids, images, strict=True)]
    limits = {"max_prompt_length": ids.shape[1], "max_images": max(map(len, images))}
    batch = put_prompts(
        Policy(placed(params, model)),
        [Row(index, None, prompt) for index, prompt in enumerate(prompts)],
        Reader(model, None, "bare", "answer", **limits),
        keep_pixels=kind in ("adapter of both towers", "all weights"),
    )
    return Inputs(placed(trainable, model), placed(frozen, model), batch, split_over_data(COMPLETIONS, mesh))


@cache
def logps_on(mesh_shape, micro_batch: int, adapted: bool) -> np.ndarray:
    mesh = make_mesh(*mesh_shape)
    given, how = inputs("adapter", mesh), {"temperature": TEMPERATURE, "micro_batch": micro_batch}
    policy = Policy(given.frozen, given.trainable if adapted else None)
    logps = completion_logps(policy, given.prompts, given.completion_ids, model=Model(tiny().config, mesh), **how)
    return jax.device_get(logps)


@cache
def stats_of_the_model(adapted: bool) -> TokenStats:
    """The model's stats of all completions at once, on one device."""
    _, config, params = tiny()
    ids, images = prompts_and_images()
    policy = Policy(params, random_lora(config) if adapted else None)
    soft = on_one_device(partial(encode_images, config=config))(policy, pack_images(images, ids, config))
    whole = on_one_device(partial(completion_stats, temperature=TEMPERATURE, config=config))
    return jax.device_get(whole(policy, ids, soft, COMPLETIONS))


def loss_batch(loss_type: str, mesh, **changes) -> LossBatch:
    """Samples of another policy and another sampler, so far off that both ends of the clip range are passed."""
    old_logps = logps_on((1, 1), Q, True) + 0.4 * normal(1, Q, G, C)
    batch = LossBatch(
        advantages=np.asarray(group_advantages(REWARDS)),
        completion_mask=MASK,
        token_weights=np.asarray(token_weights(loss_type, MASK, max_completion_length=MAX_COMPLETION_LENGTH)),
        old_logps=old_logps,
        ref_logps=logps_on((1, 1), Q, False),
        sampler_logps=old_logps + np.where(MASK, 0.3 * normal(2, Q, G, C), 9.0).astype(np.float32),
    )
    return jax.tree.map(partial(split_over_data, mesh=mesh), batch._replace(**changes))


@pytest.mark.parametrize(
    ("mesh", "micro_batch", "adapted"),
    [((1, 1), Q, True), ((1, 1), Q, False), ((1, 1), 1, True), ((2, 4), 1, True)],
)
def test_log_probs_are_those_of_the_model_on_any_mesh_and_in_any_micro_batches(mesh, micro_batch, adapted):
    assert_close(logps_on(mesh, micro_batch, adapted)[MASK], stats_of_the_model(adapted).logps[MASK])


class Result(NamedTuple):
    """What is computed from a batch, on the host."""

    loss: jax.Array
    gradient: Trainable
    metrics: dict[str, jax.Array]
    logps: jax.Array
    trained: Trainable | None = None  # as it is after the update


compiled_loss_and_grad = jax.jit(loss_and_grad, static_argnames="learner")


def loss_gradient_and_metrics(micro_batch: int, loss_type: str = "dapo", **changes) -> Result:
    """The `Result` for the adapter on one device, with the token weights of a loss type."""
    mesh, loss = make_mesh(1, 1), LossConfig(beta=0.04, importance_sampling_clip_max=1.5)
    learner = learner_of(Model(tiny().config, mesh), loss=loss, micro_batch=micro_batch)
    results = compiled_loss_and_grad(*inputs("adapter", mesh), loss_batch(loss_type, mesh, **changes), learner=learner)
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
    """With every normaliser; test_algorithm.py shows that the parts of each surrogate add up."""
    whole = loss_gradient_and_metrics(Q, loss_type)
    for micro_batch in (1, 4):
        assert_same(loss_gradient_and_metrics(micro_batch, loss_type), whole)


def test_samples_without_old_log_probs_are_the_policys_own():
    """None stands for the log-probs of the policy itself, from the same pass: ratio 1, and the same gradient."""
    own = loss_gradient_and_metrics(Q, old_logps=None)
    given = loss_gradient_and_metrics(Q, old_logps=logps_on((1, 1), Q, True))
    assert_same(own, given)
    assert own.metrics["ratio/mean"] == 1 and own.metrics["clip_ratio/region_mean"] == 0


def one_update(kind: str, mesh, batch: LossBatch, state: TrainState | None = None, *, which=tiny, **changes):
    """The state before an update, and what `update` returns; `changes` are fields of the learner."""
    given, learner = inputs(kind, mesh, which), learner_of(Model(which().config, mesh), **changes)
    state = state or init_state(given.trainable, learner.optimizer, learner.model)
    return state, update(state, *given[1:], batch, learner=learner)


@cache
def updated(kind: str, mesh_shape, which=tiny) -> Result:
    """The result of one update. The gradient is read off the optimizer: Adam's first moment is a tenth of it, clipped.

    The second moments are not zero, as after earlier updates: a first update would be just the gradient's sign.
    """
    mesh, changes = make_mesh(*mesh_shape), {}
    batch, model = loss_batch("dapo", mesh), Model(which().config, mesh)
    if which is one_head:  # the batch's log-probs are those of the other model
        batch, changes = batch._replace(old_logps=None, ref_logps=None, sampler_logps=None), {"loss": LossConfig()}
    trainable, opt_state = init_state(inputs(kind, mesh, which).trainable, learner_of(model).optimizer, model)
    nu = jax.tree.map(lambda x: jnp.full_like(x, 1e-8), optax.tree_utils.tree_get(opt_state, "nu"))
    state = TrainState(trainable, optax.tree_utils.tree_set(opt_state, nu=nu))
    _, results = one_update(kind, mesh, batch, state, which=which, **changes)
    (trained, opt_state), metrics, logps = jax.device_get(results)
    unclipped = 10 * max(1, metrics["grad_norm"] / ADAM["max_grad_norm"])
    gradient = jax.tree.map(lambda x: unclipped * x, optax.tree_utils.tree_get(opt_state, "mu"))
    return Result(metrics["loss"], gradient, metrics, logps, trained)


def assert_same_update(kind: str, mesh, which=tiny) -> None:
    before = jax.device_get(inputs(kind, make_mesh(1, 1), which).trainable)
    found, expected = updated(kind, mesh, which), updated(kind, (1, 1), which)
    assert_same(found, expected)
    for new, want, old in zip(*map(jax.tree.leaves, (found.trained, expected.trained, before)), strict=True):
        assert np.abs(want - old).max() > 1e-5
        np.testing.assert_allclose(new, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mesh", MESHES[1:], ids=str)
def test_a_mesh_changes_neither_loss_nor_gradient_nor_new_weights(mesh):
    """Neither metrics nor log-probs. An adapter, with images: two key/value heads, split or shared by two shards."""
    assert_same_update("adapter", mesh)


@pytest.mark.parametrize(
    ("kind", "mesh"), [*(("all weights", mesh) for mesh in MESHES[1:]), ("adapter of both towers", (2, 4))], ids=str
)
def test_a_mesh_changes_nothing_where_the_vision_tower_is_trained(kind, mesh):
    assert_same_update(kind, mesh)


@pytest.mark.parametrize(("kind", "mesh"), [*(("text", mesh) for mesh in MESHES[1:]), ("adapter", (4, 2))], ids=str)
def test_a_mesh_changes_nothing_with_one_key_value_head_for_all_shards(kind, mesh):
    """Each tensor shard has all of the head's weights, but only its own query heads' part of their gradient."""
    assert_same_update(kind, mesh, one_head)


def test_without_the_vision_tower_the_language_model_has_the_gradient_it_has_with_it():
    both, text = updated("all weights", (2, 4)), updated("text", (2, 4))
    others = {"grad_norm": optax.global_norm(both.gradient.text)}
    assert_same(text, both._replace(gradient=both.gradient.text, metrics=both.metrics | others))


def test_the_log_probs_of_an_update_are_those_of_a_pass_without_one():
    """They are those of the policy before the update; the adapter changes them."""
    logps = updated("adapter", (2, 4)).logps
    assert_close(logps[MASK], logps_on((1, 1), Q, True)[MASK])
    assert np.abs(logps - logps_on((1, 1), Q, False))[MASK].max() > 0.1


def test_metrics_are_of_the_whole_batch():
    """Means over all tokens that are not masked, and the largest difference, also from micro-batches on a mesh."""
    metrics = updated("adapter", (2, 4)).metrics
    difference = np.abs(0.3 * normal(2, Q, G, C))
    np.testing.assert_allclose(metrics["sampling/sampling_logp_difference/mean"], difference[MASK].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["sampling/sampling_logp_difference/max"], difference[MASK].max(), rtol=1e-5)
    for kind, adapted in (("adapter", True), ("text", False)):
        entropy = stats_of_the_model(adapted).entropy[MASK].mean()
        np.testing.assert_allclose(updated(kind, (2, 4)).metrics["entropy"], entropy, rtol=1e-5)
    ratio = np.exp(-0.4 * normal(1, Q, G, C))
    np.testing.assert_allclose(metrics["ratio/mean"], ratio[MASK].mean(), rtol=1e-5)


class Reference(NamedTuple):
    """What TRL, PEFT and torch make of the same update."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    lora: Lora


def repeated_prompts() -> dict:
    """TRL's inputs: each prompt and its images G times, padded on the left."""
    ids, images = prompts_and_images()
    left = np.stack([np.roll(row, (row == 0).sum()) for row in ids]).repeat(G, axis=0)
    per_row = [own for own in images for _ in range(G)]
    joined = torch.from_numpy(np.concatenate([left, COMPLETIONS.reshape(Q * G, C)], axis=1))
    return {
        "prompt_ids": torch.from_numpy(left).long(),
        "prompt_mask": torch.from_numpy(left != 0).long(),
        "completion_ids": torch.from_numpy(COMPLETIONS.reshape(Q * G, C)).long(),
        "completion_mask": torch.from_numpy(MASK.reshape(Q * G, C)).long(),
        "token_type_ids": (joined == IMAGE_ID).long(),
        "pixel_values": pixel_values(np.stack([image for row in per_row for image in row])),
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
        images = {name: given[name] for name in ("pixel_values", "num_images", "token_type_ids")}
        with torch.no_grad(), model.disable_adapter():
            reference, _, _ = trainer._get_per_token_logps_and_entropies(model, *joined, C, **images)
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
    """The same model, adapter, images, completions, rewards and old log-probs: the same loss, norm and new adapter.

    The reference log-probs are each side's own, with the adapter off. The norm is above the limit, so it is clipped.
    """
    expected, config = reference_update(), tiny().config
    mesh = make_mesh(*mesh)
    _, ((lora, _), metrics, _) = one_update("adapter", mesh, loss_batch("dapo", mesh))
    assert metrics["finite"] == 1 and expected.grad_norm > ADAM["max_grad_norm"]
    np.testing.assert_allclose(metrics["loss"], expected.loss, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected.grad_norm, rtol=1e-4)
    shared = expected.metrics.keys() & metrics.keys()
    assert {"kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean"} <= shared
    for name in shared:
        np.testing.assert_allclose(metrics[name], expected.metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)
    old = random_lora(config)
    for name in expected.lora.blocks._fields:
        pairs = [jax.tree.leaves(getattr(x.blocks, name)) for x in (lora, expected.lora, old)]
        for ours, theirs, before in zip(*pairs, strict=True):
            assert np.abs(np.asarray(theirs) - np.asarray(before)).max() > 5e-4, name
            assert_close(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)], ids=str)
def test_updates_are_compiled_once_and_reuse_the_memory_they_are_given(mesh):
    mesh = make_mesh(*mesh)
    batch = loss_batch("dapo", mesh)
    _, (state, _, _) = one_update("adapter", mesh, batch)
    compiled = update._cache_size()
    for _ in range(2):
        given, (state, _, _) = one_update("adapter", mesh, batch, state)
        assert all(x.is_deleted() for x in jax.tree.leaves(given))
    assert update._cache_size() == compiled


def test_a_loss_that_is_not_finite_changes_nothing_and_is_reported():
    mesh = make_mesh(1, 1)
    good = loss_batch("dapo", mesh)
    bad = good._replace(advantages=good.advantages.at[2, 1].set(jnp.nan))
    _, (state, metrics, _) = one_update("adapter", mesh, good)
    assert metrics["finite"] == 1
    before = jax.tree.map(np.array, state)
    _, (after, metrics, _) = one_update("adapter", mesh, bad, state)
    assert metrics["finite"] == 0 and np.isnan(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, after))
    _, (recovered, metrics, _) = one_update("adapter", mesh, good, after)
    assert metrics["finite"] == 1 and not np.array_equal(before.trainable.blocks.q.b, recovered.trainable.blocks.q.b)


def test_supervised_training_minimises_the_negative_log_likelihood_of_its_tokens():
    mesh = make_mesh(1, 1)
    batch = loss_batch("dapo", mesh, sampler_logps=None, ref_logps=None, old_logps=None)
    _, (state, metrics, _) = one_update("text", mesh, batch, loss=None)
    given, losses = inputs("text", mesh), [float(metrics["loss"])]
    how = {"model": Model(tiny().config, mesh), "temperature": TEMPERATURE, "micro_batch": Q}
    policy = policy_of(given.trainable, given.frozen, jnp.dtype("float32"))
    logps = completion_logps(policy, given.prompts, given.completion_ids, **how)
    np.testing.assert_allclose(losses[0], -np.asarray(logps)[MASK].mean(), rtol=1e-5)
    for _ in range(3):
        _, (state, metrics, _) = one_update("text", mesh, batch, state, loss=None)
        losses.append(float(metrics["loss"]))
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def test_policy_computes_trained_weights_in_the_dtype_of_the_model():
    _, config, params = tiny()
    lora, bfloat16 = random_lora(config), jnp.dtype("bfloat16")
    assert policy_of(lora, params, bfloat16) == Policy(params, lora)
    trained, no_lora = policy_of(params.text, Params(None, params.vision), bfloat16)
    assert no_lora is None and trained.vision is params.vision
    assert {x.dtype for x in jax.tree.leaves(trained.text)} == {bfloat16}
    everything, _ = policy_of(params, Params(None, None), bfloat16)
    assert isinstance(everything, Params) and {x.dtype for x in jax.tree.leaves(everything)} == {bfloat16}


def rates(**changes) -> np.ndarray:
    """The learning rate of each step, read off what Adam does to a weight whose gradient never changes."""
    settings = replace(SETTINGS, weight_decay=0.0, max_grad_norm=10.0, learning_rate=0.5, **changes)
    optimizer = make_learner(settings, Model(tiny().config, make_mesh(1, 1))).optimizer
    weight, gradient = jnp.zeros(()), jnp.ones(())
    state, found = optimizer.init(weight), []
    for _ in range(settings.steps + 2):
        change, state = optimizer.update(gradient, state, weight)
        found.append(-float(change))
    return np.array(found)


def test_the_rate_warms_up_from_a_first_step_that_is_not_zero_and_decays_to_a_tenth():
    found = rates(steps=12, warmup_steps=4, lr_scheduler="cosine")
    np.testing.assert_allclose(found[:4], [0.125, 0.25, 0.375, 0.5], rtol=1e-4)
    assert (np.diff(found[3:12]) < 0).all()
    progress = np.arange(9) / 8
    expected = 0.05 + 0.45 * (1 + np.cos(np.pi * progress)) / 2
    np.testing.assert_allclose(found[3:12], expected, rtol=1e-4)
    np.testing.assert_allclose(found[11:], 0.05, rtol=1e-4)


@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_a_constant_rate_stays_after_its_warm_up(warmup_steps):
    found = rates(steps=6, warmup_steps=warmup_steps, lr_scheduler="constant")
    np.testing.assert_allclose(found[:warmup_steps], 0.5 * np.arange(1, warmup_steps + 1) / 3, rtol=1e-4)
    np.testing.assert_allclose(found[warmup_steps:], 0.5, rtol=1e-4)


def test_a_run_shorter_than_its_warm_up_keeps_warming_up():
    found = rates(steps=2, warmup_steps=10, lr_scheduler="cosine")
    np.testing.assert_allclose(found, 0.05 * np.arange(1, 5), rtol=1e-4)


def test_gradients_are_clipped_by_the_norm_of_them_all():
    """Gradients of 3 and 4 of two weights become 0.6 and 0.8; Adam's first moment holds a tenth of them."""
    settings = replace(SETTINGS, max_grad_norm=1.0)
    optimizer = make_learner(settings, Model(tiny().config, make_mesh(1, 1))).optimizer
    weights = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    _, state = optimizer.update({"a": jnp.float32(3), "b": jnp.float32(4)}, optimizer.init(weights), weights)
    first_moment = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose([first_moment["a"], first_moment["b"]], [0.06, 0.08], rtol=1e-5)
