"""A whole step on a tiny model: what is sampled, rewarded, learnt, and reported.

The reward of a completion is its place in its group unless its example says "dull": then all are worth 1. Few ids may
be sampled, two of them stop ids, so that some completions end and some are cut.
"""

import copy
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_close, assert_same_samples, pixels
from sentencepiece import SentencePieceProcessor
from tiny import write_tokenizer

from data.example import Example
from gemma3.files.published import NANO
from gemma3.lora import LoraConfig, Policy, init_lora
from gemma3.mesh import Model, make_mesh
from gemma3.params import Params, init_params
from gemma3.tokenizer import Tokenizer
from grpo.algorithm import group_advantages, leave_one_out_advantages
from grpo.groups import sample_groups
from grpo.reader import Prompt, Reader, Row, rounded_up
from grpo.run.devices import mesh_shape
from grpo.run.samples import told
from grpo.run.settings import Settings, resolve_defaults
from grpo.run.setup import make_learner
from grpo.step import grpo_step
from grpo.trainer import Trainer
from grpo.update import TrainState, init_state, update

CONFIG = replace(NANO, num_layers=2, layer_types=("sliding_attention", "full_attention"))
Q, G, C = 4, 3, 6
IMAGES = pixels(3, CONFIG.vision.image_size)


class FewWords(Tokenizer):
    allowed = (1, 5, *range(300, 306))

    @property
    def never_sampled(self) -> np.ndarray:
        return ~np.isin(np.arange(CONFIG.vocab_size), self.allowed)


@cache
def tokenizer() -> FewWords:
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(Path(directory))
        return FewWords(SentencePieceProcessor(model_file=f"{directory}/tokenizer.model"), CONFIG)


@pytest.fixture(autouse=True)
def long_completions_are_correct(monkeypatch):
    monkeypatch.setattr("grpo.groups.completion_is_correct", lambda completion, example, format: len(completion) > 3)


def place_in_group(completions, examples, *, num_tokens, finished, prompts) -> SimpleNamespace:
    """Rewards 0, 1, 2 for the completions of a group, or 1 for each; and a part that counts tokens."""
    assert len(completions) == len(examples) == len(num_tokens) == len(finished) == len(prompts)
    places = [float(i % G) for i in range(len(completions))]
    total = [1.0 if e.metadata.get("dull") else at for e, at in zip(examples, places, strict=True)]
    return SimpleNamespace(total=total, parts={"tokens": list(map(float, num_tokens))})


@cache
def optimizer(learning_rate: float):
    """One optimizer for all tests that train at this rate, so that they share compiled programs."""
    settings = Settings(learning_rate=learning_rate, lr_scheduler="constant", warmup_steps=0)
    return make_learner(resolve_defaults(settings), Model(CONFIG, make_mesh(1, 1))).optimizer


@cache
def weights(model: Model) -> Params:
    params = init_params(jax.random.key(0), CONFIG)
    return jax.device_put(params, model.shardings(params))


def make_trainer(**changes) -> Trainer:
    flags = {"prompts_per_step": Q, "num_generations": G, "max_completion_length": C, "max_prompt_length": 31}
    settings = resolve_defaults(Settings(**flags | {"learning_rate": 1e-3} | changes))
    model = Model(CONFIG, make_mesh(*mesh_shape(settings.mesh)))
    limits = {"max_prompt_length": settings.max_prompt_length, "max_images": 1}
    reader = Reader(model, tokenizer(), settings.wording, settings.format, **limits)
    learner = replace(make_learner(settings, model), optimizer=optimizer(settings.learning_rate))
    return Trainer(settings, reader, weights(model), learner, place_in_group)


def begin(trainer: Trainer) -> TrainState:
    """A fresh adapter and its optimizer state, put on the mesh as train.py does."""
    model, lora = trainer.learner.model, init_lora(jax.random.key(1), CONFIG, LoraConfig(r=3, alpha=6.0))
    return init_state(jax.device_put(lora, model.shardings(lora)), trainer.learner.optimizer, model)


def row(place: int, **fields) -> Row:
    """A question, with an image before every other one."""
    image = [{"type": "image"}] * (place % 2)
    content = [*image, {"type": "text", "text": f"{place} + {place}?"}]
    ids = tokenizer().encode_chat([{"role": "user", "content": content}])
    example = Example(f"e{place}", f"{place} + {place}?", str(2 * place), **fields)
    return Row(place, example, Prompt(ids, [IMAGES[place % 3]] * (place % 2)))


def stream(dull: str = "") -> Iterator[Row]:
    """Endless rows; `dull` has a "d" in the place of each row whose completions are all worth the same."""
    for place in itertools.count():
        yield row(place, metadata={"dull": dull[place : place + 1] == "d"})


