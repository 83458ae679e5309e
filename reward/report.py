"""What an evaluation reports: figures of judged completions, as plain dicts, and a table that compares models.

A figure is {"accuracy": mean, "interval": [low, high], "n": examples}, with Wilson's 95% interval. Each example counts
once, with the mean over its samples: samples of one problem are not independent. Rests on rich for the table.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from math import fsum, isnan
from statistics import fmean
from typing import Any, NamedTuple

from rich.table import Table

from data.example import Example
from reward import gsm8k, mathvista
from reward.answer import is_correct, read_value
from reward.format import read_answer
from reward.statistics import maj_at_k, pass_at_k, wilson_interval
from reward.value import normalise

# The table has the columns of MathVista's leaderboard and a little more; language and source stay in the file.
_NOT_SHOWN = {"language", "source"}


class Result(NamedTuple):
    """One completion of one example, judged."""

    example: Example
    completion: str
    correct: bool
    well_formed: bool
    finished: bool  # it ended by itself, not at the length limit
    tokens: int


Results = Sequence[Sequence[Result]]  # for each example one result per sample, equally many for all


def completion_is_correct(completion: str, example: Example, format: str) -> bool:
    """Whether the answer is right, read strictly by the same code that rewards it."""
    return is_correct(read_answer(completion, format), example)


def figure(values: Sequence[float]) -> dict[str, Any]:
    """The figure of one number from 0 to 1 for each example. ValueError if there are none."""
    return _proportion(fsum(values), len(values))


def _proportion(correct: float, n: int) -> dict[str, Any]:
    interval = list(wilson_interval(correct, n))  # refuses n = 0
    return {"accuracy": correct / n, "interval": interval, "n": n}


def summary(results: Results) -> dict[str, Any]:
    """The figure of our own strict judgement, the format rate, the share of cut completions and the mean length."""
    flat = [result for group in results for result in group]
    return figure([fmean([result.correct for result in group]) for group in results]) | {
        "format_rate": fmean([result.well_formed for result in flat]),
        "truncated": fmean([not result.finished for result in flat]),
        "mean_tokens": fmean([result.tokens for result in flat]),
    }


def spoken(name: str, found: Mapping[str, Any]) -> str:
    """A summary in one line."""
    low, high = found["interval"]
    line = f"{name}: {found['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%}, n={found['n']})"
    if "format_rate" in found:
        line += f", well-formed {found['format_rate']:.1%}, cut at the length limit {found['truncated']:.1%}"
    return line


def _vote(result: Result, format: str) -> Hashable | None:
    """What a completion votes for: equal answers, however they are written, are one vote."""
    answer = read_answer(result.completion, format)
    if answer is None:
        return None
    value = read_value(answer, result.example)
    return normalise(answer).casefold() if value is None else value


def over_samples(results: Results, format: str) -> dict[str, dict]:
    """pass@1, pass@2, pass@4, ... up to the number of samples k, estimated without bias from all k, and maj@k."""
    k = len(results[0])
    right = [sum(result.correct for result in group) for group in results]
    found = {f"pass@{2**i}": figure([pass_at_k(k, c, 2**i) for c in right]) for i in range(k.bit_length())}
    votes = [[_vote(result, format) for result in group] for group in results]
    verdicts = [[result.correct for result in group] for group in results]
    return found | {f"maj@{k}": figure([maj_at_k(*pair) for pair in zip(votes, verdicts, strict=True)])}


def by_metadata(results: Results, keys: Sequence[str]) -> dict[str, dict]:
    """For each key of the examples' metadata, a figure for each of its values."""
    found = {}
    for key in keys:
        values: dict[str, list[float]] = {}
        for group in results:
            values.setdefault(group[0].example.metadata[key], []).append(fmean([result.correct for result in group]))
        found[key] = {name: figure(values[name]) for name in sorted(values)}
    return found


def gsm8k_figures(results: Results, format: str | None) -> dict[str, dict]:
    """GSM8K's customary accuracies: strict (in our answer block, or with format=None behind "#### ") and flexible."""
    readers = {
        "strict": lambda result: gsm8k.strict_answer(result.completion, format),
        "flexible": lambda result: gsm8k.flexible_answer(result.completion),
    }
    return {
        name: figure([fmean([gsm8k.is_correct(read(r), r.example) for r in group]) for group in results])
        for name, read in readers.items()
    }


class MathVista(NamedTuple):
    """The official scoring of each example's first completion."""

    examples: list[Example]
    records: list[dict]  # for `reward.mathvista.write_output`
    scores: dict[str, Any]  # for `reward.mathvista.write_scores`
    figures: dict[str, Any]  # the same scores as figures: "all", then for each key its values


def score_mathvista(results: Results, scorer: str) -> MathVista:
    """MathVista's score and breakdown, by the "current" or the "published" scorer; see `reward.mathvista`."""
    examples = [group[0].example for group in results]
    records = [mathvista.score(group[0].completion, group[0].example, scorer=scorer) for group in results]
    scores = mathvista.breakdown(examples, [record["true_false"] for record in records])
    figures = {"all": _proportion(scores["average"]["correct"], scores["average"]["total"])}
    for key in mathvista.SCORE_KEYS:
        figures[key] = {value: _proportion(cell["correct"], cell["total"]) for value, cell in scores[key].items()}
    return MathVista(examples, records, scores, figures)


def _agreement(truth: Sequence[float], values: Sequence[float]) -> float | None:
    """The share of pairs with different `truth` that `values` put in the same order, ties half; None without pairs."""
    pairs = [(a, b) for a, x in enumerate(truth) for b, y in enumerate(truth) if x > y]
    pairs = [(values[a], values[b]) for a, b in pairs if not (isnan(values[a]) or isnan(values[b]))]
    return fmean([(a > b) + 0.5 * (a == b) for a, b in pairs]) if pairs else None


def preference_accuracy(examples: Sequence[Example], values: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """How often `values`, one for each given completion of an example, prefer the completion with the higher reward.

    A pair counts if its rewards differ and neither of its two `values` is NaN; it counts half if they are equal. An
    example with several pairs counts once, with their mean; one without pairs is left out. None if all are left out.
    """
    found = [_agreement(e.completion_rewards, of_row) for e, of_row in zip(examples, values, strict=True)]
    comparable = [agreement for agreement in found if agreement is not None]
    return figure(comparable) if comparable else None


def figures_in(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict]]:
    """Every figure in nested dicts, with the keys that lead to it."""
    if "accuracy" in tree:
        yield path, tree
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from figures_in(value, (*path, str(key)))


def table(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    """The figures of each model, by its name, beside each other: a row for each figure, with its 95% interval."""
    shown = Table("", "", box=None, pad_edge=False, header_style="dim")
    for heading in ("n", *figures):
        shown.add_column(heading, justify="right", no_wrap=True)
    models = [
        {path: found for path, found in figures_in(of_model) if _NOT_SHOWN.isdisjoint(path)}
        for of_model in figures.values()
    ]
    last_group = None
    for path, first in models[0].items():
        *groups, name = path or ("accuracy",)
        group = " ".join(groups).replace("_", " ")
        cells = []
        for of_model in models:
            low, high = of_model[path]["interval"]
            cells.append(f"{of_model[path]['accuracy']:.1%} ({100 * low:.1f} to {100 * high:.1f})")
        shown.add_row("" if group == last_group else group, name.replace("_", " "), str(first["n"]), *cells)
        last_group = group
    return shown
