"""The memory that sampling takes on a device, and whether weights joined once fit in it."""

import math
from dataclasses import replace

import jax

from gemma3.cache import cache_slots
from gemma3.config import Config
from gemma3.filters import Sampling
from gemma3.mesh import DATA, TENSOR, Model
from gemma3.params import Params
from gemma3.sample import smaller_sizes


def cache_bytes(config: Config, num_prompts: int, prompt_length: int, sampling: Sampling, itemsize: int) -> int:
    """Bytes of keys and values while sampling, on one device that holds all heads:

    2 · K · H · itemsize · Σ_layers ( Q · min(P, W_l) + Q · G · min(C, W_l) ),  W_l the layer's window or infinity.
    """
    own = cache_slots(config, sampling.max_completion_length)
    shared = cache_slots(config, prompt_length)
    tokens = num_prompts * (sum(shared) + sampling.num_generations * sum(own))
    return 2 * config.num_kv_heads * config.head_dim * itemsize * tokens


def decoding_bytes(params: Params, model: Model, num_prompts: int, prompt_length: int, sampling: Sampling) -> int:
    """Bytes that `sample` needs on each device: stored weights, a copy of the language model's by layer, and caches.

    While rows move to a smaller loop, the caches of both are there. params: arrays or shapes; num_prompts: Q of the
    whole batch.
    """
    data, tensor = model.mesh.shape[DATA], model.mesh.shape[TENSOR]
    specs = model.specs(params)

    def bytes_of(tree, specs, parts: dict[str, int]) -> int:
        shares = jax.tree.map(lambda spec: math.prod(parts.get(axis, 1) for axis in spec), specs)
        return sum(jax.tree.leaves(jax.tree.map(lambda x, share: x.size * x.dtype.itemsize // share, tree, shares)))

    stored = bytes_of(params, specs, {DATA: data, TENSOR: tensor})
    joined = bytes_of(params.text.blocks, specs.text.blocks, {TENSOR: tensor})
    if data > 1:
        joined += bytes_of(params.text.embedding, specs.text.embedding, {TENSOR: tensor})
    itemsize = params.text.embedding.dtype.itemsize
    rows = (-(-num_prompts // data), sampling.num_generations)
    caches = sum(
        cache_bytes(model.config, q, prompt_length, replace(sampling, num_generations=g), itemsize)
        for q, g in [rows, *smaller_sizes(*rows, sampling.max_completion_length)[:1]]
    )
    return stored + joined + caches // min(tensor, model.config.num_kv_heads)


def device_memory(name: str = "bytes_limit") -> int | None:
    """Bytes of memory on one device, by jax's name; None on a backend that does not report them, such as the CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get(name)


def choose_gather(needed: int, memory: int | None) -> tuple[bool, str]:
    """`gather_once` for `sample`, True if `needed` (from `decoding_bytes`) fits in `memory`, and a sentence about it.

    Both are bytes on one device; `memory` None (not known) counts as enough. A tenth is left for everything else.
    """
    if memory is None:
        return True, f"decoding joins the weights once a rollout and needs {needed / 2**30:.2f} GiB a device"
    share = f"{needed / 2**30:.2f} GiB of {memory / 2**30:.2f} a device"
    if needed <= 0.9 * memory:
        return True, f"decoding joins the weights once a rollout and needs {share}"
    return False, (
        "decoding joins one layer's weights at a time, for every token, which is slower: "
        f"joined at once they would need {share}; a longer tensor axis needs less"
    )
