"""Turns an example into what the model reads (chat messages) and what it should write (a demonstration).

The output formats are `data.example.FORMATS`. MathVista's own hints and finished query can be used instead of ours.
"""

from typing import Any

from data.example import Example, tag_names

WORDINGS = ("instructed", "role", "hint", "query", "bare")

# Section 2 of the MathVista prompt: what follows "Hint: Please answer the question " by kind of answer.
_OFFICIAL_HINTS = {
    "multi_choice": "and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
    "float 1": "requiring a floating-point number with one decimal place and provide the final value, "
    "e.g., 1.2, 1.3, 1.4, at the end.",
    "float 2": "requiring a floating-point number with two decimal places and provide the final value, "
    "e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "requiring a Python list as an answer and provide the final list, "
    "e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
}


def letter(index: int) -> str:
    """The letter of a choice: A for 0."""
    return chr(ord("A") + index)


def official_query(example: Example) -> str:
    """MathVista's zero-shot prompt, character for character the `query` column of its published files.

    ValueError for a kind of answer that MathVista does not have.
    """
    if example.question_type == "multi_choice":
        kind = "multi_choice"
    elif example.answer_type == "float":
        kind = f"float {example.precision}"
    else:
        kind = example.answer_type
    if kind not in _OFFICIAL_HINTS:
        raise ValueError(
            f"example {example.id} asks for {kind!r}, which MathVista has no hint for; choose another --wording"
        )
    hint = f"Hint: Please answer the question {_OFFICIAL_HINTS[kind]}"
    unit = f" (Unit: {example.unit})" if example.unit else ""
    choices = "".join(f"\n({letter(i)}) {choice}" for i, choice in enumerate(example.choices))
    choices = f"\nChoices:{choices}" if example.choices else ""
    return f"{hint}\nQuestion: {example.question}{unit}{choices}".strip()


def instruction(format: str) -> str:
    """What tells the model to write its answer in `format`; ValueError for an unknown format."""
    reasoning, answer = tag_names(format)
    return (
        f"Reason step by step between <{reasoning}> and </{reasoning}>. "
        f"Then give only the final answer between <{answer}> and </{answer}>."
    )


def _answer_form(example: Example) -> str:
    """One sentence on what the answer must look like, or nothing where any text may be right."""
    unit = f" in {example.unit}, without the unit" if example.unit else ""
    if example.question_type == "multi_choice":
        return "Answer with the letter of the right choice."
    if example.answer_type == "integer":
        return f"Answer with an integer{unit}."
    if example.answer_type == "float" and example.precision is not None:
        places = "decimal place" if example.precision == 1 else "decimal places"
        return f"Answer with a number{unit}, rounded to {example.precision} {places}."
    if example.answer_type == "float":
        return f"Answer with a number{unit}."
    if example.answer_type == "list":
        return f"Answer with a list{unit}, such as [1, 2, 3]."
    return f"Answer{unit}." if unit else ""


def question_text(example: Example) -> str:
    """Our own wording of a problem: the question, its choices as "(A) ...", and the form of the answer."""
    choices = [f"({letter(i)}) {choice}" for i, choice in enumerate(example.choices)]
    return "\n".join([example.question, *choices, *filter(None, [_answer_form(example)])])


def messages(example: Example, wording: str = "instructed", format: str = "answer") -> list[dict[str, Any]]:
    """The chat messages that ask for `example`, in the tokenizer's shape, with one image part per image first.

    wording: "instructed" is our own, behind the instruction to answer in `format`; "role" has that instruction as the
    system message, for models with that role; "hint" is MathVista's, hint first, behind our instruction; "query" is the
    dataset's own finished prompt; "bare" is just the question. ValueError for an unknown wording or format, and if the
    dataset has no query.
    """
    if wording not in WORDINGS:
        raise ValueError(f"wording is {wording!r}; it must be one of {', '.join(WORDINGS)}")
    if wording == "query" and example.query is None:
        raise ValueError(f"example {example.id} brings no query of its own; choose another --wording")
    text = {"query": example.query, "bare": example.question}.get(wording)
    if text is None:
        text = official_query(example) if wording == "hint" else question_text(example)
    if wording in ("instructed", "hint"):
        text = f"{instruction(format)}\n\n{text}"
    chat = [{"role": "user", "content": [*({"type": "image"} for _ in example.images), {"type": "text", "text": text}]}]
    if wording == "role":
        chat.insert(0, {"role": "system", "content": [{"type": "text", "text": instruction(format)}]})
    return chat


def demonstration(example: Example, format: str = "answer") -> str:
    """A completion for supervised training: the reference solution as reasoning, then the answer in the asked form.

    Multiple choice is answered by letter. Raises ValueError if the example has no reference solution.
    """
    if example.reference is None:
        raise ValueError(f"example {example.id} has no reference solution to demonstrate; give its row a reference")
    answer = example.answer
    if example.question_type == "multi_choice":
        answer = letter(example.choices.index(answer))
    reasoning_tag, answer_tag = tag_names(format)
    return f"<{reasoning_tag}>{example.reference}</{reasoning_tag}>\n<{answer_tag}>{answer}</{answer_tag}>"
