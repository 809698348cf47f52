# SPDX-License-Identifier: Apache-2.0
"""How far a float32 kernel may be from `hisac.reference`, cell by cell: derived from sizes and rounding, not tuned.

With u = 2^-24 and c(n) = 64 + 2 min(n / 64, 32) + log2 n, the roundings on a term's way into a sum of n: runs of 64
terms, each run scaled and added to its tile's 32, the tiles merged in pairs:

- Logits are computed as bias - max(0, |x|^2 + |p|^2 - 2 x.p) / tau, x and p from an origin c among the prototypes (from
  zero with precision="bfloat16" and on CUDA). The three sums have D terms and the differences 4 roundings, so
      e = |dz| <= (D + 12) u (|x - c| + |p - c|)^2 / tau + 6 u d / tau + 4 u |bias|.
  Agents mode subtracts a log-sum-exp over agents, whose error is at most log(1 + sum_a s_a (exp(e_a) - 1)) and its own
  rounding.
- A weight w_i then becomes w_i exp(+-e_i) / S with |S - 1| <= f = sum_i w_i (exp(e_i) - 1), so a token moves by at most
      sum_i w_i (exp(e_i) - 1 + f) / (1 - f) |v_i - token|.
  Where f is near 1 or beyond, one law is left: a token lies between the least and the largest v of its rows. A mean x
  is a token whose v is x.
- Accumulation adds (2 c(T) + 8) u times the mean of |v|, and the result is rounded to v's type.
- lse moves by -log(1 - f), and never by more than the largest e; its own sum and rounding add (c(T) + 8 + 2 |lse|) u.
- Sparse routing adds a run for each group, the rows of one code of level 1 in a tile, which is scaled and added to the
  tile's sum: 6 G roundings for G groups.
- precision="bfloat16" rounds x, p, the weights and v by U16 = 2^-8 each: |x - p| moves by U16 (|x| + |p|), as if p
  drifted; the relative error of every weight grows by U16, and that of v is U16. On AMX and CUDA, float32 multiplies
  two halves of bfloat16 each, whose products err by at most 2^-15 sum |x p|; weights and v by 2^-15.
- A log share is z_a - log sum_a exp z_a: it moves by e_a + max e; with w_a |z_a - max z| <= 1 / e, and M terms, its own
  rounding adds (2 |z_a - max z| + 2 |share| + 2 M + 16) u.
- A leaf's sums have a relative error k, its weights' and its accumulation's: its mean v moves by 2 k max|v|, its log
  mass by k, its spread by 4 k R^2, R its longest row.
- `match` weighs the sums of a node by exp(bias_i - max bias), within (4 |bias_i - lse| + 8) u, and adds them up as a
  token's rows; a pair that is merged has two such terms.
- Gradients are sums of products; each factor's relative error, and the accumulation, multiply the sum of their moduli:
  of x - c and p - c in those of x and of prototypes, since the kernels add up g (p - c) - g (x - c).
  On CUDA (`cuda=True`) these products, and those of `attend`, are of halves too, or rounded with precision="bfloat16".

A bound is infinite where logits overflow (anything but NaN will do), NaN where a NaN or infinite value went in, or a
gradient or a sum of v overflows (anything will do).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import _core, compose
from ..types import (
    Array,
    Attended,
    AttendGradients,
    Histories,
    LeafGradients,
    Match,
    MatchGradients,
    RouteGradients,
    Tokens,
)
from . import verbs
from .rounding import (
    HALVES,
    HUGE,
    LEAST,
    TINY,
    U16,
    U,
    bias_error,
    in_float32,
    in_numpy,
    in_type,
    log_error,
    of_gradients,
    steps,
    weigh,
    weighted_sums,
)
from .rounding import (
    as_numpy as as_numpy,
)
from .tables import gather, of_table
from .tree_match import each_node, match_backward

OPTIONS = ("agents", "temperature", "book", "sparse")  # of verbs.each_history


def _dense(args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `route` or its backward in NumPy, with gathered rows copied out: loading them rounds nothing more
    than the definition does."""
    args = in_numpy(args)
    if "agents" in args:
        given = (args.pop(name, None) for name in ("agents", "count"))
        args["agents"] = compose.routed(verbs._VERBS, "route", *given, *map(args.get, ("book", "sparse")))
    return args | {"histories": gather(args["histories"])}


