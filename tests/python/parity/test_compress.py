# SPDX-License-Identifier: Apache-2.0
"""`compress`: bit for bit the verbs that it is composed of, and what its options mean."""

import numpy as np
import pytest
from hypothesis import given

import hisac
from hisac import Histories, reference, testing
from hisac.reference import bounds
from support import flat, kinds, with_threads

try:
    import torch
except ImportError:
    torch = None

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the reference, on hostile values


def log_of(votes):
    return np.log(votes.astype(np.float32))


def shares(z):
    """z - log sum exp z; -inf without a number above -inf."""
    z = z - np.nan_to_num(z.max(1, keepdims=True), neginf=0.0)
    return z - np.log(np.maximum(np.exp(z).sum(1, keepdims=True), np.float32(1e-30)))


def by_hand(
    book, histories, *, budget, fanout, beam, temperature, normalize, method, refine, missing, sparse, precision, mean_x
):
    """The same by the verbs, in NumPy."""
    agents = hisac.vote(book, histories, budget=budget, fanout=fanout, beam=beam)
    p, rows, route_book = book.prototypes(agents), histories, book
    if method == "leaf":
        rows, route_book = hisac.leaf_sums(book, histories), None if sparse is None else book
    options = {"normalize": normalize, "book": route_book, "sparse": sparse, "precision": precision}
    given = agents if sparse is None else hisac.agent_lists(book, agents, sparse)  # those of the first prototypes
    for _ in range(refine):
        found = hisac.route(rows, given._replace(prototypes=p), temperature=temperature, mean_x=True, **options)
        p = np.where(np.isneginf(found.lse)[..., None], p, found.mean_x)
    to = given._replace(prototypes=p)
    tokens, lse, mean = hisac.route(rows, to, temperature=temperature, mean_x=mean_x, **options)
    tokens = tokens.astype(histories.v.dtype)
    if missing == "token":
        gone = hisac.missing(histories, book=book)
        only = Histories(gone[:, None], histories.v, histories.offsets, v_ids=histories.v_ids)
        last = hisac.route(only, np.zeros((len(p), 1, 1), np.float32), temperature=0.1)
    share = shares(lse) if normalize == "agents" else shares(np.where(np.isneginf(lse), lse, log_of(agents.votes)))
    if missing == "token":
        if normalize == "agents":
            share = shares(np.concatenate([lse, last.lse], 1))
        else:
            options |= {"normalize": "agents", "sparse": None}
            whole = hisac.route(rows, np.zeros_like(p[:, :1]), temperature=1.0, **options).lse
            whole[np.isneginf(share).all(1)] = -np.inf
            parts = shares(np.concatenate([whole, last.lse], 1))
            share = np.concatenate([share + parts[:, :1], parts[:, 1:]], 1)
        tokens, lse = np.concatenate([tokens, last.tokens], 1), np.concatenate([lse, last.lse], 1)
        mean = np.concatenate([mean, np.zeros_like(mean[:, :1])], 1) if mean_x else None
    lists = given.lists if refine else None
    return hisac.Compressed(tokens, lse, share, agents._replace(prototypes=p, lists=lists), mean)


def assert_composed(mine, expected):
    """The same bits, but for log_share: the core's exp and log are others than NumPy's."""
    np.testing.assert_allclose(mine.log_share, expected.log_share, rtol=1e-5, atol=1e-5)
    assert flat(mine._replace(log_share=None)) == flat(expected._replace(log_share=None))


SPARSE = testing.problems(gathered=True, sparse=True, max_users=3, max_history=150, max_agents=20, max_codes=4)


@given(testing.problems(gathered=True) | SPARSE)
def test_compress_is_composed_of_verbs(p):
    args = p.compress_args()
    mine = with_threads(lambda: hisac.compress(**args))
    assert_composed(mine, by_hand(**args))
    if torch is not None:
        tensors = testing.to_torch(args)
        for module in (hisac, pytest.importorskip("hisac.torch")):
            found = module.compress(**tensors)
            found = found._replace(tokens=found.tokens.to(getattr(torch, str(mine.tokens.dtype))))
            if module is not hisac and p.dtype == "float32":  # torch's exp and log are others than the core's
                np.testing.assert_allclose(found.log_share, mine.log_share, rtol=1e-5, atol=1e-5)
                found = found._replace(log_share=torch.from_numpy(mine.log_share))
            assert p.dtype != "float32" or flat(found) == flat(mine)


@given(testing.problems(hostile=True, gathered=True))
def test_compress_hostile(p):
    args = p.compress_args()
    with np.errstate(over="ignore"):  # by hand masses are float32
        assert_composed(hisac.compress(**args), by_hand(**args))


@given(testing.problems())
def test_compress_meets_the_definition(p):
    """Without rounds of refinement, which have no bound of their own, and with exact distances."""
    args = p.compress_args() | {"refine": 0, "method": "exact"}
    exact = p.by_reference(args)
    expected = reference.compress(**exact)
    routed = {name: exact[name] for name in ("histories", "temperature", "normalize", "book", "precision")}
    routed["agents"] = expected.agents
    m = expected.agents.prototypes.shape[1]
    for convert, dtype in kinds(p):
        mine = hisac.compress(**convert(args))
        testing.assert_agents_equal(mine.agents, expected.agents)
        limit = bounds.route_bound(routed, dtype)
        for name in ("tokens", "lse"):
            got, want = (bounds.as_numpy(getattr(found, name))[:, :m] for found in (mine, expected))
            testing.assert_close(got, want, getattr(limit, name), name)


