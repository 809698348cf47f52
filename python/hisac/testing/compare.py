# SPDX-License-Identifier: Apache-2.0
"""Comparators: integers exactly, floats within the bounds derived for a problem."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..reference import bounds
from ..types import (
    Agents,
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
from .matchings import Matching
from .problems import Attention, Problem

_Gradients = RouteGradients | LeafGradients | AttendGradients | MatchGradients


def _assert(ok: Array, mine: Array, expected: Array, name: str, bound: Array | None = None) -> None:
    if not np.all(ok):
        bad = np.argwhere(~ok)
        at = tuple(map(int, bad[0]))
        within = "" if bound is None else f", allowed difference {bound[at]:.3g}"
        first = f"first at {list(at)}: expected {expected[at]}, got {mine[at]}{within}"
        raise AssertionError(f"{name}: {len(bad)} of {np.size(ok)} differ; {first}")


def assert_codes_equal(mine: Array, expected: Array, name: str = "codes") -> None:
    """Integers, equal in every cell; the first difference is named."""
    mine, expected = bounds.as_numpy(mine), bounds.as_numpy(expected)
    assert mine.dtype.kind in "iu", f"{name}: expected integers, got {mine.dtype}"
    assert mine.shape == expected.shape, f"{name}: expected shape {list(expected.shape)}, got {list(mine.shape)}"
    _assert(mine == expected, mine, expected, name)


def assert_agents_equal(mine: Agents, expected: Agents) -> None:
    """Codes, votes and counts equal in every cell, of the same codebook, and prototypes and lists, where both have kept
    them, to the bit."""
    for name, a, b in zip(("codes", "votes", "count"), mine[:3], expected[:3], strict=True):
        assert_codes_equal(a, b, name)
    assert int(mine.fingerprint) == int(expected.fingerprint), (
        f"fingerprint: expected {expected.fingerprint}, got {mine.fingerprint}"
    )
    for name in ("prototypes", "lists"):
        a, b = getattr(mine, name), getattr(expected, name)
        if a is None or b is None:
            continue
        a, b = bounds.as_numpy(a), bounds.as_numpy(b)
        assert a.shape == b.shape, f"{name}: expected shape {list(b.shape)}, got {list(a.shape)}"
        _assert(a == b, a, b, name)


def assert_close(mine: Array, expected: Array, bound: Array, name: str) -> None:
    """|mine - expected| <= bound in every cell; equal infinities are close; where the bound is NaN nothing is asked."""
    mine, expected, bound = (bounds.as_numpy(a).astype(np.float64) for a in (mine, expected, bound))
    assert mine.shape == expected.shape, f"{name}: expected shape {list(expected.shape)}, got {list(mine.shape)}"
    with np.errstate(invalid="ignore"):
        ok = (np.abs(mine - expected) <= bound) | (mine == expected) | np.isnan(bound)
    _assert(ok, mine, expected, name, bound)


def _assert_fields(mine: Any, expected: Any, bound: Any) -> None:
    for name, a, b, limit in zip(expected._fields, mine, expected, bound, strict=True):
        assert (a is None) == (b is None), f"{name}: expected {'nothing' if b is None else 'an array'}"
        if b is not None:
            assert_close(a, b, limit, name)


def assert_tokens_close(mine: Tokens, expected: Tokens, within: Problem | Tokens | None = None) -> None:
    """Tokens, lse and mean_x within the bound of a Problem (or one from `bounds.route_bound`). Without either, the
    bound is that of rows and prototypes of up to 4,096 columns, no longer than 1, |v| at most 1, at a temperature of
    0.1 or more."""
    if within is None:
        within = bounds.unit_bound(expected)
    _assert_fields(mine, expected, within.bound() if isinstance(within, Problem) else within)


def assert_leaf_sums_close(mine: Histories, expected: Histories, bound: Histories) -> None:
    """Offsets, codes and votes equal, sums within the bound from `bounds.leaf_sums_bound`."""
    for name in ("offsets", "codes", "weights"):
        assert_codes_equal(getattr(mine, name), getattr(expected, name), name)
    _assert_fields(mine, expected, bound)


def assert_attended_close(mine: Attended, expected: Attended, within: Attention | Attended) -> None:
    """Outputs and lse within the bound of an Attention (or one from `bounds.attend_bound`)."""
    _assert_fields(mine, expected, within.bound() if isinstance(within, Attention) else within)


def assert_match_close(mine: Match, expected: Match, within: Matching | Match) -> None:
    """v and lse within the bound of a Matching (or one from `bounds.match_bound`)."""
    _assert_fields(mine, expected, within.bound() if isinstance(within, Matching) else within)


def assert_gradients_close(
    mine: _Gradients, expected: _Gradients, args: Mapping[str, Any], *, cuda: bool = False
) -> None:
    """Gradients within the bound that follows from the arguments `args` of `route_backward`, `leaf_sums_backward`,
    `attend_backward` or `match_backward`; cuda: for those of a GPU."""
    limits: dict[type, Callable[..., Any]] = {
        RouteGradients: lambda: bounds.route_backward_bound(args, cuda=cuda),
        LeafGradients: lambda: bounds.leaf_sums_backward_bound(args),
        AttendGradients: lambda: bounds.attend_backward_bound(args, cuda=cuda),
        MatchGradients: lambda: bounds.match_backward_bound(args),
    }
    _assert_fields(mine, expected, limits[type(expected)]())
