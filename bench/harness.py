# SPDX-License-Identifier: Apache-2.0
"""The measuring: interleaved timing, the parity gate, rows.

A `Case` is one work at one dtype: hisac's variants and their peers over the same inputs. Every variant is first called
and checked against the truth; a variant that is wrong is not timed. Those that remain take turns, so that drift of the
clock or a noisy neighbour meets all of them alike.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Call = Callable[[int], Any]
"""One run of a variant on input copy i."""


@dataclass(frozen=True)
class Variant:
    """One way to do a case's work."""

    name: str
    make: Callable[[], Call]
    """Prepares and returns the call; what it does is not timed."""
    check: Callable[[Any, int], float]
    """(result, input copy) -> error against the truth."""
    bound: float
    """Largest error that passes."""
    role: str = "peer"
    """hisac; peer: end to end, from hisac's inputs; packed: from inputs prepared beforehand, never the best peer."""
    needs: tuple[str, ...] = ()
    """Packages without which it cannot run."""
    extra: Callable[[], Mapping[str, float]] = dict
    """More columns of its row."""
    flops: float | None = None
    """Floating-point operations of one run by formula, where they differ from the case's; 0: none worth counting."""


@dataclass(frozen=True)
class Case:
    """One work at one dtype."""

    work: str
    dtype: str
    size: str
    data: str
    """What the inputs are, in a few words."""
    rows: int
    """Behaviours, items or candidates of one run, for ns_per_row."""
    flops: float
    truth: str
    variants: tuple[Variant, ...]
    copies: int = 1
    """Different inputs that the runs go through in turn, so that no branch predictor learns one by heart."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: `share` seconds a variant within `least` to `most` rounds."""

    share: float
    least: int
    most: int
    pause: float
    """Seconds of sleep before a sample, see `rest`."""
    sample: float = 2e-3
    """Short calls are repeated until a sample takes this long."""


