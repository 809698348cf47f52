# SPDX-License-Identifier: Apache-2.0
"""A codebook's life: how it does on items, when it is due for a refit, what a refit moves, and the files that keep it
together with its items. A day of it:

>>> import numpy as np, hisac, tempfile
>>> rng, folder = np.random.default_rng(0), tempfile.mkdtemp()
>>> x, later = rng.normal(size=(2000, 4)).astype("f4"), rng.normal(2, 1, (500, 4)).astype("f4")
>>> book = hisac.fit(x, hisac.sizes_for(len(x)))
>>> items = hisac.Bundle.create(f"{folder}/monday", book, np.arange(2000), x)
>>> codes = items.append(np.arange(2000, 2500), later)
>>> if items.drift().due:
...     new = hisac.fit(items.x, init=book)
...     items = hisac.Bundle.create(f"{folder}/tuesday", new, items.ids, items.x)
...     maps = hisac.migrate(book, new, items.x)  # maps.apply(codes): codes of new from codes of book
>>> len(items.ids), items.book == new, maps.items
(2500, True, 2500)
"""

import errno
import fcntl
import math
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from . import _core
from .arrays import check, dtype_name, is_torch, on_host, take_one, whole
from .codebook import Codebook
from .fitting import of_all_chunks, source_of
from .types import Array, Drift, Health, LevelHealth, Migration

UNFINISHED = re.compile(r"lock|items-0\.npz|items-0\..*\.part|\.hisac-.*\.part")  # what `create` writes before the book
DUE = 1.25  # `drift`: a refit is due where new items have so many times the error that is to be expected


