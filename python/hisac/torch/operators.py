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
from ..types import Histories, RouteGradients
from .library import book_of, core, dense, library, no_double_backward, operator, table_gradient

# A batch of histories is these arguments of an operator: the fields of Histories, starts and ends in place of offsets.
_BATCH = [name for field in Histories._fields for name in (("starts", "ends") if field == "offsets" else (field,))]
_BATCH_SCHEMA = ", ".join(f"Tensor{'' if name in ('starts', 'ends') else '?'} {name}" for name in _BATCH)


def _histories(batch: Sequence[Any], unread: Sequence[str] = ()) -> tuple[Any, ...]:
    """The fields for the core, which does not convert."""
    named = zip(_BATCH, batch, strict=True)
    x, v, starts, ends, *others = (a if a is None or name in unread else a.contiguous() for name, a in named)
    return x, v, (starts, ends), *others


@operator("encode(int fingerprint, Tensor x) -> Tensor")
def _encode(fingerprint: int, x: Tensor) -> Iterator[Tensor]:
    book = book_of(fingerprint)
    codes = x.new_empty((*x.shape[:1], book.levels), dtype=torch.int32)
    yield codes
    core.encode(book._core, x.contiguous(), codes)


@operator(f"vote(int fingerprint, {_BATCH_SCHEMA}, int budget, int[] fanout) -> (Tensor, Tensor, Tensor)")
def _vote(fingerprint: int, *inputs: Any) -> Any:
    *batch, budget, fanout = inputs
    fanout = tuple(fanout or ())  # AOTInductor passes an empty list as None
    starts, codes = batch[_BATCH.index("starts")], batch[_BATCH.index("codes")]
    book, seats = book_of(fingerprint), math.prod(fanout) if fanout else budget
    size = starts.shape[0], min(max(seats, 0), MAX_SEATS)  # the core refuses what is outside
    agents = codes.new_empty((*size, book.levels), dtype=torch.int32)
    results = agents, codes.new_empty(size, dtype=torch.int64), codes.new_empty(size[:1], dtype=torch.int32)
    yield results
    core.vote(book._core, _histories(batch, ("x", "v")), budget, fanout, *results)


@operator("prototypes(int fingerprint, Tensor codes) -> Tensor")
def _prototypes(fingerprint: int, codes: Tensor) -> Iterator[Tensor]:
    book = book_of(fingerprint)
    found = codes.new_empty((*codes.shape[:-1], book.width), dtype=torch.float32)
    yield found
    core.prototypes(book._core, codes.contiguous().view(-1, codes.shape[-1]), found.view(-1, book.width))


_ROUTE_SCHEMA = (
    f"int? fingerprint, {_BATCH_SCHEMA}, Tensor prototypes, Tensor? count, Tensor temperature, str normalize, "
    "str method, str missing, str precision, int refine"
)
_ROUTE = [argument.split()[1] for argument in _ROUTE_SCHEMA.split(", ")]
_ROUTE_WANTED = [_ROUTE.index(name) for name in RouteGradients._fields]
_ROUTE_TABLES = [(RouteGradients._fields.index(name), _ROUTE.index(name + "_ids")) for name in ("x", "v")]
_TENSORS = _ROUTE.index("normalize")  # of route: the fingerprint, so many tensors, and its options


def _route_arguments(inputs: Sequence[Any]) -> list[Any]:
    """The arguments of the core up to the precision."""
    fingerprint, n = inputs[0], 1 + len(_BATCH)
    book = None if fingerprint is None else book_of(fingerprint)._core
    return [book, _histories(inputs[1:n]), *dense(*inputs[n:_TENSORS]), *inputs[_TENSORS : _ROUTE.index("refine")]]


def _float32(like: Tensor, shapes: Sequence[Any]) -> tuple[Tensor, ...]:
    """Gradients; empty where the shape is None: an operator cannot return None."""
    return tuple(like.new_empty((0,) if shape is None else shape, dtype=torch.float32) for shape in shapes)


