# SPDX-License-Identifier: Apache-2.0
"""The bench: its arithmetic, its parity gate, its truths and peers on small data, the JSON."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import blas
import data
import harness
import peak
import peers
import peers_codes
import run
import table
import truth
import works
from bench_support import BENCH, kernel, needs_threadpoolctl
from hisac import Agents, Histories, Tokens, reference

ONCE = harness.Effort(share=0.0, least=1, most=1, pause=0.0, sample=0.0)
NAMES = [
    *("route/1k", "route/10k", "route/100k", "route/ragged", "route/short", "backward/10k", "leaf/100k"),
    *("vote/1k", "vote/10k", "vote/100k", "vote/short", "encode/2x512", "encode/3x256", "fit/512"),
    *("route/10k/agents", "route/100k/agents", "route/ragged/agents", "route/short/agents", "route/real"),
    *(
        "backward/10k/agents",
        "train/log",
        "attend/500",
        "match/500",
        "call/route",
        "call/vote",
        "call/attend",
        "state/append10",
        "request/cold",
        "request/cached",
    ),
]
ROW = {
    *("work", "variant", "dtype", "threads", "median_ms", "peer", "ratio_to_best_peer"),
    *("error", "gflops", "share_of_peak", "data"),
}
DATA = {data.UNIT, data.NORMAL, data.CLUSTERED, data.NEAR, data.MIXTURE, data.INTERESTS, data.JOURNEY}


def variant(name: str, result: float = 0.0, role: str = "peer", **more: Any) -> harness.Variant:
    """Returns `result`, which should be 0 and may be off by 0.1."""
    return harness.Variant(name, lambda: lambda i: result, lambda r, i: abs(r), 0.1, role, **more)


def case(*variants: harness.Variant, flops: float = 6e6) -> harness.Case:
    return harness.Case("route/1k", "float32", "small", "made", 100, flops, "0", variants)


# ---------------------------------------------------------------------------------------------------------- arithmetic


def test_medians_ratios_and_shares():
    c = case(variant("fp32", role="hisac"), variant("a"), variant("b"), variant("packed", role="packed"))
    times = {
        "fp32": [0.002, 0.001, 0.009],
        "a": [0.008, 0.006, 0.007],
        "b": [0.004, 0.005, 0.050],
        "packed": [0.001] * 3,
    }
    mine, a, b, packed = harness.rows(c, 2, 30.0, times, dict.fromkeys(times, 1e-7))
    assert (mine["median_ms"], mine["min_ms"], mine["samples"], mine["threads"]) == (2.0, 1.0, 3, 2)
    assert mine["peer"] == "b" and mine["ratio_to_best_peer"] == pytest.approx(2.5)
    assert mine["packed_peer"] == "packed" and mine["ratio_to_packed_peer"] == pytest.approx(0.5)
    assert mine["gflops"] == pytest.approx(3.0) and mine["share_of_peak"] == pytest.approx(0.1)
    assert mine["ns_per_row"] == pytest.approx(20_000)
    assert b["ratio_to_best_peer"] == 1 and a["ratio_to_best_peer"] == pytest.approx(5 / 7)
    assert mine["quartiles_ms"][0] <= mine["median_ms"] <= mine["quartiles_ms"][1]
    assert packed["role"] == "packed" and packed["data"] == "made"


def test_without_peers_or_flops_there_is_no_ratio_and_no_share():
    (row,) = harness.rows(case(variant("fp32", role="hisac"), flops=0.0), 1, 30.0, {"fp32": [1.0]}, {"fp32": 0.0})
    assert row["peer"] is row["ratio_to_best_peer"] is row["gflops"] is row["share_of_peak"] is None


def test_variants_take_turns_and_slow_ones_sit_rounds_out():
    now, log = [0.0], []

    def call(name: str, seconds: float) -> harness.Call:
        def run_once(i: int) -> str:
            now[0] += seconds
            log.append((name, i))
            return name

        return run_once

    seconds = {"quick": 0.25, "even": 1.0, "slow": 4.0}
    effort = harness.Effort(share=8.0, least=2, most=8, pause=0.5, sample=1.0)
    naps: list[float] = []
    times, last = harness.interleave(
        {n: call(n, s) for n, s in seconds.items()}, seconds, 2, effort, lambda: now[0], naps.append
    )
    assert {n: len(ts) for n, ts in times.items()} == {"quick": 8, "even": 8, "slow": 2}
    assert all(ts == [seconds[n]] * len(ts) for n, ts in times.items())
    order = [name for name, _ in itertools.groupby(name for name, _ in log)]
    assert order[:3] == ["quick", "even", "slow"] and order[3:5] == ["even", "quick"]
    assert log[:4] == [("quick", 0), ("quick", 1), ("quick", 0), ("quick", 1)], "short calls repeat, over all inputs"
    assert naps == [0.5] * 18
    assert last["slow"][0] == "slow"


def test_a_rest_lasts_until_no_thread_is_busy():
    used, naps = iter([0.0, 0.4, 0.4, 0.45, 0.45, 0.46]), []
    harness.rest(0.5, naps.append, lambda: next(used))
    assert naps == [0.5] * 2, "0.4 of 0.5 seconds were somebody's, then 0.05"
    forever = itertools.count()
    harness.rest(0.5, naps.append, lambda: next(forever))
    assert len(naps) == 102
    harness.rest(0.0, naps.append, lambda: next(forever))
    assert len(naps) == 102


# --------------------------------------------------------------------------------------------------------- parity gate


def test_a_wrong_result_gets_no_row():
    planted = variant("wrong", 0.2, "hisac")
    out = harness.run_case(case(planted, variant("right", 0.05, "hisac"), variant("peer")), 1, 1.0, {}, ONCE)
    assert [r["variant"] for r in out.rows] == ["right", "peer"]
    (failure,) = out.failures
    assert failure["variant"] == "wrong" and failure["work"] == "route/1k"
    assert "error 0.2, expected at most 0.1" in failure["reason"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_error_that_is_no_number_fails(bad: float):
    out = harness.run_case(case(variant("bad", bad, "hisac")), 1, 1.0, {}, ONCE)
    assert not out.rows and len(out.failures) == 1


def test_a_result_that_turns_wrong_while_timed_gets_no_row():
    calls = itertools.count()
    late = harness.Variant("late", lambda: lambda i: next(calls), lambda r, i: float(r > 1), 0.0, "hisac")
    out = harness.run_case(case(late), 1, 1.0, {}, ONCE)
    assert not out.rows and out.failures[0]["reason"].startswith("after timing: parity")


def test_wrong_failing_and_missing_peers_are_named_and_fail_nothing():
    def broken() -> harness.Call:
        raise RuntimeError("no such\nkernel")

    out = harness.run_case(
        case(
            variant("fp32", role="hisac"),
            variant("wrong", 9.0),
            harness.Variant("broken", broken, lambda r, i: 0.0, 0.0),
            variant("absent", needs=("nothing",)),
        ),
        1, 1.0, {"nothing": "not installed"}, ONCE,
    )  # fmt: skip
    assert [r["variant"] for r in out.rows] == ["fp32"] and not out.failures
    reasons = {entry["variant"]: entry["reason"] for entry in out.left_out}
    assert reasons["broken"] == "RuntimeError: no such kernel"
    assert reasons["absent"] == "nothing: not installed"
    assert reasons["wrong"].startswith("ValueError: parity: error 9")


def test_the_peak_is_measured_or_named_as_a_stand_in(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CC", "/no/such/compiler")
    without = peak.measure(1, quick=True)
    assert without["gflops"] > 0 and "stands in" in without["how"]


# ----------------------------------------------------------------------------------------------------- truths and peers


def test_every_name_of_a_work_has_a_builder_or_is_named_as_to_come():
    assert [n for n in NAMES if n not in works.WORKS] == [n for n in works.NO_OPERATION if n in NAMES]
    assert works.names(["vote", "route/1k"]) == ["route/1k", "vote/1k", "vote/10k", "vote/100k", "vote/short"]
    assert works.names(["all"]) == list(works.WORKS)


@pytest.mark.parametrize("seed", range(3))
def test_float64_truths_agree_with_the_reference(seed: int):
    rng = np.random.default_rng(seed)
    centers, codes, x = data.structured(rng, 60, (7, 5), 6)
    v, p = rng.standard_normal((60, 3)), data.unit(rng, 3, 8, 6)
    offsets, count, book = np.array([0, 25, 26, 60]), np.array([8, 3, 5]), reference.Codebook(centers)
    for mode in ("history", "agents"):
        expected = reference.route(Histories(x, v, offsets), p, count=count, temperature=0.2, normalize=mode)
        found = truth.route64(x, v, offsets, p, 0.2, count, mode)
        np.testing.assert_allclose(found.tokens, expected.tokens, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-11, atol=1e-12)

    one = np.array([0, 60])
    sums = reference.leaf_sums(book, Histories(x, v, one, codes))
    expected = reference.route(sums, p[:1], temperature=0.2, normalize="history")
    found = truth.leaf64(x, v, peers_codes.numpy_leaves(codes, (7, 5)), p[0], 0.2)
    np.testing.assert_allclose(found.tokens, expected.tokens, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-10, atol=1e-12)

    d_tokens = rng.standard_normal((1, 8, 3))
    for mode in ("history", "agents"):
        options = {"temperature": 0.2, "normalize": mode}
        forward = reference.route(Histories(x, v, one), p[:1], **options)
        given = Tokens(d_tokens, None)
        expected = reference.route_backward(Histories(x, v, one), p[:1], forward, given, **options)
        found, terms = truth.backward64(d_tokens, forward, x, v, p[:1], 0.2, mode)
        np.testing.assert_allclose(found.v, expected.v, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found.temperature, expected.temperature, atol=1e-11 * terms)

    assert np.array_equal(truth.encode64(centers, x), reference.encode(book, x))
    assert truth.encode_gap(centers, x, reference.encode(book, x)) < 1e-12
    assert truth.encode_gap(centers, x, (codes + 1) % np.array([7, 5])) > works.NEAR_TIE
    c = truth.lloyd64(x, truth.fit_start(x, 4, 0), 3)
    np.testing.assert_allclose(c, reference.fit(x, (4,), iterations=3).centers[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("users", [1, 9])
@pytest.mark.parametrize("rule", [{"fanout": (3, 2)}, {"budget": 7}, {"budget": 40}])
def test_voting_peers_break_ties_as_the_reference(rule: dict[str, Any], users: int):
    rng = np.random.default_rng(users)
    offsets = data.offsets_of(rng.integers(1, 25, users))
    sizes = (6, 5)
    codes = [rng.integers(0, sizes, (offsets[-1], 2)).astype(np.int32) for _ in range(6)]
    book = reference.Codebook([np.zeros((s, 1)) for s in sizes])
    ran = 0
    for name, _, needs, make in peers_codes.vote(codes, offsets, sizes, rule):
        if any(peers.installed()[package] is None for package in needs):
            continue
        call = make()
        for i, c in enumerate(codes):
            expected = reference.vote(book, Histories(codes=c, offsets=offsets), **rule)
            for got, want in zip(call(i), expected[:3], strict=True):
                assert np.array_equal(np.asarray(got), want), (name, i)
        ran += 1
    assert ran >= 1


def rounded(f: Any) -> Any:
    """A reference function that takes torch's bfloat16 too, and then rounds its first result to it."""

    def dense(a: Any) -> Any:
        if a is None or isinstance(a, Agents):
            return a
        return a._make(map(dense, a)) if isinstance(a, Histories) else truth.dense(a)

    def call(*arrays: Any, **options: Any) -> Any:
        result = f(*map(dense, arrays), **options)
        first = arrays[0].v if isinstance(arrays[0], Histories) else arrays[0]
        if "bfloat16" not in str(getattr(first, "dtype", "")):
            return result
        return result._replace(**{result._fields[0]: works.as_bf16(result[0])[0]})

    return call


