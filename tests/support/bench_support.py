# SPDX-License-Identifier: Apache-2.0
"""What the tests of the bench share."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import blas

BENCH = Path(__file__).resolve().parents[2] / "bench"
needs_threadpoolctl = pytest.mark.skipif(not blas.available(), reason="threadpoolctl is not installed")


def kernel(environment: dict[str, str]) -> str | None:
    """Of NumPy's BLAS in a process of that environment; None if it is not OpenBLAS."""
    code = "import numpy, threadpoolctl as t; print([i['architecture'] for i in t.threadpool_info() if 'openblas' in i"
    code += "['internal_api']])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return next(iter(json.loads(done.stdout.replace("'", '"'))), None)