@dataclass
class Outcome:
    """What came of a case."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)


def rest(
    pause: float, sleep: Callable[[float], None] = time.sleep, busy: Callable[[], float] = time.process_time
) -> None:
    """Sleep `pause` seconds, again and again until no thread of the process is busy meanwhile: with several threads the
    pool of the variant before still spins (OpenMP's for some 10 ms, OpenBLAS's for 110) and holds the next one up."""
    for _ in range(100 if pause else 0):
        before = busy()
        sleep(pause)
        if busy() - before <= 0.1 * pause:
            return


def interleave(
    calls: Mapping[str, Call],
    first: Mapping[str, float],
    copies: int,
    effort: Effort,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[dict[str, list[float]], dict[str, tuple[Any, int]]]:
    """Time every call in turn; `first` is a rough duration of each, which sets its number of rounds and repetitions.

    Each round starts with another variant, so none always follows the same one. Returns the seconds of each sample, and
    each variant's last result with its input copy.
    """
    names = list(calls)
    rounds = {
        n: min(max(math.ceil(effort.share / max(first[n], effort.sample)), effort.least), effort.most) for n in names
    }
    inner = {n: max(1, min(200, math.ceil(effort.sample / max(first[n], 1e-9)))) for n in names}
    total = max(rounds.values(), default=0)
    times: dict[str, list[float]] = {n: [] for n in names}
    last: dict[str, tuple[Any, int]] = {}
    turn = 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        for r in range(total):
            shift = r % len(names)
            for name in names[shift:] + names[:shift]:
                if r * rounds[name] // total == (r - 1) * rounds[name] // total:
                    continue  # slow variants sit out some rounds, evenly
                call, n = calls[name], inner[name]
                rest(effort.pause, sleep)
                result = None
                start = clock()
                for k in range(turn, turn + n):
                    result = call(k % copies)
                times[name].append((clock() - start) / n)
                turn += n
                last[name] = (result, (turn - 1) % copies)
    finally:
        if collecting:
            gc.enable()
    return times, last


def parity(variant: Variant, result: Any, copy: int) -> float:
    """The error of a result; ValueError when it is above the bound or not a number."""
    error = float(variant.check(result, copy))
    if not error <= variant.bound:
        raise ValueError(f"parity: error {error:.3g}, expected at most {variant.bound:.3g}")
    return error


def run_case(
    case: Case, threads: int, peak: float, absent: Mapping[str, str], effort: Effort,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:  # fmt: skip
    """Check, time, check again. `left_out` names the peers that failed or need what is `absent` (what -> why),
    `failures` the hisac variants that failed; neither gets a row."""
    out = Outcome()
    label = {"work": case.work, "dtype": case.dtype, "threads": threads}

    def drop(v: Variant, reason: str) -> None:
        (out.failures if v.role == "hisac" else out.left_out).append({**label, "variant": v.name, "reason": reason})

    calls: dict[str, Call] = {}
    first: dict[str, float] = {}
    error: dict[str, float] = {}
    by_name = {v.name: v for v in case.variants}
    for v in case.variants:
        missing = [f"{p}: {absent[p]}" for p in v.needs if p in absent]
        if missing:
            out.left_out.append({**label, "variant": v.name, "reason": ", ".join(missing)})
            continue
        try:
            call = v.make()
            start = clock()
            results = [call(i) for i in range(case.copies)]
            first[v.name] = (clock() - start) / case.copies
            error[v.name] = max(parity(v, r, i) for i, r in enumerate(results))
            if first[v.name] < 1:  # the first call may have compiled or allocated
                start = clock()
                call(0)
                first[v.name] = clock() - start
            calls[v.name] = call
        except Exception as problem:  # a peer's fault must not end the run
            drop(v, f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}")
    times, last = interleave(calls, first, case.copies, effort, clock)
    for name, (result, copy) in last.items():
        try:
            error[name] = max(error[name], parity(by_name[name], result, copy))
        except Exception as problem:
            del times[name]
            drop(by_name[name], f"after timing: {problem}")
    out.rows = rows(case, threads, peak, times, error)
    return out


def rows(
    case: Case, threads: int, peak: float, times: Mapping[str, Sequence[float]], error: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One dictionary a variant. ratio_to_best_peer = best end-to-end peer's median / own median: above 1 is faster."""
    by_name = {v.name: v for v in case.variants}
    median = {name: statistics.median(ts) for name, ts in times.items()}

    def best(role: str) -> str | None:
        return min((n for n in median if by_name[n].role == role), key=lambda n: median[n], default=None)

    peer, packed = best("peer"), best("packed")
    found = []
    for name, ts in times.items():
        v, m = by_name[name], median[name]
        flops = case.flops if v.flops is None else v.flops
        low, high = (statistics.quantiles(ts, n=4)[::2]) if len(ts) > 1 else (m, m)
        found.append(
            {
                "work": case.work,
                "variant": name,
                "role": v.role,
                "dtype": case.dtype,
                "threads": threads,
                "median_ms": m * 1e3,
                "min_ms": min(ts) * 1e3,
                "quartiles_ms": [low * 1e3, high * 1e3],
                "samples": len(ts),
                "ns_per_row": m * 1e9 / case.rows,
                "peer": peer,
                "ratio_to_best_peer": None if peer is None else median[peer] / m,
                "packed_peer": packed,
                "ratio_to_packed_peer": None if packed is None else median[packed] / m,
                "error": error[name],
                "bound": v.bound,
                "truth": case.truth,
                "size": case.size,
                "data": case.data,
                "gflops": flops / m / 1e9 if flops else None,
                "share_of_peak": flops / m / 1e9 / peak if flops else None,
                **v.extra(),
            }
        )
    return found


def line(row: Mapping[str, Any]) -> str:
    """A row for the terminal."""
    low, high = row["quartiles_ms"]
    mark = {"hisac": "*", "peer": " ", "packed": "p"}[row["role"]]
    text = f"{mark} {row['work']:<15} {row['variant']:<27} {row['dtype']:<8} T={row['threads']}"
    text += f" {row['median_ms']:>10.4g} ms [{low:.4g}, {high:.4g}]  error {row['error']:.1e}"
    if row["ratio_to_best_peer"] is not None:
        text += f"  {row['ratio_to_best_peer']:6.2f}x {row['peer']}"
    if row["gflops"] is not None:
        text += f"  {row['gflops']:.1f} GFLOP/s ({row['share_of_peak']:.0%} of peak)"
    return text
