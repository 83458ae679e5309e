"""The page that an evaluation writes: its figures as bars, and each question with its pictures, answers and verdicts.

An answer is a record with the `example`, its `completion`, whether it is `correct`, and whether it `finished`. Text
comes from models and datasets, and becomes markup only through `escape`.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gemma3.image import load_image
from grpo.pages.page import page, picture

MOST_EXAMPLES = 200
_MOST_RIGHT = 50  # of these, where there are more wrong ones than fit
_MOST_SAMPLES = 4  # of one example

_STYLE = """
.bars td { vertical-align: middle; } .bars td:last-child { white-space: nowrap; }
.bar { position: relative; width: 12rem; height: 1rem; background: var(--line); border-radius: 3px; }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--accent); border-radius: 3px; }
.bar b { position: absolute; top: 0.42rem; height: 0.16rem; background: var(--text); opacity: 0.75; }
.choose { display: flex; flex-wrap: wrap; gap: 0.4rem 1.2rem; margin: 1rem 0; }
@media (max-width: 40rem) { .bar { width: 4.5rem; } .bars { font-size: 0.8rem; } .bars td { padding: 0.25rem; }
  .bars td:nth-child(3), .bars .dim { display: none; } }
.base i { opacity: 0.45; }
article { display: flex; flex-wrap: wrap; gap: 0.4rem 1.2rem; }
.pictures { flex: 0 1 auto; } .pictures img { min-width: 9rem; max-width: 20rem; margin: 0.3rem 0.3rem 0 0; }
.told { flex: 1 1 20rem; min-width: 0; } .told p { margin: 0.3rem 0; }
.question { font-weight: 600; white-space: pre-wrap; }
"""
_CHOICES = {
    "all": "all",
    "right": "right",
    "wrong": "wrong",
    "mended": "wrong before, right now",
    "broken": "right before, wrong now",
}

Answered = Mapping[str, Sequence[Sequence[Any]]]  # of each model, for each example, its answers


def _bars(figures: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    """Every figure in nested dicts, with the keys that lead to it."""
    if "accuracy" in figures:
        yield path, figures
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from _bars(value, (*path, str(key)))


def _bar(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    return (
        f'<div class="bar"><i style="width:{figure["accuracy"]:.1%}"></i>'
        f'<b style="left:{low:.1%};width:{high - low:.1%}"></b></div>'
    )


def bars(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Each figure of each model as a bar, with its 95% interval as a line across its end."""
    of_models = {name: dict(_bars(of_model)) for name, of_model in figures.items()}
    rows = []
    for path in next(iter(of_models.values())):
        *groups, name = path or ("accuracy",)
        for i, (model, found) in enumerate(of_models.items()):
            if (figure := found.get(path)) is None:
                continue
            low, high = figure["interval"]
            cells = ("" if i else ": ".join(filter(None, [" ".join(groups), name])), model, f"n = {figure['n']}")
            number = f"{figure['accuracy']:.1%} <span class='dim'>({100 * low:.1f} to {100 * high:.1f})</span>"
            texts = "".join(f"<td>{escape(cell.replace('_', ' '))}</td>" for cell in cells)
            rows.append(
                f"<tr{' class=base' if model == 'base' else ''}>{texts}<td>{_bar(figure)}</td><td>{number}</td></tr>"
            )
    return f'<div class="scroll"><table class="bars">{"".join(rows)}</table></div>'


def _is_right(answers: Sequence[Any]) -> bool:
    """Whether an example counts as right: at least half of its answers are."""
    return 2 * sum(answer.correct for answer in answers) >= len(answers)


def chosen(right: Sequence[bool], most: int = MOST_EXAMPLES) -> list[int]:
    """Which examples a page has room for: the wrong ones first, for there is more to see, and some right ones."""
    places = {verdict: [i for i, is_right in enumerate(right) if is_right == verdict] for verdict in (False, True)}
    kept = min(len(places[True]), max(most - len(places[False]), most * _MOST_RIGHT // MOST_EXAMPLES))
    return [*places[False][: most - kept], *places[True][:kept]]


def _answers(name: str, answers: Sequence[Any]) -> str:
    parts = []
    for answer in answers[:_MOST_SAMPLES]:
        verdict = '<b class="good">right</b>' if answer.correct else '<b class="bad">wrong</b>'
        cut = "" if answer.finished else ", cut at the length limit"
        parts.append(f"<p>{escape(name)}: {verdict}{cut}</p><pre>{escape(answer.completion)}</pre>")
    if len(answers) > _MOST_SAMPLES:
        parts.append(f'<p class="dim">and {len(answers) - _MOST_SAMPLES} more samples</p>')
    return "".join(parts)


def _card(place: int, answered: Answered) -> str:
    """One example: what is asked, and what each model says."""
    rights = [_is_right(results[place]) for results in answered.values()]
    kinds = ["card", "right" if rights[-1] else "wrong"]
    if rights[0] != rights[-1]:
        kinds.append("mended" if rights[-1] else "broken")
    answers = {name: results[place] for name, results in answered.items()}
    example = next(iter(answers.values()))[0].example
    pictures = "".join(picture(load_image(source, None), alt=f"picture of {example.id}") for source in example.images)
    choices = "".join(f"\n({chr(ord('A') + i)}) {choice}" for i, choice in enumerate(example.choices))
    return (
        f'<article class="{" ".join(kinds)}">'
        + (f'<div class="pictures">{pictures}</div>' if pictures else "")
        + f'<div class="told"><p class="question">{escape(example.question + choices)}</p>'
        + f'<p>the answer is <b>{escape(example.answer)}</b> <span class="dim">({escape(example.id)})</span></p>'
        + '<div class="grid">'
        + "".join(f"<div>{_answers(name, of_model)}</div>" for name, of_model in answers.items())
        + "</div></div></article>"
    )


def _examples(answered: Answered) -> str:
    last = list(answered.values())[-1]
    right = [_is_right(answers) for answers in last]
    shown = chosen(right)
    name = list(answered)[-1]
    says = (
        f"{len(shown)} of {len(right)} examples are shown, the wrong ones first: "
        f"{sum(not right[i] for i in shown)} of {right.count(False)} wrong and {sum(right[i] for i in shown)} of "
        f"{right.count(True)} right, as {name} answers."
    )
    names = [choice for choice in _CHOICES if len(answered) > 1 or choice not in ("mended", "broken")]
    buttons = "".join(
        f'<label><input type="radio" name="show" id="{choice}"{" checked" if choice == "all" else ""}> '
        f"{_CHOICES[choice]}</label>"
        for choice in names
    )
    cards = "".join(_card(place, answered) for place in shown)
    return f'<h2>Answers</h2><p class="dim">{escape(says)}</p><div class="choose">{buttons}</div>{cards}'


def write_page(path: Path, title: str, figures: Mapping[str, Mapping[str, Any]], answered: Answered) -> None:
    """Write or replace the page. figures: of each model, as eval.json has them; answered: the last model's come last.

    It filters by style alone: there is no script in it.
    """
    hide = "".join(
        f"body:has(#{choice}:checked) article:not(.{choice}) {{ display: none; }}\n" for choice in list(_CHOICES)[1:]
    )
    body = f'<h2>Accuracy</h2><p class="dim">The line is the 95% interval.</p>{bars(figures)}'
    body += _examples(answered) if answered else ""
    path.write_text(page(title, body, style=_STYLE + hide), encoding="utf-8")
