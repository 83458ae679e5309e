"""A name is found among directories, then in the cache, then by download; every failure says what to do."""

from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from gemma3.files.hub import NANO_DIRECTORY, files_beside_weights, resolve

RESPONSE = SimpleNamespace(headers={}, request=None)


class Hub:
    """Stands in for `snapshot_download`: a cache, and what a download gives or raises."""

    def __init__(self, cached, download=None):
        self.cached, self.download, self.downloads = cached, download, 0

    def __call__(self, name, *, allow_patterns, local_files_only=False):
        assert name == "google/gemma-3-4b-it" and "*.safetensors" in allow_patterns
        if local_files_only:
            if self.cached is None:
                raise errors.LocalEntryNotFoundError("nothing cached")
            return str(self.cached)
        self.downloads += 1
        if isinstance(self.download, Exception):
            raise self.download
        return str(self.download)


def use(monkeypatch, hub: Hub) -> Hub:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def snapshot(directory, *names):
    directory.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.model", *names):
        (directory / name).touch()
    return directory


def test_a_directory_is_itself_even_where_a_model_has_that_name(tmp_path, monkeypatch):
    hub = use(monkeypatch, Hub(None))
    (tmp_path / "google" / "gemma-3-4b-it").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("google/gemma-3-4b-it").is_dir() and resolve(tmp_path) == tmp_path
    assert hub.downloads == 0


def test_nano_is_inside_the_package():
    assert resolve("nano") == NANO_DIRECTORY


@pytest.mark.parametrize(
    "names", [["model.safetensors"], ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]]
)
def test_a_complete_snapshot_in_the_cache_is_used(names, tmp_path, monkeypatch):
    hub = use(monkeypatch, Hub(snapshot(tmp_path, *names)))
    assert resolve("google/gemma-3-4b-it") == tmp_path and hub.downloads == 0


@pytest.mark.parametrize("names", [[], ["model-00001-of-00002.safetensors"]])
def test_a_snapshot_with_parts_missing_is_completed_by_a_download(names, tmp_path, monkeypatch):
    hub = use(monkeypatch, Hub(snapshot(tmp_path, *names), tmp_path))
    assert resolve("google/gemma-3-4b-it") == tmp_path and hub.downloads == 1


def test_what_is_not_cached_is_downloaded(tmp_path, monkeypatch):
    hub = use(monkeypatch, Hub(None, tmp_path))
    assert resolve("google/gemma-3-4b-it") == tmp_path and hub.downloads == 1


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            errors.GatedRepoError("gated", response=RESPONSE),
            r"accept its licence: do so at .*/google/gemma-3-4b-it.*login",
        ),
        (errors.RepositoryNotFoundError("absent", response=RESPONSE), "check the name, run `hf auth login`"),
        (errors.LocalEntryNotFoundError("no connection"), "check the network, or pass a model directory"),
        (errors.OfflineModeIsEnabled("offline"), "check the network, or pass a model directory"),
    ],
)
def test_each_failure_says_what_to_do(error, advice, monkeypatch):
    use(monkeypatch, Hub(None, error))
    with pytest.raises(ValueError, match=advice):
        resolve("google/gemma-3-4b-it")


@pytest.mark.parametrize("name", ["gemma", "./runs/model", "/no/such/place", "a/b/c"])
def test_what_is_neither_a_directory_nor_a_name_is_refused(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(ValueError, match="is not a directory; pass a model directory, a name such as"):
        resolve(name)


def test_the_files_beside_weights_are_those_that_make_text_of_ids_and_pixels_of_images(tmp_path):
    names = ["added_tokens.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json"]
    names += ["special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    for name in (*names, "config.json", "model.safetensors", "README.md", "generation_config.json"):
        (tmp_path / name).touch()
    assert sorted(path.name for path in files_beside_weights(tmp_path)) == names
