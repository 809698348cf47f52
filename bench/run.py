# SPDX-License-Identifier: Apache-2.0
"""Times hisac against its peers and writes the rows as JSON.

    python bench/run.py --suite route --suite vote --json rows.json
    python bench/run.py --suite all --quick --json rows.json

One process for each thread count: OpenMP and BLAS read theirs when they are loaded, and no library may be told which
kernels to run (bench/blas.py). In it every work's variants take turns. A row is printed only after its result agreed
with the truth; if one of hisac's does not, the exit code is 1.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import blas

SCHEMA = 2
NOT_INSTALLED = "not installed"
QUICK_WAIT = "passive"  # threads that spin are the peers at their fastest, but stall a smoke test on a busy machine
HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------------------ machine


def commit() -> str:
    """The checkout's commit, with -dirty where it has changes; "unknown" outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def cpu() -> str:
    """The CPU's name."""
    try:
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load() -> float:
    """The load average of the last minute. Other work spoils rows of two threads, because OpenMP's spin while they
    wait for each other (measured: medians up to 30 times higher)."""
    return round(os.getloadavg()[0], 2)


# -------------------------------------------------------------------------------------------------------------- child


def measure(ops: ModuleType, chosen: list[str], threads: int, quick: bool) -> dict[str, Any]:
    """Rows, peers left out, failures, peak and versions at one thread count."""
    import numpy as np

    import harness
    import peak
    import peers
    import works

    found = peers.installed()
    absent = {name: NOT_INSTALLED for name, version in found.items() if version is None}
    if quick:
        absent[peers.COMPILE] = "left out by --quick: compiling takes longer than the rest of the run"
    pause = 0.0 if threads == 1 else 0.01
    effort = harness.Effort(0.02, 3, 5, pause) if quick else harness.Effort(0.5, 3, 51, pause)
    rate = peak.measure(threads, quick)
    print(f"threads {threads}: {rate['gflops']:.0f} GFLOP/s, {rate['how']}", flush=True)
    result: dict[str, Any] = {"rows": [], "left_out": [], "failures": [], "peak": {"threads": threads, **rate}}
    for work in works.names(chosen):
        for case in works.cases(work, ops, threads, quick):
            out = harness.run_case(case, threads, rate["gflops"], absent, effort)
            for row in out.rows:
                print(harness.line(row), flush=True)
            for entry in out.left_out:
                print(f"- {work:<15} {entry['variant']}: {entry['reason']}", flush=True)
            for entry in out.failures:
                print(f"! {work:<15} {entry['variant']} {entry['dtype']}: {entry['reason']}", flush=True)
            for name in ("rows", "left_out", "failures"):
                result[name] += getattr(out, name)
    # other work may have held the first measurement down, and nothing can hold one up
    result["peak"] = max(
        result["peak"], {"threads": threads, **peak.measure(threads, quick)}, key=lambda p: p["gflops"]
    )
    for row in result["rows"]:
        if row["gflops"] is not None:
            row["share_of_peak"] = row["gflops"] / result["peak"]["gflops"]
    result["versions"] = {
        "python": platform.python_version(),
        "hisac": getattr(ops, "__version__", "unknown"),
        "numpy": np.__version__,
        **{peers.PACKAGES[name]: version or NOT_INSTALLED for name, version in found.items()},
    }
    result["backends"] = str(ops.backends()) if hasattr(ops, "backends") else "unknown"
    return result


def child(arguments: argparse.Namespace) -> int:
    """Measure at one thread count, in a process that was started with its environment."""
    warnings.filterwarnings("ignore")
    import peers

    (threads,) = arguments.threads
    ops = importlib.import_module(arguments.module)
    if hasattr(ops, "set_num_threads"):
        ops.set_num_threads(threads)
    peers.settle(threads)
    record = blas.records(threads, peers.installed())
    write(arguments.json, measure(ops, arguments.suite, threads, arguments.quick) | {"blas": record})
    return 0


