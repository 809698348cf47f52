# SPDX-License-Identifier: Apache-2.0
"""The rules of the layout: what may include, import and stand where. Each rule is also shown a tree that breaks it."""

import ast
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = (
    "status",
    "array",
    "context",
    "pool",
    "codebook",
    "fit",
    "encode",
    "vote",
    "route",
    "attend",
    "state",
    "cuda",
    "hisac",
)
TOP = {"bench", "cpp", "python", "tests", "CMakeLists.txt", "pyproject.toml", "README.md"}
TOP |= {"LICENSE", "CHANGELOG.md", "CITATION.cff"}
# by builds and the demo, never committed; so are *.egg-info and what begins with a dot
MADE = {"hisac-demo.png", "build", "dist", "__pycache__"}
CODE = {".py", ".h", ".cpp", ".inl", ".cu", ".cuh"}
MOST_LINES, MOST_CODE = 500, 9_950  # of a file; of cpp and python together, blank lines and comments left out
MOST_CUDA = 6_000  # of cpp's cuda folder, which is counted apart


def sources(root, *folders):
    """(path relative to root, text) of the code below the folders."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in CODE and "__pycache__" not in path.parts:
                yield path.relative_to(root), path.read_text(encoding="utf-8")


def includes(text):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)


def torch_imports(root):
    """Only python/hisac/torch.py and torch_library.py import torch."""
    for path, text in sources(root, "python"):
        names = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module)
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")).endswith(
                "import__"
            ):
                names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
                names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
        allowed = path.name in ("torch.py", "torch_library.py")
        if not allowed and any(str(name).split(".")[0] == "torch" for name in names):
            yield f"{path} imports torch"


def foreign_headers(root):
    """Only cpp/bind sees nanobind and Python, only cpp/src/cuda sees CUDA, and nothing sees torch."""
    for path, text in sources(root, "cpp"):
        for name in includes(text):
            binding = re.match(r"nanobind/|Python\.h|pybind11/", name) and "bind" not in path.parts
            cuda = re.match(r"cuda_|cuda/(?!verbs)|cub/|cublas|thrust/", name) and "cuda" not in path.parts
            if binding or cuda or re.match(r"torch/|ATen/|c10/", name):
                yield f"{path} includes {name}"


def later_stages(root):
    """A stage's header, and a source named after a stage, includes only public headers up to that stage."""
    for path, text in sources(root, "cpp/include", "cpp/src"):
        stem = re.match(r"[a-z]+", path.name).group()
        public = path.parts[1] == "include"
        if public and stem not in STAGES:
            yield f"{path} is no stage"
        if stem not in STAGES or "cuda" in path.parts:  # behind cuda.h, the last
            continue
        for name in includes(text):
            seen = Path(name).stem
            if (public or name.startswith("hisac/")) and seen in STAGES and STAGES.index(seen) > STAGES.index(stem):
                yield f"{path} includes {name}, a later stage"


def long_files(root):
    """No file of code over 500 lines; cpp and python together at most MOST_CODE, the CUDA kernels MOST_CUDA."""
    total = cuda = 0
    for path, text in sources(root, "cpp", "python", "tests", "bench"):
        lines = text.splitlines()
        if len(lines) > MOST_LINES:
            yield f"{path} has {len(lines)} lines"
        if path.parts[0] in ("cpp", "python"):
            code = sum(1 for line in lines if line.strip() and not line.strip().startswith(("//", "#")))
            total, cuda = (total, cuda + code) if "cuda" in path.parts else (total + code, cuda)
    if total > MOST_CODE:
        yield f"cpp and python have {total} lines of code"
    if cuda > MOST_CUDA:
        yield f"the CUDA kernels have {cuda} lines of code"


def unlicensed(root):
    """The first line, or the one after #!, is the licence's."""
    for path, text in sources(root, "cpp", "python", "tests", "bench"):
        lines = [line for line in text.splitlines()[:2] if not line.startswith("#!")]
        if not lines or not re.fullmatch(r"(#|//) SPDX-License-Identifier: Apache-2\.0", lines[0]):
            yield f"{path} has no SPDX line on top"


def unfinished(root):
    """No notes of work to be done."""
    for path, text in sources(root, "cpp", "python", "tests", "bench"):
        for word in re.findall(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b", text):
            yield f"{path} has a {word}"


def versions(root):
    """pyproject.toml, CMakeLists.txt, CITATION.cff and the change log name one version."""
    patterns = {
        "pyproject.toml": r'^version = "([^"]+)"',
        "CMakeLists.txt": r"^project\(hisac VERSION ([0-9.]+)",
        "CITATION.cff": r"^version: (\S+)",
        "CHANGELOG.md": r"^## ([0-9][0-9.]*)",
    }
    found = {}
    for name, pattern in patterns.items():
        match = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE)
        found[name] = match.group(1) if match else None
    if None in found.values() or len(set(found.values())) != 1:
        yield f"versions differ: {found}"


