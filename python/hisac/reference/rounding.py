# SPDX-License-Identifier: Apache-2.0
"""What the bounds of all verbs are made of: roundings, the sums of many terms, the types of results."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..types import Array
from . import verbs

U = 2.0**-24
U16 = 2.0**-8
HALVES = 2.0**-15
HUGE = 2.0**125  # beyond it float32 may overflow
TINY = 2.0**-125  # below it exp may give 0
LEAST = 2.0**-149  # what one rounding of a subnormal float32 may cost
TYPES = {"float32": (2.0**-24, 2.0**-149), "float16": (2.0**-11, 2.0**-24), "bfloat16": (2.0**-8, 2.0**-133)}


def as_numpy(a: Array) -> Array:
    """Any array as NumPy; torch's bfloat16 as float32."""
    if hasattr(a, "detach"):
        a = a.detach().cpu()
        a = a.float() if str(a.dtype) == "torch.bfloat16" else a
    return np.asarray(a)


def in_numpy(args: Mapping[str, Any]) -> dict[str, Any]:
    def convert(a: Any) -> Any:
        if isinstance(a, tuple):
            return getattr(a, "_make", tuple)(map(convert, a))  # of a named tuple, one of its kind
        return as_numpy(a) if hasattr(a, "shape") else a

    return {name: convert(a) for name, a in args.items()}


def steps(n: int) -> float:
    return 64 + 2 * min(n / 64, 32) + float(np.log2(max(n, 1)))


def bias_error(bias: Array | float) -> Array:
    """Of a bias in base 2; one of 2^126 and more keeps its sign only."""
    return np.where(np.abs(bias) < 2 * HUGE, 4 * U * np.abs(bias), np.inf)


def log_error(f: Array) -> Array:
    """|log S| where |S - 1| <= f."""
    return np.where(f < 1, -np.log1p(-np.minimum(f, 1 - 1e-12)), np.inf)


def in_type(value: Array, bound: Array, dtype: str) -> Array:
    """`bound` and the rounding to `dtype`."""
    relative, least = TYPES[dtype]
    return bound + relative * (np.abs(value) + bound) + least


def in_float32(value: Array, bound: Array) -> Array:
    """`bound` of a gradient; NaN where float32 may overflow on the way (a bound holds 2^-18 of the moduli it sums)."""
    return np.where(np.isfinite(value) & (np.abs(value) < HUGE) & (bound < 2.0**-18 * HUGE), bound, np.nan)


def of_gradients(exact: Any, bounds: tuple[Array, ...], relative: float) -> tuple[Array, ...]:
    """The bounds of the gradients wanted, with a relative error more, as `_in_float32`; None where not wanted."""
    pairs = zip(exact, bounds, strict=True)
    return tuple(None if g is None else in_float32(g, bound + relative * np.abs(g)) for g, bound in pairs)


def weigh(z: Array, total: Array, e: Array) -> tuple[Array, Array]:
    """exp(z - total), 0 where total is -inf; and how much more it may be when z is wrong by e."""
    mass = np.isfinite(total)
    gap = np.where(mass, z - np.where(mass, total, 0.0), -np.inf)
    w, e = np.exp(gap), e + 2 * U * np.where(np.isfinite(gap), np.abs(gap), 0.0) + 8 * U
    # a large e may bring back what exp took for 0
    up = np.where(
        e > 1, np.where(gap + e > 70, np.inf, np.exp(np.minimum(gap + e, 70.0))), w * np.expm1(np.minimum(e, 1.0))
    )
    return w, np.where(mass, up, np.where(np.isneginf(total), 0.0, np.nan))


def weighted_sums(
    z: Array, e: Array, values: Array, size: Array, extra: float = 0.0, more: int = 0
) -> tuple[Array, Array, Array]:
    """Logits z [n, m] with errors e; values [n, V] of moduli up to size [V], themselves wrong by extra * size; so many
    roundings more than c(n) on the way into a sum -> softmax(z)^T values [m, V], its bound, and the bound of the
    log-sum-exp [m]."""
    n, m = z.shape
    way = steps(n) + more
    total = verbs.logsumexp(z, 0)
    mass = np.isfinite(total)
    bad = ~np.isfinite(values).all(0) | ~np.isfinite(size)
    values, size = np.where(bad, 0.0, values), np.where(bad, 0.0, size)
    w, up = weigh(z, total, e)
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
        bound[a] = moved + (2 * way + 8) * U * weighed + (extra + 2 * n * TINY) * size + 2 * (n + 64) * LEAST
        if np.isinf(e[np.isfinite(z[:, a]), a]).all() or np.isinf(e[z[:, a] > 0, a]).any():
            bound[a] = np.inf  # every logit overflows to -inf, or one to inf
    bad = bad | (n * size > HUGE)  # sums may overflow to both infinities
    worst = np.where(np.isfinite(z), e, 0.0).max(0, initial=0.0)
    lse = np.where(mass, np.minimum(log_error(f), worst) + (way + 8 + 2 * np.abs(total)) * U, 0.0)
    return mean, np.where(mass[:, None] & bad, np.nan, bound), lse
