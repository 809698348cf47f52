# SPDX-License-Identifier: Apache-2.0
"""Laws of the definition of `match`, its gradients and `merge`, and what the bound of `match` sees."""

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hisac
from hisac import Attended, Histories, Match, Tokens, reference, testing
from hisac.reference import bounds

exact = testing.matchings(max_sums=20, dtypes=("float32",))


def by_rows(p):
    """`match` by a loop over all rows of a user, one after another, without a largest bias."""
    levels, size = len(p.book.sizes), len(p.codes if p.ids is None else p.ids)
    v, mass = np.zeros((size, levels, p.sums.v.shape[1])), np.zeros((size, levels))
    users = zip(reference.ranges(p.sums.offsets), reference.ranges(p.candidate_offsets), strict=True)
    for own, mine in users:
        for n in range(mine.start, mine.stop):
            row = n if p.ids is None else p.ids[n]
            if not 0 <= row < len(p.codes):
                continue
            code = p.codes[row]
            if not all(0 <= c < size for c, size in zip(code, p.book.sizes, strict=True)):
                continue
            for s in range(own.start, own.stop):
                bias = 0.0 if p.sums.bias is None else float(p.sums.bias[s])
                valid = all(0 <= c < size for c, size in zip(p.sums.codes[s], p.book.sizes, strict=True))
                if not valid or not np.isfinite(bias):
                    continue
                for level in range(levels):
                    if (p.sums.codes[s, : level + 1] == code[: level + 1]).all():
                        mass[n, level] += np.exp(bias)
                        v[n, level] += np.exp(bias) * p.sums.v[s].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Match(np.where(mass[..., None] > 0, v / mass[..., None], 0.0), np.log(mass))


@given(exact)
def test_match_is_a_sum_over_the_rows_below(p):
    for mine, expected in zip(p.reference(), by_rows(p), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-9, atol=1e-9)


@given(testing.matchings(hostile=True, dtypes=("float32",)))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_deeper_level_says_no_more(p):
    """Mass falls from level to level, and a prefix without sums has none below."""
    lse = p.reference().lse
    assert (np.diff(lse, axis=1)[np.isfinite(lse[:, 1:])] <= 1e-9).all()
    assert (np.isneginf(lse[:, 1:]) | np.isfinite(lse[:, :-1])).all()
    assert p.bound().lse[np.isfinite(lse)].size == 0 or p.bound().lse[np.isfinite(lse)].min() > 0


@given(exact)
def test_match_backward_equals_finite_differences(p):
    args = p.by_reference(p.match_args())
    bias = np.zeros(len(p.sums.v)) if p.sums.bias is None else p.sums.bias.astype(np.float64)
    free = {"v": p.sums.v.astype(np.float64), "bias": np.clip(bias, -4, 4) + np.where(np.isfinite(bias), 0, bias)}
    args["sums"] = p.sums._replace(**free)
    back = p.backward_args(p.reference())["gradients"]

    def loss():
        found = reference.match(**args)
        parts = zip(found, back, strict=True)
        return sum((np.nan_to_num(a, neginf=0.0) * d).sum() for a, d in parts if d is not None)

    mine = reference.match_backward(**args, gradients=back)
    for name, values in free.items():
        slope = np.zeros(values.shape)
        for at in np.ndindex(values.shape):
            if not np.isfinite(kept := values[at]):
                continue
            sides = []
            for step in (1e-4, -1e-4):
                values[at] = kept + step
                sides.append(loss())
            values[at] = kept
            slope[at] = (sides[0] - sides[1]) / 2e-4
        np.testing.assert_allclose(getattr(mine, name), slope, rtol=1e-5, atol=1e-5, err_msg=name)
    for name in free:
        alone = reference.match_backward(**args, gradients=back, need=(name,))
        assert sum(g is None for g in alone) == 1 and np.array_equal(getattr(alone, name), getattr(mine, name))


