# SPDX-License-Identifier: Apache-2.0
"""The main job on the bundled sample: fit, encode, vote, route, score candidates, and say what came of it."""

from typing import NamedTuple

import numpy as np

import hisac

from ..progress import fit_progress, progress
from . import explain, files, protocol, trial
from .protocol import FITTED_WEEKS, TEST_WEEKS, VALIDATION_WEEKS, Auc, Events, Floats, Ints, Requests, gauc, user_aucs
from .trial import SETTINGS, SIZES, Costs, World, budget, fan_out, few

CODES = (64, 128)  # with the fit on purchases, the best of a few on validation weeks
LONG = 10_000
CANDIDATES = 500
FLOORS = ("full history", "repeat count, then full", "repeat count", "popularity")


class Size(NamedTuple):
    """How much the demo does."""

    validation: int = 200
    test: int = 600
    fit_rows: int = 20_000
    iterations: int = 10
    taus: tuple[float, ...] = (0.02, 0.1, 0.5, 1.0, 2.0)
    resamples: int = 1000
    repetitions: int = 30


FULL = Size()
QUICK = Size(validation=8, test=24, fit_rows=2_000, iterations=2, taus=(0.02, 1.0), resamples=200, repetitions=3)

ORIGIN = """\
Sample: complete_journey (CC0), the {users} households with most purchases of 2,469: heavy shoppers, not typical ones.
{events:,} purchases of {items:,} products with {texts:,} texts. The PyPI package calls the data "simulated"; the R
package, purchases of "2,469 households who are frequent shoppers", published by 84.51 degrees. Text embeddings by
all-MiniLM-L6-v2 (Apache-2.0), PCA to {width} dimensions on weeks 1-{fitted}. No ranking model is trained here."""

NOTES = """\
vs most recent M: paired difference (the floors: M = {largest}); repeat, new: GAUC of items in, and not in, the history.
cold: first request (tokens: vote, route, score; rows: fetch, score). cached: score alone. ids: 4 bytes a behaviour, 8
an agent (it names the agents; the tokens need the history). rows: float32 kept a user. pays at: the request from which
kept tokens cost less than scoring the full history's kept rows. *: timing only, that history repeated with noise."""


# -------------------------------------------------------------------------------------------------------------- table


HEAD = (
    "method", "GAUC [95 %]", "vs most recent M", "repeat", "new",
    "cold ms", "cached ms", "ids B", "rows B", "pays at",
)  # fmt: skip
Row = tuple[str, ...]  # a line of the table: a text for each column of HEAD, - where it says nothing


class Quality(NamedTuple):
    """AUCs of one method by user."""

    every: Auc
    repeat: Auc
    new: Auc


def quality(r: Requests, scores: dict[str, Floats], repeat: Ints) -> dict[str, Quality]:
    """{method: AUCs over all candidates, over those in the history, over those new to it}."""
    user, masks = protocol.users_of(r), (np.ones(len(repeat), bool), repeat > 0, repeat == 0)
    return {name: Quality(*(user_aucs(user[m], s[m], r.label[m]) for m in masks)) for name, s in scores.items()}


def number(value: float, sign: str = "") -> str:
    """.715, +.025, -.007."""
    return f"{value:{sign}.3f}".replace("0.", ".", 1)


def interval(value: tuple[float, float, float], sign: str = "") -> str:
    return "{} [{}, {}]".format(*(number(v, sign) for v in value))


def make_rows(found: dict[str, Quality], cost: Costs, long: Costs, resamples: int) -> list[list[Row]]:
    """The table's blocks: the floors, the methods for each M, then the timing-only history."""
    compressed = {s.name for s in SETTINGS}

    def spent(name: str, cost: Costs) -> Row:
        c = cost[name]
        pays = trial.pays_at(c, cost["full history"]) if name in compressed else None
        return f"{c.cold_ms:.3g}", f"{c.cached_ms:.3g}", f"{c.ids:,}", f"{c.rows:,}", "-" if pays is None else str(pays)

    def row(name: str, m: int) -> Row:
        mine, against = found[name], found[f"most recent {m}"]
        every = interval(gauc(mine.every, resamples=resamples))
        gain = "-" if mine is against else interval(gauc(mine.every, against.every, resamples=resamples), "+")
        repeat, new = (number(gauc(part, resamples=1)[0]) for part in (mine.repeat, mine.new))
        return name, every, gain, repeat, new, *spent(name, cost)

    def timed(name: str) -> Row:
        return f"{LONG // 1000}k*: {name}", "-", "-", "-", "-", *spent(name, long)

    blocks = [[row(name, SIZES[-1]) for name in FLOORS]]
    blocks += [[row(name, m) for name in (f"most recent {m}", fan_out(m).name, budget(m).name)] for m in SIZES]
    most = SIZES[-1]
    blocks[-1].append(row(few(most).name, most))
    names = "full history", *(make(most).name for make in (fan_out, budget, few))
    return [*blocks, [timed(name) for name in names]]


def table(blocks: list[list[Row]]) -> str:
    """The one table, as text."""
    text: list[list[Row]] = [[HEAD], *blocks]
    widths = [max(len(line[c]) for block in text for line in block) for c in range(len(HEAD))]
    form = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{w}}}" for w in widths[1:])])
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    lines = []
    for block in text:
        lines += [*(form.format(*line) for line in block), rule]
    return "\n".join(lines)


