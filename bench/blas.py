# SPDX-License-Identifier: Apache-2.0
"""Which kernels the peers' libraries multiply with: nothing may force them, and each run records them.

`scrub` makes the environment of a child process, `records` asks the loaded libraries, `problem` says why a run's
figures are not fair, `described` names the kernels under a table.
"""

import fnmatch
import importlib
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# a library that is told its kernel, its cache size or its instructions may run at half of its speed
FORCING = (
    "OPENBLAS_*", "GOTO_*", "MKL_*", "BLIS_*", "NVPL_BLAS_*", "ARMPL_*", "ONEDNN_*", "DNNL_*", "ATEN_CPU_CAPABILITY",
    "NPY_ENABLE_CPU_FEATURES", "NPY_DISABLE_CPU_FEATURES", "FAISS_OPT_LEVEL", "HISAC_ISA",
)  # fmt: skip
HARMLESS = ("*_VERBOSE", *THREAD_VARIABLES)
MISSING = "bench: threadpoolctl is not installed, which says which kernels a BLAS has; pip install threadpoolctl"

Record = dict[str, Any]


def forced(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that force a library's kernels, with their values."""

    def one_of(name: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) for p in patterns)

    return {n: v for n, v in sorted(environment.items()) if one_of(n, FORCING) and not one_of(n, HARMLESS)}


def scrub(environment: Mapping[str, str], threads: int) -> tuple[dict[str, str], dict[str, str]]:
    """(the environment of a child of `threads` threads, the forcing variables that it lacks)."""
    removed = forced(environment)
    kept = {name: value for name, value in environment.items() if name not in removed}
    return kept | dict.fromkeys(THREAD_VARIABLES, str(threads)), removed


def available() -> bool:
    """Whether the libraries can be asked."""
    return importlib.util.find_spec("threadpoolctl") is not None


def records(threads: int, packages: Mapping[str, str | None]) -> Record:
    """What is loaded in this process after an import of those `packages` (module -> version or None) that there are."""
    for name, version in packages.items():
        if version is not None:
            importlib.import_module(name)
    found = importlib.import_module("threadpoolctl").threadpool_info()
    libraries = []
    for one in found:
        path = Path(one["filepath"])
        libraries.append(
            {
                "owner": owner(path),
                "file": path.name,
                "api": one["internal_api"],
                "kernel": one.get("architecture"),
                "version": one.get("version"),
                "threading": one.get("threading_layer"),
                "threads": one.get("num_threads"),
            }
        )
    libraries.sort(key=lambda one: (one["owner"], one["file"]))
    return {
        "threads": threads,
        "forced": forced(os.environ),
        "libraries": libraries,
        "torch": of_torch() if packages.get("torch") is not None else None,
    }


def owner(path: Path) -> str:
    """The package that a library's file was installed with: the folder below site-packages, else the file's own."""
    parts = path.parts[:-1]
    folder = parts[parts.index("site-packages") + 1] if "site-packages" in parts[:-1] else path.parent.name
    return folder.removesuffix(".libs").removesuffix("_cpu")


def of_torch() -> Record:
    """torch's own, most of it linked into it and so not seen by threadpoolctl; None where it does not say."""
    torch = importlib.import_module("torch")
    return torch_record(str(torch.__config__.show()), str(torch.backends.cpu.get_cpu_capability()))


def torch_record(text: str, capability: str) -> Record:
    """From what torch says of its build."""

    def first(pattern: str) -> str | None:
        match = re.search(pattern, text)
        return match[1] if match else None

    return {
        "capability": capability,
        "blas": first(r"BLAS_INFO=(\w+)"),
        "mkl": first(r"Math Kernel Library Version (\S+)"),
        "onednn": first(r"MKL-DNN v(\S+)"),
        "openmp": first(r"OpenMP (\d+)"),
    }


def problem(data: Mapping[str, Any]) -> str | None:
    """Why no table may be made of a run; None if one may."""
    machine = data.get("machine", {})
    found = {one.get("threads"): one for one in machine.get("blas", [])}
    lacking = [n for n in data.get("threads", []) if not {"forced", "libraries", "torch"} <= set(found.get(n, {}))]
    if lacking or not found or "removed_variables" not in machine:
        which = f" (threads: {', '.join(map(str, lacking))})" if lacking else ""
        return f"the run has no record of the kernels that its BLAS ran{which}; run bench/run.py again"
    variables = {f"{name}={value}" for one in found.values() for name, value in one["forced"].items()}
    if variables:
        return f"the run's kernels were forced by {', '.join(sorted(variables))}; run bench/run.py, which unsets them"
    return None


def described(data: Mapping[str, Any]) -> str:
    """Each BLAS with its kernel, for the foot of a table; the same at all thread counts, as a rule."""
    names: list[str] = []
    for record in data["machine"]["blas"]:
        for one in record["libraries"]:
            if one["api"] != "openmp":
                names.append(f"{one['owner']}: {one['api']} {one['version']} {one['kernel']} ({one['threading']})")
        torch = record["torch"]
        if torch is not None:
            parts = [f"MKL {torch['mkl']}"] if torch["mkl"] else [str(torch["blas"])]
            parts += [f"oneDNN {torch['onednn']}"] if torch["onednn"] else []
            names.append(f"torch: {', '.join(parts)}, {torch['capability']}")
    return "; ".join(dict.fromkeys(names)) or "none that threadpoolctl knows"
