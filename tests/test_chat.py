"""Streamed answers equal sampled ones, on every mesh; reasoning and answer apart; the turns and commands of a chat."""

import errno
import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from data.example import FORMATS, Example
from data.prompt import messages
from data.synthetic import draw_dots
from gemma3.config import layer_pattern
from gemma3.files.hub import resolve
from gemma3.files.published import NANO
from gemma3.files.tokenizer_model import load_tokenizer
from gemma3.filters import Sampling
from gemma3.image import load_image
from gemma3.lora import Policy
from gemma3.mesh import Model, make_mesh
from gemma3.params import init_params
from gemma3.sample import sample
from gemma3.tokenizer import Tokenizer
from grpo.reader import Prompt, Reader
from grpo.use import chat as chatting
from grpo.use.chat import (
    Answerer,
    Listener,
    answers,
    apart,
    as_text,
    chat,
    encoded,
    sections,
    show,
    spelled,
    with_room,
)
from reward.format import read_answer, read_reasoning

TAGS = FORMATS["answer"]
STORY = "Ann has 5 coins and gets 4 more. How many coins now?"
DOTS = "How many red dots are there?"


@cache
def nano_tokenizer() -> Tokenizer:
    return load_tokenizer(resolve("nano"), NANO)


def answerer_on(*shape: int) -> Answerer:
    """A model with one local and one global layer and random weights: its answers are long and have many lone bytes."""
    config = replace(NANO, num_layers=2, layer_types=layer_pattern(2, 2))
    reader = Reader(Model(config, make_mesh(*shape)), nano_tokenizer(), "instructed", "answer")
    policy = Policy(init_params(jax.random.key(0), config))
    return Answerer(policy, reader, Sampling(max_completion_length=150), seed=3)


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return answerer_on(1, 1)


def in_room(answerer: Answerer, tokens: int, images: int = 0) -> Answerer:
    return answerer._replace(reader=with_room(answerer.reader, tokens, images))


def asked(answerer: Answerer, question: str, *images: bytes) -> Prompt:
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    ids = answerer.reader.tokenizer.encode_chat([{"role": "user", "content": parts}])
    return Prompt(ids, [load_image(image, 32) for image in images])


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_the_streamed_pieces_joined_are_the_answer(shape):
    """With and without an image; on four devices the listener hears each token four times."""
    answerer, listener = answerer_on(*shape), Listener()
    for number, prompt in enumerate([asked(answerer, STORY), asked(answerer, DOTS, draw_dots(3, 2, Random(0)))], 1):
        pieces = list(listener.stream(answerer, prompt, number))
        (answer,) = answers(in_room(answerer, len(prompt.ids), len(prompt.images)), [prompt], number)
        assert len(pieces) > 3 and "".join(pieces) == answer.text
        assert answer.finished == (listener.ids[-1] in answerer.reader.model.config.stop_ids)


def test_turns_of_one_padded_length_are_compiled_once(answerer):
    listener, sizes = Listener(), []
    for number, question in enumerate([STORY, "How many?", DOTS], start=1):
        "".join(listener.stream(answerer, asked(answerer, question), number))
        sizes.append(sample._cache_size())
    assert sizes[0] == sizes[1] == sizes[2]


def test_what_is_sampled_does_not_depend_on_the_batch_or_its_padding(answerer):
    """Three prompts in one batch, with more padding, get the same answers as each alone; another seed gives others."""
    prompts = [asked(answerer, question) for question in (STORY, DOTS, STORY)]
    together = answers(in_room(answerer, 100), [*prompts, Prompt([], [])], 0)
    alone = [answers(in_room(answerer, 40), [p], i)[0] for i, p in enumerate(prompts)]
    assert together[:3] == alone
    other = in_room(answerer, 40)._replace(seed=4, sampling=replace(answerer.sampling, temperature=3.0))
    assert answers(other, prompts[:1], 0) != answers(other._replace(seed=5), prompts[:1], 0)


class SlowListener(Listener):
    def _on_token(self, *args):
        time.sleep(0.03)
        return super()._on_token(*args)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_an_answer_that_nobody_hears_to_its_end_is_not_sampled_to_its_end(shape):
    """The next answer is whole again."""
    answerer, listener = answerer_on(*shape), SlowListener()
    prompt = asked(answerer, STORY)
    with closing(listener.stream(answerer, prompt, 1)) as pieces:
        next(pieces)
    sampled = len(listener.ids)
    while (heard := listener._heard.get()) is not None:
        sampled = max(sampled, 1 + heard[0])
    whole = "".join(listener.stream(answerer, prompt, 1))
    assert sampled < len(listener.ids)
    assert whole == answers(in_room(answerer, 40), [prompt], 1)[0].text


