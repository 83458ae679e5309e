"""A user's own function: loaded, recognised, and never able to stop the run."""

import math
import time
import warnings

import pytest

from data.example import Example
from reward.user import MAX_TIMEOUTS, load_user_reward

EXAMPLES = [Example(id=f"row-{i}", question=f"q{i}", answer=str(i), metadata={"level": i}) for i in range(3)]
COMPLETIONS = ["a", "bb", "ccc"]

SOURCE = """
import threading
import time

release = threading.Event()
calls = []

def length(completion, example):
    return len(completion) + int(example.answer)

def fails_on_bb(completion, example):
    if completion == "bb":
        raise KeyError("no bb")
    return 1.0

def exits(completion, example):
    raise SystemExit(3)

def odd(completion, example):
    return {"a": float("nan"), "bb": None, "ccc": "high"}[completion]

def infinite(completion, example):
    return float("inf")

def sleeps_on_a(completion, example):
    if completion == "a":
        time.sleep(60)
    return 1.0

def hangs(completion, example):
    calls.append(completion)
    release.wait(60)
    return 1.0

def trl(prompts, completions, **columns):
    assert len(prompts) == len(completions) == len(columns["answer"]) == len(columns["level"])
    return [len(c) + level + len(p) for p, c, level in zip(prompts, completions, columns["level"])]

def trl_named(completions, answer):
    return [float(a) for a in answer]

def trl_fails_on_bb(completions, **columns):
    if "bb" in completions:
        raise RuntimeError("bb came")
    return [1.0] * len(completions)

def trl_none(completions, **columns):
    return [None if c == "bb" else 1.0 for c in completions]

def trl_short(completions, **columns):
    return [1.0]

def trl_hangs(completions, **columns):
    calls.append(len(completions))
    release.wait(60)

def takes_text(text):
    return 1.0

number = 7
"""


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(SOURCE)
    loaded = []

    def load(name, time_limit=5.0):
        loaded.append(load_user_reward(f"{path}:{name}", time_limit))
        return loaded[-1]

    yield load
    for reward in loaded:
        if release := reward.function.__globals__.get("release"):
            release.set()


def messages(caught):
    assert all(issubclass(warning.category, RuntimeWarning) for warning in caught)
    return [str(warning.message) for warning in caught]


def score(reward, completions=COMPLETIONS, examples=EXAMPLES):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = reward(completions, examples)
    return values, messages(caught)


def test_both_signatures_are_recognised_by_parameter_names(load):
    assert score(load("length")) == ([1, 3, 5], [])
    assert score(load("trl")) == ([3, 5, 7], [])
    assert score(load("trl_named")) == ([0, 1, 2], [])
    assert load("trl")(COMPLETIONS, EXAMPLES, ["", "", "long"]) == [1, 3, 9]


def test_an_exception_costs_that_completion_its_reward_and_names_function_and_example(load):
    values, said = score(load("fails_on_bb"))
    assert (values[0], values[2]) == (1, 1) and math.isnan(values[1])
    assert said == [
        "the reward fails_on_bb raised KeyError: 'no bb' on example 'row-1': this completion gets no reward"
    ]


def test_in_a_batch_that_raises_only_the_culprit_loses(load):
    values, said = score(load("trl_fails_on_bb"))
    assert (values[0], values[2]) == (1, 1) and math.isnan(values[1])
    assert len(said) == 1 and "trl_fails_on_bb raised RuntimeError: bb came on example 'row-1'" in said[0]


def test_exit_does_not_end_the_run(load):
    values, said = score(load("exits"))
    assert all(map(math.isnan, values)) and "raised SystemExit: 3" in said[0]


def test_nan_none_words_and_infinity_are_no_reward(load):
    values, said = score(load("odd"))
    assert all(map(math.isnan, values))
    for message, value in zip(said, ["nan", "None", "'high'"], strict=True):
        assert f"the reward odd returned {value}, which is not a finite number on example" in message
    assert all(map(math.isnan, score(load("infinite"))[0]))


def test_none_in_a_batch_is_one_lost_reward(load):
    values, said = score(load("trl_none"))
    assert (values[0], values[2]) == (1, 1) and math.isnan(values[1])
    assert len(said) == 1 and "example 'row-1'" in said[0]


def test_a_batch_of_the_wrong_length_is_no_reward(load):
    with warnings.catch_warnings(record=True):
        assert load("trl_short")(COMPLETIONS, EXAMPLES) == [1, 1, 1]  # asked again one at a time, one is right


def test_a_sleeping_call_is_left_behind_and_the_next_ones_do_not_wait(load):
    start = time.perf_counter()
    values, said = score(load("sleeps_on_a", time_limit=0.2))
    assert time.perf_counter() - start < 5
    assert math.isnan(values[0]) and values[1:] == [1, 1]
    assert said == ["the reward sleeps_on_a ran for more than 0.2 s on example 'row-0': this completion gets no reward"]


def test_calls_over_time_that_are_not_in_a_row_do_not_stop_the_asking(load):
    completions, examples = ["a", "bb"] * 4, [EXAMPLES[0], EXAMPLES[1]] * 4
    values, said = score(load("sleeps_on_a", time_limit=0.1), completions, examples)
    assert values[1::2] == [1] * 4
    assert len(said) == 4 and all("ran for more than 0.1 s" in message for message in said)


def test_a_function_that_always_hangs_costs_a_batch_three_time_limits(load):
    reward = load("hangs", time_limit=0.1)
    start = time.perf_counter()
    values, said = score(reward, COMPLETIONS * 20, EXAMPLES * 20)
    assert time.perf_counter() - start < 5
    assert all(map(math.isnan, values)) and len(said) == 60
    assert reward.function.__globals__["calls"] == COMPLETIONS[:MAX_TIMEOUTS]
    assert "was not called, since 3 calls in a row ran over time" in said[-1]


def test_a_batch_that_hangs_is_not_asked_again(load):
    reward = load("trl_hangs", time_limit=0.1)
    values, said = score(reward)
    assert all(map(math.isnan, values)) and len(said) == 3
    assert reward.function.__globals__["calls"] == [3]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{0}/none.py:f", "there is no file .*none.py"),
        ("{0}/my.py:none", "my.py has no function 'none'"),
        ("{0}/my.py:number", "my.py has no function 'number'"),
        ("{0}/my.py:takes_text", r"takes \(text\): a reward takes \(completion, example\) or, as in TRL"),
        ("{0}/bad.py:f", "importing .*bad.py failed with SyntaxError"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_error(tmp_path, spec, message):
    (tmp_path / "my.py").write_text(SOURCE)
    (tmp_path / "bad.py").write_text("def f(:\n")
    with pytest.raises(ValueError, match=message):
        load_user_reward(spec.format(tmp_path))
