"""Examples to prompts: how a question is worded, tokenized and shown, and which examples fit."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.example import Example
from data.files import StoredImage
from data.prompt import messages
from gemma3.image import MAX_CROPS, load_image, pan_and_scan
from gemma3.mesh import Model
from gemma3.tokenizer import Tokenizer
from grpo.run.processes import held_rows


class Prompt(NamedTuple):
    """One prompt as the host holds it."""

    ids: list[int]
    images: list[np.ndarray]  # uint8[h, w, 3], at the model's size


class Row(NamedTuple):
    """An example with its prompt, and its index in the stream it comes from, which keys its randomness."""

    index: int
    example: Example | None  # None if a user typed the prompt, or if it is empty and only fills a batch
    prompt: Prompt | None  # None if another process reads it


@dataclass(frozen=True)
class Reader:
    """Turns an example into what a model reads: one place for wording, tokens, images and their limits."""

    model: Model
    tokenizer: Tokenizer
    wording: str  # one of data.prompt.WORDINGS
    format: str  # a key of data.example.FORMATS
    pan_and_scan: bool = False
    max_prompt_length: int = 512  # P
    max_images: int = 0  # A, in a prompt

    def chat(self, example: Example) -> list[dict]:
        """The chat messages that ask for an example."""
        return messages(example, self.wording, self.format)

    def render(self, example: Example) -> str:
        """The prompt for people to read."""
        return self.tokenizer.render_chat(self.chat(example))

    def length(self, example: Example) -> int:
        """The number of tokens of the prompt. Images are opened only if pan-and-scan has to know their shape."""
        if self.pan_and_scan and example.images:
            return len(self(example).ids)
        return len(self.tokenizer.encode_chat(self.chat(example)))

    def most_images(self, examples: Iterable[Example]) -> int:
        """The most images that one example may show the model; with pan-and-scan each image brings up to 4 crops."""
        return max(len(example.images) for example in examples) * (1 + MAX_CROPS if self.pan_and_scan else 1)

    def views(self, source: Path | StoredImage | bytes, name: str = "the image") -> list[np.ndarray]:
        """What the model is shown of an image: the whole of it and, with pan-and-scan, its crops."""
        if self.model.config.vision is None:
            raise ValueError(f"{name} cannot be shown: this model reads text only")
        size = self.model.config.vision.image_size
        if self.pan_and_scan:
            return pan_and_scan(load_image(source, None, name), size)
        return [load_image(source, size, name)]

    def __call__(self, example: Example) -> Prompt:
        """Tokenize the prompt and decode its images; ValueError names the example if an image cannot be read."""
        views = [self.views(source, f"the image of example {example.id}") for source in example.images]
        ids = self.tokenizer.encode_chat(self.chat(example), crops=[len(of_one) - 1 for of_one in views])
        return Prompt(ids, [view for of_one in views for view in of_one])

    def completion(self, text: str) -> list[int]:
        """The tokens of a completion that was not sampled, with a stop token, as the model would have written it."""
        return [*self.tokenizer.encode(text), self.model.config.stop_ids[-1]]

    def texts(self, ids: np.ndarray, mask: np.ndarray) -> list[list[str]]:
        """The texts [Q][G] of completions: int32[Q, G, C] where the mask is True."""
        decode = self.tokenizer.decode
        return [[decode(i[m]) for i, m in zip(*group, strict=True)] for group in zip(ids, mask, strict=True)]

    def check_length(self, tokens: int) -> None:
        if tokens > self.max_prompt_length:
            raise ValueError(f"the prompt has {tokens} tokens, more than --max-prompt-length {self.max_prompt_length}")

    def that_fit(self, examples: list[Example], name: str) -> tuple[list[Example], int]:
        """Leave out examples whose prompt is too long, and say how many: a prompt is never cut.

        Returns the others, and how many tokens the longest of their prompts has.
        """
        limit, lengths = self.max_prompt_length, [self.length(example) for example in examples]
        fitting = [example for example, length in zip(examples, lengths, strict=True) if length <= limit]
        if len(fitting) < len(examples):
            left_out = len(examples) - len(fitting)
            print(f"{name}: {left_out} of {len(examples)} prompts are longer than {limit} tokens and left out")
        if not fitting:
            raise ValueError(f"{name}: none of {len(examples)} prompts is within --max-prompt-length {limit}; raise it")
        return fitting, max(length for length in lengths if length <= limit)


def rounded_up(length: int, limit: int) -> int:
    """The size that an array of `length` tokens is padded to: 32, 40, 48, 56, 64, 80, 96, 112, 128, ..., or `limit`.

    There are four sizes for each doubling, so at most a fifth is padding. A function is compiled once for each size.
    """
    length = max(length, 32)
    unit = 1 << (length - 1).bit_length() - 3
    return min(-(-length // unit) * unit, limit)


def read_rows(
    examples: Sequence[Example], order: Iterable[int], reader: Reader, batch_size: int, first_index: int = 0
) -> Iterator[Row]:
    """Yield examples in the given order; threads tokenize the next batch of them, and decode its images, in advance.

    A process reads only the rows of a batch that it will hold. The index is counted from `first_index` on, so an
    example that comes again is sampled anew.
    """
    held, stream = held_rows(batch_size, reader.model.mesh), enumerate(order)
    with ThreadPoolExecutor(4) as pool:
        waiting = deque()
        while True:
            for i, which in itertools.islice(stream, 1 + batch_size - len(waiting)):
                prompt = pool.submit(reader, examples[which]) if i % batch_size in held else None
                waiting.append((first_index + i, examples[which], prompt))
            if not waiting:
                return
            index, example, prompt = waiting.popleft()
            yield Row(index, example, prompt and prompt.result())
