# SPDX-License-Identifier: Apache-2.0
"""The built package: what it imports, its version, and the instructions in its archive."""

import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_imports_without_torch():
    code = "import sys\nsys.modules['torch'] = None\nimport numpy as np\n"
    code += "import hisac, hisac.reference.bounds, hisac.app.cli\n"
    code += "one = np.ones((1, 1), np.float32)\nassert hisac.Codebook([one]).encode(one).tolist() == [[0]]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_installed_version():
    assert (
        version("hisac") == re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    )


AMX = "ldtilecfg|sttilecfg|tile[a-z]|tdp|tcmm"  # how its instructions begin


def weak_avx(symbols, disassembly):
    """Names of weak functions that hold AVX or AMX instructions, given what `nm` and `objdump -d` print. The linker
    keeps one copy of a weak function, so a copy compiled for AVX may run on a processor that has none."""
    weak = {line.split()[-1] for line in symbols.splitlines() if re.search(r" [WVu] \S+$", line)}
    name = None
    for line in disassembly.splitlines():
        if label := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            name = label.group(1)
        elif (
            name in weak and re.match(rf"\s*[0-9a-f]+:\s+(v[a-z]|{AMX})", line) and not re.search(r"\sver[rw]\s", line)
        ):
            yield name
            name = None


def built_archive():
    """What `nm` and `objdump -d` print of the newest build/*/libhisac.a."""
    if platform.machine() != "x86_64":
        pytest.skip("instructions of the archive: a matter of x86-64")
    if not (shutil.which("nm") and shutil.which("objdump")):
        pytest.skip("instructions of the archive: nm and objdump (binutils) are not installed")
    built = sorted(ROOT.glob("build/*/libhisac.a"), key=lambda path: path.stat().st_mtime)
    archives = [path for path in built if b"5kAvx2E" in path.read_bytes()]  # a cross build for NEON has no such table
    if not archives:
        pytest.skip("instructions of the archive: no build/*/libhisac.a, whose objects still have their symbols")
    commands = (["nm"], ["objdump", "-d", "--no-show-raw-insn"])
    return [subprocess.run([*c, archives[-1]], capture_output=True, text=True, check=True).stdout for c in commands]


def test_no_avx_in_weak_symbols():
    symbols, disassembly = built_archive()
    assert "isa_avx2" in symbols and re.search(r"\sv[a-z]+ps\s.*%ymm", disassembly), (
        "expected AVX kernels in the archive"
    )
    assert list(weak_avx(symbols, disassembly)) == []


def amx_faults(disassembly):
    """What is wrong with the AMX instructions of an archive, given what `objdump -d` prints: they are those of the
    unit, in amx.cpp alone, with the operands' roles (tiles 0-3 sums, 4-5 right, 6-7 left), and none is missing."""
    tile = {"sum": "%tmm[0-3]", "left": "%tmm[67]", "right": "%tmm[45]"}
    shapes = {
        "ldtilecfg": r"\S+",
        "tilerelease": "",
        "tilezero": tile["sum"],
        "tileloadd": r"\S*\(%\w+,%\w+,1\),%tmm[0-7]",
        "tilestored": tile["sum"] + r",\S*\(%\w+,%\w+,1\)",
        "tdpbf16ps": f"{tile['right']},{tile['left']},{tile['sum']}",
    }
    seen = dict.fromkeys(shapes, 0)
    for part in re.split(r"\n(?=\S+\.o:)", disassembly):
        for name, operands in re.findall(rf"^\s*[0-9a-f]+:\s+((?:{AMX})\w*)[ \t]*(.*?)\s*$", part, re.MULTILINE):
            if not re.match(r"\s*amx\.", part):
                yield f"{name} in {part.split(':')[0].strip()}"
            elif name not in shapes or not re.fullmatch(shapes[name], operands):
                yield f"{name} {operands}"
            else:
                seen[name] += 1
    yield from (f"no {name}" for name, count in seen.items() if count == 0)


def test_amx_instructions():
    """No machine without AMX can run them, but any can read them."""
    assert list(amx_faults(built_archive()[1])) == []


def test_amx_faults_are_seen():
    lines = "ldtilecfg -0x40(%rsp)|tilezero %tmm3|tileloadd (%rax,%rdx,1),%tmm6|tdpbf16ps %tmm4,%tmm6,%tmm3"
    lines += "|tilestored %tmm3,(%rax,%rdx,1)|tilerelease"
    whole = "".join(f"   0:\t{line}\n" for line in lines.split("|"))
    head = "\namx.cpp.o:     file format elf64-x86-64\n"
    assert list(amx_faults(head + whole)) == []
    assert list(amx_faults(head + whole.replace("tilezero", "tdpbssd"))) == ["tdpbssd %tmm3", "no tilezero"]
    assert "tdpbf16ps %tmm6,%tmm4,%tmm3" in amx_faults(head + whole.replace("%tmm4,%tmm6", "%tmm6,%tmm4"))
    assert "no tilerelease" in amx_faults(head + whole.replace("tilerelease", "ret"))
    assert "tilerelease in route.cpp.o" in amx_faults(head + whole + head.replace("amx", "route") + whole)


def test_weak_avx_is_seen():
    symbols = "0000000000000000 W _Z4weakv\n0000000000000000 T _Z6strongv\n0000000000000010 W _Z5plainv\n"
    body = "0000000000000000 <{}>:\n   0:\tendbr64\n   4:\t{}\n   8:\tret\n"
    disassembly = "".join(
        body.format(*pair)
        for pair in (
            ("_Z6strongv", "vaddps %ymm0,%ymm1,%ymm0"),
            ("_Z5plainv", "addps  %xmm1,%xmm0"),
            ("_Z4weakv", "vaddps %ymm0,%ymm1,%ymm0"),
        )
    )
    assert list(weak_avx(symbols, disassembly)) == ["_Z4weakv"]
    tiles = disassembly.replace("vaddps %ymm0,%ymm1,%ymm0", "tilerelease")
    assert list(weak_avx(symbols, tiles)) == ["_Z4weakv"]
