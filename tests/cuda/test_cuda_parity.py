# SPDX-License-Identifier: Apache-2.0
"""Every verb of CUDA against `hisac.reference`, as tests/python/parity has it for the CPU: integers exactly, floats
within `hisac.reference.bounds`, any option and hostile values; on a GPU, or over the emulated kernels
(cuda_places.py)."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hisac
from hisac import reference, testing
from hisac.reference import bounds

pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the reference, on hostile values
PLACED = settings(suppress_health_check=list(HealthCheck))  # the place is one for all examples
HOSTILE = st.booleans()
PROBLEMS = HOSTILE.flatmap(lambda hostile: testing.problems(hostile=hostile, gathered=True))
LONG = {"sparse": True, "gathered": True, "max_users": 3, "max_history": 150, "max_agents": 40, "max_codes": 4}
SPARSE = HOSTILE.flatmap(lambda hostile: testing.problems(hostile=hostile, **LONG))


@PLACED
@given(p=PROBLEMS)
def test_encode_and_vote(p, on_cuda):
    args = p.encode_args()
    book = args.pop("book")
    mine = on_cuda(book.encode, **testing.to_torch(args, p.dtype))
    testing.assert_codes_equal(mine, reference.encode(**p.by_reference(p.encode_args())))
    args = p.vote_args()
    agents = on_cuda(hisac.vote, **testing.to_torch(args, p.dtype))
    testing.assert_agents_equal(agents, reference.vote(**p.by_reference(args)))
    mine = on_cuda(book.prototypes, agents)
    np.testing.assert_array_equal(bounds.as_numpy(mine), book.prototypes(hisac.vote(**args)))


@PLACED
@given(p=PROBLEMS)
def test_route(p, on_cuda):
    args = p.route_args()
    mine = on_cuda(hisac.route, **testing.to_torch(args, p.dtype))
    limit = bounds.route_bound(p.by_reference(args), p.dtype, cuda=True)
    testing.assert_tokens_close(mine, p.reference(), limit)


@PLACED
@given(p=PROBLEMS)
def test_route_backward(p, on_cuda):
    args = p.backward_args(hisac.route(**testing.to_torch(p.route_args(), p.dtype)))
    mine = on_cuda(hisac.route_backward, **testing.to_torch(args, p.dtype))
    exact = p.by_reference(args)
    testing.assert_gradients_close(mine, reference.route_backward(**exact), exact, cuda=True)


def agents_of(p):
    """A problem's agents with codes, those of `encode`."""
    users, m, width = p.prototypes.shape
    codes = hisac.encode(p.book, p.prototypes.reshape(users * m, width)).reshape(users, m, p.book.levels)
    count = np.full(users, m, np.int32) if p.count is None else p.count
    return hisac.Agents(codes, np.ones((users, m), np.int64), count, p.book.fingerprint, p.prototypes)


@PLACED
@given(p=SPARSE, k=st.integers(1, 45))
def test_agent_lists(p, k, on_cuda):
    agents = agents_of(p)
    expected = reference.agent_lists(**p.by_reference({"book": p.book}), agents=agents, k=k).lists
    mine = on_cuda(hisac.agent_lists, p.book, testing.to_torch({"agents": agents})["agents"], k).lists
    np.testing.assert_array_equal(bounds.as_numpy(mine), expected)


@pytest.mark.parametrize("shift", [0.0, 1e3, 1e15])
def test_agent_lists_of_near_ties(shift, on_cuda):
    """Distances that float32 cannot tell apart, and equal ones."""
    rng = np.random.default_rng(3)
    centers = (shift + rng.normal(size=(9, 5))).astype(np.float32)
    p = np.float32(shift) + rng.normal(size=(1, 1, 5)) + 1e-7 * rng.integers(-2, 3, (2, 80, 5))
    book, count = hisac.Codebook([centers]), np.array([80, 41], np.int32)
    agents = hisac.Agents(np.zeros((2, 80, 1), np.int32), None, count, book.fingerprint, p.astype(np.float32))
    for k in (1, 7, 40, 80):
        expected = reference.agent_lists(reference.Codebook([centers]), agents, k).lists
        mine = on_cuda(hisac.agent_lists, book, agents, k).lists
        np.testing.assert_array_equal(bounds.as_numpy(mine), expected)


def lists_of(p, seed):
    """Arguments of `route` with lists and codes of agents that no verb made; or with neither, which are made then."""
    args, (users, m, _) = p.route_args(), p.prototypes.shape
    if seed % 2:
        return args
    rng = np.random.default_rng(seed)
    lists = rng.integers(-2, m + 2, (users, p.book.sizes[0], min(p.sparse, m) + 2)).astype(np.int32)
    lists = testing.sprinkle(rng, lists, 0.1, np.array([-(2**31), 2**31 - 1]))
    codes = rng.integers(-1, p.book.sizes[0] + 1, (users, m, p.book.levels)).astype(np.int32)
    return args | {"agents": hisac.RouteAgents(p.prototypes, p.count, codes, lists), "count": None}


