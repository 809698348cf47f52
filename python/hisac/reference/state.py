# SPDX-License-Identifier: Apache-2.0
"""The definition of a user's state between requests: a leaf table and a ring of recent rows, by the verbs of
`hisac.reference`. It keeps rows where an implementation keeps sums; what it says of votes is meant to the bit."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..types import Agents, Array, Compressed, Histories, Match, StateRecent, StateStats
from .codebook import encode
from .tables import gather
from .tree_match import match
from .verbs import compress, leaf_sums, logsumexp

UNIT_BITS = 12  # with a half-life a vote is 2^-12 of a behaviour of weight 1 at the epoch
MOST_VOTES = 2**40 - 1  # of a table
MOST_WEIGHT = 2.0**40
MOST_TIME = 2**53
LEAST_MASS = 2.0**-100
FAR = 20  # half-lives after the epoch at which it moves
NEAR = 2**31  # a time is within [epoch - 2^31, epoch + 2^31); so a half-life is at most NEAR / FAR
# of 2^f on [0, 1], by f^13 down to 1: float64, evaluated by Horner's rule without contraction
POWER = (
    1.3691488853904128e-12, 2.5678435993488206e-11, 4.4455382718708116e-10, 7.054911620801123e-09, 1.01780860092397e-07,
    1.321548679014431e-06, 1.5252733804059841e-05, 0.0001540353039338161, 0.0013333558146428443, 0.009618129107628477,
    0.05550410866482158, 0.24022650695910072, 0.6931471805599453, 1.0,
)  # fmt: skip


class Row(NamedTuple):
    """A behaviour in the ring, or, with x and v, in the table; routed: it is not in votes alone."""

    id: int
    weight: float
    time: int
    x: Any = None
    v: Any = None
    routed: bool = True


def power(fraction: float) -> float:
    """2^fraction, as votes have it."""
    total = 0.0
    for c in POWER:
        total = total * fraction + c
    return total


class UserState:
    """One user's history between requests. It keeps its book, which an implementation is given with each call.

    A row of weight w and time t counts, against the epoch E,

        mass   w 2^((t - E) / h)
        votes  rint(2^12 w 2^((t - E) / h)); without a half-life rint(w), at least 0 and at most 2^40 - 1

    w at most 2^40: a larger one counts as that. A row whose w is not finite or not above 0, or whose id is negative, is
    absent at once: it enters neither the ring nor the table, and its time says nothing. The epoch is the multiple of h
    at or before the first row's time, and without h that time. When a row comes that is 20 half-lives or more after it,
    the epoch moves on to the last whole half-life; without h, to a time that is 2^30 or more after it; when votes
    together would pass 2^40 - 1, by one half-life. The votes of each leaf are then shifted right by as many bits, and a
    leaf whose mass is below 2^-100 has none any more; nor has a row that is so faint when it comes. Without h a row has
    no more votes than are left below 2^40.

    A row enters the table when it leaves the ring, so that a ring of 0 makes the table everything. There it is absent
    where its item has no valid code. One with a NaN in x or an |x|^2 of 2^100 and more, or whose v is not finite or not
    there, votes and is not routed. Where a row has a leaf of its own and the table has all its leaves, the one with
    fewest votes is dropped first; ties: the higher one.
    """

    def __init__(
        self, book: Any, *, width: int, leaves: int, ring: int = 0, half_life: int = 0, mean_x: bool = True,
        model_tag: int = 0, weighting: int = 0,
    ) -> None:  # fmt: skip
        self.book, self.width, self.most, self.ring_size = book, width, leaves, ring
        self.half_life, self.mean_x, self.model_tag, self.weighting = half_life, mean_x, model_tag, weighting
        self.epoch: int | None = None
        self.votes: dict[int, int] = {}
        self.rows: dict[int, list[Row]] = {}
        self.ring: list[Row] = []
        self.position, self.revision = -(2**63), 0
        self.seen = self.absent = self.dropped_leaves = self.dropped_votes = 0
        self.migrated = False  # whether a leaf may have rows of items whose code is another one

    # ---- time

    def _move(self, halvings: int) -> None:
        assert self.epoch is not None
        self._move_to(self.epoch + halvings * self.half_life)

    def _move_to(self, epoch: int) -> None:
        assert self.epoch is not None
        halvings = (epoch - self.epoch) // self.half_life if self.half_life else 0
        self.epoch = epoch
        self.votes = {leaf: n >> halvings for leaf, n in self.votes.items()}
        self.rows = {leaf: self._routed(rows) for leaf, rows in self.rows.items()}
        self.ring = [row._replace(time=self._near(row.time)) for row in self.ring]

    def _near(self, time: int) -> int:
        assert self.epoch is not None
        return self.epoch + min(max(time - self.epoch, -NEAR), NEAR - 1)

    def _advance(self, time: int) -> int:
        """The time as it counts, after the epoch has been set or moved for it."""
        time, h = min(max(time, -MOST_TIME), MOST_TIME), self.half_life
        if self.epoch is None:
            self.epoch = time // h * h if h else time
        if h and (time - self.epoch) // h >= FAR:
            self._move((time - self.epoch) // h)
        elif not h and time - self.epoch >= NEAR // 2:
            self._move_to(time)
        return self._near(time)

    def _mass(self, row: Row) -> float:
        """Against the epoch."""
        assert self.epoch is not None
        if not self.half_life:
            return row.weight
        whole, part = divmod(row.time - self.epoch, self.half_life)
        return math.ldexp(row.weight * power(part / self.half_life), whole)

    def _votes_of(self, row: Row) -> int:
        if not self.half_life:
            return min(round(row.weight), MOST_VOTES - sum(self.votes.values()))
        return min(round(math.ldexp(self._mass(row), UNIT_BITS)), MOST_VOTES)

    def _routed(self, rows: list[Row]) -> list[Row]:
        """The rows of one leaf; none is routed any more where their mass has fallen below the least."""
        mass = sum(self._mass(row) for row in rows if row.routed)
        return rows if mass >= LEAST_MASS else [row._replace(routed=False) for row in rows]

    # ---- rows

    def _enter(self, items: Histories, row: Row) -> bool:
        """The row into the table; its item says by `leaf_sums` whether it votes and is routed. False: it is absent."""
        at = np.array([row.id])
        tables = items._replace(offsets=np.array([0, 1]), x_ids=at, v_ids=at)
        if not self.mean_x:
            tables = tables._replace(x=None, x_scale=None)
        alone = leaf_sums(self.book, tables)
        if not len(alone.codes):
            return False
        one, leaf = gather(tables), int(self.book.leaves(alone.codes)[0])
        x, v = (None if one.x is None else one.x[0]), one.v[0]
        routed = bool(np.isfinite(alone.bias[0]) and np.isfinite(v).all())
        v = v if routed else np.zeros(self.width)
        row = row._replace(weight=min(row.weight, MOST_WEIGHT), x=x, v=v, routed=routed)
        votes = self._votes_of(row)
        while self.half_life and sum(self.votes.values()) + votes > MOST_VOTES:
            self._move(1)
            votes = self._votes_of(row)
        (row,) = self._routed([row])
        if votes or row.routed:
            if leaf not in self.votes:
                self._drop_to(self.most - 1)
            self.votes[leaf] = self.votes.get(leaf, 0) + votes
            self.rows.setdefault(leaf, []).append(row)
        return True

    def _drop_to(self, most: int) -> None:
        while len(self.votes) > most:
            self._remove(min(self.votes, key=lambda leaf: (self.votes[leaf], -leaf)))

    def _remove(self, leaf: int) -> None:
        self.dropped_leaves += 1
        self.dropped_votes += self.votes.pop(leaf)
        del self.rows[leaf]

    def append(
        self, items: Histories, ids: Array, *, weights: Array = None, times: Array = None, positions: Array = None,
        latest: int | None = None, model_tag: int = 0,
    ) -> None:  # fmt: skip
        """Behaviours with the rows `ids` of the tables x, v and codes of `items`, the oldest first. One whose position
        is not above that of every earlier one changes nothing. A time after `latest` counts as `latest`."""
        self._check("append", ("model_tag", self.model_tag, model_tag))
        before = self.seen
        for i, row in enumerate(self._events(ids, weights, times)):
            if positions is not None:
                if positions[i] <= self.position:
                    continue
                self.position = int(positions[i])
            self.seen += 1
            if not self._counts(row):
                self.absent += 1
                continue
            time = self._advance(row.time if latest is None else min(row.time, latest))
            self.ring.append(row._replace(time=time))
            self._leave(items, self.ring_size)
        self.revision += self.seen > before

    @staticmethod
    def _events(ids: Array, weights: Array, times: Array) -> list[Row]:
        return [
            Row(id, 1.0 if weights is None else float(np.float32(weights[i])), 0 if times is None else int(times[i]))
            for i, id in enumerate(np.asarray(ids, int).tolist())
        ]

    @staticmethod
    def _counts(row: Row) -> bool:
        return 0 < row.weight < np.inf and row.id >= 0

    def _leave(self, items: Histories, most: int) -> None:
        while len(self.ring) > most:
            self.absent += not self._enter(items, self.ring.pop(0))

    def expire(self, items: Histories, now: int, *, age: int | None = None, least: int = 0, model_tag: int = 0) -> None:
        """Rows of the ring that are more than `age` older than `now` leave it, the first ones of the ring only; then
        leaves are dropped whose votes, shifted by the whole half-lives from the epoch to `now`, are below `least`."""
        self._check("expire", ("model_tag", self.model_tag, model_tag))
        if self.epoch is None:
            return
        now = self._near(min(max(now, -MOST_TIME), MOST_TIME))
        while age is not None and self.ring and self.ring[0].time < now - age:
            self._leave(items, len(self.ring) - 1)
        halvings = max((now - self.epoch) // self.half_life, 0) if self.half_life else 0
        for leaf in [leaf for leaf, n in self.votes.items() if n >> halvings < least]:
            self._remove(leaf)
        self.revision += 1

    def forget(
        self, items: Histories, ids: Array, *, kept: tuple[Any, ...] | Callable[[Array], Any] | None = None,
        whole: bool = False, model_tag: int = 0,
    ) -> None:  # fmt: skip
        """Behaviours with these ids leave the ring. The leaves of their codes, id by id, are made again of what is
        kept: (ids, weights, times) of rows that have left the ring, of which those of the leaf are read, or a function
        of the leaf's code [L] that gives them, or None. Rows with these ids are passed over. kept may be None where the
        table has none of these leaves.

        whole: all leaves are made again of kept, rows. After `migrate` an item's rows may lie in another leaf than its
        own, so nothing less is exact; then it is an error not to ask for it."""
        self._check("forget", ("model_tag", self.model_tag, model_tag))
        ids = np.asarray(ids)
        found = self._leaves(items, ids)
        if self.migrated and not whole:
            raise ValueError("forget: whole expected, since the state has been migrated, got False")
        if whole and (kept is None or callable(kept)):
            raise ValueError("forget: kept expected, rows, of which the whole table is made again, got none")
        if kept is None and any(leaf in self.votes for leaf in found):
            raise ValueError("forget: kept expected, rows or a function, since the table has their leaves, got none")
        self.ring = [row for row in self.ring if row.id not in ids]
        if whole:
            self.votes, self.rows, self.migrated = {}, {}, False
            self._enter_again(items, kept, ids, None)
        for leaf in [] if whole else found:
            if leaf in self.votes:
                del self.votes[leaf], self.rows[leaf]
                self._enter_again(items, kept(self._code(leaf)) if callable(kept) else kept, ids, leaf)
        self.revision += 1

    def _enter_again(self, items: Histories, kept: Any, gone: Array, leaf: int | None) -> None:
        rows = [] if kept is None else self._events(*kept)
        own = self._leaves(items, np.array([row.id for row in rows], int))
        for row, at in zip(rows, own, strict=True):
            if self._counts(row) and row.id not in gone and at >= 0 and leaf in (None, at):
                self._enter(items, row._replace(time=self._advance(row.time)))

    def _leaves(self, items: Histories, ids: Array) -> list[int]:
        codes = np.full((len(ids), len(self.book.sizes)), -1)
        inside = (np.asarray(ids, int) >= 0) & (np.asarray(ids, int) < len(items.codes))
        codes[inside] = np.asarray(items.codes)[np.asarray(ids, int)[inside]]
        return [int(n) for n in self.book.leaves(codes)]

    def _code(self, leaf: int) -> Array:
        return np.array(np.unravel_index(leaf, self.book.sizes), np.int32)

    def merge(self, other: "UserState", items: Histories, *, model_tag: int = 0) -> None:
        """Add another part of the same user's history, by one log: the later position is that of both. So is the later
        epoch; if their votes together pass 2^40 - 1, both move by one half-life more. Leaves that both have are added,
        then the others, as long as there is place, but not at the cost of one with more votes. Rings are merged from
        the front, the earlier time first, of equal ones mine; what is too much leaves. A state that has seen no event
        changes nothing."""
        for name in ("fingerprint", "model_tag", "options"):
            self._check("merge", (name, getattr(self, name), getattr(other, name)))
        self._check("merge", ("model_tag", self.model_tag, model_tag))
        if not other.seen:
            return
        self.position, self.revision = max(self.position, other.position), self.revision + 1
        self.migrated |= other.migrated
        if other.epoch is not None:
            self._merge_rows(other, items, other.epoch)
        for name in ("seen", "absent", "dropped_leaves", "dropped_votes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def _merge_rows(self, other: "UserState", items: Histories, theirs: int) -> None:
        if self.epoch is None:
            self.epoch = theirs
        h, votes = self.half_life, dict(other.votes)

        def move(halvings: int) -> dict[int, int]:
            return {leaf: n >> halvings for leaf, n in votes.items()}

        if theirs > self.epoch:
            self._move_to(theirs)
        elif h:
            votes = move((self.epoch - theirs) // h)
        if h and sum(self.votes.values()) + sum(votes.values()) > MOST_VOTES:
            self._move(1)
            votes = move(1)
        mine, total = set(self.votes), sum(self.votes.values()) + sum(votes.values())
        dropped = self.dropped_leaves + len(mine | set(votes)), self.dropped_votes + total
        for leaf in sorted(votes, key=lambda leaf: (leaf not in mine, leaf)):
            left = MOST_VOTES - sum(self.votes.values())
            self.votes[leaf] = self.votes.get(leaf, 0) + min(votes[leaf], left)
            self.rows.setdefault(leaf, []).extend(self._routed(other.rows[leaf]))
            self._drop_to(self.most)
        self.dropped_leaves = dropped[0] - len(self.votes)
        if self.dropped_leaves > dropped[0] - len(mine | set(votes)):  # else a full count took less than there was
            self.dropped_votes = dropped[1] - sum(self.votes.values())
        a, b = self.ring, [row._replace(time=self._near(row.time)) for row in other.ring]
        self.ring = []
        while a or b:
            self.ring.append((b if not a or (b and b[0].time < a[0].time) else a).pop(0))
        self._leave(items, self.ring_size)

    def migrate(self, book: Any) -> tuple["UserState", int, int]:
        """The state under another codebook of the same width: each leaf goes where its mean x is encoded, the prototype
        where there is no mean x -> the state, and how many leaves and votes have no x, as those that only vote."""
        options: dict[str, Any] = {
            "width": self.width,
            "leaves": self.most,
            "ring": self.ring_size,
            "half_life": self.half_life,
            "mean_x": self.mean_x,
        }
        made = UserState(book, **options, model_tag=self.model_tag, weighting=self.weighting)
        for name in ("epoch", "position", "revision", "seen", "absent", "dropped_leaves", "dropped_votes"):
            setattr(made, name, getattr(self, name))
        made.ring, lost, sums = list(self.ring), [0, 0], self.sums()
        x = self.book.prototypes(sums.codes) if sums.x is None else sums.x
        codes = encode(book, np.asarray(x, np.float32))
        for leaf, new, bias in zip(sorted(self.votes), codes, np.asarray(sums.bias), strict=True):
            if np.isneginf(bias):
                lost[0], lost[1] = lost[0] + 1, lost[1] + self.votes[leaf]
                continue
            at = int(book.leaves(new[None])[0])
            made.votes[at] = made.votes.get(at, 0) + self.votes[leaf]
            made.rows.setdefault(at, []).extend(self.rows[leaf])
        made.revision, made.migrated = made.revision + 1, self.migrated or bool(self.votes)
        return made, lost[0], lost[1]

    # ---- what is derived

    @property
    def fingerprint(self) -> int:
        return int(self.book.fingerprint)

    @property
    def options(self) -> tuple[int, bool, int]:
        return self.half_life, self.mean_x, self.weighting

    @staticmethod
    def _check(verb: str, pair: tuple[str, Any, Any]) -> None:
        name, expected, got = pair
        if expected != got:
            raise ValueError(f"{verb}: {name} expected {expected}, got {got}")

    def _decay(self, time: Any, now: int | None) -> Any:
        """The log of what time leaves of a weight, at `now` or else at the epoch."""
        since = np.asarray(time, np.int64) - ((self.epoch or 0) if now is None else now)
        return math.log(2) * since / self.half_life if self.half_life else 0.0 * since

    def sums(self, now: int | None = None) -> Histories:
        """The table: `leaf_sums` of its rows, with their votes."""
        every = [(leaf, row) for leaf in sorted(self.votes) for row in self.rows[leaf]]
        rows, levels, d = [row for _, row in every], len(self.book.sizes), self.book.centers[0].shape[1]
        codes = np.array([self._code(leaf) for leaf, _ in every], np.int32).reshape(-1, levels)
        bias = np.array([math.log(r.weight) if r.routed else -np.inf for r in rows])
        bias = bias + self._decay([r.time for r in rows], now)
        x = np.array([r.x for r in rows]).reshape(-1, d) if self.mean_x else None
        v = np.array([r.v for r in rows]).reshape(-1, self.width)
        ones = np.ones(len(rows), np.int64)  # so that no leaf is left out
        sums = leaf_sums(self.book, Histories(x, v, np.array([0, len(rows)]), codes, bias=bias, weights=ones))
        sums = sums._replace(weights=np.array([self.votes[leaf] for leaf in sorted(self.votes)], np.int64))
        return sums if self.mean_x else sums._replace(x=None, spread=None)

    def compress(self, *, now: int | None = None, **options: Any) -> Compressed:
        """`compress` of the table: agents of its votes, tokens by `route` over its sums."""
        return compress(self.book, self.sums(now), **options)

    def match(self, codes: Array, *, ids: Array = None, now: int | None = None) -> Match:
        """`match` of the table, for candidates of this user."""
        return match(self.book, self.sums(now), codes, np.array([0, len(codes if ids is None else ids)]), ids=ids)

    def recent(self, now: int | None = None) -> StateRecent:
        """The ring, the oldest first, and the shares of its rows and of the table in the mass of both."""
        w = np.array([row.weight for row in self.ring])
        time = np.array([row.time for row in self.ring], np.int64)
        ok = (w > 0) & (w < np.inf)
        bias = np.where(ok, np.log(np.where(ok, np.minimum(w, MOST_WEIGHT), 1.0)), -np.inf) + self._decay(time, now)
        table = logsumexp(self.sums(now).bias, 0)
        whole = np.logaddexp(logsumexp(bias, 0), table)
        whole = whole if whole > -np.inf else 0.0
        return StateRecent(np.array([row.id for row in self.ring], np.int64), time, bias - whole, float(table - whole))

    def stats(self, agents: Agents | None = None, before: Agents | None = None) -> StateStats:
        """outside: the share of votes at no leaf of `agents`; churn: the share of agents that are not in `before`."""
        total = sum(self.votes.values())
        mine, old = (
            [] if a is None else self.book.leaves(a.codes[0, : int(a.count[0])]).tolist() for a in (agents, before)
        )
        inside = sum(self.votes.get(leaf, 0) for leaf in set(mine))
        return StateStats(
            len(self.votes), len(self.ring), self.seen, total, self.absent / max(self.seen - len(self.ring), 1),
            self.dropped_leaves, self.dropped_votes,
            1 - inside / total if total and agents is not None else 0.0,
            len(set(mine) - set(old)) / len(mine) if mine and before is not None else 0.0,
        )  # fmt: skip

    def bound(self) -> Histories:
        """The largest |difference| of `sums` at the epoch, kept in float32 row by row, in x, v, bias and spread. A row
        moves a mean by its share of what is left, and shares are wrong by what the masses have been rounded by so far:
        n steps that lose a few units each, and n (1 + log n) by way of the shares. A merge is a step too."""
        sums, unit = self.sums(), 2.0**-24
        x, v, bias, spread = [], [], [], []
        for leaf, log_mass in zip(sorted(self.votes), sums.bias, strict=True):
            rows = [row for row in self.rows[leaf] if row.routed]
            n = len(rows) + 1
            lost = 8 * n * (2 + math.log(n)) * unit
            bias.append(4 * n * unit + 2 * unit * abs(log_mass) if rows else 0.0)
            v.append(lost * np.abs([row.v for row in rows]).max(0, initial=0.0) if rows else np.zeros(self.width))
            if self.mean_x:
                d = self.book.centers[0].shape[1]
                table = np.array([row.x for row in rows], float).reshape(-1, d)
                x.append(lost * np.abs(table).max(0, initial=0.0))
                far = 2 * np.sqrt(np.square(table).sum(1).max(initial=0.0))
                spread.append((lost + d * unit * n) * far**2 + 4 * n * far * np.sqrt(np.square(x[-1]).sum()))
        fields: list[Any] = [np.array(a).reshape(b.shape) for a, b in ((v, sums.v), (bias, sums.bias))]
        if not self.mean_x:
            return Histories(None, fields[0], bias=fields[1])
        return Histories(np.array(x).reshape(sums.x.shape), fields[0], bias=fields[1], spread=np.array(spread))
