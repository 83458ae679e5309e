"""The programs for mesh 2,4 communicate what the design says and nothing else; collectives are counted loop by loop.

Weights stored in parts are joined over `data`, a layer at a time; hidden states are summed over `tensor` where each
shard has a part of the sum. Logits are never exchanged, only single numbers per token; of a gradient, its sum.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from gemma3.config import Config, layer_pattern
from gemma3.files.published import NANO
from gemma3.filters import Sampling, num_blocks
from gemma3.lora import LoraConfig, Policy, init_lora
from gemma3.mesh import DATA, TENSOR, Model, make_mesh
from gemma3.params import Params, param_shapes
from gemma3.sample import PromptBatch, sample
from grpo.algorithm import LossBatch
from grpo.rollout import encode_on_mesh
from grpo.run.settings import Settings
from grpo.run.setup import make_learner
from grpo.update import TrainState, update

L, D, V = 3, 40, 656
CONFIG = Config(
    "gemma3_text",
    vocab_size=V,
    hidden_size=D,
    intermediate_size=104,
    num_layers=L,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    sliding_window=8,
    layer_types=layer_pattern(L, 3),
    query_pre_attn_scalar=16,
)
Q, G, P, C, RANK = 6, 5, 19, 7, 3
ROWS = Q // 2  # prompts of a data shard
ROW_WISE = Spec(DATA)
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "collective_permute", "all_to_all", "collective_broadcast")
AXES = {((0, 4), (1, 5), (2, 6), (3, 7)): DATA, ((0, 1, 2, 3), (4, 5, 6, 7)): TENSOR, (tuple(range(8)),): "both"}
SETTINGS = Settings(
    beta=0.04, learning_rate=1e-3, weight_decay=0.1, prompts_per_step=Q, micro_batch=1, dtype="float32", mesh="2,4"
)


def on_mesh(config: Config = CONFIG) -> Model:
    return Model(config, make_mesh(2, 4))


def collective(kind: str, axis: str, *shape: int) -> tuple[str, str, tuple[int, ...]]:
    """What a collective does, over which axis, and the shape of its result on one device, without axes of 1."""
    return kind, axis, tuple(n for n in shape if n > 1)


def loops(lowered) -> list[Counter]:
    """The collectives of a program by place: outside of loops, then in each loop's condition or body that has any.

    The places are in the program's order. A loop over layers or micro-batches counts once.
    """
    module = lowered.compiler_ir("stablehlo")
    functions = {str(f.attributes["sym_name"]).strip('"'): f for f in module.body.operations}
    places = [Counter()]

    def visit(block, place: Counter) -> None:
        for op in (item.operation for item in block.operations):
            dialect, name = op.name.split(".")
            if dialect == "stablehlo" and name in KINDS:
                axis = AXES[tuple(map(tuple, np.array(op.attributes["replica_groups"]).tolist()))]
                place[collective(name, axis, *op.results[0].type.shape)] += 1
            elif op.name == "func.call":
                visit(functions[str(op.attributes["callee"]).removeprefix("@")].regions[0].blocks[0], place)
            else:
                for inner in (inner for region in op.regions for inner in region.blocks):
                    here = place
                    if name == "while":
                        places.append(here := Counter())
                    visit(inner, here)

    visit(functions["main"].regions[0].blocks[0], places[0])
    return [places[0], *filter(None, places[1:])]


def compiled_collectives(lowered) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(kind, shape) of every array that the optimised program exchanges; several may share one operation."""
    kinds = "|".join(kind.replace("_", "-") for kind in KINDS)
    for results, kind in re.findall(rf" = (.+?) ({kinds})(?:-start)?\(", lowered.compile().as_text()):
        for shape in re.findall(r"\w\[([\d,]*)\]", results):
            yield kind.replace("-", "_"), collective("", "", *map(int, filter(None, shape.split(","))))[2]


def array(*shape: int, dtype=jnp.int32, spec: Spec = ROW_WISE) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(make_mesh(2, 4), spec))


def stored(tree, config: Config = CONFIG):
    """Shapes of parameters, placed as training stores them."""
    put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(put, tree, on_mesh(config).shardings(tree))


def adapter():
    return jax.eval_shape(partial(init_lora, config=CONFIG, lora=LoraConfig(r=RANK)), jax.random.key(0))


