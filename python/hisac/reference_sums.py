# SPDX-License-Identifier: Apache-2.0
"""The sums that the definitions of `hisac.reference` share: log-sum-exp, softmax, distances, means of leaves."""

from typing import Any

import numpy as np

from .results import Array


def float64(a: Array) -> Array:
    """Any of the input types as NumPy float64."""
    return np.asarray(a).astype(np.float64)


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


def leaf_means(leaf: Array, x: Array, v: Array, bias: Array, spread: Array) -> tuple[Any, ...]:
    """Rows with leaf numbers [n] -> each row's leaf as an index into the sorted leaves, and its part of the leaf's
    mass; then of the leaves, under weights w_i = e^bias_i of total W: sum w_i x_i / W, sum w_i v_i / W, log W, and
    sum w_i (spread_i + |x_i - x|^2) / W."""
    _, at = np.unique(leaf, return_inverse=True)
    alone = np.where(np.arange(at.max(initial=-1) + 1)[:, None] == at, bias, -np.inf)
    weight = np.exp(log_softmax(alone, 1))
    mean = weight @ x
    square = [w @ (spread + np.square(x - mu).sum(1)) for w, mu in zip(weight, mean, strict=True)]
    return at, weight.sum(0), mean, weight @ v, logsumexp(alone, 1), np.array(square)
