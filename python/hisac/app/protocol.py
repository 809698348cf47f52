# SPDX-License-Identifier: Apache-2.0
"""The trial that the demo runs: real histories in time order, requests that never look ahead, GAUC with its interval.

A household's events lie together, oldest first. A request is a basket: its history is every event of the household
strictly before the basket's time, its candidates are the basket's items (label 1) and, for each, four items drawn in
proportion to their purchases in the fitted weeks (label 0). Popularity alone can therefore not tell them apart.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

FITTED_WEEKS = 43  # codebook, popularity and the sample's PCA see weeks 1 to 43
VALIDATION_WEEKS = (44, 47)  # temperatures are chosen here
TEST_WEEKS = (48, 53)
NEGATIVES = 4
SAMPLE = Path(__file__).parent / "sample" / "complete_journey.npz"


class Events(NamedTuple):
    """Histories of U households: T events of I items that carry one of K texts."""

    offsets: Ints
    """[U + 1] int64: the rows of each household."""
    item: Ints
    """[T] int64."""
    minute: Ints
    """[T] int64, from the first event of all; never falls within a household."""
    week: Ints
    """[T] int64, from 1."""
    basket: Ints
    """[T] int64: the basket's number, in row order."""
    text_of_item: Ints
    """[I] int64."""
    texts: list[tuple[str, ...]]
    """K texts as (department, category, type, brand, size); unknown parts are empty."""
    x: Floats
    """[K, D] float32, rows of norm 1: the text's embedding."""


class Requests(NamedTuple):
    """B baskets with N candidates in all."""

    user: Ints
    """[B]."""
    starts: Ints
    """[B]: first row of the history."""
    ends: Ints
    """[B]: row after the history's last."""
    candidate_offsets: Ints
    """[B + 1]: the candidates of each request."""
    item: Ints
    """[N]: the candidate."""
    label: Ints
    """[N]: 1 if it was bought in the basket."""


def load(path: Path = SAMPLE) -> Events:
    """The bundled sample; see sample/README.md for what it is."""
    with np.load(path) as f:
        x = f["embedding"].astype(np.float32) * f["scale"][:, None]
        offsets, item, minute, week, text_of_item = (
            f[name].astype(np.int64) for name in ("offsets", "item", "minute", "week", "text_of_item")
        )
        basket = np.cumsum(f["first_of_basket"]) - 1
        texts = [tuple(line.split("\t")) for line in f["texts"].tobytes().decode().split("\n")]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return Events(offsets, item, minute, week, basket, text_of_item, texts, x)


def popularity(events: Events) -> Ints:
    """[I]: purchases of each item in the fitted weeks."""
    return np.bincount(events.item[events.week <= FITTED_WEEKS], minlength=len(events.text_of_item))


def requests(events: Events, weeks: tuple[int, int], *, most: int, seed: int, history: int = 500) -> Requests:
    """At most `most` baskets of weeks[0]..weeks[1], drawn by seed from those with `history` earlier events or more."""
    rng = np.random.default_rng(seed)
    basket, first = np.unique(events.basket, return_index=True)
    user = np.searchsorted(events.offsets, first, side="right") - 1
    # Two baskets of one minute do not see each other: the history ends at the first row of that minute.
    moment = np.r_[True, (np.diff(events.minute) != 0) | (np.diff(row_users(events)) != 0)]
    ends = np.maximum.accumulate(np.where(moment, np.arange(len(moment)), 0))[first]
    starts = events.offsets[user]
    eligible = (events.week[first] >= weeks[0]) & (events.week[first] <= weeks[1]) & (ends - starts >= history)
    chosen = np.sort(rng.permutation(np.flatnonzero(eligible))[:most])

    size = len(events.text_of_item)
    bought = np.isin(events.basket, basket[chosen])
    pairs = np.unique(np.searchsorted(basket[chosen], events.basket[bought]) * size + events.item[bought])
    request = pairs // size
    drawn = np.repeat(request, NEGATIVES)
    share = np.cumsum(popularity(events)) / popularity(events).sum()
    negative = np.searchsorted(share, rng.random(len(drawn)), side="right")
    while (clash := np.isin(drawn * size + negative, pairs)).any():
        negative[clash] = np.searchsorted(share, rng.random(clash.sum()), side="right")
    of = np.concatenate([request, drawn])
    order = np.argsort(of, kind="stable")
    label = np.repeat([1, 0], [len(pairs), len(drawn)])
    offsets = np.searchsorted(of[order], np.arange(len(chosen) + 1))
    item = np.concatenate([pairs % size, negative])[order]
    return Requests(user[chosen], starts[chosen], ends[chosen], offsets, item, label[order])


def row_users(events: Events) -> Ints:
    """[T]: the household of each event."""
    return np.repeat(np.arange(len(events.offsets) - 1), np.diff(events.offsets))


def users_of(r: Requests) -> Ints:
    """[N]: the user of each candidate."""
    return np.repeat(r.user, np.diff(r.candidate_offsets))


def repeat_counts(events: Events, r: Requests) -> Ints:
    """[N]: how often the candidate occurs in its request's history."""
    size = len(events.text_of_item)
    key = row_users(events) * size + events.item
    of = np.repeat(np.arange(len(r.user)), np.diff(r.candidate_offsets))
    wanted = r.user[of] * size + r.item
    # Rank (key, row) pairs as one number: T rows fit 2^32.
    ranked = np.sort(key * 2**32 + np.arange(len(key)))
    return np.searchsorted(ranked, wanted * 2**32 + r.ends[of]) - np.searchsorted(ranked, wanted * 2**32)


class Auc(NamedTuple):
    """AUC of the users that have both classes."""

    user: Ints
    value: Floats
    rows: Ints


def user_aucs(user: Ints, score: Floats, label: Ints) -> Auc:
    """AUC_u = P(score of a positive > score of a negative), ties one half, over all rows of user u.

    user, score, label [N]; by ranks within the user, tied scores sharing their mean rank. Users with one class are
    left out.
    """
    order = np.lexsort((score, user))
    user, score, label = user[order], score[order], label[order]
    new = np.r_[True, (user[1:] != user[:-1]) | (score[1:] != score[:-1])]  # not diff: -inf equals -inf
    group = np.cumsum(new) - 1
    first = np.flatnonzero(new)
    mean_rank = (first + np.r_[first[1:], len(user)] - 1) / 2  # of each group of ties
    ids, begin, rows = np.unique(user, return_index=True, return_counts=True)
    positive = np.add.reduceat(label, begin)
    rank_sum = np.add.reduceat(np.where(label > 0, mean_rank[group] - np.repeat(begin, rows), 0.0), begin)
    negative = rows - positive
    both = (positive > 0) & (negative > 0)
    pairs = np.where(both, positive * negative, 1)
    value = (rank_sum - positive * (positive - 1) / 2) / pairs
    return Auc(ids[both], value[both], rows[both])


def gauc(a: Auc, b: Auc | None = None, *, resamples: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """GAUC = sum n_u AUC_u / sum n_u, or its paired difference a - b, with the 95 % interval over resampled users."""
    value = a.value if b is None else a.value - b.value
    if len(value) == 0:
        return np.nan, np.nan, np.nan
    drawn = np.random.default_rng(seed).integers(0, len(value), (resamples, len(value)))
    means = (value * a.rows)[drawn].sum(1) / a.rows[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float((value * a.rows).sum() / a.rows.sum()), float(low), float(high)
