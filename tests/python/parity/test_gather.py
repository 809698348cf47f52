# SPDX-License-Identifier: Apache-2.0
"""Gathered inputs of `route` and its backward: against the reference, and bit for bit what copied rows give."""

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

import hisac
from hisac import reference, testing
from hisac.reference import bounds
from hisac.reference.tables import of_table
from hisac.testing.problems import sprinkle
from hisac.types import RouteGradients, Tokens
from support import by_field, checked_gradients, grouped, kinds, with_threads

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the reference, on hostile values
route, leaf_sums, missing = map(by_field, (hisac.route, hisac.leaf_sums, hisac.missing))
PROBLEMS = st.booleans().flatmap(lambda hostile: testing.problems(gathered=True, hostile=hostile))
MANY = 3 * settings().max_examples  # of the profile: so many options meet
SEARCH = settings(max_examples=3000, derandomize=True, deadline=None, database=None, phases=[Phase.generate])


def bits(result):
    """Raw bytes, with one kind of NaN."""
    arrays = [bounds.as_numpy(a) for a in result if a is not None]
    return [np.where(np.isnan(a), a.dtype.type("nan"), a).tobytes() for a in arrays]


def copied(args):
    """The same arguments with the rows copied out in the types they had, int8 as float32: NaN, or -1, where there is
    none."""
    x, v, offsets, codes, x_ids, v_ids, scale, bias, spread, weights = args["histories"][:-2]
    bias = np.zeros(len(v if v_ids is None else v_ids), "f4") if bias is None else bias.copy()
    if x is not None and x.dtype == np.int8:
        x = x.astype(np.float32) * (np.float32(1) if scale is None else scale[:, None])
    dense = []
    for table, ids, nothing in ((x, x_ids, np.nan), (v, v_ids, np.nan), (codes, x_ids, -1)):
        if ids is not None and table is not None:
            outside = (ids < 0) | (ids >= len(table))
            rows = np.concatenate([table, np.full((1, table.shape[1]), nothing, table.dtype)])
            table = rows[np.where(outside, len(table), ids)]
            bias[outside] = np.nan
        dense.append(table)
    x, v, codes = dense
    histories = hisac.Histories(x, v, offsets, codes, bias=bias, spread=spread, weights=weights)
    return {**args, "histories": histories}


@settings(max_examples=MANY)
@given(PROBLEMS)
def test_route(p):
    for convert, dtype in kinds(p):
        mine = with_threads(lambda: hisac.route(**convert(p.route_args())))  # noqa: B023
        testing.assert_tokens_close(mine, p.reference(), bounds.route_bound(p.by_reference(p.route_args()), dtype))
    if p.dtype != "bfloat16":
        assert bits(hisac.route(**p.route_args())) == bits(hisac.route(**copied(p.route_args())))


@settings(max_examples=MANY)
@given(PROBLEMS)
def test_route_backward(p):
    found = checked_gradients(p, "route", p.route_args(), p.backward_args)
    for _, _, mine in found:
        for name, like in (("x", p.histories.x), ("v", p.histories.v), ("bias", None), ("spread", None)):
            g = getattr(mine, name)
            assert g is None or tuple(g.shape) == ((behaviours(p),) if like is None else like.shape), name
    if p.dtype == "float32":
        _, args, mine = found[-1]
        assert bits(mine) == bits(in_tables(hisac.route_backward(**copied(args)), p.histories))


@settings(max_examples=MANY)
@given(PROBLEMS)
def test_leaf_sums_backward(p):
    found = checked_gradients(p, "leaf_sums", p.leaf_args(), p.leaf_backward_args)
    for _, _, mine in found:
        assert tuple(mine.v.shape) == p.histories.v.shape and tuple(mine.bias.shape) == (behaviours(p),)
    if p.dtype == "float32":
        _, args, mine = found[-1]
        assert bits(mine) == bits(in_tables(hisac.leaf_sums_backward(**copied(args)), p.histories))


