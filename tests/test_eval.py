"""eval.py on a nano model that knows nothing: what it prints and writes, log-probs equal to Hugging Face's."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_models import randomize
from transformers import AutoModelForImageTextToText

import eval as evaluation
from data.example import Example
from data.synthetic import synthetic
from gemma3.files.adapter import save_adapter
from gemma3.files.published import NANO
from gemma3.files.tokenizer_model import load_tokenizer
from gemma3.files.weights import load_checkpoint
from gemma3.lora import LoraConfig, Policy, init_lora
from gemma3.mesh import Model, make_mesh
from grpo.reader import Reader
from grpo.run.setup import new_nano
from grpo.use.evaluate import by_purpose, given_logps, trained_on, with_images
from reward.report import Result, completion_is_correct

torch.set_num_threads(1)

RIGHT = "<reasoning>so</reasoning>\n<answer>{}</answer>"
METADATA = {
    **{"split": "testmini", "language": "english", "img_width": 48, "img_height": 32, "source": "made"},
    **{"category": "general-vqa", "context": "bar chart", "grade": "college"},
}


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """A model directory with random weights and a tokenizer trained on the embedded task."""
    directory = tmp_path_factory.mktemp("eval") / "nano"
    new_nano(directory, synthetic("train", 300, 0), seed=0)
    return directory


@pytest.fixture(scope="module")
def adapter(nano):
    """A PEFT adapter of it, random in both factors, so that it has an effect."""
    lora = init_lora(jax.random.key(0), NANO, LoraConfig(r=3, alpha=6.0))
    leaves, tree = jax.tree.flatten(lora)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    lora = jax.tree.unflatten(
        tree, [x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )
    save_adapter(nano.parent / "adapter", NANO, lora, str(nano))
    return nano.parent / "adapter"


@pytest.fixture(scope="module")
def reader(nano):
    return Reader(Model(NANO, make_mesh(1, 1)), load_tokenizer(nano, NANO), "bare", "answer", max_prompt_length=32)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs eval.py with these flags; the result has what it printed, its figures, its lines, and where they are."""

    def run(*flags):
        out = tmp_path / "eval.json"
        evaluation.main([*map(str, flags), "--out", str(out)])
        lines = [json.loads(line) for line in (tmp_path / "eval_results.jsonl").read_text("utf-8").splitlines()]
        return SimpleNamespace(
            printed=capsys.readouterr().out, figures=json.loads(out.read_text()), lines=lines, at=tmp_path
        )

    return run


def write_rows(path, *rows: dict):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def png(colour) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 32), colour).save(file, "PNG")
    return file.getvalue()


def of_model(lines: list[dict], name: str) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "model"} for line in lines if line["model"] == name]


def test_the_adapters_figures_stand_beside_the_bases(run, adapter, nano):
    """With --no-base they stand alone, unchanged. The base's figures are those of the model that the adapter names."""
    both = run("--ckpt", adapter, "--limit", 7, "--max-completion-length", 9)
    assert of_model(both.lines, "base") != of_model(both.lines, "adapter")
    assert [line["id"] for line in of_model(both.lines, "adapter")] == [f"test-0-{i}" for i in range(7)]
    assert "base: 0.0% (95% interval 0.0% to 35.4%, n=7)" in both.printed and "\x1b" not in both.printed
    assert both.figures["adapter"]["by"]["kind"]["text"]["n"] == 2
    assert (both.at / "eval.html").read_text("utf-8").count("<article") == 7
    alone = run("--ckpt", adapter, "--limit", 7, "--max-completion-length", 9, "--no-base")
    assert "base" not in alone.figures and alone.figures["adapter"] == both.figures["adapter"]
    assert of_model(alone.lines, "adapter") == of_model(both.lines, "adapter")
    base = run("--ckpt", nano, "--limit", 7, "--max-completion-length", 9)
    assert of_model(base.lines, "model") == of_model(both.lines, "base")
    assert base.figures["model"] == both.figures["base"]


def test_completions_do_not_depend_on_the_batch_or_the_mesh(run, nano):
    """Sampled at temperature 1, three of each: one batch of 5 on one device, or batches of 2 on two."""
    flags = ("--ckpt", nano, "--limit", 5, "--max-completion-length", 9, "--temperature", 1, "--num-generations", 3)
    whole, parts = run(*flags), run(*flags, "--batch-size", 2, "--mesh", "2,1")
    assert len(whole.lines) == 15 and len({line["completion"] for line in whole.lines}) == 15
    assert whole.lines == parts.lines
    assert list(whole.figures["model"]["samples"]) == ["pass@1", "pass@2", "maj@3"]


