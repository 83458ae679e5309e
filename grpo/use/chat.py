"""Talking to a model in the terminal: answers as they are drawn, reasoning and answer apart, and the turns of a chat.

Rests on rich. How a question is worded, and how a picture is read, is the caller's.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from gemma3.config import Config
from gemma3.lora import Lora
from gemma3.model import Params
from gemma3.sample import OnToken, Sampling
from gemma3.tokenizer import Tokenizer
from grpo.rollout import Prompt, Rollout, place_prompts, roll_out

_SHORTEST = 64  # tokens: prompts are padded to this, or to a power of two
# What moves a terminal's cursor, colours it, or turns the direction of its text; tab and newline may.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_STYLES = {"reasoning": "dim", "answer": "bold", "": ""}
_HELP = """/image PATH   show a picture with your next message; several are shown in order
/reset        forget the conversation so far
/help         list the commands
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclass(frozen=True)
class Answerer:
    """A model, and how it is to answer."""

    params: Params
    lora: Lora | None
    config: Config
    tokenizer: Tokenizer
    mesh: Mesh
    sampling: Sampling
    seed: int
    max_prompt_length: int  # tokens of a whole conversation
    max_completion_length: int  # tokens of one answer


class Room(NamedTuple):
    """What a batch of prompts is padded to. Each size is compiled once, so there are few of them."""

    tokens: int
    pictures: int


class Answer(NamedTuple):
    text: str
    finished: bool  # by itself, not at the length limit


def room_for(tokens: int, pictures: int, limit: int) -> Room:
    """Room for prompts of at most so many tokens and pictures; ValueError for more than `limit` tokens."""
    if tokens > limit:
        raise ValueError(f"the prompt has {tokens} tokens, more than --max-prompt-length {limit}")
    padded = max(_SHORTEST, 1 << (tokens - 1).bit_length())
    return Room(min(padded, limit), 1 << (pictures - 1).bit_length() if pictures else 0)


def draw(
    answerer: Answerer, prompts: Sequence[Prompt], index: Sequence[int], room: Room, on_token: OnToken | None = None
) -> Rollout:
    """One completion of each prompt. `index` keys each one's randomness: it does not depend on what is drawn beside it.

    An empty prompt is not answered, and fills a batch up.
    """
    a = answerer
    placed = place_prompts(
        prompts,
        index,
        a.params,
        a.lora,
        config=a.config,
        mesh=a.mesh,
        max_prompt_length=room.tokens,
        max_images=room.pictures,
    )
    rollout = roll_out(
        a.params,
        a.lora,
        placed,
        jax.random.key(a.seed),
        jnp.asarray(~a.tokenizer.never_sampled),
        config=a.config,
        mesh=a.mesh,
        num_generations=1,
        max_completion_length=a.max_completion_length,
        sampling=a.sampling,
        on_token=on_token,
    )
    return jax.block_until_ready(rollout)


def draw_answers(answerer: Answerer, prompts: Sequence[Prompt], index: Sequence[int], room: Room) -> list[Answer]:
    """The answer to each prompt; see `draw`."""
    drawn = jax.device_get(draw(answerer, prompts, index, room))
    rows = zip(drawn.completion_ids[:, 0], drawn.completion_mask[:, 0], drawn.finished[:, 0], strict=True)
    answers = [Answer(answerer.tokenizer.decode(ids[mask]), bool(finished)) for ids, mask, finished in rows]
    return answers[: len(prompts)]


