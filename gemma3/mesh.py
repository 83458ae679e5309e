"""The device mesh: two axes, one rule that says how every weight is split, and the collectives by name.

`data` splits the prompts, and stores each weight in parts that are gathered just before use (FSDP). `tensor` splits
heads, MLP width and vocabulary (Megatron). All model code runs inside one `jax.shard_map` over this mesh (1,1 on a
laptop). Where communication happens, the code calls a collective by one of the names below.

Inside a `shard_map`, each array has a set of axes over which it varies: devices along them may hold different values.
An activation varies over `data`, and a head's over `tensor` too. JAX infers the set, and checks that an output declared
equal on all devices is so. Two things are left to the code: a loop's carry must vary from the start as it will later
(`zeros_varying`), and both arguments of a handwritten gradient rule must vary over the same axes (`copy_to_shards_of`).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from gemma3.config import Config
from gemma3.params import AXES, Block, VisionBlock, weight_name

DATA, TENSOR = "data", "tensor"

# The mesh axis over which each axis of a weight is split. Norms and biases are whole on every device.
SPLIT = {"V": TENSOR, "N": TENSOR, "K": TENSOR, "F": TENSOR, "D": DATA, "E": DATA}
STACKED = frozenset(Block._fields + VisionBlock._fields)


def split_axes(name: str) -> tuple[str | None, ...]:
    """The mesh axis of each axis of a weight in one layer: (DATA, TENSOR, None) for q, "D -> N H".

    If SPLIT gives two axes to the same mesh axis, only the first is split.
    """
    letters = AXES.get(name, "").replace("->", " ").split()
    found: list[str | None] = []
    for letter in letters if len(letters) > 1 else ():
        axis = SPLIT.get(letter)
        found.append(None if axis in found else axis)
    return tuple(found)


@dataclass(frozen=True)
class Model:
    """A model's sizes and the devices that it is split over: what every compiled function is compiled for."""

    config: Config
    mesh: Mesh

    def specs(self, params):
        """A pytree of `Spec` like `params`, which is any part of a model's weights, an adapter or an optimizer's state.

        If there are fewer key/value heads than tensor shards, every shard holds all of them.
        """
        whole = ("k", "v", "k.b", "v.b") if self.config.num_kv_heads < self.mesh.shape[TENSOR] else ()

        def spec(path, _) -> Spec:
            name = weight_name(path)
            split = [None if axis == TENSOR and name in whole else axis for axis in split_axes(name)]
            return Spec(None, *split) if name.split(".")[0] in STACKED else Spec(*split)

        return jax.tree_util.tree_map_with_path(spec, params)

    def shardings(self, params):
        """`specs` as shardings, for putting arrays on the mesh.

        A mesh axis of size 1 splits nothing and is left out. XLA would drop it: the output of one step would then not
        look like its input, and the next step would be compiled again.
        """

        def sharding(spec: Spec) -> NamedSharding:
            axes = [axis if axis is not None and self.mesh.shape[axis] > 1 else None for axis in spec]
            while axes and axes[-1] is None:
                axes.pop()
            return NamedSharding(self.mesh, Spec(*axes))

        return jax.tree.map(sharding, self.specs(params))


def make_mesh(data: int, tensor: int) -> Mesh:
    """A `data` by `tensor` mesh over the first data * tensor devices; ValueError where there are fewer."""
    if data < 1 or tensor < 1:
        raise ValueError(f"--mesh {data},{tensor}: both numbers must be at least 1")
    devices = jax.devices()
    if data * tensor > len(devices):
        hint = f"--virtual-devices {data * tensor} simulates them on a CPU" if devices[0].platform == "cpu" else ""
        raise ValueError(
            f"--mesh {data},{tensor} needs {data * tensor} devices and there are {len(devices)}"
            + (f"; {hint}" if hint else f"; choose a mesh whose product is at most {len(devices)}")
        )
    if data * tensor < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"--mesh {data},{tensor} leaves some of the {len(devices)} devices of {jax.process_count()} processes idle;"
            f" choose a mesh whose product is {len(devices)}"
        )
    return _mesh_of(data, tensor)


