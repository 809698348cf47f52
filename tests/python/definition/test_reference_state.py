# SPDX-License-Identifier: Apache-2.0
"""Laws of the definition, third part: the state of a user between requests."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hisac import reference, testing
from hisac.reference.state import MOST_VOTES, UserState, power
from hisac.types import Histories


def rule(p):
    return {"budget": p.budget, "fanout": p.fanout, "beam": p.beam}


@st.composite
def streams(draw, half_life=0):
    """A book, the rows of one user as tables, whole weights, times, and options of `compress`."""
    p = draw(testing.problems(max_users=1, max_history=20).filter(lambda p: p.histories.x is not None))
    book = p.by_reference(p.vote_args())["book"]
    h = reference.tables.gather(p.histories)
    items = Histories(h.x, h.v, codes=h.codes.astype(np.int32))
    n = len(items.v)
    weights = np.array(
        draw(st.lists(st.sampled_from([1.0, 1.0, 3.0, 0.0, np.nan]), min_size=n, max_size=n)), np.float32
    )
    step = max(half_life // 3, 1)
    times = np.cumsum(draw(st.lists(st.integers(0, 3 * step), min_size=n, max_size=n)), dtype=np.int64)
    return book, items, weights, times, {**rule(p), "normalize": p.normalize, "temperature": 0.5}


def state_of(book, items, **options):
    return UserState(book, width=items.v.shape[1], **{"leaves": 64, **options})


def feed(state, stream, rows):
    _, items, weights, times, _ = stream
    rows = np.asarray(rows, int)
    state.append(items, rows, weights=weights[rows], times=times[rows], positions=rows)
    return state


def check_sums(a, b):
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.weights, b.weights)
    for name in ("x", "v", "bias", "spread"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-9, atol=1e-9, err_msg=name)


def batch_of(stream):
    """The rows of a stream as histories: those whose weight is above 0, with it as bias and as votes."""
    _, items, weights, _, _ = stream
    ok = weights > 0
    codes = np.where(ok[:, None], items.codes, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        bias = np.where(ok, np.log(weights.astype(np.float64)), np.nan)
    whole = np.where(ok, weights, 0).astype(np.int64)
    return Histories(items.x, items.v, np.array([0, len(ok)]), codes, bias=bias, weights=whole)


@given(streams(), st.integers(0, 20))
def test_a_state_is_the_leaf_sums_of_its_rows(stream, i):
    """To the bit in votes and agents, whatever the parts; without a ring, of all rows."""
    book, items, _, _, options = stream
    n = len(items.v)
    state = state_of(book, items)
    for rows in np.split(np.arange(n), [min(i, n)]):
        feed(state, stream, rows)
    batch = batch_of(stream)
    check_sums(state.sums(), reference.leaf_sums(book, batch))
    got, whole = state.compress(**options), reference.compress(book, batch, method="leaf", **options)
    testing.assert_agents_equal(got.agents, whole.agents)
    for x, y in zip(got[:3], whole[:3], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


@given(streams(), st.integers(0, 6))
def test_the_ring_keeps_the_last_rows(stream, ring):
    book, items, weights, times, _ = stream
    n = len(items.v)
    state = feed(state_of(book, items, ring=ring), stream, np.arange(n))
    there = np.flatnonzero(weights > 0)
    left = there[: max(len(there) - ring, 0)]
    check_sums(state.sums(), feed(state_of(book, items), stream, left).sums())
    recent = state.recent()
    np.testing.assert_array_equal(recent.ids, there[len(left) :])
    np.testing.assert_array_equal(recent.times, times[recent.ids])
    total = np.exp([*recent.log_share, recent.table_share]).sum()
    assert total == pytest.approx(1) or (total == 0 and not len(recent.ids))
    assert (state.seen, state.absent) == (n, n - len(there) + (book.leaves(items.codes[left]) < 0).sum())


@given(streams(), st.integers(0, 20), st.integers(0, 3))
def test_events_come_at_least_once(stream, i, ring):
    book, items = stream[:2]
    n = len(items.v)
    once = feed(state_of(book, items, ring=ring), stream, np.arange(n))
    again = feed(feed(state_of(book, items, ring=ring), stream, np.arange(n)), stream, np.arange(min(i, n)))
    assert (again.revision, again.seen, str(again.ring)) == (once.revision, once.seen, str(once.ring))
    check_sums(once.sums(), again.sums())


@given(streams(half_life=30), st.integers(0, 20))
def test_votes_decay(stream, i):
    book, items, weights, times, _ = stream
    n = len(items.v)
    state = state_of(book, items, half_life=30)
    for rows in np.split(np.arange(n), [min(i, n)]):
        feed(state, stream, rows)
    batch = batch_of(stream)
    if not state.votes:
        return
    decay = (times - state.epoch) / 30
    ideal = reference.leaf_sums(book, batch._replace(bias=batch.bias + np.log(2) * decay))
    np.testing.assert_allclose(state.sums().bias, ideal.bias, rtol=1e-9, atol=1e-9)
    later = state.sums(now=state.epoch + 60)
    np.testing.assert_allclose(later.bias, ideal.bias - 2 * np.log(2), rtol=1e-9, atol=1e-9)
    votes = {}
    for leaf, w, d in zip(book.leaves(batch.codes).tolist(), weights, decay, strict=True):
        votes[leaf] = votes.get(leaf, 0) + (4096 * float(w) * 2.0**d if w > 0 else 0)
    for leaf, found in state.votes.items():
        assert abs(found - votes[leaf]) <= n


def one_level(leaves=4):
    book = reference.Codebook([np.arange(leaves, dtype=np.float32)[:, None]])
    table = np.arange(leaves, dtype=np.float32)[:, None]
    return book, Histories(table, table, codes=np.arange(leaves, dtype=np.int32)[:, None])


def test_the_epoch_moves():
    book, items = one_level()
    state = state_of(book, items, half_life=10)
    state.append(items, [0, 0], times=[17, 20])
    assert (state.epoch, state.votes) == (10, {0: round(4096 * power(0.7)) + 8192})
    state.append(items, [1], times=[10 + 199])
    assert state.epoch == 10
    state.append(items, [1], times=[10 + 200])
    assert state.epoch == 210
    assert state.votes == {0: 0, 1: (round(4096 * 2**19 * power(0.9)) >> 20) + 4096}
    state.append(items, [2], weights=[2.0**27], times=[220])  # its 2^40 votes are too many in this unit
    assert (state.epoch, state.votes[2]) == (220, 2**39)
    assert power(0.5) == pytest.approx(2**0.5, rel=1e-12)


def test_votes_end_below_two_to_the_forty():
    book, items = one_level()
    state = state_of(book, items)
    state.append(items, [0, 1, 2], weights=[2.0**39, 1e30, 5])
    assert state.votes == {0: 2**39, 1: MOST_VOTES - 2**39, 2: 0}


def test_a_full_table_drops_the_fewest_votes():
    book, items = one_level()
    state = state_of(book, items, leaves=2)
    state.append(items, [0, 3, 3, 1])
    assert state.votes == {3: 2, 1: 1}
    state.append(items, [2])
    assert state.votes == {3: 2, 2: 1}
    state.append(items, [2, 0])  # of equal votes the higher code
    assert state.votes == {2: 2, 0: 1}
    assert (state.dropped_leaves, state.dropped_votes) == (3, 4)
    other = state_of(book, items, leaves=3)
    other.append(items, [1, 3, 3, 3, 0])
    state.merge(other, items)
    assert state.votes == {0: 2, 3: 3}


@given(streams(), st.integers(0, 20), st.integers(0, 20), st.integers(0, 4))
def test_parts_merge(stream, i, j, ring):
    book, items = stream[:2]
    n = len(items.v)
    cuts = [0, *sorted((min(i, n), min(j, n))), n]
    whole = feed(state_of(book, items, ring=ring), stream, np.arange(n))

    def part(k):
        return feed(state_of(book, items, ring=ring), stream, np.arange(cuts[k], cuts[k + 1]))

    left, inner = part(0), part(1)
    left.merge(part(1), items)
    left.merge(part(2), items)
    inner.merge(part(2), items)
    right = part(0)
    right.merge(inner, items)
    left.merge(state_of(book, items, ring=ring), items)
    for merged in (left, right):
        check_sums(merged.sums(), whole.sums())
        assert (str(merged.ring), merged.seen, merged.absent) == (str(whole.ring), whole.seen, whole.absent)
    empty = state_of(book, items, ring=ring)
    empty.merge(whole, items)
    check_sums(empty.sums(), whole.sums())


def test_parts_merge_at_the_later_epoch():
    book, items = one_level()
    early, late = (state_of(book, items, half_life=10) for _ in range(2))
    early.append(items, [0, 1], times=[0, 0])
    late.append(items, [1], times=[30])
    both = state_of(book, items, half_life=10)
    both.merge(early, items)
    both.merge(late, items)
    late.merge(early, items)
    assert both.votes == late.votes == {0: 512, 1: 512 + 4096}
    assert both.epoch == late.epoch == 30


@given(streams(), st.sets(st.integers(0, 19)), st.integers(0, 4), st.sampled_from(["rows", "function", "whole"]))
def test_what_is_forgotten_never_was(stream, gone, ring, way):
    book, items, weights, times, _ = stream
    n = len(items.v)
    gone = sorted(row for row in gone if row < n)
    state = feed(state_of(book, items, ring=ring), stream, np.arange(n))
    there = np.flatnonzero(weights > 0)
    left = there[: max(len(there) - ring, 0)]
    rows = left, weights[left], times[left]
    kept = (lambda code: rows) if way == "function" else rows
    state.forget(items, np.array(gone, int), kept=kept, whole=way == "whole")
    without = state_of(book, items)
    feed(without, stream, np.setdiff1d(left, gone))
    check_sums(state.sums(), without.sums())
    assert [row.id for row in state.ring] == [row for row in there[len(left) :] if row not in gone]


def test_forgetting_needs_what_is_kept():
    book, items = one_level()
    state = state_of(book, items, ring=1)
    state.append(items, [0, 1])
    state.forget(items, np.array([1]))
    assert not state.ring
    with pytest.raises(ValueError, match="forget: kept expected"):
        state.forget(items, np.array([0]))
    assert state.votes == {0: 1}


def test_forgetting_after_a_migration():
    """Items 0, 1 and 2 lie together in the old book, and in the new one's leaf of their mean; item 2 has a leaf of its
    own there. Only the whole table made again is without it."""
    table = np.array([[0.0], [1.0], [2.0], [9.0]], np.float32)
    old, new = (reference.Codebook([np.array(c, np.float32)[:, None]]) for c in ([1, 9], [0.9, 2.1, 9]))
    before, after = (Histories(table, table, codes=reference.encode(book, table)) for book in (old, new))
    state = state_of(old, before, leaves=5)
    state.append(before, [0, 1, 2, 3])
    made, *_ = state.migrate(new)
    assert made.votes == {0: 3, 2: 1}
    rows = np.array([0, 1, 2, 3]), None, None
    with pytest.raises(ValueError, match="forget: whole expected, since the state has been migrated, got False"):
        made.forget(after, np.array([2]), kept=rows)
    with pytest.raises(ValueError, match="forget: kept expected, rows, of which the whole table"):
        made.forget(after, np.array([2]), kept=lambda code: rows, whole=True)
    made.forget(after, np.array([2]), kept=rows, whole=True)
    assert (made.votes, made.migrated) == ({0: 2, 2: 1}, False)
    np.testing.assert_allclose(made.sums().v[:, 0], [0.5, 9])


def test_a_row_that_is_not_there_says_nothing_of_time():
    """A NaN, a weight of 0 and an id below 0 neither set the epoch nor move it; nor does a time after `latest`."""
    book, items = one_level()
    state = state_of(book, items, half_life=10, ring=2)
    state.append(items, [0, 1, -1], weights=[0, np.nan, 1], times=[-(2**50), 2**50, 2**50])
    assert (state.epoch, state.ring, state.seen, state.absent) == (None, [], 3, 3)
    state.append(items, [0, 1, -1, 2], times=[100, 105, 2**50, 2**50], latest=110)
    assert (state.epoch, state.votes) == (100, {0: 4096})
    assert state.recent().times.tolist() == [105, 110]


def test_times_without_a_half_life():
    """The epoch follows, so that the ring's times are exact, and a row that is too far back is as far as can be."""
    book, items = one_level()
    state = state_of(book, items, ring=3)
    state.append(items, [0, 1, 2], times=[0, 2**40, 2**40 + 5])
    assert state.recent().times.tolist() == [2**40 - 2**31, 2**40, 2**40 + 5]
    state.expire(items, 2**40 + 6, age=3)
    assert (state.recent().ids.tolist(), state.votes) == ([2], {0: 1, 1: 1})
    late = state_of(book, items, ring=3)
    late.append(items, [3], times=[2**41])
    state.merge(late, items)
    assert state.epoch == 2**41
    assert state.recent().times.tolist() == [2**41 - 2**31, 2**41]


