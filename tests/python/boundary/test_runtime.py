# SPDX-License-Identifier: Apache-2.0
"""The binding as a good citizen of a Python process: memory, references, the GIL, threads, fork."""

import gc
import os
import resource
import subprocess
import sys
import threading
import time
import tracemalloc
from functools import partial

import numpy as np
import pytest

import hisac
from hisac import Codebook, Histories
from support import by_field

RNG = np.random.default_rng(3)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def world(rows, users=4, width=16, sizes=(8, 8), agents=20):
    """A codebook, and calls of every verb over arrays of their own: name -> (function, keyword arguments)."""
    x, book = normal(rows, width), Codebook([normal(c, width) for c in sizes])
    offsets, codes = np.linspace(0, rows, users + 1).astype(np.int64), book.encode(x)
    voted = hisac.vote(book, Histories(offsets=offsets, codes=codes), budget=agents)
    route = {
        "x": x,
        "v": normal(rows, 5),
        "offsets": offsets,
        "agents": book.prototypes(voted),
        "bias": normal(rows),
    }
    attend = {"q": normal(users, 2, 4), "keys": normal(users, agents, 2, 4), "values": normal(users, agents, 2, 3)}
    attend["candidate_offsets"] = np.arange(users + 1)
    sums = hisac.leaf_sums(book, Histories(x, route["v"], offsets, codes, bias=route["bias"]))
    match = {"codes": codes[:users].copy(), "candidate_offsets": np.arange(users + 1)}
    tokens, attended = by_field(partial(hisac.route, temperature=0.1))(**route), hisac.attend(**attend)
    return book, {
        "Codebook": (lambda centers: Codebook([centers]), {"centers": x[:8].copy()}),
        "fit": (partial(hisac.fit, sizes=sizes[:1], iterations=2), {"x": x}),
        "encode": (partial(hisac.encode, book), {"x": x}),
        "prototypes": (book.prototypes, {"codes": codes}),
        "vote": (partial(by_field(hisac.vote), book, budget=agents), {"codes": codes, "offsets": offsets}),
        "route": (by_field(partial(hisac.route, temperature=0.1)), route),
        "route_backward": (
            partial(by_field(hisac.route_backward), temperature=0.1, forward=tokens, gradients=tokens),
            route,
        ),
        "attend": (hisac.attend, attend),
        "attend_backward": (
            partial(hisac.attend_backward, forward=attended),
            {"d_out": attended[0], "d_lse": attended[1], **attend},
        ),
        "match": (partial(hisac.match, book, sums), match),
        "match_backward": (
            partial(hisac.match_backward, book, sums, hisac.match(book, sums, **match)),
            match,
        ),
    }


def bits(result):
    if isinstance(result, Codebook):
        return result.to_bytes()
    return [a.tobytes() for a in (result if isinstance(result, tuple) else (result,)) if hasattr(a, "tobytes")]


@pytest.fixture
def threads():
    """Restores the number of threads."""
    before = hisac.get_num_threads()
    yield hisac.set_num_threads
    hisac.set_num_threads(before)


BOOK, SMALL = world(40)


# --------------------------------------------------------------------------------------------------- memory, references


def refused(function, arrays):
    try:
        function(**arrays)
    except (ValueError, TypeError):
        return True
    return False


@pytest.mark.parametrize("verb", list(SMALL))
def test_references_are_given_back(verb):
    """After success, and after an error at any one argument: of a rank too many, of another type."""
    function, arrays = SMALL[verb]

    def counts():
        gc.collect()
        return {name: sys.getrefcount(arrays[name]) for name in arrays}

    before = counts()
    for _ in range(5):
        assert not refused(function, arrays)
    assert counts() == before
    for wrong in arrays:
        for _ in range(5):
            assert refused(function, {**arrays, wrong: arrays[wrong][..., None]})
            assert refused(function, {**arrays, wrong: arrays[wrong].astype(np.int16)})
    assert counts() == before


