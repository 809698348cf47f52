# SPDX-License-Identifier: Apache-2.0
"""The functions of hisac.torch: their gradients, and what they refuse."""

import importlib
import math

import pytest
from hypothesis import given

from hisac import Histories, reference, testing
from hisac.reference import bounds
from support import by_field

torch = pytest.importorskip("torch")
small = importlib.import_module("small_ranking")  # needs torch
hisac_torch = importlib.import_module("hisac.torch")
OFFSETS, CANDIDATES = small.OFFSETS, small.CANDIDATES
make_book, rows, wanted = small.make_book, small.rows, small.wanted


@pytest.fixture
def book():
    return make_book()


def together(sums):
    """Leaf sums that lie where their users' rows do, as offsets and rows."""
    starts, ends = sums.offsets
    rows = torch.cat([torch.arange(s, e) for s, e in zip(starts, ends, strict=True)] + [torch.zeros(0).long()])
    offsets = torch.cat([torch.zeros(1).long(), (ends - starts).cumsum(0)])
    fields = ((name, getattr(sums, name)[rows]) for name in ("x", "v", "codes", "bias", "spread", "weights"))
    return Histories(**dict(fields), offsets=offsets)


@given(testing.problems())
def test_sums_vote_as_their_behaviours(p):
    """The weights of leaf sums are votes, int64, which `vote` takes as they are."""
    votes = testing.to_torch(p.vote_args(), p.dtype)
    sums = hisac_torch.leaf_sums(p.book, votes["histories"])
    assert sums.weights.dtype == torch.int64
    expected = hisac_torch.vote(**votes)
    for kept in (sums, together(sums)):
        testing.assert_agents_equal(hisac_torch.vote(**votes | {"histories": kept}), expected)


