"""grpo/algorithm.py against TRL's own code (loss, parameter gradients, metrics, advantages) and hand arithmetic.

TRL is driven without its constructor, on a tiny torch Gemma 3. Its per-token log-probs go into our loss; the gradient
of our loss with respect to them is carried on through torch to the parameters, where it is compared with TRL's.
"""

import inspect
import math
import textwrap
from collections import defaultdict
from itertools import product
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head, nanstd

from grpo.algorithm import (
    LOSS_TYPES,
    LossBatch,
    LossConfig,
    centred_rewards,
    cispo_surrogate,
    clipped_surrogate,
    group_advantages,
    grpo_loss,
    importance_ratio,
    kl_k3,
    leave_one_out_advantages,
    loss_metrics,
    mask_truncated,
    token_weights,
    truncated_importance_weights,
    zero_std_groups,
)

Q, G, P, C = 3, 5, 4, 7
MAX_COMPLETION_LENGTH = 11  # longer than C, as when all completions of a batch end early
LENGTHS = np.array([[7, 2, 5, 1, 3], [4, 0, 7, 6, 2], [1, 3, 2, 5, 7]])  # one row is empty
MASK = np.arange(C) < LENGTHS[..., None]
TRL_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")

torch.set_num_threads(1)


def rows(array) -> torch.Tensor:
    """[Q, G, ...] to torch [QG, ...]."""
    return torch.from_numpy(np.array(array).reshape(Q * G, *np.shape(array)[2:]))


def groups(tensor: torch.Tensor) -> np.ndarray:
    """Torch [QG, ...] to [Q, G, ...]."""
    return tensor.detach().numpy().reshape(Q, G, *tensor.shape[1:])


def make_trl_trainer(model, config: LossConfig, *, micro_batches: int = 1) -> GRPOTrainer:
    """A GRPOTrainer with just the state that `_compute_loss` reads, on one process."""
    sampler_correction = config.importance_sampling_clip_max is not None
    trainer = object.__new__(GRPOTrainer)
    trainer.__dict__.update(
        accelerator=Accelerator(cpu=True),
        model=model,
        state=SimpleNamespace(global_step=0),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        args=SimpleNamespace(
            use_bias_correction_kl=config.use_bias_correction_kl,
            delta=config.delta,
            steps_per_generation=micro_batches,
            report_to=[],
        ),
        beta=config.beta,
        loss_type="grpo" if config.loss_type == "gspo" else config.loss_type,
        importance_sampling_level=config.ratio_level,
        epsilon_low=config.epsilon,
        epsilon_high=config.clip_high,
        max_completion_length=MAX_COMPLETION_LENGTH,
        current_gradient_accumulation_steps=micro_batches,
        use_vllm=sampler_correction,
        vllm_importance_sampling_correction=sampler_correction,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
    )
    return trainer


