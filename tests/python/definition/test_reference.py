# SPDX-License-Identifier: Apache-2.0
"""Laws of the definition, first part: the code tree, encode, fit and vote of `hisac.reference`."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hisac import Histories, reference, testing

problem = testing.problems(max_history=24)


def users_of(offsets):
    return [np.arange(r.start, r.stop) for r in reference.ranges(offsets)]


# ---------------------------------------------------------------------------------------------------- the code tree


def test_fingerprint_is_pinned():
    book = reference.Codebook([[[1, 2], [3, 4], [-0.0, 1e-45]], [[0.5, -0.5]]])
    assert book.fingerprint == FINGERPRINT
    assert reference.Codebook([[[1, 2], [3, 4], [0.0, 1e-45]], [[0.5, -0.5]]]).fingerprint != FINGERPRINT


FINGERPRINT = 4267945124947211385


@given(testing.codebooks().flatmap(lambda book: st.tuples(st.just(book), testing.codes(book))))
def test_leaves_number_the_tree(drawn):
    book, codes = reference.Codebook(drawn[0].centers), drawn[1]
    leaves, parents = book.leaves(codes), codes.astype(np.int64)
    for row, leaf in zip(parents, leaves, strict=True):
        if all(0 <= c < n for c, n in zip(row, book.sizes, strict=True)):
            assert leaf == np.ravel_multi_index(tuple(row), book.sizes)
            assert leaf // book.sizes[-1] == (
                np.ravel_multi_index(tuple(row[:-1]), book.sizes[:-1]) if len(row) > 1 else 0
            )
            total = np.float32(0)
            for c, centers in zip(row, book.centers, strict=True):
                total = total + centers[c]
            np.testing.assert_array_equal(book.prototypes(row), total)
        else:
            assert leaf == -1 and not book.prototypes(row).any()


# ------------------------------------------------------------------------------------------------------ encode, fit


@given(testing.problems(max_history=24, dtypes=("float32",)))
def test_encode_is_the_nearest_codeword_level_by_level(p):
    """Against exact rational arithmetic: no other code is nearer, and none of the same distance is lower."""
    args = p.by_reference(p.encode_args())
    x = args["x"][:3]
    for row, codes in zip(x, reference.encode(args["book"], x), strict=True):
        r = row
        for c, centers in zip(codes, args["book"].centers, strict=True):
            exact = [
                sum((Fraction(float(a)) - Fraction(float(b))) ** 2 for a, b in zip(r, center, strict=True))
                for center in centers
            ]
            assert math.isclose(exact[c], min(exact), rel_tol=1e-13, abs_tol=1e-300)
            r = r - centers[c]


def test_encode_lower_code_wins_a_tie():
    book = reference.Codebook([[[2.0], [0.0], [2.0], [0.0]], [[0.25], [-0.25], [0.25]]])
    assert reference.encode(book, np.float32([[1], [2], [0], [-1]])).tolist() == [[0, 1], [0, 0], [1, 0], [1, 1]]


@given(testing.problems(max_history=24, hostile=True))
def test_encode_marks_rows_that_are_no_numbers(p):
    args = p.by_reference(p.encode_args())
    codes = reference.encode(**args)
    finite = np.isfinite(args["x"].astype(np.float32)).all(1)
    assert (codes[~finite] == -1).all() and reference.valid_codes(args["book"], codes[finite]).all()


def test_encode_agrees_with_faiss():
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    x, centers = rng.normal(size=(500, 16)).astype(np.float32), rng.normal(size=(2, 40, 16)).astype(np.float32)
    index, expected, r = faiss.IndexFlatL2(16), [], x
    for c in centers:
        index.reset()
        index.add(c)
        expected.append(index.search(r, 1)[1][:, 0])
        r = r - c[expected[-1]]
    np.testing.assert_array_equal(reference.encode(reference.Codebook(centers), x), np.stack(expected, 1))


def test_fit_agrees_with_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, 5)).astype(np.float32)
    start = reference.fit(x, (12,), iterations=0).centers[0]
    theirs = cluster.KMeans(12, init=start, n_init=1, max_iter=7, tol=0, algorithm="lloyd").fit(x)
    mine = reference.fit(x, (12,), iterations=7)
    np.testing.assert_allclose(mine.centers[0], theirs.cluster_centers_, atol=1e-5)


def test_fit_report_start_and_progress():
    rng = np.random.default_rng(2)
    x = rng.integers(-3, 4, (200, 3)).astype(np.float32)
    x[[5, 9]] = [[np.nan, 0, 0], [2.0**100, 0, 0]]
    seen = []
    book = reference.fit(x, (16, 8, 4), iterations=9, seed=3, progress=lambda *step: seen.append(step))
    report = book.report
    assert (report.rows, report.left_out, book.sizes) == (198, 2, (16, 8, 4))
    assert [(level, n) for level, n, _ in seen] == [
        (level, n) for level in range(3) for n in range(1, report.iterations[level] + 1)
    ]
    assert max(report.iterations) <= 9 and sorted(report.error, reverse=True) == list(report.error)
    took_part = np.delete(x, [5, 9], 0)
    codes = reference.encode(book, took_part)
    assert report.unused == tuple(n - len(set(codes[:, level])) for level, n in enumerate(book.sizes))
    r = (took_part - book.prototypes(codes)).astype(np.float64)
    assert math.isclose(report.error[-1], np.square(r).sum(1).mean(), rel_tol=1e-6)
    start = reference.fit(x, (16,), iterations=0, seed=3).centers[0]
    assert len({tuple(c) for c in start.tolist()}) == 16 and all((x == c).all(1).any() for c in start)
    assert not np.array_equal(start, reference.fit(x, (16,), iterations=0, seed=4).centers[0])


def test_fit_centers_are_means():
    x = np.random.default_rng(3).normal(size=(300, 4)).astype(np.float32)
    book = reference.fit(x, (6,), iterations=200)
    near = reference.encode(book, x)[:, 0]
    means = np.stack([x[near == c].astype(np.float64).mean(0) for c in range(6)])
    np.testing.assert_allclose(book.centers[0], means, atol=1e-6)


def test_fit_ignores_rows_left_out():
    x = np.random.default_rng(4).normal(size=(90, 4)).astype(np.float32)
    more = np.concatenate([x, np.full((9, 4), np.nan, np.float32)])
    a, b = reference.fit(x, (5, 3)), reference.fit(more, (5, 3))
    assert a.fingerprint == b.fingerprint and b.report.left_out == 9
    with pytest.raises(ValueError, match="usable row"):
        reference.fit(more[90:], (5,))


def test_fit_fewer_distinct_rows_than_codes():
    x = np.float32([[1, 1], [1, 1], [0, 0], [-0.0, 0], [3, 3]])
    book = reference.fit(x, (8, 2))
    assert book.report.unused == (5, 1) and book.report.error == (0.0, 0.0)
    assert set(reference.encode(book, x)[:, 1]) == {0}


def test_fit_seeds_dead_codes_from_the_worst_rows():
    """A code that lost its rows becomes the row farthest from its center (the first of equals), a second the next."""
    met = 0
    for seed, n in itertools.product(range(40), (1, 2, 3)):
        x = np.exp(3 * np.random.default_rng(seed).normal(size=(40, 2))).astype(np.float32)
        before, after = (reference.fit(x, (14,), iterations=k, seed=seed).centers[0] for k in (n, n + 1))
        d = np.square(x[:, None].astype(np.float64) - before).sum(-1)
        dead = np.bincount(d.argmin(1), minlength=14) == 0
        np.testing.assert_array_equal(after[dead], x[np.argsort(-d.min(1), kind="stable")[: dead.sum()]])
        met += dead.sum()
    assert met > 3


# -------------------------------------------------------------------------------------------------------------- vote


def exact_budget(votes, budget, prefix, levels):
    """D'Hondt by turns: the next seat goes to the child with the largest votes / (seats + 1), as fractions."""
    if len(prefix) == levels:
        return [prefix]
    below = {}
    for leaf, n in votes.items():
        if leaf[: len(prefix)] == prefix:
            below[leaf[len(prefix)]] = below.get(leaf[len(prefix)], 0) + n
    queues = {c: exact_budget(votes, None, (*prefix, c), levels) for c in below}
    seats, order = dict.fromkeys(below, 0), []
    while any(queues.values()) and len(order) != budget:
        child = max((c for c in queues if queues[c]), key=lambda c: (Fraction(below[c], seats[c] + 1), below[c], -c))
        seats[child] += 1
        order.append(queues[child].pop(0))
    return order