def test_with_blank_images_the_question_decides(run, nano):
    """All examples with the same question then have the same greedy completion."""
    found = run("--ckpt", nano, "--limit", 24, "--max-completion-length", 9, "--images", "blank")
    questions = {example.id: example.question for example in synthetic("test", 24, 0)}
    pairs = {(questions[line["id"]], line["completion"]) for line in found.lines}
    assert len(pairs) == len(set(questions.values())) < 24


@pytest.fixture(scope="module")
def mathvista(tmp_path_factory):
    """A parquet file of MathVista's columns with four problems, one of each kind of answer that it scores."""
    rows = [
        {"pid": "1", "choices": ["red", "blue"], "question_type": "multi_choice", "answer_type": "text"},
        {"pid": "2", "answer": "7", "answer_type": "integer"},
        {"pid": "3", "answer": "0.5", "answer_type": "float", "precision": 1.0},
        {"pid": "4", "answer": "[1, 2]", "answer_type": "list"},
    ]
    tasks = ("math word problem", "visual question answering")
    for i, row in enumerate(rows):
        image = {"bytes": png((60 * i, 90, 120)), "path": None}
        row |= {"question": f"Which of {i}?", "image": f"images/{i + 1}.jpg", "decoded_image": image, "unit": None}
        row.setdefault("answer", "blue")
        skills = ["geometry reasoning", "logical reasoning"][: 1 + i % 2]
        row["metadata"] = METADATA | {"task": tasks[i % 2], "skills": skills}
    columns = ("choices", "precision", "question_type")
    defaults = dict(zip(columns, (None, None, "free_form"), strict=True))
    path = tmp_path_factory.mktemp("mathvista") / "testmini.parquet"
    pq.write_table(pa.Table.from_pylist([defaults | row for row in rows]), path)
    return path


def test_mathvista_is_scored_officially_and_broken_down(run, nano, mathvista, monkeypatch):
    """On given completions, by hand: pid 1 answers in free text, which our own reading refuses, and pid 2 is wrong."""
    completions = ("I think (B).", RIGHT.format("8"), RIGHT.format("0.5"), RIGHT.format("[1,2]"))
    flags = ("--ckpt", nano, "--data", mathvista, "--max-prompt-length", 400, "--max-completion-length", 4)

    def answer(policy, examples, reader, **_):
        return [
            [Result(e, text, completion_is_correct(text, e, "answer"), False, True, 1)]
            for e, text in zip(examples, completions, strict=True)
        ]

    monkeypatch.setattr(evaluation, "evaluate", answer)
    found = run(*flags)
    figures = found.figures["model"]
    assert figures["accuracy"] == 0.5
    assert "MathVista's current scorer: an answer that it cannot read counts" in found.printed
    official = figures["mathvista"]
    assert (official["all"]["accuracy"], official["all"]["n"]) == (0.75, 4)
    assert official["task"]["math word problem"] | {"interval": 0} == {"accuracy": 1.0, "n": 2, "interval": 0}
    assert official["skills"]["geometry reasoning"]["n"] == 4 and official["skills"]["logical reasoning"]["n"] == 2
    for heading in ("question type", "answer type", "category", "task", "context", "grade", "skills"):
        assert f"mathvista {heading}" in found.printed
    output = json.loads((found.at / "eval_output_model.json").read_text())
    scores = json.loads((found.at / "eval_scores_model.json").read_text())
    assert {pid: record["true_false"] for pid, record in output.items()} == {
        "1": True,
        "2": False,
        "3": True,
        "4": True,
    }
    assert output["1"]["response"] == "I think (B)." and output["1"]["prediction"] == "blue"
    assert scores["average"] == {"accuracy": 0.75, "correct": 3, "total": 4}
    published = run(*flags, "--scorer", "published")
    assert json.loads((published.at / "eval_scores_model.json").read_text())["average"]["accuracy"] == "75.0"


def test_the_mathvista_stand_in_runs_end_to_end(run, nano, shared_data):
    """Its first 8 problems, images and all; the longest prompts are left out and counted."""
    data = shared_data / "mathvista" / "testmini_standin.parquet"
    flags = ("--ckpt", nano, "--data", data, "--limit", 8, "--max-prompt-length", 300, "--max-completion-length", 4)
    found = run(*flags)
    kept = found.figures["model"]["mathvista"]["all"]["n"]
    assert 0 < kept < 8 and len(found.lines) == kept
    assert f"{8 - kept} of 8 prompts are longer than 300 tokens and left out" in found.printed