def as_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The pieces by which the text of `tokens` grows; a character whose bytes are several tokens comes whole.

    Everything so far is decoded each time: a piece by itself would lose the space before it.
    """
    ids, shown = [], 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids).rstrip("\ufffd")  # bytes that are no character yet read so
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
    if rest := tokenizer.decode(ids)[shown:]:
        yield rest


class Listener:
    """Hears one answer's tokens in the threads of the devices, for the thread that prints them.

    There is one for a session, since `sample` is compiled for the very function that it calls.
    """

    def __init__(self):
        self.ids: list[int] = []  # of the newest answer, as far as it has come
        self._heard = SimpleQueue()
        self._go_on = True

    def _on_token(self, place, index, tokens) -> np.bool_:
        self._heard.put((int(place), dict(zip(index.tolist(), tokens[:, 0].tolist(), strict=True))))
        return np.bool_(self._go_on)

    def _draw(self, *args) -> None:
        try:
            draw(*args, self._on_token)
        finally:
            self._heard.put(None)

    def _tokens(self, answerer: Answerer, prompt: Prompt, number: int) -> Iterator[int]:
        self.ids, self._heard, self._go_on = [], SimpleQueue(), True
        room = room_for(len(prompt.ids), len(prompt.pictures), answerer.max_prompt_length)
        with ThreadPoolExecutor(1) as pool:
            drawn = pool.submit(self._draw, answerer, [prompt], [number], room)
            try:
                while (heard := self._heard.get()) is not None:
                    place, tokens = heard
                    # Every device reports, those that hold a part of this row the same token.
                    if place == len(self.ids) and number in tokens:
                        self.ids.append(tokens[number])
                        yield tokens[number]
            finally:
                self._go_on = False
            drawn.result()

    def stream(self, answerer: Answerer, prompt: Prompt, number: int) -> Iterator[str]:
        """The answer's text, piece by piece as it is drawn; closed early, no more of it is drawn.

        number: what keys the randomness, from 1 on.
        """
        with closing(self._tokens(answerer, prompt, number)) as tokens:
            yield from as_text(tokens, answerer.tokenizer)


def sections(pieces: Iterable[str], tags: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Cut streamed text at its tags: pairs of "reasoning", "answer" or "" (outside of both) and a piece of text.

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
    """(what stands between the reasoning tags, what between the answer tags or None where there are none)."""
    parts: dict[str, str] = {}
    for kind, piece in sections([text], tags):
        parts[kind] = parts.get(kind, "") + piece
    answer = parts.get("answer")
    return parts.get("reasoning", "").strip(), None if answer is None else answer.strip()


def clean(text: str) -> str:
    """Text that a terminal takes for text: control characters read U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


def say(console: Console, text: str, style: str = "", end: str = "\n") -> None:
    console.print(Text(clean(text), style=style), end=end, soft_wrap=True)


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


def speak(
    console: Console, listener: Listener, answerer: Answerer, prompt: Prompt, number: int, tags: tuple[str, str]
) -> None:
    """Print the answer to one prompt as it is drawn, and a line if it was cut."""
    with closing(listener.stream(answerer, prompt, number)) as pieces:
        with console.status(Text("the first answer of each length waits for the compiler", style="dim")):
            first = next(pieces, "")
        show(console, itertools.chain([first], pieces), tags)
    say_if_cut(console, listener.ids[-1] in answerer.config.stop_ids, answerer.max_completion_length)


def say_if_cut(console: Console, finished: bool, length: int) -> None:
    if not finished:
        say(console, f"(cut at {length} tokens; --max-completion-length {2 * length} would let it go on)", "yellow")


def spelled(name: str, sampling: Sampling) -> str:
    """A strategy by its name and in numbers."""
    parts = [f"temperature {sampling.temperature:g}"]
    parts += [f"top-k {sampling.top_k}"] if sampling.top_k else []
    parts += [f"top-p {sampling.top_p:g}"] if sampling.top_p < 1 else []
    return f"{name}: {', '.join(parts)}"


