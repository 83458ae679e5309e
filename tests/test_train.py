"""train.py from its flags to the files of a run: continued exactly, on every kind of data, and refusals in a sentence.

The runs are tiny, in one process where they can be, and share a compilation cache. What the model learns is not judged.
"""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import peft
import pytest
import torch
from jax.experimental.compilation_cache import compilation_cache
from oracle import assert_same_samples
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import train
from data.example import Example
from data.mathvista import TRAINING_NOTICE
from data.synthetic import synthetic
from gemma3.files.adapter import load_adapter
from gemma3.files.config_json import read_config
from gemma3.files.hub import NANO_DIRECTORY
from gemma3.files.tokenizer_model import load_tokenizer
from gemma3.files.weights import load_checkpoint
from gemma3.lora import Lora, Policy
from gemma3.mesh import Model, make_mesh
from gemma3.model import forward
from grpo.reader import Reader
from grpo.run import checkpoint
from grpo.run.cli import clean_errors
from grpo.run.describe import stored_settings
from grpo.run.log import RunLog

torch.set_num_threads(1)
PROJECT = Path(__file__).parents[1]
STEPS, SAVE_EVERY = 7, 3
SMALL = {
    **{"--steps": STEPS, "--save-every": SAVE_EVERY, "--warmup-steps": 1, "--temperature": 1.5},
    **{"--prompts-per-step": 2, "--num-generations": 2, "--max-prompt-length": 96, "--max-completion-length": 16},
    **{"--wording": "bare", "--learning-rate": 0.002, "--micro-batch": 2, "--eval-limit": 2, "--eval-batch": 2},
}
# Rewards differ within a group whatever the model can do. In a chosen call, the process sends itself a signal.
REWARD = """
import os

calls = 0

def spread(prompts, completions, **columns):
    global calls
    calls += 1
    number, call = os.environ.get("SIGNAL_IN_CALL", "0 0").split()
    if calls == int(call):
        os.kill(os.getpid(), int(number))
    return [sum(map(ord, text)) % 7 for text in completions]
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A folder of compiled programs: each run has an optimizer of its own, and jax would compile all again for it."""
    folder = tmp_path_factory.mktemp("compiled")
    changes = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("reward") / "my.py"
    path.write_text(REWARD)
    return f"{path}:spread"


def flags(**changes) -> list[str]:
    """The flags of a small run, with changes: out=PATH is --out PATH, and True is a flag without a value."""
    given = SMALL | {"--" + name.replace("_", "-"): value for name, value in changes.items()}
    return [str(word) for name, value in given.items() for word in ((name,) if value is True else (name, value))]


def run(*argv) -> str:
    """Run train.py in this process, as its last lines do; return what it printed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (
            mock.patch.object(sys, "argv", ["train.py", *map(str, argv)]),
            mock.patch.object(train, "connect"),  # jax looks for other processes before it has computed anything
            redirect_stdout(io.StringIO()) as out,
            clean_errors(),
        ):
            train.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return out.getvalue()


def refusal(capsys, *argv) -> str:
    """The sentence that a run ends with; it must be alone on stderr, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    err = capsys.readouterr().err
    assert (stop.value.code, err[: len("error: ")], err.count("\n")) == (2, "error: ", 1), err
    return err[len("error: ") : -1]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def metrics(out: Path) -> list[dict]:
    """metrics.jsonl without what a clock says."""
    clocked = ("time/", "step_time", "tokens_per_second")
    return [{k: v for k, v in line.items() if not k.startswith(clocked)} for line in lines(out / "metrics.jsonl")]


def settings_of(out: Path) -> dict:
    return json.loads((out / "config.json").read_text("utf-8"))["settings"]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: numbers, samples, accuracies, adapter and optimizer state."""
    assert metrics(one) == metrics(other)
    for name in (
        *("samples.jsonl", "summary.json", "adapter/adapter_model.safetensors"),
        f"checkpoints/{STEPS:08}/state/arrays.safetensors",
    ):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory, reward):
    """(directory, output) of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, run(*flags(out=out, reward=reward))


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_run_leaves_what_it_says(whole):
    out, printed = whole
    assert [line["step"] for line in metrics(out)] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines(out / "samples.jsonl")] == [s for s in range(1, STEPS + 1) for _ in "ab"]
    assert checkpoint.steps(out) == [6, 7]
    assert all(line["grad_norm"] > 0 for line in metrics(out) if line["frac_reward_zero_std"] < 1)
    evaluated = json.loads((out / "summary.json").read_text())
    assert evaluated["before"]["n"] == evaluated["after"]["n"] == 2
    assert printed.count("held-out accuracy before") == 2  # when it is known, and in the summary
    for said in ("held-out accuracy after", f"the result is {out / 'adapter'}"):
        assert printed.count(said) == 1
    assert printed.splitlines()[-1] == f"evaluate it with: python eval.py --ckpt {out}"
    assert "\x1b" not in printed


