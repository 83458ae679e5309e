"""The FLOPs by formula are those of the very program that runs; the bytes are those of its arrays."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import roofline_update
from gemma3.config import VisionConfig, layer_pattern
from gemma3.files.published import CONFIGS, NANO
from gemma3.filters import Sampling
from gemma3.lora import LoraConfig, Policy
from gemma3.mesh import Model, make_mesh
from gemma3.params import param_shapes
from grpo.plan import costs
from grpo.plan.costs import CHIPS, Work, estimate
from grpo.plan.programs import Job, abstract_state, update_program
from grpo.rollout import encode_on_mesh
from grpo.run.settings import Settings, resolve_defaults

# Sizes without a common factor. The window is longer than any sequence, so it hides only later tokens.
CONFIG = replace(NANO, num_layers=3, layer_types=layer_pattern(3, 3), sliding_window=64, vocab_size=446, vision=None)
Q, G, P, C = 3, 5, 11, 7


def product_flops(jaxpr) -> int:
    """The FLOPs of all matrix products in a traced program: two a multiplication, times the turns of its loops."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * int(np.prod([left[axis] for axis in contracted]))
        inner = [p for value in eqn.params.values() for p in (value if isinstance(value, tuple) else (value,))]
        bodies = [getattr(p, "jaxpr", p) for p in inner if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
        total += eqn.params.get("length", 1) * sum(product_flops(body) for body in bodies)
    return total


def job(config=CONFIG, **flags) -> Job:
    settings = Settings(
        data="gsm8k",
        prompts_per_step=Q,
        num_generations=G,
        max_prompt_length=P,
        max_completion_length=C,
        micro_batch=1,
        **flags,
    )
    return Job(resolve_defaults(settings), Model(config, make_mesh(1, 1)), None)


def all_pairs(monkeypatch) -> None:
    """Also count the scores that masks hide: the program computes them too."""

    def attention_flops(config, positions: range) -> int:
        keys = P if positions.start == 0 else P + C - 1
        return 4 * config.num_heads * config.head_dim * config.num_layers * len(positions) * keys

    monkeypatch.setattr(costs, "attention_flops", attention_flops)


@pytest.mark.parametrize("flags", [{"lora_r": 2}, {"lora_r": 3, "lora_targets": ("q", "v", "down")}, {"lora_r": 0}])
def test_the_update_has_the_flops_of_the_traced_program(flags, monkeypatch):
    """Exactly, once the scores that masks hide are counted too."""
    planned = job(**flags)
    program = update_program(planned, abstract_state(planned))
    traced = jax.make_jaxpr(lambda *a: program.function(*a, **program.static))(*program.arguments)

    all_pairs(monkeypatch)
    assert product_flops(traced.jaxpr) == costs.update_flops(planned.work)


def test_the_compiler_counts_little_more_than_the_arithmetic(monkeypatch):
    """For nano's update on the CPU: all but matrix products, as in norms and softmax, adds less than a seventh."""
    all_pairs(monkeypatch)
    counted = roofline_update.count(job(NANO))
    assert counted.least < counted.flops < 1.15 * counted.least


def test_attention_counts_what_a_query_may_see():
    """A window of 3 over positions 0 to 4 on two of three layers: 1 + 2 + 3 + 3 + 3 keys, and 1 + 2 + 3 + 4 + 5."""
    config = replace(CONFIG, sliding_window=3)
    per_pair = 4 * config.num_heads * config.head_dim
    assert costs.attention_flops(config, range(5)) == per_pair * (2 * 12 + 15)
    assert costs.attention_flops(config, range(3, 5)) == per_pair * (2 * 6 + 9)


def test_an_image_has_the_flops_of_the_traced_encoder():
    config = replace(NANO, vision=VisionConfig(24, 36, 2, 3, image_size=20, patch_size=5, tokens_per_image=4))
    pixels = jax.ShapeDtypeStruct((1, 1, 20, 20, 3), jnp.uint8)
    encode = partial(encode_on_mesh, model=Model(config, make_mesh(1, 1)))
    traced = jax.make_jaxpr(encode)(Policy(param_shapes(config)), pixels)
    assert product_flops(traced.jaxpr) == costs.encoder_flops(config.vision, config.hidden_size)


def test_decoding_reads_each_weight_of_the_language_model_once():
    config = CONFIGS["gemma-3-4b-it"]
    sizes = [x.size for x in jax.tree.leaves(param_shapes(config).text)]
    assert costs.joined_bytes(config, 1, jnp.bfloat16) == 2 * sum(sizes)
    # All but the norms is split in four.
    assert costs.joined_bytes(config, 4, jnp.bfloat16) == pytest.approx(sum(sizes) / 2, rel=1e-3)


def test_a_tower_that_learns_encodes_its_images_in_the_update():
    """A frozen tower does not. To train the tower's weights takes one more pass than to train its adapters."""
    config, sampling = CONFIGS["gemma-3-4b-it"], Sampling(num_generations=8, max_completion_length=512)
    flops = lambda *trained: costs.update_flops(Work(config, 8, 512, sampling, 1, *trained))  # noqa: E731
    images = costs.images_flops(Work(config, 8, 512, sampling, 1, None))
    assert flops(LoraConfig(64, vision=True)) - flops(LoraConfig(64)) == 3 * images
    assert flops(None, True) - flops(None) == 4 * images


def test_an_estimate_is_bound_by_memory_in_sampling_and_by_arithmetic_in_the_update():
    """4b on eight v5e: each of 512 tokens reads 1.95 GB weights and 0.64 GB keys and values at 819 GB/s; an update
    is 905 TFLOP for eight chips of 197 TFLOP/s."""
    sampling = Sampling(num_generations=8, max_completion_length=512)
    work = Work(CONFIGS["gemma-3-4b-it"], 8, 512, sampling, 1, LoraConfig(64))
    call = {"micro_batch": 1, "gather_once": True, "num_iterations": 1, "num_logps": 0}
    seconds = estimate(work, CHIPS["v5e"], (2, 4), jnp.bfloat16, **call)
    assert seconds.sampling == pytest.approx(512 * (1.95e9 + 0.64e9) / 819e9, rel=0.05)
    assert seconds.update == pytest.approx(905e12 / 8 / 197e12, rel=0.01)
    apart = estimate(work, CHIPS["v5e"], (2, 4), jnp.bfloat16, **call | {"gather_once": False})
    assert apart.sampling - seconds.sampling == pytest.approx(511 * 1.95e9 / 2 / 200e9, rel=0.01)
    twice = estimate(work, CHIPS["v5e"], (2, 4), jnp.bfloat16, **call | {"num_iterations": 2, "num_logps": 1})
    assert 2 * seconds.update < twice.update < 2.5 * seconds.update