@given(PROBLEMS, st.data())
def test_rows_that_are_listed(p, data):
    """Any rows, in any order, twice, outside: those of the whole gradient, to the bit."""
    rng, listed = np.random.default_rng(p.seed), {}
    for name in ("x", "v"):
        table, ids = getattr(p.histories, name), getattr(p.histories, f"{name}_ids")
        if table is not None and ids is not None:
            dtype = data.draw(st.sampled_from([np.int32, np.int64]))
            listed[name] = rng.integers(-2, len(table) + 2, data.draw(st.integers(0, 9))).astype(dtype)
    for convert, _ in kinds(p):
        args = convert(p.backward_args(hisac.route(**convert(p.route_args()))))
        of_leaves = convert(p.leaf_backward_args(hisac.leaf_sums(**convert(p.leaf_args()))))
        for verb, every in ((hisac.route_backward, args), (hisac.leaf_sums_backward, of_leaves)):
            rows = {f"{name}_rows": a for name, a in listed.items() if name == "v" or verb is hisac.route_backward}
            whole = verb(**every)
            found = with_threads(lambda: verb(**every, **convert(rows)))  # noqa: B023
            for name in (n for n in listed if f"{n}_rows" in rows):
                if (g := getattr(whole, name)) is not None:
                    some = take(bounds.as_numpy(g), listed[name])
                    assert bits([getattr(found, name)]) == bits([some])
            others = [name for name in whole._fields if f"{name}_rows" not in rows]
            assert bits(getattr(found, n) for n in others) == bits(getattr(whole, n) for n in others)


def take(table, rows):
    """Rows of a table, zeros outside."""
    inside = (rows >= 0) & (rows < len(table))
    return np.concatenate([table, np.zeros_like(table, shape=(1, *table.shape[1:]))])[np.where(inside, rows, -1)]


def in_tables(gradients, h):
    """Gradients of rows that were copied out, as those of tables: added up in float64, in the order of behaviours."""
    summed = {}
    for name in ("x", "v"):
        g, table, ids = getattr(gradients, name, None), getattr(h, name), getattr(h, f"{name}_ids")
        if g is not None and ids is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                summed[name] = of_table(g.astype(np.float64), table, ids, None).astype(np.float32)
    return gradients._replace(**summed)


@settings(max_examples=MANY)
@given(PROBLEMS)
def test_missing(p):
    options = {"book": p.book} if p.routed_codes or p.histories.x is None else {}
    expected = reference.missing(p.histories, **p.by_reference(options))
    for convert, _ in kinds(p):
        found = with_threads(lambda: hisac.missing(**convert({"histories": p.histories}), **options))  # noqa: B023
        np.testing.assert_array_equal(bounds.as_numpy(found), expected)
    np.testing.assert_array_equal(hisac.missing(copied({"histories": p.histories})["histories"], **options), expected)


@settings(max_examples=MANY)
@given(PROBLEMS)
def test_vote(p):
    """An id outside v votes, one outside the codes does not."""
    expected = reference.vote(**p.by_reference(p.vote_args()))
    for convert, _ in kinds(p):
        testing.assert_agents_equal(with_threads(lambda: hisac.vote(**convert(p.vote_args()))), expected)  # noqa: B023
    testing.assert_agents_equal(hisac.vote(**copied(p.vote_args())), expected)


