# SPDX-License-Identifier: Apache-2.0
"""hisac.torch, functions and operators: gradients, opcheck, codebooks by fingerprint, torch's transforms."""

import gc
import importlib
import math
import re

import pytest
from hypothesis import given

import hisac
from hisac import Histories, reference, testing
from hisac.reference import bounds
from hisac.types import RouteGradients
from support import by_field

torch = pytest.importorskip("torch")
small = importlib.import_module("small_ranking")  # needs torch
hisac_torch = importlib.import_module("hisac.torch")
ops = torch.ops.hisac
OFFSETS, CANDIDATES = small.OFFSETS, small.CANDIDATES
make_book, rows, wanted = small.make_book, small.rows, small.wanted


@pytest.fixture
def book():
    return make_book()


# ----------------------------------------------------------------------------------------------------------- gradients


@given(testing.problems())
def test_functions_meet_the_reference(p):
    args = testing.to_torch(p.route_args(), p.dtype)
    testing.assert_tokens_close(hisac_torch.route(**args), p.reference(), p)
    votes = testing.to_torch(p.vote_args())
    testing.assert_agents_equal(hisac_torch.vote(**votes), reference.vote(**p.by_reference(p.vote_args())))
    x = testing.to_torch(p.encode_args(), "float32" if p.histories.x is None else p.dtype)["x"]
    testing.assert_codes_equal(hisac_torch.encode(p.book, x), reference.encode(**p.by_reference(p.encode_args())))


@given(testing.problems(dtypes=("float32",)))
def test_route_gradients_meet_the_reference(p):
    args = testing.to_torch(p.route_args())
    given = args | args["histories"]._asdict()
    names = ["v", "temperature"] if p.method == "leaf" else ["v", "temperature", "bias", "x", "prototypes"]
    names = [name for name in names if isinstance(given[name], torch.Tensor)]
    if p.refine and "prototypes" in names:
        names.remove("prototypes")
    for name in names:
        given[name].requires_grad_()
    out = hisac_torch.route(**args)
    back = p.by_reference(p.backward_args(type(out)(*(t.detach() for t in out)))) | {"need": names}
    outputs = [t for t, d in zip(out, (back["d_tokens"], back["d_lse"]), strict=False) if d is not None]
    given_ = [torch.from_numpy(d) for d in (back["d_tokens"], back["d_lse"]) if d is not None]
    mine = dict(zip(names, torch.autograd.grad(outputs, [given[name] for name in names], given_), strict=True))
    expected, bound = reference.route_backward(**back), bounds.route_backward_bound(back)
    for name in RouteGradients._fields:
        if name in names:
            testing.assert_close(mine[name], getattr(expected, name), getattr(bound, name), name)


@given(testing.attentions(dtypes=("float32",)))
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
        tokens = hisac_torch.route(histories, found.prototypes, count=found.agents.count, temperature=0.5).tokens
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(tokens, expected.tokens, rtol=1e-5, atol=1e-5)


def in_double(function):
    """gradcheck wants float64: a float32 function behind casts, whose finite differences are good to about 1e-3."""
    return lambda *args: tuple(t.double() for t in function(*(a.float() for a in args)))


FINITE = {"eps": 1e-3, "atol": 5e-3, "rtol": 5e-3, "nondet_tol": 0.0}


@pytest.mark.parametrize("normalize", ["history", "agents"])
@pytest.mark.parametrize("missing", ["drop", "token"])
@pytest.mark.parametrize("taus", [1, 3])
def test_route_gradcheck(normalize, missing, taus):
    g = torch.Generator().manual_seed(3)
    sizes = [(7, 2), (7, 3), (2, 3, 2), (taus,), (7,)]
    x, v, p, tau, bias = (torch.randn(size, generator=g, dtype=torch.float64) for size in sizes)
    x[[2, 5]] = 2.0**51  # absent
    offsets = torch.tensor([0, 4, 7])

    def run(v, p, tau, bias, present):
        x_ = x.float().index_put((torch.tensor([0, 1, 3, 4, 6]),), present)
        options = {"temperature": tau, "normalize": normalize, "missing": missing}
        return hisac_torch.route(Histories(x_, v, offsets, bias=bias), p, **options)[:2]

    inputs = [wanted(t) for t in (v, p, tau.abs() + 0.5, bias, x[[0, 1, 3, 4, 6]])]
    assert torch.autograd.gradcheck(in_double(run), inputs, **FINITE)


