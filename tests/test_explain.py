"""grpo.pages.explain: what the story says is what training computes, in the terminal and on the page."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean, stdev
from string import Formatter

import numpy as np
import pytest

import train
from gemma3.lora import Policy
from grpo.algorithm import group_advantages
from grpo.pages import explain
from grpo.pages.story import Formula
from grpo.run.settings import Settings

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The command run once, in this process: (the step it took, what it printed, the page it wrote)."""
    path = tmp_path_factory.mktemp("explain") / "explain.html"
    taken = []

    def remembered(*args):
        taken.append(take_step(*args))
        return taken[0]

    take_step = explain.take_step
    printed = path.with_suffix(".txt")
    with pytest.MonkeyPatch.context() as patch, printed.open("w", encoding="utf-8") as terminal:
        patch.setattr(sys, "argv", ["train.py", "--explain", str(path)])
        patch.setattr(explain, "take_step", remembered)
        patch.setattr(sys, "stdout", terminal)
        patch.setenv("COLUMNS", "200")
        train.main()
    return taken[0], printed.read_text(encoding="utf-8"), path.read_text(encoding="utf-8")


def log_probs_of_completions(taken):
    return np.where(taken.mask, taken.logps, 0.0).sum(axis=-1)  # [U + 1, G]


def test_the_group_shown_is_about_an_image_and_has_right_and_wrong_completions(told):
    taken, *_ = told
    example = taken.groups.rows[0].example
    assert example.images and explain.LEAST_OF_EACH <= taken.correct.sum() <= 8 - explain.LEAST_OF_EACH
    for text, correct in zip(taken.groups.texts[0], taken.correct, strict=True):
        said = re.search(r"<answer>(.*?)</answer>", text)
        assert correct == (said is not None and said[1].strip() == example.answer)


def test_the_advantages_are_the_formula_worked_by_hand(told):
    taken, printed, _ = told
    rewards = taken.rewards.tolist()
    by_hand = [(r - mean(rewards)) / (stdev(rewards) + 1e-4) for r in rewards]
    np.testing.assert_allclose(taken.advantages, by_hand, rtol=1e-5)
    assert f"/ 8 = {mean(rewards):.4f}" in printed and f"(8 - 1) ) = {stdev(rewards):.4f}" in printed
    for reward, advantage in zip(rewards, by_hand, strict=True):
        line = f"Â = ({reward:g} - {mean(rewards):.4f}) / ({stdev(rewards):.4f} + 0.0001) = {advantage:+.4f}"
        assert line in printed


def test_the_loss_of_every_update_is_the_papers_worked_by_hand(told):
    taken, *_ = told
    advantages = taken.advantages.astype(np.float64)[:, None]
    lengths = taken.mask.sum(axis=-1, keepdims=True)
    for logps, metrics in zip(taken.logps.astype(np.float64), taken.metrics, strict=False):
        ratio = np.exp(logps - taken.logps[0])
        surrogate = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
        k3 = np.exp(taken.ref_logps - logps) - (taken.ref_logps - logps) - 1
        per_token = np.where(taken.mask, -surrogate + 0.04 * k3, 0.0)
        np.testing.assert_allclose(metrics["loss"], (per_token / lengths).sum(axis=-1).mean(), atol=1e-6)
        np.testing.assert_allclose(metrics["kl"], k3[taken.mask].mean(), atol=1e-6)


def test_the_log_probs_start_as_the_samplers_and_the_base_models(told):
    taken, *_ = told
    sampled = np.asarray(taken.groups.completions.logps)[0]
    np.testing.assert_allclose(taken.logps[0][taken.mask], sampled[taken.mask], atol=1e-4)
    base = taken.trainer.logps(Policy(taken.trainer.frozen), taken.groups.prompts, taken.groups.completions.ids)
    np.testing.assert_allclose(taken.ref_logps[taken.mask], np.asarray(base)[0][taken.mask], atol=1e-6)


def test_right_completions_grow_likelier_and_wrong_ones_less_likely(told):
    taken, printed, _ = told
    change = log_probs_of_completions(taken)[-1] - log_probs_of_completions(taken)[0]
    assert change[taken.correct].min() > 0 > change[~taken.correct].mean()
    assert f"Right completions: {change[taken.correct].mean():+.4f} on average" in printed


