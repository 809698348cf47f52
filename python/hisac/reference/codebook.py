# SPDX-License-Identifier: Apache-2.0
"""The definition of the codebook and its two verbs, `fit` and `encode`; part of `hisac.reference`, read first.

Source: HiSAC, arXiv 2602.21009, its hierarchical codebook.
"""

import math
import struct
from typing import Any

import numpy as np

from ..types import Agents, Array, FitReport

FIT_LIMIT = 2.0**100  # `fit` leaves out rows with a NaN or a value not below this
TEMPERATURE_OF_ERROR = 0.05  # the default temperature, as a part of the mean squared distance of a row to its leaf
FIT_RANGE = 46  # and rows that would make the grid of its sums coarser than 2^-16 of the median row, see fit_rows
FIT_WEIGHT_RANGE = 56  # and rows whose weight is less than 2^4 units of the grid of its weights


class Codebook:
    """L arrays of centers [C_l, D] float32. A leaf is a full code; its prototype is the sum of its codewords."""

    def __init__(self, centers: Any, *, temperature: float | None = None) -> None:
        self.centers = tuple(np.array(c, dtype=np.float32) for c in centers)
        self.sizes = tuple(len(c) for c in self.centers)
        self.temperature = None if temperature is None else float(np.float32(temperature))
        self.report: FitReport | None = None

    @property
    def fingerprint(self) -> int:
        """FNV-1a, 64 bits, over D, then for each level C_l and its float32 values; little-endian, integers 64 bits."""
        data = struct.pack("<q", self.centers[0].shape[1])
        for c in self.centers:
            data += struct.pack("<q", len(c)) + c.astype("<f4").tobytes()
        h = 0xCBF29CE484222325
        for byte in data:
            h = (h ^ byte) * 0x100000001B3 % 2**64
        return h

    def leaves(self, codes: Array) -> Array:
        """codes [..., L] -> [...] int64: mixed-radix number of the leaf, -1 for an invalid code. A parent's number is
        its child's, divided by the child level's size and rounded down."""
        codes = np.asarray(codes, np.int64)
        leaf = np.zeros(codes.shape[:-1], np.int64)
        for level, size in enumerate(self.sizes):
            leaf = leaf * size + codes[..., level]
        return np.where(valid_codes(self, codes), leaf, -1)

    def prototypes(self, codes: Array) -> Array:
        """codes [..., L] (or Agents) -> [..., D] float32: the codewords on the path, added from the root down."""
        codes = np.asarray(codes.codes if isinstance(codes, Agents) else codes, np.int64)
        ok = valid_codes(self, codes)
        total = np.zeros((*codes.shape[:-1], self.centers[0].shape[1]), np.float32)
        for level, c in enumerate(self.centers):
            total = total + c[np.where(ok, codes[..., level], 0)]
        return np.where(ok[..., None], total, np.float32(0))


def valid_codes(book: Any, codes: Array) -> Array:
    """codes [..., L] -> [...] bool: every level in range."""
    codes = np.asarray(codes)
    return ((codes >= 0) & (codes < np.asarray(book.sizes))).all(-1)


def distances(r: Array, c: Array) -> Array:
    """r [T, D], c [C, D] float32 -> [T, C] float64: sum over d, in index order, of (r_d - c_d)^2. The order is part of
    the definition (no pairwise sums, no contraction), so that codes are integers everyone agrees on."""
    total = np.zeros((len(r), len(c)))
    for d in range(r.shape[1]):
        step = np.subtract.outer(r[:, d].astype(np.float64), c[:, d].astype(np.float64))
        total = total + step * step
    return total


def encode(book: Any, x: Array) -> Array:
    """Greedy residual quantisation: at level l the code c minimising |r - c|^2, then r <- r - c in float32.

    x [T, D] -> codes [T, L] int32. The lower code wins a tie; a row with a NaN or an infinity is -1 at every level.
    """
    r = np.asarray(x).astype(np.float32)
    ok: Array = np.isfinite(r).all(1)
    r = np.where(ok[:, None], r, np.float32(0))
    codes = np.empty((len(r), len(book.centers)), np.int32)
    for level, c in enumerate(book.centers):
        codes[:, level] = distances(r, c).argmin(1)
        with np.errstate(over="ignore"):
            r = r - c[codes[:, level]]
    codes[~ok] = -1
    return codes


def mix64(z: Any) -> Any:
    """The splitmix64 finaliser on uint64: the counter-based random numbers of `fit`."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def priorities(seed: int, level: int, rows: Array) -> Array:
    """uint64 per global row: mix(mix(seed + (level + 1) g) + (row + 1) g), g the golden ratio's 64 bits."""
    g = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = mix64(np.uint64(seed % 2**64) + np.uint64(level + 1) * g)
        return mix64(key + (rows.astype(np.uint64) + np.uint64(1)) * g)


def first_distinct(r: Array, order: Array, n: int) -> list[int]:
    """The first n rows of r, in `order`, that differ from those before; -0 equals 0."""
    seen: set[bytes] = set()
    picked: list[int] = []
    for i in order:
        key = (r[i] + np.float32(0)).tobytes()
        if len(picked) < n and key not in seen:
            seen.add(key)
            picked.append(i)
    return picked


def fixed_point_bits(biggest: float, rows: int) -> int:
    """k such that the sum of `rows` values, each at most `biggest`, stays below 2^62 in units of 2^-k."""
    return 61 - math.frexp(biggest)[1] - int(rows).bit_length()


