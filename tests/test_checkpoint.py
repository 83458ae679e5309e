"""Checkpoints come back bit for bit, are whole after kill -9 at any moment, and are refused if damaged or foreign."""

import itertools
import multiprocessing
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from gemma3.files.adapter import load_adapter
from gemma3.files.published import NANO
from gemma3.files.weights import load_checkpoint
from gemma3.lora import LoraConfig, init_lora
from gemma3.mesh import Model, make_mesh
from gemma3.params import Params, Text, param_shapes
from grpo.run import checkpoint
from grpo.run.checkpoint import restore, save, steps
from grpo.update import TrainState, init_state

CONFIG = replace(NANO, num_layers=2, layer_types=NANO.layer_types[-2:], hidden_size=32, intermediate_size=24)
# alpha / sqrt(3) has no short decimal.
LORA = LoraConfig(3, 5.0, rslora=True, targets=("q", "v", "down"))
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
EXTRA = {"seed": 7, "cursor": [3, 14], "note": "é"}


def random_params(seed: int, config=CONFIG) -> Params:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), param_shapes(config))


VISION = random_params(1).vision


def on_mesh(tree, model: Model):
    return jax.device_put(tree, jax.tree.map(partial(NamedSharding, model.mesh), model.specs(tree)))


def fresh(kind: str, model: Model, *, seed: int = 0, lora=LORA) -> TrainState:
    """The start of a training with the optimizer's state; kind: "adapter", "both towers", "text" or "params"."""
    if kind in ("adapter", "both towers"):
        lora = replace(lora, vision=kind == "both towers" or lora.vision)
        trainable = on_mesh(init_lora(jax.random.key(seed), model.config, lora), model)
    else:
        params = on_mesh(random_params(seed, model.config), model)
        trainable = params if kind == "params" else params.text
    return init_state(trainable, OPTIMIZER, model)


@jax.jit
def train(state: TrainState) -> TrainState:
    """A step whose gradient depends on the weights, so that a lost bit would grow."""
    grads = jax.tree.map(lambda x: jnp.sin(7 * x) + 0.1, state.trainable)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.trainable)
    return TrainState(optax.apply_updates(state.trainable, updates), opt_state)


def trained(kind: str, model: Model, count: int = 2) -> TrainState:
    state = fresh(kind, model)
    for _ in range(count):
        state = train(state)
    return state


def assert_identical(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def base_model(tmp_path) -> str:
    directory = tmp_path / "base"
    directory.mkdir()
    for name in (
        "tokenizer.model",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "README.md",
    ):
        (directory / name).write_text(name)
    return str(directory)


@pytest.fixture
def save_at(tmp_path, base_model):
    """save(run, step, state) with the rest filled in; `keep` defaults to 2."""

    def at(run, step, state, **changes):
        settings = {
            "config": CONFIG,
            "frozen_vision": VISION if isinstance(state.trainable, Text) else None,
            "base_model": base_model,
            "extra": EXTRA,
            "keep": 2,
        }
        return save(run, step, state, **settings | changes)

    return at


@pytest.fixture
def model():
    return Model(CONFIG, make_mesh(1, 1))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("adapter", (1, 1)), ("adapter", (2, 4)), ("both towers", (2, 4)), ("text", (2, 4)), ("params", (1, 1))],
)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, save_at, kind, shape):
    model = Model(CONFIG, make_mesh(*shape))
    state = trained(kind, model)
    directory = save_at(tmp_path, 2, state)
    assert directory == tmp_path / "checkpoints" / "00000002"
    template = fresh(kind, model, seed=5)
    restored, extra, step = restore(tmp_path, template, model=model)
    assert_identical(restored, state)
    assert (extra, step) == (EXTRA, 2)
    for x, like in zip(jax.tree.leaves(restored.trainable), jax.tree.leaves(template.trainable), strict=True):
        assert x.sharding == like.sharding
    for x in jax.tree.leaves(restored.opt_state):
        assert x.sharding.mesh == model.mesh


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_a_resumed_training_equals_one_that_was_not_stopped(tmp_path, save_at, shape):
    model = Model(CONFIG, make_mesh(*shape))
    save_at(tmp_path, 2, trained("adapter", model, 2))
    state, *_ = restore(tmp_path, fresh("adapter", model), model=model)
    for _ in range(3):
        state = train(state)
    assert_identical(state, trained("adapter", model, 5))


