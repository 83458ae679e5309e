"""The device mesh: two axes, one table of how every parameter is split, and the collectives by name.

`data` splits the prompts, and stores each frozen weight in parts that are gathered just before use (FSDP). `tensor`
splits heads, MLP width and vocabulary (Megatron). All model code runs inside one `jax.shard_map` over this mesh, a
laptop's being 1,1; a collective stands in the code where communication happens, under one of the names below.
"""

import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA, TENSOR = "data", "tensor"

# How each parameter is split, by field name; a block's leading axis L is never split.
PARTITION = {
    # gemma3.model.Text
    "embedding": P(TENSOR, DATA),  # [V, D]
    "final_norm": P(),  # [D]
    # gemma3.transformer.Block
    "q": P(None, DATA, TENSOR, None),  # [L, D, N, H]
    "k": P(None, DATA, TENSOR, None),  # [L, D, K, H], whole on every shard where K < tensor
    "v": P(None, DATA, TENSOR, None),  # [L, D, K, H], likewise
    "o": P(None, TENSOR, None, DATA),  # [L, N, H, D]
    "gate": P(None, DATA, TENSOR),  # [L, D, F]
    "up": P(None, DATA, TENSOR),  # [L, D, F]
    "down": P(None, TENSOR, DATA),  # [L, F, D]
    "pre_attention_norm": P(),  # [L, D]
    "post_attention_norm": P(),
    "pre_mlp_norm": P(),
    "post_mlp_norm": P(),
    "q_norm": P(),  # [L, H]
    "k_norm": P(),
    # gemma3.vision: images are split over both axes, so its weights only need storing in parts
    "patch_kernel": P(None, DATA),  # [patch * patch * c, E]
    "position": P(None, DATA),  # [T, E]
    "projector": P(DATA, None),  # [E, D]
    "query": P(None, DATA, None, None),  # [L, E, n, e]
    "key": P(None, DATA, None, None),
    "value": P(None, DATA, None, None),
    "out": P(None, None, None, DATA),  # [L, n, e, E]
    "fc1": P(None, DATA, None),  # [L, E, f]
    "fc2": P(None, None, DATA),  # [L, f, E]
}

# A LoRA pair is split as its layer is: A carries the weight's input axes, B its output axes.
for _name in ("q", "k", "v", "o", "gate", "up", "down", "query", "key", "value", "out", "fc1", "fc2"):
    _stack, *_axes = PARTITION[_name]
    _inputs = 2 if _name in ("o", "out") else 1
    PARTITION[_name + ".a"] = P(_stack, *_axes[:_inputs], None)
    PARTITION[_name + ".b"] = P(_stack, None, *_axes[_inputs:])


def simulate_devices(count: int) -> None:
    """Make the CPU look like `count` devices; to be called before jax touches any."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"


def keep_compiled() -> None:
    """Keep compiled programs on disk, so that the next run starts in seconds: in the user's cache directory, or where
    JAX_COMPILATION_CACHE_DIR says.
    """
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "grpo-gemma3"))


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
    return jax.make_mesh(
        (data, tensor), (DATA, TENSOR), devices=devices[: data * tensor], axis_types=(jax.sharding.AxisType.Auto,) * 2
    )


def topology_mesh(topology: str, data: int, tensor: int) -> Mesh:
    """A `data` by `tensor` mesh of TPU chips that need not exist, such as "v5e:2x4": to compile for, not to run on.

    ValueError without `libtpu`, for a topology that it does not know, or one of another size. Where there is no TPU,
    JAX_PLATFORMS=cpu keeps jax from looking for one.
    """
    if find_spec("libtpu") is None:
        raise ValueError(f"compiling for {topology} needs the TPU's compiler; pip install libtpu")
    # Without these libtpu would look for a machine with TPUs, complain that it finds none, and serve one process only.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # A v4 chip is one device in every run, though it has two cores.
    whole_chips = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **whole_chips).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise ValueError(
            f"{topology} is no topology of TPU chips; name one such as v5e:2x4, v5e:16x16, v5p:2x2x1 or v6e:2x4"
        ) from error
    if data * tensor != len(devices):
        raise ValueError(f"--mesh {data},{tensor} needs {data * tensor} devices and {topology} has {len(devices)}")
    return Mesh(np.array(devices).reshape(data, tensor), (DATA, TENSOR))


def check_mesh(config, mesh: Mesh, *, prompts: int | None = None) -> None:
    """Refuse, before anything is compiled, a mesh that cannot split this model, or a batch of `prompts`, evenly.

    ValueError with the numbers.
    """
    data, tensor = mesh.shape[DATA], mesh.shape[TENSOR]
    divided = [
        (TENSOR, config.num_heads, "query heads"),
        (TENSOR, config.intermediate_size, "MLP width"),
        (TENSOR, config.vocab_size, "vocabulary"),
        (DATA, config.hidden_size, "model width"),
    ]
    if config.vision is not None:
        divided.append((DATA, config.vision.hidden_size, "vision width"))
    if prompts is not None:
        divided.append((DATA, prompts, "prompts"))
    for axis, size, name in divided:
        parts = mesh.shape[axis]
        if size % parts:
            raise ValueError(
                f"--mesh {data},{tensor} cannot split the {name}, {size}, into {parts} parts; "
                f"choose a {axis} axis that divides {size}"
            )
    if max(config.num_kv_heads, tensor) % min(config.num_kv_heads, tensor):
        raise ValueError(
            f"--mesh {data},{tensor} cannot share {config.num_kv_heads} key/value heads over {tensor} parts; "
            "choose a tensor axis that divides them or is a multiple of them"
        )


def _field_name(path) -> str:
    """The key of a leaf in `PARTITION`: its field name, with that of its layer before it in a LoRA pair ("q.a")."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return ".".join(names[-2:]) if names[-1] in ("a", "b") else names[-1]


