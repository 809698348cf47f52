# SPDX-License-Identifier: Apache-2.0
"""Scoring candidates without any training, by the plain history and by its compressed tokens; what each one costs.

    score(candidate) = log sum_a share_a exp(20 (cos(x_candidate, token_a) - 1))

with v = x, and share_a the agent's share of the votes; each of n rows of a plain history has the share 1 / n. That is
`attend` with scale 20 and bias log share, whose log-sum-exp, less 20, is the score.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

import hisac

from .protocol import Events, Floats, Ints, Requests, gauc, popularity, repeat_counts, user_aucs, users_of

SIZES = (50, 100, 200)
FANOUTS = {50: (10, 5), 100: (20, 5), 200: (20, 10)}
SPARSE = 32
SHARPNESS = 20.0
CHUNK = 64  # requests whose padded histories are in memory at once

Advance = Callable[[int], None]


class Setting(NamedTuple):
    """A way to compress: seats, voting rule, normalisation and sparse routing."""

    name: str
    seats: int
    normalize: hisac.types.Normalize
    rule: dict[str, Any]
    sparse: int | None = None


def fan_out(m: int) -> Setting:
    """The paper's rule, as it is likely meant."""
    return Setting(f"fan-out {FANOUTS[m][0]}x{FANOUTS[m][1]}, history", m, "history", {"fanout": FANOUTS[m]})


def budget(m: int) -> Setting:
    """Seats in proportion, each behaviour's weight shared among the agents."""
    return Setting(f"budget {m}, agents", m, "agents", {"budget": m})


def few(m: int) -> Setting:
    """The same, where each behaviour meets few of the agents."""
    return Setting(f"budget {m}, agents, sparse {SPARSE}", m, "agents", {"budget": m}, SPARSE)


SETTINGS = [*(make(m) for m in SIZES for make in (fan_out, budget)), few(SIZES[-1])]


class World(NamedTuple):
    """Everything that scoring reads: T behaviours, each a row of a table of embeddings."""

    events: Events
    table: Floats
    """[K, D]."""
    row: Ints
    """[T]: the behaviour's row in the table."""
    x: Floats
    """[T, D]: table[row]."""
    codes: Ints
    """[T, L]."""
    book: Any


def make_world(events: Events, table: Floats, row: Ints, book: Any) -> World:
    return World(events, table, row, table[row], hisac.encode(book, table)[row], book)


# ------------------------------------------------------------------------------------------------------------ scoring


def unit(x: Floats) -> Floats:
    """Rows of norm 1; a zero row stays zero."""
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9), np.float32)