def exact_fanout(codes, weight, fanout):
    kept = [()]
    for level, k in enumerate(fanout):
        grown = []
        for parent in kept:
            under = (codes[:, :level] == parent).all(1) & (weight > 0)
            totals = {c: int(weight[under & (codes[:, level] == c)].sum()) for c in set(codes[under, level].tolist())}
            grown += [(*parent, c) for c in sorted(totals, key=lambda c: (-totals[c], c))[:k]]
        kept = grown
    return set(kept)


def exact_beam(codes, weight, beam):
    """A node is kept where its parent is, and fewer than k_l such nodes come before it."""
    kept = {()}
    for level, k in enumerate(beam):
        totals = Counter()
        for row, n in zip(codes.tolist(), weight.tolist(), strict=True):
            if n and tuple(row[:level]) in kept:
                totals[tuple(row[: level + 1])] += n
        kept = {a for a in totals if sum((-totals[b], b) < (-totals[a], a) for b in totals) < k}
    return kept


def exact_votes(weights, n):
    """The votes of n rows with valid codes: of int64 as integers, of float32 as fractions."""
    if weights is None:
        return [1] * n
    if weights.dtype == np.int64:
        found, halved = [min(max(int(w), 0), reference.votes.MAX_WEIGHT) for w in weights], 1
        while sum(found) // halved >= 2**40:
            halved *= 2
        return [w // halved for w in found]
    found = [Fraction(min(float(w), float(np.finfo("f4").max))) if w > 0 else Fraction(0) for w in weights]
    bits = 24
    while bits + sum(w > 0 for w in found).bit_length() > 40:
        bits -= 1
    return [round(float(np.float32(float(w / max(found)))) * 2**bits) if w else 0 for w in found]


@given(problem)
def test_vote_equals_brute_force(p):
    args, h = p.by_reference(p.vote_args()), p.histories
    book, agents = args["book"], reference.vote(**args)
    for b, rows in enumerate(users_of(h.offsets)):
        ok = reference.valid_codes(book, h.codes[rows])
        codes = h.codes[rows][ok]
        weight = np.array(exact_votes(None if h.weights is None else h.weights[rows][ok], len(codes)), np.int64)
        votes = {}
        for leaf, n in zip(map(tuple, codes.tolist()), weight.tolist(), strict=True):
            if n:
                votes[leaf] = votes.get(leaf, 0) + n
        if p.budget is not None:
            kept = set(exact_budget(votes, p.budget, (), len(book.sizes)))
        else:
            kept = exact_fanout(codes, weight, p.fanout) if p.beam is None else exact_beam(codes, weight, p.beam)
        expected = sorted(kept, key=lambda leaf: (-votes[leaf], leaf))
        n = int(agents.count[b])
        assert list(map(tuple, agents.codes[b, :n].tolist())) == expected
        assert agents.votes[b, :n].tolist() == [votes[leaf] for leaf in expected]
        assert (agents.codes[b, n:] == -1).all() and not agents.votes[b, n:].any()


def test_agents_are_sorted_by_votes_then_code():
    """Not by the order of choice: node 1 has more votes, so its leaf is chosen before the equal one of node 0."""
    book = reference.Codebook([np.eye(2), np.eye(2)])
    codes = np.array([[1, 1], [1, 1], [1, 0], [1, 0], [0, 0], [0, 0], [1, 1]])
    agents = reference.vote(book, Histories(codes=codes, lengths=[7]), budget=3)
    assert agents.codes[0].tolist() == [[1, 1], [0, 0], [1, 0]] and agents.votes[0].tolist() == [3, 2, 2]
    chosen = reference.vote(book, Histories(codes=codes, lengths=[7]), budget=2)
    assert chosen.codes[0].tolist() == [[1, 1], [1, 0]]


def test_beam_compares_the_nodes_of_a_level():
    """Of equal leaves that of the lower parent is kept, though the other parent has more votes. By fan-out each parent
    keeps one of its own; a narrow beam loses the most voted leaf, whose parent has few votes besides."""
    book = reference.Codebook([np.eye(3), np.eye(3)])
    codes = np.repeat([[0, 2], [1, 0], [1, 1], [1, 2], [2, 2]], [2, 2, 2, 1, 3], axis=0)
    for beam, kept in (
        ((3, 2), [[2, 2], [0, 2]]),
        ((3, 3), [[2, 2], [0, 2], [1, 0]]),
        ((1, 2), [[1, 0], [1, 1]]),
        ((2, 9), [[2, 2], [1, 0], [1, 1], [1, 2]]),
    ):
        agents = reference.vote(book, Histories(codes=codes, lengths=[10]), beam=beam)
        n = int(agents.count[0])
        assert agents.codes.shape == (1, beam[1], 2) and agents.codes[0, :n].tolist() == kept, beam


@given(problem, st.integers(1, 9))
def test_a_wide_beam_keeps_the_most_voted_leaves(p, m):
    args = p.by_reference(p.vote_args()) | {"budget": None, "fanout": None}
    agents = reference.vote(**args | {"beam": (64,) * (p.book.levels - 1) + (m,)})
    for b, rows in enumerate(users_of(p.histories.offsets)):
        weights = None if p.histories.weights is None else p.histories.weights[rows]
        votes = reference.votes.leaf_votes(args["book"], p.histories.codes[rows], weights)
        expected = sorted(votes, key=lambda leaf: (-votes[leaf], leaf))[:m]
        assert list(map(tuple, agents.codes[b, : agents.count[b]].tolist())) == expected


@given(st.lists(st.integers(1, 2**36), min_size=1, max_size=40), st.integers(1, 60))
def test_budget_keys_decide_as_fractions(counts, budget):
    votes = {(i % 7, i): n for i, n in enumerate(counts)}
    assert reference.votes.by_budget(votes, budget, 2) == exact_budget(votes, budget, (), 2)


@given(problem, st.integers(0, 2**32 - 1))
def test_votes_are_blind_to_order(p, seed):
    args, h = p.by_reference(p.vote_args()), p.histories
    for rows in users_of(h.offsets):
        order = np.random.default_rng(seed).permutation(rows)
        one, other = (
            Histories(codes=h.codes[r], lengths=[len(r)], weights=None if h.weights is None else h.weights[r])
            for r in (rows, order)
        )
        agents = reference.vote(**args | {"histories": other})
        testing.assert_agents_equal(reference.vote(**args | {"histories": one}), agents)


@given(problem, st.booleans(), st.integers(0, 2**32 - 1))
def test_votes_add_up(p, counted, seed):
    """Those of a history are the sums of those of its parts, where weights are votes, which sum to less than 2^40."""
    rng, codes = np.random.default_rng(seed), p.histories.codes
    weights = rng.integers(-1, 2**33, len(codes)) if counted else None
    half = rng.random(len(codes)) < 0.5

    def votes(rows):
        book = p.by_reference(p.vote_args())["book"]
        return reference.votes.leaf_votes(book, codes[rows], None if weights is None else weights[rows])

    a, b = votes(half), votes(~half)
    assert votes(slice(None)) == {leaf: a.get(leaf, 0) + b.get(leaf, 0) for leaf in a | b}


@given(problem)
def test_leaf_sums_vote_as_their_behaviours(p):
    """Agents and votes are the same integers, whatever the weights are; and sums of sums keep them."""
    args = p.by_reference(p.vote_args())
    sums = reference.leaf_sums(args["book"], p.histories)
    expected = reference.vote(**args)
    testing.assert_agents_equal(reference.vote(**args | {"histories": sums}), expected)
    again = reference.leaf_sums(args["book"], sums)
    testing.assert_codes_equal(again.weights, sums.weights)
    for own, rows in zip(users_of(sums.offsets), users_of(p.histories.offsets), strict=True):
        given = None if p.histories.weights is None else p.histories.weights[rows]
        votes = dict(zip(map(tuple, sums.codes[own].tolist()), sums.weights[own].tolist(), strict=True))
        found = reference.votes.leaf_votes(args["book"], p.histories.codes[rows], given)
        assert {leaf: n for leaf, n in votes.items() if n} == found


@given(problem, st.integers(-149, 112), st.integers(0, 2**32 - 1))
def test_a_common_factor_of_float_weights_changes_no_vote(p, power, seed):
    """Of 2^power, which is exact for these whole numbers: from subnormal ones to those at the top of float32."""
    args, rng = p.by_reference(p.vote_args()), np.random.default_rng(seed)
    w = testing.sprinkle(rng, rng.integers(1, 2**16, len(p.histories.codes)).astype("f4"), 0.1, UNLIKE_VOTES)
    one, other = (p.histories._replace(weights=a) for a in (w, np.ldexp(w, power)))
    agents, sums = reference.vote(**args | {"histories": one}), reference.leaf_sums(args["book"], one)
    testing.assert_agents_equal(reference.vote(**args | {"histories": other}), agents)
    testing.assert_codes_equal(reference.leaf_sums(args["book"], other).weights, sums.weights)


UNLIKE_VOTES = np.array([0, -1, np.nan, -np.inf])


@given(problem)
def test_a_parent_has_the_votes_of_its_children(p):
    book = p.by_reference(p.vote_args())["book"]
    votes = reference.votes.leaf_votes(book, p.histories.codes, p.histories.weights)
    levels = len(book.sizes)

    def check(prefix):
        below = reference.votes.children(votes, prefix)
        assert sum(below.values()) == sum(n for leaf, n in votes.items() if leaf[: len(prefix)] == prefix)
        for child in below if len(prefix) + 1 < levels else ():
            check(child)

    check(())


@given(problem, st.integers(1, 8))
def test_a_larger_budget_only_adds_agents(p, budget):
    args = p.by_reference(p.vote_args()) | {"fanout": None, "beam": None}
    small, large = (reference.vote(**args | {"budget": n}) for n in (budget, budget + 1))
    for a, b in zip(small.codes, large.codes, strict=True):
        assert {tuple(c) for c in a.tolist() if c[0] >= 0} <= {tuple(c) for c in b.tolist() if c[0] >= 0}
    assert (small.count <= large.count).all() and (large.count <= small.count + 1).all()


LARGEST = float(np.finfo("f4").max)


def votes_of(weights, codes=None):
    """The votes of rows of one user, all of code 0 if nothing else is said."""
    codes = np.zeros((len(weights), 1), np.int32) if codes is None else np.array(codes)[:, None]
    return reference.votes.row_votes(reference.Codebook([[[0.0]]]), codes, weights).tolist()


@pytest.mark.parametrize(
    ("weights", "votes"),
    [
        ([3, 1, 0, -5], [3, 1, 0, 0]),
        ([2**39, 2**39 - 1], [2**39, 2**39 - 1]),  # together 2^40 - 1
        ([2**39, 2**39], [2**38, 2**38]),  # 2^40: halved
        ([2**39, 2**39 - 1, 1], [2**38, 2**38 - 1, 0]),
        ([2**62, 2**63 - 1, -(2**63), 5], [2**38 - 1, 2**38 - 1, 0, 1]),  # 2^40 - 1 is the most
        ([2**39] * 4 + [7, 8], [2**37] * 4 + [1, 2]),
        ([2**39 - 1] * 4 + [1] * 4, [2**37 - 1] * 4 + [0] * 4),  # 2^41: by their sum, not by the sum of what is left
        ([2**36] * 15, [2**36] * 15),
        ([2**36] * 16, [2**35] * 16),
    ],
)
def test_votes_of_integers(weights, votes):
    """As they are where they sum to less than 2^40; else each without as many bits as the sum has more than 40."""
    assert votes_of(np.array(weights, np.int64)) == votes


@pytest.mark.parametrize(
    ("weights", "votes"),
    [
        ([1, 0.5, 0.25, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24], [2**24, 2**23, 2**22, 1, 0, 2]),  # ties go to even
        ([3, 1], [2**24, 5592406]),
        ([1, 0, -0.0, -1, np.nan, -np.inf], [2**24, 0, 0, 0, 0, 0]),
        ([0, -1, np.nan], [0, 0, 0]),
        ([np.inf, LARGEST, LARGEST / 2, 1], [2**24, 2**24, 2**23, 0]),  # infinity is the largest float32
        ([1e-45, 3e-45], [2**23, 2**24]),  # subnormal: 1 and 2 units
    ],
)
def test_votes_of_floats(weights, votes):
    assert votes_of(np.array(weights, np.float32)) == votes


@pytest.mark.parametrize("weight", [1e-45, 1e-38, 1.0, 7.3, 3e38, np.inf])
def test_votes_of_equal_floats(weight):
    """2^k each, k = 24 for up to 2^16 - 1 rows that vote and one less each time that their number doubles. Rows that do
    not vote do not count, for another reason each."""
    for n, k in ((1, 24), (2**16 - 1, 24), (2**16, 23), (2**17 - 1, 23), (2**17, 22)):
        weights, codes = np.full(n + 3, weight, np.float32), np.zeros(n + 3, int)
        weights[:2], codes[2] = (0, np.nan), 1
        votes = votes_of(weights, codes)
        assert votes[:3] == [0, 0, 0] and set(votes[3:]) == {2**k} and sum(votes) < 2**40


def test_only_the_first_rows_vote(monkeypatch):
    monkeypatch.setattr(reference.votes, "MAX_VOTERS", 3)
    book = reference.Codebook([np.eye(4)])
    agents = reference.vote(book, Histories(codes=np.array([[0], [9], [1], [2]]), lengths=[4]), budget=4)
    assert agents.codes[0, :, 0].tolist() == [0, 1, -1, -1]
    assert reference.votes.MAX_VOTERS == 3
