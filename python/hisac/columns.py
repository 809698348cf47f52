# SPDX-License-Identifier: Apache-2.0
"""Columns of lists in a batch: of a dict of arrays, or read in place by the Arrow C data interface.

A producer's `__arrow_c_array__` or `__arrow_c_stream__` gives capsules of C structures, which are read here by ctypes;
pyarrow is not needed. https://arrow.apache.org/docs/format/CDataInterface.html
"""

import ctypes
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np

from .types import Array

_P, _N = ctypes.c_void_p, ctypes.c_int64
_SCHEMA: dict[str, Any] = {
    "format": ctypes.c_char_p,
    "name": ctypes.c_char_p,
    "metadata": _P,
    "flags": _N,
    "n_children": _N,
}
_SCHEMA |= {"children": ctypes.POINTER(_P), "dictionary": _P, "release": _P, "private_data": _P}
_ARRAY: dict[str, Any] = dict.fromkeys(("length", "null_count", "offset", "n_buffers", "n_children"), _N)
_ARRAY |= {"buffers": ctypes.POINTER(_P), "children": ctypes.POINTER(_P)}
_ARRAY |= {"dictionary": _P, "release": _P, "private_data": _P}


class _Schema(ctypes.Structure):
    _fields_ = tuple(_SCHEMA.items())


class _Array(ctypes.Structure):
    _fields_ = tuple(_ARRAY.items())


class _Stream(ctypes.Structure):
    _fields_ = tuple((name, _P) for name in ("get_schema", "get_next", "get_last_error", "release", "private_data"))


