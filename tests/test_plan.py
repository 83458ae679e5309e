"""A plan compiles what a run would call, counts what lies on a device, and finds a run that fits."""

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest
from rich.console import Console

import grpo.groups
import grpo.rollout
import grpo.sft
import grpo.step
import grpo.trainer
from gemma3.config import layer_pattern
from gemma3.files.published import CONFIGS, NANO
from gemma3.mesh import Model, make_mesh
from grpo.plan import plan
from grpo.plan.plan import chip_of, choose_backend, compile_programs, find_fitting, make_job, print_plan, verdict
from grpo.plan.programs import Job, Memory, Program, State, abstract_state, programs
from grpo.reader import read_rows
from grpo.run.settings import Settings, resolve_defaults
from grpo.run.setup import prepare
from grpo.sft import sft_step
from grpo.step import grpo_step

GIB = 2**30
SMALL = {"prompts_per_step": 4, "num_generations": 3, "eval_limit": 4, "mesh": "2,2"}
FOUR_B = {"model": "google/gemma-3-4b-it", "mesh": "2,4", "plan": "v5e:2x4", "prompts_per_step": 8}


class Called(Exception):
    """Raised in place of a step's update."""


def described(tree) -> list:
    """Each array's place in the tree, shape, dtype, and the shape of a device's part where it is split."""

    def part(x):
        where = getattr(x, "sharding", None)
        return None if where is None or where.is_fully_replicated else where.shard_shape(x.shape)

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path), x.shape, x.dtype, part(x)) for path, x in leaves]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({}, ["images", "sampling", "update"]),
        (
            {"lora_vision": True, "num_iterations": 2, "beta": 0.1, "micro_batch": 1},
            ["images", "sampling", "old log-probs", "reference", "update"],
        ),
        ({"lora_r": 0, "train_vision": True}, ["images", "sampling", "update"]),
        ({"lora_r": 0, "beta": 0.1}, ["images", "sampling", "reference", "update"]),
        ({"objective": "sft", "lora_targets": ("q", "v")}, ["images", "update"]),
    ],
)
def test_programs_are_called_as_a_run_calls_them(flags, names, monkeypatch):
    """The arguments of a real step have the planned shapes, dtypes and splits; its settings are equal.

    A plan is for completions as long as the limit allows; a step on shorter ones cuts them.
    """
    for module in (grpo.groups, grpo.sft):
        monkeypatch.setattr(module, "rounded_up", lambda length, limit: limit)
    settings = resolve_defaults(Settings(**SMALL | flags))
    trainer, data, state = prepare(settings)
    calls = []

    def listen(module, name):
        function = getattr(module, name)

        def call(*arguments, **static):
            calls.append((function, arguments, static))
            if name == "update":
                raise Called
            return function(*arguments, **static)

        monkeypatch.setattr(module, name, call)

    listen(grpo.rollout, "encode_on_mesh")
    listen(grpo.rollout, "sample")
    listen(grpo.trainer, "completion_logps")
    listen(grpo.step, "update")
    listen(grpo.sft, "update")
    rows = read_rows(data.train, itertools.count(), trainer.reader, batch_size=4)
    with pytest.raises(Called):
        (sft_step if settings.objective == "sft" else grpo_step)(trainer, state, rows, 0)

    job = Job(settings, Model(NANO, make_mesh(2, 2)), None)
    planned = programs(job, abstract_state(job))
    assert [program.name for program in planned] == names
    for program, (function, arguments, static) in zip(planned, calls, strict=True):
        assert function is program.function
        assert described(arguments) == described(program.arguments)
        if program.name == "update":  # each optimizer is another closure
            static = {"learner": replace(static["learner"], optimizer=job.learner.optimizer)}
        assert static == program.static