@pytest.mark.parametrize("weighted", [None, "float32", "int64"])
@pytest.mark.parametrize("sizes", [(8,), (16, 8), (64, 64), (4, 4, 4, 4), (300, 300, 300)])
@pytest.mark.parametrize("n", [255, 257, 3000, 20_000])
def test_vote_in_every_way_of_counting(n, sizes, weighted):
    """Users on both sides of a block of rows, counted by histograms or sorted, as their rows copied out."""
    rng = np.random.default_rng(n)
    book = hisac.Codebook([rng.normal(size=(c, 2)).astype(np.float32) for c in sizes])
    table = rng.integers(-1, np.array(sizes) + (rng.random(len(sizes)) < 0.3), (500, len(sizes))).astype(np.int32)
    ids = sprinkle(rng, rng.zipf(1.3, n).clip(0, 502) - 2, 0.01, np.array([2**40, -(2**63), 500]))
    h = hisac.Histories(offsets=[0, n // 2, n], codes=table, x_ids=ids)
    h = h._replace(weights=(9 * rng.exponential(size=n)).astype(weighted)) if weighted else h
    rows = np.where(((ids >= 0) & (ids < 500))[:, None], table[ids.clip(0, 499)], -1)
    for rule in ({"budget": 30}, {"fanout": (2,) * len(sizes)}, {"beam": (5,) * len(sizes)}):
        expected = hisac.vote(book, h._replace(codes=rows, x_ids=None), **rule)
        testing.assert_agents_equal(hisac.vote(book, h, **rule), expected)
        assert expected.count.min() > 0


def behaviours(p):
    h = p.histories
    return len(h.v if h.v_ids is None else h.v_ids)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda h: h.x_ids is not None and h.v_ids is not None and not np.array_equal(h.x_ids, h.v_ids),
        lambda h: h.x_ids is not None and h.v_ids is None and h.x_ids.dtype == np.int32 and (h.x_ids < 0).any(),
        lambda h: h.v_ids is not None and len(h.v) > 0 and (h.v_ids == len(h.v)).any(),
        lambda h: h.v_ids is not None and len(h.v) == 0 and len(h.v_ids) > 0,
        lambda h: h.x is not None and h.x.dtype == np.int8 and h.x_ids is None and len(h.x_scale) > 1,
        lambda h: h.x is not None and h.x.dtype == np.int8 and h.x_ids is not None and len(h.x_scale) == len(h.x) > 1,
        lambda h: h.x is not None and h.x.dtype == np.int8 and np.abs(h.x.astype(int)).max(initial=0) > 50,
        lambda h: h.x_scale is not None and not np.isfinite(h.x_scale).all(),
        lambda h: h.x is None and h.x_ids is not None and len(h.codes) != len(h.x_ids),
    ],
)
def test_problems_reach(wanted):
    problems = testing.problems(gathered=True, hostile=True, max_history=12)
    find(problems, lambda p: wanted(p.histories), settings=SEARCH)


# ------------------------------------------------------------------------------------------------------ small and exact

X = np.array([[0, 0], [4, 0], [0, 4]], np.float32)
ONE = {"offsets": np.array([0, 4]), "agents": np.array([[[0, 0], [4, 0], [0, 4]]], np.float32), "temperature": 0.1}


def test_an_id_outside_its_table_is_an_absent_behaviour():
    v = np.float32([[1], [2], [4], [8]])
    for bad in (-1, 3, -(2**31), 2**31 - 1):
        for dtype in (np.int32, np.int64):
            ids = np.array([0, bad, 2, 1], dtype)
            assert route(x=X, v=v, x_ids=ids, **ONE).tokens[0].ravel().tolist() == [1, 8, 4]
            rows = {"x": X, "v": v, "x_ids": ids, "offsets": ONE["offsets"]}
            assert missing(**rows).tolist() == [-np.inf, 0, -np.inf, -np.inf]  # it has a value
            rows = {"x": X[np.array([0, 1, 2, 1])], "v": v[:3], "v_ids": ids, "offsets": ONE["offsets"]}
            assert route(**ONE | rows).tokens[0].ravel().tolist() == [1, 2, 4]
            assert missing(**rows).tolist() == [-np.inf] * 4  # it has none
    for bad in (2**62, 2**63 - 1, -(2**63)):
        out = route(x=X, v=v, x_ids=np.array([0, bad, 2, 1]), **ONE)
        assert out.tokens[0].ravel().tolist() == [1, 8, 4]


