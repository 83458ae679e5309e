"""Command lines: every type of flag, TOML beneath flags, and bad input that ends in one sentence."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from grpo.run.cli import clean_errors, fail, flag, parse


@dataclass(frozen=True)
class Settings:
    steps: int = flag(100, "how long; 5% is a lot", topic="Run")
    out: Path | None = flag(None, "where")
    learning_rate: float | None = flag(1e-5, "how fast", topic="Optimizer")
    rslora: bool = flag(False, "another scale", topic="Model")
    bias: bool = flag(True, "with a bias")
    loss_type: str = flag("dapo", "how tokens weigh", ["grpo", "dapo", "cispo"], topic="Optimizer")
    lora_targets: tuple[str, ...] = flag(("q", "v"), "which layers", ["q", "k", "v"], topic="Model")

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps}: at least 1")


def run(*argv: str) -> Settings:
    return parse(Settings, argv, prog="python it.py", description="It.")


def refusal(capsys, *argv: str) -> str:
    """What bad input prints, checked to be one sentence on stderr and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    return err[len("error: ") : -1]


def test_no_flags_give_the_defaults():
    assert run() == Settings()


def test_each_type_is_read_from_its_flag():
    settings = run(
        *("--steps", "7", "--out", "runs/a", "--learning-rate=2e-4", "--rslora", "--no-bias"),
        *("--loss-type", "cispo", "--lora-targets", "k, v"),
    )
    assert settings == Settings(7, Path("runs/a"), 2e-4, True, False, "cispo", ("k", "v"))
    assert isinstance(settings.out, Path)


def test_none_is_a_value_where_a_field_may_be_none(capsys):
    assert run("--learning-rate", "none").learning_rate is None
    assert refusal(capsys, "--steps", "none") == "--steps is 'none', and must be a whole number"


def test_a_toml_file_gives_defaults_and_flags_override_it(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('steps = 7\nlearning-rate = 1\nrslora = true\nbias = false\nlora_targets = ["k"]\nout = "x"\n')
    settings = run("--config", str(path), "--steps", "9", "--no-rslora")
    assert settings == Settings(9, Path("x"), 1.0, False, False, "dapo", ("k",))
    assert isinstance(settings.learning_rate, float)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--stepz", "3"], "python it.py has no flag --stepz; did you mean --steps?"),
        (["--lora_targets=q"], "python it.py has no flag --lora_targets; did you mean --lora-targets?"),
        (["--no-bios"], "python it.py has no flag --no-bios; did you mean --no-bias?"),
        (["--step", "3"], "python it.py has no flag --step; did you mean --steps?"),
        (["--wholly-other"], "python it.py has no flag --wholly-other; --help lists them"),
        (["runs/a"], "'runs/a' belongs to no flag; every value follows a --flag, as --help shows"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "ten"], "--steps is 'ten', and must be a whole number"),
        (["--steps", "1.5"], "--steps is '1.5', and must be a whole number"),
        (["--learning-rate", "fast"], "--learning-rate is 'fast', and must be a number or none"),
        (["--loss-type", "gpo"], "--loss-type is 'gpo', and must be one of grpo, dapo, cispo; did you mean grpo?"),
        (["--lora-targets", "q,x"], "--lora-targets is 'x', and must be one of q, k, v"),
        (["--steps", "0"], "--steps 0: at least 1"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(capsys, argv, sentence):
    assert refusal(capsys, *argv) == sentence


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("step = 3", "{} has the unknown key step; did you mean steps?"),
        ("[optimizer]\nlearning-rate = 1.0", "{} has the unknown key optimizer"),
        ("steps = 1.5", "steps in {} is 1.5, and must be a whole number"),
        ("steps = true", "steps in {} is True, and must be a whole number"),
        ('steps = "3"', "steps in {} is '3', and must be a whole number"),
        ("rslora = 1", "rslora in {} is 1, and must be true or false"),
        ("out = 3", "out in {} is 3, and must be a path or none"),
        ("lora-targets = [1]", "lora_targets in {} is [1], and must be names separated by commas"),
        ('loss-type = "gpo"', "loss_type in {} is 'gpo', and must be one of grpo, dapo, cispo; did you mean grpo?"),
        ("steps = ", "--config {} is not valid TOML: Invalid value (at end of document)"),
    ],
)
def test_bad_toml_is_refused_in_one_sentence(capsys, tmp_path, content, sentence):
    path = tmp_path / "a.toml"
    path.write_text(content)
    assert refusal(capsys, "--config", str(path)) == sentence.format(path)


def test_a_missing_toml_file_is_named(capsys):
    assert refusal(capsys, "--config", "gone.toml") == "--config gone.toml cannot be read: No such file or directory"


def test_help_lists_every_flag_under_its_topic_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as stop:
        run("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    topics = [line[:-1] for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert topics == ["Run", "Optimizer", "Model", "Other"]
    sections = dict(zip(topics, text.split(":\n")[1:], strict=True))
    assert "--steps N" in sections["Run"] and "how long; 5% is a lot (default 100)" in sections["Run"]
    assert "how fast (default 1e-5)" in sections["Optimizer"]
    assert "how tokens weigh [grpo, dapo, cispo] (default dapo)" in sections["Optimizer"]
    assert "--rslora, --no-rslora" in sections["Model"] and "another scale (default off)" in sections["Model"]
    assert "(default q,v)" in sections["Model"] and "(default on)" in sections["Model"]
    assert "--config FILE" in sections["Other"]


def test_what_is_not_given_is_as_in_the_base():
    """A flag counts as given even if its value is the default of the class."""
    base = Settings(steps=7, rslora=True, lora_targets=("k",))
    read = parse(Settings, ["--steps", "100"], prog="python it.py", description="It.", base=base)
    assert read == Settings(steps=100, rslora=True, lora_targets=("k",))


def test_fail_prints_a_sentence_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        fail("it cannot be")
    assert (stop.value.code, capsys.readouterr()) == (2, ("", "error: it cannot be\n"))


@pytest.mark.parametrize("refusal", [ValueError, RuntimeError])
def test_clean_errors_turns_the_projects_own_refusals_into_a_sentence(capsys, refusal):
    @clean_errors()
    def main():
        raise refusal("the model is too small")

    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code, capsys.readouterr().err) == (2, "error: the model is too small\n")


def test_clean_errors_keeps_the_traceback_of_a_bug():
    with pytest.raises(ValueError, match="matmul"), clean_errors():
        np.ones((2, 3)) @ np.ones((2, 3))
    with pytest.raises(KeyError), clean_errors():
        raise KeyError("a bug")


def test_a_script_ends_without_a_traceback(tmp_path):
    code = "from tests.test_cli import run; run('--steps', 'ten')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "error: --steps is 'ten', and must be a whole number\n",
    )
