# SPDX-License-Identifier: Apache-2.0
"""The works: their data by seed, hisac's variants, their peers and bounds; here all but those of route.

`WORKS` names them; a work gives one case for each dtype it is measured in. `ops` is the module under test: `hisac`, or
anything with the same functions. A case's truth is found when its first result is checked, so that who only times
need not wait for it.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np

import peers
import peers_codes
import truth
from data import CLUSTERED, MIXTURE, NEAR, NORMAL, history, items, lengths, offsets_of, structured, unit
from harness import Case, Variant
from hisac import Histories
from truth import reference
from works_common import (
    BFLOAT16,
    FLOAT32,
    INERTIA,
    NEAR_TIE,
    PEER_BFLOAT16,
    PEER_CODES,
    TAU,
    Array,
    as_bf16,
    as_torch,
    by_role,
    has_torch,
)  # fmt: skip
from works_match import match
from works_route import backward, leaf, real, route
from works_sparse import sparse
from works_train import train

NO_OPERATION = ("state/append10", "the variant fp32-grade")
"""Named for later suites; nothing to run yet."""

# -------------------------------------------------------------------------------------------------------------- cases


def vote(
    work: str, ops: ModuleType, threads: int, *, rows: int, sizes: tuple[int, int], fanout: tuple[int, int],
    budget: int, users: int = 1, short: tuple[int, int] = (20, 200), copies: int = 4,
) -> Iterator[Case]:  # fmt: skip
    """Both rules; one user of `rows`, or `users` of a length between `short`."""
    rng = np.random.default_rng(0)
    n = np.array([rows]) if users == 1 else lengths(rng, users, rows, *short)
    offsets = offsets_of(n)
    book = ops.Codebook([unit(rng, s, 16) for s in sizes])
    copies = copies if users == 1 else 1
    codes = [np.concatenate([history(rng, int(k), sizes) for k in n]) for _ in range(copies)]
    for name, rule in (("fanout", {"fanout": fanout}), ("budget", {"budget": budget})):
        yield one_vote(work, ops, book, codes, offsets, sizes, name, rule)


def one_vote(
    work: str,
    ops: ModuleType,
    book: Any,
    codes: list[Array],
    offsets: Array,
    sizes: tuple[int, int],
    name: str,
    rule: Any,
) -> Case:
    """One rule."""
    plain = reference.Codebook([np.zeros((s, 1)) for s in sizes])

    @cache
    def expected(i: int) -> Any:
        return reference.vote(plain, Histories(codes=codes[i], offsets=offsets), **rule)

    def error(result: Any, i: int) -> float:
        return max(truth.differing(a, b) for a, b in zip(result[:3], expected(i)[:3], strict=True))

    def call(i: int) -> Any:
        return ops.vote(book, Histories(codes=codes[i], offsets=offsets), **rule)

    users = len(offsets) - 1
    size = f"{users} user{'s' * (users > 1)}, T {offsets[-1]}, {sizes[0]} x {sizes[1]} codes, {name} {rule[name]}"
    mine = Variant(name, lambda: call, error, 0.0, "hisac")
    found = by_role(peers_codes.vote(codes, offsets, sizes, rule), error, 0.0)
    return Case(work, "int32", size, CLUSTERED, int(offsets[-1]), 0.0, truth.REFERENCE, (mine, *found), len(codes))


def encode(
    work: str, ops: ModuleType, threads: int, *, rows: int, width: int, sizes: tuple[int, ...], sample: int = 4000
) -> Iterator[Case]:
    """Codes by trained centers. hisac's must equal the reference's on evenly spaced rows, and be nearest to float64
    rounding on all."""
    rng = np.random.default_rng(0)
    x = items(rng, rows, width)
    centers, r = [], x[:20_000]
    for n in sizes:
        c = truth.lloyd64(r, r[rng.permutation(len(r))[:n]], 4).astype(np.float32)
        centers.append(c)
        r = r - c[truth.nearest(r, c)[0]]
    at = np.linspace(0, rows - 1, min(sample, rows)).astype(np.int64)
    book = ops.Codebook(centers)

    @cache
    def expected() -> Array:
        return truth.encode64(centers, x)

    @cache
    def canonical() -> Array:
        return reference.encode(reference.Codebook(centers), x[at])

    def exact(result: Array, i: int) -> float:
        codes = truth.dense(result)
        other = (codes != expected()).any(1)
        if truth.encode_gap(centers, x[other], codes[other]) > NEAR_TIE:
            return float(other.mean())
        return truth.differing(codes[at], canonical())

    def near(result: Array, i: int) -> float:
        if getattr(result, "dtype", None) == np.uint8:
            result = peers_codes.faiss_unpack(result, len(sizes), int(np.log2(sizes[0])))
        return float((truth.dense(result) != expected()).any(1).mean())

    mine = Variant("fp32", lambda: partial(encode_call, ops, book, x), exact, 0.0, "hisac")
    found = by_role(peers_codes.encode(x, centers, threads), near, PEER_CODES)
    size = f"{rows} items, D {width}, {' x '.join(map(str, sizes))} codes"
    name = f"{truth.REFERENCE} on {len(at)} rows, float64 distances on all"
    yield Case(work, "float32", size, MIXTURE, rows, 2.0 * rows * width * sum(sizes), name, (mine, *found))


def encode_call(ops: ModuleType, book: Any, x: Array, i: int) -> Any:
    """One run of encode."""
    return ops.encode(book, x)


def fit(
    work: str, ops: ModuleType, threads: int, *, rows: int, width: int, size: int, iterations: int, sample: int = 600
) -> Iterator[Case]:
    """One level. hisac must equal the reference on a small problem; error is the inertia above that of float64 Lloyd
    rounds from hisac's start, which the peers are given."""
    x = items(np.random.default_rng(0), rows, width)
    start = truth.fit_start(x, size, 0)
    few = x[:sample]

    @cache
    def least() -> float:
        return truth.inertia(x, truth.lloyd64(x, start, iterations))

    def error(result: Array, i: int) -> float:
        return max(0.0, truth.inertia(x, result) / least() - 1)

    def exact(result: Any, i: int) -> float:
        expected = reference.fit(few, (12,), iterations=3).centers[0]
        if not np.array_equal(ops.fit(few, (12,), iterations=3).centers[0], expected):
            return float("inf")
        return error(result.centers[0], i)

    def call(i: int) -> Any:
        return ops.fit(x, (size,), iterations=iterations)

    mine = Variant("fp32", lambda: call, exact, INERTIA, "hisac")
    found = by_role(peers_codes.fit(x, start, iterations), error, INERTIA)
    label = f"{rows} items, D {width}, {size} codes, {iterations} rounds"
    name = f"{truth.REFERENCE} on {len(few)} rows, inertia of float64 Lloyd on all"
    flops = 2.0 * rows * width * size * iterations
    yield Case(work, "float32", label, MIXTURE, rows, flops, name, (mine, *found))


