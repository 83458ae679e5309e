"""reward/mathvista_extract.py against GPT-4's extractions of real model text, and on cases with one reading."""

import gzip
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.example import Example
from reward.mathvista import normalise, verdict
from reward.mathvista_extract import extract

# The rules were written while looking at these models' texts; the others were only scored.
SEEN = {"bard", "llava_llama_2_13b", "minigpt4_llama2", "gpt4_2shot_solution_use_ocr"}

CHOICE = Example(
    id="1", question="Which animal?", answer="cat", question_type="multi_choice", choices=("dog", "cat", "cow")
)
YES_NO = Example(
    id="1", question="Is x less than y?", answer="yes", question_type="multi_choice", choices=("yes", "no")
)
INTEGER = Example(
    id="1", question="How many objects are preferred by more than 7 people?", answer="3", answer_type="integer"
)
LIST = Example(id="1", question="Between which years?", answer="[2007, 2008]", answer_type="list")


@pytest.fixture(scope="module")
def usable_rows(shared_data):
    questions = json.loads((shared_data / "mathvista" / "testmini.json").read_text(encoding="utf-8"))
    with gzip.open(shared_data / "mathvista" / "extraction_vectors.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["kind"] == "model_text" and row["answered"] and not row["suspect"]]
    assert len(rows) == 4778
    fields = ("question_type", "answer_type", "precision", "unit", "answer")
    examples = [
        Example(
            id=row["pid"],
            question=questions[row["pid"]]["question"],
            choices=tuple(row["choices"] or ()),
            **{field: row[field] for field in fields},
        )
        for row in rows
    ]
    return list(zip(rows, examples, strict=True))


def agreement(rows):
    """The shares of rows with the same normalised value, and with the same verdict, as GPT-4's extraction."""
    values = [(normalise(extract(row["response"], e), e), row, e) for row, e in rows]
    same_value = sum(value == row["normalized"] for value, row, _ in values)
    same_verdict = sum(verdict(value, e) == row["true_false"] for value, row, e in values)
    return same_value / len(rows), same_verdict / len(rows)


@pytest.mark.parametrize("seen", [True, False], ids=["seen models", "unseen models"])
def test_extraction_agrees_with_gpt4_on_real_text(usable_rows, seen):
    value, same_verdict = agreement([pair for pair in usable_rows if (pair[0]["model"] in SEEN) == seen])
    assert value >= 0.93 and same_verdict >= 0.97, (value, same_verdict)


@pytest.mark.parametrize(
    ("response", "extraction"),
    [
        ("cat", "cat"),
        ("B", "B"),
        ("B. cat", "B"),
        ("**B**", "B"),
        ("(A) is wrong and (C) is too. The answer is (B) cat.", "B"),
        ("The correct option is b) or rather (b).", "B"),
        ("Correct answer: C", "C"),
        ("It is not a dog. Therefore the animal is a cat.", "B"),
        ("<reasoning>(A)? No.</reasoning>\n<answer>B</answer>", "B"),
        ("<SOLUTION>cow</SOLUTION>", "C"),
        ("So $\\boxed{\\text{B}}$ it is.", "B"),
        ('The answer is "B".', "B"),
        ("The answer is a cat.", "B"),
        ("", ""),
        ("I cannot tell.", ""),
    ],
)
def test_the_chosen_option_is_found(response, extraction):
    assert normalise(extract(response, CHOICE), CHOICE) == normalise(extraction, CHOICE)


@pytest.mark.parametrize(
    ("response", "extraction"),
    [
        ("Yes, it is.", "A"),
        ("No.", "B"),
        ("Based on the image, x is less than y.", "A"),
        ("In the plot, x is not less than y.", "B"),
        ("Sorry, I cannot see the image.", ""),
    ],
)
def test_a_statement_answers_a_question_of_yes_or_no(response, extraction):
    assert extract(response, YES_NO) == extraction


@pytest.mark.parametrize(
    ("response", "extraction"),
    [
        ("3", "3"),
        ("There are 3 objects preferred by more than 7 people.", "3"),
        ("There are three objects preferred by more than 7 people.", "3"),
        ("2 + 1 = 3, so the answer is 3.", "3"),
        ("The answer is 1,234.", "1234"),
        ("It sums to $-5$.", "-5"),
        ("It sums to −5.", "-5"),
        ("There are **4** objects. The first has 9 votes, the last 12.", "4"),
        ("5 red and 6 blue ones, for a total of 11 objects.", "11"),
        ("So, the number of objects preferred by more than 7 people is 7.", "7"),
        ("The figure uses LLAMA-13 and shows 2 objects.", "2"),
        ("<reasoning>4 + 4 = 8</reasoning><answer> 8 </answer>", "8"),
        ("Therefore \\boxed{12} apples, found in 3 steps.", "12"),
        ("I do not know.", ""),
    ],
)
def test_the_stated_number_is_found(response, extraction):
    assert extract(response, INTEGER) == extraction


def test_lists_are_spaced_as_the_answers_are():
    assert extract("The answer is [2007,2008].", LIST) == "[2007, 2008]"
    assert extract("Its peak was between 2007 and 2008.", LIST) == "[2007, 2008]"


FRAGMENTS = [
    "(A)",
    "the answer is",
    "\\boxed{",
    "}",
    "**",
    "12",
    "-",
    ".",
    ",",
    " ",
    "\n",
    "=",
    "<answer>",
    "[",
    "yes",
    "€",
]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=25).map("".join))
def test_any_text_gives_an_extraction_that_can_be_normalised(response):
    for example in (CHOICE, YES_NO, INTEGER, LIST):
        extraction = extract(response, example)
        assert isinstance(extraction, str)
        normalise(extraction, example)


@pytest.mark.parametrize("piece", [*FRAGMENTS, "1", "1,111,", "is 1 = ", "no\n", "[1,", "the answer is (A) ", "a" * 99])
def test_a_text_of_ten_million_characters_takes_no_time(piece):
    response = piece * (10_000_000 // len(piece))
    for example in (CHOICE, INTEGER):
        start = time.perf_counter()
        extract(response, example)
        assert time.perf_counter() - start < 1.0
