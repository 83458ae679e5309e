"""The page of a run, RUN/report.html: curves, settings, samples to look at, and why the reward is flat.

It is made of what the run directory holds: config.json, metrics.jsonl, samples.jsonl with images/, summary.json.
"""

import bisect
import json
import os
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import exp, inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from grpo.pages import page
from grpo.pages.diagnosis import diagnose, end
from grpo.run.cli import flag_name
from grpo.run.log import parsed, read_json
from grpo.run.settings import Settings

MOST_GROUPS = 40  # that a page shows
MOST_BYTES = 3_000_000  # that they may fill
_MOST_POINTS = 400  # of a curve; more are averaged
# Readable on white and on near black.
_COLOURS = ("#3d8fd9", "#e08a1e", "#2fa36b", "#c75b9b", "#8a74d6", "#a08060")
_GREY = "#87909b"
_STYLES = ("-", "--", ":", "-.")
_TURN_MARKS = re.compile(r"<(?:bos|end_of_turn|start_of_image)>|<start_of_turn>(?:user|model)\n?")


class Run(NamedTuple):
    """What is read from a run directory."""

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]  # the lines of metrics.jsonl, with "finished" added
    summary: dict[str, Any]  # accuracy "before" and "after", where they are known


Card = tuple[str, Markup]  # a title, and a plot


class Panel(NamedTuple):
    """A plot: its title, and the metric of each of its lines."""

    title: str
    lines: Mapping[str, str]  # label to metric
    percent: bool = False
    capped: bool = False  # values far above the rest, of steps that compile, may lie outside the plot


_CURVES = [
    Panel(**panel) for panel in tomllib.loads(Path(__file__).with_name("curves.toml").read_text("utf-8"))["curve"]
]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, or none where there is no file. A last line that is being written is left out."""
    *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    return [parsed(line, f"{path} is damaged: line {number}") for number, line in enumerate(lines, 1)]


def read_run(path: Path) -> Run:
    """The run in a directory; ValueError if it holds no run."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is no run directory, since it holds no config.json; name the --out of a training")
    metrics = _lines(path / "metrics.jsonl")
    for line in metrics:
        if line.get("completions/clipped_ratio") is not None:
            line["finished"] = 1 - line["completions/clipped_ratio"]
    summary = path / "summary.json"
    return Run(path, read_json(path / "config.json"), metrics, read_json(summary) if summary.is_file() else {})


