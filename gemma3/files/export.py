"""A trained model for other programs: Hugging Face weights with the adapter merged in, or the adapter by itself.

    python -m gemma3.files.export RUN --out DIR [--adapter-only] [--model BASE] [--dtype bfloat16]

Rests on `weights`, `adapter` and `lora.merge`. It works in host memory, which must hold the model once and a part of it
again: one stacked weight, at most a quarter of the model, while merging, and then 5 GB, one file, while writing.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gemma3.files.adapter import load_adapter
from gemma3.files.hub import files_beside_weights, resolve
from gemma3.files.tensors import replaced_directory, write_json
from gemma3.files.weights import load_checkpoint, save_checkpoint
from gemma3.lora import merge

_SETTINGS, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Source(NamedTuple):
    """What is exported."""

    model: str  # directory or name: the adapter's base, or what was trained as a whole
    adapter: Path | None


def _named_base(adapter: Path) -> str:
    path = adapter / _SETTINGS
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); export an earlier checkpoint of the run") from error
    if not base:
        raise ValueError(f"{path} does not name the base model; give it with --model")
    return base


def _has_weights(directory: Path) -> bool:
    """Whether it is a model directory; a config.json alone a run has too."""
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def find_source(run: Path, base: str | None = None) -> Source:
    """What a directory holds: a run or one of its checkpoints, a PEFT adapter, or a model; `base` as --model gives it.

    ValueError where it is none of these, and where there is no adapter for `base` to be the base of.
    """
    for adapter in (run, run / "adapter"):
        if (adapter / _SETTINGS).is_file():
            return Source(base or _named_base(adapter), adapter)
    model = next((path for path in (run / "model", run) if _has_weights(path)), None)
    if model is None:
        raise ValueError(f"{run} holds no adapter and no weights; pass a run that has saved, an adapter or a model")
    if base:
        raise ValueError(f"{model} is a whole model, so --model {base} has no use; leave it out")
    return Source(str(model), None)


def _refuse_to_replace(out: Path, read: Path) -> None:
    """ValueError where writing `out` would remove what is `read`, or a folder that has a config.json but no weights."""
    if read.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--out {out} is or holds {read}, which is exported; pass another directory")
    if (out / "config.json").is_file() and not _has_weights(out):
        raise ValueError(f"--out {out} holds a config.json and no model, so it is not overwritten; pass another one")


def export_model(source: Source, out: Path, dtype: str | None = None) -> str:
    """Write `out`, a directory that `from_pretrained` reads, tokenizer and processor included; returns its dtype.

    The adapter is added to the weights in float32 and rounded once, to `dtype` or to that of the model's own files.
    An earlier model at `out` is replaced; ValueError if it holds anything else, or what is to be read cannot be.
    """
    for path in (resolve(source.model), source.adapter):
        if path is not None:
            _refuse_to_replace(out, path)
    config, params = load_checkpoint(source.model, dtype and jnp.dtype(dtype))
    if source.adapter is not None:
        params = jax.jit(merge, donate_argnums=0)(params, load_adapter(source.adapter, config))
    save_checkpoint(out, config, params, also=files_beside_weights(source.model))
    return str(params.text.embedding.dtype)


def export_adapter(source: Source, out: Path) -> None:
    """Copy a PEFT adapter to `out`, naming as its base `source.model`, by its whole path where that is a directory.

    An earlier adapter at `out` is replaced; ValueError if it holds anything else, or `source` has no adapter.
    """
    if source.adapter is None:
        raise ValueError(f"{source.model} was trained as a whole and has no adapter; leave --adapter-only out")
    if not (source.adapter / _WEIGHTS).is_file():
        raise ValueError(f"{source.adapter} has no {_WEIGHTS}; export an earlier checkpoint of the run")
    _refuse_to_replace(out, source.adapter)
    base = source.model
    if base == "nano" or Path(base).is_dir():
        base = str(resolve(base).resolve())
    settings = json.loads((source.adapter / _SETTINGS).read_text(encoding="utf-8"))
    with replaced_directory(out, _SETTINGS) as new:
        shutil.copy(source.adapter / _WEIGHTS, new)
        write_json(new / _SETTINGS, settings | {"base_model_name_or_path": base})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gemma3.files.export", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="run of train.py or a checkpoint of it, adapter or model")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="directory to write")
    parser.add_argument("--adapter-only", action="store_true", help="write the PEFT adapter without the model")
    parser.add_argument("--model", metavar="BASE", help="base model (default: the one that the adapter names)")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], help="of the weights (default: as the model's files)"
    )
    flags = parser.parse_args(argv)
    if flags.adapter_only and flags.dtype:
        parser.error(f"--dtype {flags.dtype} is of merged weights; leave it or --adapter-only out")
    jax.config.update("jax_platforms", "cpu")  # a model may be larger than one accelerator's memory
    try:
        source = find_source(flags.run, flags.model)
        if flags.adapter_only:
            export_adapter(source, flags.out)
            what = f"the adapter {source.adapter}"
        else:
            dtype = export_model(source, flags.out, flags.dtype)
            merged = f" with {source.adapter} merged in" if source.adapter else ""
            what = f"{source.model}{merged}, in {dtype}"
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {flags.out}: {what}")


if __name__ == "__main__":
    main()