def reading(found: dict[str, Quality], resamples: int) -> str:
    """What the numbers say, whatever they are."""

    def value(name: str) -> float:
        return gauc(found[name].every, resamples=1)[0]

    def verdict(a: Auc, b: Auc) -> str:
        _, low, high = gauc(a, b, resamples=resamples)
        return "above" if low > 0 else "below" if high < 0 else "not told apart from"

    lines = []
    for m in SIZES:
        recent = found[f"most recent {m}"].every
        parts = [f"{s.name}: {verdict(found[s.name].every, recent)} it" for s in (budget(m), fan_out(m))]
        gap = number(value(budget(m).name) - value("full history"), "+")
        lines.append(f"Against the most recent {m}: {'; '.join(parts)}. {budget(m).name} less full history: {gap}.")
    m = SIZES[1]
    parts = [
        f"{s.name} {number(gauc(found[s.name].new, resamples=1)[0])},"
        f" {verdict(found[s.name].new, found[f'most recent {m}'].new)} the most recent {m}"
        for s in (budget(m), fan_out(m))
    ]
    lines.append(f"Items new to the household: {'; '.join(parts)}.")
    over = "above" if value("repeat count") > value("full history") else "below"
    lines.append(
        f"People buy again: counting repeats alone gives {number(value('repeat count'))}, {over} the full history's"
        f" kernel ({number(value('full history'))}), and says nothing of new items."
    )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- run


def fit_world(events: Events, size: Size, seed: int) -> World:
    """A codebook fitted on purchases of the fitted weeks (so frequent texts weigh more), and everything encoded."""
    text = events.text_of_item[events.item]
    rows = np.random.default_rng(seed).permutation(text[events.week <= FITTED_WEEKS])[: size.fit_rows]
    with fit_progress(len(CODES), size.iterations) as tell:
        book = hisac.fit(events.x[rows], CODES, iterations=size.iterations, seed=seed, progress=tell)
    return trial.make_world(events, events.x, text, book)


def run(*, quick: bool, png: str, seed: int) -> None:
    """It prints what the sample is, the quality and the time of each method, and one household's agents in words. The
    picture is of these agents: what voted for them, and what each one reads."""
    files.check_out(png, (".png",))
    size = QUICK if quick else FULL
    events = protocol.load()
    origin = {"users": len(events.offsets) - 1, "events": len(events.item), "items": len(events.text_of_item)}
    print(ORIGIN.format(**origin, texts=len(events.texts), width=events.x.shape[1], fitted=FITTED_WEEKS), flush=True)

    w = fit_world(events, size, seed)
    validation = protocol.requests(events, VALIDATION_WEEKS, most=size.validation, seed=seed)
    test = protocol.requests(events, TEST_WEEKS, most=size.test, seed=seed + 1)
    chosen_on, tested_on = (f"weeks {first}-{last}" for first, last in (VALIDATION_WEEKS, TEST_WEEKS))
    methods = 1 + len(SIZES) + len(SETTINGS)
    with progress(f"choose temperatures, {chosen_on}", len(SETTINGS) * len(size.taus)) as advance:
        taus = trial.choose_tau(w, validation, size.taus, advance)
    with progress(f"score, {tested_on}", len(test.user) * methods) as advance:
        scores = trial.score_all(w, test, taus, advance)

    b = int(np.argsort(test.ends - test.starts, kind="stable")[len(test.user) // 2])  # of the median length
    rows = slice(int(test.starts[b]), int(test.ends[b]))
    shelf = protocol.popularity(events)
    item = np.random.default_rng(seed).choice(len(shelf), CANDIDATES, p=shelf / shelf.sum())
    q = events.x[events.text_of_item[item]]
    with progress("time one request", 2 * methods) as advance:
        cost = trial.costs(w, rows, q, taus, size.repetitions, advance)
        again = trial.jittered(w, rows, LONG, seed)
        long = trial.costs(again, slice(0, LONG), q, taus, max(3, size.repetitions // 3), advance)
    cost.update(trial.lookup_cost(w, rows, item, size.repetitions))
    cost["repeat count, then full"] = cost["full history"]

    found = quality(test, scores, protocol.repeat_counts(events, test))
    chosen = "; ".join(
        f"{kind} {', '.join(f'{taus[make(m).name]:g}' for m in SIZES)}"
        for kind, make in (("fan-out", fan_out), ("budget", budget))
    )
    chosen += f"; {few(SIZES[-1]).name} {taus[few(SIZES[-1]).name]:g}"
    print(
        f"\n{len(test.user)} requests of {tested_on}, {len(np.unique(test.user))} households,"
        f" {len(test.item):,} candidates: {protocol.NEGATIVES} popularity-matched negatives for each item bought.\n"
        f"Codebook {' x '.join(map(str, CODES))}. Temperatures chosen on {chosen_on} of"
        f" {', '.join(f'{t:g}' for t in size.taus)}, for M = {', '.join(map(str, SIZES))}: {chosen}.\n"
        f"Times: medians of {size.repetitions}, {CANDIDATES} candidates, the request with the median history"
        f" ({rows.stop - rows.start:,} behaviours), threads: {hisac.get_num_threads()}.\n"
    )
    print(table(make_rows(found, cost, long, size.resamples)))
    print(f"{NOTES.format(largest=SIZES[-1])}\n\n{reading(found, size.resamples)}\n")
    texts = [events.texts[k] for k in w.row[rows]]
    tau = taus[budget(SIZES[0]).name]
    explain.user(w.book, w.codes[rows], w.x[rows], texts, name=f"Household {test.user[b]}", tau=tau, png=png)
    print("\nYour own tables, .parquet or .csv, and arrays: python -m hisac fit --help, then compress --help")
