"""The page of a run, RUN/report.html: curves, settings, samples to look at, and why the reward is flat.

    python -m grpo.pages.report RUN              # rebuild it
    python -m grpo.pages.report RUN RUN --out compare.html

It is made of what the run directory holds: config.json, metrics.jsonl, samples.jsonl with pictures/, summary.json.
"""

import argparse
import bisect
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from html import escape
from math import exp, inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo.pages import page
from grpo.pages.diagnosis import Finding, diagnose, end
from grpo.run.cli import clean_errors
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
    """What is read of a run directory."""

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]  # a line of metrics.jsonl each, and what follows from it
    summary: dict[str, Any]  # accuracy "before" and "after", where they are known


class Panel(NamedTuple):
    """A plot: its title, and the metric of each of its lines."""

    title: str
    lines: Mapping[str, str]  # label to metric
    percent: bool = False
    capped: bool = False  # what is far above the rest, the steps that compile, may leave the plot


_CURVES = (
    Panel("Entropy, nats a token", {"entropy": "entropy"}),
    Panel("KL to the base model, nats a token", {"KL": "kl"}),
    Panel(
        "Clipped tokens",
        {"below": "clip_ratio/low_mean", "above": "clip_ratio/high_mean", "weight at its bound": "cispo_clip_ratio"},
        percent=True,
    ),
    Panel("Groups whose rewards are all equal", {"share": "frac_reward_zero_std"}, percent=True),
    Panel(
        "Length of completions, tokens",
        {"mean": "completions/mean_length", "longest": "completions/max_length", "shortest": "completions/min_length"},
    ),
    Panel("Completions that finished", {"share": "finished"}, percent=True),
    Panel("Gradient norm", {"norm": "grad_norm"}),
    Panel("Norm of what is trained", {"adapter": "lora_norm", "weights": "weight_norm"}),
    Panel(
        "Sampler/trainer gap, nats a token",
        {"mean": "sampling/sampling_logp_difference/mean", "largest": "sampling/sampling_logp_difference/max"},
    ),
    Panel("Learning rate", {"rate": "learning_rate"}),
    Panel("Tokens per second", {"tokens": "tokens_per_second"}),
    Panel(
        "Seconds of a step",
        {"rollout": "time/rollout", "reward": "time/reward", "update": "time/update", "all": "step_time"},
        capped=True,
    ),
    Panel("Memory at its peak, GiB", {"memory": "memory/peak_gib"}),
)

_STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
_SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, or none where there is no file. A last line that is being written is left out."""
    records = []
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if not line.endswith(b"\n"):
                break
            raise ValueError(f"{path} is damaged: line {number} is not JSON ({error})") from error
    return records


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error})") from error


def read_run(path: Path) -> Run:
    """A run as its directory tells it; ValueError where it is none."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is no run directory, since it holds no config.json; name the --out of a training")
    metrics = _lines(path / "metrics.jsonl")
    for line in metrics:
        if line.get("completions/clipped_ratio") is not None:
            line["finished"] = 1 - line["completions/clipped_ratio"]
    summary = path / "summary.json"
    return Run(path, _json(path / "config.json"), metrics, _json(summary) if summary.is_file() else {})


