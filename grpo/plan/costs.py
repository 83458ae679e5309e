"""The cost of one training step, counted by hand: floating-point operations, bytes read, bytes sent.

This is arithmetic on sizes; nothing is compiled. A compiler counts the body of a loop once, so it cannot count a whole
step; `benchmarks/roofline_update.py` compares these counts with a compiler's count of one layer. Every prompt and every
completion is taken to have its greatest length.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from gemma3.config import Config, VisionConfig
from gemma3.filters import Sampling
from gemma3.lora import TARGETS, LoraConfig
from gemma3.mesh import DATA, TENSOR, Model
from gemma3.params import AXES, axis_sizes, param_shapes, shape_of
from grpo.run.memory import cache_bytes


class Chip(NamedTuple):
    flops: float  # a second, at the peak for bfloat16 products
    memory: int  # bytes that a program may use: what the TPU compiler leaves of the published size
    bandwidth: float  # bytes a second from that memory
    link: float  # bytes a second from other chips


# Published peaks, bandwidths and links. Each chip has a page: https://cloud.google.com/tpu/docs/v5e and likewise v4,
# v5p, v6e. The pages give links of 1600 Gbit/s (v5e), 4800 Gbit/s (v5p) and, both directions together, 800 GB/s (v6e).
# The launch of v5p named 2400 Gbit/s for v4.
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
    num_prompts: int  # Q
    prompt_length: int  # P
    sampling: Sampling  # with G and C
    images: int  # of each prompt
    lora: LoraConfig | None  # None: all language weights are trained
    train_vision: bool = False  # all weights of the vision tower too

    @property
    def group(self) -> int:
        return self.sampling.num_generations

    @property
    def length(self) -> int:
        return self.sampling.max_completion_length


def weight_flops(names: Iterable[str], sizes: Mapping[str, int]) -> int:
    """FLOPs of one token through these weights of one layer: two per weight."""
    return 2 * sum(math.prod(shape_of(AXES[name], sizes)) for name in names)


def attention_flops(config: Config, positions: range) -> int:
    """FLOPs of attention in all layers, for the queries at `positions` of one sequence: scores and weighted values.

    Each query meets the keys that it may see. Image tokens also see later tokens of their image; that is left out.
    """
    seen = {local: sum(min(i + 1, config.sliding_window if local else i + 1) for i in positions) for local in (0, 1)}
    return 4 * config.num_heads * config.head_dim * sum(seen[local] for local in config.is_local)


def encoder_flops(vision: VisionConfig, hidden_size: int) -> int:
    """FLOPs of one image through the vision tower and the projector."""
    e, f, patches = vision.hidden_size, vision.intermediate_size, vision.patches_per_side**2
    layer = patches * (2 * (4 * e * e + 2 * e * f) + 4 * e * patches)
    patch_embedding = 2 * patches * vision.patch_size**2 * 3 * e
    return patch_embedding + vision.num_layers * layer + 2 * vision.tokens_per_image * e * hidden_size


def images_flops(work: Work) -> int:
    """FLOPs of encoding the images of a step."""
    if not work.images:
        return 0
    return work.num_prompts * work.images * encoder_flops(work.config.vision, work.config.hidden_size)


def stack_flops(work: Work, tokens: int, attention: int, weights: int = 1, others: int = 1) -> int:
    """FLOPs of all layers over so many tokens. attention: FLOPs of one pass over attention; weights, others: how many
    passes there are over weights, and over adapters and attention."""
    sizes = axis_sizes(work.config)
    layer = weights * weight_flops(TARGETS, sizes)
    if work.lora is not None:
        adapters = [f"{name}.{part}" for name in work.lora.targets for part in "ab"]
        layer += others * weight_flops(adapters, sizes | {"r": work.lora.r})
    return tokens * work.config.num_layers * layer + others * attention


def logps_flops(work: Work, weights: int = 1, others: int = 1) -> int:
    """FLOPs of the log-probs of all completions under one policy: each prompt and each completion is read once.

    weights, others: how many passes there are, as for `stack_flops`; over the logits as many as over weights.
    """
    config, start = work.config, work.prompt_length
    completion = range(start, start + work.length - 1)  # nothing follows the last token, so it is not read
    attention = attention_flops(config, range(start)) + work.group * attention_flops(config, completion)
    layers = stack_flops(work, start + work.group * len(completion), attention, weights, others)
    logits = 2 * config.hidden_size * config.vocab_size  # of one token
    return work.num_prompts * (layers + weights * work.group * work.length * logits)


def update_flops(work: Work) -> int:
    """The least FLOPs of one gradient over all prompts and completions, with layers and chunks of logits recomputed.

    A product of a weight and activations costs one forward pass, one to recompute it, one for the gradient of the
    activations and, if the weight is trained, one for the gradient of the weight: 3 for frozen weights, 4 for adapters.
    A product of two activations, as in attention, always has both gradients: 4.
    """
    frozen = 3 if work.lora is not None else 4
    # A tower that learns encodes its images in the update: as many passes over its weights as in the layers.
    learns = work.train_vision if work.lora is None else work.lora.vision
    return logps_flops(work, frozen, 4) + (frozen * images_flops(work) if learns else 0)


def device_bytes(tree, placed) -> int:
    """Bytes that arrays or shapes take on one device, each split as its sharding in `placed` says."""
    sizes = jax.tree.map(lambda x, where: math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize, tree, placed)
    return sum(jax.tree.leaves(sizes))


def joined_bytes(config: Config, tensor: int, dtype: jnp.dtype) -> int:
    """Bytes of the language model on one device after it is joined over `data`: decoding reads them for each token."""
    text = param_shapes(config, dtype).text
    model = Model(config, AbstractMesh((1, tensor), (DATA, TENSOR)))
    return device_bytes(text, model.shardings(text))


def caches_bytes(work: Work, data: int, tensor: int, dtype: jnp.dtype) -> int:
    """Bytes of keys and values on one device while it samples, at their full length."""
    rows, itemsize = -(-work.num_prompts // data), jnp.dtype(dtype).itemsize
    whole = cache_bytes(work.config, rows, work.prompt_length, work.sampling, itemsize)
    return whole // min(tensor, work.config.num_kv_heads)


class Estimate(NamedTuple):
    """Seconds of a step if the hardware is never idle and never slower than its published peak."""

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
    num_logps: int,
) -> Estimate:
    """The seconds of one step on a mesh of DATA, TENSOR chips.

    Sampling encodes images and reads prompts at peak FLOP/s; then each of C tokens reads the weights and all the cache
    once from memory. An update does its least FLOPs at peak. Weights stored in parts over `data` come over the links:
    in sampling once for the prompts, then once (`gather_once`) or for every token, and this time is added; in an update
    twice forward and twice backward for each micro-batch, in parallel with the arithmetic. num_logps: how often a step
    computes further log-probs, for the old policy and the reference. Not counted: sums over `tensor`, host, rewards.
    """
    data, tensor = mesh
    chips, joined = data * tensor, joined_bytes(work.config, tensor, dtype)
    gather = joined * (data - 1) / data / chip.link
    token = (joined + caches_bytes(work, data, tensor, dtype)) / chip.bandwidth
    attention = attention_flops(work.config, range(work.prompt_length))
    prefill = work.num_prompts * stack_flops(work, work.prompt_length, attention)
    reading = (images_flops(work) + prefill) / chips / chip.flops
    sampling = reading + work.length * token + gather * (1 + (1 if gather_once else work.length))
    gathers = gather * (work.num_prompts // data // micro_batch)
    one_update = max(update_flops(work) / chips / chip.flops, 4 * gathers)
    one_more = max(logps_flops(work) / chips / chip.flops, 2 * gathers)
    return Estimate(sampling, num_iterations * one_update + num_logps * one_more)