def test_gsm8k_has_its_strict_and_flexible_accuracy(run, nano, tmp_path):
    data = write_rows(tmp_path / "test.jsonl", *({"question": f"{n}?", "answer": f"so\n#### {n}"} for n in range(3)))
    flags = ("--data", data, "--wording", "bare", "--max-prompt-length", 32, "--max-completion-length", 9)
    figures = run("--ckpt", nano, *flags).figures["model"]
    assert list(figures["gsm8k"]) == ["strict", "flexible"]
    assert figures["gsm8k"]["flexible"]["n"] == figures["n"] == 3


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """Three rows to compare, one with an image; one whose completions have no rewards; one to sample."""
    path = tmp_path_factory.mktemp("preferences") / "rows.jsonl"
    (path.parent / "a.png").write_bytes(png("red"))
    return write_rows(
        path,
        {"id": "a", "question": "2?", "answer": 2, "chosen": RIGHT.format(2), "rejected": RIGHT.format(3)},
        {"id": "b", "question": "5?", "answer": 5, "completions": ["5", RIGHT.format(5), "no"], "rewards": [0.5, 0, 1]},
        {"id": "c", "question": "red?", "image": "a.png", "chosen": "yes yes", "rejected": "no"},
        {"id": "d", "question": "7?", "completions": ["7", "8"]},
        {"id": "e", "question": "9?", "answer": 9},
    )


def test_preference_accuracy_is_that_of_the_log_probs_and_of_the_reward(run, nano, preferences):
    """The reward is right on a, wrong on b where it disagrees with the data, and says nothing on c."""
    flags = ("--wording", "bare", "--max-prompt-length", 32, "--max-completion-length", 70)
    found = run("--ckpt", nano, "--data", preferences, *flags)
    lines = {line["id"]: line for line in found.lines}
    assert lines["a"]["rewards"] == [1.5, 0.5] and lines["b"]["rewards"] == [0.0, 1.5, 0.0]
    assert lines["c"]["rewards"] == [None, None] and "completion" in lines["e"] and "d" not in lines
    assert "left out 1 of 5 rows, whose completions' rewards do not differ" in found.printed
    figures = found.figures["model"]
    # The data orders b's completions 2 > 0 > 1. The reward ties 2 and 0, and has the other pairs the wrong way round.
    assert figures["preference"]["reward"]["accuracy"] == pytest.approx((1 + 0.5 / 3) / 2)
    assert figures["preference"]["reward"]["n"] == 2
    (a, b, c) = (lines[id]["logps"] for id in "abc")
    in_order = [a[0] > a[1], np.mean([b[2] > b[0], b[2] > b[1], b[0] > b[1]]), c[0] > c[1]]
    assert figures["preference"]["policy"]["accuracy"] == pytest.approx(np.mean(in_order))
    assert figures["preference"]["policy"]["n"] == 3 and figures["n"] == 1


