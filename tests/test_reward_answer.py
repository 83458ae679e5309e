"""Whether an answer is right: real cases, real problems, and properties that hold for any text."""

import json
import math
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.example import Example
from reward.answer import answer_reward, is_correct

INTEGER = Example(id="1", question="How many apples are there in total?", answer="42", answer_type="integer")
CHOICE = Example(
    id="2",
    question="Find the measure of angle H.",
    answer="107",
    question_type="multi_choice",
    choices=("97", "102", "107", "122"),
)
LIST = Example(id="3", question="Between which two years?", answer="[2014, 2016]", answer_type="list")
FLOAT = Example(id="4", question="What is the length?", answer="3.5", answer_type="float", precision=1)
TEXT = Example(id="5", question="What is the capital of France?", answer="Paris")
EXAMPLES = [INTEGER, CHOICE, LIST, FLOAT, TEXT]


def wrap(answer, reasoning="r"):
    return f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"


def test_verdict_of_every_reward_case(shared_data):
    """All verdicts marked "fact" and at least 95% of those marked "convention"."""
    right = {"fact": [], "convention": []}
    for line in (shared_data / "reward_cases.jsonl").open(encoding="utf-8"):
        case = json.loads(line)
        example = Example(
            id=case["id"],
            question=case["question"],
            answer=case["ground_truth"],
            question_type=case["question_type"],
            answer_type=case["answer_type"],
            choices=tuple(case["choices"] or ()),
            precision=case["precision"],
        )
        verdict = answer_reward(case["completion"], example, {"lower": "answer", "upper": "solution"}[case["tags"]])
        right[case["basis"]].append(verdict == float(case["correct"]))
    assert (len(right["fact"]), len(right["convention"])) == (148, 59)
    assert all(right["fact"])
    assert sum(right["convention"]) >= 0.95 * 59


def test_gsm8k_accepts_its_own_answer_and_refuses_the_next_rows(shared_data):
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "train.jsonl").open(encoding="utf-8")]
    answers = [row["answer"].split("#### ")[1] for row in rows]
    assert len(rows) == 7473
    for row, answer, following in zip(rows, answers, answers[1:] + answers[:1], strict=True):
        example = Example(id="", question=row["question"], answer=answer, answer_type="integer")
        reasoning = row["answer"].split("####")[0]
        assert answer_reward(wrap(answer, reasoning), example) == 1
        equal = int(following.replace(",", "")) == int(answer.replace(",", ""))
        assert answer_reward(wrap(following, reasoning), example) == float(equal)


def test_mathvista_accepts_its_own_answers(shared_data):
    """Every problem of testmini: the answer itself is right, as is its letter; every other option is wrong."""
    problems = json.loads((shared_data / "mathvista" / "testmini.json").read_text(encoding="utf-8"))
    for problem in problems.values():
        example = Example(
            id=problem["pid"],
            question=problem["question"],
            answer=problem["answer"],
            question_type=problem["question_type"],
            answer_type=problem["answer_type"],
            choices=tuple(problem["choices"] or ()),
            precision=problem["precision"],
            unit=problem["unit"],
        )
        assert is_correct(example.answer, example), example
        for letter, choice in zip("ABCDEFGH", example.choices, strict=False):
            for named in (letter, f"({letter})", f"({letter}) {choice}", f"{letter}. {choice}", choice):
                assert is_correct(named, example) == (choice == example.answer), (named, example)


@pytest.mark.parametrize(
    "candidate",
    [
        "C",
        "c",
        "(C)",
        "C.",
        "C) 107",
        "(C) 107",
        "C: 107",
        "107",
        "107°",
        "107 (C)",
        "Option C",
        "The answer is (C).",
        "$107$",
    ],
)
def test_one_option_by_letter_text_or_both(candidate):
    assert is_correct(candidate, CHOICE)


@pytest.mark.parametrize(
    "candidate",
    [
        "B",
        "(B) 107",
        "C) 97",
        "C and D",
        "C, B",
        "(C)(D)",
        "A) 97 B) 102 C) 107 D) 122",
        "107 or 122",
        "106",
        "10",
        "1077",
        "ABC",
        "E",
        "",
        "none of the above",
        "not C",
        "C?",
        "107 (B)",
    ],
)
def test_no_nearest_option_no_several_options(candidate):
    assert not is_correct(candidate, CHOICE)


