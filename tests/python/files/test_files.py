# SPDX-License-Identifier: Apache-2.0
"""Reading and writing a user's arrays: every kind of file gives the same array, and a broken one is named as such."""

import json
import os
import struct
import tracemalloc
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


@pytest.mark.parametrize("kind", ["list_", "large_list", "fixed"])
@pytest.mark.parametrize("value", ["float16", "float32", "float64", "int8", "uint64", "bool_"])
def test_parquet_in_pieces(here, monkeypatch, kind, value):
    """Batches, row groups and chunks of other sizes than each other; lists of the three kinds that Arrow has."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(files, "BATCH", 7)
    x = (10 * np.load("items.npy")).astype(np.uint8).astype(getattr(np, value))
    inner = getattr(pa, value)()
    kind = pa.list_(inner, WIDTH) if kind == "fixed" else getattr(pa, kind)(inner)
    lists = pa.array(x.tolist(), kind)
    table = pa.table({"x": pa.chunked_array([lists[:5], lists[5:5], lists[5:31], lists[31:]]), "first": x[:, 0]})
    pq.write_table(table, "x.parquet", row_group_size=25)
    for key, wanted in (("x", x), ("first", x[:, 0]), ("first,x,x", np.column_stack([x[:, 0], x, x]))):
        found = files.read(f"x.parquet:{key}")
        assert found.dtype == x.dtype and found.flags.writeable
        np.testing.assert_array_equal(found, wanted)


def test_parquet_missing_floats_are_nan(here):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    for kind in (pa.float16(), pa.float32(), pa.float64()):
        lists = pa.array([[1.0, None], [2.0, 3.0]], pa.list_(kind))
        pq.write_table(pa.table({"x": lists, "y": pa.array([None, 4.0], kind)}), "x.parquet")
        np.testing.assert_array_equal(files.read("x.parquet"), [[1, np.nan, np.nan], [2, 3, 4]])


def test_parquet_without_rows(here):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    kinds = {"x": pa.list_(pa.float32()), "fixed": pa.list_(pa.float32(), 3), "id": pa.int64()}
    pq.write_table(pa.schema(list(kinds.items())).empty_table(), "none.parquet")
    shapes = {name: files.read(f"none.parquet:{name}").shape for name in kinds}
    assert shapes == {"x": (0, 0), "fixed": (0, 3), "id": (0,)}
    assert files.read("none.parquet:id").dtype == np.int64
    pq.write_table(pa.table({}), "bare.parquet")
    with pytest.raises(hisac.CorruptFileError, match=r"bare\.parquet: not a readable \.parquet file"):
        files.read("bare.parquet")


@pytest.mark.parametrize("group", [5_000, 100_000])
@pytest.mark.parametrize("width", [64, 0])
def test_parquet_is_in_memory_once(here, monkeypatch, width, group):
    """Lists of more than 2^31 values cannot be one list array, and need not be: Arrow never holds more than a piece."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    x = np.random.default_rng(0).normal(size=(100_000 if width else 4_000_000, width or 1)).astype(np.float32)
    lists = pa.ListArray.from_arrays(np.arange(len(x) + 1, dtype=np.int32) * width, x.ravel()) if width else x[:, 0]
    pq.write_table(pa.table({"x": lists}), "x.parquet", row_group_size=group, use_dictionary=False)
    whole, pool = x.nbytes, pa.proxy_memory_pool(pa.default_memory_pool())
    del lists
    monkeypatch.setattr(files, "BATCH", 2_000)
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        found = files.read("x.parquet")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    np.testing.assert_array_equal(found, x if width else x[:, 0])
    assert 0 < pool.max_memory() < whole // 4 + 2**21
    assert whole <= peak < whole + whole // 8 + 2**20


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (":ragged", "t.parquet: lists of column 'ragged' differ in length, expected one length, got 1 to 2"),
        (":holes", "t.parquet: column 'holes' has missing rows, expected a list in each"),
        (":gaps", "t.parquet: column 'gaps' of int64 has missing numbers, expected none"),
        (":inside", "t.parquet: column 'inside' of int64 has missing numbers, expected none"),
        (":late", "t.parquet: lists of column 'late' differ in length, expected one length, got 1 to 3"),
        (
            ":nested",
            "t.parquet: column 'nested' is list<element: list<element: double>>, expected numbers or lists of numbers",
        ),
        (":words", "t.parquet: column 'words' is string, expected numbers or lists of numbers"),
        (
            ":none*",
            "t.parquet: no column 'none*'; expected some of ragged, holes, gaps, inside, late, nested and 1 more",
        ),
    ],
)
def test_parquet_that_is_no_matrix(here, monkeypatch, key, text):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(files, "BATCH", 2)
    monkeypatch.setattr(files, "MOST_NAMES", 6)
    columns = {
        "ragged": [[1.0], [1.0, 2.0], [1.0]], "holes": [[1.0], [1.0], None], "gaps": [1, 2, None],
        "inside": [[1], [2], [None]], "late": [[1], [2], [3, 4, 5]], "nested": [[[1.0]]] * 3, "words": ["a", "b", "c"],
    }  # fmt: skip
    pq.write_table(pa.table(columns), "t.parquet")
    with pytest.raises(ValueError) as error:
        files.read(f"t.parquet{key}")
    assert str(error.value) == text


