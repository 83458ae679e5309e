"""What one training step asks of the hardware, counted by hand: floating-point operations, bytes read, bytes sent.

Arithmetic on sizes only; nothing is compiled. A compiler counts the body of a loop once, so it cannot give a whole
step's; `benchmarks/roofline_update.py` holds these counts against the compiler's of one layer. Every prompt and
completion is taken to be as long as it may be.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from gemma3.config import Config, VisionConfig
from gemma3.lora import LoraConfig, projection_shapes
from gemma3.mesh import DATA, TENSOR, shardings
from gemma3.model import param_shapes
from gemma3.sample import cache_bytes


class Chip(NamedTuple):
    """One accelerator."""

    flops: float  # a second, at the peak of bfloat16 products
    memory: int  # bytes that a program may use: what the TPU compiler leaves of the published size
    bandwidth: float  # bytes a second from that memory
    link: float  # bytes a second from other chips


# Peaks, bandwidths and links as published, a page a chip: https://cloud.google.com/tpu/docs/v5e and likewise v4, v5p,
# v6e. Links are given there as 1600 Gbit/s (v5e), 4800 (v5p) and, both directions together, 800 GB/s (v6e); for v4
# the launch of v5p named 2400 Gbit/s.
CHIPS = {
    "v4": Chip(275e12, int(30.75 * 2**30), 1200e9, 300e9),
    "v5e": Chip(197e12, int(15.75 * 2**30), 819e9, 200e9),
    "v5p": Chip(459e12, int(95.73 * 2**30), 2765e9, 600e9),
    "v6e": Chip(918e12, int(31.24 * 2**30), 1638e9, 400e9),
}


@dataclass(frozen=True)
class Work:
    """The sizes of one step, all chips together."""

    config: Config
    prompts: int  # Q
    group: int  # G
    prompt_length: int  # P
    length: int  # C
    pictures: int  # of each prompt
    lora: LoraConfig | None  # None: all language weights are trained

    @property
    def prompt(self) -> range:
        """The positions of a prompt."""
        return range(self.prompt_length)

    @property
    def completion(self) -> range:
        """The positions of a completion that are read again: nothing follows its last token."""
        return range(self.prompt_length, self.prompt_length + self.length - 1)


def projection_flops(config: Config) -> int:
    """Of one token through the weights of one layer: two per weight."""
    return 2 * sum(math.prod(inputs + outputs) for inputs, outputs in projection_shapes(config).values())


def adapter_flops(config: Config, lora: LoraConfig) -> int:
    """Of one token through the adapters of one layer."""
    shapes = projection_shapes(config)
    return 2 * lora.r * sum(math.prod(axes) for name in lora.targets for axes in shapes[name])


def attention_flops(config: Config, positions: range) -> int:
    """Of the queries at `positions` of one sequence, in all layers: scores and mix over the keys each may see.

    A picture's tokens also see ahead within it; that is left out.
    """
    seen = {local: sum(min(i + 1, config.sliding_window if local else i + 1) for i in positions) for local in (0, 1)}
    return 4 * config.num_heads * config.head_dim * sum(seen[local] for local in config.is_local)


def logits_flops(config: Config) -> int:
    """Of one token's logits."""
    return 2 * config.hidden_size * config.vocab_size


def encoder_flops(vision: VisionConfig, hidden_size: int) -> int:
    """Of one picture through the vision tower and the projector."""
    e, f, patches = vision.hidden_size, vision.intermediate_size, vision.patches_per_side**2
    layer = patches * (2 * (4 * e * e + 2 * e * f) + 4 * e * patches)
    patch_embedding = 2 * patches * vision.patch_size**2 * 3 * e
    return patch_embedding + vision.num_layers * layer + 2 * vision.tokens_per_image * e * hidden_size


def pictures_flops(work: Work) -> int:
    """Of encoding the pictures of a step."""
    if not work.pictures:
        return 0
    return work.prompts * work.pictures * encoder_flops(work.config.vision, work.config.hidden_size)


def stack_flops(work: Work, tokens: int, attention: int, *, through: tuple[int, int, int]) -> int:
    """Of all layers over `tokens`; `through` counts the passes over weights, adapters and attention (whose single pass
    is `attention`)."""
    weights, adapters, mixing = through
    layer = weights * projection_flops(work.config)
    if work.lora is not None:
        layer += adapters * adapter_flops(work.config, work.lora)
    return tokens * work.config.num_layers * layer + mixing * attention


