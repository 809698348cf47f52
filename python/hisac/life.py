# SPDX-License-Identifier: Apache-2.0
"""A codebook's life: how it does on items, when it is due for a refit, what a refit moves, and the files that keep it
together with its items."""

import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import _core
from .arrays import check, is_torch, on_host, take_one
from .codebook import Codebook
from .fitting import source_of
from .types import Array, Drift, Health, LevelHealth, Migration

DUE = 1.25  # `drift`: a refit is due where new items have so many times the error that is to be expected


def sizes_for(items: int, levels: int = 2) -> tuple[int, ...]:
    """Sizes of a codebook whose leaves group so many items: powers of two, equal on each level, whose product is at
    most the number of items. Items stand close together, so far fewer leaves are in use, and each has several items.

    >>> sizes_for(5_000), sizes_for(300_000), sizes_for(300_000, 3)
    ((64, 64), (512, 512), (64, 64, 64))
    """
    return (2 ** max(1, min(20, int(math.log2(max(items, 1)) / levels))),) * levels


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
            interval of `ratio` is above it.

    Raises ValueError where the book has no report; TypeError.
    """
    report = check(book, Codebook, "drift: book").report
    if report is None:
        raise ValueError("drift: book expected with the report of its fit, got none")
    n, total, square = 0, np.zeros(book.levels), np.zeros(book.levels)
    for _, _, error in _read("drift", book, x):
        n, total, square = n + len(error), total + error.sum(0), square + np.square(error).sum(0)
    grown = [(report.rows + c) / (report.rows - c) if report.rows > c else math.inf for c in book.sizes]
    expected = np.cumprod(grown) * np.maximum(report.error, 1e-300)
    error = total / max(n, 1)
    spread = np.sqrt(np.maximum(square / max(n, 1) - error**2, 0) / max(n, 1))
    known = np.flatnonzero(np.isfinite(expected) & (np.asarray(report.error) > 0))
    at = int(known[-1]) if len(known) and n else -1
    ratio = float(error[at] / expected[at]) if at >= 0 else 0.0
    low = ratio - 1.96 * float(spread[at] / expected[at]) if at >= 0 else 0.0
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
    if health.levels[-1].error > 0.8 * health.variance:
        part = health.levels[-1].error / health.variance
        yield f"the codes leave {part:.0%} of the variance of x: fit more codes or one more level, or look at x"


def migrate(old: Codebook, new: Codebook, x: Any, *, votes: Array = None, honest: float = 0.9) -> Migration:
    """What becomes of codes when a codebook is replaced, as the items x [T, D] tell: an array, or chunks as for `fit`.

    A leaf of the old book is mapped to the leaf of the new one that most votes of its items go to, if these are at
    least the share `honest` of its votes; so is each code of each level. What is split more evenly, or has no item with
    votes, is not mapped. Ties go to the lower leaf. It compares numbers of codes, so `moved` means something for a book
    that `fit(init=old)` made; the maps do for any.

    Args:
        votes: [T] float32 or int64, how much each item counts, such as its purchases; 1 each without. Those not above 0
            or not finite are 0.

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
        weight = np.asarray(on_host(take_one("migrate", "votes", votes, "T")), np.float64)
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


class Bundle:
    """A codebook, and the ids, codes and x of items, in one folder, where they are known by the book's fingerprint.

    `append` encodes items that are new without a refit, and writes a part beside the others: no file changes. A part
    is written aside and renamed, so readers see it whole or not at all. A refit makes a new bundle. Items keep the
    order in which they came; one process at a time may append.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens a folder of `create`. Raises OSError; CorruptFileError where a part is of another book or damaged."""
        self.path = Path(path)
        self.book = Codebook.load(self.path / "book.safetensors")
        self._parts: list[Any] = []
        for i in range(len(list(self.path.glob("items-*.npz")))):
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
        """A new folder of a codebook and the items that it was fitted on, as `append` takes them. Raises OSError where
        the folder is there."""
        os.mkdir(path)
        check(book, Codebook, "Bundle: book").save(Path(path) / "book.safetensors")
        bundle = cls(path)
        bundle.append(ids, x)
        return bundle

    def append(self, ids: Array, x: Array) -> Array:
        """ids [n], integers or strings; x [n, D] float32 or float16 -> codes [n, L] int32 of items that are not there
        yet. Raises ValueError for an id that is, or that comes twice."""
        ids, x = np.asarray(ids), np.asarray(on_host(take_one("Bundle", "x", x, "T D")))
        if ids.ndim != 1 or len(ids) != len(x) or ids.dtype.kind not in "iuU":
            raise ValueError(f"Bundle: ids expected integers or strings [{len(x)}], got {ids.dtype} {list(ids.shape)}")
        names, times = np.unique(np.concatenate([*(part[0] for part in self._parts), ids]), return_counts=True)
        if (times > 1).any():
            raise ValueError(f"Bundle: ids expected once each, got {names[times > 1][0].item()!r} again")
        codes = self.book.encode(x)
        part = self.path / f"items-{len(self._parts)}.npz"
        aside = part.with_suffix(f".{os.getpid()}.part")
        with open(aside, "xb") as file:
            np.savez(file, ids=ids, codes=codes, x=x, fingerprint=np.uint64(self.book.fingerprint))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, part)
        self._parts.append([ids, codes, x])
        return codes

    ids = property(lambda self: np.concatenate([part[0] for part in self._parts]), doc="[T] of all items.")
    codes = property(lambda self: np.concatenate([part[1] for part in self._parts]), doc="[T, L] int32 of all items.")
    x = property(lambda self: np.concatenate([part[2] for part in self._parts]), doc="[T, D] of all items.")

    def drift(self, *, limit: float = DUE) -> Drift:
        """`hisac.drift` of the items that were appended."""
        return drift(self.book, [part[2] for part in self._parts[1:]], limit=limit)