def fit_rows(x: Array, w: Array) -> Array:
    """The rows of x [T, D] float32, of weights w [T] float64, that take part in `fit`. Each rule sees the rows that the
    rules before it leave, and b is the bits of how many these are.

    1. Rows without a NaN or a value of 2^100 and more, of a weight above 0 and finite.
    2. Rows that are not too large for the grid of the sums. With e the binary exponent of a row's largest value
       (2^(e - 1) <= |x| < 2^e), E the upper median of e over the rows that are not zero: e <= E + 46 - b. Rows of zeros
       are never too large.
    3. Rows that are not too light for the grid of the weights. With f the binary exponent of a row's weight, F the
       largest: f >= F + b - 56.
    """
    rows: Array = np.flatnonzero((np.abs(x) < FIT_LIMIT).all(1) & (w > 0) & np.isfinite(w))
    largest = np.abs(x[rows]).max(1, initial=0)
    exponent: Array = np.frexp(largest)[1]
    of_nonzero = np.sort(exponent[largest > 0])
    if len(of_nonzero):
        limit = of_nonzero[len(of_nonzero) // 2] + FIT_RANGE - len(rows).bit_length()
        rows = rows[(largest == 0) | (exponent <= limit)]
    of_weight: Array = np.frexp(w[rows])[1]
    heaviest = of_weight.max(initial=-(2**20))
    return rows[of_weight >= heaviest + len(rows).bit_length() - FIT_WEIGHT_RANGE]


def weights_of(weights: Any, rows: int) -> Array:
    """float64 [T] of float32 [T]; ones for None."""
    return np.ones(rows) if weights is None else np.asarray(weights, np.float32).astype(np.float64)


def mean_of(values: Array, total: float) -> float:
    """The sum of float64 values, rounded once from the exact one, over the total: the same in any order."""
    return math.fsum(values.tolist()) / total


def fit(
    x: Array, sizes: Any = None, *, iterations: int | None = None, seed: int = 0, init: Any = None,
    weights: Any = None, process_group: None = None, progress: Any = None,
) -> Codebook:  # fmt: skip
    """Residual k-means, level by level (Lloyd's rounds), giving the same bits on any number of threads or machines.
    sizes: the codes of each level, a number alone for one level; (512, 512), or those of `init`. iterations: 20, or 5
    with `init`. process_group: none; chunks and processes are their rows one after another.

    Start: the first C_l distinct rows in the order of `priorities`, or the centers of `init`, a codebook of these
    sizes. A round: nearest codes as `encode` finds them, then centers = sum of rint(w r 2^k) in int64 over the sum of
    rint(w 2^j) 2^-j. A code without rows takes the worst-quantised row not yet taken (distance down, row up); if every
    row is met exactly, it copies the lowest used code and so is never chosen. Stops early when no center changes.
    `fit_rows` says which rows take part. Without weights w is 1 and j is 0. x [T, D], weights [T] -> Codebook with a
    FitReport (its error is the mean by weight) and the default temperature 0.05 error, of the last level.
    """
    sizes = (init.sizes if init else (512, 512)) if sizes is None else sizes
    iterations = (5 if init else 20) if iterations is None else iterations
    x, by_weight = np.asarray(x).astype(np.float32), weights_of(weights, len(x))
    rows = fit_rows(x, by_weight)
    r, w, centers = x[rows], by_weight[rows], []
    rounds: list[int] = []
    error: list[float] = []
    unused: list[int] = []
    if len(rows) == 0:
        raise ValueError(f"fit: x is {list(x.shape)} without a usable row, expected at least one")
    j = 0 if weights is None else fixed_point_bits(float(w.max()), len(r))
    share = np.rint(np.ldexp(w, j)).astype(np.int64)
    whole = math.ldexp(float(share.sum()), -j)
    for level, size in enumerate(np.atleast_1d(sizes).tolist()):
        if init is None:
            order = np.lexsort((rows, priorities(seed, level, rows)))
            start = r[first_distinct(r, order, size)]
            c = np.concatenate([start, np.repeat(start[:1], size - len(start), 0)])
        else:
            c = init.centers[level]
        k = fixed_point_bits(float((np.abs(r).max(1) * w).max()), len(r))
        fixed = np.rint(np.ldexp(r.astype(np.float64) * w[:, None], k)).astype(np.int64)
        rounds.append(0)
        for _ in range(iterations):
            d = distances(r, c)
            near = d.argmin(1)
            count = np.zeros(size, np.int64)
            np.add.at(count, near, share)
            total = np.zeros((size, r.shape[1]), np.int64)
            np.add.at(total, near, fixed)
            used = count > 0
            new = c.copy()
            new[used] = np.ldexp(total[used].astype(np.float64), -k) / np.ldexp(count[used, None].astype(float), -j)
            dead = np.flatnonzero(~used)
            worst = d[np.arange(len(r)), near]
            far = np.flatnonzero(worst > 0)
            seeds = first_distinct(r, far[np.lexsort((far, -worst[far]))], len(dead))
            new[dead] = new[used.argmax()]
            new[dead[: len(seeds)]] = r[seeds]
            rounds[-1] += 1
            if progress:
                progress(level, rounds[-1], mean_of(worst * w, whole))
            if (new == c).all():
                break
            c = new
        d = distances(r, c)
        near = d.argmin(1)
        error.append(mean_of(d.min(1) * w, whole))
        unused.append(int(size - len(np.unique(near))))
        r = r - c[near]
        centers.append(c)
    book = Codebook(centers, temperature=float(np.float32(TEMPERATURE_OF_ERROR * error[-1])) or None)
    book.report = FitReport(len(rows), len(x) - len(rows), tuple(rounds), tuple(error), tuple(unused))
    return book
