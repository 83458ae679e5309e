"""The config of every published size, read from published.toml, and of the embedded nano model."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma3.config import Config, VisionConfig, layer_pattern
from gemma3.files.config_json import read_config
from gemma3.files.hub import NANO_DIRECTORY


def _configs(model_type: str, *, period: int, sizes: dict[str, dict[str, Any]], **shared: Any) -> dict[str, Config]:
    """The configs of one model type; all that have a vision tower (SigLIP) have the same one."""
    vision = VisionConfig() if model_type == "gemma3" else None
    configs = {}
    for name, own in sizes.items():
        layer_types = layer_pattern(own["num_layers"], period)
        configs[name] = Config(model_type, layer_types=layer_types, vision=vision, **shared | own)
    return configs


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_PRETRAINED = {name: config for kind, table in _TABLE.items() for name, config in _configs(kind, **table).items()}

# Small enough to train on a laptop in minutes, with every part of the real model: both kinds of layer, grouped heads,
# a window shorter than a sequence, images. Special ids are those of its own small tokenizer.
NANO = read_config(NANO_DIRECTORY)

_INSTRUCTION_TUNED = {
    name.removesuffix("-pt") + "-it": replace(config, stop_ids=(1, 107 if config.model_type == "gemma2" else 106))
    for name, config in _PRETRAINED.items()
}

# By published name: pretrained, and instruction-tuned ("-it"), which stop at <end_of_turn> too.
CONFIGS = {"nano": NANO} | _PRETRAINED | _INSTRUCTION_TUNED
