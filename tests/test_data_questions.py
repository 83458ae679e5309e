"""Questions to try a model on: the built-in ones state right answers; files are read or refused in a sentence."""

import json
import math

import pytest

from data.questions import built_in, load_questions
from reward.answer import is_correct


def test_the_built_in_answers_are_right():
    """Worked out anew; the letter of a choice counts as its text does."""
    truth = {
        "arithmetic": 17 * 24,
        "word-problem": 12 * 8 - 79,
        "algebra": (11 + 7) // 3,
        "geometry": math.isqrt(9**2 + 12**2),
        "probability": round(sum(a + b == 9 for a in range(1, 7) for b in range(1, 7)) / 36, 2),
        "logic": "(A)",
        "counting": 5 - 3,
    }
    examples = built_in(nano=False, images=True)
    assert [example.id for example in examples] == list(truth)
    for example in examples:
        assert is_correct(str(truth[example.id]), example) and not is_correct("1000", example)
    assert not any(example.images for example in built_in(nano=False, images=False))


def test_the_nano_model_is_asked_each_of_its_questions_once():
    examples = built_in(nano=True, images=True)
    kinds = [example.metadata["question"] for example in examples]
    assert sorted(kinds) == ["blue", "gets", "gives", "more", "red", "total"]
    assert [bool(example.images) for example in examples] == [True] * 4 + [False] * 2
    assert all(example.id.startswith("test-") for example in examples)


def test_a_text_file_holds_one_question_a_line(tmp_path):
    path = tmp_path / "q.txt"
    path.write_bytes("\ufeffOne?\r\n\n  Two, é?  \n".encode())
    assert [(e.id, e.question, e.answer) for e in load_questions(path)] == [("1", "One?", ""), ("3", "Two, é?", "")]


def test_json_lines_may_have_images_and_need_no_answers(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    path = tmp_path / "q.jsonl"
    rows = [{"question": "One?", "image": "a.png"}, {"id": "b", "question": "Two?", "choices": ["x", "y"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = load_questions(path)
    assert (one.id, one.images, two.id, two.choices) == ("1", (tmp_path / "a.png",), "b", ("x", "y"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.txt", None, "q.txt cannot be read: No such file or directory"),
        ("q.txt", b" \n\n", "q.txt holds no questions; write one on each line"),
        ("q.txt", b"abc\xff", "q.txt is no text file: it is not UTF-8 at byte 3"),
        ("q.jsonl", None, "q.jsonl cannot be read: No such file or directory"),
        ("q.jsonl", b"", "q.jsonl holds no rows"),
        ("q.jsonl", b'{"question": "a", "image": "b.png"}', "line 1: image 'b.png' is not in"),
        ("q.jsonl", b'{"question": "a", "image": "../b.png"}', "leaves"),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_questions(tmp_path / name)
