# SPDX-License-Identifier: Apache-2.0
"""A codebook as bytes: its image, and what stands beside the centers in image and file: temperature and report."""

import copy
import json
import mmap
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hisac
from hisac import Codebook, CorruptFileError, FitReport, reference
from support import flat

HEAD = 512
# where the fields of the head lie: hisac/codebook.h has what they mean
VERSION, LEVELS, WIDTH, SIZES, FINGERPRINT, BYTES, CHECKSUM, TEMPERATURE = 8, 12, 16, 24, 88, 96, 104, 112


def make(sizes=(4, 2, 1), width=3, seed=0, **more):
    rng = np.random.default_rng(seed)
    return Codebook([rng.normal(size=(c, width)).astype(np.float32) for c in sizes], **more)


def fitted(width=5, rows=200, sizes=(4, 3), scale=1.0):
    x = np.random.default_rng(1).normal(size=(rows, width)).astype(np.float32)
    x[3] = np.nan
    return hisac.fit(x * np.float32(scale), sizes, iterations=3)


def notes(book):
    return book.temperature, book.report


# ------------------------------------------------------------------------------------------------------------ the image


def test_the_head_of_an_image():
    data = make(width=13).image.tobytes()
    assert data[:8] == b"hisacbk\0" and struct.unpack_from("<II4q", data, VERSION) == (1, 3, 13, 4, 2, 1)
    assert struct.unpack_from("<Q", data, FINGERPRINT)[0] == make(width=13).fingerprint
    assert struct.unpack_from("<q", data, BYTES)[0] == len(data)


def test_the_centers_lie_in_the_image_as_they_are():
    """In the order of the levels, each at a multiple of 64."""
    for book in (make(width=13), make((3, 5), 8)):
        at = HEAD
        for c in book.centers:
            assert book.image[at : at + c.nbytes].tobytes() == c.tobytes()
            at += -(-c.nbytes // 64) * 64


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 20), st.integers(0, 2**32), st.booleans())
def test_a_view_is_the_codebook(sizes, width, seed, tempered):
    book = make(sizes, width, seed, temperature=0.25 if tempered else None)
    again = Codebook.view(book.image.copy())
    assert again == book and again.sizes == book.sizes and again.width == width and notes(again) == notes(book)
    assert again.to_bytes() == book.to_bytes() and again.image.tobytes() == book.image.tobytes()
    x = np.random.default_rng(seed).normal(size=(30, width)).astype(np.float32)
    codes = book.encode(x)
    assert again.encode(x).tobytes() == codes.tobytes()
    assert again.prototypes(codes).tobytes() == book.prototypes(codes).tobytes()


def test_a_view_copies_nothing_and_keeps_what_it_needs(tmp_path):
    book = make((40, 30), 16)
    x, path = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32), tmp_path / "image"
    codes = book.encode(x)
    path.write_bytes(book.image.tobytes())
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    image = np.frombuffer(mapped, np.uint8)
    view = Codebook.view(image)
    assert view.image.ctypes.data == image.ctypes.data and not view.image.flags.writeable
    assert Codebook.view(mapped) == Codebook.view(path.read_bytes()) == book
    del image, mapped
    assert view.encode(x).tobytes() == codes.tobytes()
    image = view.image
    del view
    assert image.tobytes() == book.image.tobytes()


def test_an_image_that_begins_anywhere_is_taken():
    book = make()
    room = np.empty(len(book.image) + 64, np.uint8)
    for shift in (1, 4, 32):
        part = room[shift : shift + len(book.image)]
        part[:] = book.image
        assert Codebook.view(part) == book


def test_a_view_of_a_tensor():
    torch = pytest.importorskip("torch")
    book = make()
    image = torch.tensor(book.image)
    assert Codebook.view(image) == book
    assert Codebook.view(torch.cat([image, image])[: len(image)]) == book


def put(data, at, kind, value):
    data = bytearray(data)
    struct.pack_into(kind, data, at, value)
    return bytes(data)


