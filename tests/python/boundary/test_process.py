# SPDX-License-Identifier: Apache-2.0
"""The binding from a process's first import to its end: daemon threads."""

import subprocess
import sys

import pytest

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