@pytest.fixture(scope="module")
def trl():
    """A tiny model, a ragged off-policy batch, and the model's log-probs with their torch graph."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    )
    model = Gemma3ForCausalLM(config).float()
    # The default initialisation predicts almost uniformly, which would leave little gradient to compare.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    model.train()

    inputs = {
        "prompt_ids": torch.randint(1, 61, (Q * G, P)),
        "prompt_mask": (torch.arange(P) >= torch.randint(0, P - 1, (Q * G, 1))).long(),
        "completion_ids": torch.randint(1, 61, (Q * G, C)),
        "completion_mask": rows(MASK).long(),
        "advantages": torch.randn(Q * G),
        "num_items_in_batch": torch.tensor(MASK.sum()),
    }
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    trainer = object.__new__(GRPOTrainer)
    trainer.accelerator = Accelerator(cpu=True)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, attention_mask, C)
    # Wide enough that both ends of the clip range, at token and at sequence level, are often passed.
    inputs["old_per_token_logps"] = logps.detach() + 0.5 * torch.randn_like(logps) + 0.5 * torch.randn(Q * G, 1)
    inputs["ref_per_token_logps"] = logps.detach() + 0.7 * torch.randn_like(logps)
    inputs["sampler_logps"] = inputs["old_per_token_logps"] + 0.5 * torch.randn_like(logps)
    return SimpleNamespace(model=model, inputs=inputs, logps=logps)


def loss_batch(trl, config: LossConfig) -> LossBatch:
    weights = token_weights(config.loss_type, jnp.asarray(MASK), max_completion_length=MAX_COMPLETION_LENGTH)
    return LossBatch(
        advantages=groups(trl.inputs["advantages"]),
        completion_mask=MASK,
        token_weights=weights,
        old_logps=groups(trl.inputs["old_per_token_logps"]),
        ref_logps=groups(trl.inputs["ref_per_token_logps"]),
        sampler_logps=groups(trl.inputs["sampler_logps"]),
    )


def assert_equals_trl(trl, config: LossConfig):
    """Loss to 1e-5, every parameter's gradient to 1e-4 of its largest entry, and the metrics that both have."""
    trainer = make_trl_trainer(trl.model, config)
    inputs = dict(trl.inputs)
    if config.importance_sampling_clip_max is not None:
        difference = (inputs["old_per_token_logps"] - inputs["sampler_logps"]) * inputs["completion_mask"]
        inputs["importance_sampling_ratio"] = torch.exp(difference).clamp(max=config.importance_sampling_clip_max)
    parameters = list(trl.model.parameters())
    trl_loss = trainer._compute_loss(trl.model, inputs)
    trl_gradients = torch.autograd.grad(trl_loss, parameters)

    batch = loss_batch(trl, config)
    loss, logps_gradient = jax.value_and_grad(grpo_loss)(groups(trl.logps), batch, config)
    gradients = torch.autograd.grad(trl.logps, parameters, rows(logps_gradient), retain_graph=True)

    np.testing.assert_allclose(loss, trl_loss.item(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, trl_gradients, strict=True):
        scale = theirs.abs().max().item()
        assert scale > 0
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * scale)

    metrics = {name: value[0] / value[1] for name, value in loss_metrics(groups(trl.logps), batch, config).items()}
    shared = trainer._metrics["train"].keys() & metrics.keys()
    assert shared == metrics.keys() - {"ratio/mean", "sampling/sampling_logp_difference/mean"}
    for name in shared:
        np.testing.assert_allclose(metrics[name], trainer._metrics["train"][name][0], rtol=1e-5, atol=1e-7)
    return metrics


@pytest.mark.parametrize(
    "loss_type, beta, use_bias_correction_kl, level",
    list(product(TRL_LOSSES, (0.0, 0.04), (True, False), ("token", "sequence"))),
)
def test_loss_gradient_and_metrics_equal_trl(trl, loss_type, beta, use_bias_correction_kl, level):
    metrics = assert_equals_trl(
        trl,
        LossConfig(
            loss_type=loss_type,
            importance_sampling_level=level,
            epsilon=0.2,
            epsilon_high=1.2 if loss_type == "cispo" else 0.28,
            beta=beta,
            use_bias_correction_kl=use_bias_correction_kl,
        ),
    )
    for name in metrics.keys() & {"clip_ratio/low_mean", "clip_ratio/high_mean", "cispo_clip_ratio"}:
        assert 0 < metrics[name] < 1, f"the batch does not exercise {name}"


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_two_sided_clipping_equals_trl(trl, loss_type, level):
    config = LossConfig(loss_type=loss_type, importance_sampling_level=level, delta=1.25, beta=0.04)
    assert_equals_trl(trl, config)
    batch, logps = loss_batch(trl, config), groups(trl.logps)
    one_sided = LossConfig(loss_type=loss_type, importance_sampling_level=level, beta=0.04)
    assert grpo_loss(logps, batch, config) < grpo_loss(logps, batch, one_sided)


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_truncated_importance_weights_equal_trl_and_leave_the_kl_alone(trl, loss_type):
    assert_equals_trl(trl, LossConfig(loss_type=loss_type, beta=0.04, importance_sampling_clip_max=1.5))


def test_gspo_is_trl_grpo_with_the_sequence_ratio(trl):
    assert_equals_trl(trl, LossConfig(loss_type="gspo", beta=0.04))


@pytest.mark.parametrize("loss_type", TRL_LOSSES)
def test_trl_in_micro_batches_adds_up_to_our_whole_batch_except_for_bnpo(trl, loss_type):
    config = LossConfig(loss_type=loss_type, beta=0.04)
    trainer = make_trl_trainer(trl.model, config, micro_batches=Q)
    trl_loss = 0.0
    for rows_of_a_prompt in torch.arange(Q * G).split(G):
        inputs = {name: x if x.ndim == 0 else x[rows_of_a_prompt] for name, x in trl.inputs.items()}
        trl_loss += trainer._compute_loss(trl.model, inputs).item()
    same = np.isclose(grpo_loss(groups(trl.logps), loss_batch(trl, config), config), trl_loss, rtol=1e-5, atol=1e-5)
    assert same == (loss_type != "bnpo")


