"""The programs of a step, with shapes in place of arrays: they are compiled but not run, and nothing is allocated.

They are the very functions that a step calls, and get the same arguments.
"""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from gemma3.config import Config
from gemma3.image import MAX_CROPS
from gemma3.lora import Policy, init_lora
from gemma3.mesh import DATA, TENSOR, Model
from gemma3.params import Params, param_shapes
from gemma3.sample import PromptBatch, sample
from grpo.algorithm import LossBatch
from grpo.plan.costs import Work, device_bytes
from grpo.rollout import encode_on_mesh
from grpo.run.memory import choose_gather, decoding_bytes
from grpo.run.settings import Settings, lora_config
from grpo.run.setup import make_learner, split_weights
from grpo.update import Learner, Trainable, TrainState, completion_logps, policy_of, update


def topology_mesh(topology: str, data: int, tensor: int) -> Mesh:
    """A `data` by `tensor` mesh of TPU chips that need not exist, such as "v5e:2x4": to compile for, not to run on.

    ValueError if `libtpu` is not installed or does not know the topology, or if the topology has another size. On a
    machine without a TPU, JAX_PLATFORMS=cpu keeps jax from looking for one.
    """
    if find_spec("libtpu") is None:
        raise ValueError(f"compiling for {topology} needs the TPU's compiler; pip install libtpu")
    # Without these libtpu would look for a machine with TPUs, complain that it finds none, and serve one process only.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # A v4 chip is one device in every run, though it has two cores.
    whole_chips = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **whole_chips).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise ValueError(
            f"{topology} is no topology of TPU chips; name one such as v5e:2x4, v5e:16x16, v5p:2x2x1 or v6e:2x4"
        ) from error
    if data * tensor != len(devices):
        raise ValueError(f"--mesh {data},{tensor} needs {data * tensor} devices and {topology} has {len(devices)}")
    return Mesh(np.array(devices).reshape(data, tensor), (DATA, TENSOR))


class State(NamedTuple):
    """What lies on the devices between the programs of a step, as shapes with their shardings."""

    trainable: Trainable
    opt_state: optax.OptState
    frozen: Params
    copy: Params | None  # whole weights trained in float32, copied to the dtype that they compute in

    @property
    def policy(self) -> Policy:
        if self.copy is None:
            return Policy(self.frozen, self.trainable)
        return Policy(Params(self.copy.text, self.copy.vision or self.frozen.vision))


def held(state: State, program: str) -> State:
    """The state that lies on the devices while this program runs: the update makes its copy of the weights itself."""
    return state._replace(copy=None) if program == "update" else state


@dataclass(frozen=True)
class Job:
    settings: Settings
    model: Model
    memory: int | None  # bytes of a device, where they are known

    @cached_property
    def learner(self) -> Learner:
        return make_learner(self.settings, self.model)

    @property
    def work(self) -> Work:
        s, config = self.settings, self.model.config
        sizes = (s.prompts_per_step, s.max_prompt_length, s.sampling, images(s, config))
        return Work(config, *sizes, lora_config(s), s.train_vision)

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.settings.dtype)

    def on_mesh(self, tree):
        """Shapes of weights with their shardings."""
        where = self.model.shardings(tree)
        return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, where)

    def rows(self, *shape: int, dtype) -> jax.ShapeDtypeStruct:
        """The shape of an array with a row for each prompt."""
        split = NamedSharding(self.model.mesh, Spec(DATA))
        return jax.ShapeDtypeStruct((self.settings.prompts_per_step, *shape), dtype, sharding=split)

    def tokens(self, dtype) -> jax.ShapeDtypeStruct:
        """The shape of an array with a number for each token of the completions."""
        return self.rows(self.work.group, self.work.length, dtype=dtype)


def images(settings: Settings, config: Config) -> int:
    """The most images of a prompt: one, or as many as pan-and-scan makes and the prompt has room for."""
    if config.vision is None or settings.data == "gsm8k":
        return 0
    room = settings.max_prompt_length // config.vision.tokens_per_image
    return min(room, 1 + MAX_CROPS) if settings.pan_and_scan else 1


def abstract_state(job: Job) -> State:
    """The state of a run before its first step, as shapes."""
    s, config, lora = job.settings, job.model.config, lora_config(job.settings)
    params, copy = job.on_mesh(param_shapes(config, job.dtype)), None
    if lora is not None:
        init = partial(init_lora, config=config, lora=lora)
        trainable, frozen = job.on_mesh(jax.eval_shape(init, jax.random.key(s.seed))), params
    else:
        trainable = job.on_mesh(split_weights(s, param_shapes(config, jnp.float32))[0])
        frozen = split_weights(s, params)[1]
        computing = jax.eval_shape(lambda weights: policy_of(weights, Params(None, None), job.dtype).params, trainable)
        copy = job.on_mesh(computing)
    opt_state = job.on_mesh(jax.eval_shape(job.learner.optimizer.init, trainable))
    return State(trainable, opt_state, frozen, copy)