OPS = SimpleNamespace(**vars(reference) | {"route": rounded(reference.route), "attend": rounded(reference.attend)})
TINY: dict[str, dict[str, Any]] = {
    "route/1k": {"rows": 30, "agents": 6, "width": 8, "value": 4},
    "route/ragged": {"users": 3, "rows": 20, "agents": 6, "width": 8, "value": 4},
    "route/short": {"users": 70, "agents": 9, "width": 8, "value": 4, "short": (3, 9)},
    "route/10k/agents": {"rows": 30, "agents": 20, "width": 8, "value": 8},
    "route/ragged/agents": {"users": 3, "rows": 20, "agents": 6, "width": 8, "value": 4},
    "route/short/agents": {"users": 70, "agents": 9, "width": 8, "value": 4, "short": (3, 9)},
    "route/real": {"budget": 8, "codes": (4, 6), "value": 4, "fit_rows": 300, "iterations": 1},
    "backward/10k": {"rows": 30, "agents": 6, "width": 8, "value": 4},
    "backward/10k/agents": {"rows": 30, "agents": 6, "width": 8, "value": 4},
    "sparse/1k": {"rows": 60, "budget": 9, "few": (2,), "width": 8, "value": 4, "items": 90, "sizes": (8, 8)},
    "train/log": {"events": 200, "items": 30, "users": 3, "rows": 12, "agents": 6, "width": 8, "value": 4},
    "leaf/100k": {"rows": 80, "agents": 6, "width": 8, "sizes": (8, 8), "value": 4},
    "vote/1k": {"rows": 50, "sizes": (8, 8), "fanout": (2, 3), "budget": 5},
    "vote/short": {"users": 5, "short": (3, 9), "sizes": (8, 8), "fanout": (2, 3), "budget": 5},
    "encode/2x512": {"rows": 300, "width": 8, "sizes": (16, 16), "sample": 50},
    "fit/512": {"rows": 1200, "width": 8, "size": 16, "iterations": 4, "sample": 60},
    "attend/500": {"candidates": 9, "tokens": 7},
    "match/500": {"leaves": 12, "candidates": 9, "sizes": (8, 8), "value": 4},
    "request/cold": {"rows": 60, "budget": 6, "candidates": 5, "width": 8, "sizes": (8, 8)},
    "request/cached": {"rows": 60, "budget": 6, "candidates": 5, "width": 8, "sizes": (8, 8)},
}


