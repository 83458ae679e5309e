"""What an evaluation leaves: figures, the table, a results file and a page."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from math import isnan

from rich.console import Console

from data.example import Example
from grpo.pages.eval_page import write_eval_page
from grpo.reader import Reader
from grpo.run.log import write_json
from grpo.use.eval_settings import EvalSettings
from reward import make_reward_function
from reward import report as reports
from reward.mathvista import write_output, write_scores


def given_rewards(examples: list[Example], reader: Reader, spec: str, max_tokens: int) -> list[list[float]]:
    """What --reward says about each completion that the examples bring."""
    flat = [(text, example) for example in examples for text in example.completions]
    rewards = make_reward_function(spec, reader.format, max_tokens=max_tokens)(
        [text for text, _ in flat],
        [example for _, example in flat],
        num_tokens=[len(reader.completion(text)) for text, _ in flat],
        finished=[True] * len(flat),
        prompts=[reader.render(example) for _, example in flat],
    )
    totals = iter(rewards.total)
    return [list(itertools.islice(totals, len(example.completions))) for example in examples]


def judge(results: list[list[reports.Result]], dataset: str, settings: EvalSettings, name: str) -> dict:
    """All figures of one model's completions: our own, and those usual for the dataset, whose files it writes."""
    figures = reports.summary(results)
    if settings.num_generations > 1:
        figures["samples"] = reports.over_samples(results, settings.format)
    if dataset == "synthetic":
        figures["by"] = reports.by_metadata(results, ("kind", "question"))
    elif dataset == "gsm8k":
        figures["gsm8k"] = reports.gsm8k_figures(results, None if settings.wording == "bare" else settings.format)
    elif dataset == "mathvista":
        scored = reports.score_mathvista(results, settings.scorer)
        stem = settings.out.stem
        write_output(settings.out.with_name(f"{stem}_output_{name}.json"), scored.examples, scored.records)
        write_scores(settings.out.with_name(f"{stem}_scores_{name}.json"), scored.scores, scorer=settings.scorer)
        figures["mathvista"] = scored.figures
    return figures


def result_lines(name: str, results: list[list[reports.Result]]) -> Iterator[dict]:
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


def publish(
    figures: dict[str, dict],
    lines: list[dict],
    answered: dict[str, list[list[reports.Result]]],
    dataset: str,
    settings: EvalSettings,
) -> None:
    """Print the table of all figures, and write eval.json, the results file and a page to look at."""
    if dataset == "mathvista":
        print(f"MathVista's {settings.scorer} scorer: an answer that it cannot read counts as the nearest choice")
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(reports.table(figures))
    completions = settings.out.with_name(f"{settings.out.stem}_results.jsonl")
    with completions.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_json(settings.out, {"settings": asdict(settings), "results": completions.name} | figures)
    page = settings.out.with_suffix(".html")
    write_eval_page(page, f"Evaluation of {settings.ckpt} on {settings.data}", figures, answered)
    print(f"written to {settings.out}, each completion to {completions}, and a page to look at to {page}")
