"""Using a model: what eval.py does with --chat, --prompt, --examples and --batch.

Rests on rich. An example is anything with `id`, `question`, `images` and `answer`; a reader makes a prompt of it, as
eval.py's `Reader` does.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from gemma3.sample import Sampling
from grpo.rollout import Prompt
from grpo.run.log import write_json
from grpo.use.chat import (
    Answer,
    Answerer,
    Room,
    answer_prompt,
    apart,
    chat,
    draw_answers,
    labels,
    room_for,
    say,
    say_if_cut,
    show,
    show_picture,
    spelled,
)
from grpo.use.eval_settings import EvalSettings, Found, load_models

Reader = Callable[[Any], Prompt]


def answer_examples(
    console: Console,
    answerers: Iterable[tuple[str, Answerer]],
    strategies: Mapping[str, Sampling],
    examples: Sequence[Any],
    reader: Reader,
    is_right: Callable[[str, Any], bool],
    tags: tuple[str, str],
    *,
    several: bool,
) -> None:
    """Print each example and what each model, in each way of sampling, answers to it, with the verdict."""
    prompts = [reader(example) for example in examples]
    longest, most = (max(map(len, column)) for column in zip(*prompts, strict=True))
    found: list[tuple[str, int, list[Answer]]] = []
    for name, answerer in answerers:
        room, length = room_for(longest, most, answerer.max_prompt_length), answerer.max_completion_length
        for label, sampling in labels(name, several, strategies):
            with console.status(Text(label, style="dim")):
                answers = draw_answers(replace(answerer, sampling=sampling), prompts, range(len(prompts)), room)
            found.append((label, length, answers))
        del answerer  # before the next model is read
    for i, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        say(console, f"\n{i + 1}. {example.question}", "bold cyan")
        for pixels in prompt.pictures:
            show_picture(console, pixels)
        for label, length, answers in found:
            say(console, label, "dim")
            show(console, [answers[i].text], tags)
            say_if_cut(console, answers[i].finished, length)
            right = is_right(answers[i].text, example)
            say(console, *(("right", "green") if right else (f"wrong: it is {example.answer}", "red")))
    say(console, "")
    for label, _, answers in found:
        right = sum(is_right(answer.text, example) for answer, example in zip(answers, examples, strict=True))
        say(console, f"{right} of {len(examples)} right: {label}")


def earlier_answers(path: Path, asked: Mapping[str, Any]) -> list[dict]:
    """The answers that `path` holds already. ValueError where they are to other questions, or asked in another way."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings, answers = found["settings"], found["answers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--output {path} exists and holds no answers; give the name of another file") from error
    for name, value in asked.items():
        if settings.get(name) != value:
            raise ValueError(
                f"--output {path} holds answers of {name} {settings.get(name)}, and now it is {value}; "
                "go on as you began, or give the name of another file"
            )
    return answers


def answer_file(
    console: Console,
    answerers: Iterable[tuple[str, Answerer]],
    examples: Sequence[Any],
    reader: Reader,
    room: Room,
    tags: tuple[str, str],
    *,
    asked: Mapping[str, Any],
    num_models: int,
    batch_size: int,
    path: Path,
) -> None:
    """Answer all examples by each model in turn, into a JSON file that is replaced, whole, after each batch.

    Started again it goes on after the last batch: the file is then the one of an undisturbed run, since an answer
    depends on its place in the list and on nothing drawn beside it. asked: what the answers depend on, JSON values;
    `earlier_answers` refuses a file of other ones.
    """
    answers = earlier_answers(path, asked)
    total = num_models * len(examples)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("answering", total=total, completed=len(answers))
        for turn, (name, answerer) in enumerate(answerers):
            while (start := len(answers) - turn * len(examples)) < len(examples):
                batch = examples[start : start + batch_size]
                prompts = [reader(example) for example in batch] + [Prompt([], [])] * (batch_size - len(batch))
                drawn = draw_answers(answerer, prompts, range(start, start + batch_size), room)
                for example, answer in zip(batch, drawn, strict=False):
                    reasoning, short = apart(answer.text, tags)
                    answers.append(
                        {
                            "id": example.id,
                            "model": name,
                            "question": example.question,
                            "images": list(map(str, example.images)),
                            "answer": short,
                            "reasoning": reasoning,
                            "completion": answer.text,
                            "finished": answer.finished,
                        }
                    )
                write_json(path, {"settings": asked, "answers": answers})
                progress.update(bar, completed=len(answers))
            del answerer  # before the next model is read
    say(console, f"{len(answers)} answers are in {path}")


