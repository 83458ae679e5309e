"""How good is a model? Accuracy on a dataset with its interval, beside the base model's, and the dataset's own scores.

    python eval.py --ckpt RUN_OR_ADAPTER_OR_MODEL [--data ...] [--limit N]
    python eval.py --ckpt ... --chat    or to use it: --prompt, --batch, --examples

The figures are written to eval.json, and beside it a page with every answer, each completion and, for MathVista, the
files that its repository's own scripts read.
"""

import io
import itertools
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isnan
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from data import NAMES, kind, load_dataset
from data.example import FORMATS, Example
from data.files import StoredPicture
from data.prompt import messages
from data.questions import built_in, load_questions
from data.synthetic import synthetic
from gemma3.config import NANO, Config
from gemma3.files.config_json import read_config
from gemma3.files.hub import resolve
from gemma3.image import MAX_CROPS, load_image, pan_and_scan
from gemma3.lora import Lora
from gemma3.mesh import check_mesh, keep_compiled, make_mesh, simulate_devices
from gemma3.model import Params
from gemma3.sample import Prompts, Sampling
from gemma3.tokenizer import Tokenizer
from grpo.pages.eval_page import write_page
from grpo.rollout import Prompt, Row, place_prompts, roll_out, split_over_data
from grpo.run.cli import clean_errors, parse
from grpo.run.log import write_json
from grpo.run.processes import exchange, held_rows, rows_on_host
from grpo.run.settings import Settings, mesh_shape, resolve_defaults
from grpo.update import score
from grpo.use.eval_settings import EvalSettings, Found, find_models, load_models, resolve_use
from grpo.use.use import use
from reward import make_scorer
from reward.format import format_reward
from reward.mathvista import write_output, write_scores
from reward.report import (
    Result,
    by_metadata,
    gsm8k_figures,
    is_right,
    over_samples,
    preference_accuracy,
    score_mathvista,
    spoken,
    summary,
    table,
)

_BAR = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))


@dataclass(frozen=True)
class Reader:
    """Turns an example into what the model reads: one place for prompts, pictures and lengths."""

    config: Config
    tokenizer: Tokenizer
    wording: str  # one of grpo.run.settings.WORDINGS
    format: str  # a key of data.example.FORMATS
    pan_and_scan: bool = False

    def chat(self, example: Example) -> list[dict]:
        """The chat messages: our instruction and wording, MathVista's hint or query, or just the question ("bare")."""
        if self.wording == "bare":
            pictures = [{"type": "image"} for _ in example.images]
            return [{"role": "user", "content": [*pictures, {"type": "text", "text": example.question}]}]
        if self.wording == "query":
            return messages(example, None, query=True)
        system = "role" if self.wording == "role" else "prefix"
        return messages(example, self.format, system=system, hint=self.wording == "hint")

    def length(self, example: Example) -> int:
        """Tokens of the prompt. Pictures are only opened where pan-and-scan has to know their shape."""
        if self.pan_and_scan and example.images:
            return len(self(example).ids)
        return len(self.tokenizer.encode_chat(self.chat(example)))

    def max_pictures(self, example: Example) -> int:
        """How many pictures the model may be shown for an example: with pan-and-scan each one and up to 4 crops."""
        return len(example.images) * (1 + MAX_CROPS if self.pan_and_scan else 1)

    def views(self, source: Path | StoredPicture | bytes, name: str = "the picture") -> list[np.ndarray]:
        """What the model is shown of a picture: the whole of it and, with pan-and-scan, its crops."""
        if self.config.vision is None:
            raise ValueError(f"{name} cannot be shown: this model reads text only")
        size = self.config.vision.image_size
        if self.pan_and_scan:
            return pan_and_scan(load_image(source, None, name), size)
        return [load_image(source, size, name)]

    def __call__(self, example: Example) -> Prompt:
        """Tokenize, and decode the pictures; ValueError naming the example where one cannot be read."""
        views = [self.views(source, f"the picture of example {example.id}") for source in example.images]
        ids = self.tokenizer.encode_chat(self.chat(example), crops=[len(of_one) - 1 for of_one in views])
        return Prompt(ids, [view for of_one in views for view in of_one])