@pytest.mark.parametrize("method", ["exact", "leaf"])
def test_gradcheck_of_a_compressor(book, method):
    compress = hisac_torch.Compressor(book, budget=3, temperature=2.0, method=method)
    x, v = rows()

    def run(v, log_tau):
        return (
            torch.func.functional_call(compress, {"log_tau": log_tau}, (Histories(x, v, OFFSETS),))
            .tokens[[0, 2]]
            .unbind()
        )

    assert torch.autograd.gradcheck(in_double(run), [wanted(v.double()), wanted(compress.log_tau.double())], **FINITE)


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
    out = hisac_torch.route(Histories(x, wanted(v), OFFSETS), p, temperature=tau)
    by_tokens, by_lse = (torch.autograd.grad(t[[0, 2]].sum(), tau, retain_graph=True)[0] for t in out[:2])
    both = torch.autograd.grad(out.tokens[[0, 2]].sum() + out.lse[[0, 2]].sum(), tau)[0]
    assert by_tokens.abs() > 0 and by_lse.abs() > 0
    torch.testing.assert_close(by_tokens + by_lse, both)


def test_refined_prototypes_are_constants():
    x, v = rows()
    p = torch.randn(3, 2, 8)
    out = hisac_torch.route(Histories(x, wanted(v), OFFSETS), p, refine=2)
    assert not out.prototypes.requires_grad and not torch.equal(out.prototypes, p)
    again = hisac_torch.route(Histories(x, v, OFFSETS), out.prototypes)
    assert torch.equal(again.tokens, out.tokens) and again.prototypes is out.prototypes
    with pytest.raises(NotImplementedError, match="refine > 0 has no gradient for prototypes"):
        hisac_torch.route(Histories(x, v, OFFSETS), wanted(p), refine=1)


@pytest.mark.parametrize("name", ["x", "bias", "prototypes"])
def test_leaf_has_gradients_for_v_and_temperature_only(book, name):
    x, v = rows()
    args = {"x": x, "bias": torch.zeros(20), "prototypes": torch.zeros(3, 2, 8)}
    args[name] = wanted(args[name])
    with pytest.raises(NotImplementedError, match="method='leaf' has gradients for v and temperature only"):
        codes = hisac_torch.encode(book, x.detach())
        by_field(hisac_torch.route)(v=v, offsets=OFFSETS, codes=codes, book=book, method="leaf", **args)


def test_absent_rows_have_no_gradient(book):
    x, v = rows()
    codes, bias = hisac_torch.encode(book, x), torch.zeros(20)
    x[2], codes[9, 1], bias[12], bias[13] = float("nan"), 99, -math.inf, float("nan")
    absent = [2, 9, 12, 13]
    v[absent] = float("nan")
    x, v, bias = wanted(x), wanted(v), wanted(bias)
    histories = Histories(x, v, OFFSETS, codes, bias=bias)
    out = hisac_torch.route(histories, torch.zeros(3, 2, 8), temperature=5.0, book=book)
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
        per_user = [out.tokens, out.lse, out.prototypes, *out.agents[:3]]
        return [a[1:] for a in per_user] + [a.grad[7:] for a in args.values()], out.tokens[0]

    clean, token = run(False)
    spoilt, other = run(True)
    assert all(map(torch.equal, clean, spoilt))
    assert name == "d_tokens" or not torch.equal(token, other)


