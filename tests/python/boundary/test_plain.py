# SPDX-License-Identifier: Apache-2.0
"""Plain arrays, which go straight into the core, beside all that must not; the callers' results of every verb."""

import gc
import sys

import numpy as np
import pytest
from test_boundary import (
    ATTEND,
    ATTENDED,
    BOOK,
    CODES,
    LAYOUTS,
    PROTOTYPES,
    REFUSED,
    ROUTE,
    TOKENS,
    TOLD,
    VALUE,
    D,
    Producer,
    T,
    X,
    bits,
    fake,
    locked,
    offset,
    route,
    sliced,
    unaligned,
)

import hisac
from hisac import Attended, Histories, Tokens, _core, arrays

torch = pytest.importorskip("torch")


def dual(t):
    return torch.autograd.forward_ad.make_dual(t, t)


class Mine(np.ndarray):
    pass


MATRIX = torch.from_numpy(X)
PLAIN = [X, X[:0], np.zeros((2, 0, 3)), np.zeros(()), locked(X), offset(X), X > 0, X.astype("f2"), CODES, MATRIX]
PLAIN += [torch.nn.Parameter(MATRIX, requires_grad=False), MATRIX.bfloat16(), torch.zeros(0, 3).T, torch.tensor(1)]
NOT_PLAIN = {
    **{kind: lambda make=make: make(X) for kind, (make, _) in REFUSED.items()},
    **{kind: lambda make=LAYOUTS[kind]: make(X) for kind in ("transposed", "negative", "unaligned", "torch sliced")},
    "none": lambda: None,
    "subclass": lambda: X.view(Mine),
    "torch subclass": lambda: MATRIX.as_subclass(type("Mine", (torch.Tensor,), {})),
    "gradient": lambda: MATRIX.clone().requires_grad_(),
    "tangent": lambda: dual(MATRIX),
    "zero": lambda: torch._efficientzerotensor(T, D),
    "fake": lambda: fake(X),
    "dates": lambda: X.astype("M8[s]"),
}


def test_plain_arrays_go_straight():
    """Ranks come from the letters; one that is not plain sends all of a call through `take`."""
    plain = _core.plain
    assert all(plain("a", (a,)) and plain("a" + " T" * a.ndim, (a,)) for a in PLAIN)
    assert not any(plain("a T T T T", (a,)) for a in PLAIN)
    assert plain("a T D, b?, c? T D", (X, None, MATRIX)) and not plain("a T D, b, c? T D", (X, None, MATRIX))
    assert not plain("a T D, b? T", (X, MATRIX))


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_is_not_plain_goes_through_take(kind):
    with torch.autograd.forward_ad.dual_level():
        odd = NOT_PLAIN[kind]()
        assert not _core.plain("a", (odd,)) and not _core.plain("a, b", (X, odd))


@pytest.mark.parametrize("letter", arrays.DLPACK_TYPES.replace("i", ""))
def test_builtin_types_by_their_names(letter):
    codes = CODES.astype(letter)
    with pytest.raises(TypeError) as error:
        hisac.vote(BOOK, Histories(offsets=ROUTE["offsets"], codes=codes), budget=2)
    assert str(error.value) == f"vote: codes expected int32 [T, L], got {codes.dtype} {list(codes.shape)}"