def test_an_error_while_sampling_reaches_the_one_who_listens(answerer):
    with pytest.raises(ValueError, match="row 0 has 1 images and 0 image tokens"):
        list(Listener().stream(answerer, asked(answerer, STORY)._replace(images=[np.zeros((32, 32, 3), "u1")]), 1))


@given(st.text(max_size=12), st.data())
def test_no_piece_of_text_ends_within_a_character(text, data):
    """Text is spelled in whole pieces and in lone bytes; bytes that never form a character are shown at the end."""
    tokenizer = nano_tokenizer()
    ids = tokenizer.encode(text)
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    pieces = list(as_text(ids, tokenizer))
    assert "".join(pieces) == tokenizer.decode(ids) and all(pieces)
    assert not any("\ufffd" in piece for piece in pieces[:-1]) or "\ufffd" in text


def test_the_space_before_a_word_is_kept(answerer):
    tokenizer = answerer.reader.tokenizer
    assert list(as_text(tokenizer.encode(" 5 € and é"), tokenizer)) == [" ", "5", " ", "€", " and", " ", "é"]


TAGGED = st.lists(
    st.sampled_from(["<reasoning>", "</reasoning>", "<answer>", "</answer>", "<", "</", "answer>", " a", "b\n", "é"]),
    max_size=9,
).map("".join)


def joined(pieces) -> list[tuple[str, str]]:
    """Neighbouring pieces of one kind are joined, empty ones left out."""
    parts: list[tuple[str, str]] = []
    for kind, piece in pieces:
        if piece and parts and parts[-1][0] == kind:
            parts[-1] = (kind, parts[-1][1] + piece)
        elif piece:
            parts.append((kind, piece))
    return parts


