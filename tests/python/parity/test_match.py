# SPDX-License-Identifier: Apache-2.0
"""`match` against `hisac.reference`, within `hisac.reference.bounds`; what it copies, bit for bit; and the same bits
whatever the threads, the order of the candidates and the other users."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hisac
from hisac import Histories, Match, reference, testing
from hisac.reference import bounds
from support import flat, kinds, with_threads

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the reference, on hostile values


@given(testing.matchings())
def test_match(p):
    check_match(p)


@given(testing.matchings(hostile=True))
def test_match_hostile(p):
    check_match(p)


@given(testing.matchings(max_levels=8, max_sums=200, max_candidates=40))
def test_match_of_deep_trees(p):
    check_match(p)


def check_match(p):
    expected, bound = p.reference(), p.bound()
    for convert, dtype in kinds(p):
        args = convert(p.match_args())
        mine = with_threads(lambda: hisac.match(**args))  # noqa: B023
        testing.assert_match_close(mine, expected, bound)
        assert np.array_equal(bounds.as_numpy(mine.lse) == -np.inf, expected.lse == -np.inf)
        assert str(mine.v.dtype).endswith(dtype) and str(mine.lse.dtype).endswith("float32")


@given(testing.matchings())
def test_match_backward(p):
    check_backward(p)


@given(testing.matchings(hostile=True))
def test_match_backward_hostile(p):
    check_backward(p)


def check_backward(p):
    exact = p.by_reference(p.backward_args(p.reference()))
    expected = reference.match_backward(**exact)
    for convert, _ in kinds(p):
        args = convert(p.backward_args(p.reference()))
        mine = with_threads(lambda: hisac.match_backward(**args))  # noqa: B023
        testing.assert_gradients_close(mine, expected, exact)
        for name in ("v", "bias"):
            alone = hisac.match_backward(**args | {"need": name})
            assert flat(getattr(alone, name)) == flat(getattr(mine, name)) and sum(g is None for g in alone) == 1


@given(testing.matchings(), st.randoms(use_true_random=False))
def test_the_order_of_candidates_changes_no_bit(p, random):
    """Nor do candidates or users that are left out."""
    args = p.match_args()
    mine, order = hisac.match(**args), np.arange(len(p.codes if p.ids is None else p.ids))
    for b in range(len(p.candidate_offsets) - 1):
        own = slice(*p.candidate_offsets[b : b + 2])
        order[own] = random.sample(order[own].tolist(), len(order[own]))
    moved = {"codes": p.codes[order]} if p.ids is None else {"ids": p.ids[order]}
    assert flat(hisac.match(**args | moved)) == flat(tuple(a[order] for a in mine))
    spans = p.sums.offsets if isinstance(p.sums.offsets, tuple) else (p.sums.offsets[:-1], p.sums.offsets[1:])
    for b in range(len(spans[0])):
        own = slice(*p.candidate_offsets[b : b + 2])
        sums = p.sums._replace(offsets=tuple(a[b : b + 1] for a in spans))
        for n in range(own.start, own.stop):
            alone = {"codes": p.codes[n : n + 1]} if p.ids is None else {"ids": p.ids[n : n + 1]}
            one = args | {"sums": sums, "candidate_offsets": np.array([0, 1])} | alone
            assert flat(hisac.match(**one)) == flat(tuple(a[n : n + 1] for a in mine))


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_a_single_row_is_copied(dtype):
    """A NaN's bits, -0, subnormals and the bias of a leaf that is one row, on every level above it too."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    bits = rng.integers(-(2**15), 2**15, (40, 7), np.int16) if dtype != "float32" else rng.integers(
        -(2**31), 2**31, (40, 7), np.int32
    )  # fmt: skip
    bits[0] = 0, -(2 ** (8 * bits.itemsize - 1)), 1, -1, 2, 3, 4
    v, bias = torch.from_numpy(bits).view(getattr(torch, dtype)), torch.linspace(-90, 90, 40)
    codes = torch.stack([torch.arange(40), torch.arange(40) % 3], 1).int()
    book = hisac.Codebook([np.zeros((40, 2), np.float32), np.zeros((3, 2), np.float32)])
    sums = Histories(None, v, torch.tensor([0, 40]), codes, bias=bias)
    out = hisac.match(book, sums, codes, torch.tensor([0, 40]))
    for level in range(2):
        assert torch.equal(out.v[:, level].contiguous().view(torch.from_numpy(bits).dtype), torch.from_numpy(bits))
        assert torch.equal(out.lse[:, level], bias)