def test_weights_of_every_type(book):
    """Whole numbers are votes, others count relative to the user's largest; in whatever type they come."""
    x, v = rows()
    h = Histories(x, v, OFFSETS, hisac_torch.encode(book, x))
    whole = torch.arange(20) % 7 - 1
    for weights, types in (
        (whole, (torch.int32, torch.int8)),
        (whole * 0.5, (torch.float64, torch.float16, torch.bfloat16)),
        (whole > 0, (torch.bool, torch.uint8)),
    ):
        plain = weights.float() if weights.is_floating_point() else weights.long()
        kept = h._replace(weights=plain)
        agents, sums = hisac_torch.vote(book, kept, budget=3), together(hisac_torch.leaf_sums(book, kept))
        for dtype in types:
            given = h._replace(weights=weights.to(dtype))
            testing.assert_agents_equal(hisac_torch.vote(book, given, budget=3), agents)
            torch.testing.assert_close(together(hisac_torch.leaf_sums(book, given)), sums, rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------- gradients


@given(testing.problems())
def test_functions_meet_the_reference(p):
    args = testing.to_torch(p.route_args(), p.dtype)
    testing.assert_tokens_close(hisac_torch.route(**args), p.reference(), p)
    exact = p.by_reference(p.leaf_args())
    sums = hisac_torch.leaf_sums(**testing.to_torch(p.leaf_args(), p.dtype))
    testing.assert_leaf_sums_close(together(sums), reference.leaf_sums(**exact), bounds.leaf_sums_bound(exact))
    options = {"book": p.book} if p.routed_codes or p.histories.x is None else {}
    found = hisac_torch.missing(args["histories"], **options)
    testing.assert_close(found, reference.missing(p.histories, **p.by_reference(options)), torch.zeros(1), "missing")
    votes = testing.to_torch(p.vote_args())
    testing.assert_agents_equal(hisac_torch.vote(**votes), reference.vote(**p.by_reference(p.vote_args())))
    x = testing.to_torch(p.encode_args(), "float32" if p.histories.x is None else p.dtype)["x"]
    testing.assert_codes_equal(hisac_torch.encode(p.book, x), reference.encode(**p.by_reference(p.encode_args())))


@given(testing.problems(dtypes=("float32",)))
def test_route_gradients_meet_the_reference(p):
    back = p.by_reference(p.backward_args(p.reference()))
    args = testing.to_torch(p.route_args() | {"mean_x": back["gradients"].mean_x is not None})
    fields = args["histories"]._asdict()
    given = args | fields | {"prototypes": args["agents"]}
    names = [name for name in back["need"] if isinstance(given[name], torch.Tensor)]
    for name in names:
        given[name].requires_grad_()
    out = hisac_torch.route(**args)
    back["forward"] = type(out)(*(None if t is None else t.detach().numpy() for t in out))
    pairs = [(t, torch.from_numpy(d)) for t, d in zip(out, back["gradients"], strict=True) if d is not None]
    if not pairs:
        return
    grads = torch.autograd.grad([t for t, _ in pairs], [given[name] for name in names], [d for _, d in pairs])
    mine, back["need"] = dict(zip(names, grads, strict=True)), names
    expected, bound = reference.route_backward(**back), bounds.route_backward_bound(back)
    for name in names:
        testing.assert_close(mine[name], getattr(expected, name), getattr(bound, name), name)


@given(testing.problems(dtypes=("float32",)))
def test_leaf_gradients_meet_the_reference(p):
    args = testing.to_torch(p.leaf_args())
    h = args["histories"]
    h = h._replace(v=wanted(h.v), bias=wanted(torch.zeros(len(h.v)) if h.bias is None else h.bias))
    sums = hisac_torch.leaf_sums(p.book, h)
    whole = together(Histories(*(t.detach() if torch.is_tensor(t) else t for t in sums)))
    back = p.by_reference(p.leaf_backward_args(whole)) | {
        "histories": p.histories._replace(bias=h.bias.detach().numpy())
    }
    gradients = [torch.from_numpy(d) for d in back["gradients"] if d is not None]
    if not gradients:
        return
    outputs = [t for t, d in zip(together(sums), back["gradients"], strict=True) if d is not None]
    mine = torch.autograd.grad(outputs, [h.v, h.bias], gradients, allow_unused=True)
    expected, bound = reference.leaf_sums_backward(**back), bounds.leaf_sums_backward_bound(back)
    for name, grad in zip(("v", "bias"), mine, strict=True):
        zero = torch.zeros(getattr(expected, name).shape)
        testing.assert_close(zero if grad is None else grad, getattr(expected, name), getattr(bound, name), name)


@given(testing.attentions(dtypes=("float32",)) | testing.attentions(dtypes=("float32",), ragged=True))
def test_attend_gradients_meet_the_reference(p):
    args = testing.to_torch(p.attend_args())
    names = [name for name in ("q", "keys", "values", "bias") if args[name] is not None]
    out = hisac_torch.attend(**args | {name: args[name].requires_grad_() for name in names})
    back = p.backward_args(type(out)(*(t.detach() for t in out)))
    outputs = [t for t, d in zip(out, (back["d_out"], back["d_lse"]), strict=True) if d is not None]
    given_ = [torch.from_numpy(d) for d in (back["d_out"], back["d_lse"]) if d is not None]
    mine = torch.autograd.grad(outputs, [args[name] for name in names], given_)
    expected, bound = reference.attend_backward(**back), bounds.attend_backward_bound(back)
    for name, grad in zip(names, mine, strict=True):
        testing.assert_close(grad, getattr(expected, name), getattr(bound, name), name)


def test_strides_do_not_matter(book):
    x, v = rows()
    p, codes, bias = torch.randn(3, 2, 8), hisac_torch.encode(book, x), torch.randn(20)

    def run(change):
        args = [wanted(change(t)) for t in (x, v, p, bias)]
        histories = Histories(args[0], args[1], change(OFFSETS), change(codes), bias=args[3])
        out = hisac_torch.route(histories, args[2], book=book, temperature=5.0)
        out.tokens.backward(change(torch.ones(3, 2, 5)))  # torch's own gradients of sums have strides of 0
        return [out.tokens, out.lse, *(t.grad for t in args)]

    def strided(t):
        wide = torch.stack([t, t], -1)[..., 0]
        assert not wide.is_contiguous()
        return wide

    assert all(map(torch.equal, run(strided), run(torch.clone)))


def test_the_default_dtype_does_not_matter(book):
    x, v = rows()
    expected = hisac_torch.Compressor(book, budget=2, temperature=0.5)(Histories(x, v, OFFSETS))
    torch.set_default_dtype(torch.float64)
    try:
        histories = Histories(x, v, OFFSETS)
        found = hisac_torch.Compressor(book, budget=2, temperature=0.5)(histories)
        tokens = hisac_torch.route(histories, found.agents, temperature=0.5).tokens
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(tokens, expected.tokens, rtol=1e-5, atol=1e-5)


def in_double(function):
    """gradcheck wants float64: a float32 function behind casts, whose finite differences are good to about 1e-3."""
    return lambda *args: tuple(t.double() for t in function(*(a.float() for a in args)))


FINITE = {"eps": 1e-3, "atol": 5e-3, "rtol": 5e-3, "nondet_tol": 0.0}


@pytest.mark.parametrize("normalize", ["history", "agents"])
@pytest.mark.parametrize("taus", [1, 3])
def test_route_gradcheck(normalize, taus):
    g = torch.Generator().manual_seed(3)
    sizes = [(7, 2), (7, 3), (2, 3, 2), (taus,), (7,)]
    x, v, p, tau, bias = (torch.randn(size, generator=g, dtype=torch.float64) for size in sizes)
    x[[2, 5]] = 2.0**51  # absent
    offsets = torch.tensor([0, 4, 7])

    def run(v, p, tau, bias, spread, present):
        x_ = x.float().index_put((torch.tensor([0, 1, 3, 4, 6]),), present)
        options = {"temperature": tau, "normalize": normalize}
        return hisac_torch.route(Histories(x_, v, offsets, bias=bias, spread=spread), p, **options)[:2]

    def mean(p, tau, bias, spread):
        h = Histories(x.float(), None, offsets, bias=bias, spread=spread)
        found = hisac_torch.route(h, p, temperature=tau, normalize=normalize, tokens=False, mean_x=True)
        return found.lse, found.mean_x

    rest = [wanted(t) for t in (p, tau.abs() + 0.5, bias, bias.square() / 4 + 0.1)]
    assert torch.autograd.gradcheck(in_double(run), [wanted(v), *rest, wanted(x[[0, 1, 3, 4, 6]])], **FINITE)
    assert torch.autograd.gradcheck(in_double(mean), rest, **FINITE)


@pytest.mark.parametrize("refine", [0, 1])
@pytest.mark.parametrize("missing", ["drop", "token"])
@pytest.mark.parametrize("method", ["exact", "leaf"])
def test_gradcheck_of_a_compressor(book, method, missing, refine):
    compress = hisac_torch.Compressor(
        book, budget=3, temperature=2.0, normalize="agents", method=method, missing=missing, refine=refine
    )
    x, v = rows()
    x[[3, 9]] = torch.nan
    bias = wanted(torch.linspace(-1, 1, 20).double())
    codes = hisac_torch.encode(book, x)

    def run(v, log_tau, bias):
        h = Histories(x, v, OFFSETS, codes, bias=bias)
        return torch.func.functional_call(compress, {"log_tau": log_tau}, (h,)).tokens[[0, 2]].unbind()

    # refined prototypes are constants, which only v does not move
    inputs = [wanted(v.double()), compress.log_tau.detach().double(), bias.detach()]
    inputs = inputs if refine else [*map(wanted, inputs)]
    assert torch.autograd.gradcheck(in_double(run), inputs, **FINITE)


def test_attend_gradcheck():
    g = torch.Generator().manual_seed(3)
    q, keys, values, bias = (
        wanted(torch.randn(size, generator=g, dtype=torch.float64))
        for size in ((5, 2, 3), (2, 4, 2, 3), (2, 4, 2, 3), (2, 4))
    )

    def run(q, keys, values, bias):
        return hisac_torch.attend(q, keys, values, torch.tensor([0, 2, 5]), bias=bias)

    assert torch.autograd.gradcheck(in_double(run), (q, keys, values, bias), **FINITE)


def test_a_gradient_has_the_type_of_its_input():
    x, v = rows()
    inputs = [wanted(x.bfloat16()), wanted(v.half()), wanted(torch.tensor([0.5], dtype=torch.float64))]
    x, v, tau = inputs
    out = hisac_torch.route(Histories(x, v, OFFSETS), torch.zeros(3, 2, 8), temperature=tau)
    assert (out.tokens.dtype, out.lse.dtype) == (torch.float16, torch.float32)
    (out.tokens.float().sum() + out.lse[[0, 2]].sum()).backward()
    assert [t.grad.dtype for t in inputs] == [t.dtype for t in inputs]


def test_only_lse_and_only_tokens_are_differentiable_alone(book):
    x, v = rows()
    tau, p = wanted(torch.tensor([0.5])), torch.zeros(3, 2, 8)
    out = hisac_torch.route(Histories(x, wanted(v), OFFSETS), p, temperature=tau, normalize="history")
    by_tokens, by_lse = (torch.autograd.grad(t[[0, 2]].sum(), tau, retain_graph=True)[0] for t in out[:2])
    both = torch.autograd.grad(out.tokens[[0, 2]].sum() + out.lse[[0, 2]].sum(), tau)[0]
    assert by_tokens.abs() > 0 and by_lse.abs() > 0
    torch.testing.assert_close(by_tokens + by_lse, both)


def test_refined_prototypes_are_constants(book):
    tau, (x, v) = wanted(torch.tensor([0.5])), map(wanted, rows())
    plain = hisac_torch.compress(book, Histories(x.detach(), v, OFFSETS), budget=2, temperature=0.1)
    out = hisac_torch.compress(book, Histories(x, v, OFFSETS), budget=2, refine=2, temperature=tau)
    used = out.agents.prototypes
    assert not used.requires_grad and not torch.equal(used, plain.agents.prototypes)
    histories = Histories(x.detach(), v.detach(), OFFSETS)
    again = hisac_torch.route(histories, out.agents, temperature=0.5)
    assert torch.equal(again.tokens, out.tokens)
    out.tokens.sum().backward()
    assert x.grad.any() and v.grad.any() and tau.grad.any()
    learnt = wanted(plain.agents.prototypes.clone())
    kept = {"agents": plain.agents._replace(prototypes=learnt), "refine": 2}
    assert not hisac_torch.compress(book, histories, temperature=0.5, **kept).agents.prototypes.requires_grad


def test_leaf_sums_have_gradients_for_v_and_bias_only(book):
    x, v = rows()
    codes = hisac_torch.encode(book, x)
    given = {"x": x, "spread": torch.zeros(20), "x_scale": torch.ones(1)}
    for name, t in given.items():
        h = Histories(x.to(torch.int8) if name == "x_scale" else x, v, OFFSETS, codes)._replace(
            **{name: wanted(t.clone())}
        )
        with pytest.raises(
            NotImplementedError, match=rf"^leaf_sums: {name} has no gradient, expected {name}.detach\(\)"
        ):
            hisac_torch.leaf_sums(book, h)
    sums = hisac_torch.leaf_sums(book, Histories(x, wanted(v), OFFSETS, codes))
    moved = [name for name in ("x", "v", "bias", "spread") if getattr(sums, name).requires_grad]
    assert moved == ["v"]  # nothing else moves with v, and so nothing else is computed
    sums = hisac_torch.leaf_sums(book, Histories(x, v.detach(), OFFSETS, codes, bias=wanted(torch.zeros(20))))
    assert all(getattr(sums, name).requires_grad for name in ("x", "v", "bias", "spread"))


def test_mean_x_has_no_gradient_for_x():
    x, v = rows()
    with pytest.raises(NotImplementedError, match=r"mean_x has no gradient for x, expected x.detach\(\)"):
        hisac_torch.route(Histories(wanted(x), v, OFFSETS), torch.zeros(3, 2, 8), mean_x=True, temperature=0.1)


def test_rows_of_leaf_sums_may_be_stated(book):
    """So that no value decides a shape; too few are refused, more are not written."""
    x, v = rows()
    codes = hisac_torch.encode(book, x)
    pair = Histories(x, v, (OFFSETS[:-1], OFFSETS[1:]), codes)
    counted, stated = hisac_torch.leaf_sums(book, pair), hisac_torch.leaf_sums(book, pair._replace(rows=33))
    assert counted.x.shape == (20, 8) and stated.x.shape == (33, 8)
    torch.testing.assert_close(together(stated), together(counted), rtol=0, atol=0)
    with pytest.raises(ValueError, match="leaf_sums: rows expected at least 20, got 19"):
        hisac_torch.leaf_sums(book, pair._replace(rows=19))


def test_absent_rows_have_no_gradient(book):
    x, v = rows()
    codes, bias = hisac_torch.encode(book, x), torch.zeros(20)
    x[2], codes[9, 1], bias[12], bias[13] = float("nan"), 99, -math.inf, float("nan")
    absent = [2, 9, 12, 13]
    v[absent] = float("nan")
    x, v, bias = wanted(x), wanted(v), wanted(bias)
    histories = Histories(x, v, OFFSETS, codes, bias=bias)
    p = torch.zeros(3, 2, 8)
    out = hisac_torch.route(histories, p, temperature=5.0, normalize="history", book=book)
    (out.tokens.sum() + out.lse[[0, 2]].sum()).backward()
    present = [i for i in range(20) if i not in absent]
    for t in (x, v, bias):
        assert t.grad[absent].count_nonzero() == 0 and (t.grad[present] != 0).any(-1).all()


@pytest.mark.parametrize("name", ["x", "v", "bias", "d_tokens"])
def test_one_users_nan_spoils_nobody_else(book, name):
    def run(spoil):
        x, v = rows()
        args = {"x": x, "v": v, "bias": torch.zeros(20), "d_tokens": torch.ones(3, 4, 5)}
        if spoil:
            args[name][0] = float("nan")
        d_tokens = args.pop("d_tokens")
        args = {key: wanted(a) for key, a in args.items()}
        out = hisac_torch.Compressor(book, budget=4, temperature=5.0)(Histories(**args, offsets=OFFSETS))
        out.tokens.backward(d_tokens)
        per_user = [out.tokens, out.lse, *out.agents[:3], out.agents.prototypes]
        return [a[1:] for a in per_user] + [a.grad[7:] for a in args.values()], out.tokens[0]

    clean, token = run(False)
    spoilt, other = run(True)
    assert all(map(torch.equal, clean, spoilt))
    assert name == "d_tokens" or not torch.equal(token, other)


@pytest.mark.parametrize("options, message", [
    ({}, "vote: expected exactly one of budget, fanout and beam, got 0"),
    ({"budget": 1, "fanout": (1, 1)}, "vote: expected exactly one of budget, fanout and beam, got 2"),
    ({"budget": 0}, "vote: budget expected 1 to 4096, got 0"),
    ({"budget": 10**12}, "vote: budget expected 1 to 4096, got 1000000000000"),
    ({"fanout": (-1, 2)}, "vote: fanout expected one number >= 1 for each of 2 levels"),
    ({"fanout": (2,)}, "vote: fanout expected one number >= 1 for each of 2 levels"),
    ({"fanout": (10**6, 10**6)}, "vote: fanout expected a product of at most 4096, got more"),
    ({"fanout": (1, 1), "beam": (1, 1)}, "vote: expected exactly one of budget, fanout and beam, got 2"),
    ({"beam": (2,)}, "vote: beam expected one number of 1 to 4096 for each of 2 levels"),
    ({"beam": (2, 10**6)}, "vote: beam expected one number of 1 to 4096 for each of 2 levels"),
    ({"budget": 2, "codes": torch.zeros(20, dtype=torch.int32)}, "vote: codes expected int32 [T, L], got int32 [20]"),
    ({"budget": 2, "weights": torch.zeros(3)}, "vote: weights expected [20], got [3]"),
])  # fmt: skip
def test_vote_refuses(book, options, message):
    args = {"codes": torch.zeros(20, 2, dtype=torch.int32), "offsets": OFFSETS} | options
    with pytest.raises(ValueError) as error:
        by_field(hisac_torch.vote)(book, **args)
    assert str(error.value) == message


@pytest.mark.parametrize("options, kind, message", [
    ({"x": torch.zeros(8)}, ValueError, "route: x expected float32, bfloat16, float16 or int8 [T, D], got float32 [8]"),
    ({"v": torch.zeros(20)}, ValueError, "route: v expected float32, bfloat16 or float16 [T, V], got float32 [20]"),
    ({"v": torch.zeros(7, 5)}, ValueError, "route: x is [20, 8], v is [7, 5]: T differs (20, 7)"),
    ({"v": torch.zeros(20, 5).double()}, TypeError,
     "route: v expected float32, bfloat16 or float16 [T, V], got float64 [20, 5]"),
    ({"agents": torch.zeros(8)}, ValueError, "route: prototypes expected float32 [B, M, D], got float32 [8]"),
    ({"agents": torch.zeros(3, 2, 9)}, ValueError,
     "route: prototypes is [3, 2, 9], x is [20, 8]: D differs (9, 8)"),
    ({"count": torch.ones(3).long()}, TypeError, "route: count expected int32 [B], got int64 [3]"),
    ({"temperature": 0.0}, ValueError, "route: temperature expected finite and > 0, got 0.0"),
    ({"temperature": torch.ones(3)}, ValueError, "route: temperature expected [1] or [2], got [3]"),
    ({"offsets": torch.tensor([0, 9, 7, 20])}, ValueError,
     "route: offsets expected 0 <= start <= end <= 20 for every user, got [9, 7) for user 1"),
])  # fmt: skip
def test_route_refuses(options, kind, message):
    args = {"x": torch.zeros(20, 8), "v": torch.zeros(20, 5), "offsets": OFFSETS, "agents": torch.zeros(3, 2, 8)}
    with pytest.raises(kind) as error:
        by_field(hisac_torch.route)(**{"temperature": 0.1} | args | options)
    assert str(error.value) == message


@pytest.mark.parametrize("change, text", [
    ({"budget": 2.7}, "vote: budget expected a whole number, got 2.7"),
    ({"fanout": (2, 1.5), "budget": None}, "vote: fanout expected a whole number, got 1.5"),
    ({"beam": (2, 1.5), "budget": None}, "vote: beam expected a whole number, got 1.5"),
    ({"refine": 1.5}, "compress: refine expected a whole number, got 1.5"),
    ({"temperature": "x"}, "route: temperature expected a number or a tensor, got str"),
])  # fmt: skip
def test_arguments_of_a_wrong_kind_are_named(book, change, text):
    """They were cut, or failed in torch's words."""
    histories = Histories(*rows(), OFFSETS)
    with pytest.raises(TypeError) as error:
        hisac_torch.compress(book, histories, **{"budget": 2, "temperature": 0.1, **change})
    assert str(error.value) == text
    with pytest.raises(TypeError):
        hisac_torch.Compressor(book, **{"budget": 2, "temperature": 0.1, **change})


def test_a_temperature_without_dimensions():
    x, v = rows()
    tau = wanted(torch.tensor(0.5))
    found, expected = (
        hisac_torch.route(Histories(x, v, OFFSETS), torch.zeros(3, 2, 8), temperature=t, normalize="history")
        for t in (tau, 0.5)
    )
    assert torch.equal(found.lse, expected.lse)
    found.lse[[0, 2]].sum().backward()
    assert tau.grad.shape == () and tau.grad != 0


def test_agents_of_another_codebook_are_refused(book):
    codes = hisac_torch.encode(book, rows()[0])
    agents = hisac_torch.vote(book, Histories(codes=codes, offsets=OFFSETS), budget=2)
    with pytest.raises(ValueError, match=f"{book.fingerprint:016x}"):
        hisac_torch.prototypes(make_book(1), agents)
