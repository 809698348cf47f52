# SPDX-License-Identifier: Apache-2.0
"""`fit` of rows in chunks, from several processes, with weights and from another codebook: all bits, the report too,
are those of `hisac.reference` on the rows in one array."""

import threading

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import hisac
from hisac import reference, testing
from support import with_threads

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the reference, on hostile values
RNG = np.random.default_rng(0)
X = (RNG.normal(size=(60, 5))[RNG.integers(0, 60, 900)] + 0.3 * RNG.normal(size=(900, 5))).astype(np.float32)


class Together:
    """A group of processes that are threads."""

    def __init__(self, processes):
        self.rooms, self.barrier = [None] * processes, threading.Barrier(processes, timeout=60)

    def member(self, number):
        class Member:
            rank, size = staticmethod(lambda: number), staticmethod(lambda: len(self.rooms))

            @staticmethod
            def add(numbers):
                self.rooms[number] = numbers.copy()
                self.barrier.wait()
                numbers[:] = np.sum(self.rooms, 0)
                self.barrier.wait()

        return Member()

    def run(self, call):
        """[call(number, group)] of all, at once; raises what one of them raises."""
        results = [None] * len(self.rooms)

        def one(number):
            try:
                results[number] = call(number, self.member(number))
            except Exception as error:
                results[number] = error

        threads = [threading.Thread(target=one, args=(number,)) for number in range(len(self.rooms))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def same(book, expected):
    assert book.fingerprint == expected.fingerprint
    assert book.report == expected.report and book.temperature == expected.temperature


def chunks(x, cuts):
    """A source that reads x anew each time, in pieces that end at `cuts`."""
    return lambda: iter(np.split(x, sorted(cuts)))


@given(
    testing.embeddings(rows=40, width=3, hostile=True),
    st.lists(st.integers(0, 40), max_size=4),
    st.integers(1, 3),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.sampled_from(["none", "ones", "counts", "any", "light"]),
    st.booleans(),
    st.booleans(),
)
@example(np.zeros((4, 3), np.float32), [2], 3, [5], "any", True, True)
def test_chunks_processes_weights_and_init(x, cuts, processes, sizes, kind, warm, grid):
    rng = np.random.default_rng(len(x))
    x = np.round(x).clip(-2, 2) if grid else x
    weights = {
        "none": None,
        "ones": np.ones(len(x), np.float32),
        "counts": rng.integers(0, 50, len(x)).astype(np.float32),
        "any": np.exp(30 * rng.normal(size=len(x))).astype(np.float32),
        "light": np.ldexp(1, -rng.integers(44, 54, len(x))).astype(np.float32),
    }[kind]
    if kind == "any" and len(x) > 1:
        weights[:2] = [np.nan, -1]
    if kind == "light" and len(x) > 1:
        weights[-1] = 1
    options = {"iterations": 4, "seed": 3}
    usable = (np.abs(x) < reference.FIT_LIMIT).all(1)
    if weights is not None:
        usable &= (weights > 0) & np.isfinite(weights)
    assume(usable.any())
    mine = theirs = None
    if warm:
        centers = [rng.normal(size=(size, 3)).astype(np.float32) for size in sizes]
        mine, theirs = hisac.Codebook(centers), reference.Codebook(centers)
    expected = reference.fit(x, sizes, weights=weights, init=theirs, **options)
    alone = hisac.fit(x, sizes, weights=weights, init=mine, **options)
    same(alone, expected)
    parts = np.array_split(np.arange(len(x)), processes)

    def one(number, group):
        part = parts[number]
        w = None if weights is None else weights[part]
        source = chunks(x[part], [cut for cut in cuts if cut <= len(part)])
        return hisac.fit(source, sizes, weights=w, init=mine, process_group=group, **options)

    for book in Together(processes).run(one):
        same(book, expected)
        assert book.moved == alone.moved and (book.moved is not None) == warm


@pytest.mark.parametrize("cuts", [[], [1], [450, 451, 451, 800]])
def test_sources(tmp_path, cuts):
    expected = reference.fit(X, (30, 8), iterations=6)
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for source in (X, mapped, chunks(X, cuts), np.split(X, cuts), [X.astype(np.float16), X][1:]):
        found = with_threads(lambda source=source: hisac.fit(source, (30, 8), iterations=6).centers)
        assert hisac.Codebook(found).fingerprint == expected.fingerprint
        same(hisac.fit(source, (30, 8), iterations=6), expected)


def test_defaults_are_those_of_the_definition():
    start = reference.fit(X, (7, 5))
    same(hisac.fit(X, init=hisac.Codebook(start.centers)), reference.fit(X, init=start))


def test_blocks_of_many_rows():
    """More rows than one block of one worker, and of two; rounds in which codes lose their rows."""
    x = np.exp(RNG.normal(size=(300_000, 2))).astype(np.float32)
    expected = reference.fit(x, (40,), iterations=2)
    assert with_threads(lambda: hisac.fit(x, (40,), iterations=2).centers)
    same(hisac.fit(x, (40,), iterations=2), expected)
    same(hisac.fit(chunks(x, [1, 150_000, 299_999]), (40,), iterations=2), expected)


def test_weights_of_whole_numbers_are_rows_that_occur_so_often():
    x = np.round(4 * X) / 4  # sums are exact in either grid
    times = RNG.integers(0, 4, len(x))
    for module in (hisac, reference):
        start = module.fit(x, (20,), iterations=0)
        few = module.fit(x, (20,), weights=times.astype(np.float32), init=start, iterations=1)
        many = module.fit(x.repeat(times, 0), (20,), init=start, iterations=1)
        assert few.fingerprint == many.fingerprint
        np.testing.assert_allclose(few.report.error, many.report.error, rtol=1e-14)
        assert (
            module.fit(x, (9, 4), weights=np.ones(len(x), np.float32)).fingerprint == module.fit(x, (9, 4)).fingerprint
        )


def test_the_error_is_the_exact_sum_rounded_once():
    """Squares from 2^-200 to 2^120, which no sum in one order adds exactly."""
    x = np.ldexp(RNG.normal(size=(300, 1)), RNG.integers(-100, 60, (300, 1))).astype(np.float32)
    x = x[np.abs(x[:, 0]) < 2.0**60]
    expected = reference.fit(x, (2,), iterations=1)
    assert hisac.fit(x, (2,), iterations=1).report == expected.report
    assert hisac.fit(x[::-1], (2,), init=hisac.fit(x, (2,), iterations=1), iterations=0).report.error == (
        expected.report.error
    )


def test_progress_is_asked_for_by_one_process(capsys):
    """Measuring takes a pass more, which all processes have to take."""
    seen = []

    def one(number, group):
        options = {"progress": lambda *step: seen.append(step)} if number == 1 else {}
        return hisac.fit(X[number::2], (8, 4), iterations=3, process_group=group, **options)

    expected = []
    x = np.concatenate([X[::2], X[1::2]])
    book = reference.fit(x, (8, 4), iterations=3, progress=lambda *step: expected.append(step))
    for found in Together(2).run(one):
        same(found, book)
    assert seen == expected
    hisac.fit(X, (8,), iterations=3, progress=True)
    assert "fit: " in capsys.readouterr().err


def test_an_empty_process_and_processes_that_differ():
    parts = [X, X[:0]]
    for found in Together(2).run(lambda n, group: hisac.fit(parts[n], (8,), process_group=group)):
        same(found, reference.fit(X, (8,)))
    for found in Together(2).run(lambda n, group: hisac.fit(lambda: iter([X] * n), (8,), process_group=group)):
        same(found, reference.fit(X, (8,)))
    for sizes, width, text in (
        ((8, 8), 4, "x of process 1 expected D = 5, got 4"),
        ((8, 9), 5, "sizes of process 1 expected as of process 0, got another value"),
    ):
        found = Together(2).run(
            lambda n, group, s=sizes, w=width: hisac.fit(X[:, : w if n else 5], (s[n],), process_group=group)
        )
        assert [str(error) for error in found] == [f"fit: {text}"] * 2
    ones, book = np.ones(900, np.float32), hisac.Codebook([X[:8]])
    for terms, text in (
        (({}, {"weights": ones}), "weights of process 1 expected none, as of process 0, got some"),
        (({"weights": ones}, {}), "weights of process 1 expected some, as of process 0, got none"),
        (({}, {"seed": 1}), "seed of process 1 expected as of process 0, got another value"),
        (({}, {"iterations": 1}), "iterations of process 1 expected as of process 0, got another value"),
        (({"iterations": 5}, {"init": book}), "init of process 1 expected as of process 0, got another value"),
    ):
        found = Together(2).run(lambda n, group, of=terms: hisac.fit(X, (8,), process_group=group, **of[n]))
        assert [str(error) for error in found] == [f"fit: {text}"] * 2
    found = Together(2).run(lambda n, group: hisac.fit(X * np.float32("nan"), (8,), process_group=group))
    assert [str(e) for e in found] == ["fit: x is [1800, 5] without a usable row, expected at least one"] * 2


@pytest.mark.parametrize("module", [hisac, reference])
def test_weights_that_are_nothing_beside_the_largest(module):
    """Their rows would have codes whose weight is 0, or means that are anything."""
    weights = np.full(900, 1e-18, np.float32)
    weights[:100] = 1
    found, expected = (module.fit(x, (40,), weights=w) for x, w in ((X, weights), (X[:100], weights[:100])))
    assert (found.report.rows, found.report.left_out, found.report.unused) == (100, 800, (0,))
    assert found.fingerprint == expected.fingerprint and found.report.error == expected.report.error
    for exponent, rows in ((-46, 900), (-47, 1)):  # 900 has 10 bits: from 2^(10 - 56) of the largest on
        weights[:] = 2.0**exponent
        weights[7] = 1
        assert module.fit(X, (40,), weights=weights, iterations=1).report.rows == rows


@pytest.mark.parametrize("module", [hisac, reference])
def test_a_heavy_row_that_is_left_out_leaves_the_light_ones(module):
    x, weights = X.copy(), np.full(900, 1e-25, np.float32)
    x[3], weights[3] = 1e25, 1
    assert module.fit(x, (8,), weights=weights, iterations=1).report[:2] == (899, 1)


@pytest.mark.parametrize("module", [hisac, reference])
@pytest.mark.parametrize("scale", [1, 1e-6, 1e-12, 1e-30])
def test_rows_of_zeros_take_part_at_any_scale(module, scale):
    x = X * np.float32(scale)
    x[::10] = 0
    book = module.fit(x, (8,), iterations=2)
    assert book.report[:2] == (900, 0)
    np.testing.assert_array_equal(
        book.fingerprint, (hisac, reference)[module is hisac].fit(x, (8,), iterations=2).fingerprint
    )


def changing(x):
    """A source of the same number of rows, others each time."""
    times = [0]

    def read():
        times[0] += 1
        yield np.roll(x, times[0], 0)

    return read


def test_rows_that_change_from_pass_to_pass():
    text = "fit: x expected to have the same rows in every pass, got others"
    with pytest.raises(ValueError, match=text):
        hisac.fit(changing(X), (8,))
    found = Together(3).run(lambda n, group: hisac.fit(changing(X) if n == 1 else X, (8,), process_group=group))
    assert [str(error) for error in found] == [text] * 3
    odd = np.r_[X, X[:1] * np.float32("nan"), 0 * X[:1], X[:1] * np.float32(1e30)]  # those that are left out, too
    same(hisac.fit(lambda: iter([odd]), (8,)), reference.fit(odd, (8,)))


def growing():
    """A source with a row more each time."""
    rows = [99]

    def read():
        rows[0] += 1
        yield X[: rows[0]]

    return read


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"x": iter([X])}, TypeError, "x expected to be read again and again, got list_iterator; pass what makes it"),
        ({"x": [[1.0, 2.0]]}, TypeError, "x expected a NumPy array, a torch tensor or anything with DLPack, got list"),
        ({"x": "x.npy"}, TypeError, "x expected a NumPy array, a torch tensor or anything with DLPack, got str"),
        ({"x": [X, X[:, :3]]}, ValueError, "x expected chunks of D = 5, got [900, 3]"),
        ({"x": [X, X[0]]}, ValueError, "x expected [T, D], got float32 [5]"),
        ({"x": lambda: X}, TypeError, "x() expected an iterator of chunks [n, D], got ndarray"),
        ({"x": lambda: None}, TypeError, "x() expected an iterator of chunks [n, D], got NoneType"),
        ({"x": growing()}, ValueError, "a chunk expected [100, 5] at most, got [101, 5]"),
        ({"weights": X[:, 0].copy()[:9]}, ValueError, "weights expected [900], got [9]"),
        ({"weights": X}, ValueError, "weights expected [T], got float32 [900, 5]"),
        ({"weights": np.arange(900)}, TypeError, "weights expected float32 [T], got int64 [900]"),
        (
            {"x": [X, X], "weights": [X[:, 0], X[:, 0]]},
            TypeError,
            "weights expected one array [T] of all chunks together, got list",
        ),
        (
            {"process_group": True},
            TypeError,
            "process_group expected a torch.distributed.ProcessGroup, or an object with rank(), size() and"
            " add(numbers), got bool",
        ),
        ({"init": X}, TypeError, "init expected hisac.Codebook, got ndarray"),
        ({"init": hisac.fit(X, (4,))}, ValueError, "sizes expected (4,), those of init, got (8, 4)"),
        (
            {"init": hisac.fit(X[:, :3], (8, 4))},
            ValueError,
            "init of level 0 expected [8, 5], got [8, 3]",
        ),
        (
            {"init": hisac.Codebook([np.full((8, 5), 1e34, np.float32), X[:4]])},
            ValueError,
            "init of level 0 expected below 2^110, got 1e+34",
        ),
    ],
)
def test_errors(change, kind, text):
    with pytest.raises(kind) as error:
        hisac.fit(**{"x": X, "sizes": (8, 4), **change})
    assert str(error.value) == f"fit: {text}"


def test_a_shrinking_source():
    rows = [901]

    def read():
        rows[0] -= 1
        yield X[: rows[0]]

    with pytest.raises(ValueError, match="fit: a pass expected 900 rows, got 899"):
        hisac.fit(read, (8, 4))
