"""A trained model for other programs: Hugging Face weights with the adapter merged in, or the adapter by itself.

Rests on `weights`, `adapter` and `lora.merge`. It works in host memory, which must hold the whole model and a copy of a
part: one stacked weight (at most a quarter of the model) while merging, then one file (5 GB) while writing.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp

from gemma3.files.adapter import load_adapter
from gemma3.files.hub import files_beside_weights, resolve
from gemma3.files.weights import load_checkpoint, save_checkpoint
from gemma3.files.writing import replaced_directory, write_json
from gemma3.lora import merge

_SETTINGS, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _refuse_to_replace(out: Path, read: Path) -> None:
    """ValueError if writing `out` would remove the files at `read`, or a folder with a config.json but no weights."""
    if read.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--export {out} is or holds {read}, which is being exported; pass another directory")
    if (out / "config.json").is_file() and not any(out.glob("*.safetensors")):  # as in a run's directory
        raise ValueError(f"--export {out} has a config.json and no model, so it is not overwritten; pass another one")


def export_model(model: str, adapter: Path | None, out: Path, dtype: str | None = None) -> str:
    """Write `out`, a directory that `from_pretrained` reads, with tokenizer and processor; return its weights' dtype.

    model: a directory or a name. The adapter is added to the weights in float32, and the sum is rounded once: to
    `dtype`, or to the dtype of the model's own files. An earlier model at `out` is replaced. ValueError if `out` holds
    anything else, or if an input cannot be read.
    """
    for path in (resolve(model), adapter):
        if path is not None:
            _refuse_to_replace(out, path)
    config, params = load_checkpoint(model, dtype and jnp.dtype(dtype))
    if adapter is not None:
        params = jax.jit(merge, donate_argnums=0)(params, load_adapter(adapter, config))
    save_checkpoint(out, config, params, also=files_beside_weights(model))
    return str(params.text.embedding.dtype)


def export_adapter(model: str, adapter: Path | None, out: Path) -> None:
    """Copy a PEFT adapter to `out` and name `model` as its base, by its absolute path if it is a directory.

    An earlier adapter at `out` is replaced. ValueError if `out` holds anything else, or if there is no adapter.
    """
    if adapter is None:
        raise ValueError(f"{model} was trained as a whole and has no adapter; leave --adapter-only out")
    if not (adapter / _WEIGHTS).is_file():
        raise ValueError(f"{adapter} has no {_WEIGHTS}; export an earlier checkpoint of the run")
    _refuse_to_replace(out, adapter)
    if model == "nano" or Path(model).is_dir():
        model = str(resolve(model).resolve())
    settings = json.loads((adapter / _SETTINGS).read_text(encoding="utf-8"))
    with replaced_directory(out, _SETTINGS) as new:
        shutil.copy(adapter / _WEIGHTS, new)
        write_json(new / _SETTINGS, settings | {"base_model_name_or_path": model})
