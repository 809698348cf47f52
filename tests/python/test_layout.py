# SPDX-License-Identifier: Apache-2.0
"""The rules of the layout: what may include, import and stand where. Each rule is also shown a tree that breaks it."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# the public headers, each of which may include only those before it
STAGES = """status array histories context pool codebook fit encode vote route leaf_sums compress attend match state
    cuda hisac""".split()
# the rooms of cpp and what each may include, longest path first; a folder's name stands for what lies below it
ROOMS = {
    "cpp/include": "",
    "cpp/src/base": "hisac base",
    "cpp/src/cpu/simd": "hisac cpu/simd",
    "cpp/src/codebook": "hisac base codebook cpu/simd",
    "cpp/src/backend": "hisac base backend.h",
    "cpp/src/verbs": "hisac base codebook backend.h verbs",
    "cpp/src/state": "hisac base codebook cpu verbs state",
    "cpp/src/cpu": "hisac base codebook backend.h cpu",
    "cpp/src/cuda/device": "hisac base cuda/device",
    "cpp/src/cuda": "hisac base codebook backend.h cuda",
    "cpp/bind": "hisac backend.h",
}
# of Python's modules and packages: what of hisac each may import
PACKAGES = {
    "types": "",
    "arrays": "types _core _cuda",
    "progress": "",
    "fitting": "types arrays progress _core",
    "codebook": "types arrays fitting _core",
    "life": "types arrays fitting codebook _core",
    "compose": "types",
    "verbs": "types arrays codebook compose",
    "candidates": "types arrays codebook compose verbs",
    "state": "types arrays codebook verbs candidates _core",
    "runtime": "arrays",
    "columns": "types",
    "bulk": "types arrays progress columns codebook life verbs state runtime",
    "reference": "types compose reference",
    "reference/bounds": "types compose reference _core",
    "testing": "types reference testing codebook",
    "torch": "types arrays codebook compose reference torch",
}
MOST_LINES = 500  # of a file, blank lines and all
# the wings of the house, and the lines of code each may have: no blank lines, comments and docstrings
WINGS = {
    "headers and CPU": "cpp/include cpp/src/base cpp/src/codebook cpp/src/backend cpp/src/verbs cpp/src/cpu "
    "cpp/src/state",
    "CUDA": "cpp/src/cuda",
    "binding and Python verbs": "cpp/bind python/hisac/__init__ python/hisac/types python/hisac/arrays "
    "python/hisac/codebook python/hisac/compose python/hisac/verbs python/hisac/candidates python/hisac/state "
    "python/hisac/runtime python/hisac/fitting python/hisac/progress python/hisac/life "
    "python/hisac/columns python/hisac/bulk",
    "torch": "python/hisac/torch",
    "reference and testing": "python/hisac/reference python/hisac/testing",
    "command line and demo": "python/hisac/app python/hisac/__main__",
}
MOST_CODE = {
    "headers and CPU": 9_163,
    "CUDA": 5_664,
    "binding and Python verbs": 3_696,
    "torch": 882,
    "reference and testing": 2_045,
    "command line and demo": 1_162,
}
TOP = {"bench", "cpp", "python", "tests", "CMakeLists.txt", "pyproject.toml", "README.md"}
TOP |= {"LICENSE", "CHANGELOG.md", "CITATION.cff"}
# by builds and the demo, never committed; so are *.egg-info and what begins with a dot
MADE = {"hisac-demo.png", "build", "dist", "__pycache__"}
CODE = {".py", ".h", ".cpp", ".inl", ".cu", ".cuh"}


def sources(root, *folders):
    """(path relative to root, text) of the code below the folders."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in CODE and "__pycache__" not in path.parts:
                yield path.relative_to(root), path.read_text(encoding="utf-8")


def includes(text):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)


def torch_imports(root):
    """Only python/hisac/torch imports torch."""
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
        allowed = path.parent.name == "torch"
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
    """A public header includes only public headers that come before it."""
    for path, text in sources(root, "cpp/include"):
        if path.stem not in STAGES:
            yield f"{path} is no stage"
            continue
        for name in includes(text):
            if Path(name).stem in STAGES[STAGES.index(path.stem) + 1 :]:
                yield f"{path} includes {name}, a later stage"


def below(path, folder):
    """Whether a path is a folder, lies in it, or is a file with that stem."""
    name = str(path)
    return name == folder or name.startswith((f"{folder}/", f"{folder}."))