@pytest.mark.parametrize("work", TINY)
def test_hisac_and_every_installed_peer_pass_on_small_data(work: str):
    build, full, _ = works.WORKS[work]
    absent = {name: "not installed" for name, version in peers.installed().items() if version is None}
    absent[peers.COMPILE] = "left out"
    found = list(build(work, OPS, 1, **(full | TINY[work])))
    for c in found:
        out = harness.run_case(c, 1, 1.0, absent, ONCE)
        assert not out.failures
        assert any(r["role"] == "hisac" for r in out.rows)
        assert c.data in DATA and all(r["data"] == c.data for r in out.rows)
        reasons = {e["variant"]: e["reason"] for e in out.left_out}
        reasons.pop("scikit-learn MiniBatchKMeans", None)  # its batches are larger than this data
        assert all(reason.endswith(("not installed", "left out")) for reason in reasons.values()), reasons
    assert found


def test_every_builder_and_both_modes_are_tried_on_small_data():
    modes = {(build, full.get("normalize")) for build, full, _ in works.WORKS.values()}
    assert modes == {(works.WORKS[work][0], works.WORKS[work][1].get("normalize")) for work in TINY}


def test_the_real_history_is_the_longest_of_the_sample_by_ids():
    found = data.household(50)
    assert found.item.dtype == np.int32 and len(found.item) > 4000 and found.item.max() < len(found.table)
    assert len(np.unique(found.item)) < len(found.item), "people buy again"
    np.testing.assert_allclose(np.linalg.norm(found.table, axis=1), 1, rtol=1e-5)
    assert found.fitted.shape == (50, found.table.shape[1])