@pytest.mark.parametrize("parts", [[1, 1, 1], [2, 1], [1, 2]])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_gradients_and_metrics_of_the_parts_add_up_to_the_whole(trl, loss_type, parts):
    config = LossConfig(loss_type=loss_type, beta=0.04, importance_sampling_clip_max=1.5)
    batch, logps = loss_batch(trl, config), groups(trl.logps)
    whole, whole_gradient = jax.value_and_grad(grpo_loss)(logps, batch, config)
    whole_metrics = loss_metrics(logps, batch, config)

    loss, gradients, metrics, start = 0.0, [], [], 0
    for size in parts:
        part = jax.tree.map(lambda x, at=slice(start, start + size): x[at], (logps, batch))
        value, gradient = jax.value_and_grad(grpo_loss)(*part, config)
        loss += value
        gradients.append(gradient)
        metrics.append(loss_metrics(*part, config))
        start += size
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(gradients), whole_gradient, rtol=1e-5, atol=1e-9)
    added = jax.tree.map(lambda *values: sum(values), *metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), added, whole_metrics)


def test_losses_gradients_and_metrics_of_shards_add_up_to_the_whole(trl):
    config = LossConfig(beta=0.04)
    batch, logps = loss_batch(trl, config), groups(trl.logps)

    def shard_loss(logps, batch):
        loss, gradient = jax.value_and_grad(grpo_loss)(logps, batch, config)
        return jax.lax.psum((loss, loss_metrics(logps, batch, config)), "data"), gradient

    shards = jax.shard_map(
        shard_loss,
        mesh=Mesh(np.array(jax.devices()[:Q]), ("data",)),
        in_specs=PartitionSpec("data"),
        out_specs=(PartitionSpec(), PartitionSpec("data")),
    )
    (loss, metrics), gradient = jax.jit(shards)(logps, batch)
    whole, whole_gradient = jax.value_and_grad(grpo_loss)(logps, batch, config)
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    np.testing.assert_allclose(gradient, whole_gradient, rtol=1e-5, atol=1e-8)
    whole_metrics = loss_metrics(logps, batch, config)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, whole_metrics)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_positions_change_nothing_whatever_they_hold(trl, loss_type):
    """Masked log-probs that lie a thousand apart would overflow the ratio if it were computed there."""
    config = LossConfig(loss_type=loss_type, beta=0.04, importance_sampling_clip_max=1.5)
    batch, logps = loss_batch(trl, config), groups(trl.logps)
    old, ref, sampler = (np.where(MASK, x, x - 1000) for x in (batch.old_logps, batch.ref_logps, batch.sampler_logps))
    dirty = batch._replace(old_logps=old, ref_logps=ref + 2000 * ~MASK, sampler_logps=sampler - 1000 * ~MASK)
    clean = jax.value_and_grad(grpo_loss)(logps, batch, config)
    assert np.all(clean[1][~MASK] == 0)
    jax.tree.map(np.testing.assert_array_equal, clean, jax.value_and_grad(grpo_loss)(logps, dirty, config))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_samples_used_once_give_the_policy_gradient(trl, loss_type):
    """With old_logps = logps every variant has the gradient -w Â, times the sampler's correction as a constant."""
    config = LossConfig(loss_type=loss_type, importance_sampling_clip_max=1.5)
    batch, logps = loss_batch(trl, config), groups(trl.logps)
    batch = batch._replace(sampler_logps=logps + 0.5 * np.sin(np.arange(Q * G)).reshape(Q, G, 1))
    gradient = jax.grad(lambda x: grpo_loss(x, batch._replace(old_logps=x), config))(logps)
    correction = np.minimum(np.exp(logps - batch.sampler_logps), 1.5)
    expected = -batch.token_weights * batch.advantages[..., None] * correction
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def trl_advantages(rewards: np.ndarray, scale_rewards: str) -> tuple[np.ndarray, np.ndarray]:
    """Runs the lines of TRL's `_generate_and_score_completions` that make advantages of rewards.

    The method also generates, so it cannot be called as a whole; the lines are taken from the installed source.
    """
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    start = source.index("        unscorable_mask = ")
    last_line = "        advantages = torch.nan_to_num(advantages, nan=0.0)\n"
    lines = textwrap.dedent(source[start : source.index(last_line) + len(last_line)])
    scope = {
        "self": SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize",
            reward_weights=torch.ones(1),
            scale_rewards=scale_rewards,
        ),
        "rewards_per_func": torch.from_numpy(rewards).reshape(-1, 1),
        "num_generations": rewards.shape[1],
        "device": "cpu",
        "torch": torch,
        "nanstd": nanstd,
    }
    exec(lines, scope)
    return scope["advantages"].numpy().reshape(rewards.shape), scope["is_std_zero"].numpy().reshape(rewards.shape)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("shape", [(Q, G), (4, 2), (3, 1), (1, 1)])
