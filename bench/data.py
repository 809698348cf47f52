# SPDX-License-Identifier: Apache-2.0
"""The works' inputs, by seed."""

from typing import Any, NamedTuple

import numpy as np

Array = Any

UNIT = "random unit vectors"
NORMAL = "random normal vectors"
CLUSTERED = "clustered codes"
NEAR = "clustered codes, x near their prototypes"
MIXTURE = "a mixture of Gaussian mixtures"
INTERESTS = "120 of 2,400 clusters, items near their centers, codes of a fit"
JOURNEY = "longest household of Complete Journey, 64-d text embeddings, random values"
"""What a work's inputs are, as its rows say."""


def unit(rng: np.random.Generator, *shape: int) -> Array:
    """Random directions, float32."""
    a = rng.standard_normal(shape, dtype=np.float32)
    return a / np.linalg.norm(a, axis=-1, keepdims=True)


def history(rng: np.random.Generator, rows: int, sizes: tuple[int, int], interests: int = 30) -> Array:
    """codes [rows, 2] int32 of a user with Zipf-like interests, a tenth of the rows off them, long tails of leaves."""
    liked = rng.choice(sizes[0], min(interests, sizes[0]), replace=False)
    share = 1 / np.arange(1, len(liked) + 1)
    first = rng.choice(liked, rows, p=share / share.sum())
    noise = rng.random(rows) < 0.1
    first[noise] = rng.integers(0, sizes[0], noise.sum())
    second = np.minimum(rng.pareto(0.8, rows) * 5, sizes[1] - 1).astype(np.int64)
    return np.stack([first, (second * 167 + first * 31) % sizes[1]], 1).astype(np.int32)


def lengths(rng: np.random.Generator, users: int, mean: int, low: int, high: int | None) -> Array:
    """Uniform between low and high, or lognormal about the mean."""
    if high is not None:
        return rng.integers(low, high + 1, users)
    return np.maximum(low, rng.lognormal(np.log(mean) - 0.5 * 0.8**2, 0.8, users)).astype(np.int64)


def offsets_of(n: Array) -> Array:
    """lengths [B] -> offsets [B + 1]."""
    return np.concatenate([[0], np.cumsum(n)]).astype(np.int64)


def structured(
    rng: np.random.Generator, rows: int, sizes: tuple[int, int], width: int
) -> tuple[list[Array], Array, Array]:
    """centers, codes [rows, 2], x [rows, width] near the prototype of its code."""
    centers = [unit(rng, sizes[0], width), 0.4 * unit(rng, sizes[1], width)]
    codes = history(rng, rows, sizes)
    x = centers[0][codes[:, 0]] + centers[1][codes[:, 1]] + 0.15 * unit(rng, rows, width)
    return centers, codes, x.astype(np.float32)


def items(rng: np.random.Generator, rows: int, width: int) -> Array:
    """x [rows, width]: a mixture of mixtures."""
    top = rng.standard_normal((300, width), dtype=np.float32)
    low = 0.5 * rng.standard_normal((300 * 64, width), dtype=np.float32)
    a = rng.integers(0, 300, rows)
    b = a * 64 + rng.integers(0, 64, rows)
    x = top[a] + low[b] + 0.35 * rng.standard_normal((rows, width), dtype=np.float32)
    return (x / np.sqrt(width)).astype(np.float32)


def interests(rng: np.random.Generator, count: int, rows: int, width: int) -> tuple[Array, Array]:
    """Unit vectors of items [count, width] in 2,400 clusters of 300 groups; and a history, items [rows] of 120 clusters
    with Zipf-like shares."""
    top = rng.standard_normal((300, width), dtype=np.float32)
    low = 0.6 * rng.standard_normal((2400, width), dtype=np.float32)
    of = np.sort(rng.integers(0, 2400, count))
    x = top[of // 8] + low[of] + 0.5 * rng.standard_normal((count, width), dtype=np.float32)
    first, size = np.searchsorted(of, np.arange(2400)), np.bincount(of, minlength=2400)
    liked = rng.permutation(np.flatnonzero(size))[:120]
    share = 1 / np.arange(1, len(liked) + 1) ** 0.8
    of_row = rng.choice(liked, rows, p=share / share.sum())
    at = first[of_row] + rng.integers(0, size[of_row])
    return x / np.linalg.norm(x, axis=1, keepdims=True), at


class Household(NamedTuple):
    """The longest history of the sample in the package, by ids."""

    table: Array
    """[I, 64] float32: an item's text embedding, of norm 1."""
    item: Array
    """[T] int32: rows of the table, oldest first."""
    fitted: Array
    """[n, 64]: purchases of all households in the fitted weeks, as the demo fits its codebook on."""


def household(fit_rows: int) -> Household:
    """The bundled sample, read as `python -m hisac demo` reads it."""
    from hisac.app import protocol

    events = protocol.load()
    user = int(np.diff(events.offsets).argmax())
    text = events.text_of_item[events.item]
    rows = np.random.default_rng(0).permutation(text[events.week <= protocol.FITTED_WEEKS])[:fit_rows]
    item = events.item[events.offsets[user] : events.offsets[user + 1]].astype(np.int32)
    return Household(events.x[events.text_of_item], item, events.x[rows])
