# SPDX-License-Identifier: Apache-2.0
"""Laws of the definition, first part: the code tree, encode, fit and vote of `hisac.reference`."""

import itertools
import math
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


@given(problem)
def test_vote_equals_brute_force(p):
    args, h = p.by_reference(p.vote_args()), p.histories
    book, agents = args["book"], reference.vote(**args)
    weights = np.ones(len(h.codes), np.int64) if h.weights is None else reference.verbs.quantise_weights(h.weights)
    for b, rows in enumerate(users_of(h.offsets)):
        ok = reference.valid_codes(book, h.codes[rows])
        codes, weight = h.codes[rows][ok], weights[rows][ok]
        votes = {}
        for leaf, n in zip(map(tuple, codes.tolist()), weight.tolist(), strict=True):
            if n:
                votes[leaf] = votes.get(leaf, 0) + n
        if p.fanout is None:
            kept = set(exact_budget(votes, p.budget, (), len(book.sizes)))
        else:
            kept = exact_fanout(codes, weight, p.fanout)
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


@given(st.lists(st.integers(1, 2**36), min_size=1, max_size=40), st.integers(1, 60))
def test_budget_keys_decide_as_fractions(counts, budget):
    votes = {(i % 7, i): n for i, n in enumerate(counts)}
    assert reference.verbs.by_budget(votes, budget, 2) == exact_budget(votes, budget, (), 2)


@given(problem, st.integers(0, 2**32 - 1))
def test_votes_are_blind_to_order_and_add_up(p, seed):
    args, h = p.by_reference(p.vote_args()), p.histories
    weights = np.ones(len(h.codes)) if h.weights is None else h.weights
    for rows in users_of(h.offsets):
        order = np.random.default_rng(seed).permutation(rows)
        half = len(order) // 2
        parts = [
            reference.verbs.leaf_votes(args["book"], h.codes[r], weights[r]) for r in (rows, order[:half], order[half:])
        ]
        assert parts[0] == {k: parts[1].get(k, 0) + parts[2].get(k, 0) for k in parts[1] | parts[2]}
        one, other = (Histories(codes=h.codes[r], lengths=[len(r)], weights=weights[r]) for r in (rows, order))
        agents = reference.vote(**args | {"histories": other})
        testing.assert_agents_equal(reference.vote(**args | {"histories": one}), agents)


@given(problem)
def test_a_parent_has_the_votes_of_its_children(p):
    book = p.by_reference(p.vote_args())["book"]
    votes = reference.verbs.leaf_votes(book, p.histories.codes, p.histories.weights)
    levels = len(book.sizes)

    def check(prefix):
        below = reference.verbs.children(votes, prefix)
        assert sum(below.values()) == sum(n for leaf, n in votes.items() if leaf[: len(prefix)] == prefix)
        for child in below if len(prefix) + 1 < levels else ():
            check(child)

    check(())


@given(problem, st.integers(1, 8))
def test_a_larger_budget_only_adds_agents(p, budget):
    args = p.by_reference(p.vote_args()) | {"fanout": None}
    small, large = (reference.vote(**args | {"budget": n}) for n in (budget, budget + 1))
    for a, b in zip(small.codes, large.codes, strict=True):
        assert {tuple(c) for c in a.tolist() if c[0] >= 0} <= {tuple(c) for c in b.tolist() if c[0] >= 0}
    assert (small.count <= large.count).all() and (large.count <= small.count + 1).all()


def test_weights_in_units():
    w = [1, 0.5, 16, 17, np.inf, -1, -np.inf, np.nan, 2.0**-14, 2.0**-13, 1.5 * 2.0**-12, 0]
    assert reference.verbs.quantise_weights(w).tolist() == [4096, 2048, 65536, 65536, 65536, 0, 0, 0, 0, 0, 2, 0]


def test_only_the_first_rows_vote(monkeypatch):
    monkeypatch.setattr(reference.verbs, "MAX_VOTERS", 3)
    book = reference.Codebook([np.eye(4)])
    agents = reference.vote(book, Histories(codes=np.array([[0], [9], [1], [2]]), lengths=[4]), budget=4)
    assert agents.codes[0, :, 0].tolist() == [0, 1, -1, -1]
    assert reference.verbs.MAX_VOTERS == 3
