"""A whole step on a tiny model: what is drawn, replaced, kept as given, rewarded, learnt, and reported.

The reward of a completion is its place in its group unless its example says "dull": then all are worth 1. Few ids may
be drawn, two of them stop ids, so that some completions end and some are cut.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_close, assert_same_samples, pixels
from tiny import write_tokenizer

from data.example import Example
from gemma3.config import NANO
from gemma3.lora import LoraConfig, init_lora
from gemma3.mesh import make_mesh, shardings
from gemma3.model import Params, init_params
from gemma3.tokenizer import Tokenizer
from grpo.algorithm import group_advantages, leave_one_out_advantages
from grpo.rollout import Prompt, Row
from grpo.run.settings import Settings, check_batch, loss_config, mesh_shape, resolve_defaults
from grpo.step import (
    Scored,
    Step,
    collect,
    draw,
    given_completions,
    group_metrics,
    grpo_step,
    judge_rollout,
    log_probs,
    sft_step,
)
from grpo.update import init_optimizer, make_optimizer, update

CONFIG = replace(NANO, num_layers=2, layer_types=("sliding_attention", "full_attention"))
Q, G, C = 4, 3, 6
PICTURES = pixels(3, CONFIG.vision.image_size)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Tokenizer(directory, CONFIG)


def place_in_group(completions, examples, *, num_tokens, finished, prompts) -> SimpleNamespace:
    """Rewards 0, 1, 2 of the completions of a group, or 1 of each; and a part that counts tokens."""
    assert len(completions) == len(examples) == len(num_tokens) == len(finished) == len(prompts)
    places = [float(i % G) for i in range(len(completions))]
    total = [1.0 if e.metadata.get("dull") else at for e, at in zip(examples, places, strict=True)]
    return SimpleNamespace(total=total, parts={"tokens": list(map(float, num_tokens))})


@cache
def optimizer(learning_rate: float):
    return make_optimizer(lambda count: learning_rate, weight_decay=0.0, adam_beta2=0.99, max_grad_norm=1.0)


@cache
def weights(mesh) -> Params:
    params = init_params(jax.random.key(0), CONFIG)
    return jax.device_put(params, shardings(params, CONFIG, mesh))


def make_step(tokenizer: Tokenizer, **changes) -> Step:
    flags = {"prompts_per_step": Q, "num_generations": G, "max_completion_length": C, "max_prompt_length": 31}
    settings = resolve_defaults(Settings(**flags | {"learning_rate": 1e-3} | changes))
    mesh = make_mesh(*mesh_shape(settings.mesh))
    return Step(
        settings,
        CONFIG,
        mesh,
        tokenizer,
        frozen=weights(mesh),
        optimizer=optimizer(settings.learning_rate),
        loss=loss_config(settings),
        scorer=place_in_group,
        is_right=lambda completion, example: len(completion) > 3,
        solution=lambda example: example.answer,
        render=lambda example: f"asked: {example.question}",
        allowed=jnp.asarray(np.isin(np.arange(CONFIG.vocab_size), [1, 5, *range(300, 306)])),
        max_images=1,
        micro_batch=check_batch(settings, mesh),
    )


def begin(step: Step):
    """A fresh adapter and its optimizer state, placed as train.py does."""
    lora = init_lora(jax.random.key(1), CONFIG, LoraConfig(r=3, alpha=6.0))
    lora = jax.device_put(lora, shardings(lora, CONFIG, step.mesh))
    return lora, init_optimizer(step.optimizer, lora, CONFIG, step.mesh)


def row(tokenizer: Tokenizer, place: int, **fields) -> Row:
    """A question, with a picture before every other one."""
    picture = [{"type": "image"}] * (place % 2)
    content = [*picture, {"type": "text", "text": f"{place} + {place}?"}]
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    example = Example(f"e{place}", f"{place} + {place}?", str(2 * place), **fields)
    return Row(place, example, Prompt(ids, [PICTURES[place % 3]] * (place % 2)))


def stream(tokenizer: Tokenizer, dull: str = "") -> Iterator[Row]:
    """Endless rows; `dull` has a "d" at the places of those whose completions are all worth the same."""
    for place in itertools.count():
        yield row(tokenizer, place, metadata={"dull": dull[place : place + 1] == "d"})


def run(step: Step, rows: Iterator[Row], steps: int = 1):
    """Metrics and samples of each step, and the adapter at the end."""
    trainable, opt_state = begin(step)
    history = []
    for number in range(steps):
        trainable, opt_state, metrics, samples = grpo_step(step, trainable, opt_state, rows, number)
        history.append((metrics, samples))
    return history, trainable


@cache
def on_policy(tokenizer: Tokenizer, mesh: str):
    """Three steps, and how many compilations of the update each of them had behind it."""
    step = make_step(tokenizer, mesh=mesh)
    trainable, opt_state = begin(step)
    rows, history, compiled = stream(tokenizer), [], []
    for number in range(3):
        trainable, opt_state, metrics, samples = grpo_step(step, trainable, opt_state, rows, number)
        history.append((metrics, samples))
        compiled.append(update._cache_size())
    return history, compiled


@pytest.mark.parametrize("mesh", ["1,1", "2,4"])
def test_on_policy_the_trainer_agrees_with_the_sampler(tokenizer, mesh):
    for metrics, _ in on_policy(tokenizer, mesh)[0]:
        assert metrics["finite"] == 1 and metrics["grad_norm"] > 0 and metrics["entropy"] > 0
        mean, largest = (metrics[f"sampling/sampling_logp_difference/{name}"] for name in ("mean", "max"))
        assert 0 <= mean <= largest < 1e-4
        assert metrics["ratio/mean"] == 1 and metrics["clip_ratio/region_mean"] == 0
        assert metrics["prompts_drawn"] == Q and metrics["frac_reward_zero_std"] == 0
        assert metrics["reward"] == 1 and metrics["lora_norm"] > 0


@pytest.mark.parametrize("mesh", ["1,1", "2,4"])
def test_steps_share_one_compilation(tokenizer, mesh):
    first, *later = on_policy(tokenizer, mesh)[1]
    assert later == [first, first]


def test_a_mesh_changes_neither_samples_nor_metrics(tokenizer):
    one, eight = on_policy(tokenizer, "1,1")[0], on_policy(tokenizer, "2,4")[0]
    for (metrics, samples), (mesh_metrics, mesh_samples) in zip(one, eight, strict=True):
        assert_same_samples(copy.deepcopy(mesh_samples), copy.deepcopy(samples))
        assert metrics.keys() == mesh_metrics.keys()
        for name in metrics.keys() - {"step_time", "tokens_per_second"}:
            if not name.startswith("time/"):
                np.testing.assert_allclose(mesh_metrics[name], metrics[name], rtol=2e-4, atol=1e-5, err_msg=name)


def test_samples_describe_each_completion(tokenizer):
    """With rewards 0, 1, 2 the advantages are -1, 0, 1 over 1 + 1e-4."""
    _, samples = on_policy(tokenizer, "1,1")[0][1]
    assert [group["id"] for group in samples] == ["e4", "e5", "e6", "e7"]
    group = samples[1]
    assert group["prompt"] == "asked: 5 + 5?" and group["answer"] == "10"
    assert [c["reward"] for c in group["completions"]] == [0, 1, 2]
    np.testing.assert_allclose([c["advantage"] for c in group["completions"]], [-0.9999, 0, 0.9999], rtol=1e-5)
    for completion in group["completions"]:
        assert completion["correct"] == (len(completion["text"]) > 3)
        assert 1 <= completion["rewards"]["tokens"] <= C
        assert completion["finished"] or completion["rewards"]["tokens"] == C


def test_the_first_prompts_of_a_step_come_with_every_token(tokenizer):
    """Used once, samples have ratio 1 and are nowhere clipped; used again, with a rate that is too high, some are."""
    _, samples = on_policy(tokenizer, "1,1")[0][1]
    assert ["pictures" in group for group in samples] == [True, True, False, False]
    for completion in samples[1]["completions"]:
        joined = "".join(piece for piece in completion["tokens"] if not piece.startswith("<"))
        assert joined.strip() == completion["text"].strip()
        assert len(completion["logps"]) == len(completion["tokens"]) == completion["rewards"]["tokens"]
        assert (completion["logps"] < 0).all() and (completion["ratios"] == 1).all()
        assert not completion["clipped"].any()
    step = make_step(tokenizer, num_iterations=3, learning_rate=0.1)
    ((metrics, samples),), _ = run(step, stream(tokenizer))
    shown = [completion for group in samples[:2] for completion in group["completions"]]
    ratios, clipped = (np.concatenate([c[name] for c in shown]) for name in ("ratios", "clipped"))
    advantages = np.concatenate([np.full(len(c["tokens"]), c["advantage"]) for c in shown])
    beyond = ((ratios < 0.8) & (advantages < 0)) | ((ratios > 1.2) & (advantages > 0))
    np.testing.assert_array_equal(clipped, beyond)
    assert clipped.any() and metrics["clip_ratio/region_mean"] > 0


@pytest.mark.parametrize(
    ("flags", "advantages"),
    [
        ({"advantage": "leave-one-out"}, leave_one_out_advantages),
        ({"scale_rewards": "none"}, lambda rewards: group_advantages(rewards, scale_rewards="none")),
    ],
)
def test_the_advantage_is_the_one_asked_for(tokenizer, flags, advantages):
    ((_, samples),), _ = run(make_step(tokenizer, **flags), stream(tokenizer))
    found = [[c["advantage"] for c in group["completions"]] for group in samples]
    np.testing.assert_allclose(found, advantages(np.array([[0, 1, 2]] * Q)), rtol=1e-6)


def collected(tokenizer, dull: str, cap: int):
    step = make_step(tokenizer, dynamic_sampling=cap)
    scored, drawn = collect(step, step.frozen, begin(step)[0], stream(tokenizer, dull), 0)
    return step, scored, [row.place for row in scored.rows], drawn


def test_dynamic_sampling_replaces_groups_that_teach_nothing(tokenizer):
    """Batches d.dd, .d.d and d... have four groups of use by the third: 1, 4, 6 and 9."""
    step, scored, places, drawn = collected(tokenizer, "d.dd.d.dd...", cap=5)
    assert places == [1, 4, 6, 9] and drawn == 12
    np.testing.assert_array_equal(scored.rewards, [[0, 1, 2]] * Q)
    assert group_metrics(scored)["frac_reward_zero_std"] == 0
    np.testing.assert_array_equal(scored.rollout.prompts.index, places)
    assert [row.example.id for row in scored.rows] == ["e1", "e4", "e6", "e9"]
    again = draw(step, step.frozen, begin(step)[0], scored.rows, 0)
    np.testing.assert_array_equal(scored.rollout.completion_ids, again.completion_ids)
    np.testing.assert_array_equal(scored.parts["tokens"], again.lengths)


def test_dynamic_sampling_stops_at_its_cap_and_keeps_some_that_teach_nothing(tokenizer):
    _, scored, places, drawn = collected(tokenizer, "d.dd.d.dd...", cap=1)
    assert places == [0, 1, 4, 6] and drawn == 8
    assert group_metrics(scored)["frac_reward_zero_std"] == 0.25


def test_dynamic_sampling_costs_nothing_where_every_group_teaches(tokenizer):
    assert collected(tokenizer, "", cap=3)[2:] == ([0, 1, 2, 3], Q)


def test_a_step_reports_the_prompts_that_dynamic_sampling_drew(tokenizer):
    rows = stream(tokenizer, "d.dd.d.dd...")
    ((metrics, samples),), _ = run(make_step(tokenizer, dynamic_sampling=2), rows)
    assert metrics["prompts_drawn"] == 12 and next(rows).place == 12
    assert [group["id"] for group in samples] == ["e1", "e4", "e6", "e9"] and metrics["finite"] == 1


def preference(tokenizer: Tokenizer, place: int) -> Row:
    """The chosen and the rejected completion, by the rewards that the dataset gives."""
    pair = {"completions": ("the sum is right", "no"), "completion_rewards": (1.0, 0.0)}
    return row(tokenizer, place, **pair)


def test_given_completions_are_not_sampled_and_keep_their_rewards(tokenizer):
    """Beside rows that are sampled, whose samples do not change; the third place of a pair stays empty."""
    step = make_step(tokenizer)
    sampled = list(itertools.islice(stream(tokenizer), Q))
    mixed = [sampled[0], preference(tokenizer, 1), sampled[2], preference(tokenizer, 3)]
    lora = begin(step)[0]
    plain, rollout = draw(step, step.frozen, lora, sampled, 0), draw(step, step.frozen, lora, mixed, 0)
    np.testing.assert_array_equal(rollout.prompts.ids, plain.prompts.ids)
    ids, mask, finished = (np.asarray(x) for x in (rollout.completion_ids, rollout.completion_mask, rollout.finished))
    for at in (0, 2):
        np.testing.assert_array_equal(ids[at], plain.completion_ids[at])
        np.testing.assert_array_equal(mask[at], plain.completion_mask[at])
    for at in (1, 3):
        for place, text in enumerate(("the sum is right", "no")):
            tokens = [*tokenizer.encode(text), 5][:C]
            np.testing.assert_array_equal(ids[at, place][mask[at, place]], tokens)
            assert finished[at, place] == (5 in tokens)
        assert not mask[at, 2].any() and not finished[at, 2]
    assert not finished[1, 0] and finished[1, 1], "one should be cut and one whole"
    trained = log_probs(step, step.frozen, lora, rollout)
    assert_close(np.asarray(rollout.sampler_logps)[mask], np.asarray(trained)[mask])

    scored = judge_rollout(step, mixed, rollout)
    nan = np.nan
    np.testing.assert_array_equal(scored.rewards, [[0, 1, 2], [1, 0, nan], [0, 1, 2], [1, 0, nan]])
    assert scored.completions[3][1] == "no" and tokenizer.decode(ids[1, 0]) in "the sum is right"
    metrics = group_metrics(scored)
    np.testing.assert_array_equal(np.isnan(scored.parts["tokens"]), np.isnan(scored.rewards))
    np.testing.assert_allclose(metrics["accuracy"], scored.correct[mask.any(axis=-1)].mean())
    assert metrics["num_tokens"] == mask.sum()


def test_more_given_completions_than_a_group_holds_are_refused(tokenizer):
    step = make_step(tokenizer)
    rows = [row(tokenizer, 7, completions=("a", "b", "c", "d"))]
    with pytest.raises(ValueError, match="example e7 brings 4 completions; --num-generations 3 is too few"):
        given_completions(step, rows, [list(rows[0].example.completions)])


def test_preference_pairs_raise_the_chosen_completion_against_the_rejected_one(tokenizer):
    step = make_step(tokenizer)
    rows = [preference(tokenizer, place) for place in range(Q)]
    before = begin(step)[0]
    rollout = draw(step, step.frozen, before, rows, 0)

    def margins(lora) -> np.ndarray:
        logps = np.where(rollout.completion_mask, log_probs(step, step.frozen, lora, rollout), 0).sum(axis=-1)
        return logps[:, 0] - logps[:, 1]

    old = margins(before)
    history, after = run(step, itertools.cycle(rows), steps=4)
    assert (margins(after) > old + 0.1).all()
    assert all(metrics["finite"] == 1 and metrics["reward"] == 0.5 for metrics, _ in history)


def test_truncated_completions_are_left_out_of_the_loss_where_asked(tokenizer):
    """No stop id may be drawn, so all are cut: nothing is left to learn from."""
    learns = {}
    for mask_truncated in (False, True):
        step = make_step(tokenizer, mask_truncated_completions=mask_truncated)
        step = replace(step, allowed=step.allowed & ~np.isin(np.arange(CONFIG.vocab_size), CONFIG.stop_ids))
        ((metrics, _),), _ = run(step, stream(tokenizer))
        assert metrics["completions/clipped_ratio"] == 1 and metrics["finite"] == 1
        learns[mask_truncated] = metrics["grad_norm"] > 0
    assert learns == {False: True, True: False}


def test_iterations_reuse_samples_against_the_log_probs_of_before_the_first(tokenizer):
    """Metrics are of the second update: the policy has moved, far enough at this rate to be clipped at both ends."""
    step = make_step(tokenizer, num_iterations=2, learning_rate=3e-2)
    ((metrics, _),), _ = run(step, stream(tokenizer))
    assert abs(metrics["ratio/mean"] - 1) > 1e-3
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4


def test_the_reference_is_the_model_without_its_adapter(tokenizer):
    """A fresh adapter does nothing, so the KL is 0 in the first step and not in the second."""
    (first, second), _ = run(make_step(tokenizer, beta=0.04, learning_rate=1e-2), stream(tokenizer), steps=2)
    assert abs(first[0]["kl"]) < 1e-6 < second[0]["kl"]


def test_an_adapted_tower_reads_pictures_as_the_sampler_did_and_the_reference_without_its_adapter(tokenizer):
    step = make_step(tokenizer)
    rows = list(itertools.islice(stream(tokenizer), Q))
    lora = init_lora(jax.random.key(1), CONFIG, LoraConfig(r=3, vision=True))
    lora = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(2), x.shape), lora)
    rollout = draw(step, step.frozen, lora, rows, 0)
    mask = np.asarray(rollout.completion_mask)
    with_pictures = mask & (np.arange(Q) % 2 == 1)[:, None, None]

    def logps(lora, pictures_read_with) -> np.ndarray:
        given = rollout._replace(prompts=step.place(rows, step.frozen, pictures_read_with)._replace(pixels=None))
        return np.asarray(log_probs(step, step.frozen, lora, given))

    assert_close(np.asarray(log_probs(step, step.frozen, lora, rollout))[mask], np.asarray(rollout.sampler_logps)[mask])
    reference = np.asarray(log_probs(step, step.frozen, None, rollout))
    assert_close(reference[mask], logps(None, None)[mask])
    assert np.abs(reference - logps(None, lora))[with_pictures].max() > 1e-3


def test_supervised_steps_lower_the_loss_of_the_solutions(tokenizer):
    step = make_step(tokenizer, objective="sft", learning_rate=1e-2)
    trainable, opt_state = begin(step)
    rows, losses = itertools.cycle(itertools.islice(stream(tokenizer), Q)), []
    for _ in range(5):
        trainable, opt_state, metrics = sft_step(step, trainable, opt_state, rows)
        losses.append(metrics["loss"])
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    lengths = [len(tokenizer.encode(str(2 * place))) + 1 for place in range(Q)]
    assert metrics["completions/mean_length"] == np.mean(lengths) and metrics["finite"] == 1


def test_the_vision_tower_is_trained_from_the_pictures(tokenizer):
    """All weights move, the tower's too; before the update the trainer agrees with the sampler."""
    step = replace(make_step(tokenizer, lora_r=0, train_vision=True), frozen=Params(None, None))
    before = weights(step.mesh)
    params = jax.device_put(jax.tree.map(jnp.array, before), shardings(before, CONFIG, step.mesh))
    state = init_optimizer(step.optimizer, params, CONFIG, step.mesh)
    after, _, metrics, _ = grpo_step(step, params, state, stream(tokenizer), 0)
    assert metrics["finite"] == 1 and metrics["sampling/sampling_logp_difference/max"] < 1e-4
    moved = jax.tree.map(lambda old, new: float(np.abs(np.asarray(old) - new).max()), before.vision, after.vision)
    assert min(moved.patch_kernel, moved.projector, moved.blocks.value, moved.blocks.fc2) > 1e-4


def test_metrics_of_groups_by_hand():
    """Rows of 2 ended, 3 cut, 1 ended and 0 tokens; the empty one fills its group and counts nowhere."""
    lengths = np.array([[2, 3], [1, 0]])
    finished = np.array([[True, False], [True, False]])
    rewards = np.array([[1.0, 3.0], [2.0, np.nan]], np.float32)
    correct = np.array([[True, False], [True, False]])
    parts = {"part": np.array([[0, 1], [5, np.nan]])}
    scored = Scored([], None, [], rewards, parts, correct, lengths, finished, 0.0)
    assert group_metrics(scored) == pytest.approx(
        {
            "reward": 2.0,
            "reward_std": 1.0,
            "frac_reward_zero_std": 0.5,
            "accuracy": 2 / 3,
            "completions/mean_length": 2.0,
            "completions/min_length": 1.0,
            "completions/max_length": 3.0,
            "completions/clipped_ratio": 1 / 3,
            "completions/mean_terminated_length": 1.5,
            "num_tokens": 6.0,
            "rewards/part/mean": 2.0,
            "rewards/part/std": 7**0.5,
        }
    )
