# SPDX-License-Identifier: Apache-2.0
"""What gives integers, encode, fit and vote, against `hisac.reference`: exactly, for NumPy and torch, on any tree, with
any number of threads and in any order of input."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import hisac
from hisac import reference, testing
from support import kinds, with_threads

try:
    import torch
except ImportError:
    torch = None

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the reference, on hostile values


# ------------------------------------------------------------------------------------------------------ encode, fit


@given(testing.problems(), st.booleans())
def test_encode(p, hostile):
    args = p.encode_args()
    expected = reference.encode(**p.by_reference(args))
    for convert, _ in kinds(p):
        testing.assert_codes_equal(hisac.encode(**convert(args)), expected)


@given(testing.problems(hostile=True))
def test_encode_hostile(p):
    args = p.encode_args()
    expected = reference.encode(**p.by_reference(args))
    for convert, _ in kinds(p):
        testing.assert_codes_equal(hisac.encode(**convert(args)), expected)


@pytest.mark.parametrize("size", [1, 7, 16, 17, 65])
@pytest.mark.parametrize("width", [1, 3, 8, 17, 40])
@pytest.mark.parametrize("offset", [0, 1000])
def test_encode_near_ties(size, width, offset):
    """Rows on, and an ulp beside, the middle of two codewords; codewords twice; and all far from the origin, where a
    screen by norms and products has lost its digits."""
    rng = np.random.default_rng(size * 100 + width)
    centers = [(rng.normal(size=(size, width)) * s + o).astype(np.float32) for s, o in ((1, offset), (0.25, 0))]
    centers[0] = np.concatenate([centers[0], centers[0][::-1]])
    i, j = rng.integers(0, 2 * size, (2, 150))
    middle = ((centers[0][i].astype(np.float64) + centers[0][j]) / 2).astype(np.float32)
    x = np.concatenate(
        [middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf)), centers[0]]
    )
    testing.assert_codes_equal(
        hisac.Codebook(centers).encode(x), reference.encode(reference.Codebook(centers), x), f"offset {offset}"
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e15, 1e30])
def test_encode_scales(scale):
    rng = np.random.default_rng(1)
    centers = [(scale * rng.normal(size=(40, 9))).astype(np.float32) for _ in range(3)]
    x = (scale * rng.normal(size=(300, 9))).astype(np.float32)
    testing.assert_codes_equal(hisac.Codebook(centers).encode(x), reference.encode(reference.Codebook(centers), x))


@pytest.mark.parametrize("width", [9, 128])
def test_encode_what_a_rough_screen_cannot_tell(width):
    """A part common to all rows and codewords, one codeword far off, copies in a row, rows of zeros."""
    rng = np.random.default_rng(width)
    near = rng.normal(size=(70, width)).astype(np.float32)
    unit = near / np.linalg.norm(near, axis=1, keepdims=True)
    x = rng.normal(size=(60, width)).astype(np.float32)
    for c, rows in (
        (near + 100, x + 100),
        (np.concatenate([near, 1e4 * near[:1]]), x),
        (np.concatenate([near[:5], np.repeat(near[:1], 60, 0), near]), np.concatenate([x, near])),
        (np.concatenate([unit, np.sign(near)]), np.concatenate([np.zeros((3, width), np.float32), x])),
        (np.sign(near), np.zeros((3, width), np.float32)),
    ):
        testing.assert_codes_equal(hisac.Codebook([c]).encode(rows), reference.encode(reference.Codebook([c]), rows))


def test_encode_many_codes():
    rng = np.random.default_rng(2)
    centers = [rng.normal(size=(3000, 5)).astype(np.float32), rng.normal(size=(513, 5)).astype(np.float32)]
    x = rng.normal(size=(200, 5)).astype(np.float32)
    book = hisac.Codebook(centers)
    codes = with_threads(lambda: book.encode(x))
    testing.assert_codes_equal(codes, reference.encode(reference.Codebook(centers), x))
    order = rng.permutation(200)
    testing.assert_codes_equal(book.encode(x[order]), codes[order])


def check_fit(x, codes, **options):
    expected = reference.fit(x, codes, **options)
    book = with_threads(lambda: hisac.fit(x, codes, **options).centers) and hisac.fit(x, codes, **options)
    for level, (mine, theirs) in enumerate(zip(book.centers, expected.centers, strict=True)):
        np.testing.assert_array_equal(mine.view(np.int32), theirs.view(np.int32), err_msg=f"level {level}")
    assert book.fingerprint == expected.fingerprint
    mine, theirs = book.report, expected.report
    assert (mine.rows, mine.left_out, mine.unused) == (theirs.rows, theirs.left_out, theirs.unused)
    assert mine.iterations == theirs.iterations
    np.testing.assert_allclose(mine.error, theirs.error, rtol=1e-9)


@given(
    testing.embeddings(width=3),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(0, 6),
    st.integers(-(2**63), 2**64 - 1),
    st.booleans(),
)
def test_fit(x, codes, iterations, seed, grid):
    """Grids have many equal rows and ties; more codes than rows; dead codes."""
    assume(len(x))
    x = np.round(x).clip(-2, 2) if grid else x
    check_fit(x, tuple(codes), iterations=iterations, seed=seed)


@given(testing.embeddings(rows=40, width=2, hostile=True), st.integers(0, 99))
def test_fit_hostile(x, seed):
    assume((np.abs(x) < reference.FIT_LIMIT).all(1).any())
    check_fit(x, (5, 3), iterations=4, seed=seed)


@pytest.mark.parametrize("huge", [1e14, -3e20, 2.0**60])
@pytest.mark.parametrize("module", [hisac, reference])
def test_fit_leaves_out_rows_that_would_coarsen_the_sums(module, huge):
    """A row of 1e14 made the grid of the sums coarser than the other rows, for the grid followed the largest value of
    all: nearly every code lost its rows, and nothing was said. Hostile rows were drawn, but only among few others."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(400, 6)).astype(np.float32)
    clean, spoilt = module.fit(x, (16, 4), iterations=6), module.fit(np.insert(x, 400, huge, 0), (16, 4), iterations=6)
    assert (spoilt.report.rows, spoilt.report.left_out) == (400, 1) and spoilt.report.unused == clean.report.unused
    assert all(np.array_equal(a, b) for a, b in zip(clean.centers, spoilt.centers, strict=True))
    check_fit(np.insert(x, [0, 7, 400], huge, 0), (16, 4), iterations=6)
    check_fit(np.insert(x, 400, 1e10, 0), (16, 4), iterations=6)  # large, but the grid keeps 2^-16 of the others
    assert module.fit(np.insert(x, 400, 1e10, 0), (2,), iterations=2).report.left_out == 0


