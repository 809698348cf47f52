# SPDX-License-Identifier: Apache-2.0
"""Sparse routing, compiled, against `hisac.reference`: lists exactly, tokens and gradients within their bounds; and the
same bits whatever the threads, the batch, or who made the lists."""

import numpy as np
import pytest
from hypothesis import Phase, assume, find, given, settings
from hypothesis import strategies as st

import hisac
from hisac import Agents, Histories, RouteAgents, reference, testing
from hisac.reference import bounds
from hisac.reference.lists import listed
from support import check_backward, check_one_by_one, flat, kinds, with_threads

try:
    import torch
except ImportError:
    torch = None

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the reference, on hostile values
LONG = {"sparse": True, "max_users": 3, "max_history": 150, "max_agents": 20, "max_codes": 4}
PROBLEMS = st.sampled_from([(False, False), (False, True), (True, True)]).flatmap(
    lambda kind: testing.problems(hostile=kind[0], gathered=kind[1], **LONG)
)


def agents_of(p):
    """A problem's agents with codes, those of `encode`."""
    users, m, width = p.prototypes.shape
    codes = hisac.encode(p.book, p.prototypes.reshape(users * m, width)).reshape(users, m, p.book.levels)
    count = np.full(users, m, np.int32) if p.count is None else p.count
    return Agents(codes, np.ones((users, m), np.int64), count, p.book.fingerprint, p.prototypes)


def listed_rows(p, to=None):
    """Of each user [n, M]: which behaviours are routed to which agents, by the definition."""
    agents = agents_of(p)
    to = RouteAgents(agents.prototypes, agents.count, agents.codes) if to is None else to
    codes = reference.tables.gather(p.histories).codes
    book = p.by_reference({"book": p.book})["book"]
    users = enumerate(reference.ranges(p.histories.offsets))
    return [listed(book, codes[rows], to, b, p.sparse) for b, rows in users]


def test_the_problems_have_sparse_users():
    """Of each kind: users whose rows meet 60 % of the agents at most, and agents that no behaviour is routed to."""

    def wanted(p):
        return any(len(rows) and 0 < rows.mean() < 0.6 and not rows.any(0).all() for rows in listed_rows(p))

    for kind in ({}, {"hostile": True}, {"gathered": True}):
        find(
            testing.problems(**LONG, **kind),
            wanted,
            settings=settings(max_examples=3000, database=None, phases=[Phase.generate]),
        )


# -------------------------------------------------------------------------------------------------------------- lists


@given(PROBLEMS, st.integers(1, 25))
def test_lists(p, k):
    agents = agents_of(p)
    expected = reference.agent_lists(p.by_reference({"book": p.book})["book"], agents, k).lists
    mine = with_threads(lambda: hisac.agent_lists(p.book, agents, k))
    assert mine.lists.dtype == np.int32 and flat(mine._replace(lists=None)) == flat(agents)
    np.testing.assert_array_equal(mine.lists, expected)
    fewer = hisac.agent_lists(p.book, agents, max(k - 2, 1)).lists
    assert flat(np.ascontiguousarray(mine.lists[..., : fewer.shape[2]])) == flat(fewer)
    if torch is not None:
        for module in (hisac, pytest.importorskip("hisac.torch")):
            np.testing.assert_array_equal(module.agent_lists(p.book, testing.to_torch(agents), k).lists, expected)


@pytest.mark.parametrize("width", [1, 3, 64, 200])
@pytest.mark.parametrize("shift", [0.0, 1e3, 1e15])
def test_lists_of_near_ties(width, shift):
    """Distances that float32 cannot tell apart, and equal ones: the definition's own sums decide, then the agent."""
    rng = np.random.default_rng(width)
    centers = (shift + rng.normal(size=(70, width))).astype(np.float32)
    p = np.float32(shift) + rng.normal(size=(1, 1, width)) + 1e-7 * rng.integers(-2, 3, (2, 60, width))
    book, agents = hisac.Codebook([centers]), Agents(
        np.zeros((2, 60, 1), np.int32), None, np.array([60, 41], np.int32), 0, p.astype(np.float32)
    )  # fmt: skip
    agents = agents._replace(fingerprint=book.fingerprint)
    for k in (1, 7, 40, 60):
        expected = reference.agent_lists(reference.Codebook([centers]), agents, k).lists
        np.testing.assert_array_equal(hisac.agent_lists(book, agents, k).lists, expected)


# -------------------------------------------------------------------------------------------------------------- route


@given(PROBLEMS)
def test_route(p):
    args, expected = p.route_args(), p.reference()
    for convert, dtype in kinds(p):
        mine = hisac.route(**convert(args))
        testing.assert_tokens_close(mine, expected, bounds.route_bound(p.by_reference(args), dtype))
    with_threads(lambda: hisac.route(**args))


@given(PROBLEMS)
def test_route_backward(p):
    check_backward(p)


