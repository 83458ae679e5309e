"""Talk to a model in the terminal: answers printed as they are sampled, reasoning and answer apart, turns of a chat.

Built on rich.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from data.example import FORMATS, Example
from gemma3.filters import Sampling
from gemma3.lora import Policy
from gemma3.sample import Completions, OnToken
from gemma3.tokenizer import Tokenizer
from grpo.pages.story import half_blocks
from grpo.reader import Prompt, Reader, Row, rounded_up
from grpo.rollout import put_prompts, roll_out

# Characters that move a terminal's cursor, colour it, or turn the direction of its text; tab and newline may stay.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_STYLES = {"reasoning": "dim", "answer": "bold", "": ""}
_HELP = """/image PATH   show an image with your next message; several are shown in order
/reset        forget the conversation so far
/help         list the commands
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer"""


class Answerer(NamedTuple):
    """A policy, how it reads questions, and how its answers are sampled."""

    policy: Policy
    reader: Reader
    sampling: Sampling
    seed: int


class Answer(NamedTuple):
    text: str
    finished: bool  # it ended by itself, not at the length limit


def with_room(reader: Reader, tokens: int, images: int) -> Reader:
    """A copy of the reader for prompts of at most so many tokens and images; ValueError for more tokens than it takes.

    Each size is compiled once, so there are only a few sizes.
    """
    reader.check_length(tokens)
    room = rounded_up(tokens, reader.max_prompt_length)
    most_images = 1 << (images - 1).bit_length() if images else 0
    return replace(reader, max_prompt_length=room, max_images=most_images)


def answer(
    answerer: Answerer, prompts: Sequence[Prompt], first_index: int, on_token: OnToken | None = None
) -> Completions:
    """One completion of each prompt. A prompt's index, counted from `first_index`, keys its randomness: its answer does
    not depend on what is sampled beside it. An empty prompt gets no answer; it only fills up a batch.
    """
    policy, reader, sampling, seed = answerer
    rows = [Row(index, None, prompt) for index, prompt in enumerate(prompts, first_index)]
    batch = put_prompts(policy, rows, reader)
    completions = roll_out(policy, batch, jax.random.key(seed), reader, sampling=sampling, on_token=on_token)
    return jax.block_until_ready(completions)


def answers(answerer: Answerer, prompts: Sequence[Prompt], first_index: int) -> list[Answer]:
    """The answer to each prompt; see `answer`."""
    ids, mask, _, finished = jax.device_get(answer(answerer, prompts, first_index))
    texts = answerer.reader.texts(ids, mask)
    return [Answer(text, bool(ended)) for (text,), (ended,), _ in zip(texts, finished, prompts, strict=False)]


def as_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of `tokens`, piece by piece as it grows; a character whose bytes are several tokens comes whole.

    All tokens so far are decoded each time: a token decoded by itself would lose the space before it.
    """
    ids, shown = [], 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids).rstrip("\ufffd")  # an incomplete character decodes to this
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
    if rest := tokenizer.decode(ids)[shown:]:
        yield rest


class Listener:
    """Hears one answer's tokens in the threads of the devices, and passes them to the thread that prints them.

    A session has only one listener: `sample` is compiled for the function that it calls, and again for another one.
    """

    def __init__(self):
        self.ids: list[int] = []  # the tokens of the newest answer so far
        self._heard = SimpleQueue()
        self._go_on = True

    def _on_token(self, t, index, tokens) -> np.bool_:
        self._heard.put((int(t), dict(zip(index.tolist(), tokens[:, 0].tolist(), strict=True))))
        return np.bool_(self._go_on)

    def _tokens(self, answerer: Answerer, prompt: Prompt, number: int) -> Iterator[int]:
        self.ids, self._heard, self._go_on = [], SimpleQueue(), True
        answerer = answerer._replace(reader=with_room(answerer.reader, len(prompt.ids), len(prompt.images)))
        with ThreadPoolExecutor(1) as pool:
            sampled = pool.submit(answer, answerer, [prompt], number, self._on_token)
            sampled.add_done_callback(lambda _: self._heard.put(None))
            try:
                while (heard := self._heard.get()) is not None:
                    t, tokens = heard
                    # Every device reports; those that hold parts of this row report the same token.
                    if t == len(self.ids) and number in tokens:
                        self.ids.append(tokens[number])
                        yield tokens[number]
            finally:
                self._go_on = False
            sampled.result()

    def stream(self, answerer: Answerer, prompt: Prompt, number: int) -> Iterator[str]:
        """The answer's text, piece by piece as it is sampled; sampling stops if the iterator is closed early.

        number: the prompt's index, which keys its randomness; from 1 on.
        """
        with closing(self._tokens(answerer, prompt, number)) as tokens:
            yield from as_text(tokens, answerer.reader.tokenizer)