def read_rows(
    examples: Sequence[Example], order: Iterable[int], reader: Reader, *, batch_size: int, mesh: Mesh, first_place=0
) -> Iterator[Row]:
    """Examples in the given order; a batch of them is tokenized, and its pictures decoded, in threads beforehand.

    Of each batch a process reads the rows that it will hold. Places are counted from `first_place`, so that an example
    that comes again is sampled anew.
    """
    held, places = held_rows(batch_size, mesh), enumerate(order)
    with ThreadPoolExecutor(4) as pool:
        waiting = deque()
        while True:
            for place, index in itertools.islice(places, 1 + batch_size - len(waiting)):
                prompt = pool.submit(reader, examples[index]) if place % batch_size in held else None
                waiting.append((first_place + place, examples[index], prompt))
            if not waiting:
                return
            place, example, prompt = waiting.popleft()
            yield Row(place, example, prompt and prompt.result())


def read_batches(
    examples: Sequence[Example],
    reader: Reader,
    params: Params,
    lora: Lora | None,
    *,
    mesh: Mesh,
    max_prompt_length: int,
    max_images: int,
    batch_size: int,
) -> Iterator[tuple[list[Row], Prompts]]:
    """The examples in batches on the mesh, all of one shape, so that one compilation serves them.

    The last batch is filled up with empty prompts, which are not sampled.
    """
    rows = read_rows(examples, range(len(examples)), reader, batch_size=batch_size, mesh=mesh)
    while batch := list(itertools.islice(rows, batch_size)):
        filled = batch + [Row(0, None, Prompt([], []))] * (batch_size - len(batch))
        yield (
            batch,
            place_prompts(
                [row.prompt for row in filled],
                [row.place for row in filled],
                params,
                lora,
                config=reader.config,
                mesh=mesh,
                max_prompt_length=max_prompt_length,
                max_images=max_images,
            ),
        )


def evaluate(
    params: Params,
    lora: Lora | None,
    examples: Sequence[Example],
    reader: Reader,
    *,
    mesh: Mesh,
    max_completion_length: int,
    num_samples: int = 1,
    sampling: Sampling = Sampling(temperature=0.0),  # noqa: B008 - frozen
    seed: int = 0,
    batch_size: int = 128,
    watch: Callable[[int, int], None] = lambda answered, total: None,
    **sizes: int,
) -> list[list[Result]]:
    """Draw `num_samples` completions of each example and judge them. The draws do not depend on `batch_size`.

    sizes: max_prompt_length and max_images, as in `read_batches`; watch: told at the start, and after each batch.
    """
    watch(0, len(examples))
    allowed = jnp.asarray(~reader.tokenizer.never_sampled)
    results = []
    for batch, prompts in read_batches(examples, reader, params, lora, mesh=mesh, batch_size=batch_size, **sizes):
        rollout = roll_out(
            params,
            lora,
            prompts,
            jax.random.key(seed),
            allowed,
            config=reader.config,
            mesh=mesh,
            num_generations=num_samples,
            max_completion_length=max_completion_length,
            sampling=sampling,
        )
        ids, mask, finished = map(rows_on_host, (rollout.completion_ids, rollout.completion_mask, rollout.finished))
        drawn = {}
        for q in held_rows(len(batch), mesh):
            texts = [reader.tokenizer.decode(i[m]) for i, m in zip(ids[q], mask[q], strict=True)]
            drawn[q] = list(zip(texts, finished[q].tolist(), mask[q].sum(axis=-1).tolist(), strict=True))
        for q, completions in sorted(exchange(drawn).items()):
            results.append([])
            for text, ended, length in completions:
                well_formed = format_reward(text, batch[q].example, reader.format) == 1.0
                right = is_right(text, batch[q].example, reader.format)
                results[-1].append(Result(batch[q].example, text, right, well_formed, ended, length))
        watch(len(results), len(examples))
    return results


def given_tokens(example: Example, reader: Reader) -> list[list[int]]:
    """The completions that an example brings, as the model would write them, with the end of its turn."""
    return [[*reader.tokenizer.encode(text), reader.config.stop_ids[-1]] for text in example.completions]


