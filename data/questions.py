"""Questions to try a model on: built-in problems of several domains, and files of a user's own.

Rests on data/jsonl.py and data/synthetic.py.
"""

from pathlib import Path
from random import Random

from data import jsonl
from data.example import Example
from data.synthetic import draw, synthetic

_PROBLEMS = (
    Example("arithmetic", "What is 17 * 24?", "408", answer_type="integer"),
    Example(
        "word-problem",
        "A baker makes 12 trays of 8 rolls and sells 79 of them. How many rolls are left?",
        "17",
        answer_type="integer",
    ),
    Example("algebra", "Solve 3x - 7 = 11 for x.", "6", answer_type="integer"),
    Example(
        "geometry",
        "A right triangle has legs of 9 cm and 12 cm. How long is its hypotenuse?",
        "15",
        answer_type="integer",
        unit="cm",
    ),
    Example(
        "probability",
        "Two fair dice are thrown. What is the probability that they show 9 in total, to two decimal places?",
        "0.11",
        answer_type="float",
        precision=2,
    ),
    Example(
        "logic",
        "Anna is older than Ben, and Carl is younger than Ben. Who is the oldest?",
        "Anna",
        question_type="multi_choice",
        choices=("Anna", "Ben", "Carl"),
    ),
)


def built_in(*, nano: bool, pictures: bool) -> list[Example]:
    """About six problems of different kinds.

    nano: held-out ones of the embedded task, the only one that the nano model knows, each of its questions once and
    about large numbers, which its teacher got wrong.
    Otherwise general ones, with `pictures` also one about a picture.
    """
    if nano:
        by_size = sorted(synthetic("test", 48, 0), key=lambda example: example.metadata["a"] * example.metadata["b"])
        largest = {example.metadata["question"]: example for example in by_size}
        return sorted(largest.values(), key=lambda example: (not example.images, example.id))
    dots = Example(
        "counting",
        "How many more red dots than blue dots are in the picture?",
        "2",
        images=(draw(5, 3, Random(0)),),
        answer_type="integer",
    )
    return [*_PROBLEMS, dots] if pictures else list(_PROBLEMS)


def load_questions(path: Path) -> list[Example]:
    """The questions of a file: JSON Lines as data/jsonl.py has them, the answers optional; else text, one a line.

    A question's id is the number of its line where it brings none. ValueError where the file cannot be read, holds no
    question, or has bad rows.
    """
    try:
        if path.suffix == ".jsonl":
            return jsonl.load(path, needs_answers=False)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: it is not UTF-8 at byte {error.start}") from error
    questions = [Example(str(i), line.strip(), "") for i, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise ValueError(f"{path} holds no questions; write one on each line")
    return questions
