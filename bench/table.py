# SPDX-License-Identifier: Apache-2.0
"""Renders hisac's rows of a run as a Markdown table.

python bench/table.py rows.json
python bench/table.py rows.json --readme bench/README.md            # replaces what is between the markers
python bench/table.py rows.json --readme bench/README.md --check    # fails if that differs

A run without records of the kernels that its BLAS ran, or whose kernels were forced, makes no table.
"""

import sys
from typing import Any

import blas
import page

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"

Row = dict[str, Any]


def number(value: float) -> str:
    """Three significant digits, never in exponents."""
    text = f"{value:.3g}"
    return f"{float(text):.0f}" if "e" in text else text


def small(value: float) -> str:
    """An error: 0, or two digits."""
    return f"{value:.1e}" if value else "0"


def cells(row: Row | None) -> list[str]:
    """Time, the ratio to the best peer, and the share of the peak; dashes where there is none."""
    if row is None:
        return ["-", "-", "-"]
    ratio, share = row["ratio_to_best_peer"], row["share_of_peak"]
    return [
        number(row["median_ms"]),
        "-" if ratio is None else f"{number(ratio)} x {row['peer']}",
        "-" if share is None else f"{share:.0%}",
    ]


def data_of(rows: list[Row]) -> str:
    """Which works have which data: suites where all of a suite has the same."""
    of = {r["work"]: r["data"] for r in rows}
    suites: dict[str, set[str]] = {}
    for work, kind in of.items():
        suites.setdefault(work.split("/")[0], set()).add(kind)
    names: dict[str, list[str]] = {}
    for work, kind in of.items():
        suite = work.split("/")[0]
        names.setdefault(kind, []).append(suite if len(suites[suite]) == 1 else work)
    return "; ".join(f"{', '.join(dict.fromkeys(works))}: {kind}" for kind, works in names.items())


def caption(data: dict[str, Any]) -> str:
    """Where the figures are from."""
    machine, versions = data["machine"], data["versions"]
    peaks = [f"{p['gflops']:.0f} GFLOP/s (threads: {p['threads']}) of {p['how']}" for p in data["peak"]]
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "hisac")
    kind = "Quick run: sizes reduced, not a measurement. " if data["quick"] else ""
    dirty = "-dirty" if data["commit"].endswith("-dirty") else ""
    return (
        f"{kind}{machine['cpu']}, {machine['cores']} cores, {data['date'][:10]}, commit {data['commit'][:12]}{dirty}; "
        f"{used}. "
        "Medians in ms; ratios above 1 mean that hisac is faster than the fastest peer from the same inputs. "
        f"Peak: {'; '.join(peaks) or 'not measured'}. "
        f"Kernels: {blas.described(data)}. "
        f"Data: {data_of(data['rows'])}."
    )


def render(data: dict[str, Any]) -> str:
    """The table and its caption."""
    threads = data["threads"]
    head = ["work", "variant"]
    for n in threads:
        head += [f"ms, {n} thread{'s' * (n > 1)}", "against the best peer", "of peak"]
    lines = [[*head, "error"], ["---"] * (len(head) + 1)]
    rows = {(r["work"], r["variant"], r["threads"]): r for r in data["rows"] if r["role"] == "hisac"}
    for work, variant in dict.fromkeys((w, v) for w, v, _ in rows):
        found = [rows.get((work, variant, n)) for n in threads]
        error = max(r["error"] for r in found if r is not None)
        lines.append([work, variant, *(cell for r in found for cell in cells(r)), small(error)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{caption(data)}\n"


def checked(data: dict[str, Any]) -> str:
    """The table of a run whose BLAS is recorded and was not forced, or ValueError."""
    if problem := blas.problem(data):
        raise ValueError(problem)
    return render(data)


def main() -> int:
    """The exit code of `page.main`."""
    return page.main(__doc__, BEGIN, END, checked)


if __name__ == "__main__":
    sys.exit(main())