def test_rings_merge_by_the_times_that_they_had():
    """The first row that leaves moves the epoch, by its votes. Rows that were apart are then equally far."""
    book, items = one_level()
    h, far = 2**31 // 20, -(2**31)
    mine, theirs = (state_of(book, items, half_life=h, ring=2) for _ in range(2))
    mine.append(items, [0, 3, 1], weights=[2.0**28 - 16, 2.0**40, 1], times=[0, far, far + 2])
    theirs.append(items, [2, 2, 0], times=[0, far + 1, 5])
    assert (mine.epoch, theirs.epoch) == (0, 0)
    mine.merge(theirs, items)
    assert mine.epoch == h
    assert [row.id for row in mine.ring] == [1, 0]


def test_a_state_expires():
    book, items = one_level()
    state = state_of(book, items, ring=3, half_life=10)
    state.append(items, [0, 1, 2], times=[0, 25, 30])
    state.expire(items, 31, age=5)
    assert [row.id for row in state.ring] == [2]
    assert state.votes == {0: 4096, 1: round(4 * 4096 * power(0.5))}
    state.expire(items, 50, least=4096 >> 4)
    assert sorted(state.votes) == [1]


def test_states_that_do_not_mix():
    book, items = one_level()
    other, _ = one_level(5)
    state = state_of(book, items)
    with pytest.raises(ValueError, match=f"fingerprint expected {book.fingerprint}, got {other.fingerprint}"):
        state.merge(state_of(other, items), items)
    with pytest.raises(ValueError, match="model_tag expected 0, got 7"):
        state.merge(state_of(book, items, model_tag=7), items)
    with pytest.raises(ValueError, match="append: model_tag expected 0, got 7"):
        state.append(items, [0], model_tag=7)
    with pytest.raises(ValueError, match="options expected"):
        state.merge(state_of(book, items, half_life=7), items)


