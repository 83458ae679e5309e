"""Layouts mean what they say, parts are read without the rest, and a directory is replaced whole or not at all."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma3.files import tensors
from gemma3.files.tensors import (
    Unwritten,
    filled,
    list_tensors,
    read_into,
    same_values,
    stored_shape,
    to_stored,
    write_tensors,
)
from gemma3.files.writing import replaced_directory

SIZES = {"N": 6, "H": 5, "D": 7, "E": 3, "c": 2, "y": 4, "x": 11}
LAYOUTS = {  # how plain NumPy turns what is stored into our array
    "D -> D": lambda s: s,
    "D N -> N D": lambda s: s.T,
    "(N H) D -> D N H": lambda s: s.reshape(6, 5, 7).transpose(2, 0, 1),
    "D (N H) -> N H D": lambda s: s.reshape(7, 6, 5).transpose(1, 2, 0),
    "(N H) -> N H": lambda s: s.reshape(6, 5),
    "E c y x -> (y x c) E": lambda s: s.transpose(2, 3, 1, 0).reshape(88, 3),
}


def stored(path, array) -> tensors.Stored:
    save_file({"w": array}, path)
    return list_tensors(path)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk_bytes", [1, 60, 2**25])
def test_a_layout_is_read_and_written_as_its_equation_says(layout, chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_CHUNK_BYTES", chunk_bytes)
    file = np.random.default_rng(0).normal(size=stored_shape(layout, SIZES)).astype(np.float32)
    expected = LAYOUTS[layout](file)
    out = np.empty(expected.shape, np.float32)
    read_into(out, stored(tmp_path / "x.safetensors", file), layout, SIZES, [range(n) for n in out.shape])
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(to_stored(expected, layout, SIZES), file)


def test_a_part_is_read_without_the_rest(tmp_path):
    file = np.random.default_rng(0).normal(size=(30, 7)).astype(np.float32)
    whole = file.reshape(6, 5, 7).transpose(2, 0, 1)
    out = np.empty((3, 2, 5), np.float32)
    read_into(
        out, stored(tmp_path / "x.safetensors", file), "(N H) D -> D N H", SIZES, [range(4, 7), range(2, 4), range(5)]
    )
    np.testing.assert_array_equal(out, whole[4:7, 2:4])


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("target", [np.float32, ml_dtypes.bfloat16])
def test_values_are_cast_while_they_are_copied(source, target, tmp_path):
    file = np.random.default_rng(0).normal(size=(7, 6)).astype(source)
    out = np.empty((6, 7), target)
    read_into(out, stored(tmp_path / "x.safetensors", file), "D N -> N D", SIZES, [range(6), range(7)])
    np.testing.assert_array_equal(out, file.T.astype(target))


def test_each_device_is_given_its_own_part_only():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("tensor", "data"))
    asked = []

    def fill(out, ranges):
        asked.append(tuple(map(len, ranges)))
        out[...] = 10 * np.array(ranges[0])[:, None] + np.array(ranges[1])

    array = filled(jax.ShapeDtypeStruct((8, 6), np.float32), sharding, fill)
    assert set(asked) == {(2, 3)}
    np.testing.assert_array_equal(array, 10 * np.arange(8)[:, None] + np.arange(6))


def test_equality_is_by_value(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    one = stored(tmp_path / "a.safetensors", array)
    assert same_values(one, stored(tmp_path / "b.safetensors", array.astype(ml_dtypes.bfloat16)))
    assert not same_values(one, stored(tmp_path / "c.safetensors", array + (array == 11)))
    assert not same_values(one, stored(tmp_path / "d.safetensors", array[:3]))


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: b"", lambda data: b"not tensors at all"])
def test_a_damaged_file_is_named(damage, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": np.ones(9)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ValueError, match=r"x\.safetensors is missing, damaged or not a safetensors file .*fetch it again"
    ):
        list_tensors(path)


def test_quantised_weights_are_refused(tmp_path):
    save_file({"w": np.ones(9, np.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"stores w as I8; .* not quantised"):
        list_tensors(tmp_path / "x.safetensors")


def test_shards_hold_at_most_so_many_bytes_and_the_index_finds_each_tensor(tmp_path):
    arrays = {name: np.full(n, n, np.float32) for name, n in {"a": 5, "b": 4, "c": 20, "d": 1}.items()}
    write_tensors(tmp_path, [Unwritten(n, a.nbytes, lambda a=a: a) for n, a in arrays.items()], max_shard_bytes=40)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 30, "total_size": 120}
    assert [sorted(load_file(p)) for p in sorted(tmp_path.glob("*.safetensors"))] == [["c"], ["a", "b", "d"]]
    for name, array in arrays.items():
        np.testing.assert_array_equal(load_file(tmp_path / index["weight_map"][name])[name], array)


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    for content in ("old", "new"):
        with replaced_directory(tmp_path / "deep" / "model", "mark") as new:
            (new / "mark").write_text(content)
            (new / content).touch()
    assert {p.name for p in (tmp_path / "deep" / "model").iterdir()} == {"mark", "new"}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model"]


def test_a_failure_while_writing_leaves_the_old_directory(tmp_path):
    with replaced_directory(tmp_path / "model", "mark") as new:
        (new / "mark").write_text("old")
    with pytest.raises(RuntimeError), replaced_directory(tmp_path / "model", "mark") as new:
        (new / "mark").write_text("half")
        raise RuntimeError
    assert (tmp_path / "model" / "mark").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_directory_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="has no mark, so it is not overwritten"), replaced_directory(tmp_path, "mark"):
        pass
    assert (tmp_path / "thesis.tex").is_file()
