# SPDX-License-Identifier: Apache-2.0
"""hisac.torch with tables and ids: gradients of tables, dense and sparse, against the reference and nn.Embedding."""

import importlib

import numpy as np
import pytest
from hypothesis import given

import hisac
from hisac import Histories, reference, testing
from hisac.reference import bounds

torch = pytest.importorskip("torch")
hisac_torch = importlib.import_module("hisac.torch")

OFFSETS = torch.tensor([0, 7, 7, 20])  # the user in the middle has no history
IDS = torch.tensor([3, 1, 3, -1, 0, 3, 6, 2, 2, 9, 3, 3, 5, 1, 0, 2, 5, 6, 6, 1])  # 9 is outside
BOTH = pytest.mark.parametrize("sparse", [False, True])


def tables(seed=0, width=8, value=5):
    """Items [8, D], values [7, V], prototypes [3, 2, D]."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, generator=g) for size in ((8, width), (7, value), (3, 2, width)))


def wanted(t):
    return t.clone().requires_grad_()


def summed(d, ids, size):
    """What a table's gradient is: the sum of its rows'."""
    total, inside = np.zeros((size, d.shape[1])), (ids >= 0) & (ids < size)
    np.add.at(total, ids[inside], d[inside])
    return total


@given(testing.problems(gathered=True, dtypes=("float32",)))
def test_gradients_meet_the_reference(p):
    args = testing.to_torch(p.route_args() | {"mean_x": False})
    given = args["histories"]._asdict()
    names = [name for name in ("x", "v") if given[name] is not None and given[name].is_floating_point()]
    for name in names:
        given[name].requires_grad_()
    out = hisac_torch.route(**args)
    forward = type(out)(*(None if t is None else t.detach() for t in out))
    back = p.by_reference(p.backward_args(forward)) | {"need": names}
    pairs = [(t, torch.from_numpy(d)) for t, d in zip(out, back["gradients"], strict=True) if d is not None]
    if not pairs:
        return
    found = torch.autograd.grad([t for t, _ in pairs], [given[name] for name in names], [d for _, d in pairs])
    expected, bound = reference.route_backward(**back), bounds.route_backward_bound(back)
    for name, grad in zip(names, found, strict=True):
        testing.assert_close(grad, getattr(expected, name), getattr(bound, name), name)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_table_is_an_embeddings_weight(dtype, sparse):
    """The tokens of rows looked up by nn.Embedding bit for bit, its gradient up to rounding, in its types and forms."""
    items, values, p = tables()
    ids = IDS.clamp(0, 6)
    embedding = torch.nn.Embedding.from_pretrained(values.to(dtype, copy=True), freeze=False, sparse=sparse)
    looked_up = hisac_torch.route(Histories(items[ids], embedding(ids), OFFSETS), p, temperature=5.0)
    looked_up.tokens.float().square().sum().backward()
    expected, embedding.weight.grad = embedding.weight.grad, None
    histories = Histories(items, embedding.weight, OFFSETS, x_ids=ids, v_ids=ids.int())
    out = hisac_torch.route(histories, p, temperature=5.0, sparse_grad=sparse)
    assert torch.equal(out.tokens, looked_up.tokens) and torch.equal(out.lse, looked_up.lse)
    out.tokens.float().square().sum().backward()
    grad = embedding.weight.grad
    assert grad.dtype == dtype and grad.layout == expected.layout
    assert not sparse or grad._indices().tolist() == [[0, 1, 2, 3, 5, 6]]
    tolerance = {} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(grad.to_dense(), expected.to_dense(), **tolerance)
    torch.optim.SGD(embedding.parameters(), lr=0.1).step()
    assert (embedding.weight != values.to(dtype)).any(1).tolist() == [True] * 4 + [False] + [True] * 2


@BOTH
def test_both_tables_have_gradients(sparse):
    items, values, p = tables()
    x, v = wanted(items), wanted(values)
    histories = Histories(x, v, OFFSETS, x_ids=IDS, v_ids=IDS.flip(0))
    out = hisac_torch.route(histories, p, temperature=5.0, sparse_grad=sparse)
    (out.tokens.sum() + out.lse[[0, 2]].sum()).backward()
    outside = (IDS < 0) | (IDS > 7) | (IDS.flip(0) < 0) | (IDS.flip(0) > 6)
    rows = wanted(items[IDS.clamp(0, 7)]), wanted(values[IDS.flip(0).clamp(0, 6)])
    bias = torch.where(outside, torch.nan, 0.0)
    out = hisac_torch.route(Histories(*rows, OFFSETS, bias=bias), p, temperature=5.0)
    (out.tokens.sum() + out.lse[[0, 2]].sum()).backward()
    for grad, row, ids in ((x.grad, rows[0].grad, IDS), (v.grad, rows[1].grad, IDS.flip(0))):
        expected = summed(row.numpy(), ids.numpy(), len(grad))
        torch.testing.assert_close(grad.to_dense(), torch.from_numpy(expected).float(), rtol=1e-6, atol=1e-6)
        assert not sparse or grad._indices().tolist() == [ids[(ids >= 0) & (ids < len(grad))].unique().tolist()]


class InFloat(torch.autograd.Function):
    """v.float() for gradients of any layout: torch itself casts no sparse ones."""

    @staticmethod
    def forward(ctx, v):
        return v.float()

    @staticmethod
    def backward(ctx, grad):
        return grad.to_dense().double()


@BOTH
@pytest.mark.parametrize("method", ["exact", "leaf"])
def test_gradcheck(method, sparse):
    items, values, _ = tables()
    book = hisac.Codebook([items[:4].numpy()])
    codes = hisac_torch.encode(book, items)
    options = {"budget": 2, "method": method, "missing": "token", "sparse_grad": sparse}

    def run(v, tau):
        histories = Histories(items, InFloat.apply(v), OFFSETS, codes, x_ids=IDS.flip(0), v_ids=IDS)
        found = hisac_torch.compress(book, histories, temperature=tau.float(), **options)
        return found.tokens.double()[[0, 2]], found.lse.double()[[0, 2], :2]

    inputs = wanted(values.double()), wanted(torch.tensor([5.0], dtype=torch.float64))
    assert torch.autograd.gradcheck(run, inputs, eps=1e-3, atol=5e-3, rtol=5e-3, nondet_tol=0.0)


@BOTH
@pytest.mark.parametrize("ids", [[], [-1, 9, 7], [7] * 3])
def test_no_row_of_the_table(ids, sparse):
    v, ids = torch.ones(7, 3, requires_grad=True), torch.tensor(ids, dtype=torch.int64)
    histories = Histories(torch.zeros(len(ids), 2), v, torch.tensor([0, len(ids)]), v_ids=ids)
    hisac_torch.route(histories, torch.zeros(1, 1, 2), temperature=5.0, sparse_grad=sparse).tokens.sum().backward()
    assert v.grad.shape == (7, 3) and not v.grad.to_dense().any() and (not sparse or v.grad._nnz() == 0)


@BOTH
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_histories_inside_a_log_of_events(integers, sparse):
    """What lies around them is nobody's: the gradients of ids that are copied out, to the bit, for any threads."""
    g = torch.Generator().manual_seed(0)
    log = torch.randint(-1, 8, (3_000,), generator=g).to(integers)
    starts = torch.tensor([2_000, 10, 500, 100, 2_900, 100], dtype=integers)
    lengths = torch.tensor([300, 90, 0, 400, 100, 1], dtype=integers)  # the last one is part of another
    items, values, p = tables()
    p = torch.cat([p, p + 1])

    def gradients(offsets, ids):
        x, v = wanted(items), wanted(values)
        out = hisac_torch.route(Histories(x, v, offsets, x_ids=ids, v_ids=ids), p, temperature=5.0, sparse_grad=sparse)
        return torch.autograd.grad(out.tokens.square().sum() + out.lse[lengths > 0].sum(), (x, v))

    threads, found = hisac.get_num_threads(), []
    for count in (1, 2, 5):
        hisac.set_num_threads(count)
        found.append(gradients((starts, starts + lengths), log))
    hisac.set_num_threads(threads)
    used = torch.cat([log[s : s + n] for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)])
    copied = gradients(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), used)
    for a, b, c, d, size in zip(*found, copied, (8, 7), strict=True):
        assert torch.equal(a.to_dense(), b.to_dense()) and torch.equal(a.to_dense(), c.to_dense())
        torch.testing.assert_close(a.to_dense(), d.to_dense(), rtol=1e-5, atol=1e-5)
        if sparse:
            assert a.is_coalesced()
            has = [[i for i in range(size) if (used == i).any()]]
            assert a._indices().tolist() == d._indices().tolist() == has


