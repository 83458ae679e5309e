"""Masks equal drawn grids and Hugging Face's own; attention over several sets of keys is attention over their union.

In a drawing a row is a query, a column a key, and 1 means that the query sees the key.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import assert_close, drawn, normal, one, tensor, text_pair
from tiny_models import IMAGE_ID, tiny_text_config
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask

from gemma3.attention import KeyValues, attend, by_head, number_images, own_mask, prompt_mask, shared_mask
from gemma3.layers import project, rms_norm, rope
from gemma3.transformer import layer_kinds

IMG, UNBOUNDED = IMAGE_ID, np.iinfo(np.int32).max


def mask_of(ids: list[list[int]], window: int) -> np.ndarray:
    ids = jnp.array(ids)
    return np.asarray(prompt_mask(ids != 0, number_images(ids, IMAGE_ID), jnp.int32(window)))


def test_images_are_numbered_by_run_of_image_tokens_in_their_row():
    ids = jnp.array([[2, IMG, IMG, 3, IMG, IMG, 4], [IMG, IMG, 5, 6, 0, 0, 0], [2, 3, 4, 5, 6, 7, 0]])
    np.testing.assert_array_equal(
        number_images(ids, IMAGE_ID), [[0, 1, 1, 0, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
    )
    assert not number_images(ids, None).any(), "a text-only model has no images"


def test_a_local_layer_sees_its_window_and_a_global_one_everything_before():
    local, everything = mask_of([[2, 11, 12, 13, 14]], 3), mask_of([[2, 11, 12, 13, 14]], UNBOUNDED)
    np.testing.assert_array_equal(
        local[0, 0],
        drawn("""
            1 . . . .
            1 1 . . .
            1 1 1 . .
            . 1 1 1 .
            . . 1 1 1
        """),
    )
    np.testing.assert_array_equal(
        everything[0, 0],
        drawn("""
            1 . . . .
            1 1 . . .
            1 1 1 . .
            1 1 1 1 .
            1 1 1 1 1
        """),
    )


def test_two_images_see_themselves_both_ways_and_each_other_only_backwards():
    np.testing.assert_array_equal(
        mask_of([[2, IMG, IMG, 3, IMG, IMG, 4]], UNBOUNDED)[0, 0],
        drawn("""
            1 . . . . . .
            1 1 1 . . . .
            1 1 1 . . . .
            1 1 1 1 . . .
            1 1 1 1 1 1 .
            1 1 1 1 1 1 .
            1 1 1 1 1 1 1
        """),
    )


def test_a_window_smaller_than_an_image_bounds_how_far_it_looks_back_but_not_ahead():
    np.testing.assert_array_equal(
        mask_of([[2, IMG, IMG, IMG, IMG, 3, IMG, IMG]], 3)[0, 0],
        drawn("""
            1 . . . . . . .
            1 1 1 1 1 . . .
            1 1 1 1 1 . . .
            . 1 1 1 1 . . .
            . . 1 1 1 . . .
            . . . 1 1 1 . .
            . . . . 1 1 1 1
            . . . . . 1 1 1
        """),
    )


def test_nobody_sees_padding():
    np.testing.assert_array_equal(
        mask_of([[2, 11, 12, 0, 0]], 3)[0, 0],
        drawn("""
            1 . . . .
            1 1 . . .
            1 1 1 . .
            . 1 1 . .
            . . 1 . .
        """),
    )


def hf_masks(ids: np.ndarray, window: int, *, images: bool) -> dict[str, np.ndarray]:
    """Hugging Face's masks of both kinds of layer, True where its additive mask is zero."""
    config = tiny_text_config(sliding_window=window)
    config._attn_implementation = "eager"
    ids = torch.from_numpy(ids).long()
    arguments = {
        "config": config,
        "inputs_embeds": torch.zeros(*ids.shape, 1),
        "attention_mask": (ids != 0).long(),
        "past_key_values": None,
        "position_ids": None,
    }
    if images:
        blocks = get_block_sequence_ids_for_mask((ids == IMAGE_ID).long())
        masks = create_masks_for_vision_model(block_sequence_ids=blocks, **arguments)
    else:
        masks = {
            "full_attention": create_causal_mask(**arguments),
            "sliding_attention": create_sliding_window_causal_mask(**arguments),
        }
    return {kind: (mask == 0).numpy() for kind, mask in masks.items()}