def test_an_empty_table_makes_everyone_absent():
    ids, v = np.zeros(4, np.int64), np.float32([[1], [2], [3], [4]])
    assert not route(x=X[:0], v=v, x_ids=ids, **ONE).tokens.any()
    assert missing(x=X[:0], v=v, x_ids=ids, offsets=ONE["offsets"]).tolist() == [0] * 4
    assert not route(x=X[[0, 1, 2, 0]], v=v[:0], v_ids=ids, **ONE).tokens.any()


def test_no_behaviours():
    none, p = np.zeros(0, np.int32), ONE["agents"]
    for offsets in (np.array([0]), np.array([0, 0])):
        out = hisac.route(
            hisac.Histories(X, X, offsets, x_ids=none, v_ids=none), p[: len(offsets) - 1], temperature=0.1
        )
        assert out.tokens.shape == (len(offsets) - 1, 3, 2) and not out.tokens.any()


@pytest.mark.parametrize("scale", [0.5, np.float32(0.5), 2, np.float32([0.5]), np.float32([0.5, 0.25, 3.0]), None])
def test_int8_is_scaled_and_rounded(scale):
    x = np.array([[-128, 127], [1, -1], [100, 3]], np.int8)
    ids, v = np.array([2, 0, 1, 2]), np.float32([[1], [2], [4], [8]])
    rows = x.astype(np.float32) * np.reshape(np.float32(1 if scale is None else scale), (-1, 1))
    args = ONE | {"temperature": 1000.0}
    mine = route(x=x, v=v, x_ids=ids, x_scale=scale, **args)
    assert bits(mine) == bits(route(x=rows[ids], v=v, **args))
    exact = grouped(args | {"x": x, "v": v, "x_ids": ids, "x_scale": scale})
    testing.assert_tokens_close(mine, reference.route(**exact), bounds.route_bound(exact))


@pytest.mark.parametrize("scale", [0, np.float32([0]), np.float32([0, 0.5, 0])])
def test_a_scale_of_zero_gives_zeros(scale):
    """Exactly, in sums too: an all-zero row of a table has the largest value, and so the scale, of zero."""
    rng = np.random.default_rng(0)
    x, v = rng.integers(-128, 128, (3, 4)).astype(np.int8), rng.normal(size=(6, 2)).astype(np.float32)
    book, ids = hisac.Codebook([rng.normal(size=(2, 4)).astype(np.float32)]), np.array([0, 1, 2, 2, 0, 1])
    rows = np.where(np.reshape(scale, (-1, 1)) == 0, 0, x * np.float32(0.5)).astype(np.float32)[ids]
    codes = np.int32([[0], [1], [0]])
    more = {"book": book, "offsets": np.array([0, 6])}
    options = {"agents": book.centers[0][None], "temperature": 0.1, "mean_x": True, **more}
    with np.errstate(all="raise"):
        mine = route(x=x, v=v, codes=codes, x_ids=ids, x_scale=scale, **options)
    assert np.isfinite(mine.tokens).all()
    sums, dense = leaf_sums(x=x, v=v, codes=codes, x_ids=ids, x_scale=scale, **more), {"x": rows, "codes": codes[ids]}
    for got, want in ((mine, route(v=v, **dense, **options)), (sums, leaf_sums(v=v, **dense, **more))):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan, 3e38])
def test_a_scale_that_is_not_finite_or_absurd_makes_absent(scale):
    x = np.array([[0, 0], [1, 0], [0, 5]], np.int8)
    v, ids = np.float32([[1], [2], [4]]), np.array([0, 1, 2, 0])
    out = route(x=x, v=v, v_ids=ids, x_ids=ids, x_scale=np.float32([1, scale, 0.8]), **ONE)
    assert out.tokens[0, [0, 2]].ravel().tolist() == [1, 4] and out.lse[0, 1] < -100
    zeros = route(x=x[:1], v=v, x_ids=np.zeros(3, int), x_scale=scale, **ONE | {"offsets": np.array([0, 3])})
    assert np.isfinite(zeros.lse).any() == np.isfinite(scale)  # 0 times infinity is no row