@pytest.mark.parametrize("method", ["exact", "leaf"])
def test_an_embedding_says_once_that_its_gradients_are_sparse(method):
    """`nn.Embedding(sparse=True)` as v, in a model that looks candidates up in it too."""
    items, values, _ = tables()
    book = hisac.Codebook([items[:4].numpy()])
    codes, ids = hisac_torch.encode(book, items), IDS.clamp(0, 6)
    compress = hisac_torch.Compressor(book, budget=3, temperature=5.0, method=method)
    found = []
    for sparse in (False, True):
        embedding = torch.nn.Embedding.from_pretrained(values.clone(), freeze=False, sparse=sparse)
        x = torch.nn.Embedding.from_pretrained(items, freeze=True)  # of the semantic side, which is not sparse
        out = compress(Histories(x, embedding, OFFSETS, codes, x_ids=ids, v_ids=ids))
        (out.tokens.sum() + embedding(torch.tensor([0, 4])).sum()).backward()
        assert embedding.weight.grad.is_sparse == sparse
        found.append(embedding.weight.grad.to_dense())
        kind = torch.optim.SparseAdam if sparse else torch.optim.Adam
        kind(embedding.parameters(), lr=0.1).step()
    assert torch.equal(*found)
    with pytest.raises(ValueError, match=r"v expected an nn\.Embedding without max_norm and scale_grad_by_freq"):
        hisac_torch.route(
            Histories(items, torch.nn.Embedding(7, 3, max_norm=1.0), OFFSETS, v_ids=IDS), tables()[2], temperature=5.0
        )


