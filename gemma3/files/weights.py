"""Checkpoints: Hugging Face model directories to `Params` and back, by one table of names and layouts.

Reading accepts every spelling of the names that transformers has written; writing uses that of the published files.
Tensors missing, left over or of another shape are refused by name: transformers would fill in random numbers.
"""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from rich.progress import Progress

from gemma3.config import Config
from gemma3.files.config_json import config_to_dict, read_config
from gemma3.files.hub import resolve
from gemma3.files.tensors import (
    Stored,
    Unwritten,
    list_tensors,
    place,
    read_into,
    replaced_directory,
    same_values,
    stored_shape,
    to_stored,
    write_json,
    write_tensors,
)
from gemma3.mesh import shardings
from gemma3.model import Params, param_shapes

# Our field: Hugging Face's name, "{}" being the layer, and how the file's axes become ours. Linear layers are stored
# (out, in), but the projector, a bare parameter, (in, out).
NAMES = {
    "text.embedding": ("model.embed_tokens.weight", "V D -> V D"),
    "text.final_norm": ("model.norm.weight", "D -> D"),
    "text.blocks.pre_attention_norm": ("model.layers.{}.input_layernorm.weight", "D -> D"),
    "text.blocks.q": ("model.layers.{}.self_attn.q_proj.weight", "(N H) D -> D N H"),
    "text.blocks.k": ("model.layers.{}.self_attn.k_proj.weight", "(K H) D -> D K H"),
    "text.blocks.v": ("model.layers.{}.self_attn.v_proj.weight", "(K H) D -> D K H"),
    "text.blocks.o": ("model.layers.{}.self_attn.o_proj.weight", "D (N H) -> N H D"),
    "text.blocks.q_norm": ("model.layers.{}.self_attn.q_norm.weight", "H -> H"),
    "text.blocks.k_norm": ("model.layers.{}.self_attn.k_norm.weight", "H -> H"),
    "text.blocks.post_attention_norm": ("model.layers.{}.post_attention_layernorm.weight", "D -> D"),
    "text.blocks.pre_mlp_norm": ("model.layers.{}.pre_feedforward_layernorm.weight", "D -> D"),
    "text.blocks.gate": ("model.layers.{}.mlp.gate_proj.weight", "F D -> D F"),
    "text.blocks.up": ("model.layers.{}.mlp.up_proj.weight", "F D -> D F"),
    "text.blocks.down": ("model.layers.{}.mlp.down_proj.weight", "D F -> F D"),
    "text.blocks.post_mlp_norm": ("model.layers.{}.post_feedforward_layernorm.weight", "D -> D"),
    "vision.patch_kernel": (
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "E c y x -> (y x c) E",
    ),
    "vision.patch_bias": ("vision_tower.vision_model.embeddings.patch_embedding.bias", "E -> E"),
    "vision.position": ("vision_tower.vision_model.embeddings.position_embedding.weight", "T E -> T E"),
    "vision.post_norm_scale": ("vision_tower.vision_model.post_layernorm.weight", "E -> E"),
    "vision.post_norm_bias": ("vision_tower.vision_model.post_layernorm.bias", "E -> E"),
    "vision.soft_norm": ("multi_modal_projector.mm_soft_emb_norm.weight", "E -> E"),
    "vision.projector": ("multi_modal_projector.mm_input_projection_weight", "E D -> E D"),
} | {
    "vision.blocks." + field: ("vision_tower.vision_model.encoder.layers.{}." + name, layout)
    for field, name, layout in (
        ("norm1_scale", "layer_norm1.weight", "E -> E"),
        ("norm1_bias", "layer_norm1.bias", "E -> E"),
        ("query", "self_attn.q_proj.weight", "(n e) E -> E n e"),
        ("query_bias", "self_attn.q_proj.bias", "(n e) -> n e"),
        ("key", "self_attn.k_proj.weight", "(n e) E -> E n e"),
        ("key_bias", "self_attn.k_proj.bias", "(n e) -> n e"),
        ("value", "self_attn.v_proj.weight", "(n e) E -> E n e"),
        ("value_bias", "self_attn.v_proj.bias", "(n e) -> n e"),
        ("out", "self_attn.out_proj.weight", "E (n e) -> n e E"),
        ("out_bias", "self_attn.out_proj.bias", "E -> E"),
        ("norm2_scale", "layer_norm2.weight", "E -> E"),
        ("norm2_bias", "layer_norm2.bias", "E -> E"),
        ("fc1", "mlp.fc1.weight", "f E -> E f"),
        ("fc1_bias", "mlp.fc1.bias", "f -> f"),
        ("fc2", "mlp.fc2.weight", "E f -> f E"),
        ("fc2_bias", "mlp.fc2.bias", "E -> E"),
    )
}


_SHOWN_BYTES = 2**30  # reading so much takes seconds, and shows its progress


def axis_sizes(config: Config) -> dict[str, int]:
    """The length of each axis named in a layout."""
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
    }
    if (vision := config.vision) is not None:
        sizes |= {
            "E": vision.hidden_size,
            "f": vision.intermediate_size,
            "n": vision.num_heads,
            "e": vision.hidden_size // vision.num_heads,
            "T": vision.patches_per_side**2,
            "y": vision.patch_size,
            "x": vision.patch_size,
            "c": 3,
        }
    return sizes