def test_the_tokens_said_to_be_clipped_have_left_the_range_with_their_advantage(told):
    taken, printed, page = told
    number = len(taken.metrics) - 1
    ratio = np.exp(taken.logps[number] - taken.logps[0])
    advantages = np.broadcast_to(taken.advantages[:, None], ratio.shape)
    beyond = taken.mask & np.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    assert beyond.any() and not taken.clipped(0).any()
    np.testing.assert_array_equal(taken.clipped(number), beyond)
    assert f"{beyond.sum()} of {taken.mask.sum()} tokens are clipped" in printed
    assert 'class="clipped"' in page


def test_every_line_named_is_where_its_function_starts(told):
    _, printed, page = told
    named = re.findall(r"^→ (\S+):(\d+) (\S+)$", printed, re.MULTILINE)
    assert {"group_advantages", "clipped_surrogate", "kl_k3", "update", "sample"} <= {name for *_, name in named}
    for path, line, name in named:
        text = (PROJECT / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert text.lstrip().startswith(f"def {name.rpartition('.')[2]}(")
        assert f"<code>{path}:{line} {name}</code>" in page


class Outline(HTMLParser):
    """What a page refers to, and whether its tags are balanced."""

    def __init__(self, document):
        super().__init__()
        self.open, self.sources, self.count = [], [], {}
        self.feed(document)

    def handle_starttag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1
        values = dict(attributes)
        self.sources += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(told):
    taken, _, page = told
    outline = Outline(page)
    assert not outline.open and outline.count["svg"] == 3 and outline.count["img"] == 1
    assert all(source.startswith(("data:", "#")) for source in outline.sources)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    for title in (chapter.title for chapter in explain.tell(taken) if chapter.title):
        assert f"<h2>{title}</h2>" in page


def test_every_placeholder_of_the_story_is_given_and_filled(told, monkeypatch):
    texts, read = [], explain.read_story

    def remembered(text, values):
        texts.append((text, values))
        return read(text, values)

    monkeypatch.setattr(explain, "read_story", remembered)
    story = explain.tell(told[0])
    ((text, values),) = texts
    names = {re.split(r"[.\[]", name)[0] for _, name, _, _ in Formatter().parse(text) if name is not None}
    assert text == (PROJECT / "grpo/pages/explain.md").read_text(encoding="utf-8") and names == set(values)
    for block in (block for chapter in story for block in (chapter.title, *chapter.blocks)):
        told_text = block.text if isinstance(block, Formula) else block
        assert not isinstance(told_text, str) or not re.search(r"\{\w", told_text)


def test_terminal_and_page_give_the_same_numbers(told):
    _, printed, page = told
    numbers = set(re.findall(r"[+-]?\d+\.\d{4}\b", printed))
    assert len(numbers) > 30 and all(number in page for number in numbers)


def test_text_that_is_no_terminal_gets_no_colour(told):
    assert "\x1b" not in told[1] and "the image, 32 by 32 pixels" in told[1]


def test_a_group_without_both_kinds_is_not_chosen(told):
    taken, *_ = told
    groups = taken.groups
    assert explain.is_telling(taken.trainer, groups)
    for correct in (np.ones_like(groups.correct), np.zeros_like(groups.correct)):
        assert not explain.is_telling(taken.trainer, groups._replace(correct=correct))
    blind = groups.rows[0]._replace(prompt=groups.rows[0].prompt._replace(images=[]))
    assert not explain.is_telling(taken.trainer, groups._replace(rows=[blind]))


def test_the_settings_said_to_differ_are_those_that_do(told):
    taken, printed, _ = told
    for name in explain.STORY:
        assert f"--{name.replace('_', '-')} " in printed
        assert getattr(taken.trainer.settings, name) != getattr(Settings(), name)
    np.testing.assert_allclose(group_advantages(taken.groups.rewards)[0], taken.advantages)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--explain", "no/such/folder/x.html"], "no/such/folder"),
        (["--explain", "x.html", "--seed", "-1"], "--seed -1"),
        (["--explain", "x.html", "--steps", "3"], "--explain tells a step of nano, with settings of its own"),
        (["--explain", "x.html", "--sed", "1"], "did you mean --seed"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_compiled(flags, says, tmp_path):
    command = [sys.executable, str(PROJECT / "train.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and says in done.stderr
    assert done.stdout == "" and not list(tmp_path.iterdir())