def test_each_table_has_gradients_of_its_own_kind():
    items, values, p = tables()
    x = torch.nn.Embedding.from_pretrained(items, freeze=False)
    v = torch.nn.Embedding.from_pretrained(values, freeze=False, sparse=True)
    hisac_torch.route(Histories(x, v, OFFSETS, x_ids=IDS, v_ids=IDS), p, temperature=5.0).tokens.sum().backward()
    assert not x.weight.grad.is_sparse and v.weight.grad.is_sparse


def test_compiles_in_one_graph():
    torch.compiler.reset()
    items, values, p = tables()

    def run(x, v, ids):
        out = hisac_torch.route(Histories(x, v, OFFSETS, x_ids=ids, v_ids=ids), p, temperature=5.0)
        return out.tokens.sum() + out.lse[[0, 2]].sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ids in (IDS, IDS.flip(0)):
        inputs = [(wanted(items), wanted(values)) for _ in range(2)]
        expected, found = run(*inputs[0], ids), compiled(*inputs[1], ids)
        expected.backward()
        found.backward()
        assert torch.equal(found, expected)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(*inputs, strict=True))


def test_a_compiled_program_steps_out_for_sparse_gradients():
    torch.compiler.reset()
    items, values, p = tables()
    v = wanted(values)

    def run(v):
        histories = Histories(items, v, OFFSETS, x_ids=IDS, v_ids=IDS)
        return hisac_torch.route(histories, p, sparse_grad=True, temperature=0.1).tokens.sum()

    torch.compile(run, backend="aot_eager")(v).backward()
    embedding = torch.nn.Embedding.from_pretrained(values, freeze=False, sparse=True)
    by_module = Histories(items, embedding, OFFSETS, x_ids=IDS, v_ids=IDS)
    compiled = torch.compile(lambda: hisac_torch.route(by_module, p, temperature=0.1).tokens, backend="aot_eager")
    compiled().sum().backward()
    assert torch.equal(embedding.weight.grad.to_dense(), v.grad.to_dense())
    expected = wanted(values)
    run(expected).backward()
    assert v.grad.is_sparse and torch.equal(v.grad.to_dense(), expected.grad.to_dense())
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match=r"route: sparse gradients are in no graph, expected torch\.no_grad"):
        torch.compile(run, backend="aot_eager", fullgraph=True)(v)
    torch.compiler.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(v), run(v))