def test_types_of_others_are_no_builtin_ones():
    """ml_dtypes gives its types letters of NumPy's own, "L" among them."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name in ("float8_e4m3b11fnuz", "float8_e5m2", "int4"):
        with pytest.raises(TypeError, match=r"^encode: x "):
            hisac.encode(BOOK, np.zeros((T, D), getattr(ml_dtypes, name)))


OUT_FIELDS = {
    "route: out tokens": (TOKENS.tokens, lambda a: route(**ROUTE, out=Tokens(a, None, None)).tokens),
    "route: out lse": (TOKENS.lse, lambda a: route(**ROUTE, out=Tokens(None, a, None)).lse),
    "route: out mean_x": (
        TOKENS.mean_x,
        lambda a: route(**ROUTE, mean_x=True, out=Tokens(None, None, a)).mean_x,
    ),
    "attend: out": (ATTENDED.out, lambda a: hisac.attend(**ATTEND, out=Attended(a, None)).out),
    "attend: out lse": (ATTENDED.lse, lambda a: hisac.attend(**ATTEND, out=Attended(None, a)).lse),
}
STRIDES = "expected float32 {}, row-major and contiguous, got other strides"
BAD_OUTS = {
    "read-only": (locked, "expected a writable array, got a read-only one"),
    "big-endian": (lambda a: a.astype(">f4"), "expected float32 {0}, got >f4 {0}"),
    "wide": (lambda a: a.astype(float), "expected float32 {0}, got float64 {0}"),
    "bits": (lambda a: a.view(np.int32), "expected float32 {0}, got int32 {0}"),
    "sliced": (sliced, STRIDES),
    "unaligned": (unaligned, STRIDES),
    "torch half": (lambda a: torch.from_numpy(a).half(), "expected float32 {0}, got float16 {0}"),
    "torch sliced": (lambda a: torch.from_numpy(sliced(a)), STRIDES),
    "gradient": (lambda a: torch.from_numpy(a).requires_grad_(), "requires grad, which hisac.{1} would cut"),
    "tangent": (lambda a: dual(torch.from_numpy(a)), "has a forward-mode tangent, which hisac.{1} would cut"),
    "negated": (lambda a: torch._neg_view(torch.from_numpy(a)), "is a conjugated or negated view"),
    "conjugated": (lambda a: torch.from_numpy(a).to(torch.complex64).conj(), "is a conjugated or negated view"),
}


@pytest.mark.parametrize("kind", BAD_OUTS)
@pytest.mark.parametrize("name", OUT_FIELDS)
def test_out_of_every_verb_is_checked(name, kind):
    (right, call_with), (make, text) = OUT_FIELDS[name], BAD_OUTS[kind]
    expected = f"{name} " + text.format(list(right.shape), name.partition(":")[0])
    with torch.autograd.forward_ad.dual_level(), pytest.raises((TypeError, ValueError)) as error:
        call_with(make(np.full_like(right, 9)))
    assert str(error.value).startswith(expected)


@pytest.mark.parametrize("name", OUT_FIELDS)
def test_out_may_be_of_a_subclass(name):
    right, call_with = OUT_FIELDS[name]
    expected = bits((call_with(None),))
    for out in (np.zeros_like(right).view(Mine), torch.nn.Parameter(torch.zeros(right.shape), requires_grad=False)):
        assert call_with(out) is out and bits((out,)) == expected


# -------------------------------------------------------------------------------------------------------------- overlap


def at(address, a, memory=None):
    """A copy of an array at this byte of some memory."""
    memory = np.zeros(1 << 12, np.uint8) if memory is None else memory
    view = memory[address : address + a.nbytes].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


OUTS = {  # the output: what it holds, the call with it, the inputs
    "encode: out": (CODES, lambda a, x=X: hisac.encode(BOOK, x, out=a), {"x": X}),
    "route: out tokens": (
        TOKENS.tokens,
        lambda a, **new: route(**{**ROUTE, **new}, out=Tokens(a, None, None)),
        ROUTE,
    ),
    "route: out lse": (TOKENS.lse, lambda a, **new: route(**{**ROUTE, **new}, out=Tokens(None, a, None)), ROUTE),
    "route: out mean_x": (
        TOKENS.mean_x,
        lambda a, **new: route(**{**ROUTE, **new}, mean_x=True, out=Tokens(None, None, a)),
        ROUTE,
    ),
    "attend: out": (ATTENDED.out, lambda a, **new: hisac.attend(**{**ATTEND, **new}, out=Attended(a, None)), ATTEND),
    "attend: out lse": (
        ATTENDED.lse,
        lambda a, **new: hisac.attend(**{**ATTEND, **new}, out=Attended(None, a)),
        ATTEND,
    ),
}


@pytest.mark.parametrize("convert", [lambda a: a, torch.from_numpy])
@pytest.mark.parametrize(("name", "other"), [(name, other) for name, (*_, inputs) in OUTS.items() for other in inputs])
def test_an_output_shares_no_memory_with_an_input(name, other, convert):
    """Not a byte, whoever begins first, nor all of it; but they may touch."""
    right, call_with, inputs = OUTS[name]
    given, start = inputs[other], 1024
    for first, shared in ((start, True), (start + given.nbytes - 8, True), (start + 8 - right.nbytes, True),
                          (start + given.nbytes, False), (start - right.nbytes, False)):  # fmt: skip
        memory = np.zeros(1 << 12, np.uint8)
        out = at(first, right, memory)
        array = at(start, given, memory)
        before = memory.copy()
        if not shared:
            call_with(convert(out), **{other: convert(array)})
            continue
        with pytest.raises(ValueError) as error:
            call_with(convert(out), **{other: convert(array)})
        told = TOLD.get(other, other)
        assert str(error.value) == f"{name} expected memory of its own, got that of {told}"
        np.testing.assert_array_equal(memory, before)


def test_outputs_share_no_memory():
    memory = np.zeros(1 << 12, np.uint8)
    tokens, lse, mean_x = (at(0, a, memory) for a in TOKENS)
    apart = at(1024, TOKENS.tokens, memory)
    for given, name, other in (
        (Tokens(tokens, lse, None), "lse", "tokens"),
        (Tokens(tokens, None, mean_x), "mean_x", "tokens"),
        (Tokens(apart, lse, mean_x), "mean_x", "lse"),
    ):
        with pytest.raises(ValueError) as error:
            route(**ROUTE, mean_x=True, out=given)
        assert str(error.value) == f"route: out {name} expected memory of its own, got that of out {other}"
    with pytest.raises(ValueError, match=r"^attend: out lse expected memory of its own, got that of out$"):
        hisac.attend(**ATTEND, out=Attended(at(0, ATTENDED.out, memory), at(0, ATTENDED.lse, memory)))


def test_arrays_without_elements_share_nothing():
    """An empty array may lie anywhere, in the middle of another too."""
    memory = np.zeros(96, np.uint8)
    x = memory.view(np.float32)[: 2 * D].reshape(2, D)
    out = memory[8:8].view(np.int32).reshape(0, 2)
    assert hisac.encode(BOOK, x[1:1], out=out) is out
    tokens = Tokens(memory[8:8].view(np.float32).reshape(0, 4, D), memory[8:8].view(np.float32).reshape(0, 4), None)
    assert (
        hisac.route(Histories(x, x, np.zeros(1, int)), PROTOTYPES[:0], out=tokens, temperature=0.1).tokens
        is tokens.tokens
    )


def test_the_core_s_own_outputs():
    """Of verbs whose results Python allocates."""
    memory, book = np.zeros(1 << 12, np.uint8), BOOK._core
    codes, wide = at(0, CODES, memory), np.empty((T, 2), np.int64)
    rows, groups = at(0, X, memory), np.array([0, T])
    batch = Histories(rows, VALUE, groups, CODES)
    voted = book, batch, 1, [], []
    sums = np.empty((T, D), "f4"), np.empty((T, 3), "f4"), np.empty(2, int), None, CODES.copy(), np.empty(T, "f4")
    for call_core, text in (
        (lambda: _core.leaves(book, codes, at(0, wide[:, 0], memory)), "leaves: out {} codes"),
        (lambda: _core.prototypes(book, codes, at(40, X, memory)), "prototypes: out {} codes"),
        (
            lambda: _core.route_backward(
                None, batch._replace(x=X), PROTOTYPES[:1], *[None] * 3, 1.0, "agents", 0, "float32",
                None, TOKENS.lse[:1], *[None] * 5, at(0, groups, memory), None, at(0, VALUE, memory), *[None] * 4,
            ),
            "route_backward: v_rows {} dv",
        ),
        (
            lambda: _core.agent_lists(book, at(0, PROTOTYPES[:1], memory), None, at(0, CODES[None], memory)),
            "agent_lists: out {} prototypes",
        ),
        (
            lambda: _core.vote(*voted, codes[:1, None], wide[:1, :1], codes[0, :1], X[:1, None]),
            "vote: out count {} out codes",
        ),
        (
            lambda: _core.vote(*voted, codes[:1, None], wide[:1, :1], np.empty(1, "i4"), rows[:1, None]),
            "vote: out prototypes {} out codes",
        ),
        (
            lambda: _core.leaf_sums(book, batch, *sums, at(0, X[0], memory), np.empty(T, int)),
            "leaf_sums: out spread {} x",
        ),
        (
            lambda: _core.leaf_sums(book, batch, *sums, np.empty(T, "f4"), at(0, wide[:, 0], memory)),
            "leaf_sums: out votes {} x",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError) as error:
            call_core()
        assert str(error.value) == text.format("expected memory of its own, got that of")


# ------------------------------------------------------------------------------------------------------------- bfloat16


def other_bfloat16(a):
    """As ml_dtypes has it: contiguous, sliced; and as producers other than torch lend it."""
    dtype = pytest.importorskip("ml_dtypes").bfloat16
    tensor = torch.from_numpy(a).bfloat16()
    return [
        a.astype(dtype),
        sliced(a.astype(dtype)),
        locked(a.astype(dtype)),
        Producer(tensor),
        Producer(tensor.T.contiguous().T if a.ndim == 2 else tensor),
        Producer(torch.from_numpy(sliced(a)).bfloat16()),
    ]


@pytest.mark.parametrize("kind", range(6))
def test_bfloat16_of_others_is_torch_s(kind):
    """The same bits in every verb; results are NumPy's, of ml_dtypes' type where they have the input's."""
    ml_dtypes = pytest.importorskip("ml_dtypes")

    def both(function, like=ml_dtypes.bfloat16, **arrays):
        tensors = {name: torch.from_numpy(a).bfloat16() for name, a in arrays.items()}
        want = function(**tensors)
        got = function(**{name: other_bfloat16(a)[kind] for name, a in arrays.items()})
        got, want = ((r,) if hasattr(r, "shape") else [a for a in r if hasattr(a, "shape")] for r in (got, want))
        assert all(type(a) is np.ndarray for a in got) and got[0].dtype == like
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float64), b.double().numpy())

    offsets, v = ROUTE["offsets"], ROUTE["v"]
    both(lambda x: hisac.encode(BOOK, x), np.int32, x=X)
    both(lambda x, v: hisac.route(Histories(x, v, offsets), PROTOTYPES, temperature=0.1)[:2], x=X, v=v)
    batch = Histories(X, None, offsets, CODES)
    both(lambda v: hisac.compress(BOOK, batch._replace(v=v), budget=4, missing="token", temperature=0.1)[:2], v=v)
    both(lambda x, v: hisac.leaf_sums(BOOK, Histories(x, v, offsets, CODES)), np.float32, x=X, v=v)
    qkv = {name: ATTEND[name] for name in ("q", "keys", "values")}
    both(lambda **a: hisac.attend(**a, candidate_offsets=ATTEND["candidate_offsets"]), **qkv)
    tensor, array = torch.from_numpy(X).bfloat16(), other_bfloat16(X)[kind]
    assert hisac.fit(array, (3, 2)) == hisac.fit(tensor, (3, 2))


