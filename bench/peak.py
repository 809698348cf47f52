# SPDX-License-Identifier: Apache-2.0
"""The machine's float32 FMA peak, measured: independent multiply-adds in registers, compiled here for this CPU.

Without a C compiler the rate of a large matrix product stands in for it, which BLAS may keep well below the peak.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = """
typedef float V __attribute__((vector_size(BYTES)));
void fma_loop(long n, float* io) {
  V sum[CHAINS], m = (V){} + io[0], a = (V){} + io[1];
  for (int j = 0; j < CHAINS; ++j) sum[j] = a * (float)j;
  for (long i = 0; i < n; ++i)
    for (int j = 0; j < CHAINS; ++j) sum[j] = sum[j] * m + a;
  for (int j = 1; j < CHAINS; ++j) sum[0] += sum[j];
  for (unsigned k = 0; k < BYTES / sizeof(float); ++k) io[k] = sum[0][k];
}
"""
WIDTHS = (16, 32, 64)  # bytes a vector
CHAINS = 12  # hides the latency of two units; more are not kept in registers
FLAGS = ("-O3", "-funroll-loops", "-ffp-contract=fast", "-shared", "-fPIC")


def build(folder: Path, size: int) -> Callable[[int, Any], None]:
    """The loop for vectors of `size` bytes."""
    source, library = folder / "fma.c", folder / f"fma{size}.so"
    source.write_text(SOURCE)
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    defines = (f"-DBYTES={size}", f"-DCHAINS={CHAINS}")
    native = ("-march=native", "-mprefer-vector-width=512") if os.uname().machine == "x86_64" else ("-mcpu=native",)
    command = [compiler, *FLAGS, *native, *defines, str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    function = ctypes.CDLL(str(library)).fma_loop
    function.argtypes, function.restype = (ctypes.c_long, ctypes.c_void_p), None
    return lambda n, io: function(n, io.ctypes.data)


def rate(loop: Callable[[int, Any], None], flops: float, threads: int, samples: int) -> float:
    """Best GFLOP/s of several samples of some 20 ms on each of `threads`; `flops` are those of one step."""
    arrays = [np.tile(np.array([0.5, 0.25], np.float32), 32) for _ in range(threads)]

    def seconds(n: int) -> float:
        for a in arrays:
            a[:2] = 0.5, 0.25
        start = time.perf_counter()
        list(pool.map(lambda a: loop(n, a), arrays))
        return time.perf_counter() - start

    with ThreadPoolExecutor(threads) as pool:
        n = max(1000, int(1_000_000 * 0.02 / seconds(1_000_000)))
        return threads * n * flops / min(seconds(n) for _ in range(samples)) / 1e9


def product(quick: bool) -> dict[str, Any]:
    """The stand-in."""
    n = 1024 if quick else 3072
    a = np.random.default_rng(0).standard_normal((n, n), dtype=np.float32)
    seconds = []
    for _ in range(4 if quick else 8):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    how = f"no C compiler, so the rate of a float32 product of {n} x {n} matrices in NumPy stands in for the peak"
    return {"gflops": 2 * n**3 / min(seconds) / 1e9, "how": how}


def measure(threads: int, quick: bool) -> dict[str, Any]:
    """{"gflops", "how"} with `threads` threads."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for size in WIDTHS:
            try:
                loop = build(Path(folder), size)
            except (OSError, subprocess.SubprocessError):
                continue
            found[size] = rate(loop, 2.0 * CHAINS * size / 4, threads, 10 if quick else 25)
    if not found:
        return product(quick)
    best = max(found, key=lambda size: found[size])
    return {"gflops": found[best], "how": f"float32 multiply-adds in {8 * best}-bit vectors, compiled for this CPU"}