@pytest.mark.parametrize("verb", list(SMALL))
def test_memory_is_given_back(verb):
    """After success and after errors: of tensors too, and of arrays whose memory may then grow or move."""
    torch = pytest.importorskip("torch")
    function, arrays = SMALL[verb]
    owners = {name: bytearray(a.tobytes()) for name, a in arrays.items()}
    views = {name: np.frombuffer(owners[name], a.dtype).reshape(a.shape) for name, a in arrays.items()}
    tensors = {name: torch.from_numpy(a.copy()) for name, a in arrays.items()}
    before = [sys.getrefcount(t) for t in tensors.values()]
    own = {name: np.array(a) for name, a in arrays.items()}
    for inputs in (own, views, tensors):
        assert not refused(function, inputs)
        for wrong in inputs:
            assert refused(function, {**inputs, wrong: inputs[wrong][..., None]})
    del inputs
    assert [sys.getrefcount(t) for t in tensors.values()] == before
    while own:
        own.popitem()[1].resize(3)  # refused while something holds it
    del views
    for owner in owners.values():
        owner.append(0)  # BufferError while something sees it


def memory():
    """Resident bytes now."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_10000_calls_leak_nothing():
    """Half of them fail; torch tensors and NumPy arrays in turn. 64 bytes of Python, or 200 of C, a call would show."""
    torch = pytest.importorskip("torch")
    calls = []
    for function, arrays in (SMALL[verb] for verb in ("Codebook", "encode", "vote", "route", "attend")):
        tensors = {name: torch.from_numpy(a) for name, a in arrays.items()}
        name = next(iter(arrays))
        calls += [partial(function, **arrays), partial(function, **tensors)]
        calls += [partial(function, **{**a, name: a[name][..., None]}) for a in (arrays, tensors)]

    def run(n):
        return sum(refused(calls[i % len(calls)], {}) for i in range(n))

    run(1000)
    gc.collect()
    tracemalloc.start()
    run(200)
    traced, resident = tracemalloc.get_traced_memory()[0], memory()
    run(200)
    assert tracemalloc.get_traced_memory()[0] - traced < 200 * 64
    tracemalloc.stop()
    assert run(10_000) == 5000
    gc.collect()
    assert memory() - resident < 10_000 * 200


# -------------------------------------------------------------------------------------------------------------- threads


def long_call(verb, scale):
    """A call of some ten milliseconds times scale."""
    _, calls = world(10_000, sizes=(64, 64), agents=200)
    function, arrays = calls[verb]
    if verb == "attend":
        arrays = {**arrays, "q": np.repeat(arrays["q"], 2000 * scale, axis=0)}
        return partial(function, **{**arrays, "candidate_offsets": arrays["candidate_offsets"] * 2000 * scale})
    if verb == "vote":
        starts = np.zeros(500 * scale, np.int64)  # users who share one history
        return partial(function, **{**arrays, "offsets": (starts, starts + arrays["offsets"][-1])})
    rows = {name: np.tile(a, (scale, 1)[: a.ndim]) for name, a in arrays.items() if name in ("x", "v", "codes", "bias")}
    more = {"offsets": arrays["offsets"] * scale} if "offsets" in arrays else {}
    return partial(function, **{**arrays, **rows, **more})


@pytest.mark.parametrize("verb", ["fit", "encode", "vote", "route", "route_backward", "attend"])
def test_the_gil_is_released(verb, threads):
    """While a long call runs, another thread ticks, up to once a millisecond. Beside a call that holds the GIL it ticks
    three times at most, before and after."""
    threads(1)
    ticks, stop = [0], threading.Event()

    def tick():
        while not stop.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    most = []
    for scale in (1, 2, 4, 8, 16, 32):  # until a call is long enough to tell
        f = long_call(verb, scale)
        before = ticks[0]
        f()
        most.append(ticks[0] - before)
        if most[-1] >= 12:
            break
    stop.set()
    thread.join()
    assert most[-1] >= 12, f"ticks during calls that grew: {most}"


def test_calls_from_many_threads_give_the_same_bits(threads):
    threads(2)
    _, calls = world(3000)
    expected = {verb: bits(function(**arrays)) for verb, (function, arrays) in calls.items()}
    wrong, start = [], threading.Barrier(6)

    def work(turn):
        start.wait()
        verbs = list(calls)[turn:] + list(calls)[:turn]
        for verb in verbs * 2:
            function, arrays = calls[verb]
            if bits(function(**arrays)) != expected[verb]:
                wrong.append(verb)

    crowd = [threading.Thread(target=work, args=(turn,), daemon=True) for turn in range(6)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in crowd)


def python(code, **environment):
    """Runs code in a fresh process; returns what it printed."""
    clean = {k: v for k, v in os.environ.items() if k not in ("HISAC_NUM_THREADS", "OMP_NUM_THREADS", "HISAC_ISA")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:] or f"ended by signal {-done.returncode}"
    return done.stdout.strip()


def test_threads_may_change_while_calls_run():
    """In a process of its own: a crash or a hang must not end this one."""
    code = """
