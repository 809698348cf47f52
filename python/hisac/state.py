# SPDX-License-Identifier: Apache-2.0
"""A user's state between requests: a leaf table and a ring of recent rows, on the CPU."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _core, candidates, verbs
from .arrays import FLOAT32, INT64, check, on_host, take, take_histories, whole
from .codebook import Codebook
from .types import Agents, Array, Compressed, Histories, Match, StateRecent, StateStats

_ITEMS = "x? items D, v items V, -, codes items L, -, -, x_scale?, -, -, -"
_EPOCH, _LAST = -(2**63), 2**63 - 1
Rows = tuple[Array, Array, Array]  # ids, weights and times; weights and times may be None
Kept = Rows | Callable[[Array], Rows | None]


class UserState:
    """One user's history, compressed, that follows every event. Its agents and tokens are derived, always fresh.

    A row of weight w (at most 2^40) and time t has, against the state's epoch E and with the half-life h,

        mass   w 2^((t - E) / h)
        votes  rint(2^12 w 2^((t - E) / h)); without a half-life rint(w): let weights be whole numbers there

    It first lies in the ring, and enters the table of leaves when `ring` later ones have come. Agents and tokens are
    those of the table: votes of its rows, to the bit, and `compress` with method="leaf". Rows of the ring are for
    `attend`, beside the tokens; see `recent`. Times are whole numbers in units of your own. Let a unit be a second:
    times 2^31 units and more from the epoch count as the farthest. A row is absent at once where its weight is not
    finite or not above 0, or its id is negative; and when it leaves the ring, where its code is invalid or its id
    outside the tables. One with a NaN in x, or a v that is not finite, votes, and is in no token.

    Every method that reads codes takes the codebook, and a method that moves rows takes `items`: Histories of which x,
    v, codes and x_scale are read, tables of items with v of the state's model_tag. In C++, hisac/state.h, a state is a
    view of bytes.

    Args:
        book: the codebook, of which the state keeps the fingerprint alone
        width: V
        leaves: S, the most leaves of the table. When it is full, a new leaf takes the place of the one with fewest
            votes, of equals the higher one
        ring: R, the most recent rows; 0: every row enters the table at once
        half_life: in units of time, up to 2^31 / 20 (3.4 years of seconds); 0: nothing decays
        mean_x: False: x of a leaf is its prototype; a leaf takes 4 (D + 1) bytes less
        model_tag: the version of v, 64 bits
        weighting: a number that you give to your rule of weights, 64 bits; states of another one do not merge

    Raises ValueError, TypeError.
    """

    def __init__(
        self, book: Codebook, *, width: int, leaves: int, ring: int = 0, half_life: int = 0, mean_x: bool = True,
        model_tag: int = 0, weighting: int = 0,
    ) -> None:  # fmt: skip
        given = (("width", width), ("leaves", leaves), ("ring", ring), ("half_life", half_life))
        sizes = [whole("UserState", name, n, 0, 2**40) for name, n in given]
        tags = (("model_tag", model_tag), ("weighting", weighting))
        numbers = [whole("UserState", name, n, 0, 2**64 - 1) for name, n in tags]
        core: Any = _core.UserState  # starred arguments do not go with its signature
        self._core: _core.UserState = core(_tree("UserState", book), *sizes, bool(mean_x), *numbers)

    @classmethod
    def _of(cls, core: _core.UserState) -> "UserState":
        state = cls.__new__(cls)
        state._core = core
        return state

    # ---- bytes

    @classmethod
    def from_bytes(cls, data: bytes) -> "UserState":
        """The state that these bytes are. Raises CorruptFileError: a checksum finds damage, but not intent, so sign the
        bytes where a store is not trusted."""
        return cls._of(_core.UserState.parse(bytes(memoryview(data))))

    def to_bytes(self, dtype: str = "float32") -> bytes:
        """The state as bytes, the same on every machine. "bfloat16" and "int8" (a scale for each row of x and of v) are
        for reading alone: an element is within 2^-8 of itself, or 1 / 252 of its row's largest."""
        return self._core.serialise(dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_bytes, (self.to_bytes(self.dtype),)

    # ---- rows

    def append(
        self, book: Codebook, items: Histories, ids: Array, *, weights: Array = None, times: Array = None,
        positions: Array = None, latest: int | None = None, model_tag: int = 0,
    ) -> None:  # fmt: skip
        """Events, the oldest first. One whose position is not above that of every earlier one changes nothing, so a log
        may deliver events again.

        Args:
            book: the codebook
            items: the tables
            ids: [n] int32 or int64, rows of the tables
            weights: [n] float32; None: 1
            times: [n] int64; None: 0
            positions: [n] int64; None: not checked
            latest: a later time counts as this one. Give the clock's time, so that no wrong time ages all that is there
            model_tag: that of v

        Raises ValueError, for another codebook or model_tag too, TypeError, NotImplementedError for a state that is for
        reading alone.
        """
        events = _events("append", ids, weights, times, positions)
        last = _LAST if latest is None else whole("append", "latest", latest, -(2**62), 2**62)
        self._core.append(_tree("append", book), _tables("append", items), events, last, model_tag)

    def expire(
        self, book: Codebook, items: Histories, now: int, *, age: int | None = None, least: int = 0, model_tag: int = 0
    ) -> None:
        """Rows at the front of the ring that are more than `age` older than `now` leave it; without an age the ring
        stays. Then leaves are dropped whose votes, shifted by the whole half-lives from the epoch to `now`, are below
        `least`."""
        age = -1 if age is None else whole("expire", "age", age, 0, 2**62)
        self._core.expire(_tree("expire", book), _tables("expire", items), _time(now), age, least, model_tag)

    def forget(
        self, book: Codebook, items: Histories, ids: Array, *, kept: Kept | None = None, whole: bool = False,
        model_tag: int = 0,
    ) -> None:  # fmt: skip
        """Behaviours with these ids leave the ring, and the leaves of their codes are made again of exactly the kept
        rows, as if these came now.

        An item's rows are looked for in the leaf of its present code. Where its code has changed since, ask for
        `whole`. After `migrate`, which maps leaves by their means, any row may lie in another leaf: there it is a
        ValueError not to ask for it.

        Args:
            book, items, model_tag: those of `append`
            ids: [n] int32 or int64
            kept: (ids, weights, times), as of `append`, of rows that have left the ring (`recent` says which have not),
                of which those of the leaf are read; or a function of a leaf's codes [L] that gives them, or None. Rows
                with `ids` are passed over. Without kept it is a ValueError that the table has a leaf of these codes
            whole: all leaves are made again, of kept, rows
        """
        tree, tables = _tree("forget", book), _tables("forget", items)
        (ids,) = take("forget", "ids n", ids)
        if callable(kept):
            kept = None if whole else self._kept(book, on_host(tables[2]), on_host(ids), kept)
        events = None if kept is None else _kept_rows(kept)
        self._core.forget(tree, tables, ids, events, bool(whole), model_tag)

    def _kept(self, book: Codebook, codes: Any, ids: Any, kept: Callable[[Array], Rows | None]) -> Rows:
        """What the function gives for the leaves that `forget` makes again, of each leaf its own rows alone."""
        ids = ids[(ids >= 0) & (ids < len(codes))]
        found, parts = book.leaves(codes[ids]), []
        for leaf in np.intersect1d(found, book.leaves(self.sums(book).codes)):
            given = kept(codes[ids[found == leaf][0]])
            if given is None:
                continue
            taken: Any = [None if a is None else on_host(a) for a in _kept_rows(given)[:3]]
            rows, weights, times = taken
            inside = (rows >= 0) & (rows < len(codes))
            here = inside & (book.leaves(codes[np.where(inside, rows, 0)]) == leaf)
            weights = np.ones(len(rows), FLOAT32) if weights is None else weights
            times = np.zeros(len(rows), INT64) if times is None else times
            for name, a in (("weights", weights), ("times", times)):
                if len(a) != len(rows):
                    raise ValueError(f"forget: {name} expected [{len(rows)}], got [{len(a)}]")
            parts.append((rows[here], weights[here], times[here]))
        none = np.zeros(0, INT64), np.zeros(0, FLOAT32), np.zeros(0, INT64)
        rows, weights, times = (np.concatenate([a, *(part[i] for part in parts)]) for i, a in enumerate(none))
        return rows, weights, times

    def merge(self, book: Codebook, other: "UserState", items: Histories, *, model_tag: int = 0) -> None:
        """Add another part of the same user's history, of the same log: votes to the bit, the later epoch and position,
        rings by time. A part that is merged twice counts twice. Of a full table those leaves stay that have more votes.
        A state that has seen no event changes nothing."""
        other = check(other, UserState, "merge: other")
        self._core.merge(_tree("merge", book), other._core, _tables("merge", items), model_tag)

    def migrate(self, book: Codebook, to: Codebook) -> tuple["UserState", int, int]:
        """The same state under another codebook of the same width: each leaf goes where its mean x is encoded, or its
        prototype where there is no mean x -> the state, and how many leaves, with how many votes, have no x, because
        none of their rows is routed. v stays: another model_tag is another state. `hisac.migrate`, which looks at a
        catalogue, is not needed for it."""
        made, leaves, votes = self._core.migrate(_tree("migrate", book), _tree("migrate", to))
        return self._of(made), leaves, votes

    # ---- what is derived

    def sums(self, book: Codebook, now: int | None = None) -> Histories:
        """The table as histories of one user, what `leaf_sums` makes of its rows, for `vote`, `route` and `match`. bias
        is the log of the mass at `now`, a time, or at the epoch."""
        found: Any = self._core.sums(_tree("sums", book), _time(now))
        x, v, codes, slots, v_slots, x_scale, bias, spread, votes = found
        if slots is not None:
            x, codes = x[slots], codes[slots]
        if v_slots is not None:
            v = v[v_slots]
        if x is not None and x.dtype == np.uint16:
            x = (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
        offsets = np.array([0, len(votes)])
        return Histories(x, v, offsets, codes, x_scale=x_scale, bias=bias, spread=spread, weights=votes)

    def compress(self, book: Codebook, *, now: int | None = None, **options: Any) -> Compressed:
        """`hisac.compress` of the table, with its options: agents of its votes, tokens over its sums. lse is of masses
        at `now`, or at the epoch."""
        made = verbs.compress(book, self.sums(book), **options)
        return made._replace(lse=self._decayed(made.lse, now))

    def match(self, book: Codebook, codes: Array, *, ids: Array = None, now: int | None = None) -> Match:
        """`hisac.match` of the table, for candidates of this user: codes [N, L], or a table with ids [N]."""
        offsets = np.array([0, len(codes if ids is None else ids)])
        found = candidates.match(book, self.sums(book), codes, offsets, ids=ids)
        return found._replace(lse=self._decayed(found.lse, now))

    def _decayed(self, lse: Array, now: int | None) -> Array:
        """lse at the epoch -> lse at `now`: all masses shrink by one factor."""
        half_life = self.params["half_life"]
        if now is None or not half_life:
            return lse
        return (lse - math.log(2) * (_time(now) - self.epoch) / half_life).astype(np.float32)

    def recent(self, now: int | None = None) -> StateRecent:
        """The ring, the oldest row first, and the shares of its rows and of the table in the mass of both. Rows of the
        ring are no part of the tokens: candidates attend to them beside these."""
        found: Any = self._core.recent(_time(now))
        return StateRecent(*found)

    def stats(self, book: Codebook, agents: Agents | None = None, before: Agents | None = None) -> StateStats:
        """What the state has come to. agents: those of `compress`, for `outside`; before: earlier ones, for `churn`."""

        def fields(given: Agents | None) -> tuple[Any, ...] | None:
            return None if given is None else (*take("stats", "codes, count", given.codes, given.count), given[3])

        found: Any = self._core.stats(_tree("stats", book), fields(agents), fields(before))
        return StateStats(*found)

    # ---- what it is

    @property
    def params(self) -> dict[str, Any]:
        """The arguments that it was made with, but the book."""
        names = ("width", "leaves", "ring", "half_life", "mean_x", "model_tag", "weighting")
        return dict(zip(names, self._core.params(), strict=True))

    @property
    def fingerprint(self) -> int:
        """Of the codebook."""
        return self._core.fingerprint

    @property
    def options(self) -> int:
        """A hash of the options that shape sums: half_life, mean_x, weighting."""
        return self._core.options

    @property
    def epoch(self) -> int:
        """What times are counted from."""
        return self._core.epoch

    @property
    def position(self) -> int:
        """Of the last event; -2^63 before the first."""
        return self._core.position

    @property
    def revision(self) -> int:
        """Grows by 1 with each append that takes an event, each expire of a state that has had a row, each forget, also
        one that fails midway, each merge of what has seen an event, and each migrate. Write a state only where the
        revision of the stored one is still that which was read."""
        return self._core.revision

    @property
    def migrated(self) -> bool:
        """Whether a leaf may have rows of items whose code is another one, since it was mapped by its mean."""
        return self._core.migrated

    @property
    def dtype(self) -> str:
        """float32; bfloat16 and int8 are for reading alone."""
        return self._core.dtype

    @property
    def nbytes(self) -> int:
        """Of memory, with room for all its leaves."""
        return self._core.nbytes


def _tree(verb: str, book: Codebook) -> _core.Codebook:
    return check(book, Codebook, f"{verb}: book")._core


def _time(now: int | None) -> int:
    return _EPOCH if now is None else whole("state", "now", now, -(2**62), 2**62)


def _tables(verb: str, items: Histories) -> tuple[Any, ...]:
    h = take_histories(verb, _ITEMS, items)
    return h.x, h.v, h.codes, h.x_scale


def _events(verb: str, *arrays: Any) -> tuple[Any, ...]:
    return take(verb, "ids n, weights? n, times? n, positions? n", *arrays)


def _kept_rows(kept: Any) -> tuple[Any, ...]:
    if not isinstance(kept, tuple | list) or len(kept) != 3:
        got = len(kept) if isinstance(kept, tuple | list) else type(kept).__name__
        raise ValueError(f"forget: kept expected (ids, weights, times), got {got}")
    return _events("forget", *kept, None)