_pointer_of = ctypes.PYFUNCTYPE(_P, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
_FILL = ctypes.CFUNCTYPE(ctypes.c_int, _P, _P)
_TEXT = ctypes.CFUNCTYPE(ctypes.c_char_p, _P)
_FREE = ctypes.CFUNCTYPE(None, _P)
_TYPES = dict(zip("cCsSiIlLefg", map(np.dtype, "i1 u1 i2 u2 i4 u4 i8 u8 f2 f4 f8".split()), strict=True))
_TYPES |= {f"ts{unit[0]}": np.dtype(f"M8[{unit}]") for unit in ("s", "ms", "us", "ns")}


class Kind(NamedTuple):
    """What becomes of a column's values, convert(its name, an array, or a list of strings), and of its nulls."""

    convert: Callable[[str, Any], Array]
    null: float


@contextmanager
def lists_of(batch: Any, wanted: Sequence[tuple[str, Kind]]) -> Iterator[tuple[Array, list[Array], list[str]]]:
    """(lengths [B]; of each wanted column the values of its lists, one list after the other; the names of all columns).

    The values are there until the end of the context. Raises ValueError for a column that is not there, and where lists
    of two columns differ in length; TypeError for what is no batch, or no list.
    """
    with ExitStack() as stack:
        if isinstance(batch, Mapping):
            there = list(batch)
        else:
            schema, chunks = stack.enter_context(_chunks(batch))
            there = [(field.name or b"").decode() for field in _children(schema)]
        every: list[Array] = []
        lengths: Array = np.empty(0, np.int64)
        for name, kind in wanted:
            if name not in there:
                raise ValueError(f"Compress: a batch expected with a column {name}, got {', '.join(there)}")
            if isinstance(batch, Mapping):
                parts = [_nested(name, batch[name], kind)]
            else:
                at = there.index(name)
                parts = [_lists(name, _children(schema)[at], _children(c)[at], c, kind) for c in chunks]
                parts = parts or [(kind.convert(name, np.empty(0, np.int64)), lengths)]
            values, own = (p[0] if len(p) == 1 else np.concatenate(p) for p in zip(*parts, strict=True))
            lengths = lengths if every else own
            if (off := np.flatnonzero(own != lengths)).size:
                row = off[0]
                text = f"{lengths[row]} in row {row}, as {wanted[0][0]}, got {own[row]}"
                raise ValueError(f"Compress: lists of {name} expected of length {text}")
            every.append(values)
        yield lengths, every, there


# -------------------------------------------------------------------------------------------------------------- a dict


def _nested(name: str, column: Any, kind: Kind) -> tuple[Array, Array]:
    """An array [B, n], or one of lists, arrays and None -> (values, lengths)."""
    if isinstance(column, np.ndarray) and column.ndim == 2:
        values, lengths = column.reshape(-1), np.full(len(column), column.shape[1], np.int64)
    else:
        rows = [np.empty(0) if _is_null(row) else np.asarray(row) for row in column]
        if wrong := [row for row in rows if row.ndim != 1]:
            raise TypeError(f"Compress: column {name} expected lists, got {wrong[0]!s:.60}")
        full = [row for row in rows if len(row)]
        values = np.concatenate(full) if full else np.empty(0, np.int64)
        lengths = np.array([len(row) for row in rows], np.int64)
    if values.dtype != object:
        return kind.convert(name, values.tolist() if values.dtype.kind == "U" else values), lengths
    known = [value for value in values.tolist() if not _is_null(value)]
    strings = bool(known) and isinstance(known[0], str)
    found = kind.convert(name, known if strings else np.array(known, None if known else np.int64))
    out = np.full(len(values), found.dtype.type(kind.null))
    out[[not _is_null(value) for value in values.tolist()]] = found
    return out, lengths


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


# --------------------------------------------------------------------------------------------------------------- Arrow


@contextmanager
def _chunks(batch: Any) -> Iterator[tuple[Any, list[Any]]]:
    """(the schema, record batches), whose memory is there until the end of the context."""
    if hasattr(batch, "__arrow_c_array__"):
        schema, array = batch.__arrow_c_array__()
        node = _Array.from_address(_pointer_of(array, b"arrow_array"))
        yield _Schema.from_address(_pointer_of(schema, b"arrow_schema")), [node]
        return
    if not hasattr(batch, "__arrow_c_stream__"):
        raise TypeError(f"Compress: a batch expected as a dict of arrays or Arrow's, got {type(batch).__name__}")
    capsule = batch.__arrow_c_stream__()
    stream = _Stream.from_address(_pointer_of(capsule, b"arrow_array_stream"))
    nodes: list[Any] = [_Schema()]

    def fill(function: int, node: Any) -> None:
        if _FILL(function)(ctypes.addressof(stream), ctypes.addressof(node)):
            text = _TEXT(stream.get_last_error)(ctypes.addressof(stream)) or b"for no stated reason"
            raise OSError(f"Compress: the Arrow stream failed: {text.decode(errors='replace')}")

    try:
        fill(stream.get_schema, nodes[0])
        while len(nodes) == 1 or nodes[-1].release:
            nodes.append(_Array())
            fill(stream.get_next, nodes[-1])
        yield nodes[0], nodes[1:-1]
    finally:
        for node in nodes:
            if node.release:
                _FREE(node.release)(ctypes.addressof(node))


def _children(node: Any) -> list[Any]:
    return [type(node).from_address(node.children[i]) for i in range(node.n_children)]


def _view(array: Any, buffer: int, dtype: Any, begin: int, n: int) -> Array:
    """n elements of a buffer from `begin` on, in place."""
    size, address = np.dtype(dtype).itemsize, array.buffers[buffer] if n else None
    if not address:  # a buffer without elements
        return np.zeros(n, dtype)
    found: Array = np.frombuffer((ctypes.c_char * (n * size)).from_address(address + begin * size), dtype)
    found.flags.writeable = False
    return found


def _valid(array: Any, begin: int, n: int) -> Array:
    """Which of n elements are not null; None: all."""
    if not array.null_count or not array.n_buffers or not array.buffers[0]:
        return None
    bits = _view(array, 0, np.uint8, begin // 8, (begin + n + 7) // 8 - begin // 8)
    return np.unpackbits(bits, bitorder="little")[begin % 8 : begin % 8 + n].astype(bool)


def _offsets(array: Any, dtype: Any, begin: int, n: int) -> Array:
    return _view(array, 1, dtype, begin, n + 1) if n else np.zeros(1, dtype)


def _lists(name: str, field: Any, column: Any, batch: Any, kind: Kind) -> tuple[Array, Array]:
    """A column of a record batch -> (values, lengths)."""
    code, begin, n = field.format.decode(), column.offset + batch.offset, batch.length
    if code == "n":
        return kind.convert(name, np.empty(0, np.int64)), np.zeros(n, np.int64)
    if code in ("+l", "+L"):
        offsets = _offsets(column, np.int32 if code == "+l" else np.int64, begin, n)
    elif code.startswith("+w:"):
        offsets = np.arange(begin, begin + n + 1) * int(code[3:])
    else:
        raise TypeError(f"Compress: column {name} expected list, large_list or fixed_size_list, got Arrow's {code!r}")
    lengths, valid, first = np.diff(offsets).astype(np.int64), _valid(column, begin, n), int(offsets[0])
    values = _values(name, _children(field)[0], _children(column)[0], first, int(offsets[-1]) - first, kind)
    if valid is not None and lengths[~valid].any():  # what stands below a null list is none of its
        values, lengths = values[np.repeat(valid, lengths)], np.where(valid, lengths, 0)
    return values, lengths


def _values(name: str, field: Any, array: Any, first: int, n: int, kind: Kind) -> Array:
    """n values from `first` on, converted: those of a dictionary once."""
    code, begin = field.format.decode(), array.offset + first
    valid = _valid(array, begin, n)
    if field.dictionary:
        words = _Array.from_address(array.dictionary)
        known = _values(name, _Schema.from_address(field.dictionary), words, 0, words.length, kind)
        known = np.append(known, known.dtype.type(kind.null))
        index = _view(array, 1, _TYPES[code], begin, n).astype(np.int64)
        return known[index if valid is None else np.where(valid, index, -1)]
    if code == "n":
        empty = kind.convert(name, np.empty(0, np.int64))
        return np.full(n, empty.dtype.type(kind.null))
    found: Any
    if code in ("u", "U"):
        found = _strings(array, np.int32 if code == "u" else np.int64, begin, n)
    elif code == "vu":
        found = _views(array, begin, n, valid)
    elif (dtype := _TYPES.get(code.partition(":")[0])) is not None:
        found = _view(array, 1, dtype, begin, n)
    elif code == "tdD":
        found = _view(array, 1, np.int32, begin, n).astype("M8[D]")
    else:
        raise TypeError(f"Compress: column {name} expected lists of numbers or strings, got Arrow's {code!r}: cast it")
    out = kind.convert(name, found)
    return out if valid is None else np.where(valid, out, out.dtype.type(kind.null))


def _strings(array: Any, dtype: Any, begin: int, n: int) -> list[str]:
    offsets = _offsets(array, dtype, begin, n)
    text = _view(array, 2, np.uint8, int(offsets[0]), int(offsets[-1] - offsets[0])).tobytes()
    spans = itertools.pairwise((offsets - offsets[0]).tolist())
    if text.isascii():
        every = text.decode()
        return [every[a:b] for a, b in spans]
    return [text[a:b].decode(errors="replace") for a, b in spans]


def _views(array: Any, begin: int, n: int, valid: Array) -> list[str]:
    """16 bytes a string: its length, and 12 bytes of text; or 4 of them, the buffer of the text and its begin there."""
    raw = _view(array, 1, np.uint8, 16 * begin, 16 * n).tobytes()
    out = []
    for i, (size, _, buffer, at) in enumerate(np.frombuffer(raw, np.int32).reshape(n, 4).tolist()):
        if valid is not None and not valid[i]:
            out.append("")
            continue
        short = raw[16 * i + 4 : 16 * i + 4 + size]
        text = short if size <= 12 else ctypes.string_at(array.buffers[2 + buffer] + at, size)
        out.append(text.decode(errors="replace"))
    return out