def evaluations(run: Run) -> list[tuple[int, float, tuple[float, float]]]:
    """Held-out accuracies, in the order of their steps: step, accuracy and 95% interval."""
    before, after = run.summary.get("before"), run.summary.get("after")
    steps = run.metrics[-1]["step"] if run.metrics else 0
    found = [(0, before["accuracy"], tuple(before["interval"]))] if before else []
    for line in run.metrics:
        if (accuracy := line.get("eval/accuracy")) is not None:
            found.append((line["step"], accuracy, (line["eval/accuracy_low"], line["eval/accuracy_high"])))
    # A run that is continued for more steps still has the summary of its earlier end.
    if after and steps == run.config["settings"]["steps"]:
        found.append((steps, after["accuracy"], tuple(after["interval"])))
    return found


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric where it is known; if there are many, means over neighbours."""
    points = np.array([(line["step"], line[name]) for line in metrics if line.get(name) is not None], float)
    points = points.reshape(-1, 2)
    width = -(-len(points) // _MOST_POINTS)
    if width > 1:
        points = np.array([points[i : i + width].mean(axis=0) for i in range(0, len(points), width)])
    return points[:, 0], points[:, 1]


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a twentieth of the values, centred; at the ends over fewer."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


class Line(NamedTuple):
    """A line of a plot; or, with `errors` below and above each value, points with error bars."""

    steps: Sequence[float]
    values: np.ndarray
    look: dict[str, Any]
    errors: np.ndarray | None = None


def draw(panel: Panel, lines: Sequence[Line]) -> Card | None:
    """A panel as a card; None where it has no lines. The strong line is a running mean."""
    from matplotlib.ticker import MaxNLocator

    if not lines:
        return None
    figure, axes = page.new_figure(4.4, 2.4)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_GREY, labelsize=9)
    axes.grid(color=_GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    for steps, values, look, errors in lines:
        if errors is not None:
            axes.errorbar(steps, values, errors, marker="o", markersize=4, capsize=3, elinewidth=1.6, **look)
            continue
        smooth = _smooth(values)
        if not np.array_equal(smooth, values):
            axes.plot(steps, values, **look | {"alpha": 0.3, "linewidth": 0.8, "label": None})
        axes.plot(steps, smooth, **{"linewidth": 1.8, "marker": "o" if len(values) == 1 else ""} | look)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%" if panel.percent else f"{value:,.6g}")
    if panel.capped:
        usual = max(np.percentile(line.values, 90) for line in lines)
        if max(line.values.max() for line in lines) > 2 * usual:
            axes.set_ylim(0, 1.2 * usual)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        above = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 4, "columnspacing": 1.2}
        axes.legend(frameon=False, fontsize=9, handlelength=1.5, borderpad=0.0, labelcolor=_GREY, **above)
    return panel.title, page.plot(figure, panel.title)


def curves(panel: Panel, runs: Sequence[Run]) -> Card | None:
    """The plot of a panel's metrics. With several runs each run has its colour and each metric its line style. None if
    all values are absent or 0.
    """
    lines, several = [], len(runs) > 1
    for r, run in enumerate(runs):
        for i, (label, name) in enumerate(panel.lines.items()):
            steps, values = _series(run.metrics, name)
            colour, style = (r, i) if several else (i, 0)
            look = {"color": _COLOURS[colour % len(_COLOURS)], "linestyle": _STYLES[style % len(_STYLES)]}
            if values.any():
                labelled = {line.look["label"] for line in lines}
                lines.append(Line(steps, values, look | {"label": None if label in labelled else label}))
    return draw(panel, lines)


def held_out(runs: Sequence[Run]) -> Card | None:
    """Held-out accuracy with its intervals; for a single run also the accuracy of the samples it trained on."""
    lines = []
    steps, values = _series(runs[0].metrics, "accuracy")
    if len(runs) == 1 and len(values):
        lines.append(Line(steps, values, {"color": _GREY, "linewidth": 1.0, "label": "samples of training"}))
    for r, run in enumerate(runs):
        found = evaluations(run)
        steps, values = [step for step, *_ in found], np.array([accuracy for _, accuracy, _ in found])
        # Rounding may put an end of an interval on the wrong side of the accuracy by 1e-17.
        sides = [(max(accuracy - low, 0.0), max(high - accuracy, 0.0)) for _, accuracy, (low, high) in found]
        look = {"color": _COLOURS[r % len(_COLOURS)], "linestyle": ":", "label": None if r else "held out, greedy"}
        if found:
            lines.append(Line(steps, values, look, np.array(sides).T))
    return draw(Panel("Accuracy, held out with 95% intervals", {}, percent=True), lines)


def all_curves(runs: Sequence[Run]) -> list[Card]:
    """Every plot that the runs have the metrics for."""
    names = dict.fromkeys(name for run in runs for line in run.metrics[-1:] for name in line)
    parts = {name.split("/")[1]: name for name in names if name.startswith("rewards/") and name.endswith("/mean")}
    rewards = Panel("Reward and its parts" if parts else "Reward", {"reward": "reward"} | parts)
    first = [curves(rewards, runs), held_out(runs)]
    if "reward" not in names:  # in GRPO the loss says nothing about progress
        first.append(curves(Panel("Loss", {"loss": "loss"}), runs))
    return [card for card in (*first, *(curves(panel, runs) for panel in _CURVES)) if card is not None]


class Span(NamedTuple):
    """Where a group stands in samples.jsonl."""

    step: int
    plain: bool  # without tokens to tint
    start: int  # bytes
    size: int


def find_spans(path: Path) -> list[Span]:
    """The span of every group, found without parsing, since a long run has many; an empty list if there is no file."""
    spans, start = [], 0
    if path.is_file():
        with open(path, "rb") as file:
            for line in file:
                step = re.match(rb'\{"step": (\d+),', line)
                if step and line.endswith(b"\n"):
                    spans.append(Span(int(step[1]), b'"tokens": [' not in line, start, len(line)))
                start += len(line)
    return spans


def _evenly(items: Sequence, most: int) -> list:
    """At most so many of the items, evenly spaced: always the last one and, if there is room for two, the first."""
    if len(items) <= most:
        return list(items)
    return [items[-1 - i * (len(items) - 1) // max(1, most - 1)] for i in range(most)][::-1]


def choose(spans: Sequence[Span], most: int) -> list[Span]:
    """At most so many groups, evenly over the steps, newest first; of each step those with tokens come first."""
    by_step: dict[int, list[Span]] = {}
    for span in sorted(spans, key=lambda span: (span.step, span.plain, span.start)):
        by_step.setdefault(span.step, []).append(span)
    chosen: list[Span] = []
    for rank in range(max(map(len, by_step.values()), default=0)):
        of_rank = [groups[rank] for groups in by_step.values() if rank < len(groups)]
        chosen += _evenly(of_rank, most - len(chosen)) if len(chosen) < most else []
    return sorted(chosen, key=lambda span: (-span.step, span.plain, span.start))


def read_groups(run: Path) -> list[dict[str, Any]]:
    """The groups that a page shows: as many as fit, with their images, into about MOST_BYTES."""
    path = run / "samples.jsonl"
    spans = find_spans(path)
    if not spans:
        return []

    def read(spans: Sequence[Span]) -> list[dict[str, Any]]:
        with open(path, "rb") as file:
            return [json.loads(os.pread(file.fileno(), span.size, span.start)) for span in spans]

    chosen = choose(spans, MOST_GROUPS)
    groups = read(chosen)
    images = [run / name for group in groups for name in group.get("images", ())]
    # On the page a token and its tag take about as much room as its numbers in the file; an image takes a third more.
    size = sum(span.size for span in chosen) + sum(file.stat().st_size * 4 // 3 for file in images if file.is_file())
    fitting = max(1, len(chosen) * MOST_BYTES // size)
    return groups if fitting >= len(chosen) else read(choose(spans, fitting))


def _token(text: str, logp: float, ratio: float | None, clipped: bool) -> dict[str, str]:
    """A token with its tints as classes: p3 marks an improbable token, u2 and d2 a ratio far above and below 1."""
    probability = exp(logp)
    ratio = inf if ratio is None else ratio  # JSON has no infinity
    tints = []
    if surprise := 3 - bisect.bisect_right((0.05, 0.3, 0.8), probability):
        tints.append(f"p{surprise}")
    if change := bisect.bisect_right((0.02, 0.1), abs(ratio - 1)):
        tints.append(f"{'u' if ratio > 1 else 'd'}{change}")
    tints += ["clip"] if clipped else []
    return {"text": text, "tint": " ".join(tints), "title": f"{probability:.1%}, ratio {ratio:.3f}"}


def _completion(completion: Mapping[str, Any]) -> dict[str, Any]:
    advantage, tokens = completion["advantage"] or 0.0, [{"text": completion["text"]}]
    if "tokens" in completion:
        columns = (completion[name] for name in ("tokens", "logps", "ratios", "clipped"))
        tokens = [_token(*token) for token in zip(*columns, strict=True)]
    size = bisect.bisect_right((0.05, 0.8), abs(advantage))
    parts = [f"{name} {value:.3g}" for name, value in completion["rewards"].items() if value is not None]
    return completion | {
        "advantage": advantage,
        "tint": f"{'up' if advantage > 0 else 'down'}{size}" if size else "",
        "parts": parts + ([] if completion["finished"] else ["cut at the length limit"]),
        "tokens": tokens,
    }


def shown_groups(run: Path) -> list[dict[str, Any]]:
    """The groups to look at, as the page shows them."""
    groups = read_groups(run)
    # Where rewards differ there is something to see.
    differ = [i for i, group in enumerate(groups) if len({c["reward"] for c in group["completions"]}) > 1]
    opened = (differ or range(len(groups)))[:2]
    return [
        group
        | {
            "opened": i in opened,
            "asked": _TURN_MARKS.sub("", group["prompt"]).strip(),
            "images": [(name, run / name if (run / name).is_file() else None) for name in group.get("images", ())],
            "completions": list(map(_completion, group["completions"])),
        }
        for i, group in enumerate(groups)
    ]


def _shown(value: Any) -> str:
    """A setting as a user would type it."""
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def chosen_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given on the command line or differ from their defaults."""
    settings, defaults = config["settings"], {entry.name: entry.default for entry in fields(Settings)}
    words = {word.split("=")[0] for word in config["command"].split()}

    def is_chosen(name: str) -> bool:
        default = defaults.get(name)
        # A default of None stands for one that depends on the model, the data or the machine.
        return flag_name(name) in words or (default is not None and _shown(default) != _shown(settings[name]))

    return {name: value for name, value in settings.items() if is_chosen(name)}