@PLACED
@given(p=SPARSE, seed=st.integers(0, 2**32 - 1))
def test_sparse_route(p, seed, on_cuda):
    args = lists_of(p, seed)
    mine, exact = on_cuda(hisac.route, **testing.to_torch(args, p.dtype)), p.by_reference(args)
    testing.assert_tokens_close(mine, reference.route(**exact), bounds.route_bound(exact, p.dtype, cuda=True))


@PLACED
@given(p=SPARSE, seed=st.integers(0, 2**32 - 1))
def test_sparse_route_backward(p, seed, on_cuda):
    args = lists_of(p, seed)
    back = p.backward_args(hisac.route(**testing.to_torch(args, p.dtype))) | {
        name: args[name] for name in ("agents", "count")
    }
    mine = on_cuda(hisac.route_backward, **testing.to_torch(back, p.dtype))
    exact = p.by_reference(back)
    testing.assert_gradients_close(mine, reference.route_backward(**exact), exact, cuda=True)


@PLACED
@given(p=PROBLEMS)
def test_leaf_sums(p, on_cuda):
    args = p.leaf_args()
    mine = on_cuda(hisac.leaf_sums, **testing.to_torch(args, p.dtype))
    exact = p.by_reference(args)
    testing.assert_leaf_sums_close(mine, reference.leaf_sums(**exact), bounds.leaf_sums_bound(exact, cuda=True))


@PLACED
@given(p=PROBLEMS)
def test_leaf_sums_backward(p, on_cuda):
    args = p.leaf_backward_args(hisac.leaf_sums(**testing.to_torch(p.leaf_args(), p.dtype)))
    mine = on_cuda(hisac.leaf_sums_backward, **testing.to_torch(args, p.dtype))
    exact = p.by_reference(args)
    testing.assert_gradients_close(mine, reference.leaf_sums_backward(**exact), exact)


@PLACED
@given(p=PROBLEMS)
def test_missing(p, on_cuda):
    options = {"book": p.book} if p.routed_codes or p.histories.x is None else {}
    mine = on_cuda(hisac.missing, **testing.to_torch({"histories": p.histories}, p.dtype), **options)
    expected = reference.missing(p.histories, **p.by_reference(options))
    np.testing.assert_array_equal(bounds.as_numpy(mine), expected)


@PLACED
@given(p=PROBLEMS, without_v=st.booleans())
def test_mean_x_alone(p, without_v, on_cuda):
    args = p.route_args() | {"tokens": False, "mean_x": True}
    if without_v:
        args["histories"] = p.histories._replace(v=None, v_ids=None)
    mine = on_cuda(hisac.route, **testing.to_torch(args, p.dtype))
    exact = p.by_reference(args)
    testing.assert_tokens_close(mine, reference.route(**exact), bounds.route_bound(exact, p.dtype, cuda=True))


@PLACED
@given(a=HOSTILE.flatmap(lambda hostile: testing.attentions(hostile=hostile)))
def test_attend_and_its_backward(a, on_cuda):
    args = a.attend_args()
    mine = on_cuda(hisac.attend, **testing.to_torch(args, a.dtype))
    testing.assert_attended_close(mine, a.reference(), bounds.attend_bound(args, a.dtype, cuda=True))
    back = a.backward_args(hisac.attend(**testing.to_torch(args, a.dtype)))
    mine = on_cuda(hisac.attend_backward, **testing.to_torch(back, a.dtype))
    testing.assert_gradients_close(mine, reference.attend_backward(**back), back, cuda=True)


@PLACED
@given(
    p=HOSTILE.flatmap(lambda hostile: testing.matchings(hostile=hostile))
    | testing.matchings(max_levels=8, max_sums=200, max_candidates=40)
)
def test_match_and_its_backward(p, on_cuda):
    args = p.match_args()
    mine, expected = on_cuda(hisac.match, **testing.to_torch(args, p.dtype)), p.reference()
    testing.assert_match_close(mine, expected, p)
    assert np.array_equal(bounds.as_numpy(mine.lse) == -np.inf, expected.lse == -np.inf)
    back = p.backward_args(expected)
    gradients = on_cuda(hisac.match_backward, **testing.to_torch(back, p.dtype))
    exact = p.by_reference(back)
    testing.assert_gradients_close(gradients, reference.match_backward(**exact), exact)


def test_subnormal_values_at_a_tiny_temperature(on_cuda):
    """No bfloat16 holds v; divided by tau^2 what is lost of it is not small."""
    v, spread, bias = np.float32([[4e-44], [3e-44]]), np.float32([8.8e-44, 2e-44]), np.float32([-1.5, 0])
    histories = hisac.Histories(np.zeros((2, 1), np.float32), v, np.array([0, 2]), bias=bias, spread=spread)
    args = {"histories": histories, "temperature": 1e-30, "precision": "bfloat16"}
    args["agents"] = np.full((1, 1, 1), -6e-45, np.float32)
    given_ = hisac.Tokens(np.ones((1, 1, 1), np.float32), None)
    back = {"forward": hisac.route(**args), "gradients": given_, **args}
    mine = on_cuda(hisac.route_backward, **back)
    testing.assert_gradients_close(mine, reference.route_backward(**back), back, cuda=True)
