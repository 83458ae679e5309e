"""Overlap with rubric items, a reference, or an answer in words."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.example import Example
from reward.rubric import correctness_reward, rubric_coverage, rubric_reward, token_f1

EXAMPLE = Example(id="1", question="Why is the sky blue?", answer="Rayleigh scattering of sunlight")


def wrap(answer):
    return f"<reasoning>r</reasoning><answer>{answer}</answer>"


def test_token_f1_by_hand():
    """Three content words against two with one in common: precision 1/3, recall 1/2, F1 0.4; bags, not sets."""
    assert token_f1("the red big dog", "a dog barks") == pytest.approx(0.4)
    assert token_f1("dog dog dog", "dog") == pytest.approx(0.5)
    assert token_f1("Dog!", "the dog") == 1
    assert token_f1("", "dog") == token_f1("", "") == 0


@given(st.text(), st.text())
def test_token_f1_is_symmetric_and_bounded(one, other):
    assert token_f1(one, other) == token_f1(other, one)
    assert 0 <= token_f1(one, other) <= 1


def test_coverage_is_the_mean_over_items():
    rubric = ("names scattering", "mentions short wavelengths", "of the")
    assert rubric_coverage("Scattering favours short wavelengths", rubric) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert rubric_coverage("anything", ("of the",)) == 0


def test_rubric_uses_what_the_example_has():
    rubric, reference = ("names scattering",), "scattering of light"
    assert rubric_reward(wrap("scattering"), replace(EXAMPLE, rubric=rubric)) == 0.5
    assert rubric_reward(wrap("scattering light"), replace(EXAMPLE, reference=reference)) == 1
    assert rubric_reward("scattering light", replace(EXAMPLE, rubric=rubric, reference=reference)) == 0.75
    assert math.isnan(rubric_reward(wrap("scattering"), EXAMPLE))


def test_a_list_of_keywords_is_held_back_by_the_reference():
    example = replace(EXAMPLE, rubric=("names scattering",), reference="scattering of light")
    stuffed = "names scattering light " + " ".join(f"word{i}" for i in range(100))
    assert rubric_reward(stuffed, example) < rubric_reward("scattering of light", example)


def test_partial_credit_only_for_answers_in_words():
    assert correctness_reward(wrap("rayleigh scattering of sunlight."), EXAMPLE) == 1
    assert correctness_reward(wrap("scattering of sunlight"), EXAMPLE) == pytest.approx(0.8 / 2)
    assert correctness_reward("scattering of sunlight", EXAMPLE) == 0
    number = replace(EXAMPLE, answer="42")
    choice = replace(EXAMPLE, answer="red dog", question_type="multi_choice", choices=("red dog", "red cat"))
    assert correctness_reward(wrap("42.0"), number) == 1
    assert correctness_reward(wrap("42 or 43"), number) == 0
    assert correctness_reward(wrap("red"), choice) == 0
    assert math.isnan(correctness_reward(wrap("red"), replace(EXAMPLE, answer="")))
