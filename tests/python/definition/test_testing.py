# SPDX-License-Identifier: Apache-2.0
"""`hisac.testing` and `hisac.reference.bounds`: the strategies reach every corner, the bounds hold for an independent
float32 computation, and the comparators see what is wrong."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

import hisac
from hisac import reference, testing
from hisac.reference import bounds
from hisac.types import Agents, Attended, RouteGradients, Tokens

SEARCH = settings(max_examples=2000, derandomize=True, deadline=None, database=None, phases=[Phase.generate])


def finite(*arrays):
    return all(np.isfinite(a).all() for a in arrays if a is not None)


# -------------------------------------------------------------------------------------------------------- strategies


@given(testing.codebooks(max_levels=4, max_codes=5, min_width=2, max_width=7))
def test_codebooks_stay_within_their_sizes(book):
    assert isinstance(book, hisac.Codebook)
    assert 1 <= len(book.sizes) <= 4 and all(1 <= n <= 5 for n in book.sizes) and 2 <= book.width <= 7
    assert all(c.dtype == np.float32 and np.isfinite(c).all() for c in book.centers)


def test_codebooks_have_duplicates_and_any_shape():
    find(testing.codebooks(), lambda b: any(len(np.unique(c, axis=0)) < len(c) for c in b.centers), settings=SEARCH)
    find(testing.codebooks(), lambda b: b.levels == 3 and len(set(b.sizes)) == 3, settings=SEARCH)


@given(testing.spans(max_users=3, max_history=9))
def test_spans_are_valid(drawn):
    rows, ragged = drawn
    for r in reference.ranges(ragged):
        assert 0 <= r.start <= r.stop <= rows and r.stop - r.start <= 9


def overlapping(drawn):
    users = [set(range(r.start, r.stop)) for r in reference.ranges(drawn[1])]
    return any(a & b for i, a in enumerate(users) for b in users[:i])


@pytest.mark.parametrize(
    "wanted",
    [
        overlapping,
        lambda d: len(reference.ranges(d[1])) == 0,
        lambda d: any(r.start == r.stop for r in reference.ranges(d[1])) and len(reference.ranges(d[1])) > 1,
        lambda d: not isinstance(d[1], tuple) and d[1][0] > 0 and d[1][-1] < d[0],
        lambda d: not isinstance(d[1], tuple) and d[1].dtype == np.int32,
    ],
    ids=["overlap", "no users", "an empty user", "rows outside", "int32"],
)
def test_spans_reach(wanted):
    find(testing.spans(), wanted, settings=SEARCH)


def test_codes_are_int32_and_may_be_invalid():
    book = hisac.Codebook([np.zeros((3, 2), np.float32), np.zeros((2, 2), np.float32)])
    found = find(testing.codes(book, 30), lambda c: not reference.valid_codes(book, c).all(), settings=SEARCH)
    assert found.dtype == np.int32 and found.shape == (30, 2)
    with pytest.raises(NoSuchExample):
        find(testing.codes(book, invalid=False), lambda c: not reference.valid_codes(book, c).all(), settings=SEARCH)


@given(testing.embeddings(hostile=False), testing.embeddings(9, 3, dtype="float16"))
def test_embeddings_are_finite_unless_hostile(a, b):
    assert finite(a, b) and a.dtype == np.float32 and b.dtype == np.float16 and b.shape == (9, 3)


def test_embeddings_turn_hostile():
    find(testing.embeddings(hostile=True), lambda a: np.isnan(a).any() and np.isinf(a).any(), settings=SEARCH)


@given(testing.problems(max_history=16))
def test_problems_run_by_the_reference(p):
    out = p.reference()
    assert finite(p.histories.x, p.histories.v, p.prototypes, out.tokens) and not np.isnan(out.lse).any()
    users = len(reference.ranges(p.histories.offsets))
    assert out.tokens.shape[:2] == (users, p.prototypes.shape[1]) and (out.mean_x is not None) == p.mean_x
    reference.vote(**p.by_reference(p.vote_args()))
    reference.encode(**p.by_reference(p.encode_args()))
    gradients = reference.route_backward(**p.by_reference(p.backward_args(out)))
    assert isinstance(gradients, RouteGradients) and len(repr(p)) < 5000
    sums = reference.leaf_sums(**p.by_reference(p.leaf_args()))
    reference.leaf_sums_backward(**p.by_reference(p.leaf_backward_args(sums)))
    made = reference.compress(**p.by_reference(p.compress_args()))
    assert finite(made.tokens) and made.tokens.shape[0] == users


def voting(p, kind):
    """Whether there are weights of integers, "i", or of floats, "f"."""
    return p.histories.weights is not None and p.histories.weights.dtype.kind == kind and len(p.histories.weights)


@given(testing.problems(max_history=16))
def test_problems_run_compiled(p):
    testing.assert_agents_equal(hisac.vote(**p.vote_args()), reference.vote(**p.by_reference(p.vote_args())))
    testing.assert_codes_equal(hisac.encode(**p.encode_args()), reference.encode(**p.by_reference(p.encode_args())))
    testing.assert_tokens_close(hisac.route(**p.route_args()), p.reference(), p)
    for mine, theirs in zip(reference.route(**p.route_args()), p.reference(), strict=True):
        np.testing.assert_array_equal(mine, theirs)  # with the compiled Codebook too
    made, expected = hisac.compress(**p.compress_args()), reference.compress(**p.by_reference(p.compress_args()))
    assert made.tokens.shape == expected.tokens.shape and made.lse.shape == expected.lse.shape


@pytest.mark.parametrize(
    "wanted",
    [
        lambda p: p.method == "leaf" and p.normalize == "agents" and p.missing == "token" and p.refine == 2,
        lambda p: p.histories.x is None,
        lambda p: p.histories.x is not None and p.routed_codes and p.mean_x,
        lambda p: p.backward_args(p.reference())["gradients"].mean_x is not None and p.histories.x is not None,
        lambda p: p.histories.bias is not None and np.isneginf(p.histories.bias).any(),
        lambda p: p.histories.weights is not None and p.fanout is not None,
        lambda p: (
            p.beam is not None and p.book.levels == 3 and 1 < p.beam[0] < p.beam[2] and p.budget is p.fanout is None
        ),
        lambda p: voting(p, "i") and 0 < p.histories.weights.max() < 4 and p.histories.weights.min() < 0,
        lambda p: voting(p, "i") and p.histories.weights.min() == -(2**63) and p.histories.weights.max() == 2**62,
        lambda p: voting(p, "f") and 0 < np.nan_to_num(p.histories.weights).max() < 1e-38,
        lambda p: voting(p, "f") and np.isposinf(p.histories.weights).any() and np.isfinite(p.histories.weights).any(),
        lambda p: voting(p, "f") and 1e35 < np.abs(np.nan_to_num(p.histories.weights, posinf=0)).mean(),
        lambda p: np.isneginf(reference.leaf_sums(**p.by_reference(p.leaf_args())).bias).any(),
        lambda p: p.count is not None and 0 in p.count,
        lambda p: np.shape(p.temperature) == (1,),
        lambda p: np.shape(p.temperature) == (3,),
        lambda p: p.dtype == "bfloat16" and isinstance(p.histories.offsets, tuple),
    ],
)
def test_problems_reach(wanted):
    find(testing.problems(max_history=12), wanted, settings=SEARCH)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda p: p.histories.x is not None and np.isnan(p.histories.x).any(),
        lambda p: np.isinf(p.histories.v).any() and p.dtype == "float32",
        lambda p: np.isnan(p.prototypes).any(),
        lambda p: (
            isinstance(p.temperature, np.ndarray) and (np.isnan(p.temperature).any() or (p.temperature <= 0).any())
        ),
        lambda p: p.count is not None and (p.count > p.prototypes.shape[1]).any(),
    ],
)
def test_hostile_problems_reach(wanted):
    find(testing.problems(max_history=12, hostile=True), wanted, settings=SEARCH)


def test_rounded_to_nearest_even():
    a = np.float32([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, np.inf, np.nan, 3.4e38, 1e-45, -0.0])
    expected = [1, 1 + 2**-6, -1 - 2**-7, np.inf, np.nan, np.inf, 0, -0.0]
    np.testing.assert_array_equal(testing.rounded(a, "bfloat16"), np.float32(expected))
    assert np.signbit(testing.rounded(a, "bfloat16")[-1]) and testing.rounded(a, "float16")[5] == np.inf
    assert testing.rounded(a, "float32") is not None and testing.rounded([0.1], "float16").dtype == np.float16


@given(testing.problems(max_history=16, plain=True))
def test_plain_problems_are_ordinary(p):
    h = p.histories
    assert (np.diff(h.offsets) > 0).all() and h.offsets[0] == 0 and h.offsets[-1] == len(h.x) == len(h.v)
    assert len(h.offsets) > 1 and h.x.dtype == h.v.dtype == np.float32 and finite(h.x, h.v, p.prototypes)
    assert ((h.codes >= 0) & (h.codes < p.book.sizes)).all() and 0 < p.temperature < np.inf
    assert all(a is None for a in (*h[4:], p.count))
    default = p.vote_args() | {"temperature": p.temperature}
    for mine, expected in zip(hisac.compress(**p.compress_args())[:3], hisac.compress(**default)[:3], strict=True):
        np.testing.assert_array_equal(mine, expected)
    assert (reference.missing(h, book=p._reference_book) == -np.inf).all()
    assert p.route_args().keys() == {"histories", "agents", "count", "temperature", "normalize", "precision", "mean_x"}
    assert (p.reference().lse > -np.inf).any(1).all()


@given(testing.problems(max_history=4, plain=True, dtypes=("float16",)))
def test_plain_problems_of_a_type(p):
    assert p.histories.x.dtype == p.histories.v.dtype == np.float16


@pytest.mark.parametrize("option", ["hostile", "gathered"])
def test_plain_problems_are_neither_hostile_nor_gathered(option):
    with pytest.raises(ValueError, match="problems: expected plain alone, got it beside hostile, gathered or sparse"):
        find(testing.problems(plain=True, **{option: True}), lambda p: True)


@given(testing.problems(max_history=8))
def test_to_torch_gives_rows_their_type(p):
    torch = pytest.importorskip("torch")
    args, given = testing.to_torch(p.route_args(), p.dtype), p.histories
    h = args["histories"]
    assert h.v.dtype == getattr(torch, p.dtype) and args["agents"].dtype == torch.float32
    np.testing.assert_array_equal(bounds.as_numpy(h.v).astype(np.float32), given.v.astype(np.float32))
    assert isinstance(h.offsets, tuple) == isinstance(given.offsets, tuple)
    assert args["normalize"] == p.normalize
    assert (h.x is None) == (given.x is None) and (given.x is None or h.x.dtype == h.v.dtype)
    tokens = testing.to_torch(Tokens(*p.reference()), p.dtype)
    assert isinstance(tokens, Tokens) and tokens.tokens.dtype == h.v.dtype and torch.is_tensor(tokens.lse)


# ------------------------------------------------------------------------------------------------------------ bounds


def plain_route(histories, agents, *, temperature, normalize, wrong=None):
    """`route` by the book in float32, expanded distances and all; `wrong` plants a fault."""
    x, v, bias = histories.x, histories.v, histories.bias
    f, users = np.float32, reference.ranges(histories.offsets)
    tokens, lse = (
        np.zeros((len(users), agents.shape[1], v.shape[1]), f),
        np.full((len(users), agents.shape[1]), -np.inf, f),
    )
    for b, rows in enumerate(users):
        if rows.stop > rows.start:
            a, p, values = x[rows].astype(f), agents[b].astype(f), v[rows].astype(f)
            d = (a * a).sum(1)[:, None] + (p * p).sum(1) - f(2) * (a @ p.T)
            z = -np.maximum(d, 0) / f(temperature * (1.002 if wrong == "temperature" else 1))
            if normalize == "agents":
                top = z.max(1, keepdims=True)
                z = z - (top + np.log(np.exp(z - top).sum(1, keepdims=True)))
            z = z if bias is None or wrong == "bias" else z + bias[rows, None]
            z = np.delete(z, 0, 0) if wrong == "row" else z
            values = np.delete(values, 0, 0) if wrong == "row" else values
            top = z.max(0)
            u = np.exp(z - top)
            tokens[b], lse[b] = (u.T @ values) / u.sum(0)[:, None], top + np.log(u.sum(0))
    return Tokens(tokens.astype(v.dtype), lse)


def tame(seed, normalize, rows=200, dtype=np.float32):
    """Unit rows and prototypes at temperature 0.1, with a bias."""
    rng = np.random.default_rng(seed)
    x, p = rng.normal(size=(rows, 24)).astype(np.float32), rng.normal(size=(2, 5, 24)).astype(np.float32)
    x, p = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype), p / np.linalg.norm(p, axis=-1, keepdims=True)
    v = (rng.uniform(-1, 1, (rows, 8))).astype(dtype)
    bias = rng.normal(size=rows).astype(np.float32)
    histories = hisac.Histories(x, v, np.array([0, rows // 3, rows]), bias=bias)
    return {"histories": histories, "agents": p, "temperature": 0.1, "normalize": normalize}


@given(st.integers(0, 2**32 - 1), st.sampled_from(["history", "agents"]), st.integers(0, 400))
def test_bound_holds_for_plain_float32(seed, normalize, rows):
    args = tame(seed, normalize, rows)
    testing.assert_tokens_close(plain_route(**args), reference.route(**args), bounds.route_bound(args))
    testing.assert_tokens_close(plain_route(**args), reference.route(**args))


@pytest.mark.parametrize("wrong", ["temperature", "bias", "row"])
@pytest.mark.parametrize("normalize", ["history", "agents"])
def test_bound_is_narrow_enough_to_see_a_fault(normalize, wrong):
    args = tame(1, normalize)
    limit = bounds.route_bound(args)
    assert limit.tokens.max() < 1e-3 and limit.lse.max() < 1e-3
    with pytest.raises(AssertionError, match="differ; first at"):
        testing.assert_tokens_close(plain_route(**args, wrong=wrong), reference.route(**args), limit)


def test_bound_follows_the_type_of_v():
    limits = [bounds.route_bound(tame(2, "history"), dtype).tokens for dtype in testing.DTYPES]
    expected = reference.route(**tame(2, "history")).tokens
    assert (limits[0] < limits[1]).all() and (limits[1] < limits[2]).all()
    np.testing.assert_array_less(2**-8 * np.abs(expected), limits[2])
    for dtype, limit in zip(testing.DTYPES, limits, strict=True):
        rounded = testing.rounded(expected, dtype)
        assert (np.abs(rounded - expected) <= limit).all()


def test_bound_where_float32_has_no_digits_left():
    """Logits of 1e10 mean nothing in float32; what is left is that tokens are means of the rows."""
    args = tame(3, "history") | {"temperature": 1e-10}
    limit, expected = bounds.route_bound(args).tokens, reference.route(**args).tokens
    h = args["histories"]
    for b, rows in enumerate(reference.ranges(h.offsets)):
        low, high = h.v[rows].min(0), h.v[rows].max(0)
        assert (expected[b] + limit[b] >= high - 1e-6).all() and (limit[b] <= high - low + 1e-3).all()


def test_bound_of_what_is_absent_or_spoiled():
    args = tame(4, "history") | {"count": np.int32([5, 2])}
    args["histories"].v[150, 3] = np.nan
    limit = bounds.route_bound(args)
    assert (limit.tokens[1, 2:] == 0).all() and (limit.lse[1, 2:] == 0).all()
    assert np.isnan(limit.tokens[1, :2, 3]).all() and np.isfinite(limit.tokens[0]).all()
    assert np.isfinite(np.delete(limit.tokens[1], 3, 1)).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from(["history", "agents"]))
def test_gradient_bound_holds_where_inputs_lose_digits(seed, normalize):
    """A gradient with its forward in float32 is within the bound of the one with its forward in float64."""
    args = tame(seed, normalize, 40)
    forward, rng = reference.route(**args), np.random.default_rng(seed)
    given = Tokens(rng.normal(size=forward.tokens.shape), rng.normal(size=forward.lse.shape))
    back = {**args, "gradients": given, "need": RouteGradients._fields}
    rough = Tokens(*(None if a is None else a.astype(np.float32) for a in forward))
    exact = reference.route_backward(forward=forward, **back)
    close = reference.route_backward(forward=rough, **back)
    testing.assert_gradients_close(close, exact, back | {"forward": forward})
    with pytest.raises(AssertionError, match="temperature: 1 of 1 differ"):
        testing.assert_gradients_close(
            exact._replace(temperature=-exact.temperature - 1e3), exact, back | {"forward": forward}
        )


def test_attend_bound_sees_a_wrong_scale():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((6, 2, 8), (2, 5, 2, 8), (2, 5, 2, 3)))
    args = {"q": q, "keys": k, "values": v, "candidate_offsets": np.array([0, 4, 6]), "scale": 0.4, "bias": None}
    expected, limit = reference.attend(**args), bounds.attend_bound(args)
    assert limit.out.max() < 1e-3
    testing.assert_attended_close(Attended(*(a.astype(np.float32) for a in expected)), expected, limit)
    with pytest.raises(AssertionError, match="out: "):
        testing.assert_attended_close(reference.attend(**args | {"scale": 0.401}), expected, limit)
    back = {"d_out": np.ones_like(expected.out), "d_lse": None, "forward": expected, **args}
    gradients = reference.attend_backward(**back)
    testing.assert_gradients_close(gradients, gradients, back)
    assert bounds.attend_backward_bound(back).bias is None
    with pytest.raises(AssertionError, match="keys: "):
        testing.assert_gradients_close(gradients._replace(keys=gradients.keys * 1.01), gradients, back)


# ------------------------------------------------------------------------------------------------------- comparators


def test_codes_are_compared_exactly():
    codes = np.int32([[0, 1], [2, 3]])
    testing.assert_codes_equal(codes, codes.astype(np.int64))
    with pytest.raises(AssertionError, match=r"codes: 1 of 4 differ; first at \[1, 0\]: expected 2, got 5"):
        testing.assert_codes_equal(np.int32([[0, 1], [5, 3]]), codes)
    with pytest.raises(AssertionError, match=r"expected shape \[2, 2\], got \[1, 2\]"):
        testing.assert_codes_equal(codes[:1], codes)
    with pytest.raises(AssertionError, match="expected integers, got float64"):
        testing.assert_codes_equal(codes.astype(float), codes)


@pytest.mark.parametrize("field", Agents._fields)
def test_agents_are_compared_exactly(field):
    prototypes, lists = np.float32([[[0, 0.5]]]), np.int32([[[0], [-1]]])
    agents = Agents(np.int32([[[0, 1]]]), np.array([[3]]), np.int32([1]), 2**63 + 1, prototypes, lists)
    testing.assert_agents_equal(agents, agents)
    with pytest.raises(AssertionError, match=f"^{field}"):
        testing.assert_agents_equal(agents._replace(**{field: getattr(agents, field) + 1}), agents)


def test_prototypes_are_compared_where_both_have_them():
    agents = Agents(np.int32([[[0]]]), np.array([[3]]), np.int32([1]), 1, np.float32([[[0, 0.5]]]))
    without = agents._replace(prototypes=None)
    for mine, expected in ((agents, without), (without, agents), (without, without)):
        testing.assert_agents_equal(mine, expected)
    near = agents._replace(prototypes=np.nextafter(agents.prototypes, np.float32(1)))
    with pytest.raises(AssertionError, match=r"^prototypes: 2 of 2 differ; first at \[0, 0, 0\]"):
        testing.assert_agents_equal(near, agents)
    with pytest.raises(AssertionError, match=r"^prototypes: expected shape \[1, 1, 2\], got \[1, 1, 1\]"):
        testing.assert_agents_equal(agents._replace(prototypes=agents.prototypes[..., :1]), agents)


def test_votes_of_leaf_sums_are_compared_exactly():
    """And a leaf that only votes has a bias of -inf and zeros, to the last digit."""
    book = reference.Codebook([[[0.0], [1.0]]])
    x, weights = np.float32([[np.nan], [1], [3]]), np.array([2**38 + 1, 0, 7])
    args = {"book": book, "histories": hisac.Histories(x, x, np.array([0, 3]), np.int32([[0], [1], [1]]))}
    args["histories"] = args["histories"]._replace(v=np.ones_like(x), weights=weights)
    sums, limit = reference.leaf_sums(**args), bounds.leaf_sums_bound(args)
    testing.assert_leaf_sums_close(sums, sums, limit)
    for field, change, text in (
        ("weights", np.array([1, 0]), r"weights: 1 of 2 differ; first at \[0\]: expected \d+5, got \d+6"),
        ("codes", np.array([[1], [0]]), "codes: 1 of 2 differ"),
        ("bias", np.array([1e30, 0]), r"bias: 1 of 2 differ; first at \[0\]: expected -inf"),
        ("x", np.array([[1e-30], [0]]), "x: 1 of 2 differ"),
        ("v", np.array([[1e-30], [0]]), "v: 1 of 2 differ"),
        ("spread", np.array([1e-30, 0]), "spread: 1 of 2 differ"),
    ):
        wrong = np.nan_to_num(getattr(sums, field), neginf=0.0) + change
        with pytest.raises(AssertionError, match=text):
            testing.assert_leaf_sums_close(sums._replace(**{field: wrong}), sums, limit)
    with pytest.raises(AssertionError, match="weights: expected integers, got float64"):
        testing.assert_leaf_sums_close(sums._replace(weights=sums.weights.astype(float)), sums, limit)


def test_close_knows_what_is_not_a_number():
    one, inf, nan = np.ones(1), np.full(1, np.inf), np.full(1, np.nan)
    testing.assert_close(one, one + 0.5, one, "a")
    testing.assert_close(-inf, -inf, one, "a")
    testing.assert_close(inf, one, inf, "a")
    testing.assert_close(nan, one, nan, "a")
    for mine, expected, bound in (
        (nan, one, inf),
        (inf, one, one),
        (nan, nan, one),
        (one, one * 3, one),
        (inf, -inf, one),
    ):
        with pytest.raises(AssertionError, match=r"a: 1 of 1 differ; first at \[0\]"):
            testing.assert_close(mine, expected, bound, "a")
    with pytest.raises(AssertionError, match="expected nothing"):
        testing.assert_gradients_close(RouteGradients(one, *[None] * 5), RouteGradients(*[None] * 6), BACK)


BACK = {"forward": Tokens(np.zeros((0, 1, 1)), np.zeros((0, 1))), "gradients": Tokens(np.zeros((0, 1, 1)), None)}
BACK |= {"histories": hisac.Histories(np.zeros((0, 1)), np.zeros((0, 1)), np.array([0])), "need": ()}
BACK |= {"agents": np.zeros((0, 1, 1)), "temperature": 0.1}


# ------------------------------------------------------------------------------------------------------ registration


def test_types_are_registered():
    testing._register()
    assert isinstance(find(st.from_type(hisac.Codebook), lambda b: b.levels == 2, settings=SEARCH), hisac.Codebook)


@pytest.mark.parametrize(
    "order", ["import hypothesis, hisac.testing", "import hisac.testing, hypothesis", "import hisac"]
)
def test_any_import_order(order):
    """hypothesis loads the entry point while it, or this module, is itself half loaded."""
    code = f"{order}\nimport sys\nassert ('hisac.testing' in sys.modules) == ('hypothesis' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
