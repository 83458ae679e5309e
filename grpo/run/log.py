"""The log of a run: metrics.jsonl, samples.jsonl, and lines on the terminal while it runs.

Every line of a file is strict JSON and is written by one call, so a reader of the file never sees half a line.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from rich.theme import Theme

from gemma3.files import writing
from grpo.run.processes import is_first
from grpo.run.trackers import Track

# Columns of the terminal's table: heading, metric, format. A column is left out if a run does not have its metric.
COLUMNS = (
    ("reward", "reward", "{:.3f}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("loss", "loss", "{:.4f}"),
    ("KL", "kl", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("length", "completions/mean_length", "{:.1f}"),
    ("tokens/s", "tokens_per_second", "{:,.0f}"),
)
# The parts of a step: their seconds are "time/rollout" and so on, and the table shows their shares.
TIMES = ("rollout", "reward", "update")
_SECONDS_BETWEEN_ROWS = 10.0
_IMAGE_SIDE = 224  # pixels: the longest side of an image that is kept to be looked at
_THEME = Theme({"bar.complete": "cyan", "bar.finished": "cyan", "progress.elapsed": "dim"})


def _float32(value: float) -> float:
    """The number with the fewest digits that is the same float32: 0.1, not 0.10000000149011612."""
    return float(str(np.float32(value)))


def _plain(value: Any, number: Callable[[float], float] = float) -> Any:
    """Nested dicts and sequences of numbers, arrays, paths and text as JSON holds them; NaN and infinity are null."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value).tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, number) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, number) for item in value]
    if isinstance(value, float):
        return number(value) if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def parsed(text: str | bytes, what: str) -> Any:
    """The content of JSON text; for other text a ValueError that begins with `what`."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{what} is not JSON ({error})") from error


def read_json(path: Path) -> Any:
    return parsed(path.read_bytes(), f"{path} is damaged: it")


def write_json(path: Path, obj: Any) -> None:
    """Write or replace a JSON file, on the first process only. NaN and infinity become null."""
    if is_first():
        writing.write_json(path, _plain(obj))


def _drop_after(path: Path, step: int) -> None:
    """Delete the lines of steps after `step`, and a last line that a crash cut short."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    if is_first():
        writing.replace_file(path, b"".join(kept))


def _clock(seconds: float) -> str:
    """Seconds as 0:42, 12:07 or 3:00:09."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _cells(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The text of each column that these metrics have, by its heading."""
    row = {}
    for heading, key, layout in COLUMNS:
        # In GRPO the loss says nothing about progress: its gradient is what counts.
        if key in metrics and not (key == "loss" and "reward" in metrics):
            value = float(metrics[key])
            row[heading] = layout.format(value) if math.isfinite(value) else "-"
    seconds = [float(metrics.get(f"time/{part}", 0.0)) for part in TIMES]
    if sum(seconds):
        row["/".join(TIMES)] = " / ".join(f"{share / sum(seconds):3.0%}" for share in seconds)
    return row