@pytest.mark.parametrize("kind", ["list_", "large_list"])
@pytest.mark.parametrize("value", ["int64", "int32", "float32", "string", "large_string"])
def test_lists_of_any_length_in_pieces(here, monkeypatch, kind, value):
    """Empty ones and empty chunks too; strings that are equal are one object."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(files, "LOOSE", 7)
    words = value not in ("int64", "int32", "float32")
    rows = [[f"word {n % 5}" if words else n for n in range(n % 4)] for n in range(60)]
    rows[8:20] = [[]] * 12
    lists = pa.array(rows, getattr(pa, kind)(getattr(pa, value)()))
    table = pa.table({"x": pa.chunked_array([lists[:0], lists[:5], lists[5:5], lists[5:]]), "other": np.arange(60)})
    pq.write_table(table, "x.parquet", row_group_size=25)
    values, lengths = files.read("x.parquet:x", loose=True)
    assert values.tolist() == [v for row in rows for v in row] and lengths.tolist() == [len(row) for row in rows]
    assert values.dtype == (object if words else value)
    assert not words or len({id(v) for v in values}) == len(set(values)) == 3
    values, lengths = files.read("x.parquet:other", loose=True)
    assert values.tolist() == list(range(60)) and lengths is None


def test_lists_of_any_length_are_in_memory_once(here, monkeypatch):
    """The array grows piece by piece; Arrow never holds more than a piece."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    sizes = np.random.default_rng(0).integers(0, 200, 40_000)
    lists = pa.ListArray.from_arrays(pa.array(np.r_[0, np.cumsum(sizes)], pa.int32()), np.arange(sizes.sum()))
    pq.write_table(pa.table({"x": lists}), "x.parquet", use_dictionary=False)
    del lists
    pool, before = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    monkeypatch.setattr(files, "LOOSE", 1_000)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        values, lengths = files.read("x.parquet:x", loose=True)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    np.testing.assert_array_equal(values, np.arange(sizes.sum()))
    np.testing.assert_array_equal(lengths, sizes)
    assert 0 < pool.max_memory() < values.nbytes // 4 + 2**21
    assert values.nbytes <= peak < values.nbytes + values.nbytes // 8 + 2**20


