# SPDX-License-Identifier: Apache-2.0
"""Laws of the definition, second part: route and attend of `hisac.reference`, and their gradients."""

import inspect
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hisac import Histories, RouteAgents, Tokens, reference, testing
from support import by_field, grouped

problem = testing.problems(max_history=24)
route = by_field(reference.route)


def args_of(p, **changes):
    """The arguments of `route`, with changes of them or of fields of the histories."""
    return changed(p.by_reference(p.route_args()), changes)


def changed(args, changes):
    fields = {name: a for name, a in changes.items() if name in Histories._fields}
    rest = {name: a for name, a in changes.items() if name not in fields}
    return args | rest | {"histories": args["histories"]._replace(**fields)}


def same(a, b, rtol=1e-9):
    for x, y in zip(a, b, strict=True):
        if x is not None:
            np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-9)


def users_of(offsets):
    return [np.arange(r.start, r.stop) for r in reference.ranges(offsets)]


# ------------------------------------------------------------------------------------------------------------- route


@given(testing.problems(max_history=24, hostile=True))
def test_weights_sum_to_one_or_zero(p):
    """For any finite values, however large the logits: tokens of v = 1 are 1, or 0 where lse is -inf."""
    out = reference.route(**args_of(p, v=np.ones((len(p.histories.v), 1))))
    np.testing.assert_allclose(out.tokens[..., 0], np.where(np.isneginf(out.lse), 0.0, 1.0), rtol=1e-9)
    assert not np.isnan(out.lse).any()


@given(testing.problems(max_history=24, hostile=True))
def test_tokens_lie_in_the_hull_of_the_present_rows(p):
    args = args_of(p, v=np.random.default_rng(p.seed).normal(size=p.histories.v.shape))
    out = reference.route(**args)
    for b, _, h in reference.each_history(*history_args(args)):
        for a in h.agents if len(h.v) else ():
            assert (h.v.min(0) - 1e-9 <= out.tokens[b, a]).all() and (out.tokens[b, a] <= h.v.max(0) + 1e-9).all()
        rest = np.setdiff1d(np.arange(out.lse.shape[1]), h.agents) if len(h.v) else slice(None)
        assert not out.tokens[b, rest].any() and np.isneginf(out.lse[b, rest]).all()


def history_args(args):
    """The arguments of `reference.each_history` from those of `route`."""
    args = args | {"to": RouteAgents(args["agents"], args.get("count"))}
    return [args.get(name) for name in inspect.signature(reference.each_history).parameters]


@given(problem, st.sampled_from(["codes", "x", "bias", "spread"]), st.integers(0, 2**32 - 1))
def test_absent_rows_change_nothing(p, how, seed):
    h = p.histories
    assume(h.x is not None and not isinstance(h.offsets, tuple) and (how != "codes" or p.routed_codes))
    rng = np.random.default_rng(seed)
    at = np.sort(rng.integers(h.offsets[0], h.offsets[-1] + 1, 5))
    zero = np.zeros(len(h.v), np.float32)
    h = h._replace(**{name: zero for name in ("bias", "spread") if getattr(h, name) is None})
    args = args_of(p) | {"histories": h}
    junk = {
        "x": np.full((5, h.x.shape[1]), np.nan if how == "x" else 0.0),
        "v": np.full((5, h.v.shape[1]), np.nan),
        "codes": np.full((5, h.codes.shape[1]), -1 if how == "codes" else 0),
        "bias": np.full(5, -np.inf if how == "bias" else 0.0),
        "spread": np.full(5, -1 if how == "spread" else 0.0),
    }
    padded = {name: np.insert(getattr(h, name), at, junk[name], 0) for name in junk}
    offsets = h.offsets + np.searchsorted(at, h.offsets, "left")
    offsets[-1] = h.offsets[-1] + 5
    same(reference.route(**args), reference.route(**changed(args, padded | {"offsets": offsets})))


