# SPDX-License-Identifier: Apache-2.0
"""Codebook files: safetensors, bit for bit the same on every machine; whatever is damaged is named, never half-loaded.

tests/data/codebook.safetensors was written once by `golden().save(...)`; no test writes it. A new version of the format
gets a new file beside it.
"""

import copy
import errno
import json
import os
import pickle
import stat
import struct
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import hisac
from hisac import Codebook, CorruptFileError

GOLDEN = Path(__file__).parent / "data" / "codebook.safetensors"


def golden():
    """Three levels whose values show every part of a float32: signs, zeros, subnormals, the largest."""
    special = [0.0, -0.0, 1.0, -1.5, 1e-45, -1e-40, 3.4028235e38, 2**-126, 1 / 3, -1e30, 16777217.0, 0.1]
    levels = [np.array(special, np.float32).reshape(4, 3)]
    levels += [np.arange(6, dtype=np.float32).reshape(2, 3) / 7, np.full((1, 3), -0.25, np.float32)]
    return Codebook(levels)


BOOK = golden()
BYTES = BOOK.to_bytes()
LENGTH = int.from_bytes(BYTES[:8], "little")
HEADER, DATA = json.loads(BYTES[8 : 8 + LENGTH]), BYTES[8 + LENGTH :]


def read(data):
    """safetensors by its specification, nothing of ours: metadata, and tensors by name."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata, tensors = header.pop("__metadata__", {}), {}
    body = data[8 + length :]
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert [a for a, _ in spans] == [0, *(b for _, b in spans[:-1])] and spans[-1][1] == len(body)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert entry["dtype"] == "F32"
        tensors[name] = np.frombuffer(body[begin:end], "<f4").reshape(entry["shape"])
    return metadata, tensors


def file(header, data=DATA, length=None):
    """A file of any header: an object, or its bytes as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def changed(name, **fields):
    """The header with fields of one entry changed; None removes."""
    entry = {k: v for k, v in {**HEADER[name], **fields}.items() if v is not None}
    return {**HEADER, name: entry}


# ------------------------------------------------------------------------------------------------ golden, other readers


def test_the_golden_file():
    data = GOLDEN.read_bytes()
    book = Codebook.load(GOLDEN)
    assert book.fingerprint == 0x980E4C8A4C7DEC3B and book == golden()
    assert all(a.tobytes() == b.tobytes() for a, b in zip(book.centers, golden().centers, strict=True))
    assert data == book.to_bytes() == BYTES
    x = np.array([[-1.5, 0, 0], [0, 0, 2], [-1e30, 1, 1], [3e38, 0, 0], [1.4, 0.6, 1.5]], np.float32)
    assert book.encode(x).tolist() == [[1, 0, 0], [0, 0, 0], [3, 0, 0], [2, 0, 0], [0, 1, 0]]
    assert book.leaves(book.encode(x)).tolist() == [2, 0, 6, 4, 1]


def test_save_writes_what_to_bytes_says(tmp_path):
    BOOK.save(tmp_path / "a.safetensors")
    BOOK.save(str(tmp_path / "b"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b").read_bytes() == BYTES
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b"]
    assert Codebook.load(tmp_path / "b") == BOOK


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 2**32))
def test_any_codebook_survives(sizes, width, seed):
    rng = np.random.default_rng(seed)
    book = Codebook([rng.normal(size=(c, width)).astype(np.float32) for c in sizes])
    data = book.to_bytes()
    again = Codebook.from_bytes(data)
    assert again == book and again.sizes == tuple(sizes) and again.to_bytes() == data
    metadata, tensors = read(data)
    assert metadata == {"format": "hisac.codebook", "version": "1", "fingerprint": f"{book.fingerprint:016x}"}
    assert list(tensors) == [f"centers.{level}" for level in range(len(sizes))]
    assert all(np.array_equal(tensors[f"centers.{level}"], c) for level, c in enumerate(book.centers))
    assert int.from_bytes(data[:8], "little") % 8 == 0, "the tensors start at a multiple of 8 bytes"


def test_the_safetensors_package_reads_ours_and_we_read_its(tmp_path):
    package = pytest.importorskip("safetensors.numpy")
    tensors = package.load(BYTES)
    assert all(np.array_equal(tensors[f"centers.{level}"], c) for level, c in enumerate(BOOK.centers))
    metadata, _ = read(BYTES)
    assert Codebook.from_bytes(package.save(dict(reversed(tensors.items())), metadata=metadata)) == BOOK