@given(streams())
def test_migration_to_the_same_book_changes_nothing(stream):
    book, items = stream[:2]
    state = feed(state_of(book, items, mean_x=False), stream, np.arange(len(items.v)))
    exact = reference.Codebook(book.centers)
    made, leaves, votes = state.migrate(exact)
    assert made.position == state.position
    kept = sum(made.votes.values())
    assert kept + votes == sum(state.votes.values())
    assert leaves == np.isneginf(state.sums().bias).sum()


def test_migration_maps_by_the_mean_x():
    book, items = one_level()
    state = state_of(book, items)
    state.append(items, [0, 1, 2, 3, 3])
    coarse = reference.Codebook([np.array([[0.4], [2.6]], np.float32)])
    made, leaves, votes = state.migrate(coarse)
    assert (made.votes, leaves, votes) == ({0: 2, 1: 3}, 0, 0)
    np.testing.assert_allclose(made.sums().v[:, 0], [0.5, 8 / 3])


def test_stats():
    book, items = one_level()
    state = state_of(book, items, ring=1)
    state.append(items, [0, 0, 1, 9, 2])
    agents = state.compress(budget=1, temperature=1.0).agents
    stats = state.stats(agents, agents)
    assert stats[:4] == (2, 1, 5, 3)
    assert stats.absent_share == 0.25
    assert (stats.outside, stats.churn) == (pytest.approx(1 / 3), 0)
    state.append(items, [1, 1, 1])
    assert state.stats(state.compress(budget=1, temperature=1.0).agents, agents).churn == 1
