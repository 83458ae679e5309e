"""From a short text to one exact value: a number, a list of numbers, or a normalised string.

Nothing is evaluated and nothing becomes a 64-bit float: values are `fractions.Fraction`. Every word and sign of the
text has to be accounted for, so a second candidate, a hedge, a bound or another unit makes the text unreadable
instead of being skipped over. Texts here are short (`answer.py` bounds them), so no pattern can run for long.
"""

import re
import tomllib
import unicodedata
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

Quantity = tuple[Fraction, frozenset[str]]  # a number and the units written with it, by the names in UNITS

# Python refuses to read integers of over 4,300 digits, and nobody asks for one.
MAX_NUMBER_CHARS = 1000

WORDS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
# The unit of each spelling.
UNITS = {spelling: unit for unit, spellings in WORDS["units"].items() for spelling in spellings.split()}
_NEUTRAL, _SPOILERS, _BOUNDS = (frozenset(WORDS[kind].split()) for kind in ("neutral", "spoilers", "bounds"))

_ZERO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))
_MINUS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63"), "-")
_QUOTES = dict.fromkeys(map(ord, "“”„«»"), '"') | dict.fromkeys(map(ord, "‘’ʼ"), "'")
_PLAIN = _ZERO_WIDTH | _MINUS | _QUOTES

# (pattern, replacement), applied in this order.
_POWERS, _MARKUP = ([(re.compile(old), new) for old, new in WORDS[kind]] for kind in ("powers", "markup"))

_NUMBER = r"""
    (?<![\w.,/+\-^'])
    (?P<sign>[+-]?)
    (?:
        (?:(?P<whole>[0-9]+)[ ]+)?(?P<over>[0-9]+)[ ]?/[ ]?(?P<under>[0-9]+)
      |
        (?P<digits>[1-9][0-9]{0,2}(?P<group>[, '])[0-9]{3}(?:(?P=group)[0-9]{3})*(?!\d)|[0-9]+)?
        (?P<decimals>\.[0-9]*)?
        (?:
            [eE](?P<exponent>[+-]?[0-9]{1,4})(?!\w)
          |
            [ ]?[×x*·][ ]?10(?:\^\{?(?P<power>[+-]?[0-9]{1,4})\}?|(?P<superscript>[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,4}))
        )?
    )
"""
_NUMBER_PATTERN = re.compile(_NUMBER, re.VERBOSE)
_TOKEN = re.compile(
    rf"""
    (?P<word>[^\W\d_]+(?:['/-][^\W\d_]+)*)
  | (?P<unit>°[ ]?[CF](?!\w)|[$€£¥₹¢°%])
  | (?P<punctuation>\s+|,(?=\s)|\.(?!\S)|[:=])
  | (?P<number>{_NUMBER})
    """,
    re.VERBOSE,
)
_VARIABLE = re.compile(r"\s*(?:[A-Za-z]|\\?(?:alpha|beta|gamma|theta|phi))\s*=")
_LEAD = re.compile(
    r"\s*(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:(?:final|correct|right|best)\s+)?"
    r"(?:(?:answer|option|choice|result|solution)\b(?:\s+is\b)?\s*[:=]?\s*(?:(?:option|choice)\s)?\s*)",
    re.IGNORECASE,
)
_ENCLOSED = re.compile(r"""\s*(?:\(([^()]*)\)|"([^"]*)"|'([^']*)')\s*\.?\s*""")
_SUPERSCRIPTS = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")


def _plain_character(char: str) -> str:
    """A full-width or mathematical digit, sign or letter as ASCII, any kind of space as a blank, others unchanged.

    Superscripts, circled digits and vulgar fractions stay as they are: "4²" is not 42.
    """
    if char != "\n" and char.isspace():
        return " "
    if "\uff01" <= char <= "\uff5e" or unicodedata.category(char) == "Nd":
        return unicodedata.normalize("NFKC", char)
    return char


def _plain_text(text: str) -> str:
    text = text.translate(_PLAIN)
    return text if text.isascii() else "".join(map(_plain_character, text))


def strip_markup(text: str) -> str:
    """`text` in plain characters, without the Markdown and LaTeX that only change how it looks.

    An unknown mark-up command stays in the text, and then no reader below accepts the text.
    """
    text = _plain_text(text)
    for pattern, replacement in _MARKUP + _POWERS:
        text = pattern.sub(replacement, text)
    return _unwrap(text)


def _unwrap(text: str) -> str:
    """`text` without brackets or quotation marks around all of it, and without a full stop behind them."""
    for _ in range(3):
        match = _ENCLOSED.fullmatch(text)
        if not match:
            break
        text = next(group for group in match.groups() if group is not None)
    return text.strip()


def strip_lead(text: str) -> str:
    """`text` without a leading "the answer is", "Option", "final answer:"."""
    return _unwrap(_LEAD.sub("", text, count=1)) if _LEAD.match(text) else text


@lru_cache(maxsize=1024)
def normalise(text: str) -> str:
    """`text` for comparing words and formulas: one blank between words, none elsewhere, no mark-up, no final stop."""
    text = re.sub(r"(?<=\w)\s+(?=\w)", " ", strip_markup(text))
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text).rstrip(".")


