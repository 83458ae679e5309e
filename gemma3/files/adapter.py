"""LoRA adapters: PEFT directories to `Lora` and back; rests on the names and layouts of `weights`.

Only adapters of the linear layers in the language model's blocks and the vision tower's are read, all layers alike.
Whatever else PEFT can store in an adapter is refused: left out, it would silently give another model.
"""

import json
import re
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from gemma3.config import Config
from gemma3.files.tensors import list_tensors, replaced_directory, stored_shape, to_stored, write_json
from gemma3.files.weights import NAMES, axis_sizes, check_tensors, common_name, load_tree, tensors_of
from gemma3.lora import TARGETS, VISION_TARGETS, Lora, lora_shapes

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
# The parts of a `Lora`: which blocks in `NAMES` each adapts, and their fields.
_PARTS = {"blocks": ("text.blocks", TARGETS), "vision": ("vision.blocks", VISION_TARGETS)}
_HF_TARGETS = {  # "blocks": {"q": "q_proj", ...}
    part: {target: NAMES[f"{blocks}.{target}"][0].split(".")[-2] for target in targets}
    for part, (blocks, targets) in _PARTS.items()
}

# Settings of PEFT that change what an adapter computes, or what it was made for; each must be off.
_MUST_BE_OFF = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# Other ways of initialising change the base model's weights as well.
_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")


def _adapter_names() -> dict[str, tuple[str, str]]:
    """Field of a `Lora` to name and layout. A weight stored "out in" has A stored "r in" and B stored "out r"."""
    names = {}
    for part, (blocks, targets) in _PARTS.items():
        for target in targets:
            name, layout = NAMES[f"{blocks}.{target}"]
            outputs, inputs = re.findall(r"\([^)]*\)|\w", layout.split("->")[0])
            module = name.removesuffix(".weight")
            names[f"{part}.{target}.a"] = (f"{module}.lora_A.weight", f"r {inputs} -> {inputs.strip('()')} r")
            names[f"{part}.{target}.b"] = (f"{module}.lora_B.weight", f"{outputs} r -> r {outputs.strip('()')}")
    return names


_NAMES = _adapter_names()


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
    """The projections of a part of `Lora` that have tensors, or if any has, are declared to."""
    blocks, targets = _PARTS[part]
    root = NAMES[f"{blocks}.{targets[0]}"][0].split("{}")[0]  # such as "model.layers."
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

    The rank, the scale and which projections are adapted are the file's own. ValueError, in a sentence, for a feature
    of PEFT beyond plain LoRA, for one that adapts no language layer, or another module than the projections of the
    language layers and the vision tower's, and for tensors missing or misshapen.
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
    # As a list the names would match q_proj, k_proj and v_proj of both the language model and the vision tower.
    text = rf".*language_model.*\.({'|'.join(modules('blocks'))})"
    return text if lora.vision is None else rf"{text}|.*vision_tower.*encoder.*\.({'|'.join(modules('vision'))})"


def _peft_name(name: str, config: Config) -> str:
    """PEFT's name of an adapter's tensor, which is that of the module in memory; `name` is our common one."""
    if config.vision is not None:
        name = re.sub(r"^model\.", "model.language_model.", name)
    return _PREFIX + re.sub(r"^vision_tower\.vision_model\.", "model.vision_tower.", name)


def save_adapter(
    directory: str | Path, config: Config, lora: Lora, base_model_name: str, *, rslora: bool = False
) -> None:
    """Write a PEFT adapter directory; `PeftModel.from_pretrained` and vLLM read it.

    The file states alpha, not the scale: scale * r, or scale * sqrt(r) with `rslora`. The directory appears, or
    replaces an earlier adapter, once everything is written. ValueError if it holds something else.
    """
    r = next(pair for pair in lora.blocks if pair is not None).b.shape[1]
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
