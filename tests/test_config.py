"""Published sizes have the published numbers of parameters, and an impossible config is refused."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from gemma3.config import VisionConfig, layer_pattern
from gemma3.files.published import CONFIGS, NANO
from gemma3.params import param_shapes


def count(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


# Counted by transformers on its meta device: total, language model, embedding, vision tower, projector.
COUNTS = {
    "gemma-3-270m": (268_098_176, 268_098_176, 167_772_160, 0, 0),
    "gemma-3-1b-pt": (999_885_952, 999_885_952, 301_989_888, 0, 0),
    "gemma-3-4b-pt": (4_300_079_472, 3_880_263_168, 671_252_480, 416_866_032, 2_950_272),
    "gemma-3-12b-pt": (12_187_325_040, 11_766_034_176, 1_006_878_720, 416_866_032, 4_424_832),
    "gemma-3-27b-pt": (27_432_406_640, 27_009_346_304, 1_409_630_208, 416_866_032, 6_194_304),
    "gemma-2-2b": (2_614_341_888, 2_614_341_888, 589_824_000, 0, 0),
    "gemma-2-9b": (9_241_705_984, 9_241_705_984, 917_504_000, 0, 0),
    "gemma-2-27b": (27_227_128_320, 27_227_128_320, 1_179_648_000, 0, 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_published_sizes(name):
    params = param_shapes(CONFIGS[name])
    vision = params.vision
    projector = count((vision.soft_norm, vision.projector)) if vision else 0
    counted = (count(params), count(params.text), count(params.text.embedding), count(vision) - projector, projector)
    assert counted == COUNTS[name]


def test_every_published_size_has_a_tuned_twin_that_also_stops_at_end_of_turn():
    for name in COUNTS:
        tuned = CONFIGS[name.removesuffix("-pt") + "-it"]
        assert tuned.stop_ids == (1, 107 if "gemma-2" in name else 106)
        assert replace(tuned, stop_ids=(1,)) == CONFIGS[name]


def test_layer_patterns():
    assert [i for i, local in enumerate(CONFIGS["gemma-3-4b-pt"].is_local) if not local] == [5, 11, 17, 23, 29]
    assert CONFIGS["gemma-2-2b"].is_local[:4] == (True, False, True, False)
    assert layer_pattern(3, 6) == ("sliding_attention",) * 3


def test_27b_scales_scores_by_width_per_head():
    assert CONFIGS["gemma-3-27b-it"].query_scale == pytest.approx(0.07715167)
    assert CONFIGS["gemma-3-4b-it"].query_scale == 1 / 16


def test_nano_has_every_part_of_the_real_model():
    assert set(NANO.is_local) == {True, False} and NANO.vision and NANO.num_heads > NANO.num_kv_heads
    assert count(param_shapes(NANO)) < 1_000_000


def test_a_config_is_hashable():
    assert hash(NANO) == hash(replace(NANO))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 2}, "3 query heads do not share 2 key/value heads evenly"),
        ({"num_layers": 5}, "layer_types names 6 layers of num_hidden_layers 5"),
    ],
)
def test_a_config_that_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(NANO, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 33}, "image_size 33 by patch_size 8"),
        ({"num_heads": 3}, "hidden_size 64 by 3 heads"),
        ({"tokens_per_image": 5}, "mm_tokens_per_image 5 must be a square"),
        ({"tokens_per_image": 9}, "whose side divides the 4 patches a side"),
    ],
)
def test_a_vision_config_that_does_not_divide_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(NANO.vision, **change)


def test_vision_defaults_are_those_of_every_published_gemma3():
    assert CONFIGS["gemma-3-27b-pt"].vision == VisionConfig()
    assert VisionConfig().patches_per_side == 64 and VisionConfig().tokens_per_side == 16
