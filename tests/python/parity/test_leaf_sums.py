# SPDX-License-Identifier: Apache-2.0
"""`leaf_sums` against `hisac.reference`: codes and votes exactly, sums within `hisac.reference.bounds`; what they mean
to `route` and to `vote`; that they add up; and the same bits whatever the threads."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hisac
from hisac import Histories, reference, testing
from hisac.reference import bounds
from support import checked_gradients, flat, kinds, with_threads

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the reference, on hostile values


@given(testing.problems())
def test_leaf_sums(p):
    check_leaf_sums(p)


@given(testing.problems(gathered=True, hostile=True))
def test_leaf_sums_hostile(p):
    check_leaf_sums(p)


def check_leaf_sums(p):
    args = p.leaf_args()
    exact = p.by_reference(args)
    expected, bound = reference.leaf_sums(**exact), bounds.leaf_sums_bound(exact)
    for convert, _ in kinds(p):
        mine = with_threads(lambda: hisac.leaf_sums(**convert(args)))  # noqa: B023
        testing.assert_leaf_sums_close(mine, expected, bound)


@given(testing.problems(gathered=True))
def test_leaf_sums_backward(p):
    check_backward(p)


@given(testing.problems(gathered=True, hostile=True))
def test_leaf_sums_backward_hostile(p):
    check_backward(p)


def check_backward(p):
    for convert, args, mine in checked_gradients(p, "leaf_sums", p.leaf_args(), p.leaf_backward_args):
        for name in ("v", "bias"):
            alone = hisac.leaf_sums_backward(**convert(args | {"need": name}))
            assert flat(getattr(alone, name)) == flat(getattr(mine, name)) and sum(g is None for g in alone) == 1


@given(testing.problems(dtypes=("float32",)))
def test_sums_where_their_users_rows_are(p):
    """As `compress` takes them: the same sums, bit for bit, and in `route` the same tokens."""
    together, apart = hisac.leaf_sums(**p.leaf_args()), hisac.verbs._sum_leaves(p.book, p.histories)
    at = [slice(*pair) for pair in zip(*apart.offsets, strict=True)]
    for name in ("x", "v", "codes", "bias", "spread", "weights"):
        rows = [getattr(apart, name)[own] for own in at]
        assert flat(np.concatenate([getattr(together, name)[:0], *rows])) == flat(getattr(together, name))
    args = {name: a for name, a in p.route_args().items() if name != "book"}
    assert flat(hisac.route(**args | {"histories": apart})) == flat(hisac.route(**args | {"histories": together}))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1023, 2048, 7000, 20000])
def test_leaf_sums_of_long_leaves(rows, biased):
    """Few leaves, so that each is summed in pieces by whoever is free; far inside the bound on average."""
    rng = np.random.default_rng(rows)
    book = hisac.Codebook([rng.normal(size=(2, 9)).astype(np.float32), rng.normal(size=(2, 9)).astype(np.float32)])
    codes = np.minimum(rng.integers(0, 9, (rows, 2)) // 4, 2).astype(np.int32)  # 2: invalid
    x, v = rng.normal(size=(rows, 9)).astype(np.float32), rng.normal(size=(rows, 5)).astype(np.float32)
    x[::97] = np.nan
    bias = 5 * rng.normal(size=rows).astype(np.float32) if biased else None
    args = {"book": book, "histories": Histories(x, v, np.array([0, 7, rows]), codes, bias=bias)}
    exact = args | {"book": reference.Codebook(book.centers)}
    mine, expected = with_threads(lambda: hisac.leaf_sums(**args)), reference.leaf_sums(**exact)
    testing.assert_leaf_sums_close(mine, expected, bounds.leaf_sums_bound(exact))
    for a, b in zip(*([a for a in sums if a is not None] for sums in (mine, expected)), strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b)


def test_leaf_sums_under_an_absent_row_of_the_largest_weight():
    """Whether a row is present shows only when x is read; weights relative to an absent row's would all be 0."""
    book = hisac.Codebook([np.zeros((1, 2), np.float32)])
    x = np.float32([[1e20, 0], [3, 0], [5, 0]])
    codes, bias = np.zeros((3, 1), np.int32), np.float32([1e6, 0, 0])
    sums = hisac.leaf_sums(book, Histories(x, x[:, :1], np.array([0, 3]), codes, bias=bias))
    assert sums.x.tolist() == [[4, 0]] and sums.spread.tolist() == [1]
    np.testing.assert_allclose(sums.bias, np.log(2), rtol=1e-6)


