# SPDX-License-Identifier: Apache-2.0
"""`match` and `merge` in torch: gradients, the module TreeMatch, compiled, exported, cast and saved."""

import copy
import importlib
import io
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hisac
from hisac import Attended, Histories, Match, Tokens, reference, testing

torch = pytest.importorskip("torch")
small = importlib.import_module("small_ranking")  # needs torch
hisac_torch = importlib.import_module("hisac.torch")
OFFSETS, CANDIDATES = small.OFFSETS, small.CANDIDATES
INF, NO_CODES = math.inf, torch.zeros(9, 2, dtype=torch.int32)


@pytest.fixture
def book():
    return small.make_book()


def batch(book, seed=0, n=20):
    """A history of three users, and nine candidates; one has an invalid code, and one an id outside the table."""
    x, v = small.rows(seed, n)
    codes = hisac_torch.encode(book, x)
    asked = codes[torch.randint(n, (9,), generator=torch.Generator().manual_seed(seed))].clone()
    asked[1::3, 1] = (asked[1::3, 1] + 1) % 5
    asked[2, 0] = -1
    return Histories(x, v, OFFSETS, codes, bias=torch.linspace(-2, 2, n)), asked


def by_definition(sizes, sums, codes, candidate_offsets):
    """`match` in torch, row by row, in float64."""
    v, (starts, ends) = sums.v.double(), sums.offsets
    out, lse = [], []
    for b in range(len(starts)):
        own = slice(int(starts[b]), int(ends[b]))
        for n in range(int(candidate_offsets[b]), int(candidate_offsets[b + 1])):
            ok = all(0 <= int(c) < size for c, size in zip(codes[n], sizes, strict=True))
            for level in range(len(sizes)):
                below = (sums.codes[own, : level + 1] == codes[n, : level + 1]).all(1) & ok
                bias = sums.bias[own].double()
                below = below & bias.isfinite()
                lse.append(bias[below].logsumexp(0) if below.any() else bias.new_tensor(-INF))
                out.append(bias[below].softmax(0) @ v[own][below])
    return torch.stack(out).view(len(codes), len(sizes), -1), torch.stack(lse).view(len(codes), -1)


def test_match_and_its_gradients(book):
    """Those of the definition by autograd in float64, through leaf_sums too."""
    h, asked = batch(book)
    grads = []
    for definition in (False, True):
        v, bias = small.wanted(h.v), small.wanted(h.bias)
        sums = hisac_torch.leaf_sums(book, h._replace(v=v, bias=bias))
        if definition:
            out, lse = by_definition(book.sizes, sums, asked, CANDIDATES)
        else:
            out, lse = hisac_torch.match(book, sums, asked, CANDIDATES)
        some = lse > -INF
        w = torch.linspace(-1, 2, out.numel()).view_as(out)
        loss = (w * out.double()).sum() + (torch.linspace(1, 3, lse.numel()).view_as(lse) * lse.double())[some].sum()
        loss.backward()
        grads.append((out.double(), lse.double(), v.grad, bias.grad))
    assert (grads[0][1] == -INF).sum() > 2 and grads[0][3].any()
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@given(testing.matchings(), st.booleans())
def test_gradients_are_those_of_the_verb(p, both):
    args = testing.to_torch(p.match_args(), p.dtype)
    sums = args["sums"]
    v, bias = small.wanted(sums.v), None if sums.bias is None else small.wanted(sums.bias)
    out = hisac_torch.match(**args | {"sums": sums._replace(v=v, bias=bias)})
    back = p.backward_args(out)
    given = testing.to_torch(back, p.dtype)
    d = [(a, g) for a, g in zip(out, given["gradients"], strict=True) if g is not None]
    if not d:
        return
    torch.autograd.backward([a for a, _ in d], [g for _, g in d])
    expected = hisac.match_backward(**given)
    assert torch.equal(v.grad, expected.v.to(v.dtype))
    assert bias is None or torch.equal(bias.grad, expected.bias)


def test_ids_jagged_candidates_and_lists(book):
    h, asked = batch(book)
    sums = hisac_torch.leaf_sums(book, h)
    expected = hisac_torch.match(book, sums, asked, CANDIDATES)
    order = torch.randperm(9)
    by_ids = hisac_torch.match(book, sums, asked[order], CANDIDATES, ids=order.argsort())
    nested = torch.nested.nested_tensor_from_jagged(asked, CANDIDATES)
    for other in (
        by_ids,
        hisac_torch.match(book, sums, nested, None),
        hisac_torch.match(book, sums, asked, CANDIDATES.tolist()),
    ):
        torch.testing.assert_close(other, expected, rtol=0, atol=0)