def prefill_flops(work: Work) -> int:
    """Of reading all prompts once."""
    attention = attention_flops(work.config, work.prompt)
    return work.prompts * stack_flops(work, work.prompt_length, attention, through=(1, 1, 1))


def score_flops(work: Work) -> int:
    """Of the log-probs of all completions under one policy: each prompt is read once, each completion once."""
    attention = attention_flops(work.config, work.prompt) + work.group * attention_flops(work.config, work.completion)
    tokens = work.prompt_length + work.group * len(work.completion)
    logits = work.group * work.length * logits_flops(work.config)
    return work.prompts * (stack_flops(work, tokens, attention, through=(1, 1, 1)) + logits)


def update_flops(work: Work) -> int:
    """The least of one gradient over all prompts and completions, each layer and each chunk of logits computed again.

    A product of a weight and activations costs one pass forward, one again, one backward with respect to the
    activations, and one with respect to the weight where it is trained: 3 for frozen weights, 4 for adapters. A product
    of two activations, as in attention, has two such gradients: 4.
    """
    frozen = 3 if work.lora is not None else 4
    attention = attention_flops(work.config, work.prompt) + work.group * attention_flops(work.config, work.completion)
    tokens = work.prompt_length + work.group * len(work.completion)
    logits = frozen * work.group * work.length * logits_flops(work.config)
    update = work.prompts * (stack_flops(work, tokens, attention, through=(frozen, 4, 4)) + logits)
    # A tower that learns encodes its pictures in the update; with weights frozen it is as the layers are.
    return update + (frozen * pictures_flops(work) if work.lora is not None and work.lora.vision else 0)


def device_bytes(tree, placed) -> int:
    """Bytes on one device of arrays or shapes, each split as its sharding in `placed` says."""
    sizes = jax.tree.map(lambda x, where: math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize, tree, placed)
    return sum(jax.tree.leaves(sizes))


def joined_bytes(config: Config, tensor: int, dtype: jnp.dtype) -> int:
    """Bytes of the language model on one device once joined over `data`: what a token of decoding reads of it."""
    text = param_shapes(config, dtype).text
    mesh = AbstractMesh((1, tensor), (DATA, TENSOR))
    return device_bytes(text, shardings(text, config, mesh))


def caches_bytes(work: Work, data: int, tensor: int, dtype: jnp.dtype) -> int:
    """Bytes of keys and values on one device while it samples, at their full length."""
    config, prompts = work.config, -(-work.prompts // data)
    whole = cache_bytes(config, prompts, work.group, work.prompt_length, work.length, jnp.dtype(dtype).itemsize)
    return whole // min(tensor, config.num_kv_heads)


class Estimate(NamedTuple):
    """Seconds, were the hardware never idle and never slower than its published peak."""

    sampling: float
    update: float


def estimate(
    work: Work,
    chip: Chip,
    mesh: tuple[int, int],
    dtype: jnp.dtype,
    *,
    micro_batch: int,
    gather_once: bool,
    num_iterations: int,
    scored: int,
) -> Estimate:
    """Of one step on a mesh of DATA, TENSOR chips.

    Sampling: pictures and prompts at peak FLOP/s, then for each of C tokens the weights and all the cache once from
    memory. Update: its least FLOPs at peak. Weights stored in parts over `data` come over the links: for sampling twice
    (`gather_once`) or for every token, added; for each micro-batch twice forward and twice backward, hidden behind the
    arithmetic. `scored` counts the further log-probs of a step: the old policy's, the reference's. Sums over `tensor`,
    the host's work and rewards are not counted.
    """
    data, tensor = mesh
    chips, joined = data * tensor, joined_bytes(work.config, tensor, dtype)
    gather = joined * (data - 1) / data / chip.link
    token = (joined + caches_bytes(work, data, tensor, dtype)) / chip.bandwidth
    reading = (pictures_flops(work) + prefill_flops(work)) / chips / chip.flops
    sampling = reading + work.length * token + gather * (1 + (1 if gather_once else work.length))
    gathers = gather * (work.prompts // data // micro_batch)
    one_update = max(update_flops(work) / chips / chip.flops, 4 * gathers)
    one_score = max(score_flops(work) / chips / chip.flops, 2 * gathers)
    return Estimate(sampling, num_iterations * one_update + scored * one_score)
