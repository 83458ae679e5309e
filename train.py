"""GRPO for Gemma 3: from a checkpoint and a dataset with checkable answers to an adapter.

    python train.py                    # the embedded nano model on the embedded task, minutes on a laptop
    python train.py --model google/gemma-3-4b-it --mesh 2,4 --data mathvista

`train` is the loop. A step is `grpo_step` in grpo/step.py. The algorithm is in grpo/algorithm.py, the model in gemma3/.
"""

from dataclasses import replace
from functools import partial

from grpo.pages.explain import explain
from grpo.plan.plan import print_plan
from grpo.run.cli import clean_errors, parse
from grpo.run.describe import spelled_out, stored_settings
from grpo.run.devices import keep_compiled, simulate_devices
from grpo.run.processes import agree, connect, stopping_together
from grpo.run.settings import Settings, resolve_defaults
from grpo.run.setup import prepare
from grpo.run.training import TrainingRun
from grpo.sft import sft_step
from grpo.step import grpo_step


def train(settings: Settings) -> None:
    """Run the training that `settings` describes, or continue it."""
    trainer, data, state = prepare(settings)
    take_step = sft_step if settings.objective == "sft" else grpo_step
    run = TrainingRun(trainer, data)
    state = run.restored(state)
    with run:
        rows = run.begin(state)
        while run.goes_on():
            try:
                state = run.advance(take_step(trainer, state, rows, run.step))
            except FloatingPointError as error:
                run.give_up(state, error)
            if run.evaluation_is_due:
                run.evaluate(state)
            run.log()
            if run.save_is_due:
                run.save(state)
        run.end(state)
    run.say_goodbye()


def main() -> None:
    read = partial(parse, Settings, prog="train.py", description=__doc__.splitlines()[0])
    settings = read()
    if settings.resume:
        settings = replace(read(base=stored_settings(settings.resume)), out=settings.resume)
    if settings.virtual_devices:
        simulate_devices(settings.virtual_devices)
    if settings.plan:
        return print_plan(settings)
    if settings.explain:
        return explain(settings)
    connect(settings.coordinator, settings.num_processes, settings.process_id)
    with stopping_together(), clean_errors():
        settings = agree(resolve_defaults(settings))
        print(spelled_out(settings))
        train(settings)


if __name__ == "__main__":
    keep_compiled()
    with clean_errors():
        main()
