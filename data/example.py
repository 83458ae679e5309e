"""One problem with a checkable answer: what every dataset yields and every reward reads.

Nothing here knows about tokens, rewards or training.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.files import StoredImage

# The output formats a prompt can ask for and a reward then expects: (reasoning tag, answer tag).
FORMATS = {"answer": ("reasoning", "answer"), "solution": ("REASONING", "SOLUTION")}


def tag_names(format: str) -> tuple[str, str]:
    """The names of a format's tags; ValueError for an unknown format."""
    if format not in FORMATS:
        raise ValueError(f"output format {format!r} is unknown: choose one of {', '.join(FORMATS)}")
    return FORMATS[format]


@dataclass(frozen=True)
class Example:
    """A question, what it shows, and what a right answer is.

    `images` holds encoded images: each is a path or a place in a temporary file, both read by `read_bytes()`, or the
    bytes of an image that was drawn here. An image is read and decoded when it is needed, so a dataset takes little
    more memory than its text.
    """

    id: str  # unique and stable within its dataset: splits and samples are keyed by it
    question: str  # as the dataset words it, without output-format instructions
    answer: str  # the right answer as text; for multiple choice the text of the right choice
    images: tuple[Path | StoredImage | bytes, ...] = ()
    question_type: str = "free_form"  # "free_form" or "multi_choice"
    answer_type: str = "text"  # "text", "integer", "float" or "list"
    choices: tuple[str, ...] = ()  # options A, B, C, ... of a multiple-choice question
    precision: int | None = None  # decimals a float answer is rounded to
    unit: str | None = None  # unit that the question asks for; the answer leaves it out
    query: str | None = None  # the dataset's own finished prompt, where it has one
    reference: str | None = None  # a worked solution, for supervised training and rubric rewards
    rubric: tuple[str, ...] = ()  # points a good completion makes
    completions: tuple[str, ...] = ()  # given completions: they are the group, and nothing is sampled
    completion_rewards: tuple[float, ...] = ()  # their rewards, where the dataset gives them
    metadata: dict[str, Any] = field(default_factory=dict)  # columns to break results down by
