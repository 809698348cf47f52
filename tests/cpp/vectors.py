# SPDX-License-Identifier: Apache-2.0
"""Writes vectors.bin, what `hisac.reference` says of seeded problems, for the C++ tests (vectors.h reads it).

Inputs are recipes, which both sides draw from splitmix64, or stored where they are few. Integers are stored; of many, a
digest of 64 bits. Floats come rounded to float32, with the bounds of `hisac.reference.bounds`: without products of
halves, and as on AMX. test_vectors.py fails when the file is not what the reference says now; then run

    python tests/cpp/vectors.py
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("vectors.bin")
HEAD = b"hisac vectors 1\n"
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
STORED = 200  # bytes of integers that are stored themselves
TAGS = {"float32": b"f", "int32": b"i", "int64": b"l", "int8": b"b", "float16": b"h", "uint16": b"H"}  # H: bfloat16


def mix(z: Any) -> Any:
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def bits(seed: int, n: int) -> Any:
    """The first n numbers of splitmix64."""
    return mix(np.uint64(seed) + GOLDEN * np.arange(1, n + 1, dtype=np.uint64))


def digest(values: Any) -> int:
    """64 bits of integers in their order."""
    a = np.ascontiguousarray(values, np.int64).reshape(-1).view(np.uint64)
    return int(mix(a + GOLDEN * np.arange(1, len(a) + 1, dtype=np.uint64)).sum(dtype=np.uint64))


def to_bfloat16(a: Any) -> Any:
    """The nearest bfloat16, ties to even, as float32."""
    b = np.asarray(a, np.float32).view(np.uint32)
    return ((b + np.uint32(0x7FFF) + (b >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(np.float32)


def rounded_up(bound: Any) -> Any:
    """The upper halves of float32 numbers not below the bounds."""
    at_least = np.nextafter(np.float32(bound), np.float32(np.inf)) * (np.asarray(bound) > 0)
    at_least = np.where(np.isnan(bound), np.nan, np.where(np.isinf(bound), np.inf, at_least)).astype(np.float32)
    b = at_least.view(np.uint32)
    return np.where(np.isfinite(at_least), b + np.uint32(0xFFFF), b).view(np.uint32) >> np.uint32(16)


def shape_of(shape: tuple[int, ...]) -> bytes:
    return struct.pack("<B", len(shape)) + struct.pack(f"<{len(shape)}I", *shape)


@dataclass
class Recipe:
    """Random numbers [shape]; patches: values of single entries, by their flat index."""

    seed: int
    shape: tuple[int, ...]
    patches: dict[int, float] = field(default_factory=dict)

    def patched(self, a: Any) -> Any:
        for i, value in self.patches.items():
            a[i] = value
        return a.reshape(self.shape)

    def head(self, kind: str) -> bytes:
        some = b"".join(struct.pack(f"<I{kind}", i, value) for i, value in self.patches.items())
        return shape_of(self.shape) + struct.pack("<QI", self.seed, len(self.patches)) + some


@dataclass
class Uniform(Recipe):
    """float32 in [-scale, scale); bfloat16: its values alone."""

    scale: float = 1.0
    bfloat16: bool = False

    def array(self) -> Any:
        n = int(np.prod(self.shape))
        a = np.float32(self.scale) * (
            (bits(self.seed, n) >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)
        )
        return self.patched(to_bfloat16(a) if self.bfloat16 else a)

    def payload(self) -> tuple[bytes, bytes]:
        return b"u", self.head("f") + struct.pack("<fB", self.scale, self.bfloat16)


MANNERS = ("even", "skewed", "halved", "one", "heavy in one")


@dataclass
class Codes(Recipe):
    """int32 [n, L] below the sizes; a manner a column: even, skewed to the lower, halved from number to number, the
    middle one, or the middle one in rows whose first code is below 6."""

    sizes: tuple[int, ...] = ()
    manners: tuple[str, ...] = ()

    def array(self) -> Any:
        n, levels = self.shape
        drawn = bits(self.seed, 2 * n * levels).reshape(n, levels, 2)
        out = np.zeros(self.shape, np.int64)
        for level, (size, manner) in enumerate(zip(self.sizes, self.manners, strict=True)):
            first, second = drawn[:, level, 0], drawn[:, level, 1]
            lowest = first & ~(first - np.uint64(1))
            zeros = np.where(first == 0, 64, np.log2(np.maximum(lowest, np.uint64(1)).astype(np.float64)))
            skewed = second % (np.uint64(1) + first % np.uint64(size))
            out[:, level] = {
                "even": second % np.uint64(size),
                "skewed": skewed,
                "halved": np.minimum(zeros.astype(np.int64), size - 1),
                "one": np.full(n, size // 2),
                "heavy in one": np.where(out[:, 0] < 6, size // 2, skewed.astype(np.int64)),
            }[manner]
        return self.patched(out.astype(np.int32).reshape(-1))

    def payload(self) -> tuple[bytes, bytes]:
        columns = (struct.pack("<IB", *c) for c in zip(self.sizes, map(MANNERS.index, self.manners), strict=True))
        return b"n", self.head("i") + b"".join(columns)


@dataclass
class Whole(Recipe):
    """int64 [n] of at most `digits` binary digits, large and small ones as often; one in eight is below zero."""

    digits: int = 0

    def array(self) -> Any:
        (n,) = self.shape
        drawn = bits(self.seed, 2 * n).reshape(n, 2)
        first, second = drawn[:, 0], drawn[:, 1]
        a = (first >> (np.uint64(63) - second % np.uint64(self.digits))).view(np.int64)
        return self.patched(np.where(second >> np.uint64(61), a, -a))

    def payload(self) -> tuple[bytes, bytes]:
        return b"w", self.head("q") + struct.pack("<B", self.digits)


@dataclass
class Stored:
    """An array as it is."""

    a: Any

    def array(self) -> Any:
        return self.a

    def payload(self) -> tuple[bytes, bytes]:
        a = np.ascontiguousarray(self.a)
        return TAGS[str(a.dtype)], shape_of(a.shape) + a.tobytes()


def offsets_of(*offsets: int) -> dict[str, Any]:
    return {"starts": Stored(np.array(offsets[:-1])), "ends": Stored(np.array(offsets[1:]))}


def number(*values: Any, kind: Any = np.int64) -> Stored:
    return Stored(np.array(values, kind))


@dataclass
class Integers:
    """Integers that are expected."""

    a: Any

    def payload(self) -> tuple[bytes, bytes]:
        if np.asarray(self.a).nbytes <= STORED:
            return Stored(self.a).payload()
        return b"d", shape_of(self.a.shape) + struct.pack("<Q", digest(self.a))


@dataclass
class Floats:
    """Floats [n, width] that are expected, every stride-th row, and their bounds, in general and on AMX."""

    a: Any
    bound: Any
    amx: Any = None
    stride: int = 1

    def payload(self) -> tuple[bytes, bytes]:
        a = np.asarray(self.a, np.float64)
        width = a.shape[-1] if a.ndim > 1 else 1
        rows, *limits = (
            np.broadcast_to(b, a.shape).reshape(-1, width)[:: self.stride].reshape(-1)
            for b in (a, self.bound, self.amx)
            if b is not None
        )
        values = rows.astype("<f4")
        with np.errstate(invalid="ignore"):
            lost = np.where(np.isfinite(rows), np.abs(rows - values), 0.0)
        halves = [rounded_up(b + lost).astype("<u2").tobytes() for b in limits]
        return b"e", shape_of(a.shape) + struct.pack("<I", self.stride) + values.tobytes() + b"".join(halves)


Case = tuple[str, dict[str, Any]]  # its name, "verb/which", and its records


def write(cases: Iterator[Case]) -> bytes:
    """A case: 'c' and its name; a record: its kind, its name, how many bytes, and these. What an earlier record has
    too is '=', with the number of that record among those which are no cases and not '=' themselves."""
    out, seen = [HEAD], dict[tuple[bytes, bytes], int]()

    def add(kind: bytes, name: str, data: bytes) -> None:
        if kind != b"c":
            if (kind, data) in seen:
                kind, data = b"=", struct.pack("<I", seen[kind, data])
            else:
                seen[kind, data] = len(seen)
        out.append(kind + struct.pack("<B", len(name)) + name.encode() + struct.pack("<I", len(data)) + data)

    for name, records in cases:
        add(b"c", name, b"")
        for of, record in records.items():
            kind, data = record.payload()
            add(kind, of, data)
    return b"".join(out)


def read(data: bytes) -> list[tuple[str, bytes, bytes]]:
    """(case and name, kind, bytes) of every record."""
    if not data.startswith(HEAD):
        raise ValueError("expected a file of vectors")
    at, case = len(HEAD), ""
    out, written = list[tuple[str, bytes, bytes]](), list[tuple[bytes, bytes]]()
    while at < len(data):
        kind, length = data[at : at + 1], data[at + 1]
        name = data[at + 2 : at + 2 + length].decode()
        (size,) = struct.unpack_from("<I", data, at + 2 + length)
        at += 6 + length + size
        content = data[at - size : at]
        if kind == b"c":
            case = name
            continue
        if kind == b"=":
            kind, content = written[struct.unpack("<I", content)[0]]
        else:
            written.append((kind, content))
        out.append((f"{case}: {name}", kind, content))
    return out


def floats(data: bytes) -> tuple[bytes, Any, Any]:
    """Of a record of floats: its head, the values, and one or two bounds."""
    rank = data[0]
    *shape, stride = struct.unpack_from(f"<{rank + 1}I", data, 1)
    head, width = 5 + 4 * rank, shape[-1] if rank > 1 else 1
    n = len(range(0, int(np.prod(shape)) // width, stride)) * width
    values = np.frombuffer(data, "<f4", n, head).astype(np.float64)
    limits = np.frombuffer(data, "<u2", -1, head + 4 * n).astype(np.uint32) << np.uint32(16)
    return data[:head], values, limits.view(np.float32).astype(np.float64).reshape(-1, n)


def differences(old: bytes, new: bytes) -> list[str]:
    """What two files differ in. Floats may, by what a sum in another order and one more rounding make of them."""
    a, b, out = read(old), read(new), []
    if [r[:2] for r in a] != [r[:2] for r in b]:
        return [f"records: {len(a)}, {len(b)}, or their names"]
    for (name, kind, was), (_, _, now) in zip(a, b, strict=True):
        if kind != b"e" or len(was) != len(now):
            if was != now:
                out.append(name)
            continue
        (head, values, bound), (other, new_values, new_bound) = floats(was), floats(now)
        with np.errstate(invalid="ignore"):
            apart = np.abs(values - new_values) > 2.0**-23 * np.abs(values) + bound[0] / 1000
        if head != other or (apart & ~(values == new_values)).any():
            out.append(name)
        elif not np.allclose(bound, new_bound, rtol=0.02, atol=0, equal_nan=True):
            out.append(f"{name}, its bound")
    return out


if __name__ == "__main__":
    from vector_cases import cases

    FILE.write_bytes(write(cases()))
    print(f"{FILE.name}: {FILE.stat().st_size} bytes")
