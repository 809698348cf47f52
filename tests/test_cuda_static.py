# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernels, where there is an nvcc: no register spills, and as many tensor instructions as
the shapes ask for. What the kernels compute is tested by tests/simt, on the CPU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ROWS = {1: 64, 2: 32}  # of a step, by the parts that a row is kept in
VALUES = 64  # columns of a block
KERNEL = r"route_tilesILi(\d)ELi(\d)ELi(\d)ELb(\d)E"  # tiles of 16 agents a warp, parts of an agent, of a row, mode


def nvcc(verb, *arguments):
    if NVCC is None:
        pytest.skip("CUDA kernels: nvcc is not installed")
    command = [NVCC, "-std=c++17", "-fmad=false", f"-I{ROOT / 'cpp/include'}", f"-I{ROOT / 'cpp/src'}", *arguments]
    done = subprocess.run(
        [*command, str(ROOT / f"cpp/src/cuda/{verb}.cu")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def spills(report):
    """{kernel: bytes spilled} of what ptxas -v prints."""
    found = re.findall(r"Function properties for (\S+)\s+.*?(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return {name: int(stores) + int(loads) for name, stores, loads in found}


@pytest.mark.parametrize(("verb", "kernels"), [("leaf_sums", 6), ("route", 9)])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_no_kernel_spills(architecture, verb, kernels, tmp_path):
    found = spills(nvcc(verb, f"-arch={architecture}", "-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "a.cubin")))
    assert len(found) == kernels
    assert {name: n for name, n in found.items() if n} == {}


def test_a_spill_is_seen():
    line = "ptxas info    : Function properties for {}\n"
    line += "    8 bytes stack frame, {} bytes spill stores, {} bytes spill loads\n"
    assert spills(line.format("a", 0, 0) + line.format("b", 4, 12)) == {"a": 0, "b": 16}


def test_tensor_instructions_as_the_shapes_ask(tmp_path):
    """A step of 16 columns of x multiplies 16 agents by every 8 rows once for each pair of parts that counts (high x
    high, low x high, high x low); the values' step likewise, for all rows of a step at once."""
    path = tmp_path / "route.ptx"
    nvcc("route", "-arch=compute_80", "-ptx", "-o", str(path))
    bodies = re.split(r"\.entry ", path.read_text())[1:]
    seen = 0
    for body in bodies:
        match = re.match(r"\S*?" + KERNEL, body)
        if not match:
            continue
        tiles, parts, stored, _ = (int(d) for d in match.groups())
        pairs = 1 if parts == 1 else parts + stored - 1
        logits = tiles * pairs * ROWS[stored] // 8
        values = tiles * pairs * ROWS[stored] // 16 * VALUES // 8
        assert len(re.findall(r"mma\.sync\.aligned\.m16n8k16", body)) == logits + values, match.group()
        seen += 1
    assert seen == 6