@pytest.mark.parametrize("change, kind, text", [
    ({"codes": NO_CODES[:, [0, 0, 0]]}, ValueError, "match: codes expected [9, 2], got [9, 3]"),
    ({"codes": torch.zeros(9, 2)}, TypeError, "match: codes expected int32 [N, L], or [items, L] with ids"),
    ({"candidate_offsets": torch.tensor([0, 9])}, ValueError, "offsets of sums name 3 users, candidate_offsets 1"),
    ({"sums": Histories(codes=NO_CODES, offsets=OFFSETS)}, TypeError, "match: sums.v expected in the histories"),
    ({"sums": Histories(None, torch.ones(9, 1), OFFSETS)}, TypeError, "match: sums.codes expected in the histories"),
    ({"sums": Histories(v=torch.ones(9, 1), offsets=OFFSETS, codes=NO_CODES, x_ids=torch.arange(9))}, ValueError,
     "match: sums expected without ids, got x_ids"),
])  # fmt: skip
def test_errors(book, change, kind, text):
    h, asked = batch(book)
    right = {"sums": hisac_torch.leaf_sums(book, h), "codes": asked, "candidate_offsets": CANDIDATES}
    with pytest.raises(kind, match=re.escape(text)):
        hisac_torch.match(book, **right | change)


# ----------------------------------------------------------------------------------------------------------- TreeMatch


class Ranker(torch.nn.Module):
    """Scores from what TreeMatch hands out."""

    def __init__(self, book, value=5):
        super().__init__()
        self.match = hisac_torch.TreeMatch(book)
        self.network = torch.nn.Linear(2 * value + 2, 1)

    def forward(self, v, offsets, codes, bias, asked, candidate_offsets):
        found = self.match(Histories(None, v, offsets, codes, bias=bias), asked, candidate_offsets)
        return self.network(torch.cat([found.v.flatten(1), found.lse], 1)).squeeze(1)


def inputs(book, seed=0, dtype=torch.float32):
    h, asked = batch(book, seed)
    return small.wanted(h.v.to(dtype)), OFFSETS, h.codes, small.wanted(h.bias), asked, CANDIDATES


def test_the_module_is_the_function_with_one_more_than_the_mass(book):
    h, asked = batch(book)
    sums = hisac_torch.leaf_sums(book, h)
    function = hisac_torch.match(book, sums, asked, CANDIDATES)
    module = hisac_torch.TreeMatch(book)
    for out in (
        module(h, asked, CANDIDATES),
        module(h._replace(codes=None), asked, CANDIDATES),
        module(sums, asked, CANDIDATES, summed=True),
    ):
        assert torch.equal(out.v, function.v)
        torch.testing.assert_close(out.lse.double(), function.lse.double().exp().log1p(), rtol=1e-6, atol=0)
    assert torch.equal(out.lse == 0, function.lse == -INF) and (out.lse == 0).any()
    assert "sparse_grad=False" in repr(module)
    with pytest.raises(ValueError, match="TreeMatch: codes expected, or x to encode, got neither x nor codes"):
        module(Histories(None, h.v, OFFSETS), asked, CANDIDATES)
    with pytest.raises(TypeError, match=re.escape("TreeMatch: book expected hisac.Codebook, got int")):
        hisac_torch.TreeMatch(3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_what_leaves_the_module_is_finite_and_of_vs_type(book, dtype):
    """For users without a behaviour, biases of -inf, NaN and inf, and candidates without a code; the gradients too."""
    v, _, codes, bias, asked, _ = inputs(book, dtype=getattr(torch, dtype))
    with torch.no_grad():
        bias[::3] = torch.tensor([-INF, INF, math.nan]).repeat(3)[:7]
    model = Ranker(book).to(getattr(torch, dtype))
    h = Histories(None, v, OFFSETS, codes, bias=bias)
    out = model.match(h, asked, CANDIDATES)
    assert out.v.dtype == out.lse.dtype == v.dtype and out.v.isfinite().all() and out.lse.isfinite().all()
    assert not out.v[4].any() and not out.lse[4].any() and (out.lse >= 0).all()  # the user in the middle has no history
    model(v, OFFSETS, codes, bias, asked, CANDIDATES).float().sum().backward()
    for a in (v, bias, *model.parameters()):
        assert a.grad is not None and a.grad.dtype == a.dtype and a.grad.isfinite().all() and a.grad.any()
    empty = Histories(None, v[:0], torch.zeros(4, dtype=torch.int64), codes[:0])
    nothing = model.match(empty, asked, CANDIDATES)
    assert not nothing.v.any() and not nothing.lse.any()


def test_a_table_of_values_gets_its_gradient(book):
    h, asked = batch(book)
    table, ids = torch.nn.Embedding(6, 5, sparse=True), torch.arange(20) % 6
    dense = small.wanted(table.weight.detach())
    module = hisac_torch.TreeMatch(book)
    for v in (table, dense):
        module(h._replace(v=v, v_ids=ids), asked, CANDIDATES).v.sum().backward()
    assert table.weight.grad.is_sparse
    torch.testing.assert_close(table.weight.grad.to_dense(), dense.grad)


def test_a_compiled_step_is_the_same(book):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Ranker(book)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed in (0, 1):
        results = []
        for call in (model, compiled):
            args = inputs(book, seed)
            score = call(*args)
            score.sum().backward()
            results.append((score, args[0].grad, args[3].grad))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b) and b.any()


