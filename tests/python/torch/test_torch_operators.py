# SPDX-License-Identifier: Apache-2.0
"""The operators torch.ops.hisac: opcheck, codebooks by fingerprint, torch's transforms, jagged tensors."""

import gc
import importlib
import re

import pytest

import hisac
from hisac import Histories

torch = pytest.importorskip("torch")
small = importlib.import_module("small_ranking")  # needs torch
hisac_torch = importlib.import_module("hisac.torch")
ops = torch.ops.hisac
OFFSETS, CANDIDATES = small.OFFSETS, small.CANDIDATES
make_book, rows, wanted = small.make_book, small.rows, small.wanted


@pytest.fixture
def book():
    return make_book()


def operator_calls(book):
    """Every operator with arguments that use all its inputs."""
    name, (x, v) = hisac_torch.register(book), rows()
    codes, spans = hisac_torch.encode(book, x), (OFFSETS[:-1], OFFSETS[1:])
    bias, spread, tau = torch.linspace(-1, 1, 20), torch.rand(20), torch.tensor([0.7])
    ids, scale = torch.arange(20) % 9 - 1, torch.tensor([0.1])

    def batch(
        x=x, v=v, spans=spans, codes=codes, x_ids=None, v_ids=None, x_scale=None, bias=bias, spread=spread,
        weights=None, longest=None, rows=None,
    ):  # fmt: skip
        return x, v, *spans, codes, x_ids, v_ids, x_scale, bias, spread, weights, longest, rows

    def voted(**fields):
        return batch(x=None, v=None, bias=None, spread=None, **fields)

    agents = ops.vote(name, *voted(), 4, [], [])
    p, count = agents[3], agents[2]
    to, agents_mode = (p, count, None, None, tau), ("agents", 0, "float32")
    learnt = (
        batch(wanted(x), wanted(v), bias=wanted(bias), spread=wanted(spread)),
        (wanted(p), count, None, None, wanted(tau)),
    )
    lists = ops.agent_lists(name, p, count, 1)
    few = (wanted(p), count, agents[0], lists, wanted(tau)), ("agents", 1, "float32")
    returned = ops.route(name, *batch(), *to, *agents_mode, True, True, [False] * 2)
    tables, listed = {"x_ids": ids, "v_ids": ids.int()}, torch.tensor([3, 1, 19, 40])
    some, every = [False, True, True, False, False, True], [True] * 6
    q, keys, values = torch.randn(9, 2, 4), torch.randn(3, 5, 2, 4), torch.randn(3, 5, 2, 3)
    attention, sharpness = (q, keys, values, CANDIDATES, torch.randn(3, 5)), (None, 0, 0.5)
    out, out_lse = ops.attend(*attention, *sharpness)
    joined = [t.flatten(0, 1) for t in (keys, values)], torch.randn(15), torch.tensor([1, 4, 4, 14]), 11, 0.5
    joined_out = ops.attend(q, *joined[0], CANDIDATES, *joined[1:])
    halves, tokens_only = tuple(t.int() for t in spans), (True, False, [False] * 2)
    int8 = batch(x.to(torch.int8), wanted(v), bias=wanted(bias), x_scale=scale, **tables)
    moving = (
        batch(x, wanted(v), bias=wanted(bias), rows=20),
        batch(x, wanted(v), bias=None, spread=None, longest=20, rows=25, **tables),
    )
    counts = torch.arange(20) % 3
    sums = ops.leaf_sums(name, *batch(weights=counts, rows=20), False)
    d_sums = sums[0], sums[1], sums[5], sums[6]
    rounded = (*to, "agents", 0, "bfloat16")
    asked, of_table = codes[[0, 3, 3, 9, 0, 11, 12, 19, 9]], torch.tensor([0, 3, 3, 9, -1, 11, 12, 19, 40])
    own = sums[2], sums[3], sums[4]
    matching = (sums[1], *own, sums[5], asked, None, CANDIDATES)
    d_match = torch.randn(9, 2, 5), torch.randn(9, 2)
    return {
        "encode": (name, x),
        "vote budget": (name, *voted(), 4, [], []),
        "vote fanout": (name, *voted(spans=halves, weights=torch.rand(20)), 0, [2, 3], []),
        "vote beam": (name, *voted(weights=counts), 0, [], [2, 3]),
        "vote table": (name, *batch(x_ids=ids, weights=counts), 4, [], []),
        "prototypes": (name, agents[0]),
        "missing": (name, *batch()),
        "missing table": (None, *batch(codes=None, **tables)),
        "leaf_sums": (name, *moving[0], False),
        "leaf_sums table": (name, *moving[1], False),
        "leaf_sums of votes": (name, *batch(x, wanted(v), weights=counts, rows=20), False),
        "leaf_sums of weights": (name, *batch(x, wanted(v), weights=torch.rand(20), rows=20), False),
        "leaf_sums_backward": (name, *batch(), *sums, *d_sums, [True, True], None),
        "leaf_sums_backward table": (name, *batch(**tables), *sums, *d_sums, [True, True], None),
        "leaf_sums_backward listed": (name, *batch(**tables), *sums, *d_sums, [True, False], listed),
        "leaf_sums_backward some": (name, *batch(), *sums, None, sums[1], None, None, [True, False], None),
        "agent_lists": (name, p, count, 2),
        "route sparse": (name, *learnt[0], *few[0], *few[1], *tokens_only),
        "route_backward sparse": (
            name, *batch(), p, count, agents[0], lists, tau, *few[1], *returned, returned[0], returned[1], None, every,
            None, None,
        ),
        "route": (name, *learnt[0], *learnt[1], *agents_mode, *tokens_only),
        "route means": (name, *batch(bias=wanted(bias)), *learnt[1], "history", 0, "float32", False, True, [False] * 2),
        "route both": (name, *batch(v=wanted(v), bias=wanted(bias)), *learnt[1], *agents_mode, True, True, [False] * 2),
        "route without v": (None, *batch(v=None), p, *[None] * 3, wanted(tau), *agents_mode, False, True, [False] * 2),
        "route codes": (
            name, *batch(None, wanted(v), bias=None), p, *[None] * 3, wanted(tau), "history", 0, "bfloat16",
            *tokens_only,
        ),
        "route gathered": (
            name, *batch(wanted(x), wanted(v), bias=wanted(bias), **tables), *learnt[1], *agents_mode, *tokens_only
        ),
        "route int8": (name, *int8, *to, "history", 0, "float32", *tokens_only),
        "route_backward": (name, *batch(), *rounded, *returned, returned[0], returned[1], None, every, None, None),
        "route_backward means": (
            name, *batch(), *rounded, *returned, None, None, returned[2], [False, *every[1:]], None, None
        ),
        "route_backward gathered": (
            name, *batch(**tables), *rounded, *returned, returned[0], returned[1], None, every, None, None
        ),
        "route_backward listed": (
            name, *batch(**tables), *rounded, *returned, returned[0], returned[1], None, every, listed, listed[:0]
        ),
        "route_backward some": (name, *batch(), *rounded, *returned, returned[0], None, None, some, None, None),
        "attend": (*map(wanted, attention[:3]), CANDIDATES, wanted(attention[4]), *sharpness),
        "attend_backward": (out, out_lse, out, out_lse, *attention, *sharpness),
        "attend offsets": (wanted(q), *map(wanted, joined[0]), CANDIDATES, wanted(joined[1]), *joined[2:]),
        "attend_backward offsets": (*joined_out, *joined_out, q, *joined[0], CANDIDATES, *joined[1:]),
        "match": (name, wanted(sums[1]), *own, wanted(sums[5]), asked, None, CANDIDATES),
        "match table": (name, wanted(sums[1]).bfloat16(), *own, None, codes, of_table, CANDIDATES.int()),
        "match_backward": (name, *matching, *d_match, [True, True]),
        "match_backward some": (name, *matching, d_match[0], None, [False, True]),
        "match_backward table": (
            name, *matching[:5], codes, of_table.int(), CANDIDATES, None, d_match[1], [True, False]
        ),
        "repeat_count": (torch.arange(20) % 5, OFFSETS[:-1], OFFSETS[1:], of_table % 5, CANDIDATES.int()),
        "attend_backward plain": (out, None, out, out_lse, *attention[:4], None, *sharpness),
    }  # fmt: skip


