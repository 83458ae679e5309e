"""How a completion is written, whatever its answer: reasoning, self-correction, length, variety, the token budget.

Each part counts surface features of English text, so a policy can learn to produce the features alone. They shape
a format early in training; keep their weights below that of the answer. All are 0 to 1 except `overlong_reward`.
"""

import re

from data.example import Example
from reward.format import read_reasoning

# Style is judged on the head of a text: more than any completion needs, and a bound on the time for every text.
MAX_STYLE_CHARS = 20_000

_STEP_WORDS = re.compile(
    r"\b(first|second|third|next|then|finally|step|because|since|so|therefore|thus|hence|given|let)\b", re.IGNORECASE
)
_NOTATION = re.compile(r"[0-9]\s?[-+*/×÷=^]\s?\(?[$]?[0-9]|[=≈<>≤≥√π∠°%]|\\[a-z]+")
_SELF_CORRECTION = re.compile(
    r"\b(wait|actually|on second thought|let me (?:re-?)?(?:check|verify|consider|count|calculate)|double-?check|"
    r"check(?:ing)? (?:this|that|the result|my)|i made (?:a|an) (?:mistake|error)|correction)\b",
    re.IGNORECASE,
)


def _ramp(value: float, full: float) -> float:
    return min(value / full, 1.0)


def reasoning_reward(completion: str, example: Example, format: str = "answer") -> float:
    """The mean of three: 40 words of reasoning or more, three different step words, three places with notation.

    Each of the three grows in proportion up to its mark, and repeating a step word earns nothing. 0 without exactly
    one reasoning block.
    """
    text = read_reasoning(completion, format)[:MAX_STYLE_CHARS]
    step_words = {word.lower() for word in _STEP_WORDS.findall(text)}
    notation = len(_NOTATION.findall(text))
    return (_ramp(len(text.split()), 40) + _ramp(len(step_words), 3) + _ramp(notation, 3)) / 3


def self_correction_reward(completion: str, example: Example, format: str = "answer") -> float:
    """1 if the reasoning checks or corrects itself at least once ("wait", "let me check"), else 0."""
    text = read_reasoning(completion, format)[:MAX_STYLE_CHARS]
    return float(_SELF_CORRECTION.search(text) is not None)


def length_reward(completion: str, example: Example, format: str = "answer") -> float:
    """1 for a completion of 30 to 300 words; in proportion below 30, and falling to 0 from 300 to 600."""
    words = len(completion[:MAX_STYLE_CHARS].split())
    return _ramp(words, 30) if words <= 300 else max(0.0, 2 - words / 300)


def quality_reward(completion: str, example: Example, format: str = "answer") -> float:
    """The share of distinct three-word runs in the reasoning, scaled down below 30 words: low for loops."""
    words = read_reasoning(completion, format)[:MAX_STYLE_CHARS].lower().split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(runs)) / len(runs) * _ramp(len(words), 30) if runs else 0.0


def overlong_reward(num_tokens: int, finished: bool, max_tokens: int, buffer: int | None = None) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), in tokens: 0 down to -1.

    0 up to `max_tokens - buffer` tokens, then falling linearly to -1 at `max_tokens`; -1 for a completion that did not
    finish, because it was cut at the limit. `buffer` defaults to a fifth of `max_tokens`, as in the paper
    (4,096 of 20,480).
    """
    buffer = max_tokens // 5 if buffer is None else buffer
    if not 0 <= buffer <= max_tokens:
        raise ValueError(f"the overlong buffer is {buffer} tokens: it must lie between 0 and max_tokens={max_tokens}")
    if not finished or num_tokens > max_tokens:
        return -1.0
    return min(0.0, (max_tokens - buffer - num_tokens) / buffer) if buffer else 0.0
