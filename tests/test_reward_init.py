"""`--reward` as a whole: weights, presets, and one object that rewards a batch."""

import math
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.example import Example
from reward import PARTS, PRESETS, make_reward_function, parse_weights

EXAMPLE = Example(id="1", question="How many apples?", answer="42", answer_type="integer", reference="6 * 7 = 42")
RIGHT = "<reasoning>6 * 7</reasoning><answer>42</answer>"
WRONG = "<reasoning>6 * 7</reasoning><answer>41</answer>"


def test_weights_are_parsed_and_presets_unfold():
    assert parse_weights("answer=2,format=1") == {"answer": 2, "format": 1}
    assert parse_weights(" answer , format=0.5 ") == {"answer": 1, "format": 0.5}
    assert parse_weights("mathvista") == {"graded_format": 1, "answer": 2}
    assert parse_weights("mathvista=0.5,answer=1,overlong") == {"graded_format": 0.5, "answer": 2, "overlong": 1}
    assert parse_weights("dir/my.py:score=3") == {"dir/my.py:score": 3}
    assert sum(PRESETS["weighted"][part] for part in ("format", "reasoning", "answer")) == pytest.approx(1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("anwser=2", "reward 'anwser' is unknown: name some of format, .*overlong, mathvista.*path/to/my.py:function"),
        ("", "reward '' is unknown"),
        ("answer=two", "the weight of reward answer is 'two': give a number, as in answer=1"),
        ("answer=nan", "the weight of reward answer is 'nan'"),
        ("overlong", "the overlong reward needs max_tokens"),
    ],
)
def test_what_cannot_be_parsed_is_one_clear_error(spec, message):
    with pytest.raises(ValueError, match=message):
        make_reward_function(spec)


def test_the_mathvista_preset_pays_one_and_one_and_two():
    rewards = make_reward_function("mathvista")([RIGHT, WRONG, "<answer>42</answer>", "42"], [EXAMPLE] * 4)
    assert rewards.total == [4, 2, 3, 0]
    assert rewards.parts == {"graded_format": [2, 2, 1, 0], "answer": [1, 0, 1, 0]}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_prefers_the_right_answer(preset):
    right, wrong = make_reward_function(preset)([RIGHT, WRONG], [EXAMPLE] * 2).total
    assert right > wrong


def test_overlong_counts_the_tokens_it_is_given():
    reward = make_reward_function("answer,overlong=0.5", max_tokens=100)
    rewards = reward([RIGHT] * 3, [EXAMPLE] * 3, num_tokens=[80, 90, 100], finished=[True, True, False])
    assert rewards.parts["overlong"] == [0, -0.5, -1]
    assert rewards.total == [1, 0.75, 0.5]
    with pytest.raises(ValueError, match="give num_tokens and finished"):
        reward([RIGHT], [EXAMPLE])


def test_nan_marks_what_cannot_be_scored_unless_its_weight_is_0():
    unscorable = replace(EXAMPLE, answer="many")
    total = make_reward_function("answer,format")([RIGHT, RIGHT], [EXAMPLE, unscorable]).total
    assert total[0] == 2 and math.isnan(total[1])
    rewards = make_reward_function("answer=0,format")([RIGHT], [unscorable])
    assert rewards.total == [1] and math.isnan(rewards.parts["answer"][0])


def test_a_users_function_is_a_part_with_its_own_name(tmp_path):
    path = tmp_path / "my.py"
    short = "def short(completion, example):\n    return 1 / len(completion)\n"
    path.write_text(short + "def answer(completion, example):\n    return 1\n")
    rewards = make_reward_function(f"{path}:short=2,answer")(["42", RIGHT], [EXAMPLE] * 2)
    assert rewards.parts == {"short": [1 / 2, 1 / len(RIGHT)], "answer": [0, 1]}
    assert rewards.total == [1, 1 + 2 / len(RIGHT)]
    with pytest.raises(ValueError, match="two rewards are called 'answer': rename the function"):
        make_reward_function(f"{path}:answer,answer")


def test_a_users_function_that_fails_leaves_the_other_parts(tmp_path):
    path = tmp_path / "my.py"
    path.write_text("def bad(completion, example):\n    return 1 / (len(completion) - 2)\n")
    with pytest.warns(RuntimeWarning, match="the reward bad raised ZeroDivisionError: .* on example '1'"):
        rewards = make_reward_function(f"{path}:bad,answer")(["42", RIGHT], [EXAMPLE] * 2)
    assert math.isnan(rewards.total[0]) and rewards.total[1] > 1
    assert rewards.parts["answer"] == [0, 1]


def test_one_example_for_each_completion():
    with pytest.raises(ValueError, match="2 completions came with 1 examples"):
        make_reward_function("answer")([RIGHT, WRONG], [EXAMPLE])
    with pytest.raises(ValueError, match="output format 'xml' is unknown"):
        make_reward_function("answer", format="xml")


@settings(deadline=500)
@given(st.lists(st.text(), max_size=5), st.sampled_from(["answer", "solution"]))
def test_every_part_gives_a_finite_number_for_any_text(completions, format):
    example = replace(EXAMPLE, rubric=("names the product",))
    rewards = make_reward_function(",".join(PARTS), format)(completions, [example] * len(completions))
    assert set(rewards.parts) == set(PARTS)
    assert len(rewards.total) == len(completions)
    assert all(math.isfinite(value) for values in rewards.parts.values() for value in values)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("piece", ["x", "word ", "1+1 ", "<", "wait ", "$a"])
def test_every_part_judges_ten_megabytes_in_under_50_ms(part, piece):
    example = replace(EXAMPLE, rubric=("names the product",))
    text = piece * (10_000_000 // len(piece))
    for completion in (text, f"<reasoning>{text}</reasoning><answer>{text[:500]}</answer>"):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            PARTS[part](completion, example, "answer")
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.05