def _of_table(name: str, g: Array, bound: Array, args: Mapping[str, Any]) -> Array:
    """The bound of the gradient of x or v, from the gradients and bounds of behaviours' rows: with ids, of sums in
    float64 that are rounded once."""
    args = in_numpy(args)
    given, rows = args["histories"], args.get(f"{name}_rows")
    ids = getattr(given, f"{name}_ids")
    if g is None or ids is None:
        return bound
    total, limit, size = (of_table(d, getattr(given, name), ids, rows) for d in (g, bound, np.abs(g)))
    return in_float32(total, limit + U * (size + limit) + LEAST)


def _origin(h: Any) -> Any:
    """The origin c [D] that the CPU takes: in each dimension the median of the first five present prototypes, or the
    first where there are fewer."""
    return np.median(h.p[:5], 0) if len(h.p) >= 5 else h.p[0] if len(h.p) else 0.0


class _Logits:
    """One user's logits z [n, m], their errors e, and what they are made of."""

    def __init__(self, h: Any, normalize: str, rounding: float, cuda: bool) -> None:
        width, drift = h.x.shape[1], 0.0
        self.d = verbs.square_distances(h.x, h.p) + h.spread[:, None]
        far = np.sqrt(np.square(h.x).sum(1) + h.spread)[:, None] + np.sqrt(np.square(h.p).sum(1))
        self.origin, near = 0.0, far
        if not cuda and rounding != U16:
            self.origin = c = _origin(h)
            near = np.sqrt(np.square(h.x - c).sum(1) + h.spread)[:, None] + np.sqrt(np.square(h.p - c).sum(1))
        if rounding == U16:
            drift = U16 * far + 2 * np.sqrt(width) * TINY  # subnormals count as 0
        far, near = np.square(far + drift), np.square(near + drift)
        e = (width + 12) * U * near + 6 * U * self.d + (2 * np.sqrt(self.d) + drift) * drift
        e = e + (2 * width + len(h.x) + 8) * LEAST
        if rounding == HALVES:
            e = e + HALVES * near + 2 * np.sqrt(width) * TINY * np.sqrt(near)  # 2 sum |x p| <= near / 2
        self.wrong = e  # of d
        t, e = np.where(h.listed, -self.d / h.tau, -np.inf), e / h.tau
        e = np.where((far / h.tau > HUGE) | (h.tau < 2.0**-126) | np.isnan(e), np.inf, e)  # inf / inf: p lost, tau inf
        e = np.where(h.listed, e, 0.0)
        self.z, self.share = h.logits(normalize)
        if normalize == "agents":
            log_sum = verbs.logsumexp(t, 1)
            log_sum = np.where(np.isfinite(log_sum), log_sum, 0.0)  # of a row that is routed to no agent
            up = np.exp(np.minimum(t - log_sum[:, None] + e, 70.0)) - np.exp(t - log_sum[:, None])
            off = np.minimum(log_error(up.sum(1)), e.max(1, initial=0.0))
            off = off + (t.shape[1] + 8 + 4 * np.abs(log_sum)) * U
            e = e + off[:, None] + 2 * U * np.where(h.listed, np.abs(t), 0.0)
        self.e = e + bias_error(h.bias)[:, None]
        self.rounding = rounding  # of a weight, and of v
        self.more = 0 if cuda else 6 * h.groups  # roundings of a sum: each group ends a run, and is scaled and added
        self.flushed = TINY if rounding else 2 * len(h.x) * LEAST  # a subnormal v counts as 0; or is rounded


