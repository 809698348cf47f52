# SPDX-License-Identifier: Apache-2.0
"""How far a float32 kernel may be from `hisac.reference`, cell by cell: derived from sizes and rounding, not tuned.

With u = 2^-24 and c(n) = 64 + 2 min(n / 64, 32) + log2 n, the roundings on a term's way into a sum of n: runs of 64
terms, each run scaled and added to its tile's 32, the tiles merged in pairs:

- Logits are computed as bias - max(0, |x|^2 + |p|^2 - 2 x.p) / tau, x and p from an origin c among the prototypes (from
  zero with precision="bfloat16" and on CUDA). The three sums have D terms and the differences 4 roundings, so
      e = |dz| <= (D + 12) u (|x - c| + |p - c|)^2 / tau + 6 u d / tau + 4 u |bias|.
  Agents mode subtracts a log-sum-exp over agents, whose error is at most log(1 + sum_a s_a (exp(e_a) - 1)) and its own
  rounding. A prototype moved by |dp| in `refine` adds (2 |x - p| |dp| + |dp|^2) / tau.
- A weight w_i then becomes w_i exp(+-e_i) / S with |S - 1| <= f = sum_i w_i (exp(e_i) - 1), so a token moves by at most
      sum_i w_i (exp(e_i) - 1 + f) / (1 - f) |v_i - token|.
  Where f is near 1 or beyond, one law is left: a token lies between the least and the largest v of its rows.
- Accumulation adds (2 c(T) + 8) u times the mean of |v|, and the result is rounded to v's type.
- lse moves by -log(1 - f), and never by more than the largest e; its own sum and rounding add (c(T) + 8 + 2 |lse|) u.
- precision="bfloat16" rounds x, p, the weights and v by U16 = 2^-8 each: |x - p| moves by U16 (|x| + |p|), as if p
  drifted; the relative error of every weight grows by U16, and that of v is U16. On AMX and CUDA, float32 multiplies
  two halves of bfloat16 each, whose products err by at most 2^-15 sum |x p|; weights and v by 2^-15.
- `leaf`: a leaf's sums have a relative error k (its weights' and its accumulation's), so d = E|x - p|^2 moves by
  4 k (R + |p|)^2, R its longest row; its mean v by 2 k max|v|; its log mass by k. Leaf sums themselves alike.
- Gradients are sums of products; each factor's relative error, and the accumulation, multiply the sum of their moduli:
  of x - c and p - c in those of x and of prototypes, since the kernels add up g (p - c) - g (x - c).
  On CUDA (`cuda=True`) these products, and those of `attend`, are of halves too, or rounded with precision="bfloat16".

A bound is infinite where float32 overflows (anything but NaN will do), NaN where a NaN or infinite value went in or
a gradient overflows (anything will do).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import _core
from ..types import Array, Attended, AttendGradients, Histories, RouteGradients, Tokens
from . import verbs

U = 2.0**-24
U16 = 2.0**-8
HALVES = 2.0**-15
HUGE = 2.0**125  # beyond it float32 may overflow
TINY = 2.0**-125  # below it exp may give 0
LEAST = 2.0**-149  # what one rounding of a subnormal float32 may cost
TYPES = {"float32": (2.0**-24, 2.0**-149), "float16": (2.0**-11, 2.0**-24), "bfloat16": (2.0**-8, 2.0**-133)}
OPTIONS = ("prototypes", "count", "temperature", "book", "method")  # of verbs.each_history


def as_numpy(a: Array) -> Array:
    """Any array as NumPy; torch's bfloat16 as float32."""
    if hasattr(a, "detach"):
        a = a.detach().cpu()
        a = a.float() if str(a.dtype) == "torch.bfloat16" else a
    return np.asarray(a)


def _in_numpy(args: Mapping[str, Any]) -> dict[str, Any]:
    def convert(a: Any) -> Any:
        if isinstance(a, tuple):
            return getattr(a, "_make", tuple)(map(convert, a))  # of a named tuple, one of its kind
        return as_numpy(a) if hasattr(a, "shape") else a

    return {name: convert(a) for name, a in args.items()}


