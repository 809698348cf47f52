# SPDX-License-Identifier: Apache-2.0
"""Where CUDA's verbs run in tests: on a GPU, where there is one, and over the kernels that tests/cuda emulates, lent to
tensors on the CPU, where HISAC_EMULATED names that module."""

import functools
import importlib.util
import os

import numpy as np
import pytest

from hisac import _core, arrays

try:
    import torch
except ImportError:
    torch = None

WHY = arrays.cuda_missing() or ("" if torch and torch.cuda.is_available() else "torch sees no GPU")
EMULATED = os.environ.get("HISAC_EMULATED", "")
on_gpu = pytest.mark.skipif(bool(WHY), reason=f"no GPU: {WHY}")


@functools.cache
def emulated_verbs():
    spec = importlib.util.spec_from_file_location("_cuda", EMULATED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.enable() == ""
    return module.backend()


def lend_on_cpu(size, index, book):
    """`arrays.lend` for the emulated kernels."""

    def aligned(n):
        memory = torch.empty(n + 64, dtype=torch.uint8)
        return memory[-memory.data_ptr() % 64 :][:n]

    image = None
    if book is not None:
        image = aligned(book.image.size)
        image.numpy()[:] = book.image
    return aligned(size), image, 0


class Place:
    """Where CUDA's verbs run; `calls` counts those that got there."""

    def __init__(self, name, lend):
        self.name, self.calls, self._lend = name, 0, lend

    def put(self, a):
        if isinstance(a, tuple):
            return type(a)(*map(self.put, a)) if hasattr(a, "_fields") else tuple(map(self.put, a))
        a = torch.from_numpy(a) if isinstance(a, np.ndarray) else a
        return a.cuda() if self.name == "gpu" and isinstance(a, torch.Tensor) else a

    def lend(self, *arguments):
        self.calls += 1
        return self._lend(*arguments)


@pytest.fixture(
    params=[
        pytest.param("gpu", marks=on_gpu),
        pytest.param("emulated", marks=pytest.mark.skipif(not EMULATED, reason="HISAC_EMULATED names no module")),
    ]
)
def place(request, monkeypatch):
    found = Place(request.param, arrays.lend if request.param == "gpu" else lend_on_cpu)
    monkeypatch.setattr(arrays, "lend", found.lend)
    return found


@pytest.fixture
def on_cuda(place):
    """on_cuda(function, *arguments): its results there, as NumPy."""

    def call(function, *arguments, **options):
        before = place.calls
        if place.name == "emulated":
            _core.use_cuda(emulated_verbs(), 1)
        try:
            result = function(*map(place.put, arguments), **{name: place.put(a) for name, a in options.items()})
        finally:
            if place.name == "emulated":
                _core.use_cuda(emulated_verbs(), 2)
        assert place.calls > before, "the call did not reach CUDA"
        return result

    return call
