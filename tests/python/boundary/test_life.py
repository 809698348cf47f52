# SPDX-License-Identifier: Apache-2.0
"""A codebook's life: warm starts, migrations, drift, health and bundles, each against a count by hand."""

import threading
from collections import Counter, defaultdict

import numpy as np
import pytest

import hisac
from hisac import CorruptFileError, reference

NAN = np.float32("nan")


def items(n, seed, *, scatter=0.3, shift=0.0):
    """Items near 60 places, the same for every seed."""
    places = np.random.default_rng(0).normal(size=(60, 6))
    rng = np.random.default_rng(seed)
    return (places[rng.integers(0, 60, n)] + scatter * rng.normal(size=(n, 6)) + shift).astype(np.float32)


X = items(2000, 1)
OLD = hisac.fit(X, (16, 8))


# ------------------------------------------------------------------------------------------------------- warm start


def test_a_warm_start_keeps_the_codes_in_order():
    day = np.concatenate([X[:1960], items(40, 2)])
    warm = hisac.fit(day, init=OLD)
    assert warm.sizes == OLD.sizes and max(warm.report.iterations) <= 5
    before, after = OLD.encode(day), warm.encode(day)
    moved = np.logical_or.accumulate(before != after, axis=1).sum(0)
    assert warm.moved == (
        tuple(int((a != b).any(1).sum()) for a, b in zip(OLD.centers, warm.centers, strict=True)),
        tuple(moved.tolist()),
        2000,
    )
    cold = hisac.fit(day, OLD.sizes, seed=1)
    assert moved[0] < 200 < 1500 < (before[:, 0] != cold.encode(day)[:, 0]).sum()
    assert OLD.moved is None and cold.moved is None


def test_a_warm_start_from_the_end_moves_nothing():
    end = hisac.fit(X, (16, 8), iterations=300)
    again = hisac.fit(X, init=end)
    assert again == end and again.moved == ((0, 0), (0, 0), 2000) and again.report.iterations == (1, 1)
    assert hisac.fit(np.r_[X, X[:1] * NAN], init=end).moved.rows == 2000


# -------------------------------------------------------------------------------------------------------- migration


def by_hand(before, after, votes, honest):
    """{old row: new row, or -1s} of the votes of both."""
    found = defaultdict(Counter)
    for a, b, w in zip(map(tuple, before.tolist()), map(tuple, after.tolist()), votes.tolist(), strict=True):
        found[a][b] += w
    for a, to in found.items():
        best = min(to, key=lambda b: (-to[b], b))
        yield a, best if to[best] > 0 and to[best] >= honest * sum(to.values()) else (-1,) * after.shape[1]


