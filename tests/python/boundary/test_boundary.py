# SPDX-License-Identifier: Apache-2.0
"""Where arrays cross into the core: what is borrowed, what comes back, what is refused and in which words."""

import re
import tracemalloc
import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hisac
from hisac import Attended, Codebook, Histories, Match, Tokens
from support import by_field

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(7)
B, T, D, V, M, N, H = 2, 10, 6, 3, 4, 5, 2


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


BOOK = Codebook([normal(4, D), normal(3, D)])
OTHER = Codebook([normal(4, D + 1), normal(3, D + 1)])
X, VALUE, BIAS, WEIGHTS = normal(T, D), normal(T, V), normal(T), np.abs(normal(T))
OFFSETS = np.array([0, 4, T])
CODES = BOOK.encode(X)
AGENTS = hisac.vote(BOOK, Histories(offsets=OFFSETS, codes=CODES), budget=M)
PROTOTYPES = BOOK.prototypes(AGENTS)
TAU = np.array([0.5, 1, 2, 4], np.float32)
ROUTE = {"x": X, "v": VALUE, "offsets": OFFSETS, "agents": PROTOTYPES}
MORE = {"count": AGENTS.count, "temperature": TAU, "bias": BIAS, "codes": CODES}
route = by_field(partial(hisac.route, temperature=0.1))
TOKENS = route(**ROUTE, **MORE, book=BOOK, mean_x=True)
ATTEND = {
    "q": normal(N, H, D),
    "keys": normal(B, M, H, D),
    "values": normal(B, M, H, V),
    "candidate_offsets": np.array([0, 2, N]),
}
LIKES = {"bias": normal(B, M)}
ATTENDED = hisac.attend(**ATTEND, **LIKES)


def route_backward(d_tokens, d_lse, d_mean_x, tokens, lse, mean_x, **rest):
    need = [name for name in hisac.RouteGradients._fields if name != "x"]
    returned, gradients = Tokens(tokens, lse, mean_x), Tokens(d_tokens, d_lse, d_mean_x)
    return by_field(partial(hisac.route_backward, temperature=0.1))(
        forward=returned, gradients=gradients, **{"need": need, **rest}
    )


def leaf_sums_backward(**given):
    of = {prefix: {n[len(prefix) :]: a for n, a in given.items() if n.startswith(prefix)} for prefix in LEAF_FIELDS}
    rest = {name: a for name, a in given.items() if "." not in name}
    sums, gradients = SUMS._replace(**of["sums."]), Histories(**of["gradients."])
    return by_field(hisac.leaf_sums_backward)(sums=sums, gradients=gradients, **rest)


LEAF_FIELDS = ("sums.", "gradients.")


def attend_backward(d_out, d_lse, out, lse, **rest):
    return hisac.attend_backward(d_out, d_lse, Attended(out, lse), **rest)


def match(codes, candidate_offsets, ids, **sums):
    sums = Histories(**{name.removeprefix("sums."): a for name, a in sums.items()})
    return hisac.match(BOOK, sums, codes, candidate_offsets, ids=ids)


def match_backward(d_v, d_lse, codes, candidate_offsets, ids, **sums):
    sums = Histories(**{name.removeprefix("sums."): a for name, a in sums.items()})
    return hisac.match_backward(BOOK, sums, Match(d_v, d_lse), codes, candidate_offsets, ids=ids)


