# SPDX-License-Identifier: Apache-2.0
"""Laws of the definition, third part: the state of a user between requests."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hisac import reference, testing
from hisac.reference import state as reference_state
from hisac.types import Agents


def rule(p):
    return {"budget": p.budget, "fanout": p.fanout, "beam": p.beam}


@st.composite
def streams(draw):
    """A book, rows of one user, the state's options."""
    p = draw(
        testing.problems(max_users=1, max_history=20).filter(
            lambda p: p.histories.x is not None and p.histories.bias is None
        )
    )
    options = {**rule(p), "normalize": p.normalize, "temperature": 0.5}
    return p, p.by_reference(p.vote_args())["book"], options


def feed(state, p, rows):
    state.append(
        p.histories.x[rows],
        p.histories.v[rows],
        p.histories.codes[rows],
        weights=None if p.histories.weights is None else p.histories.weights[rows],
    )
    return state


def check_states(a, b):
    testing.assert_agents_equal(a.agents, b.agents)
    for x, y in zip(a.tokens()[:2], b.tokens()[:2], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


@given(streams(), st.integers(0, 20), st.integers(0, 20))
def test_state_appends_in_parts(stream, i, j):
    p, book, options = stream
    n, (i, j) = len(p.histories.v), sorted((i, j))
    whole = feed(reference_state.UserState(book, revote="always", **options), p, np.arange(n))
    parts = reference_state.UserState(book, revote="always", **options)
    for rows in np.split(np.arange(n), [min(i, n), min(j, n)]):
        feed(parts, p, rows)
    check_states(whole, parts)
    pinned = feed(reference_state.UserState(book, **options), p, np.arange(min(i, n)))
    before = pinned.agents
    feed(pinned, p, np.arange(min(i, n), n))
    assert pinned.agents is before
    pinned.refresh()
    check_states(whole, pinned)


@given(streams())
def test_a_state_votes_as_its_rows(stream):
    """Without weights, too: each row that voted had the votes of an equal float weight."""
    p, book, options = stream
    rows = len(p.histories.v)
    state = feed(reference_state.UserState(book, **options), p, np.arange(rows))
    whole = p.histories._replace(offsets=np.array([0, rows]))
    testing.assert_agents_equal(state.agents, reference.vote(book, whole, **rule(p)))


@given(streams(), st.sets(st.integers(0, 19)))
def test_state_forgets(stream, gone):
    p, book, options = stream
    gone = sorted(row for row in gone if row < len(p.histories.v))
    state = feed(reference_state.UserState(book, revote="always", **options), p, np.arange(len(p.histories.v)))
    state.forget(gone)
    check_states(
        state,
        feed(
            reference_state.UserState(book, revote="always", **options),
            p,
            np.delete(np.arange(len(p.histories.v)), gone),
        ),
    )


@given(streams(), st.integers(0, 20), st.integers(0, 20))
def test_state_merges(stream, i, j):
    p, book, options = stream
    n = len(p.histories.v)
    cuts = [0, *sorted((min(i, n), min(j, n))), n]
    whole = feed(reference_state.UserState(book, **options), p, np.arange(n))

    def part(k):
        state = feed(reference_state.UserState(book, **options), p, np.arange(cuts[k], cuts[k + 1]))
        state.agents = whole.agents
        return state

    left, right, inner = part(0), part(0), part(1)
    left.merge(part(1))
    left.merge(part(2))
    inner.merge(part(2))
    right.merge(inner)
    empty = reference_state.UserState(book, **options)
    left.merge(empty)
    if n:
        empty.merge(left)
        check_states(whole, empty)
    check_states(whole, left)
    check_states(whole, right)


def test_state_refuses_other_versions():
    book, other = reference.Codebook([[[0.0]]]), reference.Codebook([[[1.0]]])
    state = reference_state.UserState(book, budget=1)
    with pytest.raises(ValueError, match=f"codebook differs: expected {book.fingerprint}, got {other.fingerprint}"):
        state.merge(reference_state.UserState(other, budget=1))
    with pytest.raises(ValueError, match="model_tag differs: expected 0, got 7"):
        state.merge(reference_state.UserState(book, budget=1, model_tag=7))
    rows = np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 1), np.int32)
    theirs = reference_state.UserState(book, budget=1)
    state.append(*rows)
    theirs.append(*rows)
    theirs.agents = Agents(theirs.agents.codes - 1, *theirs.agents[1:])
    with pytest.raises(ValueError, match="agents differ"):
        state.merge(theirs)
