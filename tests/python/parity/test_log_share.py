# SPDX-License-Identifier: Apache-2.0
"""`log_share` of `compress`: what it is in both modes, of kept agents, and beside the token of missing behaviours."""

import numpy as np
import pytest
from hypothesis import given

import hisac
from hisac import Histories, _core, reference, testing
from hisac.reference import bounds, verbs
from support import kinds

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the reference, on hostile values


def is_one(sums, some):
    np.testing.assert_allclose(sums, np.where(some, 1.0, 0.0), rtol=2e-5)


@given(testing.problems(hostile=True, gathered=True))
def test_shares_sum_to_one(p):
    """Over the tokens with mass; a share there is none of is -inf."""
    for module, args in ((hisac, p.compress_args()), (reference, p.by_reference(p.compress_args()))):
        made = module.compress(**args)
        share, mass = made.log_share, made.lse > -np.inf
        assert share.shape == made.lse.shape and (module is reference or share.dtype == np.float32)
        assert not np.isnan(share).any() and (share <= 1e-5).all() and (share[~mass] == -np.inf).all()
        is_one(np.exp(share.astype(np.float64)).sum(1), mass.any(1))


@given(testing.problems())
def test_the_share_of_the_mass_or_of_the_votes(p):
    """In agents mode of the mass; in history mode of the votes of agents that received some. To their bounds."""
    args = p.compress_args() | {"refine": 0, "method": "exact", "missing": "drop"}
    exact = p.by_reference(args)
    expected = reference.compress(**exact)
    routed = {name: exact[name] for name in ("histories", "temperature", "normalize", "book", "precision")}
    routed["agents"] = expected.agents
    votes, mass = expected.agents.votes, expected.lse > -np.inf
    for convert, dtype in kinds(p):
        e = bounds.route_bound(routed, dtype).lse
        z = expected.lse
        if p.normalize == "history":
            z = np.where(mass, np.log(np.maximum(votes, 1)), -np.inf)
            e = np.where(np.isfinite(e).all(1)[:, None], (2 + 2 * np.abs(np.where(mass, z, 0.0))) * bounds.U, np.inf)
        np.testing.assert_allclose(expected.log_share, verbs.log_softmax(z, 1), rtol=1e-12, atol=1e-12)
        limit = bounds.log_share_bound(z, e)
        testing.assert_close(hisac.compress(**convert(args)).log_share, expected.log_share, limit, "log_share")


# four behaviours near the first code, two near the second; one is missing; the second user has no behaviour
X = np.float32([[0], [0], [0], [0], [10], [10], [np.nan]])
BATCH = Histories(X, np.ones((7, 2), np.float32), np.array([0, 7, 7]), np.int32([[0]] * 4 + [[1]] * 3))


def made(module, histories=BATCH, **options):
    book = hisac.Codebook([np.float32([[0], [10], [20]])])
    book = book if module is hisac else reference.Codebook(book.centers)
    agents = options.pop("agents", None)
    if agents is not None:
        agents = agents._replace(fingerprint=book.fingerprint)
    rule = {"budget": 3} if agents is None else {"agents": agents}
    return module.compress(book, histories, temperature=1.0, **rule, **options)


@pytest.mark.parametrize("module", [hisac, reference])
@pytest.mark.parametrize("method", ["exact", "leaf"])
@pytest.mark.parametrize("normalize, missing, shares", [
    ("agents", "drop", [4 / 6, 2 / 6, 0]),
    ("agents", "token", [4 / 7, 2 / 7, 0, 1 / 7]),
    ("history", "drop", [4 / 7, 3 / 7, 0]),  # the missing one has voted
    ("history", "token", [4 / 7 * 6 / 7, 3 / 7 * 6 / 7, 0, 1 / 7]),
])  # fmt: skip
def test_shares_of_six_behaviours_and_a_missing_one(module, method, normalize, missing, shares):
    found = made(module, method=method, normalize=normalize, missing=missing).log_share
    np.testing.assert_allclose(np.exp(found), [shares, [0] * len(shares)], rtol=1e-5)
    assert (found[1] == -np.inf).all() and found[0, 2] == -np.inf


@pytest.mark.parametrize("module", [hisac, reference])
@pytest.mark.parametrize("weights", [np.float32([1, 1, 1, 1, 1e-7, 1e-7, 1]), np.int64([2**39, 1, 1, 1, 1, 1, 1])])
def test_the_extra_token_has_the_share_of_its_count_whatever_a_vote_weighs(module, weights):
    weighed = made(module, BATCH._replace(weights=weights), normalize="history", missing="token")
    np.testing.assert_allclose(np.exp(weighed.log_share[0, -1]), 1 / 7, rtol=1e-5)
    is_one(np.exp(weighed.log_share.astype(np.float64)).sum(1), [True, False])


@pytest.mark.parametrize("module", [hisac, reference])
def test_a_user_of_missing_behaviours_only(module):
    for x, normalize in ((X * np.nan, "history"), (X * np.nan, "agents")):
        found = made(module, BATCH._replace(x=x), normalize=normalize, missing="token").log_share
        assert np.exp(found).tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("module", [hisac, reference])
def test_kept_agents_have_the_votes_of_then(module):
    """Without votes they have one each; one whose votes are no number of votes has no share."""
    kept = made(module).agents
    for votes, shares in (
        (np.int64([[6, 2, 0], [5, 1, 0]]), [6 / 8, 2 / 8, 0]),
        (None, [1 / 2, 1 / 2, 0]),
        (np.int64([[-(2**63), 2**63 - 1, 9], [0, 0, 0]]), [0, 1, 0]),
    ):
        found = made(module, normalize="history", agents=kept._replace(votes=votes)).log_share
        np.testing.assert_allclose(np.exp(found), [shares, [0, 0, 0]], rtol=1e-5)
    none = kept._replace(votes=np.zeros((2, 3), np.int64))  # the missing one has the whole share
    found = made(module, normalize="history", missing="token", agents=none).log_share
    assert np.exp(found).tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    other = kept._replace(votes=None)
    np.testing.assert_array_equal(made(module, agents=other).log_share, made(module).log_share)


@pytest.mark.parametrize("module", [hisac, reference])
def test_votes_of_another_shape_are_refused(module):
    kept = made(module).agents
    with pytest.raises(ValueError, match=r"^compress: agents' votes expected \[2, 3\], got \[1, 3\]$"):
        made(module, normalize="history", agents=kept._replace(votes=kept.votes[:1]))


@pytest.mark.parametrize("normalize", ["history", "agents"])
@pytest.mark.parametrize("missing", ["drop", "token"])
def test_no_agents_at_all(normalize, missing):
    kept = made(hisac).agents
    none = hisac.Agents(kept.codes[:, :0], None, kept.count, kept.fingerprint)
    found = made(hisac, agents=none, normalize=normalize, missing=missing)
    assert found.log_share.shape == found.lse.shape == (2, 0)


def test_large_masses_keep_their_shares():
    """The core lost log 2 beside 1e30, when only NumPy's face was tested with masses so large."""
    for lse in (1e30, -1e30, 88.0, 0.0):
        out = np.empty((1, 3), np.float32)
        _core.log_share(np.float32([[lse, lse, -np.inf]]), None, out)
        np.testing.assert_array_equal(out, np.float32([[-np.log(2), -np.log(2), -np.inf]]))