def partition_specs(params, config, mesh: Mesh):
    """A pytree of `PartitionSpec` like `params` (any part of a model's parameters, arrays or shapes)."""
    replicate_kv = config.num_kv_heads < mesh.shape[TENSOR]

    def spec(path, _):
        name = _field_name(path)
        spec = PARTITION.get(name, P())
        if replicate_kv and name in ("k", "v", "k.b", "v.b"):
            return P(*(None if axis == TENSOR else axis for axis in spec))
        return spec

    return jax.tree_util.tree_map_with_path(spec, params)


def shardings(params, config, mesh: Mesh):
    """`partition_specs` as shardings, for placing arrays.

    An axis of size 1 splits nothing and is left out: XLA does not keep it, so that the output of one step would not
    look like its input, and the next step would be compiled again.
    """

    def sharding(spec: P) -> NamedSharding:
        axes = [axis if axis is not None and mesh.shape[axis] > 1 else None for axis in spec]
        while axes and axes[-1] is None:
            axes.pop()
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(sharding, partition_specs(params, config, mesh))


def gather_over_data(params, *, layer: bool = False):
    """Join the parts of each weight that are stored over `data`; the gradient is the reverse, a reduce-scatter.

    `layer` says that `params` is one layer of a stack, without the leading axis L that `PARTITION` counts.
    """
    if lax.axis_size(DATA) == 1:
        return params  # XLA would copy each weight on a CPU

    def gather(path, x):
        spec = tuple(PARTITION.get(_field_name(path), P()))[int(layer) :]
        return lax.all_gather(x, DATA, axis=spec.index(DATA), tiled=True) if DATA in spec else x

    return jax.tree_util.tree_map_with_path(gather, params)


def gather_over_tensor(x: jax.Array) -> jax.Array:
    """Concatenate the shards' rows along the first axis; the result is the same on every tensor shard."""
    return lax.all_gather(x, TENSOR, axis=0, tiled=True, to="invarying")


def copy_to_tensor(x: jax.Array) -> jax.Array:
    """The identity on what all tensor shards hold: the gradients of its uses are added, and then summed over them once.

    Without it each use would sum its own (f and g of Megatron, arXiv 1909.08053, are this and `sum_over_tensor`).
    """
    # A cast would be refused in the token loop, where x counts as differing between the shards already.
    return x + zeros_varying((), x.dtype, TENSOR)


def copy_to_shards_of(x: jax.Array, weight: jax.Array) -> jax.Array:
    """The identity on a weight that more shards hold than hold the same x: its gradient is summed over all of these.

    JAX does so by itself for its own products; a gradient rule written by hand must be given arrays that differ between
    the same shards. Zeros made like x are marked as x is.
    """
    return weight + jnp.zeros_like(x, weight.dtype, ())


def sum_over_tensor(x: jax.Array) -> jax.Array:
    return lax.psum(x, TENSOR)


def max_over_tensor(x: jax.Array) -> jax.Array:
    return lax.pmax(x, TENSOR)


def min_over_tensor(x: jax.Array) -> jax.Array:
    return lax.pmin(x, TENSOR)


def sum_over_later_shards(x: jax.Array) -> jax.Array:
    """The sum of what the tensor shards after this one hold."""
    parts = lax.all_gather(x, TENSOR)
    later = jnp.arange(parts.shape[0]) > tensor_shard()
    return jnp.where(jnp.expand_dims(later, range(1, parts.ndim)), parts, 0).sum(axis=0)


def sum_over_data(x):
    return lax.psum(x, DATA)


def max_over_data(x):
    return lax.pmax(x, DATA)


def num_tensor_shards() -> int:
    return lax.axis_size(TENSOR)


def tensor_shard() -> jax.Array:
    """Which part of the tensor axis this device holds."""
    return lax.axis_index(TENSOR)


def own_kv_heads(weight: jax.Array, num_kv_heads: int, axis: int) -> jax.Array:
    """The key/value heads that this shard's query heads use, of a weight that holds all of them because K < tensor.

    Query heads are split evenly, so `tensor // K` neighbouring shards share one key/value head.
    """
    tensor = num_tensor_shards()
    if num_kv_heads >= tensor:
        return weight
    head = tensor_shard() // (tensor // num_kv_heads)
    return lax.dynamic_slice_in_dim(weight, head, 1, axis)


def on_one_device(function, **static):
    """Run model code on a 1,1 mesh: for use outside training, where arrays are plain and nothing is split."""
    mesh = jax.make_mesh(
        (1, 1), (DATA, TENSOR), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    return jax.jit(jax.shard_map(partial(function, **static), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))


def zeros_varying(shape: tuple[int, ...], dtype, *axes: str) -> jax.Array:
    """Zeros marked as differing between the devices of `axes`, as the carry of a loop must be from the start."""
    return lax.pcast(jnp.zeros(shape, dtype), axes, to="varying")
