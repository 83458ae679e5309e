"""`train.py --plan`: would this run fit, and how fast could it be? It needs no weights, data or accelerator.

The memory is what the compiler reports for the programs of a step, compiled for the planned chips. The seconds are
arithmetic on published figures (`costs`). If a run does not fit, smaller runs are compiled until one fits.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh
from rich.console import Console
from rich.table import Table

from gemma3.config import Config
from gemma3.mesh import DATA, TENSOR, Model, make_mesh
from grpo.plan import programs
from grpo.plan.costs import CHIPS, Chip, caches_bytes, estimate, joined_bytes, update_flops
from grpo.run.cli import flag_name
from grpo.run.devices import check_mesh, mesh_shape
from grpo.run.memory import device_memory
from grpo.run.settings import Settings, check_batch, loss_config, model_config, resolve_defaults

LOCAL = ("cpu", "gpu")  # the devices that are here
EXAMPLES = "v5e:2x4, v5e:16x16, v5p:2x2x1 or v6e:2x4 (or cpu or gpu, for the devices that are here)"
MAX_TRIES = 6  # of smaller runs: compiling each takes minutes


def chip_of(name: str) -> Chip | None:
    """The figures of the chip that --plan names, None for the devices that are here; ValueError for other names."""
    if name in LOCAL:
        return None
    chip, colon, _ = name.partition(":")
    if not colon or chip not in CHIPS:
        raise ValueError(f"--plan {name} is no TPU topology with known figures; name one such as {EXAMPLES}")
    return CHIPS[chip]


def choose_backend(settings: Settings) -> Settings:
    """Keep jax from looking for an accelerator that was not asked for; a TPU's default dtype is bfloat16."""
    if settings.plan not in LOCAL:
        settings = replace(settings, dtype=settings.dtype or "bfloat16")
    if settings.plan != "gpu":
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu":
        raise ValueError(f"--plan gpu: jax sees no GPU here, only the {jax.default_backend()}; name {EXAMPLES}")
    return settings


def make_job(settings: Settings, config: Config) -> programs.Job:
    """The run to be planned on the devices of --plan; ValueError for sizes that cannot be split over them."""
    chip, shape = chip_of(settings.plan), mesh_shape(settings.mesh)
    mesh: Mesh = programs.topology_mesh(settings.plan, *shape) if chip else make_mesh(*shape)
    model = Model(config, mesh)
    check_mesh(model)
    check_batch(settings, mesh)
    loss_config(settings)
    return programs.Job(settings, model, chip.memory if chip else device_memory())


class Plan(NamedTuple):
    """A run, and the memory of those of its programs that are compiled."""

    job: programs.Job
    memory: dict[str, programs.Memory]  # by program, in the order of a step

    @property
    def too_large(self) -> set[str]:
        return {name for name, memory in self.memory.items() if not memory.fits(self.job.memory)}


def compile_programs(
    console: Console, job: programs.Job, known: dict[str, programs.Memory], first: set[str] = frozenset()
) -> Plan:
    """Compile the programs that are not `known`, those in `first` first; if one of these is too large, skip others."""
    state = programs.abstract_state(job)
    todo = {program.name: program for program in programs.programs(job, state)}
    plan = Plan(job, {})
    for name in sorted(todo, key=lambda name: name not in first):
        if name not in known:
            console.print(f"compiling the program of {name} ...", style="dim")
        plan.memory[name] = known[name] if name in known else programs.measure(todo[name], state)
        if name in first and plan.too_large:
            break
    return plan._replace(memory={name: plan.memory[name] for name in todo if name in plan.memory})


def _is_allowed(settings: Settings, config: Config) -> bool:
    """Whether the mesh can split the model and the batch. Its devices need not exist."""
    try:
        mesh = AbstractMesh(mesh_shape(settings.mesh), (DATA, TENSOR))
        check_mesh(Model(config, mesh))
        check_batch(settings, mesh)
    except ValueError:
        return False
    return True


