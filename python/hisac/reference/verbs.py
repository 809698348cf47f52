# SPDX-License-Identifier: Apache-2.0
"""The definition of `vote`, by the rules of votes.py, `leaf_sums`, `missing`, `route`, `attend` and their gradients."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import compose
from ..types import (
    Agents,
    Array,
    Attended,
    AttendGradients,
    Compressed,
    Histories,
    LeafGradients,
    RouteAgents,
    RouteGradients,
    Tokens,
)
from .codebook import encode, valid_codes
from .lists import ABSENT_NORM, agent_lists, listed
from .tables import gather, of_table
from .votes import by_beam, by_budget, by_fanout, leaf_votes, row_votes

MAX_SEATS = 4096  # most agents a user


def ranges(offsets: Any) -> list[slice]:
    """offsets [B + 1], or (starts [B], ends [B]) -> the rows of each user as slices."""
    starts, ends = offsets if isinstance(offsets, tuple) else (offsets[:-1], offsets[1:])
    return [slice(int(s), int(e)) for s, e in zip(starts, ends, strict=True)]


def vote(book: Any, histories: Histories, *, budget: Any = None, fanout: Any = None, beam: Any = None) -> Agents:
    """The interest-agents of each user: the leaves kept by one rule, `budget`, `fanout` (the paper's) or `beam`.

    Reads codes [T, L] (with x_ids, a table), offsets, and weights [T] or None of the histories -> Agents of M = budget,
    the product of the fan-outs, or the last number of the beam, with prototypes. Sorted by votes down, then code up.
    Blind to the order of rows.
    """
    codes, weights = gather(histories).codes, histories.weights
    levels = len(book.centers)
    seats = beam[-1] if beam is not None else math.prod(fanout) if fanout is not None else int(budget)
    users = ranges(histories.offsets)
    out = np.full((len(users), seats, levels), -1, np.int32)
    count_votes = np.zeros((len(users), seats), np.int64)
    count = np.zeros(len(users), np.int32)
    for b, rows in enumerate(users):
        votes = leaf_votes(book, codes[rows], None if weights is None else weights[rows])
        if beam is not None:
            kept = by_beam(votes, beam)
        elif fanout is not None:
            kept = by_fanout(votes, fanout)
        else:
            kept = by_budget(votes, seats, levels)
        kept.sort(key=lambda leaf: (-votes[leaf], leaf))
        count[b] = len(kept)
        if kept:
            out[b, : len(kept)] = kept
            count_votes[b, : len(kept)] = [votes[leaf] for leaf in kept]
    return Agents(out, count_votes, count, book.fingerprint, book.prototypes(out))


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


class History:
    """One user's rows as `route` sees them: present rows x, v, bias and spread, as indices `rows`; the agents p and
    temperatures tau that are present, as indices `agents`; which of the rows are routed to which of the agents, listed
    [rows, agents]; and, where not each to each, the number of groups of rows with one code of level 1."""

    def __init__(
        self, b: int, rows: slice, batch: Histories, to: RouteAgents, temperature: Any, book: Any, sparse: int | None
    ) -> None:
        m = to.prototypes.shape[1]
        x = float64(book.prototypes(batch.codes[rows]) if batch.x is None else batch.x[rows])
        v = np.zeros((len(x), 0)) if batch.v is None else float64(batch.v[rows])
        given = batch.bias, batch.spread
        bias, spread = (np.zeros(len(x)) if a is None else float64(a[rows]) for a in given)
        tau = np.broadcast_to(float64(temperature), (m,))
        p = float64(to.prototypes[b])
        present = m if to.count is None else min(max(int(to.count[b]), 0), m)
        with np.errstate(over="ignore", invalid="ignore"):
            ok = (np.square(x).sum(1) < ABSENT_NORM) & np.isfinite(bias)
            self.agents = np.flatnonzero((np.arange(m) < present) & (np.square(p).sum(1) < ABSENT_NORM) & (tau > 0))
        ok &= (spread >= 0) & (spread < np.inf)
        if book is not None:
            ok &= valid_codes(book, batch.codes[rows])
        self.rows = np.flatnonzero(ok)
        self.p, self.tau = p[self.agents], tau[self.agents]
        self.x, self.v, self.bias, self.spread = x[ok], v[ok], bias[ok], spread[ok]
        self.listed, self.groups = np.ones((len(self.x), len(self.p)), bool), 0
        if sparse is not None:
            codes = batch.codes[rows]
            self.listed = listed(book, codes, to, b, sparse)[np.ix_(self.rows, self.agents)]
            self.groups = 0 if self.listed.all() else len(np.unique(codes[ok, 0]))

    def logits(self, normalize: str) -> tuple[Array, Array]:
        """The logits z [n, m] whose softmax over the n rows gives each agent its weights, -inf where the row is not
        routed to the agent; and, for the backward, the shares s [n, m] of the softmax over agents (zero in history
        mode)."""
        z = -(square_distances(self.x, self.p) + self.spread[:, None]) / self.tau
        z = np.where(self.listed, z, -np.inf)
        s = np.zeros_like(z)
        if normalize == "agents":
            z = log_softmax(z, 1)
            s = np.exp(z)
        return z + self.bias[:, None], s


def each_history(
    histories: Histories, to: RouteAgents, temperature: Any, book: Any, sparse: int | None = None
) -> Iterator[tuple[int, slice, History]]:
    """The users of a batch as (b, rows, History)."""
    if histories.x is None and (histories.codes is None or book is None):
        raise ValueError("codes and book expected where x is not given, got none")
    batch = gather(histories)
    for b, rows in enumerate(ranges(batch.offsets)):
        yield b, rows, History(b, rows, batch, to, temperature, book, sparse)


def each_row(book: Any, histories: Histories) -> Iterator[tuple[slice, History]]:
    """The users of a batch, without agents, as (rows, History)."""
    width = book.centers[0].shape[1] if histories.x is None else histories.x.shape[1]
    users = len(ranges(histories.offsets))
    for _, rows, h in each_history(histories, RouteAgents(np.zeros((users, 0, width))), 1, book):
        yield rows, h


def leaf_sums(book: Any, histories: Histories) -> Histories:
    """The behaviours of each user, one row a leaf, sorted by leaf: of the present ones, with weights w_i = e^bias_i,

        W = sum w_i     x = sum w_i x_i / W     v = sum w_i v_i / W     bias = log W
        spread = sum w_i (spread_i + |x_i - x|^2) / W

    and weights, int64: the votes of all that vote. A leaf that has votes and no present behaviour has a bias of -inf,
    and zeros for x, v and spread. Reads what `route` reads, codes, and weights -> Histories with x, v, offsets, codes,
    bias, spread and weights, which stand for the behaviours in `route` and in `vote`. Sums add up: those of kept sums
    and new behaviours, as rows of one user, are the sums of all. Votes do where the weights of both are int64 or none,
    and the user has fewer than 2^40 votes.
    """
    batch, offsets, parts = gather(histories), [0], []
    for rows, h in each_row(book, histories):
        codes = batch.codes[rows].astype(np.int32)
        votes = row_votes(book, codes, None if batch.weights is None else batch.weights[rows])
        stays = votes > 0
        stays[h.rows] = True
        stays = np.flatnonzero(stays)
        _, first, leaf = np.unique(book.leaves(codes[stays]), return_index=True, return_inverse=True)
        of_leaf = np.arange(len(first))[:, None] == leaf  # [leaves, rows that stay]
        alone = np.where(of_leaf[:, np.searchsorted(stays, h.rows)], h.bias, -np.inf)
        total, weight = logsumexp(alone, 1), np.exp(log_softmax(alone, 1))
        mean = weight @ h.x
        far = [w @ (h.spread + np.square(h.x - mu).sum(1)) for w, mu in zip(weight, mean, strict=True)]
        parts.append((mean, weight @ h.v, codes[stays[first]], total, np.array(far), of_leaf @ votes[stays]))
        offsets.append(offsets[-1] + len(first))
    width = book.centers[0].shape[1] if histories.x is None else histories.x.shape[1]
    value_width = 0 if histories.v is None else histories.v.shape[1]
    none = (
        np.zeros((0, width)),
        np.zeros((0, value_width)),
        np.zeros((0, len(book.centers)), np.int32),
        *[np.zeros(0)] * 2,
        np.zeros(0, np.int64),
    )
    x, v, codes, bias, spread, votes = (np.concatenate(every) for every in zip(none, *parts, strict=True))
    return Histories(x, v, np.array(offsets), codes, bias=bias, spread=spread, weights=votes)


def leaf_sums_backward(
    book: Any, histories: Histories, sums: Histories, gradients: Histories, *, need: Any = ("v", "bias"),
    v_rows: Array = None,
) -> LeafGradients:  # fmt: skip
    """Gradients of `leaf_sums`, given the sums that it returned and the gradients of their x, v, bias and spread (each
    may be None). s_i is the share of a behaviour in the sum of its leaf:

        s_i = exp(bias_i - bias)        dv_i = s_i dv
        dbias_i = s_i (dv . (v_i - v) + dx . (x_i - x) + dbias + dspread (spread_i + |x_i - x|^2 - spread))

    `need` names the gradients wanted -> LeafGradients. x is held constant. With v_ids, v's is that of the table, or of
    its rows v_rows, as of `route_backward`.
    """
    batch = gather(histories)
    value_width = sums.v.shape[1]
    dv, dbias = np.zeros((len(batch.codes), value_width)), np.zeros(len(batch.codes))
    of_sums = ("x", "v", "bias", "spread")
    dx, dsum_v, dmass, dspread = (
        np.zeros(getattr(sums, name).shape) if getattr(gradients, name) is None else float64(getattr(gradients, name))
        for name in of_sums
    )
    x, v, mass, spread = (float64(getattr(sums, name)) for name in of_sums)
    for span, (rows, h) in zip(ranges(sums.offsets), each_row(book, histories), strict=True):
        number = {leaf: span.start + k for k, leaf in enumerate(book.leaves(sums.codes[span]).tolist())}
        for i, leaf in enumerate(book.leaves(batch.codes[rows][h.rows]).tolist()):
            s, at = number[leaf], rows.start + h.rows[i]
            share, far = np.exp(h.bias[i] - mass[s]), np.square(h.x[i] - x[s]).sum()
            dv[at] += share * dsum_v[s]
            dbias[at] += share * (
                dsum_v[s] @ (h.v[i] - v[s]) + dx[s] @ (h.x[i] - x[s]) + dmass[s]
                + dspread[s] * (h.spread[i] + far - spread[s])
            )  # fmt: skip
    dv = of_table(dv, histories.v, histories.v_ids, v_rows)
    return LeafGradients(dv if "v" in need else None, dbias if "bias" in need else None)


def missing(histories: Histories, *, book: Any = None) -> Array:
    """[T]: 0 for a behaviour that is missing, -inf for any other. One of some history is missing where `route` takes it
    for absent, though it has a row of v without a NaN or an infinity."""
    batch = gather(histories)
    rows, used = slice(0, len(batch.v)), np.zeros(len(batch.v), bool)
    for span in ranges(batch.offsets):
        used[span] = True
    width = book.centers[0].shape[1] if batch.x is None else batch.x.shape[1]
    h = History(0, rows, batch, RouteAgents(np.zeros((1, 0, width))), 1, book, None)
    here = np.isfinite(float64(batch.v)).all(1)
    here[h.rows] = False
    return np.where(here & used, 0.0, -np.inf)


def route(
    histories: Histories, agents: Agents | Array, *, count: Array = None, temperature: Any = None,
    normalize: str = "agents", book: Any = None, sparse: int | None = None, precision: str = "float32",
    tokens: bool = True, mean_x: bool = False,
) -> Tokens:  # fmt: skip
    """Soft-routing attention: each agent aggregates the whole history by semantic similarity.

        d_ai = |x_i - p_a|^2 + spread_i
        history: u_ai = exp(bias_i - d_ai / tau)
        agents:  u_ai = exp(bias_i) softmax over present a of (-d_ai / tau)
        token_a = sum_i u_ai v_i / sum_i u_ai     mean_x_a = sum_i u_ai x_i / sum_i u_ai     lse_a = log sum_i u_ai

    Of the histories it reads every field but weights: x [T, D] (None: the prototype of `codes`), v [T, V], offsets,
    bias and spread [T], codes [T, L] where `book` is given. With x_ids [T], x and codes are tables, with v_ids [T] v is
    one: behaviour i has row ids_i, and is absent where there is no such row. prototypes [B, M, D], count [B],
    temperature a number or [1] or [M], or None, the default of `book` -> Tokens, with mean_x where it is wanted,
    without tokens where these are not wanted or v is None. precision changes no result here: it is how exact an
    implementation has to be (`hisac.reference.bounds`).

    sparse: a behaviour is routed to the agents of lists.py alone, u_ai = 0 for others, and the softmax over agents is
    over these. Needs `book` and codes. None: to all.

    What is absent, of behaviours and of agents, is told by `hisac.route`; an absent agent is in no softmax. Nothing is
    checked here but normalize: for wrong shapes call `hisac.route`.
    """
    if normalize not in ("history", "agents"):
        raise ValueError(f"route: normalize expected 'history' or 'agents', got {normalize!r}")
    to = compose.routed(_VERBS, "route", agents, count, book, sparse)
    temperature = compose.temperature_of("route", temperature, book)
    users, (m, width) = len(ranges(histories.offsets)), to.prototypes.shape[1:]
    value_width = 0 if histories.v is None else histories.v.shape[1]
    token, lse, mean = np.zeros((users, m, value_width)), np.full((users, m), -np.inf), np.zeros((users, m, width))
    for b, _, h in each_history(histories, to, temperature, book, sparse):
        z, _ = h.logits(normalize)
        w = np.exp(log_softmax(z, 0))
        lse[b, h.agents], mean[b, h.agents] = logsumexp(z, 0), w.T @ h.x
        empty = np.isneginf(lse[b, h.agents])[:, None]  # whatever v is
        token[b, h.agents] = np.where(empty, 0.0, w.T @ h.v)
    return Tokens(token if tokens and histories.v is not None else None, lse, mean if mean_x else None)


def route_backward(
    histories: Histories, agents: Agents | Array, forward: Tokens, gradients: Tokens, *, count: Array = None,
    temperature: Any = None, normalize: str = "agents", book: Any = None, sparse: int | None = None,
    precision: str = "float32", need: Any = ("v", "bias", "temperature"), x_rows: Array = None, v_rows: Array = None,
) -> RouteGradients:  # fmt: skip
    """Gradients of `route`, given what it returned and the gradients of that (each may be None).

        w_ai = exp(z_ai - lse_a)                       dv_i = sum_a w_ai dtoken_a
        dz_ai = w_ai (dtoken_a . (v_i - token_a) + dmean_x_a . (x_i - mean_x_a) + dlse_a)
        dbias_i = sum_a dz_ai                          agents: dz_ai -= s_ai sum_a' dz_a'i
        dtau_a = sum_i dz_ai d_ai / tau_a^2            dx_i = sum_a -2 dz_ai (x_i - p_a) / tau_a = -dp_a's terms
        dspread_i = -sum_a dz_ai / tau_a

    `need` names the gradients wanted -> RouteGradients. With ids, those of x and v are of the tables: the sums over the
    behaviours of each row, [items, D] and [rows, V]; or of the rows that x_rows and v_rows list, zeros for one outside.
    That of mean_x reaches bias, spread, prototypes and temperature: with one of x, NotImplementedError.
    """
    to = compose.routed(_VERBS, "route_backward", agents, count, book, sparse)
    temperature = compose.temperature_of("route_backward", temperature, book)
    batch = gather(histories)
    rows_of = batch.codes if batch.v is None and batch.x is None else batch.x if batch.v is None else batch.v
    size, (m, width), value_width = len(rows_of), to.prototypes.shape[1:], 0 if batch.v is None else batch.v.shape[1]
    if batch.x is None and "x" in need:
        raise ValueError("route_backward: a gradient of x expected x, got none")
    if gradients.mean_x is not None and "x" in need:
        raise NotImplementedError("route_backward: mean_x has no gradient for x")
    dv, dbias, dspread, dx = np.zeros((size, value_width)), np.zeros(size), np.zeros(size), np.zeros((size, width))
    dtau, dp = np.zeros(m), np.zeros(to.prototypes.shape)
    for b, rows, h in each_history(histories, to, temperature, book, sparse):
        z, s = h.logits(normalize)
        total = float64(forward.lse[b, h.agents])
        mass = np.isfinite(total)
        w = np.where(mass, np.exp(z - np.where(mass, total, 0.0)), 0.0)
        slope = np.zeros(z.shape)  # of z, by what each w multiplies
        if gradients.lse is not None:
            slope = slope + float64(gradients.lse[b, h.agents])
        for values, mean, d in ((h.v, forward.tokens, gradients.tokens), (h.x, forward.mean_x, gradients.mean_x)):
            if d is not None:
                d, mean = float64(d[b, h.agents]), float64(mean[b, h.agents])
                slope = slope + values @ d.T - (mean * d).sum(1)
        dz, at = w * np.where(mass, slope, 0.0), rows.start + h.rows
        if gradients.tokens is not None:
            np.add.at(dv, at, w @ float64(gradients.tokens[b, h.agents]))
        np.add.at(dbias, at, dz.sum(1))
        dz = dz - s * dz.sum(1, keepdims=True)
        np.add.at(dspread, at, -(dz / h.tau).sum(1))
        np.add.at(dtau, h.agents, (dz * (square_distances(h.x, h.p) + h.spread[:, None])).sum(0) / h.tau**2)
        g = 2 * dz / h.tau
        for j, agent in enumerate(h.agents):
            terms = g[:, j, None] * (h.p[j] - h.x)
            np.add.at(dx, at, terms)
            dp[b, agent] = -terms.sum(0)
    if np.size(temperature) == 1:
        dtau = dtau.sum(keepdims=True)
    x, v, _, _, x_ids, v_ids = histories[:6]
    dx, dv = of_table(dx, x, x_ids, x_rows), of_table(dv, v, v_ids, v_rows)
    every = {"x": dx, "v": dv, "bias": dbias, "spread": dspread, "prototypes": dp, "temperature": dtau}
    return RouteGradients(*(every[name] if name in need else None for name in RouteGradients._fields))


_VERBS = compose.Verbs(
    encode, vote, lambda book, agents: book.prototypes(agents), agent_lists, leaf_sums, missing, route, np,
    lambda a, like: a,
)  # fmt: skip


def compress(
    book: Any, histories: Histories, *, budget: int | None = None, fanout: Any = None, beam: Any = None,
    agents: Agents | None = None, temperature: Any = None, normalize: str = "agents", method: str = "exact",
    refine: int = 0, missing: str = "drop", sparse: int | None = None, precision: str = "float32",
    mean_x: bool = False,
) -> Compressed:  # fmt: skip
    """From histories to tokens, composed of the verbs above (compose.py): `vote`, or the agents given, then `route`.

    method="leaf": over the behaviours' `leaf_sums`. refine=n: n times p_a <- mean_x_a first, where agent a received
    mass. missing="token": one more token, the mean v and log count of the behaviours that are `missing`. log_share:
    the equations of `Compressed`.
    """
    return compose.compress(
        _VERBS, book, histories, agents=agents, budget=budget, fanout=fanout, beam=beam, temperature=temperature,
        normalize=normalize, method=method, refine=refine, missing=missing, sparse=sparse, precision=precision,
        mean_x=mean_x,
    )  # fmt: skip


def tokens_of(users: int, token_offsets: Array, *arrays: Array) -> tuple[Any, ...]:
    """Where each user's tokens are in arrays [B, M, ..], or, with token_offsets, [R, ..]; then the arrays, user by
    user."""
    at: list[Any] = list(range(users)) if token_offsets is None else ranges(token_offsets)
    return at, *(None if a is None else [a[i] for i in at] for a in arrays)


def present_tokens(keys: Any, bias: Any, b: int) -> Array:
    """Of one user [M, H]: whether its bias and its key hold neither NaN nor an infinity."""
    present: Array = np.isfinite(keys[b]).all(2)
    return present if bias is None else present & np.isfinite(float64(bias[b]))[:, None]


def present_values(values: Any, keys: Any, bias: Any, b: int) -> Array:
    """One user's values [M, H, V], zero for absent tokens."""
    return np.where(present_tokens(keys, bias, b)[..., None], float64(values[b]), 0.0)


def attend_logits(q: Array, keys: Any, bias: Any, b: int, rows: slice, scale: float) -> Array:
    """One user's logits [n, H, M], -inf where a token is absent: its bias, its key or q is NaN or infinite."""
    z = scale * np.einsum("nhd,mhd->nhm", finite(q[rows]), finite(keys[b]))
    z = z if bias is None else z + finite(bias[b])
    return np.where(present_tokens(keys, bias, b).T & np.isfinite(q[rows]).all(2)[..., None], z, -np.inf)


def attend(
    q: Array, keys: Array, values: Array, candidate_offsets: Array, *, bias: Array = None, scale: float | None = None,
    token_offsets: Array = None, longest: int | None = None,
) -> Attended:  # fmt: skip
    """Target attention of each candidate on its user's tokens.

        z_m = scale q . k_m + bias_m        out = softmax(z) values        lse = log sum_m exp z_m

    q [N, H, d], keys [B, M, H, d], values [B, M, H, V], candidate_offsets [B + 1], bias [B, M]; scale 1 / sqrt(d)
    -> Attended. With token_offsets [B + 1] keys are [R, H, d], values [R, H, V] and bias [R], user by user; `longest`
    is for compiled kernels. A token whose bias or key holds a NaN or an infinity is absent, and for a q that holds one
    every token is. No present token: zero and -inf.
    """
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    out, lse = np.zeros((*q.shape[:2], values.shape[-1])), np.full(q.shape[:2], -np.inf)
    _, keys, values, bias = tokens_of(len(ranges(candidate_offsets)), token_offsets, keys, values, bias)
    for b, rows in enumerate(ranges(candidate_offsets)):
        z = attend_logits(q, keys, bias, b, rows, scale)
        lse[rows] = logsumexp(z, 2)
        w = np.exp(log_softmax(z, 2))
        mean = np.einsum("nhm,mhv->nhv", w, present_values(values, keys, bias, b))
        out[rows] = np.where(np.isfinite(lse[rows])[..., None], mean, 0.0)
    return Attended(out, lse)


def attend_backward(
    d_out: Array, d_lse: Array, forward: Attended, q: Array, keys: Array, values: Array, candidate_offsets: Array, *,
    bias: Array = None, scale: float | None = None, token_offsets: Array = None, longest: int | None = None,
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
    at, keys, values, bias = tokens_of(len(ranges(candidate_offsets)), token_offsets, keys, values, bias)
    for b, rows in enumerate(ranges(candidate_offsets)):
        g, out, total, dl = (float64(a[rows]) for a in (d_out, forward.out, forward.lse, d_lse))
        some, z = np.isfinite(total), attend_logits(q, keys, bias, b, rows, scale)
        w = np.where(some[..., None], np.exp(z - np.where(some, total, 0.0)[..., None]), 0.0)
        dw = np.einsum("nhv,mhv->nhm", g, present_values(values, keys, bias, b))
        dz = w * (dw + np.where(some, dl - (g * out).sum(2), 0.0)[..., None])
        dq[rows] = scale * np.einsum("nhm,mhd->nhd", dz, finite(keys[b]))
        dk[at[b]] = scale * np.einsum("nhm,nhd->mhd", dz, finite(q[rows]))
        dv[at[b]] = np.einsum("nhm,nhv->mhv", w, g)
        if db is not None:
            db[at[b]] = dz.sum((0, 1))
    return AttendGradients(dq, dk, dv, db)
