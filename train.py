"""GRPO for Gemma 3: from a checkpoint and a dataset with checkable answers to an adapter.

    python train.py                    # the embedded nano model on the embedded task, minutes on a laptop
    python train.py --model google/gemma-3-4b-it --mesh 2,4 --data mathvista

The loop is at the bottom; the algorithm is grpo/algorithm.py, the model gemma3/.
"""

import itertools
import os
import shlex
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from data import kind, load_dataset
from data.example import Example
from data.mathvista import TRAINING_NOTICE
from data.prompt import demonstration
from data.synthetic import synthetic
from eval import Reader, by_purpose, evaluate, given_logps, load_held_out, read_rows, that_fit
from gemma3.config import NANO, Config
from gemma3.files.adapter import load_adapter
from gemma3.files.config_json import read_config
from gemma3.files.hub import resolve
from gemma3.files.tokenizer_training import train_tokenizer, write_hugging_face_files
from gemma3.files.weights import load_checkpoint, save_checkpoint
from gemma3.lora import LoraConfig, init_lora
from gemma3.mesh import check_mesh, keep_compiled, make_mesh, shardings, simulate_devices
from gemma3.model import Params, init_params
from gemma3.sample import choose_gather, decoding_bytes, device_memory, peak_memory
from gemma3.tokenizer import Tokenizer
from grpo.pages import report
from grpo.plan.plan import print_plan
from grpo.run import checkpoint
from grpo.run.cli import clean_errors, parse
from grpo.run.log import RunLog, write_json
from grpo.run.processes import agree, connect, exchange, is_first, on_any_process, stopping_together
from grpo.run.settings import (
    Settings,
    check_batch,
    described,
    loss_config,
    mesh_shape,
    resolve_defaults,
    spelled_out,
    stored_settings,
)
from grpo.run.trackers import tracker
from grpo.step import Step, grpo_step, sft_step
from grpo.update import Trainable, init_optimizer, make_optimizer, make_schedule, policy
from reward import make_scorer
from reward.report import is_right, preference_accuracy, spoken, summary

SYNTHETIC_SIZE = 24_576  # training examples of the embedded task


def load_examples(settings: Settings) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and held-out ones that share none with them."""
    if settings.data == "synthetic":
        teacher = "hasty" if settings.objective == "sft" else "exact"
        train = synthetic("train", SYNTHETIC_SIZE, settings.seed, teacher=teacher)
    else:
        if kind(settings.data) == "mathvista":
            print(TRAINING_NOTICE)
        split = "all" if settings.eval_data else "train"
        train = load_dataset(settings.data, split, skip_missing_images=settings.skip_missing_images)
    held_out = load_held_out(
        settings.eval_data or settings.data,
        "all" if settings.eval_data else "test",
        settings.eval_limit,
        skip_missing_images=settings.skip_missing_images,
    )
    for name, part in (("train on", train), ("hold out", held_out)):
        if not part:
            raise ValueError(
                f"--data {settings.data} is too small: none of its rows is left to {name}; add rows"
                " or give other rows as --eval-data"
            )
    return train, held_out


def solution(example: Example, format: str) -> str:
    """What supervised training teaches: the best completion an example brings, or its reference solution."""
    if example.completion_rewards:
        return example.completions[int(np.argmax(example.completion_rewards))]
    return example.completions[0] if example.completions else demonstration(example, format)


def with_short_completions(examples: list[Example], tokenizer: Tokenizer, settings: Settings) -> list[Example]:
    """Leave out examples whose given completions do not fit, and say how many: none is cut."""
    limit = settings.max_completion_length

    def fits(example: Example) -> bool:
        texts = [solution(example, settings.format)] if settings.objective == "sft" else example.completions
        return all(len(tokenizer.encode(text)) < limit for text in texts)  # the end of the turn is one more

    short = [example for example in examples if fits(example)]
    if len(short) < len(examples):
        left_out = len(examples) - len(short)
        print(f"training data: {left_out} of {len(examples)} have completions longer than {limit} tokens, left out")
    if not short:
        raise ValueError(f"no given completion is within --max-completion-length {limit}; raise it")
    return short


def new_nano(directory: Path, examples: list[Example], seed: int) -> None:
    """A nano model that knows nothing: random weights, and a tokenizer of what `examples` ask and answer."""
    if not (directory / "config.json").is_file():
        params = init_params(jax.random.key(seed), NANO)
        save_checkpoint(directory, NANO, params)
        texts = [text for example in examples[:4000] for text in (example.question, solution(example, "answer"))]
        train_tokenizer([*texts, *["user\n", "model\n"] * 100], directory, NANO.vocab_size)
        write_hugging_face_files(directory, NANO)


def initial_policy(settings: Settings, config: Config, params: Params, mesh: Mesh) -> tuple[Trainable, Params]:
    """What is trained, in float32, and what stays frozen beside it: for whole weights just what the reference needs."""

    if settings.lora_r:
        if settings.adapter:
            return load_adapter(settings.adapter, config, mesh), params
        lora = LoraConfig(
            settings.lora_r, settings.lora_alpha, settings.lora_rslora, settings.lora_targets, settings.lora_vision
        )
        init = partial(init_lora, config=config, lora=lora)
        key = jax.random.key(settings.seed)
        where = shardings(jax.eval_shape(init, key), config, mesh)
        return jax.jit(init, out_shardings=where)(key), params
    if settings.adapter:
        raise ValueError("--adapter continues an adapter, and --lora-r 0 trains whole weights; leave one of them out")
    trained = params if settings.train_vision else params.text
    # A copy, since the update reuses the memory of what it is given.
    copy = partial(jax.tree.map, lambda x: x.astype(jnp.float32) + 0)
    master = jax.jit(copy, out_shardings=shardings(trained, config, mesh))(trained)
    return master, params if settings.beta else Params(None, None if settings.train_vision else params.vision)


def decoding(settings: Settings, params: Params, config: Config, mesh: Mesh) -> str:
    """A sentence on how the sampler holds the weights, and what it needs."""
    needed = decoding_bytes(
        params,
        config=config,
        mesh=mesh,
        prompts=settings.prompts_per_step,
        group=settings.num_generations,
        prompt_length=settings.max_prompt_length,
        length=settings.max_completion_length,
    )
    return choose_gather(needed, device_memory())[1]


def shuffled(size: int, seed: int, start: int) -> Iterator[int]:
    """Indices of a dataset, from place `start` on, endlessly: each epoch is a permutation fixed by the seed."""
    for epoch in itertools.count(start // size):
        yield from np.random.default_rng([seed, epoch]).permutation(size)[start % size :].tolist()
        start = 0


class Interrupt:
    """Ctrl-C or SIGTERM once: finish the step and save. Twice: stop at once."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, _) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = True


