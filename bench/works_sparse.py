# SPDX-License-Identifier: Apache-2.0
"""The works of sparse routing: a history of many interests under a fitted codebook, each behaviour routed to all agents
or to few. Peers route to all: no other library routes to few."""

from collections.abc import Iterator
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np

import peers_agents
import truth
from data import INTERESTS, interests
from harness import Case, Variant
from hisac import Histories, Tokens
from truth import reference
from works_common import FLOAT32, Array, by_role

SHARP = 0.02  # a temperature that models learn on unit vectors


def sparse(
    work: str, ops: ModuleType, threads: int, *, rows: int, budget: int, few: tuple[int, ...], width: int = 128,
    value: int = 64, items: int = 30_000, sizes: tuple[int, int] = (512, 512), iterations: int = 5,
) -> Iterator[Case]:  # fmt: skip
    """Three cases, in agents mode: `route`; its backward, of v and temperature; and `compress` from codes. The fit is
    not timed. Lists are made in the call, but for the variants that keep them."""
    table, at = interests(np.random.default_rng(0), items, rows, width)
    v = np.random.default_rng(1).standard_normal((rows, value), dtype=np.float32)
    book = ops.fit(table, sizes, iterations=iterations, seed=0)
    x, offsets = table[at], np.array([0, rows])
    h = Histories(x, v, offsets, ops.encode(book, x))
    agents = ops.vote(book, h, budget=budget)
    m = int(agents.count[0])
    agents = agents._replace(**{name: getattr(agents, name)[:, :m] for name in ("codes", "votes", "prototypes")})
    plain, options = reference.Codebook(book.centers), {"temperature": SHARP, "book": book}
    d_tokens = np.random.default_rng(2).standard_normal((1, m, value), dtype=np.float32)
    groups = len(np.unique(h.codes[:, 0]))
    size = f"1 user, T {rows} of {groups} codes, M {m}, D {width}, V {value}, agents mode"

    @cache
    def expected(k: int | None) -> Any:
        return reference.route(h, agents, **options | {"book": plain}, sparse=k)

    @cache
    def gradients(k: int | None) -> Any:
        given = {**options, "book": plain, "sparse": k, "need": ("v", "temperature")}
        return reference.route_backward(h, agents, expected(k), Tokens(d_tokens, None), **given)

    def error(k: int | None, result: Array, i: int) -> float:
        return truth.relative(result, expected(k).tokens)

    def lost(k: int) -> dict[str, float]:
        """The error against routing to all, by the tokens' masses; and agents without mass."""
        exact, found = expected(None), expected(k)
        mass = np.exp(exact.lse[0])
        off, norm = (np.linalg.norm(a[0], axis=1) for a in (found.tokens - exact.tokens, exact.tokens))
        return {"error_to_exact": float((mass * off).sum() / (mass * norm).sum())}

    def routed(to: Any, k: int | None, i: int) -> Any:
        return ops.route(h, to, **options, sparse=k).tokens

    def back(forward: Any, k: int | None, i: int) -> Any:
        given = {**options, "sparse": k, "need": ("v", "temperature")}
        return ops.route_backward(h, agents, forward, Tokens(d_tokens, None), **given)

    def compressed(k: int | None, i: int) -> Any:
        return ops.compress(book, h, budget=budget, temperature=SHARP, sparse=k).tokens[:, :m]

    def of_gradients(k: int | None, result: Any, i: int) -> float:
        return truth.relative(result.v, gradients(k).v)

    ways: list[tuple[str, int | None]] = [("all agents", None), *((f"sparse {k}", k) for k in few)]
    pairs = 2.0 * rows * m
    route, backward, compress = [], [], []
    for name, k in ways:
        check, extra = partial(error, k), dict if k is None else partial(lost, k)
        flops = None if k is None else 0.0
        route.append(Variant(name, lambda k=k: partial(routed, agents, k), check, FLOAT32, "hisac", (), extra, flops))
        forward = ops.route(h, agents, **options, sparse=k)
        backward.append(
            Variant(name, lambda f=forward, k=k: partial(back, f, k), partial(of_gradients, k), FLOAT32, "hisac",
                    flops=flops)
        )  # fmt: skip
        compress.append(Variant(name, lambda k=k: partial(compressed, k), check, FLOAT32, "hisac", flops=flops))
        if k is not None:
            kept = ops.agent_lists(book, agents, k)
            route.append(
                Variant(f"{name}, kept lists", lambda to=kept, k=k: partial(routed, to, k), check, FLOAT32, "hisac",
                        flops=0.0)
            )  # fmt: skip
    same = peers_agents.route(x, v, offsets, agents.prototypes, None, SHARP, False)
    route += by_role(same, partial(error, None), FLOAT32)
    tokens, lse = (np.asarray(a, np.float32) for a in ops.route(h, agents, **options)[:2])
    found = peers_agents.backward(x, v, agents.prototypes, SHARP, d_tokens, tokens, lse)
    backward += by_role(
        found, lambda r, i: truth.relative(r[0] if isinstance(r, tuple) else r.v, gradients(None).v), FLOAT32
    )
    for part, flops, variants in (
        (work, pairs * (width + value), route),
        (f"{work}/backward", pairs * (width + 2 * value), backward),
        (f"{work}/compress", pairs * (width + value), compress),
    ):
        yield Case(part, "float32", size, INTERESTS, rows, flops, truth.REFERENCE, tuple(variants))
