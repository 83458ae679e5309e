"""A new small tokenizer of Gemma's kind, and the files with which Hugging Face loads a new model's directory.

Rests on sentencepiece. Needed once, when a model such as nano is made from nothing; published models bring these files.
"""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from gemma3.config import Config

# Ids 0 to 3, as Gemma has them.
PAD, EOS, BOS, UNK = SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
# From id 4, in this order. A prompt has runs of up to four newlines: around an image, after a system message.
CONTROL = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<image_soft_token>", "<end_of_image>")
NEWLINE_RUNS = tuple("\n" * length for length in (1, 2, 3, 4))

# What Tokenizer.render_chat does, in the words of Hugging Face.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set chat = namespace(system="", turns=messages) -%}
{%- if messages[0].role == "system" -%}
  {%- set content = messages[0].content -%}
  {%- set chat.system = (content if content is string else content[0].text) + "\\n\\n" -%}
  {%- set chat.turns = messages[1:] -%}
{%- endif -%}
{%- for turn in chat.turns -%}
  {%- if turn.role != ("assistant" if loop.index0 % 2 else "user") -%}
    {{- raise_exception("roles must alternate user, assistant, user, ...") -}}
  {%- endif -%}
  {{- "<start_of_turn>" + ("model" if turn.role == "assistant" else "user") + "\\n" -}}
  {{- chat.system if loop.first else "" -}}
  {%- if turn.content is string -%}
    {{- turn.content | trim -}}
  {%- else -%}
    {%- for item in turn.content -%}
      {{- "<start_of_image>" if item.type == "image" else item.text | trim -}}
    {%- endfor -%}
  {%- endif -%}
  {{- "<end_of_turn>\\n" -}}
{%- endfor -%}
{{- "<start_of_turn>model\\n" if add_generation_prompt else "" -}}
"""


def train_tokenizer(texts: Iterable[str], directory: Path | str, vocab_size: int) -> None:
    """Write `directory`/tokenizer.model, byte-pair pieces learned from `texts`: the same for the same texts.

    Ids: pad 0, eos 1, bos 2, unk 3, then CONTROL, NEWLINE_RUNS, 256 bytes, the pieces in the order of their merges,
    single characters. As in Gemma's, every digit is a piece of its own, what has no piece is spelled in bytes, and
    text is taken as it is, spaces included. Raises ValueError where `texts` are too few or too many for `vocab_size`.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
            **{"pad_piece": PAD, "eos_piece": EOS, "bos_piece": BOS, "unk_piece": UNK},
            user_defined_symbols=[*CONTROL, *NEWLINE_RUNS],
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} pieces can be made of these texts: {error}") from error
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model.getvalue())


def _merges(pieces: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, the sooner joined first, since sentencepiece scores pieces so."""
    whole = {*SPECIAL, *CONTROL, *NEWLINE_RUNS}  # found in the text first, never joined
    names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size()) if not pieces.is_byte(i)]
    joined = {name for name in names if name not in whole}
    halves = ((name[:i], name[i:]) for name in names if name in joined for i in range(1, len(name)))
    return [pair for pair in halves if joined.issuperset(pair)]


def _tokenizer_json(pieces: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """The same tokenizer in the format of Hugging Face's `tokenizers`, arranged as in the published Gemma."""

    def added(name: str, special: bool) -> dict[str, Any]:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return {"id": pieces.piece_to_id(name), "content": name, **flags, "special": special}

    names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    bos, text = {"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            *(added(name, special=True) for name in (*SPECIAL, *CONTROL)),
            *(added(name, special=False) for name in NEWLINE_RUNS),
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"SpecialToken": {"id": BOS, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [pieces.piece_to_id(BOS)], "tokens": [BOS]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNK,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": _merges(pieces),
        },
    }


def _tokenizer_config(config: Config) -> dict[str, Any]:
    return {
        "tokenizer_class": "GemmaTokenizer",
        "processor_class": "Gemma3Processor",
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "mask_token": None,
        "extra_special_tokens": {"boi_token": CONTROL[2], "image_token": CONTROL[3], "eoi_token": CONTROL[4]},
    }


def _preprocessor_config(config: Config) -> dict[str, Any]:
    """What image.py and vision.py do to a picture: squash it, bilinear, and scale it to [-1, 1]."""
    side = config.vision.image_size
    return {
        "processor_class": "Gemma3Processor",
        "image_processor_type": "Gemma3ImageProcessor",
        "image_seq_length": config.vision.tokens_per_image,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_pan_and_scan": False,
    }


def write_hugging_face_files(directory: Path | str, config: Config) -> None:
    """Write what AutoTokenizer and AutoProcessor read, from the tokenizer.model that `train_tokenizer` left there.

    tokenizer.json, tokenizer_config.json, chat_template.jinja, and for a model with a vision tower
    preprocessor_config.json and processor_config.json.
    """
    directory = Path(directory)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    files = {"tokenizer.json": _tokenizer_json(pieces), "tokenizer_config.json": _tokenizer_config(config)}
    if config.vision is not None:
        files["preprocessor_config.json"] = _preprocessor_config(config)
        files["processor_config.json"] = {
            "processor_class": "Gemma3Processor",
            "image_seq_length": config.vision.tokens_per_image,
        }
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