def smaller(plan: Plan, prompts: int) -> Settings | None:
    """The next settings to try if a run does not fit, the mildest change first; None if nothing is left.

    The first change is fewer prompts at a time in the gradient, which affects only speed; then fewer prompts a step;
    then a longer tensor axis, with as many `prompts` as asked for; then fewer completions of a prompt.
    """
    s, config = plan.job.settings, plan.job.model.config
    data, tensor = mesh_shape(s.mesh)
    micro_batch = check_batch(s, plan.job.model.mesh)
    changes = []
    if plan.too_large & programs.IN_MICRO_BATCHES and micro_batch > 1:
        divisors = [n for n in range(1, micro_batch) if s.prompts_per_step // data % n == 0]
        changes.append({"micro_batch": divisors[-1]})
    if plan.too_large - programs.IN_MICRO_BATCHES:
        changes.append({"prompts_per_step": s.prompts_per_step // 2, "micro_batch": 1})
    if data % 2 == 0:
        changes.append({"mesh": f"{data // 2},{2 * tensor}", "prompts_per_step": prompts})
    if s.num_generations >= 4:
        changes.append({"num_generations": s.num_generations // 2})
    tries = (replace(s, **change) for change in changes)
    return next((settings for settings in tries if _is_allowed(settings, config)), None)


def flags_of(settings: Settings, original: Settings) -> str:
    """The flags in which `settings` differ from `original`."""
    names = ("micro_batch", "prompts_per_step", "mesh", "num_generations")
    changed = [name for name in names if getattr(settings, name) != getattr(original, name)]
    return " ".join(f"{flag_name(name)} {getattr(settings, name)}" for name in changed)


def find_fitting(console: Console, plan: Plan) -> Plan | None:
    """Try smaller runs, one after another, until one fits; return it, or None."""
    original = plan.job.settings
    for _ in range(MAX_TRIES):
        settings = smaller(plan, original.prompts_per_step)
        if settings is None:
            return None
        console.print(f"trying {flags_of(settings, original)}", style="dim")
        same = replace(plan.job.settings, micro_batch=settings.micro_batch) == settings
        known = {name: memory for name, memory in plan.memory.items() if same and name not in programs.IN_MICRO_BATCHES}
        plan = compile_programs(console, make_job(settings, plan.job.model.config), known, first=plan.too_large)
        if not plan.too_large:
            return plan
    return None


def unit_of(plan: Plan) -> tuple[str, int]:
    """The unit of memory to print, and its bytes: GiB, or MiB for small models."""
    return ("GiB", 2**30) if max(memory.peak for memory in plan.memory.values()) >= 2**30 else ("MiB", 2**20)


def memory_table(plan: Plan, state: programs.State) -> Table:
    """What lies on one chip while each program runs."""
    job, s, (unit, size) = plan.job, plan.job.settings, unit_of(plan)
    caches = {"sampling": caches_bytes(job.work, *mesh_shape(s.mesh), job.dtype)}
    trained = "adapter" if s.lora_r else "trained weights"
    table = Table(title=f"{s.model} on {s.plan}, mesh {s.mesh}: {unit} a chip", title_justify="left")
    table.add_column("")
    for name in plan.memory:
        table.add_column(name, justify="right")

    def row(what: str, bytes_in: Callable[[str, programs.Memory], int]) -> None:
        table.add_row(what, *(f"{bytes_in(name, memory) / size:.2f}" for name, memory in plan.memory.items()))

    row("frozen weights", lambda *_: programs.state_bytes(state.frozen))
    row(f"{trained} and optimizer state", lambda *_: programs.state_bytes((state.trainable, state.opt_state)))
    if state.copy is not None:
        row(f"{trained} in {s.dtype}", lambda name, _: programs.state_bytes(programs.held(state, name).copy))
    row("keys and values", lambda name, _: caches.get(name, 0))
    row("other temporaries", lambda name, memory: memory.temporaries - caches.get(name, 0))
    row(
        "prompts and completions",
        lambda name, memory: memory.peak - memory.temporaries - programs.state_bytes(programs.held(state, name)),
    )
    row("in all", lambda _, memory: memory.peak)
    table.add_row("compiled in", *(f"{memory.seconds:.0f} s" for memory in plan.memory.values()))
    return table


def verdict(plan: Plan) -> str:
    """A sentence on the program that needs the most memory."""
    name, worst = max(plan.memory.items(), key=lambda item: (item[1].refused, item[1].peak))
    unit, size = unit_of(plan)
    needed = f"{worst.peak / size:.2f}"
    if plan.job.memory is None:
        return f"{name} needs the most memory, {needed} {unit} a device; this backend does not say how much there is"
    needed += f" of {plan.job.memory / size:.2f} {unit} a chip"
    if worst.refused:
        return f"does not fit: the compiler refused {name}, which needs {needed}"
    return f"{'does not fit' if plan.too_large else 'fits'}: {name} needs the most memory, {needed}"


def speed(plan: Plan) -> str:
    """A sentence on the least seconds of a step, and on what they assume."""
    job, s, chip = plan.job, plan.job.settings, chip_of(plan.job.settings.plan)
    data, tensor = mesh_shape(s.mesh)
    lengths = (
        f"all prompts {s.max_prompt_length} and all completions {s.max_completion_length} tokens long, "
        f"images a prompt: {job.work.images}"
    )
    if chip is None:
        token = joined_bytes(job.model.config, tensor, job.dtype) + caches_bytes(job.work, data, tensor, job.dtype)
        flops = update_flops(job.work) / data / tensor
        return (
            f"a step reads {token / 1e9:.4f} GB a device for each of {s.max_completion_length} tokens, and its update "
            f"needs {flops / 1e12:.4f} TFLOP a device; {lengths}. Seconds are estimated for TPUs only"
        )
    seconds = estimate(
        job.work,
        chip,
        (data, tensor),
        job.dtype,
        micro_batch=check_batch(s, job.model.mesh),
        gather_once=programs.gathers_once(job)[0],
        num_iterations=s.num_iterations,
        num_logps=(s.num_iterations > 1) + (s.beta > 0),
    )
    if s.objective == "sft":
        seconds = seconds._replace(sampling=0.0)
    return (
        f"a step takes {sum(seconds):.2f} s or more: sampling {seconds.sampling:.2f} s, update {seconds.update:.2f} s. "
        f"That assumes {lengths}; {chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s from memory and "
        f"{chip.link / 1e9:.0f} GB/s from other chips, the published peaks; and no time for sums over the tensor axis, "
        "for rewards and for the host"
    )


def show(console: Console, plan: Plan) -> None:
    """Print the table of a plan, and what it means in sentences."""
    console.print(memory_table(plan, programs.abstract_state(plan.job)))
    sentences = [verdict(plan), speed(plan)]
    if plan.job.settings.objective == "grpo":
        sentences.insert(1, programs.gathers_once(plan.job)[1])
    for sentence in sentences:
        console.print(f"* {sentence}.", highlight=False)


def print_plan(settings: Settings) -> None:
    """Compile the programs of a step for the devices that --plan names, and print what they need on one of them.

    ValueError for what cannot be planned.
    """
    console = Console(width=118)
    chip_of(settings.plan)
    if settings.plan not in LOCAL:
        # A program for chips that are not here cannot be read back from the cache, and each try would print a warning.
        jax.config.update("jax_enable_compilation_cache", False)
    settings = resolve_defaults(choose_backend(settings))
    config = model_config(settings.model)
    plan = compile_programs(console, make_job(settings, config), {})
    show(console, plan)
    if not plan.too_large:
        return
    fitting = find_fitting(console, plan)
    if fitting is None:
        sentence = "* no smaller run that was tried fits: take a larger topology or a smaller model."
        console.print(sentence, highlight=False)
    else:
        console.print(f"* with {flags_of(fitting.job.settings, settings)} it fits:", highlight=False)
        show(console, fitting)