def test_the_resolved_settings_are_printed_once_and_stored_with_versions(whole):
    out, printed = whole
    stored = json.loads((out / "config.json").read_text())
    assert (stored["settings"]["learning_rate"], stored["settings"]["dtype"]) == (0.002, "float32")
    assert printed.count("learning_rate=0.002") == printed.count("dtype=float32") == 1
    assert stored["packages"]["jax"] == jax.__version__ and stored["packages"]["numpy"] == np.__version__
    assert stored["command"].startswith("python train.py --steps 7")


def test_a_run_that_was_interrupted_continues_bit_for_bit(whole, tmp_path, reward, monkeypatch):
    """Ctrl-C in step 2: it finishes the step, saves it, and prints the command that continues."""
    monkeypatch.setenv("SIGNAL_IN_CALL", f"{signal.SIGINT:d} 2")
    printed = run(*flags(out=tmp_path / "run", reward=reward))
    assert (checkpoint.steps(tmp_path / "run"), len(metrics(tmp_path / "run"))) == ([2], 2)
    monkeypatch.delenv("SIGNAL_IN_CALL")
    said, command = printed.splitlines()[-1].split("continue with: ")
    assert said == "stopped after step 2; " and "accuracy after" not in printed
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    run(*words)
    assert_same_run(tmp_path / "run", whole[0])


def test_a_run_interrupted_before_its_first_step_continues_too(whole, tmp_path, reward, monkeypatch):
    def interrupted(log, text, say=RunLog.say):
        say(log, text)
        if text.startswith("held-out accuracy before"):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "say", interrupted)
        printed = run(*flags(out=tmp_path / "run", reward=reward))
    assert "stopped after step 0" in printed and checkpoint.steps(tmp_path / "run") == [0]
    run("--resume", tmp_path / "run")
    assert_same_run(tmp_path / "run", whole[0])


def script(*argv, cache: Path, signal_in_call: str = "0 0"):
    """train.py as a process of its own, which computes just as this one."""
    env = os.environ | {
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "SIGNAL_IN_CALL": signal_in_call,
    }
    command = [sys.executable, "train.py", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=env, timeout=300, check=False)


@pytest.mark.slow
def test_kill_9_loses_the_steps_since_the_last_save_and_nothing_else(whole, cache, tmp_path, reward):
    """Killed in step 6 of 7 with a save at 3; then resumed, stopped by SIGTERM in step 5, and resumed to its end."""
    out = tmp_path / "run"
    killed = script(*flags(out=out, reward=reward), cache=cache, signal_in_call=f"{signal.SIGKILL:d} 6")
    assert killed.returncode == -signal.SIGKILL
    assert (checkpoint.steps(out), len(metrics(out))) == ([3], 5)
    stopped = script("--resume", out, cache=cache, signal_in_call=f"{signal.SIGTERM:d} 2")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert f"stopped after step 5; continue with: python train.py --resume {out}" in stopped.stdout
    assert checkpoint.steps(out) == [3, 5]
    run("--resume", out)
    assert_same_run(out, whole[0])


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    """A finished run that a test may change."""
    return Path(shutil.copytree(whole[0], tmp_path / "copied", symlinks=True))


def test_what_is_given_beside_resume_replaces_what_was_stored_even_by_a_default(copied):
    """The step to continue from is not remembered."""
    run("--resume", copied, "--resume-step", 6, "--steps", 6, "--save-every", 20)
    assert (settings_of(copied)["steps"], settings_of(copied)["save_every"]) == (6, 20)
    assert settings_of(copied)["max_completion_length"] == SMALL["--max-completion-length"]
    assert (checkpoint.steps(copied), len(metrics(copied))) == ([6, 7], 6)
    again = stored_settings(copied)
    assert (again.resume_step, again.out, again.steps) == (None, copied, 6)


def test_a_truncated_checkpoint_is_named_and_the_good_one_continues(copied, whole, capsys):
    damaged = copied / "checkpoints" / "00000007" / "adapter" / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    sentence = refusal(capsys, "--resume", copied)
    assert sentence.startswith(f"{damaged} is damaged")
    offered = sentence.split("continue from it with ")[1]
    assert offered == f"--resume {copied} --resume-step 6"
    run(*shlex.split(offered))
    assert_same_run(copied, whole[0])


