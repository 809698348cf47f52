# SPDX-License-Identifier: Apache-2.0
"""`recent` parts histories as the definition says; attention to both parts is attention to the whole. `repeat_count`
counts."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hisac
from hisac import reference, testing
from hisac.types import Histories


def check(mine, expected):
    assert np.asarray(mine.rows).dtype == np.int64
    for name in ("rows", "x_ids", "v_ids"):
        got, want = getattr(mine, name), getattr(expected, name)
        assert got is want is None or np.asarray(got).tolist() == want.tolist()
    assert [list(map(int, a)) for a in mine.older.offsets] == [a.tolist() for a in expected.older.offsets]
    for name in ("log_share", "older_share"):
        got, want = np.asarray(getattr(mine, name)), getattr(expected, name)
        assert got.dtype == np.float32 and got.shape == want.shape
        assert np.array_equal(np.isneginf(got), np.isneginf(want))
        near = np.isfinite(want)
        np.testing.assert_allclose(got[near], want[near], rtol=1e-5, atol=1e-5)


@given(testing.problems(max_history=20), st.integers(0, 25))
def test_recent_is_its_definition(p, n):
    h = p.histories
    mine = hisac.recent(h, n)
    check(mine, reference.recent(h, n))
    assert all(a is b for a, b in zip(mine.older[:2] + mine.older[3:], h[:2] + h[3:], strict=True))
    total = np.exp(mine.log_share.astype(float)).sum(1) + np.exp(mine.older_share.astype(float))
    assert (np.isclose(total, 1, atol=1e-5) | (total == 0)).all()
    for name, table in (("x_ids", h.x), ("v_ids", h.v)):  # every one may be looked up
        ids = getattr(mine, name)
        assert ids is None or len(table) == 0 or ((ids >= 0) & (ids < len(table))).all()


@given(testing.problems(max_history=20), st.integers(0, 25))
def test_recent_of_tensors_and_lists(p, n):
    torch = pytest.importorskip("torch")
    hisac_torch = pytest.importorskip("hisac.torch")
    h = testing.to_torch(p.histories)
    expected = reference.recent(p.histories, n)
    check(hisac.recent(h, n), expected)
    check(hisac_torch.recent(h, n), expected)
    if isinstance(h.offsets, torch.Tensor):
        check(hisac_torch.recent(h._replace(offsets=h.offsets.tolist()), n), expected)


def test_padding_is_passed_over():
    """Of a user padded on the right the recent behaviours are those before the padding."""
    h = Histories(v_ids=np.array([4, 5, 6, -1, -1, -1, 7, 8]), offsets=[0, 5, 8])
    found = hisac.recent(h, 2)
    assert found.v_ids.tolist() == [[5, 6], [7, 8]] and found.rows.tolist() == [[1, 2], [6, 7]]
    assert found.older.offsets[1].tolist() == [1, 5] and np.allclose(np.exp(found.older_share), [1 / 3, 0])
    outside = hisac.recent(h._replace(v=np.zeros((8, 1), np.float32)), 2)  # 8 is outside
    assert outside.v_ids.tolist() == [[5, 6], [7, 0]] and outside.log_share[1].tolist() == [0, -np.inf]


@given(st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_attention_to_both_parts_is_attention_to_the_whole(seed, n):
    """Raw older behaviours, under their shares, merged with recent ones: the attention to all of the history."""
    rng = np.random.default_rng(seed)
    offsets, at = np.array([0, 7, 7, 12]), np.array([0, 2, 4, 6])
    keys, values = (rng.normal(size=(12, 2, 3)).astype(np.float32) for _ in range(2))
    q, bias = rng.normal(size=(6, 2, 3)).astype(np.float32), rng.normal(size=12).astype(np.float32)
    bias[[3, 11]] = -np.inf, np.nan
    found = hisac.recent(Histories(v=values[:, 0], offsets=offsets, bias=bias), n)
    total = [reference.logsumexp(np.where(np.isfinite(bias), bias, -np.inf)[s], 0) for s in reference.ranges(offsets)]
    share = bias - np.repeat(total, np.diff(offsets)).astype(np.float32)
    whole = hisac.attend(q, keys, values, at, bias=share, token_offsets=offsets)
    new = hisac.attend(q, keys[found.rows], values[found.rows], at, bias=found.log_share)
    older = [np.arange(*s) for s in zip(*map(np.ndarray.tolist, found.older.offsets), strict=True)]
    left, ends = np.concatenate(older), np.cumsum([0, *map(len, older)])
    old = hisac.attend(q, keys[left], values[left], at, bias=share[left], token_offsets=ends)
    merged = hisac.merge(old, new)
    np.testing.assert_allclose(merged.lse, whole.lse, atol=1e-5)
    np.testing.assert_allclose(merged.out, whole.out, atol=1e-5)


def test_recent_errors():
    h = Histories(v=np.zeros((4, 1)), offsets=np.array([0, 3, 4]))
    with pytest.raises(ValueError, match=r"^recent: n expected 0 to inf, got -1"):
        hisac.recent(h, -1)
    with pytest.raises(TypeError, match=r"^recent: n expected a whole number, got 1.5"):
        hisac.recent(h, 1.5)
    for offsets, got in ((np.array([0, 3, 2]), "[3, 2) for user 1"), (np.array([0, 3, 5]), "[3, 5) for user 1")):
        text = "recent: offsets expected 0 <= start <= end <= 4 for every user, got "
        with pytest.raises(ValueError, match="^" + re.escape(text + got)):
            hisac.recent(h._replace(offsets=offsets), 1)
    with pytest.raises(TypeError, match=r"^recent: offsets expected int32 or int64, got float64"):
        hisac.recent(h._replace(offsets=np.array([0, 2.7, 4])), 1)
    with pytest.raises(ValueError, match=r"^recent: offsets expected as many starts as ends, got 2 and 1"):
        hisac.recent(h._replace(offsets=(np.array([0, 1]), np.array([1]))), 1)
    with pytest.raises(TypeError, match=r"^recent: histories expected hisac.Histories, got ndarray"):
        hisac.recent(h.v, 1)
    with pytest.raises(TypeError, match=r"^recent: bias expected float32 \[T\], got float64 \[4\]"):
        hisac.recent(h._replace(bias=np.zeros(4)), 1)
    with pytest.raises(ValueError, match=r"^recent: bias expected \[T\] = \[4\], got \[3\]"):
        hisac.recent(h._replace(bias=np.zeros(3, np.float32)), 1)
    with pytest.raises(ValueError, match=r"^recent: v_ids expected \[T\] = \[4\], got \[3\]"):
        hisac.recent(Histories(x_ids=np.zeros(4, int), v_ids=np.zeros(3, int), offsets=h.offsets), 1)
    with pytest.raises(TypeError, match=r"^histories expected with x, v, codes or ids, got none of these"):
        hisac.recent(Histories(offsets=h.offsets), 1)
    for name in ("bias", "spread", "weights"):  # each tells T
        only = hisac.recent(Histories(offsets=h.offsets, **{name: np.zeros(4, np.float32)}), 1)
        assert only.rows.tolist() == [[2], [3]]


# ------------------------------------------------------------------------------------------------------ repeat_count


@st.composite
def counted(draw):
    """Histories of few ids, some negative, and candidates of these and of others."""
    users = draw(st.integers(0, 4))
    ids = np.array(draw(st.lists(st.integers(-2, 5), max_size=30)), draw(st.sampled_from([np.int32, np.int64])))
    cuts = np.sort(draw(st.lists(st.integers(0, len(ids)), min_size=2 * users, max_size=2 * users)))
    if draw(st.booleans()):
        offsets = cuts[:users].astype(np.int64), cuts[users:].astype(np.int64)  # they may overlap
    else:
        offsets = np.array([0, *cuts[:users]], np.int64)
    asked = np.array(draw(st.lists(st.integers(-2, 7), max_size=12)), draw(st.sampled_from([np.int32, np.int64])))
    at = np.sort(draw(st.lists(st.integers(0, len(asked)), min_size=users + 1, max_size=users + 1))).astype(np.int64)
    field = draw(st.sampled_from(["v_ids", "x_ids"]))
    other = {"x_ids": np.zeros_like(ids)} if field == "v_ids" and draw(st.booleans()) else {}
    return Histories(offsets=offsets, **{field: ids}, **other), asked, at


@given(counted())
def test_repeat_count_is_its_definition(p):
    expected = reference.repeat_count(*p)
    mine = hisac.repeat_count(*p)
    assert mine.dtype == np.int64 and mine.tolist() == expected.tolist()


@given(counted())
def test_repeat_count_of_tensors_and_lists(p):
    torch = pytest.importorskip("torch")
    hisac_torch = pytest.importorskip("hisac.torch")
    expected, (h, ids, at) = reference.repeat_count(*p).tolist(), testing.to_torch(p)
    assert hisac.repeat_count(h, ids, at).tolist() == expected
    mine = hisac_torch.repeat_count(h, ids, at)
    assert mine.dtype == torch.int64 and mine.tolist() == expected
    assert hisac_torch.repeat_count(h, ids, at.tolist()).tolist() == expected


def test_repeat_count_errors():
    h, ids, at = Histories(v_ids=np.zeros(4, int), offsets=np.array([0, 3, 4])), np.zeros(2, int), np.array([0, 1, 2])
    with pytest.raises(TypeError, match=r"^repeat_count: v_ids or x_ids expected in the histories, got neither"):
        hisac.repeat_count(h._replace(v_ids=None, v=np.zeros((4, 1))), ids, at)
    with pytest.raises(TypeError, match=r"^repeat_count: ids expected int32 or int64, got float64"):
        hisac.repeat_count(h, ids.astype(float), at)
    with pytest.raises(TypeError, match=r"^repeat_count: ids of the histories expected int32 or int64, got float64"):
        hisac.repeat_count(h._replace(v_ids=np.zeros(4)), ids, at)
    with pytest.raises(ValueError, match=r"^repeat_count: candidate_offsets expected \[B \+ 1\] = \[3\], got \[2\]"):
        hisac.repeat_count(h, ids, at[:2])
    with pytest.raises(ValueError, match=r"^repeat_count: candidate_offsets expected 0 <= start <= end <= 2 for every"):
        hisac.repeat_count(h, ids, np.array([0, 2, 1]))
    with pytest.raises(ValueError, match=r"^repeat_count: offsets expected 0 <= start <= end <= 4 for every user"):
        hisac.repeat_count(h._replace(offsets=np.array([0, 3, 5])), ids, at)
    with pytest.raises(ValueError, match=r"^repeat_count: ids of the histories expected one dimension, got \[4, 1\]"):
        hisac.repeat_count(h._replace(v_ids=np.zeros((4, 1), int)), ids, at)
