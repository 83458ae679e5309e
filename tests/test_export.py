"""What eval.py --export writes gives our logits and completions in transformers and peft, and replaces nothing else."""

import io
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from oracle import PAIRS, assert_close, hf_logits, image_prompts, random_lora
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma3ForConditionalGeneration,
)

import eval as evaluation
from data.synthetic import synthetic
from gemma3.files.adapter import save_adapter
from gemma3.files.hub import NANO_DIRECTORY
from gemma3.files.tokenizer_model import load_tokenizer
from gemma3.files.weights import load_checkpoint, save_checkpoint
from gemma3.filters import Sampling
from gemma3.lora import Policy, merge
from gemma3.mesh import Model, make_mesh
from gemma3.model import forward
from grpo.reader import Reader
from grpo.run import checkpoint
from grpo.run.cli import clean_errors
from grpo.update import TrainState
from grpo.use.evaluate import evaluate

torch.set_num_threads(1)

LOADERS = {"text": AutoModelForCausalLM, "images": AutoModelForImageTextToText}
IDS, IMAGES = image_prompts()


def write_run(run: Path, trainable, config, base: Path | str, vision=None) -> Path:
    """A run directory as train.py leaves it."""
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"settings": {"model": str(base)}}))
    state = TrainState(trainable, optax.sgd(0.1, 0.9).init(trainable))
    checkpoint.save(run, 3, state, config=config, frozen_vision=vision, base_model=str(base), extra={}, keep=1)
    return run


