"""Rewards for words shared with rubric items, with a reference text, or with the right answer if it is in words.

These give partial credit by design, for data without one checkable value. A list of keywords does well on the
rubric alone; the similarity to the reference, which counts surplus words against the completion, holds it back.
"""

import re
from collections import Counter
from math import nan

from data.example import Example
from reward.answer import answer_reward, ground_truth
from reward.format import read_answer
from reward.value import WORDS

# Overlap is measured on the head of a text, which bounds the time for every text.
MAX_OVERLAP_CHARS = 20_000

_WORD = re.compile(r"[^\W_]+")
_STOP_WORDS = frozenset(WORDS["stop_words"].split())


def _content_words(text: str) -> list[str]:
    words = _WORD.findall(text[:MAX_OVERLAP_CHARS].lower())
    return [word for word in words if word not in _STOP_WORDS]


def token_f1(text: str, reference: str) -> float:
    """The F1 score of the content words of two texts as bags of words (SQuAD's measure, arXiv 1606.05250, 6.1)."""
    ours, theirs = Counter(_content_words(text)), Counter(_content_words(reference))
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def rubric_coverage(text: str, rubric: tuple[str, ...]) -> float:
    """The mean over rubric items of the share of an item's content words that `text` uses."""
    words = set(_content_words(text))
    items = [item for item in map(set, map(_content_words, rubric)) if item]
    return sum(len(item & words) / len(item) for item in items) / max(len(items), 1)


def rubric_reward(completion: str, example: Example, format: str = "answer") -> float:
    """The mean of rubric coverage and similarity to the reference, or the one that applies; NaN if neither does.

    The answer block is judged, or the whole completion if there is none: rubric data often asks for no tags.
    """
    text = read_answer(completion, format) or completion
    found = []
    if example.rubric:
        found.append(rubric_coverage(text, example.rubric))
    if example.reference:
        found.append(token_f1(text, example.reference))
    return sum(found) / len(found) if found else nan


def correctness_reward(completion: str, example: Example, format: str = "answer") -> float:
    """`answer_reward` with partial credit for words: half the F1 overlap with an answer that is free text.

    Numbers, lists and options get no partial credit: paying for near misses rewards guessing.
    """
    exact = answer_reward(completion, example, format)
    in_words = example.question_type != "multi_choice" and isinstance(ground_truth(example), str)
    if exact == 0 and in_words:
        return token_f1(read_answer(completion, format) or "", example.answer) / 2
    return exact