BACK = {"d_tokens": normal(B, M, V), "d_lse": normal(B, M), "d_mean_x": normal(B, M, D)}
BACK |= TOKENS._asdict()
ROWS = {"x": X, "v": VALUE, "offsets": OFFSETS, "codes": CODES, "bias": BIAS, "spread": WEIGHTS}
SUMS = hisac.leaf_sums(BOOK, Histories(**ROWS))
LEAF_BACK = {"sums.x": SUMS.x, "sums.v": SUMS.v, "sums.bias": SUMS.bias}
LEAF_BACK |= {f"gradients.{name}": normal(*getattr(SUMS, name).shape) for name in ("x", "v", "bias")}
RETURN = {"d_out": normal(N, H, V), "d_lse": normal(N, H), "out": ATTENDED.out, "lse": ATTENDED.lse}
MATCH = {"sums.v": SUMS.v, "offsets": SUMS.offsets, "sums.codes": SUMS.codes, "sums.bias": SUMS.bias, "codes": CODES}
MATCH |= {"candidate_offsets": ATTEND["candidate_offsets"], "ids": np.arange(N)}
CALLS = {  # verb: the function and all its array arguments
    "Codebook": (lambda centers: Codebook([centers]).centers, {"centers": X}),
    "fit": (lambda x: Codebook.fit(x, (3, 2)).centers, {"x": X}),
    "encode": (partial(hisac.encode, BOOK), {"x": X}),
    "leaves": (BOOK.leaves, {"codes": CODES}),
    "prototypes": (BOOK.prototypes, {"codes": CODES}),
    "vote": (partial(by_field(hisac.vote), BOOK, budget=M), {"codes": CODES, "offsets": OFFSETS, "weights": WEIGHTS}),
    "route": (partial(route, book=BOOK), {**ROUTE, **MORE}),
    "route_backward": (partial(route_backward, book=BOOK), {**BACK, **ROUTE, **MORE}),
    "missing": (partial(by_field(hisac.missing), book=BOOK), ROWS),
    "leaf_sums": (partial(by_field(hisac.leaf_sums), book=BOOK), {**ROWS, "weights": np.arange(-1, T - 1)}),
    "leaf_sums_backward": (partial(leaf_sums_backward, book=BOOK), {**LEAF_BACK, **ROWS}),
    "compress": (partial(by_field(hisac.compress), BOOK, budget=M, missing="token", temperature=0.1), ROWS),
    "attend": (hisac.attend, {**ATTEND, **LIKES}),
    "attend_backward": (attend_backward, {**RETURN, **ATTEND, **LIKES}),
    "match": (match, MATCH),
    "match_backward": (match_backward, {"d_v": normal(N, 2, V), "d_lse": normal(N, 2), **MATCH}),
}
TOLD = {"agents": "prototypes"}  # what messages call an argument: here those that are no Agents
ARGUMENTS = [(verb, name) for verb, (_, arrays) in CALLS.items() for name in arrays]


def flat(result):
    """The arrays of a result."""
    if isinstance(result, tuple):
        return [array for part in result for array in flat(part)]
    return [result] if hasattr(result, "shape") else []


def bits(result):
    return [(tuple(a.shape), str(a.dtype).split(".")[-1], np.asarray(a).tobytes()) for a in flat(result)]


def call(verb, **changed):
    function, arrays = CALLS[verb]
    return function(**{**arrays, **changed})


EXPECTED = {verb: bits(call(verb)) for verb in CALLS}


class Producer:
    """An array that only DLPack can read."""

    def __init__(self, array, device=None):
        self.array, self.device = array, device

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device or self.array.__dlpack_device__()


# --------------------------------------------------------------------------------------------------- kinds and places


