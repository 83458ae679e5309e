"""The devices of a run: simulated ones, programs kept between runs, and the mesh that --mesh asks for."""

import os
from pathlib import Path

import jax

from gemma3.filters import num_blocks
from gemma3.mesh import DATA, TENSOR, Model


def simulate_devices(count: int) -> None:
    """Make the CPU look like `count` devices; call it before jax touches any device."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"


def keep_compiled() -> None:
    """Keep compiled programs for later runs: in the user's cache directory, or as JAX_COMPILATION_CACHE_DIR says."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "grpo-gemma3"))


def mesh_shape(text: str) -> tuple[int, int]:
    """The two numbers of --mesh DATA,TENSOR."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--mesh {text}: give two numbers, DATA,TENSOR, such as 2,4")
    return int(parts[0]), int(parts[1])


def check_mesh(model: Model) -> None:
    """Raise ValueError, before anything is compiled, for a mesh that cannot split this model evenly."""
    config, (data, tensor) = model.config, (model.mesh.shape[axis] for axis in (DATA, TENSOR))
    divided = [
        (TENSOR, config.num_heads, "query heads"),
        (TENSOR, config.intermediate_size, "MLP width"),
        (TENSOR, num_blocks(config.vocab_size), "vocabulary's blocks"),
        (DATA, config.hidden_size, "model width"),
    ]
    if config.vision is not None:
        divided.append((DATA, config.vision.hidden_size, "vision width"))
    for axis, size, name in divided:
        parts = model.mesh.shape[axis]
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
