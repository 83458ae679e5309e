"""Saving a run and continuing it exactly: trained weights, optimizer state, and whatever else the loop needs.

    RUN/checkpoints/00000020/adapter/    a PEFT directory; without an adapter, model/: a Hugging Face directory
    RUN/checkpoints/00000020/state/      arrays.safetensors (optimizer), state.msgpack (the rest), SHA256SUMS
    RUN/adapter                          a link to the newest adapter/, or RUN/model

A checkpoint is written under a hidden name and renamed when it is on the disk. So a numbered one is complete.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import jax
import msgpack
import numpy as np
import optax
from safetensors import safe_open
from safetensors.numpy import save_file

from gemma3.config import Config
from gemma3.files.adapter import load_adapter, save_adapter
from gemma3.files.hub import files_beside_weights
from gemma3.files.weights import load_checkpoint, save_checkpoint
from gemma3.lora import VISION_TARGETS, Lora
from gemma3.mesh import Model
from gemma3.params import Params, Vision
from grpo.run.processes import is_first, to_first
from grpo.update import Trainable, TrainState

FORMAT = 1  # of state/; raise it for a change that older code cannot read


def _folder(run: Path) -> Path:
    return Path(run) / "checkpoints"


def steps(run: Path) -> list[int]:
    """The steps whose checkpoints were completely written, in order."""
    names = [path.name for path in _folder(run).glob("*")]
    return sorted(int(name) for name in names if re.fullmatch(r"\d{8,}", name))


def _describe(trainable: Trainable) -> str:
    """What is trained, in words. Trainings that could not exchange their arrays get different words."""
    if not isinstance(trainable, Lora):
        return "language model and vision tower" if isinstance(trainable, Params) else "the language model"
    vision = [name for name in trainable.pairs if name in VISION_TARGETS]
    adapted = ", ".join(name for name in trainable.pairs if name not in vision)
    adapted += f" and the vision tower's {', '.join(vision)}" if vision else ""
    return f"a LoRA adapter of rank {trainable.r} and scale {trainable.scale:g} on {adapted}"


def _model(config: Config) -> dict:
    """The config as msgpack will give it back: with lists for tuples."""
    return json.loads(json.dumps(asdict(config)))


def _named(tree) -> dict[str, jax.Array]:
    """The leaves of a pytree by their path, such as "1.0.mu.blocks.q.a"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _layout(tree) -> dict[str, str]:
    """Dtype and shape of every leaf by its path, such as "float32[2, 48, 8]"."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _named(tree).items()}


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(run: Path, target: Path) -> None:
    """Point RUN/adapter or RUN/model at `target`, in one atomic step."""
    name, new = run / target.name, run / f".{target.name}.new"
    new.unlink(missing_ok=True)
    new.symlink_to(target.relative_to(run))
    new.replace(name)


def _write_state(directory: Path, opt_state: optax.OptState, content: dict) -> None:
    """Write state/, with the checksums of all files; `sha256sum -c state/SHA256SUMS`, run in `directory`, checks it."""
    state = directory / "state"
    state.mkdir()
    arrays = {name: np.asarray(leaf, order="C") for name, leaf in _named(opt_state).items()}
    save_file(arrays, state / "arrays.safetensors")
    (state / "state.msgpack").write_bytes(msgpack.packb({"format": FORMAT, "arrays": _layout(opt_state), **content}))
    lines = [f"{_sha256(path)}  {path.relative_to(directory)}\n" for path in _files(directory)]
    (state / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def save(
    run: Path,
    step: int,
    state: TrainState,
    *,
    config: Config,
    frozen_vision: Vision | None,
    base_model: str,
    extra: dict,
    keep: int,
    rslora: bool = False,
) -> Path:
    """Write the checkpoint of `step`, point RUN/adapter or RUN/model at it, and return its directory.

    A crash at any moment leaves the earlier checkpoints and the link as they were. Saving deletes the checkpoints of
    later steps, which exist if the run was continued from an earlier one, all but the `keep` newest ones, and what a
    crash left behind. Every process calls this function, and the first one writes.

    frozen_vision: the vision tower to save with a trained `Text`, else None; base_model: name or directory of the model
    that was trained, whose tokenizer is saved with whole weights; extra: anything that msgpack can hold; rslora: how
    the adapter's file states its scale. ValueError for a `keep` below 1.
    """
    if keep < 1:
        raise ValueError(f"--keep {keep}: at least 1 checkpoint must stay")
    run, folder = Path(run), _folder(run)
    target = folder / f"{step:08}"
    whole = not isinstance(state.trainable, Lora | Params)
    (trainable, opt_state), frozen_vision = to_first((state, frozen_vision if whole else None))
    if not is_first():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".[0-9]*"):
        shutil.rmtree(leftover)
    new = folder / f".{step:08}.new"
    content = {
        "step": step,
        "base_model": base_model,
        "config": _model(config),
        "trained": _describe(trainable),
        "extra": extra,
    }
    try:
        new.mkdir()
        if isinstance(trainable, Lora):
            save_adapter(new / "adapter", config, trainable, base_model, rslora=rslora)
        else:
            params = trainable if isinstance(trainable, Params) else Params(trainable, frozen_vision)
            save_checkpoint(new / "model", config, params, also=files_beside_weights(base_model))
        _write_state(new, opt_state, content)
        for path in (*new.rglob("*"), new):
            _sync(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    replaced = folder / f".{step:08}.old"
    if target.exists():
        target.rename(replaced)
    new.rename(target)
    _sync(folder)
    _link(run, target / ("adapter" if isinstance(trainable, Lora) else "model"))
    _sync(run)
    shutil.rmtree(replaced, ignore_errors=True)
    history = steps(run)
    last = history.index(step) + 1
    for old in history[: max(0, last - keep)] + history[last:]:
        # Renamed first: a crash must not leave half of a checkpoint under a number.
        hidden = (folder / f"{old:08}").rename(folder / f".{old:08}.old")
        shutil.rmtree(hidden)
    return target


def _check_files(directory: Path) -> None:
    """Raise a ValueError that names the first file that is missing or not as it was written."""
    sums = directory / "state" / "SHA256SUMS"
    if not sums.is_file():
        raise ValueError(f"{sums} is missing")
    lines = sums.read_text(encoding="utf-8", errors="replace").splitlines()
    expected = {directory / name: checksum for checksum, _, name in (line.partition("  ") for line in lines)}
    for path in sorted({*expected, *_files(directory)} - {sums}):
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path not in expected:
            raise ValueError(f"{path} is not listed in {sums.name}, so one of the two is damaged")
        if _sha256(path) != expected[path]:
            raise ValueError(f"{path} is damaged: its checksum is not the one it was saved with")


def _different(theirs: dict, ours: dict) -> str | None:
    """The first key in which two dicts differ, with both values, or None."""
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            return f"{key} is {theirs.get(key)} there and {ours.get(key)} here"
    return None


def _check(directory: Path, template: TrainState, config: Config) -> dict:
    """The content of state.msgpack; ValueError if the checkpoint is damaged or of another model or training."""
    _check_files(directory)
    path = directory / "state" / "state.msgpack"
    try:
        content = msgpack.unpackb(path.read_bytes())
        version = content["format"]
    except (OSError, ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"{path} is missing or damaged ({type(error).__name__})") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version!r}, and this version reads format {FORMAT}")
    if difference := _different(content["config"], _model(config)):
        raise ValueError(f"{directory} is of another model: {difference}")
    if content["trained"] != (ours := _describe(template.trainable)):
        raise ValueError(f"{directory} holds {content['trained']}, and this run trains {ours}")
    if difference := _different(content["arrays"], _layout(template.opt_state)):
        raise ValueError(f"{directory / 'state' / 'arrays.safetensors'} is of another optimizer: {difference}")
    return content


def _advice(run: Path, bad: int, template: TrainState, config: Config) -> str:
    """What to do about a checkpoint that cannot be used: continue from the newest other one that can."""
    for step in reversed(steps(run)):
        try:
            if step != bad:
                _check(_folder(run) / f"{step:08}", template, config)
                return f"step {step} is good: continue from it with --resume {run} --resume-step {step}"
        except ValueError:
            continue
    return f"no other checkpoint in {run} could be used in its place"


def _put(array: np.ndarray, like: jax.Array) -> jax.Array:
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])


def restore(run: Path, template: TrainState, *, model: Model, step: int | None = None) -> tuple[TrainState, dict, int]:
    """What `save` was given at `step`, or at the newest step: (state, extra, step), bit for bit.

    template: the state of a fresh start, its arrays on the mesh; each array gets the dtype and the sharding of its
    template. ValueError for a checkpoint that is damaged, or of another model, adapter or optimizer: it names the file,
    what is wrong with it, and the newest other checkpoint that could be used.
    """
    run, saved = Path(run), steps(run)
    if not saved:
        raise ValueError(f"{run} holds no checkpoint to continue from")
    step = saved[-1] if step is None else step
    if step not in saved:
        raise ValueError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, saved))}")
    directory = _folder(run) / f"{step:08}"
    try:
        content = _check(directory, template, model.config)
        if isinstance(template.trainable, Lora):
            trainable = load_adapter(directory / "adapter", model.config, model.mesh)
        else:
            params = load_checkpoint(directory / "model", mesh=model.mesh)[1]
            trainable = params if isinstance(template.trainable, Params) else params.text
    except ValueError as error:
        raise ValueError(f"{error}; {_advice(run, step, template, model.config)}") from error
    # The tree is the template's, with its exact scale: the file states alpha, and alpha / r may be off by a rounding.
    trainable = jax.tree.unflatten(jax.tree.structure(template.trainable), jax.tree.leaves(trainable))
    trainable = jax.device_put(trainable, jax.tree.map(lambda like: like.sharding, template.trainable))
    likes, structure = _named(template.opt_state), jax.tree.structure(template.opt_state)
    with safe_open(directory / "state" / "arrays.safetensors", framework="numpy") as file:
        arrays = [_put(file.get_tensor(name), like) for name, like in likes.items()]
    return TrainState(trainable, jax.tree.unflatten(structure, arrays)), content["extra"], step