@given(problem)
def test_absent_agents_take_no_share(p):
    args = args_of(p)
    m, b = p.prototypes.shape[1], p.prototypes.shape[0]
    count = np.full(b, m) if p.count is None else p.count
    junk = np.concatenate([p.prototypes, np.full((b, 2, p.prototypes.shape[2]), np.nan)], 1)
    tau = np.broadcast_to(p.temperature, m)
    wide = reference.route(**args | {"agents": junk, "count": count, "temperature": np.append(tau, [1.0, 1.0])})
    for a, c in zip(reference.route(**args)[:2], wide[:2], strict=True):
        np.testing.assert_array_equal(a, c[:, :m])
        assert not np.isfinite(c[:, m:]).any() or not c[:, m:].any()
    agents_of_bad_tau = reference.route(**args | {"temperature": np.where(np.arange(m) == 0, np.nan, tau)})
    assert np.isneginf(agents_of_bad_tau.lse[:, 0]).all() and not agents_of_bad_tau.tokens[:, 0].any()


@given(problem, st.integers(0, 24))
def test_parts_of_a_history_merge(p, cut):
    """token = sum over parts of exp(lse_part - lse) token_part; so tiles, machines and updates may be merged."""
    args = args_of(p)
    whole = reference.route(**args)
    starts, ends = (
        np.array([[r.start, max(r.start, r.stop)] for r in reference.ranges(p.histories.offsets)]).reshape(-1, 2).T
    )
    middle = np.minimum(starts + cut, ends)
    parts = [reference.route(**changed(args, {"offsets": pair})) for pair in ((starts, middle), (middle, ends))]
    lse = np.logaddexp(parts[0].lse, parts[1].lse)
    np.testing.assert_allclose(whole.lse, lse, rtol=1e-9, atol=1e-9)
    shares = [np.exp(part.lse - np.where(np.isfinite(lse), lse, 0))[..., None] for part in parts]
    np.testing.assert_allclose(
        whole.tokens, shares[0] * parts[0].tokens + shares[1] * parts[1].tokens, rtol=1e-9, atol=1e-9
    )


@given(problem)
def test_users_do_not_meet(p):
    """A batch is its users one by one; ragged, overlapping or empty."""
    args, out = args_of(p), reference.route(**args_of(p))
    for b, rows in enumerate(users_of(p.histories.offsets)):
        fields = ((name, getattr(p.histories, name)) for name in ("x", "v", "codes", "bias", "spread"))
        one = {name: None if a is None else a[rows] for name, a in fields}
        one |= {"agents": p.prototypes[b : b + 1], "count": None if p.count is None else p.count[b : b + 1]}
        alone = reference.route(**changed(args, one | {"offsets": np.array([0, len(rows)])}))
        for a, c in zip(out, alone, strict=True):
            assert a is None or np.array_equal(a[b], c[0], equal_nan=True)


@given(problem, st.data())
def test_one_users_nan_spoils_nobody_else(p, data):
    users, v = users_of(p.histories.offsets), p.histories.v.copy()
    assume(any(map(len, users)))
    row = data.draw(st.sampled_from(sorted(set().union(*users))))
    spoilt = [b for b, rows in enumerate(users) if row in rows]
    v[row] = np.nan
    clean, spoiled = reference.route(**args_of(p)), reference.route(**args_of(p, v=v))
    for a, c in zip(clean[:2], spoiled[:2], strict=True):
        np.testing.assert_array_equal(np.delete(a, spoilt, 0), np.delete(c, spoilt, 0))


@given(problem)
def test_agents_mode_conserves_mass(p):
    """Each present row gives exp(bias) to the agents together: sum_a exp(lse_a) = sum_i exp(bias_i)."""
    args = args_of(p, normalize="agents")
    out = reference.route(**args)
    for b, _, h in reference.each_history(*history_args(args)):
        if len(h.agents) and len(h.x):
            np.testing.assert_allclose(reference.logsumexp(out.lse[b], 0), reference.logsumexp(h.bias, 0), atol=1e-9)