CSV = """id,name,small,code,e0,e1,when
1,one,-3,007,0.5,1,2024-01-01
2,"two, or 2",4,12,,2.5,2024-01-02
18446744073709551615,,5,13,1e-3,nan,2024-01-03
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_columns_of_csv(here, encoding):
    """What is not written as a number of that kind is written stays a string; a missing float is NaN."""
    pytest.importorskip("pyarrow")
    with open("x.csv", "w", encoding=encoding) as f:
        f.write(CSV)
    kinds = {"id": np.uint64, "small": np.int64, "e0": np.float64, "code": object, "when": object}
    found = {name: files.read(f"x.csv:{name}", loose=True)[0] for name in kinds}
    assert {name: column.dtype for name, column in found.items()} == kinds
    assert found["id"].tolist() == [1, 2, 2**64 - 1] and found["code"].tolist() == ["007", "12", "13"]
    wanted = [[0.5, 1], [np.nan, 2.5], [0.001, np.nan]]
    np.testing.assert_array_equal(files.read("x.csv:e*"), wanted)
    np.testing.assert_array_equal(files.read("x.csv:e0,e1,e0"), np.array(wanted)[:, [0, 1, 0]])
    for spec, loose, text in (
        ("x.csv:name", True, "x.csv: column 'name' of string has missing numbers or strings, expected none"),
        ("x.csv:when", False, "x.csv: column 'when' is string, expected numbers or lists of numbers"),
        ("x.csv:none", False, "x.csv: no column 'none'; expected some of "),
        ("x.csv", True, "x.csv: several arrays, none named; expected x.csv:KEY with KEY one of code, e0, e1, id, "),
    ):
        with pytest.raises(files.Refused) as error:
            files.read(spec, loose=loose)
        assert str(error.value).startswith(text)


@pytest.mark.parametrize("text", [b"", b"a,b\n1,2\n3\n", b"a,b\n1,2\n\xff\xfe,3\n", b"a\n1\n2,3\n"])
def test_a_broken_csv_is_corrupt(here, text):
    pytest.importorskip("pyarrow")
    with open("x.csv", "wb") as f:
        f.write(text)
    with pytest.raises(hisac.CorruptFileError, match=r"^x\.csv: not a readable \.csv file \("):
        files.read("x.csv:a", loose=True)


def test_csv_without_rows(here):
    pytest.importorskip("pyarrow")
    with open("x.csv", "w") as f:
        f.write("a,b\n")
    assert files.read("x.csv").shape == (0, 2) and len(files.read("x.csv:b", loose=True)[0]) == 0


def test_an_array_beside_a_fingerprint_needs_no_name(here):
    x = np.load("items.npy")
    for path in ("x.npz", "x.safetensors"):
        files.write(path, {"fingerprint": np.array([7], np.uint64), "x": x})
        np.testing.assert_array_equal(files.read(path), x)
        assert (
            files.read(f"{path}:fingerprint").tolist() == files.read(f"{path}:x", beside="fingerprint").tolist() == [7]
        )
    files.write("x.npz", {"fingerprint": np.array([7], np.uint64)})
    with pytest.raises(files.Refused, match=r"none named; expected x\.npz:KEY with KEY one of fingerprint"):
        files.read("x.npz")


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
        (raw(b'{"x": ' + b"1" * 5000 + b"}"), "its header is not JSON"),
        (raw({"x": entry(["F32"])}, b"\0" * 4), "'x' has a bad dtype, shape or data_offsets"),
        (raw({"x": entry(shape=(1,) * 65)}, b"\0" * 4), "'x' has a bad dtype, shape or data_offsets"),
        (raw({"x": entry(shape=(2**63, 0), span=(0, 0))}), "'x' has a bad dtype, shape or data_offsets"),
        (raw({"x": entry(shape=(-1,))}, b"\0" * 4), "'x' has a bad dtype, shape or data_offsets"),
        (raw({"x": entry(shape=(True,))}, b"\0" * 4), "'x' has a bad dtype, shape or data_offsets"),
        (raw({"x": entry(span=(0, 4, 4))}, b"\0" * 4), "'x' has a bad dtype, shape or data_offsets"),
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


def test_safetensors_of_unknown_types_beside(here):
    """Only the tensor asked for needs a type that NumPy has; the others may even be of half bytes."""
    header = {
        "a": entry("F8_E4M3", (3,), (0, 3)), "x": entry("F32", (1,), (3, 7)), "b": entry("F4", (3,), (7, 9)),
    }  # fmt: skip
    with open("f8.safetensors", "wb") as f:
        f.write(raw(header, b"\1\2\3" + struct.pack("<f", 2.5) + b"\1\2"))
    np.testing.assert_array_equal(files.read("f8.safetensors:x"), np.array([2.5], np.float32))
    with pytest.raises(ValueError) as error:
        files.read("f8.safetensors:a")
    types = "F64, F32, F16, I64, I32, I16, I8, U64, U32, U16, U8, BOOL, BF16"
    assert str(error.value) == f"f8.safetensors: 'a' is F8_E4M3, expected one of {types}"
    assert not isinstance(error.value, hisac.CorruptFileError)


def many(kind, names):
    """A file of that kind with an array of each name."""
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.table({name: [1.0] for name in names}), f"many.{kind}")
    else:
        files.write(f"many.{kind}", dict.fromkeys(names, np.zeros(1, np.float32)))


@pytest.mark.parametrize("kind", ["safetensors", "npz", "parquet"])
def test_long_lists_of_names_are_cut(here, kind):
    """Close matches come first, then a few others, then how many more."""
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2_000)]
    many(kind, names)
    with pytest.raises(ValueError) as error:
        files.read(f"many.{kind}:model.layers.77.self_atn.q_proj.weight")
    text = str(error.value)
    assert len(text) < 600 and text.endswith(" and 1,992 more")
    assert text.index("model.layers.77.self_attn.q_proj.weight") < text.index(",")
    if kind != "parquet":  # which takes all columns
        with pytest.raises(ValueError) as error:
            files.read(f"many.{kind}")
        assert len(str(error.value)) < 600 and str(error.value).endswith(" and 1,992 more")


@pytest.mark.parametrize("kind", ["safetensors", "npz", "parquet"])
def test_long_names_are_cut(here, kind):
    names = [letter * 20_000 for letter in "abc"]
    many(kind, names)
    with pytest.raises(ValueError) as error:
        files.read(f"many.{kind}:d")
    assert len(str(error.value)) < 800
    files.read(f"many.{kind}:{names[0]}")


def test_a_long_name_in_a_corrupt_header_is_cut(here):
    with open("bad.safetensors", "wb") as f:
        f.write(raw({"x" * 100_000: 1}))
    with pytest.raises(hisac.CorruptFileError) as error:
        files.read("bad.safetensors")
    assert len(str(error.value)) < 400 and str(error.value).endswith("lacks dtype, shape or data_offsets")


def test_a_fifo_is_not_waited_for(here):
    os.mkfifo("pipe.npy")
    with pytest.raises(FileNotFoundError, match=r"pipe\.npy: no regular file"):
        files.read("pipe.npy")


def test_safetensors_refuses_what_it_has_no_name_for(here):
    with pytest.raises(ValueError, match="x is complex128, which safetensors has no name for"):
        files.write("x.safetensors", {"x": np.zeros(1, complex)})
    assert not os.path.exists("x.safetensors")
