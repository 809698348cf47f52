# SPDX-License-Identifier: Apache-2.0
"""The definition of every hisac operation: NumPy, float64, written to be read.

Whatever a kernel does, it must agree with this page: codes, votes and agents exactly, floats within a bound derived
from sizes and rounding. Arrays follow one naming: B users, T behaviours, D semantic width, V value width, L levels,
M agents a user, N candidates, H heads. Values never raise: invalid codes mean absent, NaN loses, an empty sum is a zero
token with lse -inf. The state kept between requests is in `reference_state`.

Source: HiSAC, arXiv 2602.21009. Semantic IDs and the code tree: its hierarchical codebook; `vote`: hierarchical
voting (`fanout`) and our apportionment (`budget`); `route`: soft-routing attention; `attend`: target attention.
"""

import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from .reference_sums import float64, leaf_means, log_softmax, logsumexp, square_distances
from .results import Agents, Array, Attended, AttendGradients, FitReport, LeafSums, RouteGradients, Tokens

FIT_LIMIT = 2.0**100  # `fit` leaves out rows with a NaN or a value not below this
MAX_SEATS = 4096  # most agents a user
MAX_VOTERS = 2**24 - 1  # a user's later rows do not vote
ABSENT_NORM = 2.0**100  # a row whose |x|^2 is not below is absent
WEIGHT_UNIT = 2**12  # weighted votes count in units of 1 / WEIGHT_UNIT
MAX_WEIGHT = 16.0

Node = tuple[int, ...]  # a code prefix; a whole code is a leaf
Votes = dict[Node, int]


class Codebook:
    """L arrays of centers [C_l, D] float32. A leaf is a full code; its prototype is the sum of its codewords."""

    def __init__(self, centers: Any) -> None:
        self.centers = tuple(np.array(c, dtype=np.float32) for c in centers)
        self.sizes = tuple(len(c) for c in self.centers)
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


def ranges(offsets: Any) -> list[slice]:
    """offsets [B + 1], or (starts [B], ends [B]) -> the rows of each user as slices."""
    starts, ends = offsets if isinstance(offsets, tuple) else (offsets[:-1], offsets[1:])
    return [slice(int(s), int(e)) for s, e in zip(starts, ends, strict=True)]


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


def fit(x: Array, codes: Any = (512, 512), *, iterations: int = 20, seed: int = 0, progress: Any = None) -> Codebook:
    """Residual k-means, level by level (Lloyd's rounds), giving the same bits on any number of threads or machines.

    Start: the first C_l distinct rows in the order of `priorities`. A round: nearest codes as `encode` finds them, then
    centers = sum of rint(r 2^k) in int64 / count. A code without rows takes the worst-quantised row not yet taken
    (distance down, row up); if every row is met exactly, it copies the lowest used code and so is never chosen.
    Stops early when no center changes. x [T, D] -> Codebook with a FitReport.
    """
    x = np.asarray(x).astype(np.float32)
    rows = np.flatnonzero((np.abs(x) < FIT_LIMIT).all(1))
    r, centers = x[rows], []
    rounds: list[int] = []
    error: list[float] = []
    unused: list[int] = []
    if len(rows) == 0:
        raise ValueError(f"fit: x is {list(x.shape)} without a usable row, expected at least one")
    for level, size in enumerate(codes):
        order = np.lexsort((rows, priorities(seed, level, rows)))
        start = r[first_distinct(r, order, size)]
        c = np.concatenate([start, np.repeat(start[:1], size - len(start), 0)])
        k = fixed_point_bits(float(np.abs(r).max()), len(r))
        fixed = np.rint(np.ldexp(r.astype(np.float64), k)).astype(np.int64)
        rounds.append(0)
        for _ in range(iterations):
            d = distances(r, c)
            near = d.argmin(1)
            count = np.bincount(near, minlength=size)
            total = np.zeros((size, r.shape[1]), np.int64)
            np.add.at(total, near, fixed)
            used = count > 0
            new = c.copy()
            new[used] = np.ldexp(total[used].astype(np.float64), -k) / count[used, None]
            dead = np.flatnonzero(~used)
            worst = d[np.arange(len(r)), near]
            far = np.flatnonzero(worst > 0)
            seeds = first_distinct(r, far[np.lexsort((far, -worst[far]))], len(dead))
            new[dead] = new[used.argmax()]
            new[dead[: len(seeds)]] = r[seeds]
            rounds[-1] += 1
            if progress:
                progress(level, rounds[-1], float(worst.mean()))
            if (new == c).all():
                break
            c = new
        d = distances(r, c)
        near = d.argmin(1)
        error.append(float(d.min(1).mean()))
        unused.append(int(size - len(np.unique(near))))
        r = r - c[near]
        centers.append(c)
    book = Codebook(centers)
    book.report = FitReport(len(rows), len(x) - len(rows), tuple(rounds), tuple(error), tuple(unused))
    return book