@pytest.mark.parametrize("verb", list(CALLS))
def test_results_are_of_the_inputs_kind(verb):
    """NumPy in, NumPy out; torch in, torch out; anything else with DLPack is seen as NumPy: with the same bits."""
    arrays = CALLS[verb][1]
    tensors = {name: torch.from_numpy(a.copy()) for name, a in arrays.items()}
    kinds = [
        ({name: Producer(a) for name, a in arrays.items()}, np.ndarray),
        ({name: Producer(t) for name, t in tensors.items()}, np.ndarray),
        (tensors, torch.Tensor),
        ({n: torch.nn.Parameter(t, requires_grad=False) for n, t in tensors.items()}, torch.Tensor),
        ({n: t.as_subclass(type("Mine", (torch.Tensor,), {})) for n, t in tensors.items()}, torch.Tensor),
    ]
    for inputs, kind in kinds:
        result = call(verb, **inputs)
        assert bits(result) == EXPECTED[verb]
        if verb not in ("Codebook", "fit"):  # a codebook's centers are NumPy
            assert all(isinstance(a, kind) for a in flat(result))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype):
    half = getattr(torch, dtype)
    x, v, q, k, w = (torch.from_numpy(a).to(half) for a in (X, VALUE, *list(ATTEND.values())[:3]))
    tokens = hisac.route(Histories(x, v, OFFSETS), PROTOTYPES, temperature=0.1)
    exact = hisac.route(Histories(x.float(), v.float(), OFFSETS), PROTOTYPES, temperature=0.1)
    assert tokens.tokens.dtype == half and tokens.lse.dtype == torch.float32
    assert torch.equal(tokens.tokens, exact.tokens.to(half)) and torch.equal(tokens.lse, exact.lse)
    assert torch.equal(hisac.encode(BOOK, x), hisac.encode(BOOK, x.float()))
    attended = hisac.attend(q, k, w, ATTEND["candidate_offsets"])
    assert attended.out.dtype == half and attended.lse.dtype == torch.float32
    gradients = hisac.route_backward(
        Histories(x, v, OFFSETS), PROTOTYPES, tokens, Tokens(tokens.tokens, None), temperature=0.1
    )
    assert all(g is None or g.dtype == torch.float32 for g in gradients)
    if dtype == "float16":
        assert (
            hisac.route(Histories(x.numpy(), v.numpy(), OFFSETS), PROTOTYPES, temperature=0.1).tokens.dtype
            == np.float16
        )


def test_inputs_are_borrowed_and_outputs_written_in_place():
    x = np.zeros((1 << 16, D), np.float32)
    x[:] = X[0]
    hisac.encode(BOOK, x)
    for same in (x, Producer(x), torch.from_numpy(x)):
        out = np.full((len(x), 2), -7, np.int32)
        tracemalloc.start()
        assert hisac.encode(BOOK, same, out=out) is out
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < x.nbytes / 8, "a copy of x was made"
        assert (out == CODES[0]).all()
    address = torch.empty((T, 2), dtype=torch.int32)
    assert hisac.encode(BOOK, torch.from_numpy(X), out=address) is address
    np.testing.assert_array_equal(address, CODES)


@pytest.mark.parametrize("convert", [np.copy, lambda a: torch.from_numpy(a.copy())])
def test_out_of_route_and_attend(convert):
    fresh = route(**ROUTE, mean_x=True)
    out = Tokens(*(convert(np.full_like(a, 9)) for a in fresh))
    again = route(**ROUTE, mean_x=True, out=out)
    assert all(a is b for a, b in zip(again, out, strict=True)) and bits(again) == bits(fresh)
    partly = route(**ROUTE, mean_x=True, out=Tokens(None, out.lse, None))
    assert partly.lse is out.lse and bits(partly) == bits(fresh)
    out = Attended(*(convert(np.full_like(a, 9)) for a in ATTENDED))
    assert hisac.attend(**ATTEND, **LIKES, out=out)[0] is out.out and bits(out) == bits(ATTENDED)


# -------------------------------------------------------------------------------------------------------------- strides


def sliced(a):
    big = np.zeros([2 * n + 3 for n in a.shape], a.dtype)
    view = big[tuple(slice(1, 2 * n + 1, 2) for n in a.shape)]
    view[...] = a
    return view


def unaligned(a):
    view = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def offset(a):
    big = np.zeros((len(a) + 2, *a.shape[1:]), a.dtype)
    big[2:] = a
    return big[2:]


def locked(a):
    view = a.copy()
    view.flags.writeable = False
    return view


