# SPDX-License-Identifier: Apache-2.0
"""The works of training: a batch of histories that lie somewhere in one log of events, by ids into tables.

hisac is told where each history starts and ends. The other variants copy the ids of the batch out of the log first:
what the gradients cost must come from the behaviours in use, not from the log.
"""

from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

import peers
import truth
from data import UNIT, lengths, offsets_of, unit
from harness import Case, Variant
from hisac import Histories
from works_common import FLOAT32, TAU, Array, as_torch, has_torch


def gradients64(x: Array, v: Array, ids: list[Array], p: Array, d_tokens: Array) -> tuple[Array, Array]:
    """Of the tables x and v, in float64 and agents mode: ids, p and d_tokens of each user."""
    dx, dv = np.zeros(x.shape), np.zeros(v.shape)
    for at, near, d in zip(ids, p.astype(np.float64), d_tokens.astype(np.float64), strict=True):
        rows, values = x[at].astype(np.float64), v[at].astype(np.float64)
        w, lse, _ = truth.weights(rows, near, TAU, 0.0, 0.0, "agents")
        dz = w * (d @ values.T - ((w @ values) * d).sum(1)[:, None])
        dz -= w * np.exp(lse)[:, None] * dz.sum(0)
        np.add.at(dv, at, w.T @ d)
        np.add.at(dx, at, 2 / TAU * (dz.T @ near - rows * dz.sum(0)[:, None]))
    return dx, dv


def train(
    work: str, ops: ModuleType, threads: int, *, events: int, items: int, users: int, rows: int, agents: int,
    width: int = 64, value: int = 64,
) -> Iterator[Case]:  # fmt: skip
    """Three cases: `hisac.torch.route` forward and backward, with gradients of a table v, dense and sparse, and with
    those of both tables."""
    if not has_torch():
        return
    torch, hisac_torch = peers.package("torch"), peers.package("hisac.torch")
    rng = np.random.default_rng(0)
    n = lengths(rng, users, rows, rows // 2, 3 * rows // 2)
    starts, offsets = rng.integers(0, events - n), offsets_of(n)
    log = rng.integers(0, items, events)
    ids = [log[s : s + k] for s, k in zip(starts, n, strict=True)]
    x, v, p = (
        unit(rng, items, width),
        rng.standard_normal((items, value), dtype=np.float32),
        unit(rng, users, agents, width),
    )
    d_tokens = rng.standard_normal((users, agents, value), dtype=np.float32)
    tx, tv, tp, td, in_log, start, end, at = as_torch(x, v, p, d_tokens, log, starts, starts + n, offsets)

    @cache
    def expected() -> tuple[Array, Array]:
        return gradients64(x, v, ids, p, d_tokens)

    def error(found: Any, i: int) -> float:
        wanted = expected()[-len(found) :]
        return max(truth.relative(truth.dense(d.to_dense()), e) for d, e in zip(found, wanted, strict=True))

    def variant(name: str, role: str, both: bool, sparse: bool) -> Variant:
        def make() -> Callable[[int], Any]:
            table, values = tx.clone().requires_grad_(both), tv.clone().requires_grad_()
            wanted = (table, values) if both else (values,)

            def call(i: int) -> Any:
                where, behaviours = (start, end), in_log
                if role == "peer":
                    behaviours = torch.cat([in_log[s : s + k] for s, k in zip(starts, n, strict=True)])
                    where = at
                h = Histories(table, values, where, x_ids=behaviours, v_ids=behaviours)
                with torch.enable_grad():
                    tokens = hisac_torch.route(h, tp, temperature=TAU, sparse_grad=sparse).tokens
                return torch.autograd.grad(tokens, wanted, td)

            return call

        return Variant(name, make, error, FLOAT32, role)

    batch = f"{users} users, {offsets[-1]} behaviours of {events} events, {items} items"
    size = f"{batch}, M {agents}, D {width}, V {value}, agents mode"
    pairs = float(offsets[-1] * agents)
    for name, both, sparse in (("dense", False, False), ("sparse", False, True), ("both", True, False)):
        flops = 2 * pairs * (2 * (width + value) + value + width * both)
        variants = variant(name, "hisac", both, sparse), variant("ids copied out", "peer", both, sparse)
        yield Case(f"{work}/{name}", "float32", size, UNIT, int(offsets[-1]), flops, truth.EXPANDED, variants)
