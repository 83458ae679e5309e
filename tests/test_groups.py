"""Groups of completions: what is sampled, replaced and kept as given, and the metrics of a step's groups."""

import itertools

import jax
import numpy as np
import pytest
from oracle import assert_close
from test_step import CONFIG, C, G, Q, begin, make_trainer, preference, row, stream, tokenizer

from gemma3.lora import LoraConfig, Policy, init_lora
from grpo.groups import Groups, collect, given_completions, group_metrics, reward_groups, sample_groups
from grpo.rollout import put_prompts


def collected(dull: str, cap: int) -> Groups:
    trainer = make_trainer(dynamic_sampling=cap)
    return collect(trainer, trainer.policy(begin(trainer).trainable), stream(dull), 0)


def places(groups: Groups) -> list[int]:
    return [row.index for row in groups.rows]


def test_dynamic_sampling_replaces_groups_that_teach_nothing():
    """With the batches d.dd, .d.d and d... (d is dull) there are four useful groups by the third: 1, 4, 6 and 9."""
    groups = collected("d.dd.d.dd...", cap=5)
    assert places(groups) == [1, 4, 6, 9] and groups.num_sampled == 12
    np.testing.assert_array_equal(groups.rewards, [[0, 1, 2]] * Q)
    assert group_metrics(groups)["frac_reward_zero_std"] == 0
    np.testing.assert_array_equal(groups.prompts.index, places(groups))
    assert [row.example.id for row in groups.rows] == ["e1", "e4", "e6", "e9"]
    trainer = make_trainer()
    _, again = sample_groups(trainer, trainer.policy(begin(trainer).trainable), groups.rows, 0)
    np.testing.assert_array_equal(groups.completions.ids, again.ids)
    np.testing.assert_array_equal(groups.parts["tokens"], again.mask.sum(axis=-1))


def test_dynamic_sampling_stops_at_its_cap_and_keeps_some_that_teach_nothing():
    groups = collected("d.dd.d.dd...", cap=1)
    assert places(groups) == [0, 1, 4, 6] and groups.num_sampled == 8
    assert group_metrics(groups)["frac_reward_zero_std"] == 0.25


def test_dynamic_sampling_costs_nothing_where_every_group_teaches():
    groups = collected("", cap=3)
    assert places(groups) == [0, 1, 2, 3] and groups.num_sampled == Q


def test_given_completions_are_not_sampled_and_keep_their_rewards(monkeypatch):
    """They stand beside sampled rows, whose samples do not change; the third place in a pair's group stays empty."""
    monkeypatch.setattr("grpo.groups.completion_is_correct", lambda completion, example, format: len(completion) > 3)
    trainer = make_trainer()
    sampled = list(itertools.islice(stream(), Q))
    mixed = [sampled[0], preference(1), sampled[2], preference(3)]
    policy = trainer.policy(begin(trainer).trainable)
    (plain_prompts, plain), (prompts, completions) = (
        sample_groups(trainer, policy, rows, 0) for rows in (sampled, mixed)
    )
    np.testing.assert_array_equal(prompts.ids, plain_prompts.ids)
    ids, mask, logps, finished = map(np.asarray, completions)
    for at in (0, 2):
        np.testing.assert_array_equal(ids[at], plain.ids[at])
        np.testing.assert_array_equal(mask[at], plain.mask[at])
    for at in (1, 3):
        for place, text in enumerate(("the sum is right", "no")):
            tokens = [*tokenizer().encode(text), 5][:C]
            np.testing.assert_array_equal(ids[at, place][mask[at, place]], tokens)
            assert finished[at, place] == (5 in tokens)
        assert not mask[at, 2].any() and not finished[at, 2]
    assert not finished[1, 0] and finished[1, 1], "one should be cut and one whole"
    trained = trainer.logps(policy, prompts, completions.ids)
    assert_close(logps[mask], np.asarray(trained)[mask])

    groups = reward_groups(trainer, mixed, prompts, completions, started=0.0)
    nan = np.nan
    np.testing.assert_array_equal(groups.rewards, [[0, 1, 2], [1, 0, nan], [0, 1, 2], [1, 0, nan]])
    assert groups.texts[3][1] == "no" and tokenizer().decode(ids[1, 0]) in "the sum is right"
    metrics = group_metrics(groups)
    np.testing.assert_array_equal(np.isnan(groups.parts["tokens"]), np.isnan(groups.rewards))
    np.testing.assert_allclose(metrics["accuracy"], groups.correct[mask.any(axis=-1)].mean())
    assert metrics["num_tokens"] == mask.sum()


def test_more_given_completions_than_a_group_holds_are_refused():
    rows = [row(7, completions=("a", "b", "c", "d"))]
    with pytest.raises(ValueError, match="example e7 brings 4 completions; --num-generations 3 is too few"):
        given_completions(rows, [rows[0].example.completions], make_trainer().reader, (G, C))


def test_an_adapted_tower_reads_images_as_the_sampler_did_and_the_reference_without_its_adapter():
    trainer = make_trainer()
    rows = list(itertools.islice(stream(), Q))
    lora = init_lora(jax.random.key(1), CONFIG, LoraConfig(r=3, vision=True))
    lora = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(2), x.shape), lora)
    policy, reference = trainer.policy(lora), trainer.reference
    prompts, (ids, mask, sampler_logps, _) = sample_groups(trainer, policy, rows, 0)
    mask = np.asarray(mask)
    with_images = mask & (np.arange(Q) % 2 == 1)[:, None, None]

    def logps_of_reference(images_read_with: Policy) -> np.ndarray:
        return np.asarray(trainer.logps(reference, put_prompts(images_read_with, rows, trainer.reader), ids))

    assert_close(np.asarray(trainer.logps(policy, prompts, ids))[mask], np.asarray(sampler_logps)[mask])
    found = np.asarray(trainer.logps(reference, prompts, ids))
    assert_close(found[mask], logps_of_reference(reference)[mask])
    assert np.abs(found - logps_of_reference(policy))[with_images].max() > 1e-3


def test_metrics_of_groups_by_hand():
    """Completions of 2 (ended), 3 (cut), 1 (ended) and 0 tokens; the empty one fills its group and counts nowhere."""
    lengths = np.array([[2, 3], [1, 0]])
    finished = np.array([[True, False], [True, False]])
    rewards = np.array([[1.0, 3.0], [2.0, np.nan]], np.float32)
    correct = np.array([[True, False], [True, False]])
    parts = {"part": np.array([[0, 1], [5, np.nan]])}
    groups = Groups([], None, None, [], rewards, parts, correct, lengths, finished, 4, 0.0, 0.0, 0.0)
    assert group_metrics(groups) == pytest.approx(
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
            "prompts_drawn": 4,
        }
    )