def test_a_directory_that_holds_a_run_is_not_overwritten(copied, reward, capsys):
    content = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    sentence = refusal(capsys, *flags(out=copied, reward=reward, seed=1))
    assert sentence == (
        f"{copied} holds another run; choose another --out, or continue that run with --resume {copied}"
    )
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == content


def test_a_loss_that_is_not_finite_stops_the_run_with_the_state_before_it_saved(whole, tmp_path, reward, capsys):
    out = tmp_path / "run"
    sentence = refusal(capsys, *flags(out=out, reward=reward, learning_rate=1e38))
    (saved,) = checkpoint.steps(out)
    assert sentence.startswith(f"step {saved + 1}: the ") and "not finite; the update was not applied" in sentence
    assert sentence.endswith(f"the state before it is saved in {out}: try a lower --learning-rate")
    assert len(metrics(out)) == saved
    weights = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(np.isfinite(array).all() for array in weights.values())


ONE_ROW = [{"question": "How many?", "answer": 1}]
REFUSED = [
    (["--stepz", "3"], "train.py has no flag --stepz; did you mean --steps?"),
    (["--mesh", "2x4"], "--mesh 2x4: give two numbers, DATA,TENSOR, such as 2,4"),
    (["--mesh", "0,1"], "--mesh 0,1: both numbers must be at least 1"),
    (
        ["--mesh", "4,4"],
        "--mesh 4,4 needs 16 devices and there are 8; --virtual-devices 16 simulates them on a CPU",
    ),
    (
        ["--mesh", "4,1", "--prompts-per-step", "6"],
        "--prompts-per-step 6 cannot be split over the data axis of --mesh 4,1; use a multiple of 4",
    ),
    (
        ["--prompts-per-step", "6", "--micro-batch", "4"],
        "--micro-batch 4 does not divide the 6 prompts of a data shard (--prompts-per-step 6, --mesh 1,1)",
    ),
    (
        ["--mesh", "1,3"],
        "--mesh 1,3 cannot split the query heads, 4, into 3 parts; choose a tensor axis that divides 4",
    ),
    (["--num-generations", "1"], "--num-generations 1: a group of one has nothing to compare with; use at least 2"),
    (
        ["--model", "{tmp}/gone"],
        "{tmp}/gone is not a directory; pass a model directory, a name such as google/gemma-3-4b-it, or nano",
    ),
    (["--model", "{tmp}"], "{tmp} is not a model directory: it has no config.json"),
    (["--adapter", "{tmp}"], "{tmp}/adapter_config.json is missing or damaged"),
    (["--adapter", "{tmp}", "--lora-r", "0"], "--adapter continues an adapter, and --lora-r 0 trains whole weights"),
    (["--data", "{tmp}/gone.jsonl"], "'{tmp}/gone.jsonl' is no known dataset and no file or folder; known are"),
    (["--data", "{tmp}/empty.jsonl"], "{tmp}/empty.jsonl holds no rows"),
    (["--data", "{tmp}/one.jsonl"], "--data {tmp}/one.jsonl is too small: none of its rows is left to hold out"),
    (["--max-prompt-length", "5"], "training data: none of 24576 prompts is within --max-prompt-length 5; raise it"),
    (["--reward", "anwser"], "reward 'anwser' is unknown"),
    (["--resume", "{tmp}/gone"], "--resume {tmp}/gone: there is no run, since {tmp}/gone/config.json does not exist"),
    (["--resume", "{tmp}/foreign"], "--resume {tmp}/foreign: {tmp}/foreign/config.json is damaged or of another"),
    (["--train-vision"], "--train-vision trains whole weights, and --lora-r 16 an adapter; add --lora-r 0"),
    (["--lora-vision", "--lora-r", "0"], "--lora-vision adds adapters, and --lora-r 0 trains whole weights; use"),
    (["--config", "{tmp}/gone.toml"], "--config {tmp}/gone.toml cannot be read: No such file or directory"),
]