def quantise_weights(weights: Array) -> Array:
    """float -> votes in units of 2^-12: rint(clip(w, 0, 16) 2^12), NaN is 0."""
    w = np.nan_to_num(np.asarray(weights).astype(np.float64), nan=0.0, posinf=MAX_WEIGHT, neginf=0.0)
    return np.rint(np.clip(w, 0, MAX_WEIGHT) * WEIGHT_UNIT).astype(np.int64)


def leaf_votes(book: Any, codes: Array, weights: Array = None) -> Votes:
    """codes [n, L] of one user -> {leaf: votes}: how many rows have its code, or their weights."""
    codes = np.asarray(codes)[:MAX_VOTERS]
    weight = np.ones(len(codes), np.int64) if weights is None else quantise_weights(weights)[:MAX_VOTERS]
    votes: Votes = {}
    for row, w in zip(*(a[valid_codes(book, codes)].tolist() for a in (codes, weight)), strict=True):
        if w:
            votes[tuple(row)] = votes.get(tuple(row), 0) + w
    return votes


def children(votes: Votes, prefix: Node) -> Votes:
    """{child prefix: votes of all leaves below it} of the node `prefix`."""
    found: Votes = {}
    for leaf, n in votes.items():
        if leaf[: len(prefix)] == prefix:
            child = leaf[: len(prefix) + 1]
            found[child] = found.get(child, 0) + n
    return found


def by_fanout(votes: Votes, fanout: tuple[int, ...], prefix: Node = ()) -> list[Node]:
    """The paper's rule: under every kept node keep the k_l children with most votes; ties go to the lower code."""
    if len(prefix) == len(fanout):
        return [prefix]
    kept = sorted(children(votes, prefix).items(), key=lambda item: (-item[1], item[0]))[: fanout[len(prefix)]]
    return [leaf for child, _ in kept for leaf in by_fanout(votes, fanout, child)]