def test_the_words_of_an_option_are_part_of_it():
    example = replace(CHOICE, question="How many red or blue balls?", answer="3 red", choices=("3 red", "5 blue"))
    assert is_correct("3 Red", example) and is_correct("A", example)
    assert not is_correct("3 blue", example) and not is_correct("3", example)
    free = replace(TEXT, question=example.question, answer="3 red")
    assert is_correct("3 red.", free) and not is_correct("3 blue", free)


def test_letter_case_counts_where_it_tells_options_apart():
    genotype = replace(CHOICE, question="Which genotype?", answer="Aa", choices=("AA", "Aa", "aa"))
    assert is_correct("Aa", genotype) and is_correct("B", genotype) and is_correct("(b) Aa", genotype)
    for wrong in ("AA", "aa", "aA", "A", "(C) aa", "(B) aa"):
        assert not is_correct(wrong, genotype)


def test_blanks_between_words_and_digits_count():
    example = replace(CHOICE, question="Which code?", answer="1 2", choices=("12", "1 2", "60-k"))
    assert is_correct("1  2", example) and not is_correct("12", example)
    assert is_correct("60 - k", replace(example, answer="60-k"))


def test_equal_options_are_one_option():
    example = replace(CHOICE, answer="18", choices=("9", "12", "18", "18"))
    assert is_correct("C", example) and is_correct("D", example) and is_correct("18", example)


def test_a_letter_that_is_also_another_options_text_names_nothing():
    example = replace(CHOICE, answer="A", choices=("B", "A", "C"))
    assert not is_correct("A", example)
    assert not is_correct("B", example)
    assert is_correct("(B) A", example)


def test_small_letters_as_options_are_told_from_capital_letters_of_places():
    example = replace(CHOICE, answer="(b)", choices=("(c)", "(a)", "(b)"))
    assert is_correct("(b)", example) and is_correct("b", example) and is_correct("(C)", example)
    assert not is_correct("B", example) and not is_correct("c", example)


def test_an_integer_is_never_truncated_or_rounded():
    assert is_correct("42.0", INTEGER)
    assert not is_correct("42.9", INTEGER)
    assert not is_correct("41.9999999999", INTEGER)
    big = replace(INTEGER, answer="9007199254740992")
    assert is_correct("9,007,199,254,740,992", big)
    assert not is_correct("9007199254740993", big)
    assert not is_correct("9" * 5000, big)


def test_a_float_is_compared_at_its_precision():
    assert is_correct("3.46", FLOAT) and is_correct("7/2", FLOAT) and not is_correct("3.55", FLOAT)
    assert is_correct("0.004", replace(FLOAT, answer="0.0")) and is_correct("-0.04", replace(FLOAT, answer="0.0"))
    assert not is_correct("3.49999", replace(FLOAT, precision=None))


def test_list_and_text_answers():
    assert is_correct("[2014,2016.0]", LIST)
    assert not is_correct("[2016, 2014]", LIST)
    assert is_correct("The answer is **paris**.", TEXT)
    assert not is_correct("Paris or London", TEXT)
    assert not is_correct("Pari", TEXT)


def test_a_unit_in_the_ground_truth_is_the_unit_asked_for():
    example = Example(id="6", question="How far is it?", answer="60 km")
    assert is_correct("60", example) and is_correct("60 kilometers", example)
    assert not is_correct("60 miles", example)


def test_a_ground_truth_of_any_length_is_handled():
    for answer in ("9" * 5000, "word " * 2000, "1/" + "9" * 5000, "[" + "9" * 5000 + "]"):
        for example in EXAMPLES:
            is_correct("9" * 5000, replace(example, answer=answer, choices=("1", answer)))
    assert is_correct("Word " * 2000, replace(TEXT, answer="word " * 2000))


def test_without_a_usable_ground_truth_there_is_no_score():
    for example in (replace(INTEGER, answer="many"), replace(CHOICE, answer="108"), replace(TEXT, answer="")):
        assert math.isnan(answer_reward(wrap("42"), example))
        assert not is_correct("42", example)


TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "<ANSWER>", "<answer"]
MARKUP = [
    "**",
    "`",
    "$",
    "$$",
    "_",
    "#",
    r"\boxed{",
    "}",
    r"\frac{1}{2}",
    "[",
    "(",
    ")",
    r"\(",
    r"\text{",
    "°",
    "%",
    "/",
    "^",
]
WORDS = [
    "42",
    "107",
    "-",
    "+",
    ".",
    ",",
    "e",
    "1e9",
    "A",
    "C",
    "apples",
    "km",
    "or",
    "not",
    "=",
    "x",
    " ",
    "\n",
    "\u200b",
    "½",
]
PIECES = st.one_of(st.sampled_from(TAGS + MARKUP + WORDS), st.text(max_size=3))
MESSY = st.lists(PIECES, max_size=30).map("".join)


@settings(max_examples=400, deadline=200)
@given(MESSY, st.sampled_from(EXAMPLES))
def test_any_text_gets_a_verdict(text, example):
    """Never raises, never hangs (a deadline of 200 ms), never anything but 0 or 1."""
    assert answer_reward(text, example) in (0, 1)
    assert answer_reward(wrap(text), example) in (0, 1)
    assert is_correct(text, example) in (False, True)


@settings(max_examples=200, deadline=200)
@given(MESSY, MESSY, st.sampled_from(["answer", "solution"]))
def test_any_ground_truth_gets_a_verdict(text, truth, format):
    for example in EXAMPLES:
        reward = answer_reward(wrap(text), replace(example, answer=truth, question=truth), format)
        assert reward in (0, 1) or math.isnan(reward)


@settings(max_examples=300)
@given(MESSY, MESSY, MESSY, st.sampled_from(["41", "42 or 43", "about 42", "", "4 2", "the answer", "B", "4.2"]))
def test_nothing_outside_the_block_makes_a_wrong_answer_right(before, between, after, wrong):
    """Also with right answers, tags and mark-up outside: only the block is read, and only if there is exactly one."""
    for example in EXAMPLES:
        text = f"{before}<reasoning>r</reasoning>{between}<answer>{wrong}</answer>{after}"
        assert answer_reward(text, example) == 0


@given(st.text(" \t\n\u00a0"), st.text(" \t\n\u00a0"))
def test_white_space_never_changes_a_verdict(left, right):
    for answer, verdict in (("42", 1), ("41", 0), ("42 43", 0)):
        assert answer_reward(f"{left}<answer>{right}{answer}{left}</answer>{right}", INTEGER) == verdict


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_two_numbers_are_right_only_if_they_are_equal_and_one(one, other):
    example = replace(INTEGER, answer=str(one))
    assert is_correct(str(other), example) == (one == other)
    for join in (" or ", ", ", " and ", "; ", " to ", "\n"):
        assert not is_correct(f"{one}{join}{other}", example)


@pytest.mark.parametrize(
    "piece", ["x", "9", " ", "e", "<", "</answer", "<answer>", "(", "1,", "\u200b", "\u2003", "$a"]
)
@pytest.mark.parametrize("place", ["{0}", "<answer>{0}</answer>", "<answer>42</answer>{0}", "{0}<answer>42</answer>"])
def test_ten_megabytes_in_under_50_ms(piece, place):
    completion = place.format(piece * (10_000_000 // len(piece)))
    for example in (INTEGER, CHOICE):
        assert min(_seconds(answer_reward, completion, example) for _ in range(3)) < 0.05


@pytest.mark.parametrize(
    "piece", ["1 ", "$a", r"\text{", r"\[", "**a", "*_", "1/", "a^", "(A", "the ", "1,", "{", "`", " A)"]
)
def test_the_longest_answer_that_is_read_in_under_50_ms(piece):
    candidate = (piece * 1000)[:1000]
    for example in EXAMPLES:
        assert min(_seconds(is_correct, candidate, example) for _ in range(3)) < 0.05


def test_ten_megabytes_of_reasoning_do_not_hide_the_answer():
    assert answer_reward(wrap("42", "so " * 3_300_000), INTEGER) == 1


def _seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start
