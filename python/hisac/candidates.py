# SPDX-License-Identifier: Apache-2.0
"""The verbs of candidates: `attend` to their user's tokens, `match` with its leaf sums, and `merge` of what they give.

Arrays, places and letters are those of `hisac.verbs`.
"""

import math
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np

from . import compose
from .arrays import (
    FLOAT32,
    behaviours_of,
    check,
    core,
    dtype_name,
    empty,
    give,
    is_torch,
    most_tokens,
    pair_of,
    take,
    take_histories,
    wanted_of,
    whole,
)
from .codebook import Codebook
from .types import Array, Attended, AttendGradients, Histories, Match, MatchGradients, Recent
from .verbs import VERBS

_NO_ATTENDED, _NO_MATCH = Attended(None, None), Match(None, None)
_SUMS = "-, sums.v S V, offsets B+1, sums.codes S L, -, -, -, sums.bias?, -, -"
_CANDIDATES = "codes N L, ids? N, candidate_offsets"
_Pair = TypeVar("_Pair", bound=tuple[Any, ...])


def attend(
    q: Array, keys: Array, values: Array, candidate_offsets: Array, *, bias: Array = None, scale: float | None = None,
    token_offsets: Array = None, longest: int | None = None, out: Attended | None = None,
) -> Attended:  # fmt: skip
    """Target attention of candidates on their user's tokens (paper, target attention).

        z_m = scale q . k_m + bias_m        out = softmax(z) values        lse = log sum_m exp z_m

    A token is absent where its bias or key holds a NaN or an infinity; for a q that holds one every token is. Without
    tokens: zero and -inf.

    Args:
        q: [N, H, d], of one type with keys and values: float32, bfloat16 or float16
        keys: [B, M, H, d]; with token_offsets [R, H, d]
        values: [B, M, H, V]; with token_offsets [R, H, V]
        candidate_offsets: [B + 1] int32 or int64: user b has the candidates candidate_offsets[b] .. [b + 1]
        bias: [B, M] float32, such as the log_share of tokens; with token_offsets [R]
        scale: None: 1 / sqrt(d)
        token_offsets: [B + 1] int32 or int64: user b has the tokens token_offsets[b] .. [b + 1], such as recent
            behaviours. None: M each
        longest: the most tokens of a user, where that is known, beside token_offsets; None, or 0, where it is not
        out: Attended to write into

    Returns Attended; its lse tells how well the best tokens match, which softmax attention alone hides. Raises
    ValueError, TypeError.
    """
    arrays, options = _attend_inputs("attend", q, keys, values, candidate_offsets, bias, token_offsets, longest, scale)
    q, values = arrays[0], arrays[2]
    given = _NO_ATTENDED if out is None else check(out, Attended, "attend: out")
    result = Attended(
        give("attend", "out", given.out, q, (q.shape[0], q.shape[1], values.shape[-1])),
        give("attend", "out lse", given.lse, q, (q.shape[0], q.shape[1]), FLOAT32),
    )
    core.attend(*arrays, *options, *result)
    return result


def attend_backward(
    d_out: Array, d_lse: Array, forward: Attended, q: Array, keys: Array, values: Array, candidate_offsets: Array, *,
    bias: Array = None, scale: float | None = None, token_offsets: Array = None, longest: int | None = None,
) -> AttendGradients:  # fmt: skip
    """Gradients of `attend`.

    Args:
        d_out, d_lse: the gradients of what it returned; d_lse may be None
        forward: what it returned
        q, keys, values, candidate_offsets, bias, scale, token_offsets, longest: those of the call

    Returns AttendGradients, float32. Raises ValueError, TypeError.
    """
    verb = "attend_backward"
    arrays, options = _attend_inputs(verb, q, keys, values, candidate_offsets, bias, token_offsets, longest, scale)
    check(forward, Attended, f"{verb}: forward")
    back = take(verb, "d_out, d_lse?, out, lse", d_out, d_lse, forward.out, forward.lse)
    gradients = AttendGradients(
        *(None if arrays[i] is None else empty(back[0], tuple(arrays[i].shape), FLOAT32) for i in (0, 1, 2, 4))
    )
    core.attend_backward(*back, *arrays, *options, *gradients)
    return gradients


