"""Is the answer right? One candidate in one block, compared exactly with the ground truth.

It is read strictly, so that hedging is not paid: several candidates, a range, another unit, an unevaluated
expression, a truncated integer or the nearest option by spelling are all wrong. Rests on `format.py` and `value.py`.
"""

import re
from fractions import Fraction
from math import nan

from data.example import Example
from reward.format import read_answer
from reward.value import (
    Quantity,
    asked_units,
    normalise,
    question_words,
    read_list,
    read_quantity,
    round_half_up,
    strip_lead,
    strip_markup,
)

# A final answer is short. This bounds the work for any text, and 5,000 digits are no answer to any question here.
MAX_ANSWER_CHARS = 1000

Value = str | Fraction | tuple[Fraction, ...]

_LETTER = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\]]?[.:)]?")
_LETTER_THEN_TEXT = re.compile(r"[(\[]?([A-Za-z])(?:[)\]]?\s*[.:,=-]|[)\]])?\s+(\S.*)", re.DOTALL)
_TEXT_THEN_LETTER = re.compile(r"(.*\S)\s*[(\[]([A-Za-z])[)\]]\.?", re.DOTALL)


def _read_quantity(text: str, example: Example, words: frozenset[str] = frozenset()) -> Quantity | None:
    """The one number in `text`, with the units that the question, the ground truth and the options use."""
    units = asked_units(example.question, " ; ".join((example.unit or "", example.answer, *example.choices)))
    return read_quantity(strip_markup(text), words, units)


def _same_quantity(one: Quantity | None, other: Quantity | None) -> bool:
    """The same number, and the same units unless one of the two leaves them out."""
    return bool(one and other) and one[0] == other[0] and (one[1] == other[1] or not one[1] or not other[1])


def _option_key(text: str, example: Example) -> str:
    """A key that is equal for texts that spell the same option; letter case counts only where options differ by it."""
    keys = {normalise(choice) for choice in example.choices}
    case_matters = len({key.casefold() for key in keys}) < len(keys)
    return normalise(text) if case_matters else normalise(text).casefold()


def _options_by_text(text: str, example: Example) -> set[int]:
    """The options that `text` spells out or, if there are none, those with the same number and unit."""
    wanted = _option_key(text, example)
    same = {index for index, choice in enumerate(example.choices) if _option_key(choice, example) == wanted}
    if same:
        return same
    quantity = _read_quantity(text, example, question_words(example.question))
    choices = [_read_quantity(choice, example) for choice in example.choices] if quantity else []
    return {index for index, choice in enumerate(choices) if _same_quantity(choice, quantity)}


def _option_by_letter(letter: str, example: Example) -> set[int]:
    index = ord(letter.upper()) - ord("A")
    return {index} if index < len(example.choices) else set()


def _options_by_single_letter(letter: str, example: Example) -> set[int]:
    """The options that a letter may mean: by text or by place in the alphabet; text counts first for a small letter."""
    same_case = {index for index, choice in enumerate(example.choices) if strip_markup(choice) == letter}
    if letter.islower() and same_case:
        return same_case
    return same_case | _option_by_letter(letter, example) or _options_by_text(letter, example)


def _named_options(text: str, example: Example) -> set[int]:
    """The options that `text` may mean: by letter or by text; by both ("(C) 107", "107 (C)") only if they agree."""
    if match := _LETTER.fullmatch(text):
        return _options_by_single_letter(match[1], example)
    if named := _options_by_text(text, example):
        return named
    if match := _LETTER_THEN_TEXT.fullmatch(text):
        return _option_by_letter(match[1], example) & _options_by_text(match[2], example)
    if match := _TEXT_THEN_LETTER.fullmatch(text):
        return _option_by_letter(match[2], example) & _options_by_text(match[1], example)
    return set()


def _read_choice(candidate: str, example: Example) -> str | None:
    """The key of the one option that `candidate` names; two options of equal text are one option."""
    text = strip_markup(candidate)
    named = _named_options(text, example) or _named_options(strip_lead(text), example)
    keys = {_option_key(example.choices[index], example) for index in named}
    return keys.pop() if len(keys) == 1 else None


def _rounded(value: Fraction, example: Example) -> Fraction:
    if example.answer_type == "integer" or example.precision is None:
        return value
    return round_half_up(value, int(example.precision))


def _rounded_list(text: str, example: Example) -> tuple[Fraction, ...] | None:
    numbers = read_list(text)
    return numbers and tuple(_rounded(number, example) for number in numbers)


def _rounded_number(text: str, example: Example, words: frozenset[str] = frozenset()) -> Fraction | None:
    quantity = _read_quantity(text, example, words)
    return _rounded(quantity[0], example) if quantity else None


def ground_truth(example: Example) -> Value | None:
    """The ground truth as a value to compare with; None if it is not a value of the example's answer type."""
    if example.question_type == "multi_choice":
        truth = _option_key(example.answer, example)
        return truth if any(_option_key(choice, example) == truth for choice in example.choices) else None
    if example.answer_type == "list":
        return _rounded_list(example.answer, example)
    number = _rounded_number(example.answer, example)
    if number is None and example.answer_type == "text":
        return normalise(example.answer).casefold() or None
    return number


def read_value(candidate: str | None, example: Example) -> Value | None:
    """What the text of an answer says, read as a value of the ground truth's kind; None where it says no such value."""
    truth = ground_truth(example)
    if candidate is None or truth is None:
        return None
    candidate = candidate.strip()
    if len(candidate) > MAX_ANSWER_CHARS + 2 * len(example.answer):
        return None
    if example.question_type == "multi_choice":
        return _read_choice(candidate, example)
    if isinstance(truth, tuple):
        return _rounded_list(candidate, example)
    if isinstance(truth, Fraction):
        return _rounded_number(candidate, example, question_words(example.question))
    texts = (candidate, strip_lead(strip_markup(candidate)))
    return truth if truth in [normalise(text).casefold() for text in texts] else None


def is_correct(candidate: str | None, example: Example) -> bool:
    """Whether the text of an answer (None: there is none) has the value of `example.answer`.

    Multiple choice: one option by letter, by text, or by both if they agree. Integer: exactly equal. Float: equal
    after rounding both to `example.precision` decimals (no precision: exactly). List: the same numbers in the same
    order. Text: the same number, or the same words up to letter case and white space. These are ignored around a value:
    mark-up, the unit asked for, words of the question, "the answer is", well-formed digit grouping. False if the ground
    truth is not a value of the example's answer type.
    """
    value = read_value(candidate, example)
    return value is not None and value == ground_truth(example)


def answer_reward(completion: str, example: Example, format: str = "answer") -> float:
    """1 if the one answer block holds the right answer, else 0; NaN where the example has no usable ground truth."""
    if ground_truth(example) is None:
        return nan
    return float(is_correct(read_answer(completion, format), example))