def _dense(args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `route` or its backward in NumPy, with gathered rows copied out: loading them rounds nothing more
    than the definition does."""
    args = _in_numpy(args)
    return args | {"histories": verbs.gather(args["histories"])}


def _steps(n: int) -> float:
    return 64 + 2 * min(n / 64, 32) + float(np.log2(max(n, 1)))


def _bias_error(bias: Array | float) -> Array:
    """Of a bias in base 2; one of 2^126 and more keeps its sign only."""
    return np.where(np.abs(bias) < 2 * HUGE, 4 * U * np.abs(bias), np.inf)


def _log_error(f: Array) -> Array:
    """|log S| where |S - 1| <= f."""
    return np.where(f < 1, -np.log1p(-np.minimum(f, 1 - 1e-12)), np.inf)


def _in_type(value: Array, bound: Array, dtype: str) -> Array:
    """`bound` and the rounding to `dtype`."""
    relative, least = TYPES[dtype]
    return bound + relative * (np.abs(value) + bound) + least


def _in_float32(value: Array, bound: Array) -> Array:
    """`bound` of a gradient; NaN where float32 may overflow on the way (a bound holds 2^-18 of the moduli it sums)."""
    return np.where(np.isfinite(value) & (np.abs(value) < HUGE) & (bound < 2.0**-18 * HUGE), bound, np.nan)


def _of_gradients(exact: Any, bounds: tuple[Array, ...], relative: float) -> tuple[Array, ...]:
    """The bounds of the gradients wanted, with a relative error more, as `_in_float32`; None where not wanted."""
    pairs = zip(exact, bounds, strict=True)
    return tuple(None if g is None else _in_float32(g, bound + relative * np.abs(g)) for g, bound in pairs)


def _weights(z: Array, total: Array, e: Array) -> tuple[Array, Array]:
    """exp(z - total), 0 where total is -inf; and how much more it may be when z is wrong by e."""
    mass = np.isfinite(total)
    gap = np.where(mass, z - np.where(mass, total, 0.0), -np.inf)
    w, e = np.exp(gap), e + 2 * U * np.where(np.isfinite(gap), np.abs(gap), 0.0) + 8 * U
    # a large e may bring back what exp took for 0
    up = np.where(
        e > 1, np.where(gap + e > 70, np.inf, np.exp(np.minimum(gap + e, 70.0))), w * np.expm1(np.minimum(e, 1.0))
    )
    return w, np.where(mass, up, np.where(np.isneginf(total), 0.0, np.nan))


def _sums(z: Array, e: Array, values: Array, size: Array, extra: float = 0.0) -> tuple[Array, Array, Array]:
    """Logits z [n, m] with errors e; values [n, V] of moduli up to size [V], themselves wrong by extra * size ->
    softmax(z)^T values [m, V], its bound, and the bound of the log-sum-exp [m]."""
    n, m = z.shape
    total = verbs.logsumexp(z, 0)
    mass = np.isfinite(total)
    bad = ~np.isfinite(values).all(0) | ~np.isfinite(size)
    values, size = np.where(bad, 0.0, values), np.where(bad, 0.0, size)
    w, up = _weights(z, total, e)
    w, up = w / np.where(mass, w.sum(0), 1.0), np.minimum(up, 1e30)  # a huge z leaves no digits for log sum w = 0
    f = up.sum(0)
    mean, bound = w.T @ values, np.zeros((m, values.shape[1]))
    span_low, span_high = values.min(0, initial=np.inf), values.max(0, initial=-np.inf)
    for a in np.flatnonzero(mass):
        change = (up[:, a] + w[:, a] * f[a]) / (1 - f[a]) if f[a] < 1 else np.full(n, np.inf)
        inside = np.maximum(mean[a] - span_low, span_high - mean[a])
        if f[a] < 0.5:
            moved = np.minimum(change @ np.abs(values - mean[a]), inside)
            weighed = np.minimum((w[:, a] + change) @ np.abs(values), size) if extra == 0 else size
        else:
            moved, weighed = inside, size
        bound[a] = moved + (2 * _steps(n) + 8) * U * weighed + (extra + 2 * n * TINY) * size + 2 * (n + 64) * LEAST
        if np.isinf(e[:, a]).all() or np.isinf(e[z[:, a] > 0, a]).any():
            bound[a] = np.inf  # every logit overflows to -inf, or one to inf
    bound = np.where(mass[:, None] & (n * size > HUGE), np.inf, bound)
    worst = np.where(np.isfinite(z), e, 0.0).max(0, initial=0.0)
    lse = np.where(mass, np.minimum(_log_error(f), worst) + (_steps(n) + 8 + 2 * np.abs(total)) * U, 0.0)
    return mean, np.where(mass[:, None] & bad, np.nan, bound), lse


def _largest(h: Any, rows: Array) -> Array:
    """The largest of each leaf's rows [n] or [n, V], moduli."""
    most = np.zeros((len(h.x), *rows.shape[1:]))
    np.maximum.at(most, h.leaf, rows)
    return most


def first_of(leaf: Array) -> Array:
    """leaf [n] of each row -> the first row of the same leaf."""
    _, first, number = np.unique(leaf, return_index=True, return_inverse=True)
    return np.asarray(first[number])


def _leaf_errors(h: Any, raw: Any) -> tuple[Array, Array]:
    """The relative error of each leaf's sums, and how far its rows reach; of single rows: none, and |x|."""
    skew, reach = np.zeros(len(h.x)), np.sqrt(np.square(raw.x).sum(1) + raw.spread)
    if h is raw:
        return skew, reach
    rounding = 2 * U * np.abs(raw.bias - h.bias[h.leaf]) + 4 * U
    np.add.at(skew, h.leaf, h.share * np.expm1(np.minimum(rounding, 1.0)))
    return skew + (_steps(len(raw.x)) + 8) * U, _largest(h, reach)


def _origin(h: Any) -> Any:
    """The origin c [D] that the CPU takes: in each dimension the median of the first five present prototypes, or the
    first where there are fewer."""
    return np.median(h.p[:5], 0) if len(h.p) >= 5 else h.p[0] if len(h.p) else 0.0


class _Logits:
    """One user's logits z [n, m], their errors e, what they are made of; `drift` [m] is how far p may be off."""

    def __init__(self, h: Any, raw: Any, normalize: str, drift: Array, rounding: float, cuda: bool) -> None:
        self.skew, reach = _leaf_errors(h, raw)
        width = h.x.shape[1]
        self.d = verbs.square_distances(h.x, h.p) + h.spread[:, None]
        far = reach[:, None] + np.sqrt(np.square(h.p).sum(1))
        self.origin, near = 0.0, far
        if not cuda and rounding != U16:
            self.origin = c = _origin(h)
            near = np.sqrt(np.square(h.x - c).sum(1) + h.spread)[:, None] + np.sqrt(np.square(h.p - c).sum(1))
        if rounding == U16:
            drift = drift + U16 * far + 2 * np.sqrt(width) * TINY  # subnormals count as 0
        far, near = np.square(far + drift), np.square(near + drift)
        e = (
            (width + 12) * U * near
            + (4 if cuda else 16) * self.skew[:, None] * far  # the CPU sums x less the first row of a leaf
            + 6 * U * self.d
            + (2 * np.sqrt(self.d) + drift) * drift
        )
        e = e + (2 * width + len(raw.x) + 8) * LEAST
        if rounding == HALVES:
            e = e + HALVES * near + 2 * np.sqrt(width) * TINY * np.sqrt(near)  # 2 sum |x p| <= near / 2
        self.wrong = e  # of d
        self.reach = reach
        t, e = -self.d / h.tau, e / h.tau
        e = np.where((far / h.tau > HUGE) | (h.tau < 2.0**-126) | np.isnan(e), np.inf, e)  # inf / inf: p lost, tau inf
        self.z, self.share = h.logits(normalize)
        if normalize == "agents":
            log_sum = verbs.logsumexp(t, 1)
            up = np.exp(np.minimum(t - log_sum[:, None] + e, 70.0)) - np.exp(t - log_sum[:, None])
            off = np.minimum(_log_error(up.sum(1)), e.max(1, initial=0.0))
            off = off + (t.shape[1] + 8 + 4 * np.abs(log_sum)) * U
            e = e + off[:, None] + 2 * U * np.abs(t)
        self.e = e + self.skew[:, None] + _bias_error(h.bias)[:, None]
        self.rounding = rounding  # of a weight, and of v
        self.flushed = TINY if rounding else 2 * len(raw.x) * LEAST  # a subnormal v counts as 0; is rounded in its leaf


def _rounding(args: Mapping[str, Any], cuda: bool) -> float:
    """The relative error of what products multiply."""
    if args.get("precision") == "bfloat16":
        return U16
    return HALVES if cuda or _core.active_isa() == "amx" else 0.0


def _users(args: Mapping[str, Any]) -> Any:
    """The users of a batch as (b, rows, History, History of its single rows)."""
    full: dict[str, Any] = dict.fromkeys(OPTIONS) | {"temperature": 0.1, "method": "exact"} | dict(args)
    options = {name: full[name] for name in OPTIONS}
    single = options | {"method": "exact"}
    for b, rows, h in verbs.each_history(full["histories"], **options):
        yield b, rows, h, h if full["method"] == "exact" else verbs.History(b, rows, full["histories"], **single)


def route_bound(args: Mapping[str, Any], dtype: str = "float32", *, cuda: bool = False) -> Tokens:
    """args: the arguments of `route`; dtype: v's type; cuda: on a GPU -> the largest |difference| of tokens, lse and
    prototypes."""
    args = _dense(args)
    p, v, missing = args["prototypes"], args["histories"].v, args.get("missing") == "token"
    m, refine, normalize = p.shape[1], args.get("refine", 0), args.get("normalize", "history")
    rounding = _rounding(args, cuda)
    tokens, lse = np.zeros((len(p), m + missing, v.shape[1])), np.zeros((len(p), m + missing))
    moved = np.where(np.isnan(p), np.nan, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        for b, _, h, raw in _users(args):
            drift = np.zeros(len(h.agents))
            for step in range(refine + 1):
                logits = _Logits(h, raw, normalize, drift, rounding, cuda)
                e = logits.e + 2 * logits.rounding
                extra = 2 * float(logits.skew.max(initial=0.0)) + logits.rounding
                if step == refine:
                    break
                mass = np.isfinite(verbs.logsumexp(logits.z, 0))
                mean, bound, _ = _sums(logits.z, e, h.x, np.abs(raw.x).max(0, initial=0.0), extra)
                bound = _in_type(mean, bound + logits.flushed, "float32")
                h.p = np.where(mass[:, None], mean, h.p)
                drift = np.where(mass, np.sqrt(np.square(bound).sum(1)), drift)
                moved[b, h.agents] = np.where(mass[:, None], bound, moved[b, h.agents])
            mean, bound, off = _sums(logits.z, e, h.v, np.abs(raw.v).max(0, initial=0.0), extra)
            some, bound = np.isfinite(verbs.logsumexp(logits.z, 0))[:, None], bound + logits.flushed
            tokens[b, h.agents], lse[b, h.agents] = np.where(some, _in_type(mean, bound, dtype), 0.0), off
            if missing and len(h.absent):
                n, size = len(h.absent), np.abs(h.absent_v).max(0)
                rounded = (_steps(n) + 2) * U * size + cuda * (rounding * size + TINY)
                bound = _in_type(h.absent_v.mean(0), rounded, dtype)
                tokens[b, m], lse[b, m] = np.where(n * size > HUGE, np.inf, bound), 4 * U * np.log(n)
    return Tokens(tokens, lse, moved)


def leaf_sums_bound(args: Mapping[str, Any], *, cuda: bool = False) -> Histories:
    """args: the arguments of `leaf_sums`; cuda: on a GPU -> the largest |difference| of x, v, bias and spread; codes
    are exact."""
    args = _dense(args)
    batch, book = args["histories"], args["book"]
    users, width = len(verbs.ranges(batch.offsets)), book.centers[0].shape[1] if batch.x is None else batch.x.shape[1]
    empty = np.zeros((0, width)), np.zeros((0, batch.v.shape[1])), np.zeros(0), np.zeros(0)
    parts = []
    with np.errstate(over="ignore", invalid="ignore"):
        for *_, h, raw in _users(args | {"prototypes": np.zeros((users, 0, width)), "method": "leaf"}):
            skew, reach = _leaf_errors(h, raw)
            float64_mean = np.square(2.0**-50 * reach)  # of the definition itself
            if not cuda:  # sums are those of x less the leaf's first row
                reach = _largest(h, np.sqrt(np.square(raw.x - raw.x[first_of(h.leaf)]).sum(1) + raw.spread))
            x, v = (4 * skew[:, None] * _largest(h, np.abs(a)) + 2 * TINY for a in (raw.x, raw.v))
            bias = skew + 4 * U * np.abs(h.bias) + 4 * U
            spread = 4 * skew * np.square(reach) + U * h.spread + float64_mean + TINY
            parts.append((_in_float32(h.x, x), _in_float32(h.v, v), bias, spread))
    x, v, bias, spread = (np.concatenate(every) for every in zip(empty, *parts, strict=True))
    codes = np.zeros((len(bias), len(book.centers)))
    return Histories(x, v, np.zeros(users + 1), codes, bias=bias, spread=spread)


def unit_bound(expected: Tokens) -> Tokens:
    """The bound of `route` for |x|, |p| and |v| at most 1, temperature at least 0.1 and at most 2^24 rows."""
    _, m, width = expected.prototypes.shape
    e = ((width + 12) * 16 + 6 * 4) * U / 0.1 + (m + 2 * 40 + 16) * U  # |x - c| + |p - c| <= 4
    f = np.expm1(e)
    tokens = 2 * f / (1 - f) + (2 * _steps(2**24) + 8) * U
    tokens = _in_type(expected.tokens, np.full(expected.tokens.shape, tokens), "float32")
    lse = f / (1 - f) + (_steps(2**24) + 8 + 2 * np.abs(np.nan_to_num(expected.lse, neginf=0.0))) * U
    return Tokens(tokens, lse, np.zeros(expected.prototypes.shape))


def route_backward_bound(args: Mapping[str, Any], *, cuda: bool = False) -> RouteGradients:
    """args: the arguments of `route_backward`; cuda: on a GPU -> the largest |difference| of each wanted gradient."""
    args = _dense(args)
    forward, v = args["forward"], args["histories"].v
    p, normalize = forward.prototypes, args.get("normalize", "history")
    rounding, (m, width) = _rounding(args, cuda), p.shape[1:]
    # of a product with a gradient: what both factors are rounded by, and what is lost of one that is subnormal
    split, least = (2 * rounding, TINY) if cuda else (0.0, 0.0)
    dv, dbias, dx, dtau, dp = (np.zeros(s) for s in (v.shape, len(v), (len(v), width), m, p.shape))
    d_lse = np.zeros(forward.lse.shape) if args["d_lse"] is None else args["d_lse"]
    returned = forward.tokens, forward.lse, args["d_tokens"], d_lse
    with np.errstate(over="ignore", invalid="ignore"):
        for b, rows, h, raw in _users({**args, "prototypes": p}):
            logits = _Logits(h, raw, normalize, np.zeros(len(h.agents)), rounding, cuda)
            token, total, dt, dl = (verbs.float64(a[b, h.agents]) for a in returned)
            mass, n = np.isfinite(total), len(h.x)
            w, wrong = _weights(logits.z, total, logits.e + logits.skew[:, None])
            wrong = wrong + TINY * mass
            size = np.abs(raw.v).max(0, initial=0.0) if h is not raw else np.abs(h.v)
            term = size @ np.abs(dt).T + np.abs(dl) + np.abs(token * dt).sum(1) * np.ones((n, 1))
            term = np.where(term > HUGE / 8, np.inf, term)
            long = (v.shape[1] + _steps(n) + 16) * U + split  # a dot product over V, then the sums of the forward
            slope = np.where(mass, h.v @ dt.T + dl - (token * dt).sum(1), 0.0)
            dz = w * slope
            lost = least * (np.abs(dt).sum(1) + size.sum(-1, keepdims=True)) if cuda else 0.0
            dz_wrong = wrong * np.abs(slope) + (w + wrong) * ((long + 2 * logits.skew[:, None]) * term + lost)
            many = (len(h.agents) + 8) * U
            dv_wrong, at = wrong @ np.abs(dt) + (many + split) * (w @ np.abs(dt)), rows.start + raw.rows
            dv_wrong = dv_wrong + least * (np.abs(dt).sum(0) + w.sum(1, keepdims=True))
            if h is not raw:
                dv_wrong = dv_wrong + 4 * logits.skew[:, None] * (w @ np.abs(dt))
                share_wrong = 2 * U * np.abs(raw.bias - h.bias[h.leaf]) + logits.skew[h.leaf]
                dv_wrong = dv_wrong[h.leaf] * (h.share * (1 + share_wrong))[:, None]
                dv_wrong += (h.share * share_wrong)[:, None] * (w @ np.abs(dt))[h.leaf]
            else:
                np.add.at(dbias, at, dz_wrong.sum(1) + many * np.abs(dz).sum(1) + TINY)
            np.add.at(dv, at, dv_wrong * (1 + U) + U * 4 * np.abs(dv_wrong) + TINY)
            s = logits.share
            every, every_wrong = dz.sum(1, keepdims=True), (dz_wrong + many * np.abs(dz)).sum(1, keepdims=True)
            s_wrong = s * np.expm1(np.minimum(logits.e, 70.0)) + TINY * (normalize == "agents")
            dz_wrong = dz_wrong + s * every_wrong + s_wrong * (np.abs(every) + every_wrong)
            dz, dz_wrong = np.abs(dz - s * every), dz_wrong + 4 * U * (np.abs(dz) + s * np.abs(every))
            accumulate = (_steps(n) + len(p) + m + 16) * U
            d, d_wrong = logits.d, logits.wrong
            off = dz_wrong * (d + d_wrong) + dz * d_wrong + accumulate * dz * d
            np.add.at(dtau, h.agents, off.sum(0) / h.tau**2 + TINY)
            if h is raw:
                off = dz_wrong + (many + accumulate + max(split, logits.rounding)) * dz
                g, g_wrong = 2 * dz / h.tau, 2 * off / h.tau + least
                x, a = (np.abs(rows - logits.origin) + logits.flushed / U16 for rows in (h.x, h.p))
                beyond = np.where(g + g_wrong > HUGE, np.inf, TINY)  # however small what they multiply
                np.add.at(dx, at, (g_wrong + 6 * U * g) @ a + (g_wrong + 6 * U * g).sum(1, keepdims=True) * x)
                np.add.at(dx, at, beyond.max(1, initial=TINY, keepdims=True))
                dp[b, h.agents] = g_wrong.T @ x + g_wrong.sum(0)[:, None] * a + beyond.max(0, initial=TINY)[:, None]
            if args.get("missing") == "token" and len(h.absent):
                share = np.abs(verbs.float64(args["d_tokens"][b, m])) / len(h.absent)
                np.add.at(dv, rows.start + h.absent, 4 * U * share + TINY)
    overlap = (len(p) + 1) * U  # rows of several users are added up
    exact: Any = verbs.route_backward(**args)
    if np.size(args.get("temperature", 0.1)) == 1:
        dtau = dtau.sum(keepdims=True)
    return RouteGradients(*_of_gradients(exact, (dv, dtau, dbias, dx, dp), overlap))


def _attend_errors(
    q: Array, keys: Array, bias: Array | None, b: int, rows: slice, scale: float, split: float
) -> tuple[Array, Array]:
    """One user's logits [n, H, M] and their errors; split: of a product, relative."""
    z = verbs.attend_logits(q, keys, bias, b, rows, scale)
    moduli = np.einsum("nhd,mhd->nhm", *(np.abs(verbs.finite(a)) for a in (q[rows], keys[b])))
    shift = 0.0 if bias is None else np.abs(verbs.finite(bias[b]))
    e = (
        ((q.shape[2] + 8) * U + split) * abs(scale) * moduli
        + 4 * U * np.where(np.isfinite(z), np.abs(z), 0.0)
        + _bias_error(shift)
    )
    return z, np.where((moduli > HUGE) | (abs(scale) * moduli > HUGE), np.inf, e)


def attend_bound(args: Mapping[str, Any], dtype: str = "float32", *, cuda: bool = False) -> Attended:
    """args: the arguments of `attend`; dtype: q's type; cuda: on a GPU -> the largest |difference| of out and lse."""
    args, split = _in_numpy(args), HALVES * cuda
    q, keys, values, bias = args["q"], args["keys"], args["values"].astype(np.float64), args.get("bias")
    scale = 1 / np.sqrt(q.shape[2]) if args.get("scale") is None else args["scale"]
    out, lse = np.zeros((*q.shape[:2], values.shape[3])), np.zeros(q.shape[:2])
    with np.errstate(over="ignore", invalid="ignore"):
        for b, rows in enumerate(verbs.ranges(args["candidate_offsets"])):
            z, e = _attend_errors(q, keys, bias, b, rows, scale, split)
            for h in range(q.shape[1]):
                absent, none = np.isneginf(z[:, h]).all(0), np.isneginf(z[:, h]).all(1)  # tokens, candidates
                zt, et, some = z[:, h, ~absent].T, e[:, h, ~absent].T, values[b, ~absent, h]
                mean, bound, off = _sums(
                    np.where(none, 0.0, zt), np.where(none, 0.0, et), some, np.abs(some).max(0, initial=0.0), 2 * split
                )
                bound = _in_type(mean, bound + TINY * cuda, dtype)
                bound[:, ~np.isfinite(some).all(0)] = np.nan  # a value that is not finite spoils its user
                out[rows, h], lse[rows, h] = np.where(none[:, None], 0.0, bound), np.where(none, 0.0, off)
                if cuda:  # whose products meet what the CPU leaves out
                    odd = ~np.isfinite(q[rows, h]).all(1) | ~np.isfinite(keys[b, :, h]).all()
                    spoilt = odd[:, None] | ~np.isfinite(values[b, :, h]).all(0)
                    out[rows, h][spoilt] = lse[rows, h][odd] = np.nan
    return Attended(out, lse)


def attend_backward_bound(args: Mapping[str, Any], *, cuda: bool = False) -> AttendGradients:
    """args: the arguments of `attend_backward`; cuda: on a GPU -> the largest |difference| of each gradient."""
    args, split = _in_numpy(args), 2 * HALVES * cuda  # of both factors of a product
    q, keys, values, bias, forward = args["q"], args["keys"], args["values"], args.get("bias"), args["forward"]
    scale = 1 / np.sqrt(q.shape[2]) if args.get("scale") is None else args["scale"]
    dq, dk, dv, db = np.zeros(q.shape), np.zeros(keys.shape), np.zeros(values.shape), np.zeros(keys.shape[:2])
    d_lse = np.zeros(forward.lse.shape) if args["d_lse"] is None else args["d_lse"]
    with np.errstate(over="ignore", invalid="ignore"):
        for b, rows in enumerate(verbs.ranges(args["candidate_offsets"])):
            g, out, total, dl = (verbs.float64(a[rows]) for a in (args["d_out"], forward.out, forward.lse, d_lse))
            z, e = _attend_errors(q, keys, bias, b, rows, scale, split)
            w, wrong = _weights(z, total[..., None], e)
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
                + ((_steps(max(len(g), 1)) + keys.shape[1] + 16) * U + split) * dz
            )
            dq[rows] = abs(scale) * np.einsum("nhm,mhd->nhd", off, np.abs(verbs.finite(keys[b]))) + TINY
            dk[b] = abs(scale) * np.einsum("nhm,nhd->mhd", off, np.abs(verbs.finite(q[rows]))) + TINY
            dv[b] = np.einsum("nhm,nhv->mhv", wrong + ((_steps(len(g)) + 8) * U + split) * w, np.abs(g)) + TINY
            db[b] = off.sum((0, 1)) + q.shape[1] * U * dz.sum((0, 1)) + TINY
            if cuda and not all(np.isfinite(a).all() for a in (q[rows], keys[b], values[b])):
                dq[rows] = dk[b] = dv[b] = db[b] = np.nan
    exact: Any = verbs.attend_backward(**args)
    return AttendGradients(*_of_gradients(exact, (dq, dk, dv, db), U))