@pytest.mark.parametrize(("argv", "sentence"), REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED])
def test_bad_input_ends_in_one_sentence(argv, sentence, tmp_path, capsys):
    """Nothing is written either."""
    write_rows(tmp_path / "empty.jsonl", [])
    write_rows(tmp_path / "one.jsonl", ONE_ROW)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"settings": {"stepz": 3}}')
    argv = [word.format(tmp=tmp_path) for word in argv]
    assert refusal(capsys, "--out", tmp_path / "run", *argv).startswith(sentence.format(tmp=tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_truncated_model_is_refused(tmp_path, capsys):
    model = Path(shutil.copytree(NANO_DIRECTORY, tmp_path / "model"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(weights) in refusal(capsys, *flags(out=tmp_path / "run", model=model))


@pytest.mark.slow
def test_the_script_refuses_without_a_traceback(cache, tmp_path):
    done = script("--mesh", "4,4", "--out", tmp_path / "run", cache=cache)
    assert (done.returncode, done.stderr.count("\n"), done.stderr[:20]) == (2, 1, "error: --mesh 4,4 ne")


def test_a_toml_file_sets_what_flags_do_not(tmp_path, reward):
    config = tmp_path / "my.toml"
    config.write_text(f'steps = 9\nseed = 5\nreward = "{reward}"\nepsilon = 0.5\neval-every = 3\n')
    run(*flags(out=tmp_path / "run", config=config))
    stored = settings_of(tmp_path / "run")
    assert (stored["steps"], stored["seed"], stored["epsilon"]) == (STEPS, 5, 0.5)
    measured = [line for line in metrics(tmp_path / "run") if "eval/accuracy" in line]
    assert all(line["eval/accuracy_low"] <= line["eval/accuracy"] <= line["eval/accuracy_high"] for line in measured)
    evaluated = [line["step"] for line in measured]
    assert evaluated == [3, 6]


def dots(folder: Path, count: int):
    """Rows with an image each, as users write them."""
    for i in range(count):
        Image.new("RGB", (40, 30), (20 * i, 90, 40)).save(folder / f"{i}.png")
        yield {"id": f"own-{i}", "question": "How many dots are there?", "answer": i, "image": f"{i}.png"}


def test_own_data_with_images(tmp_path, reward):
    data = write_rows(tmp_path / "my.jsonl", dots(tmp_path, 10))
    run(*flags(out=tmp_path / "run", data=data, reward=reward))
    samples = lines(tmp_path / "run" / "samples.jsonl")
    assert all("<start_of_image>How many dots" in group["prompt"] for group in samples)
    assert {group["id"] for group in samples} <= {f"own-{i}" for i in range(10)}
    assert samples[0]["answer"] == samples[0]["id"].removeprefix("own-")


def test_own_preferences(tmp_path):
    rows = [{"question": f"Which of {i}?", "chosen": f"1 red. {i}", "rejected": "2 blue."} for i in range(10)]
    data = write_rows(tmp_path / "my.jsonl", rows)
    run(*flags(out=tmp_path / "run", data=data))
    for group in lines(tmp_path / "run" / "samples.jsonl"):
        chosen, rejected = group["completions"]
        assert (chosen["reward"], rejected["reward"]) == (1.0, 0.0)
        assert chosen["text"].startswith("1 red.") and chosen["advantage"] == -rejected["advantage"] > 0
    assert all(line["grad_norm"] > 0 for line in metrics(tmp_path / "run"))


def test_gsm8k(shared_data, tmp_path, reward):
    run(*flags(out=tmp_path / "run", data=shared_data / "gsm8k", reward=reward, eval_limit=20))
    assert len(lines(tmp_path / "run" / "samples.jsonl")) == 2 * STEPS


def test_mathvista_comes_with_its_licence_first(shared_data, tmp_path, reward):
    data = shared_data / "mathvista" / "testmini_standin.parquet"
    printed = run(*flags(out=tmp_path / "run", data=data, reward=reward, eval_limit=20))
    assert printed.index(TRAINING_NOTICE) < printed.index("held-out accuracy before")
    assert len(lines(tmp_path / "run" / "samples.jsonl")) == 2 * STEPS


def test_a_mesh_changes_neither_samples_nor_metrics(whole, tmp_path, reward, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # to which --virtual-devices adds
    run(*flags(out=tmp_path / "run", reward=reward, mesh="2,4", virtual_devices=8, steps=1, micro_batch=1))
    (first,), expected = metrics(tmp_path / "run"), metrics(whole[0])[0]
    first, expected = ({k: np.nan if v is None else v for k, v in line.items()} for line in (first, expected))
    assert first == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
    assert_same_samples(lines(tmp_path / "run" / "samples.jsonl"), lines(whole[0] / "samples.jsonl")[:2])


def test_dynamic_sampling_counts_the_prompts_it_draws(whole, tmp_path, monkeypatch):
    """If all rewards are equal, it takes prompts up to its cap, and the run continues after all of them."""
    constant = tmp_path / "constant.py"
    constant.write_text("def one(completion, example):\n    return 1.0\n")
    run(*flags(out=tmp_path / "run", reward=f"{constant}:one", dynamic_sampling=2, save_every=1))
    found = metrics(tmp_path / "run")
    assert [line["prompts_drawn"] for line in found] == [6] * STEPS
    assert all(line["frac_reward_zero_std"] == 1 and line["grad_norm"] == 0 for line in found)
    samples = (tmp_path / "run" / "samples.jsonl").read_bytes()
    run("--resume", tmp_path / "run", "--resume-step", STEPS - 1)
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == samples


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A model made from nothing by supervised training on the embedded task."""
    out = tmp_path_factory.mktemp("taught") / "run"
    run(*flags(out=out, objective="sft", model="scratch", lora_r=0, max_completion_length=64))
    return out


def test_supervised_training_makes_a_model_from_nothing(taught):
    found = metrics(taught)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1)) and found[-1]["loss"] < found[0]["loss"]
    assert not (taught / "samples.jsonl").exists() and not (taught / "adapter").exists()


def test_its_directory_is_a_model_here_and_in_transformers(taught):
    """Its tokenizer is the same one too."""
    example = synthetic("test", 9, 0)[0]
    hf = AutoModelForImageTextToText.from_pretrained(taught / "model", dtype=torch.float32).eval()
    ours, theirs = logits_of_both(taught / "model", None, hf, example)
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    config = read_config(taught / "model")
    text = "<reasoning>2 red, 3 blue.</reasoning>"
    tokenizer = AutoTokenizer.from_pretrained(taught / "model")
    assert tokenizer.encode(text, add_special_tokens=False) == load_tokenizer(taught / "model", config).encode(text)


def test_all_weights_train_against_a_frozen_copy(taught, tmp_path, reward):
    """GRPO without LoRA from the taught model; the second update on a step's samples is off-policy."""
    run(
        *flags(
            out=tmp_path / "run",
            model=taught / "model",
            reward=reward,
            lora_r=0,
            beta=0.04,
            num_iterations=2,
            max_completion_length=64,
        )
    )
    found = metrics(tmp_path / "run")
    assert all(line["kl"] > 0 and line["ratio/mean"] != 1.0 for line in found)
    before, after = (load_checkpoint(out / "model")[1] for out in (taught, tmp_path / "run"))
    assert not np.array_equal(before.text.embedding, after.text.embedding)
    jax.tree.map(np.testing.assert_array_equal, before.vision, after.vision)


def logits_of_both(directory: Path, lora: Lora | None, hf, example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Our and transformers' logits of an example's prompt with its images."""
    config, params = load_checkpoint(directory)
    prompt = Reader(Model(config, make_mesh(1, 1)), load_tokenizer(directory, config), "bare", "answer")(example)
    ids, pixels = torch.tensor([prompt.ids]), torch.tensor(np.stack(prompt.images)).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = hf(
            input_ids=ids, pixel_values=pixels / 127.5 - 1.0, token_type_ids=(ids == config.image_token_id).int()
        ).logits
    ours = forward(Policy(params, lora), ids.numpy(), [prompt.images], config=config)
    return np.asarray(ours), theirs.numpy()


def test_the_adapter_works_in_peft_and_changes_the_model(whole):
    example = next(example for example in synthetic("test", 9, 0) if example.images)
    hf = AutoModelForImageTextToText.from_pretrained(NANO_DIRECTORY, dtype=torch.float32).eval()
    base, _ = logits_of_both(NANO_DIRECTORY, None, hf, example)
    adapted = peft.PeftModel.from_pretrained(hf, whole[0] / "adapter").eval()
    lora = load_adapter(whole[0] / "adapter", read_config(NANO_DIRECTORY))
    ours, theirs = logits_of_both(NANO_DIRECTORY, lora, adapted, example)
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
    assert np.abs(ours - base).max() > 1e-3


@pytest.mark.slow
def test_the_default_run_learns(tmp_path):
    """What a new user starts, with no flag but --out: for numbers it never trained on, most answers become right.

    With blank images it can only guess, before and after: the best constant answers get 21%.
    """
    run = tmp_path / "run"

    def call(*command) -> None:
        environment = os.environ | {"XLA_FLAGS": ""}
        subprocess.run([sys.executable, *command], cwd=PROJECT, env=environment, check=True, stdout=subprocess.DEVNULL)

    call("train.py", "--out", run)
    figures = json.loads((run / "summary.json").read_text())
    assert figures["after"]["accuracy"] >= max(0.85, figures["before"]["accuracy"] + 0.2)
    rewards = [line["reward"] for line in metrics(run)]
    assert np.mean(rewards[-20:]) > np.mean(rewards[:20]) + 0.1
    call("eval.py", "--ckpt", run, "--images", "blank")
    blank = json.loads((run / "eval.json").read_text())
    assert all(blank[model]["by"]["kind"]["image"]["accuracy"] < 0.25 for model in ("base", "adapter"))