def show_picture(console: Console, pixels: np.ndarray) -> None:
    """A picture uint8[h, w, 3] in a terminal of many colours, two pixels to a character; elsewhere nothing."""
    if not console.is_terminal or console.no_color or console.color_system not in ("256", "truecolor"):
        return
    image = Image.fromarray(pixels)
    image.thumbnail((32, 32))
    rows = np.asarray(image)[: image.height // 2 * 2]
    for upper, lower in zip(rows[::2], rows[1::2], strict=True):
        line = Text()
        for front, back in zip(upper, lower, strict=True):
            line.append("▀", Style(color=Color.from_rgb(*front), bgcolor=Color.from_rgb(*back)))
        console.print(line)


@dataclass
class Conversation:
    """What was said so far, and the pictures that wait for the next message."""

    messages: list[dict] = field(default_factory=list)
    views: list[list[np.ndarray]] = field(default_factory=list)  # of each picture: itself, then its crops if any
    attached: list[list[np.ndarray]] = field(default_factory=list)


def extended(talk: Conversation, question: str, ask: Callable[[str, int], list[dict]]) -> Conversation:
    """The conversation with the next question and the pictures that waited for it."""
    if talk.messages:
        pictures = [{"type": "image"}] * len(talk.attached)
        added = [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]
    else:
        added = ask(question, len(talk.attached))
    return Conversation(talk.messages + added, talk.views + talk.attached)


def encoded(talk: Conversation, answerer: Answerer) -> Prompt:
    """The whole conversation as the prompt of the next answer; ValueError where it is too long."""
    crops = [len(views) - 1 for views in talk.views]
    ids = answerer.tokenizer.encode_chat(talk.messages, crops=crops)
    limit = answerer.max_prompt_length
    if len(ids) > limit:
        raise ValueError(f"the conversation has {len(ids)} tokens, more than {limit}; /reset begins a new one")
    return Prompt(ids, [view for views in talk.views for view in views])


def attach(console: Console, talk: Conversation, path: str, look: Callable[[Path], list[np.ndarray]]) -> None:
    if not path:
        raise ValueError("/image needs the path of a picture, such as /image dots.png")
    views = look(Path(path.strip("'\"")).expanduser())
    show_picture(console, views[0])
    talk.attached.append(views)
    say(console, f"shown with your next message: {path}", "dim")


def chat(
    console: Console,
    answerer: Answerer,
    read_line: Callable[[], str],
    ask: Callable[[str, int], list[dict]],
    look: Callable[[Path], list[np.ndarray]],
    tags: tuple[str, str],
) -> None:
    """Talk until /quit or the end of the input. The whole conversation is the prompt of each answer.

    ask: the messages that begin a conversation, of a question and how many pictures go with it; look: reads a picture,
    with its crops if any. Both, like a mistyped command, may raise ValueError, which is said and forgotten.
    """
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
                attach(console, talk, rest.strip(), look)
            elif command.startswith("/"):
                raise ValueError(f"{command} is no command; /help lists them")
            if not line or command.startswith("/"):
                continue
            asked = extended(talk, line, ask)
            prompt = encoded(asked, answerer)
        except ValueError as error:
            say(console, str(error), "red")
            continue
        try:
            speak(console, listener, answerer, prompt, number, tags)
        except KeyboardInterrupt:
            say(console, "\n(stopped)", "dim")
        said = answerer.tokenizer.decode(listener.ids)
        if not said.strip() and talk.messages:
            say(console, "/reset begins anew: a model that was taught single questions may need it", "dim")
        talk = replace(asked, messages=[*asked.messages, {"role": "assistant", "content": said}])


def labels(name: str, several: bool, strategies: Mapping[str, Sampling]) -> Iterator[tuple[str, Sampling]]:
    """For each strategy what its answers are headed by: the model where there are several, the strategy in numbers."""
    for strategy, sampling in strategies.items():
        yield (f"{name}, " if several else "") + spelled(strategy, sampling), sampling


def answer_prompt(
    console: Console,
    answerers: Iterable[tuple[str, Answerer]],
    strategies: Mapping[str, Sampling],
    prompt: Prompt,
    tags: tuple[str, str],
    *,
    several: bool,
) -> None:
    """Print what each model, in each way of sampling, says to one prompt."""
    listener = Listener()
    for name, answerer in answerers:
        for i, (label, sampling) in enumerate(labels(name, several, strategies)):
            say(console, ("\n" if i else "") + label, "dim")
            speak(console, listener, replace(answerer, sampling=sampling), prompt, 1, tags)
        if several:
            say(console, "")
        del answerer  # before the next model is read