@pytest.mark.parametrize(
    "header",
    [
        json.dumps(HEADER, indent=3).encode(),
        json.dumps(HEADER, separators=(" , ", "\t:\r\n")).encode() + b" \n" * 9,
        json.dumps(HEADER, sort_keys=True).encode(),
        json.dumps({k: dict(reversed(v.items())) for k, v in reversed(HEADER.items())}).encode(),
        json.dumps({**HEADER, "__metadata__": {**HEADER["__metadata__"], "note": 'of "mine" \\', "": ""}}).encode(),
    ],
)
def test_another_order_or_spacing_is_the_same_file(header):
    assert Codebook.from_bytes(file(header)) == BOOK
    assert Codebook.from_bytes(bytearray(file(header))) == Codebook.from_bytes(memoryview(file(header))) == BOOK


def test_tensors_may_lie_in_another_order_only_if_the_offsets_say_so():
    """Levels in the file in the order of their names: what this version reads; others are refused, not misread."""
    end, middle = HEADER["centers.0"]["data_offsets"][1], HEADER["centers.1"]["data_offsets"][1]
    header = changed("centers.0", data_offsets=[middle - end, middle])
    header["centers.1"] = {**header["centers.1"], "data_offsets": [0, middle - end]}
    with pytest.raises(CorruptFileError, match="a tensor's shape and data_offsets do not fit the file"):
        Codebook.from_bytes(file(header, DATA[end:middle] + DATA[:end] + DATA[middle:]))


# ---------------------------------------------------------------------------------------------------------- corruptions

FIT = "a tensor's shape and data_offsets do not fit the file"
JSON = "the header is not the JSON that the format needs"
FIELDS = "a tensor needs dtype, shape [C, D] and data_offsets"
META = "metadata expected format, version and fingerprint"
MAP = "the metadata is not a map of strings"
NAME = "tensors expected centers.0 to centers.7, got another name"
LONG = "the header is longer than the file, or than 1 MiB"
TEXT = BYTES[8 : 8 + LENGTH].rstrip()


def meta(**fields):
    return changed("__metadata__", **fields)


