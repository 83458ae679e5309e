"""data/jsonl.py: what a row may hold, and the report of rows that hold something else."""

import json

import pytest

from data.jsonl import load


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "my.jsonl"
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def one(path):
    (example,) = load(path)
    return example


def test_a_row_of_question_and_answer_is_enough(write):
    first, second = load(write({"question": "1+1?", "answer": 2}, "", {"question": "Why?", "answer": "so"}))
    assert (first.id, first.question, first.answer, first.answer_type) == ("1", "1+1?", "2", "integer")
    assert (second.id, second.answer_type, second.question_type) == ("3", "text", "free_form")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"answer": "-12"}, ("-12", "integer", None)),
        ({"answer": "1.50"}, ("1.50", "float", 2)),
        ({"answer": 0.25}, ("0.25", "float", 2)),
        ({"answer": "1.5", "precision": 1.0}, ("1.5", "float", 1)),
        ({"answer": "3", "precision": 2}, ("3", "float", 2)),
        ({"answer": [1, 2.5]}, ("[1, 2.5]", "list", None)),
        ({"answer": "7", "answer_type": "text"}, ("7", "text", None)),
        ({"answer": "1/2"}, ("1/2", "text", None)),
    ],
)
def test_the_answer_type_is_read_off_the_answer(write, row, expected):
    example = one(write({"question": "q"} | row))
    assert (example.answer, example.answer_type, example.precision) == expected


@pytest.mark.parametrize(
    ("answer", "choices", "text"),
    [
        ("green", ["red", "green"], "green"),
        ("B", ["red", "green"], "green"),
        ("A", ["B", "A"], "A"),
        (7, ["6", "7"], "7"),
    ],
)
def test_the_right_choice_is_given_by_text_or_else_by_letter(write, answer, choices, text):
    example = one(write({"question": "q", "answer": answer, "choices": choices}))
    assert (example.question_type, example.answer, example.choices) == ("multi_choice", text, tuple(choices))


def test_further_fields_become_metadata(write):
    row = {"id": 5, "question": "q", "answer": "a", "unit": "cm", "rubric": ["x", "y"], "reference": "r", "topic": "t"}
    example = one(write(row))
    assert (example.id, example.unit, example.rubric, example.reference) == ("5", "cm", ("x", "y"), "r")
    assert example.metadata == {"topic": "t"}


