# SPDX-License-Identifier: Apache-2.0
"""The Python and torch faces of CUDA's verbs: that arguments, places, streams and gradients reach the kernels, in the
places of cuda_places.py. What they compute is tested in tests/cuda and test_cuda_parity.py."""

import functools

import numpy as np
import pytest

import hisac
from hisac import Histories, RouteGradients, Tokens, arrays, testing

torch = pytest.importorskip("torch")
from cuda_places import on_gpu  # noqa: E402

import hisac.torch as ht  # noqa: E402

T, D, V, M = 300, 24, 10, 12


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(T, D)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    book = hisac.Codebook([x[:16].copy(), 0.5 * x[16:24]], temperature=0.1)
    v, bias = rng.normal(size=(T, V)).astype(np.float32), rng.normal(size=T).astype(np.float32)
    offsets = np.array([0, 90, 90, T])
    histories = Histories(x, v, offsets, book.encode(x), bias=bias, weights=np.abs(bias))
    return {"book": book, "histories": histories, "agents": hisac.vote(book, histories, budget=M)}


def numbers(a):
    """bfloat16 as float32; votes keep all their digits."""
    if not isinstance(a, torch.Tensor):
        return np.asarray(a)
    return (a.float() if a.is_floating_point() else a).detach().cpu().numpy()


def assert_near(mine, expected, tolerance=1e-4):
    """Frobenius, relative: kernels are tested to their bounds elsewhere."""
    for a, b in zip(mine, expected, strict=True):
        if b is None:
            continue
        a, b = numbers(a).astype(np.float64), numbers(b).astype(np.float64)
        assert (np.isfinite(a) == np.isfinite(b)).all()
        ok = np.isfinite(b)
        assert np.linalg.norm(a[ok] - b[ok]) <= tolerance * np.linalg.norm(b[ok]) + 1e-12


def test_codes_agents_and_prototypes_are_the_cpus(problem, on_cuda):
    book, weighed = problem["book"], problem["histories"]
    plain = weighed._replace(weights=None)
    np.testing.assert_array_equal(numbers(on_cuda(book.encode, plain.x)), plain.codes)
    rules = (plain, {"budget": M}), (plain, {"fanout": (4, 3)}), (plain, {"beam": (5, 7)}), (weighed, {"budget": 5})
    for histories, rule in rules:
        expected = hisac.vote(book, histories, **rule)
        mine = on_cuda(functools.partial(hisac.vote, book), histories, **rule)
        for a, b in zip(mine[:3], expected[:3], strict=True):
            np.testing.assert_array_equal(numbers(a), b)
        for found in (mine.prototypes, on_cuda(book.prototypes, mine)):
            np.testing.assert_array_equal(numbers(found), book.prototypes(expected))


@pytest.mark.parametrize("options", [
    {}, {"normalize": "agents"}, {"mean_x": True}, {"mean_x": True, "tokens": False}, {"precision": "bfloat16"},
    {"temperature": np.float32([0.3])},
])  # fmt: skip
def test_route(problem, on_cuda, options):
    p, agents = problem, problem["agents"]
    inputs = p["histories"], agents.prototypes
    rest = {"count": agents.count, "book": p["book"], **options}
    tolerance = 0.02 if "precision" in options else 1e-4
    mine, expected = on_cuda(hisac.route, *inputs, **rest), hisac.route(*inputs, **rest)
    assert_near(mine, expected, tolerance)
    again = on_cuda(hisac.route, p["histories"], agents, book=p["book"], **options)
    assert [a is None for a in mine] == [a is None for a in expected]
    assert all(a is b is None or np.array_equal(numbers(a), numbers(b)) for a, b in zip(mine, again, strict=True))


def test_bfloat16_keeps_near_agents_near(problem, on_cuda):
    """Distances are those of the rounded rows, norms too: an agent at a behaviour's place stays there."""
    x = problem["histories"].x[:8]
    histories = Histories(x, x, (np.arange(8), np.arange(1, 9)))
    out = on_cuda(hisac.route, histories, x[:, None], temperature=0.01, precision="bfloat16")
    assert np.abs(numbers(out.lse)).max() < 1e-3


