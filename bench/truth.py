# SPDX-License-Identifier: Apache-2.0
"""What a row is checked against: `hisac.reference` where it is quick enough, else the same formulas in float64 with
expanded squares, one user or one block of rows at a time (tests/python/app/test_bench.py holds the two together)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hisac import reference as definition
from hisac.types import Histories, RouteGradients, Tokens

Array = Any
reference: Any = definition  # untyped, to be read
REFERENCE_PAIRS = 4e7  # behaviour x agent x width up to which the reference takes at most about a second
REFERENCE = "hisac.reference"
EXPANDED = "float64 expanded form"


def dense(a: Array) -> Array:
    """Any array as NumPy; bfloat16 and float16 as float32."""
    if hasattr(a, "detach"):
        a = a.detach()
        a = a.float() if a.is_floating_point() else a
        return a.cpu().numpy()
    return np.asarray(a)


def relative(result: Array, truth: Array) -> float:
    """|result - truth|_F / |truth|_F."""
    a, b = dense(result).astype(np.float64), np.asarray(truth, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"parity: result is {list(a.shape)}, expected {list(b.shape)}")
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def differing(result: Array, truth: Array) -> float:
    """Share of integer entries that differ."""
    a, b = dense(result), np.asarray(truth)
    if a.shape != b.shape:
        raise ValueError(f"parity: result is {list(a.shape)}, expected {list(b.shape)}")
    return float((a != b).mean())


def weights(
    x: Array, p: Array, tau: float, spread: Array, bias: Array, normalize: str = "history"
) -> tuple[Array, Array, Array]:
    """x [n, D], p [m, D] -> softmax over n of z = bias - (|x - p|^2 + spread) / tau as [m, n], its lse [m], |x - p|^2;
    normalize="agents": of bias + log softmax over m of z."""
    d = np.square(x).sum(1) - 2 * (p @ x.T) + np.square(p).sum(1)[:, None]
    z = -(d + spread) / tau
    if normalize == "agents":
        z -= z.max(0)
        z -= np.log(np.exp(z).sum(0))
    z += bias
    top = z.max(1, keepdims=True)
    w = np.exp(z - top)
    total = w.sum(1, keepdims=True)
    return w / total, (np.log(total) + top)[:, 0], d


def route64(
    x: Array, v: Array, offsets: Array, p: Array, tau: float, count: Array | None, normalize: str = "history"
) -> Tokens:
    """Either mode without bias; every user has a behaviour."""
    tokens, lse = np.zeros((*p.shape[:2], v.shape[1])), np.full(p.shape[:2], -np.inf)
    for b in range(len(p)):
        s, m = slice(offsets[b], offsets[b + 1]), p.shape[1] if count is None else int(count[b])
        w, lse[b, :m], _ = weights(x[s].astype(np.float64), p[b, :m].astype(np.float64), tau, 0.0, 0.0, normalize)
        tokens[b, :m] = w @ v[s].astype(np.float64)
    return Tokens(tokens, lse, p)


def which(rows: int, p: Array) -> str:
    """Which truth a route of so many rows has."""
    quick = rows * p.shape[1] * p.shape[2] <= REFERENCE_PAIRS and len(p) <= 64
    return REFERENCE if quick else EXPANDED


def route(
    x: Array, v: Array, offsets: Array, p: Array, tau: float, count: Array | None = None, normalize: str = "history"
) -> Tokens:
    """The tokens by the truth that `which` names."""
    x, v = dense(x), dense(v)
    if which(len(x), p) == REFERENCE:
        h = Histories(x, v, offsets)
        tokens: Tokens = reference.route(h, p, count=count, temperature=tau, normalize=normalize)
        return tokens
    return route64(x, v, offsets, p, tau, count, normalize)


def leaf64(x: Array, v: Array, leaf: Array, p: Array, tau: float) -> Tokens:
    """`route` over the leaf sums of one user: x [T, D], v [T, V], leaf [T], p [M, D]."""
    order = np.argsort(leaf, kind="stable")
    starts = np.flatnonzero(np.diff(leaf[order], prepend=-1))
    n = np.diff(starts, append=len(leaf))[:, None]
    xs, vs = x[order].astype(np.float64), v[order].astype(np.float64)
    mu, mean_v = (np.add.reduceat(a, starts) / n for a in (xs, vs))
    spread = np.add.reduceat(np.square(xs - np.repeat(mu, n[:, 0], 0)).sum(1), starts) / n[:, 0]
    w, lse, _ = weights(mu, p.astype(np.float64), tau, spread, np.log(n[:, 0]))
    return Tokens((w @ mean_v)[None], lse[None])


def backward64(
    d_tokens: Array, forward: Tokens, x: Array, v: Array, p: Array, tau: float, normalize: str = "history"
) -> tuple[Any, float]:
    """Gradients of v and temperature for one user with d_lse = 0, and the sum of the sizes of the latter's terms;
    d_tokens, forward and p are batches of one."""
    v, dt = v.astype(np.float64), d_tokens[0].astype(np.float64)
    w, lse, d = weights(x.astype(np.float64), p[0].astype(np.float64), tau, 0.0, 0.0, normalize)
    dz = w * (dt @ v.T - (forward.tokens[0] * dt).sum(1)[:, None])
    if normalize == "agents":
        dz -= w * np.exp(lse)[:, None] * dz.sum(0)
    terms = dz * d / tau**2
    found = dict.fromkeys(RouteGradients._fields) | {"v": w.T @ dt, "temperature": np.array([terms.sum()])}
    return RouteGradients(**found), float(np.abs(terms).sum())


def nearest(x: Array, c: Array, block: int = 8192) -> tuple[Array, Array]:
    """x [T, D], c [C, D] -> the nearest code of each row and its squared distance, in float64."""
    c = c.astype(np.float64)
    near, least = np.empty(len(x), np.int64), np.empty(len(x))
    for i in range(0, len(x), block):
        r = x[i : i + block].astype(np.float64)
        d = np.square(c).sum(1) - 2 * (r @ c.T)
        near[i : i + block] = d.argmin(1)
        least[i : i + block] = d.min(1) + np.square(r).sum(1)
    return near, least


def encode64(centers: Sequence[Array], x: Array) -> Array:
    """Codes by the expanded form in float64, residuals in float32; only near-ties can differ from the reference."""
    codes = np.empty((len(x), len(centers)), np.int64)
    for level, c in enumerate(centers):
        codes[:, level], _ = nearest(x, c)
        x = x - c[codes[:, level]]
    return codes


def encode_gap(centers: Sequence[Array], x: Array, codes: Array) -> float:
    """How much farther than the nearest codeword the chosen ones are, at most; squared distance."""
    gap = 0.0
    for level, c in enumerate(centers):
        _, least = nearest(x, c)
        r = x.astype(np.float64) - c[codes[:, level]]
        gap = max(gap, float((np.square(r).sum(1) - least).max(initial=0.0)))
        x = x - c[codes[:, level]]
    return gap


def fit_start(x: Array, size: int, seed: int) -> Array:
    """The rows that `fit` starts level 0 from."""
    rows = np.arange(len(x))
    order = np.argsort(reference.priorities(seed, 0, rows), kind="stable")
    return x[reference.first_distinct(x, order[: 4 * size], size)]


def lloyd64(x: Array, c: Array, iterations: int) -> Array:
    """Lloyd's rounds in float64; a code without rows stays where it is."""
    c = c.astype(np.float64)
    for _ in range(iterations):
        near, _ = nearest(x, c)
        order = np.argsort(near, kind="stable")
        starts = np.flatnonzero(np.diff(near[order], prepend=-1))
        used = near[order][starts]
        c[used] = np.add.reduceat(x[order].astype(np.float64), starts) / np.diff(starts, append=len(x))[:, None]
    return c


def inertia(x: Array, c: Array) -> float:
    """Mean squared distance of a row to its nearest center."""
    return float(nearest(x, dense(c))[1].mean())
