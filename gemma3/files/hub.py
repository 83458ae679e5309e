"""Finding a model by name: the one inside this package, a directory, Hugging Face's cache, or a download."""

import re
from pathlib import Path

NANO_DIRECTORY = Path(__file__).parents[1] / "nano"

# Our tokenizer reads tokenizer.model alone; the other files are copied when a model is written again.
_BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*processor_config.json", "chat_template*")
# What a model directory is made of; nothing else is fetched.
_FILES = ["config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json", *_BESIDE]


def _is_complete(snapshot: Path) -> bool:
    """Whether a cached snapshot is complete: other programs may fetch only some files, or a download may break off."""
    names = {path.name for path in snapshot.iterdir()}
    shards = [re.fullmatch(r"model-\d+-of-(\d+)\.safetensors", name) for name in names]
    count = next((int(shard[1]) for shard in shards if shard), None)
    weights = "model.safetensors" in names if count is None else count == sum(shard is not None for shard in shards)
    return weights and {"config.json", "tokenizer.model"} <= names


def resolve(directory_or_name: str | Path) -> Path:
    """The model directory of a path, of a Hugging Face name such as "google/gemma-3-4b-it", or of "nano".

    A name is looked for among directories, then in Hugging Face's cache, and is then downloaded. If none of these finds
    it, a ValueError says what to do.
    """
    if str(directory_or_name) == "nano":
        return NANO_DIRECTORY
    if Path(directory_or_name).is_dir():
        return Path(directory_or_name)
    name = str(directory_or_name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(
            f"{name} is not a directory; pass a model directory, a name such as google/gemma-3-4b-it, or nano"
        )
    # Imported here: it takes a while, and models on disk do not need it.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        cached = Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES, local_files_only=True))
        if _is_complete(cached):
            return cached
    except errors.LocalEntryNotFoundError:
        pass
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{name} asks you to accept its licence: do so at https://huggingface.co/{name}, then run `hf auth login`, "
            "or pass a model directory"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{name} is neither a directory nor a model you may see at https://huggingface.co; check the name, run "
            "`hf auth login` if it is private, or pass a model directory"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{name} is not in the Hugging Face cache and could not be downloaded ({type(error).__name__}); check the "
            "network, or pass a model directory"
        ) from error


def files_beside_weights(directory_or_name: str | Path) -> list[Path]:
    """A model's tokenizer, chat template and processor files, which are copied when its weights are written again."""
    directory = resolve(directory_or_name)
    return [path for pattern in _BESIDE for path in sorted(directory.glob(pattern))]