def test_route_of_tables(problem, on_cuda):
    p = problem
    ids = np.random.default_rng(1).integers(-2, T + 2, 400)
    table = np.random.default_rng(2).integers(-127, 128, (T, D)).astype(np.int8)
    offsets, v_ids = np.array([0, 100, 300, 400]), ids.astype(np.int32)
    histories = Histories(table, p["histories"].v, offsets, x_ids=ids, v_ids=v_ids, x_scale=0.002)
    inputs = histories, p["agents"]
    mine = on_cuda(hisac.route, *inputs, temperature=0.1)
    assert_near(mine, hisac.route(*inputs, temperature=0.1))


def test_leaf_sums(problem, on_cuda):
    inputs = problem["book"], problem["histories"]
    mine, expected = on_cuda(hisac.leaf_sums, *inputs), hisac.leaf_sums(*inputs)
    np.testing.assert_array_equal(numbers(mine.codes), expected.codes)
    np.testing.assert_array_equal(numbers(mine.offsets), expected.offsets)
    assert_near(mine, expected)
    given = Histories(np.cos(expected.x), np.sin(expected.v), bias=expected.bias, spread=expected.spread)
    back = functools.partial(hisac.leaf_sums_backward, problem["book"])
    arguments = problem["histories"], expected, given
    assert_near(on_cuda(back, *arguments), back(*arguments), 1e-3)


def test_match(problem, on_cuda):
    """Features and gradients, of NumPy and through TreeMatch, whose histories are longer than one user's sums."""
    book, rng = problem["book"], np.random.default_rng(4)
    sums, offsets = hisac.leaf_sums(book, problem["histories"]), np.array([0, 20, 20, 50], np.int32)
    table, ids = problem["histories"].codes, rng.integers(-1, T + 1, 50)
    mine = on_cuda(hisac.match, book, sums, table, offsets, ids=ids)
    expected = hisac.match(book, sums, table, offsets, ids=ids)
    assert_near(mine, expected)
    given = hisac.Match(np.cos(expected.v), np.sin(np.nan_to_num(expected.lse, neginf=0)))
    arguments = book, sums, given, table, offsets
    mine = on_cuda(hisac.match_backward, *arguments, ids=ids)
    assert_near(mine, hisac.match_backward(*arguments, ids=ids))

    def loss(v, bias, offsets, codes, ids, candidates):
        v, bias = (a.detach().clone().requires_grad_() for a in (v, bias))
        found = ht.TreeMatch(book)(Histories(None, v, offsets, codes, bias=bias), codes, candidates, ids=ids)
        (found.v.sin().sum() + found.lse.sum()).backward()
        return [*found, v.grad, bias.grad]

    h = problem["histories"]
    inputs = h.v, h.bias, h.offsets, h.codes, np.abs(ids) % T, np.array([0, 20, 20, 50])
    assert_near(on_cuda(loss, *inputs), loss(*map(torch.from_numpy, inputs)), 1e-3)


@pytest.mark.parametrize("kind", ["rows", "table"])
def test_missing(problem, on_cuda, kind):
    h = problem["histories"]
    x = h.x.copy()
    x[::7] = np.nan
    ids = np.random.default_rng(1).integers(-2, T, T)
    h = h._replace(x=x) if kind == "rows" else h._replace(x=x, codes=None, x_ids=ids, v_ids=ids[::-1].copy())
    expected = hisac.missing(h)
    np.testing.assert_array_equal(numbers(on_cuda(hisac.missing, h)), expected)
    assert (expected == 0).any()


@pytest.mark.parametrize("options", [
    {"method": "leaf"}, {"missing": "token"}, {"refine": 2}, {"normalize": "history"},
    {"normalize": "history", "missing": "token"}, {"sparse": 1}, {"sparse": 1, "normalize": "history"},
])  # fmt: skip
def test_compress(problem, on_cuda, options):
    run = functools.partial(hisac.compress, problem["book"], budget=M, **options)
    mine, expected = on_cuda(run, problem["histories"]), run(problem["histories"])
    assert_near([*mine[:3], mine.agents.prototypes], [*expected[:3], expected.agents.prototypes], 1e-3)


