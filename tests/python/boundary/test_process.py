# SPDX-License-Identifier: Apache-2.0
"""The binding from a process's first import to its end: interpreters, other modules, daemon threads."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from test_runtime import python

import hisac

# -------------------------------------------------------------------------------------------------------------- imports


def test_import_reads_no_metadata():
    """It took most of hisac's own part of the import, and a copied package has none."""
    code = "import sys, hisac\nprint('importlib.metadata' in sys.modules, hisac.__version__)"
    assert python(code) == f"False {hisac.__version__}"


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
print(book.sizes, hisac.vote(book, book.encode(book.centers[0]), np.array([0, 2]), budget=1).votes.tolist())
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
prototypes = book.prototypes(hisac.vote(book, codes, offsets, budget=20))
path = os.path.join(tempfile.gettempdir(), f"hisac-daemon-{os.getpid()}")
def work(*_):
    time.sleep(0.001)
    return sum(range(1000))
calls = {
    "encode": lambda: book.encode(x),
    "vote": lambda: hisac.vote(book, codes, offsets, budget=20),
    "route": lambda: hisac.route(x, x, offsets, prototypes),
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
