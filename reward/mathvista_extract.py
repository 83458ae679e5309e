"""Reading the answer out of a model's free text by rules, where MathVista's authors asked GPT-4.

The result is an extraction in MathVista's sense: an option letter, a number or a list, as text, for `reward.mathvista`
to normalise and judge. It is for reporting only. It searches the text for what was probably meant, which a policy
would learn to exploit; rewards read one answer block instead.
"""

import re
from collections.abc import Callable

from data.example import FORMATS, Example

# Both in characters. Only the end of a long text is read, where a conclusion stands; that bounds the time.
MAX_TEXT = 20_000
MAX_CUE_REACH = 300

# Neither the 847 of "A-847" nor the 3 of "3rotations" is a number; the 5 of "5cm" is. The groups are atomic (?>...)
# because backtracking into a long run of digits would take quadratic time.
_DIGITS = r"-?\$?(?>\d{1,3}(?:,\d{3})+|\d+)(?>(?:\.\d+)?)"
_NUMBER = re.compile(rf"(?<![\w.])(?<!\w-){_DIGITS}(?!\w*[A-Za-z]{{3}})|(?<![\w.])-?\.\d+")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_WORD_VALUES = {word: str(value) for value, word in enumerate(_WORDS)}
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)

_ANSWER_CUE = re.compile(
    r"\b(?:answer|option|choice|result)\b[^.\n]{0,80}?(?:\b(?:is|are|would be|will be)\b|:|=)\s*:?|答案\s*[是为：:]?",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(r"\b(?:therefore|thus|hence|so|conclusion|conclude|finally)\b|因此|所以|故", re.IGNORECASE)
_STATES = re.compile(r"(?:\b(?:is|are|was|were|be|equals?|approximately|about|has|have|had)\b|=|≈)[ $]*", re.IGNORECASE)
_BOLD = re.compile(r"\*\*[^*\n\d]*\d[^*\n]*\*\*")
_TOTAL = re.compile(r"\btotal of\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+|(?<=[。！？])")
_NEGATION = re.compile(r"\b(?:not|cannot|never|neither|nor)\b|n['’]t\b", re.IGNORECASE)
_REFUSAL = re.compile(r"\b(?:sorry|unable|cannot|can['’]t|not (?:possible|clear|enough))\b", re.IGNORECASE)


def _inside_brace(text: str) -> str:
    """`text` up to the brace that closes a brace opened just before `text`."""
    depth = 1
    for end, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:end]
    return text


def _passages(response: str) -> list[str]:
    """Where the answer may stand, best place first: the last answer block, the last LaTeX box, the whole text."""
    text = response[-MAX_TEXT:].replace("−", "-")
    found = [text.rpartition(f"<{tag}>")[2].partition("</")[0] for _, tag in FORMATS.values() if f"<{tag}>" in text]
    if "\\boxed{" in text:
        found.append(_inside_brace(text.rpartition("\\boxed{")[2]))
    without_fonts = [re.sub(r"\\(?:text|mathrm|mathbf)\s?\{([^{}]*)\}", r" \1 ", part) for part in [*found, text]]
    without_markup = [re.sub(r"</?\w+>|__|`|\\[()\[\]]", " ", part) for part in without_fonts]
    return [re.sub(r"[ \t]+", " ", part).strip() for part in without_markup]


def _sentences(text: str) -> list[str]:
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def _content_words(text: str) -> set[str]:
    """The words that carry meaning, roughly: four letters or more, without a plural's s."""
    return {word.rstrip("s") for word in re.findall(r"[^\W\d_]{4,}", text.lower())}


def _numbers(text: str) -> list[tuple[int, str]]:
    """(position, value) of each number in `text`, written in digits or as a word."""
    found = [(m.start(), re.sub(r"[,$]", "", m.group())) for m in _NUMBER.finditer(text)]
    found += [(m.start(), _WORD_VALUES[m.group().lower()]) for m in _NUMBER_WORD.finditer(text)]
    return sorted(found)


def _stated_number(sentence: str, known: set[str]) -> str | None:
    """The number that a sentence gives as its result, or None.

    Numbers in `known`, those of the question, may be mere repetition ("3 objects preferred by more than 7 people").
    They count only if the sentence has no others, and then only right behind "is", "=" and the like. The result is the
    last number in bold, else the last right behind such a word, else the first of the others behind "total of", behind
    the last equals sign, behind the first such word, or anywhere.
    """
    if bold := [value for m in _BOLD.finditer(sentence) for _, value in _numbers(m.group())]:
        return bold[-1]
    found = _numbers(sentence)
    new = [(position, value) for position, value in found if value not in known]
    behind_verb = {m.end() for m in _STATES.finditer(sentence)}
    if stated := [value for position, value in new or found if position in behind_verb]:
        return stated[-1]
    if not new:
        return None
    total, verb = _TOTAL.search(sentence), _STATES.search(sentence)
    equals = max(sentence.rfind("="), sentence.rfind("≈")) + 1
    for start in (total.end() if total else 0, equals, verb.end() if verb else 0):
        if start and (behind := [value for position, value in new if position > start]):
            return behind[0]
    return new[0][1]


