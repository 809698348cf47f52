# SPDX-License-Identifier: Apache-2.0
"""Arrays in, arrays out: what kinds the verbs take, and results of the same kind in the same place.

NumPy arrays and torch tensors come as they are, the latter from a GPU too; anything else with DLPack on the CPU is seen
as NumPy, and bfloat16 as ml_dtypes' where that is installed. A non-contiguous input is copied once; dtypes are never
converted, devices never changed. torch is not imported here: a tensor brings its own module.
"""

import functools
import importlib
import math
import operator
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np

from . import _core
from .types import Array, Histories

FLOAT32, INT32, INT64 = map(np.dtype, (np.float32, np.int32, np.int64))
NUMBERS = (int, float, np.number)
plain, fits = _core.plain, _core.fits
core: Any = _core  # starred arguments do not go with its signatures
DLPACK_TYPES = "?bBhHiIlLqQefdFD"  # NumPy's letters for them; not longdouble, dates, structures


def is_torch(x: Array) -> bool:
    """Whether x is a torch tensor, without importing torch."""
    return isinstance(x, getattr(sys.modules.get("torch"), "Tensor", ()))


def is_cuda(x: Array) -> bool:
    """Whether x, taken, is a torch tensor on a GPU."""
    return not isinstance(x, np.ndarray) and bool(x.is_cuda)


def _refuse_view(verb: str, name: str, x: Array) -> None:
    """Refuse a torch tensor that says more than its memory does, or lies elsewhere."""
    if x.requires_grad:
        raise TypeError(f"{verb}: {name} requires grad, which hisac.{verb} would cut; use hisac.torch, or detach()")
    torch = sys.modules["torch"]
    dual = torch.autograd.forward_ad
    if getattr(dual, "_current_level", 0) >= 0 and dual.unpack_dual(x).tangent is not None:  # costs 10 of those below
        raise TypeError(f"{verb}: {name} has a forward-mode tangent, which hisac.{verb} would cut; see hisac.torch")
    if x.is_nested or x.layout is not torch.strided:
        raise TypeError(f"{verb}: {name} expected a dense tensor, got layout {x.layout}; pass values() and offsets()")
    if x.is_conj() or x.is_neg():
        raise TypeError(f"{verb}: {name} is a conjugated or negated view; call resolve_conj() or resolve_neg()")
    why = cuda_missing() if x.is_cuda else ""
    if why or not (x.is_cpu or x.is_cuda):
        raise TypeError(f"{verb}: {name} expected on the CPU, got {x.device}{why and ': ' + why}")


@functools.cache
def cuda_missing() -> str:
    """Why there are no verbs on a GPU; empty where they are, from now on."""
    try:
        from . import _cuda
    except ImportError:
        return "this build has no CUDA kernels"
    why: str = _cuda.enable()
    if not why:
        _core.use_cuda(_cuda.backend())
    return why


def lend(size: int, index: int, book: _core.Codebook | None) -> tuple[Array, Array, int]:
    """For the core, on GPU `index`: scratch of so many bytes, the book's image (copied once), the current stream."""
    torch = sys.modules["torch"]
    device = torch.device("cuda", index)
    image = None
    if book is not None:
        images = vars(book).setdefault("images", {})
        if index not in images:
            images[index] = torch.tensor(book.image, device=device)
        image = images[index]
    scratch = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
    return scratch, image, torch.cuda.current_stream(device).cuda_stream


def take(verb: str, names: str, *arrays: Array) -> tuple[Array, ...]:
    """Inputs as the core can borrow them, contiguous NumPy arrays or torch tensors, by "name letters, .." with a letter
    for each dimension, or none for any; "name?" may be None.

    Plain ones stay as they are; any other is copied, or raises ValueError, or TypeError: what is no array, and tensors
    whose meaning the core would lose: gradients, conjugated or negated views, jagged and sparse layouts, other devices.
    """
    if plain(names, arrays):
        return arrays
    kinds = (name.partition(" ") for name in names.split(", "))
    return tuple(
        None if x is None and name[-1] == "?" else take_one(verb, name.rstrip("?"), x, letters)
        for x, (name, _, letters) in zip(arrays, kinds, strict=True)
    )


