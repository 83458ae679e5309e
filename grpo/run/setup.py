"""From the settings to everything that a run starts from: examples, model, optimizer, and what is trained."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from data import kind, load_dataset
from data.example import Example
from data.mathvista import TRAINING_NOTICE
from data.synthetic import synthetic
from gemma3.files.adapter import load_adapter
from gemma3.files.config_json import read_config
from gemma3.files.hub import resolve
from gemma3.files.published import NANO
from gemma3.files.tokenizer_model import load_tokenizer
from gemma3.files.tokenizer_training import train_tokenizer, write_hugging_face_files
from gemma3.files.weights import load_checkpoint, save_checkpoint
from gemma3.lora import init_lora
from gemma3.mesh import Model, make_mesh
from gemma3.params import Params, init_params
from grpo.reader import Reader, rounded_up
from grpo.run.devices import check_mesh, mesh_shape
from grpo.run.processes import exchange, is_first
from grpo.run.settings import Settings, check_batch, lora_config, loss_config
from grpo.sft import solution
from grpo.trainer import Trainer
from grpo.update import Learner, Trainable, TrainState, init_state
from grpo.use.evaluate import by_purpose, load_held_out
from reward import make_reward_function

SYNTHETIC_SIZE = 24_576  # training examples of the embedded task


class Data(NamedTuple):
    """The examples of a run."""

    train: list[Example]
    asked: list[Example]  # held out, to be answered
    given: list[Example]  # held out, with completions to be compared


def load_examples(settings: Settings) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and the held-out examples, none of which are among them."""
    skip = {"skip_missing_images": settings.skip_missing_images}
    if settings.data == "synthetic":
        teacher = "hasty" if settings.objective == "sft" else "exact"
        train = synthetic("train", SYNTHETIC_SIZE, settings.seed, teacher=teacher)
    else:
        if kind(settings.data) == "mathvista":
            print(TRAINING_NOTICE)
        train = load_dataset(settings.data, "all" if settings.eval_data else "train", **skip)
    split = "all" if settings.eval_data else "test"
    held_out = load_held_out(settings.eval_data or settings.data, split, settings.eval_limit, **skip)
    for name, part in (("train on", train), ("hold out", held_out)):
        if not part:
            raise ValueError(
                f"--data {settings.data} is too small: none of its rows is left to {name}; add rows"
                " or give other rows as --eval-data"
            )
    return train, held_out


def with_short_completions(examples: list[Example], reader: Reader, settings: Settings) -> list[Example]:
    """Leave out examples whose given completions do not fit, and print how many: a completion is never cut."""
    limit = settings.max_completion_length

    def fits(example: Example) -> bool:
        texts = [solution(example, settings.format)] if settings.objective == "sft" else example.completions
        return all(len(reader.completion(text)) <= limit for text in texts)

    short = [example for example in examples if fits(example)]
    if len(short) < len(examples):
        left_out = len(examples) - len(short)
        print(f"training data: {left_out} of {len(examples)} have completions longer than {limit} tokens, left out")
    if not short:
        raise ValueError(f"no given completion is within --max-completion-length {limit}; raise it")
    return short


def new_nano(directory: Path, examples: list[Example], seed: int) -> str:
    """Write a nano model with random weights and a tokenizer trained on `examples`, and return its directory."""
    if is_first() and not (directory / "config.json").is_file():
        save_checkpoint(directory, NANO, init_params(jax.random.key(seed), NANO))
        texts = [text for example in examples[:4000] for text in (example.question, solution(example, "answer"))]
        train_tokenizer([*texts, *["user\n", "model\n"] * 100], directory, NANO.vocab_size)
        write_hugging_face_files(directory)
    exchange({})  # the others wait until it is written
    return str(directory)