class Setup(NamedTuple):
    """All that a run starts from."""

    step: Step
    trainable: Trainable
    opt_state: optax.OptState
    rate: optax.Schedule
    reader: Reader
    examples: list[Example]  # to train on
    asked: list[Example]  # held out, to be answered
    given: list[Example]  # held out, with completions to be compared
    sampler: str  # a sentence on how it holds the weights


def prepare(settings: Settings) -> Setup:
    """Read model and data, refusing what cannot work before anything is compiled."""
    mesh = make_mesh(*mesh_shape(settings.mesh))
    micro_batch = check_batch(settings, mesh)
    loss = loss_config(settings)
    examples, held_out = load_examples(settings)
    if settings.model == "scratch":
        if is_first():
            new_nano(settings.out / "scratch", examples, settings.seed)
        exchange({})  # the others wait until it is written
        settings = replace(settings, model=str(settings.out / "scratch"))
    config = read_config(resolve(settings.model))
    check_mesh(config, mesh)
    tokenizer = Tokenizer(resolve(settings.model), config)
    reader = Reader(config, tokenizer, settings.wording, settings.format, settings.pan_and_scan)
    scorer = make_scorer(settings.reward, settings.format, max_tokens=settings.max_completion_length)
    examples = that_fit(examples, reader, settings.max_prompt_length, "training data")
    examples = with_short_completions(examples, tokenizer, settings)
    held_out = that_fit(held_out, reader, settings.max_prompt_length, "held-out data")
    asked, given = by_purpose(held_out, reader, settings.max_completion_length, "held-out data")

    print(f"reading the weights of {settings.model}")
    _, params = load_checkpoint(settings.model, jnp.dtype(settings.dtype), mesh)
    sampler = decoding(settings, params, config, mesh)
    trainable, frozen = initial_policy(settings, config, params, mesh)
    del params  # whole weights that are trained need not stay in memory twice
    rate = make_schedule(
        settings.learning_rate,
        settings.steps * settings.num_iterations,
        warmup_steps=settings.warmup_steps,
        schedule=settings.lr_scheduler,
    )
    optimizer = make_optimizer(
        rate,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
    )
    opt_state = init_optimizer(optimizer, trainable, config, mesh)
    step = Step(
        settings,
        config,
        mesh,
        tokenizer,
        frozen,
        optimizer,
        loss,
        scorer,
        is_right=partial(is_right, format=settings.format),
        solution=partial(solution, format=settings.format),
        render=lambda example: tokenizer.render_chat(reader.chat(example)),
        allowed=jnp.asarray(~tokenizer.never_sampled),
        max_images=max(reader.max_pictures(example) for example in examples + held_out),
        micro_batch=micro_batch,
    )
    return Setup(step, trainable, opt_state, rate, reader, examples, asked, given, sampler)


def measure(setup: Setup, trainable: Trainable, log: RunLog) -> dict:
    """Greedy accuracy of the policy as it is now on held-out rows; of rows with completions, its preferences."""
    step, settings = setup.step, setup.step.settings
    now = policy(trainable, step.frozen, step.dtype)
    sizes = {
        "mesh": step.mesh,
        "max_prompt_length": settings.max_prompt_length,
        "max_completion_length": settings.max_completion_length,
        "max_images": step.max_images,
        "batch_size": settings.eval_batch,
    }
    if setup.asked:
        return summary(evaluate(*now, setup.asked, setup.reader, watch=log.evaluating, **sizes))
    return preference_accuracy(setup.given, given_logps(*now, setup.given, setup.reader, **sizes))