class RunLog:
    """The log of one run, as a context manager: two files in the run directory, and the terminal.

    run: its directory, which must exist; total_steps: the step at which the run ends; resume_step: the step after which
    it goes on (later lines of the files are dropped), or None for a new run; track: a function that gets the metrics
    too. ValueError if a new run would add to the files of an older one.
    """

    def __init__(self, run: Path, total_steps: int, *, resume_step: int | None, track: Track | None = None):
        self._track = track
        self._metrics, self._samples = Path(run) / "metrics.jsonl", Path(run) / "samples.jsonl"
        self._total = total_steps
        if resume_step is not None:
            _drop_after(self._metrics, resume_step)
            _drop_after(self._samples, resume_step)
        elif self._metrics.exists() and self._metrics.stat().st_size:
            raise ValueError(f"{run} holds another run; choose another --out, or continue that run with --resume {run}")
        self._headings: list[str] = []
        self._row: Text | None = None  # of the latest step, if it is not printed yet
        self._row_time = -math.inf
        self._first: tuple[int, float] | None = None  # the first step of this process, and when it was done
        self._console = console = Console(highlight=False, soft_wrap=True, theme=_THEME)
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=28),
            TimeElapsedColumn(),
            TextColumn("{task.fields[now]}"),
        )
        hidden = not console.is_terminal or console.is_dumb_terminal
        self._live = Progress(*columns, console=console, transient=True, refresh_per_second=2, disable=hidden)
        self._task = self._live.add_task(
            "", total=total_steps, completed=resume_step or 0, now="the first step compiles"
        )

    def __enter__(self) -> "RunLog":
        self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self._print_row()
        if not self._live.disable:  # some versions of rich would print an empty line
            self._live.stop()

    def _append(self, path: Path, records: Sequence[dict]) -> None:
        if not is_first():
            return
        lines = [json.dumps(_plain(record, _float32), ensure_ascii=False, allow_nan=False) + "\n" for record in records]
        with open(path, "ab", buffering=0) as file:
            file.write("".join(lines).encode())

    def metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a line of numbers under TRL's names to metrics.jsonl, with the digits of a float32."""
        self._append(self._metrics, [{"step": step, **metrics}])
        if self._track is not None:
            self._track(step, metrics)

    def samples(self, step: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """Append a line for each prompt of a step to samples.jsonl: the prompt and the completions of its group.

        The "images" of a group, uint8[h, w, 3], become files, and the line holds their names.
        """
        lines = [{"step": step, **group} for group in groups]
        for q, line in enumerate(lines):
            if line.get("images") and is_first():
                named = enumerate(line["images"])
                line["images"] = [self._keep_image(f"{step:08}-{q}-{i}.png", x) for i, x in named]
        self._append(self._samples, lines)

    def _keep_image(self, name: str, pixels: np.ndarray) -> str:
        path = self._samples.with_name("images") / name
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(pixels)
        image.thumbnail((_IMAGE_SIDE, _IMAGE_SIDE))
        image.save(path)
        return f"images/{name}"

    def say(self, text: str) -> None:
        """Print a line, above the live one if there is one."""
        self._console.print(Text(text))

    def _time_left(self, step: int, now: float) -> str:
        # The first step compiles, so it says nothing about the others.
        if self._first is None or step == self._first[0]:
            return "-"
        seconds = (now - self._first[1]) / (step - self._first[0])
        return _clock(seconds * (self._total - step))

    def _print_row(self) -> None:
        if self._row is not None:
            self._console.print(self._row)
            self._row = None

    def evaluating(self, answered: int, total: int) -> None:
        """Show on the live line how far an evaluation has come."""
        self._live.update(self._task, now=f"evaluating on held-out examples, {answered} of {total}")

    def progress(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show a finished step: at once on the live line, and as a row of the table every ten seconds or so.

        It reads the metrics of `COLUMNS` and the seconds "time/rollout", "time/reward" and "time/update".
        """
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        left = self._time_left(step, now)
        cells = {"step": f"{step}/{self._total}"} | _cells(metrics) | {"left": left}
        widths = {heading: max(len(heading), 8) for heading in cells}
        if list(cells) != self._headings:
            self._headings = list(cells)
            head = "  ".join(heading.rjust(width) for heading, width in widths.items())
            self._console.print(Text(head, style="dim"))
        self._row = Text("  ").join(
            Text(cells[heading].rjust(width), style="bold" if heading in ("reward", "accuracy") else "")
            for heading, width in widths.items()
        )
        if now - self._row_time >= _SECONDS_BETWEEN_ROWS or step >= self._total:
            self._print_row()
            self._row_time = now
        shown = [f"{name} {cells[name]}" for name in ("reward", "accuracy", "loss") if name in cells]
        self._live.update(self._task, completed=step, now="  ".join([*shown, f"{left} left"]))
