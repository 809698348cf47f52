# SPDX-License-Identifier: Apache-2.0
"""The bench: no kernel is forced, a table needs their records, two builds take turns."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blas
import data
import pair
import run
import table
from bench_support import BENCH, kernel, needs_threadpoolctl

# ------------------------------------------------------------------------------------------------------------- kernels


FORCING = (
    "OPENBLAS_CORETYPE OPENBLAS_L2_SIZE MKL_ENABLE_INSTRUCTIONS MKL_DEBUG_CPU_TYPE MKL_CBWR ONEDNN_MAX_CPU_ISA "
    "DNNL_MAX_CPU_ISA ATEN_CPU_CAPABILITY BLIS_ARCH_TYPE GOTO_NUM_THREADS NPY_DISABLE_CPU_FEATURES HISAC_ISA"
).split()


def test_no_variable_that_forces_a_kernel_reaches_a_child():
    harmless = {"PATH": "/bin", "OPENBLAS_VERBOSE": "2", "OMP_WAIT_POLICY": "passive", "HISAC_NUM_THREADS": "2"}
    kept, removed = blas.scrub(dict.fromkeys(FORCING, "x") | harmless | {"MKL_NUM_THREADS": "9"}, 2)
    assert removed == dict.fromkeys(FORCING, "x")
    assert kept == harmless | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "2")


@needs_threadpoolctl
def test_a_forced_kernel_is_not_the_one_that_a_child_runs():
    asked = os.environ | {"OPENBLAS_CORETYPE": "Haswell"}
    if kernel(asked) != "Haswell":
        pytest.skip("NumPy's BLAS here does not obey OPENBLAS_CORETYPE=Haswell")
    found = kernel(blas.scrub(asked, 1)[0])
    if found == "Haswell":
        assert kernel(blas.scrub(os.environ, 1)[0]) == "Haswell"
        pytest.skip("Haswell's kernel is this machine's own")
    assert found


@needs_threadpoolctl
def test_records_name_the_forced_and_the_loaded(monkeypatch: pytest.MonkeyPatch):
    for name in FORCING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    record = blas.records(2, {"numpy": "any", "torch": None, "not_there": None})
    assert record["threads"] == 2 and record["torch"] is None
    assert record["forced"].items() >= {"OPENBLAS_CORETYPE": "Haswell"}.items()
    assert all(set(one) >= {"owner", "api", "kernel", "version", "threading"} for one in record["libraries"])
    assert "/" not in json.dumps(record["libraries"])


def test_owners_of_libraries():
    folder = "/a/lib/python3.11/site-packages"
    assert blas.owner(Path(f"{folder}/numpy.libs/libscipy_openblas64_-1.so")) == "numpy"
    assert blas.owner(Path(f"{folder}/faiss_cpu.libs/libopenblaso.so")) == "faiss"
    assert blas.owner(Path(f"{folder}/torch/lib/libgomp.so.1")) == "torch"
    assert blas.owner(Path("/usr/lib/libblas.so")) == "lib"


def test_what_torch_says_of_its_build():
    text = (
        "  - Intel(R) oneAPI Math Kernel Library Version 2024.2-Product Build 1\n  - Intel(R) MKL-DNN v3.12.0 (Git Hash"
    )
    text += " 80)\n  - OpenMP 201511 (a.k.a.)\n  - Build settings: BLAS_INFO=mkl, BUILD_TYPE=Release"
    expected = {"capability": "AVX2", "blas": "mkl", "mkl": "2024.2-Product", "onednn": "3.12.0", "openmp": "201511"}
    assert blas.torch_record(text, "AVX2") == expected
    assert blas.torch_record("", "NEON") == dict.fromkeys(expected) | {"capability": "NEON"}


def test_without_threadpoolctl_there_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(blas, "available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["run.py", "--suite=vote/1k"])
    assert run.main() == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "pip install threadpoolctl" in err


# --------------------------------------------------------------------------------------------------------------- table


def blas_record(threads: int, **more: Any) -> dict[str, Any]:
    numpy = {"owner": "numpy", "api": "openblas", "kernel": "SkylakeX", "version": "0.3.31", "threading": "pthreads"}
    torch = {"capability": "AVX512", "blas": "mkl", "mkl": "2024.2", "onednn": "3.12.0", "openmp": "201511"}
    openmp = {"owner": "torch", "api": "openmp", "kernel": None, "version": None, "threading": None}
    return {"threads": threads, "forced": {}, "libraries": [numpy, openmp], "torch": torch} | more


def result_of_a_run(ratio: float = 2.5) -> dict[str, Any]:
    def row(work: str, name: str, threads: int, **more: Any) -> dict[str, Any]:
        base = {"work": work, "variant": name, "threads": threads, "role": "hisac", "median_ms": 1234.5, "peer": "SDPA"}
        base["data"] = data.CLUSTERED if work.startswith("vote") else data.UNIT
        return base | {"ratio_to_best_peer": ratio, "share_of_peak": 0.756, "error": 1.2e-6} | more

    return {
        "commit": "0123456789abcdef-dirty",
        "date": "2026-01-02T03:04:05+00:00",
        "quick": False,
        "threads": [1, 2],
        "machine": {"cpu": "A CPU", "cores": 2, "removed_variables": {}, "blas": [blas_record(1), blas_record(2)]},
        "versions": {"numpy": "2.0", "hisac": "0.1", "faiss-cpu": "not installed"},
        "peak": [{"threads": 1, "gflops": 100.0, "how": "float32 product"}],
        "rows": [
            row("route/1k", "fp32", 1),
            row("route/1k", "fp32", 2, error=3e-6, ratio_to_best_peer=0.5),
            row("route/1k", "SDPA", 1, role="peer"),
            row("vote/1k", "fanout", 2, error=0.0, share_of_peak=None, ratio_to_best_peer=None, median_ms=0.0123),
        ],
    }


def test_the_table():
    lines = table.render(result_of_a_run()).splitlines()
    assert lines[0].split(" | ")[2:5] == ["ms, 1 thread", "against the best peer", "of peak"]
    assert lines[2] == "| route/1k | fp32 | 1230 | 2.5 x SDPA | 76% | 1230 | 0.5 x SDPA | 76% | 3.0e-06 |"
    assert lines[3] == "| vote/1k | fanout | - | - | - | 0.0123 | - | - | 0 |"
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert "A CPU, 2 cores, 2026-01-02, commit 0123456789ab-dirty; numpy 2.0, faiss-cpu not installed." in lines[5]
    kernels = "Kernels: numpy: openblas 0.3.31 SkylakeX (pthreads); torch: MKL 2024.2, oneDNN 3.12.0, AVX512. "
    assert lines[5].endswith(f"{kernels}Data: route: random unit vectors; vote: clustered codes.")


def test_data_is_named_by_suites_where_all_works_share_it():
    rows = [("route/1k", "u"), ("route/10k", "u"), ("vote/1k", "c"), ("vote/2k", "c"), ("route/real", "r")]
    found = table.data_of([{"work": work, "data": kind} for work, kind in rows])
    assert found == "route/1k, route/10k: u; vote: c; route/real: r"


REFUSED = {
    "no record": lambda d: d["machine"].pop("blas"),
    "not of two threads": lambda d: d["machine"]["blas"].pop(),
    "no word of what was removed": lambda d: d["machine"].pop("removed_variables"),
    "no kernels": lambda d: d["machine"]["blas"][0].pop("libraries"),
    "forced": lambda d: d["machine"]["blas"][1].update(forced={"OPENBLAS_CORETYPE": "Haswell"}),
    "no machine": lambda d: d.pop("machine"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_run_with_forced_or_unknown_kernels_makes_no_table(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    result, rows, readme = result_of_a_run(), tmp_path / "rows.json", tmp_path / "README.md"
    assert blas.problem(result) is None
    REFUSED[why](result)
    rows.write_text(json.dumps(result))
    readme.write_text(before := f"{table.BEGIN}\nold\n{table.END}\n")
    for more in ([], ["--readme", str(readme)], ["--readme", str(readme), "--check"]):
        monkeypatch.setattr(sys, "argv", ["table.py", str(rows), *more])
        assert table.main() == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and str(rows) in err
        assert ("OPENBLAS_CORETYPE=Haswell" in err) == (why == "forced")
    assert readme.read_text() == before


def test_the_readme_is_updated_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows, readme = tmp_path / "rows.json", tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")

    def call(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", ["table.py", str(rows), "--readme", str(readme), *more])
        return table.main()

    rows.write_text(json.dumps(result_of_a_run()))
    assert call("--check") == 1 and "old" in readme.read_text()
    assert call() == 0 and call("--check") == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "| route/1k |" in text
    rows.write_text(json.dumps(result_of_a_run(ratio=7.0)))
    assert call("--check") == 1
    readme.write_text("no markers\n")
    with pytest.raises(SystemExit) as ended:
        call()
    assert ended.value.code == 2


# ---------------------------------------------------------------------------------------------------------------- pair


def test_the_median_ratio_of_pairs_and_its_interval():
    old = np.linspace(1.0, 2.0, 21)
    row = pair.statistics(old, 1.25 * old)
    assert row["old_ms"] == pytest.approx(1500) and row["new_ms"] == pytest.approx(1875) and row["pairs"] == 21
    assert row["ratio"] == row["low"] == row["high"] == pytest.approx(1.25), "drift that both share is no difference"
    ratios = np.linspace(0.9, 1.1, 21)
    row = pair.statistics(np.ones(21), np.random.default_rng(5).permutation(ratios))
    assert row["ratio"] == pytest.approx(1.0) and 0.94 <= row["low"] < 1 < row["high"] <= 1.06
    assert row == pair.statistics(np.ones(21), np.random.default_rng(5).permutation(ratios))


@pytest.mark.parametrize(
    ("ratios", "slower"),
    [
        ([1.0] * 15, False),
        ([1.04] * 15, False),
        ([1.06] * 15, True),
        ([0.5] * 15, False),
        ([1.0] * 8 + [1.2] * 7, True),  # the median is 1, but might as well be 1.2
    ],
)
def test_slower_by_the_median_or_by_the_upper_end(ratios: list[float], slower: bool):
    assert pair.statistics([1.0] * 15, ratios)["slower"] is slower


def test_the_order_is_swapped_from_pair_to_pair():
    log: list[str] = []

    def ask(side: str) -> float:
        log.append(side)
        return float(len(log))

    assert pair.alternate(ask, 3) == {"old": [1.0, 4.0, 5.0], "new": [2.0, 3.0, 6.0]}
    assert log == ["old", "new", "new", "old", "old", "new"]


def test_processes_of_one_thread_share_a_processor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7, 3}, raising=False)
    assert [pair.processor(n, 1) for n in range(3)] == [3, 7, 3] and pair.processor(0, 2) is None
    monkeypatch.delattr(os, "sched_getaffinity")
    assert pair.processor(0, 1) is None


def test_short_calls_are_repeated_alike_in_both():
    assert pair.repeats([1e-3, 2e-3], 5e-3) == 5 and pair.repeats([1.0, 0.9], 5e-3) == 1
    assert pair.repeats([0.0, 1.0], 5e-3) == 5000


HARNESS = """
def rest(pause): pass
def parity(variant, result, copy):
    if result != "right": raise ValueError("parity: wrong")