def _attend_inputs(
    verb: str, q: Array, keys: Array, values: Array, candidate_offsets: Array, bias: Array, token_offsets: Array,
    longest: int | None, scale: float | None,
) -> tuple[tuple[Any, ...], tuple[int, float]]:  # fmt: skip
    """The arrays in the order of the core, and its (longest, scale)."""
    shape = "B M" if token_offsets is None else "R"
    arrays = take(
        verb, f"q N H d, keys {shape} H d, values {shape} H V, candidate_offsets, bias?, token_offsets?",
        q, keys, values, candidate_offsets, bias, token_offsets,
    )  # fmt: skip
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{verb}: scale expected finite, got {scale}")
    width = arrays[0].shape[2] or 1
    return arrays, (most_tokens(verb, token_offsets, longest), 1 / math.sqrt(width) if scale is None else float(scale))


def match(
    book: Codebook, sums: Histories, codes: Array, candidate_offsets: Array, *, ids: Array = None,
    out: Match | None = None,
) -> Match:  # fmt: skip
    """What the history says of each candidate (tree match). On level l, of the user's leaf sums s below the candidate's
    first l codes,

        lse = log sum_s exp(bias_s)        v = sum_s exp(bias_s) v_s / sum_s exp(bias_s)        none: v = 0, lse = -inf

    A sum is absent with an invalid code or a bias that is NaN or infinite, as that of a leaf which only votes. Votes do
    not enter; a time decay belongs into the biases of behaviours.

    Args:
        book: the codebook of the codes
        sums: what `leaf_sums` returns, of B users. Read are v [S, V] float32, bfloat16 or float16, offsets, codes
            [S, L] and bias [S], which may be None: 0. A user's rows are sorted by code, each leaf once; of others the
            results are not specified, but finite where v is
        codes: [N, L] int32, the candidates' semantic IDs; or those of a table [items, L] with ids. A candidate with an
            invalid code has no sums on any level
        candidate_offsets: [B + 1] int32 or int64: user b has the candidates candidate_offsets[b] .. [b + 1]
        ids: [N] int32 or int64: candidate n has the codes of row ids[n]. One whose id is outside has no sums
        out: Match to write into

    Returns Match. Raises ValueError, TypeError.
    """
    tree, sums, codes, ids, offsets = _match_inputs("match", book, sums, codes, ids, candidate_offsets)
    shape = (codes if ids is None else ids).shape[0], codes.shape[1]
    given = _NO_MATCH if out is None else check(out, Match, "match: out")
    result = Match(
        give("match", "out v", given.v, sums.v, (*shape, sums.v.shape[1])),
        give("match", "out lse", given.lse, sums.v, shape, FLOAT32),
    )
    core.match(tree, sums, codes, ids, offsets, *result)
    return result


def match_backward(
    book: Codebook, sums: Histories, gradients: Match, codes: Array, candidate_offsets: Array, *, ids: Array = None,
    need: Iterable[str] = ("v", "bias"),
) -> MatchGradients:  # fmt: skip
    """Gradients of `match` for its sums. With the share s_i = exp(bias_i - lse) of a sum, added up over candidates in
    the order of their index, and over levels,

        dv_i = s_i dv        dbias_i = s_i (dlse + dv . (v_i - v))

    Args:
        book, sums, codes, candidate_offsets, ids: those of the call of `match`
        gradients: those of what it returned; each of its fields may be None
        need: the gradients wanted, of "v" and "bias"

    Returns MatchGradients, float32, None where not wanted. Raises ValueError, TypeError.
    """
    verb, wanted = "match_backward", wanted_of("match_backward", need, MatchGradients)
    tree, sums, codes, ids, offsets = _match_inputs(verb, book, sums, codes, ids, candidate_offsets)
    d_v, d_lse = take(verb, "d_v?, d_lse?", *check(gradients, Match, f"{verb}: gradients"))
    shapes = {"v": tuple(sums.v.shape), "bias": tuple(sums.v.shape[:1])}
    out = MatchGradients(*(empty(sums.v, shapes[f], FLOAT32) if f in wanted else None for f in MatchGradients._fields))
    core.match_backward(tree, sums, d_v, d_lse, codes, ids, offsets, *out)
    return out


def _match_inputs(
    verb: str, book: Codebook, sums: Histories, codes: Array, ids: Array, candidate_offsets: Array
) -> tuple[Any, ...]:
    tree = check(book, Codebook, f"{verb}: book")._core
    return tree, take_histories(verb, _SUMS, sums), *take(verb, _CANDIDATES, codes, ids, candidate_offsets)


