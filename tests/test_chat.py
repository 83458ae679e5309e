"""Streamed answers equal drawn ones, on every mesh; reasoning and answer apart; the turns and commands of a chat."""

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
from data.synthetic import draw as draw_dots
from gemma3.config import NANO, layer_pattern
from gemma3.files.hub import resolve
from gemma3.image import load_image
from gemma3.mesh import make_mesh
from gemma3.model import init_params
from gemma3.sample import Sampling, sample
from gemma3.tokenizer import Tokenizer
from grpo.rollout import Prompt
from grpo.use import chat as chatting
from grpo.use.chat import (
    Answerer,
    Listener,
    apart,
    as_text,
    chat,
    draw_answers,
    encoded,
    room_for,
    sections,
    show,
    spelled,
)
from reward.format import read_answer, read_reasoning

TAGS = FORMATS["answer"]
STORY = "Ann has 5 coins and gets 4 more. How many coins now?"
DOTS = "How many red dots are there?"


@cache
def nano_tokenizer() -> Tokenizer:
    return Tokenizer(resolve("nano"), NANO)


def answerer_on(*shape: int) -> Answerer:
    """A model of one local and one global layer and random weights: it writes at length, and many lone bytes."""
    config = replace(NANO, num_layers=2, layer_types=layer_pattern(2, 2))
    params = init_params(jax.random.key(0), config)
    return Answerer(params, None, config, nano_tokenizer(), make_mesh(*shape), Sampling(), 3, 512, 150)


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return answerer_on(1, 1)


def asked(answerer: Answerer, question: str, *pictures: bytes) -> Prompt:
    parts = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]
    ids = answerer.tokenizer.encode_chat([{"role": "user", "content": parts}])
    return Prompt(ids, [load_image(picture, 32) for picture in pictures])


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_the_streamed_pieces_joined_are_the_answer(shape):
    """With and without a picture; on four devices each token is heard four times."""
    answerer, listener = answerer_on(*shape), Listener()
    for number, prompt in enumerate([asked(answerer, STORY), asked(answerer, DOTS, draw_dots(3, 2, Random(0)))], 1):
        room = room_for(len(prompt.ids), len(prompt.pictures), 512)
        pieces = list(listener.stream(answerer, prompt, number))
        (answer,) = draw_answers(answerer, [prompt], [number], room)
        assert len(pieces) > 3 and "".join(pieces) == answer.text
        assert answer.finished == (listener.ids[-1] in answerer.config.stop_ids)


def test_turns_of_one_padded_length_are_compiled_once(answerer):
    listener, sizes = Listener(), []
    for number, question in enumerate([STORY, "How many?", DOTS], start=1):
        "".join(listener.stream(answerer, asked(answerer, question), number))
        sizes.append(sample._cache_size())
    assert sizes[0] == sizes[1] == sizes[2]


def test_what_is_drawn_does_not_depend_on_the_batch_or_its_padding(answerer):
    """Three prompts at once, one of them padded to another length, and each alone; the seed makes the difference."""
    prompts = [asked(answerer, question) for question in (STORY, DOTS, STORY)]
    together = draw_answers(answerer, [*prompts, Prompt([], [])], [0, 1, 2, 3], room_for(100, 0, 512))
    alone = [draw_answers(answerer, [p], [i], room_for(40, 0, 512))[0] for i, p in enumerate(prompts)]
    assert together[:3] == alone
    other = replace(answerer, seed=4, sampling=Sampling(3.0))
    assert draw_answers(other, prompts[:1], [0], room_for(40, 0, 512)) != draw_answers(
        replace(other, seed=5), prompts[:1], [0], room_for(40, 0, 512)
    )


class SlowListener(Listener):
    def _on_token(self, *args):
        time.sleep(0.03)
        return super()._on_token(*args)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_an_answer_that_nobody_hears_to_its_end_is_not_drawn_to_its_end(shape):
    """And the next one is whole again."""
    answerer, listener = answerer_on(*shape), SlowListener()
    prompt = asked(answerer, STORY)
    with closing(listener.stream(answerer, prompt, 1)) as pieces:
        next(pieces)
    drawn = len(listener.ids)
    while (heard := listener._heard.get()) is not None:
        drawn = max(drawn, 1 + heard[0])
    whole = "".join(listener.stream(answerer, prompt, 1))
    assert drawn < len(listener.ids)
    assert whole == draw_answers(answerer, [prompt], [1], room_for(40, 0, 512))[0].text