@pytest.mark.parametrize("honest", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("sizes", [(16, 8), (16,), (7, 5, 3)])
@pytest.mark.parametrize("voted", [False, True])
def test_migrate(honest, sizes, voted):
    x = np.concatenate([X[:700], np.full((1, 6), NAN, np.float32)])
    new = hisac.fit(X, sizes, seed=3)
    votes = np.random.default_rng(4).integers(-1, 6, 701).astype(np.float32) if voted else None
    if voted:
        votes[:2] = [NAN, np.inf]
    found = hisac.migrate(OLD, new, [x[:300], x[300:]], votes=votes, honest=honest)
    counted = np.ones(700) if votes is None else np.where(np.isfinite(votes[:700]) & (votes[:700] > 0), votes[:700], 0)
    before, after = OLD.encode(x[:700]), new.encode(x[:700])
    wanted = dict(by_hand(before, after, counted, honest))
    assert found.items == 700
    assert dict(zip(map(tuple, found.leaves.tolist()), map(tuple, found.to.tolist()), strict=True)) == wanted
    assert found.leaves.tolist() == sorted(found.leaves.tolist())
    for level, of_level in enumerate(found.codes):
        one = dict(by_hand(before[:, [level]], after[:, [level]], counted, honest))
        assert of_level.tolist() == [one.get((c,), (-1,))[0] for c in range(OLD.sizes[level])]
    both = min(2, len(sizes))
    moved = np.logical_or.accumulate(before[:, :both] != after[:, :both], axis=1)
    lost = np.array([wanted[tuple(row)][0] < 0 for row in before.tolist()])
    np.testing.assert_allclose(found.moved_items, moved.mean(0))
    np.testing.assert_allclose(found.moved_votes, counted @ moved / counted.sum())
    np.testing.assert_allclose([found.lost_items, found.lost_votes], [lost.mean(), counted @ lost / counted.sum()])
    codes = np.stack([before[:4], np.full((4, 2), -1), np.full((4, 2), 10**6)])
    assert found.apply(codes).shape == (3, 4, len(sizes))
    assert found.apply(codes)[0].tolist() == [list(wanted[tuple(row)]) for row in before[:4].tolist()]
    assert (found.apply(codes)[1:] == -1).all()


def test_migrate_of_nothing():
    found = hisac.migrate(OLD, OLD, X[:0])
    assert found.items == 0 and found.moved_items == (0, 0) and found.lost_items == 0
    assert found.apply(np.zeros((3, 2), np.int32)).tolist() == [[-1, -1]] * 3
    same = hisac.migrate(OLD, OLD, X, votes=np.arange(2000))
    assert same.moved_votes == (0, 0) and same.lost_votes == 0 and (same.leaves == same.to).all()


# ------------------------------------------------------------------------------------------------------------- drift


def test_drift_tells_other_items_from_more_of_the_same():
    same, few, far = (hisac.drift(OLD, items(n, 5, shift=s)) for n, s in ((1500, 0), (5, 0), (1500, 1.0)))
    assert abs(same.ratio - 1) < 0.1 and not same.due and not few.due
    assert far.due and far.ratio > 1.5 and far.low > hisac.life.DUE
    assert hisac.drift(OLD, items(1500, 5), limit=0.5).due
    x = items(1500, 5)
    error = np.square(x.astype(np.float64) - OLD.prototypes(OLD.encode(x))).sum(1)
    np.testing.assert_allclose(same.error[-1], error.mean(), rtol=1e-6)
    growth = (2000 + 16) / (2000 - 16) * (2000 + 8) / (2000 - 8)
    np.testing.assert_allclose(same.expected[-1], OLD.report.error[-1] * growth)
    assert same.ratio - same.low == pytest.approx(1.96155 * error.std(ddof=1) / 1500**0.5 / same.expected[-1], rel=1e-5)
    assert hisac.drift(OLD, np.r_[x, x[:3] * NAN]) == same
    halves = hisac.drift(OLD, lambda: iter(np.split(x, [7, 7, 900])))
    np.testing.assert_allclose(halves.error, same.error)


def test_drift_of_a_few_items():
    """One, or copies of one, say nothing of how items differ."""
    x = items(40, 5, shift=2.0)
    for few in (x[:1], x[[0] * 7], [x[:1], x[:1]]):
        found = hisac.drift(OLD, few)
        assert found.ratio > 1 and found.low == -np.inf and not found.due
    for n, quantile in (
        (2, 12.70620),
        (3, 4.30265),
        (5, 2.77645),
        (6, 2.57058),
        (7, 2.44691),
        (11, 2.22814),
        (31, 2.04227),
    ):
        found = hisac.drift(OLD, x[:n])
        error = np.square(x[:n].astype(np.float64) - OLD.prototypes(OLD.encode(x[:n]))).sum(1)
        width = quantile * error.std(ddof=1) / n**0.5 / found.expected[-1]
        assert found.ratio - found.low == pytest.approx(width, rel=2**-13)


def test_drift_without_anything_to_expect():
    alone = hisac.fit(X[:20], (4, 64))  # more codes than items
    found = hisac.drift(alone, X[20:])
    assert found.expected[1] == np.inf and found.ratio == found.error[0] / found.expected[0]
    nothing = hisac.drift(OLD, X[:0])
    assert nothing.items == 0 and nothing.ratio == 0 and not nothing.due
    with pytest.raises(ValueError, match="drift: book expected with the report of its fit, got none"):
        hisac.drift(hisac.Codebook(OLD.centers), X)


# ------------------------------------------------------------------------------------------------------------ health


def test_health_counts_what_is_there():
    x = np.concatenate([X[:500], X[:100], np.full((2, 6), NAN, np.float32), -0.0 * X[:2], 0 * X[:1]])
    found = hisac.health(OLD, [x[:130], x[130:130], x[130:]])
    here = np.isfinite(x).all(1)
    codes = OLD.encode(x)[here]
    leaves = Counter(map(tuple, codes.tolist()))
    apart = Counter(map(tuple, OLD.encode(np.unique(x[here] + 0, axis=0)).tolist()))
    assert (found.rows, found.absent, found.leaves, found.distinct) == (603, 2, len(leaves), 501)
    sizes = list(leaves.values())
    assert found.rows_a_leaf == (pytest.approx(np.mean(sizes)), np.median(sizes), max(sizes))
    assert found.shared == pytest.approx(sum(n for n in sizes if n > 1) / 603)
    assert found.shared_distinct == pytest.approx(sum(n for n in apart.values() if n > 1) / 501)
    assert found.variance == pytest.approx(np.square(x[here] - x[here].mean(0, np.float64)).sum(1).mean())
    rest = x[here].astype(np.float64)
    for number, level in enumerate(found.levels):
        share = np.bincount(codes[:, number], minlength=OLD.sizes[number]) / 603
        rest = rest - OLD.centers[number][codes[:, number]]
        assert level.size == OLD.sizes[number] and level.used == (share > 0).sum() and level.most == share.max()
        assert level.effective == pytest.approx(np.exp(-sum(p * np.log(p) for p in share if p)))
        assert level.error == pytest.approx(np.square(rest).sum(1).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("x", "sizes", "text"),
    [
        (X, (16, 8), None),
        (
            items(3000, 1, scatter=3.0),
            (256, 256),
            "are alone in their leaf, so votes cannot group them: fit smaller sizes",
        ),
        (
            np.r_[X[:5], np.zeros((995, 6), np.float32)],
            (4,),
            "level 1 is collapsed: its 4 codes tell apart as few as 1.0",
        ),
        (np.repeat(X[:12], 30, 0), (16,), "level 1 has 4 dead codes of 16: fit 12 or fewer"),
        (np.random.default_rng(0).normal(size=(4000, 200)).astype(np.float32), (4,), "leave 99% of the variance of x"),
        (np.r_[X, X[:9] * NAN], (16, 8), "9 rows have a NaN or an infinity and no codes"),
    ],
)
def test_health_warns(x, sizes, text):
    warnings = hisac.health(hisac.fit(x, sizes), x).warnings
    assert sum(str(text) in warning for warning in warnings) == (text is not None)
    assert warnings == () if text is None else len(warnings) <= 2


def test_the_rule_of_sizes_makes_leaves_that_group():
    assert [hisac.sizes_for(n) for n in (0, 3, 300_000, 2**60)] == [(2, 2), (2, 2), (512, 512), (2**20, 2**20)]
    for levels in (1, 2, 3, 8):
        for items_ in {2**bits + more for bits in range(levels, 58) for more in (-1, 0, 1)}:
            size, *others = hisac.sizes_for(items_, levels)
            assert others == [size] * (levels - 1)
            assert size == 2 or size**levels <= items_
            assert size == 2**20 or (2 * size) ** levels > items_
    x = items(6000, 3)
    found = hisac.health(hisac.fit(x, hisac.sizes_for(6000)), x)
    assert found.shared_distinct > 0.7 and not found.warnings


def test_health_of_one_row():
    for x in (X[:1] + 1, np.repeat(X[:1] + 1, 9, 0)):
        found = hisac.health(OLD, x)
        assert found.variance == 0 and found.levels[-1].error > 0 and found.distinct == found.leaves == 1
        assert all("is collapsed" in warning for warning in found.warnings)


def test_health_of_no_row():
    with pytest.raises(ValueError, match="health: x expected a row without NaN and infinity, got none"):
        hisac.health(OLD, X * NAN)


# ----------------------------------------------------------------------------------------------------------- bundles


@pytest.mark.parametrize("kind", [np.int64, str])
def test_a_bundle_grows(tmp_path, kind):
    ids, later = np.arange(2000).astype(kind), items(300, 6)
    made = hisac.Bundle.create(tmp_path / "b", OLD, ids, X)
    seen = hisac.Bundle(tmp_path / "b")
    codes = made.append(np.arange(5000, 5300).astype(kind), later)
    np.testing.assert_array_equal(codes, reference.encode(OLD, later))
    opened = hisac.Bundle(tmp_path / "b")
    for bundle in (made, opened):
        assert bundle.book == OLD and bundle.book.report == OLD.report
        assert bundle.ids.tolist() == [*ids.tolist(), *np.arange(5000, 5300).astype(kind).tolist()]
        np.testing.assert_array_equal(bundle.codes, OLD.encode(np.concatenate([X, later])))
        np.testing.assert_array_equal(bundle.x, np.concatenate([X, later]))
        assert bundle.drift() == hisac.drift(OLD, later)
    assert len(seen.ids) == 2000 and not list((tmp_path / "b").glob("*.part"))
    for again in (ids[:1], np.array([7000, 7000]).astype(kind)):
        with pytest.raises(ValueError, match="Bundle: ids expected once each, got ") as error:
            opened.append(again, later[: len(again)])
        assert str(error.value).endswith(f"got {again[0].item()!r} again")
    with pytest.raises(ValueError, match=r"Bundle: ids expected integers or strings \[300\], got .* \[2\]"):
        opened.append(ids[:2], later)
    with pytest.raises(FileExistsError):
        hisac.Bundle.create(tmp_path / "b", OLD, ids, X)


def test_two_handles_of_a_bundle_append_after_one_another(tmp_path, monkeypatch):
    first = hisac.Bundle.create(tmp_path / "b", OLD, [1], X[:1])
    second = hisac.Bundle(tmp_path / "b")
    second.append([2], X[1:2])
    with pytest.raises(ValueError, match="Bundle: ids expected once each, got 2 again"):
        first.append([2], X[2:3])
    first.append([3], X[2:3])
    assert first.ids.tolist() == hisac.Bundle(tmp_path / "b").ids.tolist() == [1, 2, 3]
    assert second.ids.tolist() == [1, 2]
    # even where nothing makes them take turns, no part takes another's place
    monkeypatch.setattr(second, "_see", lambda: None)
    with pytest.raises(FileExistsError):
        second.append([4], X[3:4])
    assert hisac.Bundle(tmp_path / "b").ids.tolist() == [1, 2, 3] and not list((tmp_path / "b").glob("*.part"))


def test_many_append_at_once(tmp_path):
    hisac.Bundle.create(tmp_path / "b", OLD, [-1], X[:1])

    def work(number):
        bundle = hisac.Bundle(tmp_path / "b")
        for i in range(number, 40, 4):
            bundle.append([i], X[i : i + 1])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bundle = hisac.Bundle(tmp_path / "b")
    assert sorted(bundle.ids.tolist()) == list(range(-1, 40))
    np.testing.assert_array_equal(bundle.x[1:], X[bundle.ids[1:]])


def test_what_killed_processes_leave(tmp_path):
    for name in ("items-0.npz", "items-0.77.part", ".hisac-0123456789abcdef.part", "lock"):  # of `create`
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / name).write_bytes(b"torn")
    with pytest.raises(OSError, match=r"book\.safetensors"):
        hisac.Bundle(tmp_path / "b")
    bundle = hisac.Bundle.create(tmp_path / "b", OLD, [1], X[:1])
    (tmp_path / "b/items-1.77.part").write_bytes(b"torn")  # of `append`
    bundle.append([2], X[1:2])
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == {"book.safetensors", "items-0.npz", "items-1.npz", "lock"}
    assert hisac.Bundle(tmp_path / "b").ids.tolist() == [1, 2]
    (tmp_path / "b/items-0.npz").unlink()
    (tmp_path / "b/items-1.npz").unlink()
    with pytest.raises(CorruptFileError, match=r"expected items-0\.npz, got no items"):
        hisac.Bundle(tmp_path / "b")


