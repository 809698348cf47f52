# SPDX-License-Identifier: Apache-2.0
"""The vectors that the C++ tests read are what the reference says now, and a change of either would show."""

import struct

import numpy as np
import pytest
import vectors
from vector_cases import cases, encode_cases

COMMITTED = vectors.FILE.read_bytes()


def test_the_file_is_what_the_reference_says():
    assert vectors.differences(COMMITTED, vectors.write(cases())) == []


def test_splitmix64_is_splitmix64():
    """The first numbers of its authors' program from 1234567."""
    assert vectors.bits(1234567, 3).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def encode_file():
    return vectors.write(encode_cases())


def test_a_changed_integer_is_a_difference():
    name = vectors.read(encode_file())[0][0]
    spoilt = bytearray(encode_file())
    at = spoilt.index(b"codes") + len("codes") + 4 + 13  # past the name, the size, a rank and two lengths
    spoilt[at] ^= 1
    assert vectors.differences(bytes(spoilt), encode_file()) == [name.replace("book", "codes")]


@pytest.mark.parametrize("factor", [1 + 2.0**-20, 1.0])
def test_a_changed_float_is_a_difference(factor):
    """One in the last digit or two is not: another order of a sum may cost that."""
    values = np.linspace(1, 2, 7)
    old, new = (vectors.write([("a/b", {"c": vectors.Floats(v, 1e-6)})]) for v in (values, values * factor))
    assert vectors.differences(old, new) == ([] if factor == 1 else ["a/b: c"])


def test_a_wider_bound_is_a_difference():
    old, new = (vectors.write([("a/b", {"c": vectors.Floats(np.ones(3), b)})]) for b in (1e-6, 1.1e-6))
    assert vectors.differences(old, new) == ["a/b: c, its bound"]


def test_bounds_are_rounded_up():
    bounds = np.concatenate([2.0 ** np.arange(-120, 60) * 1.2345, [0.0, np.inf, np.nan]])
    (_, _, back) = vectors.floats(vectors.Floats(np.zeros(len(bounds)), bounds).payload()[1])
    some = bounds[:-3]
    assert (back[0, :-3] >= some).all() and (back[0, :-3] <= some * 1.01).all()
    assert back[0, -3] == 0 and np.isinf(back[0, -2]) and np.isnan(back[0, -1])


def test_equal_records_are_written_once():
    twice = [("a/b", {"x": vectors.Stored(np.arange(50)), "y": vectors.Stored(np.arange(50))})]
    assert len(vectors.write(twice)) < 2 * 50 * 8
    assert [r[2] for r in vectors.read(vectors.write(twice))] == [struct.pack("<BI50q", 1, 50, *range(50))] * 2