# The programs that take the prompts a few at a time.
IN_MICRO_BATCHES = frozenset(("old log-probs", "reference", "update"))


class Program(NamedTuple):
    """One function of a step, and its arguments."""

    name: str
    function: Callable  # jitted
    arguments: tuple
    static: dict[str, Any]
    uses: Any  # the part of the state that it reads; the rest lies beside it


def _pixels(job: Job) -> jax.ShapeDtypeStruct | None:
    side = job.model.config.vision.image_size if job.work.images else 0
    return job.rows(job.work.images, side, side, 3, dtype=jnp.uint8) if side else None


def _prompts(job: Job, *, pixels: bool) -> PromptBatch:
    w, config, soft = job.work, job.model.config, None
    if w.images:
        soft = job.rows(w.images, config.vision.tokens_per_image, config.hidden_size, dtype=job.dtype)
    ids, index = job.rows(w.prompt_length, dtype=jnp.int32), job.rows(dtype=jnp.int32)
    return PromptBatch(ids, soft, index, _pixels(job) if pixels else None)


def _trains_tower(settings: Settings) -> bool:
    return settings.train_vision or settings.lora_vision


def gathers_once(job: Job) -> tuple[bool, str]:
    """How the sampler will hold the weights, by the same rule as in a run, and a sentence about it."""
    sizes = (job.work.num_prompts, job.work.prompt_length, job.settings.sampling)
    return choose_gather(decoding_bytes(param_shapes(job.model.config, job.dtype), job.model, *sizes), job.memory)


def sample_program(job: Job, state: State) -> Program:
    static = {
        "model": job.model,
        "sampling": job.settings.sampling,
        "gather_once": gathers_once(job)[0],
        "on_token": None,
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    allowed = jax.ShapeDtypeStruct((job.model.config.vocab_size,), jnp.bool_)
    params, lora = state.policy
    arguments = (state.policy, _prompts(job, pixels=False), key, allowed)
    return Program("sampling", sample, arguments, static, (params.text, lora and lora.blocks))


def logps_program(job: Job, policy: Policy, name: str) -> Program:
    """The program for the log-probs of the old policy, or of the reference."""
    learner, tower, (params, lora) = job.learner, _trains_tower(job.settings), policy
    static = {"model": job.model, "temperature": learner.temperature, "micro_batch": learner.micro_batch}
    arguments = (policy, _prompts(job, pixels=tower), job.tokens(jnp.int32))
    uses = (params, lora) if tower else (params.text, lora and lora.blocks)
    return Program(name, completion_logps, arguments, static, uses)


def update_program(job: Job, state: State) -> Program:
    s, tower, supervised = job.settings, _trains_tower(job.settings), job.settings.objective == "sft"
    batch = LossBatch(
        advantages=job.rows(job.settings.sampling.num_generations, dtype=jnp.float32),
        completion_mask=job.tokens(jnp.bool_),
        token_weights=job.tokens(jnp.float32),
        old_logps=job.tokens(jnp.float32) if s.num_iterations > 1 and not supervised else None,
        ref_logps=job.tokens(jnp.float32) if s.beta and not supervised else None,
        sampler_logps=None if supervised else job.tokens(jnp.float32),
    )
    train_state = TrainState(state.trainable, state.opt_state)
    arguments = (train_state, state.frozen, _prompts(job, pixels=tower), job.tokens(jnp.int32), batch)
    frozen = (state.frozen.text, state.frozen.vision if tower else None) if s.lora_r else None
    return Program("update", update, arguments, {"learner": job.learner}, (train_state, frozen))


def programs(job: Job, state: State) -> list[Program]:
    """The programs of a step, in its order."""
    s, found = job.settings, []
    if job.work.images:
        params, lora = state.policy
        arguments, uses = (state.policy, _pixels(job)), (params.vision, lora and lora.vision)
        found.append(Program("images", encode_on_mesh, arguments, {"model": job.model}, uses))
    if s.objective == "grpo":
        found.append(sample_program(job, state))
        if s.num_iterations > 1:
            found.append(logps_program(job, state.policy, "old log-probs"))
        if s.beta:
            found.append(logps_program(job, Policy(state.frozen), "reference"))
    return [*found, update_program(job, state)]


class Memory(NamedTuple):
    """Bytes that one program needs on one chip, as the compiler lays it out."""

    beside: int  # the state that it does not read
    arguments: int
    temporaries: int
    results: int  # results that do not take the place of arguments
    seconds: float  # to compile
    refused: bool  # the compiler found no room; `temporaries` then holds the bytes that it asked for

    @property
    def peak(self) -> int:
        return self.beside + self.arguments + self.temporaries + self.results

    def fits(self, memory: int | None) -> bool:
        return not self.refused and (memory is None or self.peak <= memory)


def state_bytes(tree) -> int:
    return device_bytes(tree, jax.tree.map(lambda x: x.sharding, tree))


def _needed(error: str) -> int:
    """The bytes that the compiler asked for, from its error when it is out of memory."""
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