IMAGE = make().image.tobytes()
DAMAGED = {
    "nothing": (b"", "expected at least 512 bytes, got 0"),
    "half a head": (IMAGE[:256], "expected at least 512 bytes, got 256"),
    "another file": (b"hisacbk1" + IMAGE[8:], "the bytes are no image"),
    "version 2": (put(IMAGE, VERSION, "<I", 2), "version expected 1, got 2"),
    "no level": (put(IMAGE, LEVELS, "<I", 0), "sizes are out of range"),
    "9 levels": (put(IMAGE, LEVELS, "<I", 9), "sizes are out of range"),
    "width 0": (put(IMAGE, WIDTH, "<q", 0), "sizes are out of range"),
    "width 2^20 + 1": (put(IMAGE, WIDTH, "<q", 2**20 + 1), "sizes are out of range"),
    "a negative size": (put(IMAGE, SIZES, "<q", -4), "sizes are out of range"),
    "a size of 2^62": (put(IMAGE, SIZES + 8, "<q", 2**62), "sizes are out of range"),
    "another size": (put(IMAGE, SIZES, "<q", 2**20), f"bytes, got {len(IMAGE)}"),
    "cut short": (IMAGE[:-64], f"expected {len(IMAGE)} bytes, got {len(IMAGE) - 64}"),
    "64 bytes more": (IMAGE + bytes(64), f"expected {len(IMAGE)} bytes, got {len(IMAGE) + 64}"),
    "another fingerprint": (put(IMAGE, FINGERPRINT, "<Q", 1), "checksum expected "),
    "a temperature": (put(IMAGE, TEMPERATURE, "<f", 0.5), "checksum expected "),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_images(name):
    data, text = DAMAGED[name]
    with pytest.raises(CorruptFileError, match=r"^codebook image: ") as error:
        Codebook.view(np.frombuffer(data, np.uint8))
    assert text in str(error.value)


@given(st.integers(0, len(IMAGE) - 1), st.integers(1, 255))
def test_every_changed_byte_is_noticed(at, change):
    data = bytearray(IMAGE)
    data[at] ^= change
    with pytest.raises(CorruptFileError, match=r"^codebook image: "):
        Codebook.view(np.frombuffer(bytes(data), np.uint8))


def test_what_is_no_image_at_all():
    for image, kind, text in (
        (np.zeros(600, np.float32), TypeError, r"Codebook: image expected uint8 \[any\], got float32 \[600\]"),
        (np.zeros((2, 600), np.uint8), ValueError, r"Codebook: image expected \[any\], got uint8 \[2, 600\]"),
        (b"hisac", CorruptFileError, "codebook image: expected at least 512 bytes, got 5"),
        ("hisac", TypeError, "Codebook: image expected a NumPy array"),
        (make().to_bytes() * 9, CorruptFileError, "the bytes are no image; for a file of `save` there is load"),
    ):
        with pytest.raises(kind, match=text):
            Codebook.view(image)


# ----------------------------------------------------------------------------------------------- temperature and report


def test_fit_leaves_a_temperature_and_a_report():
    book = fitted()
    assert book.temperature == np.float32(0.05 * book.report.error[-1]) > 0
    assert book.report.rows == 199 and book.report.left_out == 1
    assert make().temperature is None and make().report is None
    assert make(temperature=0.25).temperature == 0.25
    same = hisac.fit(np.ones((9, 2), np.float32), 1)
    assert same.report.error == (0.0,) and same.temperature is None, "where every row is met there is no scale"


def test_both_stay_through_files_images_copies_and_pickles(tmp_path):
    book = fitted()
    book.save(tmp_path / "book")
    again = Codebook.load(tmp_path / "book"), Codebook.from_bytes(book.to_bytes()), Codebook.view(book.image.copy())
    for one in (*again, copy.copy(book), copy.deepcopy(book), pickle.loads(pickle.dumps(book))):
        assert one == book and notes(one) == notes(book) and isinstance(one.report, FitReport)
        assert one.image.tobytes() == book.image.tobytes()


def test_neither_is_part_of_the_fingerprint():
    book, plain = fitted(), Codebook(fitted().centers)
    assert book == plain and book.fingerprint == plain.fingerprint
    assert book.to_bytes() != plain.to_bytes()


@given(st.floats(2.0**-140, 2.0**127, width=32))
def test_any_temperature_survives(tau):
    book = make(temperature=tau)
    assert Codebook.from_bytes(book.to_bytes()).temperature == book.temperature == np.float32(tau)


@pytest.mark.parametrize("tau", [0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none(tau):
    with pytest.raises(ValueError, match=r"^Codebook: temperature expected finite and > 0, got "):
        make(temperature=tau)


def test_a_temperature_that_float32_rounds_to_none():
    """1e-60 was taken for no temperature."""
    with pytest.raises(ValueError, match=r"^Codebook: temperature expected above 0 in float32, got 1e-60$"):
        make(temperature=1e-60)


def metadata(data):
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length])["__metadata__"]


def with_metadata(data, **fields):
    """The file with fields of its metadata changed; None removes."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {k: v for k, v in (header["__metadata__"] | fields).items() if v is not None}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def test_the_metadata_of_a_fit():
    book = fitted()
    found, report = metadata(book.to_bytes()), book.report
    assert float(found["temperature"]) == book.temperature
    levels = zip(report.iterations, report.error, report.unused, strict=True)
    assert [float(n) for n in found["fit"].split()] == [*report[:2], *(n for level in levels for n in level)]


WHOLE = "metadata fit expected rows, left_out, and for each level iterations, error, unused"


@pytest.mark.parametrize("text", ["", "warm", "nan", "inf", "-0.5", "1e39", "0.5 0.5", " 0.5", "0.5 ", "0,5", "0x1"])
def test_a_damaged_temperature(text):
    with pytest.raises(CorruptFileError, match=r"^codebook file: metadata temperature expected a number of float32$"):
        Codebook.from_bytes(with_metadata(fitted().to_bytes(), temperature=text))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ("", "metadata fit expected numbers"),
        ("rows", "metadata fit expected numbers"),
        ("199 1 3 0.5 0 3 nan 0", "metadata fit expected numbers"),
        ("199 1 3 0.5 0 3 -0.1 0", "metadata fit expected numbers"),
        ("199  1 3 0.5 0 3 0.25 0", "metadata fit expected numbers"),
        (" ".join("1" * 27), "metadata fit expected numbers"),
        ("199 1 3 0.5 0 3 0.25", WHOLE),
        ("199 1 3 0.5 0 3 0.25 0 0", WHOLE),
        ("0 1 3 0.5 0 3 0.25 0", WHOLE),
        ("1e16 1 3 0.5 0 3 0.25 0", WHOLE),
        ("199 0.5 3 0.5 0 3 0.25 0", WHOLE),
        ("199 1 3e9 0.5 0 3 0.25 0", WHOLE),
    ],
)
def test_a_damaged_report(numbers, text):
    with pytest.raises(CorruptFileError, match=f"^codebook file: {text}$"):
        Codebook.from_bytes(with_metadata(fitted().to_bytes(), fit=numbers))


def test_metadata_without_one_of_both():
    """Another tool may leave out the report, or the temperature, which then follows from the report."""
    book = fitted()
    assert notes(Codebook.from_bytes(with_metadata(book.to_bytes(), fit=None))) == (book.temperature, None)
    assert notes(Codebook.from_bytes(with_metadata(book.to_bytes(), temperature=None))) == notes(book)


# ------------------------------------------------------------------------------------ what the default temperature does


def test_every_verb_takes_the_temperature_of_the_codebook():
    book = fitted()
    x = np.random.default_rng(2).normal(size=(40, 5)).astype(np.float32)
    h = hisac.Histories(x, x, [0, 25, 40], book.encode(x))
    theirs = reference.Codebook(book.centers, temperature=book.temperature)
    assert theirs.temperature == book.temperature
    given = {"temperature": book.temperature}
    made = hisac.compress(book, h, budget=6)
    assert flat(made[:2]) == flat(hisac.compress(book, h, budget=6, **given)[:2])
    out = hisac.route(h, made.agents, book=book)
    assert flat(out) == flat(hisac.route(h, made.agents, book=book, **given))
    back = {"forward": out, "gradients": out, "book": book, "need": ("v", "temperature")}
    mine = hisac.route_backward(h, made.agents, **back)
    assert flat(mine) == flat(hisac.route_backward(h, made.agents, **back, **given)) and mine.temperature.shape == (1,)
    exact = [reference.compress(theirs, h, budget=6, **more).tokens for more in ({}, given)]
    np.testing.assert_array_equal(*exact)


@given(st.integers(-20, 20), st.sampled_from(["exact", "leaf"]), st.sampled_from(["agents", "history"]))
def test_the_scale_of_x_changes_nothing(power, method, normalize):
    """A factor on every embedding, of a power of two so that nothing rounds: the same codes, agents and tokens."""
    x = np.random.default_rng(3).normal(size=(300, 5)).astype(np.float32)

    def compressed(x):
        book = hisac.fit(x, (6, 4), iterations=3)
        h = hisac.Histories(x, v, [0, 100, 300])
        return hisac.compress(book, h, budget=8, method=method, normalize=normalize)

    v = x.copy()
    one, other = compressed(x), compressed(x * np.float32(2.0**power))
    assert flat(one.agents[:3]) == flat(other.agents[:3]) and flat(one[:2]) == flat(other[:2])