def sections(pieces: Iterable[str], tags: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Cut streamed text at its tags into pairs (kind, piece of text): "reasoning", "answer", or "" outside of both.

    tags: the names of the reasoning tag and the answer tag.
    """
    inside = {f"<{tag}>": kind for tag, kind in zip(tags, ("reasoning", "answer"), strict=True)}
    after = inside | {f"</{tag}>": "" for tag in tags}
    any_tag = re.compile("|".join(map(re.escape, after)))
    kind, waiting = "", ""
    for piece in itertools.chain(pieces, [None]):
        waiting += piece or ""
        while found := any_tag.search(waiting):
            yield kind, waiting[: found.start()]
            kind, waiting = after[found[0]], waiting[found.end() :]
        # The beginning of a tag waits for the rest of it.
        begun = waiting.rfind("<")
        if piece is None or begun < 0 or not any(tag.startswith(waiting[begun:]) for tag in after):
            begun = len(waiting)
        yield kind, waiting[:begun]
        waiting = waiting[begun:]


def apart(text: str, tags: tuple[str, str]) -> tuple[str, str | None]:
    """(the text between the reasoning tags, the text between the answer tags or None if there are none)."""
    parts: dict[str, str] = {}
    for kind, piece in sections([text], tags):
        parts[kind] = parts.get(kind, "") + piece
    answer = parts.get("answer")
    return parts.get("reasoning", "").strip(), None if answer is None else answer.strip()


def say(console: Console, text: str, style: str = "", end: str = "\n") -> None:
    """Print text with U+FFFD in place of control characters, so that a terminal only prints it."""
    console.print(Text(_CONTROL.sub("\ufffd", text), style=style), end=end, soft_wrap=True)


def show(console: Console, pieces: Iterable[str], tags: tuple[str, str]) -> None:
    """Print an answer as it comes, reasoning and answer under their names, without the white space around them."""
    last, blank = None, ""
    for kind, piece in sections(pieces, tags):
        if kind != last:
            piece, blank = piece.lstrip(), ""
            if not piece:
                continue
            if last is not None:
                say(console, "")
            if kind:
                say(console, f"{kind:<11}", "cyan", end="")
            last = kind
        piece = blank + piece
        text = piece.rstrip()
        blank = piece[len(text) :]
        say(console, text, _STYLES[kind], end="")
    say(console, "(it says nothing)" if last is None else "", "dim")


def speak(console: Console, listener: Listener, answerer: Answerer, prompt: Prompt, number: int) -> None:
    """Print the answer to one prompt as it is sampled, and a line if it was cut."""
    reader = answerer.reader
    with closing(listener.stream(answerer, prompt, number)) as pieces:
        with console.status(Text("the first answer of each length waits for the compiler", style="dim")):
            first = next(pieces, "")
        show(console, itertools.chain([first], pieces), FORMATS[reader.format])
    finished = listener.ids[-1] in reader.model.config.stop_ids
    say_if_cut(console, finished, answerer.sampling.max_completion_length)


def say_if_cut(console: Console, finished: bool, length: int) -> None:
    if not finished:
        say(console, f"(cut at {length} tokens; --max-completion-length {2 * length} would let it go on)", "yellow")


def spelled(name: str, sampling: Sampling) -> str:
    """A strategy by its name and in numbers."""
    parts = [f"temperature {sampling.temperature:g}"]
    parts += [f"top-k {sampling.top_k}"] if sampling.top_k else []
    parts += [f"top-p {sampling.top_p:g}"] if sampling.top_p < 1 else []
    return f"{name}: {', '.join(parts)}"


def show_image(console: Console, pixels: np.ndarray) -> None:
    """Print an image uint8[h, w, 3] if the terminal has many colours."""
    if console.is_terminal and not console.no_color and console.color_system in ("256", "truecolor"):
        console.print(half_blocks(pixels))


@dataclass
class Conversation:
    """What was said so far, and the images that wait for the next message."""

    messages: list[dict] = field(default_factory=list)
    views: list[list[np.ndarray]] = field(default_factory=list)  # for each image: the image, then its crops if any
    attached: list[list[np.ndarray]] = field(default_factory=list)


def asked(text: str, images: Sequence[Path | bytes]) -> Example:
    """What a user asks, as an example that a reader can word."""
    return Example("asked", text, "", images=tuple(images))


def extended(talk: Conversation, question: str, reader: Reader) -> Conversation:
    """The conversation with the next question and the images that waited for it."""
    if talk.messages:
        images = [{"type": "image"}] * len(talk.attached)
        added = [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]
    else:
        added = reader.chat(asked(question, [b""] * len(talk.attached)))
    return Conversation(talk.messages + added, talk.views + talk.attached)


def encoded(talk: Conversation, reader: Reader) -> Prompt:
    """The whole conversation as the prompt of the next answer; ValueError where it is too long."""
    crops = [len(views) - 1 for views in talk.views]
    ids, limit = reader.tokenizer.encode_chat(talk.messages, crops=crops), reader.max_prompt_length
    if len(ids) > limit:
        raise ValueError(f"the conversation has {len(ids)} tokens, more than {limit}; /reset begins a new one")
    return Prompt(ids, [view for views in talk.views for view in views])


def attach(console: Console, talk: Conversation, path: str, reader: Reader) -> None:
    if not path:
        raise ValueError("/image needs the path of an image, such as /image dots.png")
    views = reader.views(Path(path.strip("'\"")).expanduser())
    show_image(console, views[0])
    talk.attached.append(views)
    say(console, f"shown with your next message: {path}", "dim")


def chat(console: Console, answerer: Answerer, read_line: Callable[[], str]) -> None:
    """Talk until /quit or the end of the input. The whole conversation is the prompt of each answer.

    If a command or an image is wrong, the error is printed and the chat goes on.
    """
    reader = answerer.reader
    listener, talk = Listener(), Conversation()
    say(console, "/help lists the commands", "dim")
    for number in itertools.count(1):
        try:
            line = read_line().strip()
        except EOFError:
            say(console, "")
            return
        except KeyboardInterrupt:
            say(console, "\n/quit or Ctrl-D leaves", "dim")
            continue
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/reset":
                talk = Conversation()
                say(console, "a new conversation", "dim")
            elif command == "/help":
                say(console, _HELP, "dim")
            elif command == "/image":
                attach(console, talk, rest.strip(), reader)
            elif command.startswith("/"):
                raise ValueError(f"{command} is no command; /help lists them")
            if not line or command.startswith("/"):
                continue
            longer = extended(talk, line, reader)
            prompt = encoded(longer, reader)
        except ValueError as error:
            say(console, str(error), "red")
            continue
        try:
            speak(console, listener, answerer, prompt, number)
        except KeyboardInterrupt:
            say(console, "\n(stopped)", "dim")
        said = reader.tokenizer.decode(listener.ids)
        if not said.strip() and talk.messages:
            say(console, "/reset starts anew, which a model trained on single questions may need", "dim")
        talk = replace(longer, messages=[*longer.messages, {"role": "assistant", "content": said}])
