"""Every weight of a model: its name, its axes, its initial value.

Axes are letters of the alphabet in `gemma3/__init__.py`. "D -> N H" is a projection: its inputs stand before the arrow,
its outputs after it. Everything else that depends on a weight's shape follows from its axes: its split over devices
(`mesh`), the shape of its adapter (`lora`), its layout in a file (`files/weights`).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma3.config import Config


def axes(letters: str) -> Any:
    """The axes of a weight, as the default of its field: so `Block()` holds the axes of a block's weights."""
    return letters


class Block(NamedTuple):
    """The weights of a decoder block. In a model all blocks are stacked: each array then begins with the axis L."""

    pre_attention_norm: jax.Array = axes("D")
    q: jax.Array = axes("D -> N H")
    k: jax.Array = axes("D -> K H")
    v: jax.Array = axes("D -> K H")
    o: jax.Array = axes("N H -> D")
    q_norm: jax.Array | None = axes("H")  # None in Gemma 2, like k_norm
    k_norm: jax.Array | None = axes("H")
    post_attention_norm: jax.Array = axes("D")
    pre_mlp_norm: jax.Array = axes("D")
    gate: jax.Array = axes("D -> F")
    up: jax.Array = axes("D -> F")
    down: jax.Array = axes("F -> D")
    post_mlp_norm: jax.Array = axes("D")


class Text(NamedTuple):
    """The language model. The embedding table is the output layer too."""

    embedding: jax.Array = axes("V D")
    blocks: Block = Block()
    final_norm: jax.Array = axes("D")


class VisionBlock(NamedTuple):
    """The weights of an encoder block, stacked as `Block` is."""

    norm1_scale: jax.Array = axes("E")
    norm1_bias: jax.Array = axes("E")
    query: jax.Array = axes("E -> n e")
    query_bias: jax.Array = axes("n e")
    key: jax.Array = axes("E -> n e")
    key_bias: jax.Array = axes("n e")
    value: jax.Array = axes("E -> n e")
    value_bias: jax.Array = axes("n e")
    out: jax.Array = axes("n e -> E")
    out_bias: jax.Array = axes("E")
    norm2_scale: jax.Array = axes("E")
    norm2_bias: jax.Array = axes("E")
    fc1: jax.Array = axes("E -> f")
    fc1_bias: jax.Array = axes("f")
    fc2: jax.Array = axes("f -> E")
    fc2_bias: jax.Array = axes("E")


class Vision(NamedTuple):
    """The vision tower and the projector."""

    patch_kernel: jax.Array = axes("p -> E")  # p: the numbers of a patch, in the order (y, x, c)
    patch_bias: jax.Array = axes("E")
    position: jax.Array = axes("T E")  # a row for each patch
    blocks: VisionBlock = VisionBlock()
    post_norm_scale: jax.Array = axes("E")
    post_norm_bias: jax.Array = axes("E")
    soft_norm: jax.Array = axes("E")
    projector: jax.Array = axes("E -> D")


class Params(NamedTuple):
    """A model's weights; `vision` is None in a text-only one."""

    text: Text
    vision: Vision | None


# Axes by field name; all names differ. In a LoRA pair, A maps a projection's inputs to rank r, and B r to its outputs.
AXES = {
    name: letters
    for part in (Text(), Block(), Vision(), VisionBlock())
    for name, letters in part._asdict().items()
    if isinstance(letters, str)
}
PROJECTIONS = {name: tuple(letters.split(" -> ")) for name, letters in AXES.items() if "->" in letters}
for _name, (_inputs, _outputs) in PROJECTIONS.items():
    AXES |= {f"{_name}.a": f"{_inputs} -> r", f"{_name}.b": f"r -> {_outputs}"}


def weight_name(path) -> str:
    """The key of a leaf in `AXES`: its field name; in a LoRA pair, the projection's name stands before it ("q.a")."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return ".".join(names[-2:]) if names[-1] in ("a", "b") else names[-1]


def axis_sizes(config: Config) -> dict[str, int]:
    """The length of each axis of this model's weights."""
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
            "p": vision.patch_size**2 * 3,  # y, x and c, which are separate axes in a file
            **{"y": vision.patch_size, "x": vision.patch_size, "c": 3},
        }
    return sizes


def shape_of(letters: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """The sizes (D, N, H) for the letters "D -> N H"."""
    return tuple(sizes[letter] for letter in letters.replace("->", " ").split())


def param_shapes(config: Config, dtype=jnp.float32) -> Params:
    """Every parameter as a `jax.ShapeDtypeStruct`: nothing is allocated."""
    sizes = axis_sizes(config)

    def shapes(part: NamedTuple, *stack: int):
        return jax.tree.map(lambda axes: jax.ShapeDtypeStruct((*stack, *shape_of(axes, sizes)), dtype), part)

    block = Block() if config.qk_norm else Block(q_norm=None, k_norm=None)
    text = shapes(Text(blocks=None))._replace(blocks=shapes(block, config.num_layers))
    if config.vision is None:
        return Params(text, None)
    blocks = shapes(VisionBlock(), config.vision.num_layers)
    return Params(text, shapes(Vision(blocks=None))._replace(blocks=blocks))


def init_params(key: jax.Array, config: Config, dtype=jnp.float32) -> Params:
    """Random weights to train from scratch: matrices N(0, 1/inputs), the embedding N(0, 1/D), norms the identity."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config, dtype))
    sizes = axis_sizes(config)

    def init(number: int, name: str, shape: tuple[int, ...]) -> jax.Array:
        if "norm" in name or "bias" in name:
            return jnp.ones(shape, dtype) if name.endswith("scale") else jnp.zeros(shape, dtype)
        if name in PROJECTIONS:
            inputs = math.prod(shape_of(PROJECTIONS[name][0], sizes))
        else:
            inputs = 4 * sizes["E"] if name == "position" else sizes["D"]
        return (jax.random.normal(jax.random.fold_in(key, number), shape) * inputs**-0.5).astype(dtype)

    arrays = [init(number, path[-1].name, leaf.shape) for number, (path, leaf) in enumerate(leaves)]
    return jax.tree.unflatten(tree, arrays)
