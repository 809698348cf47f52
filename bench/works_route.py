# SPDX-License-Identifier: Apache-2.0
"""The works of `route`: both modes and their backward, by leaves, and on a real history."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np

import peers
import peers_agents
import peers_codes
import truth
from data import JOURNEY, NEAR, UNIT, history, household, lengths, offsets_of, structured, unit
from harness import Case, Variant
from hisac import Histories, Tokens
from truth import reference
from works_common import (
    BFLOAT16,
    FLOAT32,
    PEER_BFLOAT16,
    TAU,
    Array,
    as_bf16,
    as_torch,
    by_role,
    has_torch,
)  # fmt: skip


def route(
    work: str, ops: ModuleType, threads: int, *, users: int, rows: int, agents: int, width: int, value: int = 64,
    short: tuple[int, int] | None = None, normalize: str = "history",
) -> Iterator[Case]:  # fmt: skip
    """Either mode, tau 0.1. `rows` a user (the mean of a lognormal when users > 1), or uniform between `short`, whose
    agents are then as many as the user has distinct leaves."""
    rng = np.random.default_rng(0)
    n = (
        np.array([rows])
        if users == 1
        else lengths(rng, users, rows, short[0] if short else 50, short[1] if short else None)
    )
    offsets, count = offsets_of(n), None
    if short:
        leaves = [len(np.unique(history(rng, int(k), (512, 512)), axis=0)) for k in n]
        count = np.minimum(leaves, agents).astype(np.int32)
    x, p, v = unit(rng, offsets[-1], width), unit(rng, users, agents, width), None
    v = rng.standard_normal((offsets[-1], value), dtype=np.float32)
    pairs = float((n * (agents if count is None else count)).sum())
    size = f"{users} user{'s' * (users > 1)}, T {offsets[-1]}, M {agents}, D {width}, V {value}, {normalize} mode"
    same = {"history": peers.route, "agents": peers_agents.route}[normalize]

    def case(variant: str, dtype: str, a: tuple[Array, ...], bound: float, peer_bound: float, bf16: bool) -> Case:
        ax, av, at, ap, ac = a

        @cache
        def expected() -> Any:
            return truth.route(ax, av, offsets, p, TAU, count, normalize)

        def error(result: Array, i: int) -> float:
            return truth.relative(result, expected().tokens)

        def error_lse(result: Any, i: int) -> float:
            there = np.isfinite(expected().lse)
            lse = np.where(there, truth.dense(result.lse), 0.0)
            return max(error(result.tokens, i), truth.relative(lse, np.where(there, expected().lse, 0.0)))

        def call(i: int, precision: str) -> Any:
            h = Histories(ax, av, at)
            return ops.route(h, ap, count=ac, temperature=TAU, normalize=normalize, precision=precision)

        found = by_role(same(ax, av, at, ap, ac, TAU, bf16), error, peer_bound)
        mine = [Variant(variant, lambda: partial(call, precision="float32"), error_lse, bound, "hisac")]
        if bf16:
            rounded = Variant(
                f"{variant} products", lambda: partial(call, precision="bfloat16"), error_lse, peer_bound, "hisac"
            )
            mine.insert(0, rounded)
        flops, name = 2 * pairs * (width + value), truth.which(len(x), p)
        return Case(work, dtype, size, UNIT, int(offsets[-1]), flops, name, (*mine, *found))

    yield case("fp32", "float32", (x, v, offsets, p, count), FLOAT32, FLOAT32, False)
    if has_torch():
        at, ap, ac = as_torch(offsets, p, count)
        yield case("bf16", "bfloat16", (*as_bf16(x, v), at, ap, ac), BFLOAT16, PEER_BFLOAT16, True)


def real(
    work: str, ops: ModuleType, threads: int, *, budget: int, codes: tuple[int, int] = (64, 128), value: int = 64,
    fit_rows: int = 20_000, iterations: int = 10, tau: float = 0.02,
) -> Iterator[Case]:  # fmt: skip
    """The longest history of the sample by ids into two tables, agents mode; codebook and temperature are the demo's.
    Fit, codes and vote come first and are not timed."""
    h = household(fit_rows)
    rows, offsets = len(h.item), np.array([0, len(h.item)])
    values = np.random.default_rng(0).standard_normal((len(h.table), value), dtype=np.float32)
    book = ops.fit(h.fitted, codes, iterations=iterations, seed=0)
    found = ops.vote(book, Histories(codes=ops.encode(book, h.table[h.item]), offsets=offsets), budget=budget)
    p = found.prototypes[:, : int(found.count[0])]

    @cache
    def expected() -> Any:
        return truth.route64(h.table[h.item], values[h.item], offsets, p, tau, None, "agents")

    def error(result: Array, i: int) -> float:
        return truth.relative(result, expected().tokens)

    def call(i: int) -> Any:
        gathered = Histories(h.table, values, offsets, x_ids=h.item, v_ids=h.item)
        return ops.route(gathered, p, temperature=tau, normalize="agents")

    mine = Variant("fp32", lambda: call, lambda r, i: error(r.tokens, i), FLOAT32, "hisac")
    same = by_role(peers_agents.gathered(h.table, h.item, values, h.item, p, tau), error, FLOAT32)
    width = h.table.shape[1]
    size = f"1 user, T {rows} of {len(h.table)} items, M {p.shape[1]}, D {width}, V {value}, agents mode"
    flops = 2.0 * rows * p.shape[1] * (width + value)
    yield Case(work, "float32", size, JOURNEY, rows, flops, truth.EXPANDED, (mine, *same))


def backward(
    work: str, ops: ModuleType, threads: int, *, rows: int, agents: int, width: int, value: int = 64,
    normalize: str = "history",
) -> Iterator[Case]:  # fmt: skip
    """Gradients of v and temperature, x and prototypes frozen, d_lse None; the forward is not timed. The temperature's
    gradient is a sum that cancels, so its error is taken relative to the sum of its terms' sizes."""
    rng = np.random.default_rng(0)
    x, p, v = unit(rng, rows, width), unit(rng, 1, agents, width), rng.standard_normal((rows, value), dtype=np.float32)
    d_tokens = rng.standard_normal((1, agents, value), dtype=np.float32)
    offsets = np.array([0, rows])
    batch = Histories(x, v, offsets)
    forward = ops.route(batch, p, temperature=TAU, normalize=normalize)
    name = truth.which(rows, p)

    @cache
    def expected() -> tuple[Any, float]:
        exact = truth.route(x, v, offsets, p, TAU, None, normalize)
        gradients, terms = truth.backward64(d_tokens, exact, x, v, p, TAU, normalize)
        if name == truth.REFERENCE:
            options = {"temperature": TAU, "normalize": normalize, "need": ("v", "temperature")}
            gradients = reference.route_backward(batch, p, exact, Tokens(d_tokens, None), **options)
        return gradients, terms

    def error(result: Any, i: int) -> float:
        gradients, terms = expected()
        v, temperature = (result.v, result.temperature) if hasattr(result, "temperature") else result[:2]
        slope = abs(float(truth.dense(temperature)[0]) - float(gradients.temperature[0])) / terms
        return max(truth.relative(v, gradients.v), slope)

    def call(i: int) -> Any:
        options = {"temperature": TAU, "normalize": normalize, "need": ("v", "temperature")}
        return ops.route_backward(Histories(x, v, offsets), p, forward, Tokens(d_tokens, None), **options)

    tokens, lse = (np.asarray(a, np.float32) for a in forward[:2])
    same = {"history": peers.backward, "agents": peers_agents.backward}[normalize]
    found = by_role(same(x, v, p, TAU, d_tokens, tokens, lse), error, FLOAT32)
    kept = 4.0 * rows * agents * value  # autograd has kept the weights
    found = [replace(f, flops=kept) if f.name.endswith("autograd") and f.name != "SDPA autograd" else f for f in found]
    mine = Variant("fp32", lambda: call, error, FLOAT32, "hisac")
    size = f"1 user, T {rows}, M {agents}, D {width}, V {value}, {normalize} mode"
    yield Case(work, "float32", size, UNIT, rows, 2.0 * rows * agents * (width + 2 * value), name, (mine, *found))


