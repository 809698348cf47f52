# SPDX-License-Identifier: Apache-2.0
"""The work of `match`, and its peers: compositions of a search for each candidate and a sum for each node."""

from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

import peers
import truth
from data import CLUSTERED, history
from harness import Case, Variant
from hisac import Histories, Match
from truth import reference
from works_common import FLOAT32, Array, as_torch, by_role


def numbers(codes: Array, size: int) -> list[Array]:
    """The number of each row's node on every level of two."""
    first = codes[:, 0].astype(np.int64)
    return [first, first * size + codes[:, 1]]


def in_numpy(v: Array, bias: Array, of_sums: list[Array], of_candidates: list[Array]) -> peers.Call:
    """Sums by reduceat over the sorted rows of every node, then a search for each candidate."""

    def call(i: int) -> Any:
        out = np.empty((len(of_candidates[0]), len(of_sums), v.shape[1]), np.float32)
        lse = np.empty(out.shape[:2], np.float32)
        for level, (rows, asked) in enumerate(zip(of_sums, of_candidates, strict=True)):
            starts = np.flatnonzero(np.r_[True, rows[1:] != rows[:-1]])
            top = np.maximum.reduceat(bias, starts)
            w = np.exp(bias - np.repeat(top, np.diff(np.r_[starts, len(rows)])))
            total = np.add.reduceat(w, starts)
            mean = np.add.reduceat(w[:, None] * v, starts) / total[:, None]
            nodes = rows[starts]
            at = np.minimum(np.searchsorted(nodes, asked), len(nodes) - 1)
            some = nodes[at] == asked
            out[:, level] = np.where(some[:, None], mean[at], 0)
            lse[:, level] = np.where(some, (top + np.log(total))[at], -np.inf)
        return out, lse

    return call


def in_torch(v: Array, bias: Array, of_sums: list[Array], of_candidates: list[Array], backward: Any = None) -> Any:
    """The same by index_add; backward: gradients of v and lse, whose forward is not timed."""
    torch = peers.package("torch")
    tv, tb = (torch.tensor(a, requires_grad=backward is not None) for a in (v, bias))
    rows, asked = as_torch(*of_sums), as_torch(*of_candidates)

    def forward() -> Any:
        means, masses = [], []
        for own, candidates in zip(rows, asked, strict=True):
            nodes, node = torch.unique_consecutive(own, return_inverse=True)
            top = torch.full((len(nodes),), -torch.inf).scatter_reduce(0, node, tb.detach(), "amax")
            w = (tb - top[node]).exp()
            total = torch.zeros(len(nodes)).index_add(0, node, w)
            mean = torch.zeros(len(nodes), tv.shape[1]).index_add(0, node, w[:, None] * tv) / total[:, None]
            at = torch.searchsorted(nodes, candidates).clamp(max=len(nodes) - 1)
            some = nodes[at] == candidates
            means.append(torch.where(some[:, None], mean[at], 0.0))
            masses.append(torch.where(some, (top + total.log())[at], -torch.inf))
        return torch.stack(means, 1), torch.stack(masses, 1)

    if backward is None:
        return lambda i: forward()
    with torch.enable_grad():
        found = forward()
    given = as_torch(*backward)
    return lambda i: torch.autograd.grad(found, (tv, tb), given, retain_graph=True)


def match(
    work: str, ops: ModuleType, threads: int, *, leaves: int, candidates: int, sizes: tuple[int, int], value: int = 64
) -> Iterator[Case]:
    """One user's candidates, most of them of leaves that the user has; then the backward."""
    rng = np.random.default_rng(0)
    codes = np.unique(history(rng, 40 * leaves, sizes), axis=0)
    codes = codes[np.sort(rng.choice(len(codes), min(leaves, len(codes)), replace=False))]
    v = rng.standard_normal((len(codes), value), dtype=np.float32)
    bias = rng.standard_normal(len(codes), dtype=np.float32)
    sums, at = Histories(None, v, np.array([0, len(codes)]), codes, bias=bias), np.array([0, candidates])
    asked = codes[rng.integers(0, len(codes), candidates)]
    other = rng.random(candidates) < 0.3
    asked[other] = history(rng, int(other.sum()), sizes)
    keys = numbers(codes, sizes[1]), numbers(asked, sizes[1])
    book = ops.Codebook([np.zeros((n, 8), np.float32) for n in sizes])
    plain = reference.Codebook([np.zeros((n, 8), np.float32) for n in sizes])
    given = Match(*(rng.standard_normal(s, dtype=np.float32) for s in ((candidates, 2, value), (candidates, 2))))

    @cache
    def expected() -> Any:
        return reference.match(plain, sums, asked, at)

    @cache
    def expected_back() -> Any:
        return reference.match_backward(plain, sums, given, asked, at)

    def error(result: Any, i: int) -> float:
        lse, exact = truth.dense(result[1]), expected().lse
        if not np.array_equal(np.isinf(lse), np.isinf(exact)):
            return float("inf")
        some = np.isfinite(exact)
        return max(truth.relative(result[0], expected().v), truth.relative(lse[some], exact[some]))

    def back_error(result: Any, i: int) -> float:
        return max(truth.relative(a, b) for a, b in zip(result, expected_back(), strict=True))

    def call(i: int) -> Any:
        return ops.match(book, sums, asked, at)

    def call_back(i: int) -> Any:
        return ops.match_backward(book, sums, given, asked, at)

    need = ("torch",)
    size = f"{candidates} candidates, {len(codes)} leaves, {sizes[0]} x {sizes[1]} codes, V {value}"
    flops = 2.0 * 2 * len(codes) * value
    mine = Variant("fp32", lambda: call, error, FLOAT32, "hisac")
    found: list[peers.Peer] = [
        ("NumPy reduceat", "peer", (), lambda: in_numpy(v, bias, *keys)),
        ("torch index_add", "peer", need, lambda: in_torch(v, bias, *keys)),
    ]
    variants = mine, *by_role(found, error, FLOAT32)
    yield Case(work, "float32", size, CLUSTERED, candidates, flops, truth.REFERENCE, variants)
    mine = Variant("backward", lambda: call_back, back_error, FLOAT32, "hisac")
    found = [("torch autograd", "peer", need, lambda: in_torch(v, bias, *keys, given))]
    variants = mine, *by_role(found, back_error, FLOAT32)
    yield Case(work, "float32", size, CLUSTERED, candidates, 2 * flops, truth.REFERENCE, variants)
