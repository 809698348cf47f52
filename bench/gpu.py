# SPDX-License-Identifier: Apache-2.0
"""Times hisac on a GPU against its peers and writes the rows as JSON, in the form of bench/run.py.

python bench/gpu.py --json rows.json
python bench/gpu.py --device cpu --quick        # a smoke test of this program
"""

import argparse
import gc
import importlib.util
import json
import platform
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import gpu_works
import harness
import hisac
from run import SCHEMA, commit


def median_seconds(f: Any, clock: Any, rounds: int = 7) -> float:
    """Of one run."""
    f()
    times = []
    for _ in range(rounds):
        start = clock()
        f()
        times.append(clock() - start)
    return float(sorted(times)[rounds // 2])


def machine(device: str, clock: Any) -> dict[str, Any]:
    """What the device does at most, measured: a bfloat16 product and a copy."""
    n = 256 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * n**3 / median_seconds(lambda: a @ b, clock) / 1e9
    source = torch.empty(n * n * 8, dtype=torch.uint8, device=device)
    copied = 2 * source.numel() / median_seconds(lambda: source.clone(), clock) / 1e9
    name = platform.processor() or "CPU" if device == "cpu" else torch.cuda.get_device_name()
    return {"gpu": name, "product_gflops": product, "copy_gb_per_s": copied}


def main() -> int:
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text.add_argument("--json", type=Path, metavar="PATH", help="where to write the rows")
    text.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    text.add_argument("--work", action="append", metavar="NAME", help="route/batch, ..; all if none is named")
    text.add_argument("--quick", action="store_true", help="small sizes and few rounds: not a measurement")
    text.add_argument("--seconds", type=float, default=540, help="after which no further work is begun")
    arguments = text.parse_args()
    began, device = time.monotonic(), arguments.device
    torch.set_grad_enabled(False)

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    absent = {} if device == "cuda" else {"cuda": "no GPU"}
    if importlib.util.find_spec("flash_attn_interface") is None:
        absent["flash_attn_interface"] = "not installed"
    if arguments.quick:
        absent["c"] = "left out by --quick: compiling takes longer than the rest of the run"
    effort = harness.Effort(0.01, 2, 3, 0.0, 1e-3) if arguments.quick else harness.Effort(0.4, 5, 51, 0.0, 5e-3)
    result: dict[str, Any] = {"schema": SCHEMA, "commit": commit(), "date": datetime.now(timezone.utc).isoformat()}
    result |= {"quick": arguments.quick, "machine": machine(device, clock), "rows": [], "left_out": [], "failures": []}
    result["versions"] = {"python": platform.python_version(), "hisac": hisac.__version__, "torch": torch.__version__}
    peak = result["machine"]["product_gflops"]
    print(result["machine"], flush=True)
    for case in gpu_works.cases(device, arguments.quick):
        if arguments.work and case.work not in arguments.work:
            continue
        if time.monotonic() - began > arguments.seconds:
            result["left_out"].append(
                {"work": case.work, "dtype": case.dtype, "variant": "all", "reason": "no time left"}
            )
            continue
        out = harness.run_case(case, 0, peak, absent, effort, clock)
        for row in out.rows:
            print(harness.line(row), flush=True)
        for kind in ("rows", "left_out", "failures"):
            result[kind] += getattr(out, kind)
        for entry in (*out.left_out, *out.failures):
            print(f"- {case.work:<15} {entry['variant']}: {entry['reason']}", flush=True)
        del case, out
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        if arguments.json:  # what a run that is cut off has found
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