# ------------------------------------------------------------------------------------------------------------- parent


def write(path: Path, data: dict[str, Any]) -> None:
    """JSON, written aside and renamed."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    aside.replace(path)


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """One child a thread count; the JSON of a whole run."""
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": arguments.quick,
        "suites": arguments.suite,
        "threads": arguments.threads,
        "machine": {
            "removed_variables": blas.forced(os.environ),
            "blas": [],
            "cpu": cpu(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "load_before": load(),
            "wait_policy": os.environ.get("OMP_WAIT_POLICY", QUICK_WAIT if arguments.quick else "default"),
        },
        "versions": {},
        "peak": [],
        "rows": [],
        "left_out": [],
        "failures": [],
    }
    if result["machine"]["load_before"] > 0.5:
        print(f"load average {result['machine']['load_before']}: other work is running, so expect noise", flush=True)
    for threads in arguments.threads:
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "rows.json"
            command = [
                sys.executable,
                str(HERE / "run.py"),
                "--child",
                f"--module={arguments.module}",
                f"--json={part}",
            ]
            command += ["--threads", str(threads), *(f"--suite={s}" for s in arguments.suite)]
            command += ["--quick"] * arguments.quick
            environment, _ = blas.scrub(os.environ, threads)
            if arguments.quick:
                environment.setdefault("OMP_WAIT_POLICY", QUICK_WAIT)
            code = subprocess.run(command, env=environment, check=False).returncode
            if code or not part.exists():
                result["failures"].append(
                    {"threads": threads, "variant": "all", "reason": f"the process ended with {code}"}
                )
                continue
            found = json.loads(part.read_text())
        result["peak"].append(found["peak"])
        result["versions"], result["machine"]["backends"] = found["versions"], found["backends"]
        result["machine"]["blas"].append(found["blas"])
        for name in ("rows", "left_out", "failures"):
            result[name] += found[name]
    return result


def thread_counts(text: str) -> list[int]:
    """ "1,2" -> [1, 2]"""
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"expected counts of at least 1, got {text}")
    return counts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    import works

    text = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"works: {', '.join(works.WORKS)}\n"
        f"no operation yet, so no row: {', '.join(works.NO_OPERATION)}\n"
        "rows: * is hisac, p a peer from inputs packed beforehand, which is never the best peer;\n"
        "ratios above 1 mean that hisac is faster. For backward/10k against its own forward see route/10k.",
    )  # fmt: skip
    choices = [*works.SUITES, *works.WORKS, "all"]
    text.add_argument(
        "--suite", action="append", choices=choices, metavar="NAME", help=f"{', '.join(works.SUITES)}, one work, or all"
    )
    text.add_argument("--json", type=Path, metavar="PATH", help="where to write the rows")
    text.add_argument(
        "--quick", action="store_true", help="small sizes and few rounds: a smoke test, not a measurement"
    )
    text.add_argument(
        "--threads", type=thread_counts, default=[1, 2], metavar="1,2", help="thread counts (default 1,2)"
    )
    text.add_argument("--module", default="hisac", help=argparse.SUPPRESS)
    text.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return text


def main() -> int:
    """The exit code: 0, 1 if a row failed, 2 for a wrong call."""
    arguments = parser().parse_args()
    arguments.suite = arguments.suite or ["all"]
    if not blas.available():
        print(blas.MISSING, file=sys.stderr)
        return 2
    if arguments.child:
        return child(arguments)
    if arguments.json:  # a folder that cannot be made must not be found out at the end
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    result = run_all(arguments)
    if arguments.json:
        write(arguments.json, result)
    mine = [r for r in result["rows"] if r["role"] == "hisac"]
    print(f"{len(mine)} rows of hisac, {len(result['rows']) - len(mine)} of peers, {len(result['failures'])} failures")
    for entry in result["failures"]:
        print(f"failed: {entry}", file=sys.stderr)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