def test_an_exported_program_takes_another_number_of_candidates(book):
    model, (v, offsets, codes, bias, asked, candidate_offsets) = Ranker(book), inputs(book)
    n, t = (torch.export.Dim(name, min=3, max=4096) for name in ("N", "T"))
    shapes = ({0: t}, None, {0: t}, {0: t}, {0: n}, None)
    program = torch.export.export(
        model, (v.detach(), offsets, codes, bias.detach(), asked, candidate_offsets), dynamic_shapes=shapes
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    more = torch.cat([asked, asked, asked[:4]]), torch.tensor([0, 5, 5, 22])
    args = v.detach(), offsets, codes, bias.detach(), *more
    assert torch.equal(torch.export.load(file).module()(*args), model(*args))


def test_a_state_dict_brings_its_codebook(book):
    model, other = Ranker(book), Ranker(small.make_book(5))
    args = inputs(book)
    assert [k for k in model.state_dict() if k.startswith("match")] == ["match._extra_state"]
    other.load_state_dict(model.state_dict())
    assert other.match.book.fingerprint == book.fingerprint
    assert torch.equal(other(*args), model(*args)) and torch.equal(copy.deepcopy(model)(*args), model(*args))


# --------------------------------------------------------------------------------------------------------------- merge


def pair(seed, some=(8, 3), width=5):
    """(out, lse) with every kind of -inf against another seed's."""
    g = torch.Generator().manual_seed(seed)
    out, lse = torch.randn(*some, width, generator=g), 3 * torch.randn(*some, generator=g)
    none = torch.rand(some, generator=g) < 0.4
    return out.masked_fill(none[..., None], 0.0), lse.masked_fill(none, -INF)


def test_merge_and_its_gradients():
    """Against logsumexp and softmax in float64; gradients are finite, and zero on a side of -inf."""
    one, other = (tuple(map(small.wanted, pair(seed))) for seed in (1, 2))
    none = [a[1].detach() == -INF for a in (one, other)]
    assert (none[0] & none[1]).any() and (none[0] != none[1]).any() and (~none[0] & ~none[1]).any()
    out, lse = hisac_torch.merge(one, other)
    both = torch.stack([one[1], other[1]]).double()
    share = both.softmax(0).nan_to_num(0.0)[..., None]
    torch.testing.assert_close(lse.double(), both.logsumexp(0))
    torch.testing.assert_close(out.double(), (share * torch.stack([one[0], other[0]]).double()).sum(0))
    for a, b in ((0, 1), (1, 0)):
        alone = none[a] & ~none[b]
        assert torch.equal(out[alone], (one, other)[b][0][alone]) and torch.equal(lse[alone], (one, other)[b][1][alone])
    grads = torch.autograd.grad((lse.sum(), out.square().sum()), (*one, *other))
    assert all(g.isfinite().all() for g in grads)
    for g_out, g_lse, gone in ((*grads[:2], none[0]), (*grads[2:], none[1])):
        assert not g_out[gone].any() and not g_lse[gone].any() and g_lse[~gone].any()

    def loss(*a):
        out, lse = hisac_torch.merge(a[:2], a[2:])
        return out.square().sum() + lse.masked_fill(lse == -INF, 0.0).sum()

    double = [a.detach().double().requires_grad_() for a in (*one, *other)]
    for g, expected in zip(grads, torch.autograd.grad(loss(*double), double), strict=True):
        torch.testing.assert_close(g.double(), expected, rtol=1e-5, atol=1e-5)
    some = [torch.where(a == -INF, 0.5, a).detach().double().requires_grad_() for a in (*one, *other)]
    assert torch.autograd.gradcheck(loss, some)


def test_merge_compiles():
    torch.compiler.reset()
    one, other = pair(1), pair(2)
    compiled = torch.compile(hisac_torch.merge, fullgraph=True, backend="aot_eager")
    for kind in (tuple, Attended._make, Match._make):
        mine, expected = compiled(kind(one), kind(other)), hisac_torch.merge(kind(one), kind(other))
        assert type(mine) is type(expected) and all(map(torch.equal, mine, expected))


@given(st.integers(0, 2**32 - 1))
def test_merge_says_the_same_of_numpy_torch_and_the_definition(seed):
    one, other = pair(seed), pair(seed + 1)
    in_numpy = [tuple(t.numpy() for t in p) for p in (one, other)]
    expected = reference.merge(*in_numpy)
    mine = hisac.merge(*in_numpy)
    assert all(a.dtype == np.float32 for a in mine)
    for a, b in zip(mine, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for found in (hisac.merge(one, other), hisac_torch.merge(one, other)):
        for a, b in zip(found, mine, strict=True):
            torch.testing.assert_close(a, torch.from_numpy(b), rtol=1e-6, atol=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_merge_is_associative_up_to_rounding(seed):
    a, b, c = (Match(*pair(seed + i)) for i in range(3))
    merge = hisac_torch.merge
    for x, y in zip(merge(merge(a, b), c), merge(a, merge(b, c)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_merged_parts_of_the_tokens_are_all_of_them():
    q, keys, bias = torch.randn(9, 2, 4), torch.randn(3, 8, 2, 4), torch.randn(3, 8)
    bias[0, :5], bias[1] = -INF, -INF
    whole = hisac_torch.attend(q, keys, keys, CANDIDATES, bias=bias)
    parts = [hisac_torch.attend(q, k, k, CANDIDATES, bias=b) for k, b in zip(
        (keys[:, :5], keys[:, 5:]), (bias[:, :5], bias[:, 5:]), strict=True
    )]  # fmt: skip
    merged = hisac_torch.merge(*parts)
    assert isinstance(merged, Attended)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-6)


def test_merge_of_tokens_takes_mean_x_and_types_along():
    a, b = pair(1), pair(2)
    one, other = (Tokens(p[0].bfloat16(), p[1], p[0][..., :2]) for p in (a, b))
    merged = hisac_torch.merge(one, other)
    assert merged.tokens.dtype == torch.bfloat16 and merged.lse.dtype == torch.float32
    torch.testing.assert_close(merged.mean_x, hisac_torch.merge(a, b)[0][..., :2])
    without = hisac_torch.merge(one._replace(mean_x=None), other._replace(mean_x=None))
    assert without.mean_x is None and torch.equal(without.tokens, merged.tokens)
    for change, text in (
        ({"mean_x": None}, "merge: b expected the fields of a, Tokens of 3, got 3"),
        ({"lse": b[1][:2]}, "merge: b's lse expected [8, 3], got [2, 3]"),
        ({"tokens": b[0][..., :1]}, "merge: b's tokens expected [8, 3, 5], got [8, 3, 1]"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            hisac_torch.merge(one, other._replace(**change))


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_an_lse_that_is_no_mass_spoils_a_merge(odd):
    ones = np.ones((1, 2), np.float32)
    for merge, pair in (
        (hisac.merge, lambda lse: (ones, np.float32([lse]))),
        (reference.merge, lambda lse: (ones, np.float32([lse]))),
        (hisac_torch.merge, lambda lse: (torch.from_numpy(ones), torch.tensor([lse]))),
    ):
        for a, b in ((odd, 0.0), (0.0, odd), (odd, odd)):
            with np.errstate(invalid="ignore"):
                out, lse = merge(pair(a), pair(b))
            assert np.isnan(np.asarray(out)).all() and np.isnan(np.asarray(lse)).all()


def test_a_merge_is_of_one_type():
    match = hisac.Match(np.ones((1, 2), np.float32), np.zeros(1, np.float32))
    with pytest.raises(TypeError, match=r"^merge: b expected arrays as those of a, got Tensor$"):
        hisac.merge((np.zeros((2, 1)), np.zeros(2)), (torch.zeros(2, 1), torch.zeros(2)))
    with pytest.raises(TypeError, match=r"^merge: b expected Match, as a, got tuple$"):
        hisac.merge(match, tuple(match))