@given(problem)
def test_limits_of_temperature(p):
    """tau -> 0: the nearest row; tau -> infinity: the mean weighted by exp(bias), in both modes."""
    args = args_of(p, normalize="history")
    cold, hot = (reference.route(**args | {"temperature": tau}) for tau in (1e-9, 1e12))
    fair = reference.route(**args | {"temperature": 1e12, "normalize": "agents"})
    for b, _, h in reference.each_history(*history_args(args)):
        if len(h.x):
            d = reference.verbs.square_distances(h.x, h.p) + h.spread[:, None]
            nearest, second = (np.sort(d, 0)[i] if len(d) > i else np.full(d.shape[1], np.inf) for i in (0, 1))
            clear = second - nearest > 1e-6
            np.testing.assert_allclose(cold.tokens[b, h.agents][clear], h.v[d.argmin(0)][clear], atol=1e-9)
            w = np.exp(h.bias - reference.logsumexp(h.bias, 0))
            for out in (hot, fair):
                np.testing.assert_allclose(
                    out.tokens[b, h.agents], np.tile(w @ h.v, (len(h.agents), 1)), rtol=1e-6, atol=1e-6
                )


@pytest.mark.parametrize("normalize", ["history", "agents"])
def test_a_changed_bias_changes_tokens(normalize):
    x, p = np.float32([[0, 0], [1, 0], [0, 1]]), np.float32([[[0, 0], [1, 1]]])
    options = {"x": x, "v": x, "offsets": np.array([0, 3]), "agents": p, "temperature": 1.0, "normalize": normalize}
    plain = route(**options)
    same(plain, route(**options, bias=np.zeros(3)))
    biased = route(**options, bias=np.array([0.0, 1.0, 0.0]))
    assert (np.abs(biased.tokens - plain.tokens).max(-1) > 1e-3).all() and (biased.lse > plain.lse).all()
    shifted = route(**options, bias=np.full(3, 0.7))
    np.testing.assert_allclose(shifted.tokens, plain.tokens, atol=1e-12)
    np.testing.assert_allclose(shifted.lse, plain.lse + 0.7)


@given(problem)
def test_mean_x_is_the_token_of_x(p):
    assume(p.histories.x is not None)
    out = reference.route(**args_of(p, mean_x=True, v=p.histories.x))
    np.testing.assert_array_equal(out.tokens, out.mean_x)
    alone = reference.route(**args_of(p, mean_x=True, tokens=False, v=None))
    assert alone.tokens is None
    same(alone[1:], out[1:])


# ------------------------------------------------------------------------------------------------------- leaf sums


@given(problem)
def test_leaf_sums_are_exact_when_a_leafs_rows_coincide(p):
    book = p.by_reference(p.vote_args())["book"]
    args = args_of(p, x=None, spread=None, book=book)
    sums = reference.leaf_sums(book, args["histories"])
    same(reference.route(**args), reference.route(**args | {"histories": sums}), 1e-7)


def test_leaf_sums_act_at_their_mean():
    book = reference.Codebook([[[0.0], [9.0]]])
    x, p = np.array([[0.0], [2.0], [9.0]]), np.array([[[1.0]]])
    sums = reference.leaf_sums(book, Histories(x, x, np.array([0, 3]), np.array([[0], [0], [1]])))
    assert sums.x.tolist() == [[1], [9]] and sums.spread.tolist() == [1, 0] and sums.codes.tolist() == [[0], [1]]
    np.testing.assert_allclose(sums.bias, [math.log(2), 0])
    out = reference.route(sums, p, temperature=1.0, normalize="history")
    z = np.array([math.log(2) - (0 + 1), -64.0])  # mean 1, variance 1; one row at 9
    assert math.isclose(out.lse[0, 0], np.logaddexp(*z))
    assert math.isclose(out.tokens[0, 0, 0], np.exp(z - np.logaddexp(*z)) @ [1, 9])


def test_missing_rows():
    """Absent, with a v that is finite. As x of a route, to one prototype of 0, they give their mean and log count."""
    x = np.float32([[0], [np.nan], [np.inf], [1], [2.0**50]])
    v = np.float32([[1], [2], [4], [8], [np.nan]])
    h = Histories(x, v, np.array([0, 4, 5]), bias=np.float32([0, 0, 0, np.nan, 0]))
    found = reference.missing(h)
    assert found.tolist() == [-np.inf, 0, 0, 0, -np.inf]
    token = reference.route(Histories(found[:, None], v, h.offsets), np.zeros((2, 1, 1)), temperature=1.0)
    np.testing.assert_allclose(token.tokens[0, 0], (2 + 4 + 8) / 3)
    assert math.isclose(token.lse[0, 0], math.log(3))
    assert token.tokens[1].tolist() == [[0]] and np.isneginf(token.lse[1]).all()


