"""LoRA (arXiv 2106.09685) on the projections of the language model and, optionally, of the vision tower: shapes, PEFT's
initialisation, merging. Also `Policy`: a model's weights with an adapter or without.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma3.config import Config
from gemma3.params import AXES, Params, axis_sizes, shape_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraPair:
    """The two factors of scale * A · B, which is added to one projection, float32; in a `Lora` stacked over L."""

    a: jax.Array  # [inputs..., r]
    b: jax.Array  # [r, outputs...]
    scale: float = field(metadata={"static": True})  # alpha / r: a constant


class LoraBlock(NamedTuple):
    """The pairs of the decoder blocks; None where a projection is not adapted."""

    q: LoraPair | None = None
    k: LoraPair | None = None
    v: LoraPair | None = None
    o: LoraPair | None = None
    gate: LoraPair | None = None
    up: LoraPair | None = None
    down: LoraPair | None = None


class LoraVisionBlock(NamedTuple):
    """The pairs of the vision tower's encoder blocks, likewise."""

    query: LoraPair | None = None
    key: LoraPair | None = None
    value: LoraPair | None = None
    out: LoraPair | None = None
    fc1: LoraPair | None = None
    fc2: LoraPair | None = None


TARGETS, VISION_TARGETS = LoraBlock._fields, LoraVisionBlock._fields


class Lora(NamedTuple):
    """A model's adapter."""

    blocks: LoraBlock = LoraBlock()
    vision: LoraVisionBlock | None = None  # None leaves the tower as it is

    @property
    def pairs(self) -> dict[str, LoraPair]:
        """The pairs that are not None, by the name of the projection that each adapts."""
        named = self.blocks._asdict() | (self.vision._asdict() if self.vision else {})
        return {name: pair for name, pair in named.items() if pair is not None}

    @property
    def r(self) -> int:
        return next(iter(self.pairs.values())).a.shape[-1]

    @property
    def scale(self) -> float:
        return next(iter(self.pairs.values())).scale


class Policy(NamedTuple):
    """Weights that answer prompts: the papers' policy, old policy and reference are each a `Policy`.

    With an adapter, the reference is `Policy(params)`: it shares the policy's weights and needs no second copy.
    """

    params: Params
    lora: Lora | None = None


@dataclass(frozen=True)
class LoraConfig:
    """The settings of LoRA, with PEFT's names and meaning; ValueError for an impossible rank or target."""

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


def lora_shapes(
    config: Config, r: int, scale: float, targets: Iterable[str], vision_targets: Iterable[str] = ()
) -> Lora:
    """An adapter of the given projections as `jax.ShapeDtypeStruct`s: nothing is allocated."""
    sizes = axis_sizes(config) | {"r": r}

    def pairs(layers: int, names: Iterable[str]) -> dict[str, LoraPair]:
        array = lambda name: jax.ShapeDtypeStruct((layers, *shape_of(AXES[name], sizes)), jnp.float32)  # noqa: E731
        return {name: LoraPair(array(f"{name}.a"), array(f"{name}.b"), scale) for name in names}

    blocks = LoraBlock(**pairs(config.num_layers, targets))
    if not vision_targets:
        return Lora(blocks)
    return Lora(blocks, LoraVisionBlock(**pairs(config.vision.num_layers, vision_targets)))


def init_lora(key: jax.Array, config: Config, lora: LoraConfig) -> Lora:
    """A ~ U(-1/sqrt(inputs), 1/sqrt(inputs)) and B = 0, PEFT's default: the adapted model starts as the base model.

    ValueError if the vision tower is to be adapted and the model has none.
    """
    if lora.vision and config.vision is None:
        raise ValueError(f"--lora-vision adapts the vision tower, and a {config.model_type} model has none")
    shapes = lora_shapes(config, lora.r, lora.scale, lora.targets, VISION_TARGETS if lora.vision else ())

    def fresh(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name, factor = path[-2].name, path[-1].name
        if factor == "b":
            return jnp.zeros(leaf.shape, jnp.float32)
        _, *inputs, _ = leaf.shape
        bound = math.prod(inputs) ** -0.5
        a_key = jax.random.fold_in(key, (TARGETS + VISION_TARGETS).index(name))
        return jax.random.uniform(a_key, leaf.shape, jnp.float32, -bound, bound)

    return jax.tree_util.tree_map_with_path(fresh, shapes)


def merge(params: Params, lora: Lora) -> Params:
    """The params with W + scale * A · B in place of each adapted W. The sum is float32, rounded once to W's dtype.

    It works on one layer at a time, since a whole stack in float32 is twice its size in bfloat16. If compiled with
    `params` donated, it writes the sums over the weights, and memory holds no second copy.
    """

    def merged(weight: jax.Array, pair: LoraPair) -> jax.Array:
        a, b = jnp.asarray(pair.a), jnp.asarray(pair.b)

        def add(layer: jax.Array, stack: jax.Array) -> jax.Array:
            product = jnp.tensordot(a[layer], b[layer], axes=1, precision="highest")
            return stack.at[layer].set((stack[layer].astype(jnp.float32) + pair.scale * product).astype(stack.dtype))

        return jax.lax.fori_loop(0, len(weight), add, weight)

    def merge_part(part, pairs: LoraBlock | LoraVisionBlock):
        adapted = {name: pair for name, pair in pairs._asdict().items() if pair is not None}
        blocks = {name: merged(getattr(part.blocks, name), pair) for name, pair in adapted.items()}
        return part._replace(blocks=part.blocks._replace(**blocks))

    params = params._replace(text=merge_part(params.text, lora.blocks))
    return params if lora.vision is None else params._replace(vision=merge_part(params.vision, lora.vision))