LAYOUTS = {
    "transposed": lambda a: a.T.copy().T,
    "negative": lambda a: np.flip(np.flip(a).copy()),
    "sliced": sliced,
    "unaligned": unaligned,
    "offset": offset,
    "read-only": locked,
    "torch transposed": lambda a: torch.from_numpy(a.T.copy()).permute(*reversed(range(a.ndim))),
    "torch sliced": lambda a: torch.from_numpy(sliced(a)),
    "torch offset": lambda a: torch.from_numpy(offset(a)),
    "DLPack sliced": lambda a: Producer(sliced(a)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("verb", "name"), ARGUMENTS)
def test_strides_do_not_matter(verb, name, layout):
    view = LAYOUTS[layout](CALLS[verb][1][name])
    memory = view.array if isinstance(view, Producer) else view
    before = bits((memory,))
    assert bits(call(verb, **{name: view})) == EXPECTED[verb]
    assert bits((memory,)) == before


@pytest.mark.parametrize(("verb", "name"), [a for a in ARGUMENTS if "offsets" not in a[1]])
def test_broadcast_arrays(verb, name):
    row = CALLS[verb][1][name][:1]
    shape = CALLS[verb][1][name].shape
    copied = bits(call(verb, **{name: np.repeat(row, shape[0], axis=0)}))
    assert bits(call(verb, **{name: np.broadcast_to(row, shape)})) == copied
    assert bits(call(verb, **{name: torch.from_numpy(row.copy()).expand(shape)})) == copied


@given(st.data())
def test_any_view_is_its_copy(data):
    """A random view (order, step, sign, window) of a random array routes as its contiguous copy does."""
    width, rows = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 12))
    step = st.sampled_from([-2, -1, 1, 2])

    def view(n, m):
        a = np.random.default_rng(0).normal(size=(2 * n + 2, 2 * m + 2)).astype(np.float32)
        a = a if data.draw(st.booleans()) else np.asfortranarray(a)
        return a[:: data.draw(step), :: data.draw(step)][:n, :m]

    x, v = view(rows, width), view(rows, width)
    prototypes = np.stack([view(3, width), view(3, width)])[:, ::-1]
    cut = data.draw(st.integers(0, rows))
    offsets = np.array([0, cut, rows], data.draw(st.sampled_from([np.int32, np.int64])))
    copied = hisac.route(Histories(x.copy(), v.copy(), offsets), prototypes.copy(), temperature=0.1)
    assert bits(hisac.route(Histories(x, v, offsets), prototypes, temperature=0.1)) == bits(copied)


# -------------------------------------------------------------------------------------------------------------- refused


def fake(a):
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(torch.from_numpy(a.copy()))


def jagged(a):
    return torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=torch.jagged)