@operator(f"route({_ROUTE_SCHEMA}, bool sparse) -> (Tensor tokens, Tensor lse, Tensor refined)")
def _route(*inputs: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    v, starts, prototypes, missing, refine = (
        inputs[_ROUTE.index(name)] for name in ("v", "starts", "prototypes", "missing", "refine")
    )
    size = (starts.shape[0], math.prod(prototypes.shape[-2:-1]) + (missing == "token"))
    tokens, lse = v.new_empty((*size, *v.shape[-1:])), v.new_empty(size, dtype=torch.float32)
    refined = prototypes.new_empty(prototypes.shape if refine else (0,))  # empty: an operator cannot return its input
    yield tokens, lse, refined
    core.route(*_route_arguments(inputs), refine, tokens, lse, refined if refine else None)


@operator(
    "route_backward(Tensor d_tokens, Tensor? d_lse, Tensor tokens, Tensor lse, bool[] need, "
    f"{_ROUTE_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _route_backward(
    d_tokens: Tensor, d_lse: Tensor | None, tokens: Tensor, lse: Tensor, need: Sequence[bool], *inputs: Any
) -> Iterator[tuple[Tensor, ...]]:
    wanted = zip((inputs[i] for i in _ROUTE_WANTED), need, strict=True)
    shapes: list[Any] = [t.shape if needed and t is not None else None for t, needed in wanted]
    for at, ids in _ROUTE_TABLES:  # a row for each id
        if shapes[at] is not None and inputs[ids] is not None:
            shapes[at] = (*inputs[ids].shape[:1], *shapes[at][1:])
    results = _float32(d_tokens, shapes)
    yield results
    filled = (r if needed else None for r, needed in zip(results, need, strict=True))
    core.route_backward(*dense(d_tokens, d_lse, tokens, lse), *_route_arguments(inputs), *filled)


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
    bias = tensors[8]
    results = _float32(tensors[0], [None if t is None else t.shape for t in (*tensors[4:7], bias)])
    yield results
    core.attend_backward(*dense(*tensors), scale, *results[:3], None if bias is None else results[3])


def _gradients_by_input(ctx: Any, at: Sequence[int], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs `at`, None for every other input; torch casts them to the inputs' types."""
    found = {i: g for i, g in zip(at, grads, strict=True) if ctx.needs_input_grad[i]}
    return tuple(found.get(i) for i in range(len(ctx.needs_input_grad)))


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, lse, refined = output
    needs = dict(zip(_ROUTE, ctx.needs_input_grad, strict=False))
    given = dict(zip(_ROUTE, inputs, strict=False))
    if given["method"] == "leaf" and (needs["x"] or needs["prototypes"] or needs["bias"]):
        raise NotImplementedError("route: method='leaf' has gradients for v and temperature only")
    if given["refine"] and needs["prototypes"]:
        raise NotImplementedError("route: refine > 0 has no gradient for prototypes, expected prototypes.detach()")
    for name in ("x_scale", "spread"):
        if needs[name]:
            raise NotImplementedError(f"route: {name} has no gradient, expected {name}.detach()")
    ctx.mark_non_differentiable(refined)
    ctx.set_materialize_grads(False)
    used = given | {"prototypes": refined if given["refine"] else given["prototypes"]}
    ctx.save_for_backward(tokens, lse, *(used[name] for name in _ROUTE[1:_TENSORS]))
    ctx.options, ctx.sparse = inputs[_TENSORS : len(_ROUTE)], inputs[-1]
    ctx.fingerprint = given["fingerprint"]
    ctx.book = None if ctx.fingerprint is None else book_of(ctx.fingerprint)  # alive until the backward


def _route_back(ctx: Any, d_tokens: Tensor | None, d_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    tokens, lse, *tensors = ctx.saved_tensors
    inputs = [ctx.fingerprint, *tensors, *ctx.options]
    need = [ctx.needs_input_grad[i] for i in _ROUTE_WANTED]
    d_tokens = torch.zeros_like(tokens) if d_tokens is None else d_tokens
    grads = list(torch.ops.hisac.route_backward(d_tokens, d_lse, tokens, lse, need, *inputs))
    for at, ids in _ROUTE_TABLES:
        if need[at] and inputs[ids] is not None:
            grads[at] = table_gradient(grads[at], inputs[ids], inputs[_ROUTE_WANTED[at]].shape[0], ctx.sparse)
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