def preference(place: int) -> Row:
    """The chosen and the rejected completion, by the rewards that the dataset gives."""
    pair = {"completions": ("the sum is right", "no"), "completion_rewards": (1.0, 0.0)}
    return row(place, **pair)


def run(trainer: Trainer, rows: Iterator[Row], steps: int = 1):
    """Metrics and samples of each step, and the state at the end."""
    state = begin(trainer)
    history = []
    for step in range(steps):
        result = grpo_step(trainer, state, rows, step)
        state = result.state
        history.append((result.metrics, told(trainer, result)))
    return history, state


@cache
def on_policy(mesh: str):
    """Three steps, and how many compilations of the update each of them had behind it."""
    trainer = make_trainer(mesh=mesh)
    state = begin(trainer)
    rows, history, compiled = stream(), [], []
    for step in range(3):
        result = grpo_step(trainer, state, rows, step)
        state = result.state
        history.append((result.metrics, told(trainer, result)))
        compiled.append(update._cache_size())
    return history, compiled


@pytest.mark.parametrize("mesh", ["1,1", "2,4"])
def test_on_policy_the_trainer_agrees_with_the_sampler(mesh):
    for metrics, _ in on_policy(mesh)[0]:
        assert metrics["finite"] == 1 and metrics["grad_norm"] > 0 and metrics["entropy"] > 0
        mean, largest = (metrics[f"sampling/sampling_logp_difference/{name}"] for name in ("mean", "max"))
        assert 0 <= mean <= largest < 1e-4
        assert metrics["ratio/mean"] == 1 and metrics["clip_ratio/region_mean"] == 0
        assert metrics["prompts_drawn"] == Q and metrics["frac_reward_zero_std"] == 0
        assert metrics["reward"] == 1 and metrics["lora_norm"] > 0


@pytest.mark.parametrize("mesh", ["1,1", "2,4"])
def test_steps_share_one_compilation(mesh):
    first, *later = on_policy(mesh)[1]
    assert later == [first, first]


def test_a_mesh_changes_neither_samples_nor_metrics():
    one, eight = on_policy("1,1")[0], on_policy("2,4")[0]
    for (metrics, samples), (mesh_metrics, mesh_samples) in zip(one, eight, strict=True):
        assert_same_samples(copy.deepcopy(mesh_samples), copy.deepcopy(samples))
        assert metrics.keys() == mesh_metrics.keys()
        for name in metrics.keys() - {"step_time", "tokens_per_second"}:
            if not name.startswith("time/"):
                np.testing.assert_allclose(mesh_metrics[name], metrics[name], rtol=2e-4, atol=1e-5, err_msg=name)


def test_samples_describe_each_completion():
    """With rewards 0, 1, 2 the advantages are -1, 0, 1 over 1 + 1e-4."""
    _, samples = on_policy("1,1")[0][1]
    assert [group["id"] for group in samples] == ["e4", "e5", "e6", "e7"]
    group = samples[1]
    assert group["prompt"] == "<bos><start_of_turn>user\n5 + 5?<end_of_turn>\n<start_of_turn>model\n"
    assert group["answer"] == "10"
    assert [c["reward"] for c in group["completions"]] == [0, 1, 2]
    np.testing.assert_allclose([c["advantage"] for c in group["completions"]], [-0.9999, 0, 0.9999], rtol=1e-5)
    for completion in group["completions"]:
        assert completion["correct"] == (len(completion["text"]) > 3)
        assert 1 <= completion["rewards"]["tokens"] <= C
        assert completion["finished"] or completion["rewards"]["tokens"] == C


def test_the_first_prompts_of_a_step_come_with_every_token():
    """Used once, samples have ratio 1 and are nowhere clipped; used again, with a rate that is too high, some are."""
    _, samples = on_policy("1,1")[0][1]
    assert ["images" in group for group in samples] == [True, True, False, False]
    for completion in samples[1]["completions"]:
        joined = "".join(piece for piece in completion["tokens"] if not piece.startswith("<"))
        assert joined.strip() == completion["text"].strip()
        assert len(completion["logps"]) == len(completion["tokens"]) == completion["rewards"]["tokens"]
        assert (completion["logps"] < 0).all() and (completion["ratios"] == 1).all()
        assert not completion["clipped"].any()
    trainer = make_trainer(num_iterations=3, learning_rate=0.1)
    ((metrics, samples),), _ = run(trainer, stream())
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
def test_the_advantage_is_the_one_asked_for(flags, advantages):
    ((_, samples),), _ = run(make_trainer(**flags), stream())
    found = [[c["advantage"] for c in group["completions"]] for group in samples]
    np.testing.assert_allclose(found, advantages(np.array([[0, 1, 2]] * Q)), rtol=1e-6)


