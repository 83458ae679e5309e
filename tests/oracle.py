"""What the parity tests share: tiny Hugging Face models beside the same weights here, and ways to run and compare both.

Comparisons are float32; the tolerances are a few times the noise measured between Hugging Face's own eager and sdpa
attention on models of this size.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
import torch
from tiny_models import IMAGE_ID, tiny_gemma2_config, tiny_model, tiny_multimodal_config, tiny_text_config

from gemma3.config import Config
from gemma3.files.weights import load_checkpoint
from gemma3.lora import Lora, LoraBlock, LoraConfig, LoraVisionBlock, init_lora
from gemma3.mesh import Model, make_mesh
from gemma3.params import Params

torch.set_num_threads(1)


class Pair(NamedTuple):
    """One model twice: Hugging Face's, and its config and parameters here."""

    hf: torch.nn.Module
    config: Config
    params: Params


def load(hf: torch.nn.Module) -> tuple[Config, Params]:
    """The config and parameters of a Hugging Face model, by way of a checkpoint on disk."""
    with tempfile.TemporaryDirectory() as directory:
        hf.save_pretrained(directory)
        return load_checkpoint(directory)


def pair(hf_config, seed: int = 0) -> Pair:
    hf = tiny_model(hf_config, seed)
    return Pair(hf, *load(hf))


@cache
def text_pair() -> Pair:
    return pair(tiny_text_config())


@cache
def multimodal_pair() -> Pair:
    return pair(tiny_multimodal_config())


@cache
def narrow_pair() -> Pair:
    """A window of 3 keys, smaller than an image's block of 4 soft tokens."""
    return pair(tiny_multimodal_config(sliding_window=3))


@cache
def gemma2_pair() -> Pair:
    return pair(tiny_gemma2_config())


PAIRS = {"text": text_pair, "images": multimodal_pair, "narrow": narrow_pair, "gemma2": gemma2_pair}