def sizes_for(items: int, levels: int = 2) -> tuple[int, ...]:
    """Sizes of a codebook whose leaves group so many items: the largest powers of two, equal on each level, from 2 to
    2^20, whose product is at most the number of items; 2 where there are fewer than 2^levels items. Items stand close
    together, so far fewer leaves are in use, and each has several items. Raises ValueError, TypeError.

    >>> sizes_for(5_000), sizes_for(300_000), sizes_for(300_000, 3)
    ((64, 64), (512, 512), (64, 64, 64))
    """
    levels = whole("sizes_for", "levels", levels, 1, 8)
    bits = whole("sizes_for", "items", items, 0).bit_length() - 1
    return (2 ** max(1, min(20, bits // levels)),) * levels


def _read(verb: str, book: Codebook, x: Any) -> Iterator[tuple[Array, Array, Array]]:
    """(x float32, codes [n, L], square distances [n, L] after each level) of the rows of a source that have codes."""
    for chunk in source_of(verb, x)():
        codes = on_host(book.encode(chunk))
        here = (codes >= 0).all(1)
        rows = on_host(chunk.float()) if is_torch(chunk) else chunk.astype(np.float32)
        rest, codes, error = rows[here], codes[here], np.empty((int(here.sum()), book.levels))
        for level, center in enumerate(book.centers):
            rest = rest - center[codes[:, level]]
            error[:, level] = np.square(rest, dtype=np.float64).sum(1)
        yield rows, codes, error


def _quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t, to 2^-13 of it; above 4 degrees by an expansion at that of the normal."""
    if freedom <= 4:
        return (12.7062, 4.3027, 3.1824, 2.7764)[freedom - 1]
    z = 1.959964
    terms = [(z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384]
    terms.append((79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160)
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, 1))


def drift(book: Codebook, x: Any, *, limit: float = DUE) -> Drift:
    """How far items x that came after the fit are from their codes, against the items of the fit.

    A codebook is nearer to the items it was fitted on than to others of the same kind. With n items and C codes a
    level, the mean squared distance of others is (n + C) / (n - C) times as large where k-means has found the clusters.
    `expected` is the errors of the fit times this, level by level. A level with n <= C expects nothing: there and below
    it `expected` is infinite. `ratio` is that of error and expected at the last level where it is finite.

    Args:
        book: a codebook with the report of its fit.
        x: [T, D] the new items; or chunks, as `fit` takes them.
        limit: the ratio from which on a refit is due, if the items are enough to say so: the low end of the 95 %
            interval of `ratio`, by Student's t, is above it. It is -infinity where fewer than two items differ in
            their error, since nothing is known of the spread then.

    Raises ValueError where the book has no report; TypeError.
    """
    report = check(book, Codebook, "drift: book").report
    if report is None:
        raise ValueError("drift: book expected with the report of its fit, got none")
    n, total, square = 0, np.zeros(book.levels), np.zeros(book.levels)
    least, most = np.full(book.levels, np.inf), np.zeros(book.levels)
    for _, _, error in _read("drift", book, x):
        n, total, square = n + len(error), total + error.sum(0), square + np.square(error).sum(0)
        least, most = np.minimum(least, error.min(0, initial=np.inf)), np.maximum(most, error.max(0, initial=0))
    grown = [(report.rows + c) / (report.rows - c) if report.rows > c else math.inf for c in book.sizes]
    expected = np.cumprod(grown) * np.maximum(report.error, 1e-300)
    error = total / max(n, 1)
    spread = np.sqrt(np.maximum(square / max(n, 1) - error**2, 0) / max(n - 1, 1))
    known = np.flatnonzero(np.isfinite(expected) & (np.asarray(report.error) > 0))
    at = int(known[-1]) if len(known) and n else -1
    ratio = float(error[at] / expected[at]) if at >= 0 else 0.0
    differ = at >= 0 and bool(least[at] < most[at])
    low = ratio - _quantile(n - 1) * float(spread[at] / expected[at]) if differ else -math.inf
    return Drift(n, tuple(error.tolist()), tuple(expected.tolist()), ratio, low, low > limit)


def health(book: Codebook, x: Any) -> Health:
    """How a codebook does on items x [T, D], or on chunks as `fit` takes them, with warnings that say what to do.

    A warning is given where nearly all items are alone in their leaf, so that votes cannot group them; where a level is
    collapsed, so that its codes tell little apart; where codes are dead; where the codes explain little of x; and where
    rows have no codes. Rows without codes count in `absent` alone. Memory: 4 L + 16 bytes a row.

    Raises ValueError where no row has codes; TypeError.
    """
    check(book, Codebook, "health: book")
    every, marks, rows, first = [], [], 0, None
    total, square, error = np.zeros(book.width), 0.0, np.zeros(book.levels)
    factors = np.random.default_rng(0).integers(0, 2**63, book.width, np.uint64) * np.uint64(2) + np.uint64(1)
    for x_rows, codes, errors in _read("health", book, x):
        rows += len(x_rows)
        kept = x_rows[np.isfinite(x_rows).all(1)] + np.float32(0)
        every.append(codes)
        bits = kept.view(np.uint32).astype(np.uint64)
        marks.append(((bits ^ bits << np.uint64(31)) * factors).sum(1, dtype=np.uint64))
        first = kept[0].astype(np.float64) if first is None and len(kept) else first
        away = kept - (0.0 if first is None else first)
        total, square, error = total + away.sum(0), square + float(np.square(away).sum()), error + errors.sum(0)
    n = sum(map(len, every))
    if not n:
        raise ValueError("health: x expected a row without NaN and infinity, got none")
    codes, mark = np.concatenate(every), np.concatenate(marks)
    variance = max(square / n - float(np.square(total / n).sum()), 0.0)
    levels = []
    for level, size in enumerate(book.sizes):
        share = np.sort(np.bincount(codes[:, level], minlength=size))[::-1] / n
        used = share[share > 0]
        effective = float(np.exp(-(used * np.log(used)).sum()))
        levels.append(LevelHealth(size, len(used), effective, float(share[0]), float(error[level] / n)))
    leaf = np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)
    distinct = leaf[np.unique(mark, return_index=True)[1]]
    per_leaf, per_distinct = np.bincount(leaf), np.bincount(distinct)
    shared, shared_distinct = (float(k[k > 1].sum() / k.sum()) for k in (per_leaf, per_distinct))
    spread = (float(per_leaf.mean()), float(np.median(per_leaf)), int(per_leaf.max()))
    found = Health(
        n, rows - n, variance, tuple(levels), len(per_leaf), spread, shared, len(distinct), shared_distinct, ()
    )
    return found._replace(warnings=tuple(_warnings(found)))


def _warnings(health: Health) -> Iterator[str]:
    rule = " x ".join(map(str, sizes_for(health.distinct, len(health.levels))))
    if health.absent:
        yield f"{health.absent:,} rows have a NaN or an infinity and no codes: repair them where x is made"
    if health.distinct > 1 and health.shared_distinct < 0.5:
        yield (
            f"{1 - health.shared_distinct:.0%} of the distinct items are alone in their leaf, so votes cannot group"
            f" them: fit smaller sizes, such as {rule} (hisac.sizes_for)"
        )
    for number, level in enumerate(health.levels, 1):
        if level.size > 1 and (level.most > 0.5 or level.effective < level.size / 10):
            yield (
                f"level {number} is collapsed: its {level.size} codes tell apart as few as {level.effective:.1f} evenly"
                f" used ones, and one has {level.most:.0%} of the items: center x, scale its rows to one length, drop"
                " copies of an item, or fit fewer codes"
            )
        elif level.used < 0.9 * level.size:
            yield f"level {number} has {level.size - level.used} dead codes of {level.size}: fit {level.used} or fewer"
    if health.levels[-1].error > 0.8 * health.variance > 0:
        part = health.levels[-1].error / health.variance
        yield f"the codes leave {part:.0%} of the variance of x: fit more codes or one more level, or look at x"


def migrate(old: Codebook, new: Codebook, x: Any, *, votes: Array = None, honest: float = 0.9) -> Migration:
    """What becomes of codes when a codebook is replaced, as the items x [T, D] tell: an array, or chunks as for `fit`.

    A leaf of the old book is mapped to the leaf of the new one that most votes of its items go to, if these are at
    least the share `honest` of its votes; so is each code of each level. What is split more evenly, or has no item with
    votes, is not mapped. Ties go to the lower leaf. It compares numbers of codes, so `moved` means something for a book
    that `fit(init=old)` made; the maps do for any.

    The maps are for what was stored by codes alone, without x. `UserState.migrate` is another thing and does not use
    them: a state keeps a mean x of each leaf, and encodes it by the new book.

    Args:
        votes: [T] float32 or int64, how much each item counts, such as its purchases, one array of all chunks together;
            1 each without. Those not above 0 or not finite are 0.

    Raises ValueError where D differs, or where votes are not [T]; TypeError.
    """
    for name, book in (("old", old), ("new", new)):
        check(book, Codebook, f"migrate: {name}")
    if old.width != new.width:
        raise ValueError(f"migrate: new expected D = {old.width}, as old, got {new.width}")
    pairs = [[on_host(book.encode(chunk)) for book in (old, new)] for chunk in source_of("migrate", x)()]
    empty = [np.empty((0, book.levels), np.int32) for book in (old, new)]
    before, after = (np.concatenate([empty[i], *(pair[i] for pair in pairs)]) for i in range(2))
    weight = np.ones(len(before))
    if votes is not None:
        weight = np.asarray(on_host(of_all_chunks("migrate", "votes", votes)), np.float64)
        if len(weight) != len(before):
            raise ValueError(f"migrate: votes expected [{len(before)}], got [{len(weight)}]")
        weight = np.where((weight > 0) & np.isfinite(weight), weight, 0.0)
    here = (before >= 0).all(1) & (after >= 0).all(1)
    before, after, weight = before[here], after[here], weight[here]
    leaves, to = _majority(before, after, weight, honest)
    codes = []
    for level in range(min(old.levels, new.levels)):
        found, successor = _majority(before[:, [level]], after[:, [level]], weight, honest)
        full = np.full(old.sizes[level], -1, np.int32)
        full[found[:, 0]] = successor[:, 0]
        codes.append(full)
    both = min(old.levels, new.levels)
    moved = np.logical_or.accumulate(before[:, :both] != after[:, :both], axis=1)
    part = Migration(len(before), tuple(codes), leaves, to, (), (), 0.0, 0.0)
    lost = (part.apply(before) < 0).any(1)
    even = np.ones(len(before))
    shares = [[float(w @ of / w.sum()) if w.sum() else 0.0 for of in (*moved.T, lost)] for w in (even, weight)]
    (*items, lost_items), (*voted, lost_votes) = shares
    return part._replace(
        moved_items=tuple(items), moved_votes=tuple(voted), lost_items=lost_items, lost_votes=lost_votes
    )


def _majority(a: Array, b: Array, weight: Array, honest: float) -> tuple[Array, Array]:
    """(the distinct rows of a, the row of b that most of the weight beside it has, or -1 where it is not enough)."""
    keys, k = np.unique(a, axis=0, return_inverse=True)
    ends, e = np.unique(b, axis=0, return_inverse=True)
    pair, p = np.unique(k.reshape(-1) * len(ends) + e.reshape(-1), return_inverse=True)
    of_pair, total = np.bincount(p, weight, len(pair)), np.bincount(k.reshape(-1), weight, len(keys))
    owner = pair // max(len(ends), 1)
    order = np.lexsort((pair, -of_pair, owner))
    best = order[np.searchsorted(owner[order], np.arange(len(keys)))]
    good = (of_pair[best] >= honest * total) & (total > 0)
    return keys, np.where(good[:, None], ends[pair[best] % max(len(ends), 1)], np.int32(-1))


def _type(a: Array) -> str:
    return "strings" if a.dtype.kind == "U" else str(a.dtype)


class Bundle:
    """A codebook, and the ids, codes and x of items, in one folder, where they are known by the book's fingerprint.

    `append` encodes items that are new without a refit, and writes a part beside the others: no file changes. A part
    is written aside and linked to its name, so readers see it whole or not at all, and it never takes another's place.
    Processes that append at once take turns, by a lock (flock) of the file `lock`; what one that was killed left aside,
    the next removes. A bundle has the items there were when it was opened, or appended last. A refit makes a new
    bundle. Items keep the order in which they came, and the types that ids and x of the first ones have.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens a folder of `create`. Raises OSError; CorruptFileError where a part is of another book or damaged."""
        self.path = Path(path)
        self.book = Codebook.load(self.path / "book.safetensors")
        self._parts: list[Any] = []
        self._see()
        if not self._parts:
            raise _core.CorruptFileError(f"{self.path}: expected items-0.npz, got no items")

    def _see(self) -> None:
        """Reads the parts that are new."""
        for i in range(len(self._parts), len(list(self.path.glob("items-*.npz")))):
            name = self.path / f"items-{i}.npz"
            try:
                with np.load(name, allow_pickle=False) as file:
                    part = [file[key] for key in ("ids", "codes", "x", "fingerprint")]
            except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise _core.CorruptFileError(f"{name}: {error}") from error
            if (mark := f"{int(part[3]):016x}") != f"{self.book.fingerprint:016x}":
                raise _core.CorruptFileError(f"{name}: expected items of {self.book}, got of {mark}")
            self._parts.append(part[:3])

    @classmethod
    def create(cls, path: str | os.PathLike[str], book: Codebook, ids: Array, x: Array) -> "Bundle":
        """A new folder of a codebook and the items that it was fitted on, as `append` takes them. The book is written
        last: a folder without it is one that a killed `create` left, and is taken over. Raises OSError where the folder
        is there with anything else."""
        bundle = cls.__new__(cls)
        bundle.path, bundle.book, bundle._parts = Path(path), check(book, Codebook, "Bundle: book"), []
        part = bundle._part(ids, x)
        bundle.path.mkdir(exist_ok=True)
        bundle._refuse_others()
        with bundle._alone():
            bundle._refuse_others()
            (bundle.path / "items-0.npz").unlink(missing_ok=True)
            bundle._write(part)
            book.save(bundle.path / "book.safetensors")
        return bundle

    def _refuse_others(self) -> None:
        """Raises FileExistsError where the folder has more than a `create` that was killed left."""
        if not all(UNFINISHED.fullmatch(name) for name in os.listdir(self.path)):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.path))

    def append(self, ids: Array, x: Array) -> Array:
        """ids [n], integers or strings; x [n, D] float32 or float16 -> codes [n, L] int32 of items that are not there
        yet. Raises ValueError for an id that is, or that comes twice; TypeError for ids or x of another type than those
        of the first items; OSError."""
        with self._alone():
            self._see()
            part = self._part(ids, x)
            self._write(part)
        return part[1]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits until no other process writes, and removes what killed ones left aside."""
        with open(self.path / "lock", "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for left in self.path.glob("items-*.part"):
                left.unlink(missing_ok=True)
            yield

    def _part(self, ids: Array, x: Array) -> list[Any]:
        """(ids, codes, x) of new items."""
        x = take_one("Bundle", "x", x, "T D")
        if dtype_name(x) not in ("float32", "float16"):
            raise TypeError(f"Bundle: x expected float32 or float16 [T, D], got {dtype_name(x)}")
        ids, x = np.asarray(ids), on_host(x)
        first = next((part for part in self._parts if len(part[0])), None)
        if ids.size == 0:
            ids = ids.astype(first[0].dtype if first else np.int64)
        elif ids.dtype.kind in "OT" and all(isinstance(one, str) for one in ids.reshape(-1).tolist()):
            ids = ids.astype(np.str_)
        if ids.ndim != 1 or len(ids) != len(x) or ids.dtype.kind not in "iuU":
            raise ValueError(f"Bundle: ids expected integers or strings [{len(x)}], got {ids.dtype} {list(ids.shape)}")
        for name, new, old in (("ids", ids, first and first[0]), ("x", x, first and first[2])):
            if old is not None and len(new) and _type(new) != _type(old):
                raise TypeError(f"Bundle: {name} expected {_type(old)}, as of its first items, got {_type(new)}")
        names, times = np.unique(np.concatenate([*self._filled(0), ids]), return_counts=True)
        if (times > 1).any():
            raise ValueError(f"Bundle: ids expected once each, got {names[times > 1][0].item()!r} again")
        return [ids, self.book.encode(x), x]

    def _write(self, part: list[Any]) -> None:
        name = self.path / f"items-{len(self._parts)}.npz"
        aside = name.with_suffix(f".{os.getpid()}.part")
        try:
            with open(aside, "xb") as file:
                fields = dict(zip(("ids", "codes", "x"), part, strict=True))
                np.savez(file, **fields, fingerprint=np.uint64(self.book.fingerprint))
                file.flush()
                os.fsync(file.fileno())
            os.link(aside, name)
        finally:
            aside.unlink(missing_ok=True)
        self._parts.append(part)

    def _filled(self, field: int) -> list[Array]:
        """ids, codes or x of the parts with items."""
        return [part[field] for part in self._parts if len(part[0])]

    def _all(self, field: int) -> Array:
        return np.concatenate(self._filled(field) or [self._parts[0][field]])

    ids = property(lambda self: self._all(0), doc="[T] of all items.")
    codes = property(lambda self: self._all(1), doc="[T, L] int32 of all items.")
    x = property(lambda self: self._all(2), doc="[T, D] of all items.")

    def drift(self, *, limit: float = DUE) -> Drift:
        """`hisac.drift` of the items that were appended."""
        return drift(self.book, [part[2] for part in self._parts[1:]], limit=limit)