def test_a_truth_is_found_only_when_a_result_is_checked(monkeypatch: pytest.MonkeyPatch):
    for name in ("route64", "leaf64", "lloyd64", "encode64", "backward64", "inertia"):
        monkeypatch.setattr(truth, name, lambda *a, name=name: pytest.fail(f"{name} was called"))
    for work in ("route/short", "leaf/100k", "backward/10k/agents", "route/real", "fit/512"):
        build, full, _ = works.WORKS[work]
        for c in build(work, OPS, 1, **(full | TINY[work])):
            for v in c.variants:
                if v.role == "hisac":
                    v.make()(0)


def test_one_wrong_code_or_center_is_refused():
    book = reference.Codebook(data.structured(np.random.default_rng(0), 5, (8, 8), 8)[0])

    def off_by_one(book: Any, x: Any) -> Any:
        codes = reference.encode(book, x)
        codes[0, 1] = (codes[0, 1] + 1) % 16
        return codes

    def nudged(x: Any, codes: Any, *, iterations: int) -> Any:
        book = reference.fit(x, codes, iterations=iterations)
        return reference.Codebook([np.nextafter(c, np.float32(9)) for c in book.centers])

    assert book.sizes == (8, 8)
    for work, ops in (("encode/2x512", {"encode": off_by_one}), ("fit/512", {"fit": nudged})):
        build, full, _ = works.WORKS[work]
        (c,) = build(work, SimpleNamespace(**vars(reference) | ops), 1, **(full | TINY[work]))
        (failure,) = harness.run_case(harness.Case(**vars(c) | {"variants": c.variants[:1]}), 1, 1.0, {}, ONCE).failures
        assert "parity" in failure["reason"]


