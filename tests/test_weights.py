"""Checkpoints go both ways between transformers and here with the same logits; what does not fit is refused by name."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    END_OF_IMAGE_ID,
    IMAGE_ID,
    START_OF_IMAGE_ID,
    tiny_gemma2_config,
    tiny_model,
    tiny_multimodal_config,
    tiny_text_config,
)

from gemma3.config import layer_pattern
from gemma3.files.published import CONFIGS, NANO
from gemma3.files.weights import NAMES, common_name, field_path, load_checkpoint, save_checkpoint
from gemma3.mesh import Model, make_mesh
from gemma3.model import forward
from gemma3.params import param_shapes

torch.set_num_threads(1)
CONFIGURATIONS = {"text": tiny_text_config, "multimodal": tiny_multimodal_config, "gemma2": tiny_gemma2_config}


def prompt(kind: str) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Two rows of ids and their images: two in the first row of a multimodal prompt, one in the second."""
    rng = np.random.default_rng(3)
    ids = rng.integers(4, 370, (2, 23))
    tokens = [START_OF_IMAGE_ID, *[IMAGE_ID] * 4, END_OF_IMAGE_ID]
    if kind != "multimodal":
        return ids, [[], []]
    ids[0, 2:8], ids[0, 11:17], ids[1, 5:11] = tokens, tokens, tokens
    image = lambda: rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)  # noqa: E731
    return ids, [[image(), image()], [image()]]