def test_what_bounds_and_comparators_of_match_see():
    rng = np.random.default_rng(0)
    book, codes = reference.Codebook([np.zeros((2, 1)), np.zeros((9, 1))]), np.int32([[0, k] for k in range(9)])
    sums = Histories(None, rng.normal(size=(9, 3)).astype("f4"), np.array([0, 9]), codes, bias=np.linspace(-2, 2, 9))
    args = {"book": book, "sums": sums, "codes": codes[:4], "candidate_offsets": np.array([0, 4])}
    expected, limit = reference.match(**args), bounds.match_bound(args)
    assert limit.v.max() < 3e-4 and limit.lse.max() < 3e-5
    testing.assert_match_close(Match(*(a.astype(np.float32) for a in expected)), expected, limit)
    for field in Match._fields:
        wrong = expected._replace(**{field: getattr(expected, field) * 1.001})
        with pytest.raises(AssertionError, match=f"{field}: "):
            testing.assert_match_close(wrong, expected, limit)
    back = args | {"gradients": Match(np.ones((4, 2, 3)), np.ones((4, 2)))}
    gradients = reference.match_backward(**back)
    testing.assert_gradients_close(gradients, gradients, back)
    for field in gradients._fields:
        wrong = gradients._replace(**{field: getattr(gradients, field) * 1.001 + 1e-3})
        with pytest.raises(AssertionError, match=f"{field}: "):
            testing.assert_gradients_close(wrong, gradients, back)


def test_match_takes_the_verbs_arguments():
    for name in ("match", "match_backward", "merge"):
        of_verb, of_definition = (inspect.signature(getattr(m, name)).parameters for m in (hisac, reference))
        assert [p for p in of_verb if p != "out"] == list(of_definition)
        assert all(of_verb[p].default == of_definition[p].default for p in of_definition)


# --------------------------------------------------------------------------------------------------------------- merge


def pair(rng, kind=tuple, width=3):
    """(out, lse), one in three of them -inf."""
    lse = testing.sprinkle(rng, 5 * rng.normal(size=(6, 2)), 1 / 3, np.array([-np.inf]))
    return kind((np.where(lse[..., None] > -np.inf, rng.normal(size=(6, 2, width)), 0.0), lse))


@given(testing.generators(), st.sampled_from([tuple, Attended._make, Match._make]))
def test_merge_is_the_mean_by_mass(rng, kind):
    """By exp and log alone; the same of the verb; the other side bit for bit where one is -inf."""
    a, b = pair(rng, kind), pair(rng, kind)
    mass = np.exp(np.stack([a[1], b[1]]))
    total = mass.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (mass[..., None] * np.stack([a[0], b[0]])).sum(0) / total[..., None]
        expected = np.where(total[..., None] > 0, mean, 0.0), np.log(total)
    for module in (reference, hisac):
        found = module.merge(a, b)
        assert type(found) is type(a)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)
        for one, other in ((a, b), (b, a)):
            alone = np.isneginf(one[1])
            for x, y in zip(found, other, strict=True):
                assert x[alone].tobytes() == y[alone].tobytes()


@pytest.mark.parametrize("module", [hisac, reference])
def test_merge_of_tokens(module):
    rng = np.random.default_rng(0)
    a, b = (Tokens(*pair(rng), mean_x=rng.normal(size=(6, 2, 4))) for _ in range(2))
    found = module.merge(a, b)
    np.testing.assert_allclose(found.mean_x, module.merge((a.mean_x, a.lse), (b.mean_x, b.lse))[0], rtol=1e-12)
    bare = module.merge(a._replace(mean_x=None), b._replace(mean_x=None))
    assert bare.mean_x is None and np.array_equal(bare.tokens, found.tokens)


def test_merge_refuses_other_shapes():
    out, lse = np.zeros((4, 3)), np.zeros(4)
    for b, text in (
        ((out[:3], lse), "merge: b's out expected [4, 3], got [3, 3]"),
        ((out, lse[:3]), "merge: b's lse expected [4], got [3]"),
        ((out, lse, None), "merge: b expected the fields of a, tuple of 2, got 3"),
        ((lse, lse), "merge: b's out expected [4, 3], got [4]"),
    ):
        with pytest.raises(ValueError) as error:
            hisac.merge((out, lse), b)
        assert str(error.value) == text
    with pytest.raises(ValueError, match=r"^merge: a's out expected \[4, 4\], got \[4\]$"):
        hisac.merge((lse, lse), (lse, lse))
