# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the CUDA kernels, where there is an nvcc: no register spills, and as many tensor instructions as
the shapes ask for. What the kernels compute is tested by tests/cuda, on the CPU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.deep  # minutes of compiling
ROOT = Path(__file__).resolve().parents[2]
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ROWS = {1: 64, 2: 32}  # of a step, by the parts that a row is kept in
VALUES = 64  # columns of a block
SOURCES = sorted(path.stem for path in (ROOT / "cpp/src/cuda").glob("*.cu"))
# tiles of 16 agents a warp, parts of an agent, of a row; then the mode, and of the backward whether to prototypes
ROUTE = r"route_tilesILi(\d)ELi(\d)ELi(\d)ELb\dE"
BACK = r"back_tilesILi(\d)ELi(\d)ELi(\d)ELb\dELb(\d)E"
ENCODE = r"(encode_rows)ILb[01]E"  # residuals on the chip or not
ATTEND = r"(attend_tiles)ILN\w+?4PassE(\d)ELi(\d)E"  # what is summed, parts of an input


def nvcc(source, *arguments):
    if NVCC is None:
        pytest.skip("CUDA kernels: nvcc is not installed")
    command = [NVCC, "-std=c++17", "-fmad=false", f"-I{ROOT / 'cpp/include'}", f"-I{ROOT / 'cpp/src'}", *arguments]
    done = subprocess.run(
        [*command, str(ROOT / f"cpp/src/cuda/{source}.cu")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def spills(report):
    """{kernel: bytes spilled} of what ptxas -v prints."""
    found = re.findall(r"Function properties for (\S+)\s+.*?(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return {name: int(stores) + int(loads) for name, stores, loads in found}


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "backend"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_no_kernel_spills(architecture, source, tmp_path):
    report = nvcc(source, f"-arch={architecture}", "-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "kernels.cubin"))
    found = spills(report)
    assert found and {name: n for name, n in found.items() if n} == {}
    if source == "vote":  # two blocks of 512 threads share a processor
        assert max(int(n) for n in re.findall(r"Used (\d+) registers", report)) <= 65536 // 1024


def test_a_spill_is_seen():
    line = "ptxas info    : Function properties for {}\n"
    line += "    8 bytes stack frame, {} bytes spill stores, {} bytes spill loads\n"
    assert spills(line.format("a", 0, 0) + line.format("b", 4, 12)) == {"a": 0, "b": 16}


def products(source, kernel, count, tmp_path):
    """(the kernel's groups, how many tensor instructions its PTX has), of `count` kernels."""
    path = tmp_path / "kernels.ptx"
    nvcc(source, "-arch=compute_80", "-ptx", "-o", str(path))
    bodies = re.split(r"\.entry ", path.read_text())[1:]
    found = [(match.groups(), body) for body in bodies if (match := re.match(r"\S*?" + kernel, body))]
    assert len(found) == count
    return [(groups, len(re.findall(r"mma\.sync\.aligned\.m16n8k16", body))) for groups, body in found]


def test_tensor_instructions_of_route(tmp_path):
    """A step of 16 columns of x multiplies 16 agents by every 8 rows once for each pair of parts that counts (high x
    high, low x high, high x low); the values' step likewise, for all rows of a step at once."""
    for numbers, count in products("route", ROUTE, 6, tmp_path):
        tiles, parts, stored = map(int, numbers)
        pairs = 1 if parts == 1 else parts + stored - 1
        logits = tiles * pairs * ROWS[stored] // 8
        assert count == logits + tiles * pairs * ROWS[stored] // 16 * VALUES // 8


def test_tensor_instructions_of_the_backward(tmp_path):
    """Three such products, two with x and one with v; then for rows 16 by 32 outputs by 16 agents, for prototypes the
    values' step, whose rows are fewer for want of registers."""
    for numbers, count in products("route_backward", BACK, 12, tmp_path):
        tiles, parts, stored, to_prototypes = map(int, numbers)
        pairs = 1 if parts == 1 else parts + stored - 1
        rows = 32 // parts if to_prototypes else 64 if parts == 1 else 32
        outputs = tiles * pairs * rows // 16 * VALUES // 8 if to_prototypes else 4 * (1 if parts == 1 else 3)
        assert count == 3 * tiles * pairs * rows // 8 + outputs, numbers


def test_one_product_screens_in_encode(tmp_path):
    """Eight steps of 16 columns multiply a warp's 32 rows by a tile of 32 codes once, in float16."""
    for _, count in products("encode", ENCODE, 2, tmp_path):
        assert count == 8 * 2 * 32 // 8


def test_tensor_instructions_of_attend(tmp_path):
    """A step of 16 columns multiplies 16 rows by 32 others, once for each pair of parts; the backward does so for the
    logits and for their gradients. Weights have two parts and meet 128 columns; the forward asks if q is finite."""
    for (_, *numbers), count in products("attend", ATTEND, 6, tmp_path):
        summed, parts = map(int, numbers)
        logits = 32 // 8 * (2 * parts - 1) * (2 if summed else 1)
        assert count == logits + 32 // 16 * 128 // 8 * (parts + 1) + (0 if summed else parts)