def log_share(votes: Ints) -> Floats:
    """votes [B, M] -> log of their share [B, M], -inf where there are none: `attend` leaves those tokens out."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(votes / votes.sum(1, keepdims=True)), np.float32)


def score(tokens: Floats, bias: Floats, q: Floats, candidate_offsets: Ints) -> Floats:
    """tokens [B, M, D] of norm 1, bias [B, M], q [N, D] of norm 1 -> [N]: the kernel score of each candidate."""
    values = np.zeros((*bias.shape, 1, 1), np.float32)  # only the log-sum-exp is wanted
    found = hisac.attend(q[:, None], tokens[:, :, None], values, candidate_offsets, bias=bias, scale=SHARPNESS)
    return np.asarray(found.lse[:, 0] - SHARPNESS)


def compress(w: World, starts: Ints, ends: Ints, s: Setting, tau: float, voted: Any = None) -> tuple[Floats, Floats]:
    """Tokens of norm 1 [B, M, D] and log share of votes [B, M] of the histories starts..ends."""
    histories = hisac.Histories(w.x, w.x, (starts, ends), w.codes)
    rule = s.rule if voted is None else {"agents": voted}
    made = hisac.compress(w.book, histories, **rule, temperature=tau, normalize=s.normalize, sparse=s.sparse)
    return unit(made.tokens), log_share(made.agents.votes)


def candidates(w: World, r: Requests) -> Floats:
    """[N, D]: the embedding of each candidate."""
    return w.events.x[w.events.text_of_item[r.item]]


def score_rows(w: World, starts: Ints, ends: Ints, r: Requests, advance: Advance) -> Floats:
    """[N]: the kernel score over the plain rows starts..ends, some requests at a time."""
    q, parts = candidates(w, r), []
    for b in range(0, len(starts), CHUNK):
        begin, end = starts[b : b + CHUNK], ends[b : b + CHUNK]
        rows = begin[:, None] + np.arange((end - begin).max())
        inside = rows < end[:, None]
        bias = np.where(inside, -np.log(end - begin)[:, None], -np.inf).astype(np.float32)
        offsets = r.candidate_offsets[b : b + CHUNK + 1]
        mine = q[offsets[0] : offsets[-1]]
        parts.append(score(w.x[np.where(inside, rows, 0)], bias, mine, offsets - offsets[0]))
        advance(len(begin))
    return np.concatenate(parts)


def choose_tau(w: World, r: Requests, taus: Iterable[float], advance: Advance) -> dict[str, float]:
    """{setting: the temperature with the best GAUC on these requests}, the lower one on a tie."""
    q, best = candidates(w, r), {}
    for s in SETTINGS:
        voted = hisac.vote(w.book, hisac.Histories(codes=w.codes, offsets=(r.starts, r.ends)), **s.rule)
        found = {}
        for tau in sorted(taus):
            scores = score(*compress(w, r.starts, r.ends, s, tau, voted), q, r.candidate_offsets)
            found[tau] = gauc(user_aucs(users_of(r), scores, r.label), resamples=1)[0]
            advance(1)
        best[s.name] = max(found, key=lambda tau: found[tau])
    return best


def score_all(w: World, r: Requests, taus: dict[str, float], advance: Advance) -> dict[str, Floats]:
    """{method: score of every candidate [N]}."""
    repeat = repeat_counts(w.events, r)
    full = score_rows(w, r.starts, r.ends, r, advance)
    scores = {
        "full history": full,
        "repeat count, then full": repeat * 1e3 + full,  # |full| <= 40 + log rows
        "repeat count": repeat.astype(np.float64),
        "popularity": popularity(w.events)[r.item].astype(np.float64),
    }
    for m in SIZES:
        scores[f"most recent {m}"] = score_rows(w, np.maximum(r.starts, r.ends - m), r.ends, r, advance)
    q = candidates(w, r)
    for s in SETTINGS:
        scores[s.name] = score(*compress(w, r.starts, r.ends, s, taus[s.name]), q, r.candidate_offsets)
        advance(len(r.starts))
    return scores


# ------------------------------------------------------------------------------------------------------------- costs


class Cost(NamedTuple):
    """Milliseconds of a first request and of one whose tokens are kept; bytes kept a user, as ids and as rows."""

    cold_ms: float
    cached_ms: float
    ids: int
    rows: int


Costs = dict[str, Cost]  # {method: Cost}


def median_ms(call: Callable[[], Any], repetitions: int) -> float:
    call()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def cost_of(make: Callable[[], tuple[Floats, Floats]], q: Floats, ids: int, rows: int, repetitions: int) -> Cost:
    offsets = np.array([0, len(q)])
    tokens, bias = make()
    cold = median_ms(lambda: score(*make(), q, offsets), repetitions)
    return Cost(cold, median_ms(lambda: score(tokens, bias, q, offsets), repetitions), ids, rows)


def plain_cost(w: World, rows: slice, last: int, q: Floats, repetitions: int) -> Cost:
    """Of the last `last` rows: cold fetches their embeddings by item, then scores q."""
    row = w.row[rows][-last:]
    bias = np.full((1, len(row)), -np.log(len(row)), np.float32)
    size = 4 * len(row)
    return cost_of(lambda: (w.table[row][None], bias), q, size, size * w.table.shape[1], repetitions)


def token_cost(w: World, rows: slice, s: Setting, tau: float, q: Floats, repetitions: int) -> Cost:
    """Of a setting: cold votes, routes and scores q; codes and embeddings of the history are at hand."""
    starts, ends = np.array([rows.start]), np.array([rows.stop])
    kept = s.seats * (4 * w.table.shape[1] + 4)  # a token and its share
    return cost_of(lambda: compress(w, starts, ends, s, tau), q, 8 * s.seats, kept, repetitions)


def lookup_cost(w: World, rows: slice, item: Ints, repetitions: int) -> Costs:
    """Of the two floors that look numbers up."""
    size, history, shelf = len(w.events.text_of_item), w.events.item[rows], popularity(w.events)
    counts = np.bincount(history, minlength=size)
    cold = median_ms(lambda: np.bincount(history, minlength=size)[item], repetitions)
    cached, lookup = median_ms(lambda: counts[item], repetitions), median_ms(lambda: shelf[item], repetitions)
    distinct = int((counts > 0).sum())
    return {
        "repeat count": Cost(cold, cached, 4 * len(history), 8 * distinct),
        "popularity": Cost(lookup, lookup, 0, 0),
    }


def costs(w: World, rows: slice, q: Floats, taus: dict[str, float], repetitions: int, advance: Advance) -> Costs:
    """Of the full history, the most recent rows and every setting, for one history."""
    found = {}
    for name, last in (("full history", rows.stop - rows.start), *((f"most recent {m}", m) for m in SIZES)):
        found[name] = plain_cost(w, rows, last, q, repetitions)
        advance(1)
    for s in SETTINGS:
        found[s.name] = token_cost(w, rows, s, taus[s.name], q, repetitions)
        advance(1)
    return found


def pays_at(cost: Cost, full: Cost) -> int | None:
    """The first number of requests n at which kept tokens cost less than the full history's kept rows:
    cold + (n - 1) cached < n full; None if never."""
    gain = full.cached_ms - cost.cached_ms
    return None if gain <= 0 else max(1, int((cost.cold_ms - cost.cached_ms) / gain) + 1)


def jittered(w: World, rows: slice, length: int, seed: int) -> World:
    """One history repeated to `length` rows with small noise: for timing only."""
    x = np.resize(w.x[rows], (length, w.x.shape[1]))
    x = unit(x + np.random.default_rng(seed).normal(0, 0.02, x.shape).astype(np.float32))
    return make_world(w.events, x, np.arange(length), w.book)