def test_advantages_equal_trl(shape, scale_rewards):
    rewards = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    expected, _ = trl_advantages(rewards, scale_rewards)
    np.testing.assert_allclose(group_advantages(rewards, scale_rewards=scale_rewards), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_advantages_with_unscorable_completions_equal_trl(scale_rewards):
    nan = np.nan
    rewards = np.array([[1, nan, 0, 0.5], [nan, nan, nan, nan], [nan, nan, 2, nan], [1, 1, 1, 1]], np.float32)
    expected, _ = trl_advantages(rewards, scale_rewards)
    np.testing.assert_allclose(group_advantages(rewards, scale_rewards=scale_rewards), expected, rtol=1e-5, atol=1e-6)


def test_group_advantages_by_hand():
    """Rewards 0, 2, 4: mean 2, standard deviation sqrt((4 + 0 + 4) / 2) = 2."""
    rewards = np.array([[0.0, 2.0, 4.0], [7.0, 7.0, 7.0]])
    one = 2 / (2 + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards), [[-one, 0, one], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(group_advantages(rewards, scale_rewards="none"), [[-2, 0, 2], [0, 0, 0]])


def test_leave_one_out_advantages_by_hand():
    """For 1, 2 and 6 the others average 4, 3.5 and 1.5; NaN does not count; alone, there is nothing to compare with."""
    rewards = np.array([[1, 2, 6], [np.nan, 1, 3], [np.nan, 5, np.nan]])
    expected = [[-3, -1.5, 4.5], [0, -2, 2], [0, 0, 0]]
    np.testing.assert_allclose(leave_one_out_advantages(rewards), expected, rtol=1e-6)


def test_equal_rewards_give_advantages_of_exactly_zero():
    """0.9 six times has a float32 mean that is not 0.9."""
    rewards = np.full((1, 6), 0.9, np.float32)
    assert jnp.mean(rewards) != rewards[0, 0]
    for advantages in (group_advantages(rewards), leave_one_out_advantages(rewards), centred_rewards(rewards)):
        np.testing.assert_array_equal(advantages, np.zeros((1, 6)))


def test_zero_std_groups_are_those_without_a_difference():
    nan = np.nan
    rewards = np.array([[0.7, 0.7, 0.7], [0, 1, 0], [nan, 1, 1], [nan, nan, 3], [nan, nan, nan], [nan, 0, 1]])
    np.testing.assert_array_equal(zero_std_groups(rewards), [True, False, True, True, True, False])
    scored = np.array([[0.5, 0.5, 0.5], [0, 1, 0]], np.float32)
    np.testing.assert_array_equal(zero_std_groups(scored), trl_advantages(scored, "group")[1].all(axis=1))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([np.nan, 0.0, 0.1, 1.0, -3.0]), min_size=8, max_size=8))
def test_advantages_are_finite_and_sum_to_zero_in_every_group(rewards):
    rewards = np.array(rewards).reshape(2, 4)
    for advantages in (
        *(group_advantages(rewards, scale_rewards=scale) for scale in ("group", "batch", "none")),
        leave_one_out_advantages(rewards),
    ):
        assert np.all(np.isfinite(advantages))
        np.testing.assert_allclose(jnp.sum(advantages, axis=-1), 0, atol=1e-5)
        assert np.all(np.asarray(advantages)[np.isnan(rewards)] == 0)


