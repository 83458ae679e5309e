"""What it saves that completions which go on move to fewer rows: one token loop against several, in turns.

    python -m benchmarks.lengths                     # a few minutes on a CPU
    python -m benchmarks.lengths --limit 512         # the longer, the more there is to save

Q=16 prompts and G=8 completions of each, sampled at temperature 1, with three kinds of lengths: geometric with a mean
of a quarter of the limit C, which is the long tail of real answers; all C, where no loop but the first is used; and
nano's own on its own questions. The first two are of the 270m shape with fewer layers and weights that make all ids
about equally likely; how many of them end a completion makes its expected length.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from data.synthetic import synthetic
from gemma3.config import Config
from gemma3.files.hub import resolve
from gemma3.files.published import CONFIGS
from gemma3.files.tokenizer_model import load_tokenizer
from gemma3.files.weights import load_checkpoint
from gemma3.filters import Sampling
from gemma3.lora import Policy
from gemma3.mesh import Model, make_mesh
from gemma3.params import init_params
from gemma3.sample import Completions, PromptBatch, sample, smaller_sizes
from grpo.reader import Reader, Row
from grpo.rollout import put_prompts

Q, G = 16, 8
PROMPT_LENGTH, VOCAB_SIZE = 64, 8192


class Work(NamedTuple):
    """What is sampled."""

    config: Config
    policy: Policy
    prompts: PromptBatch
    allowed: np.ndarray  # bool[V]


def even(layers: int, mean: int | None) -> Work:
    """A model to which all ids are about equally likely; None: no completion ends before the limit."""
    config = CONFIGS["gemma-3-270m"]
    config = replace(config, vocab_size=VOCAB_SIZE, num_layers=layers, layer_types=config.layer_types[:layers])
    params = init_params(jax.random.key(0), config)
    params = params._replace(text=params.text._replace(embedding=0.02 * params.text.embedding))
    ends = range(1, 1 + round(VOCAB_SIZE / mean)) if mean else [-1]
    ids = np.random.default_rng(0).integers(1, VOCAB_SIZE, (Q, PROMPT_LENGTH))
    prompts = PromptBatch(jnp.asarray(ids, jnp.int32), None, jnp.arange(Q, dtype=jnp.int32))
    return Work(replace(config, stop_ids=tuple(ends)), Policy(params), prompts, np.arange(VOCAB_SIZE) > 0)


def nano() -> Work:
    directory = resolve("nano")
    config, params = load_checkpoint(directory)
    examples = synthetic("train", Q, seed=0)
    reader = Reader(Model(config, make_mesh(1, 1)), load_tokenizer(directory, config), "bare", "answer", False, 32, 1)
    prompts = put_prompts(Policy(params), [Row(i, e, reader(e)) for i, e in enumerate(examples)], reader)
    return Work(config, Policy(params), prompts, ~reader.tokenizer.never_sampled)


def compiled(work: Work, limit: int, sizes: Callable) -> Callable[[int], Completions]:
    """The sampler with the loops that `sizes` chooses, as a function of the number that keys its randomness."""
    allowed = jnp.asarray(work.allowed)
    how = {
        "model": Model(work.config, make_mesh(1, 1)),
        "sampling": Sampling(num_generations=G, max_completion_length=limit),
    }
    with mock.patch("gemma3.sample.smaller_sizes", sizes):
        jax.clear_caches()  # what was traced with other sizes
        program = sample.lower(work.policy, work.prompts, jax.random.key(0), allowed, **how).compile()
    return lambda number: program(work.policy, work.prompts, jax.random.key(number), allowed)


def timed(program: Callable[[int], Completions], number: int) -> tuple[float, Completions]:
    started = time.perf_counter()
    completions = jax.block_until_ready(program(number))
    return time.perf_counter() - started, completions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=128, help="C")
    parser.add_argument("--layers", type=int, default=6, help="of the 270m shape")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each, in turns, of which the median is taken")
    args = parser.parse_args()
    table = Table(title=f"Q={Q} G={G} C={args.limit}, loops of {[(Q, G), *smaller_sizes(Q, G, args.limit)]}")
    for column in ("lengths", "mean", "longest", "one loop, s", "several, s", "faster", "same completions"):
        table.add_column(column, justify="left" if column == "lengths" else "right")
    works = {
        f"geometric, mean {args.limit // 4}": even(args.layers, args.limit // 4),
        "all at the limit": even(args.layers, None),
        "nano's": nano(),
    }
    for name, work in works.items():
        programs = [compiled(work, args.limit, sizes) for sizes in (lambda *_: [], smaller_sizes)]
        calls = [[timed(program, number) for program in programs] for number in range(1 + args.repeats)][1:]
        one, several = (statistics.median(call[i][0] for call in calls) for i in (0, 1))
        same = np.mean([(first.ids == second.ids).all(axis=-1) for (_, first), (_, second) in calls])
        lengths = np.stack([first.mask.sum(axis=-1) for (_, first), _ in calls])
        numbers = (f"{lengths.mean():.0f}", f"{lengths.max()}", f"{one:.2f}", f"{several:.2f}", f"{one / several:.2f}x")
        table.add_row(name, *numbers, f"{same:.1%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