def wrong_rooms(root):
    """Files include only what their room may, by paths from cpp/src."""
    for path, text in sources(root, "cpp"):
        room = max((r for r in ROOMS if below(path, r)), key=len, default=None)
        if room is None:
            yield f"{path} stands in no room"
            continue
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE):
            neighbour = room in ("cpp/include", "cpp/bind") and "/" not in name
            if not neighbour and name != "emulator.h" and not any(below(name, r) for r in ROOMS[room].split()):
                yield f"{path} includes {name}"


def wrong_imports(root):
    """Modules of hisac import only what their package may; nothing imports the command line."""
    for path, text in sources(root, "python"):
        module = path.relative_to("python/hisac").with_suffix("").as_posix()
        package = max((p for p in PACKAGES if below(module, p)), key=len, default=None)
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = path.parent.relative_to("python/hisac").parts[: len(path.parent.parts) - 1 - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                found = "/".join([*base, *name.split(".")])
                found = {"Codebook": "codebook", "CorruptFileError": "_core"}.get(found, found)
                if package is None:
                    wrong = below(found, "app") and not below(module, "app") and module != "__main__"
                else:
                    wrong = not any(below(found, p) for p in PACKAGES[package].split())
                if wrong:
                    yield f"{path} imports {found}"


def code_lines(path, text):
    """How many lines are neither blank, nor a comment, nor of a docstring."""
    rows = text.splitlines()
    found = {i for i, row in enumerate(rows, 1) if row.strip() and not row.strip().startswith(("//", "#"))}
    for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found -= set(range(node.lineno, node.end_lineno + 1))
    return len(found)


def long_files(root):
    """No file of code over MOST_LINES lines; no wing over its MOST_CODE."""
    total = dict.fromkeys(WINGS, 0)
    for path, text in sources(root, "cpp", "python", "tests", "bench"):
        if len(text.splitlines()) > MOST_LINES:
            yield f"{path} has {len(text.splitlines())} lines"
        if path.parts[0] in ("cpp", "python"):
            wing = next((w for w, rooms in WINGS.items() if any(below(path, room) for room in rooms.split())), None)
            if wing is None:
                yield f"{path} is in no wing whose code is counted"
            else:
                total[wing] += code_lines(path, text)
    for wing, lines in total.items():
        if lines > MOST_CODE[wing]:
            yield f"{wing}: {lines} lines of code, at most {MOST_CODE[wing]}"


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


RULES = (
    torch_imports,
    foreign_headers,
    later_stages,
    wrong_rooms,
    wrong_imports,
    long_files,
    unlicensed,
    unfinished,
    versions,
    strangers,
)


@pytest.mark.parametrize("rule", RULES)
def test_layout(rule):
    assert list(rule(ROOT)) == []


SPDX_PY, SPDX_CPP = "# SPDX-License-Identifier: Apache-2.0\n", "// SPDX-License-Identifier: Apache-2.0\n"
PLANTED = [
    (torch_imports, "python/hisac/verbs.py", "import torch"),
    (torch_imports, "python/hisac/verbs.py", "def f():\n    from torch.nn import Module"),
    (torch_imports, "python/hisac/verbs.py", "import importlib\nt = importlib.import_module('torch')"),
    (torch_imports, "python/hisac/verbs.py", "t = __import__('torch')"),
    (foreign_headers, "cpp/src/cpu/vote.cpp", "#include <nanobind/nanobind.h>"),
    (foreign_headers, "cpp/include/hisac/vote.h", "#include <Python.h>"),
    (foreign_headers, "cpp/bind/core.cpp", "# include <torch/extension.h>"),
    (foreign_headers, "cpp/src/cpu/vote.cpp", "#include <cuda_runtime.h>"),
    (later_stages, "cpp/include/hisac/vote.h", '#include "route.h"'),
    (later_stages, "cpp/include/hisac/array.h", '#include "context.h"'),
    (later_stages, "cpp/include/hisac/extra.h", ""),
    (wrong_rooms, "cpp/include/hisac/vote.h", '#include "base/arena.h"'),
    (wrong_rooms, "cpp/src/base/arena.h", '#include "cpu/simd/kernels.h"'),
    (wrong_rooms, "cpp/src/codebook/file.cpp", '#include "cpu/nearest.h"'),
    (wrong_rooms, "cpp/src/verbs/vote.cpp", '#include "cpu/verbs.h"'),
    (wrong_rooms, "cpp/src/verbs/vote.cpp", '#include "cuda/verbs.h"'),
    (wrong_rooms, "cpp/src/cpu/vote.cpp", '#include "verbs/histories.h"'),
    (wrong_rooms, "cpp/src/cpu/vote.cpp", '#include "nearest.h"'),
    (wrong_rooms, "cpp/src/cpu/simd/amx.h", '#include "cpu/nearest.h"'),
    (wrong_rooms, "cpp/src/cuda/vote.cu", '#include "cpu/seats.h"'),
    (wrong_rooms, "cpp/src/cuda/device/simt.h", '#include "cuda/route_task.h"'),
    (wrong_rooms, "cpp/src/kernels/new.cpp", ""),
    (wrong_imports, "python/hisac/types.py", "from .arrays import take"),
    (wrong_imports, "python/hisac/reference/verbs.py", "from .. import verbs"),
    (wrong_imports, "python/hisac/verbs.py", "from .app.files import read"),
    (wrong_imports, "python/hisac/progress.py", "from .app import files"),
    (long_files, "tests/test_long.py", "pass\n" * 500),
    (long_files, "cpp/src/cpu/simd/kernels.inl", "x();\n" * 500),
    (long_files, "cpp/src/cuda/route.cu", "x();\n" * 500),
    (unlicensed, "bench/new.py", None),
    (unfinished, "cpp/src/cpu/vote.cpp", "// TO" + "DO: ties"),
    (versions, "CITATION.cff", "version: 9.9.9"),
    (versions, "CHANGELOG.md", "# Changes"),
    (strangers, "setup.py", "pass"),
    (strangers, "docs/index.md", "words"),
]


@pytest.fixture
def house(tmp_path):
    """A small tree that keeps every rule."""
    files = {
        "python/hisac/torch/library.py": SPDX_PY + "import torch\n\nfrom ..types import Agents\n",
        "python/hisac/verbs.py": SPDX_PY + "from .types import Agents\n",
        "python/hisac/app/cli.py": SPDX_PY + "from . import files\nfrom .. import verbs\n",
        "cpp/include/hisac/vote.h": SPDX_CPP + '#include "codebook.h"\n',
        "cpp/src/cpu/vote.cpp": SPDX_CPP + '#include "base/arena.h"\n#include "hisac/vote.h"\n',
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


def test_the_cores_page_lists_the_rooms():
    text = (ROOT / "cpp/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(cpp/\S+)` \| .* \| (.*) \|$", text, re.MULTILINE)
    assert {room: found.strip("`") for room, found in rows} == ROOMS | {"cpp/include": "other public headers"}


@pytest.mark.parametrize("rule", RULES)
def test_a_good_house_passes(house, rule):
    assert list(rule(house)) == []


@pytest.mark.parametrize(("rule", "name", "text"), PLANTED)
def test_a_rule_sees_what_breaks_it(house, rule, name, text):
    head = "" if text is None else SPDX_PY if name.endswith(".py") else SPDX_CPP if name.startswith("cpp") else ""
    (house / name).parent.mkdir(parents=True, exist_ok=True)
    (house / name).write_text(head + ("pass" if text is None else text) + "\n", encoding="utf-8")
    assert list(rule(house))


def test_the_code_of_a_room_is_counted(house, monkeypatch):
    """Without blank lines, comments and docstrings; headers and CPU together."""
    monkeypatch.setattr(sys.modules[__name__], "MOST_CODE", dict.fromkeys(WINGS, 9))
    text = '"""Five.\n\nsix\n"""\n\n# seven\ndef f():\n    """Eight."""\n    return """a\nb"""\n'
    (house / "python/hisac/torch/library.py").write_text(SPDX_PY + text * 3, encoding="utf-8")
    assert list(long_files(house)) == []
    (house / "python/hisac/torch/library.py").write_text(SPDX_PY + text * 4, encoding="utf-8")
    (house / "cpp/src/cpu/vote.cpp").write_text(SPDX_CPP + "// x();\n\nx();\n" * 10, encoding="utf-8")
    assert list(long_files(house)) == [
        "headers and CPU: 10 lines of code, at most 9",
        "torch: 12 lines of code, at most 9",
    ]