# --------------------------------------------------------------------------------------------------------- gradients


def slopes(loss, values, step=1e-6):
    """Central differences of loss over every entry of `values` (float64, changed in place and restored)."""
    out = np.zeros(values.shape)
    for at in np.ndindex(values.shape):
        kept = values[at]
        high, low = (loss(values.__setitem__(at, kept + s)) for s in (step, -step))
        values[at] = kept
        out[at] = (high - low) / (2 * step)
    return out


def by_argument(values):
    """Values by the names of gradients, by those of arguments."""
    return {"agents" if name == "prototypes" else name: a for name, a in values.items()}


def pairing(returned, gradients):
    """The sum of what was returned times the gradients of it."""
    pairs = zip(returned, gradients, strict=True)
    return sum((np.where(np.isfinite(a), a, 0) * d).sum() for a, d in pairs if d is not None)


@given(testing.problems(max_users=2, max_history=5, max_width=3, max_agents=3, dtypes=("float32",)))
def test_route_backward_equals_finite_differences(p):
    args = args_of(p)
    tau = np.full(1, p.temperature) if isinstance(p.temperature, float) else p.temperature.astype(np.float64)
    args["temperature"] = tau = np.maximum(tau, 0.5)
    h = p.histories
    zero = np.zeros(len(h.v))
    free = {"v": h.v, "temperature": tau, "bias": zero if h.bias is None else h.bias, "prototypes": p.prototypes}
    free["spread"] = zero + 1 if h.spread is None else h.spread
    free |= {} if h.x is None else {"x": h.x}
    free = {
        name: a.astype(np.float64) / (10 if name == "x" and np.abs(a).max(initial=0) > 10 else 1)
        for name, a in free.items()
    }
    args = changed(args, by_argument(free))
    forward = reference.route(**args)
    back = p.backward_args(forward)
    given = {name: a for name, a in args.items() if name != "mean_x"} | {n: back[n] for n in ("gradients", "need")}
    mine = reference.route_backward(forward=forward, **given)
    for name in set(back["need"]) & set(free):
        values = free[name]
        inside = np.isfinite(values) & ((name != "spread") | (values > 1e-5))  # on either side present
        with np.errstate(invalid="ignore"):
            expected = slopes(lambda _: pairing(reference.route(**args), back["gradients"]), values)
        got = getattr(mine, name)
        np.testing.assert_allclose(got[inside], expected[inside], rtol=1e-4, atol=1e-4, err_msg=name)
    assert all(getattr(mine, name) is None for name in set(mine._fields) - set(back["need"]))


@pytest.mark.parametrize("normalize", ["history", "agents"])
@pytest.mark.parametrize("tau", [np.array([0.7]), np.array([0.7, 0.4, 2.0])])
@pytest.mark.parametrize("of_mean", [False, True])
def test_every_gradient_of_route_matters(normalize, tau, of_mean):
    """Three rows and agents close enough together that no gradient is near zero."""
    rng = np.random.default_rng(0)
    x, v, p, bias = (rng.normal(size=s) for s in ((3, 2), (3, 2), (1, 3, 2), 3))
    gradients = Tokens(*(rng.normal(size=s) for s in ((1, 3, 2), (1, 3), (1, 3, 2))))
    gradients = gradients if of_mean else gradients._replace(mean_x=None)
    free = {"x": x / 2, "v": v, "prototypes": p / 2, "bias": bias, "temperature": tau.copy()}
    free["spread"] = rng.uniform(size=3)
    args, options = by_argument(free), {"offsets": np.array([0, 3]), "normalize": normalize}
    need = [name for name in free if name != "x" or not of_mean]
    forward = route(**args, **options, mean_x=True)
    mine = reference.route_backward(**grouped(args | options), forward=forward, gradients=gradients, need=need)
    for name in need:
        expected = slopes(lambda _: pairing(route(**args, **options, mean_x=True), gradients), free[name])
        assert np.abs(expected).max() > (0.1 if name != "spread" else 0) or len(tau) == 1
        np.testing.assert_allclose(getattr(mine, name), expected, rtol=1e-6, atol=1e-8, err_msg=name)


