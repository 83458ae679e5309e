"""Several processes are one run: the same samples and numbers; the end of one ends all; any number can continue it.

Processes of this machine, with simulated devices, talk over the loopback address. Each script is train.py itself.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from oracle import assert_same_samples
from test_train import REWARD, lines, metrics

from gemma3.mesh import make_mesh
from grpo.rollout import split_over_data
from grpo.run import processes
from grpo.run.processes import agree, connect, exchange, held_rows, of_all_rows, rows_on_host, to_first
from grpo.run.settings import Settings

PROJECT = Path(__file__).parents[1]
STEPS, SAVE_EVERY = 4, 2
FLAGS = {
    **{"--steps": STEPS, "--save-every": SAVE_EVERY, "--warmup-steps": 1, "--temperature": 1.5},
    **{"--prompts-per-step": 4, "--num-generations": 2, "--max-completion-length": 16, "--micro-batch": 1},
    # Constant, since a run that is continued with other --steps decays at another pace.
    **{"--learning-rate": 0.0002, "--lr-scheduler": "constant", "--eval-limit": 3, "--eval-batch": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "my.py").write_text(REWARD)
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(
    folder: Path, count: int, devices: int, *words, kill: int | None = None, seeds: tuple[int, int] = (0, 0)
) -> list[subprocess.Popen]:
    """`count` processes of one run with `devices` devices each; process `kill` ends itself by SIGKILL in step 3."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    several = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(count)] if count > 1 else []
    return [
        subprocess.Popen(
            [
                *(sys.executable, "train.py", *map(str, words), "--virtual-devices", str(devices)),
                *(several and [*several, "--process-id", str(i), "--seed", str(seeds[i])]),
            ],
            cwd=PROJECT,
            env=environment | {"SIGNAL_IN_CALL": "9 3" if i == kill else "0 0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def wait(started: list[subprocess.Popen], seconds: float = 300) -> list[SimpleNamespace]:
    """What each process printed, and its exit code; none outlives this."""
    end = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=max(1, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
    return [SimpleNamespace(out=o, err=e, code=p.returncode) for (o, e), p in zip(outputs, started, strict=True)]


def flags(folder: Path, out: Path, mesh: str) -> list:
    given = FLAGS | {"--out": out, "--mesh": mesh, "--reward": f"{folder / 'my.py'}:spread"}
    return [word for pair in given.items() for word in pair]


def finished(ended: list[SimpleNamespace]) -> list[SimpleNamespace]:
    assert [process.code for process in ended] == [0] * len(ended), "\n".join(process.err for process in ended)
    return ended


@pytest.fixture(scope="module")
def two(folder) -> Path:
    """A run of two processes with four devices each."""
    first, second = finished(wait(start(folder, 2, 4, *flags(folder, folder / "two", "2,4"))))
    assert "the result is" in first.out and "process 1 of 2 waits for the others" in second.out
    assert "held-out accuracy" not in second.out
    return folder / "two"


def assert_close_runs(one: Path, other: Path) -> None:
    """The same samples, and metrics equal to float32 rounding."""
    assert_same_samples(lines(one / "samples.jsonl"), lines(other / "samples.jsonl"))
    for found, expected in zip(metrics(one), metrics(other), strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            missing = np.nan if value is None else value
            shown = np.nan if found[name] is None else found[name]
            assert shown == pytest.approx(missing, rel=2e-3, abs=2e-5, nan_ok=True), name
    accuracies = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    assert accuracies[0] == accuracies[1]


@pytest.mark.slow
def test_two_processes_are_one(folder, two):
    """Against one process with all eight devices: samples, metrics, accuracies, images and the adapter's files."""
    finished(wait(start(folder, 1, 8, *flags(folder, folder / "one", "2,4"))))
    assert_close_runs(two, folder / "one")
    files = [sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()) for run in (two, folder / "one")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_where_one_process_is_killed_the_other_says_so_and_any_mesh_goes_on(folder, two):
    """Killed in the third step, continued from the save after the second: by two processes, and by one device."""
    out = folder / "killed"
    first, second = wait(start(folder, 2, 4, *flags(folder, out, "2,4"), kill=1))
    assert second.code == -9 and first.code == 1
    assert "lost another one" in first.err and "--resume" in first.err and "Traceback" not in first.err
    assert [line["step"] for line in metrics(out)] == [1, 2]
    shutil.copytree(out, folder / "on one", symlinks=True)
    finished(wait(start(folder, 2, 4, "--resume", out)))
    assert_close_runs(out, two)
    finished(wait(start(folder, 1, 1, "--resume", folder / "on one", "--mesh", "1,1", "--steps", STEPS - 1)))
    finished(wait(start(folder, 1, 8, "--resume", folder / "on one", "--mesh", "2,4", "--steps", STEPS)))
    assert [line["step"] for line in metrics(folder / "on one")] == [1, 2, 3, 4]
    assert_close_runs(folder / "on one", two)


@pytest.mark.slow
def test_processes_that_do_not_agree_stop_in_a_sentence(folder):
    for process in wait(start(folder, 2, 4, *flags(folder, folder / "differ", "2,4"), seeds=(0, 3))):
        assert process.code == 2 and "Traceback" not in process.err
        assert "error: process 1 was started with --seed 3 and process 0 with 0" in process.err


@pytest.mark.slow
def test_a_mesh_that_leaves_devices_of_some_process_idle_is_refused(folder):
    for process in wait(start(folder, 2, 4, *flags(folder, folder / "idle", "1,4"))):
        assert process.code == 2
        assert "error: --mesh 1,4 leaves some of the 8 devices of 2 processes idle; choose" in process.err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("host:1", None, 0), "--num-processes is missing"),
        ((None, 2, None), "--coordinator, --process-id is missing"),
        (("host:1", 2, 2), "--process-id 2: it must be from 0 to 1"),
        (("host", 2, 1), "--coordinator host: give the address of process 0 as HOST:PORT"),
    ],
)
def test_addresses_that_cannot_be_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        connect(*given)


def test_where_no_one_is_at_the_address_the_user_is_told(monkeypatch, capsys):
    monkeypatch.setattr(processes, "_JOIN_SECONDS", 0)
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(RuntimeError, match=f"--coordinator {address}: process 0 does not answer there"):
        connect(address, 2, 1)
    assert capsys.readouterr().out == f"process 1 of 2 waits for the others at {address}\n"


def test_settings_must_agree_but_for_the_directory(monkeypatch):
    """A directory that was not given has the time in its name, and that of process 0 counts."""
    own = Settings(out=Path("runs/b"), process_id=1)
    everyone = {0: {"out": "runs/a", "seed": "0"}, 1: {"out": "runs/b", "seed": "0"}}
    monkeypatch.setattr(processes, "exchange", lambda records: everyone)
    assert agree(own) == Settings(out=Path("runs/a"), process_id=1)
    everyone[1]["seed"] = "3"
    with pytest.raises(ValueError, match="process 1 was started with --seed 3 and process 0 with 0"):
        agree(own)


def test_one_process_holds_all_rows_and_has_no_one_to_ask():
    mesh = make_mesh(4, 2)
    assert held_rows(5, mesh) == [0, 1, 2, 3, 4]
    array = np.arange(24).reshape(8, 3)
    np.testing.assert_array_equal(rows_on_host(split_over_data(array, mesh)), array)
    assert exchange({3: "c", 1: "a"}) == {3: "c", 1: "a"}
    tree = {"x": jax.numpy.ones(3)}
    assert to_first(tree) is tree


def test_columns_come_back_in_the_rows_order_as_what_they_were():
    texts, rewards = [["c", "d"], ["a", "b"]], np.array([[3, np.nan], [1, 2]], np.float32)
    correct, lengths = np.array([True, False]), np.array([9, 7])
    found = of_all_rows([2, 0], texts, rewards, correct, lengths)
    assert found[0] == [["a", "b"], ["c", "d"]]
    for column, values in zip(found[1:], (rewards, correct, lengths), strict=True):
        np.testing.assert_array_equal(column, values[::-1], strict=True)