@pytest.mark.parametrize("normalize", ["history", "agents"])
def test_subnormal_rows_and_values(normalize):
    rng, n = np.random.default_rng(0), 150
    book = hisac.Codebook(tuple(rng.normal(size=(2, 3)).astype(np.float32) for _ in range(3)))
    rows = {"x": rng.integers(-128, 128, (n, 3)).astype(np.int8), "x_scale": np.float32([1e-45])}
    rows |= {"v": rng.normal(size=(n, 4)).astype(np.float32) * np.float32(1e-43), "offsets": np.array([0, n])}
    histories = hisac.Histories(**rows, codes=rng.integers(0, 2, (n, 3)).astype(np.int32))
    args = {"histories": histories, "agents": rng.normal(size=(1, 4, 3)).astype(np.float32)}
    args |= {"temperature": 0.1, "normalize": normalize, "mean_x": True}
    testing.assert_tokens_close(hisac.route(**args), reference.route(**args), bounds.route_bound(args))
    mine, exact = hisac.leaf_sums(book, histories), {"book": reference.Codebook(book.centers), "histories": histories}
    testing.assert_leaf_sums_close(mine, reference.leaf_sums(**exact), bounds.leaf_sums_bound(exact))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 31, 64, 130])
def test_every_width_of_int8(width, precision):
    rng = np.random.default_rng(width)
    x, scale = rng.integers(-128, 128, (50, width)).astype(np.int8), rng.uniform(0, 0.02, 50).astype(np.float32)
    ids, v = rng.integers(0, 50, 300), rng.normal(size=(300, 3)).astype(np.float32)
    p = rng.normal(size=(2, 5, width)).astype(np.float32)
    args = {"offsets": np.array([0, 100, 300]), "agents": p, "temperature": 5.0, "precision": precision}
    dense = x.astype(np.float32)[ids] * scale[ids, None]
    assert bits(route(x=x, v=v, x_ids=ids, x_scale=scale, **args)) == bits(route(x=dense, v=v, **args))


def test_many_tiles_and_overlapping_histories():
    rng = np.random.default_rng(0)
    items, n = rng.normal(size=(900, 12)).astype(np.float32) / 4, 9000
    values, ids = rng.normal(size=(700, 6)).astype(np.float32), rng.integers(-5, 905, n)
    v_ids = rng.integers(-5, 705, n).astype(np.int32)
    args = {"x": items, "v": values, "offsets": (np.array([0, 10, 2000]), np.array([9000, 5000, 2000]))}
    args |= {"agents": items[:24].reshape(3, 8, 12), "x_ids": ids, "v_ids": v_ids, "bias": None}
    args = grouped(args | {"temperature": 0.1, "mean_x": True})
    out = with_threads(lambda: hisac.route(**args))
    assert bits(out) == bits(hisac.route(**copied(args)))
    testing.assert_tokens_close(out, reference.route(**args), bounds.route_bound(args))
    back = {name: a for name, a in args.items() if name != "mean_x"} | {"forward": out}
    back |= {"gradients": Tokens(np.cos(50 * out.tokens), None), "need": RouteGradients._fields}
    mine = with_threads(lambda: hisac.route_backward(**back))
    testing.assert_gradients_close(mine, reference.route_backward(**back), back)
    assert bits(mine) == bits(in_tables(hisac.route_backward(**copied(back)), args["histories"]))


# ------------------------------------------------------------------------------------------------------------- refusals

