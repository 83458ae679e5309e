"""Files answered batch by batch, interrupted and continued; built-in examples with their verdicts."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from test_chat import answerer_on, in_room

import eval as evaluation
import grpo.use.use
from data.example import Example
from gemma3.filters import Sampling
from grpo.reader import Reader
from grpo.use import chat as chatting
from grpo.use.use import answer_examples, answer_file

EXAMPLES = [Example(str(i), f"What is {i} + {i}?", str(2 * i)) for i in range(5)]
ASKED = {"seed": 3, "models": {"model": ["nano", None]}}


@pytest.fixture(scope="module")
def answerer():
    answerer = in_room(answerer_on(1, 1), 40)
    return answerer._replace(
        reader=replace(answerer.reader, wording="bare"), sampling=Sampling(max_completion_length=12)
    )


@pytest.fixture
def answer(answerer, tmp_path, monkeypatch):
    """Answer the examples into a file of this name and return its bytes; `stop_at` is the id to be interrupted at."""
    read = Reader.__call__

    def answer(name: str, *, batch_size: int, stop_at: str = "", asked_for: dict = ASKED, examples=EXAMPLES) -> bytes:
        def read_or_stop(reader, example):
            if example.id == stop_at:
                raise KeyboardInterrupt
            return read(reader, example)

        monkeypatch.setattr(Reader, "__call__", read_or_stop)
        answer_file(
            Console(file=io.StringIO()),
            [("base", "", answerer), ("adapter", "", answerer._replace(seed=4))],
            examples,
            asked_for=asked_for,
            num_models=2,
            batch_size=batch_size,
            path=tmp_path / name,
        )
        return (tmp_path / name).read_bytes()

    return answer


def test_a_file_gone_on_with_is_that_of_one_go(answer, tmp_path):
    """Interrupted twice, then continued with batches of another size; in between, the file is valid too."""
    whole = answer("whole.json", batch_size=2)
    for stop_at, there in (("3", 2), ("4", 4)):
        with pytest.raises(KeyboardInterrupt):
            answer("parts.json", batch_size=2, stop_at=stop_at)
        found = json.loads((tmp_path / "parts.json").read_text("utf-8"))
        assert found["settings"] == ASKED and len(found["answers"]) == there
    assert answer("parts.json", batch_size=3) == whole == answer("whole.json", batch_size=2)
    answers = json.loads(whole)["answers"]
    assert [(a["model"], a["id"]) for a in answers] == [(m, str(i)) for m in ("base", "adapter") for i in range(5)]
    assert len({a["completion"] for a in answers}) == 10
    assert list(answers[0]) == ["id", "model", "question", "images", "answer", "reasoning", "completion", "finished"]


def test_answers_to_something_else_are_not_gone_on_with(answer, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"settings": ASKED | {"seed": 4}, "answers": []}))
    with pytest.raises(ValueError, match=r"a\.json holds answers of seed 4, and now it is 3; go on as you began, or"):
        answer("a.json", batch_size=2)
    for content in ("", "[]", '{"a": 1}'):
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(ValueError, match=r"b\.json exists and holds no answers; give the name of another file"):
            answer("b.json", batch_size=2)
        assert (tmp_path / "b.json").read_text() == content


def test_examples_are_shown_with_their_verdicts_by_every_strategy(answerer, monkeypatch):
    """The answers are made up: the first model is right about the second question only."""
    texts = {0.0: ["so <answer>1</answer>", "<answer>2</answer>"], 0.5: ["<answer>0</answer>", "<answer>9</answer>"]}

    def made_up(answerer, prompts, first_index):
        assert len(prompts) == 2 and first_index == 0
        return [chatting.Answer(text, text.startswith("<")) for text in texts[answerer.sampling.temperature]]

    monkeypatch.setattr(chatting, "answers", made_up)
    console = Console(file=io.StringIO(), width=60)
    ways = {"greedy": Sampling(0.0, max_completion_length=12), "wild": Sampling(0.5, 7, max_completion_length=12)}
    labelled = [("base", f"base, {chatting.spelled(*way)}", answerer._replace(sampling=way[1])) for way in ways.items()]
    answer_examples(console, labelled, EXAMPLES[:2], answerer.reader)
    assert console.file.getvalue().splitlines() == [
        "",
        "1. What is 0 + 0?",
        "base, greedy: temperature 0",
        "so",
        "answer     1",
        "(cut at 12 tokens; --max-completion-length 24 would let it go on)",
        "wrong: it is 0",
        "base, wild: temperature 0.5, top-k 7",
        "answer     0",
        "right",
        "",
        "2. What is 1 + 1?",
        "base, greedy: temperature 0",
        "answer     2",
        "right",
        "base, wild: temperature 0.5, top-k 7",
        "answer     9",
        "wrong: it is 2",
        "",
        "1 of 2 right: base, greedy: temperature 0",
        "1 of 2 right: base, wild: temperature 0.5, top-k 7",
    ]


def test_ctrl_c_ends_with_a_sentence_and_130(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    (tmp_path / "q.txt").write_text("2+2?\n")
    monkeypatch.setattr(grpo.use.use, "answer_file", interrupted)
    with pytest.raises(SystemExit, match="130"):
        evaluation.main(["--batch", str(tmp_path / "q.txt")])
    assert capsys.readouterr().out == "\nstopped; the same command goes on from here\n"


@pytest.mark.slow
def test_a_batch_that_was_killed_is_gone_on_with(tmp_path):
    """`kill -9` while it answers one question at a time: started again, it ends with the file of a run in one go."""
    (tmp_path / "q.txt").write_text("".join(f"Ann has {i} coins and gets {i % 5} more.\n" for i in range(40)))
    command = [sys.executable, str(Path(evaluation.__file__)), "--batch", "q.txt", "--strategy", "creative"]
    options = {"cwd": tmp_path, "env": os.environ | {"JAX_PLATFORMS": "cpu"}, "capture_output": True, "text": True}
    subprocess.run([*command, "--output", "whole.json"], check=True, timeout=300, **options)

    parts = tmp_path / "parts.json"
    again = [*command, "--output", "parts.json", "--batch-size", "1"]
    process = subprocess.Popen(again, cwd=tmp_path, env=options["env"], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not parts.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    answered = len(json.loads(parts.read_text("utf-8"))["answers"])
    assert 0 < answered < 40
    done = subprocess.run(again, check=True, timeout=300, **options)
    assert done.stdout == "40 answers are in parts.json\n" and done.stderr == ""
    assert parts.read_bytes() == (tmp_path / "whole.json").read_bytes()
    other = subprocess.run([*again, "--seed", "1"], timeout=300, **options)
    assert other.returncode == 2
    assert other.stderr.startswith("error: --output parts.json holds answers of seed 0, and now it is 1; go on as")
