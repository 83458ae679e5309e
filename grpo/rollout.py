"""One step's samples: prompts put on the mesh, their pictures encoded once, G completions of each drawn."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemma3.config import Config
from gemma3.lora import Lora
from gemma3.mesh import DATA
from gemma3.model import Params, pack_images
from gemma3.sample import OnToken, Prompts, Sampling, choose_gather, decoding_bytes, device_memory, encode, sample


class Prompt(NamedTuple):
    """One prompt as the host holds it."""

    ids: list[int]
    pictures: list[np.ndarray]  # uint8[h, w, 3], at the model's size


class Row(NamedTuple):
    """An example ready for use, and its place in the stream it comes from, which keys its randomness."""

    place: int
    example: Any
    prompt: Prompt | None  # None where another process reads it


class Rollout(NamedTuple):
    """One step's prompts and completions, before rewards. Every array is split over `data` along its first axis."""

    prompts: Prompts
    completion_ids: jax.Array  # int32[Q, G, C]
    completion_mask: jax.Array  # bool[Q, G, C]
    sampler_logps: jax.Array  # float32[Q, G, C]
    finished: jax.Array  # bool[Q, G]

    @property
    def lengths(self) -> jax.Array:
        """Tokens of each completion, the stop token included: int32[Q, G]."""
        return self.completion_mask.sum(axis=-1)


def split_over_data(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """An array on the mesh, split along its first axis; of several processes each looks at the rows it holds only."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P(DATA)), lambda rows: array[rows])


def place_prompts(
    prompts: Sequence[Prompt | None],
    index: Sequence[int],
    params: Params,
    lora: Lora | None,
    *,
    config: Config,
    mesh: Mesh,
    max_prompt_length: int,
    max_images: int,
    keep_pixels: bool = False,
) -> Prompts:
    """Pad prompts to [Q, P], put them on the mesh and encode their pictures; `index` keys each one's randomness.

    A prompt that another process holds is None here. Q is filled up to a multiple of the data axis with empty rows,
    which are not sampled. Every batch has room for `max_images` pictures a prompt, so that one compilation serves them
    all. `keep_pixels` keeps the pictures themselves, for training the vision tower or an adapter of it.
    """
    rows = -(-len(prompts) // mesh.shape[DATA]) * mesh.shape[DATA]
    ids = np.full((rows, max_prompt_length), config.pad_id, np.int32)
    for row, prompt in zip(ids, prompts, strict=False):
        if prompt is None:
            continue
        if len(prompt.ids) > max_prompt_length:
            raise ValueError(
                f"a prompt has {len(prompt.ids)} tokens, more than --max-prompt-length {max_prompt_length}"
            )
        row[: len(prompt.ids)] = prompt.ids
    keys = np.zeros(rows, np.int32)
    keys[: len(prompts)] = index
    soft = pixels = None
    if max_images:
        pictures = [[] if prompt is None else prompt.pictures for prompt in prompts] + [[]] * (rows - len(prompts))
        pixels = split_over_data(pack_images(pictures, ids, config, max_images), mesh)
        soft = encode(params, pixels, lora, config=config, mesh=mesh)
    return Prompts(split_over_data(ids, mesh), soft, split_over_data(keys, mesh), pixels if keep_pixels else None)


def roll_out(
    params: Params,
    lora: Lora | None,
    prompts: Prompts,
    key: jax.Array,
    allowed: jax.Array,
    *,
    config: Config,
    mesh: Mesh,
    num_generations: int,
    max_completion_length: int,
    sampling: Sampling,
    on_token: OnToken | None = None,
) -> Rollout:
    """Draw G completions of each prompt; arguments as in `sample`, which holds the weights as they fit."""
    rows, prompt_length = prompts.ids.shape
    needed = decoding_bytes(
        params,
        config=config,
        mesh=mesh,
        prompts=rows,
        group=num_generations,
        prompt_length=prompt_length,
        length=max_completion_length,
    )
    gather_once, _ = choose_gather(needed, device_memory())
    samples = sample(
        params,
        lora,
        prompts,
        key,
        allowed,
        config=config,
        mesh=mesh,
        num_generations=num_generations,
        max_completion_length=max_completion_length,
        sampling=sampling,
        gather_once=gather_once,
        on_token=on_token,
    )
    return Rollout(prompts, samples.completion_ids, samples.completion_mask, samples.logps, samples.finished)


def take_rows(rollouts: Sequence[Rollout], rows: Sequence[int]) -> Rollout:
    """A rollout of the given rows of several rollouts, counted through them in order and placed as these are."""
    index = np.asarray(rows)

    def take(*parts: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(jnp.concatenate(parts)[index], parts[0].sharding)

    return jax.tree.map(take, *rollouts)
