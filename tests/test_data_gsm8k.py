"""data/gsm8k.py on the published files, and on small ones with what may go wrong."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.gsm8k import load

ROWS = [
    {"question": "q1", "answer": "48/2 = <<48/2=24>>24 clips.\nSo 24.\n#### 24"},
    {"question": "q2\u2028still q2", "answer": "It loses.\n#### -1,080"},
]


@pytest.fixture
def folder(tmp_path):
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def test_answers_are_integers_without_commas_and_notes_are_stripped(folder):
    first, second = load(folder, "train")
    assert (first.id, first.answer, first.answer_type) == ("train-1", "24", "integer")
    assert first.reference == "48/2 = 24 clips.\nSo 24."
    assert (second.answer, second.question) == ("-1080", "q2\u2028still q2")


def test_all_published_rows_are_read(shared_data):
    train, test = load(shared_data / "gsm8k", "train"), load(shared_data / "gsm8k", "test")
    assert (len(train), len(test)) == (7473, 1319)
    assert load(shared_data / "gsm8k") == train + test
    assert all(e.answer == str(int(e.answer)) for e in train + test)
    assert not any("<<" in e.reference or "####" in e.reference for e in train + test)
    assert {e.answer for e in train if e.answer.startswith("-")} == {"-7", "-47", "-12"}
    assert max(int(e.answer) for e in train) == 192_000_000


def test_one_file_is_divided_by_hash(shared_data):
    path = shared_data / "gsm8k" / "test.jsonl"
    train, test, everything = (load(path, split) for split in ("train", "test", "all"))
    assert len(train) + len(test) == len(everything) == 1319
    assert not {e.id for e in train} & {e.id for e in test}
    assert 0.15 < len(test) / 1319 < 0.25


@pytest.mark.parametrize("below", [".", "main"])
def test_parquet_files_are_read_as_the_hub_lays_them_out(folder, tmp_path, below):
    target = tmp_path / "hub" / below
    target.mkdir(parents=True)
    for split in ("train", "test"):
        rows = ROWS if split == "train" else ROWS[:1]
        pq.write_table(pa.Table.from_pylist(rows), target / f"{split}-00000-of-00001.parquet")
    assert load(tmp_path / "hub") == load(folder)


def test_bad_rows_are_reported_together(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [ROWS[0], {"question": "q", "answer": "#### 1.5"}, {"question": "q"}, ["q"]]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"3 bad rows.*row 2: .*'#### N'.*row 3: .*row 4: "):
        load(path)
    path.write_text("{\n")
    with pytest.raises(ValueError, match="row 1"):
        load(path)


def test_a_folder_without_the_split_is_refused(folder):
    (folder / "test.jsonl").unlink()
    with pytest.raises(ValueError, match=r"holds neither test\.jsonl"):
        load(folder)
