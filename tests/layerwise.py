"""Walk through a model here and in Hugging Face layer by layer, and name the first place where they differ."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import torch
from oracle import Pair, by_row, hf_logits, one

from gemma3 import transformer, vision
from gemma3.attention import image_blocks
from gemma3.layers import rms_norm
from gemma3.mesh import on_one_device
from gemma3.model import embed, logits_of, place_soft_tokens


@cache
def _one_layer(config):
    return on_one_device(transformer.prefill, config=config)


def layer_outputs(pair: Pair, ids: np.ndarray, pictures=None) -> dict[str, np.ndarray]:
    """The output of each layer in turn, by name: ids int32[B, T] right-padded; pictures as `forward` takes them."""
    _, config, params = pair
    outputs, soft = {}, None
    if pictures:
        w, pixels = params.vision, np.stack([picture for row in pictures for picture in row])
        x = outputs["vision embedding"] = vision.embed_patches(pixels, w, config.vision.patch_size)
        for i in range(config.vision.num_layers):
            x = outputs[f"vision layer {i}"] = vision.vision_block(x, one(w.blocks, i), config.vision.norm_eps)
        x = vision.layer_norm(x, w.post_norm_scale, w.post_norm_bias, config.vision.norm_eps)
        soft = outputs["projector"] = vision.project_patches(x, w, config.vision)

    x = on_one_device(embed)(ids, params.text.embedding)
    if soft is not None:
        x = place_soft_tokens(x, ids, by_row(soft, pictures), config.image_token_id)
    outputs["embedding"] = x
    blocks_of_images = image_blocks(jnp.asarray(ids), config.image_token_id)
    for i, kind in enumerate(config.layer_types):
        layer = jax.tree.map(lambda a, i=i: a[i : i + 1], params.text.blocks)
        prefill = _one_layer(replace(config, num_layers=1, layer_types=(kind,)))
        x = outputs[f"layer {i}"] = prefill(x, layer, None, ids != config.pad_id, blocks_of_images)[0]
    x = outputs["final norm"] = rms_norm(x, params.text.final_norm, config.norm_eps)
    outputs["logits"] = logits_of(x, params.text.embedding, config=config)
    return {name: np.asarray(output) for name, output in outputs.items()}


@torch.no_grad()
def hf_layer_outputs(hf: torch.nn.Module, ids: np.ndarray, pictures=None) -> dict[str, np.ndarray]:
    """`layer_outputs` of the Hugging Face model, taken by hooks."""
    outputs, handles = {}, []
    text = hf.model.language_model if hasattr(hf.model, "language_model") else hf.model

    def keep(name: str, module: torch.nn.Module) -> None:
        hook = lambda _, __, output: outputs.__setitem__(name, output.numpy())  # noqa: E731
        handles.append(module.register_forward_hook(hook))

    first = lambda _, inputs: outputs.__setitem__("embedding", inputs[0].numpy())  # noqa: E731
    handles.append(text.layers[0].register_forward_pre_hook(first))
    if pictures:
        tower = hf.model.vision_tower
        keep("vision embedding", tower.embeddings)
        for i, layer in enumerate(tower.encoder.layers):
            keep(f"vision layer {i}", layer)
        keep("projector", hf.model.multi_modal_projector)
    for i, layer in enumerate(text.layers):
        keep(f"layer {i}", layer)
    keep("final norm", text.norm)
    outputs["logits"] = hf_logits(hf, ids, pictures).numpy()
    for handle in handles:
        handle.remove()
    return outputs


def first_difference(pair: Pair, ids: np.ndarray, pictures=None, rtol: float = 1e-5) -> str | None:
    """The name of the first layer whose output differs from Hugging Face's on real tokens, or None."""
    ours, theirs = layer_outputs(pair, ids, pictures), hf_layer_outputs(pair.hf, ids, pictures)
    assert ours.keys() == theirs.keys()
    for name, have in ours.items():
        want = theirs[name]
        if have.shape[:2] == ids.shape:  # what a padded position holds has no meaning
            have, want = have[ids != pair.config.pad_id], want[ids != pair.config.pad_id]
        if np.abs(have - want).max() > rtol * np.abs(want).max():
            return name
    return None
