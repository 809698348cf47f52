# SPDX-License-Identifier: Apache-2.0
"""Agents as the second argument of `route`: bit for bit the same as their prototypes and count."""

import copy
import importlib
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hisac
from hisac import Agents, Codebook, Histories, Tokens, reference, testing
from support import flat, kinds, said, with_threads

try:
    import torch
except ImportError:
    torch = None

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the reference, on hostile values
PROBLEMS = st.booleans().flatmap(lambda hostile: testing.problems(hostile=hostile, gathered=True))


def routed(p):
    """The agents that a problem's codes vote for, and the other arguments of `route`."""
    rest = {name: a for name, a in p.route_args().items() if name not in ("agents", "count")}
    return hisac.vote(**p.vote_args()), rest | {"temperature": p.compress_args()["temperature"]}


def bare(agents):
    return {"agents": agents.prototypes, "count": agents.count}


# ---------------------------------------------------------------------------------------------------------------- vote


@given(PROBLEMS)
def test_vote_has_the_prototypes_of_its_codes(p):
    for convert, _ in kinds(p):
        args = convert(p.vote_args())
        agents = with_threads(lambda: hisac.vote(**args))  # noqa: B023
        assert flat(agents.prototypes) == flat(p.book.prototypes(agents))
        assert flat(agents.prototypes) == flat(p.book.prototypes(agents._replace(prototypes=None)))


@given(PROBLEMS)
def test_prototypes_are_those_of_the_definition(p):
    agents, expected = hisac.vote(**p.vote_args()), reference.vote(**p.by_reference(p.vote_args()))
    assert flat(agents.prototypes) == flat(expected.prototypes) and agents.prototypes.dtype == np.float32


@given(PROBLEMS)
def test_absent_agents_have_prototypes_of_zeros(p):
    for found in (hisac.vote(**p.vote_args()), reference.vote(**p.by_reference(p.vote_args()))):
        absent = np.arange(found.codes.shape[1]) >= found.count[:, None]
        assert (absent == (found.codes[..., 0] < 0)).all()
        assert not any(flat(found.prototypes[absent])[0])  # no negative zero either


# --------------------------------------------------------------------------------------------------------------- route


@given(PROBLEMS)
def test_agents_are_their_prototypes_and_count(p):
    agents, rest = routed(p)
    for convert, _ in kinds(p):
        whole, parts = convert({"agents": agents, **rest}), convert({**bare(agents), **rest})
        assert flat(hisac.route(**whole)) == flat(hisac.route(**parts))
    exact = p.by_reference(rest)
    assert flat(reference.route(agents=agents, **exact)) == flat(reference.route(**bare(agents), **exact))


@given(PROBLEMS)
def test_and_in_the_backward(p):
    agents, rest = routed(p)
    args = p.backward_args(hisac.route(agents=agents, **rest)) | {"temperature": rest["temperature"]}
    whole = {name: a for name, a in args.items() if name != "count"} | {"agents": agents}
    parts = args | bare(agents)
    for convert, _ in kinds(p):
        assert flat(hisac.route_backward(**convert(whole))) == flat(hisac.route_backward(**convert(parts)))
    whole, parts = p.by_reference(whole), p.by_reference(parts)
    assert flat(reference.route_backward(**whole)) == flat(reference.route_backward(**parts))


@given(testing.problems(gathered=True))
def test_bounds_take_agents(p):
    agents, rest = routed(p)
    mine, exact = hisac.route(agents=agents, **rest), p.by_reference({"agents": agents, **rest})
    testing.assert_tokens_close(mine, reference.route(**exact), reference.bounds.route_bound(exact, p.dtype))
    back = p.backward_args(mine) | {"temperature": rest["temperature"], "count": None, "agents": agents}
    exact = p.by_reference(back)
    testing.assert_gradients_close(hisac.route_backward(**back), reference.route_backward(**exact), exact)


@given(testing.problems(gathered=True))
def test_kept_agents_need_no_prototypes_beside_their_book(p):
    agents, rest = routed(p)
    kept, rest = agents._replace(prototypes=None), rest | {"book": p.book}
    for convert, _ in kinds(p):
        whole, parts = convert({"agents": kept, **rest}), convert({**bare(agents), **rest})
        assert flat(hisac.route(**whole)) == flat(hisac.route(**parts))
    whole, parts = p.by_reference({"agents": kept, **rest}), p.by_reference({**bare(agents), **rest})
    assert flat(reference.route(**whole)) == flat(reference.route(**parts))


