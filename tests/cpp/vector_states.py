# SPDX-License-Identifier: Apache-2.0
"""The problems of vectors.bin about states: recorded runs of two states through seeded operations, and what the
definition says of both after each of them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from vectors import Case, Codes, Floats, Integers, Stored, Uniform, number

from hisac import reference
from hisac.reference.state import UserState
from hisac.types import Histories

APPEND, EXPIRE, FORGET, MERGE, RETURN, MIGRATE = range(6)
STEP = 8  # numbers of a step: operation, state, first event, past the last, and four of its own
WEIGHTS = np.float32([1, 1, 1, 2, 5, 0.5, 2.75, 0, -1, np.nan, np.inf, 2.0**27, 1e-35])


def numbers_of(state: UserState) -> list[int]:
    """What is equal to the bit: counts, the leaves, their votes, the ring."""
    stats, recent, leaves = state.stats(), state.recent(), sorted(state.votes)
    found = [state.epoch or 0, state.position, state.revision, *stats[:4], *stats[5:7], *leaves]
    return [*found, *(state.votes[leaf] for leaf in leaves), *recent.ids.tolist(), *recent.times.tolist()]


def rows_of(events: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    return {name: a[first:last] for name, a in events.items()}


def play(
    states: list[UserState],
    step: list[int],
    events: dict[str, Any],
    items: list[Histories],
    of: list[int],
    books: list[Any],
) -> None:
    """One operation. items: of each of two codebooks; of: which of them a state has."""
    kind, which, first, last, a, b, c, _ = step
    state, tables = states[which], items[of[which]]
    some = rows_of(events, first, last)
    if kind == APPEND:
        state.append(tables, some.pop("ids"), **some, model_tag=9)
    elif kind == EXPIRE:
        state.expire(tables, a, age=None if b < 0 else b, least=c, model_tag=9)
    elif kind == FORGET:
        kept = rows_of(events, a, b)
        rows = kept["ids"], kept["weights"], kept["times"]
        state.forget(tables, some["ids"], kept=rows, whole=state.migrated, model_tag=9)
    elif kind == MERGE and of[0] == of[1]:
        state.merge(states[1 - which], tables, model_tag=9)
    elif kind == MIGRATE:
        of[which] = 1 - of[which]
        states[which] = state.migrate(books[of[which]])[0]


def state_case(name: str, leaves: int, ring: int, half_life: int, mean_x: bool, width: int, wide: int, n: int) -> Case:
    sizes, rng = (6, 7), np.random.default_rng(n + leaves)
    records: dict[str, Any] = {
        "book": number(600, width, *sizes), "other": number(610, width, 5, 4),
        "options": number(leaves, ring, half_life, mean_x),
        "x": Uniform(620, (40, width), {3 * width: np.nan}), "v": Uniform(621, (40, wide), {5 * wide + 1: np.inf}),
        "codes": Codes(622, (40, 2), {8: -1, 15: 9}, sizes, ("skewed", "even")),
        "other_codes": Codes(623, (40, 2), {8: -1}, (5, 4), ("even", "even")),
    }  # fmt: skip
    books = []
    for of in ("book", "other"):
        seed, _, *counts = records[of].array().tolist()
        levels = [Uniform(seed + k, (c, width), scale=0.25**k).array() for k, c in enumerate(counts)]
        books.append(reference.Codebook(levels))
    of, time, at, steps, log = [0, 0], 1_700_000_000, 0, list[list[int]](), list[int]()
    x, v = (records[of_].array() for of_ in ("x", "v"))
    tables = [records[of_].array() for of_ in ("codes", "other_codes")]
    items = [Histories(x, v, codes=t) for t in tables]
    options: dict[str, Any] = {"half_life": half_life, "mean_x": mean_x, "model_tag": 9, "weighting": 1}
    states = [UserState(books[0], width=wide, leaves=leaves, ring=ring, **options) for _ in range(2)]
    events: dict[str, Any] = {"ids": [], "weights": [], "times": [], "positions": []}
    for _ in range(n):
        kind = int(rng.choice(6, p=[0.7, 0.08, 0.08, 0.08, 0.02 + 0.04 * mean_x, 0.04 * (not mean_x)]))
        first, count = len(events["ids"]), int(rng.integers(0, 12)) if kind in (APPEND, FORGET) else 0
        gap = int(rng.choice([0, 1, 7, 90])) * max(half_life // 60, 1)
        events["ids"] += rng.integers(-1, 41, count).tolist()
        events["weights"] += rng.choice(WEIGHTS, count).tolist()
        events["times"] += [time + gap * k for k in range(count)]
        events["positions"] += [at + k - int(rng.integers(0, 3)) for k in range(count)]
        step = [kind, int(rng.integers(0, 2)), first, first + count, 0, 0, 0, 0]
        if kind == EXPIRE:
            step[4:7] = time - int(rng.integers(0, 50)), int(rng.choice([-1, 0, 30])), int(rng.choice([0, 1, 4096]))
        elif kind == FORGET:  # the earlier events without these are what is kept
            step[4], step[5] = max(first - 60, 0), first
        time, at = time + gap * count, at + count * (kind == APPEND)
        now = {k: np.array(a, np.float32 if k == "weights" else np.int64) for k, a in events.items()}
        play(states, step, now, items, of, books)
        steps.append(step)
        for state in states:
            log += numbers_of(state)
    kinds = {"weights": np.float32}
    records |= {name: Stored(np.array(a, kinds.get(name, np.int64))) for name, a in events.items()}
    records |= {"steps": Stored(np.array(steps, np.int64)), "log": Integers(np.array(log, np.int64))}
    for k, state in enumerate(states):
        sums, bound = state.sums(), state.bound()
        for field in ("x", "v", "bias", "spread"):
            if getattr(sums, field) is not None:
                records[f"{field} {k}"] = Floats(getattr(sums, field), getattr(bound, field) + 2.0**-120)
    return f"state/{name}", records


def state_cases() -> Iterator[Case]:
    yield state_case("counts", 30, 5, 0, True, 7, 5, 50)
    yield state_case("decay", 30, 5, 60, True, 17, 19, 50)
    yield state_case("few leaves", 4, 0, 40, True, 3, 2, 60)
    yield state_case("prototypes", 12, 3, 25, False, 5, 3, 60)
    yield state_case("far times", 12, 3, 2**31 // 20, True, 5, 3, 60)