def test_a_create_that_fails_leaves_nothing(tmp_path):
    for book, ids, x in ((OLD, [1, 1], X[:2]), ("no", [1, 2], X[:2]), (OLD, [1, 2], X[:2, :3]), (OLD, [1], X[:2])):
        with pytest.raises((ValueError, TypeError)):
            hisac.Bundle.create(tmp_path / "b", book, ids, x)
        assert not (tmp_path / "b").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine").write_bytes(b"")
    with pytest.raises(FileExistsError):
        hisac.Bundle.create(tmp_path / "b", OLD, [1], X[:1])
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine"]


U64, TEXT = np.array([2**63 + 1], np.uint64), np.array(["a"], object)


@pytest.mark.parametrize(
    ("first", "more", "text"),
    [
        (U64, [1], "ids expected uint64, as of its first items, got int64"),
        ([1], U64, "ids expected int64, as of its first items, got uint64"),
        ([1], np.array([2], np.int32), "ids expected int64, as of its first items, got int32"),
        ([1], ["zz"], "ids expected int64, as of its first items, got strings"),
        (["1"], [2], "ids expected strings, as of its first items, got int64"),
        (U64, U64 + np.uint64(2), None),
        (["a"], ["longer"], None),
        (TEXT, np.array(["longer"], object), None),
    ],
)
def test_ids_keep_their_type(tmp_path, first, more, text):
    for name, begin in (("a", lambda path: hisac.Bundle.create(path, OLD, first, X[:1])), ("b", None)):
        if begin is None:  # the first items may come later
            bundle = hisac.Bundle.create(tmp_path / name, OLD, [], X[:0])
            bundle.append(first, X[:1])
        else:
            bundle = begin(tmp_path / name)
        bundle.append([], X[:0])
        if text:
            with pytest.raises(TypeError) as error:
                bundle.append(more, X[1:2])
            assert str(error.value) == f"Bundle: {text}"
        else:
            bundle.append(more, X[1:2])
        for seen in (bundle, hisac.Bundle(tmp_path / name)):
            assert seen.ids.tolist() == [*np.asarray(first).tolist(), *([] if text else np.asarray(more).tolist())]
            assert seen.ids.dtype.kind == np.array(np.asarray(first).tolist()).dtype.kind


