# SPDX-License-Identifier: Apache-2.0
"""One fit over a source of rows that is read again and again, by one process or several."""

import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from . import _core
from .arrays import is_torch, on_host, take_one
from .progress import fit_progress
from .types import Array, Moved

Progress = Callable[[int, int, float], Any]
Source = Callable[[], Iterable[Array]]
CHUNK = 2**16  # rows of a mapped file that are read at once


def source_of(verb: str, x: Any) -> Source:
    """What reads x from its first row, as often as it is called: an array in one chunk, a mapped file in several, a
    function that makes an iterator of chunks [n, D], or anything else that can be iterated again, such as a list."""
    if isinstance(x, np.memmap) and x.ndim == 2:
        return lambda: (take_one(verb, "x", x[i : i + CHUNK], "T D") for i in range(0, max(len(x), 1), CHUNK))
    if isinstance(x, Iterator):
        raise TypeError(f"{verb}: x expected to be read again and again, got {type(x).__name__}; pass what makes it")
    if callable(x) or (isinstance(x, Iterable) and not hasattr(x, "__dlpack__") and not is_torch(x)):
        if isinstance(x, str | bytes):
            take_one(verb, "x", x)
        return lambda: (take_one(verb, "x", chunk, "T D") for chunk in (_made(verb, x) if callable(x) else x))
    taken = take_one(verb, "x", x, "T D")
    return lambda: (taken,)


def _made(verb: str, x: Callable[[], Any]) -> Iterable[Array]:
    """The chunks that a function returns."""
    chunks = x()
    if not isinstance(chunks, Iterable) or hasattr(chunks, "__dlpack__") or is_torch(chunks):
        raise TypeError(f"{verb}: x() expected an iterator of chunks [n, D], got {type(chunks).__name__}")
    return chunks


def of_all_chunks(verb: str, name: str, x: Any) -> Array:
    """Numbers [T] of rows, which are one array even where the rows are chunks."""
    if isinstance(x, list | tuple | Iterator) or callable(x):
        raise TypeError(f"{verb}: {name} expected one array [T] of all chunks together, got {type(x).__name__}")
    return take_one(verb, name, x, "T")


def measured(verb: str, x: Any, read: Source) -> tuple[int, int]:
    """(T, D) of a source, whose chunks are read for it unless x is an array; D is 0 where there are none."""
    if len(getattr(x, "shape", ())) == 2:
        return int(x.shape[0]), int(x.shape[1])
    rows = width = 0
    for chunk in read():
        if width not in (0, chunk.shape[1]):
            raise ValueError(f"{verb}: x expected chunks of D = {width}, got {list(chunk.shape)}")
        rows, width = rows + int(chunk.shape[0]), int(chunk.shape[1])
    return rows, width


def add_over(group: Any, numbers: Any) -> None:
    """int64 numbers, in place: their sums over the processes of a group."""
    if hasattr(group, "add"):
        group.add(numbers)
        return
    distributed, tensor = sys.modules["torch"].distributed, sys.modules["torch"].from_numpy(numbers)
    sent = tensor.cuda() if "nccl" in distributed.get_backend(group) else tensor
    distributed.all_reduce(sent, group=group)
    if sent is not tensor:
        tensor.copy_(sent)


def check_group(group: Any) -> None:
    """Raises TypeError for what is neither None, nor a group of torch.distributed, nor like one."""
    torch_group = getattr(getattr(sys.modules.get("torch"), "distributed", None), "ProcessGroup", ())
    like_one = all(callable(getattr(group, name, None)) for name in ("rank", "size", "add"))
    if group is not None and not like_one and not isinstance(group, torch_group):
        raise TypeError(
            "fit: process_group expected a torch.distributed.ProcessGroup, or an object with rank(), size() and"
            f" add(numbers), got {type(group).__name__}"
        )


def agreed(group: Any, width: int, weighted: bool, terms: dict[str, Any]) -> int:
    """D of all processes. Raises ValueError where they differ in D, in whether they have weights, or in other terms."""
    said = np.zeros((group.size(), 2 + len(terms)), np.int64)
    said[group.rank()] = width, weighted, *(zlib.crc32(repr(term).encode()) for term in terms.values())
    add_over(group, said.reshape(-1))
    widest: int = said[:, 0].max()
    first = said[0].tolist()
    for process, theirs in enumerate(said.tolist()):
        if theirs[0] not in (0, widest):
            raise ValueError(f"fit: x of process {process} expected D = {widest}, got {theirs[0]}")
        if theirs[1] != first[1]:
            wanted, got = (("none", "some")[of] for of in (first[1], theirs[1]))
            raise ValueError(f"fit: weights of process {process} expected {wanted}, as of process 0, got {got}")
        for name, term, expected in zip(terms, theirs[2:], first[2:], strict=True):
            if term != expected:
                raise ValueError(f"fit: {name} of process {process} expected as of process 0, got another value")
    return int(widest)


def fit(
    x: Any, sizes: Sequence[int], iterations: int, seed: int, init: Sequence[Array], weights: Array, group: Any,
    progress: Progress | bool | None,
) -> _core.Codebook:  # fmt: skip
    """`Codebook.fit` of checked arguments."""
    read = source_of("fit", x)
    rows, width = measured("fit", x, read)
    process, processes = 0, 1
    if group is not None:
        process, processes = group.rank(), group.size()
        terms = {"sizes": sizes, "iterations": iterations, "seed": seed, "init": [zlib.crc32(c) for c in init]}
        width = agreed(group, width, weights is not None, terms)
    with ExitStack() as stack:
        tell = stack.enter_context(fit_progress(len(sizes), iterations)) if progress is True else progress
        core = _core.Fit(sizes, iterations, seed, rows, width, init, weights, process, processes, bool(tell))
        while not core.done:
            if core.reads:
                for chunk in read():
                    core.add(chunk)
            if group is not None:
                add_over(group, core.shared)
            round_ = core.next()
            if round_ and callable(tell):
                tell(*round_)
        return core.book()


def moved(old: Any, new: Any, x: Any, group: Any) -> Moved:
    """What a fit of x from the codebook `old` moved, over all processes of a group."""
    counts = np.zeros(1 + new.levels, np.int64)
    for chunk in source_of("fit", x)():
        before, after = on_host(old.encode(chunk)), on_host(new.encode(chunk))
        here = (before >= 0).all(1)
        counts[0] += here.sum()
        counts[1:] += np.logical_or.accumulate(before[here] != after[here], axis=1).sum(0)
    if group is not None:
        add_over(group, counts)
    codes = (int((a != b).any(1).sum()) for a, b in zip(old.centers, new.centers, strict=True))
    return Moved(tuple(codes), tuple(counts[1:].tolist()), int(counts[0]))
