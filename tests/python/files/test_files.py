# SPDX-License-Identifier: Apache-2.0
"""Reading and writing a user's arrays: every kind of file gives the same array, and a broken one is named as such."""

import json
import os
import struct
import zipfile

import numpy as np
import pytest

import hisac
from hisac.app import files

WIDTH = 4


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with items.npy."""
    monkeypatch.chdir(tmp_path)
    np.save("items.npy", np.random.default_rng(0).normal(size=(60, WIDTH)).astype(np.float32))


def test_every_kind_of_file_gives_the_same_array(here):
    x = np.load("items.npy")
    np.savez("x.npz", x=x, y=x[:1])
    np.savez("one.npz", x=x)
    files.write("x.safetensors", {"x": x, "y": x[:1]})
    for spec in ("items.npy", "x.npz:x", "one.npz", "x.safetensors:x"):
        np.testing.assert_array_equal(files.read(spec), x, err_msg=spec)


def test_parquet_columns_give_the_same_array(here):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    x = np.load("items.npy")
    lists = pa.array(x.tolist(), pa.list_(pa.float32()))
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), WIDTH)
    columns = {f"e{d}": x[:, d] for d in range(WIDTH)}
    pq.write_table(pa.table({"list": lists, "fixed": fixed, "id": np.arange(60), **columns}), "x.parquet")
    pq.write_table(pa.table(columns), "columns.parquet")
    pq.write_table(pa.table({"x": pa.chunked_array([lists[:7], lists[7:]])}), "chunks.parquet")
    for key in ("x.parquet:list", "x.parquet:fixed", "x.parquet:e*", "x.parquet:e0,e1,e2,e3"):
        np.testing.assert_array_equal(files.read(key), x, err_msg=key)
    for path in ("columns.parquet", "chunks.parquet"):
        np.testing.assert_array_equal(files.read(path), x, err_msg=path)
    np.testing.assert_array_equal(files.read("x.parquet:id"), np.arange(60))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (":ragged", "t.parquet: lists of column 'ragged' differ in length, expected one length, got 1 to 2"),
        (":holes", "t.parquet: lists of column 'holes' differ in length, expected one length, got missing rows"),
        (":words", "t.parquet: column 'words' is string, expected numbers or lists of numbers"),
        (":none*", "t.parquet: no column 'none*'; expected some of ragged, holes, words"),
    ],
)
def test_parquet_that_is_no_matrix(here, key, text):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"ragged": [[1.0], [1.0, 2.0]], "holes": [[1.0], None], "words": ["a", "b"]}), "t.parquet")
    with pytest.raises(ValueError) as error:
        files.read(f"t.parquet{key}")
    assert str(error.value) == text


def test_a_broken_parquet_file_is_corrupt(here):
    pytest.importorskip("pyarrow")
    with open("x.parquet", "wb") as f:
        f.write(b"PAR1 and nothing else")
    with pytest.raises(hisac.CorruptFileError, match=r"not a readable \.parquet file"):
        files.read("x.parquet")


def test_a_broken_npz_member_is_corrupt(here):
    with zipfile.ZipFile("x.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY but no header")
    with pytest.raises(hisac.CorruptFileError, match=r"not a readable \.npz file"):
        files.read("x.npz")


def test_safetensors_of_every_type(here):
    arrays = {name: np.array([[0, 1], [1, 0]], code) for name, code in files.DTYPES.items() if name != "BF16"}
    files.write("all.safetensors", {**arrays, "empty": np.zeros((0, 3), np.float32), "scalar": np.float32(2)})
    for name, array in arrays.items():
        found = files.read(f"all.safetensors:{name}")
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    assert files.read("all.safetensors:empty").shape == (0, 3)
    assert files.read("all.safetensors:scalar").shape == ()


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(1,), span=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def test_safetensors_bfloat16_becomes_float32(here):
    with open("b.safetensors", "wb") as f:
        f.write(raw({"x": entry("BF16", (3,), (0, 6))}, struct.pack("<3H", 0x3F80, 0xC000, 0x7FC0)))
    np.testing.assert_array_equal(files.read("b.safetensors"), np.array([1, -2, np.nan], np.float32))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "expected at least 8 bytes, got 0"),
        (raw({}, length=2**63), f"a header of {2**63} bytes in a file of 10"),
        (raw(b"{"), "its header is not JSON"),
        (raw(b"\xff\xff"), "its header is not JSON"),
        (raw(b"[" * 100_000), "its header is not JSON"),
        (raw(b"[]"), "its header is not an object"),
        (raw(b'{"x": 1, "x": 2}'), "a name occurs twice"),
        (raw({"x": 1}), "'x' lacks dtype, shape or data_offsets"),
        (raw({"x": {**entry(), "more": 1}}, b"\0" * 4), "'x' lacks dtype, shape or data_offsets"),
        (raw({"x": entry("F8")}, b"\0" * 4), "'x' has the unknown dtype 'F8'"),
        (raw({"x": entry(["F32"])}, b"\0" * 4), "'x' has the unknown dtype ['F32']"),
        (raw({"x": entry(shape=(-1,))}, b"\0" * 4), "'x' has a bad shape or data_offsets"),
        (raw({"x": entry(shape=(True,))}, b"\0" * 4), "'x' has a bad shape or data_offsets"),
        (raw({"x": entry(span=(0, 4, 4))}, b"\0" * 4), "'x' has a bad shape or data_offsets"),
        (raw({"x": entry(shape=(2,))}, b"\0" * 4), "'x' has 4 bytes, which does not fit F32 [2]"),
        (raw({"x": entry(shape=(2**62, 4))}, b"\0" * 4), f"'x' has 4 bytes, which does not fit F32 [{2**62}, 4]"),
        (raw({"x": entry(span=(4, 8))}, b"\0" * 8), "'x' overlaps another tensor or leaves a gap"),
        (raw({"x": entry(), "y": entry()}, b"\0" * 4), "'y' overlaps another tensor or leaves a gap"),
        (raw({"x": entry()}, b"\0" * 3), "expected 73 bytes, got 72"),
        (raw({"x": entry()}, b"\0" * 5), "expected 73 bytes, got 74"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_corrupt_safetensors(here, data, text):
    with open("bad.safetensors", "wb") as f:
        f.write(data)
    with pytest.raises(hisac.CorruptFileError) as error:
        files.read("bad.safetensors")
    assert str(error.value) == f"bad.safetensors: not a safetensors file: {text}"


def test_safetensors_refuses_what_it_has_no_name_for(here):
    with pytest.raises(ValueError, match="x is complex128, which safetensors has no name for"):
        files.write("x.safetensors", {"x": np.zeros(1, complex)})
    assert not os.path.exists("x.safetensors")