@given(TAGGED, st.data())
def test_where_text_is_cut_into_pieces_does_not_matter(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert joined(sections(pieces, TAGS)) == joined(sections([text], TAGS))


def test_text_before_a_tag_that_turns_out_to_be_none_is_shown_late_but_shown():
    assert joined(sections(["1 <", " 2 </ans", "wers"], TAGS)) == [("", "1 < 2 </answers")]
    assert next(sections(["a <rea"], TAGS)) == ("", "a ")


@pytest.mark.parametrize(
    "text",
    ["<reasoning>2+2</reasoning>\n<answer> 4 </answer>", "<reasoning>so</reasoning>", "4", "<answer>4</answer>."],
)
def test_reasoning_and_answer_are_those_that_the_reward_reads(text):
    assert apart(text, TAGS) == (read_reasoning(text), read_answer(text))


def shown(*pieces: str, **options) -> str:
    file = io.StringIO()
    show(Console(file=file, highlight=False, width=40, **options), pieces, TAGS)
    return file.getvalue()


def test_reasoning_and_answer_stand_apart():
    assert (
        shown("<reasoning>\n2+", "2 is [b] </rea", "soning>\n\n<answer>4</ans", "wer>\n")
        == "reasoning  2+2 is [b]\nanswer     4\n"
    )
    assert shown("just", " text\n") == "just text\n" and shown("") == "(it says nothing)\n"
    assert "\x1b[1m4\x1b[0m" in shown("<answer>4</answer>", force_terminal=True, color_system="standard")


def test_an_answer_cannot_steer_the_terminal():
    """Escape, carriage return and a change of text direction are shown as replacement characters."""
    assert shown("a\x1b[2Jb\rc\u202ed\x9b1me\tf") == "a\ufffd[2Jb\ufffdc\ufffdd\ufffd1me  f\n"


def test_a_strategy_is_spelled_in_numbers():
    assert spelled("greedy", Sampling(0.0)) == "greedy: temperature 0"
    assert spelled("mine", Sampling(0.5, 7, 0.25)) == "mine: temperature 0.5, top-k 7, top-p 0.25"


def test_rooms_are_few_and_have_a_limit(answerer):
    reader = replace(answerer.reader, max_prompt_length=500)
    lengths = [with_room(reader, tokens, 0).max_prompt_length for tokens in (1, 64, 65, 257, 500)]
    assert lengths == [32, 64, 80, 320, 500]
    assert [with_room(reader, 9, images).max_images for images in (0, 1, 2, 3, 5)] == [0, 1, 2, 4, 8]
    with pytest.raises(ValueError, match="the prompt has 501 tokens, more than --max-prompt-length 500"):
        with_room(reader, 501, 0)


@pytest.fixture
def talk(answerer, monkeypatch, tmp_path):
    """Run a chat with these input lines and made-up answers; return what it printed and the prompts it answered."""
    (tmp_path / "a.png").write_bytes(draw_dots(1, 2, Random(0)))
    monkeypatch.chdir(tmp_path)

    def talk(*lines: str, limit: int = 512, stopped: bool = False, says: str = "") -> tuple[str, list[Prompt]]:
        prompts, left, file = [], iter(lines), io.StringIO()

        def stream(listener, answerer, prompt, number):
            prompts.append(prompt)
            text = says or f"<answer>{len(prompts)}</answer>"
            listener.ids = [*answerer.reader.tokenizer.encode(text), answerer.reader.model.config.stop_ids[-1]]
            yield answerer.reader.tokenizer.decode(listener.ids)
            if stopped:
                raise KeyboardInterrupt

        def read_line() -> str:
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr(Listener, "stream", stream)
        limited = answerer._replace(reader=replace(answerer.reader, max_prompt_length=limit))
        chat(Console(file=file, highlight=False), limited, read_line)
        return file.getvalue(), prompts

    return talk


def test_the_whole_conversation_is_the_prompt_of_each_answer(talk, answerer):
    """The prompt has all images, and the instruction once, at the front; a reset forgets all of it."""
    printed, (first, second, third) = talk(
        "/image a.png", " one ", "/image 'a.png'", "/image a.png", "two", "/reset", "x"
    )
    image = {"type": "image"}
    (begun,) = messages(Example("", "one", "", images=(b"",)))
    turns = [begun]
    assert first.ids == answerer.reader.tokenizer.encode_chat(turns) and len(first.images) == 1
    turns += [
        {"role": "assistant", "content": "<answer>1</answer>"},
        {"role": "user", "content": [image, image, {"type": "text", "text": "two"}]},
    ]
    assert second.ids == answerer.reader.tokenizer.encode_chat(turns) and len(second.images) == 3
    assert third.ids == answerer.reader.tokenizer.encode_chat(messages(Example("", "x", ""))) and not third.images
    assert [line for line in printed.splitlines() if line.startswith("answer")] == [
        f"answer     {i}" for i in (1, 2, 3)
    ]


def test_bad_input_is_answered_by_a_sentence_and_the_talk_goes_on(talk):
    printed, prompts = talk("/images a.png", "/image", "/image none.png", "", "/help", "one", "/quit", "never")
    assert "/images is no command; /help lists them\n" in printed
    assert "/image needs the path of an image, such as /image dots.png\n" in printed
    assert re.search(r"^none\.png cannot be read: No such file or directory$", printed, re.MULTILINE)
    assert "/reset        forget the conversation so far\n" in printed
    assert len(prompts) == 1 and printed.endswith("answer     1\n")


def test_an_answer_that_is_stopped_counts_as_far_as_it_came(talk, answerer):
    """Ctrl-C during an answer does not end the talk, and the part that was shown counts as said."""
    printed, (first, second) = talk("one", "two", stopped=True)
    assert printed.count("(stopped)\n") == 2
    begun = answerer.reader.tokenizer.decode(first.ids)
    assert answerer.reader.tokenizer.decode(second.ids).startswith(begun + "<answer>1</answer>")


def test_silence_in_a_long_talk_hints_at_a_reset(talk):
    """A model that was taught single questions may fall silent in a talk; after the first question there is no hint."""
    printed, _ = talk("one", "two", says=" ")
    assert printed.splitlines()[1:] == [
        "(it says nothing)",
        "(it says nothing)",
        "/reset starts anew, which a model trained on single questions may need",
        "",
    ]


def test_a_conversation_that_grows_too_long_is_refused_until_it_is_reset(talk):
    printed, prompts = talk("one", "two " * 40, "three", "/reset", "four", limit=120)
    assert re.search(r"the conversation has \d+ tokens, more than 120; /reset begins a new one\n", printed)
    assert len(prompts) == 3 and len(prompts[1].ids) > len(prompts[0].ids) > len(prompts[2].ids) - 5


def test_an_image_is_drawn_in_a_terminal_of_many_colours_only():
    pixels = np.zeros((6, 4, 3), np.uint8)
    pixels[1, 2] = (1, 2, 3)
    for options, lines in (({"color_system": "truecolor", "force_terminal": True}, 3), ({}, 0)):
        console = Console(file=io.StringIO(), **options)
        chatting.show_image(console, pixels)
        assert console.file.getvalue().count("\n") == lines
    console = Console(file=io.StringIO(), color_system="truecolor", force_terminal=True, no_color=False)
    chatting.show_image(console, pixels)
    assert "\x1b[38;2;0;0;0;48;2;1;2;3m▀" in console.file.getvalue()


def test_the_images_of_a_conversation_are_given_with_their_crops(answerer):
    """They come in the order of the tokens that stand for them."""
    whole, crop = np.zeros((32, 32, 3), np.uint8), np.ones((32, 32, 3), np.uint8)
    talk = chatting.Conversation(
        [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], [[whole], [whole, crop, crop]]
    )
    prompt = encoded(talk, answerer.reader)
    assert [int(image[0, 0, 0]) for image in prompt.images] == [0, 0, 1, 1]
    config = answerer.reader.model.config
    assert prompt.ids.count(config.image_token_id) == 4 * config.vision.tokens_per_image


# Takes control of its terminal, so that Ctrl-C there reaches it, even if the tests ignore Ctrl-C (as they do in the
# background). Then it becomes the wanted program.
TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Terminal:
    """A Python program under a pseudo-terminal, as a person sees it."""

    def __init__(self, *arguments: str):
        self.seen = ""
        self._terminal, theirs = pty.openpty()
        settings = {"JAX_PLATFORMS": "cpu", "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if name != "NO_COLOR"} | settings,
        )
        os.close(theirs)

    def until(self, pattern: str, seconds: float = 240) -> str:
        """The output up to and with the pattern; AssertionError if the pattern does not come."""
        begun, end = len(self.seen), time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen[begun:])):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen[begun:]!r}"
            if select.select([self._terminal], [], [], 1)[0]:
                try:
                    self.seen += os.read(self._terminal, 65536).decode(errors="replace")
                except OSError as error:  # how Linux says that the other side has closed
                    assert error.errno == errno.EIO
                    return self.seen[begun:]
        return self.seen[begun : begun + found.end()]

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def end(self) -> int:
        """The exit code; a program that does not end is killed."""
        try:
            return self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            os.close(self._terminal)