def test_mean_x_has_no_gradient_of_x():
    h, p = Histories(np.zeros((1, 1)), np.zeros((1, 1)), np.array([0, 1])), np.zeros((1, 1, 1))
    forward = reference.route(h, p, mean_x=True, temperature=0.1)
    with pytest.raises(NotImplementedError, match="mean_x has no gradient for x"):
        reference.route_backward(h, p, forward, Tokens(None, None, p), need=("x",), temperature=0.1)


@given(testing.problems(max_users=2, max_history=6, max_width=3, dtypes=("float32",)))
def test_leaf_sums_backward_equals_finite_differences(p):
    args, h = p.by_reference(p.leaf_args()), p.histories
    bias = np.zeros(len(h.v)) if h.bias is None else h.bias.astype(np.float64)
    free = {"v": h.v.astype(np.float64), "bias": np.where(np.abs(bias) < 20, bias, np.nan)}
    args["histories"] = h._replace(**free)
    back = p.leaf_backward_args(reference.leaf_sums(**args))
    gradients = [getattr(back["gradients"], name) for name in ("x", "v", "bias", "spread")]

    def loss(_):
        sums = reference.leaf_sums(**args)
        return pairing([getattr(sums, name) for name in ("x", "v", "bias", "spread")], gradients)

    mine = reference.leaf_sums_backward(**args, sums=back["sums"], gradients=back["gradients"])
    for name, values in free.items():
        expected, inside = slopes(loss, values), np.isfinite(values)
        np.testing.assert_allclose(getattr(mine, name)[inside], expected[inside], rtol=1e-4, atol=1e-3, err_msg=name)


SMALL = {"max_users": 2, "max_candidates": 3, "dtypes": ("float32",)}


@given(testing.attentions(**SMALL) | testing.attentions(**SMALL, ragged=True))
def test_attend_backward_equals_finite_differences(p):
    args = p.attend_args()
    free = {name: args[name].astype(np.float64) for name in ("q", "keys", "values", "bias") if args[name] is not None}
    free["q"] /= max(1, np.abs(free["q"]).max(initial=0))
    args |= free
    forward = reference.attend(**args)
    back = p.backward_args(forward)
    mine = reference.attend_backward(**args, **{name: back[name] for name in ("d_out", "d_lse")}, forward=forward)
    for name, values in free.items():
        inside = np.isfinite(values)
        expected = slopes(lambda _: pairing(reference.attend(**args), (back["d_out"], back["d_lse"])), values)
        np.testing.assert_allclose(getattr(mine, name)[inside], expected[inside], rtol=1e-4, atol=1e-4, err_msg=name)
    assert (mine.bias is None) == (args["bias"] is None)


@given(testing.attentions())
def test_attend_is_a_softmax_over_present_tokens(p):
    args, out = p.attend_args(), p.reference()
    scale = p.scale or 1 / math.sqrt(p.q.shape[2])
    expected, lse = np.zeros(out.out.shape), np.full(out.lse.shape, -np.inf)
    for b, (s, e) in enumerate(zip(p.candidate_offsets[:-1], p.candidate_offsets[1:], strict=True)):
        here = np.arange(p.keys.shape[1]) if p.bias is None else np.flatnonzero(np.isfinite(p.bias[b]))
        for n in range(s, e):
            for h in range(p.q.shape[1]) if len(here) else ():
                z = scale * p.keys[b, here, h].astype(float) @ p.q[n, h].astype(float)
                z = z + (0 if p.bias is None else p.bias[b, here])
                u = np.exp(z - z.max())
                expected[n, h] = u @ p.values[b, here, h].astype(float) / u.sum()
                lse[n, h] = z.max() + math.log(u.sum())
    same(reference.attend(**args), (expected, lse), 1e-9)
