# SPDX-License-Identifier: Apache-2.0
"""Times two installed builds of hisac in turn and says which rows became slower.

    python bench/pair.py --old OLD/bin/python --new NEW/bin/python --suite route --suite vote --json pair.json
    python bench/pair.py --old OLD/bin/python --new NEW/bin/python --old-bench OLD_CHECKOUT/bench

Each build has a resident process (bench/pair_child.py), which runs the works of a bench folder: this one, or one of its
own where the signatures differ. Only hisac's variants run. The processes take turns, one sample each, first the one and
then the other; who waits is asleep. Those of one thread share a processor, each restart another one: what else runs on
it meets both alike. Fresh processes start --restarts times, because the layout of pages is luck.

ratio: median of new / old over the pairs, with its 95 % interval by a bootstrap over pairs. A row is slower if that
ratio is above 1.05 or the interval's upper end above 1.08; it is then measured again with more pairs, which decides.
The exit code is 1 if a row stays slower or the new build fails on one that the old build does, 2 if a process breaks.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import blas
from run import HERE, cpu, load, write

SCHEMA = 1
RATIO, UPPER = 1.05, 1.08
MORE = 3  # times as many pairs for a row that looks slower
RESAMPLES = 5000
SAMPLE, QUICK_SAMPLE = 5e-3, 2e-3  # short calls are repeated until a sample takes as many seconds
WARM = 0.05  # calls of fewer seconds are timed after one that is not
SIDES = ("old", "new")

Row = dict[str, Any]


class Broken(RuntimeError):
    """A process ended or answered nonsense."""


class Process:
    """One build's process; `ask` is a request and its answer."""

    def __init__(
        self, side: str, python: str, bench: Path, threads: int, quick: bool, module: str = "hisac",
        cpu: int | None = None,
    ) -> None:  # fmt: skip
        environment, _ = blas.scrub(os.environ, threads)
        command = [python, str(HERE / "pair_child.py"), f"--bench={bench.resolve()}", f"--threads={threads}"]
        command += [f"--module={module}", *["--quick"] * quick, *([] if cpu is None else [f"--cpu={cpu}"])]
        self.side, self.doing = side, "starting"
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True, encoding="utf-8"
            )
        except OSError as problem:
            raise Broken(f"{side}: {python}: {problem.strerror}") from None
        try:
            self.about = self.answer()
        except BaseException:
            self.close()
            raise

    def answer(self) -> Row:
        """The next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            code = self.process.wait()
            raise Broken(f"{self.side}: the process ended with {code} while {self.doing}; what it said is above")
        try:
            found: Row = json.loads(line)
        except ValueError:
            raise Broken(f"{self.side}: expected a line of JSON while {self.doing}, got {line[:80]!r}") from None
        return found

    def ask(self, do: str, **more: Any) -> Row:
        """Send a request and wait."""
        assert self.process.stdin is not None
        self.doing = " ".join([do, *(str(v) for v in more.values())])
        try:
            self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended, which `answer` finds
        return self.answer()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.close()
        except OSError:
            pass
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def processor(restart: int, threads: int) -> int | None:
    """The one that a pair of processes keeps to; None where it may use several."""
    if threads > 1 or not hasattr(os, "sched_getaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[restart % len(allowed)]


# --------------------------------------------------------------------------------------------------------- arithmetic


def statistics(old: Sequence[float], new: Sequence[float]) -> Row:
    """Paired seconds -> medians, the median ratio and its interval (percentile bootstrap over pairs, fixed seed)."""
    a, b = np.asarray(old), np.asarray(new)
    ratios = b / a
    drawn = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), (0.025, 0.975))
    row = {"old_ms": float(np.median(a)) * 1e3, "new_ms": float(np.median(b)) * 1e3, "ratio": float(np.median(ratios))}
    row |= {"low": float(low), "high": float(high), "pairs": len(ratios)}
    row["slower"] = row["ratio"] > RATIO or row["high"] > UPPER
    return row


def repeats(seconds: Sequence[float], sample: float) -> int:
    """Calls a sample, for both processes alike."""
    return max(1, min(5000, math.ceil(sample / max(min(seconds), 1e-9))))


def alternate(ask: Callable[[str], float], pairs: int) -> dict[str, list[float]]:
    """`pairs` samples of each side, the order swapped from pair to pair."""
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for i in range(pairs):
        for side in SIDES if i % 2 == 0 else SIDES[::-1]:
            times[side].append(ask(side))
    return times


# ---------------------------------------------------------------------------------------------------------- measuring


class Found:
    """What the process pairs said, over all restarts."""

    def __init__(self) -> None:
        self.about: dict[str, Row] = {}
        self.times: dict[str, list[dict[str, list[float]]]] = {}
        """row -> one entry a restart"""
        self.only: dict[str, list[str]] = {side: [] for side in SIDES}
        self.failures: list[Row] = []

    def note(self, side: str, entry: Row) -> None:
        """Keep a failure once."""
        if not any((f["side"], f["row"]) == (side, entry["row"]) for f in self.failures):
            self.failures.append({"side": side, **entry})

    def alone(self, side: str, names: Sequence[str]) -> None:
        """Keep what only one build has, once."""
        self.only[side] += [name for name in names if name not in self.only[side]]


def one_pair(arguments: argparse.Namespace, restart: int, pairs: int, only: set[str] | None, found: Found) -> None:
    """A fresh pair of processes through all works, or through those rows that are in `only`. The first of all checks
    every result."""
    check = restart == 0 and only is None
    more = (arguments.threads, arguments.quick, arguments.module, processor(restart, arguments.threads))
    with (
        Process("old", arguments.old, arguments.old_bench, *more) as old,
        Process("new", arguments.new, arguments.new_bench, *more) as new,
    ):
        both = {"old": old, "new": new}
        found.about = {side: p.about for side, p in both.items()}
        works = {side: p.ask("works", chosen=arguments.suite)["works"] for side, p in both.items()}
        for side, other in (SIDES, SIDES[::-1]):
            found.alone(side, [w for w in works[side] if w not in works[other]])
        for work in [w for w in works["new"] if w in works["old"]]:
            if only is not None and not any(row.split(" ")[0].startswith(work) for row in only):
                continue
            opened = {side: p.ask("open", work=work, check=check) for side, p in both.items()}
            first = {side: {r["row"]: r["seconds"] for r in o["rows"]} for side, o in opened.items()}
            for side, other in (SIDES, SIDES[::-1]):
                for entry in opened[side]["failures"]:
                    found.note(side, entry)
                found.alone(side, [row for row in first[side] if row not in first[other]])
            for row, seconds in first["new"].items():
                if row not in first["old"] or (only is not None and row not in only):
                    continue
                n = repeats([seconds, first["old"][row]], QUICK_SAMPLE if arguments.quick else SAMPLE)

                request = {"row": row, "repeats": n, "warm": seconds < WARM}

                def ask(side: str, request: Row = request) -> float:
                    return float(both[side].ask("sample", **request)["seconds"])

                found.times.setdefault(row, []).append(alternate(ask, pairs))


def rows_of(found: Found) -> list[Row]:
    """The statistics of every row."""
    rows = []
    for name, restarts in found.times.items():
        joined = {side: [t for one in restarts for t in one[side]] for side in SIDES}
        work, rest = name.split(" ", 1)
        variant, dtype = rest.rsplit(" ", 1)
        row = {
            "row": name,
            "work": work,
            "variant": variant,
            "dtype": dtype,
            **statistics(joined["old"], joined["new"]),
        }
        row["restart_ratios"] = [statistics(one["old"], one["new"])["ratio"] for one in restarts]
        rows.append(row)
    return rows


def measure(arguments: argparse.Namespace) -> tuple[list[Row], Found]:
    """All rows; those that look slower were measured again, with the first figures kept under "first"."""
    found = Found()
    for n in range(arguments.restarts):
        one_pair(arguments, n, arguments.pairs, None, found)
    rows = rows_of(found)
    slower = {r["row"] for r in rows if r["slower"]}
    if slower:
        print(f"measured again with {MORE} times the pairs: {', '.join(sorted(slower))}", flush=True)
        again = Found()
        for n in range(arguments.restarts):
            one_pair(arguments, n, MORE * arguments.pairs, slower, again)
        second = {r["row"]: r for r in rows_of(again)}
        rows = [second[r["row"]] | {"first": r} if r["row"] in second else r for r in rows]
    return rows, found


def bad(rows: Sequence[Row], found: Found) -> list[str]:
    """What makes the exit code 1."""
    lines = [f"slower: {r['row']}, {r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in rows if r["slower"]]
    broken_before = {f["row"] for f in found.failures if f["side"] == "old"}
    for f in found.failures:
        if f["side"] == "new" and f["row"] not in broken_before:
            lines.append(f"failed: {f['row']}: {f['reason']}")
    return lines


def table(data: Row) -> str:
    """Markdown, and what was not compared."""
    lines = ["| work | variant | old ms | new ms | new / old | 95 % | pairs | |", "| --- " * 8 + "|"]
    for r in data["rows"]:
        mark = "slower" if r["slower"] else "faster" if r["high"] < 1 / RATIO else ""
        lines.append(
            f"| {r['work']} | {r['variant']} {r['dtype']} | {r['old_ms']:.4g} | {r['new_ms']:.4g} | {r['ratio']:.3f} "
            f"| {r['low']:.3f}-{r['high']:.3f} | {r['pairs']} | {mark} |"
        )
    for side in SIDES:
        if data["only"][side]:
            lines.append(f"\nOnly in {side}, not compared: {', '.join(data['only'][side])}.")
    lines += [f"\nFailed in {f['side']}: {f['row']}: {f['reason']}" for f in data["failures"]]
    builds = "; ".join(
        f"{side} {data[side]['version']}, commit {data[side]['commit'][:12]}, build {data[side]['digest']}"
        for side in SIDES
    )
    note = " Null run: both are the same build, so all ratios should be about 1." if data["null"] else ""
    return "\n".join([*lines, f"\nThreads: {data['threads']}. {builds}.{note}"])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def positive(value: str) -> int:
        if int(value) < 1:
            raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
        return int(value)

    for side in SIDES:
        text.add_argument(f"--{side}", required=True, metavar="PYTHON", help=f"interpreter with the {side} build")
        text.add_argument(
            f"--{side}-bench", type=Path, default=HERE, metavar="DIR", help="the works it runs (default: this folder)"
        )
    text.add_argument("--suite", action="append", metavar="NAME", help="a suite, one work, or all (default)")
    text.add_argument("--pairs", type=positive, default=15, help="pairs of samples of each pair of processes")
    text.add_argument("--restarts", type=positive, default=3, help="fresh pairs of processes")
    text.add_argument("--threads", type=positive, default=1)
    text.add_argument("--quick", action="store_true", help="small sizes: a smoke test, not a measurement")
    text.add_argument("--json", type=Path, metavar="PATH")
    text.add_argument("--module", default="hisac", help=argparse.SUPPRESS)
    return text


def main() -> int:
    """The exit code."""
    arguments = parser().parse_args()
    arguments.suite = arguments.suite or ["all"]
    before = load()
    try:
        rows, found = measure(arguments)
    except Broken as problem:
        print(f"pair: {problem}", file=sys.stderr)
        return 2
    if not rows and not any(found.only.values()) and not found.failures:
        print(f"pair: no work is named {', '.join(arguments.suite)}", file=sys.stderr)
        return 2
    same = [found.about[side]["digest"] for side in SIDES]
    data = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **found.about,
        "null": same[0] == same[1] != "unknown",
        "threads": arguments.threads,
        "quick": arguments.quick,
        "restarts": arguments.restarts,
        "machine": {
            "cpu": cpu(),
            "cores": os.cpu_count(),
            "load_before": before,
            "removed_variables": blas.forced(os.environ),
        },
        "rows": rows,
        "only": found.only,
        "failures": found.failures,
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write(arguments.json, data)
    print(table(data))
    problems = bad(rows, found)
    for line in problems:
        print(line, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
