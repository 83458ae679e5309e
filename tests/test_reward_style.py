"""Reasoning, self-correction, length, variety and the soft token budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.example import Example
from reward.style import (
    length_reward,
    overlong_reward,
    quality_reward,
    reasoning_reward,
    self_correction_reward,
)

EXAMPLE = Example(id="1", question="How many?", answer="42", answer_type="integer")
PARTS = [length_reward, quality_reward, reasoning_reward, self_correction_reward]


def wrap(reasoning):
    return f"<reasoning>{reasoning}</reasoning><answer>42</answer>"


def test_reasoning_counts_words_step_words_and_notation():
    """By hand: 8 of 40 words, 2 of 3 step words, 1 of 3 places with notation."""
    text = wrap("first we add the two, then then 4+5")
    assert reasoning_reward(text, EXAMPLE) == pytest.approx((8 / 40 + 2 / 3 + 1 / 3) / 3)
    full = wrap("First 2+3 = 5. Then 5*2 = 10, because " + "it doubles " * 20)
    assert reasoning_reward(full, EXAMPLE) == 1
    assert reasoning_reward("first 2+3, then = therefore", EXAMPLE) == 0


def test_reasoning_is_read_from_the_format_asked_for():
    assert reasoning_reward("<REASONING>so</REASONING>", EXAMPLE, "solution") > 0
    assert reasoning_reward("<REASONING>so</REASONING>", EXAMPLE, "answer") == 0


@pytest.mark.parametrize(
    ("text", "reward"),
    [("7. Wait, that is 8.", 1), ("Let me check: 8.", 1), ("I double-check it", 1), ("It is 8.", 0), ("the waiter", 0)],
)
def test_self_correction(text, reward):
    assert self_correction_reward(wrap(text), EXAMPLE) == reward
    assert self_correction_reward(text, EXAMPLE) == 0


@pytest.mark.parametrize(("words", "reward"), [(0, 0), (15, 0.5), (30, 1), (300, 1), (450, 0.5), (600, 0), (900, 0)])
def test_length_rises_stays_and_falls(words, reward):
    assert length_reward("word " * words, EXAMPLE) == pytest.approx(reward)


def test_quality_is_low_for_loops():
    different = " ".join(f"w{i}" for i in range(41))
    assert quality_reward(wrap(different), EXAMPLE) == 1
    assert quality_reward(wrap("we go on " * 20), EXAMPLE) == pytest.approx(3 / 58)
    assert quality_reward(wrap("too short"), EXAMPLE) == 0


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 4000))
def test_overlong_is_trls_soft_overlong_punishment(max_tokens, buffer, num_tokens):
    from trl.rewards import get_soft_overlong_punishment

    buffer = min(buffer, max_tokens)
    oracle = get_soft_overlong_punishment(max_completion_len=max_tokens, soft_punish_cache=buffer)
    expected = oracle([[0] * num_tokens])[0]
    assert overlong_reward(num_tokens, True, max_tokens, buffer) == pytest.approx(expected)


def test_overlong_by_hand():
    """100 tokens, a buffer of a fifth: free to 80, half way at 90, everything lost for one that did not finish."""
    assert [overlong_reward(n, True, 100) for n in (1, 80, 90, 100)] == [0, 0, -0.5, -1]
    assert overlong_reward(3, False, 100) == -1
    assert overlong_reward(4, True, 4) == 0
    with pytest.raises(ValueError, match="buffer is 101 tokens: it must lie between 0 and max_tokens=100"):
        overlong_reward(1, True, 100, 101)


@given(st.text())
def test_style_is_between_0_and_1_for_any_text(text):
    for part in PARTS:
        assert 0 <= part(text, EXAMPLE) <= 1
        assert 0 <= part(wrap(text), EXAMPLE) <= 1
