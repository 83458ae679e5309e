"""data/__init__.py: which dataset a name, a file or a folder is."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data
from data import gsm8k, jsonl, kind, load_dataset, mathvista

GSM8K_ROW = {"question": "q", "answer": "a\n#### 3"}


def test_names_are_known_without_a_file():
    assert [kind(name) for name in ("mathvista", "AI4Math/MathVista")] == ["mathvista"] * 2
    assert [kind(name) for name in ("gsm8k", "openai/gsm8k")] == ["gsm8k"] * 2


def test_files_and_folders_are_known_by_what_they_hold(shared_data):
    for path in ("mathvista", "mathvista/testmini_standin.parquet", "mathvista/testmini.json"):
        assert kind(shared_data / path) == "mathvista"
    for path in ("gsm8k", "gsm8k/train.jsonl"):
        assert kind(shared_data / path) == "gsm8k"


def test_a_files_name_says_nothing(tmp_path):
    rows = {
        "gsm8k.jsonl": GSM8K_ROW | {"topic": "t"},
        "my.jsonl": GSM8K_ROW,
        "mathvista.jsonl": {"question": "q", "answer": "a"},
    }
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row))
    assert [kind(tmp_path / name) for name in rows] == ["jsonl", "gsm8k", "jsonl"]
    pq.write_table(pa.Table.from_pylist([GSM8K_ROW]), tmp_path / "mathvista.parquet")
    assert kind(tmp_path / "mathvista.parquet") == "gsm8k"


def test_a_path_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mathvista").mkdir()
    (tmp_path / "mathvista" / "train.jsonl").write_text(json.dumps(GSM8K_ROW))
    assert kind("mathvista") == "gsm8k"
    assert load_dataset("mathvista", "train")[0].answer == "3"


def test_each_kind_is_read_by_its_own_file(shared_data, tmp_path):
    stand_in, problems = shared_data / "mathvista" / "testmini_standin.parquet", shared_data / "gsm8k"
    problems_of = lambda examples: [replace(example, images=()) for example in examples]  # noqa: E731
    assert problems_of(load_dataset(stand_in, "test")) == problems_of(mathvista.load(stand_in, "test"))
    assert load_dataset(str(problems), "test") == gsm8k.load(problems, "test")
    (tmp_path / "my.jsonl").write_text(
        '{"question": "q", "answer": "a", "image": "no.png"}\n{"question": "q", "answer": "a"}'
    )
    assert load_dataset(tmp_path / "my.jsonl", skip_missing_images=True) == jsonl.load(
        tmp_path / "my.jsonl", skip_missing_images=True
    )


@pytest.mark.parametrize("content", [None, "text.txt", "folder", "other.json", "other.parquet"])
def test_what_is_unknown_is_named_and_the_known_listed(tmp_path, content):
    path = tmp_path / (content or "nothing")
    if content == "text.txt":
        path.write_text("hello")
    elif content == "folder":
        path.mkdir()
        (path / "my.jsonl").write_text('{"question": "q", "answer": "a"}')
    elif content == "other.json":
        path.write_text('{"a": 1}')
    elif content == "other.parquet":
        pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ValueError) as error:
        load_dataset(path)
    assert str(path) in str(error.value)
    assert all(name in str(error.value) for name in (*data.NAMES, "testmini.json", ".jsonl"))


def test_broken_files_say_so(tmp_path):
    for name, reason in (("x.parquet", "is not a parquet file"), ("x.json", "is not JSON"), ("x.jsonl", "line 1")):
        (tmp_path / name).write_text("{")
        with pytest.raises(ValueError, match=reason):
            load_dataset(tmp_path / name)