def test_bfloat16_results_of_the_caller():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    x = X.astype(bfloat16)
    histories = Histories(x, ROUTE["v"].astype(bfloat16), ROUTE["offsets"])
    fresh = hisac.route(histories, PROTOTYPES, temperature=0.1)
    assert _core.plain("a T D", (x,))
    out = Tokens(np.zeros_like(fresh.tokens), None, None)
    assert hisac.route(histories, PROTOTYPES, out=out, temperature=0.1).tokens is out.tokens
    assert out.tokens.tobytes() == fresh.tokens.tobytes()
    with pytest.raises(ValueError, match=r"^route: out tokens expected bfloat16 .*, got float16 "):
        hisac.route(histories, PROTOTYPES, out=Tokens(fresh.tokens.astype(np.float16), None, None), temperature=0.1)


def test_bfloat16_by_dlpack_needs_ml_dtypes(monkeypatch):
    lent = Producer(MATRIX.bfloat16())
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError) as error:
        hisac.encode(BOOK, lent)
    assert str(error.value) == "encode: x expected ml_dtypes beside bfloat16 by DLPack, got no such module"


def test_bfloat16_by_dlpack_is_borrowed():
    """Until the array that sees it is gone."""
    pytest.importorskip("ml_dtypes")
    tensor = torch.zeros(T, D, dtype=torch.bfloat16)
    seen = arrays.take_one("encode", "x", Producer(tensor))
    tensor[0, 0] = 3
    assert seen[0, 0] == 3 and seen.ctypes.data == tensor.data_ptr()
    del tensor
    gc.collect()
    assert seen[0, 0] == 3


