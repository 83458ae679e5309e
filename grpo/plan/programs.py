"""The programs of a step, for shapes instead of arrays: nothing is allocated, and they are compiled, not run.

They are the very functions that `step` calls, `encode`, `sample` and `update`, with the arguments that it gives them.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma3.config import Config
from gemma3.image import MAX_CROPS
from gemma3.lora import Lora, LoraConfig, init_lora
from gemma3.mesh import DATA, shardings
from gemma3.model import Params, param_shapes
from gemma3.sample import Prompts, Sampling, choose_gather, decoding_bytes, encode, sample
from grpo.algorithm import LossBatch
from grpo.plan.costs import Work, device_bytes
from grpo.run.settings import Settings, check_batch, loss_config
from grpo.update import Trainable, make_optimizer, make_schedule, policy, update


class State(NamedTuple):
    """What lies on the devices between the programs of a step, as shapes with their shardings."""

    trainable: Trainable
    opt_state: optax.OptState
    frozen: Params
    copy: Params | None  # weights that are trained in float32, again in the dtype that they compute in

    @property
    def policy(self) -> tuple[Params, Lora | None]:
        if self.copy is None:
            return self.frozen, self.trainable
        return Params(self.copy.text, self.copy.vision or self.frozen.vision), None


def held(state: State, program: str) -> State:
    """What of the state there is while a program of this name runs: the update copies the weights that it trains."""
    return state._replace(copy=None) if program == "update" else state


@dataclass(frozen=True)
class Job:
    """A run to be planned."""

    settings: Settings
    config: Config
    mesh: Mesh
    memory: int | None  # bytes of a device, where they are known

    @property
    def work(self) -> Work:
        s = self.settings
        group = 1 if s.objective == "sft" else s.num_generations
        return Work(
            *(self.config, s.prompts_per_step, group, s.max_prompt_length, s.max_completion_length),
            pictures=pictures(s, self.config),
            lora=lora_config(s),
        )

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.settings.dtype)

    def placed(self, tree):
        """Shapes with the shardings of parameters."""
        where = shardings(tree, self.config, self.mesh)
        return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, where)

    def rows(self, *shape: int, dtype) -> jax.ShapeDtypeStruct:
        """An array with a row for each prompt."""
        split = NamedSharding(self.mesh, P(DATA))
        return jax.ShapeDtypeStruct((self.work.prompts, *shape), dtype, sharding=split)


def pictures(settings: Settings, config: Config) -> int:
    """The most pictures of a prompt: one, or as many as pan-and-scan makes and the prompt has room for."""
    if config.vision is None or settings.data == "gsm8k":
        return 0
    room = settings.max_prompt_length // config.vision.tokens_per_image
    return min(room, 1 + MAX_CROPS) if settings.pan_and_scan else 1


def lora_config(settings: Settings) -> LoraConfig | None:
    s = settings
    return LoraConfig(s.lora_r, s.lora_alpha, s.lora_rslora, s.lora_targets, s.lora_vision) if s.lora_r else None


def optimizer_of(settings: Settings) -> optax.GradientTransformation:
    steps = settings.steps * settings.num_iterations
    schedule = {"warmup_steps": settings.warmup_steps, "schedule": settings.lr_scheduler}
    return make_optimizer(
        make_schedule(settings.learning_rate, steps, **schedule),
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
    )


def abstract_state(job: Job, optimizer: optax.GradientTransformation) -> State:
    """The state of a run before its first step."""
    s, lora, params = job.settings, job.work.lora, job.placed(param_shapes(job.config, job.dtype))
    if lora:
        init = partial(init_lora, config=job.config, lora=lora)
        trainable, frozen = job.placed(jax.eval_shape(init, jax.random.key(s.seed))), params
    else:
        master = param_shapes(job.config, jnp.float32)
        trainable = job.placed(master if s.train_vision else master.text)
        frozen = params if s.beta else Params(None, None if s.train_vision else params.vision)
    opt_state = job.placed(jax.eval_shape(optimizer.init, trainable))
    computing = jax.eval_shape(lambda weights: policy(weights, Params(None, None), job.dtype)[0], trainable)
    return State(trainable, opt_state, frozen, None if lora else job.placed(computing))


class Program(NamedTuple):
    """One function of a step, and what it is called with."""

    name: str
    function: Callable  # jitted
    arguments: tuple
    static: dict[str, Any]
    uses: Any  # what it reads of the state; the rest of the state lies beside it


def _pixels(job: Job) -> jax.ShapeDtypeStruct | None:
    side = job.config.vision.image_size if job.work.pictures else 0
    return job.rows(job.work.pictures, side, side, 3, dtype=jnp.uint8) if side else None


def _prompts(job: Job, *, pixels: bool) -> Prompts:
    w, config = job.work, job.config
    soft = None
    if w.pictures:
        soft = job.rows(w.pictures, config.vision.tokens_per_image, config.hidden_size, dtype=job.dtype)
    ids, index = job.rows(w.prompt_length, dtype=jnp.int32), job.rows(dtype=jnp.int32)
    return Prompts(ids, soft, index, _pixels(job) if pixels else None)


def encode_program(job: Job, state: State) -> Program:
    params, lora = state.policy
    static = {"config": job.config, "mesh": job.mesh}
    return Program("pictures", encode, (params, _pixels(job), lora), static, (params.vision, lora and lora.vision))


def gathers_once(job: Job) -> tuple[bool, str]:
    """How the sampler will hold the weights, by the rule that a run goes by."""
    w = job.work
    sizes = {"prompts": w.prompts, "group": w.group, "prompt_length": w.prompt_length, "length": w.length}
    needed = decoding_bytes(param_shapes(job.config, job.dtype), config=job.config, mesh=job.mesh, **sizes)
    return choose_gather(needed, job.memory)


def sample_program(job: Job, state: State) -> Program:
    s, (params, lora) = job.settings, state.policy
    static = {
        "config": job.config,
        "mesh": job.mesh,
        "num_generations": s.num_generations,
        "max_completion_length": s.max_completion_length,
        "sampling": Sampling(s.temperature, s.top_k, s.top_p),
        "gather_once": gathers_once(job)[0],
        "on_token": None,
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    allowed = jax.ShapeDtypeStruct((job.config.vocab_size,), jnp.bool_)
    arguments = (params, lora, _prompts(job, pixels=False), key, allowed)
    return Program("sampling", sample, arguments, static, (params.text, lora and lora.blocks))


def update_program(job: Job, state: State, optimizer: optax.GradientTransformation) -> Program:
    s, w = job.settings, job.work
    tokens = lambda dtype: job.rows(w.group, w.length, dtype=dtype)  # noqa: E731
    supervised = s.objective == "sft"
    batch = LossBatch(
        advantages=job.rows(w.group, dtype=jnp.float32),
        completion_mask=tokens(jnp.bool_),
        weights=tokens(jnp.float32),
        old_logps=tokens(jnp.float32) if s.num_iterations > 1 and not supervised else None,
        ref_logps=tokens(jnp.float32) if s.beta and not supervised else None,
        sampler_logps=None if supervised else tokens(jnp.float32),
    )
    trains_tower = s.train_vision or s.lora_vision
    arguments = (*state[:3], _prompts(job, pixels=trains_tower), tokens(jnp.int32), batch)
    static = {
        "optimizer": optimizer,
        "config": job.config,
        "mesh": job.mesh,
        "dtype": job.dtype,
        "loss": loss_config(s),
        "temperature": s.temperature,
        "micro_batch": check_batch(s, job.mesh),
    }
    frozen = (state.frozen.text, state.frozen.vision if trains_tower else None) if s.lora_r else None
    return Program("update", update, arguments, static, (state.trainable, state.opt_state, frozen))


def programs(job: Job, state: State, optimizer: optax.GradientTransformation) -> list[Program]:
    """Those of a step, in its order."""
    drawn = [] if job.settings.objective == "sft" else [sample_program(job, state)]
    seen = [encode_program(job, state)] if job.work.pictures else []
    return [*seen, *drawn, update_program(job, state, optimizer)]


class Memory(NamedTuple):
    """Bytes of one program on one chip, as its compiler lays it out."""

    beside: int  # the state that it does not read
    arguments: int
    temporaries: int
    results: int  # those that do not take the place of arguments
    seconds: float  # to compile
    refused: bool  # the compiler found no room; `temporaries` is then what it says that it needs

    @property
    def peak(self) -> int:
        return self.beside + self.arguments + self.temporaries + self.results

    def fits(self, memory: int | None) -> bool:
        return not self.refused and (memory is None or self.peak <= memory)


def state_bytes(tree) -> int:
    return device_bytes(tree, jax.tree.map(lambda x: x.sharding, tree))


def _needed(error: str) -> int:
    """The bytes that a compiler out of memory says that it needs."""
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds", error)
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]]) if found else 0


def measure(program: Program, state: State) -> Memory:
    """Compile a program and read off its memory."""
    beside = state_bytes(held(state, program.name)) - state_bytes(program.uses)
    start = time.perf_counter()
    lowered = program.function.lower(*program.arguments, **program.static)
    try:
        stats = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed, seconds = _needed(str(error)), time.perf_counter() - start
        return Memory(beside, state_bytes(program.uses), needed, 0, seconds, refused=True)
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    seconds = time.perf_counter() - start
    return Memory(beside, stats.argument_size_in_bytes, stats.temp_size_in_bytes, results, seconds, refused=False)