def recent(histories: Histories, n: int) -> Recent:
    """Each user's n most recent behaviours apart from the older ones, for candidates that attend to the tokens of the
    older and, raw, to the recent (joined tokens). The shares of both are of one whole:

        share of behaviour i = exp(bias_i) / sum of exp(bias) over the user's behaviours

    Attention to both in one softmax is that to

        np.concatenate((made.tokens, v[found.v_ids]), 1)       under the bias
        np.concatenate((made.log_share + found.older_share[:, None], found.log_share), 1)

    where `made` is what `compress` made of found.older, and v the table of values.

    Behaviours with an id of no row, such as -1, or a bias that is NaN or infinite are padding: they are not recent, and
    have no share. One that `route` takes for absent for another reason, a NaN in x or an invalid code, has one.

    Args:
        histories: in the order of time, the latest last. Read are offsets, x_ids, v_ids and bias
        n: how many; of fewer all are recent. More than T are taken as T

    Returns Recent. Raises ValueError, TypeError.

    >>> found = recent(Histories(v=np.zeros((6, 1)), offsets=np.array([0, 5, 6])), 2)
    >>> found.rows.tolist(), [int(a) for a in found.older.offsets[1]]
    ([[3, 4], [5, 0]], [3, 5])
    >>> [round(float(np.exp(a)), 3) for a in (*found.log_share[0], found.older_share[0])]
    [0.2, 0.2, 0.6]
    """
    n = whole("recent", "n", n, 0)
    h, numbers, spans = _time_order("recent", "bias? T", histories)
    if h.bias is not None and dtype_name(h.bias) != "float32":
        raise TypeError(f"recent: bias expected float32 [T], got {dtype_name(h.bias)} {list(h.bias.shape)}")
    t = behaviours_of(h)
    return compose.recent(VERBS._replace(numbers=numbers), h, spans, t, min(n, t))


def _time_order(verb: str, bias: str, histories: Histories) -> tuple[Histories, Any, tuple[Any, Any]]:
    """Histories that are taken, what has their functions, numpy or torch, and their (starts, ends)."""
    h = take_histories(verb, f"-, -, offsets B+1, -, x_ids?, v_ids?, -, {bias}, -, -", histories)
    numbers = sys.modules["torch"] if is_torch(h.offsets[0]) else np
    spans = pair_of(verb, h.offsets) or (h.offsets[:-1], h.offsets[1:])
    return h, numbers, compose.checked_spans(numbers, verb, "offsets", spans, behaviours_of(h))


def repeat_count(histories: Histories, ids: Array, candidate_offsets: Array) -> Array:
    """How often each candidate's item is in its user's history. On its own it ranks what a user takes again; of new
    items it says nothing.

        count_n = number of behaviours of n's user whose id is ids_n

    Args:
        histories: read are v_ids [T], or without them x_ids, and offsets
        ids: [N] int32 or int64: candidates' ids, those of the histories; a negative one is of no item
        candidate_offsets: [B + 1] int32 or int64: user b has the candidates candidate_offsets[b] .. [b + 1]

    Returns [N] int64; 0 for a candidate in no user's range. Raises ValueError, TypeError.

    >>> h = Histories(v_ids=np.array([4, 4, 7, 4]), offsets=np.array([0, 3, 4]))
    >>> repeat_count(h, np.array([4, 9, 4]), np.array([0, 2, 3]))
    array([2, 0, 1])
    """
    h, numbers, spans = _time_order("repeat_count", "-", histories)
    own = h.x_ids if h.v_ids is None else h.v_ids
    ids, offsets = take("repeat_count", "ids N, candidate_offsets", ids, candidate_offsets)
    return compose.repeat_count(numbers, spans, *compose.counted(numbers, len(spans[0]), own, ids, offsets))


def merge(a: _Pair, b: _Pair) -> _Pair:
    """Two pairs (out, lse), of disjoint parts of one softmax or one sum -> that of both. With m = max(lse_a, lse_b),

        lse = m + log(exp(lse_a - m) + exp(lse_b - m))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

    Where one lse is -inf, the result is the other pair, bit for bit; where both are, 0 and -inf; an lse of NaN or inf
    gives NaN. Associative up to rounding. Not of what the modules TreeMatch and TargetAttention return: their lse is
    log(1 + mass), or 0 where there is nothing. Merge results of `match` or `attend`; TargetAttention joins several
    sets of tokens itself.

    Args:
        a, b: of one type: Attended, Match, Tokens, whose mean_x is merged as its tokens are, or tuples. lse has any
            shape, out that of lse and a width. Tensors may have gradients, which then reach the result

    Returns the same type as a, out of the type of a's. Raises ValueError for a wrong shape.
    """
    merged: _Pair = compose.merge(sys.modules["torch"] if is_torch(a[1]) else np, a, b)
    return merged
