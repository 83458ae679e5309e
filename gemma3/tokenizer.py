"""Text to token ids and back, and Gemma's chat turns.

It rests on sentencepiece. Ids equal those of Hugging Face's Gemma tokenizer, chat template and processor, with one
intended difference: text that spells a control token, such as `<end_of_turn>` in a question, stays text.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor

from gemma3.config import Config

_TURN = ("<start_of_turn>", "<end_of_turn>")
_IMAGE = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")

# Text is cut after the "<" of each control string. sentencepiece would match a control string anywhere in a text; but
# now no part holds a whole one, and it is spelled with ordinary pieces.
_INSIDE_CONTROL = re.compile(f"(?<=<)(?={'|'.join(name[1:] for name in _TURN + _IMAGE)})")


class Tokenizer:
    """The tokenizer of one model; immutable, so safe to share between threads.

    A conversation is a list of messages {"role": "system" | "user" | "assistant", "content": ...}. The content is a
    string, or a list of {"type": "text", "text": str} and {"type": "image"} items; other keys of an item are ignored.
    The system message is optional, comes first and is one text; then user and assistant take turns.
    """

    def __init__(self, pieces: SentencePieceProcessor, config: Config):
        """Both from one directory: `files.tokenizer_model.load_tokenizer` reads and checks them."""
        self._pieces, self._config = pieces, config
        self._start_of_turn, self._end_of_turn = (self._pieces.piece_to_id(name) for name in _TURN)
        unk = self._pieces.unk_id()
        image_ids = {self._pieces.piece_to_id(name) for name in _IMAGE} | {config.image_token_id}
        self._prompt_only = {config.pad_id, config.bos_id, unk} | (image_ids - {None})
        self._without_text = self._prompt_only | {self._pieces.eos_id(), self._start_of_turn, self._end_of_turn}

    @property
    def never_sampled(self) -> np.ndarray:
        """bool[V], True on ids that no completion may hold.

        Those are pad, bos, unk, the three image tokens, and the rows past the last piece, which stand for no text.
        """
        mask = np.arange(self._config.vocab_size) >= self._pieces.get_piece_size()
        mask[list(self._prompt_only)] = True
        return mask

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text, without bos.

        Control strings in it are neutralised: `<start_of_turn>`, `<end_of_turn>`, `<start_of_image>`,
        `<image_soft_token>`, `<end_of_image>`, and also `<bos>`, `<eos>` and `<pad>`, are spelled with ordinary pieces.
        So no control id ever comes from text, and `decode` gives the text back. (A literal U+2581 comes back as a
        space: sentencepiece knows no difference.) ValueError if the text has lone surrogates, which are not Unicode.
        """
        # Python encodes the text to bytes: its error for a surrogate shows where, and sentencepiece's does not.
        return [i for part in _INSIDE_CONTROL.split(text) for i in self._pieces.encode(part.encode())]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without control tokens (pad, bos, eos, turns, images) and ids that have no piece.

        A multi-byte character that is incomplete, at the end or elsewhere, becomes U+FFFD. ValueError if an id is
        outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self._config.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary of {self._config.vocab_size} tokens")
        size = self._pieces.get_piece_size()
        return self._pieces.decode([i for i in ids if i < size and i not in self._without_text])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Each id's own piece of text, for people to look at: control tokens by name, lone bytes as "<0xE2>"."""
        size = self._pieces.get_piece_size()
        return [self._pieces.id_to_piece(int(i)).replace("▁", " ") if i < size else f"<{i}>" for i in ids]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the published chat template makes of it, for people to read.

        Do not encode it: in text, a user's control string and a control token look the same.
        """
        parts = self._chat(messages, add_generation_prompt)
        return "".join(part if isinstance(part, str) else self._pieces.id_to_piece(part) for part in parts)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        crops: Sequence[int] | None = None,
    ) -> list[int]:
        """The ids of a conversation, with one bos, and each image as its block of soft tokens.

        `add_generation_prompt` opens the model's turn at the end. `crops` holds, for each image in order, the number of
        crops that image.pan_and_scan made; None means no crops. The soft token blocks are in the order of the images:
        an image, its crops, the next image. ValueError if the roles do not alternate, a message is not of the form
        above, Gemma 2 is given a system message, or a model without a vision tower is given an image.
        """
        parts = self._chat(messages, add_generation_prompt)
        image = self._config.start_of_image_id
        num_images = parts.count(image)
        crops = [0] * num_images if crops is None else crops
        if len(crops) != num_images:
            raise ValueError(f"crops is {list(crops)}; it should hold one number for each of the {num_images} images")
        remaining = iter(crops)
        expanded = []
        for part in parts:
            expanded += self._image_block(next(remaining)) if part == image else [part]
        # Adjacent texts are encoded as one: the newlines around an image merge with those of the text beside it.
        ids = []
        for kind, run in groupby(expanded, key=type):
            same = list(run)
            ids += self.encode("".join(same)) if kind is str else same
        return ids

    def _chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> list[str | int]:
        """The published chat template, as texts (str) and control tokens (ids); an image is a start_of_image id."""
        system = ""
        if messages and messages[0].get("role") == "system":
            system, messages = self._system(messages[0].get("content")), messages[1:]
        if not messages:
            raise ValueError("the conversation has no user message")
        parts = [self._config.bos_id]
        for i, message in enumerate(messages):
            role, name = ("assistant", "model") if i % 2 else ("user", "user")
            if message.get("role") != role:
                raise ValueError(
                    "roles must alternate user, assistant, user, ..., after at most one system message; "
                    f"found {message.get('role')!r} where {role!r} belongs"
                )
            content = self._content(message.get("content"))
            parts += [self._start_of_turn, f"{name}\n", "" if i else system, *content, self._end_of_turn, "\n"]
        if add_generation_prompt:
            parts += [self._start_of_turn, "model\n"]
        return parts

    def _system(self, content: Any) -> str:
        """What precedes the first user text. Unlike every other text, it is not trimmed."""
        if self._config.model_type == "gemma2":
            raise ValueError("Gemma 2 has no system role; put the instructions into the first user message")
        match content:
            case str(text) | [{"type": "text", "text": str(text)}]:
                return text + "\n\n"
        raise ValueError(f"the content of a system message must be one text, not {content!r}")

    def _content(self, content: Any) -> list[str | int]:
        if isinstance(content, str):
            return [content.strip()]
        if not isinstance(content, list | tuple):
            raise ValueError(f"the content of a message must be a string or a list of items, not {content!r}")
        return [self._item(item) for item in content]

    def _item(self, item: Any) -> str | int:
        match item:
            case {"type": "text", "text": str(text)}:
                return text.strip()
            case {"type": "image"}:
                if self._config.vision is None:
                    raise ValueError("a message holds an image, but this model has no vision tower")
                return self._config.start_of_image_id
        raise ValueError(f"an item of a message must be a text with its 'text', or an image, not {item!r}")

    def _image_block(self, num_crops: int) -> list[str | int]:
        """What stands for an image in the prompt, and for its pan-and-scan crops if it has any."""
        config = self._config
        soft_tokens = [config.image_token_id] * config.vision.tokens_per_image
        block = ["\n\n", config.start_of_image_id, *soft_tokens, config.end_of_image_id, "\n\n"]
        if not num_crops:
            return block
        crops = [" ", *block] * num_crops
        return ["Here is the original image ", *block, " and here are some crops to help you see better", *crops]