def initial_weights(settings: Settings, params: Params, model: Model) -> tuple[Trainable, Params]:
    """What is trained, in float32, and what stays frozen: with an adapter all of `params`, else see `split_weights`."""
    if (lora := lora_config(settings)) is not None:
        if settings.adapter:
            return load_adapter(settings.adapter, model.config, model.mesh), params
        init = partial(init_lora, config=model.config, lora=lora)
        key = jax.random.key(settings.seed)
        return jax.jit(init, out_shardings=model.shardings(jax.eval_shape(init, key)))(key), params
    if settings.adapter:
        raise ValueError("--adapter continues an adapter, and --lora-r 0 trains whole weights; leave one of them out")
    trained, frozen = split_weights(settings, params)
    # A copy, since the update reuses the memory of what it is given.
    copy = partial(jax.tree.map, lambda x: x.astype(jnp.float32) + 0)
    return jax.jit(copy, out_shardings=model.shardings(trained))(trained), frozen


def split_weights(settings: Settings, params: Params) -> tuple[Trainable, Params]:
    """Without an adapter: the weights that are trained, and those kept frozen for the reference or as the tower."""
    tower = settings.train_vision
    return params if tower else params.text, params if settings.beta else Params(None, None if tower else params.vision)


def make_schedule(settings: Settings) -> optax.Schedule:
    """The rate of each update: linear warm-up, then "cosine" to a tenth or "constant"."""
    peak, warmup, steps = settings.learning_rate, settings.warmup_steps, settings.steps * settings.num_iterations
    if settings.lr_scheduler == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), 0.1 * peak)
    else:
        rates = [optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)]
        rate = optax.join_schedules(rates, [warmup])
    # Counted from 1: at a rate of 0 the first step of a warm-up would waste its samples.
    return lambda count: rate(count + 1)


def make_learner(settings: Settings, model: Model) -> Learner:
    """AdamW after clipping by the global norm, on the loss that the flags describe; ValueError for impossible flags."""
    adamw = optax.adamw(make_schedule(settings), b1=0.9, b2=settings.adam_beta2, weight_decay=settings.weight_decay)
    return Learner(
        model,
        optax.chain(optax.clip_by_global_norm(settings.max_grad_norm), adamw),
        loss_config(settings),
        jnp.dtype(settings.dtype),
        settings.temperature,
        check_batch(settings, model.mesh),
    )


def prepare(settings: Settings) -> tuple[Trainer, Data, TrainState]:
    """Read model and data, and refuse what cannot work before anything is compiled."""
    mesh = make_mesh(*mesh_shape(settings.mesh))
    check_batch(settings, mesh)
    loss_config(settings)
    train, held_out = load_examples(settings)
    if settings.model == "scratch":
        settings = replace(settings, model=new_nano(settings.out / "scratch", train, settings.seed))
    directory = resolve(settings.model)
    model = Model(read_config(directory), mesh)
    check_mesh(model)
    how = (settings.wording, settings.format, settings.pan_and_scan, settings.max_prompt_length)
    reader = Reader(model, load_tokenizer(directory, model.config), *how)
    reward = make_reward_function(settings.reward, settings.format, max_tokens=settings.max_completion_length)
    train, longest = reader.that_fit(train, "training data")
    train = with_short_completions(train, reader, settings)
    held_out, longest_held_out = reader.that_fit(held_out, "held-out data")
    data = Data(train, *by_purpose(held_out, reader, settings.max_completion_length, "held-out data"))
    room = rounded_up(max(longest, longest_held_out), settings.max_prompt_length)
    reader = replace(reader, max_prompt_length=room, max_images=reader.most_images(train + held_out))

    print(f"reading the weights of {settings.model}")
    _, params = load_checkpoint(settings.model, jnp.dtype(settings.dtype), mesh)
    trainable, frozen = initial_weights(settings, params, model)
    del params  # whole weights that are trained need not stay in memory twice
    trainer = Trainer(settings, reader, frozen, make_learner(settings, model), reward)
    return trainer, data, init_state(trainable, trainer.learner.optimizer, model)