def test_leaf_sums_of_large_values_stay_finite():
    book, big = hisac.Codebook([np.zeros((1, 1), np.float32)]), np.full((3000, 1), 3e38, np.float32)
    codes = np.zeros((3000, 1), np.int32)
    sums = hisac.leaf_sums(book, Histories(np.zeros_like(big), big, np.array([0, 3000]), codes))
    np.testing.assert_allclose(sums.v, 3e38, rtol=1e-5)


def test_a_spread_does_not_lose_its_digits_to_a_shift():
    """Rows near each other and far from zero: E|x|^2 - |mean|^2 lost a spread of 5 beside squares of 640,000,
    within the bound of that formula."""
    rng = np.random.default_rng(6)
    x = (0.3 * rng.normal(size=(3000, 64)) + 100).astype(np.float32)
    book = hisac.Codebook([np.zeros((2, 64), np.float32)])
    codes, v = rng.integers(0, 2, (3000, 1)).astype(np.int32), np.ones((3000, 1), np.float32)
    mine = with_threads(lambda: hisac.leaf_sums(book, Histories(x, v, np.array([0, 3000]), codes)))
    for leaf in range(2):
        rows = x[codes[:, 0] == leaf].astype(np.float64)
        np.testing.assert_allclose(mine.spread[leaf], np.square(rows - rows.mean(0)).sum(1).mean(), rtol=1e-5)
        np.testing.assert_allclose(mine.x[leaf], rows.mean(0), rtol=2e-7)


@given(testing.problems(), st.integers(0, 64), st.booleans())
def test_leaf_sums_add_up(p, cut, counted):
    """The sums of kept sums and new rows are those of all, to the rounding of both; and exactly, the votes. New rows
    without weights have one vote each."""
    h, rows = p.histories, len(p.histories.v)
    x = np.asarray(p.book.prototypes(h.codes)) if h.x is None else h.x
    bias, spread = (np.zeros(rows, np.float32) if a is None else a for a in (h.bias, h.spread))
    x, v = np.asarray(x, np.float32), np.asarray(h.v, np.float32)
    weights = np.random.default_rng(p.seed).integers(-1, 2**31, rows) if counted else None
    whole = Histories(x, v, np.array([0, rows]), h.codes, bias=bias, spread=spread, weights=weights)
    cut = min(cut, rows)
    kept = hisac.leaf_sums(p.book, whole._replace(offsets=np.array([0, cut])))
    new = whole if counted else whole._replace(weights=np.ones(rows, np.int64))
    names = ("x", "v", "codes", "bias", "spread", "weights")
    pairs = {name: (getattr(kept, name), getattr(new, name)[cut:]) for name in names}
    old_and_new = Histories(
        **{name: np.concatenate(pair) for name, pair in pairs.items()}, lengths=[len(kept.x) + rows - cut]
    )
    exact = p.by_reference({"book": p.book, "histories": whole})
    limit = Histories(*(None if a is None else 4 * a for a in bounds.leaf_sums_bound(exact)))
    testing.assert_leaf_sums_close(hisac.leaf_sums(p.book, old_and_new), reference.leaf_sums(**exact), limit)


# --------------------------------------------------------------------------------------------------------------- votes


@given(testing.problems(gathered=True, max_levels=4, max_history=100))
def test_sums_vote_as_their_behaviours(p):
    check_votes(p)


@given(testing.problems(gathered=True, hostile=True))
def test_sums_vote_as_their_behaviours_hostile(p):
    check_votes(p)


def check_votes(p):
    """The same agents with the same votes, whatever the weights are, and whether rows that vote are present or not."""
    for convert, _ in kinds(p):
        votes = convert(p.vote_args())
        expected, sums = hisac.vote(**votes), hisac.leaf_sums(**convert(p.leaf_args()))
        testing.assert_agents_equal(hisac.vote(**votes | {"histories": sums}), expected)
        apart = hisac.verbs._sum_leaves(p.book, votes["histories"])
        testing.assert_agents_equal(hisac.vote(**votes | {"histories": apart}), expected)
        again = hisac.leaf_sums(p.book, sums)
        voted = [bounds.as_numpy(s.weights)[bounds.as_numpy(s.weights) > 0] for s in (sums, again)]
        testing.assert_codes_equal(*voted, "votes of sums of sums")