def test_degenerate_batches_have_finite_loss_and_gradient():
    """All rows empty, and a group of one with one token."""
    for mask in (np.zeros((2, 3, 4), bool), np.ones((1, 1, 1), bool)):
        for loss_type in LOSS_TYPES:
            zeros = jnp.zeros(mask.shape)
            weights = token_weights(loss_type, mask, max_completion_length=4)
            batch = LossBatch(group_advantages(zeros[..., 0]), mask, weights, zeros, zeros, zeros)
            config = LossConfig(loss_type=loss_type, beta=0.04, importance_sampling_clip_max=1.5)
            loss, gradient = jax.value_and_grad(grpo_loss)(zeros - 1.0, batch, config)
            assert np.isfinite(loss) and np.all(np.isfinite(gradient))


def test_token_weights_by_hand():
    """Rows of 1, 2 and 0 tokens, length limit 5."""
    mask = np.array([[[1, 0], [1, 1], [0, 0]]], bool)
    expected = {
        "grpo": [[1 / 3, 0], [1 / 6, 1 / 6], [0, 0]],
        "bnpo": [[1 / 3, 0], [1 / 3, 1 / 3], [0, 0]],
        "dr_grpo": [[1 / 15, 0], [1 / 15, 1 / 15], [0, 0]],
    }
    expected |= {"gspo": expected["grpo"], "dapo": expected["bnpo"], "cispo": expected["bnpo"]}
    assert expected.keys() == set(LOSS_TYPES)
    for loss_type, weights in expected.items():
        np.testing.assert_allclose(token_weights(loss_type, mask, max_completion_length=5), [weights], rtol=1e-6)


def test_truncated_completions_leave_the_mask_as_empty_rows():
    mask = np.array([[[1, 1, 1], [1, 1, 0]]], bool)
    np.testing.assert_array_equal(
        mask_truncated(mask, np.array([[False, True]])), np.array([[[0, 0, 0], [1, 1, 0]]], bool)
    )


def test_sequence_ratio_is_the_geometric_mean_of_the_token_ratios():
    """2 and 8 have the geometric mean 4; the masked third token would make it 16 times larger."""
    logps = jnp.log(jnp.array([[[2.0, 8.0, 1024.0]]]))
    mask = np.array([[[True, True, False]]])
    np.testing.assert_allclose(importance_ratio(logps, jnp.zeros((1, 1, 3)), mask), [[[2, 8, 1]]], rtol=1e-6)
    sequence = importance_ratio(logps, jnp.zeros((1, 1, 3)), mask, level="sequence")
    np.testing.assert_allclose(sequence, [[[4.0]]], rtol=1e-6)