def command(config: Mapping[str, Any]) -> str:
    """The command that reproduces a run: its own or, if the run was continued, one with the flags it began with."""
    if "--resume" not in config["command"]:
        return config["command"]
    words = ["python", "train.py"]
    for name, value in chosen_settings(config).items():
        if isinstance(value, bool):
            words.append(flag_name(name) if value else flag_name(f"no_{name}"))
        elif name not in ("resume", "resume_step"):
            words += [flag_name(name), _shown(value)]
    return shlex.join(words)


def _percent(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    low, high = found["interval"]
    return f"{found['accuracy']:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def _minutes(run: Run) -> str:
    seconds = sum(line.get("step_time") or 0.0 for line in run.metrics)
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"


def tiles(run: Run) -> list[tuple[str, str]]:
    """The few numbers that a reader wants first, each with its label."""
    steps = run.metrics[-1]["step"] if run.metrics else 0
    found = [(f"{steps} of {run.config['settings']['steps']}", f"steps, {_minutes(run)}")]
    if held := evaluations(run):
        found.append((" → ".join(dict.fromkeys(f"{held[i][1]:.1%}" for i in (0, -1))), "right, held out"))
    rewards = [line["reward"] for line in run.metrics if line.get("reward") is not None]
    return [*found, (f"{rewards[0]:.2f} → {rewards[-1]:.2f}", "reward")] if rewards else found


def write(path: Path, out: Path | None = None) -> Path:
    """Write RUN/report.html, or `out`, from what the run has logged so far. The page is replaced in one step.

    ValueError where `path` is no run directory or one of its files is damaged.
    """
    run, out = read_run(path), out or path / "report.html"
    config, settings = run.config, run.config["settings"]
    helps = {entry.name: entry.metadata["help"] for entry in fields(Settings)}
    rows = {name: (flag_name(name), _shown(value), helps.get(name, "")) for name, value in settings.items()}
    chosen = chosen_settings(config)
    document = page.render(
        "report.html",
        title=run.path.resolve().name,
        settings=settings,
        tiles=tiles(run),
        curves=all_curves([run]),
        groups=shown_groups(run.path),
        command=command(config),
        config=config,
        chosen=[rows[name] for name in chosen],
        others=[row for name, row in rows.items() if name not in chosen],
        has_reward=end(run.metrics, "reward") is not None,
        findings=sorted(diagnose(run.metrics), key=lambda finding: finding.fine),
    )
    page.write_page(out, document)
    return out


def compare(paths: Sequence[Path], out: Path) -> Path:
    """Write a page that lays several runs side by side: accuracies, all curves, the settings that differ."""
    runs = [read_run(path) for path in paths]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    results = []
    for name, run in zip(names, runs, strict=True):
        (steps, _), *_ = tiles(run)
        reward = end(run.metrics, "reward")
        accuracies = [_percent(run.summary.get(when)) for when in ("before", "after")]
        results.append((name, steps, _minutes(run), "" if reward is None else f"{reward:.3f}", *accuracies))
    flags = dict.fromkeys(name for run in runs for name in run.config["settings"] if name not in ("out", "resume"))
    rows = [(flag_name(name), *(_shown(run.config["settings"].get(name)) for run in runs)) for name in flags]
    values = {"title": f"{len(runs)} runs compared", "names": names, "results": results, "curves": all_curves(runs)}
    keys = [(name, _COLOURS[i % len(_COLOURS)]) for i, name in enumerate(names)]
    different = [row for row in rows if len(set(row[1:])) > 1]
    page.write_page(out, page.render("compare.html", keys=keys, different=different, **values))
    return out


def write_pages(paths: Sequence[Path], out: Path | None) -> Path:
    """Write a run's page again, or one that compares several, to `out`, else to RUN/report.html or compare.html."""
    return write(paths[0], out) if len(paths) == 1 else compare(paths, out or Path("compare.html"))