def test_log_probs_of_given_completions_equal_hugging_faces(nano, reader, tmp_path):
    """Summed over the completion and the end of its turn, for groups of unequal sizes and lengths, in batches of 2."""
    hf = randomize(AutoModelForImageTextToText.from_pretrained(nano, dtype=torch.float32), seed=1)
    hf.save_pretrained(tmp_path)
    _, params = load_checkpoint(tmp_path)
    examples = [
        Example("a", "How many red dots?", "", completions=("3 red.", "blue")),
        Example("b", "Ann has 2 coins.", "", completions=("2 3 4", "no", RIGHT.format(4))),
        Example("c", "How?", "", completions=("", "so")),
    ]
    found = given_logps(Policy(params), examples, reader, max_completion_length=70, batch_size=2)
    assert [len(group) for group in found] == [2, 3, 2]
    for example, logps in zip(examples, found, strict=True):
        prompt = reader(example).ids
        for completion, logp in zip(example.completions, logps, strict=True):
            ids = [*reader.tokenizer.encode(completion), 5]
            with torch.no_grad():
                logits = hf(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            taken = torch.log_softmax(logits.double(), -1)[range(len(ids)), ids]
            assert logp == pytest.approx(taken.sum().item(), rel=1e-5)


def test_completions_that_do_not_fit_are_left_out_and_counted(reader, capsys):
    long = Example("l", "q", "", completions=("a " * 40, "b"), completion_rewards=(1, 0))
    short, asked = dataclasses.replace(long, completions=("a", "b")), Example("s", "q", "1")
    assert by_purpose([long, asked, short], reader, 20, "mine") == ([asked], [short])
    assert capsys.readouterr().out == "mine: left out 1 of 3 rows, with completions longer than 20 tokens\n"
    with pytest.raises(ValueError, match="mine: no row is left to evaluate; raise --max-completion-length"):
        by_purpose([long], reader, 20, "mine")


def test_shuffled_images_are_those_of_others():
    """Each image is used once, none by its own example; examples without one keep none."""
    examples = [Example(str(i), "q", "", images=() if i % 3 == 2 else (b"%d" % i,)) for i in range(11)]
    for seed in range(20):
        moved = with_images(examples, "shuffled", seed)
        assert sorted(e.images for e in moved) == sorted(e.images for e in examples)
        assert all(new.images != old.images for new, old in zip(moved, examples, strict=True) if old.images)
        assert all(bool(new.images) == bool(old.images) for new, old in zip(moved, examples, strict=True))


def test_blank_images_are_one_grey():
    examples = [Example("0", "q", "", images=(b"x", b"y")), Example("1", "q", "")]
    blank, text = with_images(examples, "blank", 0)
    assert [Image.open(io.BytesIO(file)).getcolors() for file in blank.images] == [[(32 * 32, (240, 240, 240))]] * 2
    assert text.images == ()
    with pytest.raises(ValueError, match="--images shuffled: 1 of 2 examples have any; leave it out"):
        with_images(examples, "shuffled", 0)
    with pytest.raises(ValueError, match="--images blank: 0 of 1 examples have any; leave it out"):
        with_images(examples[1:], "blank", 0)


def test_what_a_run_trained_on_is_known_under_another_name(mathvista, tmp_path):
    assert trained_on("gsm8k", {"data": "gsm8k"})
    assert trained_on(str(mathvista), {"data": "mathvista"})
    assert not trained_on(str(mathvista), {"data": "gsm8k"})
    assert not trained_on(str(mathvista), {"data": "synthetic"})
    assert not trained_on(str(mathvista), {"data": str(tmp_path / "gone.jsonl")})
    assert not trained_on("synthetic", {})


def test_a_question_is_answered_before_and_after_training(adapter, tmp_path, capsys):
    """The question comes with an image; no evaluation is run and no file is written."""
    (tmp_path / "a.png").write_bytes(png("red"))
    flags = ["--ckpt", adapter, "--prompt", "How many red dots?", "--image", tmp_path / "a.png"]
    evaluation.main([*map(str, flags), "--base", "--max-completion-length", "9", "--strategy", "standard"])
    printed = capsys.readouterr().out
    before, after = printed.split("adapter, standard: temperature 1, top-k 64, top-p 0.95\n")
    assert before.startswith("base, standard: temperature 1, top-k 64, top-p 0.95\n")
    assert before.splitlines()[1:] != after.splitlines() and "\x1b" not in printed
    assert "(cut at 9 tokens; --max-completion-length 18 would let it go on)" in after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]


def test_a_model_without_a_vision_tower_is_shown_nothing(nano):
    config = dataclasses.replace(NANO, vision=None)
    reader = Reader(Model(config, make_mesh(1, 1)), load_tokenizer(nano, config), "bare", "answer")
    with pytest.raises(ValueError, match="the image cannot be shown: this model reads text only"):
        reader.views(png("red"))


def test_bad_input_ends_in_a_sentence(tmp_path):
    """On the command line it also means exit code 2, that sentence and no traceback."""
    with pytest.raises(ValueError, match=r"no/where/at/all is not a directory; pass a model directory, a name such as"):
        evaluation.main(["--ckpt", "no/where/at/all"])
    with pytest.raises(ValueError, match="holds no adapter and no weights; pass a run that has saved, an adapter or a"):
        evaluation.main(["--ckpt", str(tmp_path)])
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is not a model directory: it has no config\.json"):
        evaluation.main(["--ckpt", str(tmp_path)])
    with pytest.raises(ValueError, match="'nope' is no known dataset and no file or folder; known are synthetic, the"):
        evaluation.main(["--ckpt", str(tmp_path), "--data", "nope"])
    with pytest.raises(ValueError, match="--base: --ckpt nano is a model that was not trained from another here"):
        evaluation.main(["--prompt", "2+2?", "--base"])
    with pytest.raises(ValueError, match=r"none\.png cannot be read: No such file or directory"):
        evaluation.main(["--prompt", "2+2?", "--image", str(tmp_path / "none.png")])
    command = [sys.executable, str(Path(evaluation.__file__)), "--num-generations", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    sentence = "error: --num-generations 3: greedy completions of an example are all alike; add --temperature 1\n"
    assert (done.returncode, done.stderr, done.stdout) == (2, sentence, "")