def test_the_link_leads_to_the_newest_adapter_also_when_the_run_is_moved(tmp_path, save_at, model):
    run = tmp_path / "run"
    for count in (1, 2):
        save_at(run, count, trained("adapter", model, count), rslora=True)
    moved = run.rename(tmp_path / "moved")
    adapter = load_adapter(moved / "adapter", CONFIG)
    assert_identical(adapter.blocks, trained("adapter", model, 2).trainable.blocks)
    assert adapter.scale == pytest.approx(LORA.scale, rel=1e-8)
    assert '"lora_alpha": 5,' in (moved / "adapter" / "adapter_config.json").read_text()


def test_the_whole_model_is_a_model_directory_with_its_tokenizer(tmp_path, save_at, model):
    state = trained("text", model)
    save_at(tmp_path / "run", 2, state)
    config, params = load_checkpoint(tmp_path / "run" / "model")
    assert config == CONFIG
    assert_identical(params, Params(state.trainable, VISION))
    copied = {"tokenizer.model", "tokenizer_config.json", "preprocessor_config.json"}
    names = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert names == copied | {"model.safetensors", "config.json", "generation_config.json"}
    assert (tmp_path / "run" / "model" / "tokenizer.model").read_text() == "tokenizer.model"


def test_the_newest_are_kept(tmp_path, save_at, model):
    state = trained("adapter", model)
    for step in (1, 5, 12, 13):
        save_at(tmp_path, step, state, keep=3)
    assert steps(tmp_path) == [5, 12, 13]
    save_at(tmp_path, 14, state, keep=1)
    assert steps(tmp_path) == [14]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000014"]


def test_saving_an_earlier_step_ends_the_history_after_it(tmp_path, save_at, model):
    """A run continued from step 1 must not be resumed at the old step 3."""
    for count in (1, 2, 3):
        save_at(tmp_path, count, trained("adapter", model, 0), keep=3)
    save_at(tmp_path, 2, trained("adapter", model, 2), keep=3)
    assert steps(tmp_path) == [1, 2]
    state, _, step = restore(tmp_path, fresh("adapter", model), model=model)
    assert step == 2
    assert_identical(state, trained("adapter", model, 2))


def test_any_saved_step_can_be_restored(tmp_path, save_at, model):
    for count in (1, 2):
        save_at(tmp_path, count, trained("adapter", model, count))
    state, _, step = restore(tmp_path, fresh("adapter", model), model=model, step=1)
    assert step == 1
    assert_identical(state, trained("adapter", model, 1))


