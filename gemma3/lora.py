"""LoRA (arXiv 2106.09685) on the language layers: initialisation as PEFT's, which projections, and merging.

`lora=None` is the base model everywhere, so a reference policy needs no second copy of the weights.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma3.config import Config

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora:
    """A model's adapter: its arrays are the trained parameters; the scale is a constant."""

    blocks: LoraBlock
    scale: float = field(metadata={"static": True})


@dataclass(frozen=True)
class LoraConfig:
    """PEFT's names and meaning; ValueError for a rank or target that cannot be."""

    r: int = 16
    alpha: float = 16.0
    rslora: bool = False
    targets: tuple[str, ...] = TARGETS

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
    """The input and output axes of each projection that can be adapted."""
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


def init_lora(key: jax.Array, config: Config, lora: LoraConfig) -> Lora:
    """A ~ U(-1/sqrt(inputs), 1/sqrt(inputs)) and B = 0, PEFT's default: the adapted model starts as the base model."""
    pairs = {}
    for name, (inputs, outputs) in projection_shapes(config).items():
        if name in lora.targets:
            bound = np.prod(inputs) ** -0.5
            a_key = jax.random.fold_in(key, TARGETS.index(name))
            a = jax.random.uniform(a_key, (config.num_layers, *inputs, lora.r), jnp.float32, -bound, bound)
            pairs[name] = Adapter(a, jnp.zeros((config.num_layers, lora.r, *outputs), jnp.float32))
    return Lora(LoraBlock(**pairs), lora.scale)


def merge(blocks, lora: Lora):
    """The decoder blocks with W + scale * A · B in place of W, computed in float32 and rounded once to W's dtype."""

    def merged(weight: jax.Array, pair: Adapter) -> jax.Array:
        layers, r = pair.b.shape[:2]
        product = pair.a.reshape(layers, -1, r) @ pair.b.reshape(layers, r, -1)
        return (weight.astype(jnp.float32) + lora.scale * product.reshape(weight.shape)).astype(weight.dtype)

    pairs = {name: pair for name, pair in lora.blocks._asdict().items() if pair is not None}
    return blocks._replace(**{name: merged(getattr(blocks, name), pair) for name, pair in pairs.items()})
