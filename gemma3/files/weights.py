"""Checkpoints: Hugging Face model directories to `Params` and back, by the table of names in names.toml.

Reading accepts every spelling of the names that transformers has written; writing uses that of the published files.
A missing, surplus or misshapen tensor is refused by name; transformers would fill in random numbers instead.
"""

import json
import math
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from rich.progress import Progress

from gemma3.config import Config
from gemma3.files import tensors
from gemma3.files.config_json import config_to_dict, read_config
from gemma3.files.hub import resolve
from gemma3.files.writing import replaced_directory, write_json
from gemma3.mesh import Model
from gemma3.params import AXES, Params, axis_sizes, param_shapes, weight_name

_TABLE = tomllib.loads(Path(__file__).with_name("names.toml").read_text(encoding="utf-8"))["tensors"]
# From our field, such as "text.blocks.q", to Hugging Face's name; "{}" stands for the layer's number.
NAMES = {f"{part}.{field}": name for part, names in _TABLE.items() for field, name in names.items()}
_SHOWN_BYTES = 2**30  # reading this much takes seconds, so its progress is shown


def layout_of(path) -> str:
    """The layout of the tensor that is stored for the leaf at this path, in the notation of `tensors`.

    Linear layers are stored as (out, in), with heads and head dim joined: "(N H) D -> D N H". The projector, a bare
    parameter, is stored as (in, out), and the patch kernel as the kernel of a convolution.
    """
    name = weight_name(path)
    inputs, _, outputs = AXES[name].partition(" -> ")
    if name == "patch_kernel":
        return "E c y x -> (y x c) E"
    if name == "projector":
        return f"{inputs} {outputs} -> {inputs} {outputs}"
    if not outputs:
        return f"({inputs}) -> {inputs}" if name.endswith("bias") else f"{inputs} -> {inputs}"
    return f"({outputs}) ({inputs}) -> {inputs} {outputs}"


def common_name(name: str) -> str:
    """One name for all spellings that transformers has used: text as in a text-only model, vision as published.

    Published:           language_model.model.X    vision_tower.vision_model.Y    multi_modal_projector.Z
    In memory since 4.52: model.language_model.X   model.vision_tower.Y           model.multi_modal_projector.Z
    Saved by 5.x:        language_model.model.X    vision_tower.Y                 multi_modal_projector.Z
    """
    name = re.sub(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", "", name)
    name = re.sub(r"^language_model\.(model\.|(?!lm_head))", "model.", name).removeprefix("language_model.")
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def field_path(path) -> str:
    return ".".join(key.name for key in path)


def check_tensors(found: dict[str, tensors.Stored], expected: dict[str, tuple[int, ...]], where: Path) -> None:
    """Raise a ValueError that names the tensor if one is missing, surplus or misshapen."""

    def some(names: Iterable[str]) -> str:
        first, *rest = sorted(names)
        return first + (f" and {len(rest)} more" if rest else "")

    if missing := expected.keys() - found.keys():
        raise ValueError(f"{where} lacks the tensor {some(missing)}, which its config asks for")
    if surplus := found.keys() - expected.keys():
        raise ValueError(f"{where} holds the tensor {some(surplus)}, which this model does not have")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{name} in {found[name].path} is {list(found[name].shape)}; the config asks for {list(shape)}"
            )