@given(testing.problems(max_history=100), st.integers(0, 2**32 - 1))
def test_a_common_factor_of_float_weights_changes_no_vote(p, seed):
    """Of a power of two for each user, which is exact for these whole numbers: from subnormal ones to the largest."""
    rng, h, rows = np.random.default_rng(seed), p.histories, len(p.histories.v)
    w = testing.sprinkle(rng, rng.integers(1, 2**16, rows).astype("f4"), 0.1, np.array([0, -1, np.nan, -np.inf]))
    user = np.zeros(rows, int) if isinstance(h.offsets, tuple) else np.searchsorted(h.offsets, np.arange(rows), "right")
    one, other = (h._replace(weights=a) for a in (w, np.ldexp(w, rng.integers(-149, 113, 9)[user])))
    args = p.vote_args()
    agents = hisac.vote(**args | {"histories": one})
    testing.assert_agents_equal(hisac.vote(**args | {"histories": other}), agents)
    assert flat(hisac.leaf_sums(p.book, other)) == flat(hisac.leaf_sums(p.book, one))


@given(testing.problems(dtypes=("float32",)))
def test_route_ignores_leaves_that_only_vote(p):
    """They have a bias of -inf and zeros; without them the tokens are the same."""
    sums = hisac.leaf_sums(**p.leaf_args())
    present = np.isfinite(sums.bias)
    assert (present | np.isneginf(sums.bias)).all() and (present | (sums.weights > 0)).all()
    assert not any(a[~present].any() for a in (sums.x, sums.v, sums.spread))
    offsets = np.concatenate([[0], np.cumsum(present)])[sums.offsets]
    fewer = {name: getattr(sums, name)[present] for name in ("x", "v", "codes", "bias", "spread", "weights")}
    fewer = Histories(**fewer, offsets=offsets)
    args = p.by_reference({name: a for name, a in p.route_args().items() if name != "book"}) | {"histories": fewer}
    mine, without = (hisac.route(**args | {"histories": h}) for h in (sums, fewer))
    limit, expected = bounds.route_bound(args), reference.route(**args)
    testing.assert_tokens_close(mine, expected, limit)
    testing.assert_tokens_close(without, expected, limit)


@pytest.mark.parametrize("module", [hisac, reference])
def test_a_leaf_that_only_votes(module):
    """Leaf 0 is of a row without x and of one of infinite spread; leaf 1 is present and does not vote; nothing is left
    of leaf 2; leaf 3 has both kinds of rows."""
    book = module.Codebook([np.float32([[0], [1], [2], [3]])])
    x, v = np.float32([[np.nan], [1], [5], [3], [7], [np.nan]]), np.float32([[1], [2], [4], [8], [16], [32]])
    codes, spread = np.int32([[0], [1], [0], [3], [3], [2]]), np.float32([0, 0, np.inf, 0, np.nan, 0])
    weights = np.array([5, 0, 2, 3, 4, -1])
    h = Histories(x, v, np.array([0, 6]), codes, spread=spread, weights=weights)
    sums = module.leaf_sums(book, h)
    assert sums.codes.tolist() == [[0], [1], [3]] and sums.weights.tolist() == [7, 0, 7]
    assert sums.bias.tolist() == [-np.inf, 0, 0] and sums.x.tolist() == [[0], [1], [3]]
    assert sums.v.tolist() == [[0], [2], [8]] and sums.spread.tolist() == [0, 0, 0]
    agents = module.vote(book, sums, budget=4)
    testing.assert_agents_equal(agents, module.vote(book, h, budget=4))
    assert agents.codes[0].tolist() == [[0], [3], [-1], [-1]] and agents.votes[0].tolist() == [7, 7, 0, 0]
    out = module.route(sums, np.float32([[[0], [3]]]), temperature=1.0)
    expected = module.route(h, np.float32([[[0], [3]]]), temperature=1.0)
    np.testing.assert_allclose(out.tokens, expected.tokens, rtol=1e-6)
    np.testing.assert_allclose(out.lse, expected.lse, rtol=1e-6)


@pytest.mark.parametrize("module", [hisac, reference])
@pytest.mark.parametrize("weights", [[2**39, 2**39 - 1], [2**39] * 3, np.ones(40_000)])
def test_a_leaf_may_have_nearly_all_votes(module, weights):
    """Up to 2^40 - 1 of them, which its sums keep, as the sums of these do: more than the most of one behaviour."""
    book, n = module.Codebook([np.zeros((1, 1), np.float32)]), len(weights)
    weights = np.array(weights, np.int64 if isinstance(weights, list) else np.float32)
    zeros = np.zeros((n, 1), np.float32)
    h = Histories(zeros, zeros, np.array([0, n]), np.zeros((n, 1), np.int32), weights=weights)
    expected = module.vote(book, h, budget=1)
    sums = module.leaf_sums(book, h)
    assert sums.weights.tolist() == expected.votes[0].tolist() and sums.weights[0] > 2**39
    testing.assert_agents_equal(module.vote(book, sums, budget=1), expected)
    assert module.leaf_sums(book, sums).weights.tolist() == sums.weights.tolist()
