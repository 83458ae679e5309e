"""GSM8K's two customary accuracies, strict and flexible, after lm-evaluation-harness (gsm8k.yaml).

For reporting only: the flexible one takes the last number anywhere, which a policy could exploit.
"""

import re

from data.example import FORMATS, Example

_MARKER = re.compile(r"#### (-?[0-9.,]+)")
_ANY_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def strict_answer(completion: str, format: str | None = None) -> str | None:
    """The value after the first "#### " or, with a `format` of ours, the text of the first answer block; else None."""
    if format is None:
        match = _MARKER.search(completion)
        return match.group(1) if match else None
    tag = FORMATS[format][1]
    _, opened, rest = completion.partition(f"<{tag}>")
    answer, closed, _ = rest.partition(f"</{tag}>")
    return answer.strip() if opened and closed else None


def flexible_answer(completion: str) -> str | None:
    """The last number in `completion`, or None."""
    found = _ANY_NUMBER.findall(completion)
    return found[-1] if found else None


def _clean(value: str) -> str:
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", value))


def is_correct(value: str | None, example: Example) -> bool:
    """Whether `value` equals the answer as text, after the harness's clean-up of commas, dollars and a final stop."""
    return value is not None and _clean(value) == _clean(example.answer)
