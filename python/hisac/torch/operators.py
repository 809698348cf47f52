# SPDX-License-Identifier: Apache-2.0
"""The operators `torch.ops.hisac.*`: schema, fake and real implementation, autograd.

A route or attend operator has its gradient as an operator of its own, so that torch.compile sees both.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import MAX_SEATS
from .library import book_of, core, dense, library, no_double_backward, operator, table_gradient


def _gradients(inputs: Sequence[Any], need: Sequence[bool], ids: Sequence[Any] = ()) -> tuple[Tensor, ...]:
    """float32, a row for each id where there are ids; empty where not needed: an operator cannot return None."""
    shapes = [t.shape if needed and t is not None else (0,) for t, needed in zip(inputs, need, strict=True)]
    for at, i in ids:
        if i is not None and need[at]:
            shapes[at] = (*i.shape[:1], *shapes[at][1:])
    return tuple(inputs[0].new_empty(shape, dtype=torch.float32) for shape in shapes)


@operator("encode(Tensor x, int fingerprint) -> Tensor")
def _encode(x: Tensor, fingerprint: int) -> Iterator[Tensor]:
    book = book_of(fingerprint)
    codes = x.new_empty((*x.shape[:1], book.levels), dtype=torch.int32)
    yield codes
    core.encode(book._core, x.contiguous(), codes)


@operator(
    "vote(Tensor codes, Tensor starts, Tensor ends, int fingerprint, int budget, int[] fanout, Tensor? weights)"
    " -> (Tensor, Tensor, Tensor)"
)
def _vote(codes: Tensor, starts: Tensor, ends: Tensor, fingerprint: int, budget: int, fanout: Any, weights: Any) -> Any:
    fanout = tuple(fanout or ())  # AOTInductor passes an empty list as None
    book, seats = book_of(fingerprint), math.prod(fanout) if fanout else budget
    size = starts.shape[0], min(max(seats, 0), MAX_SEATS)  # the core refuses what is outside
    agents = codes.new_empty((*size, book.levels), dtype=torch.int32)
    results = agents, codes.new_empty(size, dtype=torch.int64), codes.new_empty(size[:1], dtype=torch.int32)
    yield results
    core.vote(book._core, *dense(codes, starts, ends), budget, fanout, *dense(weights), *results)


@operator("prototypes(Tensor codes, int fingerprint) -> Tensor")
def _prototypes(codes: Tensor, fingerprint: int) -> Iterator[Tensor]:
    book = book_of(fingerprint)
    found = codes.new_empty((*codes.shape[:-1], book.width), dtype=torch.float32)
    yield found
    core.prototypes(book._core, codes.contiguous().view(-1, codes.shape[-1]), found.view(-1, book.width))


_ROUTE_INPUTS = (
    "Tensor? x, Tensor v, Tensor starts, Tensor ends, Tensor prototypes, Tensor temperature, Tensor? count, "
    "Tensor? bias, Tensor? codes, Tensor? x_ids, Tensor? v_ids, Tensor? x_scale, int? fingerprint, str normalize, "
    "str method, int refine, str missing, str precision, Tensor? spread"
)
_ROUTE_WANTED = (1, 5, 7, 0, 4)  # v, temperature, bias, x, prototypes, in the order of `RouteGradients`


def _route_arguments(inputs: Sequence[Any]) -> list[Any]:
    """The arguments of the core up to the precision."""
    x, v, starts, ends, prototypes, temperature, count, bias, codes, *gathered, spread = dense(*inputs[:12], inputs[18])
    fingerprint, normalize, method, _, missing, precision = inputs[12:18]
    book = None if fingerprint is None else book_of(fingerprint)._core
    rows = [x, v, starts, ends, bias, spread, codes, book, *gathered]
    return [*rows, prototypes, count, temperature, normalize, method, missing, precision]


@operator(f"route({_ROUTE_INPUTS}, bool sparse) -> (Tensor tokens, Tensor lse, Tensor refined)")
def _route(*inputs: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    v, starts, prototypes, refine, missing = (inputs[i] for i in (1, 2, 4, 15, 16))
    size = (starts.shape[0], math.prod(prototypes.shape[-2:-1]) + (missing == "token"))
    tokens, lse = v.new_empty((*size, *v.shape[-1:])), v.new_empty(size, dtype=torch.float32)
    refined = prototypes.new_empty(prototypes.shape if refine else (0,))  # empty: an operator cannot return its input
    yield tokens, lse, refined
    core.route(*_route_arguments(inputs), refine, tokens, lse, refined if refine else None)


@operator(
    "route_backward(Tensor d_tokens, Tensor? d_lse, Tensor tokens, Tensor lse, bool[] need, "
    f"{_ROUTE_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _route_backward(
    d_tokens: Tensor, d_lse: Tensor | None, tokens: Tensor, lse: Tensor, need: Sequence[bool], *inputs: Any
) -> Iterator[tuple[Tensor, ...]]:
    results = _gradients([inputs[i] for i in _ROUTE_WANTED], need, ((0, inputs[10]), (3, inputs[9])))
    yield results
    wanted = [r if needed else None for r, needed in zip(results, need, strict=True)]
    core.route_backward(*dense(d_tokens, d_lse, tokens, lse), *_route_arguments(inputs), *wanted)


_ATTEND_INPUTS = "Tensor q, Tensor keys, Tensor values, Tensor candidate_offsets, Tensor? bias, float scale"


@operator(f"attend({_ATTEND_INPUTS}) -> (Tensor out, Tensor lse)")
def _attend(q: Tensor, keys: Tensor, values: Tensor, *others: Any) -> Iterator[tuple[Tensor, Tensor]]:
    results = q.new_empty((*q.shape[:2], *values.shape[-1:])), q.new_empty(q.shape[:2], dtype=torch.float32)
    yield results
    core.attend(*dense(q, keys, values, *others[:-1]), others[-1], *results)


@operator(
    f"attend_backward(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, {_ATTEND_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _attend_backward(*inputs: Any) -> Iterator[tuple[Tensor, ...]]:
    *tensors, scale = inputs
    bias = tensors[8] is not None
    results = _gradients([tensors[i] for i in (4, 5, 6, 8)], (True, True, True, bias))
    yield results
    core.attend_backward(*dense(*tensors), scale, *results[:3], results[3] if bias else None)


def _gradients_by_input(ctx: Any, at: Sequence[int], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs `at`, None for every other input; torch casts them to the inputs' types."""
    found = {i: g for i, g in zip(at, grads, strict=True) if ctx.needs_input_grad[i]}
    return tuple(found.get(i) for i in range(len(ctx.needs_input_grad)))


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, lse, refined = output
    fingerprint, method, refine = inputs[12], inputs[14], inputs[15]
    _, _, bias, x, prototypes = (ctx.needs_input_grad[i] for i in _ROUTE_WANTED)
    if method == "leaf" and (x or prototypes or bias):
        raise NotImplementedError("route: method='leaf' has gradients for v and temperature only")
    if refine and prototypes:
        raise NotImplementedError("route: refine > 0 has no gradient for prototypes, expected prototypes.detach()")
    for name, at in (("x_scale", 11), ("spread", 18)):
        if ctx.needs_input_grad[at]:
            raise NotImplementedError(f"route: {name} has no gradient, expected {name}.detach()")
    ctx.mark_non_differentiable(refined)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tokens, lse, *inputs[:4], refined if refine else inputs[4], *inputs[5:12], inputs[18])
    ctx.options, ctx.sparse = inputs[12:18], inputs[19]
    ctx.book = None if fingerprint is None else book_of(fingerprint)  # alive until the backward


def _route_back(ctx: Any, d_tokens: Tensor | None, d_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    tokens, lse, *tensors, spread = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in _ROUTE_WANTED]
    d_tokens = torch.zeros_like(tokens) if d_tokens is None else d_tokens
    grads = list(torch.ops.hisac.route_backward(d_tokens, d_lse, tokens, lse, need, *tensors, *ctx.options, spread))
    for at, table, ids in ((0, tensors[1], tensors[10]), (3, tensors[0], tensors[9])):
        if need[at] and ids is not None:
            grads[at] = table_gradient(grads[at], ids, table.shape[0], ctx.sparse)
    return _gradients_by_input(ctx, _ROUTE_WANTED, grads)


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:5])
    ctx.scale = inputs[5]


def _attend_back(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    grads = torch.ops.hisac.attend_backward(d_out, d_lse, out, lse, *tensors, ctx.scale)
    return _gradients_by_input(ctx, (0, 1, 2, 4), grads)


for _name, _back, _setup in (("route", _route_back, _route_setup), ("attend", _attend_back, _attend_setup)):
    torch.library.register_autograd(f"hisac::{_name}", _back, setup_context=_setup, lib=library)
    torch.library.register_autograd(f"hisac::{_name}_backward", no_double_backward, lib=library)