def take_one(verb: str, name: str, x: Array, letters: str = "") -> Array:
    """`take` of one array, whatever its name."""
    if isinstance(x, np.ndarray):
        if type(x) is not np.ndarray and isinstance(x, np.ma.MaskedArray):
            raise TypeError(f"{verb}: {name} expected an array without a mask, got a masked one; fill it")
        dtype, flags = x.dtype, x.flags
        if (dtype.char not in DLPACK_TYPES and dtype.name != "bfloat16") or not dtype.isnative:
            raise TypeError(f"{verb}: {name} expected a native dtype that DLPack names, got {dtype!r}")
        taken = x if flags.c_contiguous and flags.aligned else x.copy()
    elif is_torch(x):
        _refuse_view(verb, name, x)
        taken = x.contiguous()
    elif hasattr(x, "__dlpack__"):
        try:
            seen = np.from_dlpack(x)
        except (BufferError, RuntimeError) as error:
            seen = _from_bfloat16(verb, name, x, error)
        return take_one(verb, name, seen, letters)
    else:
        raise TypeError(
            f"{verb}: {name} expected a NumPy array, a torch tensor or anything with DLPack, got {type(x).__name__}"
        )
    if letters and x.ndim != letters.count(" ") + 1:
        shape = ", ".join(letters.split()).replace("+", " + ")
        raise ValueError(f"{verb}: {name} expected [{shape}], got {dtype_name(x)} {list(x.shape)}")
    if letters[-1:] in tuple("DVd") and x.shape[-1] > 2**20:
        raise ValueError(f"{verb}: {name} expected {letters[-1]} of at most 2^20, got {x.shape[-1]}")
    if letters == "B+1" and not x.shape[0]:
        raise ValueError(f"{verb}: {name} expected [B + 1], got an empty array")
    return taken


