"""The log of a run: strict JSON that survives a crash and a resume, and what the terminal shows."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from grpo.run import log
from grpo.run.log import RunLog, write_json

STEP = {
    "reward": 0.5,
    "accuracy": 0.25,
    "loss": 0.125,
    "kl": float("nan"),
    "completions/mean_length": 14.25,
    "tokens_per_second": 1830.4,
    "time/rollout": 3.0,
    "time/reward": 0.0,
    "time/update": 1.0,
}


def strict(line: str):
    """Parse JSON as every other reader of it does: without the literals NaN and Infinity."""

    def refuse(literal: str):
        raise AssertionError(f"{literal} is not JSON")

    return json.loads(line, parse_constant=refuse)


def read(path: Path) -> list:
    return [strict(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_metrics_are_one_strict_json_line_a_step(tmp_path):
    with RunLog(tmp_path, 2, resume_step=None) as run:
        run.metrics(1, {"reward": jnp.float32(0.1), "kl": float("nan"), "num_tokens": np.int64(3), "entropy": np.inf})
        run.metrics(2, {"reward": float(np.float32(0.3)), "step_time": 1.23456789012345})
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward": 0.1, "kl": None, "num_tokens": 3, "entropy": None},
        {"step": 2, "reward": 0.3, "step_time": 1.2345679},
    ]


def test_logged_floats_are_the_same_float32(tmp_path):
    digits = np.random.default_rng(0).uniform(-9.5, 9.5, 75)
    values = (digits * 10.0 ** np.arange(-37, 38)).astype(np.float32)
    with RunLog(tmp_path, 1, resume_step=None) as run:
        run.metrics(1, {str(i): jnp.asarray(value) for i, value in enumerate(values)})
    (line,) = read(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(np.array([line[str(i)] for i in range(len(values))], np.float32), values)


def test_samples_are_one_line_a_group(tmp_path):
    group = {
        "prompt": "¿Cuánto?\n",
        "answer": "3",
        "completions": [
            {"text": "3", "rewards": {"answer": np.float32(1)}, "advantage": float("nan"), "finished": True}
        ],
    }
    with RunLog(tmp_path, 1, resume_step=None) as run:
        run.samples(1, [group, group | {"answer": "4"}])
    first, second = read(tmp_path / "samples.jsonl")
    assert first["completions"] == [{"text": "3", "rewards": {"answer": 1.0}, "advantage": None, "finished": True}]
    assert (first["step"], first["prompt"], second["answer"]) == (1, "¿Cuánto?\n", "4")


def test_images_of_a_group_become_files_that_its_line_names(tmp_path):
    """No larger than needed to be looked at, and of the same proportions."""
    small, large = np.arange(30 * 20 * 3, dtype=np.uint8).reshape(30, 20, 3), np.zeros((896, 448, 3), np.uint8)
    seen = []
    with RunLog(tmp_path, 1, resume_step=None, track=lambda step, metrics: seen.append((step, metrics))) as run:
        run.samples(1, [{"prompt": "a"}, {"prompt": "b", "images": [small, large]}, {"prompt": "c", "images": []}])
        run.metrics(1, {"reward": 2.0})
    _, line, _ = read(tmp_path / "samples.jsonl")
    assert line["images"] == ["images/00000001-1-0.png", "images/00000001-1-1.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / line["images"][0])), small)
    assert Image.open(tmp_path / line["images"][1]).size == (112, 224)
    assert seen == [(1, {"reward": 2.0})]


def test_resuming_drops_later_steps_and_a_line_cut_short(tmp_path):
    with RunLog(tmp_path, 9, resume_step=None) as run:
        for step in range(1, 6):
            run.metrics(step, {"reward": step})
            run.samples(step, [{"prompt": "a"}, {"prompt": "b"}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rew')
    with RunLog(tmp_path, 9, resume_step=3) as run:
        run.metrics(4, {"reward": 40})
    assert [(line["step"], line["reward"]) for line in read(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]
    assert [line["step"] for line in read(tmp_path / "samples.jsonl")] == [1, 1, 2, 2, 3, 3]


def test_a_new_run_refuses_the_directory_of_another(tmp_path):
    with RunLog(tmp_path, 1, resume_step=None) as run:
        run.metrics(1, {})
    with pytest.raises(ValueError, match=rf"{tmp_path} holds another run; .* --resume {tmp_path}"):
        RunLog(tmp_path, 1, resume_step=None)


def test_write_json_is_exact_and_replaces_the_file_as_a_whole(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"old": 1})
    with open(path) as reader:
        write_json(path, {"rate": 1.23456789012e-05, "out": Path("a/b"), "targets": ("q", "v"), "nan": float("nan")})
        assert strict(reader.read()) == {"old": 1}, "a reader who opened the old file sees it whole"
    content = {"rate": 1.23456789012e-05, "out": "a/b", "targets": ["q", "v"], "nan": None}
    assert strict(path.read_text()) == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_write_json_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert strict(path.read_text()) == {"old": 1}


def test_plain_output_is_a_row_every_ten_seconds_and_the_last(tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(log.time, "monotonic", lambda: float(next(clock)))
    with RunLog(tmp_path, 8, resume_step=None) as run:
        run.say("before: [41%]")
        for step in range(1, 9):
            run.progress(step, STEP)
    first, heading, *rows = capsys.readouterr().out.splitlines()
    assert first == "before: [41%]"
    assert heading.split() == [
        "step",
        "reward",
        "accuracy",
        "KL",
        "length",
        "tokens/s",
        "rollout/reward/update",
        "left",
    ]
    assert [row.split()[0] for row in rows] == ["1/8", "4/8", "7/8", "8/8"]
    assert rows[1].split()[1:6] == ["0.500", "25.0%", "-", "14.2", "1,830"]
    assert "75% /  0% / 25%" in rows[1]
    assert [row.split()[-1] for row in rows] == ["-", "0:16", "0:04", "0:00"]
    assert len({len(line) for line in (heading, *rows)}) == 1, "the columns line up"


def test_the_row_of_an_interrupted_run_is_printed_at_its_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(log.time, "monotonic", lambda: 0.0)
    with pytest.raises(KeyboardInterrupt), RunLog(tmp_path, 100, resume_step=None) as run:
        for step in (1, 2, 3):
            run.progress(step, STEP)
        raise KeyboardInterrupt
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", "1/100", "3/100"]


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "0:42"), (727, "12:07"), (10809, "3:00:09"), (59.6, "1:00")])
def test_clock(seconds, text):
    assert log._clock(seconds) == text


def in_a_terminal(tmp_path: Path, **environment: str) -> str:
    """What RunLog writes to a real pseudo-terminal, control sequences included."""
    code = (
        "import pathlib, sys, time; from grpo.run.log import RunLog\n"
        "with RunLog(pathlib.Path(sys.argv[1]), 3, resume_step=None) as run:\n"
        "    run.say('hello [bold]')\n"
        "    for step in (1, 2, 3):\n"
        f"        run.progress(step, {STEP!r})\n".replace("nan", "float('nan')")
    )
    inherited = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env=inherited | {"TERM": "xterm-256color", **environment},
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not part:
            break
        output += part
    os.close(ours)
    assert process.wait(timeout=60) == 0, output.decode()
    return output.decode()


def test_a_terminal_gets_a_live_line_below_the_table(tmp_path):
    text = in_a_terminal(tmp_path)
    assert "hello [bold]" in text and "━" in text and "step 0/3" in text
    assert re.search(r"\x1b\[[\d;]*36m", text), "the bar is cyan"
    assert re.search(r"\x1b\[\?25l", text) and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is back"


def test_no_color_is_respected(tmp_path):
    text = in_a_terminal(tmp_path, NO_COLOR="1")
    assert "━" in text
    assert not re.search(r"\x1b\[(\d+;)*(3[0-8]|9[0-7])[;m]", text)


def test_a_dumb_terminal_gets_plain_lines(tmp_path):
    text = in_a_terminal(tmp_path, TERM="dumb")
    assert "\x1b" not in text and "━" not in text
    assert [line.split()[0] for line in text.splitlines()] == ["hello", "step", "1/3", "3/3"]
