"""The page that an evaluation writes: its figures as bars, and each question with its images, answers and verdicts.

An answer is a record with the fields `example`, `completion`, `correct` and `finished`. The page filters by CSS alone
and has no script.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma3.image import load_image
from grpo.pages.page import image_tag, render, write_page
from reward.report import figures_in

MOST_EXAMPLES = 200
_MOST_RIGHT = 50  # right examples that are shown even if the wrong ones alone would fill the page
_MOST_SAMPLES = 4  # shown for one example
_CHOICES = {
    "all": "all",
    "right": "right",
    "wrong": "wrong",
    "mended": "wrong before, right now",
    "broken": "right before, wrong now",
}

Answered = Mapping[str, Sequence[Sequence[Any]]]  # by model: for each example its answers


def bars(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each figure of each model as a bar, with its 95% interval as a line across its end."""
    of_models = {name: dict(figures_in(of_model)) for name, of_model in figures.items()}
    for path in next(iter(of_models.values())):
        *groups, name = path or ("accuracy",)
        label = ": ".join(filter(None, [" ".join(groups), name])).replace("_", " ")
        for i, (model, found) in enumerate(of_models.items()):
            if (figure := found.get(path)) is not None:
                low, high = figure["interval"]
                yield {
                    "label": "" if i else label,
                    "model": model.replace("_", " "),
                    "n": figure["n"],
                    "width": f"{figure['accuracy']:.1%}",
                    "low": f"{low:.1%}",
                    "span": f"{high - low:.1%}",
                    "interval": f"{100 * low:.1f} to {100 * high:.1f}",
                }


def _is_correct(answers: Sequence[Any]) -> bool:
    """Whether an example counts as right: at least half of its answers are."""
    return 2 * sum(answer.correct for answer in answers) >= len(answers)


def chosen(correct: Sequence[bool], most: int = MOST_EXAMPLES) -> list[int]:
    """Which examples a page shows: the wrong ones first, since they show more, and then some right ones."""
    wrong, right = ([i for i, verdict in enumerate(correct) if verdict == wanted] for wanted in (False, True))
    kept = min(len(right), max(most - len(wrong), most * _MOST_RIGHT // MOST_EXAMPLES))
    return [*wrong[: most - kept], *right[:kept]]


def _card(i: int, answered: Answered) -> dict[str, Any]:
    """One example: what is asked, and what each model says."""
    answers = {name: results[i] for name, results in answered.items()}
    first, *_, last = [_is_correct(of_model) for of_model in (*answers.values(), list(answers.values())[-1])]
    example = next(iter(answers.values()))[0].example
    changed = ["mended" if last else "broken"] if first != last else []
    return {
        "kinds": ["right" if last else "wrong", *changed],
        "example": example,
        "images": [image_tag(load_image(source, None), alt=f"image of {example.id}") for source in example.images],
        "question": example.question + "".join(f"\n({chr(ord('A') + i)}) {c}" for i, c in enumerate(example.choices)),
        "answers": answers,
    }


def write_eval_page(path: Path, title: str, figures: Mapping[str, Mapping[str, Any]], answered: Answered) -> None:
    """Write or replace the page. figures: by model, as in eval.json; answered: the last model decides what is shown."""
    name, last = list(answered.items())[-1] if answered else ("", [])
    correct = [_is_correct(answers) for answers in last]
    shown = chosen(correct)
    summary = (
        f"{len(shown)} of {len(correct)} examples are shown, the wrong ones first: "
        f"{sum(not correct[i] for i in shown)} of {correct.count(False)} wrong and {sum(correct[i] for i in shown)} of "
        f"{correct.count(True)} right, as {name} answers."
    )
    choices = {
        choice: label for choice, label in _CHOICES.items() if len(answered) > 1 or choice not in ("mended", "broken")
    }
    cards, values = [_card(i, answered) for i in shown], {"title": title, "most_samples": _MOST_SAMPLES}
    values |= {"bars": bars(figures), "cards": cards, "summary": summary, "choices": choices}
    write_page(path, render("eval.html", **values))
