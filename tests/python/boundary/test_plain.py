# SPDX-License-Identifier: Apache-2.0
"""Plain arrays, which go straight into the core, beside all that must not; and the callers' results of every verb."""

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
    D,
    T,
    X,
    bits,
    fake,
    locked,
    offset,
    sliced,
    unaligned,
)

import hisac
from hisac import Attended, Tokens, _core, arrays

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
        hisac.vote(BOOK, codes, ROUTE["offsets"], budget=2)
    assert str(error.value) == f"vote: codes expected int32 [T, L], got {codes.dtype} {list(codes.shape)}"


def test_types_of_others_are_no_builtin_ones():
    """ml_dtypes gives its types letters of NumPy's own, "L" among them."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name in ("bfloat16", "float8_e4m3b11fnuz", "float8_e5m2", "int4"):
        with pytest.raises(TypeError, match=r"^encode: x "):
            hisac.encode(BOOK, np.zeros((T, D), getattr(ml_dtypes, name)))


OUT_FIELDS = {
    "route: out tokens": (TOKENS.tokens, lambda a: hisac.route(**ROUTE, out=Tokens(a, None, None)).tokens),
    "route: out lse": (TOKENS.lse, lambda a: hisac.route(**ROUTE, out=Tokens(None, a, None)).lse),
    "route: out prototypes": (
        PROTOTYPES,
        lambda a: hisac.route(**ROUTE, refine=1, out=Tokens(None, None, a)).prototypes,
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
