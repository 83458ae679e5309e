"""data/files.py: the split by hash, paths that stay in their folder, images on the disk, the report of bad rows,
failed downloads."""

import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest

from data.files import download, find, in_split, inside, refuse_bad_rows, store_image

IDS = [str(i) for i in range(2000)]


def test_train_and_test_part_every_id_and_all_takes_each():
    assert all(in_split(i, "train") != in_split(i, "test") for i in IDS)
    assert all(in_split(i, "all") for i in IDS)


def test_a_fifth_of_the_ids_is_held_out():
    held_out = sum(in_split(i, "test") for i in IDS)
    assert abs(held_out - 400) < 4 * (2000 * 0.2 * 0.8) ** 0.5  # four standard deviations of a fair draw


def test_the_split_is_the_documented_hash():
    for i in ("1", "train-17", "straße"):
        assert in_split(i, "test") == (int(hashlib.sha256(i.encode()).hexdigest()[:16], 16) % 5 == 0)


def test_an_unknown_split_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'dev'.*train, test, all"):
        in_split("1", "dev")


def test_a_path_in_the_folder_is_resolved(tmp_path):
    assert inside(tmp_path, "a/../b.png") == tmp_path.resolve() / "b.png"


@pytest.mark.parametrize("relative", ["../b.png", "/etc/passwd", "a/../../b.png"])
def test_a_path_leaving_the_folder_is_refused(tmp_path, relative):
    with pytest.raises(ValueError, match="leaves"):
        inside(tmp_path, relative)


def test_a_link_leaving_the_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="leaves"):
        inside(tmp_path / "data", "link.png")


def test_files_are_found_one_level_down_and_no_deeper(tmp_path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "deep.txt").touch()
    assert find(tmp_path, "*.txt") == []
    (tmp_path / "x" / "b.txt").touch()
    (tmp_path / "x" / "a.txt").touch()
    assert find(tmp_path, "*.txt") == [tmp_path / "x" / "a.txt", tmp_path / "x" / "b.txt"]
    (tmp_path / "top.txt").touch()
    assert find(tmp_path, "*.txt") == [tmp_path / "top.txt"]


def test_stored_images_are_read_back_whole_by_many_threads_while_more_are_stored():
    contents = [bytes([i]) * (i * 997) for i in range(200)]
    file = tempfile.TemporaryFile()  # noqa: SIM115
    images = [store_image(file, content) for content in contents[:150]]
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(lambda i: images[i].read_bytes() == contents[i], list(range(150)) * 20)
        images += [store_image(file, content) for content in contents[150:]]
        assert all(read)
    assert [image.read_bytes() for image in images] == contents


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
def test_a_full_disk_is_a_sentence():
    sentence = r"^images cannot be written .* \(No space left on device\); set TMPDIR"
    with open("/dev/full", "r+b", buffering=0) as full, pytest.raises(RuntimeError, match=sentence):
        store_image(full, b"image")


def test_bad_rows_are_counted_and_the_first_few_shown(tmp_path):
    refuse_bad_rows(tmp_path, [])
    with pytest.raises(ValueError) as error:
        refuse_bad_rows(tmp_path, [f"line {i}: no" for i in range(1, 9)])
    assert "8 bad rows" in str(error.value) and "line 5: no; and 3 more" in str(error.value)
    assert "line 6" not in str(error.value)


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(RuntimeError, match=r"owner/name \(no route to host\).*fetch data/\*.*give --data its folder"):
        download("owner/name", "data/*")