import threading, time
import numpy as np, hisac
rng = np.random.default_rng(0)
x, p = rng.normal(size=(8000, 16)).astype("f4"), rng.normal(size=(4, 20, 16)).astype("f4")
offsets = np.array([0, 1000, 4000, 6000, 8000])
want, end, wrong = hisac.route(hisac.Histories(x, x, offsets), p, temperature=0.1).tokens, time.monotonic() + 1.5, []
def call():
    while time.monotonic() < end:
        again = hisac.route(hisac.Histories(x, x, offsets), p, temperature=0.1).tokens
        if not np.array_equal(again, want): wrong.append(1)
def resize():
    n = 0
    while time.monotonic() < end:
        n += 1
        hisac.set_num_threads(1 + n % 5)
crowd = [threading.Thread(target=f, daemon=True) for f in (call, call, resize)]
for t in crowd: t.start()
for t in crowd: t.join(10)
print(len(wrong), sum(t.is_alive() for t in crowd))
"""
    assert python(code) == "0 0"


def test_bits_do_not_depend_on_the_threads_where_torch_flushes_subnormals():
    """The mode is the calling thread's, and the pool's threads are older than each change of it."""
    pytest.importorskip("torch")
    code = """
import numpy as np, torch, hisac
tiny, codes, seen = np.full((4, 8), 2.0**-130, "f4"), np.zeros((300_000, 2), "i4"), set()
book = hisac.Codebook([tiny, tiny])
for n in (1, 2, 4):
    hisac.set_num_threads(n)
    for flush in (False, True, False):
        torch.set_flush_denormal(flush)
        seen |= {(flush, book.prototypes(codes).tobytes()) for _ in range(5)}
print(sorted((flush, int(np.frombuffer(sums, "u4").max())) for flush, sums in seen))
"""
    assert python(code) == "[(False, 1048576), (True, 0)]"


def test_a_progress_callback_may_call_the_same_verb():
    """The call that waits for its callback keeps its scratch; a call from inside, larger or smaller, has its own."""
    code = """
import numpy as np, hisac
x = np.random.default_rng(0).normal(size=(3000, 16)).astype("f4")
for n in (1, 2):
    hisac.set_num_threads(n)
    alone, inner = hisac.fit(x, (16, 16), iterations=3), [hisac.fit(y, (8,)) for y in (x[:900], x.repeat(3, 0))]
    def progress(*_): print([hisac.fit(y, (8,)) for y in (x[:900], x.repeat(3, 0))] == inner)
    print(hisac.fit(x, (16, 16), iterations=3, progress=progress) == alone)
"""
    assert set(python(code).split()) == {"True"}


# ----------------------------------------------------------------------------------------------------------------- fork


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_can_call(threads):
    """The pool's threads do not come along; the child makes its own, also a child of the child."""
    threads(2)
    _, calls = world(3000)
    expected = {verb: bits(function(**arrays)) for verb, (function, arrays) in calls.items()}

    def family(depth):
        child = os.fork()
        if child == 0:
            try:
                same = all(bits(function(**arrays)) == expected[verb] for verb, (function, arrays) in calls.items())
                os._exit(family(depth - 1) if same and depth else 0 if same else 1)
            finally:
                os._exit(2)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(child, 9)
        os.waitpid(child, 0)
        return 3

    assert family(1) == 0
    hisac.set_num_threads(3)
    assert family(0) == 0
    assert bits(calls["route"][0](**calls["route"][1])) == expected["route"]