def load_tree(
    shapes,
    names: dict[str, str],
    found: dict[str, tensors.Stored],
    config: Config,
    sizes: dict[str, int],
    mesh: Mesh | None,
):
    """Read every leaf of `shapes` (`jax.ShapeDtypeStruct`s) into its place on the mesh, or on one device."""
    first = SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda _: first, shapes) if mesh is None else Model(config, mesh).shardings(shapes)

    def leaf(path, shape: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
        name, layout = names[field_path(path)], layout_of(path)

        def fill(out: np.ndarray, ranges: list[range]) -> None:
            if "{}" not in name:
                tensors.read_into(out, found[name], layout, sizes, ranges)
                return
            for row, layer in zip(out, ranges[0], strict=True):
                tensors.read_into(row, found[name.format(layer)], layout, sizes, ranges[1:])

        return tensors.filled(shape, sharding, fill)

    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    nbytes = sum(math.prod(shape.shape) * shape.dtype.itemsize for _, shape in leaves)
    # A progress bar is shown only on a terminal, and only if reading takes long.
    with Progress(transient=True, disable=nbytes < _SHOWN_BYTES or not sys.stdout.isatty()) as progress:
        task, arrays = progress.add_task("reading weights", total=nbytes), []
        for (path, shape), sharding in zip(leaves, jax.tree.leaves(where), strict=True):
            arrays.append(leaf(path, shape, sharding))
            progress.advance(task, arrays[-1].nbytes)
    return jax.tree.unflatten(tree, arrays)


def tensors_of(tree, names: dict[str, str]) -> Iterator[tuple[str, str, Callable[[], jax.Array]]]:
    """The tensors that a pytree of arrays or shapes is stored as: each (name, layout, function returning the array)."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name, layout = names[field_path(path)], layout_of(path)
        if "{}" not in name:
            yield name, layout, lambda leaf=leaf: leaf
        else:
            for layer in range(leaf.shape[0]):
                yield name.format(layer), layout, lambda leaf=leaf, layer=layer: leaf[layer]


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged ({error!r}); fetch it again") from error
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    pickles = [
        path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in sorted(directory.glob(pattern))
    ]
    hint = f"; {pickles[0]} is never opened, since unpickling a file can run any program in it" if pickles else ""
    raise ValueError(f"{directory} has neither model.safetensors nor its index{hint}")


def _find_tensors(directory: Path) -> dict[str, tensors.Stored]:
    """Every tensor of a checkpoint by its common name."""
    found: dict[str, tensors.Stored] = {}
    for tensor in (tensor for path in _weight_files(directory) for tensor in tensors.list_tensors(path)):
        name = common_name(tensor.name)
        if name in found:
            raise ValueError(f"{directory} holds {name} twice, as {found[name].name} and as {tensor.name}")
        found[name] = tensor
    return found


def _main_dtype(found: Iterable[tensors.Stored]):
    """The dtype of the largest tensor; float64 counts as float32, which JAX makes of it."""
    largest = max(found, key=lambda tensor: math.prod(tensor.shape))
    return {"BF16": jnp.bfloat16, "F16": jnp.float16}.get(largest.dtype, jnp.float32)


def load_checkpoint(
    directory_or_name: str | Path, dtype=jnp.float32, mesh: Mesh | None = None
) -> tuple[Config, Params]:
    """Read a Hugging Face model directory, or one found by name ("google/gemma-3-4b-it", "nano").

    Each device's part of each parameter is read straight from the files and cast to `dtype` or, if it is None, to the
    dtype of the files' largest tensor. Parameters are split over `mesh` as `gemma3.mesh` says, or lie on the first
    device. Nothing is unpickled. ValueError for whatever cannot be used: the config, a damaged file, a missing, surplus
    or misshapen tensor, an output layer that is not the embedding table.
    """
    directory = resolve(directory_or_name)
    config = read_config(directory)
    found = _find_tensors(directory)
    shapes, sizes = param_shapes(config, dtype or _main_dtype(found.values())), axis_sizes(config)
    head = found.pop("lm_head.weight", None)
    expected = {name: tensors.stored_shape(layout, sizes) for name, layout, _ in tensors_of(shapes, NAMES)}
    check_tensors(found, expected, directory)
    if head is not None and not tensors.same_values(head, found["model.embed_tokens.weight"]):
        raise ValueError(
            f"{head.path} holds a {head.name} that differs from the embedding; Gemma's output layer is tied"
        )
    return config, load_tree(shapes, NAMES, found, config, sizes, mesh)


def save_checkpoint(
    directory: str | Path,
    config: Config,
    params: Params,
    *,
    max_shard_bytes: int = 5 * 10**9,
    also: Iterable[Path] = (),
) -> None:
    """Write a directory that `from_pretrained` reads, in the parameters' own dtype; `also` names files to copy into it.

    The directory appears, or replaces an earlier checkpoint, once everything is written. The arrays must be addressable
    from this process. ValueError if `directory` holds something other than a model.
    """
    sizes, unwritten = axis_sizes(config), []
    for name, layout, get in tensors_of(params, NAMES):
        nbytes = int(np.prod(tensors.stored_shape(layout, sizes))) * params.text.embedding.dtype.itemsize
        make = lambda get=get, layout=layout: tensors.to_stored(np.asarray(get()), layout, sizes)  # noqa: E731
        prefix = "language_model." if config.vision is not None and name.startswith("model.") else ""
        unwritten.append(tensors.Unwritten(prefix + name, nbytes, make))
    ids = {"bos_token_id": config.bos_id, "eos_token_id": list(config.stop_ids), "pad_token_id": config.pad_id}
    with replaced_directory(directory, "config.json") as new:
        tensors.write_tensors(new, unwritten, max_shard_bytes)
        write_json(new / "config.json", config_to_dict(config) | {"torch_dtype": str(params.text.embedding.dtype)})
        write_json(new / "generation_config.json", ids)
        for path in also:
            shutil.copy(path, new)