def attend(
    work: str, ops: ModuleType, threads: int, *, candidates: int, tokens: int, heads: int = 2, width: int = 32
) -> Iterator[Case]:
    """One user's candidates on its tokens; then its backward, whose forward is not timed."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((candidates, heads, width), dtype=np.float32)
    k, v = (rng.standard_normal((1, tokens, heads, width), dtype=np.float32) for _ in range(2))
    at = np.array([0, candidates])
    size = f"{candidates} candidates, {tokens} tokens, {heads} heads, d {width}"
    flops = 4.0 * candidates * tokens * heads * width

    def case(variant: str, dtype: str, a: tuple[Array, ...], bound: float, peer_bound: float, bf16: bool) -> Case:
        aq, ak, av, ao = a

        @cache
        def expected() -> Any:
            return reference.attend(*(truth.dense(b) for b in a))

        def error(result: Array, i: int) -> float:
            return truth.relative(result, expected().out)

        def both(result: Any, i: int) -> float:
            return max(error(result.out, i), truth.relative(result.lse, expected().lse))

        def call(i: int) -> Any:
            return ops.attend(aq, ak, av, ao)

        mine = Variant(variant, lambda: call, both, bound, "hisac")
        found = by_role(peers.attend(aq, ak, av, bf16), error, peer_bound)
        return Case(work, dtype, size, NORMAL, candidates, flops, truth.REFERENCE, (mine, *found))

    yield case("fp32", "float32", (q, k, v, at), FLOAT32, FLOAT32, False)
    if has_torch():
        yield case("bf16", "bfloat16", (*as_bf16(q, k, v), *as_torch(at)), BFLOAT16, PEER_BFLOAT16, True)

    d_out = rng.standard_normal(q.shape, dtype=np.float32)
    forward = ops.attend(q, k, v, at)

    @cache
    def expected() -> Any:
        return reference.attend_backward(d_out, None, reference.attend(q, k, v, at), q, k, v, at)

    def error(result: Any, i: int) -> float:
        return max(truth.relative(a, b) for a, b in zip(result[:3], expected()[:3], strict=True))

    def call(i: int) -> Any:
        return ops.attend_backward(d_out, None, forward, q, k, v, at)

    found = by_role(peers.attend_backward(q, k, v, d_out), error, FLOAT32)
    mine = Variant("backward", lambda: call, error, FLOAT32, "hisac")
    yield Case(work, "float32", size, NORMAL, candidates, 2.5 * flops, truth.REFERENCE, (mine, *found))


def request(
    work: str, ops: ModuleType, threads: int, *, rows: int, budget: int, candidates: int, width: int,
    sizes: tuple[int, int], heads: int = 2, value: int = 64, cached: bool = False,
) -> Iterator[Case]:  # fmt: skip
    """One user's request: vote, route, attend from given codes; or, `cached`, attend alone on kept tokens.
    Peers: full target attention of the candidates on every behaviour (SDPA), and the same pipeline in torch."""
    rng = np.random.default_rng(0)
    centers, codes, x = structured(rng, rows, sizes, width)
    v = rng.standard_normal((rows, value), dtype=np.float32)
    q = rng.standard_normal((candidates, heads, value // heads), dtype=np.float32)
    book, offsets, at = ops.Codebook(centers), np.array([0, rows]), np.array([0, candidates])
    plain = reference.Codebook(centers)
    agents = reference.vote(plain, Histories(codes=codes, offsets=offsets), budget=budget)
    heads_of = (1, budget, heads, value // heads)
    rows_of = v.reshape(1, rows, heads, -1)

    @cache
    def tokens() -> Array:
        kept = truth.route(x, v, offsets, agents.prototypes, TAU, agents.count)
        return kept.tokens.reshape(heads_of)

    @cache
    def expected() -> Array:
        return reference.attend(q, tokens(), tokens(), at).out

    @cache
    def full() -> Array:
        return reference.attend(q, rows_of, rows_of, at).out

    def error(result: Array, i: int) -> float:
        return truth.relative(result, expected())

    def call_cold(i: int) -> Any:
        h = Histories(x, v, offsets, codes)
        a = ops.vote(book, h, budget=budget)
        t = ops.route(h, a, temperature=TAU, normalize="history").tokens.reshape(heads_of)
        return ops.attend(q, t, t, at).out

    stored = tokens().astype(np.float32) if cached else None

    def call_cached(i: int) -> Any:
        return ops.attend(q, stored, stored, at).out

    def pipeline() -> peers.Call:
        torch = peers.package("torch")
        tx, tv, tc, tq = as_torch(x, v, codes, q)
        c = as_torch(*centers)

        def call(i: int) -> Any:
            key, n = torch.unique(tc[:, 0].long() * sizes[1] + tc[:, 1], return_counts=True)
            leaves, _, count = peers_codes.torch_select(key, n, 1, sizes, {"budget": budget})
            leaves = leaves[0, : int(count[0])].long()
            t = torch.zeros(budget, value)
            t[: len(leaves)] = peers.expanded(c[0][leaves[:, 0]] + c[1][leaves[:, 1]], tx, tv, TAU)
            t = t.view(budget, heads, -1).transpose(0, 1)[None]
            f = torch.nn.functional.scaled_dot_product_attention
            return f(tq.transpose(0, 1)[None], t, t)[0].transpose(0, 1)

        return call

    attend_flops, route_flops = 4.0 * candidates * value, 2.0 * rows * budget * (width + value)
    whole = [p for p in peers.attend(q, rows_of, rows_of, False) if p[0].startswith("SDPA")]
    found = by_role(
        [(f"{n} on all behaviours", role, needs, make) for n, role, needs, make in whole],
        lambda r, i: truth.relative(r, full()),
        FLOAT32,
        attend_flops * rows,
    )
    flops, call = attend_flops * budget, call_cached
    if not cached:
        flops, call = flops + route_flops, call_cold
        found += by_role([("torch vote, expanded, SDPA", "peer", ("torch",), pipeline)], error, FLOAT32)
    mine = Variant("budget", lambda: call, error, FLOAT32, "hisac")
    size = f"1 user, T {rows}, budget {budget}, D {width}, V {value}, {candidates} candidates, {heads} heads"
    yield Case(work, "float32", size, NEAR, rows, flops, truth.EXPANDED, (mine, *found))


# -------------------------------------------------------------------------------------------------------------- table

Build = Callable[..., Iterator[Case]]
CODES = (512, 512)
RULES: dict[str, Any] = {"fanout": (16, 16), "budget": 200}
ROUTE_10K: dict[str, Any] = {"users": 1, "rows": 10_000, "agents": 200, "width": 128}
ROUTE_100K: dict[str, Any] = {"users": 1, "rows": 100_000, "agents": 256, "width": 128}
ROUTE_RAGGED: dict[str, Any] = {"users": 64, "rows": 1720, "agents": 200, "width": 128}
ROUTE_SHORT: dict[str, Any] = {"users": 4096, "rows": 110, "agents": 200, "width": 64, "short": (20, 200)}
QUICK_FIT: dict[str, Any] = {"items": 3000, "sizes": (64, 64), "iterations": 2}
BACKWARD_10K: dict[str, Any] = {"rows": 10_000, "agents": 200, "width": 128}

WORKS: dict[str, tuple[Build, dict[str, Any], dict[str, Any]]] = {
    "route/1k": (route, {"users": 1, "rows": 1000, "agents": 200, "width": 64}, {"rows": 500}),
    "route/10k": (route, ROUTE_10K, {"rows": 2000}),
    "route/100k": (route, ROUTE_100K, {"rows": 8000}),
    "route/ragged": (route, ROUTE_RAGGED, {"users": 8, "rows": 500}),
    "route/short": (route, ROUTE_SHORT, {"users": 128}),
    "route/10k/agents": (route, {**ROUTE_10K, "normalize": "agents"}, {"rows": 2000}),
    "route/100k/agents": (route, {**ROUTE_100K, "normalize": "agents"}, {"rows": 8000}),
    "route/ragged/agents": (route, {**ROUTE_RAGGED, "normalize": "agents"}, {"users": 8, "rows": 500}),
    "route/short/agents": (route, {**ROUTE_SHORT, "normalize": "agents"}, {"users": 128}),
    "route/real": (real, {"budget": 200}, {"fit_rows": 4000, "iterations": 3}),
    "backward/10k": (backward, BACKWARD_10K, {"rows": 2000}),
    "backward/10k/agents": (backward, {**BACKWARD_10K, "normalize": "agents"}, {"rows": 2000}),
    "sparse/1k": (sparse, {"rows": 1000, "budget": 200, "few": (16, 32)}, QUICK_FIT),
    "sparse/10k": (sparse, {"rows": 10_000, "budget": 200, "few": (16, 32)}, {**QUICK_FIT, "rows": 2000}),
    "sparse/10k/many": (sparse, {"rows": 10_000, "budget": 1000, "few": (32,)}, {**QUICK_FIT, "rows": 3000}),
    "sparse/100k": (sparse, {"rows": 100_000, "budget": 256, "few": (32,)}, {**QUICK_FIT, "rows": 5000}),
    "train/log": (
        train,
        {"events": 1_470_000, "items": 100_000, "users": 64, "rows": 1000, "agents": 100},
        {"events": 60_000, "items": 5_000, "users": 8},
    ),
    "leaf/100k": (leaf, {"rows": 100_000, "agents": 256, "width": 128, "sizes": CODES}, {"rows": 8000}),
    "vote/1k": (vote, {"rows": 1000, "sizes": CODES, **RULES}, {}),
    "vote/10k": (vote, {"rows": 10_000, "sizes": CODES, **RULES}, {"copies": 2}),
    "vote/100k": (vote, {"rows": 100_000, "sizes": CODES, **RULES}, {"rows": 30_000, "copies": 1}),
    "vote/short": (vote, {"rows": 110, "users": 4096, "sizes": CODES, **RULES}, {"users": 256}),
    "encode/2x512": (encode, {"rows": 200_000, "width": 128, "sizes": CODES}, {"rows": 4000, "sample": 500}),
    "encode/3x256": (encode, {"rows": 200_000, "width": 128, "sizes": (256,) * 3}, {"rows": 4000, "sample": 500}),
    "fit/512": (
        fit,
        {"rows": 200_000, "width": 128, "size": 512, "iterations": 10},
        {"rows": 8000, "size": 64, "iterations": 4},
    ),
    "attend/500": (attend, {"candidates": 500, "tokens": 200}, {}),
    "match/500": (match, {"leaves": 2000, "candidates": 500, "sizes": CODES}, {}),
    # next to nothing to compute: what a call costs, from NumPy as fp32 and from torch as bf16
    "call/route": (route, {"users": 1, "rows": 5, "agents": 4, "width": 8, "value": 8}, {}),
    "call/vote": (vote, {"rows": 5, "sizes": (4, 4), "fanout": (2, 2), "budget": 3}, {}),
    "call/attend": (attend, {"candidates": 3, "tokens": 4, "width": 8}, {}),
    "request/cold": (
        request,
        {"rows": 10_000, "budget": 200, "candidates": 500, "width": 128, "sizes": CODES},
        {"rows": 2000},
    ),
    "request/cached": (
        request,
        {"rows": 10_000, "budget": 200, "candidates": 500, "width": 128, "sizes": CODES, "cached": True},
        {"rows": 2000},
    ),
}  # fmt: skip
"""Work -> builder, full sizes, what --quick changes. /agents: in the recommended mode, else history mode."""
SUITES = tuple(dict.fromkeys(w.split("/")[0] for w in WORKS))


def names(chosen: list[str]) -> list[str]:
    """Suites, works or "all" -> works, in the order of the table."""
    return [w for w in WORKS if "all" in chosen or w in chosen or w.split("/")[0] in chosen]


def cases(work: str, ops: ModuleType, threads: int, quick: bool) -> Iterator[Case]:
    """The cases of a work, one after the other, so that only one's data is in memory."""
    build, full, less = WORKS[work]
    return build(work, ops, threads, **(full | less if quick else full))
