"""The page of an evaluation: every shown example is in it, as text, and the filter tells right from wrong."""

import base64
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image

from data.example import Example
from grpo.pages.eval_page import chosen, write_eval_page

NASTY = '<script>alert("x")</script> & </pre><b>'
FIGURES = {
    "base": {"accuracy": 0.25, "interval": [0.1, 0.5], "n": 4},
    "adapter": {"accuracy": 0.5, "interval": [0.2, 0.75], "n": 4},
}


def answer(example: Example, correct: bool, text: str = "so", finished: bool = True) -> SimpleNamespace:
    return SimpleNamespace(example=example, completion=text, correct=correct, finished=finished)


def png(colour: tuple) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 3), colour).save(file, "PNG")
    return file.getvalue()


class Elements(HTMLParser):
    """The articles of a page with their classes and texts, and the names of all its elements."""

    def __init__(self, markup: str):
        super().__init__()
        self.articles, self.names = [], set()
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        if tag == "article":
            self.articles.append((set(dict(attrs)["class"].split()), []))

    def handle_data(self, data):
        if self.articles:
            self.articles[-1][1].append(data)


@pytest.fixture
def page(tmp_path):
    """Four examples: right and wrong by the base, then by the adapter; the third has hostile text and an image."""
    examples = [Example(f"e{i}", f"question {i}?", f"answer {i}") for i in range(4)]
    examples[2] = Example(f"{NASTY}2", f"{NASTY}?", NASTY, images=(png((9, 80, 200)),), choices=(NASTY, "other"))
    base, adapter = (True, False, False, True), (True, True, False, False)
    write_eval_page(
        tmp_path / "eval.html",
        f"Evaluation of {NASTY}",
        FIGURES,
        {
            "base": [[answer(e, right, f"base {NASTY}")] for e, right in zip(examples, base, strict=True)],
            "adapter": [[answer(e, right, finished=False)] for e, right in zip(examples, adapter, strict=True)],
        },
    )
    return (tmp_path / "eval.html").read_text("utf-8")


def test_every_example_is_there_once_and_sorted_by_what_became_of_it(page):
    """The wrong ones first, each in the order of the dataset."""
    found = [(classes - {"card"}, "".join(texts)) for classes, texts in Elements(page).articles]
    assert [classes for classes, _ in found] == [{"wrong"}, {"wrong", "broken"}, {"right"}, {"right", "mended"}]
    ids = [f"({NASTY}2)", "(e3)", "(e0)", "(e1)"]
    assert [[id for id in ids if id in text] for _, text in found] == [[id] for id in ids]
    assert all("base: " in text and "adapter: " in text for _, text in found)
    assert "4 of 4 examples are shown, the wrong ones first: 2 of 2 wrong and 2 of 2 right, as adapter answers." in page


def test_text_is_never_markup(page):
    """The text comes out as it went in, and the page has no script at all."""
    elements = Elements(page)
    assert "script" not in elements.names and NASTY not in page
    (hostile, *_) = elements.articles
    text = "".join(hostile[1])
    assert f"{NASTY}?\n(A) {NASTY}\n(B) other" in text and f"the answer is {NASTY}" in text and f"base {NASTY}" in text
    assert page.count(escape(f"base {NASTY}")) == 4


def test_images_are_in_the_page(page):
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert image.shape == (3, 5, 3) and (image == (9, 80, 200)).all()


def test_each_choice_of_the_filter_hides_what_is_not_of_its_class(page):
    choices = re.findall(r'<input type="radio" name="show" id="(\w+)"', page)
    assert choices == ["all", "right", "wrong", "mended", "broken"]
    assert re.findall(r"body:has\(#(\w+):checked\) article:not\(\.(\w+)\)", page) == [(c, c) for c in choices[1:]]


def test_one_model_alone_has_nothing_to_compare(tmp_path):
    """Of many samples the first four are shown; an example with half of its samples right counts as right."""
    example = Example("a", "q?", "1")
    samples = [answer(example, i % 2 == 0, f"sample {i}.") for i in range(6)]
    write_eval_page(tmp_path / "a.html", "t", {"model": FIGURES["base"]}, {"model": [samples]})
    page = (tmp_path / "a.html").read_text()
    assert re.findall(r'name="show" id="(\w+)"', page) == ["all", "right", "wrong"]
    assert re.findall(r"sample (\d)\.", page) == ["0", "1", "2", "3"] and "and 2 more samples" in page
    assert 'class="card right"' in page


def test_an_evaluation_without_completions_has_its_figures(tmp_path):
    write_eval_page(tmp_path / "a.html", "t", {"model": {"preference": {"policy": FIGURES["base"]}}}, {})
    page = (tmp_path / "a.html").read_text()
    assert "preference: policy" in page and "25.0%" in page and "<article" not in page


def test_bars_are_as_long_as_the_numbers_say(tmp_path):
    """There is a bar for every figure, however deep, of each model that has it."""
    figures = {"base": FIGURES["base"], "adapter": FIGURES["adapter"] | {"skills": {"a_b": FIGURES["base"]}}}
    figures["base"] = figures["base"] | {"skills": {"a_b": FIGURES["adapter"]}}
    write_eval_page(tmp_path / "a.html", "t", figures, {})
    markup = (tmp_path / "a.html").read_text()
    assert re.findall(r'<i style="width:([\d.]+)%"', markup) == ["25.0", "50.0", "50.0", "25.0"]
    assert '<b style="left:10.0%;width:40.0%">' in markup and "skills: a b" in markup
    assert '25.0% <span class="dim">(10.0 to 50.0)</span>' in markup


@pytest.mark.parametrize(
    ("wrong", "right", "shown"),
    [(3, 4, (3, 4)), (7, 50, (7, 13)), (90, 90, (15, 5)), (90, 2, (18, 2)), (0, 90, (0, 20)), (90, 0, (20, 0))],
)
def test_where_there_are_too_many_most_of_those_shown_are_wrong(wrong, right, shown):
    """A quarter of the room is kept for right ones, if there are that many."""
    verdicts = [i % 2 == 1 for i in range(2 * min(wrong, right))] + [right > wrong] * abs(wrong - right)
    places = chosen(verdicts, most=20)
    kept = [verdicts[i] for i in places]
    assert (kept.count(False), kept.count(True)) == shown and kept == sorted(kept)
    assert len(set(places)) == len(places) and places[: shown[0]] == sorted(places[: shown[0]])