IDS, V = np.array([0, 1, 2, 0]), np.zeros((4, 1), np.float32)
RIGHT = {"x": X, "v": V, "x_ids": IDS, **ONE}
BOOK = hisac.Codebook([X])


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"x_ids": IDS[:3]}, ValueError, "x_ids is [3], v is [4, 1]: T differs (3, 4)"),
        ({"v_ids": IDS[:3]}, ValueError, "x_ids is [4], v_ids is [3]: T differs (4, 3)"),
        ({"x_ids": None, "v_ids": IDS}, ValueError, "x is [3, 2], v_ids is [4]: T differs (3, 4)"),
        ({"x_ids": IDS[None]}, ValueError, "x_ids expected int32 or int64 [T], got int64 [1, 4]"),
        ({"v_ids": IDS * 1.0}, TypeError, "v_ids expected int32 or int64 [T], got float64 [4]"),
        ({"x_ids": IDS.astype(np.uint32)}, TypeError, "x_ids expected int32 or int64 [T], got uint32 [4]"),
        (
            {"x_ids": [0, 1, 2, 0]},
            TypeError,
            "x_ids expected a NumPy array, a torch tensor or anything with DLPack, got list",
        ),
        ({"x": None}, ValueError, "x_ids expected with x or codes, got neither"),
        ({"codes": np.zeros((2, 1), "i4")}, ValueError, "codes expected [3, 1], got [2, 1]"),
        (
            {"x_ids": None, "x": X[[0, 1, 2, 0]], "codes": np.zeros((3, 1), "i4")},
            ValueError,
            "codes expected [4, 1], got [3, 1]",
        ),
        ({"weights": np.zeros(3, "f4")}, ValueError, "weights expected [4], got [3]"),
        ({"x_scale": 0.5}, ValueError, "x_scale expected with x of int8, got another"),
        (
            {"x": None, "x_ids": None, "x_scale": 0.5, "codes": np.zeros((4, 1), "i4"), "book": BOOK},
            ValueError,
            "x_scale expected with x of int8, got another",
        ),
        ({"x": X.astype(np.int8), "x_scale": np.ones(2, "f4")}, ValueError, "x_scale expected [1] or [3], got [2]"),
        (
            {"x": X.astype(np.int8), "x_scale": np.ones(3)},
            TypeError,
            "x_scale expected float32 [1] or [rows of x], got float64 [3]",
        ),
        (
            {"x": X.astype(np.int16)},
            TypeError,
            "x expected float32, bfloat16, float16 or int8 [T, D], got int16 [3, 2]",
        ),
        ({"v": V.astype(np.int8)}, TypeError, "v expected float32, bfloat16 or float16 [T, V], got int8 [4, 1]"),
        ({"bias": np.zeros(3, "f4"), "v_ids": IDS}, ValueError, "bias expected [4], got [3]"),
        (
            {"offsets": np.array([0, 5])},
            ValueError,
            "offsets expected 0 <= start <= end <= 4 for every user, got [0, 5) for user 0",
        ),
    ],
)
def test_refusals(change, kind, text):
    forward = route(**RIGHT)
    args = {**RIGHT, **change}
    back = args | {"gradients": Tokens(forward.tokens, None), "forward": forward}
    for verb, given_ in (("route", args), ("route_backward", back)):
        with pytest.raises(kind) as error:
            getattr(hisac, verb)(**grouped(given_))
        assert str(error.value) == f"{verb}: {text}"


# ------------------------------------------------------------------------------------------------- gradients of tables


