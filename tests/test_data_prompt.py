"""data/prompt.py: chat messages, MathVista's own wording, and demonstrations."""

import pytest

from data.example import FORMATS, Example
from data.mathvista import load
from data.prompt import demonstration, instruction, messages, official_query, question_text

CHOICE = Example(
    id="c",
    question="Which is even?",
    answer="4",
    images=(b"png", b"png"),
    question_type="multi_choice",
    choices=("3", "4", "5"),
    reference="4 = 2 * 2.",
)
FLOAT = Example(id="f", question="How long?", answer="1.50", answer_type="float", precision=2, unit="cm")


def user_text(chat):
    return chat[-1]["content"][-1]["text"]


def test_each_image_has_an_image_part_before_the_text():
    (message,) = messages(CHOICE)
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["image", "image", "text"]
    assert [part["type"] for part in messages(FLOAT)[0]["content"]] == ["text"]


@pytest.mark.parametrize("format", FORMATS)
def test_the_instruction_stands_in_the_system_role_or_in_front_of_the_question(format):
    reasoning, answer = FORMATS[format]
    for tag in (reasoning, answer):
        assert f"<{tag}>" in instruction(format) and f"</{tag}>" in instruction(format)
    system, user = messages(CHOICE, "role", format)
    assert system == {"role": "system", "content": [{"type": "text", "text": instruction(format)}]}
    assert user_text([user]) == question_text(CHOICE)
    assert user_text(messages(CHOICE, "instructed", format)) == f"{instruction(format)}\n\n{question_text(CHOICE)}"


def test_bare_is_nothing_but_the_question():
    (message,) = messages(CHOICE, "bare")
    assert [part["type"] for part in message["content"]] == ["image", "image", "text"]
    assert user_text([message]) == CHOICE.question


def test_choices_unit_and_precision_are_stated():
    expected = "Which is even?\n(A) 3\n(B) 4\n(C) 5\nAnswer with the letter of the right choice."
    assert question_text(CHOICE) == expected
    assert (
        question_text(FLOAT) == "How long?\nAnswer with a number in cm, without the unit, rounded to 2 decimal places."
    )
    assert question_text(Example(id="t", question="Why?", answer="so")) == "Why?"


def test_the_rebuilt_query_equals_the_stored_one_on_all_of_testmini(shared_data):
    examples = load(shared_data / "mathvista" / "testmini_standin.parquet")
    assert len(examples) == 1000
    assert [official_query(example) for example in examples] == [example.query for example in examples]


def test_hint_words_the_question_as_mathvista_does():
    hint = "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
    expected = f"{hint}\nQuestion: Which is even?\nChoices:\n(A) 3\n(B) 4\n(C) 5"
    assert user_text(messages(CHOICE, "hint")) == f"{instruction('answer')}\n\n{expected}"
    assert "\nQuestion: How long? (Unit: cm)" in user_text(messages(FLOAT, "hint"))


def test_the_datasets_query_is_sent_as_it_is():
    example = Example(id="q", question="x", answer="y", query=" as it is ")
    assert user_text(messages(example, "query")) == " as it is "


def test_what_cannot_be_asked_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"'xml'.*answer, solution"):
        messages(CHOICE, format="xml")
    with pytest.raises(ValueError, match=r"'user'.*instructed, role, hint, query, bare"):
        messages(CHOICE, "user")
    with pytest.raises(ValueError, match="example c brings no query"):
        messages(CHOICE, "query")
    with pytest.raises(ValueError, match="'float None'"):
        messages(Example(id="1", question="x", answer="1.5", answer_type="float"), "hint")


def test_a_demonstration_reasons_and_answers_by_letter():
    assert demonstration(CHOICE) == "<reasoning>4 = 2 * 2.</reasoning>\n<answer>B</answer>"
    assert demonstration(CHOICE, "solution") == "<REASONING>4 = 2 * 2.</REASONING>\n<SOLUTION>B</SOLUTION>"
    with pytest.raises(ValueError, match="example f has no reference"):
        demonstration(FLOAT)