def test_images_are_paths_relative_to_the_file(write, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        (tmp_path / name).write_bytes(b"not decoded here")
    single, several = load(
        write(
            {"question": "q", "answer": "a", "image": "a.png"},
            {"question": "q", "answer": "a", "images": ["a.png", "sub/b.png"]},
        )
    )
    assert single.images == (tmp_path / "a.png",)
    assert several.images == (tmp_path / "a.png", tmp_path / "sub" / "b.png")


def test_a_missing_image_is_an_error_or_skips_the_row(write):
    path = write({"question": "q", "answer": "a", "image": "none.png"}, {"question": "q", "answer": "a"})
    with pytest.raises(ValueError, match=r"line 1: image 'none.png' is not in .*--skip-missing-images"):
        load(path)
    assert [e.id for e in load(path, skip_missing_images=True)] == ["2"]


def test_an_image_outside_the_folder_is_refused_even_through_a_link(write, tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    (tmp_path / "out.png").write_bytes(b"x")
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    path = folder / "my.jsonl"
    for image in ("../out.png", str(tmp_path / "out.png"), "link.png"):
        path.write_text(json.dumps({"question": "q", "answer": "a", "image": image}))
        with pytest.raises(ValueError, match=r"line 1: path .* leaves"):
            load(path, skip_missing_images=True)


def test_preferences_are_completions_with_rewards_one_and_zero(write):
    example = one(write({"question": "q", "chosen": "good", "rejected": "bad"}))
    assert example.completions == ("good", "bad") and example.completion_rewards == (1.0, 0.0)


def test_completions_may_bring_rewards(write):
    row = {"question": "q", "answer": "a", "completions": ["x", "y", "z"]}
    with_rewards, without = load(write(row | {"rewards": [0, 0.5, -1]}, row))
    assert with_rewards.completion_rewards == (0.0, 0.5, -1.0)
    assert without.completions == ("x", "y", "z") and without.completion_rewards == ()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "it is not JSON"),
        ("[1]", "it holds list"),
        ({"answer": "a"}, "question is missing"),
        ({"question": " ", "answer": "a"}, "question is ' '"),
        ({"question": "q"}, "answer is missing"),
        ({"question": "q", "answer": True}, "answer is True"),
        ({"question": "q", "answer": float("nan")}, "answer is nan"),
        ({"question": "q", "answer": "z", "choices": ["x", "y"]}, "neither one of the 2 choices"),
        ({"question": "q", "answer": "C", "choices": ["x", "y"]}, "neither one of the 2 choices"),
        ({"question": "q", "answer": "x", "choices": ["x"]}, "choices holds 1"),
        ({"question": "q", "answer": "x", "choices": "xy"}, "choices is 'xy'"),
        ({"question": "q", "answer": "1.5", "precision": 1.5}, "precision is 1.5"),
        ({"question": "q", "answer": "1", "answer_type": "int"}, "answer_type is 'int'"),
        ({"question": "q", "answer": "a", "rubric": [1]}, "rubric is"),
        ({"question": "q", "answer": "a", "image": "a.png", "images": ["a.png"]}, "both image and images"),
        ({"question": "q", "chosen": "x"}, "only one of chosen and rejected"),
        ({"question": "q", "chosen": "x", "rejected": None}, "chosen or rejected is null"),
        ({"question": "q", "chosen": "x", "rejected": "y", "completions": ["x", "y"]}, "both chosen and completions"),
        ({"question": "q", "answer": "a", "completions": ["x"]}, "completions holds 1"),
        ({"question": "q", "answer": "a", "completions": ["x", "y"], "rewards": [1]}, "rewards holds 1 numbers for 2"),
        ({"question": "q", "answer": "a", "completions": ["x", "y"], "rewards": [1, "2"]}, "list of finite numbers"),
        ({"question": "q", "answer": "a", "rewards": [1, 2]}, "rewards holds 2 numbers for 0"),
        ({"question": "q", "answer": "a", "completions": ["x", "y"], "rewards": [1, 10**400]}, "too large"),
    ],
)
def test_a_bad_row_is_reported_with_its_line_and_reason(write, row, reason):
    with pytest.raises(ValueError, match="1 bad row, correct them: line 2: ") as error:
        load(write({"question": "q", "answer": "a"}, row))
    assert reason in str(error.value)


def test_all_bad_rows_are_reported_at_once(write):
    good, bad = {"question": "q", "answer": "a"}, {"question": "q"}
    with pytest.raises(ValueError, match=r"2 bad rows.*line 2: .*line 4: "):
        load(write(good, bad, good, bad))


def test_an_id_is_used_once(write):
    with pytest.raises(ValueError, match="line 2: id 'x' was used before"):
        load(write(*[{"id": "x", "question": "q", "answer": "a"}] * 2))


def test_text_that_is_no_utf8_and_nesting_without_end_are_bad_rows(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_bytes(b'{"question": "\xff", "answer": "a"}\n' + b"[" * 10**6)
    with pytest.raises(ValueError, match=r"2 bad rows.*line 1: .*utf-8.*line 2: "):
        load(path)


def test_an_empty_file_is_refused(write):
    with pytest.raises(ValueError, match="holds no rows"):
        load(write(""))


def test_rows_keep_their_split_when_others_are_added(write):
    rows = [{"id": f"row {i}", "question": "q", "answer": "a"} for i in range(50)]
    few = {e.id for e in load(write(*rows[:30]), "test")}
    many = {e.id for e in load(write(*rows), "test")}
    assert few and few == many & {row["id"] for row in rows[:30]}
