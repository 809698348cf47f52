# SPDX-License-Identifier: Apache-2.0
"""Renders hisac's rows of a run as a Markdown table.

python bench/table.py rows.json
python bench/table.py rows.json --readme bench/README.md            # replaces what is between the markers
python bench/table.py rows.json --readme bench/README.md --check    # fails if that differs

A run without records of the kernels that its BLAS ran, or whose kernels were forced, makes no table.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import blas

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
MARKED = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)

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
    peaks = ", ".join(f"{p['gflops']:.0f} GFLOP/s (threads: {p['threads']})" for p in data["peak"])
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "hisac")
    how = data["peak"][0]["how"] if data["peak"] else "not measured"
    kind = "Quick run: sizes reduced, not a measurement. " if data["quick"] else ""
    dirty = "-dirty" if data["commit"].endswith("-dirty") else ""
    return (
        f"{kind}{machine['cpu']}, {machine['cores']} cores, {data['date'][:10]}, commit {data['commit'][:12]}{dirty}; "
        f"{used}. "
        "Medians in ms; ratios above 1 mean that hisac is faster than the fastest peer from the same inputs. "
        f"Peak: {peaks}, {how}. "
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


def main() -> int:
    """The exit code: 0, 1 if --check finds a difference, 2 for a wrong call."""
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text.add_argument("json", type=Path, help="what bench/run.py --json wrote")
    text.add_argument("--readme", type=Path, help=f"the file whose text between {BEGIN} and {END} is the table")
    text.add_argument("--check", action="store_true", help="write nothing; exit 1 if the text differs")
    arguments = text.parse_args()
    if arguments.check and arguments.readme is None:
        text.error("--check needs --readme")
    data = json.loads(arguments.json.read_text())
    problem = blas.problem(data)
    if problem:
        print(f"{arguments.json}: {problem}", file=sys.stderr)
        return 2
    table = render(data)
    if arguments.readme is None:
        print(table, end="")
        return 0
    old = arguments.readme.read_text()
    if len(MARKED.findall(old)) != 1:
        text.error(f"{arguments.readme}: expected {BEGIN} and {END} once, found {len(MARKED.findall(old))} pairs")
    new = MARKED.sub(lambda _: f"{BEGIN}\n{table}{END}", old)
    if new == old:
        return 0
    if arguments.check:
        print(f"{arguments.readme}: the table differs from {arguments.json}; run without --check", file=sys.stderr)
        return 1
    arguments.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