ARRAY = "expected a NumPy array, a torch tensor or anything with DLPack, got "
REFUSED = {  # what comes: how it is made of a right argument, the words after "verb: name "
    "list": (lambda a: a.tolist(), ARRAY + "list"),
    "number": (lambda a: "1", ARRAY + "str"),
    "class": (lambda a: torch.float32, ARRAY + "dtype"),
    "masked": (lambda a: np.ma.masked_array(a, a > 0), "expected an array without a mask, got a masked one; fill it"),
    "big-endian": (lambda a: a.astype(a.dtype.newbyteorder(">")), "expected a native dtype that DLPack names, got "),
    "structured": (lambda a: a.astype([("a", "f4")]), "expected a native dtype that DLPack names, got "),
    "object": (lambda a: a.astype(object), "expected a native dtype that DLPack names, got dtype('O')"),
    "long double": (lambda a: a.astype(np.longdouble), "expected a native dtype that DLPack names, got "),
    "meta": (lambda a: torch.from_numpy(a).to("meta"), "expected on the CPU, got meta"),
    "sparse": (lambda a: torch.from_numpy(a).to_sparse(), "expected a dense tensor, got layout torch.sparse_coo; "),
    "jagged": (jagged, "expected a dense tensor, got layout torch.jagged; pass values() and offsets()"),
    "nested": (
        lambda a: torch.nested.nested_tensor([torch.zeros(2, 3)]),
        "expected a dense tensor, got layout torch.strided; pass values() and offsets()",
    ),
    "mkldnn": (lambda a: torch.zeros(2, 3).to_mkldnn(), "expected a dense tensor, got layout torch._mkldnn; "),
    "negated": (lambda a: torch._neg_view(torch.from_numpy(a)), "is a conjugated or negated view; call resolve_conj("),
    "conjugated": (
        lambda a: torch.from_numpy(a).to(torch.complex64).conj(),
        "is a conjugated or negated view; call resolve_conj() or resolve_neg()",
    ),
    "DLPack float8": (
        lambda a: Producer(torch.from_numpy(a).to(torch.float8_e4m3fn)),
        "expected in CPU memory, of a dtype that ",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize(("verb", "name"), ARGUMENTS)
def test_refused_kinds(verb, name, kind):
    if (name, kind) == ("offsets", "list"):
        pytest.skip("taken: test_offsets_of_every_kind")
    make, text = REFUSED[kind]
    bad = make(CALLS[verb][1][name])
    with pytest.raises(TypeError, match=re.escape(f"{verb}: {TOLD.get(name, name)} {text}")):
        call(verb, **{name: bad})


@pytest.mark.parametrize(("verb", "name"), [a for a in ARGUMENTS if CALLS[a[0]][1][a[1]].dtype == np.float32])
def test_gradients_are_not_cut_in_silence(verb, name):
    t = torch.from_numpy(CALLS[verb][1][name].copy())
    with pytest.raises(TypeError) as error:
        call(verb, **{name: t.clone().requires_grad_()})
    told = TOLD.get(name, name)
    text = f"{verb}: {told} requires grad, which hisac.{verb} would cut; use hisac.torch, or detach()"
    assert str(error.value) == text
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(t, t)
        with pytest.raises(
            TypeError, match=f"^{verb}: {told} has a forward-mode tangent, which hisac.{verb} would cut"
        ):
            call(verb, **{name: dual})
    assert bits(call(verb, **{name: t.requires_grad_().detach()})) == EXPECTED[verb]


@pytest.mark.parametrize("dtype", ["float64", "int16", "bool", "complex64", "uint64"])
@pytest.mark.parametrize(("verb", "name"), ARGUMENTS)
def test_wrong_dtypes(verb, name, dtype):
    """Never converted: int64 codes, float64 embeddings and the like are named. torch says the same as NumPy."""
    right = CALLS[verb][1][name]
    with np.errstate(invalid="ignore"):
        cast = right.astype(dtype)
    for wrong in (cast, torch.from_numpy(cast)):
        with pytest.raises(TypeError) as error:
            call(verb, **{name: wrong})
        inner = "(vote|route)" if verb == "compress" else verb  # the verb that it calls
        assert re.match(rf"{inner}: {TOLD.get(name, name)} expected .+, got ", str(error.value))
        assert str(error.value).endswith(f", got {dtype} {list(right.shape)}")


def test_tensors_without_memory_of_their_own():
    """vmap, forward-mode functions, quantised and wrapper tensors, FakeTensor, float8: a TypeError, nothing written."""
    x, out = torch.from_numpy(X.copy()), torch.full((T, 2), -7, dtype=torch.int32)
    into = partial(hisac.encode, BOOK, out=out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd = [
            lambda: torch.func.vmap(into)(torch.stack([x, x])),
            lambda: torch.func.jvp(into, (x,), (x,)),
            lambda: torch.func.functionalize(into)(x),
            lambda: into(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
            lambda: into(x.to(torch.float8_e4m3fn)),
            lambda: into(torch._efficientzerotensor(T, D)),
        ]
        for f in odd:
            with pytest.raises(TypeError, match=r"^encode: x "):
                f()
    for bad in (partial(into, fake(X)), partial(hisac.encode, BOOK, x, out=fake(CODES))):
        with pytest.raises(TypeError, match=r"^encode: (x|out) expected an array with data, got a fake tensor$"):
            bad()
    assert (out == -7).all()


# ----------------------------------------------------------------------------------------------------------------- out=

OUTS = [  # of encode, which writes int32 [10, 2]
    (np.zeros((T, 2), np.int64), ValueError, "encode: out expected int32 [10, 2], got int64 [10, 2]"),
    (np.zeros((T, 2), ">i4"), ValueError, "encode: out expected int32 [10, 2], got >i4 [10, 2]"),
    (np.zeros((T, 3), np.int32), ValueError, "encode: out expected int32 [10, 2], got int32 [10, 3]"),
    (torch.zeros(T), ValueError, "encode: out expected int32 [10, 2], got float32 [10]"),
    (locked(CODES), TypeError, "encode: out expected a writable array, got a read-only one"),
    (CODES.tolist(), TypeError, "encode: out expected a NumPy array or a torch tensor, got list"),
    (Producer(CODES), TypeError, "encode: out expected a NumPy array or a torch tensor, got Producer"),
    (torch.zeros((T, 2), device="meta"), TypeError, "encode: out expected on the CPU, got meta"),
    *(
        (out, ValueError, "encode: out expected int32 [10, 2], row-major and contiguous, got other strides")
        for out in (
            *(LAYOUTS[name](CODES) for name in ("transposed", "negative", "sliced", "unaligned", "torch sliced")),
            torch.zeros((1, 2), dtype=torch.int32).expand(T, 2),
        )
    ),
]


@pytest.mark.parametrize(("out", "kind", "text"), OUTS)
def test_out_is_checked(out, kind, text):
    memory = out if isinstance(out, np.ndarray | torch.Tensor) and not getattr(out, "is_meta", False) else CODES
    before = bits((memory,))
    with pytest.raises(kind) as error:
        hisac.encode(BOOK, X, out=out)
    assert str(error.value) == text
    assert bits((memory,)) == before


def test_out_tensors_whose_meaning_would_be_lost():
    x, v = torch.from_numpy(X), torch.from_numpy(VALUE)
    tokens = torch.zeros(B, M, V)
    for bad, text in (
        (torch._neg_view(tokens), "route: out tokens is a conjugated or negated view; "),
        (tokens.clone().requires_grad_(), "route: out tokens requires grad, which hisac.route would cut; "),
    ):
        with pytest.raises(TypeError, match=re.escape(text)):
            hisac.route(Histories(x, v, OFFSETS), PROTOTYPES, out=Tokens(bad, None, None), temperature=0.1)
    assert (tokens == 0).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"offsets": np.array([0, 5, 4])},
        {"offsets": np.array([0, 4, T + 1])},
        {"temperature": 0.0},
        {"temperature": np.ones(3, np.float32)},
        {"count": np.ones(3, np.int32)},
        {"bias": np.ones(9, np.float32)},
        {"normalize": "?"},
        {"x": None},
        {"agents": PROTOTYPES[:, :, :5]},
    ],
)
def test_nothing_is_written_on_error(wrong):
    out = Tokens(np.full((B, M, V), 9, np.float32), np.full((B, M), 9, np.float32), np.full((B, M, D), 9, np.float32))
    with pytest.raises(ValueError, match=r"^route: "):
        route(**{**ROUTE, **wrong}, mean_x=True, out=out)
    assert all((a == 9).all() for a in out)


@pytest.mark.parametrize("rule", ["fanout", "beam"])
def test_numbers_of_a_rule(rule):
    """Whole numbers of any kind in anything that can be iterated over, once; a number alone is refused."""
    histories = Histories(offsets=OFFSETS, codes=CODES)
    expected = hisac.vote(BOOK, histories, **{rule: (1, 2)})
    for numbers in ([1, 2], (np.int64(1), 2), (True, 2), np.array([1, 2], np.uint8), (n for n in (1, 2)), {1: 0, 2: 0}):
        found = hisac.vote(BOOK, histories, **{rule: numbers})
        for mine, same in zip(found, expected, strict=True):
            np.testing.assert_array_equal(mine, same)
    for wrong, got in ((2, "2"), ([1, 0], "(1, 0)"), ((n for n in (1, 2, 3)), "(1, 2, 3)")):
        with pytest.raises(ValueError, match=f"{rule} expected one number .* of 2 levels, got {re.escape(got)}"):
            hisac.vote(BOOK, histories, **{rule: wrong})


def test_leaf_sums_keep_the_memory_of_their_rows_alone():
    behaviours = Histories(X, VALUE, OFFSETS, np.zeros_like(CODES))  # a leaf each
    for histories in (behaviours, Histories(*(a if a is None else torch.from_numpy(a) for a in behaviours))):
        for a in hisac.leaf_sums(BOOK, histories)[:-2]:
            if isinstance(a, np.ndarray):
                assert a.flags.owndata and a.base is None and a.shape[0] in (B, B + 1)
            elif a is not None:
                assert a.untyped_storage().nbytes() == a.nbytes and a.shape[0] in (B, B + 1)
