# SPDX-License-Identifier: Apache-2.0
"""The problems of vectors.bin about candidates: attend, match, and their gradients."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from vectors import Case, Codes, Floats, Stored, Uniform, number, offsets_of

from hisac import reference
from hisac.reference import bounds
from hisac.types import Attended, Histories, Match, MatchGradients

NAN, INF = float("nan"), float("inf")


# --------------------------------------------------------------------------------------------------------------- attend


def attend_case(name: str, pairs: tuple[int, ...], agents: int, heads: int, key: int, wide: int, stride: int) -> Case:
    users, n = len(pairs) - 1, pairs[-1]
    absent = {i: -INF for i in range(agents, 2 * agents - 1)} | {3: NAN}
    bias = Uniform(503, (users, agents), {i: a for i, a in absent.items() if i < users * agents})
    records: dict[str, Any] = {
        "q": Uniform(500, (n, heads, key), scale=3.0),
        "keys": Uniform(501, (users, agents, heads, key), scale=3.0),
        "values": Uniform(502, (users, agents, heads, wide)),
        "bias": bias,
        "scale": number(0.4, kind=np.float32),
        **offsets_of(*pairs),
    }
    args = {of: records[of].array() for of in ("q", "keys", "values", "bias")}
    args |= {"candidate_offsets": np.array(pairs), "scale": float(np.float32(0.4))}
    found = reference.attend(**args)
    limit = bounds.attend_bound(args)
    expected = {f: Floats(getattr(found, f), getattr(limit, f), stride=stride) for f in Attended._fields}
    given = {
        "given out": Stored(found.out.astype(np.float32)[: 0 if stride > 1 else None]),
        "given lse": Stored(found.lse.astype(np.float32)[: 0 if stride > 1 else None]),
        "d_out": Uniform(504, found.out.shape),
        "d_lse": Uniform(505, found.lse.shape),
    }
    if stride > 1:  # forward alone
        return f"attend/{name}", records | expected
    forward = Attended(given["given out"].array(), given["given lse"].array())
    args |= {"d_out": given["d_out"].array(), "d_lse": given["d_lse"].array(), "forward": forward}
    back, limits = reference.attend_backward(**args), bounds.attend_backward_bound(args)
    grads = {f"grad {f}": Floats(getattr(back, f), getattr(limits, f)) for f in back._fields}
    return f"attend/{name}", records | expected | given | grads


def attend_cases() -> Iterator[Case]:
    yield attend_case("long", (0, 650, 700), 21, 2, 7, 9, 17)
    yield attend_case("two heads", (0, 8, 8, 13), 5, 2, 3, 4, 1)
    yield attend_case("tails", (0, 11), 19, 1, 17, 21, 1)


# ---------------------------------------------------------------------------------------------------------------- match


def match_case(name: str, sizes: tuple[int, ...], offsets: tuple[int, ...], ends: tuple[int, ...], wide: int) -> Case:
    """The k-th of a user's n sums is of leaf k (leaves / n). Some sums are absent."""
    n, rows, levels, leaves = ends[-1], offsets[-1], len(sizes), int(np.prod(sizes))
    parts = [np.arange(k) * (leaves // max(k, 1)) for k in np.diff(offsets)]
    codes = np.stack(np.unravel_index(np.concatenate(parts), sizes), 1).astype(np.int32)
    records: dict[str, Any] = {
        "book": number(519, 1, *sizes),
        "v": Uniform(520, (rows, wide)),
        "bias": Uniform(521, (rows,), {1: -INF, rows // 2: NAN, rows // 3: INF}, 5.0),
        "asked": Codes(522, (n, levels), {3: -1, 4 * levels: 1 << 30}, sizes, ("skewed",) * levels),
        "d_v": Uniform(523, (n, levels, wide)),
        "d_lse": Uniform(524, (n, levels)),
        "candidate_offsets": Stored(np.array(ends)),
        **offsets_of(*offsets),
    }
    v, bias, asked, d_v, d_lse = (records[of].array() for of in ("v", "bias", "asked", "d_v", "d_lse"))
    sums = Histories(None, v, np.array(offsets), codes, bias=bias)
    book = reference.Codebook([np.zeros((size, 1)) for size in sizes])
    args = {"book": book, "sums": sums, "codes": asked, "candidate_offsets": np.array(ends)}
    back = args | {"gradients": Match(d_v, d_lse)}
    found, limit = reference.match(**args), bounds.match_bound(args)
    grads, limits = reference.match_backward(**back), bounds.match_backward_bound(back)
    expected = {f"out {f}": Floats(getattr(found, f), getattr(limit, f)) for f in Match._fields}
    stride = max(1, rows // 60)
    expected |= {
        f"grad {f}": Floats(getattr(grads, f), getattr(limits, f), stride=stride) for f in MatchGradients._fields
    }
    return f"match/{name}", records | expected


def match_cases() -> Iterator[Case]:
    yield match_case("two levels", (7, 6), (0, 30, 30, 41), (0, 20, 23, 40), 5)
    yield match_case("deep", (2,) * 8, (0, 200), (0, 14), 5)
    yield match_case("long", (2, 3000), (0, 5000), (0, 12), 3)