@given(PROBLEMS)
def test_lists_that_are_kept(p):
    """Made once, longer than needed, or by the call: the same bits; bare prototypes have the codes of `encode`."""
    args, agents = p.route_args(), agents_of(p)
    expected = hisac.route(**args)
    args = {name: a for name, a in args.items() if name != "count"}
    for kept in (agents, *(hisac.agent_lists(p.book, agents, k) for k in (p.sparse, p.sparse + 3))):
        assert flat(hisac.route(**args | {"agents": kept})) == flat(expected)
    back = p.backward_args(expected)
    back, whole = {name: a for name, a in back.items() if name != "count"}, hisac.route_backward(**back)
    assert flat(hisac.route_backward(**back | {"agents": kept})) == flat(whole)


@given(PROBLEMS, st.integers(0, 2**32 - 1))
def test_lists_may_say_anything(p, seed):
    """Lists and codes of agents that no verb made: entries outside, twice, of absent agents."""
    rng, (users, m, _) = np.random.default_rng(seed), p.prototypes.shape
    lists = rng.integers(-2, m + 2, (users, p.book.sizes[0], min(p.sparse, m) + 2)).astype(np.int32)
    lists = testing.sprinkle(rng, lists, 0.1, np.array([-(2**31), 2**31 - 1]))
    codes = rng.integers(-1, p.book.sizes[0] + 1, (users, m, p.book.levels)).astype(np.int32)
    to = RouteAgents(p.prototypes, p.count, codes, lists)
    args = p.route_args() | {"agents": to, "count": None}
    exact = p.by_reference(args)
    testing.assert_tokens_close(hisac.route(**args), reference.route(**exact), bounds.route_bound(exact, p.dtype))
    back = p.backward_args(hisac.route(**args)) | {"agents": to, "count": None}
    exact = p.by_reference(back)
    testing.assert_gradients_close(hisac.route_backward(**back), reference.route_backward(**exact), exact)


@given(PROBLEMS)
def test_lists_of_all_agents_are_dense_routing(p):
    args, m = p.route_args(), p.prototypes.shape[1]
    dense = {name: a for name, a in args.items() if name != "sparse"}
    assert flat(hisac.route(**args | {"sparse": m})) == flat(hisac.route(**dense))


@given(PROBLEMS)
def test_a_behaviour_is_shared_out_whole(p):
    """By the definition: in agents mode the masses of a user's agents sum to those of its behaviours, however few
    agents each meets."""
    assume(np.all(np.asarray(p.temperature) > 0))
    args = p.by_reference(p.route_args())
    found = np.exp(reference.route(**args | {"normalize": "agents"}).lse)
    users = reference.each_history(args["histories"], RouteAgents(p.prototypes, p.count), 1.0, args["book"])
    for mass, (_, _, h) in zip(found, users, strict=True):
        expected = np.exp(h.bias).sum() if len(h.agents) else 0.0
        np.testing.assert_allclose(mass.sum(), expected, rtol=1e-9, atol=1e-30)


@given(PROBLEMS)
def test_route_ragged_equals_one_by_one(p):
    check_one_by_one(p)


@pytest.mark.parametrize("refine", [0, 2])
def test_lists_come_back_with_refined_agents(refine):
    """Refined prototypes beside lists of those before: given again, such agents give the same tokens."""
    rng = np.random.default_rng(refine)
    book = hisac.Codebook([rng.normal(size=(6, 8)).astype("f4"), 0.3 * rng.normal(size=(5, 8)).astype("f4")])
    x = rng.normal(size=(500, 8)).astype(np.float32)
    h = Histories(x, x, np.array([0, 500]), hisac.encode(book, x))
    options = {"temperature": 0.5, "sparse": 2}
    first = hisac.compress(book, h, budget=20, refine=refine, **options)
    assert (first.agents.lists is not None) == (refine > 0)
    again = hisac.compress(book, h, agents=first.agents, **options)
    assert flat(again.tokens) == flat(first.tokens)


@pytest.mark.parametrize("normalize", ["history", "agents"])
@pytest.mark.parametrize("rows", [300, 9000])
def test_long_histories(rows, normalize):
    """Several tiles, groups of every size, agents in numbers that no panel's width divides: with own panels and masked
    rows in one tile, forward and backward, with several threads."""
    rng = np.random.default_rng(rows)
    centers = [rng.normal(size=(40, 20)), 0.3 * rng.normal(size=(12, 20))]
    book = hisac.Codebook([c.astype(np.float32) for c in centers])
    codes = np.stack([np.minimum(rng.geometric(0.12, rows) - 1, 39), rng.integers(0, 12, rows)], 1).astype(np.int32)
    codes[::50, 1] = 12  # invalid
    x = np.asarray(book.prototypes(codes)) + 0.2 * rng.normal(size=(rows, 20))
    v, bias = rng.normal(size=(rows, 7)).astype(np.float32), rng.normal(size=rows).astype(np.float32)
    x[3::70] = np.nan
    h = Histories(x.astype(np.float32), v, np.array([0, rows]), codes, bias=bias)
    agents = hisac.vote(book, h, budget=77)
    args = {"histories": h, "agents": agents, "temperature": 0.4, "normalize": normalize, "book": book, "sparse": 5}
    exact = args | {"book": reference.Codebook(book.centers)}
    mine = with_threads(lambda: hisac.route(**args, mean_x=True))
    bound = bounds.route_bound(exact | {"mean_x": True})
    assert np.nanmax(bound.tokens) < 0.02
    testing.assert_tokens_close(mine, reference.route(**exact, mean_x=True), bound)
    d = hisac.Tokens(*(rng.normal(size=a.shape).astype(np.float32) for a in mine))
    need = ("v", "bias", "spread", "prototypes", "temperature")
    back = {"forward": mine, "gradients": d, "need": need}
    gradients = with_threads(lambda: hisac.route_backward(**args, **back))
    testing.assert_gradients_close(gradients, reference.route_backward(**exact, **back), exact | back)


