"""The FLOPs of a GRPO update, divided by the least it could do; the compiler of a TPU or of the CPU counts them.

    pip install libtpu && python -m benchmarks.roofline_update                        # no TPU is needed: nothing runs
    python -m benchmarks.roofline_update nano --plan cpu --mesh 1,1 --virtual-devices 1

The compiler counts the body of a loop once. So one layer (forward and backward, prompts and completions) and one chunk
of logits are compiled as they stand in the update's loops, and each count is multiplied by the turns of its loop. The
least is `grpo.plan.costs.update_flops`. `train.py --plan` says what the whole update holds in memory.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu would look for a TPU

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec
from rich.console import Console
from rich.table import Table

from gemma3.lora import Policy
from gemma3.mesh import DATA, TENSOR, sum_over_data
from gemma3.model import logit_chunks, logits_of, token_stats
from gemma3.params import Block, Params, Text
from gemma3.transformer import extend, prefill
from grpo.plan.costs import update_flops
from grpo.plan.plan import choose_backend, make_job
from grpo.plan.programs import Job, abstract_state
from grpo.run.devices import simulate_devices
from grpo.run.settings import Settings, check_batch, model_config, resolve_defaults


class Cost(NamedTuple):
    """What the compiler counts, on one chip."""

    flops: float
    moved: float  # bytes

    def times(self, count: float) -> "Cost":
        return Cost(self.flops * count, self.moved * count)


class Count(NamedTuple):
    """An update on one chip."""

    layers: Cost
    logits: Cost
    least: float  # FLOPs

    @property
    def flops(self) -> float:
        return self.layers.flops + self.logits.flops


def _cost(job: Job, body: Callable, arguments: tuple, specs: tuple) -> Cost:
    """The cost of `body`, a sum over all devices, and of its gradient with respect to the first argument."""
    mesh = job.model.mesh
    split = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    program = jax.shard_map(jax.value_and_grad(body), mesh=mesh, in_specs=specs, out_specs=(Spec(), specs[0]))
    analysis = jax.jit(program).lower(*jax.tree.map(split, arguments, specs)).compile().cost_analysis()
    return Cost(analysis["flops"], analysis["bytes accessed"])


def layer_cost(job: Job, prompts: int) -> Cost:
    """One layer over `prompts` prompts and their completions, with the gradients of its adapters and its inputs."""
    w, config = job.work, job.model.config
    config = replace(config, num_layers=1, layer_types=config.layer_types[:1])
    model = replace(job.model, config=config)
    state = abstract_state(replace(job, model=model))
    lora, blocks = state.trainable, state.frozen.text.blocks
    array = lambda *shape: jax.ShapeDtypeStruct((prompts, *shape), job.dtype)  # noqa: E731
    hidden = (array(w.prompt_length, config.hidden_size), array(w.group, w.length - 1, config.hidden_size))
    ids = jax.ShapeDtypeStruct((prompts, w.prompt_length), jnp.int32)

    def body(learned, blocks: Block, ids: jax.Array) -> jax.Array:
        lora, (read, extended) = learned
        policy = Policy(Params(Text(blocks=blocks), None), lora)
        read, kv = prefill(policy, read, ids > 0, ids, config=config)
        extended = extend(policy, extended, kv, (ids > 0).sum(axis=1), config=config)
        return sum_over_data(read.astype(jnp.float32).sum() + extended.astype(jnp.float32).sum())

    specs = ((model.specs(lora), (Spec(DATA), Spec(DATA))), model.specs(blocks), Spec(DATA))
    return _cost(job, body, ((lora, hidden), blocks, ids), specs)


def logits_cost(job: Job, tokens: int) -> Cost:
    """The log-probs of one chunk of `tokens` tokens, with the gradient of the hidden states."""
    config, rows = job.model.config, tokens * job.model.mesh.shape[DATA]
    hidden = jax.ShapeDtypeStruct((rows, config.hidden_size), job.dtype)
    embedding = jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), job.dtype)
    ids = jax.ShapeDtypeStruct((rows,), jnp.int32)

    def body(hidden, embedding, ids):
        @jax.checkpoint
        def logps(hidden):
            return token_stats(logits_of(embedding, hidden, config=config), ids).logps

        return sum_over_data(logps(hidden).sum())

    return _cost(job, body, (hidden, embedding, ids), (Spec(DATA), Spec(TENSOR), Spec(DATA)))


def count(job: Job) -> Count:
    """Compile the parts of an update."""
    w, (config, mesh) = job.work, (job.model.config, job.model.mesh)
    data, tensor, micro_batch = mesh.shape[DATA], mesh.shape[TENSOR], check_batch(job.settings, mesh)
    micro_batches = w.num_prompts // data // micro_batch
    chunks, at_once = logit_chunks(micro_batch * w.group * w.length, config.vocab_size // tensor)
    return Count(
        layers=layer_cost(job, micro_batch * data).times(config.num_layers * micro_batches),
        logits=logits_cost(job, at_once).times(chunks * micro_batches),
        least=update_flops(w) / data / tensor,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["google/gemma-3-4b-it"], help="published names")
    parser.add_argument("--plan", default="v5e:2x4", help="topology, or cpu")
    parser.add_argument("--mesh", default="2,4", help="devices: DATA,TENSOR")
    parser.add_argument("--virtual-devices", type=int, default=0, help="simulate this many on a CPU")
    given = parser.parse_args()
    if given.virtual_devices:
        simulate_devices(given.virtual_devices)
    sizes = {"prompts_per_step": 8, "max_prompt_length": 512, "max_completion_length": 512, "lora_r": 64}
    title = f"One update, Q=8, G=8, P=512, C=512, LoRA r=64, mesh {given.mesh} on {given.plan}, a chip"
    table = Table(title=title)
    for column in ("model", "TFLOP: layers", "logits", "least", "in all / least", "GB moved"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in given.models:
        settings = Settings(model=name, mesh=given.mesh, plan=given.plan, data="gsm8k", micro_batch=1, **sizes)
        settings = resolve_defaults(choose_backend(settings))
        row = count(make_job(settings, model_config(name)))
        figures = [f"{x / 1e12:.4g}" for x in (row.layers.flops, row.logits.flops, row.least)]
        figures += [f"{row.flops / row.least:.3f}", f"{(row.layers.moved + row.logits.moved) / 1e9:.4g}"]
        table.add_row(name, *figures)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