def of_events(seed=0, events=5_000, users=40, items=60, width=3, value=70):
    """Histories that overlap inside a log of events, some events in none; more columns than one pass of sums has."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, events - 200, users)
    ids = np.where(rng.random(events) < 0.3, 4, rng.integers(-1, items + 1, events))  # a hot row; some of none
    x, v = rng.normal(size=(items, width)).astype("f4"), rng.normal(size=(items, value)).astype("f4")
    h = hisac.Histories(x, v, (starts, starts + rng.integers(0, 200, users)), x_ids=ids, v_ids=ids)
    return h, rng.normal(size=(users, 5, width)).astype("f4"), rng


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_behaviours_of_no_history_have_no_gradient(dtype):
    """What lies in the log around the histories changes no bit, whatever its ids are."""
    h, p, rng = of_events()
    h = h._replace(x_ids=h.x_ids.astype(dtype), v_ids=h.v_ids.astype(dtype))
    forward = hisac.route(h, p, temperature=1.0)
    gradients = Tokens(rng.normal(size=forward.tokens.shape).astype("f4"), None)
    back = {"agents": p, "forward": forward, "gradients": gradients, "temperature": 1.0, "need": ("x", "v", "bias")}
    found = with_threads(lambda: hisac.route_backward(h, **back))
    used = np.zeros(len(h.x_ids), bool)
    for start, end in zip(*h.offsets, strict=True):
        used[start:end] = True
    assert 0 < used.sum() < len(used) and not found.bias[~used].any()
    for nothing in (-1, 4, 2**31 - 1):
        others = np.where(used, h.x_ids, nothing).astype(dtype)
        assert bits(hisac.route_backward(h._replace(x_ids=others, v_ids=others), **back)) == bits(found)
    exact = reference.route_backward(h, **back)
    testing.assert_gradients_close(found, exact, {"histories": h, **back})
    assert not found.v[~np.isin(np.arange(len(h.v)), h.v_ids[used])].any() and found.v[4].any()


def test_scratch_grows_with_the_histories_and_not_with_the_log():
    """A log of 2^28 events, whose gradients as rows would be 80 GB, of which 100 are in use."""
    h, p, rng = of_events()
    n = 2**28
    ids = np.zeros(n, np.int32)  # pages that nobody reads take no memory
    ids[n - 100 :] = rng.integers(0, 60, 100)
    few = h._replace(offsets=(np.array([n - 100]), np.array([n])), x_ids=ids, v_ids=ids)
    same = few._replace(offsets=[0, 100], x_ids=ids[-100:], v_ids=ids[-100:])
    forward = hisac.route(same, p[:1], temperature=1.0)
    back = {"agents": p[:1], "forward": forward, "gradients": Tokens(forward.tokens, None), "temperature": 1.0}
    back["need"] = ("x", "v")
    assert bits(hisac.route(few, p[:1], temperature=1.0)) == bits(forward)
    assert bits(hisac.route_backward(few, **back)) == bits(hisac.route_backward(same, **back))


def test_a_hot_row_keeps_its_digits():
    """100,000 behaviours of one item among a few of others, summed in float64 and rounded once, on any threads."""
    n, rng = 100_000, np.random.default_rng(0)
    ids = np.where(rng.random(n) < 0.99, 4, rng.integers(-1, 10, n))
    x, v = np.zeros((n, 1), np.float32), rng.normal(size=(9, 70)).astype(np.float32)
    forward = Tokens(np.zeros((1, 1, 70), "f4"), np.zeros((1, 1), "f4"))
    gradients = Tokens(rng.normal(1, 0.1, (1, 1, 70)).astype(np.float32), None)
    bias = rng.normal(size=n).astype(np.float32)
    back = {"agents": np.zeros((1, 1, 1), "f4"), "forward": forward, "gradients": gradients, "need": "v"}
    back["temperature"] = 1.0
    h = hisac.Histories(x, v, [0, n], v_ids=ids, bias=bias)
    found = with_threads(lambda: hisac.route_backward(h, **back)).v
    rows = hisac.route_backward(h._replace(v=v[ids.clip(0, 8)], v_ids=None), **back).v
    np.testing.assert_array_equal(found, of_table(rows.astype(np.float64), v, ids, None).astype(np.float32))
    assert found[4].any() and found.dtype == np.float32


@pytest.mark.parametrize("ids", [[], [-1, 9, 7], [7] * 3])
def test_no_row_of_the_table(ids):
    h = hisac.Histories(np.zeros((len(ids), 2), "f4"), np.ones((7, 3), "f4"), [0, len(ids)], v_ids=np.array(ids, int))
    forward = Tokens(np.ones((1, 1, 3), "f4"), np.zeros((1, 1), "f4"))
    back = {"agents": np.zeros((1, 1, 2), "f4"), "forward": forward, "gradients": forward, "need": "v"}
    back["temperature"] = 1.0
    found = hisac.route_backward(h, **back).v
    assert found.shape == (7, 3) and not found.any()
    assert hisac.route_backward(h, **back, v_rows=np.array([0, 6])).v.tolist() == [[0] * 3] * 2