def say_goodbye(settings: Settings, before: dict, after: dict, minutes: float) -> None:
    """What came out of a run, and where it is."""
    print(spoken("held-out accuracy before", before))
    print(spoken("held-out accuracy after ", after))
    trained = settings.out / ("adapter" if settings.lora_r else "model")
    print(f"{settings.steps} steps in {minutes:.1f} minutes; the result is {trained}")
    print(f"look at it: {settings.out / 'report.html'}")
    print(f"evaluate it with: python eval.py --ckpt {shlex.quote(str(settings.out))}")


def train(settings: Settings) -> None:
    """Run, or continue, the training that `settings` describe."""
    started = time.perf_counter()
    setup = prepare(settings)
    step, trainable, opt_state, *_ = setup
    setup = setup._replace(trainable=None, opt_state=None)  # what they begin as need not stay in memory
    settings = step.settings
    done, cursor, before = 0, 0, None
    if settings.resume:
        trainable, opt_state, extra, done = checkpoint.restore(
            settings.out, trainable, opt_state, config=step.config, mesh=step.mesh, step=settings.resume_step
        )
        cursor, before = extra["cursor"], extra["before"]
    settings.out.mkdir(parents=True, exist_ok=True)
    interrupt = Interrupt()

    def save() -> None:
        checkpoint.save(
            settings.out,
            done,
            trainable,
            opt_state,
            config=step.config,
            frozen_vision=step.frozen.vision,
            base_model=settings.model,
            extra={"cursor": cursor, "before": before},
            keep=settings.keep,
            rslora=settings.lora_rslora,
        )
        if is_first():
            report.write(settings.out)

    about = described(settings)
    track = tracker(settings.log if is_first() else None, settings.out, about["settings"])
    with RunLog(settings.out, settings.steps, resume_step=done if settings.resume else None, track=track) as log:
        write_json(settings.out / "config.json", about)
        if before is None:
            log.say("evaluating on held-out examples; the first batch compiles")
            before = measure(setup, trainable, log)
            log.say(spoken("held-out accuracy before", before))
        write_json(settings.out / "summary.json", {"before": before})
        log.say(setup.sampler)
        order = shuffled(len(setup.examples), settings.seed, cursor)
        rows = read_rows(
            setup.examples,
            order,
            setup.reader,
            batch_size=settings.prompts_per_step,
            mesh=step.mesh,
            first_place=cursor,
        )
        while done < settings.steps and not on_any_process(interrupt.requested):
            try:
                if settings.objective == "sft":
                    trainable, opt_state, metrics = sft_step(step, trainable, opt_state, rows)
                else:
                    trainable, opt_state, metrics, samples = grpo_step(step, trainable, opt_state, rows, done)
                    log.samples(done + 1, samples)
                if not metrics.pop("finite"):
                    raise FloatingPointError(f"the loss, {metrics['loss']:g}, or its gradient is not finite")
            except FloatingPointError as error:
                save()
                raise ValueError(
                    f"step {done + 1}: {error}; the update was not applied, and the state before it is saved in "
                    f"{settings.out}: try a lower --learning-rate"
                ) from error
            metrics["learning_rate"] = float(setup.rate(done * settings.num_iterations))
            if (peak := peak_memory()) is not None:
                metrics["memory/peak_gib"] = peak / 2**30
            done += 1
            cursor += metrics.get("prompts_drawn", settings.prompts_per_step)
            if settings.eval_every and done % settings.eval_every == 0 and done < settings.steps:
                found = measure(setup, trainable, log)
                low, high = found["interval"]
                metrics |= {"eval/accuracy": found["accuracy"], "eval/accuracy_low": low, "eval/accuracy_high": high}
            log.metrics(done, metrics)
            log.progress(done, metrics)
            if done % settings.save_every == 0 or done == settings.steps:
                save()
        if done < settings.steps:
            save()
        else:
            after = measure(setup, trainable, log)
            write_json(settings.out / "summary.json", {"before": before, "after": after})
            if is_first():
                report.write(settings.out)
    if done < settings.steps:
        print(f"stopped after step {done}; continue with: python train.py --resume {shlex.quote(str(settings.out))}")
    else:
        say_goodbye(settings, before, after, minutes=(time.perf_counter() - started) / 60)


def main() -> None:
    read = partial(parse, Settings, prog="train.py", description=__doc__.splitlines()[0])
    settings = read()
    if settings.resume:
        settings = replace(read(base=stored_settings(settings.resume)), out=settings.resume)
    if settings.virtual_devices:
        simulate_devices(settings.virtual_devices)
    if settings.plan:
        return print_plan(settings)
    connect(settings.coordinator, settings.num_processes, settings.process_id)
    with stopping_together(), clean_errors():
        settings = agree(resolve_defaults(settings))
        print(spelled_out(settings))
        train(settings)


if __name__ == "__main__":
    keep_compiled()
    with clean_errors():
        main()
