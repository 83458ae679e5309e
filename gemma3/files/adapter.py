"""LoRA adapters: PEFT directories to `Lora` and back; rests on the names and layouts of `weights`.

An adapter may adapt the linear layers in the blocks of the language model and of the vision tower, in all layers alike.
Anything else that PEFT can store in an adapter is refused: to ignore it would silently give another model.
"""

import json
import re
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from gemma3.config import Config
from gemma3.files.tensors import list_tensors, stored_shape, to_stored
from gemma3.files.weights import NAMES, check_tensors, common_name, load_tree, tensors_of
from gemma3.files.writing import replaced_directory, write_json
from gemma3.lora import TARGETS, VISION_TARGETS, Lora, lora_shapes
from gemma3.params import axis_sizes

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
# For each part of a `Lora`: the blocks in `NAMES` that it adapts, and the fields that may have a pair.
_PARTS = {"blocks": ("text.blocks", TARGETS), "vision": ("vision.blocks", VISION_TARGETS)}
_HF_TARGETS = {  # "blocks": {"q": "q_proj", ...}
    part: {target: NAMES[f"{blocks}.{target}"].split(".")[-2] for target in targets}
    for part, (blocks, targets) in _PARTS.items()
}

# PEFT settings that go beyond plain LoRA, in what an adapter computes or in which modules it adapts; each must be off.
_MUST_BE_OFF = """
    alora_invocation_tokens alpha_pattern arrow_config fan_in_fan_out kasa_config layer_replication
    layers_to_transform lora_bias modules_to_save monteclora_config rank_pattern target_parameters
    trainable_token_indices use_bdlora use_dora use_qalora velora_config
""".split()  # noqa: SIM905 - a list would be a line a word
# The initialisations that leave the base model's weights as they are; others change them too.
_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")

# The tensor's name for each field of a `Lora`.
_NAMES = {
    f"{part}.{target}.{factor}": NAMES[f"{blocks}.{target}"].replace(".weight", f".lora_{factor.upper()}.weight")
    for part, (blocks, targets) in _PARTS.items()
    for target in targets
    for factor in ("a", "b")
}


def _read_settings(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); pass a PEFT adapter's directory") from error
    if kind != "LORA":
        raise ValueError(f"{path} describes an adapter of type {kind}; only LORA is supported")
    for key in _MUST_BE_OFF:
        if settings.get(key):
            raise ValueError(f"{path} sets {key} to {settings[key]!r}; only plain LoRA, without it, is supported")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{path} sets bias to {settings['bias']!r}; only 'none' is supported")
    if settings.get("init_lora_weights") not in _INITIALISATIONS:
        raise ValueError(
            f"{path} sets init_lora_weights to {settings['init_lora_weights']!r}, which changes the base model too; "
            "save it from PEFT as a conventional LoRA first"
        )
    for key, numbers in (("r", int), ("lora_alpha", int | float)):
        if not isinstance(settings.get(key), numbers) or settings[key] <= 0:
            raise ValueError(f"{path} gives {key} as {settings.get(key)!r}; a number above 0 is needed")
    return settings


def _adapted(found: dict, part: str, declared: list[str] | str | None) -> set[str]:
    """The projections that a part of `Lora` adapts: those with tensors and, if there are any, those in `declared`."""
    blocks, targets = _PARTS[part]
    root = NAMES[f"{blocks}.{targets[0]}"].split("{}")[0]  # such as "model.layers."
    held = {
        target
        for target, module in _HF_TARGETS[part].items()
        if any(name.startswith(root) and f".{module}." in name for name in found)
    }
    if held and isinstance(declared, list):  # not a regular expression, in which the names need not be written out
        modules = {name.split(".")[-1] for name in declared}
        held |= {target for target, module in _HF_TARGETS[part].items() if module in modules}
    return held


def load_adapter(directory: str | Path, config: Config, mesh: Mesh | None = None) -> Lora:
    """Read a PEFT LoRA adapter of this model, float32, split over `mesh` or on the first device.

    The rank, the scale and the adapted projections are the file's own. ValueError if the adapter uses a feature of PEFT
    beyond plain LoRA, adapts no language layer, adapts a module that is not a projection of the language model or the
    vision tower, or has missing or misshapen tensors.
    """
    directory = Path(directory)
    settings = _read_settings(directory / "adapter_config.json")
    found = {common_name(t.name.removeprefix(_PREFIX)): t for t in list_tensors(directory / _WEIGHTS)}
    targets, vision_targets = (_adapted(found, part, settings.get("target_modules")) for part in _PARTS)
    if not targets:
        modules = ", ".join(_HF_TARGETS["blocks"].values())
        raise ValueError(f"{directory} adapts no layer of the language model; one of {modules} is needed")
    if vision_targets and config.vision is None:
        raise ValueError(f"{directory} adapts the vision tower, and a {config.model_type} model has none")
    r = settings["r"]
    scale = settings["lora_alpha"] / (r**0.5 if settings.get("use_rslora") else r)
    shapes, sizes = lora_shapes(config, r, scale, targets, vision_targets), axis_sizes(config) | {"r": r}
    expected = {name: stored_shape(layout, sizes) for name, layout, _ in tensors_of(shapes, _NAMES)}
    check_tensors(found, expected, directory / _WEIGHTS)
    return load_tree(shapes, _NAMES, found, config, sizes, mesh)


def _target_modules(lora: Lora, config: Config) -> list[str] | str:
    def modules(part: str) -> list[str]:
        pairs = getattr(lora, part)._asdict()
        return [_HF_TARGETS[part][target] for target, pair in pairs.items() if pair is not None]

    if config.vision is None:
        return modules("blocks")
    # A regular expression: PEFT would look for a list of names in both towers, and both have q_proj, k_proj, v_proj.
    text = rf".*language_model.*\.({'|'.join(modules('blocks'))})"
    return text if lora.vision is None else rf"{text}|.*vision_tower.*encoder.*\.({'|'.join(modules('vision'))})"


def _peft_name(name: str, config: Config) -> str:
    """PEFT's name of an adapter's tensor, made from the module's name in memory; `name` is our common name."""
    if config.vision is not None:
        name = re.sub(r"^model\.", "model.language_model.", name)
    return _PREFIX + re.sub(r"^vision_tower\.vision_model\.", "model.vision_tower.", name)


def save_adapter(
    directory: str | Path, config: Config, lora: Lora, base_model_name: str, *, rslora: bool = False
) -> None:
    """Write a PEFT adapter directory; `PeftModel.from_pretrained` and vLLM read it.

    The file states alpha instead of the scale: alpha = scale * r, or scale * sqrt(r) with `rslora`. The directory
    appears, or replaces an earlier adapter, once everything is written. ValueError if it holds something else.
    """
    r = lora.r
    alpha = round(lora.scale * (r**0.5 if rslora else r), 9)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": rslora,
        "target_modules": _target_modules(lora, config),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    sizes = axis_sizes(config) | {"r": r}
    with replaced_directory(directory, "adapter_config.json") as new:
        tensors = {}
        for name, layout, get in tensors_of(lora, _NAMES):
            tensors[_peft_name(name, config)] = to_stored(np.asarray(get(), np.float32), layout, sizes)
        save_file(tensors, new / _WEIGHTS, metadata={"format": "pt"})
        write_json(new / "adapter_config.json", settings)