def by_budget(votes: Votes, budget: int, levels: int, prefix: Node = ()) -> list[Node]:
    """Seats in proportion (D'Hondt at every node): a node merges its children's orders; the j-th leaf of child c has
    the key n_c / j; larger key, then larger n_c, then lower code first. (n_c << 24) // j decides like the fraction."""
    if len(prefix) == levels:
        return [prefix]
    ranked = []
    for child, n in children(votes, prefix).items():
        for j, leaf in enumerate(by_budget(votes, budget, levels, child), 1):
            ranked.append((-((n << 24) // j), -n, child, j, leaf))
    return [leaf for *_, leaf in sorted(ranked)[:budget]]


def vote(
    book: Any, codes: Array, offsets: Any, *, budget: int | None = None, fanout: Any = None, weights: Array = None
) -> Agents:
    """The interest-agents of each user: the leaves kept by `budget` (ours) or `fanout` (the paper's rule).

    codes [T, L], offsets [B + 1] or (starts, ends), weights [T] or None -> Agents of M = budget, or the product of the
    fan-outs. Sorted by votes down, then code up. Blind to the order of a user's rows.
    """
    levels = len(book.centers)
    seats = int(budget or 0) if fanout is None else math.prod(fanout)
    users = ranges(offsets)
    out = np.full((len(users), seats, levels), -1, np.int32)
    count_votes = np.zeros((len(users), seats), np.int64)
    count = np.zeros(len(users), np.int32)
    for b, rows in enumerate(users):
        votes = leaf_votes(book, codes[rows], None if weights is None else weights[rows])
        kept = by_budget(votes, seats, levels) if fanout is None else by_fanout(votes, fanout)
        kept.sort(key=lambda leaf: (-votes[leaf], leaf))
        count[b] = len(kept)
        if kept:
            out[b, : len(kept)] = kept
            count_votes[b, : len(kept)] = [votes[leaf] for leaf in kept]
    return Agents(out, count_votes, count, book.fingerprint)


class History:
    """One user's rows as `route` sees them: present rows x, v, bias and spread, or their leaves'; the agents p and
    temperatures tau that are present, as indices `agents`; the values of absent rows."""

    def __init__(
        self, b: int, rows: slice, x: Array, v: Array, prototypes: Array, count: Array, temperature: Any, bias: Array,
        spread: Array, codes: Array, book: Any, method: str,
    ) -> None:  # fmt: skip
        m = prototypes.shape[1]
        self.x = float64(book.prototypes(codes[rows]) if x is None else x[rows])
        self.v = float64(v[rows])
        self.bias, self.spread = (np.zeros(len(self.x)) if a is None else float64(a[rows]) for a in (bias, spread))
        tau = np.broadcast_to(float64(temperature), (m,))
        p = float64(prototypes[b])
        present = m if count is None else min(max(int(count[b]), 0), m)
        with np.errstate(over="ignore", invalid="ignore"):
            ok = (np.square(self.x).sum(1) < ABSENT_NORM) & np.isfinite(self.bias)
            self.agents = np.flatnonzero((np.arange(m) < present) & (np.square(p).sum(1) < ABSENT_NORM) & (tau > 0))
        ok &= (self.spread >= 0) & (self.spread < np.inf)
        if codes is not None:
            ok &= valid_codes(book, codes[rows])
        self.rows = np.flatnonzero(ok)
        self.absent = np.flatnonzero(~ok & np.isfinite(self.v).all(1))
        self.absent_v = self.v[self.absent]
        self.p, self.tau = p[self.agents], tau[self.agents]
        self.x, self.v, self.bias, self.spread = self.x[ok], self.v[ok], self.bias[ok], self.spread[ok]
        if method == "leaf":  # the rows of one leaf become one; a row has a share of its leaf's mass
            leaf = book.leaves(codes[rows])[ok]
            self.leaf, self.share, self.x, self.v, self.bias, self.spread = leaf_means(
                leaf, self.x, self.v, self.bias, self.spread
            )

    def merge_leaves(self, leaf: Array) -> None:
        """Rows of one leaf become one row: W = sum e^bias, its mean x and v, spread = E|x - mean|^2, bias = log W."""
        _, self.leaf = np.unique(leaf, return_inverse=True)
        number = np.arange(self.leaf.max(initial=-1) + 1)
        alone = np.where(number[:, None] == self.leaf, self.bias, -np.inf)
        total, weight = logsumexp(alone, 1), np.exp(log_softmax(alone, 1))
        self.share = weight.sum(0)  # a row's part of its leaf's mass
        mean = weight @ self.x
        self.spread = np.array([w @ np.square(self.x - mu).sum(1) for w, mu in zip(weight, mean, strict=True)])
        self.x, self.v, self.bias = mean, weight @ self.v, total

    def logits(self, normalize: str) -> tuple[Array, Array]:
        """The logits z [n, m] whose softmax over the n rows gives each agent its weights; and, for the backward, the
        shares s [n, m] of the softmax over agents (zero in history mode)."""
        z = -(square_distances(self.x, self.p) + self.spread[:, None]) / self.tau
        s = np.zeros_like(z)
        if normalize == "agents":
            z = log_softmax(z, 1)
            s = np.exp(z)
        return z + self.bias[:, None], s


def histories(
    x: Array, v: Array, offsets: Any, prototypes: Array, count: Array, temperature: Any, bias: Array, spread: Array,
    codes: Array, book: Any, method: str,
) -> Iterator[tuple[int, slice, History]]:  # fmt: skip
    """The users of a batch as (b, rows, History)."""
    if (method == "leaf" or x is None) and codes is None:
        raise ValueError("route: codes are needed when x is not given, and by method='leaf'")
    for b, rows in enumerate(ranges(offsets)):
        yield b, rows, History(b, rows, x, v, prototypes, count, temperature, bias, spread, codes, book, method)


def leaf_sums(
    x: Array, v: Array, offsets: Any, codes: Array, book: Any, *, bias: Array = None, spread: Array = None
) -> LeafSums:
    """The present behaviours of each user, one row a leaf, sorted by leaf: means, log mass and spread (`leaf_means`).

    Arguments as in `route` -> LeafSums. `route` over them is `route` with method="leaf" over the behaviours. Sums add
    up: those of kept sums and new behaviours, as rows of one user, are the sums of all.
    """
    width, users = book.centers[0].shape[1] if x is None else x.shape[1], len(ranges(offsets))
    sums = LeafSums(np.zeros((0, width)), np.zeros((0, v.shape[1])), np.zeros(users + 1, np.int64),
                    np.zeros(0), np.zeros(0), np.zeros((0, len(book.centers)), np.int32))  # fmt: skip
    agents = np.zeros((users, 0, width))
    for b, rows, h in histories(x, v, offsets, agents, None, 1, bias, spread, codes, book, "leaf"):
        sums.offsets[b + 1] = sums.offsets[b] + len(h.x)
        first = h.rows[np.unique(h.leaf, return_index=True)[1]]
        found = h.x, h.v, sums.offsets, h.bias, h.spread, np.asarray(codes, np.int32)[rows][first]
        sums = LeafSums(*(a if a is m else np.concatenate([a, m]) for a, m in zip(sums, found, strict=True)))
    return sums


def route(
    x: Array, v: Array, offsets: Any, prototypes: Array, *, count: Array = None, temperature: Any = 0.1,
    normalize: str = "history", bias: Array = None, spread: Array = None, codes: Array = None, book: Any = None,
    method: str = "exact", refine: int = 0, missing: str = "drop",
) -> Tokens:  # fmt: skip
    """Soft-routing attention: each agent aggregates the whole history by semantic similarity.

        d_ai = |x_i - p_a|^2 + spread_i
        history: u_ai = exp(bias_i - d_ai / tau)
        agents:  u_ai = exp(bias_i) softmax over present a of (-d_ai / tau)
        token_a = sum_i u_ai v_i / sum_i u_ai          lse_a = log sum_i u_ai

    x [T, D] (None: the prototype of `codes`), v [T, V], offsets [B + 1] or (starts, ends), prototypes [B, M, D],
    count [B], temperature a number or [1] or [M], bias [T], spread [T], codes [T, L] with their book -> Tokens.
    method="leaf": over the rows' `leaf_sums`: those of one leaf act as one at their mean, farther by their variance.
    refine=n: n times p_a <- sum u x / sum u. missing="token": one more token, the mean v and log count of absent rows.
    """
    users, m = len(ranges(offsets)), prototypes.shape[1]
    tokens = np.zeros((users, m + (missing == "token"), v.shape[1]))
    lse = np.full(tokens.shape[:2], -np.inf)
    refined = np.array(prototypes, np.float64)
    for b, _, h in histories(x, v, offsets, prototypes, count, temperature, bias, spread, codes, book, method):
        for step in range(refine + 1):
            z, _ = h.logits(normalize)
            total = logsumexp(z, 0)
            w = np.exp(log_softmax(z, 0))
            if step < refine:
                h.p = np.where(np.isfinite(total)[:, None], w.T @ h.x, h.p)
        refined[b, h.agents] = h.p
        tokens[b, h.agents], lse[b, h.agents] = w.T @ h.v, total
        if missing == "token" and len(h.absent):
            tokens[b, m], lse[b, m] = h.absent_v.mean(0), np.log(len(h.absent))
    return Tokens(tokens, lse, refined)


def route_backward(
    d_tokens: Array, d_lse: Array, forward: Tokens, x: Array, v: Array, offsets: Any, *, count: Array = None,
    temperature: Any = 0.1, normalize: str = "history", bias: Array = None, spread: Array = None, codes: Array = None,
    book: Any = None, method: str = "exact", missing: str = "drop", need: Any = ("v", "temperature", "bias"),
) -> RouteGradients:  # fmt: skip
    """Gradients of `route`, given what it returned (its prototypes count as constant during `refine`).

        w_ai = exp(z_ai - lse_a)                       dv_i = sum_a w_ai dtoken_a
        dz_ai = w_ai (dtoken_a . (v_i - token_a) + dlse_a)
        dbias_i = sum_a dz_ai                          agents: dz_ai -= s_ai sum_a' dz_a'i
        dtau_a = sum_i dz_ai d_ai / tau_a^2            dx_i = sum_a -2 dz_ai (x_i - p_a) / tau_a = -dp_a's terms

    d_tokens [B, M (+ 1), V], d_lse [B, M (+ 1)] or None; `need` names the gradients wanted -> RouteGradients.
    method="leaf" has those of v and temperature only.
    """
    if method == "leaf" and not set(need) <= {"v", "temperature"}:
        raise NotImplementedError("route_backward: method='leaf' has gradients for v and temperature only")
    if x is None and "x" in need:
        raise ValueError("route_backward: a gradient of x expected x, got none")
    prototypes = forward.prototypes
    m, width = prototypes.shape[1:]
    dv, dbias, dx = np.zeros(v.shape), np.zeros(len(v)), np.zeros((len(v), width))
    dtau, dp = np.zeros(m), np.zeros(prototypes.shape)
    for b, rows, h in histories(x, v, offsets, prototypes, count, temperature, bias, spread, codes, book, method):
        z, s = h.logits(normalize)
        token, total, dt, dl = (
            np.asarray(a)[b, h.agents].astype(np.float64)
            for a in (forward.tokens, forward.lse, d_tokens, np.zeros(forward.lse.shape) if d_lse is None else d_lse)
        )
        mass = np.isfinite(total)
        w = np.where(mass, np.exp(z - np.where(mass, total, 0.0)), 0.0)
        dz = w * (h.v @ dt.T + np.where(mass, dl - (token * dt).sum(1), 0.0))
        dv_rows, at = w @ dt, rows.start + h.rows
        if method == "leaf":
            dv_rows = dv_rows[h.leaf] * h.share[:, None]
        else:
            np.add.at(dbias, at, dz.sum(1))
        np.add.at(dv, at, dv_rows)
        dz = dz - s * dz.sum(1, keepdims=True)
        d = square_distances(h.x, h.p) + h.spread[:, None]
        np.add.at(dtau, h.agents, (dz * d).sum(0) / h.tau**2)
        if method == "exact":
            g = 2 * dz / h.tau
            np.add.at(dx, at, g @ h.p - g.sum(1, keepdims=True) * h.x)
            dp[b, h.agents] = g.T @ h.x - g.sum(0)[:, None] * h.p
        if missing == "token" and len(h.absent):
            np.add.at(dv, rows.start + h.absent, float64(d_tokens[b, m]) / len(h.absent))
    if np.size(temperature) == 1:
        dtau = dtau.sum(keepdims=True)
    every = {"v": dv, "temperature": dtau, "bias": dbias, "x": dx, "prototypes": dp}
    return RouteGradients(*(every[name] if name in need else None for name in RouteGradients._fields))


def attend_logits(q: Array, keys: Array, bias: Array, b: int, rows: slice, scale: float) -> Array:
    """One user's logits [n, H, M]; a token whose bias is NaN or infinite is absent (-inf)."""
    z = scale * np.einsum("nhd,mhd->nhm", float64(q[rows]), float64(keys[b]))
    if bias is not None:
        row = float64(bias[b])
        z = np.where(np.isfinite(row), z + np.where(np.isfinite(row), row, 0.0), -np.inf)
    return z


def attend(
    q: Array, keys: Array, values: Array, candidate_offsets: Array, *, bias: Array = None, scale: float | None = None
) -> Attended:
    """Target attention of each candidate on its user's tokens.

        z_m = scale q . k_m + bias_m        out = softmax(z) values        lse = log sum_m exp z_m

    q [N, H, d], keys [B, M, H, d], values [B, M, H, V], candidate_offsets [B + 1], bias [B, M]; scale 1 / sqrt(d)
    -> Attended. No present token: zero and -inf.
    """
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    out, lse = np.zeros((*q.shape[:2], values.shape[3])), np.full(q.shape[:2], -np.inf)
    for b, rows in enumerate(ranges(candidate_offsets)):
        z = attend_logits(q, keys, bias, b, rows, scale)
        lse[rows] = logsumexp(z, 2)
        w = np.exp(log_softmax(z, 2))
        out[rows] = np.einsum("nhm,mhv->nhv", w, float64(values[b]))
    return Attended(out, lse)


def attend_backward(
    d_out: Array, d_lse: Array, forward: Attended, q: Array, keys: Array, values: Array, candidate_offsets: Array, *,
    bias: Array = None, scale: float | None = None,
) -> AttendGradients:  # fmt: skip
    """Gradients of `attend`, given what it returned.

        w = exp(z - lse)       dz = w (dout . values - dout . out + dlse)
        dq = scale dz keys     dkeys = scale dz^T q     dvalues = w^T dout     dbias = sum of dz

    d_out [N, H, V], d_lse [N, H] or None -> AttendGradients; bias None where none was given.
    """
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    dq, dk, dv = np.zeros(q.shape), np.zeros(keys.shape), np.zeros(values.shape)
    db = None if bias is None else np.zeros(np.shape(bias))
    d_lse = np.zeros(forward.lse.shape) if d_lse is None else d_lse
    for b, rows in enumerate(ranges(candidate_offsets)):
        g, out, total, dl = (float64(a[rows]) for a in (d_out, forward.out, forward.lse, d_lse))
        some, z = np.isfinite(total), attend_logits(q, keys, bias, b, rows, scale)
        w = np.where(some[..., None], np.exp(z - np.where(some, total, 0.0)[..., None]), 0.0)
        dw = np.einsum("nhv,mhv->nhm", g, float64(values[b]))
        dz = w * (dw + np.where(some, dl - (g * out).sum(2), 0.0)[..., None])
        dq[rows] = scale * np.einsum("nhm,mhd->nhd", dz, float64(keys[b]))
        dk[b] = scale * np.einsum("nhm,nhd->mhd", dz, float64(q[rows]))
        dv[b] = np.einsum("nhm,nhv->mhv", w, g)
        if db is not None:
            db[b] = dz.sum((0, 1))
    return AttendGradients(dq, dk, dv, db)
