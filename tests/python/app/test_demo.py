# SPDX-License-Identifier: Apache-2.0
"""The demo: a split that never looks ahead, fair negatives, GAUC, the score, costs, table, words and picture."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hisac
from hisac import Histories, reference
from hisac.app import demo, explain, protocol, trial


@pytest.fixture(scope="module")
def events():
    return protocol.load()


@pytest.fixture(scope="module")
def asked(events):
    return protocol.requests(events, protocol.TEST_WEEKS, most=80, seed=5)


@pytest.fixture(scope="module")
def world(events):
    size = demo.QUICK._replace(fit_rows=1000)
    return demo.fit_world(events, size, seed=0)


# -------------------------------------------------------------------------------------------------------------- split


def test_the_sample_is_what_its_readme_says(events):
    assert (len(events.offsets) - 1, len(events.item), len(events.text_of_item)) == (150, 338_840, 36_481)
    assert events.x.shape == (12_508, 64) and len(events.texts) == 12_508
    assert {len(text) for text in events.texts} == {5}
    np.testing.assert_allclose(np.linalg.norm(events.x, axis=1), 1, atol=1e-5)
    lengths = np.diff(events.offsets)
    readme = (protocol.SAMPLE.parent / "README.md").read_text()
    assert f"({lengths.min():,} to {lengths.max():,} each" in readme
    assert protocol.SAMPLE.stat().st_size < 3e6
    within = np.diff(protocol.row_users(events)) == 0
    assert (np.diff(events.minute)[within] >= 0).all()


def test_histories_end_strictly_before_the_basket(events, asked):
    user = protocol.row_users(events)
    assert len(asked.user) == 80
    for b, (u, start, end) in enumerate(zip(asked.user, asked.starts, asked.ends, strict=True)):
        bought = asked.item[asked.candidate_offsets[b] : asked.candidate_offsets[b + 1]]
        bought = set(bought[asked.label[asked.candidate_offsets[b] : asked.candidate_offsets[b + 1]] == 1])
        baskets = [k for k in np.unique(events.basket[end : end + 200]) if user[events.basket == k][0] == u]
        (basket,) = [k for k in baskets if set(events.item[events.basket == k]) == bought][:1]
        rows = events.basket == basket
        assert start == events.offsets[u] and end - start >= 500
        assert (user[start:end] == u).all()
        assert events.minute[start:end].max() < events.minute[rows].min() == events.minute[end]
        assert set(events.week[rows]) <= set(range(48, 54))


def test_nothing_is_fitted_on_later_weeks(events):
    later = events.week > protocol.FITTED_WEEKS
    changed = events._replace(item=np.where(later, 0, events.item))
    np.testing.assert_array_equal(protocol.popularity(changed), protocol.popularity(events))
    size = demo.QUICK._replace(fit_rows=300)
    a, b = demo.fit_world(events, size, seed=1), demo.fit_world(changed, size, seed=1)
    assert a.book.fingerprint == b.book.fingerprint


def test_the_sample_pca_ignores_rows_of_later_weeks():
    path = Path(__file__).parents[3] / "bench" / "sample.py"
    spec = importlib.util.spec_from_file_location("bench_sample", path)
    sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sample)
    assert sample.FITTED_WEEKS == protocol.FITTED_WEEKS
    x = np.random.default_rng(0).normal(size=(50, 8))
    weight = np.r_[np.zeros(10), np.arange(1, 41)]
    found = sample.reduce(x, weight, 3)
    other = sample.reduce(np.r_[x[:10] * 7 + 1, x[10:]], weight, 3)
    np.testing.assert_allclose(other[10:], found[10:])
    assert abs(weight @ found / weight.sum()).max() < 1e-12
    centred = x - weight @ x / weight.sum()
    energy = np.linalg.svd(centred * np.sqrt(weight / weight.sum())[:, None], compute_uv=False)[:3] ** 2
    np.testing.assert_allclose(weight @ found**2 / weight.sum(), energy)


def test_validation_and_test_weeks_do_not_meet(events):
    a = protocol.requests(events, protocol.VALIDATION_WEEKS, most=50, seed=0)
    assert set(events.week[a.ends]) <= set(range(44, 48))
    assert protocol.FITTED_WEEKS < protocol.VALIDATION_WEEKS[0] <= protocol.VALIDATION_WEEKS[1] < protocol.TEST_WEEKS[0]


def test_negatives_are_four_a_positive_and_not_in_the_basket(events, asked):
    shelf = protocol.popularity(events)
    for b in range(len(asked.user)):
        rows = slice(asked.candidate_offsets[b], asked.candidate_offsets[b + 1])
        positive = asked.item[rows][asked.label[rows] == 1]
        negative = asked.item[rows][asked.label[rows] == 0]
        assert len(negative) == protocol.NEGATIVES * len(positive) > 0
        assert not np.isin(negative, positive).any()
        assert (shelf[negative] > 0).all()
    # In proportion to purchases: the share of the best-selling half of all purchases is about a half.
    order = np.argsort(-shelf)
    top = order[: np.searchsorted(np.cumsum(shelf[order]), shelf.sum() / 2)]
    drawn = asked.item[asked.label == 0]
    share = shelf[top].sum() / shelf.sum()
    assert abs(np.isin(drawn, top).mean() - share) < 5 * math.sqrt(0.25 / len(drawn))


def test_requests_are_fixed_by_their_seed(events, asked):
    again = protocol.requests(events, protocol.TEST_WEEKS, most=80, seed=5)
    other = protocol.requests(events, protocol.TEST_WEEKS, most=80, seed=6)
    assert all(np.array_equal(a, b) for a, b in zip(asked, again, strict=True))
    assert not np.array_equal(asked.ends, other.ends)


def test_repeat_counts_are_counts(events, asked):
    found = protocol.repeat_counts(events, asked)
    of = np.repeat(np.arange(len(asked.user)), np.diff(asked.candidate_offsets))
    for n in range(0, len(found), 37):
        history = events.item[asked.starts[of[n]] : asked.ends[of[n]]]
        assert found[n] == (history == asked.item[n]).sum()


# --------------------------------------------------------------------------------------------------------------- GAUC


def brute_auc(score, label):
    pairs = [(p > n) + (p == n) / 2 for p in score[label == 1] for n in score[label == 0]]
    return sum(pairs) / len(pairs)


@given(
    npst.arrays(np.int64, st.integers(1, 40), elements=st.integers(0, 3)).flatmap(
        lambda user: st.tuples(
            st.just(user),
            npst.arrays(np.float64, len(user), elements=st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 1e9])),
            npst.arrays(np.int64, len(user), elements=st.integers(0, 1)),
        )
    )
)
def test_gauc_is_brute_force(rows):
    user, score, label = rows
    found = protocol.user_aucs(user, score, label)
    wanted = [u for u in np.unique(user) if len(set(label[user == u])) == 2]
    assert found.user.tolist() == wanted
    aucs = [brute_auc(score[user == u], label[user == u]) for u in wanted]
    np.testing.assert_allclose(found.value, aucs)
    value, low, high = protocol.gauc(found, resamples=50)
    if not wanted:
        assert np.isnan([value, low, high]).all()
        return
    sizes = [(user == u).sum() for u in wanted]
    np.testing.assert_allclose(value, np.average(aucs, weights=sizes))
    assert min(aucs) - 1e-12 <= low <= high <= max(aucs) + 1e-12


def test_the_paired_difference_cancels_what_is_common():
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(30), 20)
    label, score = rng.integers(0, 2, 600), rng.normal(size=600)
    a = protocol.user_aucs(user, score, label)
    assert protocol.gauc(a, a) == (0.0, 0.0, 0.0)
    better = a._replace(value=a.value + 0.1)
    np.testing.assert_allclose(protocol.gauc(better, a), 0.1)


# -------------------------------------------------------------------------------------------------------------- score


def brute_score(tokens, share, q):
    return math.log(sum(s * math.exp(20 * (float(t @ q) - 1)) for t, s in zip(tokens, share, strict=True)))


def test_rows_score_as_the_formula_says(world, events, asked):
    few = first(asked, 3)
    found = trial.score_rows(world, few.starts, few.ends, few, lambda _: None)
    q = trial.candidates(world, few).astype(np.float64)
    for n in range(0, len(q), 11):
        b = int(np.searchsorted(few.candidate_offsets, n, side="right") - 1)
        history = world.x[few.starts[b] : few.ends[b]].astype(np.float64)
        wanted = brute_score(history, np.full(len(history), 1 / len(history)), q[n])
        assert found[n] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("setting", trial.SETTINGS, ids=lambda s: s.name)
def test_tokens_score_as_the_formula_says(world, asked, setting):
    few = first(asked, 2)
    tokens, bias = trial.compress(world, few.starts, few.ends, setting, 0.5)
    q = trial.candidates(world, few)
    found = trial.score(tokens, bias, q, few.candidate_offsets)
    book = reference.Codebook(world.book.centers)
    histories = Histories(world.x, world.x, (few.starts, few.ends), world.codes)
    agents = reference.vote(book, histories, **setting.rule)
    options = {"temperature": 0.5, "normalize": setting.normalize, "book": book, "sparse": setting.sparse}
    made = reference.route(histories, agents, **options)
    for n in range(0, len(q), 17):
        b = int(np.searchsorted(few.candidate_offsets, n, side="right") - 1)
        live = slice(0, agents.count[b])
        unit = made.tokens[b, live] / np.linalg.norm(made.tokens[b, live], axis=1, keepdims=True)
        share = agents.votes[b, live] / agents.votes[b].sum()
        assert found[n] == pytest.approx(brute_score(unit, share, q[n].astype(np.float64)), abs=1e-3)


def first(r, n):
    """The first n requests of r."""
    rows = r.candidate_offsets[n]
    return protocol.Requests(
        r.user[:n], r.starts[:n], r.ends[:n], r.candidate_offsets[: n + 1], r.item[:rows], r.label[:rows]
    )


def test_the_temperature_is_the_best_on_the_given_requests(world, asked, monkeypatch):
    few = first(asked, 20)
    monkeypatch.setattr(trial, "SETTINGS", [trial.budget(50)])
    chosen = trial.choose_tau(world, few, (4.0, 0.02), lambda _: None)[trial.budget(50).name]
    found = {}
    for tau in (0.02, 4.0):
        scores = trial.score_all(world, few, {trial.budget(50).name: tau}, lambda _: None)[trial.budget(50).name]
        found[tau] = protocol.gauc(protocol.user_aucs(protocol.users_of(few), scores, few.label))[0]
    assert chosen == max(found, key=found.get)


# -------------------------------------------------------------------------------------------------------------- costs


@given(*[st.floats(0.001, 50)] * 3)
def test_caching_pays_at_the_first_request_that_is_cheaper(cold, cached, full):
    cost, plain = trial.Cost(cold, cached, 0, 0), trial.Cost(full, full, 0, 0)
    n = trial.pays_at(cost, plain)
    if n is None:
        assert cached >= full
        return
    total = lambda k: cold + (k - 1) * cached - k * full  # noqa: E731
    slack = 1e-9 * n * 100
    assert n == 1 or total(n - 1) >= -slack
    assert total(n) < slack


def test_the_long_history_is_as_long_as_said_and_close_to_its_source(world):
    again = trial.jittered(world, slice(0, 1700), 5000, seed=0)
    assert again.x.shape == (5000, 64) and len(again.codes) == 5000
    cosine = (again.x[1700:3400] * world.x[:1700]).sum(1)
    assert cosine.min() > 0.95 and cosine.max() < 1.0


# -------------------------------------------------------------------------------------------------------------- table


def small_table(world, asked):
    few = first(asked, 12)
    taus = {s.name: 0.1 for s in trial.SETTINGS}
    scores = trial.score_all(world, few, taus, lambda _: None)
    found = demo.quality(few, scores, protocol.repeat_counts(world.events, few))
    cost = {name: trial.Cost(2.0, 1.0, 4000, 8000) for name in scores}
    return found, demo.make_rows(found, cost, cost, 20)


def test_the_table_has_every_row_and_column(world, asked):
    _, blocks = small_table(world, asked)
    lines = demo.table(blocks).splitlines()
    assert lines[0].split("  ")[0] == "method"
    for head in (
        "GAUC [95 %]",
        "vs most recent M",
        "repeat",
        "new",
        "cold ms",
        "cached ms",
        "ids B",
        "rows B",
        "pays at",
    ):
        assert head in lines[0]
    names = [line[:37].strip().split("  ")[0] for line in lines[1:] if not line.startswith("---")]
    wanted = ["full history", "repeat count, then full", "repeat count", "popularity"]
    for m, fan in ((50, "10x5"), (100, "20x5"), (200, "20x10")):
        wanted += [f"most recent {m}", f"fan-out {fan}, history", f"budget {m}, agents"]
    few = "budget 200, agents, sparse 32"
    wanted += [few, "10k*: full history", "10k*: fan-out 20x10, history", "10k*: budget 200, agents", f"10k*: {few}"]
    assert names == wanted
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 140
    for block in blocks[1:4]:
        assert block[0][2] == "-"
        assert all(row[2] != "-" for row in block[1:])
    assert all(row[1] == "-" and float(row[5]) > 0 for row in blocks[4])


def test_the_reading_follows_the_numbers(world, asked):
    found, _ = small_table(world, asked)
    perfect = {
        name: q._replace(every=q.every._replace(value=np.zeros_like(q.every.value))) for name, q in found.items()
    }
    for name in ("budget 100, agents", "repeat count"):
        perfect[name] = perfect[name]._replace(every=perfect[name].every._replace(value=perfect[name].every.value + 1))
    lines = demo.reading(perfect, 20).splitlines()
    assert lines[1] == (
        "Against the most recent 100: budget 100, agents: above it; fan-out 20x5, history: not told apart from it."
        " budget 100, agents less full history: +1.000."
    )
    assert lines[3].startswith("Items new to the household: budget 100, agents .")
    assert lines[4] == (
        "People buy again: counting repeats alone gives 1.000, above the full history's kernel (.000),"
        " and says nothing of new items."
    )


# ---------------------------------------------------------------------------------------------------- words, picture


def portrait(world, events):
    rows = slice(0, 900)
    texts = [events.texts[k] for k in world.row[rows]]
    return explain.portrait(world.book, world.codes[rows], world.x[rows], texts, 0.1), rows, texts


def test_the_weights_shown_are_those_of_route(world, events):
    p, rows, _ = portrait(world, events)
    histories = Histories(world.x[rows], world.x[rows], lengths=[900], codes=world.codes[rows])
    agents = hisac.vote(world.book, histories, budget=explain.SEATS)
    p_agents = reference.Codebook(world.book.centers).prototypes(agents)
    made = reference.route(histories, p_agents, count=agents.count, temperature=0.1, normalize="agents")
    np.testing.assert_allclose(p.weights.T @ world.x[rows], made.tokens[0, : len(p.names)], atol=1e-5)


def test_words_and_tree_tell_votes_and_paths(world, events):
    p, _, texts = portrait(world, events)
    assert len(p.names) == explain.SEATS
    assert set(p.names) <= {" > ".join(t[:3]) for t in texts}
    words = explain.words(p).splitlines()
    assert words[0] == f"  {p.votes[0]:4} votes  {p.names[0]}"
    assert words[1].strip().startswith("reads ")
    assert words[-1].strip() == f".. and 16 more agents with {p.votes[8:].sum()} votes"
    assert sorted(a for node in p.nodes for a in node.agents) == list(range(explain.SEATS))
    for node in p.nodes:
        assert node.votes >= sum(p.votes[a] for a in node.agents)
    assert len(explain.tree(p).splitlines()) == explain.SEATS + len(p.nodes)


def test_without_matplotlib_the_tree_is_text(world, events, tmp_path, monkeypatch, capsys):
    p, rows, texts = portrait(world, events)
    for name in ("matplotlib", "matplotlib.colors", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "picture.png"
    explain.user(world.book, world.codes[rows], world.x[rows], texts, name="Household 0", tau=0.1, png=str(path))
    out = capsys.readouterr().out
    assert "Its voted tree (a picture needs matplotlib, try: pip install matplotlib):\n" + explain.tree(p) in out
    assert not path.exists()


def test_the_picture_goes_where_a_link_leads(world, events, tmp_path):
    pytest.importorskip("matplotlib")
    p, _, _ = portrait(world, events)
    real, link = tmp_path / "real.png", tmp_path / "link.png"
    real.touch(0o600)
    link.symlink_to(real)
    explain.draw(p, "title", str(link))
    assert link.is_symlink() and real.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert real.stat().st_mode & 0o777 == 0o600 and sorted(os.listdir(tmp_path)) == ["link.png", "real.png"]


def test_a_picture_that_cannot_be_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "load", None)  # calling it would be a TypeError
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match=r"pipe\.png: is a device, FIFO or socket, expected a file"):
        demo.run(quick=True, png=str(tmp_path / "pipe.png"), seed=0)


def test_the_quick_demo_runs_to_its_last_line_without_torch(tmp_path):
    code = "import sys; from hisac.app.cli import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "demo", "--quick", "--png", "out.png"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("Sample: complete_journey (CC0), the 150 households with most purchases")
    assert "24 requests of weeks 48-53" in found.stdout
    assert found.stdout.endswith("python -m hisac fit --help, then compress --help\n")
    if importlib.util.find_spec("matplotlib"):
        assert os.listdir(tmp_path) == ["out.png"]
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    else:
        assert "Its voted tree (a picture needs matplotlib" in found.stdout
