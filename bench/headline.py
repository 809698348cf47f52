# SPDX-License-Identifier: Apache-2.0
"""Renders README's few numbers from a run: verbs and requests, one thread, with the fastest peer's own time.

python bench/headline.py rows.json
python bench/headline.py rows.json --readme README.md            # replaces what is between the markers
python bench/headline.py rows.json --readme README.md --check    # fails if that differs

A work that the run does not have gives no row; a quick run gives no numbers at all.
"""

import re
import sys
from typing import Any, NamedTuple

import page
from table import number

BEGIN, END = "<!-- numbers -->", "<!-- /numbers -->"

Row = dict[str, Any]


class Line(NamedTuple):
    """A row of the table: the first of the works that the run has, with the sizes that the run names."""

    works: tuple[str, ...]
    variant: str
    size: str
    """What a row's size must match."""
    text: str
    """What the row is called; its fields are the groups of `size`."""


ROWS = r"T (?P<rows>\d+)"
AGENTS = r"(?P<agents>\d+)"
LINES = (
    Line(
        ("route/10k/agents", "route/10k"),
        "fp32",
        ROWS + rf", M {AGENTS}, D (?P<width>\d+), V \d+(, (?P<mode>\w+) mode)?$",
        "`route`, {mode} mode: {rows} behaviours of width {width} to {agents} tokens",
    ),
    Line(
        ("sparse/10k",),
        "sparse 32",
        ROWS + rf" of \d+ codes, M {AGENTS}, .*$",
        "the same with `sparse=32`: {rows} behaviours, {agents} agents",
    ),
    Line(("vote/10k",), "budget", ROWS + rf", .* budget {AGENTS}$", "`vote`: {rows} behaviours, {agents} agents"),
    Line(
        ("encode/2x512",),
        "fp32",
        r"^(?P<rows>\d+) items, D \d+, (?P<codes>.+) codes$",
        "`encode`: {rows} items, {codes} codes",
    ),
    Line(
        ("request/cold",),
        "budget",
        ROWS + rf", budget {AGENTS}, .* (?P<candidates>\d+) candidates",
        "a request, `vote`, `route` in history mode, `attend`: {rows} behaviours, {candidates} candidates",
    ),
    Line(
        ("request/cached",),
        "budget",
        ROWS + rf", budget {AGENTS}, .* (?P<candidates>\d+) candidates",
        "a request with kept tokens, `attend`: {agents} tokens, {candidates} candidates",
    ),
)
PEERS = {
    "np.unique budget": "the same rule in NumPy",
    "faiss flat": "faiss, exact search",
    "torch vote, expanded, SDPA": "the same steps in torch",
    "SDPA on all behaviours": "torch's attention to all behaviours",
}
"""What a visitor calls a peer; any other is called as in the run."""
MODE = "history"  # of `route` where a run's size names none


def grouped(text: str | None) -> str:
    """10000 -> 10,000; other text as it is; None is the mode."""
    return MODE if text is None else f"{int(text):,}" if text.isdecimal() else text


def time(ms: float) -> str:
    """Milliseconds, or microseconds below a tenth."""
    return f"{number(ms)} ms" if ms >= 0.1 else f"{number(ms * 1e3)} us"


def line(wanted: Line, rows: dict[tuple[str, str], Row]) -> str | None:
    """One row of the table; None where the run has neither the work nor a peer of it."""
    for work in wanted.works:
        mine = rows.get((work, wanted.variant))
        if mine is None or mine["ratio_to_best_peer"] is None:
            continue
        sizes = re.search(wanted.size, mine["size"])
        if sizes is None:
            raise ValueError(f"{work}: its size is {mine['size']!r}, expected {wanted.size!r}")
        name = wanted.text.format(**{key: grouped(value) for key, value in sizes.groupdict().items()})
        ratio = mine["ratio_to_best_peer"]
        peer = f"{PEERS.get(mine['peer'], mine['peer'])}, {time(mine['median_ms'] * ratio)}"
        return f"| {name} | {time(mine['median_ms'])} | {peer} | {number(ratio)} |"
    return None


def caption(data: dict[str, Any]) -> str:
    """Where the figures are from."""
    machine, versions = data["machine"], data["versions"]
    doubt = " Which kernels NumPy's BLAS ran is not recorded: ratios to NumPy may be too high."
    kernels = "" if machine.get("blas") else doubt
    return (
        f"One thread of a machine with {machine['cores']} cores of an {machine['cpu']}; medians; {data['date'][:10]}, "
        f"commit {data['commit'][:12]}, torch {versions['torch']}, NumPy {versions['numpy']}.{kernels}"
    )


def render(data: dict[str, Any]) -> str:
    """The table and its caption. Raises ValueError for a quick run, or one without any of the works."""
    if data["quick"]:
        raise ValueError("a quick run measures nothing, expected a whole one")
    rows = {(r["work"], r["variant"]): r for r in data["rows"] if r["role"] == "hisac" and r["threads"] == 1}
    lines = [text for text in (line(wanted, rows) for wanted in LINES) if text is not None]
    if not lines:
        raise ValueError("the run has none of the works, expected at least one")
    head = ["| work | hisac | fastest peer | ratio |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *lines, "", caption(data)]) + "\n"


def main() -> int:
    """The exit code of `page.main`."""
    return page.main(__doc__, BEGIN, END, render)


if __name__ == "__main__":
    sys.exit(main())