def test_a_step_reports_the_prompts_that_dynamic_sampling_took():
    rows = stream("d.dd.d.dd...")
    ((metrics, samples),), _ = run(make_trainer(dynamic_sampling=2), rows)
    assert metrics["prompts_drawn"] == 12 and next(rows).index == 12
    assert [group["id"] for group in samples] == ["e1", "e4", "e6", "e9"] and metrics["finite"] == 1


def test_preference_pairs_raise_the_chosen_completion_against_the_rejected_one():
    trainer = make_trainer()
    rows = [preference(place) for place in range(Q)]
    before = trainer.policy(begin(trainer).trainable)
    prompts, completions = sample_groups(trainer, before, rows, 0)

    def margins(policy: Policy) -> np.ndarray:
        logps = np.where(completions.mask, trainer.logps(policy, prompts, completions.ids), 0).sum(axis=-1)
        return logps[:, 0] - logps[:, 1]

    old = margins(before)
    history, after = run(trainer, itertools.cycle(rows), steps=4)
    assert (margins(trainer.policy(after.trainable)) > old + 0.1).all()
    assert all(metrics["finite"] == 1 and metrics["reward"] == 0.5 for metrics, _ in history)


def test_truncated_completions_are_left_out_of_the_loss_where_asked():
    """No stop id may be sampled, so all are cut: nothing is left to learn from."""
    endless, learns = copy.copy(tokenizer()), {}
    endless.allowed = sorted(set(FewWords.allowed) - set(CONFIG.stop_ids))
    for mask_truncated in (False, True):
        trainer = make_trainer(mask_truncated_completions=mask_truncated)
        trainer = replace(trainer, reader=replace(trainer.reader, tokenizer=endless))
        ((metrics, _),), _ = run(trainer, stream())
        assert metrics["completions/clipped_ratio"] == 1 and metrics["finite"] == 1
        learns[mask_truncated] = metrics["grad_norm"] > 0
    assert learns == {False: True, True: False}


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
def test_what_lies_behind_the_longest_completion_is_cut_and_was_worth_nothing(loss_type, monkeypatch):
    """A step on completions cut to 32 of 80 tokens is the step on all 80, to rounding; most of them stop early."""

    def step() -> tuple[int, dict[str, float], TrainState]:
        trainer = make_trainer(max_completion_length=80, loss_type=loss_type, beta=0.04)
        result = grpo_step(trainer, begin(trainer), stream(), 0)
        return result.groups.completions.ids.shape[2], result.metrics, result.state

    size, metrics, state = step()
    monkeypatch.setattr("grpo.groups.rounded_up", lambda length, limit: limit)
    whole_size, whole_metrics, whole_state = step()
    longest = metrics["completions/max_length"]
    assert longest <= size == rounded_up(int(longest), 80) < whole_size == 80
    for name in ("loss", "grad_norm", "entropy", "kl", "completions/mean_length"):
        np.testing.assert_allclose(metrics[name], whole_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)
    for ours, expected in zip(*map(jax.tree.leaves, (state.trainable, whole_state.trainable)), strict=True):
        assert_close(ours, expected, atol=1e-5)


def test_iterations_reuse_samples_against_the_log_probs_of_before_the_first():
    """Metrics are of the second update: the policy has moved, far enough at this rate to be clipped at both ends."""
    ((metrics, _),), _ = run(make_trainer(num_iterations=2, learning_rate=3e-2), stream())
    assert abs(metrics["ratio/mean"] - 1) > 1e-3
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4


def test_the_reference_is_the_model_without_its_adapter():
    """A fresh adapter does nothing, so the KL is 0 in the first step and not in the second."""
    (first, second), _ = run(make_trainer(beta=0.04, learning_rate=1e-2), stream(), steps=2)
    assert abs(first[0]["kl"]) < 1e-6 < second[0]["kl"]


def test_the_vision_tower_is_trained_from_the_images():
    """All weights move, the tower's too; before the update the trainer agrees with the sampler."""
    trainer = replace(make_trainer(lora_r=0, train_vision=True), frozen=Params(None, None))
    model = trainer.learner.model
    before = weights(model)
    params = jax.device_put(jax.tree.map(jnp.array, before), model.shardings(before))
    state, metrics, *_ = grpo_step(trainer, init_state(params, trainer.learner.optimizer, model), stream(), 0)
    after = state.trainable
    assert metrics["finite"] == 1 and metrics["sampling/sampling_logp_difference/max"] < 1e-4
    moved = jax.tree.map(lambda old, new: float(np.abs(np.asarray(old) - new).max()), before.vision, after.vision)
    assert min(moved.patch_kernel, moved.projector, moved.blocks.value, moved.blocks.fc2) > 1e-4
