"""What a policy answers to held-out examples, and which of given completions it prefers."""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from data import NAMES, kind, load_dataset
from data.example import Example
from data.synthetic import synthetic
from gemma3.filters import Sampling
from gemma3.lora import Policy
from gemma3.sample import PromptBatch
from grpo.groups import given_completions
from grpo.reader import Prompt, Reader, Row, read_rows, rounded_up
from grpo.rollout import put_prompts, roll_out, split_over_data
from grpo.run.processes import held_rows, of_all_rows, rows_on_host
from grpo.update import completion_logps
from reward.format import format_reward
from reward.report import Result, completion_is_correct

GREEDY = Sampling(temperature=0.0)


def load_held_out(data: str, split: str, limit: int, *, skip_missing_images: bool = False) -> list[Example]:
    """Examples to evaluate on: at most `limit` of a dataset's `split` (0: all, or 384 of the endless synthetic)."""
    if data == "synthetic":
        return synthetic("test", limit or 384, 0)
    examples = load_dataset(data, split, skip_missing_images=skip_missing_images)
    return examples[:limit] if limit else examples


def trained_on(data: str, run: dict) -> bool:
    """Whether the run with these settings trained on part of this dataset: same name or path, or both MathVista."""
    trained = run.get("data")
    if data == trained or trained is None or "synthetic" in (data, trained):
        return data == trained
    is_known = trained in NAMES or Path(trained).exists()
    return is_known and kind(trained) == kind(data) == "mathvista"


def with_images(examples: list[Example], images: str, seed: int) -> list[Example]:
    """The examples with the images "given", "blank" ones, or "shuffled" ones of others: does the model look at them?"""
    if images == "given":
        return examples
    having = [i for i, example in enumerate(examples) if example.images]
    if len(having) < (2 if images == "shuffled" else 1):
        raise ValueError(f"--images {images}: {len(having)} of {len(examples)} examples have any; leave it out")
    order = np.random.default_rng(seed).permutation(having)
    other = dict(zip(order, np.roll(order, 1), strict=True))
    blank = io.BytesIO()
    Image.new("RGB", (32, 32), (240, 240, 240)).save(blank, "PNG")

    def shown(i: int) -> tuple:
        return (blank.getvalue(),) * len(examples[i].images) if images == "blank" else examples[other[i]].images

    return [replace(example, images=shown(i)) if i in other else example for i, example in enumerate(examples)]


def by_purpose(examples: list[Example], reader: Reader, limit: int, name: str) -> tuple[list[Example], list[Example]]:
    """(examples to sample completions of, examples whose own completions are compared); prints how many are neither."""
    rewarded = [example for example in examples if example.completion_rewards]
    asked = [e for e in examples if not e.completion_rewards and (e.answer or not e.completions)]
    given = [example for example in rewarded if len(set(example.completion_rewards)) > 1]
    if left_out := len(examples) - len(asked) - len(given):
        print(f"{name}: left out {left_out} of {len(examples)} rows, whose completions' rewards do not differ")
    fitting = [e for e in given if max(len(reader.completion(text)) for text in e.completions) <= limit]
    if len(fitting) < len(given):
        left_out = len(given) - len(fitting)
        print(f"{name}: left out {left_out} of {len(examples)} rows, with completions longer than {limit} tokens")
    if not (asked or fitting):
        raise ValueError(f"{name}: no row is left to evaluate; raise --max-completion-length or give rows rewards")
    return asked, fitting


def read_batches(
    policy: Policy, examples: Sequence[Example], reader: Reader, batch_size: int
) -> Iterator[tuple[list[Row], PromptBatch]]:
    """The examples in batches on the mesh, all of one shape, so that one compilation serves them.

    The last batch is filled up with empty prompts, which are not sampled.
    """
    rows = read_rows(examples, range(len(examples)), reader, batch_size)
    while batch := list(itertools.islice(rows, batch_size)):
        filled = batch + [Row(0, None, Prompt([], []))] * (batch_size - len(batch))
        yield batch, put_prompts(policy, filled, reader)


def evaluate(
    policy: Policy,
    examples: Sequence[Example],
    reader: Reader,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    batch_size: int = 128,
    watch: Callable[[int, int], None] = lambda answered, total: None,
) -> list[list[Result]]:
    """Sample G completions of each example, which do not depend on `batch_size`, and judge them.

    watch: called at the start and after each batch with the number of answered examples and of all examples.
    """
    watch(0, len(examples))
    results = []
    for batch, prompts in read_batches(policy, examples, reader, batch_size):
        completions = roll_out(policy, prompts, jax.random.key(seed), reader, sampling=sampling)
        held = held_rows(len(batch), reader.model.mesh)
        ids, mask, finished = (rows_on_host(x)[held] for x in (completions.ids, completions.mask, completions.finished))
        columns = of_all_rows(held, reader.texts(ids, mask), finished, mask.sum(axis=-1))
        for row, *answers in zip(batch, *columns, strict=True):
            results.append([])
            for text, ended, length in zip(*answers, strict=True):
                well_formed = format_reward(text, row.example, reader.format) == 1.0
                correct = completion_is_correct(text, row.example, reader.format)
                results[-1].append(Result(row.example, text, correct, well_formed, bool(ended), int(length)))
        watch(len(results), len(examples))
    return results


def given_logps(
    policy: Policy, examples: Sequence[Example], reader: Reader, max_completion_length: int, batch_size: int
) -> list[list[float]]:
    """The log-prob of each completion that the examples bring, summed over its tokens."""
    mesh, logps = reader.model.mesh, []
    longest = max(len(reader.completion(text)) for example in examples for text in example.completions)
    shape = (max(len(example.completions) for example in examples), rounded_up(longest, max_completion_length))
    for batch, prompts in read_batches(policy, examples, reader, batch_size):
        ids, mask = given_completions(batch, [row.example.completions for row in batch], reader, shape)
        padded = np.full((len(prompts.ids), *shape), reader.model.config.pad_id, np.int32)
        padded[: len(batch)] = ids
        # One prompt at a time, so that memory never holds more than one group, however large the batch.
        how = {"model": reader.model, "temperature": 1.0, "micro_batch": 1}
        found = rows_on_host(completion_logps(policy, prompts, split_over_data(padded, mesh), **how))
        held = held_rows(len(batch), mesh)
        sums = np.where(mask[held], found[held].astype(np.float64), 0.0).sum(axis=-1)
        (sums,) = of_all_rows(held, sums)
        logps += [of_row[: len(row.example.completions)].tolist() for row, of_row in zip(batch, sums, strict=True)]
    return logps