@pytest.mark.parametrize("call", operator_calls(make_book()))
def test_opcheck(book, call):
    name = call.split()[0]
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "leaf_sums":  # whose results hold rows that are not written, so that no two runs compare
        utils.pop()  # test_compositions_trace_in_one_graph traces it
    torch.library.opcheck(getattr(ops, name).default, operator_calls(book)[call], test_utils=utils)


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
    out = hisac_torch.route(Histories(None, v, OFFSETS, codes), torch.zeros(3, 2, 8), book=book, temperature=0.1)
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
    keys, p, codes = wanted(torch.randn(3, 5, 2, 4)), torch.zeros(3, 2, 8), torch.zeros(20, 2, dtype=torch.int32)
    cases = {
        (v, tau): lambda: hisac_torch.route(Histories(x, v, OFFSETS), p, temperature=tau).tokens.sum(),
        (q, keys): lambda: hisac_torch.attend(q, keys, keys, CANDIDATES).out.sum(),
        (v,): lambda: hisac_torch.match(make_book(), Histories(None, v, OFFSETS, codes), codes, OFFSETS).v.sum(),
    }
    for inputs, function in cases.items():
        with pytest.raises(NotImplementedError, match="double backward is not supported"):
            double_backward(function, inputs, graph)


def test_forward_mode_raises():
    x, v = rows()
    q, keys, tau = torch.randn(9, 2, 4), torch.randn(3, 5, 2, 4), torch.tensor([0.5])
    p, codes = torch.zeros(3, 2, 8), torch.zeros(20, 2, dtype=torch.int32)
    cases = [
        (lambda v: hisac_torch.route(Histories(x, v, OFFSETS), p, temperature=0.1).tokens, v),
        (lambda x: hisac_torch.route(Histories(x, v, OFFSETS), p, temperature=0.1).lse, x),
        (lambda tau: hisac_torch.route(Histories(x, v, OFFSETS), p, temperature=tau).lse, tau),
        (lambda q: hisac_torch.attend(q, keys, keys, CANDIDATES).lse, q),
        (lambda v: hisac_torch.match(make_book(), Histories(None, v, OFFSETS, codes), codes, OFFSETS).v, v),
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
    many, compress = torch.stack([v, 2 * v]), hisac_torch.Compressor(book, budget=4, temperature=0.1)
    one_by_one = torch.stack([compress(Histories(x, one, OFFSETS)).tokens for one in many])
    assert torch.equal(torch.vmap(lambda v: compress(Histories(x, v, OFFSETS)).tokens)(many), one_by_one)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_jagged_tensors(book):
    x, v = rows()
    nested_x = torch.nested.nested_tensor_from_jagged(x, OFFSETS)
    nested_v = torch.nested.nested_tensor_from_jagged(wanted(v), OFFSETS)
    compress = hisac_torch.Compressor(book, budget=4, temperature=0.1)
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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_jagged_tensors_of_other_rows_are_refused(book):
    """Their values were paired one by one, whatever their lengths said: no test had two structures."""
    x, v = rows(n=8)
    one, other = torch.tensor([0, 5, 5, 8]), torch.tensor([0, 3, 3, 8])
    x, same, v = (torch.nested.nested_tensor_from_jagged(*pair) for pair in ((x, one), (v, one.clone()), (v, other)))
    text = "v expected the rows of the other fields, [5, 0, 3] a user, got [3, 0, 5]"
    for histories in (Histories(x, v), Histories(x.values(), v, one)):
        with pytest.raises(ValueError, match=re.escape(f"compress: {text}")):
            hisac_torch.compress(book, histories, budget=2, temperature=0.1)
        with pytest.raises(ValueError, match=re.escape(f"route: {text}")):
            hisac_torch.route(histories, torch.zeros(3, 2, 8), temperature=0.1)
    assert hisac_torch.compress(book, Histories(x, same), budget=2, temperature=0.1).tokens.shape == (3, 2, 5)


@pytest.mark.parametrize("face", ["encode", "route", "attend"])
def test_the_functions_outside_torch_refuse_tensors_with_gradients(book, face):
    x, v = rows()
    q = torch.randn(9, 2, 4)
    calls = {
        "encode": ("x", lambda: hisac.encode(book, wanted(x))),
        "route": ("v", lambda: hisac.route(Histories(x, wanted(v), OFFSETS), torch.zeros(3, 2, 8), temperature=0.1)),
        "attend": ("q", lambda: hisac.attend(wanted(q), torch.ones(3, 5, 2, 4), torch.ones(3, 5, 2, 4), CANDIDATES)),
    }
    name, call = calls[face]
    with pytest.raises(TypeError) as error:
        call()
    expected = f"{face}: {name} requires grad, which hisac.{face} would cut; use hisac.torch, or detach()"
    assert str(error.value) == expected