@pytest.mark.parametrize("normalize", ["history", "agents"])
def test_gradients(problem, on_cuda, place, normalize):
    """Through torch's operators: every input of route, and attend's after it."""
    h, agents = problem["histories"], problem["agents"]
    rng = np.random.default_rng(3)
    q, candidates = rng.normal(size=(7, 2, V // 2)).astype(np.float32), np.array([0, 3, 3, 7])
    leaves = {"x": h.x, "v": h.v, "bias": h.bias, "q": q, "tau": np.float32([0.2])}
    leaves["prototypes"] = agents.prototypes

    def loss(offsets, count, candidates, **given):
        given = {name: a.detach().clone().requires_grad_() for name, a in given.items()}
        histories = Histories(given["x"], given["v"], offsets, bias=given["bias"])
        options = {"count": count, "temperature": given["tau"], "normalize": normalize}
        out = ht.route(histories, given["prototypes"], **options)
        keys = out.tokens.unflatten(2, (2, V // 2))
        found = ht.attend(given["q"], keys, keys.cos(), candidates, bias=out.lse)
        (found.out.sum() + found.lse.sin().nan_to_num().sum()).backward()
        return [found.out, found.lse, *(a.grad for a in given.values())]

    arguments = h.offsets, agents.count, candidates
    cpu = loss(*map(torch.from_numpy, arguments), **{name: torch.from_numpy(a) for name, a in leaves.items()})
    assert_near(on_cuda(loss, *arguments, **leaves), cpu, 1e-3)


def test_sparse_routing(problem, on_cuda):
    """Through torch: lists, and tokens and gradients by them."""
    h, agents, book = problem["histories"], problem["agents"], problem["book"]

    def loss(x, v, offsets, codes, agents, sparse=1):
        v = v.detach().clone().requires_grad_()
        kept = ht.agent_lists(book, agents, 2)
        out = ht.route(Histories(x, v, offsets, codes), kept, book=book, sparse=sparse)
        out.tokens.sin().sum().backward()
        return [kept.lists, out.tokens, out.lse, v.grad]

    inputs = (*h[:4], agents)
    cpu, dense = (loss(*testing.to_torch(inputs), sparse=sparse) for sparse in (1, None))
    mine = on_cuda(loss, *inputs)
    assert_near(mine, cpu, 1e-3)
    np.testing.assert_array_equal(numbers(mine[0]), numbers(cpu[0]))
    assert not np.allclose(numbers(mine[1]), numbers(dense[1]), atol=0.01)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_tables(problem, on_cuda, sparse):
    h = problem["histories"]
    rng = np.random.default_rng(1)

    def gradients(x, v, offsets, prototypes, x_ids, v_ids):
        x, v = (a.detach().clone().requires_grad_() for a in (x, v))
        histories = Histories(x, v, offsets, x_ids=x_ids, v_ids=v_ids)
        out = ht.route(histories, prototypes, sparse_grad=sparse, temperature=0.1)
        (out.tokens.sin().sum() + out.lse.nan_to_num(neginf=0).sum()).backward()
        return [a.grad.to_dense() for a in (x, v)]

    inputs = h.x[:60].copy(), h.v[:50].copy(), h.offsets, problem["agents"].prototypes
    inputs += rng.integers(-2, 64, T), rng.integers(-2, 60, T).astype(np.int32)
    cpu = gradients(*map(torch.from_numpy, inputs))
    assert_near(on_cuda(gradients, *inputs), cpu, 1e-3)


@pytest.mark.parametrize("of_mean", [False, True])
@pytest.mark.parametrize("kind", ["rows", "int8", "codes"])
def test_route_backward(problem, on_cuda, kind, of_mean):
    """What torch's operators have no gradient of, but may be given."""
    book, agents = problem["book"], problem["agents"]
    rng = np.random.default_rng(2)
    x = {"rows": problem["histories"].x, "int8": rng.integers(-127, 128, (50, D)).astype(np.int8), "codes": None}[kind]
    histories = problem["histories"]._replace(x=x, spread=rng.uniform(size=T).astype(np.float32))
    rest = {"book": book, "normalize": "agents"}
    rest["temperature"] = np.linspace(0.1, 0.4, M, dtype=np.float32)  # with one for all agents spread has no gradient
    if kind == "int8":
        scale = rng.uniform(0, 0.002, 50).astype(np.float32)
        codes = histories.codes[:50]
        histories = histories._replace(codes=codes, x_ids=rng.integers(-2, 52, T), x_scale=scale)
    forward = hisac.route(histories, agents, mean_x=True, **rest)
    gradients = Tokens(np.cos(forward.tokens), np.sin(np.nan_to_num(forward.lse, neginf=0)))
    gradients = gradients._replace(mean_x=np.sin(forward.mean_x)) if of_mean else gradients
    need = RouteGradients._fields[of_mean or kind == "codes" :]
    back = functools.partial(hisac.route_backward, need=need)
    given = histories, agents, forward, gradients
    assert_near(on_cuda(back, *given, **rest), back(*given, **rest), 1e-3)


def test_modules(problem, on_cuda, place):
    h = problem["histories"]
    compress = ht.Compressor(problem["book"], budget=M, normalize="agents", temperature=0.1)
    expected = compress(Histories(*map(torch.from_numpy, h[:3])))
    if place.name == "gpu":
        compress.cuda()
    mine = on_cuda(compress, Histories(*h[:3]))
    np.testing.assert_array_equal(numbers(mine.agents.codes), numbers(expected.agents.codes))
    assert_near([*mine[:2], mine.agents.prototypes], [*expected[:2], expected.agents.prototypes])


def test_without_a_gpu_it_says_so():
    found = hisac.backends()["cuda"]
    assert found is True if not arrays.cuda_missing() else isinstance(found, str) and found


# ---------------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def given(problem):
    inputs = *problem["histories"][:3], problem["agents"].prototypes
    x, v, offsets, prototypes = (torch.from_numpy(a).cuda() for a in inputs)
    return Histories(x, v, offsets), prototypes


@on_gpu
def test_arrays_in_two_places_are_refused(given):
    histories, prototypes = given
    with pytest.raises(TypeError, match=r"offsets|starts"):
        hisac.route(histories._replace(offsets=histories.offsets.cpu()), prototypes, temperature=0.1)
    with pytest.raises(TypeError, match="prototypes"):
        hisac.route(histories, prototypes.cpu(), temperature=0.1)
    listed = histories._replace(offsets=histories.offsets.tolist())
    assert torch.equal(hisac.route(listed, prototypes, temperature=0.1).tokens, hisac.route(*given).tokens)


@on_gpu
def test_the_current_stream_is_used_and_no_other_waited_for(given):
    expected, stream = hisac.route(*given).tokens, torch.cuda.Stream()
    torch.cuda.synchronize()
    gate = torch.cuda.Event()
    torch.cuda._sleep(200_000_000)  # the default stream is busy
    gate.record()
    with torch.cuda.stream(stream):
        tokens = hisac.route(*given).tokens
    stream.synchronize()
    assert not gate.query(), "the call waited for the default stream"
    assert torch.equal(tokens, expected)


@on_gpu
def test_graph_capture(given):
    histories, prototypes = given
    tau = torch.full((1,), 0.1, device="cuda")
    out = hisac.route(histories, prototypes, temperature=tau)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hisac.route(histories, prototypes, temperature=tau, out=out)
    histories.v.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out.tokens, hisac.route(histories, prototypes, temperature=tau).tokens)


@on_gpu
def test_compile_and_autocast(given):
    (x, v, offsets, *_), prototypes = given

    def tokens(v):
        return ht.route(Histories(x, v, offsets), prototypes, temperature=0.1).tokens

    assert torch.equal(torch.compile(tokens, fullgraph=True)(v), tokens(v))
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(tokens(v), ht.route(Histories(x, v, offsets), prototypes, temperature=0.1).tokens)
