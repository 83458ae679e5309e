"""Using a model: what eval.py does with --chat, --prompt, --examples and --batch. Built on rich."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from data.example import FORMATS, Example
from data.questions import built_in, load_questions
from gemma3.files.published import NANO
from grpo.reader import Prompt, Reader
from grpo.run.log import write_json
from grpo.use import chat as chatting
from grpo.use.eval_settings import EvalSettings, Found, load_models
from reward.report import completion_is_correct

Answerers = Iterator[tuple[str, str, chatting.Answerer]]  # a model's name, the heading of its answers, the model itself


def load_answerers(settings: EvalSettings, found: Found, reader: Reader) -> Answerers:
    """Each model in each way of sampling. Only one model is in memory at a time if the caller deletes it too. Inside an
    `enumerate` it would stay, since `enumerate` keeps its last item.
    """
    for name, policy in load_models(found.models, settings.dtype, reader.model):
        for strategy, sampling in settings.strategies.items():
            label = f"{name}, " * (len(found.models) > 1) + chatting.spelled(strategy, sampling)
            yield name, label, chatting.Answerer(policy, reader, sampling, settings.seed)
        del policy


def answer_prompt(console: Console, answerers: Answerers, prompt: Prompt) -> None:
    """Print what each model, in each way of sampling, says to one prompt."""
    listener, gap = chatting.Listener(), ""
    for _, label, answerer in answerers:
        chatting.say(console, gap + label, "dim")
        chatting.speak(console, listener, answerer, prompt, 1)
        gap = "\n"
        del answerer


def answer_examples(console: Console, answerers: Answerers, examples: Sequence[Example], reader: Reader) -> None:
    """Print each example and what each model, in each way of sampling, answers to it, with the verdict."""
    prompts = [reader(example) for example in examples]
    room = chatting.with_room(reader, *(max(map(len, column)) for column in zip(*prompts, strict=True)))
    found: list[tuple[str, int, list[chatting.Answer]]] = []
    for _, label, answerer in answerers:
        with console.status(Text(label, style="dim")):
            answers = chatting.answers(answerer._replace(reader=room), prompts, 0)
        found.append((label, answerer.sampling.max_completion_length, answers))
        del answerer
    for i, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        chatting.say(console, f"\n{i + 1}. {example.question}", "bold cyan")
        for pixels in prompt.images:
            chatting.show_image(console, pixels)
        for label, length, given in found:
            chatting.say(console, label, "dim")
            chatting.show(console, [given[i].text], FORMATS[reader.format])
            chatting.say_if_cut(console, given[i].finished, length)
            correct = completion_is_correct(given[i].text, example, reader.format)
            chatting.say(console, *(("right", "green") if correct else (f"wrong: it is {example.answer}", "red")))
    chatting.say(console, "")
    for label, _, given in found:
        pairs = zip(given, examples, strict=True)
        correct = sum(completion_is_correct(answer.text, example, reader.format) for answer, example in pairs)
        chatting.say(console, f"{correct} of {len(examples)} right: {label}")


def earlier_answers(path: Path, asked_for: Mapping[str, Any]) -> list[dict]:
    """The answers that `path` already holds. ValueError if they belong to other questions or to other settings."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings, earlier = found["settings"], found["answers"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--output {path} exists and holds no answers; give the name of another file") from error
    for name, value in asked_for.items():
        if settings.get(name) != value:
            raise ValueError(
                f"--output {path} holds answers of {name} {settings.get(name)}, and now it is {value}; "
                "go on as you began, or give the name of another file"
            )
    return earlier


def answer_file(
    console: Console,
    answerers: Answerers,
    examples: Sequence[Example],
    *,
    asked_for: Mapping[str, Any],
    num_models: int,
    batch_size: int,
    path: Path,
) -> None:
    """Answer all examples with each model in turn, and replace a JSON file of all answers after each batch.

    Started again, it goes on after the last batch. The file becomes the same as without interruption, since an answer
    depends on its index in the list and not on what is sampled beside it. asked_for: what the answers depend on, as
    JSON holds it; `earlier_answers` refuses a file in which this differs.
    """
    done = earlier_answers(path, asked_for)
    end, total = 0, num_models * len(examples)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("answering", total=total, completed=len(done))
        for name, _, answerer in answerers:
            reader, end = answerer.reader, end + len(examples)
            while (start := len(done) - end + len(examples)) < len(examples):
                batch = examples[start : start + batch_size]
                prompts = [reader(example) for example in batch] + [Prompt([], [])] * (batch_size - len(batch))
                for example, answer in zip(batch, chatting.answers(answerer, prompts, start), strict=False):
                    reasoning, short = chatting.apart(answer.text, FORMATS[reader.format])
                    done.append(
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
                write_json(path, {"settings": asked_for, "answers": done})
                progress.update(bar, completed=len(done))
            del answerer
    chatting.say(console, f"{len(done)} answers are in {path}")


def typed_line() -> str:
    """The next line that the user types; a terminal also shows a prompt and, where Python has them, has arrow keys."""
    if not sys.stdin.isatty():
        return input()
    with suppress(ImportError):  # Windows has no readline
        import readline  # noqa: F401 - its import gives input() a line to edit and a history
    return input("> ")


def what_is_asked(settings: EvalSettings, found: Found) -> dict[str, Any]:
    """What the answers of --batch depend on."""
    names = ("seed", "max_completion_length", "max_prompt_length", "wording", "format", "pan_and_scan", "dtype")
    sampling = settings.sampling
    return {
        "models": {name: [model, adapter and str(adapter)] for name, (model, adapter) in found.models.items()},
        "questions": str(settings.batch),
        "questions_sha256": hashlib.sha256(settings.batch.read_bytes()).hexdigest(),
        **{name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")},
        **{name: getattr(settings, name) for name in names},
    }


def use(settings: EvalSettings, found: Found, reader: Reader) -> None:
    """Answer what the user asks, in the way that was chosen."""
    console = Console(highlight=False)
    if settings.use == "batch":
        examples = load_questions(settings.batch)
        longest = max(map(reader.length, examples))
        reader = chatting.with_room(reader, longest, reader.most_images(examples))
    answerers = load_answerers(settings, found, reader)
    try:
        if settings.use == "chat":
            _, label, answerer = next(answerers)
            chatting.say(console, f"{settings.ckpt}, {label}", "dim")
            chatting.chat(console, answerer, typed_line)
        elif settings.use == "prompt":
            prompt = reader(chatting.asked(settings.prompt, list(map(Path, settings.image))))
            answer_prompt(console, answerers, prompt)
        elif settings.use == "examples":
            config = reader.model.config
            examples = built_in(nano=config.hidden_size == NANO.hidden_size, images=config.vision is not None)
            answer_examples(console, answerers, examples, reader)
        else:
            answer_file(
                console,
                answerers,
                examples,
                asked_for=what_is_asked(settings, found),
                num_models=len(found.models),
                batch_size=min(settings.batch_size, len(examples)),
                path=settings.output or Path("answers.json"),
            )
    except KeyboardInterrupt:
        chatting.say(console, "\nstopped" + ("; the same command goes on from here" if settings.use == "batch" else ""))
        raise SystemExit(130) from None
