# SPDX-License-Identifier: Apache-2.0
"""A user's state against its definition, under any interleaving of operations: what counts is equal to the bit, sums
are within their bound, and a state that comes back from its bytes goes on as if it had never left."""

import pickle

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import hisac
import hisac.testing
from hisac import reference
from hisac.reference.state import UserState as Definition

BOTH = st.integers(0, 1)
ITEMS = 24
TAG = 2**63 + 5


def tables(seed, books, width):
    """Items for each book: the same x and v, with the codes of that book."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-8, 8, (ITEMS, books[0].width)).astype(np.float32) / 4
    v = rng.standard_normal((ITEMS, width)).astype(np.float32)
    x[3] = np.nan
    v[7, 0], v[8, 1] = np.nan, -np.inf
    items = []
    for book in books:
        codes = book.encode(np.nan_to_num(x))
        codes[5, 0] = -1
        codes[6, -1] = 1 << 20
        items.append(hisac.Histories(x, v, codes=codes))
    return items


class Machine(RuleBasedStateMachine):
    """Two states of a user, each beside its definition, which go through the same operations and are merged."""

    @initialize(
        seed=st.integers(0, 99), mean_x=st.booleans(), half_life=st.sampled_from([0, 0, 1, 7, 60, 2**26, 2**31 // 20]),
        leaves=st.sampled_from([1, 3, 5, 30]), ring=st.sampled_from([0, 1, 4]),
    )  # fmt: skip
    def begin(self, seed, mean_x, half_life, leaves, ring):
        rng = np.random.default_rng(seed)
        self.books = [
            hisac.Codebook([rng.standard_normal((c, 3)).astype(np.float32) / (k + 1) for k, c in enumerate(sizes)])
            for sizes in ((3, 4), (5,))
        ]
        self.exact = [reference.Codebook(book.centers) for book in self.books]
        self.items = tables(seed, self.books, 2)
        self.options = {"width": 2, "leaves": leaves, "ring": ring, "half_life": half_life, "mean_x": mean_x}
        self.options |= {"model_tag": TAG, "weighting": 3}
        self.of = [0, 0]
        self.states = [hisac.UserState(self.books[0], **self.options) for _ in range(2)]
        self.known = [Definition(self.exact[0], **self.options) for _ in range(2)]
        self.time, self.at = 1_000_000, 0

    def pair(self, which):
        k = self.of[which]
        return self.states[which], self.known[which], self.books[k], self.items[k]

    @rule(
        which=BOTH,
        ids=st.lists(st.integers(-1, ITEMS), max_size=8),
        weights=st.sampled_from([None, [1.0], [1.0, 2.0, 0.0, 5.0], [0.5, 2.5, 3.75], [np.nan, 1.0, np.inf, 2.0**27]]),
        step=st.sampled_from([0, 1, 7, 40, 200, 2**25, 2**29, 2**31]),
        wide=st.booleans(),
        again=st.integers(0, 5),
        late=st.sampled_from([None, None, -9, 3, 2**62]),
    )
    def append(self, which, ids, weights, step, wide, again, late):
        state, known, book, items = self.pair(which)
        n = len(ids)
        weights = None if weights is None else np.resize(np.float32(weights), n)
        times = self.time + step * np.arange(n, dtype=np.int64)
        self.time += step * n
        positions = max(self.at - again, 0) + np.arange(n, dtype=np.int64)
        self.at = max(self.at, int(positions[-1]) + 1 if n else 0)
        options = {"weights": weights, "times": times, "positions": positions, "model_tag": TAG}
        options["latest"] = late and min(self.time + late, 2**62)
        state.append(book, items, np.array(ids, np.int64 if wide else np.int32), **options)
        known.append(items, np.array(ids, int), **options)

    @rule(which=BOTH, ago=st.integers(0, 100), age=st.sampled_from([None, 0, 30]), least=st.sampled_from([0, 1, 4096]))
    def expire(self, which, ago, age, least):
        state, known, book, items = self.pair(which)
        state.expire(book, items, self.time - ago, age=age, least=least, model_tag=TAG)
        known.expire(items, self.time - ago, age=age, least=least, model_tag=TAG)

    @rule(
        which=BOTH, ids=st.lists(st.integers(-1, ITEMS), max_size=3), by_function=st.booleans(), whole=st.booleans()
    )  # fmt: skip
    def forget(self, which, ids, by_function, whole):
        state, known, book, items = self.pair(which)
        left = [row for rows in known.rows.values() for row in rows]
        whole = whole or known.migrated
        types = {"id": np.int64, "weight": np.float32, "time": np.int64}
        rows = tuple(np.array([getattr(row, name) for row in left], kind) for name, kind in types.items())
        kept = (lambda code: rows) if by_function and not whole else rows
        state.forget(book, items, np.array(ids, np.int64), kept=kept, whole=whole, model_tag=TAG)
        known.forget(items, np.array(ids, int), kept=kept, whole=whole, model_tag=TAG)

    @rule(which=BOTH)
    def merge(self, which):
        state, known, book, items = self.pair(which)
        other, theirs = self.states[1 - which], self.known[1 - which]
        before = other.to_bytes()
        if self.of[0] != self.of[1]:
            with pytest.raises(ValueError, match="merge: codebook expected"):
                state.merge(book, other, items, model_tag=TAG)
            return
        state.merge(book, other, items, model_tag=TAG)
        known.merge(theirs, items, model_tag=TAG)
        assert other.to_bytes() == before

    @rule(which=BOTH)
    def migrate(self, which):
        """By prototypes, which are the same to the bit; means may be encoded apart."""
        if self.options["mean_x"]:
            return
        state, known, book, _ = self.pair(which)
        self.of[which] = 1 - self.of[which]
        self.states[which], *lost = state.migrate(book, self.books[self.of[which]])
        self.known[which], *expected = known.migrate(self.exact[self.of[which]])
        assert lost == expected

    @rule(which=BOTH, by_pickle=st.booleans())
    def leave_and_come_back(self, which, by_pickle):
        state = self.states[which]
        data = state.to_bytes()
        back = pickle.loads(pickle.dumps(state)) if by_pickle else hisac.UserState.from_bytes(data)
        assert back.to_bytes() == data
        assert back.params == state.params == self.options
        self.states[which] = back

    @rule(which=BOTH, dtype=st.sampled_from(["bfloat16", "int8"]))
    def serve(self, which, dtype):
        state, _, book, _ = self.pair(which)
        served = hisac.UserState.from_bytes(state.to_bytes(dtype))
        check_served(served.sums(book), state.sums(book), dtype)
        assert served.to_bytes(dtype) == state.to_bytes(dtype)

    @invariant()
    def agree(self):
        if not hasattr(self, "states"):
            return
        for which in (0, 1):
            check(*self.pair(which)[:3])


def check_served(a, b, dtype):
    for name in ("codes", "weights", "bias", "spread"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for name in ("x", "v"):
        given, whole = getattr(a, name), getattr(b, name)
        if whole is None:
            continue
        if given.dtype == np.int8:
            given = given * a.x_scale[:, None]
        size = np.abs(whole) * 2.0**-8 if dtype == "bfloat16" else np.abs(whole).max(1, keepdims=True, initial=0) / 252
        assert (np.abs(given - whole) < size + 2.0**-120).all()


def check(state, known, book):
    sums, expected, bound = state.sums(book), known.sums(), known.bound()
    np.testing.assert_array_equal(sums.codes, expected.codes)
    np.testing.assert_array_equal(sums.weights, expected.weights)
    for name in ("x", "v", "bias", "spread"):
        a, b, most = (getattr(h, name) for h in (sums, expected, bound))
        assert (a is None) == (b is None)
        if a is None:
            continue
        none = np.isneginf(b)
        np.testing.assert_array_equal(np.isneginf(a), none)
        off = np.where(none, 0.0, np.abs(np.where(none, 0, a) - np.where(none, 0, b)))
        np.testing.assert_array_less(off, most + 2.0**-120, err_msg=name)
    assert (state.position, state.revision, state.migrated) == (known.position, known.revision, known.migrated)
    assert state.epoch == (known.epoch or 0)
    agents = state.compress(book, budget=3, temperature=1.0).agents
    testing_agents = known.compress(budget=3, temperature=1.0).agents
    hisac.testing.assert_agents_equal(agents, testing_agents)
    a, b = state.stats(book, agents, agents), known.stats(testing_agents, testing_agents)
    assert (a[:4], a[5:7]) == (b[:4], b[5:7])
    np.testing.assert_allclose(a[4::3], b[4::3], atol=1e-12)
    a, b = state.recent(), known.recent()
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.times, b.times)
    np.testing.assert_allclose(a.log_share, b.log_share, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(a.table_share, b.table_share, rtol=1e-5, atol=1e-4)


TestState = Machine.TestCase


def pair(half_life, ring, leaves=9):
    """A state and its definition, of one-dimensional items, and what calls a method of both."""
    book = hisac.Codebook([np.arange(4, dtype=np.float32)[:, None]])
    table = np.arange(4, dtype=np.float32)[:, None]
    items = hisac.Histories(table, table, codes=book.encode(table))
    options = {"width": 1, "leaves": leaves, "ring": ring, "half_life": half_life}
    return book, items, hisac.UserState(book, **options), Definition(reference.Codebook(book.centers), **options)


def test_rings_merge_by_the_times_that_they_had():
    """The first row that leaves moves the epoch, by its votes. Rows that were apart are then equally far. The machine
    did not find it: of its half-lives none was long enough for times at the end of their range."""
    h, far = 2**31 // 20, -(2**31)
    book, items, *mine = pair(h, 2)
    theirs = pair(h, 2)[2:]
    runs = (
        (mine, [0, 3, 1], [2.0**28 - 16, 2.0**40, 1], [0, far, far + 2]),
        (theirs, [2, 2, 0], [1, 1, 1], [0, far + 1, 5]),
    )
    for both, ids, weights, times in runs:
        options = {"weights": np.float32(weights), "times": np.array(times)}
        both[0].append(book, items, np.array(ids), **options)
        both[1].append(items, ids, **options)
    mine[0].merge(book, theirs[0], items)
    mine[1].merge(theirs[1], items)
    check(*mine, book)
    assert mine[0].recent().ids.tolist() == [1, 0]


@pytest.mark.parametrize("half_life", [0, 60])
def test_rows_that_are_not_there_and_times_out_of_range(half_life):
    """The machine had no time of another clock, and no row that is absent before any other has come."""
    book, items, state, known = pair(half_life, 2)
    end = 2**62
    for ids, weights, times, latest in (
        ([0, -1, 1], [0, 1, np.nan], [5, end, -end], None),
        ([0, 1, 2], [1, 1, 1], [100, end, 130], 130),
        ([2, 3, 0], [1, 1, 1], [-end, 2**40, 2**40 + 3], None),
        ([1, -1, 9], [1, 1, 1], [2**40 + 9, end, 2**40 + 9], None),
        ([1], [1], [end], None),
    ):
        options = {"weights": np.float32(weights), "times": np.array(times), "latest": latest}
        state.append(book, items, np.array(ids), **options)
        known.append(items, ids, **options)
        check(state, known, book)


def test_events_that_are_no_rows_merge_too():
    """Their position and their number; the machine merges them too seldom."""
    book, items, *mine = pair(60, 2)
    theirs = pair(60, 2)[2:]
    options = {"weights": np.float32([0, np.nan]), "positions": np.array([4, 9])}
    theirs[0].append(book, items, np.array([1, 2]), **options)
    theirs[1].append(items, [1, 2], **options)
    for turn in range(2):
        mine[0].merge(book, theirs[0], items)
        mine[1].merge(theirs[1], items)
        check(*mine, book)
        assert (mine[0].position, mine[0].stats(book).seen, mine[0].revision) == (9, 2 * turn + 2, turn + 1)


def test_a_leaf_survives_rows_of_v_that_are_not_finite():
    book, items, state, known = pair(10, 0)
    items = items._replace(v=np.array([[1], [np.nan], [np.inf], [3e38]], np.float32))
    ids, times = np.resize(np.arange(4), 60), np.arange(60)
    state.append(book, items, ids, times=times)
    known.append(items, ids, times=times)
    check(state, known, book)
    assert np.isfinite(state.sums(book).v).all()


def test_migration_by_means():
    """Items near the codewords of both books, so that rounding moves no mean over to another one."""
    rng = np.random.default_rng(4)
    books = [hisac.Codebook([8 * rng.standard_normal((c, 5)).astype(np.float32)]) for c in (9, 6)]
    own = rng.integers(0, 9, 60)
    x = books[0].centers[0][own] + rng.standard_normal((60, 5)).astype(np.float32) / 50
    items = hisac.Histories(x, rng.standard_normal((60, 2)).astype(np.float32), codes=books[0].encode(x))
    exact = [reference.Codebook(book.centers) for book in books]
    options = {"width": 2, "leaves": 9, "ring": 3, "half_life": 50}
    state, known = hisac.UserState(books[0], **options), Definition(exact[0], **options)
    for each in (lambda *a, **k: state.append(books[0], *a, **k), known.append):
        each(items, np.arange(60), times=np.arange(60))
    moved, *lost = state.migrate(books[0], books[1])
    expected, *known_lost = known.migrate(exact[1])
    assert lost == known_lost == [0, 0]
    check(moved, expected, books[1])