def test_a_plan_prints_what_lies_on_a_device(capsys):
    """Nano on four simulated devices: the parts of the sampler's column add up to the whole."""
    print_plan(Settings(plan="cpu", mesh="2,2", num_generations=2))
    printed = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if "│" in line]
    column = {name.strip(): cell.strip() for name, _, cell, _ in rows}
    parts = ("frozen weights", "adapter and optimizer state", "keys and values", "other temporaries")
    total = sum(float(column[part]) for part in (*parts, "prompts and completions"))
    assert float(column["in all"]) == pytest.approx(total, abs=0.03) and total > 2
    assert "update needs the most memory" in printed and "Seconds are estimated for TPUs only" in printed


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"plan": "v5e"}, "--plan v5e is no TPU topology with known figures; name one such as v5e:2x4"),
        ({"plan": "tpu:2x4"}, "--plan tpu:2x4 is no TPU topology"),
        ({"plan": "gpu"}, "--plan gpu: jax sees no GPU here, only the cpu"),
        ({"plan": "cpu", "mesh": "3,4"}, "--mesh 3,4 needs 12 devices and there are 8"),
        ({"plan": "cpu", "mesh": "1,8"}, "--mesh 1,8 cannot split the query heads, 4, into 8 parts"),
        ({"plan": "cpu", "model": "gemma-3-1b-it", "lora_vision": True}, "--lora-vision adapts the vision tower"),
        ({"plan": "cpu", "mesh": "2,1", "prompts_per_step": 5}, "--prompts-per-step 5 cannot be split"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_sentence(flags, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        print_plan(Settings(**flags))


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, which knows the topologies, is not installed")
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"plan": "v5e:3x5"}, "v5e:3x5 is no topology of TPU chips; name one such as v5e:2x4"),
        ({"mesh": "4,4"}, "--mesh 4,4 needs 16 devices and v5e:2x4 has 8"),
        ({"mesh": "1,8"}, "--mesh 1,8 cannot split"),
        ({"prompts_per_step": 7}, "--prompts-per-step 7 cannot be split over the data axis of --mesh 2,4"),
    ],
)
def test_a_mesh_that_a_topology_cannot_hold_is_refused_before_compiling(flags, sentence, monkeypatch):
    monkeypatch.setattr("grpo.plan.programs.measure", None)
    if flags.get("mesh") == "1,8":
        flags = flags | {"model": "google/gemma-3-1b-it"}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        print_plan(Settings(**FOUR_B | flags))


def test_without_libtpu_its_pip_line_is_given(monkeypatch):
    monkeypatch.setattr("grpo.plan.programs.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install libtpu"):
        print_plan(Settings(**FOUR_B))


def test_chips_are_found_by_the_name_before_the_shape():
    assert chip_of("v5e:16x16").flops == 197e12 and chip_of("v6e:2x4").memory > 31 * GIB and chip_of("cpu") is None


def compiled_for(program: Program) -> dict:
    """What a program is compiled for, with the learner's fields one by one."""
    return program.static | (vars(program.static["learner"]) if program.name == "update" else {})


def sized(rule):
    """A stand-in for the compiler: a program needs as many bytes as `rule` says."""

    def measure(program: Program, state: State) -> Memory:
        return Memory(0, 0, rule(program), 0, 0.0, refused=False)

    return measure


@pytest.mark.parametrize(
    ("rule", "flags"),
    [
        (lambda p: 3 * compiled_for(p).get("micro_batch", 1), "--micro-batch 2"),
        (lambda p: p.arguments[1].ids.shape[0] if p.name == "sampling" else 1, "--micro-batch 1 --prompts-per-step 4"),
        (lambda p: compiled_for(p)["model"].mesh.shape["data"] * 4, "--micro-batch 1 --mesh 1,4"),
        (lambda p: 9, None),
    ],
    ids=["micro-batch", "prompts", "mesh", "nothing"],
)
def test_the_mildest_change_that_fits_is_found(rule, flags, monkeypatch):
    """There are seven bytes. First fewer prompts are taken at a time, then fewer prompts, then another mesh."""
    monkeypatch.setattr("grpo.plan.programs.measure", sized(rule))
    monkeypatch.setattr(plan, "device_memory", lambda: 7)
    settings = resolve_defaults(Settings(plan="cpu", mesh="2,2", prompts_per_step=8, micro_batch=4))
    console = Console(quiet=True)
    first = compile_programs(console, make_job(settings, NANO), {})
    assert first.too_large and verdict(first).startswith("does not fit: ")
    fitting = find_fitting(console, first)
    assert (fitting and plan.flags_of(fitting.job.settings, settings)) == flags


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, which holds the TPU compiler, is not installed")
def test_a_few_layers_of_4b_fit_eight_v5e_chips():
    """Two layers of 4b, Q=8, G=8, P=320 with an image, C=65, LoRA r=64, micro-batch 1: under 1.5 GiB a chip."""
    config = replace(CONFIGS["gemma-3-4b-it"], num_layers=2, layer_types=layer_pattern(2, 2))
    lengths = {"max_prompt_length": 320, "max_completion_length": 65}
    settings = resolve_defaults(choose_backend(Settings(**FOUR_B, **lengths, lora_r=64, data="mathvista")))
    compiled = compile_programs(Console(quiet=True), make_job(settings, config), {})
    assert not compiled.too_large and list(compiled.memory) == ["images", "sampling", "update"]
    assert all(memory.peak < 1.5 * GIB for memory in compiled.memory.values())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, which knows the topologies, is not installed")
def test_the_command_refuses_without_a_word_from_libraries():
    """It needs no weights either: the model is only named."""
    root = Path(__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS" and not k.startswith("TPU_")}
    command = [sys.executable, "train.py", "--model", "google/gemma-3-27b-it", "--mesh", "2,2", "--plan", "v5e:2x4"]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: --mesh 2,2 needs 4 devices and v5e:2x4 has 8\n"