@given(testing.problems(dtypes=("float32",)))
def test_agents_may_be_those_of_an_earlier_call(p):
    """Their prototypes are used as they are, refined or not. Those that kept none are the agents of their codes."""
    args = p.compress_args()
    first, rule = hisac.compress(**args), {"budget": None, "fanout": None, "beam": None}
    for kept, rounds in ((first.agents, 0), (first.agents._replace(prototypes=None), args["refine"])):
        assert flat(hisac.compress(**args | rule | {"agents": kept, "refine": rounds})) == flat(first)


@pytest.mark.parametrize("module", [hisac, reference])
def test_refined_prototypes_are_kept(module):
    """Two rounds and two more are four. Without their prototypes agents begin again."""
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    book = hisac.Codebook([x[:4].copy(), x[4:8].copy()])
    book = book if module is hisac else reference.Codebook(book.centers)
    h = Histories(x, x[:, :2].copy(), np.array([0, 20, 60]))
    two, four = (module.compress(book, h, budget=5, temperature=2.0, refine=n) for n in (2, 4))
    assert not np.array_equal(two.agents.prototypes, book.prototypes(two.agents))
    assert not np.array_equal(two.agents.prototypes, four.agents.prototypes)
    more = module.compress(book, h, agents=two.agents, temperature=2.0, refine=2)
    assert flat(more) == flat(four)
    forgotten = module.compress(book, h, agents=two.agents._replace(prototypes=None), temperature=2.0, refine=2)
    assert flat(forgotten) == flat(two)
    routed = module.route(h._replace(codes=module.encode(book, x)), two.agents, temperature=2.0, book=book)
    assert flat(routed[:2]) == flat(two[:2])


def test_the_token_of_missing_rows():
    book = hisac.Codebook([np.float32([[0], [1]])])
    x = np.float32([[0], [np.nan], [np.inf], [1], [2.0**50]])
    v = np.float32([[1], [2], [4], [8], [np.nan]])
    h = Histories(x, v, np.array([0, 4, 5, 5]), np.zeros((5, 1), np.int32), bias=np.float32([0, 0, 0, np.nan, 0]))
    for module, codebook in ((hisac, book), (reference, reference.Codebook(book.centers))):
        for method in ("exact", "leaf"):
            made = module.compress(codebook, h, budget=1, missing="token", method=method, temperature=0.1)
            np.testing.assert_allclose(made.tokens[:, 1], [[(2 + 4 + 8) / 3], [0], [0]])
            np.testing.assert_allclose(made.lse[:, 1], [np.log(3), -np.inf, -np.inf])
            assert made.tokens[0, 0] == 1 and made.tokens.shape == (3, 2, 1)


def test_refinement_finds_the_means():
    x = np.float32([[0, 0], [0.2, 0], [5, 5], [5, 5.2]])
    book = hisac.Codebook([np.float32([[1, 0], [4, 5]])])
    for module, codebook in ((hisac, book), (reference, reference.Codebook(book.centers))):
        h = Histories(x, x, np.array([0, 4, 4]))
        made = module.compress(codebook, h, budget=3, temperature=0.5, refine=60)
        np.testing.assert_allclose(np.sort(made.agents.prototypes[0, :2], 0), [[0.1, 0], [5, 5.1]], atol=1e-5)
        np.testing.assert_allclose(made.tokens[0, :2], made.agents.prototypes[0, :2], atol=1e-5)
        assert not made.agents.prototypes[1].any()  # nobody's prototypes stay


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"budget": 3}, ValueError, "compress: expected either agents or a rule, got both"),
        ({"beam": (2, 2)}, ValueError, "compress: expected either agents or a rule, got both"),
        (
            {"agents": None, "fanout": 3},
            ValueError,
            "vote: fanout expected one number >= 1 for each of 1 levels, got 3",
        ),
        (
            {"agents": None, "beam": 3},
            ValueError,
            "vote: beam expected one number of 1 to 4096 for each of 1 levels, got 3",
        ),
        (
            {"x": np.ones((3, 7), np.float32)},
            ValueError,
            "compress: x is [3, 7], the codebook has D = 2: D differs (7, 2)",
        ),
    ],
)
def test_compress_names_what_its_caller_gave(change, kind, text):
    """Errors spoke of prototypes, of which the caller has none, and a rule beside agents was ignored."""
    book, v = hisac.Codebook([np.eye(2, dtype=np.float32)], temperature=1.0), np.ones((3, 2), np.float32)
    h = Histories(v, v, [0, 3], np.zeros((3, 1), np.int32))
    args = {"agents": hisac.vote(book, h, budget=2), **change}
    h = h._replace(x=args.pop("x", v))
    with pytest.raises(kind) as error:
        hisac.compress(book, h, **args)
    assert str(error.value) == text