def strangers(root):
    """The top level holds the agreed names only."""
    for path in sorted(root.iterdir()):
        name = path.name
        if name not in TOP and name not in MADE and not name.startswith(".") and not name.endswith(".egg-info"):
            yield f"{name} stands at the top level"


RULES = (torch_imports, foreign_headers, later_stages, long_files, unlicensed, unfinished, versions, strangers)


@pytest.mark.parametrize("rule", RULES)
def test_layout(rule):
    assert list(rule(ROOT)) == []


SPDX_PY, SPDX_CPP = "# SPDX-License-Identifier: Apache-2.0\n", "// SPDX-License-Identifier: Apache-2.0\n"
PLANTED = [
    (torch_imports, "python/hisac/ops.py", "import torch"),
    (torch_imports, "python/hisac/ops.py", "def f():\n    from torch.nn import Module"),
    (torch_imports, "python/hisac/ops.py", "import importlib\nt = importlib.import_module('torch')"),
    (torch_imports, "python/hisac/ops.py", "t = __import__('torch')"),
    (foreign_headers, "cpp/src/vote.cpp", "#include <nanobind/nanobind.h>"),
    (foreign_headers, "cpp/include/hisac/vote.h", "#include <Python.h>"),
    (foreign_headers, "cpp/bind/core.cpp", "# include <torch/extension.h>"),
    (foreign_headers, "cpp/src/vote.cpp", "#include <cuda_runtime.h>"),
    (later_stages, "cpp/include/hisac/vote.h", '#include "route.h"'),
    (later_stages, "cpp/include/hisac/array.h", '#include "context.h"'),
    (later_stages, "cpp/src/codebook_file.cpp", '#include "hisac/fit.h"'),
    (later_stages, "cpp/include/hisac/extra.h", ""),
    (long_files, "tests/test_long.py", "pass\n" * 500),
    (long_files, "cpp/src/cpu/kernels.inl", "x();\n" * 500),
    (long_files, "cpp/src/cuda/route.cu", "x();\n" * 500),
    (unlicensed, "bench/new.py", None),
    (unfinished, "cpp/src/vote.cpp", "// TO" + "DO: ties"),
    (versions, "CITATION.cff", "version: 9.9.9"),
    (versions, "CHANGELOG.md", "# Changes"),
    (strangers, "setup.py", "pass"),
    (strangers, "docs/index.md", "words"),
]


@pytest.fixture
def house(tmp_path):
    """A small tree that keeps every rule."""
    files = {
        "python/hisac/torch.py": SPDX_PY + "import torch\n",
        "python/hisac/ops.py": SPDX_PY + "from . import torch\n",
        "cpp/include/hisac/vote.h": SPDX_CPP + '#include "codebook.h"\n',
        "cpp/src/vote.cpp": SPDX_CPP + '#include "hisac/vote.h"\n#include "tiles.h"\n',
        "cpp/bind/core.cpp": SPDX_CPP + "#include <nanobind/nanobind.h>\n",
        "tests/test_a.py": "#!/usr/bin/env python\n" + SPDX_PY,
        "bench/run.py": SPDX_PY,
        "pyproject.toml": '[project]\nversion = "1.2.0"\n',
        "CMakeLists.txt": "project(hisac VERSION 1.2.0 LANGUAGES CXX)\n",
        "CITATION.cff": "version: 1.2.0\n",
        "CHANGELOG.md": "# Changes\n\n## 1.2.0\n",
        ".gitignore": "build/\n",
        "build/x.o": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("rule", RULES)
def test_a_good_house_passes(house, rule):
    assert list(rule(house)) == []


@pytest.mark.parametrize(("rule", "name", "text"), PLANTED)
def test_a_rule_sees_what_breaks_it(house, rule, name, text):
    head = "" if text is None else SPDX_PY if name.endswith(".py") else SPDX_CPP if name.startswith("cpp") else ""
    (house / name).parent.mkdir(parents=True, exist_ok=True)
    (house / name).write_text(head + ("pass" if text is None else text) + "\n", encoding="utf-8")
    assert list(rule(house))


def test_all_code_together_is_counted(house):
    for i in range(25):
        (house / f"python/hisac/part{i}.py").write_text(SPDX_PY + "pass\n" * 400, encoding="utf-8")
        (house / f"cpp/src/cuda/part{i}.cu").parent.mkdir(parents=True, exist_ok=True)
        (house / f"cpp/src/cuda/part{i}.cu").write_text(SPDX_CPP + "x();\n" * 251, encoding="utf-8")
    assert list(long_files(house)) == [
        "cpp and python have 10002 lines of code",
        "the CUDA kernels have 6275 lines of code",
    ]


# ------------------------------------------------------------------------------------------------- the built package


def test_imports_without_torch():
    code = "import sys\nsys.modules['torch'] = None\nimport numpy as np\nimport hisac, hisac.bounds, hisac.__main__\n"
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
