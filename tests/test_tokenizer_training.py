"""A trained tokenizer has nano's layout, and Hugging Face, offline, reads the same ids from the files beside it."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from PIL import Image
from sentencepiece import SentencePieceProcessor
from tiny import CORPUS
from tokenizers import Tokenizer as TokenizersFile
from transformers import AutoProcessor, AutoTokenizer

from data.prompt import demonstration, question_text
from data.synthetic import synthetic
from gemma3.files.hub import files_beside_weights
from gemma3.files.published import NANO
from gemma3.files.tokenizer_model import load_tokenizer
from gemma3.files.tokenizer_training import CONTROL, train_tokenizer, write_hugging_face_files
from gemma3.image import load_image
from grpo.run.setup import SYNTHETIC_SIZE, new_nano

TASK_TEXTS = [text for e in synthetic("train", 999, 3) for text in (question_text(e), demonstration(e))]
TEXTS = {"task": TASK_TEXTS, "mixed": CORPUS}


@pytest.fixture(scope="module", params=TEXTS)
def directory(request, tmp_path_factory):
    """A model directory without weights, made from the embedded task or from texts of many kinds."""
    directory = tmp_path_factory.mktemp(request.param) / "new" / "model"
    train_tokenizer(TEXTS[request.param], directory, NANO.vocab_size)
    write_hugging_face_files(directory)
    return directory


@pytest.fixture(scope="module")
def pieces(directory):
    return SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


@pytest.fixture(scope="module")
def processor(directory):
    """Hugging Face's processor from the files in the directory; a path is never looked up on the hub."""
    return AutoProcessor.from_pretrained(directory, local_files_only=True)


# U+2581 is left out: it is sentencepiece's own sign for a space.
parts = st.sampled_from(["red dots", "Natalia sold", "</reasoning>\n<answer>", "12 + 30", "é", "數學", "🙂", "\r\n"])
spaces = st.text(" \n\t", max_size=9)
texts = (
    st.lists(parts | spaces | st.text(max_size=6), max_size=6)
    .map("".join)
    .filter(lambda text: "▁" not in text and not any(name in text for name in (*CONTROL, "<bos>", "<eos>", "<pad>")))
)
fuzz = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def user(*content) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


IMAGE, QUESTION = {"type": "image"}, {"type": "text", "text": " How many red dots?\n"}
CONVERSATIONS = {
    "text": [{"role": "user", "content": "\n12 + 30? "}],
    "image first": user(IMAGE, QUESTION),
    "image last": user(QUESTION, IMAGE, IMAGE),
    "system": [{"role": "system", "content": "Be brief.\n"}, *user(IMAGE, QUESTION)],
    "system in a list": [{"role": "system", "content": [{"type": "text", "text": " x"}]}, *user(QUESTION)],
    "turns": [*user(IMAGE, QUESTION), {"role": "assistant", "content": " 3 red."}, *user(QUESTION)],
}


def test_ids_are_those_of_the_nano_config(directory, pieces):
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *CONTROL, "\n", "\n\n", "\n\n\n", "\n\n\n\n"]
    assert [pieces.id_to_piece(i) for i in range(13)] == names
    assert [i for i in range(pieces.get_piece_size()) if pieces.is_byte(i)] == list(range(13, 13 + 256))
    assert pieces.get_piece_size() == NANO.vocab_size
    load_tokenizer(directory, NANO)  # which raises where its config names other ids