# ---------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("convert", [lambda a: a, torch.from_numpy])
@pytest.mark.parametrize("width", [2**20 + 1, 2**57 + 1024, 2**57 + 16])
def test_empty_arrays_of_absurd_widths(width, convert):
    """Refused before anything of that size is asked for or counted."""
    x, prototypes, v = (convert(np.empty(s, "f4")) for s in ((0, width), (2, 0, width), (0, 3)))
    offsets, codes = convert(np.zeros(3, int)), convert(np.empty((0, 2), np.int32))
    none, lse = convert(np.empty((2, 0, 3), "f4")), convert(np.empty((2, 0), "f4"))
    right = {"x": x[:, :1], "v": v, "offsets": offsets, "agents": prototypes[:, :, :1]}
    q, keys = (convert(np.empty(s, "f4")) for s in ((0, 1, width), (2, 0, 1, width)))
    for function, name in (
        (lambda: hisac.encode(BOOK, x), "encode: x"),
        (lambda: hisac.fit(x, (2,)), "fit: x"),
        (lambda: route(**{**right, "x": x}), "route: x"),
        (lambda: route(**{**right, "v": x}), "route: v"),
        (lambda: route(**{**right, "agents": prototypes}), "route: prototypes"),
        (
            lambda: hisac.route_backward(
                Histories(x, v, offsets),
                prototypes,
                Tokens(none, lse),
                Tokens(none, None),
                need=("v",),
                temperature=0.1,
            ),
            "route_backward: x",
        ),
        (lambda: hisac.leaf_sums(BOOK, Histories(x, v, offsets, codes)), "leaf_sums: x"),
        (lambda: hisac.attend(q, keys, keys, offsets), "attend: q"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} expected [DVd] of at most 2\^20, got {width}$"):
            function()


def test_the_core_checks_widths_itself():
    """As torch's operators call it."""
    wide, v, offsets = np.empty((0, 2**57 + 1024), "f4"), np.empty((0, 3), "f4"), np.zeros(3, int)
    out = np.empty((2, 0, 3), "f4"), np.empty((2, 0), "f4")
    options = [None, None, None, 1.0, "history", 0, "float32"]
    with pytest.raises(ValueError, match=r"^route: x expected .* of at most 2\^20 numbers, got float32 \[0, 144"):
        _core.route(None, Histories(wide, v, offsets), np.empty((2, 0, 1), "f4"), *options, *out, None)
    with pytest.raises(ValueError, match=r"^route: prototypes expected .* D at most 2\^20, got float32 \[2, 0, 144"):
        _core.route(None, Histories(v, v, offsets), np.empty((2, 0, 2**57), "f4"), *options, *out, None)
    from hisac import torch as hisac_torch

    wide, v, offsets, prototypes = map(torch.from_numpy, (wide, v, offsets, np.empty((2, 0, 2**57 + 1024), "f4")))
    with pytest.raises(ValueError, match=r"^route: x expected .* of at most 2\^20 numbers, got float32 \[0, 144"):
        hisac_torch.route(Histories(wide, v, offsets), prototypes, temperature=0.1)