def leaf(
    work: str, ops: ModuleType, threads: int, *, rows: int, agents: int, width: int, sizes: tuple[int, int],
    value: int = 64,
) -> Iterator[Case]:  # fmt: skip
    """Three cases: `route` over leaf sums from the rows, with peers of the same approximation and of the exact form it
    stands in for; the sums alone; and `route` from kept sums, with peers from kept means."""
    rng = np.random.default_rng(0)
    centers, codes, x = structured(rng, rows, sizes, width)
    v = rng.standard_normal((rows, value), dtype=np.float32)
    book, offsets = ops.Codebook(centers), np.array([0, rows])
    number = peers_codes.numpy_leaves(codes, sizes)
    found, n = np.unique(number, return_counts=True)
    top = found[np.argsort(-n, kind="stable")[:agents]]
    p = (centers[0][top // sizes[1]] + centers[1][top % sizes[1]])[None].astype(np.float32)
    adding, routing = 2.0 * rows * (width + value), 2.0 * len(found) * p.shape[1] * (width + value)

    @cache
    def expected() -> Any:
        return truth.leaf64(x, v, number, p[0], TAU)

    @cache
    def exact() -> Any:
        return truth.route64(x, v, offsets, p, TAU, None)

    def error(result: Array, i: int) -> float:
        return truth.relative(result, expected().tokens)

    def call(i: int) -> Any:
        return ops.route(ops.leaf_sums(book, Histories(x, v, offsets, codes)), p, temperature=TAU, normalize="history")

    mine = Variant(
        "leaf", lambda: call, lambda r, i: error(r.tokens, i), FLOAT32, "hisac",
        extra=lambda: {"error_to_exact": truth.relative(expected().tokens, exact().tokens)},
    )  # fmt: skip
    sums = ops.leaf_sums(book, Histories(x, v, offsets, codes))
    mean = np.add.reduceat(x[np.argsort(number, kind="stable")].astype(np.float64), np.cumsum(n) - n) / n[:, None]

    def add(i: int) -> Any:
        return ops.leaf_sums(book, Histories(x, v, offsets, codes))

    def kept(i: int) -> Any:
        return ops.route(sums, p, temperature=TAU, normalize="history")

    alone = Variant("sums", lambda: add, lambda r, i: truth.relative(r.x, mean), FLOAT32, "hisac")
    from_kept = Variant("kept", lambda: kept, lambda r, i: error(r.tokens, i), FLOAT32, "hisac")
    same = by_role(peers.leaf(x, v, codes, sizes, p, TAU), error, FLOAT32)
    same_kept = by_role(peers.kept_leaf(x, v, codes, sizes, p, TAU), error, FLOAT32)
    stood_for = by_role(
        peers.route(x, v, offsets, p, None, TAU, False),
        lambda r, i: truth.relative(r, exact().tokens),
        FLOAT32,
        2.0 * rows * p.shape[1] * (width + value),
    )
    size = f"1 user, T {rows} in {len(found)} leaves, M {p.shape[1]}, D {width}, V {value}"
    for part, flops, variants in (
        (work, adding + routing, (mine, *same, *stood_for)),
        (f"{work}/sums", adding, (alone,)),
        (f"{work}/kept", routing, (from_kept, *same_kept)),
    ):
        yield Case(part, "float32", size, NEAR, rows, flops, truth.EXPANDED, variants)
