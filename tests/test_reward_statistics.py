"""reward/statistics.py against enumeration and published values."""

from itertools import combinations

import pytest

from reward.statistics import maj_at_k, pass_at_k, wilson_interval


def test_the_interval_is_wilsons():
    # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (correct, total), expected in published.items():
        assert wilson_interval(correct, total) == pytest.approx(expected, abs=5e-5)


def test_the_bounds_are_where_the_observed_share_is_196_deviations_off():
    for correct, total in ((7, 11), (500, 1000), (1, 3)):
        for bound in wilson_interval(correct, total):
            deviation = abs(correct / total - bound) / (bound * (1 - bound) / total) ** 0.5
            assert deviation == pytest.approx(1.959964, abs=1e-5)


def test_none_right_and_all_right_mirror_each_other():
    low, high = wilson_interval(0, 17)
    assert low == 0 and wilson_interval(17, 17) == pytest.approx((1 - high, 1))


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_what_is_no_proportion_is_refused(correct, total):
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(correct, total)


@pytest.mark.parametrize(("samples", "correct"), [(7, 0), (7, 2), (7, 7), (5, 4)])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples(samples, correct):
    verdicts = [i < correct for i in range(samples)]
    for k in range(1, samples + 1):
        draws = [any(draw) for draw in combinations(verdicts, k)]
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)


def test_the_majority_decides_and_ties_are_shared():
    assert maj_at_k(["a", "b", "a"], [True, False, True]) == 1
    assert maj_at_k(["a", "b", "b"], [True, False, False]) == 0
    assert maj_at_k(["a", "b", "c", "a", "b"], [True, False, False, True, False]) == 0.5


def test_no_answer_is_no_vote():
    assert maj_at_k([None, None, "a"], [False, False, True]) == 1
    assert maj_at_k([None, None], [False, False]) == 0
