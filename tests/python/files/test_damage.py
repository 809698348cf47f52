# SPDX-License-Identifier: Apache-2.0
"""Damaged files of every kind: an array or one line of ValueError or OSError, never another exception."""

import io
import json
import os
import zipfile

import numpy as np
import pytest

import hisac
from hisac.app import commands, files

X = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
KINDS = (
    "a.npy",
    "a.npz:x",
    "packed.npz:x",
    "a.safetensors:x",
    "a.parquet:x",
    "packed.parquet:x,id",
    "book.safetensors",
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, as the current one."""
    monkeypatch.chdir(tmp_path)


def make(path):
    """A sound file of X."""
    if path == "book.safetensors":
        hisac.Codebook([X[:5], X[:4]]).save(path)
    elif path == "packed.npz":
        np.savez_compressed(path, x=X, y=X[:1])
    elif path.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")
        table = pa.table({"x": pa.array(X.tolist(), pa.list_(pa.float32())), "id": np.arange(60)})
        packed = path.startswith("packed")
        pq.write_table(table, path, compression="zstd" if packed else "none", use_dictionary=not packed)
    else:
        files.write(path, {"x": X} if path.endswith(".npy") else {"x": X, "y": X[:1]})
    with open(path, "rb") as f:
        return f.read()


def damaged(data, places, seed=0):
    """Cut, with a bit or a byte turned, with a byte gone or twice, at `places` spread over the file and at its ends."""
    ends = min(16, len(data) // 2)
    spread = np.random.default_rng(seed).integers(0, len(data), places).tolist()
    for place in sorted({*range(ends), *range(len(data) - ends, len(data)), *spread}):
        head, byte, tail = data[:place], data[place], data[place + 1 :]
        yield f"cut at {place}", head
        yield f"bit at {place}", head + bytes([byte ^ 1 << place % 8]) + tail
        yield f"byte at {place}", head + bytes([byte ^ 0xFF]) + tail
        yield f"gone at {place}", head + tail
        yield f"twice at {place}", head + bytes([byte, byte]) + tail


@pytest.mark.parametrize("spec", KINDS)
def test_damage_is_one_line(here, recwarn, spec):
    path = spec.partition(":")[0]
    whole = make(path)
    refused = 0
    for how, data in damaged(whole, 120):
        with open(f"bad-{path}", "wb") as f:
            f.write(data)
        try:
            found = commands.load_book(f"bad-{path}") if "book" in path else files.read(f"bad-{spec}")
            assert isinstance(found, (np.ndarray, hisac.Codebook))
        except (ValueError, OSError) as error:
            text = str(error)
            assert text.startswith(f"bad-{path}: ") and "\n" not in text and len(text) < 500, (how, text)
            refused += 1
        except BaseException as error:
            raise AssertionError(f"{how}: {error!r}") from error
        os.unlink(f"bad-{path}")  # writing over it would wait for the disk
    assert refused > 100
    assert not recwarn.list


@pytest.mark.parametrize("column", ["words", "lists"])
def test_damage_of_strings_and_of_lists_is_one_line(here, recwarn, column):
    pa = pytest.importorskip("pyarrow")
    words = [f"w{n % 7}" for n in range(60)]
    table = pa.table({"words": words, "lists": [words[: n % 5] for n in range(60)]})
    pytest.importorskip("pyarrow.parquet").write_table(table, "whole.parquet", compression="none")
    with open("whole.parquet", "rb") as f:
        whole = f.read()
    for how, data in damaged(whole, 120):
        with open("bad.parquet", "wb") as f:
            f.write(data)
        try:
            assert len(files.read(f"bad.parquet:{column}", loose=True)) == 2
        except (ValueError, OSError) as error:
            text = str(error)
            assert text.startswith("bad.parquet: ") and "\n" not in text and len(text) < 500, (how, text)
        except BaseException as error:
            raise AssertionError(f"{how}: {error!r}") from error
        os.unlink("bad.parquet")
    assert not recwarn.list


@pytest.mark.parametrize("path", ["a.npy", "a.npz", "packed.npz", "a.safetensors", "a.parquet", "book.safetensors"])
def test_a_file_cut_short_is_corrupt(here, path):
    whole = make(path)
    for size in range(0, len(whole), 7):
        with open(path, "wb") as f:
            f.write(whole[:size])
        with pytest.raises(hisac.CorruptFileError):
            commands.load_book(path) if "book" in path else files.read(path)


@pytest.mark.parametrize("path", ["a.npz", "packed.npz"])
def test_a_damaged_value_in_an_npz_is_found(here, path):
    """The checksum is compared, whatever zlib makes of it first."""
    whole = make(path)
    with zipfile.ZipFile(path) as archive:
        begin = archive.getinfo("x.npy").header_offset + 200
        end = begin + archive.getinfo("x.npy").compress_size - 250
    for place in range(begin, end, 23):
        with open(path, "wb") as f:
            f.write(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(hisac.CorruptFileError, match=rf"{path}: not a readable \.npz file \("):
            files.read(f"{path}:x")


def npy(header, data=b""):
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + data


HEADERS = {
    "rows": "{'descr': '<f4', 'fortran_order': False, 'shape': (59, 4)}",  # fewer than there are bytes for
    "huge": "{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4)}",
    "large": "{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976,)}",
    "negative": "{'descr': '<f4', 'fortran_order': False, 'shape': (-60, 4)}",
    "text": "{'descr': '<f4', 'fortran_order': False, 'shape': '60'}",
    "open": "{'descr': '<f4', 'fortran_order': False, 'shape': (60, 4",
    "quote": "{'descr': '<f4', 'fortran_order': False, 'shape': (60, 4)} '''",
    "dtype": "{'descr': {'a': 1}, 'fortran_order': False, 'shape': (60, 4)}",
    "keys": "{'descr': '<f4', [1]: False, 'shape': (60, 4)}",
    "deep": "(" * 100 + "{" * 10,
    "object": "{'descr': '|O', 'fortran_order': False, 'shape': (60, 4)}",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_a_damaged_header_of_an_array(here, kind, header):
    data = npy(header, X.tobytes())
    if kind == "npz":
        with zipfile.ZipFile("x.npz", "w") as archive:
            archive.writestr("x.npy", data)
    else:
        with open("x.npy", "wb") as f:
            f.write(data)
    with pytest.raises((ValueError, OSError), match=rf"^x\.{kind}: not a readable \.{kind} file \(.*\)$"):
        files.read(f"x.{kind}")


def test_an_npz_member_that_is_no_array(here):
    """NumPy hands its bytes out."""
    with zipfile.ZipFile("x.npz", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(hisac.CorruptFileError, match=r"x\.npz: not a readable \.npz file"):
        files.read("x.npz")


def test_an_encrypted_npz(here):
    make("a.npz")
    with open("a.npz", "rb") as f:
        data = bytearray(f.read())
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):
        data[data.index(mark) + (6 if mark[2] == 3 else 8)] |= 1
    with open("a.npz", "wb") as f:
        f.write(data)
    with pytest.raises(hisac.CorruptFileError, match="encrypted"):
        files.read("a.npz:x")


def test_a_sound_file_reads_with_numpy_too(here):
    """What the reader does itself (members of .npz) stays what NumPy does."""
    make("packed.npz")
    with np.load("packed.npz") as f:
        np.testing.assert_array_equal(files.read("packed.npz:x"), f["x"])
    buffer = io.BytesIO()
    np.savez(buffer, np.asfortranarray(X))
    with open("order.npz", "wb") as f:
        f.write(buffer.getvalue())
    np.testing.assert_array_equal(files.read("order.npz:arr_0"), X)


def test_hostile_safetensors_headers_end_soon(here):
    """Numbers of thousands of digits, a thousand dimensions: refused before anything is multiplied."""
    for shape in ([2**62] * 1000, [10**4000] * 8, [0, *[2**62] * 63]):
        text = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
        with open("bad.safetensors", "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
        with pytest.raises(hisac.CorruptFileError, match=r"^bad\.safetensors: not a "):
            files.read("bad.safetensors")
