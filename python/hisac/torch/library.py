# SPDX-License-Identifier: Apache-2.0
"""What the operators of `hisac.torch` stand on: codebooks by name, operators by generator, gradients of tables."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from .. import Codebook, compose
from ..arrays import core as core
from ..arrays import cuda_missing


class UnknownCodebookError(LookupError):
    """A program names a codebook that this process has not registered."""


_books: dict[int, "weakref.WeakValueDictionary[int, Codebook]"] = {}  # every copy: one may die before another


def register(book: Codebook) -> int:
    """Make `book` known to this process while the caller keeps it; returns its fingerprint as an int64.

    Modules and functions do it by themselves; who only runs an exported program has to, after importing hisac.torch:

        import hisac.torch
        book = hisac.Codebook.load("book.safetensors")  # kept as long as the program
        hisac.torch.register(book)
        program = torch.export.load("model.pt2").module()

    >>> book = Codebook([torch.eye(2)])
    >>> register(book) % 2**64 == book.fingerprint
    True
    """
    fingerprint: int = book.fingerprint - (book.fingerprint >> 63 << 64)
    _books.setdefault(fingerprint, weakref.WeakValueDictionary())[id(book)] = book
    return fingerprint


vars(register)["_dynamo_marked_constant"] = True  # torch.compiler.assume_constant_result, less its second of imports


def book_of(fingerprint: int) -> Codebook:
    for reference in _books[fingerprint].valuerefs() if fingerprint in _books else ():
        if book := reference():
            return book
    known = [f"{name % 2**64:016x}" for name, copies in list(_books.items()) if len(copies)]
    got = f"codebook {fingerprint % 2**64:016x} is not registered"
    raise UnknownCodebookError(f"{got}, expected one of {known}: call hisac.torch.register(book) and keep the book")


# ---------------------------------------------------------------------------------------------------------- operators

library = cast(Any, torch.library.Library)("hisac", "DEF")


def _on_cuda(steps: Iterator[Any]) -> Iterator[Any]:
    if why := cuda_missing():
        raise TypeError(f"hisac: expected tensors on the CPU, got some on cuda: {why}")
    return steps


def operator(schema: str) -> Callable[[Callable[..., Iterator[Any]]], None]:
    """Define an operator by a generator that first yields the results, allocated, and then fills them: its first half
    serves as the fake implementation, so the two cannot disagree."""

    def define(steps: Callable[..., Iterator[Any]]) -> None:
        name = schema.partition("(")[0]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, lambda *inputs: list(steps(*inputs)).pop(), "CPU")
        library.impl(name, lambda *inputs: list(_on_cuda(steps(*inputs))).pop(), "CUDA")
        torch.library.register_fake(f"hisac::{name}", lambda *inputs: next(steps(*inputs)), lib=library)

    return define


def dense(*tensors: Tensor | None) -> Any:
    return [None if t is None else t.contiguous() for t in tensors]


def no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("hisac has first derivatives only: double backward is not supported")


# ------------------------------------------------------------------------------------------------- gradients of tables


def rows_used(ids: Tensor, starts: Tensor, ends: Tensor, size: int) -> Tensor:
    """The rows of a table that the behaviours of all histories have, ascending, each once: [U] int64."""
    rows, _ = compose.rows_of(torch, starts.long(), ends.long())
    found = ids[rows]
    return cast(Tensor, cast(Any, found[(found >= 0) & (found < size)].long()).unique())


def sparse_gradient(d_rows: Tensor, rows: Tensor, size: int) -> Tensor:
    """The gradient of a table of which only `rows` have one, d_rows [U, V], as coalesced COO."""
    shape = (size, *d_rows.shape[1:])
    return torch.sparse_coo_tensor(rows[None], d_rows, shape, is_coalesced=True, check_invariants=False)
