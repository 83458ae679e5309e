"""GRPO and its variants as equations: rewards to advantages, log-probs to a loss. Arrays in, arrays out.

Differences from DeepSeekMath (https://arxiv.org/abs/2402.03300, section 4.1), and the reasons:

* The default loss is "dapo", the mean over tokens. The paper's loss, "grpo", is the mean over completions of each
  completion's mean over tokens: the longer a wrong answer, the cheaper it is per token.
* The mean over tokens is over the whole batch, not over each group as in DAPO: every token counts the same.
* The KL term is ρ k3, not k3: the gradient of k3 belongs to another divergence (`kl_penalty`). β is 0 by default: right
  answers can be checked, so the policy needs less restraint than with a learned reward model.
* The standard deviation of a group's rewards has Bessel's correction, and 1e-4 is added to it: advantages stay small
  where rewards hardly differ.
* "cispo" bounds the weight of a token from above only, as its authors ran it; the paper's equation has both bounds.
* An optional correction handles a sampler whose probabilities are not the trainer's (`truncated_importance_weights`).
* A reward is one number per completion: there is no process supervision and no reward model. The reference is fixed.

These are TRL 1.16's choices too, and its names are used. Where the papers maximise an objective J, this file returns
the loss -J. The reading order is the paper's: advantages, importance ratio, KL, clipped surrogate, the weight of a
token, and at the end `grpo_loss`, which puts them together.

Symbols of the paper and their arrays, for Q prompts, G completions of each, and completions padded to C tokens:

    rᵢ           rewards                   float32[Q, G], NaN where a completion could not be rewarded
    Âᵢ           advantages                float32[Q, G], the same for every token of a completion
    log π_θ      logps                     float32[Q, G, C], the policy in training: the only one with a gradient
    log π_old    old_logps                 float32[Q, G, C], the policy at the time of sampling
    log π_ref    ref_logps                 float32[Q, G, C], the frozen reference
    |oᵢ|         completion_mask, summed   bool[Q, G, C], True on tokens that count: through the first end of turn

Masked positions may hold any finite number. All log-probs are at the sampling temperature.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo")
SCALE_REWARDS = ("group", "batch", "none")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")
STD_EPSILON = 1e-4


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError, naming the choices, where value is not one of them."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")


def centred_rewards(rewards: jax.Array) -> jax.Array:
    """rᵢ - mean(r) over each group: float32[Q, G] to float32[Q, G]; NaN rewards are left out and stay NaN."""
    # The smallest is subtracted first so that a group of equal rewards gives exactly 0. The float32 mean of equal
    # numbers can be off by one rounding, and that difference would then be divided by something as small as 1e-4.
    shifted = rewards - jnp.nanmin(rewards, axis=-1, keepdims=True)
    return shifted - jnp.nanmean(shifted, axis=-1, keepdims=True)


def group_advantages(rewards: jax.Array, *, scale_rewards: str = "group") -> jax.Array:
    """Advantages relative to the group: how much better a completion is than the others of its prompt.

        Âᵢ = (rᵢ - mean(r)) / (std(r) + 1e-4)

    DeepSeekMath, section 4.1.2 (outcome supervision). The mean is always the group's. The standard deviation is the
    group's ("group"), that of all rewards of the step ("batch", as in https://arxiv.org/abs/2508.08221), or left out
    ("none", as in Dr. GRPO, https://arxiv.org/abs/2503.20783: dividing by it favours prompts that are almost always
    or almost never solved).

    rewards is float32[Q, G] with all prompts of the step; NaN marks a completion that could not be rewarded, which
    takes no part in mean and standard deviation. Returns float32[Q, G]: 0 for a NaN reward and for a group of one.
    """
    check_choice("scale_rewards", scale_rewards, SCALE_REWARDS)
    rewards = jnp.asarray(rewards, jnp.float32)
    advantages = centred_rewards(rewards)
    if scale_rewards == "group":
        advantages /= jnp.nanstd(advantages, axis=-1, keepdims=True, ddof=1) + STD_EPSILON
    elif scale_rewards == "batch":
        advantages /= jnp.nanstd(rewards, ddof=1) + STD_EPSILON
    return jnp.where(jnp.isnan(advantages), 0.0, advantages)


def leave_one_out_advantages(rewards: jax.Array) -> jax.Array:
    """Advantages against the mean of the other completions: a baseline without bias, since it does not contain rᵢ.

        Âᵢ = rᵢ - 1/(G-1) Σⱼ≠ᵢ rⱼ = (rᵢ - mean(r)) · G/(G-1)

    RLOO, https://arxiv.org/abs/2402.14740. Arguments and result as in `group_advantages`; G counts those with a reward.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    count = jnp.sum(~jnp.isnan(rewards), axis=-1, keepdims=True)
    advantages = centred_rewards(rewards) * count / jnp.maximum(count - 1, 1)
    return jnp.where(jnp.isnan(advantages), 0.0, advantages)