def typed_line() -> str:
    """The next line that the user types; with a prompt, and where Python has them arrow keys, if it is a terminal."""
    if not sys.stdin.isatty():
        return input()
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - its import gives input() a line to edit and a history
    return input("> ")


def what_is_asked(settings: EvalSettings, found: Found) -> dict[str, Any]:
    """What the answers of --batch depend on."""
    names = ("seed", "max_completion_length", "max_prompt_length", "wording", "format", "pan_and_scan", "dtype")
    return {
        "models": {name: [model, adapter and str(adapter)] for name, (model, adapter) in found.models.items()},
        "questions": str(settings.batch),
        "questions_sha256": hashlib.sha256(settings.batch.read_bytes()).hexdigest(),
        **asdict(settings.sampling),
        **{name: getattr(settings, name) for name in names},
    }


def use(
    settings: EvalSettings,
    found: Found,
    reader: Any,
    mesh: Mesh,
    *,
    question: Callable[[str, Sequence[Any]], Any],
    built_in: Callable[[], Sequence[Any]],
    load_questions: Callable[[Path], Sequence[Any]],
    is_right: Callable[[str, Any], bool],
    tags: tuple[str, str],
) -> None:
    """Answer what the user asks, in the way that was chosen.

    reader: as eval.py's `Reader`; question: an example of a text and its pictures; is_right: of a completion and the
    example that it answers; tags: of reasoning and of the answer.
    """
    answerers = (
        (
            name,
            Answerer(
                params,
                lora,
                reader.config,
                reader.tokenizer,
                mesh,
                settings.sampling,
                settings.seed,
                settings.max_prompt_length,
                settings.max_completion_length,
            ),
        )
        for name, params, lora in load_models(found.models, settings.dtype, reader.config, mesh)
    )
    console, several = Console(highlight=False), len(found.models) > 1
    try:
        if settings.use == "chat":
            _, answerer = next(answerers)
            ((strategy, sampling),) = settings.strategies.items()
            say(console, f"{settings.ckpt}, {spelled(strategy, sampling)}", "dim")
            ask = lambda text, pictures: reader.chat(question(text, [b""] * pictures))  # noqa: E731
            chat(console, answerer, typed_line, ask, reader.views, tags)
        elif settings.use == "prompt":
            prompt = reader(question(settings.prompt, list(map(Path, settings.image))))
            answer_prompt(console, answerers, settings.strategies, prompt, tags, several=several)
        elif settings.use == "examples":
            examples = built_in()
            answer_examples(console, answerers, settings.strategies, examples, reader, is_right, tags, several=several)
        else:
            examples = load_questions(settings.batch)
            longest, pictures = (max(map(size, examples)) for size in (reader.length, reader.max_pictures))
            answer_file(
                console,
                answerers,
                examples,
                reader,
                room_for(longest, pictures, settings.max_prompt_length),
                tags,
                asked=what_is_asked(settings, found),
                num_models=len(found.models),
                batch_size=min(settings.batch_size, len(examples)),
                path=settings.output or Path("answers.json"),
            )
    except KeyboardInterrupt:
        say(console, "\nstopped" + ("; the same command goes on from here" if settings.use == "batch" else ""))
        raise SystemExit(130) from None
