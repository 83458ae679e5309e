"""The output format: is there one reasoning block and one answer block, and what does the answer block say?

Tags are located by looking at every "<", never with a lazy regular expression: that is one pass over any text, and
repeated or nested tags cannot pair up wrongly.
"""

from data.example import Example, tag_names

# No completion of this size is prose with two blocks; the bound keeps ten megabytes of "<" as cheap as any text.
MAX_ANGLE_BRACKETS = 10_000

Block = tuple[int, int]  # where the text between a pair of tags starts and ends


def _tags(format: str) -> list[str]:
    """The four tags of a format in `data.example.FORMATS`: reasoning opens, closes, answer opens, closes."""
    return [tag for name in tag_names(format) for tag in (f"<{name}>", f"</{name}>")]


def _find_tags(text: str, tags: list[str]) -> list[list[int]]:
    """For each tag all positions where it starts; none in a text with `MAX_ANGLE_BRACKETS` "<" or more."""
    found = [[] for _ in tags]
    position = text.find("<")
    for _ in range(MAX_ANGLE_BRACKETS):
        if position < 0:
            return found
        for tag, starts in zip(tags, found, strict=True):
            if text.startswith(tag, position):
                starts.append(position)
        position = text.find("<", position + 1)
    return [[] for _ in tags]


def _has_text(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` is more than white space, checked in pieces: a copy of all of it may be large."""
    return any(not text[i : min(i + 4096, end)].isspace() for i in range(start, end, 4096))


def _block(text: str, tag: str, opens: list[int], closes: list[int]) -> Block | None:
    """The place of the text between the one `tag` and its one closing tag; None if not one of each, or if empty."""
    if len(opens) != 1 or len(closes) != 1:
        return None
    start, end = opens[0] + len(tag), closes[0]
    return (start, end) if start < end and _has_text(text, start, end) else None


def _blocks(completion: str, format: str) -> tuple[Block | None, Block | None]:
    """The reasoning block and the answer block; an answer block inside the reasoning, closed or not, does not count."""
    tags = _tags(format)
    opens, closes, answer_opens, answer_closes = _find_tags(completion, tags)
    reasoning = _block(completion, tags[0], opens, closes)
    answer = _block(completion, tags[2], answer_opens, answer_closes)
    if answer is None:
        return reasoning, None
    last_open = max((start for start in opens if start < answer[0]), default=-1)
    last_close = max((start for start in closes if start < answer[0]), default=-1)
    return reasoning, None if last_open > last_close else answer


def read_answer(completion: str, format: str = "answer") -> str | None:
    """The text of the answer block without the white space round it, or None.

    None means: no such block, more than one (even with equal texts), an empty one, or one inside the reasoning.
    Text before and after the block does not matter here; it is a matter for `format_reward`.
    """
    _, answer = _blocks(completion, format)
    return completion[slice(*answer)].strip() if answer else None


def read_reasoning(completion: str, format: str = "answer") -> str:
    """The text of the one reasoning block; "" if there is no such block, if it is empty, or if there are several."""
    reasoning, _ = _blocks(completion, format)
    return completion[slice(*reasoning)].strip() if reasoning else ""


def format_reward(completion: str, example: Example, format: str = "answer") -> float:
    """1 for exactly one reasoning block, then exactly one answer block, both non-empty, only white space outside."""
    reasoning, answer = _blocks(completion, format)
    if reasoning is None or answer is None or reasoning[1] > answer[0]:
        return 0.0
    opens, closes, answer_opens, answer_closes = map(len, _tags(format))
    outside = [
        (0, reasoning[0] - opens),
        (reasoning[1] + closes, answer[0] - answer_opens),
        (answer[1] + answer_closes, len(completion)),
    ]
    return 0.0 if any(_has_text(completion, start, end) for start, end in outside) else 1.0


def graded_format_reward(completion: str, example: Example, format: str = "answer") -> float:
    """0, 1 or 2: one point for a well-formed reasoning block and one for a well-formed answer block.

    This is the 1 + 1 of the public vision GRPO recipes. Text outside the blocks costs nothing here; an answer
    block inside the reasoning earns no point, because nothing can be read from it.
    """
    return float(sum(block is not None for block in _blocks(completion, format)))