def common_name(name: str) -> str:
    """One spelling for all that transformers has used: that of a text-only model, beside the published vision's.

    Published:           language_model.model.X    vision_tower.vision_model.Y    multi_modal_projector.Z
    In memory since 4.52: model.language_model.X   model.vision_tower.Y           model.multi_modal_projector.Z
    Saved by 5.x:        language_model.model.X    vision_tower.Y                 multi_modal_projector.Z
    """
    name = re.sub(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", "", name)
    name = re.sub(r"^language_model\.(model\.|(?!lm_head))", "model.", name).removeprefix("language_model.")
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def published_name(name: str, config: Config) -> str:
    return name if config.vision is None or not name.startswith("model.") else "language_model." + name


def field_path(path) -> str:
    return ".".join(key.name for key in path)


def check_tensors(found: dict[str, Stored], expected: dict[str, tuple[int, ...]], where: Path) -> None:
    """ValueError naming what is missing, left over or of another shape."""

    def some(names: Iterable[str]) -> str:
        first, *rest = sorted(names)
        return first + (f" and {len(rest)} more" if rest else "")

    if missing := expected.keys() - found.keys():
        raise ValueError(f"{where} lacks the tensor {some(missing)}, which its config asks for")
    if surplus := found.keys() - expected.keys():
        raise ValueError(f"{where} holds the tensor {some(surplus)}, which this model has no use for")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{name} in {found[name].path} is {list(found[name].shape)}; the config asks for {list(shape)}"
            )


def load_tree(shapes, names: dict[str, tuple[str, str]], found: dict[str, Stored], config: Config, sizes, mesh):
    """Read every leaf of `shapes` (`jax.ShapeDtypeStruct`s) into its place on the mesh, or on one device."""
    first = SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda _: first, shapes) if mesh is None else shardings(shapes, config, mesh)

    def leaf(path, shape: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
        name, layout = names[field_path(path)]

        def fill(out: np.ndarray, ranges: list[range]) -> None:
            if "{}" not in name:
                read_into(out, found[name], layout, sizes, ranges)
                return
            for row, layer in zip(out, ranges[0], strict=True):
                read_into(row, found[name.format(layer)], layout, sizes, ranges[1:])

        return place(shape, sharding, fill)

    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    nbytes = sum(math.prod(shape.shape) * shape.dtype.itemsize for _, shape in leaves)
    # On a terminal, where it takes long enough to be watched.
    with Progress(transient=True, disable=nbytes < _SHOWN_BYTES or not sys.stdout.isatty()) as progress:
        task, arrays = progress.add_task("reading weights", total=nbytes), []
        for (path, shape), sharding in zip(leaves, jax.tree.leaves(where), strict=True):
            arrays.append(leaf(path, shape, sharding))
            progress.advance(task, arrays[-1].nbytes)
    return jax.tree.unflatten(tree, arrays)


def tensors_of(tree, names: dict[str, tuple[str, str]]) -> Iterator[tuple[str, str, Callable[[], jax.Array]]]:
    """(name, layout, function returning the array) of each tensor that a pytree of arrays or shapes is stored as."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name, layout = names[field_path(path)]
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


def _find_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint by its common name."""
    found: dict[str, Stored] = {}
    for tensor in (tensor for path in _weight_files(directory) for tensor in list_tensors(path)):
        name = common_name(tensor.name)
        if name in found:
            raise ValueError(f"{directory} holds {name} twice, as {found[name].name} and as {tensor.name}")
        found[name] = tensor
    return found


def _main_dtype(found: Iterable[Stored]):
    """That of the largest tensor, where a float64 counts as the float32 that JAX makes of it."""
    largest = max(found, key=lambda tensor: math.prod(tensor.shape))
    return {"BF16": jnp.bfloat16, "F16": jnp.float16}.get(largest.dtype, jnp.float32)


def load_checkpoint(
    directory_or_name: str | Path, dtype=jnp.float32, mesh: Mesh | None = None
) -> tuple[Config, Params]:
    """Read a Hugging Face model directory, or one found by name ("google/gemma-3-4b-it", "nano").

    Each device's part of each parameter is read straight from the files, cast on the way to `dtype`, or if it is None
    to that of the files' largest tensor: split over `mesh` as `gemma3.mesh` says, or on the first device. Never
    unpickles. ValueError, in a sentence, for whatever cannot be used: the config, a damaged file, a tensor missing,
    left over or of another shape, an output layer that is not the embedding table.
    """
    directory = resolve(directory_or_name)
    config = read_config(directory)
    found = _find_tensors(directory)
    shapes, sizes = param_shapes(config, dtype or _main_dtype(found.values())), axis_sizes(config)
    head = found.pop("lm_head.weight", None)
    expected = {name: stored_shape(layout, sizes) for name, layout, _ in tensors_of(shapes, NAMES)}
    check_tensors(found, expected, directory)
    if head is not None and not same_values(head, found["model.embed_tokens.weight"]):
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

    The directory appears, or an earlier checkpoint of that name is replaced, once everything is written. The arrays
    must be addressable from this process. ValueError if `directory` holds something other than a model.
    """
    sizes = axis_sizes(config)
    tensors = []
    for name, layout, get in tensors_of(params, NAMES):
        nbytes = int(np.prod(stored_shape(layout, sizes))) * params.text.embedding.dtype.itemsize
        make = lambda get=get, layout=layout: to_stored(np.asarray(get()), layout, sizes)  # noqa: E731
        tensors.append(Unwritten(published_name(name, config), nbytes, make))
    ids = {"bos_token_id": config.bos_id, "eos_token_id": list(config.stop_ids), "pad_token_id": config.pad_id}
    with replaced_directory(directory, "config.json") as new:
        write_tensors(new, tensors, max_shard_bytes)
        write_json(new / "config.json", config_to_dict(config) | {"torch_dtype": str(params.text.embedding.dtype)})
        write_json(new / "generation_config.json", ids)
        for path in also:
            shutil.copy(path, new)