def _most_telling(text: str, question: str, read: Callable[[str], str | None]) -> str | None:
    """What `read` finds in the sentence that looks most like the answer to `question`, or None if it finds nothing.

    In favour of a sentence: it repeats the question's words, draws a conclusion, has emphasis, stands late in the text.
    """
    asked, sentences = _content_words(question), _sentences(text)
    most, best = 0.0, None
    for number, sentence in enumerate(sentences):
        if (value := read(sentence)) is None:
            continue
        repeated = len(asked & _content_words(sentence)) / max(1, len(asked))
        weight = (
            repeated + 0.5 * bool(_CONCLUSION.search(sentence)) + ("**" in sentence) + 0.5 * number / len(sentences)
        )
        if best is None or weight >= most:
            most, best = weight, value
    return best


def _cued(text: str) -> list[str]:
    """What stands behind each "the answer is", last first."""
    return [text[cue.end() : cue.end() + MAX_CUE_REACH].lstrip(' *"') for cue in _ANSWER_CUE.finditer(text)][::-1]


def _number(text: str, question: str) -> str | None:
    """The number that `text` answers `question` with, or None."""
    known = {value for _, value in _numbers(question)}
    for behind in _cued(text):
        sentence = _SENTENCE_END.split(behind, maxsplit=1)[0]
        if "=" in sentence and (value := _stated_number(sentence, set())):
            return value
        if found := [value for _, value in _numbers(sentence)]:
            return next((value for value in found if value not in known), found[0])
    for ignored in (known, set()):
        if value := _most_telling(text, question, lambda sentence, ignored=ignored: _stated_number(sentence, ignored)):
            return value
    return None


def _option_letter(text: str, choices: tuple[str, ...]) -> str | None:
    """The letter that `text` names its choice by, or None."""
    last = chr(ord("A") + len(choices) - 1)
    letters = f"[A-{last}]"
    for behind in _cued(text):
        # "A cat" is no letter, so a bare letter must not be followed by a word; nor is "A's".
        if m := re.match(rf"(?:option |choice )?\(?({letters})(?:\)|\b(?!['’]))(?! [a-z])", behind):
            return m.group(1)
        if m := re.match(rf"[^.\n]{{0,60}}?\(((?i:{letters}))\)", behind):
            return m.group(1).upper()
    if found := re.findall(rf"\(({letters})\)", text):
        return found[-1]
    if m := re.match(rf"\W{{0,4}}({letters})(?:[.):*]|$)", text):
        return m.group(1)
    found = re.findall(rf"\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s+({letters})\b", text)
    return found[-1] if found else None


def _yes_or_no(text: str, choices: tuple[str, ...]) -> str | None:
    """The letter of yes or no: by the first word of `text`, else by a negation in its first sentence; or None."""
    lowered = [choice.lower() for choice in choices]
    if sorted(lowered) != ["no", "yes"]:
        return None
    if m := re.match(r"\W*(yes|no)\b", text, re.IGNORECASE):
        word = m.group(1).lower()
    elif not text or _REFUSAL.search(text) or re.search(r"\b(?:yes|no)\b", text, re.IGNORECASE):
        return None
    else:
        word = "no" if _NEGATION.search(_sentences(text)[0]) else "yes"
    return "AB"[lowered.index(word)]


def _plain(text: str) -> str:
    """`text` in lower case without LaTeX mark-up and degree signs, so that a choice is found however it is typeset."""
    text = re.sub(r"\\degree|\\circ|°|degrees?|\\,|\\mathrm|[{}$^*\\]", " ", text.lower())
    return re.sub(r"\s+", " ", text).strip()


def _named_choice(sentence: str, choices: tuple[str, ...]) -> str | None:
    """The letter of the choice whose text stands last in `sentence`, the longest of those that end there, or None."""
    sentence, ends = _plain(sentence), []
    for i, choice in enumerate(map(_plain, choices)):
        for m in re.finditer(rf"(?<![\w.]){re.escape(choice)}(?!\w|\.\d)", sentence) if choice else ():
            ends.append((m.end(), len(choice), chr(ord("A") + i)))
    return max(ends)[2] if ends else None


def _choice(text: str, example: Example) -> str | None:
    if text in example.choices:
        return text
    return (
        _option_letter(text, example.choices)
        or _yes_or_no(text, example.choices)
        or _most_telling(text, example.question, lambda sentence: _named_choice(sentence, example.choices))
    )


def _list(text: str, question: str) -> str | None:
    """The last bracketed list of `text`, spaced as Python prints it; else the numbers of its most telling sentence."""
    if found := re.findall(r"\[([^\[\]]*)\]", text):
        return "[" + ", ".join(item.strip() for item in found[-1].split(",")) + "]"

    def numbers(sentence: str) -> str | None:
        values = [value for _, value in _numbers(sentence)]
        return "[" + ", ".join(values) + "]" if len(values) > 1 else None

    return _most_telling(text, question, numbers)


def extract(response: str, example: Example) -> str:
    """The answer that `response` gives to `example`, as an option letter, a choice, a number or a list; "" if none.

    A multiple-choice response that names no option but a number gives that number: the official normalisation then
    takes the choice nearest in spelling, as it does with GPT-4's extractions.
    """
    passages = _passages(response)
    for text in passages:
        if example.question_type == "multi_choice":
            found = _choice(text, example)
        elif example.answer_type == "list":
            found = _list(text, example.question)
        else:
            found = _number(text, example.question)
        if found:
            return found
    if example.question_type == "multi_choice":
        return _number(passages[-1], example.question) or ""
    return ""