@pytest.mark.parametrize("options, message", [
    ({}, "vote: expected either budget or fanout, got neither"),
    ({"budget": 1, "fanout": (1, 1)}, "vote: expected either budget or fanout, got both"),
    ({"budget": 0}, "vote: budget expected 1 to 4096, got 0"),
    ({"budget": 10**12}, "vote: budget expected 1 to 4096, got 1000000000000"),
    ({"fanout": (-1, 2)}, "vote: fanout expected one number >= 1 for each of 2 levels"),
    ({"fanout": (2,)}, "vote: fanout expected one number >= 1 for each of 2 levels"),
    ({"fanout": (10**6, 10**6)}, "vote: fanout expected a product of at most 4096, got more"),
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
    ({"prototypes": torch.zeros(8)}, ValueError, "route: prototypes expected float32 [B, M, D], got float32 [8]"),
    ({"prototypes": torch.zeros(3, 2, 9)}, ValueError,
     "route: prototypes is [3, 2, 9], x is [20, 8]: D differs (9, 8)"),
    ({"count": torch.ones(3).long()}, TypeError, "route: count expected int32 [B], got int64 [3]"),
    ({"temperature": 0.0}, ValueError, "route: temperature expected finite and > 0, got 0.0"),
    ({"temperature": torch.ones(3)}, ValueError, "route: temperature expected [1] or [2], got [3]"),
    ({"offsets": torch.tensor([0, 9, 7, 20])}, ValueError,
     "route: offsets expected 0 <= start <= end <= 20 for every user, got [9, 7) for user 1"),
])  # fmt: skip
def test_route_refuses(options, kind, message):
    args = {"x": torch.zeros(20, 8), "v": torch.zeros(20, 5), "offsets": OFFSETS, "prototypes": torch.zeros(3, 2, 8)}
    with pytest.raises(kind) as error:
        by_field(hisac_torch.route)(**args | options)
    assert str(error.value) == message


def test_agents_of_another_codebook_are_refused(book):
    codes = hisac_torch.encode(book, rows()[0])
    agents = hisac_torch.vote(book, Histories(codes=codes, offsets=OFFSETS), budget=2)
    with pytest.raises(ValueError, match=f"{book.fingerprint:016x}"):
        hisac_torch.prototypes(make_book(1), agents)


# ------------------------------------------------------------------------------------------------------------ operators


def operator_calls(book):
    """Every operator with arguments that use all its inputs."""
    name, (x, v) = hisac_torch.register(book), rows()
    codes, spans = hisac_torch.encode(book, x), (OFFSETS[:-1], OFFSETS[1:])
    bias, spread, tau = torch.linspace(-1, 1, 20), torch.rand(20), torch.tensor([0.7])
    ids, scale = torch.arange(20) % 9 - 1, torch.tensor([0.1])

    def batch(
        x=x, v=v, spans=spans, codes=codes, x_ids=None, v_ids=None, x_scale=None, bias=bias, spread=spread, weights=None
    ):
        return x, v, *spans, codes, x_ids, v_ids, x_scale, bias, spread, weights

    def voted(**fields):
        return batch(x=None, v=None, bias=None, spread=None, **fields)

    agents = ops.vote(name, *voted(), 4, [])
    p, count = ops.prototypes(name, agents[0]), agents[2]
    to, agents_mode = (p, count, tau), ("agents", "exact", "token", "float32", 0)
    learnt = batch(wanted(x), wanted(v), bias=wanted(bias)), (wanted(p), count, wanted(tau))
    tokens, lse, _ = ops.route(name, *batch(), *to, *agents_mode, False)
    constant = batch(x, wanted(v), bias=None, spread=None), (p, count, wanted(tau))
    tables = {"x_ids": ids, "v_ids": ids.int()}
    back = (tokens, lse, tokens, lse), ("agents", "exact", "token", "bfloat16", 0)
    some, every = [True, True, False, False, True], [True] * 5
    q, keys, values = torch.randn(9, 2, 4), torch.randn(3, 5, 2, 4), torch.randn(3, 5, 2, 3)
    attention, sharpness = (q, keys, values, CANDIDATES, torch.randn(3, 5)), 0.5
    out, out_lse = ops.attend(*attention, sharpness)
    halves, plain = tuple(t.int() for t in spans), ("drop", "bfloat16", 0, False)
    int8 = batch(x.to(torch.int8), wanted(v), bias=wanted(bias), x_scale=scale, **tables)
    return {
        "encode": (name, x),
        "vote budget": (name, *voted(), 4, []),
        "vote fanout": (name, *voted(spans=halves, weights=torch.rand(20)), 0, [2, 3]),
        "prototypes": (name, agents[0]),
        "route": (name, *learnt[0], *learnt[1], *agents_mode, False),
        "route refine": (name, *learnt[0], p, *learnt[1][1:], "history", "exact", "token", "float32", 2, False),
        "route leaf": (name, *constant[0], *constant[1], "agents", "leaf", *plain),
        "route codes": (
            name,
            *batch(None, wanted(v), bias=None, spread=None),
            p,
            None,
            wanted(tau),
            "history",
            "exact",
            *plain,
        ),
        "route gathered": (
            name,
            *batch(wanted(x), wanted(v), bias=wanted(bias), **tables),
            *learnt[1],
            *agents_mode,
            False,
        ),
        "route int8": (name, *int8, *to, "history", "exact", "token", "float32", 0, False),
        "route_backward": (*back[0], every, name, *batch(), *to, *back[1]),
        "route_backward gathered": (*back[0], every, name, *batch(**tables), *to, *back[1]),
        "sum_rows": (v, torch.tensor([3, 1, 19]), torch.tensor([0, 2, 2, 3])),
        "route_backward some": (tokens, None, tokens, lse, some, name, *batch(), *to, *back[1]),
        "attend": (*map(wanted, attention[:3]), CANDIDATES, wanted(attention[4]), sharpness),
        "attend_backward": (out, out_lse, out, out_lse, *attention, sharpness),
        "attend_backward plain": (out, None, out, out_lse, *attention[:4], None, sharpness),
    }


