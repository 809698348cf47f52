# SPDX-License-Identifier: Apache-2.0
"""What the operators of `hisac.torch` stand on: codebooks by name, operators by generator, gradients of tables."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from .. import Codebook
from ..arrays import core as core
from ..arrays import cuda_missing


class UnknownCodebookError(LookupError):
    """A program names a codebook that this process has not registered."""


_books: dict[int, "weakref.WeakValueDictionary[int, Codebook]"] = {}  # every copy: one may die before another


def register(book: Codebook) -> int:
    """Make `book` known to this process while the caller keeps it; returns its fingerprint as an int64.

    Modules and functions do it by themselves; who only runs an exported program has to.

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


@operator("sum_rows(Tensor rows, Tensor order, Tensor begin) -> Tensor")
def _sum_rows(rows: Tensor, order: Tensor, begin: Tensor) -> Iterator[Tensor]:
    sums = rows.new_empty((begin.shape[0] - 1, *rows.shape[1:]))
    yield sums
    core.sum_rows(*dense(rows, order, begin), sums)


torch.library.register_autograd("hisac::sum_rows", no_double_backward, lib=library)


def table_gradient(d_rows: Tensor, ids: Tensor, size: int, sparse_grad: bool) -> Tensor:
    """The gradient [size, V] of a table from those of its rows as behaviours had them, [T, V]: the sum over those of
    one id, in the order of the behaviours and in float64; ids outside the table add nothing. Sparse: coalesced COO."""
    ids = torch.where((ids >= 0) & (ids < size), ids, size).long()
    ids, order = ids.sort(stable=True)
    if sparse_grad:
        ids, count = cast(Any, ids).unique_consecutive(return_counts=True)
        ids = ids[ids < size]
        count = count[: len(ids)]
    else:
        count = ids.new_zeros(size + 1).scatter_add(0, ids, torch.ones_like(ids))[:size]
    begin = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    sums: Tensor = torch.ops.hisac.sum_rows(d_rows, order, begin)
    if not sparse_grad:
        return sums
    return torch.sparse_coo_tensor(ids[None], sums, (size, *sums.shape[1:]), is_coalesced=True, check_invariants=False)