# ------------------------------------------------------------------------------------------------ command line and JSON

WRONG = """
from hisac.reference import *
from hisac import reference
def vote(*a, **k):
    agents = reference.vote(*a, **k)
    return agents._replace(votes=agents.votes + 1) if "fanout" in k else agents
"""


@needs_threadpoolctl
def test_a_planted_wrong_operation_ends_with_exit_code_1_and_no_row(tmp_path: Path):
    (tmp_path / "planted.py").write_text(WRONG)
    out = tmp_path / "rows.json"
    command = [sys.executable, BENCH / "run.py", "--suite=vote/1k", "--quick", "--threads=1", "--module=planted"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--json", out], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": path, "OPENBLAS_CORETYPE": "Haswell"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "! vote/1k" in done.stdout and "failed:" in done.stderr
    result = json.loads(out.read_text())
    assert [r["variant"] for r in result["rows"] if r["role"] == "hisac"] == ["budget"]
    assert [f["variant"] for f in result["failures"]] == ["fanout"]
    assert result["schema"] == run.SCHEMA and result["quick"] is True and result["threads"] == [1]
    assert set(result) >= {"commit", "date", "machine", "versions", "peak", "left_out", "suites"}
    assert result["machine"]["cpu"] and set(result["versions"]) >= {
        "python",
        "numpy",
        "hisac",
        *peers.PACKAGES.values(),
    }
    assert result["machine"]["removed_variables"]["OPENBLAS_CORETYPE"] == "Haswell"
    (record,) = result["machine"]["blas"]
    assert record["threads"] == 1 and record["forced"] == {} and record["libraries"]
    assert (record["torch"] is None) == (peers.installed()["torch"] is None)
    native = kernel(blas.scrub(os.environ, 1)[0])
    found = [one["kernel"] for one in record["libraries"] if (one["owner"], one["api"]) == ("numpy", "openblas")]
    assert not found or found == [native]
    assert result["peak"][0]["gflops"] > 0 and "float32" in result["peak"][0]["how"]
    for row in result["rows"]:
        assert set(row) >= ROW and row["error"] <= row["bound"] and row["median_ms"] > 0
        assert row["ratio_to_best_peer"] is not None and row["peer"]
    assert blas.problem(result) is None and "budget" in table.render(result)
    assert not list(tmp_path.glob("*.part"))


def test_help_names_the_works_without_an_operation():
    text = " ".join(run.parser().format_help().split())
    assert all(name in text for name in works.NO_OPERATION)
    assert all(work in text for work in works.WORKS)


@pytest.mark.parametrize("arguments", [["--suite", "nothing"], ["--threads", "0"], ["--threads", "x"]])
def test_wrong_calls_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        run.parser().parse_args(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_commit_names_a_checkout_or_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run.commit() == "unknown"


def test_the_gpus_program_runs_on_a_cpu(tmp_path):
    """Every work, variant and peer of bench/gpu.py, each checked against its truth, but those that need a GPU."""
    pytest.importorskip("torch")
    command = [sys.executable, BENCH / "gpu.py", "--device=cpu", "--quick", f"--json={tmp_path / 'rows.json'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert result["failures"] == [] and result["quick"] is True
    assert {entry["reason"].split(":")[0] for entry in result["left_out"]} <= {"c", "cuda", "flash_attn_interface"}
    works = {"route/batch", "route/ragged", "route/short"}
    works |= {f"{work} agents" for work in works} | {
        "backward/batch",
        "vote/batch",
        "encode/items",
        "attend/batch",
        "match/batch",
    }
    assert {row["work"] for row in result["rows"] if row["role"] == "hisac"} == works