def _is_value(match: re.Match) -> bool:
    """Whether a match of `_NUMBER` has digits and, in a fraction, a denominator above 0; "3 4/3" is no mixed number."""
    if len(match[0]) > MAX_NUMBER_CHARS:
        return False
    if match["over"] is None:
        return match["digits"] is not None or (match["decimals"] or ".") != "."
    proper = match["over"][0] != "0" and int(match["over"]) < int(match["under"])
    return int(match["under"]) != 0 and (match["whole"] is None or proper)


def _to_fraction(match: re.Match) -> Fraction:
    sign = -1 if match["sign"] == "-" else 1
    if match["over"] is not None:
        return sign * (int(match["whole"] or 0) + Fraction(int(match["over"]), int(match["under"])))
    digits = (match["digits"] or "0").replace(match["group"] or ",", "")
    exponent = match["exponent"] or match["power"] or (match["superscript"] or "0").translate(_SUPERSCRIPTS)
    return sign * Fraction(digits + (match["decimals"] or "").rstrip(".")) * Fraction(10) ** int(exponent)


def _words(text: str) -> list[str]:
    return [token["word"] or token["unit"] for token in _TOKEN.finditer(text) if token["word"] or token["unit"]]


def _unit(word: str) -> str | None:
    return UNITS.get(word if len(word) == 1 else word.lower().replace(" ", ""))  # "h" is hours, "H" is a point


def _stem(word: str) -> str:
    """`word` without the endings that an answer in a sentence changes: apple, apples; earn, earned."""
    word = word.lower().removesuffix("'s")
    return re.sub(r"(?<=...)(?:ing|ed|es|s|e)$", "", word)


def _question_text(question: str) -> str:
    """A question in plain characters with its powers of units in words."""
    text = _plain_text(question).replace("^\\circ", "°").replace("\\circ", "°")
    for pattern, replacement in _POWERS:
        text = pattern.sub(replacement, text)
    return text


@lru_cache(maxsize=1024)
def asked_units(question: str, other: str = "") -> frozenset[str]:
    """The units, by the names in `UNITS`, in which `question` may be answered without changing the number.

    "How many <things>" asks for the things and for no other unit; any other question may be answered in each unit
    it mentions, but in percent only where the asking sentence speaks of percent. Every unit in the text `other` is
    allowed too (the dataset's own `unit`, the ground truth).
    """
    question = _question_text(question)
    asking = [sentence for sentence in re.split(r"(?<=[.?!])\s", question) if "?" in sentence]
    asking = asking[-1] if asking else question
    units = {_unit(word) for word in _words(asking)}
    if "how many" not in asking.lower():
        units |= {_unit(word) for word in _words(question)} - {"percent"}
    if re.search(r"\bangles?\b|∠|\\angle", question, re.IGNORECASE):
        units.add("degree")
    units |= {_unit(word) for word in _words(_question_text(other))}
    return frozenset(units - {None})


@lru_cache(maxsize=1024)
def question_words(question: str) -> frozenset[str]:
    """The stems of a question's words: those that may stand beside the number in its answer."""
    return frozenset(_stem(word) for word in _words(_question_text(question)) if not _unit(word))


def read_quantity(text: str, words: frozenset[str], units: frozenset[str]) -> Quantity | None:
    """The one number in `text` and the units written with it, or None if the text does not name one number.

    `text` went through `strip_markup`. Beside the number it may hold the unit asked for (`units`), words of the
    question (`words`) and a few words like "the answer is"; "x = " may stand before it. None for anything else.
    """
    variable = _VARIABLE.match(text)
    position, end = (variable.end() if variable else 0), len(text)
    number, found, previous = None, set(), ""
    while position < end:
        token = _TOKEN.match(text, position)
        if not token or token.end() == position:
            return None
        word = token["word"] or token["unit"]
        if word is not None:
            if not _is_harmless(word, words, units, gap=position - number.end() if number else None):
                return None
            found |= {_unit(word)} - {None}
            previous = word.lower()
        elif token["punctuation"] is None:
            if number is not None or not _is_value(token) or previous in _BOUNDS:
                return None
            number = token
        position = token.end()
    return (_to_fraction(number), frozenset(found)) if number else None


def _is_harmless(word: str, words: frozenset[str], units: frozenset[str], gap: int | None) -> bool:
    """Whether `word`, `gap` characters behind the number or (None) before it, leaves the number as it is.

    Only a unit may touch the number, and a single letter behind it is a factor: "angle H is 42", but not "42 x".
    """
    unit = _unit(word)
    if unit is not None or gap == 0:
        return unit in units
    if gap is not None and len(word) == 1:
        return False
    return word.lower() not in _SPOILERS and (word.lower() in _NEUTRAL or _stem(word) in words)


def read_list(text: str) -> tuple[Fraction, ...] | None:
    """The numbers of one flat list, "[1, 2.5]", "(1, 2.5)" or "1, 2.5"; None for anything else.

    A comma separates here and never groups digits. Braces are refused, because a set has no order.
    """
    text = strip_lead(strip_markup(text)).removesuffix(".").strip()
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    matches = [_NUMBER_PATTERN.fullmatch(item.strip()) for item in text.split(",")]
    if not all(match and _is_value(match) and match["group"] is None for match in matches):
        return None
    return tuple(map(_to_fraction, matches))


def round_half_up(value: Fraction, precision: int) -> Fraction:
    """`value` at `precision` decimals, halves away from zero: the rounding taught at school, exact."""
    scaled = abs(value) * 10**precision + Fraction(1, 2)
    return (1 if value >= 0 else -1) * Fraction(scaled.numerator // scaled.denominator, 10**precision)