CORRUPT = {
    "empty": (b"", "expected at least 8 bytes"),
    "7 bytes": (BYTES[:7], "expected at least 8 bytes"),
    "no header": (file(b"", b""), "the header is no JSON object"),
    "header past the end": (file(HEADER, length=len(file(HEADER)) - 7), LONG),
    "header of 2^63": (file(HEADER, length=2**63), LONG),
    "header of 2^64 - 1": (file(HEADER, length=2**64 - 1), LONG),
    "header over 1 MiB": (file(TEXT + b" " * (1 << 20)), LONG),
    "an array": (file(b"[]"), "the header is no JSON object"),
    "no JSON": (file(b"\x80\x04K\x01."), "the header is no JSON object"),
    "an empty object": (file(b"{}"), JSON),
    "a trailing comma": (file(TEXT[:-1] + b",}"), JSON),
    "two objects": (file(TEXT + b"{}"), JSON),
    "not closed": (file(TEXT[:-1]), JSON),
    "a NUL": (file(TEXT + b"\0"), JSON),
    "deep nesting": (file(b'{"__metadata__":' + b"[" * 500_000), MAP),
    "nested metadata": (file(meta(more={"a": "b"})), MAP),
    "metadata of numbers": (file(meta(version=1)), MAP),
    "only metadata": (file({"__metadata__": HEADER["__metadata__"]}, b""), "no level"),
    "no metadata": (file({k: v for k, v in HEADER.items() if k != "__metadata__"}), META),
    "no format": (file(meta(format=None)), META),
    "no version": (file(meta(version=None)), META),
    "no fingerprint": (file(meta(fingerprint=None)), META),
    "another format": (file(meta(format="pt")), "metadata format expected hisac.codebook, got another"),
    "version 2": (file(meta(version="2")), "version expected 1, got 2"),
    "a long version": (file(meta(version="1" * 99)), "version expected 1, got " + "1" * 20),
    "a version in no script": (file(TEXT.replace(b'"1"', b'"\xff\xe2"')), "version expected 1, got "),
    "an empty version": (file(meta(version="")), META),
    "fingerprint, short": (file(meta(fingerprint="12")), "metadata fingerprint expected 16 hex digits"),
    "fingerprint, upper": (file(meta(fingerprint="A" * 16)), "metadata fingerprint expected 16 hex digits"),
    "fingerprint, other": (
        file(meta(fingerprint="0" * 16)),
        f"fingerprint expected {0:016x}, the centers have {BOOK.fingerprint:016x}",
    ),
    "another tensor": (file({**HEADER, "bias": HEADER["centers.0"]}), NAME),
    "level 8": (file({**HEADER, "centers.8": HEADER["centers.0"]}), NAME),
    "an escaped name": (file(TEXT.replace(b"centers.1", b"centers\\u002e1")), NAME),
    "a tensor twice": (file(TEXT[:-1] + b"," + TEXT[TEXT.index(b'"centers.0') :]), "a tensor appears twice"),
    "level 1 missing": (file({k: v for k, v in HEADER.items() if k != "centers.1"}), "a level is missing"),
    "level 0 missing": (file({k: v for k, v in HEADER.items() if k != "centers.0"}), "a level is missing"),
    "last level missing": (
        file({k: v for k, v in HEADER.items() if k != "centers.2"}),
        "bytes left over after the last tensor",
    ),
    "F16": (file(changed("centers.0", dtype="F16")), "a tensor's dtype expected F32"),
    "dtype 32": (file(changed("centers.0", dtype=32)), "a tensor's dtype expected F32"),
    "no dtype": (file(changed("centers.0", dtype=None)), FIELDS),
    "no shape": (file(changed("centers.0", shape=None)), FIELDS),
    "no offsets": (file(changed("centers.0", data_offsets=None)), FIELDS),
    "another field": (file(changed("centers.0", strides=[3, 1])), "a tensor has an unknown field"),
    "a flat tensor": (file(changed("centers.0", shape=[12])), FIELDS),
    "three dimensions": (file(changed("centers.0", shape=[4, 3, 1])), FIELDS),
    "a negative shape": (file(changed("centers.0", shape=[-4, -3])), FIELDS),
    "a broken shape": (file(changed("centers.0", shape=[4.0, 3])), FIELDS),
    "no rows": (file(changed("centers.0", shape=[0, 3])), FIT),
    "another shape": (file(changed("centers.0", shape=[3, 3])), FIT),
    "more rows": (file(changed("centers.2", shape=[2, 3], data_offsets=[72, 96])), FIT),
    "a shape that wraps": (file(changed("centers.0", shape=[2**62, 3])), FIELDS),
    "a shape of 17 digits": (file(changed("centers.0", shape=[10**17, 10**17])), FIT),
    "2^20 + 1 rows": (file(changed("centers.0", shape=[2**20 + 1, 3])), FIT),
    "offsets, overlap": (file(changed("centers.1", data_offsets=[44, 68])), FIT),
    "offsets, gap": (file(changed("centers.1", data_offsets=[52, 76])), FIT),
    "offsets, backwards": (file(changed("centers.1", data_offsets=[72, 48])), FIT),
    "offsets, past the end": (file(HEADER, DATA[:-1]), FIT),
    "one byte more": (file(HEADER, DATA + b"\0"), "bytes left over after the last tensor"),
    "another file behind": (BYTES + BYTES, "bytes left over after the last tensor"),
    "other widths": (
        file(changed("centers.1", shape=[3, 2])),
        "Codebook: centers of level 1 are [3, 2], level 0 has D = 3: D differs",
    ),
    "a NaN": (
        file(HEADER, DATA[:4] + struct.pack("<f", float("nan")) + DATA[8:]),
        "Codebook: expected finite centers, got nan at [0, 1] of level 0",
    ),
    "an infinity": (
        file(HEADER, DATA[:-4] + struct.pack("<f", float("inf"))),
        "Codebook: expected finite centers, got inf at [0, 2] of level 2",
    ),
    "a zero's sign": (file(HEADER, b"\0\0\0\x80" + DATA[4:]), "fingerprint expected "),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_files(name, tmp_path):
    data, text = CORRUPT[name]
    (tmp_path / "bad.safetensors").write_bytes(data)
    for get in (lambda: Codebook.from_bytes(data), lambda: Codebook.load(tmp_path / "bad.safetensors")):
        with pytest.raises(CorruptFileError) as error:
            get()
        said = str(error.value)
        assert said.startswith("codebook file: ") and text in said and isinstance(error.value, ValueError)
        assert said == f"codebook file: {text}" or text in ("fingerprint expected ", "version expected 1, got ")


def survives(data):
    """The book, or None where a CorruptFileError says what is wrong."""
    try:
        return Codebook.from_bytes(data)
    except CorruptFileError as error:
        assert str(error).startswith("codebook file: ") and len(str(error)) > 30
        return None


def test_a_file_cut_anywhere_is_corrupt():
    assert all(survives(BYTES[:n]) is None for n in range(len(BYTES)))


def test_every_changed_byte_is_noticed():
    """Any byte, any bit: corrupt, or, where JSON does not care (a space for another), the same codebook."""
    harmless = 0
    for at in range(len(BYTES)):
        for value in {BYTES[at] ^ 1 << bit for bit in range(8)} | {0, 0x20, 0x22, 0x5C, 0x7D, 0xFF} - {BYTES[at]}:
            book = survives(BYTES[:at] + bytes([value]) + BYTES[at + 1 :])
            assert book is None or book == BOOK
            harmless += book is not None
    assert harmless <= (LENGTH - len(TEXT)) * 3


@given(st.data())
def test_random_damage(data):
    """Several edits at once: bytes inserted, removed, copied. A book that loads is the book."""
    damaged = bytearray(BYTES)
    for _ in range(data.draw(st.integers(1, 4))):
        at, n = data.draw(st.integers(0, len(damaged))), data.draw(st.integers(0, 9))
        piece = data.draw(st.binary(max_size=9) | st.sampled_from([b'"', b"{", b"}", b",", b"[", b"\\", b"9"]))
        damaged[at : at + n] = piece if data.draw(st.booleans()) else damaged[:n]
    book = survives(bytes(damaged))
    assert book is None or book == BOOK


@given(st.binary(max_size=80))
@example(b"{" + b'"\\' * 40)
@example(b'{"__metadata__":{"format":"hisac.codebook","version":"1","fingerprint":"0000000000000000"}')
def test_any_header(text):
    assert survives(file(text)) is None
    assert survives(text) is None


# --------------------------------------------------------------------------------------------------- files, copies


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(OSError, match=r"cannot open .*none: No such file or directory"):
        Codebook.load(tmp_path / "none")
    with pytest.raises(IsADirectoryError, match=f"cannot read {tmp_path}: Is a directory"):
        Codebook.load(tmp_path)
    BOOK.save(tmp_path / "locked")
    os.chmod(tmp_path / "locked", 0)
    if os.geteuid() != 0:  # the superuser reads everything
        with pytest.raises(OSError, match="Permission denied"):
            Codebook.load(tmp_path / "locked")
    for name in ("\u00e9" * 90, "\u4e2d" * 60, "\U0001f600" * 50):  # wherever the message is cut
        for path in (tmp_path / name, tmp_path / ("a" + name), f"/none/a{name}", f"/none/ab{name}"):
            with pytest.raises(OSError, match="cannot open"):
                Codebook.load(path)
            with pytest.raises(OSError, match="cannot write"):
                BOOK.save(Path(path) / "book")
    for name in (None, 3.5):
        with pytest.raises(TypeError):
            Codebook.load(name)


def test_names_of_files(tmp_path):
    """bytes, any script, and what is not UTF-8; a null character is not the end of the name."""
    names = ["plain", "\u00e9\u4e2d \U0001f600", b"bytes", b"\xc3\xa9"]
    if sys.platform != "darwin":  # a file system of UTF-8 only
        names += [b"x\xff", os.fsdecode(b"y\xfe")]
    for name in names:
        path = os.path.join(os.fsencode(tmp_path), name) if isinstance(name, bytes) else tmp_path / name
        BOOK.save(path)
        assert Codebook.load(path) == BOOK
    assert set(os.listdir(tmp_path)) == {os.fsdecode(name) for name in names}
    with pytest.raises(FileNotFoundError, match="none"):
        Codebook.load(os.fsencode(tmp_path) + b"/none\xff")
    for use in (Codebook.load, BOOK.save):
        with pytest.raises(ValueError, match=r"path expected no null character, got '.*plain.x00"):
            use(f"{tmp_path}/plain\0.safetensors")


def test_loading_what_is_no_file_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    said = []

    def load():
        try:
            Codebook.load(tmp_path / "pipe")
        except OSError as error:
            said.append(str(error))

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(10)
    assert said == [f"[Errno 22] codebook file: cannot read {tmp_path / 'pipe'}: expected a regular file, got a pipe"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("head", [b"\x93NUMPY", file(HEADER, b"")])
def test_a_large_file_of_another_kind_takes_no_memory(tmp_path, head):
    """3 GB that hold nothing but the first bytes."""

    def peak():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith("VmHWM"))

    with open(tmp_path / "large", "wb") as f:
        f.write(head)
        f.truncate(3 << 30)
    before = peak()
    with pytest.raises(CorruptFileError):
        Codebook.load(tmp_path / "large")
    assert peak() - before < 64 << 20


def test_save_keeps_modes_and_links_and_refuses_what_is_no_file(tmp_path):
    book, link, pipe = tmp_path / "book", tmp_path / "link", tmp_path / "pipe"
    BOOK.save(book)
    book.chmod(0o600)
    link.symlink_to("book")
    golden().save(link)
    assert link.is_symlink() and stat.S_IMODE(book.stat().st_mode) == 0o600 and Codebook.load(book) == BOOK
    os.mkfifo(pipe)
    with pytest.raises(OSError, match=f"cannot write {pipe}: expected a regular file, got a pipe") as error:
        BOOK.save(pipe)
    assert error.value.errno == errno.EINVAL and pipe.is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["book", "link", "pipe"]


def test_from_bytes_takes_bytes():
    for what in (5, "text", None, [1, 2]):
        with pytest.raises(TypeError):
            Codebook.from_bytes(what)


def test_a_failed_save_leaves_everything_as_it_was(tmp_path):
    """A missing folder, a folder in the way, a full or locked place: OSError, no part left behind."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"mine")
    for path in ("missing/book", "folder", "file/book", "x" * 300):
        with pytest.raises(OSError, match="codebook file: cannot write"):
            BOOK.save(tmp_path / path)
    if os.geteuid() != 0:
        os.chmod(tmp_path / "folder", 0o500)
        with pytest.raises(OSError, match="Permission denied"):
            BOOK.save(tmp_path / "folder" / "book")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and os.listdir(tmp_path / "folder") == []
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits a file's size")
def test_a_disk_that_fills_up_keeps_the_old_file(tmp_path):
    import resource
    import signal

    old = Codebook([np.ones((1, 3), np.float32)])
    old.save(tmp_path / "book")
    large = Codebook([np.ones((4096, 64), np.float32)])
    limits, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, limits[1]))
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            large.save(tmp_path / "book")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, action)
    assert os.listdir(tmp_path) == ["book"] and Codebook.load(tmp_path / "book") == old


def test_readers_see_the_old_or_the_new_file(tmp_path):
    """save renames: someone who loads meanwhile never meets half a file."""
    books = [Codebook([np.full((512, 16), n, np.float32)]) for n in range(2)]
    path, stop, seen = tmp_path / "book", threading.Event(), set()
    books[0].save(path)

    def rewrite():
        for n in range(40):
            books[n % 2].save(path)
        stop.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    while not stop.is_set():
        seen.add(Codebook.load(path).fingerprint)
    writer.join()
    assert seen <= {book.fingerprint for book in books}


def test_copies_and_pickles():
    book = hisac.fit(np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32), (4, 2), iterations=2)
    copies = [pickle.loads(pickle.dumps(book, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in (*copies, copy.copy(book), copy.deepcopy(book)):
        assert other == book and hash(other) == hash(book) and other.report == book.report is not None
        assert other.to_bytes() == book.to_bytes() and len({other, book}) == 1
    broken = pickle.dumps(book, 4).replace(b"hisac.codebook", b"hisac.notebook", 1)
    with pytest.raises((CorruptFileError, ModuleNotFoundError)):
        pickle.loads(broken)


def test_equality_hash_and_repr():
    same, other = golden(), Codebook([np.zeros((4, 3), np.float32)])
    assert BOOK == same and BOOK is not same and hash(BOOK) == hash(same)
    assert BOOK != other and BOOK != BOOK.fingerprint and BOOK != BYTES
    assert repr(BOOK) == f"Codebook(sizes=(4, 2, 1), width=3, fingerprint={BOOK.fingerprint:016x})"
    twice = [Codebook([np.zeros(s, np.float32)]) for s in ((2, 3), (3, 2))]
    assert twice[0] != twice[1], "the same bytes in another shape"
    with pytest.raises(AttributeError):
        BOOK.width = 4
    BOOK.centers[0][:] = 9
    assert BOOK.to_bytes() == BYTES, "centers are copies"
