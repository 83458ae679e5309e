"""data/mathvista.py: the published parquet schema and the repository's JSON, on the real texts."""

import io
import json
import tracemalloc
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data.mathvista import COLUMNS, TRAINING_NOTICE, load


@pytest.fixture(scope="module")
def parquet(shared_data):
    return shared_data / "mathvista" / "testmini_standin.parquet"


@pytest.fixture
def repository(tmp_path, shared_data):
    """The first 20 records of the repository's JSON with images for all but pid 3 and 7."""
    records = json.loads((shared_data / "mathvista" / "testmini.json").read_text(encoding="utf-8"))
    records = dict(list(records.items())[:20])
    (tmp_path / "testmini.json").write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "images").mkdir()
    for pid in records.keys() - {"3", "7"}:
        (tmp_path / "images" / f"{pid}.jpg").write_bytes(b"an image")
    return tmp_path


def test_parquet_and_json_hold_the_same_problems(parquet, shared_data):
    records = json.loads((shared_data / "mathvista" / "testmini.json").read_text(encoding="utf-8"))
    examples = load(parquet)
    assert [e.id for e in examples] == list(records)
    for e in examples:
        record = records[e.id]
        for field in ("question", "answer", "question_type", "answer_type", "unit", "precision", "metadata"):
            assert getattr(e, field) == record[field], (e.id, field)
        assert list(e.choices) == (record["choices"] or [])


def test_precision_is_a_whole_number_though_parquet_holds_floats(parquet):
    counts = Counter((type(e.precision), e.precision) for e in load(parquet) if e.answer_type == "float")
    assert counts == {(int, 1): 20, (int, 2): 20}


def test_images_are_the_files_own_bytes_and_of_the_size_in_the_metadata(parquet):
    stored = pq.read_table(parquet, columns=["decoded_image"])["decoded_image"].to_pylist()
    for e, own in zip(load(parquet), stored, strict=True):
        (image,) = e.images
        assert image.read_bytes() == own["bytes"]
        assert Image.open(io.BytesIO(own["bytes"])).size == (e.metadata["img_width"], e.metadata["img_height"])


def test_images_are_not_held_in_memory(parquet, tmp_path):
    """500 rows with 100 kB each: at most a twentieth stays in memory, and Arrow does not keep the images either."""
    table = pq.read_table(parquet).slice(0, 500)
    images = [{"bytes": bytes([i % 251]) * 100_000, "path": None} for i in range(500)]
    place = table.column_names.index("decoded_image")
    table = table.set_column(place, "decoded_image", pa.array(images, table.schema.field(place).type))
    pq.write_table(table, tmp_path / "large.parquet", row_group_size=50)
    del table, images
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    examples = load(tmp_path / "large.parquet")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2_500_000 and peak < 15_000_000, "500 rows of text, and at the peak the images of 32 or 64 rows"
    assert pa.total_allocated_bytes() - before < 500_000
    for i in (0, 70, 250, 499):
        assert examples[i].images[0].read_bytes() == bytes([i % 251]) * 100_000


def test_train_and_test_are_disjoint_and_complete(parquet):
    train, test, everything = ({e.id for e in load(parquet, split)} for split in ("train", "test", "all"))
    assert not train & test and train | test == everything
    assert (len(train), len(test)) == (802, 198)


def test_json_beside_its_images_folder_gives_paths_and_a_rebuilt_query(repository, parquet):
    examples = load(repository / "testmini.json", skip_missing_images=True)
    assert len(examples) == 18 and "3" not in {e.id for e in examples}
    assert examples[0].images == (repository / "images" / "1.jpg",)
    assert [e.query for e in examples] == [e.query for e in load(parquet)[:20] if e.id not in ("3", "7")]


def test_missing_images_are_an_error_naming_the_first_and_the_count(repository, shared_data):
    with pytest.raises(ValueError, match=r"^2 of 20 rows have no image, the first is pid 3 .*--skip-missing-images$"):
        load(repository / "testmini.json")
    with pytest.raises(ValueError, match=r"^1000 of 1000 rows have no image, the first is pid 1 .*images/1.jpg"):
        load(shared_data / "mathvista" / "testmini.json")
    with pytest.raises(ValueError, match="no row with an image"):
        load(shared_data / "mathvista" / "testmini.json", skip_missing_images=True)


def test_a_parquet_row_without_image_is_missing_too(parquet, tmp_path):
    rows = pq.read_table(parquet).slice(0, 3).to_pylist()
    rows[1]["decoded_image"] = None
    rows[2]["decoded_image"]["bytes"] = None
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "few.parquet")
    with pytest.raises(ValueError, match=r"2 of 3 rows .* first is pid 2"):
        load(tmp_path / "few.parquet")
    assert [e.id for e in load(tmp_path / "few.parquet", skip_missing_images=True)] == ["1"]


def test_a_folder_is_read_with_its_files_in_order(parquet, tmp_path):
    (tmp_path / "data").mkdir()
    table = pq.read_table(parquet)
    pq.write_table(table.slice(0, 4), tmp_path / "data" / "testmini-00000-of-00002.parquet")
    pq.write_table(table.slice(4, 3), tmp_path / "data" / "testmini-00001-of-00002.parquet")
    pq.write_table(table.slice(7, 3), tmp_path / "data" / "test-00000-of-00001.parquet")
    assert [e.id for e in load(tmp_path)] == ["1", "2", "3", "4", "5", "6", "7"]


def test_other_parquet_files_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no"):
        load(tmp_path)
    pq.write_table(pa.table({column: [1] for column in COLUMNS - {"pid"}}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="lacks the columns pid"):
        load(tmp_path / "x.parquet")


def test_the_notice_is_one_line_with_the_condition():
    assert "\n" not in TRAINING_NOTICE and "prohibits training" in TRAINING_NOTICE