def stacked(tree, config: Config = CONFIG) -> list[tuple[Spec, tuple[int, ...], tuple[int, ...]]]:
    """For every array of a stack: how one layer of it is split, and its shape on a device when joined and in parts."""
    model = on_mesh(config)
    sizes = model.mesh.shape

    def share(x, spec: Spec, *axes: str) -> tuple[int, ...]:
        spec = (*spec, *[None] * (x.ndim - len(spec)))
        return tuple(n // sizes[axis] if axis in axes else n for n, axis in zip(x.shape, spec, strict=True))[1:]

    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(model.specs(tree)), strict=True)
    return [(Spec(*spec[1:]), share(x, spec, TENSOR), share(x, spec, TENSOR, DATA)) for x, spec in pairs]


def gathers(tree, config: Config = CONFIG) -> Counter:
    """One for each array of a layer that is stored in parts over `data`."""
    return Counter(collective("all_gather", DATA, *joined) for spec, joined, _ in stacked(tree, config) if DATA in spec)


BLOCKS = param_shapes(CONFIG).text.blocks
EMBEDDING = collective("all_gather", DATA, V // 4, D)


def lowered_sample(gather_once: bool):
    return sample.lower(
        stored(Policy(param_shapes(CONFIG), adapter())),
        PromptBatch(array(Q, P), None, array(Q)),
        array(dtype=jax.random.key(0).dtype, spec=Spec()),
        array(V, dtype=jnp.bool_, spec=Spec(TENSOR)),
        model=on_mesh(),
        sampling=Sampling(num_generations=G, max_completion_length=C),
        gather_once=gather_once,
    )


def lowered_update(kind: str):
    params, learner = param_shapes(CONFIG), make_learner(SETTINGS, on_mesh())
    trainable, frozen = {"adapter": (adapter(), params), "text": (params.text, Params(None, None))}[kind]
    of_tokens = partial(array, Q, G, C)
    return update.lower(
        stored(TrainState(trainable, jax.eval_shape(learner.optimizer.init, trainable))),
        stored(frozen),
        PromptBatch(array(Q, P), None, array(Q)),
        of_tokens(),
        LossBatch(
            advantages=array(Q, G, dtype=jnp.float32),
            completion_mask=of_tokens(dtype=jnp.bool_),
            token_weights=of_tokens(dtype=jnp.float32),
            old_logps=of_tokens(dtype=jnp.float32),
            ref_logps=of_tokens(dtype=jnp.float32),
        ),
        learner=learner,
    )


@pytest.mark.parametrize("gather_once", [True, False])
def test_a_decode_step_sums_two_hidden_states_a_layer_and_five_numbers_a_row(gather_once):
    """The embedding is looked up in parts: one sum. Attention and MLP: one sum each per layer. Then five numbers a row:
    three for the choice (the highest logit, the chosen one, its id), two for the log-prob (the highest logit, the sum
    of exp). The choice asks for its highest logit twice; the compiler keeps one. The masses of the vocabulary's blocks
    are joined. Whether to go on is one maximum over `data`. Weights are gathered in the step only if they were not
    gathered before the loop.
    """
    outside, prompt_layer, unfinished, step = loops(lowered_sample(gather_once))
    weights = gathers((BLOCKS, adapter()))
    all_layers = Counter({key: L * count for key, count in weights.items()})
    number = collective("all_reduce", TENSOR, ROWS, G)
    once, each_token = (all_layers, Counter()) if gather_once else (Counter(), all_layers)
    choice = Counter({number: 5 + 1, collective("all_gather", TENSOR, num_blocks(V), ROWS, G): 1})
    assert step == each_token + choice + Counter({collective("all_reduce", TENSOR, ROWS, G, D): 1 + 2 * L})
    assert unfinished == Counter([collective("all_reduce", DATA)])

    # Before the loop the prompts are read, and the first token is sampled.
    hidden = collective("all_reduce", TENSOR, ROWS, P, D)
    assert prompt_layer == weights + Counter({hidden: 2})
    assert outside == once + Counter({EMBEDDING: 2, hidden: 1}) + choice


def gradient_sums(trained) -> Counter:
    """What the backward pass of one layer exchanges for the gradients of a stack's matrices.

    Each is summed over `data` and left in the parts in which it is stored. An adapter's factor that every tensor shard
    holds whole is summed over `tensor` too.
    """
    sums = Counter()
    for spec, joined, parts in stacked(trained):
        if DATA in spec:
            sums[collective("reduce_scatter", DATA, *parts)] += 1
        else:
            sums[collective("all_reduce", DATA, *joined)] += 1
        if TENSOR not in spec:
            sums[collective("all_reduce", TENSOR, *joined)] += 1
    return sums


@pytest.mark.parametrize("kind", ["adapter", "text"])
def test_a_layer_of_the_update_gathers_its_weights_twice_and_sums_six_hidden_states(kind):
    """Forward: each stored weight is gathered, and two hidden states are summed, after attention and after the MLP.
    Backward: both happen again, since only a layer's input is kept; then the gradients of the inputs of attention and
    MLP are summed, and those of the layer's weights. Prompt and completions pass the stack one after the other.

    Norms are whole everywhere: their gradients are summed over `data`, those of the q and k norms over both axes.
    """
    trained = {"adapter": adapter(), "text": BLOCKS}[kind]
    matrices = (
        adapter() if kind == "adapter" else BLOCKS._replace(**{name: None for name in BLOCKS._fields if "norm" in name})
    )
    weights = gathers((BLOCKS, trained) if kind == "adapter" else trained)
    norms = {collective("all_reduce", DATA, D): 4, collective("all_reduce", "both", CONFIG.head_dim): 2}
    sums = gradient_sums(matrices) + Counter(norms if kind == "text" else {})
    hidden = {"prompt": (P, D), "completions": (G, C - 1, D)}
    summed = {name: collective("all_reduce", TENSOR, *shape) for name, shape in hidden.items()}
    _, micro_batch, *layers = loops(lowered_update(kind))
    prompt, completions, tokens, tokens_backward, completions_backward, prompt_backward = layers
    assert prompt == weights + Counter({summed["prompt"]: 2})
    assert completions == weights + Counter({summed["completions"]: 2})
    assert completions_backward == weights + Counter({summed["completions"]: 4}) + sums
    assert prompt_backward == weights + Counter({summed["prompt"]: 4}) + sums

    # For logits: highest, sum of exp, chosen, entropy; backward: the first two again, and the hidden states' gradient.
    number = collective("all_reduce", TENSOR, G * C)
    assert tokens == Counter({number: 4})
    assert tokens_backward == Counter({number: 2, collective("all_reduce", TENSOR, G * C, D): 1})

    # Each embedding is gathered for prompts and for completions; the rest is sums of metrics, of one or two numbers.
    expected = Counter({EMBEDDING: 2} | dict.fromkeys(summed.values(), 1))
    if kind == "text":
        expected += {collective("reduce_scatter", DATA, V // 4, D // 2): 2, collective("all_reduce", DATA, D): 2}
    metrics = micro_batch - expected
    assert expected <= micro_batch
    assert {key[:2] for key in metrics} == {("all_reduce", DATA)} and all(np.prod(shape) <= 2 for *_, shape in metrics)


@pytest.mark.parametrize(
    "program", [partial(lowered_sample, True), partial(lowered_update, "adapter")], ids=["sample", "update"]
)
def test_the_compiler_adds_no_kind_of_collective_and_no_gather(program):
    """Compiled for eight devices. It adds only sums of single numbers, for the optimizer's global norm."""
    lowered = program()
    design = {(kind, shape) for place in loops(lowered) for kind, _, shape in place}
    found = set(compiled_collectives(lowered))
    assert {kind for kind, _ in found} == {kind for kind, _ in design}
    assert all(kind == "all_reduce" and shape == () for kind, shape in found - design)


def test_images_are_dealt_out_and_only_their_soft_tokens_gathered():
    """Each device encodes its own images with weights gathered layer by layer; the soft tokens are then joined."""
    config, images = NANO, 2
    policy, pixels = stored(Policy(param_shapes(config)), config), array(Q, images, 32, 32, 3, dtype=jnp.uint8)
    lowered = encode_on_mesh.lower(policy, pixels, model=on_mesh(config))
    outside, layer = loops(lowered)
    vision = param_shapes(config).vision
    assert layer == gathers(vision.blocks, config)
    padded = -(-ROWS * images // 4) * 4
    soft = collective("all_gather", TENSOR, padded, config.vision.tokens_per_image, config.hidden_size)
    tables = {name: getattr(vision, name).shape for name in ("patch_kernel", "position", "projector")}
    assert outside == Counter([soft, *(collective("all_gather", DATA, *shape) for shape in tables.values())])