def test_an_error_while_drawing_reaches_the_one_who_listens(answerer):
    with pytest.raises(ValueError, match="row 0 has 1 pictures and 0 image tokens"):
        list(Listener().stream(answerer, asked(answerer, STORY)._replace(pictures=[np.zeros((32, 32, 3), "u1")]), 1))


@given(st.text(max_size=12), st.data())
def test_no_piece_of_text_ends_within_a_character(text, data):
    """Spelled by whole pieces and by lone bytes; what is no character in the end is shown in the end."""
    tokenizer = nano_tokenizer()
    ids = tokenizer.encode(text)
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    pieces = list(as_text(ids, tokenizer))
    assert "".join(pieces) == tokenizer.decode(ids) and all(pieces)
    assert not any("\ufffd" in piece for piece in pieces[:-1]) or "\ufffd" in text


def test_the_space_before_a_word_is_kept(answerer):
    tokenizer = answerer.tokenizer
    assert list(as_text(tokenizer.encode(" 5 € and é"), tokenizer)) == [" ", "5", " ", "€", " and", " ", "é"]


TAGGED = st.lists(
    st.sampled_from(["<reasoning>", "</reasoning>", "<answer>", "</answer>", "<", "</", "answer>", " a", "b\n", "é"]),
    max_size=9,
).map("".join)


def joined(pieces) -> list[tuple[str, str]]:
    """Neighbours of one kind as one, empty ones left out."""
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
    """Escape sequences, carriage returns and text that turns round are shown as what they are: no text."""
    assert shown("a\x1b[2Jb\rc\u202ed\x9b1me\tf") == "a\ufffd[2Jb\ufffdc\ufffdd\ufffd1me  f\n"


def test_a_strategy_is_spelled_in_numbers():
    assert spelled("greedy", Sampling(0.0)) == "greedy: temperature 0"
    assert spelled("mine", Sampling(0.5, 7, 0.25)) == "mine: temperature 0.5, top-k 7, top-p 0.25"


def test_rooms_are_few_and_have_a_limit():
    assert [room_for(tokens, 0, 500).tokens for tokens in (1, 64, 65, 257, 500)] == [64, 64, 128, 500, 500]
    assert [room_for(9, pictures, 500).pictures for pictures in (0, 1, 2, 3, 5)] == [0, 1, 2, 4, 8]
    with pytest.raises(ValueError, match="the prompt has 501 tokens, more than --max-prompt-length 500"):
        room_for(501, 0, 500)


@pytest.fixture
def talk(answerer, monkeypatch, tmp_path):
    """Talks these lines with answers that are made up; returns what was printed and the conversations it answered."""
    (tmp_path / "a.png").write_bytes(draw_dots(1, 2, Random(0)))

    def talk(*lines: str, limit: int = 512, stopped: bool = False, says: str = "") -> tuple[str, list[Prompt]]:
        prompts, left, file = [], iter(lines), io.StringIO()

        def stream(listener, answerer, prompt, number):
            prompts.append(prompt)
            text = says or f"<answer>{len(prompts)}</answer>"
            listener.ids = [*answerer.tokenizer.encode(text), answerer.config.stop_ids[-1]]
            yield answerer.tokenizer.decode(listener.ids)
            if stopped:
                raise KeyboardInterrupt

        def read_line() -> str:
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr(Listener, "stream", stream)
        chat(
            Console(file=file, highlight=False),
            replace(answerer, max_prompt_length=limit),
            read_line,
            lambda text, pictures: messages(Example("", text, "", images=(b"",) * pictures), "answer"),
            lambda path: [load_image(tmp_path / path, 32)],
            TAGS,
        )
        return file.getvalue(), prompts

    return talk