class Case:
    """A tiny model on disk, an adapter (of both towers if it reads images) and the logits of the adapted model.

    `run` is a run that trained the adapter.
    """

    def __init__(self, kind: str, folder: Path):
        self.kind = kind
        hf, self.config, self.params = PAIRS[kind]()
        self.base = folder / "base"
        hf.save_pretrained(self.base)
        (self.base / "tokenizer.model").write_bytes(b"pieces")
        self.lora = random_lora(self.config, vision=kind == "images")
        self.given = (IDS, IMAGES) if kind == "images" else (np.where(IDS == 380, 9, IDS), None)
        self.real = IDS != 0
        self.logits = forward(Policy(self.params, self.lora), *self.given, config=self.config)[self.real]
        plain = forward(self.params, *self.given, config=self.config)[self.real]
        assert np.abs(self.logits - plain).max() > 0.1, "the adapter does something"
        self.run = write_run(folder / "run", self.lora, self.config, self.base)

    @torch.no_grad()
    def logits_of(self, hf) -> torch.Tensor:
        return hf_logits(hf.eval(), *self.given)[torch.from_numpy(self.real)]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    return cache(lambda kind: Case(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(params=["text", "images"])
def case(request, make):
    return make(request.param)


@pytest.fixture
def text(make):
    return make("text")


def export(source, out, *flags) -> None:
    evaluation.main([str(word) for word in ("--ckpt", source, "--export", out, *flags)])


def test_a_merged_run_gives_the_adapted_logits_in_transformers(case, tmp_path, capsys):
    export(case.run, tmp_path / "merged")
    expected = f"wrote {tmp_path / 'merged'}: {case.base} with {case.run / 'adapter'} merged in, in float32\n"
    assert capsys.readouterr().out == expected
    hf = LOADERS[case.kind].from_pretrained(tmp_path / "merged")
    assert hf.dtype == torch.float32
    assert_close(case.logits, case.logits_of(hf))
    assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == b"pieces"


def test_an_exported_adapter_gives_the_same_logits_in_peft(case, tmp_path, monkeypatch):
    """Also if the base was named by a relative path, which would be of no use elsewhere."""
    monkeypatch.chdir(case.base.parent)
    export(case.run, tmp_path / "adapter", "--adapter-only", "--model", "base")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(case.base.resolve())
    hf = peft.PeftModel.from_pretrained(LOADERS[case.kind].from_pretrained(named), tmp_path / "adapter")
    assert_close(case.logits, case.logits_of(hf))


def test_an_adapter_and_a_checkpoint_are_exported_like_their_run(text, tmp_path):
    export(text.run, tmp_path / "run")
    expected = (tmp_path / "run" / "model.safetensors").read_bytes()
    for i, source in enumerate((text.run / "checkpoints" / "00000003", text.run / "adapter")):
        export(source, tmp_path / str(i))
        assert (tmp_path / str(i) / "model.safetensors").read_bytes() == expected


def test_the_base_can_be_another_than_the_named_one(text, tmp_path):
    shutil.copytree(text.run / "adapter", tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": "gone/gone"}))
    export(tmp_path / "adapter", tmp_path / "merged", "--model", text.base)
    assert_close(text.logits, text.logits_of(LOADERS["text"].from_pretrained(tmp_path / "merged")))


def test_a_model_trained_as_a_whole_is_written_as_it_is(case, tmp_path):
    """A run of a trained language model with its frozen tower; both are made by merging an adapter into the base."""
    trained = merge(case.params, case.lora)
    run = write_run(tmp_path / "run", trained.text, case.config, case.base, vision=trained.vision)
    export(run, tmp_path / "exported")
    _, ours = load_checkpoint(tmp_path / "exported")
    jax.tree.map(np.testing.assert_array_equal, ours, trained)
    assert_close(case.logits, case.logits_of(LOADERS[case.kind].from_pretrained(tmp_path / "exported")))


def test_weights_are_written_in_the_dtype_of_the_base_and_rounded_once(text, tmp_path):
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), text.params)
    save_checkpoint(tmp_path / "base", text.config, rounded)
    exact = merge(jax.tree.map(lambda x: x.astype(jnp.float32), rounded), text.lora)
    for flags, dtype in (((), jnp.bfloat16), (("--dtype", "float32"), jnp.float32)):
        export(text.run, tmp_path / "merged", "--model", tmp_path / "base", *flags)  # the second replaces
        _, ours = load_checkpoint(tmp_path / "merged", None)
        assert {x.dtype for x in jax.tree.leaves(ours)} == {jnp.dtype(dtype)}
        jax.tree.map(lambda x, y, d=dtype: np.testing.assert_array_equal(x, y.astype(d)), ours, exact)
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == getattr(torch, jnp.dtype(dtype).name)


@pytest.fixture(scope="module")
def adapted_nano(tmp_path_factory):
    """(params, adapter, reader, directory): the embedded model, a random adapter, and both exported as one."""
    folder = tmp_path_factory.mktemp("nano")
    config, params = load_checkpoint("nano")
    lora = random_lora(config, alpha=24.0)  # so strong that it changes most completions
    save_adapter(folder / "adapter", config, lora, "nano")
    export(folder / "adapter", folder / "merged")
    model, sizes = Model(config, make_mesh(1, 1)), {"max_prompt_length": 128, "max_images": 1}
    reader = Reader(model, load_tokenizer(NANO_DIRECTORY, config), "bare", "answer", **sizes)
    return params, lora, reader, folder / "merged"


def hugging_face_inputs(directory: Path, chats: list[list[dict]], images: list[bytes]):
    """What transformers' own processor in the directory makes of chats with one image each, padded on the left."""
    processor = AutoProcessor.from_pretrained(directory)
    texts = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    images = [[Image.open(io.BytesIO(image)).convert("RGB")] for image in images]
    return processor(
        text=texts, images=images, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )


def test_tokenizer_and_processor_come_along(adapted_nano):
    _, _, reader, directory = adapted_nano
    example = synthetic("test", 1, 0)[0]
    (ids,) = hugging_face_inputs(directory, [reader.chat(example)], example.images)["input_ids"].tolist()
    assert ids == reader(example).ids
    written = AutoTokenizer.from_pretrained(directory).decode(ids, skip_special_tokens=True)
    assert written == reader.tokenizer.decode(ids)


@pytest.mark.slow
def test_hugging_faces_generate_writes_the_same_completions(adapted_nano):
    """Greedily, for 64 held-out images, from the exported files alone; the base model's completions are others."""
    params, lora, reader, directory = adapted_nano
    examples = [example for example in synthetic("test", 200, 0) if example.images][:64]
    how = {"sampling": Sampling(temperature=0.0, max_completion_length=64), "batch_size": 64}
    texts = lambda lora: [  # noqa: E731
        group[0].completion for group in evaluate(Policy(params, lora), examples, reader, **how)
    ]
    ours = texts(lora)
    assert len(set(ours)) > 10 and sum(a != b for a, b in zip(ours, texts(None), strict=True)) > 32

    hf = Gemma3ForConditionalGeneration.from_pretrained(directory, attn_implementation="eager").eval()
    chats, images = [reader.chat(example) for example in examples], [example.images[0] for example in examples]
    inputs = hugging_face_inputs(directory, chats, images)
    with torch.no_grad():
        sampled = hf.generate(**inputs, max_new_tokens=64, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in sampled] == ours


def refused(capsys, source, out, *flags) -> str:
    with pytest.raises(SystemExit) as end, clean_errors():
        export(source, out, *flags)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_exported_is_refused_in_a_sentence(text, tmp_path, capsys):
    out = tmp_path / "out"
    assert "none is not a directory; pass a model directory" in refused(capsys, tmp_path / "none", out)
    (tmp_path / "fresh").mkdir()
    shutil.copy(text.run / "config.json", tmp_path / "fresh")
    assert "holds no adapter and no weights; pass a run" in refused(capsys, tmp_path / "fresh", out)
    assert "has no adapter; leave --adapter-only out" in refused(capsys, text.base, out, "--adapter-only")
    assert "so --model nano has no use; leave it out" in refused(capsys, text.base, out, "--model", "nano")
    assert "leave it or --adapter-only out" in refused(capsys, text.run, out, "--adapter-only", "--dtype", "float32")
    assert "no/where/at/all is not a directory" in refused(capsys, text.run, out, "--model", "no/where/at/all")
    assert "which this model does not have" in refused(capsys, text.run, out, "--model", "nano")
    adapter = shutil.copytree(text.run / "adapter", tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing, damaged or" in refused(capsys, adapter, out)
    assert "has no adapter_model.safetensors" in refused(capsys, adapter, out, "--adapter-only")
    (adapter / "adapter_config.json").write_text("{}")
    assert "does not name the base model; give it with --model" in refused(capsys, adapter, out)
    (adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json is damaged" in refused(capsys, adapter, out)
    assert not (tmp_path / "out").exists()


def test_nothing_but_an_earlier_export_is_replaced(text, tmp_path, capsys):
    run = shutil.copytree(text.run, tmp_path / "run", symlinks=True)
    base = shutil.copytree(text.base, tmp_path / "base")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years")
    before = sorted(tmp_path.rglob("*"))
    named = ("--model", base)
    assert "is or holds" in refused(capsys, run, base, *named)
    assert "is or holds" in refused(capsys, run, tmp_path, *named)
    assert "and no model, so it is not overwritten" in refused(capsys, run, run, *named)
    assert "is or holds" in refused(capsys, run, run / "adapter", *named, "--adapter-only")
    assert "and no model, so it is not overwritten" in refused(capsys, text.run, run, *named)
    for flags in ((), ("--adapter-only",)):
        assert "so it is not overwritten" in refused(capsys, run, tmp_path / "other", *named, *flags)
    assert "has no adapter_config.json, so it is not" in refused(capsys, text.run, base, "--adapter-only")
    assert sorted(tmp_path.rglob("*")) == before


def test_on_the_command_line_bad_input_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "eval.py", "--ckpt", str(tmp_path), "--export", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=NANO_DIRECTORY.parents[1])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path} holds no adapter") and done.stderr.count("\n") == 1
