"""The bytes that a decode step moves on a TPU, divided by the least it could move; the TPU's own compiler counts them.

    pip install libtpu && python -m benchmarks.roofline      # no TPU is needed: nothing runs

Decoding is bound by memory: a step must read the weights once, each prompt's keys and values once for its whole group,
and each completion's own. The compiled program for `gemma3.sample.next_token`, with weights already joined over `data`,
says for each operation what it reads and writes and where that lies. Counted is what travels to or from the chip's main
memory: operands and results there, and copies to and from on-chip memory, the sampler's included. The body of a scan
would count once, but the step's loop over layers is a Python loop.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu would look for a TPU
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import argparse
import math
import re
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec
from rich.console import Console
from rich.table import Table

from gemma3.attention import KeyValues
from gemma3.cache import PromptCache, cache_slots
from gemma3.config import Config
from gemma3.files.published import CONFIGS
from gemma3.filters import Sampling
from gemma3.lora import LoraBlock
from gemma3.mesh import DATA, TENSOR, Model
from gemma3.params import param_shapes
from gemma3.sample import Fixed, Loop, next_token
from gemma3.transformer import Layer, LayerKind, layer_kinds
from grpo.plan.programs import topology_mesh

ROWS = Spec(DATA)


class Setting(NamedTuple):
    """What is decoded, and where."""

    num_prompts: int = 8  # Q
    prompt_length: int = 512  # P
    sampling: Sampling = Sampling(num_generations=8, max_completion_length=512)  # G and C, all of it held in the cache
    topology: str = "v5e:2x4"
    mesh: tuple[int, int] = (2, 4)


class Count(NamedTuple):
    """Bytes a chip moves in one step."""

    weights: int  # this and the next two must be read: the least
    prompt_cache: int
    own_cache: int
    moved: int  # what the compiled step moves
    compile_seconds: float

    @property
    def least(self) -> int:
        return self.weights + self.prompt_cache + self.own_cache


def _without_data(spec: Spec) -> Spec:
    return Spec(*(None if axis == DATA else axis for axis in spec))


def _inputs(model: Model, setting: Setting) -> tuple[tuple, tuple]:
    """The arguments of a step as shapes, and how they are split: weights, `Fixed` without the weights, `Loop`."""
    config, q, sampling = model.config, setting.num_prompts, setting.sampling
    g, c = sampling.num_generations, sampling.max_completion_length
    heads = max(config.num_kv_heads, model.mesh.shape[TENSOR])  # a head that several shards need is held by each
    array = jax.ShapeDtypeStruct

    text = param_shapes(config, jnp.bfloat16).text
    specs = jax.tree.map(_without_data, model.specs(text))
    by_head = array((text.blocks.k.shape[1], heads, config.head_dim), jnp.bfloat16)
    block = jax.tree.map(lambda x: array(x.shape[1:], x.dtype), text.blocks)._replace(k=by_head, v=by_head)
    block_spec = jax.tree.map(lambda spec: Spec(*spec[1:]), specs.blocks)
    block_spec = block_spec._replace(k=Spec(None, TENSOR), v=Spec(None, TENSOR))
    weights = (text.embedding, text.final_norm, [block] * config.num_layers)
    weight_specs = (specs.embedding, specs.final_norm, [block_spec] * config.num_layers)

    def caches(*rows: int, length: int) -> list[KeyValues]:
        shapes = [(*rows, slots, config.head_dim) for slots in cache_slots(config, length)]
        return [KeyValues(*(array(shape, jnp.bfloat16) for _ in "kv")) for shape in shapes]

    def cache_specs(*axes) -> list[KeyValues]:
        return [KeyValues(Spec(*axes), Spec(*axes))] * config.num_layers

    fixed = (
        [PromptCache(kv, array((q,), jnp.int32)) for kv in caches(q, heads, length=setting.prompt_length)],
        array((q,), jnp.int32),
        array((q, g), jax.random.key(0).dtype),
        array((config.vocab_size,), jnp.bool_),
    )
    fixed_specs = ([PromptCache(kv, ROWS) for kv in cache_specs(DATA, TENSOR)], ROWS, ROWS, Spec(TENSOR))
    loop = Loop(
        t=array((), jnp.int32),
        done=array((q, g), jnp.bool_),
        place=array((q, g), jnp.int32),
        ids=array((q * g, c), jnp.int32),
        logps=array((q * g, c), jnp.float32),
        caches=caches(q * heads * g, length=c),
    )
    loop_specs = Loop(Spec(), ROWS, ROWS, ROWS, ROWS, cache_specs((DATA, TENSOR)))
    return (weights, fixed, loop), (weight_specs, fixed_specs, loop_specs)


def _one_step(weights, fixed, loop: Loop, *, config: Config, sampling: Sampling) -> Loop:
    embedding, final_norm, blocks = weights
    kinds = layer_kinds(config)
    layers = [Layer(w, LoraBlock(), LayerKind(*(x[i] for x in kinds))) for i, w in enumerate(blocks)]
    readers = [lambda x, layer=layer: layer for layer in layers]
    return next_token(Fixed(embedding, final_norm, readers, *fixed), loop, config=config, sampling=sampling)


class Stored(NamedTuple):
    """An array of a compiled program."""

    bytes: int
    outside: bool  # in main memory; otherwise in a memory on the chip


def _arrays(type_text: str) -> list[Stored]:
    """The arrays of a type such as "(f32[4,8]{1,0:T(4,128)}, bf16[640,2560]{1,0:T(8,128)(2,1)S(1)})"."""
    found = re.findall(r"([a-z]+)(\d*)\[([\d,]*)\](\{[^}]*\})?", type_text)
    return [
        Stored(math.prod(int(n) for n in shape.split(",") if n) * (int(bits or 8) // 8), "S(" not in layout)
        for _, bits, shape, layout in found
    ]


def bytes_moved(program: str) -> int:
    """The bytes that a compiled TPU program moves to or from main memory, from its text."""
    results: dict[str, list[Stored]] = {}
    moved = 0
    for line in program[program.index("\nENTRY") :].splitlines():
        parts = re.match(r"\s*(?:ROOT )?%(\S+) = (.*?)\s([a-z][\w-]*)\((.*)", line)
        if parts is None:
            continue
        name, type_text, operation, rest = parts.groups()
        result = results[name] = _arrays(type_text)
        operands = [x for other in re.findall(r"%([\w.-]+)", rest.split("), ")[0]) for x in results.get(other, ())]
        if operation in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast") or operation[-5:] == "-done":
            continue
        if operation in ("copy-start", "slice-start"):  # types (to, from, ...) and ((from), to, ...)
            copied = min(x.bytes for x in result[:2])
            moved += copied * sum(x.outside for x in result[:2])
        elif operation == "dynamic-update-slice":  # in place: only the update is read and written
            moved += 2 * operands[1].bytes * result[0].outside
        elif name.startswith("gather_fusion"):  # reads only the rows that it returns
            moved += sum(2 * x.bytes for x in result)
        else:
            moved += sum(x.bytes for x in [*result, *operands] if x.outside)
    return moved


def count(config: Config, setting: Setting) -> Count:
    """Compile one step of the sampler and count its bytes."""
    mesh = topology_mesh(setting.topology, *setting.mesh)
    shapes, specs = _inputs(Model(config, mesh), setting)
    body = partial(_one_step, config=config, sampling=setting.sampling)
    body = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=specs[2])
    split = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    weights, fixed, loop = jax.tree.map(split, shapes, specs)

    def bytes_of(tree) -> int:
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    lowered = jax.jit(body, donate_argnums=2).lower(weights, fixed, loop)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    return Count(
        weights=bytes_of(weights),
        prompt_cache=bytes_of([prompt.kv for prompt in fixed[0]]),
        own_cache=bytes_of(loop.caches),
        moved=bytes_moved(compiled.as_text()),
        compile_seconds=seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["gemma-3-4b-it", "gemma-3-1b-it"], help="published names")
    setting = Setting()
    q, p, sampling, topology, (data, tensor) = setting
    g, c = sampling.num_generations, sampling.max_completion_length
    title = f"One decode step, Q={q}, G={g}, P={p}, own cache {c}, mesh {data},{tensor} on {topology}: GB a chip"
    table = Table(title=title)
    for column in ("model", "weights", "prompts' cache", "own cache", "least", "moved", "moved / least", "compile, s"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in parser.parse_args().models:
        row = count(CONFIGS[name], setting)
        figures = [f"{x / 1e9:.3f}" for x in (row.weights, row.prompt_cache, row.own_cache, row.least, row.moved)]
        table.add_row(name, *figures, f"{row.moved / row.least:.3f}", f"{row.compile_seconds:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
