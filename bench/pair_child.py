# SPDX-License-Identifier: Apache-2.0
"""The resident process of bench/pair.py: one build, the works of the bench folder that it is given.

One JSON request a line on stdin, one JSON answer a line on stdout; whatever else prints goes to stderr. Between two
requests it waits for stdin, asleep. Requests, by their "do":

    works   {chosen}           -> {works}: the names among `chosen` that this folder has
    open    {work, check}      -> {rows: [{row, seconds}], failures: [{row, reason}]}: makes the work's data, and calls
                                  and checks every variant of hisac once
    sample  {row, repeats, warm} -> {seconds}: of one call; warm: after one that is not timed
"""

import argparse
import gc
import hashlib
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


def commit_of(folder: Path) -> str:
    """The commit of the checkout that a folder is in, with -dirty where it has changes; "unknown" outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def source_commit() -> str:
    """The commit of the folder or repository that hisac was installed from, as it stands now."""
    try:
        text = importlib.metadata.distribution("hisac").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
    origin = json.loads(text) if text else {}
    if "vcs_info" in origin:
        return str(origin["vcs_info"].get("commit_id", "unknown"))
    url = str(origin.get("url", ""))
    return commit_of(Path(url.removeprefix("file://"))) if url.startswith("file://") else "unknown"


def digest(package: Path) -> str:
    """Of a package's Python files and libraries: two builds with the same one are the same build."""
    total = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".so", ".pyd", ".dylib")):
        total.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return total.hexdigest()[:16]


class Child:
    """The works of one build, by request."""

    def __init__(self, bench: Path, module: str, threads: int, quick: bool) -> None:
        self.ops = importlib.import_module(module)
        self.threads, self.quick, self.bench = threads, quick, bench
        if hasattr(self.ops, "set_num_threads"):
            self.ops.set_num_threads(threads)
        self.harness, self.list = (importlib.import_module(name) for name in ("harness", "works"))
        self.calls: dict[str, tuple[Callable[[int], Any], int]] = {}

    def about(self) -> Answer:
        """Which build this is."""
        file = getattr(self.ops, "__file__", None)
        return {
            "version": str(getattr(self.ops, "__version__", "unknown")),
            "commit": source_commit(),
            "digest": digest(Path(file).parent) if file and Path(file).name == "__init__.py" else "unknown",
            "bench_commit": commit_of(self.bench),
            "python": sys.version.split()[0],
            "backends": str(self.ops.backends()) if hasattr(self.ops, "backends") else "unknown",
        }

    def works(self, chosen: list[str]) -> Answer:
        """Suites, works or "all" -> works."""
        return {"works": list(self.list.names(chosen))}

    def open(self, work: str, check: bool) -> Answer:
        """Make the data of a work, in place of the one before."""
        self.calls.clear()
        gc.collect()
        rows: list[Answer] = []
        failures: list[Answer] = []
        try:
            for case in self.list.cases(work, self.ops, self.threads, self.quick):
                for variant in case.variants:
                    if variant.role == "hisac":
                        self.add(f"{case.work} {variant.name} {case.dtype}", case, variant, check, rows, failures)
        except Exception as problem:  # a build that lacks what the work uses
            failures.append({"row": work, "reason": reason(problem)})
        return {"rows": rows, "failures": failures}

    def add(
        self, row: str, case: Any, variant: Any, check: bool, rows: list[Answer], failures: list[Answer]
    ) -> None:  # fmt: skip
        """A variant that works becomes a row."""
        try:
            call = variant.make()
            for i in range(case.copies):
                result = call(i)
                if check:
                    self.harness.parity(variant, result, i)
            start = time.perf_counter()
            call(0)
            rows.append({"row": row, "seconds": time.perf_counter() - start})
        except Exception as problem:
            failures.append({"row": row, "reason": reason(problem)})
        else:
            self.calls[row] = (call, case.copies)

    def sample(self, row: str, repeats: int, warm: bool) -> Answer:
        """The mean of some calls; `warm` brings back the caches and pages that the other process's turn has cost."""
        call, copies = self.calls[row]
        gc.disable()
        if warm:
            call(0)
        start = time.perf_counter()
        for k in range(repeats):
            call(k % copies)
        seconds = (time.perf_counter() - start) / repeats
        gc.enable()
        self.harness.rest(0.01 if self.threads > 1 else 0.0)  # no thread of this one is awake when the other's turn is
        return {"seconds": seconds}


def reason(problem: Exception) -> str:
    """One line."""
    traceback.print_exception(problem)
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


def main() -> int:
    """Answer until stdin ends."""
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text.add_argument("--bench", type=Path, required=True)
    text.add_argument("--module", default="hisac")
    text.add_argument("--threads", type=int, default=1)
    text.add_argument("--quick", action="store_true")
    text.add_argument("--cpu", type=int, help="the only processor to run on")
    arguments = text.parse_args()
    if arguments.cpu is not None:
        os.sched_setaffinity(0, {arguments.cpu})
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    sys.path[0] = str(arguments.bench)  # instead of this file's own folder: no module of another bench gets in
    child = Child(arguments.bench, arguments.module, arguments.threads, arguments.quick)

    def answer(found: Answer) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    answer(child.about())
    doing: dict[str, Callable[..., Answer]] = {"works": child.works, "open": child.open, "sample": child.sample}
    for line in sys.stdin:
        request = json.loads(line)
        answer(doing[request.pop("do")](**request))
    return 0


if __name__ == "__main__":
    sys.exit(main())