@pytest.mark.parametrize("call", operator_calls(make_book()))
def test_opcheck(book, call):
    torch.library.opcheck(getattr(ops, call.split()[0]).default, operator_calls(book)[call])


def test_every_operator_is_checked(book):
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("hisac::")}
    assert registered == {call.split()[0] for call in operator_calls(book)}


def test_compiled_functions_follow_their_codebook():
    torch.compiler.reset()
    x, _ = rows()

    def codes(book):
        found = hisac_torch.encode(book, x)
        agents = hisac_torch.vote(book, Histories(codes=found, offsets=OFFSETS), budget=3)
        return found, hisac_torch.prototypes(book, agents)

    compiled = torch.compile(codes, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        assert all(map(torch.equal, compiled(make_book(seed)), codes(make_book(seed))))


@pytest.mark.parametrize("first", [0, 1])
def test_a_codebook_is_known_while_any_copy_lives(first):
    books, (x, _) = [make_book(23), make_book(23)], rows()
    name, same = map(hisac_torch.register, books)
    codes = hisac_torch.encode(books[0], x)
    assert name == same
    del books[first]
    gc.collect()
    assert torch.equal(ops.encode(name, x), codes)
    books.clear()
    gc.collect()
    with pytest.raises(LookupError, match=r"call hisac.torch.register\(book\) and keep the book"):
        ops.encode(name, x)


def test_a_backward_keeps_its_codebook():
    book, (x, v) = make_book(29), rows()
    v = wanted(v)
    codes = hisac_torch.encode(book, x)
    out = hisac_torch.route(Histories(None, v, OFFSETS, codes), torch.zeros(3, 2, 8), book=book)
    del book
    gc.collect()
    out.tokens.sum().backward()
    assert v.grad[:, 0].sum() == pytest.approx(4.0, rel=1e-5)  # two agents of two users, weights that sum to 1


def double_backward(function, inputs, graph):
    (grad,) = torch.autograd.grad(function(), inputs[0], create_graph=True)
    (grad.sum() if graph == "linear" else grad.square().sum()).backward()


@pytest.mark.parametrize("graph", ["linear", "square"])
def test_double_backward_raises(graph):
    """The gradients of sums depend on saved tensors only: `once_differentiable` would be silent there."""
    x, v = rows()
    v, tau, q = wanted(v), wanted(torch.tensor([0.5])), torch.randn(9, 2, 4, requires_grad=True)
    keys, p = wanted(torch.randn(3, 5, 2, 4)), torch.zeros(3, 2, 8)
    cases = {
        (v, tau): lambda: hisac_torch.route(Histories(x, v, OFFSETS), p, temperature=tau).tokens.sum(),
        (q, keys): lambda: hisac_torch.attend(q, keys, keys, CANDIDATES).out.sum(),
    }
    for inputs, function in cases.items():
        with pytest.raises(NotImplementedError, match="double backward is not supported"):
            double_backward(function, inputs, graph)


def test_forward_mode_raises():
    x, v = rows()
    q, keys, tau = torch.randn(9, 2, 4), torch.randn(3, 5, 2, 4), torch.tensor([0.5])
    p = torch.zeros(3, 2, 8)
    cases = [
        (lambda v: hisac_torch.route(Histories(x, v, OFFSETS), p).tokens, v),
        (lambda x: hisac_torch.route(Histories(x, v, OFFSETS), p).lse, x),
        (lambda tau: hisac_torch.route(Histories(x, v, OFFSETS), p, temperature=tau).lse, tau),
        (lambda q: hisac_torch.attend(q, keys, keys, CANDIDATES).lse, q),
    ]
    for function, at in cases:
        with pytest.raises(NotImplementedError, match="forward-mode differentiation is not supported"):
            torch.func.jvp(function, (at,), (torch.ones_like(at),))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
            function(torch.autograd.forward_ad.make_dual(at, torch.ones_like(at)))
        with pytest.raises(RuntimeError, match="functorch transforms"):
            torch.func.grad(lambda *a, function=function: function(*a).sum())(at)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_goes_one_by_one_and_is_right(book):
    x, v = rows()
    many, compress = torch.stack([v, 2 * v]), hisac_torch.Compressor(book, budget=4)
    one_by_one = torch.stack([compress(Histories(x, one, OFFSETS)).tokens for one in many])
    assert torch.equal(torch.vmap(lambda v: compress(Histories(x, v, OFFSETS)).tokens)(many), one_by_one)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_jagged_tensors(book):
    x, v = rows()
    nested_x = torch.nested.nested_tensor_from_jagged(x, OFFSETS)
    nested_v = torch.nested.nested_tensor_from_jagged(wanted(v), OFFSETS)
    compress = hisac_torch.Compressor(book, budget=4)
    expected = compress(Histories(x, v, OFFSETS))
    for h in (Histories(nested_x, nested_v), Histories(x, nested_v), Histories(nested_x, v), Histories(x, v, OFFSETS)):
        torch.testing.assert_close(compress(h), expected, rtol=0, atol=0)
    holes = torch.nested.nested_tensor_from_jagged(v, OFFSETS, lengths=torch.tensor([5, 0, 1]))
    spans = OFFSETS[:-1], OFFSETS[:-1] + torch.tensor([5, 0, 1])
    torch.testing.assert_close(compress(Histories(x, holes)), compress(Histories(x, v, spans)), rtol=0, atol=0)
    q, keys = torch.randn(9, 2, 4), torch.randn(3, 5, 2, 4)
    nested_q = torch.nested.nested_tensor_from_jagged(q, CANDIDATES)
    expected = hisac_torch.attend(q, keys, keys, CANDIDATES)
    torch.testing.assert_close(hisac_torch.attend(nested_q, keys, keys, None), expected, rtol=0, atol=0)
    for wrong, got in (
        (v, "got no offsets, expected them, or a jagged nested tensor"),
        (
            torch.nested.nested_tensor([v]),
            "got a strided nested tensor, expected a jagged nested tensor, or its values()",
        ),
    ):
        with pytest.raises(TypeError, match=re.escape(got)):
            compress(Histories(x, wrong))


@pytest.mark.parametrize("face", ["encode", "route", "attend"])
def test_the_functions_outside_torch_refuse_tensors_with_gradients(book, face):
    x, v = rows()
    q = torch.randn(9, 2, 4)
    calls = {
        "encode": ("x", lambda: hisac.encode(book, wanted(x))),
        "route": ("v", lambda: hisac.route(Histories(x, wanted(v), OFFSETS), torch.zeros(3, 2, 8))),
        "attend": ("q", lambda: hisac.attend(wanted(q), torch.ones(3, 5, 2, 4), torch.ones(3, 5, 2, 4), CANDIDATES)),
    }
    name, call = calls[face]
    with pytest.raises(TypeError) as error:
        call()
    expected = f"{face}: {name} requires grad, which hisac.{face} would cut; use hisac.torch, or detach()"
    assert str(error.value) == expected
