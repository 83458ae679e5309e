"""How good is a model? Its accuracy on a dataset with an interval, the base model's, and the dataset's own scores.

    python eval.py --ckpt RUN_OR_ADAPTER_OR_MODEL [--data ...] [--limit N]
    python eval.py --ckpt ... --chat           use the model; so do --prompt, --batch and --examples
    python eval.py --ckpt ... --export DIR     write the model for other programs
    python eval.py --report RUN,RUN            compare runs on one page

The figures go to eval.json. Next to it lie a page with every answer, a file of all completions and, for MathVista, the
files that the scripts in MathVista's repository read.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from data import kind
from gemma3.files.config_json import read_config
from gemma3.files.export import export_adapter, export_model
from gemma3.files.hub import resolve
from gemma3.files.tokenizer_model import load_tokenizer
from gemma3.mesh import Model, make_mesh
from grpo.pages.report import write_pages
from grpo.reader import Reader, rounded_up
from grpo.run.cli import clean_errors, parse
from grpo.run.devices import check_mesh, keep_compiled, mesh_shape, simulate_devices
from grpo.use.eval_settings import EvalSettings, Found, find_models, load_models, resolve_settings, resolve_use
from grpo.use.evaluate import by_purpose, evaluate, given_logps, load_held_out, trained_on, with_images
from grpo.use.results import given_rewards, judge, preference_lines, publish, result_lines
from grpo.use.use import use
from reward.report import preference_accuracy, spoken

_BAR = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))


def show_progress(bar: Progress, task: TaskID, answered: int, total: int) -> None:
    bar.update(task, completed=answered, total=total, note="" if answered else "the first batch compiles")


def measure(settings: EvalSettings, found: Found, reader: Reader) -> None:
    """Evaluate the models on a dataset, print their figures and write all results."""
    s, dataset = settings, "synthetic" if settings.data == "synthetic" else kind(settings.data)
    if s.split == "all" and trained_on(s.data, found.run):
        print("note: --split all includes examples that this run trained on")
    examples = load_held_out(s.data, s.split, s.limit, skip_missing_images=s.skip_missing_images)
    examples, longest = reader.that_fit(with_images(examples, s.images, s.seed), s.data)
    asked, given = by_purpose(examples, reader, s.max_completion_length, s.data)
    rewards = given_rewards(given, reader, s.reward, s.max_completion_length) if given else []
    room = rounded_up(longest, s.max_prompt_length)
    reader = replace(reader, max_prompt_length=room, max_images=reader.most_images(examples))
    batch_size = min(s.batch_size, max(len(asked), len(given)))

    s.out.parent.mkdir(parents=True, exist_ok=True)
    figures, lines, answered = {}, [], {}
    for name, policy in load_models(found.models, s.dtype, reader.model):
        figures[name] = {}
        if asked:
            with Progress(*_BAR, transient=True, disable=not sys.stdout.isatty()) as bar:
                watch = partial(show_progress, bar, bar.add_task(name, total=None, note=""))
                how = {"sampling": s.sampling, "seed": s.seed, "batch_size": batch_size, "watch": watch}
                answered[name] = evaluate(policy, asked, reader, **how)
            figures[name] |= judge(answered[name], dataset, s, name)
            lines += result_lines(name, answered[name])
            print(spoken(name, figures[name]))
        if given:
            logps = given_logps(policy, given, reader, s.max_completion_length, batch_size)
            by = {"policy": logps, "reward": rewards}
            figures[name]["preference"] = {who: preference_accuracy(given, values) for who, values in by.items()}
            lines += preference_lines(name, given, rewards, logps)
        del policy  # before the next model is read
    publish(figures, lines, answered, dataset, s)


def write_export(settings: EvalSettings, found: Found) -> None:
    """Write a model or its adapter for other programs, and print what was written."""
    jax.config.update("jax_platforms", "cpu")  # a model may be larger than one accelerator's memory
    ((model, adapter),) = found.models.values()
    if settings.adapter_only:
        export_adapter(model, adapter, settings.export)
        what = f"the adapter {adapter}"
    else:
        dtype = export_model(model, adapter, settings.export, settings.dtype)
        what = f"{model}{f' with {adapter} merged in' if adapter else ''}, in {dtype}"
    print(f"wrote {settings.export}: {what}")


def main(argv: Sequence[str] | None = None) -> None:
    typed = parse(EvalSettings, argv, prog="eval.py", description=__doc__.splitlines()[0])
    if typed.report:
        print(write_pages(list(map(Path, typed.report)), typed.out))
        return
    found = find_models(typed.ckpt, typed.model, typed.base if typed.base is not None else not typed.use)
    if typed.export:
        return write_export(typed, found)
    if typed.virtual_devices:
        simulate_devices(typed.virtual_devices)
    if typed.base and len(found.models) == 1:
        raise ValueError(f"--base: --ckpt {typed.ckpt} is a model that was not trained from another here; leave it out")
    # An unknown dataset is refused here, before a model is downloaded.
    settings = typed if typed.use else resolve_settings(typed, found.run)
    mesh = make_mesh(*mesh_shape(typed.mesh))
    name = next(iter(found.models.values()))[0]
    directory = resolve(name)
    model = Model(read_config(directory), mesh)
    check_mesh(model)
    if typed.use:
        settings = resolve_use(typed, found.run, name, model.config)
    how = (settings.wording, settings.format, settings.pan_and_scan, settings.max_prompt_length)
    reader = Reader(model, load_tokenizer(directory, model.config), *how)
    (use if settings.use else measure)(settings, found, reader)


if __name__ == "__main__":
    keep_compiled()
    with clean_errors():
        main()