def test_fit_with_dead_codes():
    """Skewed rows: codes lose all their rows and are seeded again (test_reference.py shows that these do)."""
    for seed in range(40):
        x = np.exp(3 * np.random.default_rng(seed).normal(size=(40, 2))).astype(np.float32)
        check_fit(x, (14, 4), iterations=5, seed=seed)


@pytest.mark.parametrize(("codes", "scatter"), [((200,), 0.05), ((900,), 0.3), ((120, 60), 1.0)])
def test_fit_many_rounds(codes, scatter):
    """Enough codes for several groups of bounds, and enough rounds for the bounds to rule most of them out."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(90, 6))[rng.integers(0, 90, 1500)] + scatter * rng.normal(size=(1500, 6))
    check_fit(x.astype(np.float32), codes, iterations=15, seed=1)


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_fit_types(dtype):
    x = testing.rounded(np.random.default_rng(0).normal(size=(500, 12)), dtype)
    expected = reference.fit(x, (24, 6), iterations=5)
    for rows in [x] if torch is None else [x, testing.to_torch(x, dtype)]:
        assert hisac.fit(rows, (24, 6), iterations=5).fingerprint == expected.fingerprint


def test_a_size_alone_is_one_level():
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    books = [module.fit(x, sizes, iterations=2) for module in (hisac, reference) for sizes in (5, (5,))]
    assert {book.fingerprint for book in books} == {books[0].fingerprint} and hisac.fit(x, np.int64(5)).sizes == (5,)


def test_fit_progress_sees_the_same_rounds():
    x = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    seen = []
    for fit in (hisac.fit, reference.fit):
        seen.append([])
        fit(x, (8, 4), iterations=5, progress=lambda *step: seen[-1].append(step))
    assert [s[:2] for s in seen[0]] == [s[:2] for s in seen[1]] and len(seen[0]) > 2
    np.testing.assert_allclose([s[2] for s in seen[0]], [s[2] for s in seen[1]], rtol=1e-9)


# -------------------------------------------------------------------------------------------------------------- vote


def check_vote(args, by_reference):
    agents = with_threads(lambda: hisac.vote(**args))
    testing.assert_agents_equal(agents, reference.vote(**by_reference(args)))
    return agents


@given(testing.problems(max_levels=5, max_history=100), st.booleans(), st.integers(0, 2**32 - 1))
def test_vote(p, hostile, seed):
    agents = check_vote(p.vote_args(), p.by_reference)
    for convert, _ in kinds(p):
        testing.assert_agents_equal(hisac.vote(**convert(p.vote_args())), agents)
    h = p.histories
    if isinstance(h.offsets, tuple):
        return
    order = np.arange(len(h.codes))
    for rows in reference.ranges(h.offsets):
        np.random.default_rng(seed).shuffle(order[rows])
    shuffled = h._replace(codes=h.codes[order], weights=None if h.weights is None else h.weights[order])
    testing.assert_agents_equal(hisac.vote(**p.vote_args() | {"histories": shuffled}), agents)


@given(testing.problems(hostile=True))
def test_vote_hostile(p):
    check_vote(p.vote_args(), p.by_reference)


@pytest.mark.parametrize(
    "sizes", [(70000, 3), (3, 70000), (256,) * 8, (2, 1, 5, 1, 3, 2, 4, 2), (1,) * 8, (65536,) * 4]
)
@pytest.mark.parametrize(
    "rule",
    [{"budget": 1}, {"budget": 40}, {"budget": 4096}, {"fanout": (5, 3, *[2] * 6)}, {"beam": (4096, 9, 30, 5) * 2}],
)
def test_vote_on_any_tree(sizes, rule):
    """Wide levels, deep trees, and trees with 2^64 leaves."""
    rng = np.random.default_rng(len(sizes))
    centers = [np.zeros((n, 1), np.float32) for n in sizes]
    n = 3000
    codes = np.stack(
        [np.minimum(rng.geometric(0.3, n) - 1, s - 1) * ((s - 1) // max(1, min(s - 1, 9))) for s in sizes], 1
    )
    codes = np.where(rng.random(codes.shape) < 0.001, s_max := np.array(sizes), np.minimum(codes, s_max - 1)).astype(
        np.int32
    )
    rule = {name: n if name == "budget" else n[: len(sizes)] for name, n in rule.items()}
    for w in (None, rng.exponential(size=n).astype(np.float32), rng.integers(-1, 9, n)):
        histories = hisac.Histories(codes=codes, offsets=np.array([0, 0, n // 3, n]), weights=w)
        args = {"book": hisac.Codebook(centers), "histories": histories, **rule}
        testing.assert_agents_equal(hisac.vote(**args), reference.vote(**args | {"book": reference.Codebook(centers)}))


@pytest.mark.parametrize("sizes", [(512, 512), (40, 3), (4, 100), (9, 11, 130), (1000,)])
@pytest.mark.parametrize("rows", [511, 512, 1000, 2048, 9001])
@pytest.mark.parametrize("rule", ["fanout", "few", "budget", "beam", "wide"])
def test_vote_on_long_histories(sizes, rows, rule):
    """Where leaves are counted in place: from 2,048 rows by budget, from 512 by the other rules; beside them shorter
    histories, for which the same scratch must do. Weights relative to which others have one vote or none; votes as they
    are, and more than there may be, so that all lose their last bits."""
    rng = np.random.default_rng(rows + len(sizes))
    lengths = [rows, 40, 520, rows // 2, rows]
    n = sum(lengths)
    codes = np.stack([np.minimum(rng.pareto(0.8, n) * 4, s - 1).astype(np.int64) * 31 % s for s in sizes], 1)
    codes = np.where(rng.random((n, 1)) < 0.1, rng.integers(-1, np.array(sizes) + 1, codes.shape), codes)
    args = {
        "book": hisac.Codebook([np.zeros((s, 1), np.float32) for s in sizes]),
        "fanout": {"fanout": (16, 16, 8)[: len(sizes)], "few": (2,) * len(sizes)}.get(rule),
        "beam": {"beam": (16, 60, 200)[-len(sizes) :], "wide": (4096,) * len(sizes)}.get(rule),
        "budget": 200 if rule == "budget" else None,
    }
    expected = args | {"book": reference.Codebook(args["book"].centers)}
    floats = rng.exponential(size=n).astype(np.float32), np.exp(rng.normal(0, 9, n)).astype(np.float32)
    for weights in (None, *floats, rng.integers(0, 3, n), rng.integers(-(2**39), 2**39, n)):
        h = hisac.Histories(codes=codes.astype(np.int32), lengths=lengths, weights=weights)
        agents = with_threads(lambda h=h: hisac.vote(histories=h, **args))
        testing.assert_agents_equal(agents, reference.vote(histories=h, **expected))


@pytest.mark.parametrize(
    ("weight", "votes"), [(np.float32(0.3), 2**22), (2**22, 2**22), (2**30, 2**22), (2**39, 2**22)]
)
def test_vote_counts_above_32_bits(weight, votes):
    """140,000 rows have 2^22 votes each: of floats, of as many votes, and of more than there may be."""
    centers, n = [np.zeros((3, 1), np.float32)], 140_000
    codes = np.repeat(np.int32([[1], [2]]), [n - 7, 7], 0)
    histories = hisac.Histories(codes=codes, lengths=[n], weights=np.full(n, weight))
    agents = hisac.vote(hisac.Codebook(centers), histories, budget=3)
    testing.assert_agents_equal(agents, reference.vote(reference.Codebook(centers), histories, budget=3))
    assert agents.votes[0].tolist() == [votes * (n - 7), votes * 7, 0]