"""
WORKS = """
import os, time
from types import SimpleNamespace as New
WORKS = {works}
def names(chosen): return [w for w in WORKS if w in chosen or "all" in chosen]
def cases(work, ops, threads, quick):
    print("noise on stdout")
    if WORKS[work] is None: raise TypeError("no such verb")
    variants = []
    for name, seconds, result in WORKS[work]:
        def call(i, seconds=seconds, result=result):
            if result == "crash": os._exit(3)
            time.sleep(seconds)
            return result
        role = "peer" if name == "peer" else "hisac"
        variants.append(New(name=name, role=role, make=lambda call=call: call))
    yield New(work=work, dtype="float32", copies=2, variants=variants)
"""


def in_turn(
    folder: Path, old: dict[str, Any], new: dict[str, Any], *more: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:  # fmt: skip
    """pair.py over made works, work -> [(variant, seconds, result)], of a package without anything in it."""
    (folder / "package" / "nothing").mkdir(parents=True)
    (folder / "package" / "nothing" / "__init__.py").write_text("__version__ = '7'\n")
    command = [sys.executable, BENCH / "pair.py", "--module=nothing", "--quick", f"--json={folder / 'pair.json'}"]
    for side, made in (("old", old), ("new", new)):
        (folder / side).mkdir()
        (folder / side / "harness.py").write_text(HARNESS)
        (folder / side / "works.py").write_text(WORKS.replace("{works}", repr(made)))
        command += [f"--{side}={sys.executable}", f"--{side}-bench={folder / side}"]
    path = os.pathsep.join([str(folder / "package"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *more], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False
    )
    found = folder / "pair.json"
    return done, json.loads(found.read_text()) if found.exists() else {}


def test_a_slower_row_is_measured_again_and_ends_with_exit_code_1(tmp_path: Path):
    right = "right"
    old = {"a/1": [("v", 2e-3, right), ("gone", 0, right), ("peer", 9, right)], "a/2": [("v", 0, right)], "old": []}
    new = {"a/1": [("v", 5e-3, right), ("come", 0, right)], "a/2": None, "new": []}
    done, result = in_turn(tmp_path, old, new, "--pairs=3", "--restarts=2")
    assert done.returncode == 1, done.stderr
    (row,) = result["rows"]
    assert (row["work"], row["variant"], row["dtype"], row["slower"]) == ("a/1", "v", "float32", True)
    assert row["pairs"] == 3 * 2 * pair.MORE and row["first"]["pairs"] == 3 * 2 and len(row["restart_ratios"]) == 2
    assert row["old_ms"] >= 2 and row["new_ms"] >= 5 and 1.3 < row["low"] <= row["ratio"] <= row["high"]
    assert "slower: a/1 v float32" in done.stderr and "failed: a/2: TypeError: no such verb" in done.stderr
    assert result["only"] == {"old": ["old", "a/1 gone float32", "a/2 v float32"], "new": ["new", "a/1 come float32"]}
    assert "| a/1 | v float32 |" in done.stdout and "Only in old, not compared: old, a/1 gone" in done.stdout
    assert "noise on stdout" not in done.stdout and "noise on stdout" in done.stderr
    assert result["old"]["version"] == "7" and result["null"] is True and "Null run" in done.stdout


def test_a_faster_row_and_a_row_that_was_broken_before_fail_nothing(tmp_path: Path):
    old = {"a/1": [("v", 6e-3, "right"), ("w", 0, "wrong")]}
    new = {"a/1": [("v", 1e-3, "right"), ("w", 0, "wrong")]}
    done, result = in_turn(tmp_path, old, new, "--pairs=3", "--restarts=1")
    assert done.returncode == 0, done.stderr
    assert [(r["variant"], r["slower"], "first" in r) for r in result["rows"]] == [("v", False, False)]
    assert {f["side"]: f["reason"] for f in result["failures"]} == dict.fromkeys(
        pair.SIDES, "ValueError: parity: wrong"
    )


def test_a_crash_is_a_clear_error(tmp_path: Path):
    works = {"a/1": [("v", 0, "right")]}
    done, result = in_turn(tmp_path, works, {"a/1": [("v", 0, "crash")]}, "--suite=a/1")
    assert done.returncode == 2 and not result
    assert "pair: new: the process ended with 3 while open a/1 True" in done.stderr


def test_wrong_calls_of_pair_end_with_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    done, _ = in_turn(tmp_path, {"a/1": []}, {"a/1": []}, "--suite=b")
    assert done.returncode == 2 and "no work is named b" in done.stderr
    with pytest.raises(pair.Broken, match="old: /no/such/python: No such file"):
        pair.Process("old", "/no/such/python", BENCH, 1, True)
    with pytest.raises(pair.Broken, match="old: the process ended with 1 while starting"):
        pair.Process("old", sys.executable, tmp_path, 1, True)
    assert "No module named 'harness'" in capfd.readouterr().err


def test_a_build_against_itself_takes_the_same_time(tmp_path: Path):
    found = tmp_path / "pair.json"
    command = [sys.executable, BENCH / "pair.py", f"--old={sys.executable}", f"--new={sys.executable}", "--quick"]
    command += ["--suite=call/vote", "--pairs=5", "--restarts=1", f"--json={found}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: other work on this machine was in the way
    result = json.loads(found.read_text())
    assert result["null"] is True and result["failures"] == [] and not any(result["only"].values())
    assert [r["variant"] for r in result["rows"]] == ["fanout", "budget"]
    assert all(0.4 < r["ratio"] < 2.5 and r["old_ms"] < 1 for r in result["rows"])
    assert (done.returncode == 1) == any(r["slower"] for r in result["rows"])
    assert result["old"] == result["new"] and len(result["old"]["digest"]) == 16 and result["old"]["bench_commit"]