@pytest.mark.parametrize(
    "ratio, advantage, delta, loss, slope",
    [
        (1.1, 1.0, None, -1.1, -1),  # inside the range: the plain policy gradient
        (2.0, 1.0, None, -1.3, 0),  # already likelier by more than ε_high: no gain
        (0.5, 1.0, None, -0.5, -1),  # became unlikely though good: pulled back
        (0.5, -1.0, None, 0.8, 0),  # already less likely by more than ε: no gain
        (2.0, -1.0, None, 2.0, 1),  # became likely though bad: pushed back, without bound
        (2.0, -1.0, 1.5, 1.5, 0),  # the same, bounded by δ
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, delta, loss, slope):
    def surrogate(rho):
        return clipped_surrogate(rho, jnp.float32(advantage), epsilon=0.2, epsilon_high=0.3, delta=delta)

    value, gradient = jax.value_and_grad(surrogate)(jnp.float32(ratio))
    np.testing.assert_allclose([value, gradient], [loss, slope], rtol=1e-6)


def test_cispo_keeps_the_gradient_of_a_token_that_the_clip_would_drop():
    """Ratio 4 with a largest weight of 3 and advantage 2: loss -3 * 2 * log π, slope -6."""
    loss, slope = jax.value_and_grad(
        lambda logp: cispo_surrogate(jnp.exp(logp - (logp - jnp.log(4.0))), logp, jnp.float32(2), epsilon_high=3.0)
    )(jnp.float32(-0.5))
    np.testing.assert_allclose([loss, slope], [3, -6], rtol=1e-6)


def test_truncated_importance_weights_by_hand():
    """π_old / π_sampler of 1/2, 2 and 8, capped at 3, and 1 off the mask."""
    old, sampler = jnp.log(jnp.array([[[0.1, 0.4, 0.8, 0.9]]])), jnp.log(jnp.array([[[0.2, 0.2, 0.1, 0.1]]]))
    mask = np.array([[[True, True, True, False]]])
    weights = truncated_importance_weights(old, sampler, mask, clip_max=3.0)
    np.testing.assert_allclose(weights, [[[0.5, 2, 3, 1]]], rtol=1e-6)


def test_k3_by_hand():
    """π_ref / π_θ = 2 gives 2 - log 2 - 1."""
    k3 = kl_k3(jnp.log(jnp.full((1, 1, 2), 0.25)), jnp.log(jnp.full((1, 1, 2), 0.5)), np.array([[[True, False]]]))
    np.testing.assert_allclose(k3, [[[1 - math.log(2), 0]]], rtol=1e-6)


def test_k3_is_an_unbiased_kl_and_its_gradient_only_with_the_importance_ratio():
    """Sums over a whole vocabulary stand for the means over samples: from π_θ itself, and from an older π_old."""
    theta, ref, old = jax.random.normal(jax.random.key(0), (3, 1, 1, 13))
    log_ref, log_old = jax.nn.log_softmax(ref), jax.nn.log_softmax(old)
    everything = jnp.ones((1, 1, 13), bool)

    def kl(a, b):
        return jnp.sum(jnp.exp(a) * (a - b))

    def mean_penalty(x, log_sampler, *, corrected):
        logps = jax.nn.log_softmax(x)
        penalty = kl_k3(logps, log_ref, everything)
        if corrected:
            penalty *= importance_ratio(logps, log_sampler, everything)
        return jnp.sum(jnp.exp(log_sampler) * penalty)

    log_theta = jax.nn.log_softmax(theta)
    reverse = jax.grad(lambda x: kl(jax.nn.log_softmax(x), log_ref))(theta)
    forward = jax.grad(lambda x: kl(log_ref, jax.nn.log_softmax(x)))(theta)
    assert np.max(np.abs(reverse - forward)) > 0.05
    np.testing.assert_allclose(mean_penalty(theta, log_theta, corrected=False), kl(log_theta, log_ref), rtol=1e-5)
    gradient = jax.grad(mean_penalty)
    np.testing.assert_allclose(gradient(theta, log_theta, corrected=False), forward, atol=1e-6)
    np.testing.assert_allclose(gradient(theta, log_theta, corrected=True), reverse, atol=1e-6)
    np.testing.assert_allclose(gradient(theta, log_old, corrected=True), reverse, atol=1e-6)


def test_the_loss_compiles_with_the_config_as_a_static_argument(trl):
    config = LossConfig(beta=0.04)
    batch, logps = loss_batch(trl, config), groups(trl.logps)
    compiled = jax.jit(grpo_loss, static_argnames="config")(logps, batch, config)
    np.testing.assert_allclose(compiled, grpo_loss(logps, batch, config), rtol=1e-6)


def test_epsilon_high_follows_epsilon_except_for_cispo():
    assert LossConfig(epsilon=0.1).clip_high == 0.1
    assert LossConfig(epsilon=0.1, epsilon_high=0.3).clip_high == 0.3
    assert LossConfig(loss_type="cispo").clip_high == 5.0
    assert LossConfig(loss_type="gspo").ratio_level == "sequence"


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"loss_type": "ppo"}, "loss_type is 'ppo'; choose one of grpo, bnpo, dr_grpo, dapo, cispo, gspo"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level is 'word'; choose one of token, sequence"),
        ({"epsilon": 0.0}, "epsilon is 0.0; it must be greater than 0"),
        ({"epsilon_high": -0.1}, "epsilon_high is -0.1; it must be greater than 0"),
        ({"importance_sampling_clip_max": math.nan}, "importance_sampling_clip_max is nan; it must be greater than 0"),
        ({"beta": -1.0}, "beta is -1.0; it must be 0"),
        ({"delta": 1.2}, "delta is 1.2; it must be greater than 1 \\+ epsilon_high = 1.2"),
        ({"loss_type": "cispo", "delta": 9.0}, "delta is 9.0, but 'cispo' has no clipped ratio"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LossConfig(**options)


def test_unknown_names_are_refused_by_the_functions_that_take_them():
    with pytest.raises(ValueError, match="scale_rewards is 'std'; choose one of group, batch, none"):
        group_advantages(np.zeros((1, 2)), scale_rewards="std")
    with pytest.raises(ValueError, match="loss_type is 'ppo'"):
        token_weights("ppo", MASK, max_completion_length=1)
    with pytest.raises(ValueError, match="importance_sampling_level is 'word'"):
        importance_ratio(jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1)), np.ones((1, 1, 1), bool), level="word")