def test_a_save_that_fails_leaves_the_run_as_it_was(tmp_path, save_at, model, monkeypatch):
    save_at(tmp_path, 1, trained("adapter", model, 1))

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(OSError, match="No space left"):
        save_at(tmp_path, 2, trained("adapter", model, 2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001"]
    assert (tmp_path / "adapter").resolve() == tmp_path / "checkpoints" / "00000001" / "adapter"


def test_keep_must_leave_one(tmp_path, save_at, model):
    with pytest.raises(ValueError, match=r"--keep 0: at least 1"):
        save_at(tmp_path, 1, trained("adapter", model, 1), keep=0)


def at_step(state: TrainState, step: int) -> TrainState:
    """A state whose every number tells the step it belongs to."""
    return jax.tree.map(lambda x: np.asarray(x) + np.asarray(step, x.dtype), state)


def save_forever(run: Path, state: TrainState, ready) -> None:
    """Save step after step until killed. Runs in its own process, on numpy arrays only."""
    for step in itertools.count(steps(run)[-1] + 1):
        save(
            *(run, step, at_step(state, step)),
            **{"config": CONFIG, "frozen_vision": None, "base_model": "nano", "extra": {"step": step}, "keep": 2},
        )
        ready.send(step)


@pytest.fixture
def processes():
    """Processes that start in milliseconds: forked from one that has imported this code and does nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grpo.run.checkpoint", "pytest"])
    return context


def test_kill_9_at_a_random_moment_of_a_save_always_leaves_a_loadable_run(tmp_path, save_at, model, processes):
    rng = np.random.default_rng(0)
    template = fresh("adapter", model)
    state = at_step(template, 0)
    save_at(tmp_path, 1, at_step(state, 1))
    interrupted = 0
    for _ in range(20):
        theirs, ours = processes.Pipe()
        process = processes.Process(target=save_forever, args=(tmp_path, state, ours))
        process.start()
        assert theirs.poll(60), "the process never saved anything"
        ours.close()
        process.join(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        told = []
        while theirs.poll():
            try:
                told.append(theirs.recv())
            except EOFError:
                break
        interrupted += any((tmp_path / "checkpoints").glob(".[0-9]*"))

        restored, extra, step = restore(tmp_path, template, model=model)
        assert step >= told[-1], "a save that returned is not lost"
        assert extra == {"step": step}
        assert_identical(restored, at_step(template, step))
        linked = load_adapter(tmp_path / "adapter", CONFIG)
        assert any(np.array_equal(linked.blocks.q.a, at_step(state.trainable.blocks.q.a, s)) for s in steps(tmp_path))
    assert interrupted >= 5, "most kills should fall within a save"
    save_at(tmp_path, step + 1, at_step(state, step + 1))
    assert not any((tmp_path / "checkpoints").glob(".*")), "the next save clears what the kills left"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


FILES = (
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "state/SHA256SUMS",
    "state/arrays.safetensors",
    "state/state.msgpack",
)


@pytest.fixture
def two_steps(tmp_path, save_at, model):
    """A run with checkpoints 10 and 20."""
    for step in (10, 20):
        save_at(tmp_path, step, trained("adapter", model))
    return tmp_path


def refusal(run: Path, template: TrainState, model: Model, step=None) -> str:
    with pytest.raises(ValueError) as error:
        restore(run, template, model=model, step=step)
    return str(error.value)


def test_the_files_of_a_checkpoint_are_those_that_get_damaged_below(two_steps):
    directory = two_steps / "checkpoints" / "00000020"
    assert sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()) == list(FILES)


@pytest.mark.parametrize("damage", [cut, flip, empty, Path.unlink])
def test_damage_to_any_file_is_named_and_the_good_checkpoint_offered(two_steps, model, damage):
    directory = two_steps / "checkpoints" / "00000020"
    for name in FILES:
        shutil.copytree(directory, two_steps / "copy")
        damage(directory / name)
        message = refusal(two_steps, fresh("adapter", model), model)
        # If the list of checksums is damaged, the message may name a file that no longer matches the list.
        named = "00000020" if name.endswith("SUMS") else f"00000020/{name} is "
        assert named in message
        assert message.endswith(f"step 10 is good: continue from it with --resume {two_steps} --resume-step 10")
        shutil.rmtree(directory)
        (two_steps / "copy").rename(directory)


def test_where_no_checkpoint_is_good_none_is_offered(two_steps, model):
    for step in (10, 20):
        cut(two_steps / "checkpoints" / f"{step:08}" / "state" / "arrays.safetensors")
    message = refusal(two_steps, fresh("adapter", model), model)
    assert "00000020/state/arrays.safetensors is damaged" in message
    assert message.endswith(f"no other checkpoint in {two_steps} could be used in its place")


def test_a_later_checkpoint_is_offered_for_a_damaged_earlier_one(two_steps, model):
    cut(two_steps / "checkpoints" / "00000010" / "state" / "arrays.safetensors")
    assert "--resume-step 20" in refusal(two_steps, fresh("adapter", model), model, step=10)


@pytest.mark.parametrize(
    ("lora", "held", "trains"),
    [
        (replace(LORA, r=4), "rank 3 and scale 2.88675 on q, v, down", "rank 4 and scale 2.5 on q, v, down"),
        (replace(LORA, alpha=6.0), "rank 3 and scale 2.88675", "rank 3 and scale 3.4641"),
        (replace(LORA, targets=("q",)), "on q, v, down", "on q;"),
        (replace(LORA, vision=True), "on q, v, down,", "on q, v, down and the vision tower's query, key, value, out"),
    ],
)
def test_another_adapter_is_refused(two_steps, model, lora, held, trains):
    message = refusal(two_steps, fresh("adapter", model, lora=lora), model)
    assert held in message and trains in message


@pytest.mark.parametrize(
    ("kind", "words"), [("text", "trains the language model;"), ("params", "trains language model and vision tower;")]
)
def test_whole_weights_do_not_continue_an_adapter(two_steps, model, kind, words):
    message = refusal(two_steps, fresh(kind, model), model)
    assert "holds a LoRA adapter of rank 3" in message and words in message


def test_another_model_is_refused(two_steps, model):
    other = Model(replace(CONFIG, intermediate_size=40), model.mesh)
    message = refusal(two_steps, fresh("adapter", other), other)
    assert "00000020 is of another model: intermediate_size is 24 there and 40 here" in message


def test_another_optimizer_is_refused(two_steps, model):
    trainable = fresh("adapter", model).trainable
    message = refusal(two_steps, TrainState(trainable, optax.sgd(0.1, momentum=0.9).init(trainable)), model)
    assert "00000020/state/arrays.safetensors is of another optimizer" in message


def test_another_format_is_refused(tmp_path, save_at, model, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save_at(tmp_path, 1, trained("adapter", model))
    monkeypatch.undo()
    message = refusal(tmp_path, fresh("adapter", model), model)
    assert "state.msgpack has format 2, and this version reads format 1" in message


def test_a_step_that_was_not_saved_is_refused(two_steps, model):
    message = refusal(two_steps, fresh("adapter", model), model, step=15)
    assert message == f"{two_steps} has no checkpoint of step 15; it has 10, 20"


def test_a_directory_without_checkpoints_is_refused(tmp_path, model):
    assert refusal(tmp_path, fresh("adapter", model), model) == f"{tmp_path} holds no checkpoint to continue from"


def test_a_stray_name_is_no_checkpoint(two_steps):
    (two_steps / "checkpoints" / "notes").mkdir()
    (two_steps / "checkpoints" / ".00000030.new").mkdir()
    assert steps(two_steps) == [10, 20]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_sha256sum_can_check_a_checkpoint(two_steps):
    directory = two_steps / "checkpoints" / "00000020"
    check = partial(subprocess.run, ["sha256sum", "-c", "--quiet", "state/SHA256SUMS"], cwd=directory, check=False)
    assert check().returncode == 0
    cut(directory / "state" / "arrays.safetensors")
    assert check(capture_output=True).returncode == 1


def test_the_rest_of_the_state_is_plain_msgpack(two_steps):
    content = msgpack.unpackb((two_steps / "checkpoints" / "00000020" / "state" / "state.msgpack").read_bytes())
    assert (content["step"], content["extra"], content["config"]["vocab_size"]) == (20, EXTRA, 448)
    assert content["arrays"]["1.0.count"] == "int32[]"
    assert content["arrays"]["1.0.mu.blocks.q.a"] == "float32[2, 32, 3]"
