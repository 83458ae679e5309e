"""Hugging Face's `config.json` to a `Config` and back; rests on `config`.

A config that this code could only approximate (another architecture, another rope type, an attention bias) is refused:
a model that is almost right trains without complaint and is wrong.
"""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

from gemma3.config import Config, VisionConfig, layer_pattern

_TABLE = tomllib.loads(Path(__file__).with_name("names.toml").read_text(encoding="utf-8"))["config"]
_TEXT_KEYS, _SOFTCAP_KEYS, _VISION_KEYS = (_TABLE[part] for part in ("text", "softcap", "vision"))

# What the transformers class assumes for a key that config.json leaves out; the published 4b leaves out most.
_DEFAULTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_ONLY_VALUE = {  # keys that change the model; this code supports one value of each, which is also the default
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_act": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
    "quantization_config": None,
}
_ONLY_VALUE_GEMMA3 = _ONLY_VALUE | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
# The pooling head defaults to True in transformers, but Gemma 3 never looks at what it computes.
_ONLY_VALUE_VISION = _ONLY_VALUE | {"vision_use_head": False, "num_channels": 3, "model_type": "siglip_vision_model"}


def _require(only_value: dict, fields: dict) -> None:
    for key, supported in only_value.items():
        if fields.get(key) not in (None, supported):
            given, needed = json.dumps(fields[key]), json.dumps(supported)
            raise ValueError(f"config.json sets {key} to {given}; only {needed} is supported")


def _rope(text: dict, model_type: str) -> dict[str, float]:
    """Read rope in the spelling of 2025 (`rope_theta`, `rope_scaling`) or of transformers 5 (`rope_parameters`)."""
    parameters, scaling = text.get("rope_parameters") or {}, text.get("rope_scaling") or {}
    if model_type == "gemma2":
        local_rope = global_rope = {"rope_theta": text["rope_theta"]} | parameters | scaling
    else:
        global_rope = {"rope_theta": text["rope_theta"]} | (parameters.get("full_attention") or {}) | scaling
        local_rope = {"rope_theta": text["rope_local_base_freq"]} | (parameters.get("sliding_attention") or {})
    for rope, supported in ((local_rope, ("default",)), (global_rope, ("default", "linear"))):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in supported or (kind == "linear" and "factor" not in rope):
            raise ValueError(
                f"config.json asks for rope {rope}; supported are the types 'default', and 'linear' with a factor in "
                "Gemma 3's full_attention layers"
            )
    return {
        "global_rope_base": float(global_rope["rope_theta"]),
        "global_rope_factor": float(global_rope["factor"]) if kind == "linear" else 1.0,
        "local_rope_base": float(local_rope["rope_theta"]),
    }


def _layer_types(text: dict, model_type: str) -> tuple[str, ...]:
    period = 2 if model_type == "gemma2" else text["sliding_window_pattern"]
    kinds = tuple(text.get("layer_types") or layer_pattern(text["num_hidden_layers"], period))
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"config.json names layer types {sorted(unknown)}; supported are sliding and full attention")
    return kinds


def _vision(top: dict) -> VisionConfig:
    given = top.get("vision_config") or {}
    _require(_ONLY_VALUE_VISION, given)
    fields = _DEFAULTS["siglip_vision_model"] | given
    sizes = {field: fields[key] for field, key in _VISION_KEYS.items()}
    return VisionConfig(**sizes, tokens_per_image=top.get("mm_tokens_per_image", 256))


def _token_ids(top: dict, text: dict) -> dict:
    def first(key: str, default):
        return next(fields[key] for fields in (top, text, {key: default}) if fields.get(key) is not None)

    ids = {
        "pad_id": first("pad_token_id", 0),
        "bos_id": first("bos_token_id", 2),
        "stop_ids": _as_ids(first("eos_token_id", 1)),
    }
    if top["model_type"] == "gemma3":
        ids |= {
            "image_token_id": top.get("image_token_index", top.get("image_token_id", 262144)),
            "start_of_image_id": top.get("boi_token_index", top.get("boi_token_id", 255999)),
            "end_of_image_id": top.get("eoi_token_index", top.get("eoi_token_id", 256000)),
        }
    return ids


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def config_from_dict(top: dict) -> Config:
    """Read the content of a Hugging Face `config.json`; ValueError if this code cannot honour it exactly."""
    model_type = top.get("model_type")
    if model_type not in ("gemma3", "gemma3_text", "gemma2"):
        raise ValueError(
            f"config.json has model_type {model_type!r}; supported are Gemma 3 ('gemma3', 'gemma3_text') and 'gemma2'"
        )
    given = top.get("text_config") or {} if model_type == "gemma3" else top
    for fields in (top, given):
        _require(_ONLY_VALUE if model_type == "gemma2" else _ONLY_VALUE_GEMMA3, fields)
    # A null switches a soft cap off; for any other key it means the default.
    defaults = _DEFAULTS[model_type.removesuffix("_text")]
    text = defaults | {key: value for key, value in given.items() if value is not None or key in _SOFTCAP_KEYS.values()}
    return Config(
        model_type=model_type,
        layer_types=_layer_types(text, model_type),
        qk_norm=model_type != "gemma2",
        vision=_vision(top) if model_type == "gemma3" else None,
        **{field: text.get(key) for field, key in (_TEXT_KEYS | _SOFTCAP_KEYS).items()},
        **_rope(text, model_type),
        **_token_ids(top, given),
    )


def config_to_dict(config: Config) -> dict:
    """The `config.json` that transformers reads, in the spelling of the published checkpoints."""
    text = {key: getattr(config, field) for field, key in (_TEXT_KEYS | _SOFTCAP_KEYS).items()} | {
        "model_type": "gemma2" if config.model_type == "gemma2" else "gemma3_text",
        "layer_types": list(config.layer_types),
        "rope_theta": config.global_rope_base,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "pad_token_id": config.pad_id,
        "bos_token_id": config.bos_id,
    }
    if config.model_type != "gemma2":
        text["rope_local_base_freq"] = config.local_rope_base
    if config.global_rope_factor != 1.0:
        text["rope_scaling"] = {"rope_type": "linear", "factor": config.global_rope_factor}
    stop_ids = {"eos_token_id": list(config.stop_ids)}
    if config.vision is None:
        name = "Gemma2ForCausalLM" if config.model_type == "gemma2" else "Gemma3ForCausalLM"
        return {"architectures": [name]} | text | stop_ids
    vision = {key: getattr(config.vision, field) for field, key in _VISION_KEYS.items()}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": vision | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "mm_tokens_per_image": config.vision.tokens_per_image,
        "image_token_index": config.image_token_id,
        "boi_token_index": config.start_of_image_id,
        "eoi_token_index": config.end_of_image_id,
        "tie_word_embeddings": True,
    } | stop_ids


def _read_json(path: Path) -> dict:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a JSON object")
    return content


def read_config(directory: Path | str) -> Config:
    """Read `config.json`, and the further stop ids of `generation_config.json`, from a Hugging Face model directory."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a model directory: it has no config.json")
    try:
        config = config_from_dict(_read_json(path))
        path = path.with_name("generation_config.json")
        # Instruction-tuned Gemma 2 names <end_of_turn> here only.
        more = _as_ids(_read_json(path).get("eos_token_id")) if path.is_file() else ()
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    return replace(config, stop_ids=tuple(dict.fromkeys(config.stop_ids + more)))
