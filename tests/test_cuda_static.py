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
ROUTE = r"(?:route_tiles|back_to_rows|back_to_prototypes)"
KERNEL = rf"({ROUTE})ILi(\d)ELi(\d)ELi(\d)ELb(\d)E"  # tiles of 16 agents a warp, parts of an agent, of a row, mode


def nvcc(source, *arguments):
    if NVCC is None:
        pytest.skip("CUDA kernels: nvcc is not installed")
    command = [NVCC, "-std=c++17", "-fmad=false", f"-I{ROOT / 'cpp/include'}", f"-I{ROOT / 'cpp/src'}", *arguments]
    done = subprocess.run([*command, str(ROOT / "cpp/src/cuda" / source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def spills(report):
    """{kernel: bytes spilled} of what ptxas -v prints."""
    found = re.findall(r"Function properties for (\S+)\s+.*?(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return {name: int(stores) + int(loads) for name, stores, loads in found}


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("source", "kernels"), [("route.cu", 6), ("route_backward.cu", 12)])
def test_no_kernel_spills(source, kernels, architecture, tmp_path):
    report = nvcc(source, f"-arch={architecture}", "-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "route.cubin"))
    found = spills(report)
    assert sum(bool(re.search(KERNEL, name)) for name in found) == kernels
    assert {name: n for name, n in found.items() if n} == {}


def test_a_spill_is_seen():
    line = "ptxas info    : Function properties for {}\n"
    line += "    8 bytes stack frame, {} bytes spill stores, {} bytes spill loads\n"
    assert spills(line.format("a", 0, 0) + line.format("b", 4, 12)) == {"a": 0, "b": 16}


def bodies(source, tmp_path):
    """What a source's kernels look like in PTX: name, tiles, parts, stored, and how many tensor instructions."""
    path = tmp_path / "route.ptx"
    nvcc(source, "-arch=compute_80", "-ptx", "-o", str(path))
    for body in re.split(r"\.entry ", path.read_text())[1:]:
        if match := re.match(r"\S*?" + KERNEL, body):
            numbers = (int(d) for d in match.groups()[1:4])
            yield match.group(1), *numbers, len(re.findall(r"mma\.sync\.aligned\.m16n8k16", body))


def test_tensor_instructions_as_the_shapes_ask(tmp_path):
    """A step of 16 columns of x multiplies 16 agents by every 8 rows once for each pair of parts that counts (high x
    high, low x high, high x low); the values' step likewise, for all rows of a step at once."""
    seen = 0
    for _, tiles, parts, stored, count in bodies("route.cu", tmp_path):
        pairs = 1 if parts == 1 else parts + stored - 1
        logits = tiles * pairs * ROWS[stored] // 8
        values = tiles * pairs * ROWS[stored] // 16 * VALUES // 8
        assert count == logits + values
        seen += 1
    assert seen == 6


def test_tensor_instructions_of_the_backward(tmp_path):
    """Two such products, with x and with v; then for rows 16 by 32 outputs by 16 agents, for prototypes the values'
    step, whose rows are fewer for want of registers."""
    seen = 0
    for name, tiles, parts, stored, count in bodies("route_backward.cu", tmp_path):
        pairs = 1 if parts == 1 else parts + stored - 1
        to_rows = name == "back_to_rows"
        rows = (64 if parts == 1 else 32) if to_rows else 32 // parts
        outputs = 4 * (1 if parts == 1 else 3) if to_rows else tiles * pairs * rows // 16 * VALUES // 8
        assert count == 2 * tiles * pairs * rows // 8 + outputs, name
        seen += 1
    assert seen == 12