def evaluations(run: Run) -> list[tuple[int, float, tuple[float, float]]]:
    """Held-out accuracies, in the order of their steps: step, accuracy and 95% interval."""
    before, after = run.summary.get("before"), run.summary.get("after")
    steps = run.metrics[-1]["step"] if run.metrics else 0
    found = [(0, before["accuracy"], tuple(before["interval"]))] if before else []
    for line in run.metrics:
        if (accuracy := line.get("eval/accuracy")) is not None:
            found.append((line["step"], accuracy, (line["eval/accuracy_low"], line["eval/accuracy_high"])))
    # A run that was continued for more steps still has the summary of fewer.
    if after and steps == run.config["settings"]["steps"]:
        found.append((steps, after["accuracy"], tuple(after["interval"])))
    return found


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric where it is known; of many, means over neighbours."""
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


def _axes():
    """An empty plot, without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.4))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_GREY, labelsize=9)
    axes.grid(color=_GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _finish(figure, axes, panel: Panel, heights: Sequence[np.ndarray]) -> str:
    """Ticks, limits and legend of a panel that was drawn, and its card."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%" if panel.percent else f"{value:,.6g}")
    if panel.capped:
        usual = max(np.percentile(values, 90) for values in heights)
        if max(values.max() for values in heights) > 2 * usual:
            axes.set_ylim(0, 1.2 * usual)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        above = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 4, "columnspacing": 1.2}
        axes.legend(frameon=False, fontsize=9, handlelength=1.5, borderpad=0.0, labelcolor=_GREY, **above)
    return f'<div class="card plot"><h3>{escape(panel.title)}</h3>{page.plot(figure, panel.title)}</div>'


def curves(panel: Panel, runs: Sequence[Run]) -> str:
    """A panel as a card; of several runs each has its colour, and each metric its style. Nothing if all is absent or 0.

    The strong line is a running mean.
    """
    figure, axes = _axes()
    heights, labelled, several = [], set(), len(runs) > 1
    for r, run in enumerate(runs):
        for i, (label, name) in enumerate(panel.lines.items()):
            steps, values = _series(run.metrics, name)
            if not values.any():
                continue
            look = {
                "color": _COLOURS[(r if several else i) % len(_COLOURS)],
                "linestyle": _STYLES[(i if several else 0) % len(_STYLES)],
                "marker": "o" if len(values) == 1 else "",
            }
            smooth = _smooth(values)
            if not np.array_equal(smooth, values):
                axes.plot(steps, values, **look | {"alpha": 0.3, "linewidth": 0.8})
            axes.plot(steps, smooth, **look, linewidth=1.8, label=None if label in labelled else label)
            labelled.add(label)
            heights.append(values)
    return _finish(figure, axes, panel, heights) if heights else ""


def held_out(runs: Sequence[Run]) -> str:
    """Held-out accuracy with its intervals as a card; of a single run, that of the samples it trained on behind it."""
    figure, axes = _axes()
    panel, heights = Panel("Accuracy, held out with 95% intervals", {}, percent=True), []
    if len(runs) == 1 and len(samples := _series(runs[0].metrics, "accuracy")[1]):
        steps = _series(runs[0].metrics, "accuracy")[0]
        axes.plot(steps, _smooth(samples), color=_GREY, linewidth=1.0, label="samples of training")
        heights.append(samples)
    for r, run in enumerate(runs):
        found = evaluations(run)
        if not found:
            continue
        steps, values = [step for step, *_ in found], np.array([accuracy for _, accuracy, _ in found])
        sides = [(accuracy - low, high - accuracy) for _, accuracy, (low, high) in found]
        look = {
            "color": _COLOURS[r % len(_COLOURS)],
            "marker": "o",
            "markersize": 4,
            "capsize": 3,
            "elinewidth": 1.6,
            "linestyle": ":",
        }
        # Rounding may put an end of an interval on the wrong side of the accuracy by 1e-17.
        errors = np.maximum(np.array(sides).T, 0.0)
        axes.errorbar(steps, values, yerr=errors, **look, label="held out, greedy" if r == 0 else None)
        heights.append(values)
    return _finish(figure, axes, panel, heights) if heights else ""


def all_curves(runs: Sequence[Run]) -> str:
    """Every plot that the runs have the metrics for."""
    names = dict.fromkeys(name for run in runs for line in run.metrics[-1:] for name in line)
    parts = {name.split("/")[1]: name for name in names if name.startswith("rewards/") and name.endswith("/mean")}
    first = [
        curves(Panel("Reward and its parts" if parts else "Reward", {"reward": "reward"} | parts), runs),
        held_out(runs),
    ]
    if "reward" not in names:  # in GRPO the loss says nothing about progress
        first.append(curves(Panel("Loss", {"loss": "loss"}), runs))
    cards = [*first, *(curves(panel, runs) for panel in _CURVES)]
    return f'<div class="grid">{"".join(cards)}</div>' if any(cards) else '<p class="dim">No step is done yet.</p>'


class Place(NamedTuple):
    """Where a group stands in samples.jsonl."""

    step: int
    plain: bool  # without tokens to tint
    start: int  # bytes
    size: int


def index_samples(path: Path) -> list[Place]:
    """The place of every group, found without parsing them: a long run has many. None where there is no file."""
    places, start = [], 0
    if path.is_file():
        with open(path, "rb") as file:
            for line in file:
                step = re.match(rb'\{"step": (\d+),', line)
                if step and line.endswith(b"\n"):
                    places.append(Place(int(step[1]), b'"tokens": [' not in line, start, len(line)))
                start += len(line)
    return places


def _evenly(items: Sequence, most: int) -> list:
    """At most so many of the items, evenly spaced, the last always among them, and then the first."""
    if len(items) <= most:
        return list(items)
    return [items[-1 - i * (len(items) - 1) // max(1, most - 1)] for i in range(most)][::-1]


def choose(places: Sequence[Place], most: int) -> list[Place]:
    """At most so many groups, evenly over the steps and newest first: a step's first with tokens, then its others."""
    by_step: dict[int, list[Place]] = {}
    for place in sorted(places, key=lambda place: (place.step, place.plain, place.start)):
        by_step.setdefault(place.step, []).append(place)
    chosen: list[Place] = []
    for rank in range(max(map(len, by_step.values()), default=0)):
        of_rank = [groups[rank] for groups in by_step.values() if rank < len(groups)]
        chosen += _evenly(of_rank, most - len(chosen)) if len(chosen) < most else []
    return sorted(chosen, key=lambda place: (-place.step, place.plain, place.start))


def read_groups(run: Path) -> list[dict[str, Any]]:
    """The groups that a page shows: so many that they and their pictures fill about MOST_BYTES at most."""
    path = run / "samples.jsonl"
    places = index_samples(path)
    if not places:
        return []

    def read(places: Sequence[Place]) -> list[dict[str, Any]]:
        groups = []
        with open(path, "rb") as file:
            for place in places:
                file.seek(place.start)
                groups.append(json.loads(file.read(place.size)))
        return groups

    chosen = choose(places, MOST_GROUPS)
    groups = read(chosen)
    pictures = [run / name for group in groups for name in group.get("pictures", ())]
    # A token in a tag of its own takes about as much room as its numbers do in the file, a picture a third more.
    size = sum(place.size for place in chosen) + sum(
        file.stat().st_size * 4 // 3 for file in pictures if file.is_file()
    )
    fitting = max(1, len(chosen) * MOST_BYTES // size)
    return groups if fitting >= len(chosen) else read(choose(places, fitting))


def _bucket(value: float, bounds: Sequence[float]) -> int:
    """How many of the rising bounds a value reaches."""
    return bisect.bisect_right(bounds, value)


def _token(text: str, logp: float, ratio: float | None, clipped: bool) -> str:
    """A token with its tints as classes: p3 is improbable, u2 and d2 a ratio far above and below 1."""
    probability = exp(logp)
    ratio = inf if ratio is None else ratio  # JSON has no infinity
    classes = []
    if surprise := 3 - _bucket(probability, (0.05, 0.3, 0.8)):
        classes.append(f"p{surprise}")
    if change := _bucket(abs(ratio - 1), (0.02, 0.1)):
        classes.append(f"{'u' if ratio > 1 else 'd'}{change}")
    if clipped:
        classes.append("clip")
    return f'<i class="{" ".join(classes)}" title="{probability:.1%}, ratio {ratio:.3f}">{escape(text)}</i>'


def _completion(completion: Mapping[str, Any]) -> str:
    reward, advantage = completion["reward"], completion["advantage"] or 0.0
    if "tokens" in completion:
        columns = (completion[name] for name in ("tokens", "logps", "ratios", "clipped"))
        text = "".join(_token(*token) for token in zip(*columns, strict=True))
    else:
        text = f"<i>{escape(completion['text'])}</i>"
    size = _bucket(abs(advantage), (0.05, 0.8))
    tint = f"{'up' if advantage > 0 else 'down'}{size}" if size else ""
    right = completion["correct"]
    parts = [f"{name} {value:.3g}" for name, value in completion["rewards"].items() if value is not None]
    parts += [] if completion["finished"] else ["cut at the length limit"]
    verdict = '<b class="good">✓ right</b>' if right else '<b class="bad">✗ wrong</b>'
    return (
        f'<article class="completion {"right" if right else "wrong"} {tint}" '
        f'data-reward="{"" if reward is None else reward}">{verdict} · reward '
        f"<b>{'none' if reward is None else f'{reward:.3g}'}</b>"
        f'<div class="dim">advantage <b>{advantage:+.2f}</b> · {escape(" · ".join(parts))}</div>'
        f"<pre>{text}</pre></article>"
    )


def _pictures(run: Path, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if (run / name).is_file():
            yield page.picture((run / name).read_bytes(), alt="a picture of the question")
        else:
            yield f'<span class="dim">{escape(name)} is gone</span>'


def _group(run: Path, group: Mapping[str, Any], opened: bool) -> str:
    asked = _TURN_MARKS.sub("", group["prompt"]).strip()
    marks = "".join(
        f'<span class="{"good" if c["correct"] else "bad"}">{"✓" if c["correct"] else "✗"}</span>'
        for c in group["completions"]
    )
    last_paragraph = asked.split("\n\n")[-1]
    answer = "" if group["answer"] is None else f"<p>right answer: <b>{escape(str(group['answer']))}</b></p>"
    return (
        f'<details class="group card" data-step="{group["step"]}"{" open" if opened else ""}><summary>'
        f'<b>step {group["step"]}</b><span class="marks">{marks}</span>'
        f'<span class="asked dim">{escape(last_paragraph[:200])}</span></summary>'
        f'<div class="question">{"".join(_pictures(run, group.get("pictures", ())))}<div><pre>{escape(asked)}</pre>'
        f'{answer}</div></div><div class="side">{"".join(map(_completion, group["completions"]))}</div></details>'
    )


_FILTER = """<form id="filter" class="card" hidden>
<label>step <input name="first" type="number" min="1" placeholder="first"></label>
<label>to <input name="last" type="number" min="1" placeholder="last"></label>
<label>reward <input name="least" type="number" step="any" placeholder="least"></label>
<label>to <input name="most" type="number" step="any" placeholder="most"></label>
<label>answers <select name="verdict"><option value="">all</option><option value="right">right</option>
<option value="wrong">wrong</option></select></label>
<label>tint tokens by <select name="tint"><option value="p">probability</option><option value="r">ratio</option>
<option value="a">advantage</option><option value="">nothing</option></select></label>
<button name="unfold" type="button">unfold or fold</button> <output id="count" class="dim"></output></form>
<p class="dim"><span class="legend of-p">A token's probability when it was drawn: <i>over 80%</i>
<i class="p1">over 30%</i> <i class="p2">over 5%</i> <i class="p3">less</i>.</span>
<span class="legend of-r">Ratio of the policy in the last update to the one that drew the token:
<i class="d2">10% less</i> <i class="d1">2% less</i> <i>1</i> <i class="u1">2% more</i> <i class="u2">10% more</i>;
samples that are used once have ratio 1.</span>
<span class="legend of-a">Advantage: <span class="up2"><i>made likelier</i></span>
<span class="down2"><i>made less likely</i></span>.</span> The clip left <i class="clip">underlined</i> tokens without a
gradient.</p>"""


def samples(run: Path) -> str:
    """The groups to look at, as a section with its filter; nothing where the run drew none."""
    groups = read_groups(run)
    if not groups:
        return ""
    # Where rewards differ there is something to see.
    differ = [i for i, group in enumerate(groups) if len({c["reward"] for c in group["completions"]}) > 1]
    opened = (differ or range(len(groups)))[:2]
    cards = "".join(_group(run, group, opened=i in opened) for i, group in enumerate(groups))
    return (
        '<h2 id="samples-title">Samples to look at</h2><p>A line is a question with its group of completions: some '
        "of the whole run, the newest first. Point at a token for its numbers.</p>"
        f'<section id="samples" data-tint="p">{_FILTER}{cards}</section>'
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    """A setting as one would type it."""
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
        return _flag(name) in words or (default is not None and _shown(default) != _shown(settings[name]))

    return {name: value for name, value in settings.items() if is_chosen(name)}


def command(config: Mapping[str, Any]) -> str:
    """What reproduces a run: its command, or for one that was continued, the flags that it began with."""
    if "--resume" not in config["command"]:
        return config["command"]
    words = ["python", "train.py"]
    for name, value in chosen_settings(config).items():
        if isinstance(value, bool):
            words.append(_flag(name) if value else _flag(f"no_{name}"))
        elif name not in ("resume", "resume_step"):
            words += [_flag(name), _shown(value)]
    return shlex.join(words)


def configuration(config: Mapping[str, Any]) -> str:
    """The settings and what reproduces them, as a section."""
    helps = {entry.name: entry.metadata["help"] for entry in fields(Settings)}
    chosen = chosen_settings(config)

    def rows(names):
        return [(_flag(name), _shown(config["settings"][name]), helps.get(name, "")) for name in names]

    others = [name for name in config["settings"] if name not in chosen]
    packages = ", ".join(f"{name} {version}" for name, version in config["packages"].items())
    commit = f"commit {config['git']}, " if config["git"] else ""
    head = ("flag", "value", "what it is")
    return (
        f'<h2 id="settings">Settings</h2><pre>{escape(command(config))}</pre>'
        f'<p class="dim">{escape(commit)}{escape(config["devices"])}, {escape(packages)}</p>'
        f"{page.table(head, rows(chosen)) if chosen else ''}"
        f"<details><summary>{len(others)} settings as they are by default</summary>{page.table(head, rows(others))}"
        "</details>"
    )


def _finding(finding: Finding) -> str:
    verdict = '<span class="good">fine</span>' if finding.fine else '<b class="bad">look here</b>'
    return (
        f'<div class="finding">{verdict}<div>{escape(finding.name)}: <b>{escape(finding.number)}</b></div>'
        f'<p class="dim">{escape(finding.advice)}</p></div>'
    )


def diagnosis(metrics: Sequence[Mapping[str, Any]]) -> str:
    """What the log says about the run, as a section: what deserves a look first."""
    findings = sorted(diagnose(metrics), key=lambda finding: finding.fine)
    title = "Why is my reward flat?" if end(metrics, "reward") is not None else "Is anything wrong?"
    return f'<h2 id="diagnosis">{title}</h2>{"".join(map(_finding, findings))}'


def _percent(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    low, high = found["interval"]
    return f"{found['accuracy']:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def _minutes(run: Run) -> str:
    seconds = sum(line.get("step_time") or 0.0 for line in run.metrics)
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"


def tiles(run: Run) -> str:
    """The few numbers that one asks for first."""
    steps = run.metrics[-1]["step"] if run.metrics else 0
    found = [(f"{steps} of {run.config['settings']['steps']}", f"steps, {_minutes(run)}")]
    held = evaluations(run)
    if held:
        found.append((" → ".join(dict.fromkeys(f"{held[i][1]:.1%}" for i in (0, -1))), "right, held out"))
    rewards = [line["reward"] for line in run.metrics if line.get("reward") is not None]
    if rewards:
        found.append((f"{rewards[0]:.2f} → {rewards[-1]:.2f}", "reward"))
    cells = "".join(f'<div><b>{escape(number)}</b><span class="dim">{what}</span></div>' for number, what in found)
    return f'<div class="tiles">{cells}</div>'


def document(run: Run) -> str:
    """The page of one run."""
    settings, shown = run.config["settings"], samples(run.path)
    about = f"{settings['objective']} of {settings['model']} on {settings['data']}"
    return page.page(
        run.path.resolve().name,
        f'<p>{escape(about)}</p>{tiles(run)}<nav><a href="#curves">Curves</a> '
        f'{"<a href=#samples-title>Samples</a> " if shown else ""}<a href="#settings">Settings</a> '
        f'<a href="#diagnosis">Diagnosis</a></nav><h2 id="curves">Curves</h2>{all_curves([run])}{shown}'
        f"{configuration(run.config)}{diagnosis(run.metrics)}",
        style=_STYLE,
        script=_SCRIPT if shown else "",
    )


def write(run: Path, out: Path | None = None) -> Path:
    """Write RUN/report.html, or `out`, from what the run has logged so far; a reader sees the old page or the new.

    ValueError where `run` is no run directory or one of its files is damaged.
    """
    out = out or run / "report.html"
    page.write_page(out, document(read_run(run)))
    return out


def compare(paths: Sequence[Path], out: Path) -> Path:
    """Write a page that lays several runs side by side: accuracies, all curves, the settings that differ."""
    runs = [read_run(path) for path in paths]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    keys = "".join(
        f'<span class="key" style="--colour:{_COLOURS[i % len(_COLOURS)]}">{escape(name)}</span>'
        for i, name in enumerate(names)
    )
    results = []
    for name, run in zip(names, runs, strict=True):
        steps, reward = run.metrics[-1]["step"] if run.metrics else 0, end(run.metrics, "reward")
        reward = "" if reward is None else f"{reward:.3f}"
        accuracies = [_percent(run.summary.get(when)) for when in ("before", "after")]
        results.append((name, f"{steps} of {run.config['settings']['steps']}", _minutes(run), reward, *accuracies))
    flags = dict.fromkeys(name for run in runs for name in run.config["settings"] if name not in ("out", "resume"))
    rows = [(_flag(name), *(_shown(run.config["settings"].get(name)) for run in runs)) for name in flags]
    different = [row for row in rows if len(set(row[1:])) > 1]
    head = ("run", "steps", "time", "reward, last fifth", "held out before, %", "after")
    body = (
        f"{page.table(head, results)}<h2>Settings that differ</h2>"
        f"{page.table(('flag', *names), different) if different else '<p>None.</p>'}"
        f"<h2>Curves</h2><p>{keys}</p>{all_curves(runs)}"
    )
    page.write_page(out, page.page(f"{len(runs)} runs compared", body, style=_STYLE))
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m grpo.pages.report", description="Rebuild a run's page, or compare runs."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run directory")
    help = "the page to write (default RUN/report.html; of several runs compare.html)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=help)
    given = parser.parse_args(argv)
    if len(given.runs) == 1:
        print(write(given.runs[0], given.out))
    else:
        print(compare(given.runs, given.out or Path("compare.html")))


if __name__ == "__main__":
    with clean_errors():
        main()