def test_training_is_deterministic(tmp_path):
    """The same texts, from a list or a generator, give the same file to the byte."""
    train_tokenizer(TASK_TEXTS, tmp_path / "a", 400)
    train_tokenizer((text for text in TASK_TEXTS), str(tmp_path / "b"), 400)
    files = [(tmp_path / name / "tokenizer.model").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    assert SentencePieceProcessor(model_proto=files[0]).get_piece_size() == 400


def test_the_task_takes_few_tokens(tmp_path):
    """A demonstration and its end fit the default length of completions, 56; each digit is one token."""
    train_tokenizer(TASK_TEXTS, tmp_path, NANO.vocab_size)
    tokenizer = load_tokenizer(tmp_path, NANO)
    for example in synthetic("test", 300, 4):
        assert len(tokenizer.encode(demonstration(example))) < 56
    assert len(tokenizer.encode("1234567890")) == 10


@given(texts)
@fuzz
def test_text_survives_and_equals_hugging_face(directory, pieces, processor, text):
    """Spaces, newlines and unseen scripts come back as they were; both ways to load the directory give the same ids."""
    ids = pieces.encode(text)
    assert pieces.decode(ids) == text
    assert processor.tokenizer.encode(text, add_special_tokens=False) == ids
    assert processor.tokenizer.decode(ids) == text
    file = TokenizersFile.from_file(str(directory / "tokenizer.json"))
    assert file.encode(text, add_special_tokens=False).ids == ids
    assert file.encode(text).ids == [NANO.bos_id, *ids]


def test_auto_tokenizer_knows_the_special_tokens(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    assert len(tokenizer) == tokenizer.vocab_size == NANO.vocab_size
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert tokenizer.mask_token is None
    assert tokenizer.image_token_id == NANO.image_token_id
    assert (tokenizer.boi_token_id, tokenizer.eoi_token_id) == (NANO.start_of_image_id, NANO.end_of_image_id)
    assert tokenizer.convert_tokens_to_ids("<end_of_turn>") == NANO.stop_ids[1]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=True) == (
        "user\nx\nmodel\n"
    )


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_conversations_equal_ours(directory, processor, messages, add_generation_prompt):
    """Template and ids, image blocks included."""
    ours = load_tokenizer(directory, NANO)
    text = processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
    assert text == ours.render_chat(messages, add_generation_prompt=add_generation_prompt)
    images = [Image.new("RGB", (9, 7))] * text.count("<start_of_image>")
    inputs = processor(text=text, images=[images] if images else None, add_special_tokens=False)
    assert inputs["input_ids"][0] == ours.encode_chat(messages, add_generation_prompt=add_generation_prompt)


@pytest.mark.parametrize("roles", ["assistant", "user user", "user assistant assistant"])
def test_the_template_refuses_roles_that_do_not_alternate(processor, roles):
    with pytest.raises(TemplateError, match="alternate"):
        processor.apply_chat_template([{"role": role, "content": "x"} for role in roles.split()])


def test_images_equal_ours(processor):
    """The image processor squashes and scales an image of another size to the pixels that image.py gives."""
    noise = np.random.default_rng(0).integers(0, 256, (51, 37, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    theirs = processor.image_processor(image)["pixel_values"][0]
    pixels = load_image(image, NANO.vision.image_size)
    np.testing.assert_allclose(theirs.transpose(1, 2, 0), pixels / 127.5 - 1, atol=1e-6)


def test_nanos_own_files_are_made_again_byte_for_byte(tmp_path):
    """By training from nothing on the embedded task: nano's tokenizer was made from its texts."""
    new_nano(tmp_path, synthetic("train", SYNTHETIC_SIZE, 0, teacher="hasty"), seed=0)
    expected = files_beside_weights("nano")
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"} < {path.name for path in expected}
    assert [path.name for path in files_beside_weights(tmp_path)] == [path.name for path in expected]
    for path in expected:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_files_are_plain_json_and_the_same_each_time(directory, tmp_path):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    write_hugging_face_files(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    vocabulary = json.loads(before["tokenizer.json"])["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(NANO.vocab_size))


@pytest.mark.parametrize("vocab_size", [270, 5000])
def test_a_size_that_the_texts_do_not_fit_is_named(tmp_path, vocab_size):
    with pytest.raises(ValueError, match=f"no tokenizer of {vocab_size} pieces can be made of these texts"):
        train_tokenizer(TASK_TEXTS, tmp_path, vocab_size)
    assert not (tmp_path / "tokenizer.model").exists()
