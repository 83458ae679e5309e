"""Walk through a model here and in Hugging Face layer by layer, and name the first place where they differ."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import torch
from oracle import Pair, by_row, hf_logits, one

from gemma3 import transformer, vision
from gemma3.attention import number_images
from gemma3.layers import rms_norm
from gemma3.lora import LoraVisionBlock, Policy
from gemma3.mesh import on_one_device
from gemma3.model import embed, insert_soft_tokens, logits_of


@cache
def _one_layer(config):
    return on_one_device(transformer.prefill, config=config)


def layer_outputs(pair: Pair, ids: np.ndarray, images=None) -> dict[str, np.ndarray]:
    """The output of each layer in turn, by name: ids int32[B, T] right-padded; images as `forward` takes them."""
    _, config, params = pair
    outputs, soft = {}, None
    if images:
        w, pixels = params.vision, np.stack([image for row in images for image in row])
        x = outputs["vision embedding"] = vision.embed_patches(w, pixels, config.vision.patch_size)
        for i in range(config.vision.num_layers):
            block, eps = one(w.blocks, i), config.vision.norm_eps
            x = outputs[f"vision layer {i}"] = vision.vision_block(block, x, LoraVisionBlock(), eps)
        x = vision.layer_norm(w.post_norm_scale, w.post_norm_bias, x, config.vision.norm_eps)
        soft = outputs["projector"] = vision.project_patches(w, x, config.vision)

    x = on_one_device(embed)(params.text.embedding, ids)
    if soft is not None:
        x = insert_soft_tokens(x, ids, by_row(soft, images), config.image_token_id)
    outputs["embedding"] = x
    image_numbers = number_images(jnp.asarray(ids), config.image_token_id)
    for i, kind in enumerate(config.layer_types):
        layer = jax.tree.map(lambda a, i=i: a[i : i + 1], params.text.blocks)
        policy = Policy(params._replace(text=params.text._replace(blocks=layer)))
        prefill = _one_layer(replace(config, num_layers=1, layer_types=(kind,)))
        x = outputs[f"layer {i}"] = prefill(policy, x, ids != config.pad_id, image_numbers)[0]
    x = outputs["final norm"] = rms_norm(params.text.final_norm, x, config.norm_eps)
    outputs["logits"] = logits_of(params.text.embedding, x, config=config)
    return {name: np.asarray(output) for name, output in outputs.items()}


@torch.no_grad()
def hf_layer_outputs(hf: torch.nn.Module, ids: np.ndarray, images=None) -> dict[str, np.ndarray]:
    """`layer_outputs` of the Hugging Face model, taken by hooks."""
    outputs, handles = {}, []
    text = hf.model.language_model if hasattr(hf.model, "language_model") else hf.model

    def keep(name: str, module: torch.nn.Module) -> None:
        hook = lambda _, __, output: outputs.__setitem__(name, output.numpy())  # noqa: E731
        handles.append(module.register_forward_hook(hook))

    first = lambda _, inputs: outputs.__setitem__("embedding", inputs[0].numpy())  # noqa: E731
    handles.append(text.layers[0].register_forward_pre_hook(first))
    if images:
        tower = hf.model.vision_tower
        keep("vision embedding", tower.embeddings)
        for i, layer in enumerate(tower.encoder.layers):
            keep(f"vision layer {i}", layer)
        keep("projector", hf.model.multi_modal_projector)
    for i, layer in enumerate(text.layers):
        keep(f"layer {i}", layer)
    keep("final norm", text.norm)
    outputs["logits"] = hf_logits(hf, ids, images).numpy()
    for handle in handles:
        handle.remove()
    return outputs


def first_difference(pair: Pair, ids: np.ndarray, images=None, rtol: float = 1e-5) -> str | None:
    """The name of the first layer whose output differs from Hugging Face's on real tokens, or None."""
    ours, theirs = layer_outputs(pair, ids, images), hf_layer_outputs(pair.hf, ids, images)
    assert ours.keys() == theirs.keys()
    for name, have in ours.items():
        want = theirs[name]
        if have.shape[:2] == ids.shape:  # what a padded position holds has no meaning
            have, want = have[ids != pair.config.pad_id], want[ids != pair.config.pad_id]
        if np.abs(have - want).max() > rtol * np.abs(want).max():
            return name
    return None