def given_logps(
    params: Params,
    lora: Lora | None,
    examples: Sequence[Example],
    reader: Reader,
    *,
    mesh: Mesh,
    max_completion_length: int,
    **sizes: int,
) -> list[list[float]]:
    """The log-prob, summed over its tokens, of each completion that the examples bring."""
    group = max(len(example.completions) for example in examples)
    logps = []
    for batch, prompts in read_batches(examples, reader, params, lora, mesh=mesh, **sizes):
        ids = np.full((len(prompts.ids), group, max_completion_length), reader.config.pad_id, np.int32)
        lengths = []
        for row, of_row in zip(batch, ids, strict=False):
            lengths.append([])
            for tokens, line in zip(given_tokens(row.example, reader), of_row, strict=False):
                line[: len(tokens)] = tokens
                lengths[-1].append(len(tokens))
        # One prompt at a time: in memory there is then never more than one group, however large the batch.
        stats = score(
            params,
            lora,
            prompts,
            split_over_data(ids, mesh),
            config=reader.config,
            mesh=mesh,
            temperature=1.0,
            micro_batch=1,
        )
        found = rows_on_host(stats.logps).astype(np.float64)
        sums = {
            q: [float(line[:n].sum()) for line, n in zip(found[q], lengths[q], strict=False)]
            for q in held_rows(len(batch), mesh)
        }
        logps += [of_row for _, of_row in sorted(exchange(sums).items())]
    return logps


def that_fit(examples: list[Example], reader: Reader, limit: int, name: str) -> list[Example]:
    """Leave out examples whose prompt is too long, and say how many: a prompt is never cut."""
    fitting = [example for example in examples if reader.length(example) <= limit]
    if len(fitting) < len(examples):
        left_out = len(examples) - len(fitting)
        print(f"{name}: {left_out} of {len(examples)} prompts are longer than {limit} tokens and left out")
    if not fitting:
        raise ValueError(f"{name}: none of {len(examples)} prompts is within --max-prompt-length {limit}; raise it")
    return fitting


def load_held_out(data: str, split: str, limit: int, *, skip_missing_images: bool = False) -> list[Example]:
    """Examples to evaluate on: `split` of a dataset, at most `limit` (0: all; of synthetic, which has no end, 384)."""
    if data == "synthetic":
        return synthetic("test", limit or 384, 0)
    examples = load_dataset(data, split, skip_missing_images=skip_missing_images)
    return examples[:limit] if limit else examples


def trained_on(data: str, run: dict) -> bool:
    """Whether the run of these settings trained on part of this dataset: this name or path, or a copy of MathVista."""
    trained = run.get("data")
    if data == trained or trained is None or "synthetic" in (data, trained):
        return data == trained
    is_known = trained in NAMES or Path(trained).exists()
    return is_known and kind(trained) == kind(data) == "mathvista"


def resolve_settings(settings: EvalSettings, run: dict) -> EvalSettings:
    """Fill in what was not given: as in training where it is the run's data, else as train.py would train on it.

    ValueError where the data is no known dataset.
    """
    data = settings.data or run.get("eval_data") or run.get("data") or "synthetic"
    if data != "synthetic":
        kind(data)
    like = asdict(resolve_defaults(Settings(data=data, format=run.get("format", "answer"))))
    if data in (run.get("data"), run.get("eval_data")):
        like |= {name: value for name, value in run.items() if name not in ("dtype", "data", "out")}
    like |= {
        "data": data,
        "base": True,
        "split": "test" if data == "synthetic" or trained_on(data, run) else "all",
        "out": Path(settings.ckpt if run else ".", "eval.json"),
    }
    missing = [name for name, value in asdict(settings).items() if value is None and name in like and name != "model"]
    return replace(settings, **{name: like[name] for name in missing})


def shown(examples: list[Example], pictures: str, seed: int) -> list[Example]:
    """The examples with their pictures, with blank ones, or with those of others: does the model look at them?"""
    if pictures == "given":
        return examples
    places = [i for i, example in enumerate(examples) if example.images]
    if len(places) < (2 if pictures == "shuffled" else 1):
        raise ValueError(f"--pictures {pictures}: {len(places)} of {len(examples)} examples have any; leave it out")
    order = np.random.default_rng(seed).permutation(places)
    other = dict(zip(order, np.roll(order, 1), strict=True))
    blank = io.BytesIO()
    Image.new("RGB", (32, 32), (240, 240, 240)).save(blank, "PNG")

    def images(i: int) -> tuple:
        return (blank.getvalue(),) * len(examples[i].images) if pictures == "blank" else examples[other[i]].images

    return [replace(example, images=images(i)) if i in other else example for i, example in enumerate(examples)]