def _mesh_of(data: int, tensor: int) -> Mesh:
    devices, automatic = jax.devices()[: data * tensor], (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((data, tensor), (DATA, TENSOR), devices=devices, axis_types=automatic)


def gather_over_data(params):
    """Join the parts of each weight that `data` splits; the gradient is the reverse, a reduce-scatter.

    Stacked weights are given one layer at a time, without the axis L.
    """
    if lax.axis_size(DATA) == 1:
        return params  # otherwise XLA would copy each weight on a CPU

    def gather(path, x: jax.Array) -> jax.Array:
        split = split_axes(weight_name(path))
        return lax.all_gather(x, DATA, axis=split.index(DATA), tiled=True) if DATA in split else x

    return jax.tree_util.tree_map_with_path(gather, params)


def gather_over_tensor(x: jax.Array) -> jax.Array:
    """Concatenate the shards' rows along the first axis; the result is the same on every tensor shard."""
    return lax.all_gather(x, TENSOR, axis=0, tiled=True, to="invarying")


def copy_to_tensor(x: jax.Array) -> jax.Array:
    """The identity on an array that all tensor shards hold: its uses' gradients are added before one sum over shards.

    Without it, each use would sum its own gradient. In Megatron, arXiv 1909.08053, this is f; `sum_over_tensor` is g.
    """
    # `lax.pcast` would be refused in the token loop, where x varies over `tensor` already.
    return x + zeros_varying((), x.dtype, TENSOR)


def copy_to_shards_of(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The identity on a weight, but it varies as x does: its gradient is summed over all shards that hold it."""
    return weight + jnp.zeros_like(x, weight.dtype, ())  # zeros made like x vary as x does


def sum_over_tensor(x: jax.Array) -> jax.Array:
    return lax.psum(x, TENSOR)


def max_over_tensor(x: jax.Array) -> jax.Array:
    return lax.pmax(x, TENSOR)


def min_over_tensor(x: jax.Array) -> jax.Array:
    return lax.pmin(x, TENSOR)


def sum_over_data(x):
    return lax.psum(x, DATA)


def max_over_data(x):
    return lax.pmax(x, DATA)


def num_tensor_shards() -> int:
    return lax.axis_size(TENSOR)


def tensor_shard() -> jax.Array:
    """Which part of the tensor axis this device holds."""
    return lax.axis_index(TENSOR)


def own_places(places: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Places counted from the first of this tensor shard's `size`, clipped to them, and whether each is one of them."""
    own = places - tensor_shard() * size
    clipped = jnp.clip(own, 0, size - 1)
    return clipped, own == clipped


def own_kv_heads(weight: jax.Array, num_kv_heads: int, axis: int) -> jax.Array:
    """The key/value heads of a weight that this shard's query heads use; if K < tensor, the weight holds all K heads.

    Query heads are split evenly, so `tensor // K` neighbouring shards share one key/value head.
    """
    tensor = num_tensor_shards()
    if num_kv_heads >= tensor:
        return weight
    head = tensor_shard() // (tensor // num_kv_heads)
    return lax.dynamic_slice_in_dim(weight, head, 1, axis)


def on_one_device(function, config: Config | None = None):
    """Run model code on a 1,1 mesh: for use outside training, where arrays are plain and nothing is split."""
    body = function if config is None else partial(function, config=config)
    return jax.jit(jax.shard_map(body, mesh=_mesh_of(1, 1), in_specs=Spec(), out_specs=Spec(), check_vma=False))


def zeros_varying(shape: tuple[int, ...], dtype, *axes: str) -> jax.Array:
    """Zeros that vary over these axes of the mesh."""
    return lax.pcast(jnp.zeros(shape, dtype), axes, to="varying")