# -------------------------------------------------------------------------------------------------------------- torch


@given(testing.problems(**LONG, dtypes=("float32",)))
def test_torch(p):
    """Operators and autograd have the bits of the core."""
    ht = pytest.importorskip("hisac.torch")
    args, agents = p.route_args(), agents_of(p)
    mine = hisac.route(**args | {"tokens": True})
    tensors = testing.to_torch({name: a for name, a in args.items() if name != "count"})
    v = tensors["histories"].v.requires_grad_()
    tau = torch.as_tensor(np.reshape(np.float32(p.temperature), -1)).requires_grad_()
    tensors |= {"histories": tensors["histories"]._replace(v=v), "temperature": tau}
    for kept in (agents, hisac.agent_lists(p.book, agents, p.sparse)):
        found = ht.route(**tensors | {"agents": testing.to_torch(kept)})
        assert flat(tuple(a if a is None else a.detach().numpy() for a in found)) == flat(mine)
    gradients = p.backward_args(mine)["gradients"]._replace(lse=None, mean_x=None)
    assume(gradients.tokens is not None)
    mine = hisac.route_backward(**args_of_backward(p, mine, gradients))
    got = torch.autograd.grad(found.tokens, (v, tau), torch.as_tensor(gradients.tokens))
    assert flat(tuple(a.numpy() for a in got)) == flat((mine.v, mine.temperature))


def args_of_backward(p, forward, gradients):
    args = p.backward_args(forward) | {"gradients": gradients, "need": ("v", "temperature")}
    return args | {"temperature": np.reshape(np.float32(p.temperature), -1)}


# ------------------------------------------------------------------------------------------------------------- errors

BOOK = hisac.Codebook([np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32)])
ROWS = Histories(np.eye(2, dtype=np.float32), np.ones((2, 1), np.float32), np.array([0, 2]), np.zeros((2, 2), np.int32))
FOUND = hisac.vote(BOOK, ROWS, budget=3)
WRONG_LISTS = FOUND._replace(lists=np.zeros((1, 2, 1), np.int32))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"sparse": 0}, ValueError, "route: sparse expected 1 to 2147483647, got 0"),
        ({"sparse": 1.5}, TypeError, "route: sparse expected a whole number, got 1.5"),
        ({"book": None}, TypeError, "route: book expected beside sparse, got none"),
        ({"histories": ROWS._replace(codes=None)}, TypeError, "route: codes expected"),
        ({"agents": WRONG_LISTS}, ValueError, "route: agents' lists expected [1, 2, 2], got [1, 2, 1]"),
        ({"agents": FOUND._replace(codes=FOUND.codes[:, :2])}, ValueError, "route: agents' codes expected [1, 3, 2]"),
        (
            {"agents": RouteAgents(FOUND.prototypes, FOUND.count)},
            ValueError,
            "route: agents' codes expected [1, 3, 2], got [0, 0, 0]",
        ),
        ({"agents": FOUND._replace(lists=np.zeros((1, 2, 3)))}, TypeError, "route: agents.lists expected int32"),
    ],
)
def test_errors(change, error, text):
    args = {"histories": ROWS, "agents": FOUND, "temperature": 0.1, "book": BOOK, "sparse": 2} | change
    with pytest.raises(error) as caught:
        hisac.route(**args)
    assert str(caught.value).startswith(text), caught.value


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((BOOK, FOUND, 0), ValueError, "agent_lists: k expected 1 to 2147483647, got 0"),
        ((BOOK, FOUND.prototypes, 1), TypeError, "agent_lists: agents expected hisac.Agents, got ndarray"),
        ((None, FOUND, 1), TypeError, "agent_lists: book expected hisac.Codebook, got NoneType"),
        ((BOOK, FOUND._replace(fingerprint=7), 1), ValueError, "agent_lists: agents expected of codebook "),
        ((BOOK, FOUND._replace(count=FOUND.count[:0]), 1), ValueError, "agent_lists: count expected [1], got [0]"),
    ],
)
def test_errors_of_lists(args, error, text):
    with pytest.raises(error) as caught:
        hisac.agent_lists(*args)
    assert str(caught.value).startswith(text), caught.value