@torch.no_grad()
def logits_of_transformers(model, ids: np.ndarray, images: list[list[np.ndarray]]) -> np.ndarray:
    inputs = {"input_ids": torch.tensor(ids)}
    if flat := [image for row in images for image in row]:
        pixels = torch.tensor(np.stack(flat)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        inputs |= {"pixel_values": pixels, "token_type_ids": torch.tensor(ids == IMAGE_ID).int()}
    return model(**inputs).logits.float().numpy()


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def published(request, tmp_path_factory):
    """(kind, directory saved by transformers, prompt, its logits)."""
    kind, directory = request.param, tmp_path_factory.mktemp(request.param)
    model = tiny_model(CONFIGURATIONS[kind]())
    model.save_pretrained(directory)
    ids, images = prompt(kind)
    return kind, directory, (ids, images), logits_of_transformers(model, ids, images)


def assert_same_logits(directory, prompt, expected):
    config, params = load_checkpoint(directory)
    np.testing.assert_allclose(forward(params, *prompt, config=config), expected, atol=1e-5, rtol=0)


def test_what_transformers_saves_gives_its_logits_here(published):
    _, directory, given, expected = published
    assert expected.std() > 0.1
    assert_same_logits(directory, given, expected)


def test_what_is_saved_here_gives_the_same_logits_in_transformers(published, tmp_path):
    kind, directory, given, expected = published
    save_checkpoint(tmp_path / "ours", *load_checkpoint(directory), max_shard_bytes=200_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    model, report = type(tiny_model(CONFIGURATIONS[kind]())).from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(report.values())
    np.testing.assert_allclose(logits_of_transformers(model, *given), expected, atol=1e-5, rtol=0)
    assert model.generation_config.eos_token_id == [1]


def rewrite(source: Path, target: Path, rename=lambda name: name, change=None) -> None:
    """Copy a checkpoint, its tensors renamed and then changed by `change(tensors)`."""
    target.mkdir(exist_ok=True)
    tensors = {rename(name): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    if change is not None:
        change(tensors)
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())


def published_names(name: str) -> str:
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def names_in_memory(name: str) -> str:
    return "model." + name.replace("language_model.model.", "language_model.")


def names_in_memory_of_2025(name: str) -> str:
    return names_in_memory(published_names(name))


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A tiny multimodal checkpoint in the spelling of transformers 5, its prompt and its logits."""
    directory, (ids, images) = tmp_path_factory.mktemp("multimodal"), prompt("multimodal")
    model = tiny_model(tiny_multimodal_config())
    model.save_pretrained(directory)
    return directory, (ids, images), logits_of_transformers(model, ids, images)


@pytest.mark.parametrize("rename", [published_names, names_in_memory, names_in_memory_of_2025])
def test_every_spelling_of_the_names_is_read(rename, multimodal, tmp_path):
    directory, given, expected = multimodal
    rewrite(directory, tmp_path, rename)
    assert_same_logits(tmp_path, given, expected)


def test_names_in_memory_are_those_of_transformers(multimodal):
    saved = {names_in_memory(name) for name in load_file(multimodal[0] / "model.safetensors")}
    assert saved | {"lm_head.weight"} == set(tiny_model(tiny_multimodal_config()).state_dict())


def test_what_is_written_has_the_published_names(multimodal, tmp_path):
    directory, *_ = multimodal
    save_checkpoint(tmp_path / "ours", *load_checkpoint(directory))
    assert set(load_file(tmp_path / "ours" / "model.safetensors")) == {
        published_names(name) for name in load_file(directory / "model.safetensors")
    }


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_an_output_layer_equal_to_the_embedding_is_accepted_and_another_refused(name, multimodal, tmp_path):
    directory, given, expected = multimodal
    embedding = "language_model.model.embed_tokens.weight"
    rewrite(directory, tmp_path, change=lambda tensors: tensors.update({name: tensors[embedding]}))
    assert_same_logits(tmp_path, given, expected)
    rewrite(directory, tmp_path, change=lambda tensors: tensors.update({name: tensors[embedding] + 1e-3}))
    with pytest.raises(ValueError, match=f"holds a {name} that differs from the embedding"):
        load_checkpoint(tmp_path)


def replace_tensor(name: str, tensor):
    return lambda tensors: tensors.update({name: tensor})


NORM = "language_model.model.norm.weight"
Q = "language_model.model.layers.7.self_attn.q_proj.weight"
BAD_TENSORS = {
    "missing": (lambda tensors: tensors.pop(Q), r"lacks the tensor model\.layers\.7\.self_attn\.q_proj\.weight, which"),
    "several missing": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "q_proj" in name],
        r"lacks the tensor model\.layers\.0\.self_attn\.q_proj\.weight and 11 more",
    ),
    "left over": (
        replace_tensor("other.weight", torch.ones(3)),
        r"holds the tensor other\.weight, which this model does not have",
    ),
    "a ninth layer": (
        replace_tensor(Q.replace("7", "8"), torch.ones(64, 48)),
        r"holds the tensor model\.layers\.8\.self_attn\.q_proj\.weight",
    ),
    "misshapen": (
        replace_tensor(NORM, torch.ones(47)),
        r"norm\.weight in .*model\.safetensors is \[47\]; .*asks for \[48\]",
    ),
    "transposed": (replace_tensor(Q, torch.ones(48, 64)), r"is \[48, 64\]; the config asks for \[64, 48\]"),
    "twice": (
        replace_tensor("model.language_model.norm.weight", torch.ones(48)),
        r"holds model\.norm\.weight twice, as",
    ),
    "quantised": (replace_tensor(NORM, torch.ones(48, dtype=torch.int8)), "as I8"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_the_config_are_named(case, multimodal, tmp_path):
    change, message = BAD_TENSORS[case]
    rewrite(multimodal[0], tmp_path, change=change)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path)


def test_a_text_only_reader_does_not_take_a_multimodal_checkpoint_for_its_own(multimodal, tmp_path):
    rewrite(multimodal[0], tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content["text_config"]))
    with pytest.raises(ValueError, match=r"holds the tensor multi_modal_projector.* which this model does not have"):
        load_checkpoint(tmp_path)


def test_a_pickle_is_never_opened(multimodal, tmp_path):
    (tmp_path / "config.json").write_text((multimodal[0] / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is never opened, since unpickling"):
        load_checkpoint(tmp_path)


def test_a_directory_without_weights_is_refused(multimodal, tmp_path):
    (tmp_path / "config.json").write_text((multimodal[0] / "config.json").read_text())
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor its index$"):
        load_checkpoint(tmp_path)


def test_a_missing_shard_and_a_damaged_index_are_named(multimodal, tmp_path):
    ours = tmp_path / "ours"
    save_checkpoint(ours, *load_checkpoint(multimodal[0]), max_shard_bytes=200_000)
    next(ours.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-.* is missing, damaged"):
        load_checkpoint(ours)
    (ours / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        load_checkpoint(ours)


def test_bfloat16_files_are_read_exactly_and_written_again(multimodal, tmp_path):
    directory, *_ = multimodal
    rewrite(directory, tmp_path, change=lambda t: t.update({name: x.to(torch.bfloat16) for name, x in t.items()}))
    config, params = load_checkpoint(tmp_path, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    save_checkpoint(tmp_path / "ours", config, params)
    before, after = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(after[published_names(name)], tensor) for name, tensor in before.items())
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    _, wide = load_checkpoint(tmp_path, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, wide, jax.tree.map(lambda x: x.astype(jnp.float32), params))


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32", "float64"])
def test_without_a_dtype_weights_come_in_that_of_the_largest_tensor(stored, multimodal, tmp_path):
    """Norms are often stored in float32 beside smaller weights."""
    mixed = lambda name, x: x if "norm" in name else x.to(getattr(torch, stored))  # noqa: E731
    rewrite(multimodal[0], tmp_path, change=lambda t: t.update({name: mixed(name, x) for name, x in t.items()}))
    _, params = load_checkpoint(tmp_path, None)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {stored.replace("64", "32")}


@pytest.mark.parametrize("data, tensor", [(1, 1), (2, 4), (8, 1)])
def test_on_a_mesh_the_values_are_the_same_and_split_as_the_mesh_says(data, tensor, multimodal):
    config, whole = load_checkpoint(multimodal[0])
    mesh = make_mesh(data, tensor)
    _, split = load_checkpoint(multimodal[0], mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    jax.tree.map(
        lambda x, sharding: x.sharding == sharding or pytest.fail(f"{x.sharding} is not {sharding}"),
        split,
        Model(config, mesh).shardings(whole),
    )


def test_saving_a_split_model_writes_the_same_file(multimodal, tmp_path):
    for name, mesh in (("whole", None), ("split", make_mesh(2, 4))):
        save_checkpoint(tmp_path / name, *load_checkpoint(multimodal[0], mesh=mesh))
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "split/model.safetensors").read_bytes()


def test_files_named_in_also_are_copied(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), param_shapes(NANO))
    save_checkpoint(tmp_path / "out", NANO, params, also=[tmp_path / "tokenizer.model"])
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    config, again = load_checkpoint(tmp_path / "out")
    assert config == NANO
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_every_parameter_of_every_model_has_a_name_and_no_name_is_idle():
    paths = [
        {field_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(param_shapes(config))[0]}
        for config in CONFIGS.values()
    ]
    assert set.union(*paths) == set(NAMES)


def test_common_names_are_their_own_common_names():
    assert all(common_name(name) == name for name in NAMES.values())


# VmHWM, since a child's ru_maxrss starts at its parent's.
MEASURE = """
import re, sys, jax, jax.numpy as jnp
from gemma3.files.weights import load_checkpoint
jax.block_until_ready(jnp.ones(3) + 1)
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
_, params = load_checkpoint(sys.argv[1], dtype=sys.argv[2])
jax.block_until_ready(params)
print((peak() - before) / sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_loading_takes_a_quarter_more_memory_than_the_parameters_at_most(tmp_path):
    """Measured on the shapes of gemma-3-270m, mapped pages of the file included."""
    config = CONFIGS["gemma-3-270m"]
    params = jax.tree.map(lambda x: np.zeros(x.shape, ml_dtypes.bfloat16), param_shapes(config))
    save_checkpoint(tmp_path / "model", config, params, max_shard_bytes=10**8)
    run = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), "bfloat16"]
    result = subprocess.run(run, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    ratio = float(result.stdout)
    assert 0.9 < ratio <= 1.25


# One of two processes with four devices each, which together hold the mesh 2,4.
MEASURE_HALF = """
import re, sys, jax, jax.numpy as jnp
from gemma3.mesh import make_mesh
from gemma3.files.weights import load_checkpoint
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
mesh = make_mesh(2, 4)
jax.block_until_ready(jnp.ones(3) + 1)
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
_, params = load_checkpoint(sys.argv[1], dtype="bfloat16", mesh=mesh)
jax.block_until_ready(params)
print((peak() - before) / sum(x.nbytes for x in jax.tree.leaves(params)))
jax.distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_each_of_two_processes_takes_the_memory_of_its_half(tmp_path):
    """The language model of 12b with every width a fifth, 0.3 GB: a host needs less than the checkpoint's size."""
    config = replace(
        CONFIGS["gemma-3-12b-it"],
        model_type="gemma3_text",
        vocab_size=52_448,
        hidden_size=768,
        intermediate_size=3072,
        head_dim=64,
        num_layers=12,
        layer_types=layer_pattern(12, 6),
        image_token_id=None,
        vision=None,
    )
    params = jax.tree.map(lambda x: np.broadcast_to(ml_dtypes.bfloat16(1), x.shape), param_shapes(config))
    save_checkpoint(tmp_path / "model", config, params, max_shard_bytes=10**8)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEASURE_HALF, str(tmp_path / "model"), address, str(rank)],
            cwd=Path(__file__).parents[1],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ratios = [float(process.communicate(timeout=120)[0].split()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(0.45 < ratio < 0.65 for ratio in ratios), ratios