def gradients(hf: torch.nn.Module, loss: torch.Tensor) -> Params:
    """torch autograd's gradient of `loss`, named and shaped as the parameters here.

    The gradients are written over the parameters of a copy, which is then loaded like any checkpoint.
    """
    parameters = [p for p in hf.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    saved = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, gradient in zip(parameters, found, strict=True):
            p.copy_(torch.zeros_like(p) if gradient is None else gradient)
        params = load(hf)[1]
        for p, value in zip(parameters, saved, strict=True):
            p.copy_(value)
    return params


def random_lora(config: Config, r: int = 3, alpha: float = 6.0, vision: bool = False) -> Lora:
    """An adapter of every projection whose B is not zero, so that it does something and A has a gradient."""
    lora = init_lora(jax.random.key(3), config, LoraConfig(r, alpha, vision=vision))
    keys = iter(jax.random.split(jax.random.key(4), 13))
    fill = lambda pair: replace(pair, b=0.05 * jax.random.normal(next(keys), pair.b.shape))  # noqa: E731
    tower = LoraVisionBlock(*map(fill, lora.vision)) if vision else None
    return Lora(LoraBlock(*map(fill, lora.blocks)), tower)


def drawn(drawing: str) -> np.ndarray:
    """A mask from its drawing: one line a query, one column a key, 1 where the query sees the key."""
    return np.array([[cell == "1" for cell in row.split()] for row in drawing.strip().splitlines()])


def one(stacked, layer: int):
    """One layer of a stack."""
    return jax.tree.map(lambda x: x[layer], stacked)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def tensor(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


def pixels(images: int, size: int = 56, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (images, size, size, 3), dtype=np.uint8)


def pixel_values(images: np.ndarray) -> torch.Tensor:
    """uint8[I, h, w, 3] as Hugging Face's processor hands it to the model: float32[I, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def image_prompts() -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Four right-padded prompts, longer than the window of 8: two images, none, one, and one that comes first."""
    image = [377, *[IMAGE_ID] * 4, 378]
    rows = [
        [2, 11, *image, 12, 13, *image, 14, 15, 16, 17],
        [2, *range(21, 32)],
        [2, 31, 32, 33, 34, 35, 36, 37, 38, *image, 39, 40],
        [*[IMAGE_ID] * 4, 41, 42, 43],
    ]
    ids = np.zeros((4, 21), np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    a, b, c, d = pixels(4)
    return ids, [[a, b], [], [c], [d]]


def by_row(flat: np.ndarray, images) -> np.ndarray:
    """Values of each image, [I, ...], in the shape that the model takes: [Q, A, ...], padded with zeros."""
    rows = np.zeros((len(images), max(map(len, images)), *flat.shape[1:]), flat.dtype)
    values = iter(np.asarray(flat))
    for row, own in zip(rows, images, strict=True):
        for place in range(len(own)):
            row[place] = next(values)
    return rows


def hf_logits(hf: torch.nn.Module, ids: np.ndarray, images=None) -> torch.Tensor:
    """Hugging Face's float32 logits of right-padded ids, [B, T, V]; `images` as `forward` takes them."""
    ids = torch.from_numpy(np.asarray(ids, np.int64))
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    flat = [image for row in images or [] for image in row]
    if flat:
        inputs |= {"pixel_values": pixel_values(np.stack(flat)), "token_type_ids": (ids == IMAGE_ID).long()}
    return hf(**inputs, use_cache=False).logits


def sharded(function: Callable, params, config: Config, mesh: tuple[int, int], in_specs, out_specs) -> Callable:
    """Jit `function(params, *args)` as training runs it: over a mesh, with split parameters; jax checks which values
    are the same on which devices. `out_specs` may name "params", for results that are split like the parameters."""
    mesh = make_mesh(*mesh)
    specs = Model(config, mesh).specs(params)
    out_specs = jax.tree.map(lambda spec: specs if spec == "params" else spec, out_specs)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(specs, *in_specs), out_specs=out_specs, check_vma=True))


def assert_close(ours, theirs, atol: float = 1e-5) -> None:
    """Equal within `atol`; torch tensors and jax arrays of the same shape."""
    theirs = theirs.detach().float().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs, np.float32)
    ours = np.asarray(ours, np.float32)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def plain(tree):
    """Nested lists and dicts with arrays as lists, which compare with ==."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), tree)


def assert_same_samples(found: list[dict], expected: list[dict]) -> None:
    """The lines of samples.jsonl are equal, up to rounding in the tokens' logps and ratios."""
    for one, other in zip(found, expected, strict=True):
        for completion, same in zip(one["completions"], other["completions"], strict=True):
            for name in ("logps", "ratios"):
                assert (name in completion) == (name in same)
                np.testing.assert_allclose(completion.pop(name, []), same.pop(name, []), rtol=1e-4, atol=1e-4)
    assert plain(found) == plain(expected)


def assert_trees_close(ours, theirs, rtol: float = 5e-5) -> None:
    """Every tensor's largest difference is at most `rtol` of its largest value, and the tensor is not all zero.

    A key bias in the vision tower shifts all scores of a query alike, so its true gradient is zero and what is computed
    is rounding: it is measured against the gradient of the query bias.
    """
    expected, tree = jax.tree_util.tree_flatten_with_path(theirs)
    found, found_tree = jax.tree.flatten(ours)
    assert tree == found_tree
    expected = {jax.tree_util.keystr(path): np.asarray(want, np.float64) for path, want in expected}
    for (name, want), have in zip(expected.items(), found, strict=True):
        largest = np.abs(expected[name.replace(".key_bias", ".query_bias")]).max()
        assert want.shape == have.shape and largest > 0, name
        worst = np.abs(want - np.asarray(have, np.float64)).max() / largest
        assert worst <= rtol, f"{name}: relative difference {worst:.1e}"