def zero_std_groups(rewards: jax.Array) -> jax.Array:
    """Groups that teach nothing, because all their rewards are equal: float32[Q, G] to bool[Q].

    Its mean is the metric `frac_reward_zero_std`. In TRL a group with one rewarded completion does not count, and with
    scale_rewards "batch" the metric is about the batch; here it is always about groups. DAPO's dynamic sampling
    (https://arxiv.org/abs/2503.14476, section 3.2) replaces these groups with those of other prompts.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    return ~(jnp.nanmax(rewards, axis=-1) > jnp.nanmin(rewards, axis=-1))


def mask_truncated(completion_mask: jax.Array, finished: jax.Array) -> jax.Array:
    """Leave completions that hit the length limit out of the loss: their reward says little about their tokens.

    Overlong filtering of DAPO, section 3.4; TRL's `mask_truncated_completions`. completion_mask is bool[Q, G, C];
    finished, bool[Q, G], is True where the completion ended by itself. Returns bool[Q, G, C], all False where it did
    not. Apply it before `token_weights`.
    """
    return completion_mask & finished[..., None]


def importance_ratio(
    logps: jax.Array, old_logps: jax.Array, completion_mask: jax.Array, *, level: str = "token"
) -> jax.Array:
    """How much likelier a completion is under the policy in training than under the policy that sampled it.

        token       ρᵢₜ = π_θ(oᵢₜ | q, oᵢ,<ₜ) / π_old(oᵢₜ | q, oᵢ,<ₜ)       DeepSeekMath, equation 3
        sequence    ρᵢ  = (π_θ(oᵢ | q) / π_old(oᵢ | q))^(1/|oᵢ|)            GSPO, https://arxiv.org/abs/2507.18071

    The sequence ratio is the geometric mean of the token ratios; its gradient reaches every token. π_old is constant:
    if samples are used for one update only, old_logps may be logps itself, and ρ is 1 with gradient ∇log π_θ.

    Returns float32[Q, G, C] for "token", float32[Q, G, 1] for "sequence"; 1 on masked positions and for empty rows.
    """
    check_choice("importance_sampling_level", level, IMPORTANCE_SAMPLING_LEVELS)
    log_ratio = jnp.where(completion_mask, logps - jax.lax.stop_gradient(old_logps), 0.0)
    if level == "sequence":
        lengths = jnp.sum(completion_mask, axis=-1, keepdims=True)
        log_ratio = jnp.sum(log_ratio, axis=-1, keepdims=True) / jnp.maximum(lengths, 1)  # [Q, G, 1]
    return jnp.exp(log_ratio)


def kl_k3(logps: jax.Array, ref_logps: jax.Array, completion_mask: jax.Array) -> jax.Array:
    """The k3 estimate of KL(π_θ ‖ π_ref) from one sampled token: never negative, and unbiased for tokens from π_θ.

        k3 = π_ref/π_θ - log(π_ref/π_θ) - 1

    Schulman, http://joschu.net/blog/kl-approx.html; DeepSeekMath, section 4.1.1. All arguments are [Q, G, C]; returns
    float32[Q, G, C], 0 on masked positions.
    """
    log_ratio = jnp.where(completion_mask, jax.lax.stop_gradient(ref_logps) - logps, 0.0)
    return jnp.exp(log_ratio) - log_ratio - 1.0


def clipped_surrogate(
    ratio: jax.Array, advantages: jax.Array, *, epsilon: float, epsilon_high: float, delta: float | None = None
) -> jax.Array:
    """The clipped loss of a token: nothing is gained by moving its ratio out of the clip range.

        ℓ = -min(ρ Â, clip(ρ, 1-ε, 1+ε_high) Â)

    PPO, https://arxiv.org/abs/1707.06347; with one ε in DeepSeekMath, equation 3; with two ("clip-higher") in DAPO,
    equation 8. With delta the first ρ becomes min(ρ, δ), which bounds the loss also where Â is negative: two-sided
    clipping, INTELLECT-2, https://arxiv.org/abs/2505.07291.

    ratio is [Q, G, C] or [Q, G, 1], advantages [Q, G, 1]; returns the shape of ratio.
    """
    clipped_ratio = jnp.clip(ratio, 1 - epsilon, 1 + epsilon_high)
    if delta is not None:
        ratio = jnp.minimum(ratio, delta)
    return -jnp.minimum(ratio * advantages, clipped_ratio * advantages)


def cispo_surrogate(ratio: jax.Array, logps: jax.Array, advantages: jax.Array, *, epsilon_high: float) -> jax.Array:
    """REINFORCE with a clipped importance weight: a token keeps its gradient also where PPO's clip would drop it.

        ℓ = -sg(min(ρ, ε_high)) Â log π_θ        sg: stop gradient

    CISPO in MiniMax-M1, https://arxiv.org/abs/2506.13585, equations 4 and 5, without the lower bound. As in TRL, ε_high
    is the largest weight itself, not its distance from 1. ratio is [Q, G, C] or [Q, G, 1], logps [Q, G, C], advantages
    [Q, G, 1]; returns float32[Q, G, C].
    """
    return -jax.lax.stop_gradient(jnp.minimum(ratio, epsilon_high)) * advantages * logps


def truncated_importance_weights(
    old_logps: jax.Array, sampler_logps: jax.Array, completion_mask: jax.Array, *, clip_max: float
) -> jax.Array:
    """Correct for a sampler whose probabilities are not quite the trainer's: another precision or another kernel.

        w = sg(min(π_old / π_sampler, C_max))

    Both use the weights at sampling time; the trainer computes π_old, and the sampler computed π_sampler.
    Truncated importance sampling, https://fengyao.notion.site/off-policy-rl; TRL's "token_truncate". All arguments are
    [Q, G, C]; returns float32[Q, G, C], min(1, C_max) on masked positions.
    """
    log_ratio = jnp.where(completion_mask, old_logps - sampler_logps, 0.0)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_ratio), clip_max))


def sequence_mean(completion_mask: jax.Array) -> jax.Array:
    """1 / (QG · |oᵢ|): the mean over rows of each row's mean over tokens; an empty row counts as a row of loss 0.

    DeepSeekMath, equation 3; GSPO, equation 5. A token of a long completion weighs less than one of a short completion.
    TRL takes this mean over its micro-batch and divides it by the number of micro-batches.
    """
    lengths = jnp.sum(completion_mask, axis=-1, keepdims=True)
    return completion_mask / (lengths.size * jnp.maximum(lengths, 1))


def token_mean(completion_mask: jax.Array) -> jax.Array:
    """1 / Σᵢ |oᵢ|: the mean over all tokens of the batch; every token weighs the same.

    DAPO, equation 12, and CISPO sum the lengths over each group. Here the sum is over the whole batch, as TRL's
    `num_items_in_batch` is. TRL's "bnpo" sums over the current micro-batch, so its loss depends on how a batch is cut.
    Here "bnpo" does not depend on it, and equals TRL's with one micro-batch.
    """
    return completion_mask / jnp.maximum(jnp.sum(completion_mask), 1)


def fixed_length(completion_mask: jax.Array, max_completion_length: int) -> jax.Array:
    """1 / (QG · L): a constant. Neither the length of its completion nor the others' lengths change a token's weight.

    Dr. GRPO, https://arxiv.org/abs/2503.20783. L is the length limit, not the padded width C. TRL takes the rows of its
    micro-batch as QG and divides by the number of micro-batches.
    """
    rows = completion_mask.shape[0] * completion_mask.shape[1]
    return completion_mask / jnp.float32(rows * max_completion_length)


def token_weights(loss_type: str, completion_mask: jax.Array, *, max_completion_length: int) -> jax.Array:
    """The weight of every token in the loss: bool[Q, G, C] to float32[Q, G, C], 0 on masked positions.

    Compute it once, from the mask of the whole batch, before the batch is cut into micro-batches or shards.
    max_completion_length is the limit at sampling, in tokens.
    """
    check_choice("loss_type", loss_type, LOSS_TYPES)
    if loss_type in ("grpo", "gspo"):
        return sequence_mean(completion_mask)
    if loss_type == "dr_grpo":
        return fixed_length(completion_mask, max_completion_length)
    return token_mean(completion_mask)


@dataclass(frozen=True)
class LossConfig:
    """The settings of `grpo_loss`, with TRL's names and defaults; hashable, so it can be static under `jax.jit`."""

    loss_type: str = "dapo"  # not "grpo": there, the longer a wrong answer, the cheaper it is per token
    importance_sampling_level: str = "token"  # or "sequence"; "gspo" is always "sequence"
    epsilon: float = 0.2  # ε
    epsilon_high: float | None = None  # ε_high; None: epsilon, or 5.0 for "cispo", where it is the largest weight
    delta: float | None = None  # δ of two-sided clipping; None: one-sided
    beta: float = 0.0  # β, the weight of the KL term; at 0 no reference log-probs are needed
    use_bias_correction_kl: bool = True  # see `kl_penalty`
    importance_sampling_clip_max: float | None = None  # C_max of `truncated_importance_weights`; None: no correction

    def __post_init__(self):
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("importance_sampling_level", self.importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS)
        for name in ("epsilon", "epsilon_high", "importance_sampling_clip_max"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be greater than 0.")
        if not self.beta >= 0:
            raise ValueError(f"beta is {self.beta}; it must be 0 (no KL term) or greater.")
        if self.delta is not None and self.loss_type == "cispo":
            raise ValueError(f"delta is {self.delta}, but 'cispo' has no clipped ratio to bound; leave delta unset.")
        if self.delta is not None and not self.delta > 1 + self.clip_high:
            raise ValueError(f"delta is {self.delta}; it must be greater than 1 + epsilon_high = {1 + self.clip_high}.")

    @property
    def clip_high(self) -> float:
        """ε_high as it is used. For CISPO, ScaleRL (https://arxiv.org/abs/2510.13786) recommends 5."""
        if self.epsilon_high is not None:
            return self.epsilon_high
        return 5.0 if self.loss_type == "cispo" else self.epsilon

    @property
    def ratio_level(self) -> str:
        """The level of the importance ratio as it is used."""
        return "sequence" if self.loss_type == "gspo" else self.importance_sampling_level


class LossBatch(NamedTuple):
    """All that the loss needs beside `logps`. Every array can be cut along Q, for micro-batches and for shards."""

    advantages: jax.Array  # float32[Q, G]
    completion_mask: jax.Array  # bool[Q, G, C]
    token_weights: jax.Array  # float32[Q, G, C], `token_weights` of the whole batch
    old_logps: jax.Array | None  # float32[Q, G, C]; None: samples are used once, and the update's own logps serve
    ref_logps: jax.Array | None = None  # float32[Q, G, C], needed where beta > 0
    sampler_logps: jax.Array | None = None  # float32[Q, G, C], needed where importance_sampling_clip_max is set


def kl_penalty(logps: jax.Array, ratio: jax.Array, batch: LossBatch, config: LossConfig) -> jax.Array:
    """The KL term of each token: k3, or with the bias correction ρ k3.

    k3 has the right value but not the right gradient: for tokens from π_θ the mean of ∇k3 is ∇KL(π_ref ‖ π_θ). With the
    token's ratio ρ, even where ρ is 1, the mean of ∇(ρ k3) is ∇KL(π_θ ‖ π_ref), also for tokens from π_old.
    DeepSeek-V3.2, https://arxiv.org/abs/2512.02556. A sequence ratio is multiplied too, as in TRL, but is not exact.

    logps [Q, G, C], ratio as `importance_ratio` returns it; returns float32[Q, G, C].
    """
    kl = kl_k3(logps, batch.ref_logps, batch.completion_mask)
    return kl * ratio if config.use_bias_correction_kl else kl


def grpo_loss(logps: jax.Array, batch: LossBatch, config: LossConfig) -> jax.Array:
    """The loss: surrogate plus β KL, each token with its weight.

        L(θ) = Σᵢ Σₜ wᵢₜ ( sᵢₜ ℓᵢₜ + β κᵢₜ )

    w: `token_weights`; ℓ: `clipped_surrogate` or `cispo_surrogate`; κ: `kl_penalty`; s: `truncated_importance_weights`
    if importance_sampling_clip_max is set, otherwise 1. DeepSeekMath's equation 3, times -1, is the case
    w = 1 / (QG · |oᵢ|), one ε, κ = k3: loss_type "grpo", use_bias_correction_kl False, nothing else set but ε and β.

    It is a plain sum, so the losses of the parts of a batch add up to the loss of the whole, and so do their gradients:
    cut logps and batch along Q, into micro-batches or shards, and add. logps is float32[Q, G, C]; returns a float32[].
    """
    advantages = batch.advantages[..., None]  # [Q, G, 1]
    ratio = importance_ratio(logps, batch.old_logps, batch.completion_mask, level=config.ratio_level)
    if config.loss_type == "cispo":
        loss = cispo_surrogate(ratio, logps, advantages, epsilon_high=config.clip_high)
    else:
        loss = clipped_surrogate(
            ratio, advantages, epsilon=config.epsilon, epsilon_high=config.clip_high, delta=config.delta
        )
    if config.importance_sampling_clip_max is not None:
        loss *= truncated_importance_weights(
            batch.old_logps, batch.sampler_logps, batch.completion_mask, clip_max=config.importance_sampling_clip_max
        )
    if config.beta > 0:
        loss += config.beta * kl_penalty(logps, ratio, batch, config)
    return jnp.sum(batch.token_weights * loss)


def sum_and_count(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The sum of values where mask is True and the number of True, as float32[2]: a mean whose parts can be added."""
    return jnp.stack([jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask, dtype=jnp.float32)])


def clipped(ratio: jax.Array, advantages: jax.Array, config: LossConfig) -> tuple[jax.Array, jax.Array]:
    """Where the ratio has left the clip range on the side to which its advantage pushes: bool below, and bool above.

    There the surrogate is constant, and a token has no gradient. "cispo" has no lower end; above, it bounds the weight.
    """
    if config.loss_type == "cispo":
        return jnp.zeros_like(ratio, dtype=bool), (ratio > config.clip_high) & (advantages > 0)
    return (ratio < 1 - config.epsilon) & (advantages < 0), (ratio > 1 + config.clip_high) & (advantages > 0)


def loss_metrics(logps: jax.Array, batch: LossBatch, config: LossConfig) -> dict[str, jax.Array]:
    """The metrics of the loss, under TRL's names; arguments as in `grpo_loss`. Every value is a `sum_and_count`.

    Add the values of a batch's parts, then divide value[0] by value[1]. Means are over tokens; means of sequence ratios
    are over completions, empty ones included, as in TRL. "ratio/mean" is not TRL's: far from 1, the samples are stale.
    """
    mask, advantages = batch.completion_mask, batch.advantages[..., None]
    ratio = importance_ratio(logps, batch.old_logps, mask, level=config.ratio_level)
    counted = mask if config.ratio_level == "token" else jnp.ones_like(ratio, dtype=bool)
    metrics = {"ratio/mean": sum_and_count(ratio, counted)}
    if config.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = sum_and_count(clipped(ratio, advantages, config)[1], counted)
    else:
        low, high = clipped(ratio, advantages, config)
        metrics["clip_ratio/low_mean"] = sum_and_count(low, counted)
        metrics["clip_ratio/high_mean"] = sum_and_count(high, counted)
        metrics["clip_ratio/region_mean"] = sum_and_count(low | high, counted)
    if config.beta > 0:
        metrics["kl"] = sum_and_count(kl_penalty(logps, ratio, batch, config), mask)
    if batch.sampler_logps is not None:
        difference = jnp.abs(batch.old_logps - batch.sampler_logps)
        metrics["sampling/sampling_logp_difference/mean"] = sum_and_count(difference, mask)
    return metrics
