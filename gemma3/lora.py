"""LoRA (arXiv 2106.09685) on the language layers, and where asked on the vision tower's: which projections,
initialisation as PEFT's, and merging.

`lora=None` is the base model everywhere, so a reference policy needs no second copy of the weights.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma3.config import Config, VisionConfig


class Adapter(NamedTuple):
    """The two factors of one projection's update, stacked over L, float32."""

    a: jax.Array  # [L, inputs..., r]
    b: jax.Array  # [L, r, outputs...]


class LoraBlock(NamedTuple):
    """The adapters of the decoder blocks; None where a projection is not adapted."""

    q: Adapter | None = None
    k: Adapter | None = None
    v: Adapter | None = None
    o: Adapter | None = None
    gate: Adapter | None = None
    up: Adapter | None = None
    down: Adapter | None = None


class LoraVisionBlock(NamedTuple):
    """The adapters of the vision tower's encoder blocks, likewise."""

    query: Adapter | None = None
    key: Adapter | None = None
    value: Adapter | None = None
    out: Adapter | None = None
    fc1: Adapter | None = None
    fc2: Adapter | None = None


TARGETS, VISION_TARGETS = LoraBlock._fields, LoraVisionBlock._fields


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora:
    """A model's adapter: its arrays are the trained parameters; the scale is a constant."""

    blocks: LoraBlock
    scale: float = field(metadata={"static": True})
    vision: LoraVisionBlock | None = None  # None leaves the tower as it is


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's names and meaning; ValueError for a rank or target that cannot be."""

    r: int = 16
    alpha: float = 16.0
    rslora: bool = False
    targets: tuple[str, ...] = TARGETS
    vision: bool = False  # all projections of the vision tower too

    def __post_init__(self):
        if self.r < 1:
            raise ValueError(f"--lora-r {self.r}: the rank must be at least 1 (0 trains all language weights instead)")
        if not self.targets or (unknown := set(self.targets) - set(TARGETS)):
            named = ", ".join(sorted(unknown)) if self.targets else "nothing"
            raise ValueError(f"--lora-targets names {named}; choose among {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rank stabilisation (arXiv 2312.03732)."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)


def projection_shapes(config: Config) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The input and output axes of each projection of a decoder block."""
    d, f = (config.hidden_size,), (config.intermediate_size,)
    queries, keys = (config.num_heads, config.head_dim), (config.num_kv_heads, config.head_dim)
    return {
        "q": (d, queries),
        "k": (d, keys),
        "v": (d, keys),
        "o": (queries, d),
        "gate": (d, f),
        "up": (d, f),
        "down": (f, d),
    }


def vision_projection_shapes(config: VisionConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The same of an encoder block of the vision tower."""
    e, f = (config.hidden_size,), (config.intermediate_size,)
    heads = (config.num_heads, config.hidden_size // config.num_heads)
    return {
        "query": (e, heads),
        "key": (e, heads),
        "value": (e, heads),
        "out": (heads, e),
        "fc1": (e, f),
        "fc2": (f, e),
    }


def lora_shapes(
    config: Config, r: int, scale: float, targets: Iterable[str], vision_targets: Iterable[str] = ()
) -> Lora:
    """An adapter of the given projections as `jax.ShapeDtypeStruct`s: nothing is allocated."""

    def pairs(layers: int, axes: dict, names: Iterable[str]) -> dict[str, Adapter]:
        array = lambda *shape: jax.ShapeDtypeStruct((layers, *shape), jnp.float32)  # noqa: E731
        return {name: Adapter(array(*axes[name][0], r), array(r, *axes[name][1])) for name in names}

    blocks = LoraBlock(**pairs(config.num_layers, projection_shapes(config), targets))
    if not vision_targets:
        return Lora(blocks, scale)
    tower = pairs(config.vision.num_layers, vision_projection_shapes(config.vision), vision_targets)
    return Lora(blocks, scale, LoraVisionBlock(**tower))


def init_lora(key: jax.Array, config: Config, lora: LoraConfig) -> Lora:
    """A ~ U(-1/sqrt(inputs), 1/sqrt(inputs)) and B = 0, PEFT's default: the adapted model starts as the base model.

    ValueError where the vision tower of a text-only model is to be adapted.
    """
    if lora.vision and config.vision is None:
        raise ValueError(f"--lora-vision adapts the vision tower, and a {config.model_type} model has none")
    shapes = lora_shapes(config, lora.r, lora.scale, lora.targets, VISION_TARGETS if lora.vision else ())

    def fresh(path, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name, factor = path[-2].name, path[-1].name
        if factor == "b":
            return jnp.zeros(shape.shape, jnp.float32)
        bound = np.prod(shape.shape[1:-1]) ** -0.5
        a_key = jax.random.fold_in(key, (TARGETS + VISION_TARGETS).index(name))
        return jax.random.uniform(a_key, shape.shape, jnp.float32, -bound, bound)

    return jax.tree_util.tree_map_with_path(fresh, shapes)


def merge(params, lora: Lora):
    """The model with W + scale * A · B in place of each adapted W, a float32 sum rounded once to W's dtype.

    One layer at a time, since in float32 a whole stack is twice what it is in bfloat16. Compiled with `params` donated
    the sums are written over the weights, and there is no second model in memory.
    """

    def merged(weight: jax.Array, pair: Adapter) -> jax.Array:
        a, b = jnp.asarray(pair.a), jnp.asarray(pair.b)

        def add(layer: jax.Array, stack: jax.Array) -> jax.Array:
            product = jnp.tensordot(a[layer], b[layer], axes=1, precision="highest")
            return stack.at[layer].set((stack[layer].astype(jnp.float32) + lora.scale * product).astype(stack.dtype))

        return jax.lax.fori_loop(0, len(weight), add, weight)

    def adapted(part, adapters):
        pairs = {name: pair for name, pair in adapters._asdict().items() if pair is not None}
        blocks = {name: merged(getattr(part.blocks, name), pair) for name, pair in pairs.items()}
        return part._replace(blocks=part.blocks._replace(**blocks))

    params = params._replace(text=adapted(params.text, lora.blocks))
    return params if lora.vision is None else params._replace(vision=adapted(params.vision, lora.vision))