def _from_bfloat16(verb: str, name: str, x: Array, error: Exception) -> Array:
    """What NumPy refused with this error, as ml_dtypes.bfloat16 if it is bfloat16 on the CPU."""
    bits = core.bfloat16_bits(x)
    if bits is None:
        raise TypeError(f"{verb}: {name} expected in CPU memory, of a dtype that NumPy has: {error}") from None
    try:
        return bits.view(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError:
        raise TypeError(f"{verb}: {name} expected ml_dtypes beside bfloat16 by DLPack, got no such module") from None


def empty(like: Array, shape: tuple[int, ...], dtype: Any = None) -> Array:
    """An uninitialised result beside `like`, of a dtype of NumPy's, or of like's own."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, like.dtype if dtype is None else dtype)
    if dtype is None:
        return like.new_empty(*shape)
    torch = sys.modules["torch"]
    if like.is_cuda:
        return like.new_empty(shape, dtype=getattr(torch, dtype.name))
    return torch.from_numpy(np.empty(shape, dtype))  # 0.6 us; new_empty takes 0.9


def maker(like: Array) -> Any:
    """`empty` of one array, f(shape, dtype), without a step between for NumPy's."""
    return np.empty if isinstance(like, np.ndarray) else functools.partial(empty, like)


def number(x: float, like: Array) -> Array:
    """A number as float32 [1] beside `like`."""
    if not is_cuda(like):
        return np.array([x], np.float32)
    torch = sys.modules["torch"]
    return torch.full((1,), x, dtype=torch.float32, device=like.device)


def on_host(a: Array) -> Any:
    """As NumPy; what lies on a GPU is waited for."""
    return a.cpu().numpy() if is_torch(a) else np.asarray(a)


def beside(like: Array, a: Array) -> Array:
    """The same numbers of the kind of `like`, in its place."""
    if is_torch(like) != is_torch(a):
        return sys.modules["torch"].as_tensor(a, device=like.device) if is_torch(like) else on_host(a)
    return a


def first_rows(a: Array, n: int) -> Array:
    """The first n rows of a result, without the memory of the others; what NumPy made of it is no longer to be used."""
    if is_torch(a):
        return a[:n].clone()
    a.resize((n, *a.shape[1:]), refcheck=False)
    return a


def give(verb: str, name: str, out: Array, like: Array, shape: tuple[int, ...], dtype: Any = None) -> Array:
    """The caller's `out`, checked, or a fresh result."""
    if out is None:
        return empty(like, shape, dtype)
    if fits(out, shape, like, -1 if dtype is None else dtype.num):
        return out
    if is_torch(out):
        _refuse_view(verb, name, out)
    elif not isinstance(out, np.ndarray):
        raise TypeError(f"{verb}: {name} expected a NumPy array or a torch tensor, got {type(out).__name__}")
    wanted, got = str(dtype or dtype_name(like)), dtype_name(out)
    if tuple(out.shape) != tuple(shape) or got != wanted:
        raise ValueError(f"{verb}: {name} expected {wanted} {list(shape)}, got {got} {list(out.shape)}")
    if not (out.is_contiguous() if is_torch(out) else out.flags.c_contiguous and out.flags.aligned):
        raise ValueError(f"{verb}: {name} expected {wanted} {list(shape)}, row-major and contiguous, got other strides")
    return out


def dtype_name(x: Array) -> str:
    """float32, bfloat16, int64, ..."""
    return str(x.dtype).replace("torch.", "")


def whole(verb: str, name: str, n: Any, least: float = -math.inf, most: float = math.inf) -> int:
    """A whole number in a range; a float is refused rather than cut."""
    try:
        number = operator.index(n)
    except TypeError:
        got = type(n).__name__ if getattr(n, "shape", ()) else repr(n)
        raise TypeError(f"{verb}: {name} expected a whole number, got {got}") from None
    if not least <= number <= most:
        raise ValueError(f"{verb}: {name} expected {least} to {most}, got {number}")
    return number


def most_tokens(verb: str, token_offsets: Array, longest: int | None) -> int:
    """`longest` as the core takes it, 0 where it is not known."""
    if longest is None:
        return 0
    if token_offsets is None:
        raise ValueError(f"{verb}: longest expected beside token_offsets, got {longest} without")
    return whole(verb, "longest", longest, 0)


def per_level(verb: str, name: str, given: Any, levels: int, most: float = math.inf) -> tuple[int, ...]:
    """Whole numbers from 1 on, one a level; a tuple of such numbers is taken as it is."""
    if type(given) is tuple and len(given) == levels:
        for k in given:
            if type(k) is not int or not 1 <= k <= most:
                break
        else:
            return given
    if hasattr(given, "__iter__"):
        found = tuple(whole(verb, name, k) for k in given)
        if len(found) == levels and 1 <= min(found) and max(found) <= most:
            return found
        given = found
    kind = ">= 1" if most == math.inf else f"of 1 to {most}"
    raise ValueError(f"{verb}: {name} expected one number {kind} for each of {levels} levels, got {given!r}")


_Kind = TypeVar("_Kind")


def check(given: Any, kind: type[_Kind], name: str) -> _Kind:
    """`given`; TypeError where it is of another type of hisac."""
    if not isinstance(given, kind):
        raise TypeError(f"{name} expected hisac.{kind.__name__}, got {type(given).__name__}")
    return given


def wanted_of(verb: str, need: Iterable[str], gradients: Any) -> tuple[str, ...]:
    """The names of the gradients that a backward is asked for."""
    wanted = (need,) if isinstance(need, str) else tuple(need)
    if not set(wanted) <= set(gradients._fields):
        raise ValueError(f"{verb}: need expected names of {gradients._fields}, got {wanted}")
    return wanted


def take_histories(verb: str, names: str, histories: Histories) -> Histories:
    """The fields that a verb reads, as `take`; "-" stands for one that it does not read, which stays as it is."""
    if not isinstance(histories, Histories):
        raise TypeError(f"{verb}: histories expected hisac.Histories, got {type(histories).__name__}")
    if plain(names, histories):
        return histories
    taken: list[Any] = []
    for kind, field in zip(names.split(", "), histories[:-2], strict=True):
        name, _, letters = kind.partition(" ")
        if name == "-" or (field is None and name[-1] == "?"):
            taken.append(field)
        elif field is None:
            raise TypeError(f"{verb}: {name} expected in the histories, got None")
        elif name == "offsets":
            taken.append(_take_offsets(verb, field, letters, histories))
        elif name == "x_scale?" and isinstance(field, NUMBERS):
            taken.append(number(float(field), taken[1]))
        else:
            taken.append(take_one(verb, name.rstrip("?"), field, letters))
    taken += histories[-2:]
    return Histories(*taken)


def behaviours_of(histories: Histories) -> Any:
    """T of histories that are taken."""
    h = histories
    for a in (h.x_ids, h.v_ids, h.v, h.x, h.codes, h.bias, h.spread, h.weights):
        if a is not None:
            return a.shape[0]
    raise TypeError("histories expected with x, v, codes or ids, got none of these")


def rows_of(table: Array, listed: Array) -> int:
    """Rows of the gradient of x or v, of a table as many as are listed."""
    return 0 if table is None else len(table if listed is None else listed)


def pair_of(verb: str, offsets: Any) -> tuple[Any, Any] | None:
    """Offsets that are (starts, ends); None for any other than a tuple."""
    if not isinstance(offsets, tuple):
        return None
    if len(offsets) != 2:
        raise ValueError(
            f"{verb}: offsets expected an array, a list, or a tuple (starts, ends), got a tuple of {len(offsets)}"
        )
    return offsets


def _take_offsets(verb: str, offsets: Any, letters: str, beside: Histories) -> Any:
    """offsets [B + 1], or (starts [B], ends [B]): arrays, or lists of integers, which go where codes or v are."""
    if pair := pair_of(verb, offsets):
        both = zip(("starts", "ends"), pair, strict=True)
        return tuple(take_one(verb, name, _of_list(verb, name, a, beside), "B") for name, a in both)
    return take_one(verb, "offsets", _of_list(verb, "offsets", offsets, beside), letters)


def _of_list(verb: str, name: str, a: Any, beside: Histories) -> Array:
    """A list or range of integers as int64, beside the arrays of a batch; anything else as it is."""
    if not isinstance(a, list | range):
        return a
    found = np.array([whole(verb, name, n, -(2**63), 2**63 - 1) for n in a], np.int64)
    like = next((t for t in (beside.codes, beside.v) if is_torch(t)), None)
    return found if like is None else sys.modules["torch"].from_numpy(found).to(like.device)