def test_the_whole_conversation_is_the_prompt_of_each_answer(talk, answerer):
    """With its pictures, and the instruction once, in front; a reset forgets all of it."""
    printed, (first, second, third) = talk(
        "/image a.png", " one ", "/image 'a.png'", "/image a.png", "two", "/reset", "x"
    )
    picture = {"type": "image"}
    (begun,) = messages(Example("", "one", "", images=(b"",)), "answer")
    turns = [begun]
    assert first.ids == answerer.tokenizer.encode_chat(turns) and len(first.pictures) == 1
    turns += [
        {"role": "assistant", "content": "<answer>1</answer>"},
        {"role": "user", "content": [picture, picture, {"type": "text", "text": "two"}]},
    ]
    assert second.ids == answerer.tokenizer.encode_chat(turns) and len(second.pictures) == 3
    assert third.ids == answerer.tokenizer.encode_chat(messages(Example("", "x", ""), "answer")) and not third.pictures
    assert [line for line in printed.splitlines() if line.startswith("answer")] == [
        f"answer     {i}" for i in (1, 2, 3)
    ]


def test_bad_input_is_answered_by_a_sentence_and_the_talk_goes_on(talk):
    printed, prompts = talk("/images a.png", "/image", "/image none.png", "", "/help", "one", "/quit", "never")
    assert "/images is no command; /help lists them\n" in printed
    assert "/image needs the path of a picture, such as /image dots.png\n" in printed
    assert re.search(r"/none\.png cannot be read: No such file or directory\n", printed)
    assert "/reset        forget the conversation so far\n" in printed
    assert len(prompts) == 1 and printed.endswith("answer     1\n")


def test_an_answer_that_is_stopped_counts_as_far_as_it_came(talk, answerer):
    """Ctrl-C while it is written leaves the talk as it is: what was shown was said."""
    printed, (first, second) = talk("one", "two", stopped=True)
    assert printed.count("(stopped)\n") == 2
    begun = answerer.tokenizer.decode(first.ids)
    assert answerer.tokenizer.decode(second.ids).startswith(begun + "<answer>1</answer>")


def test_silence_in_a_long_talk_hints_at_a_reset(talk):
    """What a model does that was taught single questions only; to the first question it is just silence."""
    printed, _ = talk("one", "two", says=" ")
    assert printed.splitlines()[1:] == [
        "(it says nothing)",
        "(it says nothing)",
        "/reset begins anew: a model that was taught single questions may need it",
        "",
    ]


def test_a_conversation_that_grows_too_long_is_refused_until_it_is_reset(talk):
    printed, prompts = talk("one", "two " * 40, "three", "/reset", "four", limit=120)
    assert re.search(r"the conversation has \d+ tokens, more than 120; /reset begins a new one\n", printed)
    assert len(prompts) == 3 and len(prompts[1].ids) > len(prompts[0].ids) > len(prompts[2].ids) - 5


def test_a_picture_is_drawn_in_a_terminal_of_many_colours_only():
    pixels = np.zeros((6, 4, 3), np.uint8)
    pixels[1, 2] = (1, 2, 3)
    for options, lines in (({"color_system": "truecolor", "force_terminal": True}, 3), ({}, 0)):
        console = Console(file=io.StringIO(), **options)
        chatting.show_picture(console, pixels)
        assert console.file.getvalue().count("\n") == lines
    console = Console(file=io.StringIO(), color_system="truecolor", force_terminal=True, no_color=False)
    chatting.show_picture(console, pixels)
    assert "\x1b[38;2;0;0;0;48;2;1;2;3m▀" in console.file.getvalue()


def test_the_pictures_of_a_conversation_are_given_with_their_crops(answerer):
    """In the order of the tokens that stand for them."""
    whole, crop = np.zeros((32, 32, 3), np.uint8), np.ones((32, 32, 3), np.uint8)
    talk = chatting.Conversation(
        [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], [[whole], [whole, crop, crop]]
    )
    prompt = encoded(talk, answerer)
    assert [int(picture[0, 0, 0]) for picture in prompt.pictures] == [0, 0, 1, 1]
    assert prompt.ids.count(answerer.config.image_token_id) == 4 * answerer.config.vision.tokens_per_image


# Makes its terminal the one whose Ctrl-C reaches it, and becomes the program that is wanted.
TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
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
        """What comes until the pattern does; AssertionError where it does not."""
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
    """The embedded model counts right here; its picture is drawn, and its tokens come one by one."""
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
        time.sleep(1)  # as a person would: in the instant after the prompt readline does not wait for keys yet
        terminal.type("\x03")
        assert "/quit or Ctrl-D leaves" in terminal.until("\n> $")
        terminal.type("/quit\r")
        terminal.until("never", seconds=30)
    finally:
        code = terminal.end()
    assert code == 0 and "Traceback" not in terminal.seen
