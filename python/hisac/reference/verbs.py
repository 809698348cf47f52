# SPDX-License-Identifier: Apache-2.0
"""The definition of `vote`, `leaf_sums`, `route`, `attend` and their gradients."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..types import Agents, Array, Attended, AttendGradients, Histories, RouteGradients, Tokens
from .codebook import valid_codes

MAX_SEATS = 4096  # most agents a user
MAX_VOTERS = 2**24 - 1  # a user's later rows do not vote
ABSENT_NORM = 2.0**100  # a row whose |x|^2 is not below is absent
WEIGHT_UNIT = 2**12  # weighted votes count in units of 1 / WEIGHT_UNIT
MAX_WEIGHT = 16.0

Node = tuple[int, ...]  # a code prefix; a whole code is a leaf
Votes = dict[Node, int]


def ranges(offsets: Any) -> list[slice]:
    """offsets [B + 1], or (starts [B], ends [B]) -> the rows of each user as slices."""
    starts, ends = offsets if isinstance(offsets, tuple) else (offsets[:-1], offsets[1:])
    return [slice(int(s), int(e)) for s, e in zip(starts, ends, strict=True)]


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


def vote(book: Any, histories: Histories, *, budget: int | None = None, fanout: Any = None) -> Agents:
    """The interest-agents of each user: the leaves kept by `budget` (ours) or `fanout` (the paper's rule).

    Reads codes [T, L] (with x_ids, a table), offsets, and weights [T] or None of the histories -> Agents of M = budget,
    or the product of the fan-outs. Sorted by votes down, then code up. Blind to the order of a user's rows.
    """
    codes, weights = gather(histories).codes, histories.weights
    levels = len(book.centers)
    seats = int(budget or 0) if fanout is None else math.prod(fanout)
    users = ranges(histories.offsets)
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


def float64(a: Array) -> Array:
    """Any of the input types as NumPy float64."""
    return np.asarray(a).astype(np.float64)


def finite(a: Array) -> Array:
    """The same with zeros in place of NaN and infinities."""
    return np.nan_to_num(float64(a), nan=0.0, posinf=0.0, neginf=0.0)


def logsumexp(z: Array, axis: int) -> Array:
    """log sum exp along `axis`; -inf for an empty sum."""
    top = z.max(axis, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(z - top).sum(axis)) + top.squeeze(axis)


def log_softmax(z: Array, axis: int) -> Array:
    """z - log sum exp z along `axis`, so that its exp sums to 1 however large z is."""
    top = z.max(axis, keepdims=True, initial=-np.inf)
    z = z - np.where(np.isfinite(top), top, 0.0)
    total = np.expand_dims(logsumexp(z, axis), axis)
    return z - np.where(np.isfinite(total), total, 0.0)


def square_distances(x: Array, p: Array) -> Array:
    """x [n, D], p [m, D] -> [n, m] float64."""
    return np.stack([np.square(x - a).sum(1) for a in p], 1) if len(p) else np.zeros((len(x), 0))


def gather(histories: Histories) -> Histories:
    """The same histories without ids and scale: x [T, D], v [T, V], codes [T, L], bias [T].

    int8 rows times their scale are rounded to float32. A behaviour whose id is outside its table gets a bias of NaN,
    so it is not routed; outside x and codes it gets codes of -1, so it does not vote; outside v a row of NaN, so it is
    not counted as missing.
    """
    x, v, offsets, codes, x_ids, v_ids, x_scale, bias, spread, weights = histories
    if x is not None and x.dtype == np.int8:
        scale = np.reshape(np.float32(1.0 if x_scale is None else x_scale), (-1, 1))
        with np.errstate(over="ignore", invalid="ignore"):
            x = x.astype(np.float32) * scale
    dense = []
    for table, ids, nothing in ((x, x_ids, np.nan), (codes, x_ids, -1), (v, v_ids, np.nan)):
        if ids is not None and table is not None:
            inside = (ids >= 0) & (ids < len(table))
            rows = np.full((len(ids), table.shape[1]), nothing)
            rows[inside] = table[ids[inside]]
            table, bias = rows, np.where(inside, 0.0 if bias is None else bias, np.nan)
        dense.append(table)
    x, codes, v = dense
    return Histories(x, v, offsets, codes, bias=bias, spread=spread, weights=weights)


class History:
    """One user's rows as `route` sees them: present rows x, v, bias and spread, or their leaves'; the agents p and
    temperatures tau that are present, as indices `agents`; the values of absent rows."""

    def __init__(
        self, b: int, rows: slice, batch: Histories, prototypes: Array, count: Array, temperature: Any, book: Any,
        method: str,
    ) -> None:  # fmt: skip
        m, codes = prototypes.shape[1], batch.codes
        self.x = float64(book.prototypes(codes[rows]) if batch.x is None else batch.x[rows])
        self.v = float64(batch.v[rows])
        bias, spread = batch.bias, batch.spread
        self.bias, self.spread = (np.zeros(len(self.x)) if a is None else float64(a[rows]) for a in (bias, spread))
        tau = np.broadcast_to(float64(temperature), (m,))
        p = float64(prototypes[b])
        present = m if count is None else min(max(int(count[b]), 0), m)
        with np.errstate(over="ignore", invalid="ignore"):
            ok = (np.square(self.x).sum(1) < ABSENT_NORM) & np.isfinite(self.bias)
            self.agents = np.flatnonzero((np.arange(m) < present) & (np.square(p).sum(1) < ABSENT_NORM) & (tau > 0))
        ok &= (self.spread >= 0) & (self.spread < np.inf)
        if book is not None:
            ok &= valid_codes(book, codes[rows])
        self.rows = np.flatnonzero(ok)
        self.absent = np.flatnonzero(~ok & np.isfinite(self.v).all(1))
        self.absent_v = self.v[self.absent]
        self.p, self.tau = p[self.agents], tau[self.agents]
        self.x, self.v, self.bias, self.spread = self.x[ok], self.v[ok], self.bias[ok], self.spread[ok]
        if method == "leaf":
            self.merge_leaves(book.leaves(codes[rows])[ok])

    def merge_leaves(self, leaf: Array) -> None:
        """Rows of one leaf become one row: with w = e^bias / W, W their sum, x and v are the means weighted by w,
        spread = sum w (spread + |x - mean|^2), bias = log W."""
        _, self.leaf = np.unique(leaf, return_inverse=True)
        number = np.arange(self.leaf.max(initial=-1) + 1)
        alone = np.where(number[:, None] == self.leaf, self.bias, -np.inf)
        total, weight = logsumexp(alone, 1), np.exp(log_softmax(alone, 1))
        self.share = weight.sum(0)  # a row's part of its leaf's mass
        mean = weight @ self.x
        far = [w @ (self.spread + np.square(self.x - mu).sum(1)) for w, mu in zip(weight, mean, strict=True)]
        self.x, self.v, self.bias, self.spread = mean, weight @ self.v, total, np.array(far)

    def logits(self, normalize: str) -> tuple[Array, Array]:
        """The logits z [n, m] whose softmax over the n rows gives each agent its weights; and, for the backward, the
        shares s [n, m] of the softmax over agents (zero in history mode)."""
        z = -(square_distances(self.x, self.p) + self.spread[:, None]) / self.tau
        s = np.zeros_like(z)
        if normalize == "agents":
            z = log_softmax(z, 1)
            s = np.exp(z)
        return z + self.bias[:, None], s


def each_history(
    histories: Histories, prototypes: Array, count: Array, temperature: Any, book: Any, method: str
) -> Iterator[tuple[int, slice, History]]:
    """The users of a batch as (b, rows, History)."""
    if (method == "leaf" or histories.x is None) and (histories.codes is None or book is None):
        raise ValueError("codes and book expected where x is not given and for leaf sums, got none")
    batch = gather(histories)
    for b, rows in enumerate(ranges(batch.offsets)):
        yield b, rows, History(b, rows, batch, prototypes, count, temperature, book, method)


def leaf_sums(book: Any, histories: Histories) -> Histories:
    """The present behaviours of each user, one row a leaf, sorted by leaf: with weights w_i = e^bias_i,

        W = sum w_i     x = sum w_i x_i / W     v = sum w_i v_i / W     bias = log W
        spread = sum w_i (spread_i + |x_i - x|^2) / W

    Reads what `route` reads, and codes -> Histories with x, v, offsets, codes, bias and spread. `route` over them is
    `route` with method="leaf" over the behaviours; for `vote` a row of sums would count once. Sums add up: those of
    kept sums and new behaviours, as rows of one user, are the sums of all.
    """
    width = book.centers[0].shape[1] if histories.x is None else histories.x.shape[1]
    users, levels, codes = len(ranges(histories.offsets)), len(book.centers), gather(histories).codes
    offsets = np.zeros(users + 1, np.int64)
    x, v, bias = np.zeros((0, width)), np.zeros((0, histories.v.shape[1])), np.zeros(0)
    sums = [x, v, np.zeros((0, levels), np.int32), bias, bias]
    for b, rows, h in each_history(histories, np.zeros((users, 0, width)), None, 1, book, "leaf"):
        offsets[b + 1] = offsets[b] + len(h.x)
        first = h.rows[np.unique(h.leaf, return_index=True)[1]]
        of_user = h.x, h.v, codes[rows][first].astype(np.int32), h.bias, h.spread
        sums = [np.concatenate(pair) for pair in zip(sums, of_user, strict=True)]
    x, v, codes, bias, spread = sums
    return Histories(x, v, offsets, codes, bias=bias, spread=spread)


def route(
    histories: Histories, prototypes: Array, *, count: Array = None, temperature: Any = 0.1,
    normalize: str = "history", book: Any = None, method: str = "exact", refine: int = 0, missing: str = "drop",
    precision: str = "float32",
) -> Tokens:  # fmt: skip
    """Soft-routing attention: each agent aggregates the whole history by semantic similarity.

        d_ai = |x_i - p_a|^2 + spread_i
        history: u_ai = exp(bias_i - d_ai / tau)
        agents:  u_ai = exp(bias_i) softmax over present a of (-d_ai / tau)
        token_a = sum_i u_ai v_i / sum_i u_ai          lse_a = log sum_i u_ai

    Of the histories it reads every field but weights: x [T, D] (None: the prototype of `codes`), v [T, V], offsets,
    bias and spread [T], codes [T, L] where `book` is given. With x_ids [T], x and codes are tables, with v_ids [T] v is
    one: behaviour i has row ids_i, and is absent where there is no such row. prototypes [B, M, D], count [B],
    temperature a number or [1] or [M] -> Tokens.
    method="leaf": over `leaf_sums`: the rows of one leaf act as one row at their mean, farther by their variance.
    refine=n: n times p_a <- sum u x / sum u. missing="token": one more token, the mean v and log count of absent rows.
    precision changes no result here: it is how exact an implementation has to be (`hisac.reference.bounds`).
    """
    users, m = len(ranges(histories.offsets)), prototypes.shape[1]
    tokens = np.zeros((users, m + (missing == "token"), histories.v.shape[1]))
    lse = np.full(tokens.shape[:2], -np.inf)
    refined = np.array(prototypes, np.float64)
    for b, _, h in each_history(histories, prototypes, count, temperature, book, method):
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
    d_tokens: Array, d_lse: Array, forward: Tokens, histories: Histories, *, count: Array = None,
    temperature: Any = 0.1, normalize: str = "history", book: Any = None, method: str = "exact", missing: str = "drop",
    precision: str = "float32", need: Any = ("v", "temperature", "bias"),
) -> RouteGradients:  # fmt: skip
    """Gradients of `route`, given what it returned (its prototypes count as constant during `refine`).

        w_ai = exp(z_ai - lse_a)                       dv_i = sum_a w_ai dtoken_a
        dz_ai = w_ai (dtoken_a . (v_i - token_a) + dlse_a)
        dbias_i = sum_a dz_ai                          agents: dz_ai -= s_ai sum_a' dz_a'i
        dtau_a = sum_i dz_ai d_ai / tau_a^2            dx_i = sum_a -2 dz_ai (x_i - p_a) / tau_a = -dp_a's terms

    d_tokens [B, M (+ 1), V], d_lse [B, M (+ 1)] or None; `need` names the gradients wanted -> RouteGradients.
    method="leaf" has those of v and temperature only. Those of gathered x and v are of each behaviour's row [T, ..].
    """
    if method == "leaf" and not set(need) <= {"v", "temperature"}:
        raise NotImplementedError("route_backward: method='leaf' has gradients for v and temperature only")
    if histories.x is None and "x" in need:
        raise ValueError("route_backward: a gradient of x expected x, got none")
    v, prototypes = gather(histories).v, forward.prototypes
    m, width = prototypes.shape[1:]
    d_lse = np.zeros(forward.lse.shape) if d_lse is None else d_lse
    dv, dbias, dx = np.zeros(v.shape), np.zeros(len(v)), np.zeros((len(v), width))
    dtau, dp = np.zeros(m), np.zeros(prototypes.shape)
    for b, rows, h in each_history(histories, prototypes, count, temperature, book, method):
        z, s = h.logits(normalize)
        given = forward.tokens, forward.lse, d_tokens, d_lse
        token, total, dt, dl = (float64(a[b, h.agents]) for a in given)
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
            for j, agent in enumerate(h.agents):
                terms = g[:, j, None] * (h.p[j] - h.x)
                np.add.at(dx, at, terms)
                dp[b, agent] = -terms.sum(0)
        if missing == "token" and len(h.absent):
            np.add.at(dv, rows.start + h.absent, float64(d_tokens[b, m]) / len(h.absent))
    if np.size(temperature) == 1:
        dtau = dtau.sum(keepdims=True)
    every = {"v": dv, "temperature": dtau, "bias": dbias, "x": dx, "prototypes": dp}
    return RouteGradients(*(every[name] if name in need else None for name in RouteGradients._fields))


def present_tokens(keys: Array, bias: Array, b: int) -> Array:
    """Of one user [M, H]: whether its bias and its key hold neither NaN nor an infinity."""
    present: Array = np.isfinite(keys[b]).all(2)
    return present if bias is None else present & np.isfinite(float64(bias[b]))[:, None]


def present_values(values: Array, keys: Array, bias: Array, b: int) -> Array:
    """One user's values [M, H, V], zero for absent tokens."""
    return np.where(present_tokens(keys, bias, b)[..., None], float64(values[b]), 0.0)


def attend_logits(q: Array, keys: Array, bias: Array, b: int, rows: slice, scale: float) -> Array:
    """One user's logits [n, H, M], -inf where a token is absent: its bias, its key or q is NaN or infinite."""
    z = scale * np.einsum("nhd,mhd->nhm", finite(q[rows]), finite(keys[b]))
    z = z if bias is None else z + finite(bias[b])
    return np.where(present_tokens(keys, bias, b).T & np.isfinite(q[rows]).all(2)[..., None], z, -np.inf)


def attend(
    q: Array, keys: Array, values: Array, candidate_offsets: Array, *, bias: Array = None, scale: float | None = None
) -> Attended:
    """Target attention of each candidate on its user's tokens.

        z_m = scale q . k_m + bias_m        out = softmax(z) values        lse = log sum_m exp z_m

    q [N, H, d], keys [B, M, H, d], values [B, M, H, V], candidate_offsets [B + 1], bias [B, M]; scale 1 / sqrt(d)
    -> Attended. A token whose bias or key holds a NaN or an infinity is absent, and for a q that holds one every token
    is. No present token: zero and -inf.
    """
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    out, lse = np.zeros((*q.shape[:2], values.shape[3])), np.full(q.shape[:2], -np.inf)
    for b, rows in enumerate(ranges(candidate_offsets)):
        z = attend_logits(q, keys, bias, b, rows, scale)
        lse[rows] = logsumexp(z, 2)
        w = np.exp(log_softmax(z, 2))
        mean = np.einsum("nhm,mhv->nhv", w, present_values(values, keys, bias, b))
        out[rows] = np.where(np.isfinite(lse[rows])[..., None], mean, 0.0)
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
        dw = np.einsum("nhv,mhv->nhm", g, present_values(values, keys, bias, b))
        dz = w * (dw + np.where(some, dl - (g * out).sum(2), 0.0)[..., None])
        dq[rows] = scale * np.einsum("nhm,mhd->nhd", dz, finite(keys[b]))
        dk[b] = scale * np.einsum("nhm,nhd->mhd", dz, finite(q[rows]))
        dv[b] = np.einsum("nhm,nhv->mhv", w, g)
        if db is not None:
            db[b] = dz.sum((0, 1))
    return AttendGradients(dq, dk, dv, db)
