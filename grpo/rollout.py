"""Put prompts on the mesh, encode their images once, and sample G completions of each prompt."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from gemma3.filters import Sampling
from gemma3.lora import Policy
from gemma3.mesh import DATA, Model
from gemma3.model import encode_images, pack_images
from gemma3.sample import Completions, OnToken, PromptBatch, sample
from grpo.reader import Reader, Row
from grpo.run.memory import choose_gather, decoding_bytes, device_memory


def split_over_data(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """Put an array on the mesh, split along its first axis over `data`. A process reads only the rows that it holds."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, Spec(DATA)), lambda rows: array[rows])


@partial(jax.jit, static_argnames="model")
def encode_on_mesh(policy: Policy, pixels: jax.Array, *, model: Model) -> jax.Array:
    """The soft tokens [Q, A, M, D] of each prompt's images, uint8[Q, A, h, w, 3]."""
    body, in_specs = partial(encode_images, config=model.config), (model.specs(policy), Spec(DATA))
    return jax.shard_map(body, mesh=model.mesh, in_specs=in_specs, out_specs=Spec(DATA))(policy, pixels)


def put_prompts(policy: Policy, rows: Sequence[Row], reader: Reader, *, keep_pixels: bool = False) -> PromptBatch:
    """Pad prompts to [Q, P], put them on the mesh and encode their images.

    The prompt of a row that another process holds is None. Q is filled up to a multiple of the data axis with empty
    prompts, which are not sampled. Every batch has room for the reader's P tokens and A images per prompt, so one
    compilation serves them all. `keep_pixels` keeps the images themselves, to train the vision tower or an adapter of
    it.
    """
    mesh, config = reader.model.mesh, reader.model.config
    size = -(-len(rows) // mesh.shape[DATA]) * mesh.shape[DATA]
    ids = np.full((size, reader.max_prompt_length), config.pad_id, np.int32)
    images: list[list[np.ndarray]] = [[] for _ in ids]
    for q, row in enumerate(rows):
        if row.prompt is not None:
            reader.check_length(len(row.prompt.ids))
            ids[q, : len(row.prompt.ids)] = row.prompt.ids
            images[q] = row.prompt.images
    index = np.zeros(size, np.int32)
    index[: len(rows)] = [row.index for row in rows]
    soft = pixels = None
    if reader.max_images:
        pixels = split_over_data(pack_images(images, ids, config, reader.max_images), mesh)
        soft = encode_on_mesh(policy, pixels, model=reader.model)
    return PromptBatch(split_over_data(ids, mesh), soft, split_over_data(index, mesh), pixels if keep_pixels else None)


def roll_out(
    policy: Policy,
    prompts: PromptBatch,
    key: jax.Array,
    reader: Reader,
    *,
    sampling: Sampling,
    on_token: OnToken | None = None,
) -> Completions:
    """Sample G completions of each prompt. Arguments as in `sample`; the device's memory decides `gather_once`."""
    needed = decoding_bytes(policy.params, reader.model, *prompts.ids.shape, sampling)
    gather_once, _ = choose_gather(needed, device_memory())
    allowed = jnp.asarray(~reader.tokenizer.never_sampled)
    how = {"model": reader.model, "sampling": sampling, "gather_once": gather_once, "on_token": on_token}
    return sample(policy, prompts, key, allowed, **how)


def take_rows(batches: Sequence, rows: Sequence[int]):
    """One pytree with the chosen rows of several pytrees of the same structure; `rows` counts through all in order."""
    chosen = np.asarray(rows)

    def take(*parts: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(jnp.concatenate(parts)[chosen], parts[0].sharding)

    return jax.tree.map(take, *batches)