# ---------------------------------------------------------------------------------------------------------- kept agents

RNG = np.random.default_rng(5)
X, V = (RNG.normal(size=(12, width)).astype(np.float32) for width in (6, 3))
BOOK, OTHER = Codebook([X[:3].copy(), X[3:6].copy()]), Codebook([X[6:9].copy(), X[3:6].copy()])
HISTORIES = Histories(X, V, np.array([0, 5, 12]), BOOK.encode(X))
AGENTS = hisac.vote(BOOK, HISTORIES, budget=4)
TOKENS = hisac.route(HISTORIES, AGENTS, temperature=0.1)


@pytest.mark.parametrize("way", [lambda a: pickle.loads(pickle.dumps(a)), copy.copy, copy.deepcopy])
def test_a_copy_is_taken_as_the_agents(way):
    found = way(AGENTS)
    assert type(found) is Agents and flat(found) == flat(AGENTS) and found.fingerprint == BOOK.fingerprint
    assert flat(hisac.route(HISTORIES, found, book=BOOK, temperature=0.1)) == flat(
        hisac.route(HISTORIES, AGENTS, book=BOOK, temperature=0.1)
    )


def test_a_fingerprint_may_be_a_numpy_number():
    """As a file of arrays keeps it."""
    kept = AGENTS._replace(fingerprint=np.uint64(AGENTS.fingerprint), prototypes=None)
    assert flat(hisac.route(HISTORIES, kept, book=BOOK, temperature=0.1)) == flat(
        hisac.route(HISTORIES, AGENTS, book=BOOK, temperature=0.1)
    )


def test_agents_of_four_fields_have_no_prototypes():
    assert Agents(*AGENTS[:4]).prototypes is None


# ------------------------------------------------------------------------------------------------------------- refusals

NO_COUNT = "count expected None beside Agents, which have their own"
WITHOUT = "agents expected with prototypes, or with the book that makes them"
FOREIGN = f"agents expected of codebook {OTHER.fingerprint:016x}, got {BOOK.fingerprint:016x}"
REFUSED = [
    ({"agents": AGENTS, "count": AGENTS.count}, TypeError, NO_COUNT),
    ({"agents": AGENTS, "book": OTHER}, ValueError, FOREIGN),
    ({"agents": AGENTS._replace(prototypes=None), "book": OTHER}, ValueError, FOREIGN),
    ({"agents": AGENTS._replace(prototypes=None)}, TypeError, WITHOUT),
]


def faces():
    """The modules with a `route`."""
    yield hisac, lambda args: args
    yield reference, lambda args: {k: reference.Codebook(a.centers) if k == "book" else a for k, a in args.items()}
    if torch is not None:
        yield importlib.import_module("hisac.torch"), testing.to_torch


@pytest.mark.parametrize(("given_", "kind", "text"), REFUSED)
def test_refusals(given_, kind, text):
    for module, convert in faces():
        args = convert({"histories": HISTORIES, **given_})
        said(lambda: module.route(**args), kind, f"route: {text}")  # noqa: B023
    for module, convert in list(faces())[:2]:
        args = convert({"histories": HISTORIES, **given_, "forward": TOKENS, "gradients": Tokens(TOKENS.tokens, None)})
        said(lambda: module.route_backward(**args), kind, f"route_backward: {text}")  # noqa: B023


@pytest.mark.parametrize("agents", [AGENTS, AGENTS._replace(prototypes=None)])
def test_compress_refuses_agents_of_another_codebook(agents):
    for module, convert in faces():
        args = convert({"book": OTHER, "histories": HISTORIES, "agents": agents, "temperature": 0.1})
        said(lambda: module.compress(**args), ValueError, f"compress: {FOREIGN}")  # noqa: B023


def test_prototypes_of_agents_are_checked_as_bare_ones():
    narrow = AGENTS._replace(prototypes=AGENTS.prototypes[..., :5])
    text = "route: prototypes is [2, 4, 5], x is [12, 6]: D differs (5, 6)"
    said(lambda: hisac.route(HISTORIES, narrow, temperature=0.1), ValueError, text)
    fewer = AGENTS._replace(count=AGENTS.count[:1])
    said(lambda: hisac.route(HISTORIES, fewer, temperature=0.1), ValueError, "route: count expected [2], got [1]")
