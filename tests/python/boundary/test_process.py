# SPDX-License-Identifier: Apache-2.0
"""The binding from a process's first import to its end: environment, interpreters, other modules, daemon threads."""

import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from test_runtime import python

import hisac

# ---------------------------------------------------------------------------------------------------------- environment


def no_quota(_root="/"):
    return math.inf


@pytest.mark.parametrize(
    ("hisac_threads", "omp_threads", "expected", "refused"),
    [
        ("3", None, 3, ""),
        (None, "5", 5, ""),
        ("3", "5", 3, ""),
        ("256", None, 256, ""),
        (None, "4,2", 4, ""),
        ("2,1", "5", 2, ""),
        (" 007 ", None, 7, ""),
        ("", "5", 5, ""),
        ("", "", None, ""),
        (None, None, None, ""),
        ("3", "abc", 3, ""),
        ("0", "5", 5, "'0'"),
        ("-1", "5", 5, "'-1'"),
        ("2.5", "5", 5, "'2.5'"),
        ("abc", None, None, "'abc'"),
        (",4", None, None, "',4'"),
        ("257", "5", 256, "'257'"),
        ("1" + "0" * 20, None, 256, "'10000000000000000000'"),
        ("9" * 5000, None, 256, repr("9" * 20)),
        ("0" * 5000, "5", 5, repr("0" * 20)),
    ],
)
def test_default_threads(monkeypatch, recwarn, hisac_threads, omp_threads, expected, refused):
    """A number from 1 to 256, or the first of a list; a warning names what is neither; an empty variable is none."""
    monkeypatch.setattr(hisac, "_quota", no_quota)
    for name, value in (("HISAC_NUM_THREADS", hisac_threads), ("OMP_NUM_THREADS", omp_threads)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = expected or min(processors, 256)
    assert hisac._default_threads() == threads
    text = f"HISAC_NUM_THREADS expected 1 to 256, got {refused}; using {threads} threads"
    assert [str(w.message) for w in recwarn] == ([text] if refused else [])


QUOTAS = {  # what the control groups say: (files, processors)
    "none": ({}, math.inf),
    "no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, math.inf),
    "half": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
    "a parent's": (
        {
            "proc/self/cgroup": "0::/a.slice/b\n",
            "sys/fs/cgroup/a.slice/b/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/a.slice/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
        },
        1.5,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "12:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n0::/x\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        2.5,
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": "4:cpuacct,cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        math.inf,
    ),
    "nonsense": ({"proc/self/cgroup": "\n::\n0::/../a\n", "sys/fs/cgroup/cpu.max": "some 0\n"}, math.inf),
}


@pytest.mark.parametrize("kind", QUOTAS)
def test_quota_of_a_container(monkeypatch, tmp_path, kind):
    """It counts as processors, rounded up, at least one."""
    files, processors = QUOTAS[kind]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert hisac._quota(f"{tmp_path}/") == processors
    for name in ("HISAC_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(hisac, "_quota", lambda: processors)
    assert hisac._default_threads() == (64 if processors == math.inf else math.ceil(processors))


def test_environment_of_a_fresh_process():
    """Integers are equal on every instruction set, and floats to rounding; HISAC_ISA names the one in use."""
    code = """
import hisac, numpy as np
rng = np.random.default_rng(0)
x = rng.normal(size=(200, 16)).astype("f4")
book = hisac.fit(x, (8, 8), iterations=3)
codes, offsets = book.encode(x), np.array([0, 90, 200])
agents = hisac.vote(book, hisac.Histories(codes=codes, offsets=offsets), budget=10)
t = hisac.route(hisac.Histories(x, x, offsets), book.prototypes(agents), temperature=0.1)
print(hisac.get_num_threads(), hisac.backends()["cpu"], book.fingerprint, codes.tolist(), agents.votes.tolist())
print(" ".join(f"{n:.4f}" for n in t.tokens.ravel()[:64]))
"""
    isas = hisac.backends()["available"]
    assert isas[0] in ("baseline", "neon") and hisac.backends()["cpu"] in isas
    said = [python(code, HISAC_ISA=isa, HISAC_NUM_THREADS=str(n)).splitlines() for n, isa in enumerate(isas, 1)]
    assert [line.split(" ", 2)[:2] for line, _ in said] == [[str(n), isa] for n, isa in enumerate(isas, 1)]
    assert len({line.split(" ", 2)[2] for line, _ in said}) == 1
    numbers = np.array([[float(n) for n in line.split()] for _, line in said])
    np.testing.assert_allclose(numbers, numbers[:1].repeat(len(isas), 0), atol=2e-4)


def test_instruction_sets_that_are_not_to_be_had():
    """The best is used, with a warning; an empty variable is none."""
    code = "import warnings\nwith warnings.catch_warnings(record=True) as said:\n    import hisac\n"
    code += "print(*[w.message for w in said], hisac.backends()['cpu'])"
    best = python(code)
    assert best == hisac.backends()["available"][-1] == python(code, HISAC_ISA="")
    text = f"HISAC_ISA expected one of {' '.join(hisac.backends()['available'])}, got {'x' * 20!r}; using {best}"
    assert python(code, HISAC_ISA="x" * 5000) == f"{text} {best}"


# -------------------------------------------------------------------------------------------------------------- imports


def test_the_package_needs_no_torch():
    """Importing hisac and using it brings in neither torch nor anything that is not NumPy's or Python's."""
    code = """
import sys, hisac, numpy as np
hisac.Codebook([np.ones((2, 3), "f4")]).encode(np.ones((2, 3), "f4"))
print(sorted({n.partition(".")[0] for n in sys.modules} & {"torch", "scipy", "pyarrow", "hypothesis", "tqdm"}))
"""
    assert python(code) == "[]"


def test_import_reads_no_metadata():
    """It took most of hisac's own part of the import, and a copied package has none."""
    code = "import sys, hisac\nprint('importlib.metadata' in sys.modules, hisac.__version__)"
    assert python(code) == f"False {hisac.__version__}"


def test_cuda_is_looked_for_when_a_call_needs_it():
    """cuInit before a fork leaves the children without CUDA. The module that calls it is a stand-in."""
    code = """
import sys, types
said, cuda = [], types.ModuleType("hisac._cuda")
cuda.enable = lambda: said.append("cuInit") or "no GPU"
sys.modules["hisac._cuda"] = cuda
import numpy as np, hisac
print(hisac.Codebook([np.eye(2, dtype="f4")]).encode(np.eye(2, dtype="f4")).tolist(), said)
print(hisac.backends()["cuda"], said)
try:
    import torch, hisac.torch
    del said[:]
    hisac.cuda = hisac.torch.encode(hisac.Codebook([torch.eye(2)]), torch.eye(2))
except ImportError:
    del said[:]
print(said)
"""
    assert python(code).splitlines() == ["[[0], [1]] []", "no GPU ['cuInit']", "[]"]


def test_a_second_import():
    """Tests and reloaders empty sys.modules: the types of C++ are there once all the same."""
    code = """
import sys
import numpy as np, hisac
book = hisac.Codebook([np.eye(2, dtype="f4")])
for name in [name for name in sys.modules if name.partition(".")[0] == "hisac"]:
    del sys.modules[name]
import hisac as again
print(again is hisac, again._core.Codebook is hisac._core.Codebook)
for b in (book, again.Codebook(book.centers)):
    print(b.fingerprint == book.fingerprint, b.encode(np.eye(2, dtype="f4")).tolist())
"""
    assert python(code).splitlines() == ["False True", *["True [[0], [1]]"] * 2]


@pytest.mark.parametrize("first", ["", "import hisac"])
def test_a_sub_interpreter_is_refused(first):
    """ImportError there; the main interpreter goes on as if nothing had been."""
    code = f"""
import sys
{first}
if sys.version_info >= (3, 13):
    import _interpreters as interpreters
    legacy = interpreters.create("legacy")
else:
    import _xxsubinterpreters as interpreters
    legacy = interpreters.create(**({{"isolated": False}} if sys.version_info >= (3, 12) else {{}}))
try:
    failure = interpreters.run_string(legacy, "import hisac")
except Exception as error:
    failure = error
print("ImportError" in str(failure), "got a sub-interpreter" in str(failure))
interpreters.destroy(legacy)
import numpy as np, hisac
book = hisac.Codebook([np.eye(2, dtype="f4")])
histories = hisac.Histories(codes=book.encode(book.centers[0]), lengths=[2])
print(book.sizes, hisac.vote(book, histories, budget=1).votes.tolist())
"""
    assert python(code).splitlines() == ["True True", "(2,) [[1]]"]


SECOND = """
#include <nanobind/nanobind.h>
#include "hisac/codebook.h"
NB_MODULE(second, m) {
  nanobind::class_<hisac::Codebook>(m, "Codebook")
      .def(nanobind::init<>())
      .def("levels", [](hisac::Codebook&) { return 7; });
}
"""


def test_another_module_binds_the_same_type(tmp_path):
    """A C++ service with bindings of its own over hisac's headers."""
    nanobind, compiler = pytest.importorskip("nanobind"), shutil.which(os.environ.get("CXX", "c++"))
    package = Path(hisac.__file__).parent
    archives, headers = sorted(package.glob("lib*/libhisac.a")), package / "include"
    if not compiler or not archives:
        pytest.skip("a second module needs a C++ compiler, and the library that the wheel installs")
    base = Path(nanobind.include_dir()).parent
    (tmp_path / "second.cpp").write_text(SECOND)
    include = [sysconfig.get_path("include"), base / "include", base / "ext/robin_map/include", headers]
    command = [compiler, "-shared", "-fPIC", "-O0", "-std=c++17", "-DNDEBUG", "-fvisibility=hidden"]
    command += ["-fno-strict-aliasing", "-DNB_COMPACT_ASSERTIONS", *(f"-I{folder}" for folder in include)]
    command += [tmp_path / "second.cpp", base / "src/nb_combined.cpp", archives[0], "-pthread"]
    subprocess.run([*command, "-o", tmp_path / "second.so"], check=True)
    code = """
import numpy as np, {}, {}
print(second.Codebook().levels(), hisac.Codebook([np.eye(2, dtype="f4")]).sizes)
"""
    for order in (("hisac", "second"), ("second", "hisac")):
        assert python(code.format(*order), PYTHONPATH=str(tmp_path)) == "7 (2,)"


# ------------------------------------------------------------------------------------------------------ daemon threads

DAEMON = """
import os, sys, tempfile, threading, time
import numpy as np, hisac
hisac.set_num_threads(2)
rng = np.random.default_rng(0)
x, offsets = rng.normal(size=(2000, 16)).astype("f4"), np.array([0, 2000])
book = hisac.Codebook([rng.normal(size=(16, 16)).astype("f4")] * 2)
codes = book.encode(x)
prototypes = book.prototypes(hisac.vote(book, hisac.Histories(codes=codes, offsets=offsets), budget=20))
path = os.path.join(tempfile.gettempdir(), f"hisac-daemon-{os.getpid()}")
def work(*_):
    time.sleep(0.001)
    return sum(range(1000))
calls = {
    "encode": lambda: book.encode(x),
    "vote": lambda: hisac.vote(book, hisac.Histories(codes=codes, offsets=offsets), budget=20),
    "route": lambda: hisac.route(hisac.Histories(x, x, offsets), prototypes, temperature=0.1),
    "fit": lambda: hisac.fit(x, (8,)),
    "progress": lambda: hisac.fit(x, (8,), progress=work),
    "load": lambda: hisac.Codebook.load(path),
}
book.save(path)
def run(call=calls[sys.argv[1]]):
    while True:
        call()
class Late:  # other threads ask for the GIL while the interpreter ends
    def __del__(self, sleep=time.sleep, remove=os.remove, path=path):
        sleep(0.3)
        remove(path)
late = Late()
for _ in range(2):
    threading.Thread(target=run, daemon=True).start()
time.sleep(0.1)
"""


@pytest.mark.parametrize("verb", ["encode", "vote", "route", "fit", "progress", "load"])
def test_a_daemon_thread_in_a_verb_at_the_end(verb):
    """Python before 3.14 unwinds the stack of a thread that then asks for the GIL: C++ frames do not survive it."""
    crowd = [subprocess.Popen([sys.executable, "-c", DAEMON, verb], stderr=subprocess.PIPE) for _ in range(3)]
    said = [process.communicate(timeout=60)[1].decode() for process in crowd]
    assert [process.returncode for process in crowd] == [0] * 3, said