def by_purpose(examples: list[Example], reader: Reader, limit: int, name: str) -> tuple[list[Example], list[Example]]:
    """(examples to sample completions of, examples whose own completions are compared); what cannot be is counted."""
    rewarded = [example for example in examples if example.completion_rewards]
    asked = [e for e in examples if not e.completion_rewards and (e.answer or not e.completions)]
    given = [example for example in rewarded if len(set(example.completion_rewards)) > 1]
    if left_out := len(examples) - len(asked) - len(given):
        print(f"{name}: left out {left_out} of {len(examples)} rows, whose completions' rewards do not differ")
    fitting = [example for example in given if max(map(len, given_tokens(example, reader))) <= limit]
    if len(fitting) < len(given):
        left_out = len(given) - len(fitting)
        print(f"{name}: left out {left_out} of {len(examples)} rows, with completions longer than {limit} tokens")
    if not (asked or fitting):
        raise ValueError(f"{name}: no row is left to evaluate; raise --max-completion-length or give rows rewards")
    return asked, fitting


def given_rewards(examples: list[Example], reader: Reader, spec: str, max_tokens: int) -> list[list[float]]:
    """What --reward says about each completion that the examples bring."""
    flat = [(text, example) for example in examples for text in example.completions]
    lengths = [len(tokens) for example in examples for tokens in given_tokens(example, reader)]
    scores = make_scorer(spec, reader.format, max_tokens=max_tokens)(
        [text for text, _ in flat],
        [example for _, example in flat],
        num_tokens=lengths,
        finished=[True] * len(flat),
        prompts=[reader.tokenizer.render_chat(reader.chat(example)) for _, example in flat],
    )
    totals = iter(scores.total)
    return [list(itertools.islice(totals, len(example.completions))) for example in examples]


def judge(results: list[list[Result]], dataset: str, settings: EvalSettings, name: str) -> dict:
    """All figures of one model's completions: our own and those customary for the dataset, whose files are written."""
    figures = summary(results)
    if settings.num_samples > 1:
        figures["samples"] = over_samples(results, settings.format)
    if dataset == "synthetic":
        figures["by"] = by_metadata(results, ("kind", "question"))
    elif dataset == "gsm8k":
        figures["gsm8k"] = gsm8k_figures(results, None if settings.wording == "bare" else settings.format)
    elif dataset == "mathvista":
        scored = score_mathvista(results, settings.scorer)
        stem = settings.out.stem
        write_output(settings.out.with_name(f"{stem}_output_{name}.json"), scored.examples, scored.records)
        write_scores(settings.out.with_name(f"{stem}_scores_{name}.json"), scored.scores, scorer=settings.scorer)
        figures["mathvista"] = scored.figures
    return figures


def compare(examples: list[Example], rewards: list[list[float]], logps: list[list[float]]) -> dict:
    """Preference accuracy: does the policy, and does the reward, prefer what the data prefers?"""
    return {"policy": preference_accuracy(examples, logps), "reward": preference_accuracy(examples, rewards)}


def result_lines(name: str, results: list[list[Result]]) -> Iterator[dict]:
    """One line of the results file for each completion."""
    for result in itertools.chain.from_iterable(results):
        line = {"model": name, "id": result.example.id, "answer": result.example.answer}
        yield line | {field: getattr(result, field) for field in ("completion", "correct", "well_formed", "finished")}


def preference_lines(
    name: str, examples: list[Example], rewards: list[list[float]], logps: list[list[float]]
) -> Iterator[dict]:
    """One line of the results file for each example that brings completions; a reward of NaN is null, as JSON wants."""
    for example, by_reward, by_policy in zip(examples, rewards, logps, strict=True):
        stated = [None if isnan(reward) else reward for reward in by_reward]
        yield {"model": name, "id": example.id, "rewards": stated, "logps": by_policy}


def report(
    figures: dict[str, dict],
    lines: list[dict],
    answered: dict[str, list[list[Result]]],
    dataset: str,
    settings: EvalSettings,
) -> None:
    """Print the table of all figures, and write eval.json, the results file and a page to look at."""
    if dataset == "mathvista":
        print(f"MathVista's score is that of its {settings.scorer} scorer: what it cannot read is the nearest choice")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(table(figures))
    completions = settings.out.with_name(f"{settings.out.stem}_results.jsonl")
    with completions.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_json(settings.out, {"settings": asdict(settings), "results": completions.name} | figures)
    page = settings.out.with_suffix(".html")
    write_page(page, f"Evaluation of {settings.ckpt} on {settings.data}", figures, answered)
    print(f"written to {settings.out}, each completion to {completions}, and a page to look at to {page}")