def test_x_keeps_its_type(tmp_path):
    bundle = hisac.Bundle.create(tmp_path / "b", OLD, [1], X[:1].astype(np.float16))
    bundle.append([2], X[1:2].astype(np.float16))
    for dtype, text in (
        (np.float32, "x expected float16, as of its first items, got float32"),
        (np.float64, r"x expected float32 or float16 \[T, D\], got float64"),
    ):
        with pytest.raises(TypeError, match=f"Bundle: {text}"):
            bundle.append([3], X[2:3].astype(dtype))
    assert bundle.x.dtype == np.float16 and len(bundle.ids) == 2
    with pytest.raises(ValueError, match=r"Bundle: ids expected integers or strings \[1\], got object \[1\]"):
        bundle.append(np.array([3], object), X[2:3].astype(np.float16))


def test_a_bundle_refuses_what_is_not_its_books(tmp_path):
    other = hisac.fit(X, (8, 8))
    for name, book in (("a", OLD), ("b", other)):
        hisac.Bundle.create(tmp_path / name, book, np.arange(2000), X)
    (tmp_path / "a/items-0.npz").rename(tmp_path / "b/items-1.npz")
    with pytest.raises(CorruptFileError, match=rf"items-1\.npz: expected items of .*, got of {OLD.fingerprint:016x}"):
        hisac.Bundle(tmp_path / "b")
    (tmp_path / "b/items-1.npz").write_bytes(b"PK\3\4 torn")
    with pytest.raises(CorruptFileError, match=r"items-1\.npz: "):
        hisac.Bundle(tmp_path / "b")


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: hisac.migrate(None, OLD, X), TypeError, "migrate: old expected hisac.Codebook, got NoneType"),
        (
            lambda: hisac.migrate(OLD, hisac.fit(X[:, :3], 4), X),
            ValueError,
            "migrate: new expected D = 6, as old, got 3",
        ),
        (lambda: hisac.migrate(OLD, OLD, X, votes=np.ones(3)), ValueError, "migrate: votes expected [2000], got [3]"),
        (
            lambda: hisac.migrate(OLD, OLD, [X], votes=[np.ones(2000)]),
            TypeError,
            "migrate: votes expected one array [T] of all chunks together, got list",
        ),
        (lambda: hisac.sizes_for(X), TypeError, "sizes_for: items expected a whole number, got ndarray"),
        (lambda: hisac.sizes_for(9, 0), ValueError, "sizes_for: levels expected 1 to 8, got 0"),
        (lambda: hisac.sizes_for(-1), ValueError, "sizes_for: items expected 0 to inf, got -1"),
        (
            lambda: hisac.drift(OLD, lambda: X),
            TypeError,
            "drift: x() expected an iterator of chunks [n, D], got ndarray",
        ),
        (lambda: hisac.migrate(OLD, OLD, X[0]), ValueError, "migrate: x expected [T, D], got float32 [6]"),
        (lambda: hisac.drift(None, X), TypeError, "drift: book expected hisac.Codebook, got NoneType"),
        (lambda: hisac.health(1, X), TypeError, "health: book expected hisac.Codebook, got int"),
        (lambda: hisac.health(OLD, X[:, :3]), ValueError, "encode: x is [2000, 3], the codebook has D = 6: D differs"),
    ],
)
def test_errors(call, kind, text):
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == text