RAGGED = np.array(
    [
        [2, 11, IMG, IMG, IMG, IMG, 12, 13, IMG, IMG, IMG, IMG, 14],  # two images
        [IMG, IMG, IMG, IMG, 11, 12, 13, 14, 15, 0, 0, 0, 0],  # one at the start, padding at the end
        [2, 11, 12, 13, 14, 15, 16, 17, IMG, IMG, IMG, IMG, 0],
        [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)


@pytest.mark.parametrize("window", [1, 3, 5, 100])
@pytest.mark.parametrize("images", [True, False])
def test_masks_equal_hugging_face(window, images):
    ids = RAGGED if images else np.where(RAGGED == IMAGE_ID, 9, RAGGED)
    theirs = hf_masks(ids, window, images=images)
    np.testing.assert_array_equal(mask_of(ids, window), theirs["sliding_attention"])
    np.testing.assert_array_equal(mask_of(ids, UNBOUNDED), theirs["full_attention"])


def test_a_completion_sees_the_real_keys_of_its_prompt_within_the_window():
    """Prompts of 4 and of 2 tokens, padded to 4; a completion of 3 tokens; window 3."""
    lengths = np.array([4, 2])
    mask = np.asarray(shared_mask(lengths[:, None, None] + np.arange(3), lengths, np.zeros(2, int), 4, jnp.int32(3)))
    np.testing.assert_array_equal(
        mask[0, 0],
        drawn("""
            . . 1 1
            . . . 1
            . . . .
        """),
    )
    np.testing.assert_array_equal(
        mask[1, 0],
        drawn("""
            1 1 . .
            . 1 . .
            . . . .
        """),
    )


def test_a_completion_sees_the_same_keys_when_only_the_last_of_its_prompt_are_kept():
    """Prompts of 6 and of 2 tokens keep 3 keys each, from positions 3 and 0 on: the mask is a part of the whole one."""
    lengths, starts = np.array([6, 2]), np.array([3, 0])
    positions = lengths[:, None, None] + np.arange(4)
    whole = np.asarray(shared_mask(positions, lengths, 0 * starts, 6, jnp.int32(4)))
    kept = np.asarray(shared_mask(positions, lengths, starts, 3, jnp.int32(4)))
    np.testing.assert_array_equal(kept[0], whole[0, :, :, 3:])
    np.testing.assert_array_equal(kept[1], whole[1, :, :, :3])
    assert not whole[0, :, :, :3].any() and kept[0].any(), "the keys left out lie outside the window"


def test_a_completion_sees_its_own_keys_causally_wherever_they_are_kept():
    """The keys are out of order, as in a ring buffer, and one slot is empty; the queries are tokens 1 and 2."""
    keys = jnp.array([2, 0, 1, -1])
    np.testing.assert_array_equal(
        own_mask(jnp.array([1, 2]), keys, jnp.int32(2))[0, 0],
        drawn("""
            . 1 1 .
            1 . 1 .
        """),
    )
    np.testing.assert_array_equal(
        own_mask(jnp.array([1, 2]), keys, jnp.int32(UNBOUNDED))[0, 0],
        drawn("""
            . 1 1 .
            1 1 1 .
        """),
    )


@pytest.mark.parametrize("window", [1, 3, 5, 100])
def test_prompt_and_own_mask_side_by_side_are_the_mask_of_the_whole_sequence(window):
    """Both equal rows of Hugging Face's mask for prompt and completion end to end, for each prompt length."""
    lengths, t = (RAGGED != 0).sum(axis=1), np.arange(7)
    positions = lengths[:, None, None] + t
    on_prompt = np.asarray(shared_mask(positions, lengths, 0 * lengths, RAGGED.shape[1], jnp.int32(window)))[:, 0]
    on_own = np.asarray(own_mask(t, t, jnp.int32(window)))[0, 0]
    for row, length, shared in zip(RAGGED, lengths, on_prompt, strict=True):
        ids = np.concatenate([row[:length], np.full(len(t), 9)])[None]
        whole = hf_masks(ids, window, images=True)["sliding_attention"][0, 0, length:]
        np.testing.assert_array_equal(np.concatenate([shared[:, :length], on_own], axis=1), whole)
        assert not shared[:, length:].any()


Q, G, T, S1, S2, HEADS, KV_HEADS, HEAD_DIM = 2, 3, 5, 7, 4, 6, 2, 8
SCALE = 0.3


def attention_inputs():
    q = 3 * normal(0, Q, G, T, HEADS, HEAD_DIM)
    shared = KeyValues(normal(1, Q, KV_HEADS, S1, HEAD_DIM), normal(2, Q, KV_HEADS, S1, HEAD_DIM))
    own = KeyValues(normal(3, Q, KV_HEADS, G, S2, HEAD_DIM), normal(4, Q, KV_HEADS, G, S2, HEAD_DIM))
    masks = np.random.default_rng(5).random((Q, 1, T, S1)) < 0.6, np.random.default_rng(6).random((1, 1, T, S2)) < 0.6
    masks[1][..., 0] = True  # every query sees something
    return q, shared, own, *masks


def concatenated():
    """The same keys, values and masks, the shared ones repeated for each completion: [Q * G, heads, S1 + S2, ...]."""
    _, shared, own, shared_seen, own_seen = attention_inputs()

    def join(s, o):
        s = np.broadcast_to(s[:, None], (Q, G, *s.shape[1:]))
        return tensor(np.concatenate([s, o.swapaxes(1, 2)], axis=3)).flatten(0, 1)

    seen = np.concatenate([np.broadcast_to(m, (Q, G, T, m.shape[-1])) for m in (shared_seen, own_seen)], axis=-1)
    return join(shared.k, own.k), join(shared.v, own.v), tensor(seen).flatten(0, 1)[:, None]


def test_attention_over_two_sets_of_keys_is_attention_over_their_concatenation():
    """The reference is torch's attention, where query head n reads key/value head n // 3."""
    q, shared, own, shared_seen, own_seen = attention_inputs()
    k, v, seen = concatenated()
    theirs = torch.nn.functional.scaled_dot_product_attention(
        tensor(q).flatten(0, 1).transpose(1, 2), k, v, seen, scale=SCALE, enable_gqa=True
    )
    ours = attend(q, [(shared, shared_seen), (own, own_seen)], scale=SCALE, softcap=None)
    assert_close(ours, theirs.transpose(1, 2).unflatten(0, (Q, G)))


def test_the_soft_cap_bends_scores_before_the_mask():
    """cap * tanh(s / cap) with a cap well inside the range of the scores (Gemma 2)."""
    q, shared, own, shared_seen, own_seen = attention_inputs()
    k, v, seen = concatenated()
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = SCALE * tensor(q).flatten(0, 1).transpose(1, 2) @ k.transpose(2, 3)
    assert scores.abs().max() > 3.0
    scores = (2.0 * torch.tanh(scores / 2.0)).masked_fill(~seen, -torch.inf)
    theirs = (scores.softmax(-1) @ v).transpose(1, 2).unflatten(0, (Q, G))
    assert_close(attend(q, [(shared, shared_seen), (own, own_seen)], scale=SCALE, softcap=2.0), theirs)


def test_a_query_that_sees_nothing_is_finite():
    q, shared, *_ = attention_inputs()
    assert np.isfinite(attend(q, [(shared, np.zeros((1, 1, T, S1), bool))], scale=SCALE, softcap=None)).all()


def test_large_scores_do_not_overflow():
    """The set with the larger score gets all the weight; exp of either score alone would be infinite."""
    q = np.ones((1, 1, 1, 1, 2), np.float32)
    sets = [
        (
            KeyValues(np.full((1, 1, 1, 2), k, np.float32), np.full((1, 1, 1, 2), v, np.float32)),
            np.ones((1, 1, 1, 1), bool),
        )
        for k, v in ((1000.0, 3.0), (900.0, 5.0))
    ]
    assert_close(attend(q, sets, scale=1.0, softcap=None), np.full((1, 1, 1, 1, 2), 3.0), atol=0.0)


@pytest.mark.parametrize("layer", [0, 5])
def test_an_attention_layer_equals_hugging_face(layer):
    """Projections, q/k norm, rope, scores scaled by 12 ** -0.5 and not by the head dim, local (0) and global (5), in a
    sequence longer than the window, at positions that do not start at zero."""
    hf, config, params = text_pair()
    w, kind = one(params.text.blocks, layer), one(layer_kinds(config), layer)
    x, positions = normal(layer, 2, 13, 48), np.arange(3, 16)[None, None]
    mask = mask_of(np.full((2, 13), 9), kind.window)

    module = hf.model.layers[layer].self_attn
    rotation = hf.model.rotary_emb(tensor(x), tensor(positions[0]), config.layer_types[layer])
    hf_mask = torch.zeros(2, 1, 13, 13).masked_fill(~tensor(mask), torch.finfo(torch.float32).min)
    theirs = module(tensor(x), position_embeddings=rotation, attention_mask=hf_mask)[0]

    x = x[:, None]
    q = rms_norm(w.q_norm, project(w.q, x), config.norm_eps)
    k = rms_norm(w.k_norm, project(w.k, x), config.norm_eps)
    v = project(w.v, x)
    q, k = (rope(heads, positions, kind.inverse_frequencies) for heads in (q, k))
    mixed = attend(
        q, [(KeyValues(by_head(k)[:, :, 0], by_head(v)[:, :, 0]), mask)], scale=config.query_scale, softcap=None
    )
    assert_close(project(w.o, mixed, axes=2)[:, 0], theirs)


@pytest.mark.parametrize("name", ["q", "k"])
def test_query_and_key_norms_equal_hugging_face(name):
    """One weight over the head dim, the same for every head, applied before rope."""
    hf, config, params = text_pair()
    module, w, x = hf.model.layers[3].self_attn, one(params.text.blocks, 3), normal(3, 2, 13, 48)
    heads = project(getattr(w, name), x)
    theirs = getattr(module, f"{name}_norm")(getattr(module, f"{name}_proj")(tensor(x)).unflatten(-1, (-1, 16)))
    assert_close(rms_norm(getattr(w, f"{name}_norm"), heads, config.norm_eps), theirs)