def question(text: str, images: Sequence[Path | bytes]) -> Example:
    """What a user asks, as an example that a reader can word."""
    return Example("asked", text, "", images=tuple(images))


def show_progress(bar: Progress, task: TaskID, answered: int, total: int) -> None:
    bar.update(task, completed=answered, total=total, note="" if answered else "the first batch compiles")


def measure(settings: EvalSettings, found: Found, reader: Reader, mesh: Mesh) -> None:
    """Evaluate the models on a dataset, print their figures and write all that is known."""
    dataset = "synthetic" if settings.data == "synthetic" else kind(settings.data)
    if settings.split == "all" and trained_on(settings.data, found.run):
        print("note: --split all includes examples that this run trained on")
    examples = load_held_out(
        settings.data, settings.split, settings.limit, skip_missing_images=settings.skip_missing_images
    )
    examples = that_fit(
        shown(examples, settings.pictures, settings.seed), reader, settings.max_prompt_length, settings.data
    )
    asked, given = by_purpose(examples, reader, settings.max_completion_length, settings.data)
    rewards = given_rewards(given, reader, settings.reward, settings.max_completion_length) if given else []
    sizes = {
        "mesh": mesh,
        "max_prompt_length": settings.max_prompt_length,
        "max_completion_length": settings.max_completion_length,
        "max_images": max(reader.max_pictures(example) for example in examples),
        "batch_size": min(settings.batch_size, max(len(asked), len(given))),
    }
    sampling = {"num_samples": settings.num_samples, "sampling": settings.sampling, "seed": settings.seed}

    settings.out.parent.mkdir(parents=True, exist_ok=True)
    figures, lines, answered = {}, [], {}
    for name, params, lora in load_models(found.models, settings.dtype, reader.config, mesh):
        figures[name] = {}
        if asked:
            with Progress(*_BAR, transient=True, disable=not sys.stdout.isatty()) as bar:
                watch = partial(show_progress, bar, bar.add_task(name, total=None, note=""))
                answered[name] = evaluate(params, lora, asked, reader, watch=watch, **sizes, **sampling)
            figures[name] |= judge(answered[name], dataset, settings, name)
            lines += result_lines(name, answered[name])
            print(spoken(name, figures[name]))
        if given:
            logps = given_logps(params, lora, given, reader, **sizes)
            figures[name]["preference"] = compare(given, rewards, logps)
            lines += preference_lines(name, given, rewards, logps)
        del params, lora  # before the next model is read
    report(figures, lines, answered, dataset, settings)


def main(argv: Sequence[str] | None = None) -> None:
    typed = parse(EvalSettings, argv, prog="eval.py", description=__doc__.splitlines()[0])
    if typed.virtual_devices:
        simulate_devices(typed.virtual_devices)
    found = find_models(typed.ckpt, typed.model, typed.base if typed.base is not None else not typed.use)
    if typed.base and len(found.models) == 1:
        raise ValueError(f"--base: --ckpt {typed.ckpt} is a model that was not trained from another here; leave it out")
    # A dataset that is none is refused before a model is downloaded for it.
    settings = typed if typed.use else resolve_settings(typed, found.run)
    mesh = make_mesh(*mesh_shape(typed.mesh))
    model = next(iter(found.models.values()))[0]
    directory = resolve(model)
    config = read_config(directory)
    check_mesh(config, mesh)
    if typed.use:
        settings = resolve_use(typed, found.run, model, config)
    reader = Reader(config, Tokenizer(directory, config), settings.wording, settings.format, settings.pan_and_scan)
    if not settings.use:
        measure(settings, found, reader, mesh)
        return
    use(
        settings,
        found,
        reader,
        mesh,
        question=question,
        built_in=partial(built_in, nano=config.hidden_size == NANO.hidden_size, pictures=config.vision is not None),
        load_questions=load_questions,
        is_right=partial(is_right, format=settings.format),
        tags=FORMATS[settings.format],
    )


if __name__ == "__main__":
    keep_compiled()
    with clean_errors():
        main()
