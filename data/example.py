"""One problem with a checkable answer: what every dataset yields and every reward reads.

Nothing here knows about tokens, rewards or training.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The output formats a prompt can ask for and a reward then expects: (reasoning tag, answer tag).
FORMATS = {"answer": ("reasoning", "answer"), "solution": ("REASONING", "SOLUTION")}


@dataclass(frozen=True)
class Example:
    """A question, what it shows, and what a right answer is.

    `images` holds pictures as they were found, a path or the encoded bytes of a file, and nothing is decoded
    until the picture is needed: a dataset is then as small in memory as its text.
    """

    id: str  # unique and stable within its dataset: splits and samples are keyed by it
    question: str  # as the dataset words it, without output-format instructions
    answer: str  # the right answer as text; for multiple choice the text of the right choice
    images: tuple[Path | bytes, ...] = ()
    question_type: str = "free_form"  # "free_form" or "multi_choice"
    answer_type: str = "text"  # "text", "integer", "float" or "list"
    choices: tuple[str, ...] = ()  # options A, B, C, ... of a multiple-choice question
    precision: int | None = None  # decimals a float answer is rounded to
    unit: str | None = None  # unit asked for, without which the number is meant
    query: str | None = None  # the dataset's own finished prompt, where it has one
    reference: str | None = None  # a worked solution, for supervised training and rubric rewards
    rubric: tuple[str, ...] = ()  # points a good completion makes
    completions: tuple[str, ...] = ()  # given completions: the group is these and nothing is sampled
    completion_rewards: tuple[float, ...] = ()  # their rewards, where the dataset gives them
    metadata: dict[str, Any] = field(default_factory=dict)  # columns to break results down by