def _rounding(args: Mapping[str, Any], cuda: bool) -> float:
    """The relative error of what products multiply."""
    if args.get("precision") == "bfloat16":
        return U16
    return HALVES if cuda or _core.active_isa() == "amx" else 0.0


def _users(args: Mapping[str, Any]) -> Any:
    """The users of a batch as (b, rows, History)."""
    full: dict[str, Any] = dict.fromkeys(OPTIONS) | dict(args)
    full["temperature"] = compose.temperature_of("route", full["temperature"], full["book"])
    return verbs.each_history(full["histories"], *(full[name] for name in OPTIONS))


def route_bound(args: Mapping[str, Any], dtype: str = "float32", *, cuda: bool = False) -> Tokens:
    """args: the arguments of `route`; dtype: v's type; cuda: on a GPU -> the largest |difference| of tokens, lse and
    mean_x, where these are wanted."""
    args = _dense(args)
    p, v, normalize = args["agents"].prototypes, args["histories"].v, args.get("normalize", "agents")
    value_width = 0 if v is None else v.shape[1]
    tokens, lse, mean_x = np.zeros((*p.shape[:2], value_width)), np.zeros(p.shape[:2]), np.zeros(p.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        for b, _, h in _users(args):
            logits = _Logits(h, normalize, _rounding(args, cuda), cuda)
            some, e = np.isfinite(verbs.logsumexp(logits.z, 0))[:, None], logits.e + 2 * logits.rounding
            wrong = logits.rounding * (2 + logits.rounding)  # of a value, and of its weight, whose sum is not rounded
            for values, kind, to in ((h.v, dtype, tokens), (h.x, "float32", mean_x)):
                size = np.abs(values).max(0, initial=0.0)
                mean, bound, off = weighted_sums(logits.z, e, values, size, wrong, logits.more)
                to[b, h.agents] = np.where(some, in_type(mean, bound + logits.flushed, kind), 0.0)
            lse[b, h.agents] = off
    wanted = args.get("tokens", True) and v is not None
    return Tokens(tokens if wanted else None, lse, mean_x if args.get("mean_x") else None)


def _by_leaf(book: Any, kept: Array, codes: Array, h: Any) -> tuple[Array, Array, Array]:
    """One user's leaves, of codes `kept`: that of each row; their log masses; the relative errors of their sums."""
    leaf = np.searchsorted(book.leaves(kept), book.leaves(codes))
    alone = np.where(np.arange(len(kept))[:, None] == leaf, h.bias, -np.inf)
    mass, share = verbs.logsumexp(alone, 1), np.exp(verbs.log_softmax(alone, 1)).sum(0)
    skew, rounding = np.zeros(len(kept)), 2 * U * np.abs(h.bias - mass[leaf]) + 4 * U
    np.add.at(skew, leaf, share * np.expm1(np.minimum(rounding, 1.0)))
    return leaf, mass, skew + (steps(len(h.x)) + 8) * U


def _largest(leaf: Array, count: int, rows: Array) -> Array:
    """The largest of each leaf's rows [n] or [n, V], moduli."""
    most = np.zeros((count, *rows.shape[1:]))
    np.maximum.at(most, leaf, rows)
    return most


def first_of(leaf: Array) -> Array:
    """leaf [n] of each row -> the first row of the same leaf."""
    _, first, number = np.unique(leaf, return_index=True, return_inverse=True)
    return np.asarray(first[number])


def leaf_sums_bound(args: Mapping[str, Any], *, cuda: bool = False) -> Histories:
    """args: the arguments of `leaf_sums`; cuda: on a GPU -> the largest |difference| of x, v, bias and spread; codes
    and votes are exact, and a bias of -inf is -inf."""
    args = _dense(args)
    batch, book = args["histories"], args["book"]
    sums: Any = verbs.leaf_sums(**args)
    parts = []
    with np.errstate(over="ignore", invalid="ignore"):
        for (rows, h), own in zip(verbs.each_row(book, batch), verbs.ranges(sums.offsets), strict=True):
            leaf, mass, skew = _by_leaf(book, sums.codes[own], batch.codes[rows][h.rows], h)
            reach = np.sqrt(np.square(h.x).sum(1) + h.spread)
            float64_mean = np.square(2.0**-50 * _largest(leaf, len(mass), reach))  # of the definition itself
            if not cuda:  # sums are those of x less the leaf's first row
                reach = np.sqrt(np.square(h.x - h.x[first_of(leaf)]).sum(1) + h.spread)
            reach = _largest(leaf, len(mass), reach)
            x, v = (4 * skew[:, None] * _largest(leaf, len(mass), np.abs(a)) + 2 * TINY for a in (h.x, h.v))
            spread = 4 * skew * np.square(reach) + U * sums.spread[own] + float64_mean + TINY
            bias = skew + 4 * U * np.abs(np.nan_to_num(mass, neginf=0.0)) + 4 * U
            parts.append((in_float32(sums.x[own], x), in_float32(sums.v[own], v), bias, spread))
    empty = np.zeros((0, sums.x.shape[1])), np.zeros((0, sums.v.shape[1])), np.zeros(0), np.zeros(0)
    x, v, bias, spread = (np.concatenate(every) for every in zip(empty, *parts, strict=True))
    offsets, codes, votes = (np.zeros(a.shape) for a in (sums.offsets, sums.codes, sums.weights))
    return Histories(x, v, offsets, codes, bias=bias, spread=spread, weights=votes)


def leaf_sums_backward_bound(args: Mapping[str, Any]) -> LeafGradients:
    """args: the arguments of `leaf_sums_backward` -> the largest |difference| of each wanted gradient."""
    given, args = args, _dense(args)
    book, sums, gradients = args["book"], args["sums"], args["gradients"]
    batch = args["histories"]
    dv, dbias = np.zeros((len(batch.v), sums.v.shape[1])), np.zeros(len(batch.v))
    of_sums = ("x", "v", "bias", "spread")
    x, v, mass, spread = (verbs.float64(getattr(sums, name)) for name in of_sums)
    dx, dsum_v, dmass, dspread = (
        np.zeros(getattr(sums, name).shape) if (d := getattr(gradients, name)) is None else np.abs(verbs.float64(d))
        for name in of_sums
    )
    long = (x.shape[1] + v.shape[1] + 24) * U
    with np.errstate(over="ignore", invalid="ignore"):
        for own, (rows, h) in zip(verbs.ranges(sums.offsets), verbs.each_row(book, batch), strict=True):
            number = np.searchsorted(book.leaves(sums.codes[own]), book.leaves(batch.codes[rows][h.rows]))
            s, at = own.start + number, rows.start + h.rows
            gap = h.bias - mass[s]
            share = np.exp(np.minimum(gap, 80.0))
            wrong = share * np.expm1(np.minimum(2 * U * np.abs(gap) + 12 * U, 1.0)) + TINY
            far = np.square(np.sqrt(np.square(h.x).sum(1)) + np.sqrt(np.square(x[s]).sum(1)))
            moduli = (dsum_v[s] * (np.abs(h.v) + np.abs(v[s]))).sum(1) + (dx[s] * (np.abs(h.x) + np.abs(x[s]))).sum(1)
            moduli = moduli + dmass[s] + dspread[s] * (h.spread + far + spread[s])
            moduli = np.where((moduli > HUGE) | (far > HUGE), np.inf, moduli)
            np.add.at(dv, at, wrong[:, None] * dsum_v[s] + TINY)
            np.add.at(dbias, at, (wrong + share * long) * moduli + TINY)
    overlap = (len(verbs.ranges(batch.offsets)) + 1) * U
    exact: Any = verbs.leaf_sums_backward(**args)
    of_rows, of_bias = of_gradients(exact, (dv, dbias), overlap)
    return LeafGradients(_of_table("v", exact.v, of_rows, given), of_bias)


def unit_bound(expected: Tokens, width: int = 4096) -> Tokens:
    """The bound of `route` for |x|, |p| and |v| at most 1, D at most `width`, temperature at least 0.1 and at most 2^24
    rows."""
    m = expected.lse.shape[1]
    e = ((width + 12) * 16 + 6 * 4) * U / 0.1 + (m + 2 * 40 + 16) * U  # |x - c| + |p - c| <= 4
    f = np.expm1(e)
    of_means = 2 * f / (1 - f) + (2 * steps(2**24) + 8) * U
    tokens, mean_x = (
        None if a is None else in_type(a, np.full(a.shape, of_means), "float32")
        for a in (expected.tokens, expected.mean_x)
    )
    lse = f / (1 - f) + (steps(2**24) + 8 + 2 * np.abs(np.nan_to_num(expected.lse, neginf=0.0))) * U
    return Tokens(tokens, lse, mean_x)


def log_share_bound(z: Array, e: Array) -> Array:
    """Of z_a - log sum_a exp z_a, [B, M], as `Compressed.log_share`, where z is wrong by e: z = lse in agents mode."""
    some = np.isfinite(z)
    near = np.where(some, z - z.max(1, keepdims=True, initial=-HUGE), 0.0)
    share = np.where(some, verbs.log_softmax(z, 1), 0.0)
    rounding = (2 * np.abs(near) + 2 * np.abs(share) + 2 * z.shape[1] + 16) * U
    bound = e + e.max(1, keepdims=True, initial=0.0) + rounding
    return np.where(np.abs(share) < HUGE, bound, np.inf)


def route_backward_bound(args: Mapping[str, Any], *, cuda: bool = False) -> RouteGradients:
    """args: the arguments of `route_backward`; cuda: on a GPU -> the largest |difference| of each wanted gradient."""
    given, args = args, _dense(args)
    forward, gradients, p = args["forward"], args["gradients"], args["agents"].prototypes
    without_x = gradients.mean_x is not None or args["histories"].x is None
    exact: Any = verbs.route_backward(**args | {"need": RouteGradients._fields[without_x:]})
    normalize, rounding, (m, width) = args.get("normalize", "agents"), _rounding(args, cuda), p.shape[1:]
    # of a product with a gradient: what both factors are rounded by, and what is lost of one that is subnormal
    split, least = (2 * rounding, TINY) if cuda else (0.0, 0.0)
    size = len(exact.bias)
    dv, dbias, dspread, dx, dtau, dp = (
        np.zeros(shape) for shape in (exact.v.shape, size, size, (size, width), m, p.shape)
    )
    with np.errstate(over="ignore", invalid="ignore"):
        for b, rows, h in _users(args):
            logits = _Logits(h, normalize, rounding, cuda)
            total, at, n = verbs.float64(forward.lse[b, h.agents]), rows.start + h.rows, len(h.x)
            mass = np.isfinite(total)
            w, wrong = weigh(logits.z, total, logits.e)
            wrong = wrong + TINY * mass
            slope, term, lost, columns = np.zeros(w.shape), np.zeros(w.shape), 0.0, 0
            if gradients.lse is not None:
                dl = verbs.float64(gradients.lse[b, h.agents])
                slope, term = slope + dl, term + np.abs(dl)
            for values, mean, d in ((h.v, forward.tokens, gradients.tokens), (h.x, forward.mean_x, gradients.mean_x)):
                if d is None:
                    continue
                d, mean = (verbs.float64(a[b, h.agents]) for a in (d, mean))
                slope = slope + values @ d.T - (mean * d).sum(1)
                term = term + np.abs(values) @ np.abs(d).T + np.abs(mean * d).sum(1)
                lost = lost + least * (np.abs(d).sum(1) + np.abs(values).sum(1, keepdims=True))
                columns += values.shape[1]
            slope, term = np.where(mass, slope, 0.0), np.where(term > HUGE / 8, np.inf, term)
            way = steps(n) + logits.more
            long = (columns + way + 16) * U + split  # a dot product over columns, then the sums of the forward
            dz = w * slope
            dz_wrong = wrong * np.abs(slope) + (w + wrong) * (long * term + lost)
            many = (len(h.agents) + 8) * U
            if gradients.tokens is not None:
                dt = np.abs(verbs.float64(gradients.tokens[b, h.agents]))
                dv_wrong = wrong @ dt + (many + split) * (w @ dt)
                dv_wrong = dv_wrong + least * (dt.sum(0) + w.sum(1, keepdims=True))
                np.add.at(dv, at, dv_wrong * (1 + U) + U * 4 * np.abs(dv_wrong) + TINY)
            np.add.at(dbias, at, dz_wrong.sum(1) + many * np.abs(dz).sum(1) + TINY)
            s = logits.share
            every, every_wrong = dz.sum(1, keepdims=True), (dz_wrong + many * np.abs(dz)).sum(1, keepdims=True)
            s_wrong = s * np.expm1(np.minimum(logits.e, 70.0)) + TINY * (normalize == "agents")
            dz_wrong = dz_wrong + s * every_wrong + s_wrong * (np.abs(every) + every_wrong)
            dz, dz_wrong = np.abs(dz - s * every), dz_wrong + 4 * U * (np.abs(dz) + s * np.abs(every))
            accumulate = (way + len(p) + m + 16) * U
            d, d_wrong = logits.d, logits.wrong
            off = dz_wrong * (d + d_wrong) + dz * d_wrong + accumulate * dz * d
            np.add.at(dtau, h.agents, off.sum(0) / h.tau**2 + TINY)
            off = dz_wrong + (many + accumulate + max(split, logits.rounding)) * dz
            g, g_wrong = 2 * dz / h.tau, 2 * off / h.tau + least
            x, a = (np.abs(rows - logits.origin) + logits.flushed / U16 for rows in (h.x, h.p))
            beyond = np.where(g + g_wrong > HUGE, np.inf, TINY)  # however small what they multiply
            np.add.at(dspread, at, (g_wrong + 6 * U * g).sum(1) + beyond.max(1, initial=TINY))
            np.add.at(dx, at, (g_wrong + 6 * U * g) @ a + (g_wrong + 6 * U * g).sum(1, keepdims=True) * x)
            np.add.at(dx, at, beyond.max(1, initial=TINY, keepdims=True))
            dp[b, h.agents] = g_wrong.T @ x + g_wrong.sum(0)[:, None] * a + beyond.max(0, initial=TINY)[:, None]
    overlap = (len(p) + 1) * U  # rows of several users are added up
    if np.size(args.get("temperature", 0)) == 1:
        dtau = dtau.sum(keepdims=True)
    need = args.get("need", ("v", "bias", "temperature"))
    wanted = RouteGradients(*(g if n in need else None for n, g in zip(exact._fields, exact, strict=True)))
    found = RouteGradients(*of_gradients(wanted, (dx, dv, dbias, dspread, dp, dtau), overlap))
    x, v = (_of_table(name, getattr(wanted, name), getattr(found, name), given) for name in "xv")
    return found._replace(x=x, v=v)


def _attend_errors(
    q: Array, keys: Any, bias: Any, b: int, rows: slice, scale: float, split: float
) -> tuple[Array, Array]:
    """One user's logits [n, H, M] and their errors; split: of a product, relative."""
    z = verbs.attend_logits(q, keys, bias, b, rows, scale)
    moduli = np.einsum("nhd,mhd->nhm", *(np.abs(verbs.finite(a)) for a in (q[rows], keys[b])))
    shift = 0.0 if bias is None else np.abs(verbs.finite(bias[b]))
    e = (
        ((q.shape[2] + 8) * U + split) * abs(scale) * moduli
        + 4 * U * np.where(np.isfinite(z), np.abs(z), 0.0)
        + bias_error(shift)
    )
    return z, np.where((moduli > HUGE) | (abs(scale) * moduli > HUGE), np.inf, e)


def attend_bound(args: Mapping[str, Any], dtype: str = "float32", *, cuda: bool = False) -> Attended:
    """args: the arguments of `attend`; dtype: q's type; cuda: on a GPU -> the largest |difference| of out and lse."""
    args, split = in_numpy(args), HALVES * cuda
    q, keys, values, bias = args["q"], args["keys"], args["values"].astype(np.float64), args.get("bias")
    scale = 1 / np.sqrt(q.shape[2]) if args.get("scale") is None else args["scale"]
    out, lse = np.zeros((*q.shape[:2], values.shape[-1])), np.zeros(q.shape[:2])
    spans = verbs.ranges(args["candidate_offsets"])
    _, keys, values, bias = verbs.tokens_of(len(spans), args.get("token_offsets"), keys, values, bias)
    with np.errstate(over="ignore", invalid="ignore"):
        for b, rows in enumerate(spans):
            z, e = _attend_errors(q, keys, bias, b, rows, scale, split)
            for h in range(q.shape[1]):
                absent, none = np.isneginf(z[:, h]).all(0), np.isneginf(z[:, h]).all(1)  # tokens, candidates
                zt, et, some = z[:, h, ~absent].T, e[:, h, ~absent].T, values[b][~absent, h]
                mean, bound, off = weighted_sums(
                    np.where(none, 0.0, zt), np.where(none, 0.0, et), some, np.abs(some).max(0, initial=0.0), 2 * split
                )
                bound = in_type(mean, bound + TINY * cuda, dtype)
                bound[:, ~np.isfinite(some).all(0)] = np.nan  # a value that is not finite spoils its user
                out[rows, h], lse[rows, h] = np.where(none[:, None], 0.0, bound), np.where(none, 0.0, off)
                if cuda:  # whose products meet what the CPU leaves out
                    odd = ~np.isfinite(q[rows, h]).all(1) | ~np.isfinite(keys[b][:, h]).all()
                    spoilt = odd[:, None] | ~np.isfinite(values[b][:, h]).all(0)
                    out[rows, h][spoilt] = lse[rows, h][odd] = np.nan
    return Attended(out, lse)


def attend_backward_bound(args: Mapping[str, Any], *, cuda: bool = False) -> AttendGradients:
    """args: the arguments of `attend_backward`; cuda: on a GPU -> the largest |difference| of each gradient."""
    args, split = in_numpy(args), 2 * HALVES * cuda  # of both factors of a product
    q, keys, values, bias, forward = args["q"], args["keys"], args["values"], args.get("bias"), args["forward"]
    scale = 1 / np.sqrt(q.shape[2]) if args.get("scale") is None else args["scale"]
    dq, dk, dv, db = np.zeros(q.shape), np.zeros(keys.shape), np.zeros(values.shape), np.zeros(keys.shape[:-2])
    d_lse = np.zeros(forward.lse.shape) if args["d_lse"] is None else args["d_lse"]
    spans = verbs.ranges(args["candidate_offsets"])
    at, keys, values, bias = verbs.tokens_of(len(spans), args.get("token_offsets"), keys, values, bias)
    with np.errstate(over="ignore", invalid="ignore"):
        for b, rows in enumerate(spans):
            g, out, total, dl = (verbs.float64(a[rows]) for a in (args["d_out"], forward.out, forward.lse, d_lse))
            z, e = _attend_errors(q, keys, bias, b, rows, scale, split)
            w, wrong = weigh(z, total[..., None], e)
            wrong = wrong + TINY * (wrong > 0)
            read = verbs.present_values(values, keys, bias, b)
            term = np.einsum("nhv,mhv->nhm", np.abs(g), np.abs(read))
            term = term + (np.abs(g * out).sum(2) + np.abs(dl))[..., None]
            term = np.where(term > HUGE / 8, np.inf, term)
            long = (g.shape[2] + 16) * U + split
            slope = np.einsum("nhv,mhv->nhm", g, read) + (dl - (g * out).sum(2))[..., None]
            dz = w * np.abs(np.where(np.isfinite(total)[..., None], slope, 0.0))
            off = (
                wrong * np.abs(slope)
                + (w + wrong) * long * term
                + ((steps(max(len(g), 1)) + len(keys[b]) + 16) * U + split) * dz
                + LEAST * (g.shape[2] + 16) * (w + wrong > 0)  # of subnormal products, before large keys or queries
            )
            dq[rows] = abs(scale) * np.einsum("nhm,mhd->nhd", off, np.abs(verbs.finite(keys[b]))) + TINY
            dk[at[b]] = abs(scale) * np.einsum("nhm,nhd->mhd", off, np.abs(verbs.finite(q[rows]))) + TINY
            dv[at[b]] = np.einsum("nhm,nhv->mhv", wrong + ((steps(len(g)) + 8) * U + split) * w, np.abs(g)) + TINY
            db[at[b]] = off.sum((0, 1)) + q.shape[1] * U * dz.sum((0, 1)) + TINY
            if cuda and not all(np.isfinite(a).all() for a in (q[rows], keys[b], values[b])):
                dq[rows] = dk[at[b]] = dv[at[b]] = db[at[b]] = np.nan
    exact: Any = verbs.attend_backward(**args)
    return AttendGradients(*of_gradients(exact, (dq, dk, dv, db), U))


def _match_args(args: Mapping[str, Any]) -> dict[str, Any]:
    names = ("book", "sums", "codes", "candidate_offsets", "ids")
    return {name: args.get(name) for name in names}


def match_bound(args: Mapping[str, Any], dtype: str = "float32") -> Match:
    """args: the arguments of `match`; dtype: the type of the sums' v -> the largest |difference| of v and lse."""
    args = in_numpy(args)
    levels, table = len(args["book"].sizes), args["sums"].v
    size = len(args["codes"] if args.get("ids") is None else args["ids"])
    v, lse = np.zeros((size, levels, table.shape[1])), np.zeros((size, levels))
    known: dict[Any, Any] = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for n, level, rows, bias in each_node(**_match_args(args)):
            if (node := rows.tobytes()) not in known:
                values = verbs.float64(table[rows])
                largest = np.abs(values).max(0, initial=0.0)
                mean, bound, off = weighted_sums(
                    bias[:, None], 2 * U * np.abs(bias - bias.max())[:, None], values, largest
                )
                known[node] = in_type(mean, bound + TINY, dtype)[0], off[0]
            v[n, level], lse[n, level] = known[node]
    return Match(v, lse)


def match_backward_bound(args: Mapping[str, Any]) -> MatchGradients:
    """args: the arguments of `match_backward` -> the largest |difference| of each wanted gradient."""
    args = in_numpy(args)
    table, gradients = args["sums"].v, args["gradients"]
    dv, dbias = np.zeros(table.shape), np.zeros(len(table))
    many = (len(args["candidate_offsets"]) * len(args["book"].sizes) + 4) * U  # nodes that a row is in, of all users
    with np.errstate(over="ignore", invalid="ignore"):
        for n, level, rows, bias in each_node(**_match_args(args)):
            share, wrong = weigh(bias, verbs.logsumexp(bias, 0), 2 * U * np.abs(bias - bias.max()))
            share, wrong = share / share.sum(), wrong + share * wrong.sum() + TINY
            d = np.zeros(table.shape[1]) if gradients.v is None else np.abs(verbs.float64(gradients.v[n, level]))
            d_lse = 0.0 if gradients.lse is None else abs(float(gradients.lse[n, level]))
            values = np.abs(verbs.float64(table[rows]))
            moduli = d_lse + values @ d + share @ (values @ d)
            moduli = np.where(moduli > HUGE, np.inf, moduli)
            np.add.at(dv, rows, wrong[:, None] * d + many * (share[:, None] * d) + TINY)
            np.add.at(dbias, rows, wrong * moduli + share * (wrong @ (values @ d)) + many * share * moduli + TINY)
    exact: Any = match_backward(**args)
    return MatchGradients(*of_gradients(exact, (dv, dbias), U))
