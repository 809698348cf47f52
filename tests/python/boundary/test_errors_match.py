# SPDX-License-Identifier: Apache-2.0
"""Every refusal of `match` and `match_backward` that Python sees, word for word."""

import numpy as np
import pytest

import hisac
from hisac import Histories, Match
from support import said

BOOK = hisac.Codebook([np.zeros((4, 6), np.float32), np.zeros((3, 6), np.float32)])
CODES = np.int32([[0, 0], [0, 2], [1, 1], [3, 0], [3, 2]])
V, BIAS = np.ones((5, 2), np.float32), np.zeros(5, np.float32)
SUMS = Histories(None, V, np.array([0, 2, 5]), CODES, bias=BIAS)
RIGHT = {"book": BOOK, "sums": SUMS, "codes": CODES[:4], "candidate_offsets": np.array([0, 3, 4])}
FOUND = hisac.match(**RIGHT)
SPAN = "candidate_offsets expected 0 <= start <= end <= 4 for every user, got"
FLOATS = "float32, bfloat16 or float16"

MATCH = [
    ({"book": 3}, TypeError, "book expected hisac.Codebook, got int"),
    ({"sums": tuple(SUMS)}, TypeError, "histories expected hisac.Histories, got tuple"),
    ({"sums": SUMS._replace(v=None)}, TypeError, "sums.v expected in the histories, got None"),
    ({"sums": SUMS._replace(codes=None)}, TypeError, "sums.codes expected in the histories, got None"),
    ({"sums": SUMS._replace(v=V.astype(float))}, TypeError, f"sums.v expected {FLOATS} [S, V], got float64 [5, 2]"),
    ({"sums": SUMS._replace(v=V[:, :0])}, ValueError, "expected V of 1 to 2^20, got 0"),
    ({"sums": SUMS._replace(v=V[0])}, ValueError, "sums.v expected [S, V], got float32 [2]"),
    ({"sums": SUMS._replace(codes=CODES[:4])}, ValueError, "codes of sums expected [5, 2], got [4, 2]"),
    ({"sums": SUMS._replace(codes=CODES[:, :1])}, ValueError, "codes of sums expected [5, 2], got [5, 1]"),
    (
        {"sums": SUMS._replace(codes=CODES.astype(np.int64))},
        TypeError,
        "sums.codes expected int32 [S, L], got int64 [5, 2]",
    ),
    ({"sums": SUMS._replace(bias=BIAS[:4])}, ValueError, "bias expected [5], got [4]"),
    ({"sums": SUMS._replace(bias=BIAS[None])}, ValueError, "sums.bias expected float32 [S], got float32 [1, 5]"),
    ({"sums": SUMS._replace(x_ids=np.arange(5))}, ValueError, "sums expected without ids, got x_ids"),
    ({"sums": SUMS._replace(v_ids=np.arange(5))}, ValueError, "sums expected without ids, got v_ids"),
    (
        {"sums": SUMS._replace(offsets=np.array([0, 2, 6]))},
        ValueError,
        "offsets expected 0 <= start <= end <= 5 for every user, got [2, 6) for user 1",
    ),
    ({"sums": SUMS._replace(longest=2)}, ValueError, "longest expected at least 3, got 2"),
    ({"codes": CODES[:, :1]}, ValueError, "codes expected [5, 2], got [5, 1]"),
    ({"codes": CODES[0]}, ValueError, "codes expected [N, L], got int32 [2]"),
    (
        {"codes": CODES.astype(np.int64)},
        TypeError,
        "codes expected int32 [N, L], or [items, L] with ids, got int64 [5, 2]",
    ),
    ({"ids": np.zeros((2, 2), np.int64)}, ValueError, "ids expected [N], got int64 [2, 2]"),
    ({"ids": np.zeros(2, np.float32)}, TypeError, "ids expected int32 or int64 [N], got float32 [2]"),
    (
        {"candidate_offsets": np.array([0, 4])},
        ValueError,
        "offsets of sums name 2 users, candidate_offsets 1: B differs",
    ),
    ({"candidate_offsets": np.array([0, 3, 5])}, ValueError, f"{SPAN} [3, 5) for user 1"),
    ({"candidate_offsets": np.array([0, 3, 2])}, ValueError, f"{SPAN} [3, 2) for user 1"),
    ({"candidate_offsets": np.array([-1, 3, 4])}, ValueError, f"{SPAN} [-1, 3) for user 0"),
    (
        {"candidate_offsets": np.array([0.0, 3, 4])},
        TypeError,
        "candidate_offsets expected int32 or int64 [B + 1], got float64 [3]",
    ),
]


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        *MATCH,
        ({"out": tuple(FOUND)}, TypeError, "out expected hisac.Match, got tuple"),
        ({"out": Match(V, None)}, ValueError, "out v expected float32 [4, 2, 2], got float32 [5, 2]"),
        ({"out": Match(None, FOUND.v)}, ValueError, "out lse expected float32 [4, 2], got float32 [4, 2, 2]"),
    ],
)
def test_match(change, kind, text):
    said(lambda: hisac.match(**RIGHT | change), kind, f"match: {text}")


GIVEN = "expected d_v [4, 2, 2] and d_lse [4, 2]"


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        *MATCH,
        ({"gradients": tuple(FOUND)}, TypeError, "gradients expected hisac.Match, got tuple"),
        ({"gradients": Match(FOUND.v[:3], None)}, ValueError, GIVEN),
        ({"gradients": Match(None, FOUND.lse[:3])}, ValueError, GIVEN),
        (
            {"gradients": Match(FOUND.v.astype(float), None)},
            TypeError,
            f"d_v expected {FLOATS} [N, L, V], got float64 [4, 2, 2]",
        ),
        ({"need": ("v", "x")}, ValueError, "need expected names of ('v', 'bias'), got ('v', 'x')"),
    ],
)
def test_match_backward(change, kind, text):
    said(lambda: hisac.match_backward(**RIGHT | {"gradients": FOUND} | change), kind, f"match_backward: {text}")


def test_out_is_written_into():
    out = Match(np.full_like(FOUND.v, 7), np.full_like(FOUND.lse, 7))
    found = hisac.match(**RIGHT, out=out)
    assert found.v is out.v and found.lse is out.lse
    assert np.array_equal(found.v, FOUND.v) and np.array_equal(found.lse, FOUND.lse)


def test_lists_are_offsets_and_other_strides_are_copied():
    wide = np.zeros((5, 4), np.float32)
    wide[:, ::2] = V
    sums = SUMS._replace(v=wide[:, ::2], offsets=[0, 2, 5])
    for a, b in zip(hisac.match(**RIGHT | {"sums": sums}), FOUND, strict=True):
        assert np.array_equal(a, b)
