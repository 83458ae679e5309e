"""Questions to try a model on: built-in problems of several domains, and files of a user's own."""

from pathlib import Path
from random import Random

from data import jsonl
from data.example import Example
from data.synthetic import draw_dots, synthetic


def built_in(*, nano: bool, images: bool) -> list[Example]:
    """About six problems of different kinds.

    nano: held-out problems of the embedded task, the only task that the nano model knows. Each kind of question comes
    once and about large numbers, which the model's teacher got wrong.
    Otherwise general problems; with `images` also one about an image.
    """
    if nano:
        by_size = sorted(synthetic("test", 48, 0), key=lambda example: example.metadata["a"] * example.metadata["b"])
        largest = {example.metadata["question"]: example for example in by_size}
        return sorted(largest.values(), key=lambda example: (not example.images, example.id))
    dots = Example(
        "counting",
        "How many more red dots than blue dots are in the image?",
        "2",
        images=(draw_dots(5, 3, Random(0)),),
        answer_type="integer",
    )
    problems = jsonl.load(Path(__file__).with_name("built_in.jsonl"))
    return [*problems, dots] if images else problems


def load_questions(path: Path) -> list[Example]:
    """The questions of a file: JSON Lines as in data/jsonl.py with optional answers, or text with one question a line.

    A question without an id gets its line number. ValueError if the file cannot be read, holds no question or has bad
    rows.
    """
    try:
        if path.suffix == ".jsonl":
            return jsonl.load(path, needs_answers=False)
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file: it is not UTF-8 at byte {error.start}") from error
    questions = [Example(str(i), line.strip(), "") for i, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise ValueError(f"{path} holds no questions; write one on each line")
    return questions