@pytest.mark.parametrize("rows", [63, 64, 65, 2048, 2049, 30000])
@pytest.mark.parametrize("biased", [False, True])
def test_match_of_long_nodes(rows, biased):
    """Far inside the bound on average: sums of runs and tiles, and biases relative to the largest of the node."""
    rng = np.random.default_rng(rows)
    book = hisac.Codebook([np.zeros((3, 2), np.float32), np.zeros((rows, 2), np.float32)])
    codes = np.stack([np.repeat([0, 2], [rows, 7]), np.r_[:rows, :7]], 1).astype(np.int32)
    v, bias = rng.normal(size=(rows + 7, 5)).astype(np.float32), None
    if biased:
        bias = (3 * rng.normal(size=rows + 7)).astype(np.float32)
        bias[codes[:, 0] == 2] += 200
    sums = Histories(None, v, np.array([0, rows + 7]), codes, bias=bias)
    asked = np.int32([[0, 1], [1, 1], [2, 5], [0, rows - 1]])
    args = {"book": book, "sums": sums, "codes": asked, "candidate_offsets": np.array([0, 4])}
    mine, exact = with_threads(lambda: hisac.match(**args)), args | {"book": reference.Codebook(book.centers)}
    expected = reference.match(**exact)
    testing.assert_match_close(mine, expected, bounds.match_bound(exact))
    assert np.linalg.norm(mine.v - expected.v) <= 2e-6 * np.linalg.norm(expected.v)
    np.testing.assert_allclose(mine.lse, expected.lse, rtol=1e-6, atol=1e-6)
    gradients = Match(rng.normal(size=mine.v.shape).astype("f4"), rng.normal(size=mine.lse.shape).astype("f4"))
    back = with_threads(lambda: hisac.match_backward(**args, gradients=gradients))
    of_reference = reference.match_backward(**exact, gradients=gradients)
    testing.assert_gradients_close(back, of_reference, exact | {"gradients": gradients})


def test_a_nan_reaches_its_node_whatever_its_weight():
    """A weight that float32 cannot hold is no absence. Only biases near each other had been tried."""
    book = hisac.Codebook([np.eye(2, dtype=np.float32)] * 2)
    v, codes = np.array([[1, 2], [np.nan, 3], [5, 6]], np.float32), np.array([[0, 0], [0, 1], [1, 0]], np.int32)
    for gap in (50, 104, 200):
        sums = Histories(None, v, np.array([0, 3]), codes, bias=np.array([gap, 0, -np.inf], np.float32))
        found = hisac.match(book, sums, np.array([[0, 0], [1, 0]], np.int32), np.array([0, 2]))
        np.testing.assert_array_equal(found.v[0], [[np.nan, 2], [1, 2]])
        assert not found.v[1].any() and np.isneginf(found.lse[1]).all()


def test_large_values_stay_finite():
    book, big = hisac.Codebook([np.zeros((1, 1), np.float32), np.zeros((3000, 1), np.float32)]), np.float32(3e38)
    codes = np.stack([np.zeros(3000), np.arange(3000)], 1).astype(np.int32)
    sums = Histories(None, np.full((3000, 1), big), np.array([0, 3000]), codes)
    np.testing.assert_allclose(hisac.match(book, sums, codes[:1], np.array([0, 1])).v[0, 0], 3e38, rtol=1e-5)


@given(testing.matchings(dtypes=("float32",)), st.integers(0, 2**32 - 1))
def test_sums_in_any_order_give_finite_values(p, seed):
    """What they are is not specified, but that nothing but the order is to blame: without v's of no user."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(p.sums.v))
    codes = testing.sprinkle(rng, p.sums.codes[order], 0.1, np.array([-1, -(2**31), 2**31 - 1]))
    sums = p.sums._replace(codes=codes)
    out = with_threads(lambda: hisac.match(**p.match_args() | {"sums": sums}))
    assert np.isfinite(out.v).all() and (np.isfinite(out.lse) | (out.lse == -np.inf)).all()
    args = p.backward_args(out) | {"sums": sums}
    assert all(np.isfinite(g).all() for g in with_threads(lambda: hisac.match_backward(**args)))


@given(testing.problems(), st.integers(0, 2**32 - 1))
def test_sums_say_of_candidates_what_behaviours_do(p, seed):
    """The whole way from behaviours, by the definition: the mean v and the log mass of those below each prefix."""
    rng = np.random.default_rng(seed)
    users = len(reference.ranges(p.histories.offsets))
    asked = rng.integers(0, p.book.sizes, (3 * users, p.book.levels)).astype(np.int32)
    sums = hisac.leaf_sums(**p.leaf_args())
    out = hisac.match(p.book, sums, asked, 3 * np.arange(users + 1))
    exact = p.by_reference(p.leaf_args())
    for b, (rows, h) in enumerate(reference.verbs.each_row(exact["book"], reference.verbs.gather(exact["histories"]))):
        codes = np.asarray(reference.verbs.gather(p.histories).codes)[rows][h.rows]
        for n in range(3 * b, 3 * b + 3):
            for level in range(p.book.levels):
                below = (codes[:, : level + 1] == asked[n, : level + 1]).all(1)
                w = np.exp(h.bias[below])
                if not below.any():
                    assert not out.v[n, level].any() and out.lse[n, level] == -np.inf
                    continue
                np.testing.assert_allclose(out.lse[n, level], np.log(w.sum()), rtol=1e-5, atol=1e-4)
                np.testing.assert_allclose(out.v[n, level], w @ h.v[below] / w.sum(), rtol=1e-4, atol=1e-4)