@pytest.mark.parametrize("made", [lambda w: w * 2, lambda w: w.half(), torch.nn.Linear(5, 4)])
def test_sparse_gradients_are_for_leaves(made):
    items, values, p = tables()
    book, v = hisac.Codebook([items[:4].numpy()]), wanted(values)
    codes = hisac_torch.encode(book, items)
    histories = Histories(items, made(v), OFFSETS, codes, x_ids=IDS, v_ids=IDS)
    got = made(v).grad_fn.name()
    for verb, run in (
        ("route", lambda h: hisac_torch.route(h, p, sparse_grad=True, temperature=0.1)),
        ("leaf_sums", lambda h: hisac_torch.leaf_sums(book, h, sparse_grad=True)),
        ("route", hisac_torch.Compressor(book, budget=2, sparse_grad=True, temperature=0.1)),
    ):
        text = f"^{verb}: with sparse_grad v expected a leaf, as an nn.Embedding's weight, got what {got} made$"
        with pytest.raises(ValueError, match=text):
            run(histories)
        with torch.no_grad():
            run(histories)
        run(histories._replace(v=histories.v.detach()))
    with pytest.raises(ValueError, match=r"^route: with sparse_grad x expected a leaf"):
        hisac_torch.route(histories._replace(x=wanted(items) * 1, v=v), p, sparse_grad=True, temperature=0.1)


def test_a_weight_that_is_looked_up_densely_too_has_a_dense_gradient():
    """As the documentation of Compressor says. SparseAdam takes that of lookups by the module."""
    items, values, p = tables()
    embedding = torch.nn.Embedding.from_pretrained(values.clone(), freeze=False, sparse=True)
    histories = Histories(items, embedding.weight, OFFSETS, x_ids=IDS, v_ids=IDS)
    for looked_up, sparse in ((lambda ids: embedding.weight[ids], False), (embedding, True)):
        embedding.zero_grad()
        tokens = hisac_torch.route(histories, p, sparse_grad=True, temperature=0.1).tokens
        (tokens.sum() + looked_up(IDS.clamp(0, 6)).sum()).backward()
        assert embedding.weight.grad.is_sparse == sparse
    torch.optim.SparseAdam(embedding.parameters()).step()
    assert embedding.weight.isfinite().all()


