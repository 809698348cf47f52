# SPDX-License-Identifier: Apache-2.0
"""The definition of `match`, what the leaf sums of a user say of each candidate, of its gradients, and of
`merge` and `recent`."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..types import Array, Histories, Match, MatchGradients, Recent
from .codebook import valid_codes
from .verbs import float64, log_softmax, logsumexp, ranges


def candidate_codes(codes: Array, ids: Array, levels: int) -> Array:
    """codes [N, L], or with ids [N] the rows of a table [items, L] -> [N, L]; -1 for an id outside the table."""
    codes = np.asarray(codes)
    if ids is None:
        return codes
    ids = np.asarray(ids)
    inside = (ids >= 0) & (ids < len(codes))
    found = np.full((len(ids), levels), -1, np.int64)
    found[inside] = codes[ids[inside]]
    return found


def each_node(
    book: Any, sums: Histories, codes: Array, candidate_offsets: Array, ids: Array
) -> Iterator[tuple[int, int, Array, Array]]:
    """Of every candidate n and level l that has some: (n, l, the rows of the sums below its first l + 1 codes, their
    biases)."""
    levels = len(book.sizes)
    codes = candidate_codes(codes, ids, levels)
    bias = np.zeros(len(sums.codes)) if sums.bias is None else float64(sums.bias)
    present = valid_codes(book, sums.codes) & np.isfinite(bias)
    ok = valid_codes(book, codes)
    for own, mine in zip(ranges(sums.offsets), ranges(candidate_offsets), strict=True):
        for n in range(mine.start, mine.stop):
            same = present[own] & ok[n]
            for level in range(levels):
                same = same & (sums.codes[own, level] == codes[n, level])
                rows = own.start + np.flatnonzero(same)
                if len(rows):
                    yield n, level, rows, bias[rows]


def match(book: Any, sums: Histories, codes: Array, candidate_offsets: Array, *, ids: Array = None) -> Match:
    """What the history says of each candidate: of the user's leaf sums s below the candidate's first l codes,

        lse = log sum_s exp(bias_s)        v = sum_s exp(bias_s) v_s / sum_s exp(bias_s)        none: v = 0, lse = -inf

    Reads v, offsets, codes and bias of the sums, bias None: 0 each. A sum is absent with an invalid code or a bias that
    is NaN or infinite. codes [N, L]; or a table [items, L], whose row ids[n] is candidate n's. User b has the
    candidates candidate_offsets[b] .. [b + 1]. A candidate with an invalid code, an id outside the table or no user has
    no sums on any level -> Match, v [N, L, V], lse [N, L].
    """
    size, levels = len(codes if ids is None else ids), len(book.sizes)
    v, lse = np.zeros((size, levels, sums.v.shape[1])), np.full((size, levels), -np.inf)
    for n, level, rows, bias in each_node(book, sums, codes, candidate_offsets, ids):
        v[n, level] = np.exp(log_softmax(bias, 0)) @ float64(sums.v[rows])
        lse[n, level] = logsumexp(bias, 0)
    return Match(v, lse)


def match_backward(
    book: Any, sums: Histories, gradients: Match, codes: Array, candidate_offsets: Array, *, ids: Array = None,
    need: Any = ("v", "bias"),
) -> MatchGradients:  # fmt: skip
    """Gradients of `match`, given those of its v and lse (each may be None). With the share s_i = exp(bias_i - lse) of
    a sum, added up over candidates in the order of their index, and over levels,

        dv_i = s_i dv        dbias_i = s_i (dlse + dv . (v_i - v))

    An implementation may add up the gradients of the candidates of one node first, in the order of their index, and
    then share them out. Codes have no gradient. `need` names the gradients wanted -> MatchGradients.
    """
    d_sum, d_bias = np.zeros(sums.v.shape), np.zeros(len(sums.codes))
    for n, level, rows, bias in each_node(book, sums, codes, candidate_offsets, ids):
        share, values = np.exp(log_softmax(bias, 0)), float64(sums.v[rows])
        slope = np.zeros(len(rows))
        if gradients.lse is not None:
            slope = slope + float64(gradients.lse[n, level])
        if gradients.v is not None:
            dv = float64(gradients.v[n, level])
            d_sum[rows] += share[:, None] * dv
            slope = slope + (values - share @ values) @ dv
        d_bias[rows] += share * slope
    return MatchGradients(d_sum if "v" in need else None, d_bias if "bias" in need else None)


def recent(histories: Histories, n: int) -> Recent:
    """Each user's last n behaviours apart from the older ones. One with an id of no row, or a bias that is not finite,
    is padding and passed over. With N = the sum of exp(bias) over the others of a user, log_share_i = bias_i - log N,
    and the older ones' share is the sum of theirs. n is at most T.
    """
    h = histories
    sizes = [len(a) for a in (h.x_ids, h.v_ids, h.v, h.x, h.codes, h.bias) if a is not None]
    bias = np.zeros(sizes[0]) if h.bias is None else float64(h.bias)
    bias = np.where(np.isfinite(bias), bias, -np.inf)
    for table, ids in ((h.x, h.x_ids), (h.v, h.v_ids)):
        if ids is not None:
            bias = np.where((ids >= 0) & (ids < (np.inf if table is None else len(table))), bias, -np.inf)

    spans, n = ranges(h.offsets), min(n, len(bias))
    rows, share = np.zeros((len(spans), n), np.int64), np.full((len(spans), n), -np.inf)
    cut, older = np.zeros(len(spans), np.int64), np.zeros(len(spans))
    for b, span in enumerate(spans):
        present = span.start + np.flatnonzero(bias[span] > -np.inf)
        late = present[max(0, len(present) - n) :]
        cut[b] = span.start if len(late) == len(present) else late[0] if n else span.stop
        total = logsumexp(bias[present], 0)
        rows[b, : len(late)], share[b, : len(late)] = late, bias[late] - total
        older[b] = logsumexp(bias[present[: len(present) - len(late)]], 0) - (total if len(present) else 0.0)
    x_ids, v_ids = (a if a is None else np.where(share > -np.inf, a[rows], 0) for a in (h.x_ids, h.v_ids))
    starts = np.array([s.start for s in spans], np.int64)
    return Recent(h._replace(offsets=(starts, cut)), rows, x_ids, v_ids, share, older)


def repeat_count(histories: Histories, ids: Array, candidate_offsets: Array) -> Array:
    """[N]: how many behaviours of its user have the candidate's id, by v_ids or, without these, x_ids. A negative id
    counts none."""
    own = histories.x_ids if histories.v_ids is None else histories.v_ids
    counts = np.zeros(len(ids), np.int64)
    for rows, asked in zip(ranges(histories.offsets), ranges(candidate_offsets), strict=True):
        for n in range(asked.start, asked.stop):
            counts[n] = (own[rows] == ids[n]).sum() if ids[n] >= 0 else 0
    return counts


def merge(a: Any, b: Any) -> Any:
    """Two pairs (out, lse) of disjoint parts of one softmax -> that of both: with m = max(lse_a, lse_b),

        lse = m + log(exp(lse_a - m) + exp(lse_b - m))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    Where one lse is -inf, the result is the other pair; where both are, 0 and -inf; NaN or inf gives NaN. Pairs are
    `Attended`, `Match`, `Tokens`, whose mean_x is merged as its tokens are, or tuples; out has the shape of lse, and a
    width.
    """
    lse_a, lse_b = float64(a[1]), float64(b[1])
    both = np.stack([lse_a, lse_b])
    both = np.where(both == np.inf, np.nan, both)
    share = np.exp(log_softmax(both, 0))[..., None]

    def mean(x: Array, y: Array) -> Array:
        return None if x is None else np.where(share == 0, 0.0, share * np.stack([float64(x), float64(y)])).sum(0)

    merged = [logsumexp(both, 0) if i == 1 else mean(*pair) for i, pair in enumerate(zip(a, b, strict=True))]
    return getattr(type(a), "_make", tuple)(merged)