@pytest.mark.slow
def test_a_person_can_talk_to_the_model_in_a_terminal(tmp_path):
    """The embedded model counts right here; its image is drawn, and its tokens come one by one."""
    (tmp_path / "dots.png").write_bytes(draw_dots(1, 2, Random(0)))
    terminal = Terminal(str(Path(chatting.__file__).parents[2] / "eval.py"), "--chat")
    try:
        assert "nano, greedy: temperature 0" in terminal.until("> $")
        terminal.type(f"/image {tmp_path}/dots.png\r")
        assert terminal.until("\n> $").count("▀") == 32 * 16
        terminal.type(f"{DOTS}\r")
        answer = terminal.until(r"answer.*\n> $")
        pieces = re.findall(r"\x1b\[2m([^\x1b]*)\x1b\[0m", answer.split("reasoning", 1)[1])
        assert "".join(pieces) == "1 red." and len(pieces) == 3
        assert re.search(r"answer +\x1b\[0m\x1b\[1m1\x1b\[0m", answer)
        terminal.type("/reset\r")
        assert "a new conversation" in terminal.until("\n> $")
        terminal.type("/dance\r")
        assert "/dance is no command; /help lists them" in terminal.until("\n> $")
        time.sleep(1)  # as a person would: right after the prompt, readline is not waiting for keys yet
        terminal.type("\x03")
        assert "/quit or Ctrl-D leaves" in terminal.until("\n> $")
        terminal.type("/quit\r")
        terminal.until("never", seconds=30)
    finally:
        code = terminal.end()
    assert code == 0 and "Traceback" not in terminal.seen