@BOTH
def test_double_backward_raises(sparse):
    items, values, p = tables()
    v, tau = wanted(values), wanted(torch.tensor([5.0]))
    histories = Histories(items, v, OFFSETS, x_ids=IDS, v_ids=IDS)
    out = hisac_torch.route(histories, p, temperature=tau, sparse_grad=sparse)
    (grad,) = torch.autograd.grad(out.tokens.square().sum(), v, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not supported"):
        grad.to_dense().sum().backward()


def test_a_scale_has_no_gradient():
    items, values, p = tables()
    x, scale = (items * 10).to(torch.int8), torch.tensor([0.1])
    with pytest.raises(NotImplementedError, match=r"x_scale has no gradient, expected x_scale.detach\(\)"):
        hisac_torch.route(
            Histories(x, values, OFFSETS, x_ids=IDS, v_ids=IDS, x_scale=wanted(scale)), p, temperature=0.1
        )
    found = hisac_torch.route(
        Histories(x, wanted(values), OFFSETS, x_ids=IDS, v_ids=IDS, x_scale=scale), p, temperature=0.1
    )
    again = hisac_torch.route(Histories(x, values, OFFSETS, x_ids=IDS, v_ids=IDS, x_scale=0.1), p, temperature=0.1)
    assert torch.equal(found.tokens, again.tokens)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_compressor_takes_tables(sparse):
    items, values, _ = tables()
    book = hisac.Codebook([items[:4].numpy(), items[4:6].numpy() / 4])
    compress = hisac_torch.Compressor(book, budget=3, temperature=5.0, sparse_grad=sparse)
    codes, v = hisac_torch.encode(book, items), wanted(values)
    ids = IDS.clamp(0, 6)
    found = compress(Histories(items, v, OFFSETS, codes, x_ids=ids, v_ids=ids))
    rows = wanted(values[IDS.clamp(0, 6)])
    expected = compress(Histories(items[ids], rows, OFFSETS))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.tokens.sum().backward()
    expected.tokens.sum().backward()
    assert v.grad.is_sparse == sparse
    summed_rows = torch.from_numpy(summed(rows.grad.numpy(), IDS.clamp(0, 6).numpy(), 7)).float()
    torch.testing.assert_close(v.grad.to_dense(), summed_rows, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="got no codes beside x_ids: encode the table once"):
        compress(Histories(items, v, OFFSETS, x_ids=IDS, v_ids=IDS))


def test_the_padding_row_of_an_embedding():
    """As the documentation of Histories says: -1 in place of padding_idx is absent, and the row gets no gradient. Given
    the module, padding_idx itself is."""
    items, _, p = tables()
    book = hisac.Codebook([items[:4].numpy()])
    embedding = torch.nn.Embedding(7, 3, padding_idx=2)
    ids = IDS.clamp(0, 6)
    absent = ids.masked_fill(ids == embedding.padding_idx, -1)
    h = Histories(items, embedding.weight, OFFSETS, hisac_torch.encode(book, items), absent, absent)
    kept = ids != embedding.padding_idx
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])[OFFSETS]
    without = h._replace(offsets=starts, x_ids=ids[kept], v_ids=ids[kept])
    for verb in (
        lambda h: hisac_torch.vote(book, h, budget=4)[:3],
        lambda h: hisac_torch.route(h, p, book=book, temperature=0.1)[:2],
    ):
        torch.testing.assert_close(verb(h), verb(without), rtol=1e-5, atol=1e-5)
    hisac_torch.route(h, p, temperature=0.1).tokens.sum().backward()
    assert not embedding.weight.grad[2].any() and embedding.weight.grad.any()
    expected, embedding.weight.grad = embedding.weight.grad, None
    module = h._replace(v=embedding, x_ids=ids, v_ids=ids.int())
    for verb in (
        lambda h: hisac_torch.vote(book, h, budget=4)[:3],
        lambda h: hisac_torch.route(h, p, book=book, temperature=0.1)[:2],
        lambda h: hisac_torch.route(hisac_torch.leaf_sums(book, h), p, temperature=0.1)[:2],
        lambda h: hisac_torch.Compressor(book, budget=4, temperature=0.1)(h)[:3],
    ):
        torch.testing.assert_close(verb(module), verb(h), rtol=0, atol=0)
    hisac_torch.route(module, p, temperature=0.1).tokens.sum().backward()
    torch.testing.assert_close(embedding.weight.grad, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_jagged_ids():
    items, values, p = tables()
    ids = torch.nested.nested_tensor_from_jagged(IDS, OFFSETS)
    found = hisac_torch.route(Histories(items, values, None, x_ids=ids, v_ids=ids), p, temperature=0.1)
    expected = hisac_torch.route(Histories(items, values, OFFSETS, x_ids=IDS, v_ids=IDS), p, temperature=0.1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
