# SPDX-License-Identifier: Apache-2.0
"""The operators `torch.ops.hisac.*`: schema, fake and real implementation, autograd.

A route or attend operator has its gradient as an operator of its own, so that torch.compile sees both.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import compose
from ..reference import MAX_SEATS
from ..types import Histories, LeafGradients, MatchGradients, RouteGradients
from .library import book_of, core, dense, library, no_double_backward, operator, rows_used, sparse_gradient

# A batch of histories is these arguments of an operator: the fields of Histories, starts and ends in place of offsets.
_BATCH = [name for field in Histories._fields for name in (("starts", "ends") if field == "offsets" else (field,))]
_TYPES = {"starts": "Tensor", "ends": "Tensor", "longest": "SymInt?", "rows": "SymInt?"}
_BATCH_SCHEMA = ", ".join(f"{_TYPES.get(name, 'Tensor?')} {name}" for name in _BATCH)


def _histories(batch: Sequence[Any], unread: Sequence[str] = ()) -> tuple[Any, ...]:
    """The fields for the core, which does not convert."""
    named = zip(_BATCH, batch, strict=True)
    x, v, starts, ends, *others = (
        a.contiguous() if isinstance(a, Tensor) and name not in unread else a for name, a in named
    )
    return x, v, (starts, ends), *others


@operator("encode(int fingerprint, Tensor x) -> Tensor")
def _encode(fingerprint: int, x: Tensor) -> Iterator[Tensor]:
    book = book_of(fingerprint)
    codes = x.new_empty((*x.shape[:1], book.levels), dtype=torch.int32)
    yield codes
    core.encode(book._core, x.contiguous(), codes)


@operator(
    f"vote(int fingerprint, {_BATCH_SCHEMA}, int budget, int[] fanout, int[] beam) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _vote(fingerprint: int, *inputs: Any) -> Any:
    *batch, budget, fanout, beam = inputs
    fanout, beam = tuple(fanout or ()), tuple(beam or ())  # AOTInductor passes an empty list as None
    starts, codes = batch[_BATCH.index("starts")], batch[_BATCH.index("codes")]
    book, seats = book_of(fingerprint), beam[-1] if beam else math.prod(fanout) if fanout else budget
    size = starts.shape[0], min(max(seats, 0), MAX_SEATS)  # the core refuses what is outside
    agents = codes.new_empty((*size, book.levels), dtype=torch.int32)
    votes, count = codes.new_empty(size, dtype=torch.int64), codes.new_empty(size[:1], dtype=torch.int32)
    results = agents, votes, count, codes.new_empty((*size, book.width), dtype=torch.float32)
    yield results
    core.vote(book._core, _histories(batch, ("x", "v")), budget, fanout, beam, *results)


@operator("prototypes(int fingerprint, Tensor codes) -> Tensor")
def _prototypes(fingerprint: int, codes: Tensor) -> Iterator[Tensor]:
    book = book_of(fingerprint)
    found = codes.new_empty((*codes.shape[:-1], book.width), dtype=torch.float32)
    yield found
    core.prototypes(book._core, codes.contiguous().view(-1, codes.shape[-1]), found.view(-1, book.width))


@operator("agent_lists(int fingerprint, Tensor prototypes, Tensor? count, int k) -> Tensor")
def _agent_lists(fingerprint: int, prototypes: Tensor, count: Tensor | None, k: int) -> Iterator[Tensor]:
    book, (users, m, _) = book_of(fingerprint), prototypes.shape
    found = prototypes.new_empty((users, book.sizes[0], min(k, m)), dtype=torch.int32)
    yield found
    core.agent_lists(book._core, *dense(prototypes, count), found)


# ------------------------------------------------------------------------------------------------------ route


def _core_book(fingerprint: int | None) -> Any:
    return None if fingerprint is None else book_of(fingerprint)._core


def _float32(like: Tensor, shapes: Sequence[Any]) -> tuple[Tensor, ...]:
    """Gradients; empty where the shape is None: an operator cannot return None."""
    return tuple(like.new_empty((0,) if shape is None else shape, dtype=torch.float32) for shape in shapes)


def _of_rows(t: Tensor, rows: Tensor | None) -> Any:
    """The shape of a gradient: that of t, or of those of its rows that are listed."""
    return t.shape if rows is None else (rows.shape[0], *t.shape[1:])


def _some(wanted: Sequence[bool], arrays: Sequence[Any]) -> list[Any]:
    return [a if w else None for w, a in zip(wanted, arrays, strict=True)]


_ROUTE_SCHEMA = (
    f"int? fingerprint, {_BATCH_SCHEMA}, Tensor prototypes, Tensor? count, Tensor? agent_codes, Tensor? agent_lists, "
    "Tensor temperature, str normalize, int sparse, str precision"
)
_ROUTE = [argument.split()[1] for argument in _ROUTE_SCHEMA.split(", ")]
_ROUTE_WANTED = [_ROUTE.index(name) for name in RouteGradients._fields]
_TENSORS = _ROUTE.index("normalize")  # of route: the fingerprint, so many tensors, and its options


def _behaviours(batch: Sequence[Any]) -> Any:
    """T"""
    of = dict(zip(_BATCH, batch, strict=True))
    return next(of[name] for name in ("x_ids", "v_ids", "v", "x", "codes") if of[name] is not None).shape[0]


def _route_arguments(inputs: Sequence[Any]) -> list[Any]:
    n = 1 + len(_BATCH)
    return [
        _core_book(inputs[0]),
        _histories(inputs[1:n]),
        *dense(*inputs[n:_TENSORS]),
        *inputs[_TENSORS : len(_ROUTE)],
    ]


@operator(
    f"route({_ROUTE_SCHEMA}, bool tokens, bool mean_x, bool[] sparse_grad)"
    " -> (Tensor tokens, Tensor lse, Tensor mean_x)"
)
def _route(*inputs: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    v, starts, prototypes = (inputs[_ROUTE.index(name)] for name in ("v", "starts", "prototypes"))
    wanted = inputs[-3], True, inputs[-2]
    size = starts.shape[0], math.prod(prototypes.shape[-2:-1])
    like, width = (v, v.shape[-1]) if inputs[-3] else (prototypes, 0)
    lse, mean_x = _float32(prototypes, [size, prototypes.shape if inputs[-2] else None])
    results = like.new_empty((*size, width)), lse, mean_x
    yield results
    core.route(*_route_arguments(inputs), *_some(wanted, results))


@operator(
    f"route_backward({_ROUTE_SCHEMA}, Tensor tokens, Tensor lse, Tensor mean_x, Tensor? d_tokens, Tensor? d_lse, "
    "Tensor? d_mean_x, bool[] need, Tensor? x_rows, Tensor? v_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def _route_backward(*inputs: Any) -> Iterator[tuple[Tensor, ...]]:
    *returned, d_tokens, d_lse, d_mean_x, need, x_rows, v_rows = inputs[len(_ROUTE) :]
    given = dict(zip(RouteGradients._fields, (inputs[i] for i in _ROUTE_WANTED), strict=True))
    listed = {"x": x_rows, "v": v_rows}
    shapes = [None if t is None else _of_rows(t, listed.get(name)) for name, t in given.items()]
    results = _float32(returned[1], _some(need, shapes))
    yield results
    tokens, lse, mean_x = dense(*returned)
    forward = tokens if d_tokens is not None else None, lse, mean_x if d_mean_x is not None else None
    back = *forward, *dense(d_tokens, d_lse, d_mean_x, x_rows, v_rows)
    core.route_backward(*_route_arguments(inputs), *back, *_some(need, results))


@operator(f"missing(int? fingerprint, {_BATCH_SCHEMA}) -> Tensor")
def _missing(fingerprint: int | None, *batch: Any) -> Iterator[Tensor]:
    (found,) = _float32(batch[_BATCH.index("starts")], [(_behaviours(batch),)])
    yield found
    core.missing(_core_book(fingerprint), _histories(batch), found)


# ------------------------------------------------------------------------------------------------------ leaf sums

_LEAF_SCHEMA = f"int fingerprint, {_BATCH_SCHEMA}"
_LEAF = [argument.split()[1] for argument in _LEAF_SCHEMA.split(", ")]
_LEAF_WANTED = [_LEAF.index(name) for name in LeafGradients._fields]
_SUMS = "x v starts ends codes bias spread weights".split()
_SUMS_WITH_GRADIENT = [_SUMS.index(name) for name in ("x", "v", "bias", "spread")]


def as_histories(x: Any, v: Any, starts: Any, ends: Any, codes: Any, bias: Any, spread: Any, votes: Any) -> Histories:
    """Leaf sums, as the operator returns them."""
    return Histories(x, v, (starts, ends), codes, bias=bias, spread=spread, weights=votes)


@operator(f"leaf_sums({_LEAF_SCHEMA}, bool sparse) -> ({', '.join('Tensor' for _ in _SUMS)})")
def _leaf_sums(fingerprint: int, *inputs: Any) -> Iterator[tuple[Tensor, ...]]:
    *batch, _ = inputs
    x, v, starts, rows = (batch[_BATCH.index(name)] for name in ("x", "v", "starts", "rows"))
    book = book_of(fingerprint)
    sum_x, sum_v, bias, spread = _float32(
        v, [(rows, book.width if x is None else x.shape[-1]), (rows, v.shape[-1]), (rows,), (rows,)]
    )
    first, last, votes = (starts.new_empty(n, dtype=torch.int64) for n in (starts.shape, starts.shape, (rows,)))
    results = sum_x, sum_v, first, last, v.new_empty((rows, book.levels), dtype=torch.int32), bias, spread, votes
    yield results
    core.leaf_sums(book._core, _histories(batch), *results)


@operator(
    f"leaf_sums_backward({_LEAF_SCHEMA}, {', '.join(f'Tensor sum_{n}' for n in _SUMS)}, Tensor? d_x, Tensor? d_v, "
    "Tensor? d_bias, Tensor? d_spread, bool[] need, Tensor? v_rows) -> (Tensor, Tensor)"
)
def _leaf_sums_backward(fingerprint: int, *inputs: Any) -> Iterator[tuple[Tensor, ...]]:
    n = len(_BATCH)
    batch, sums = inputs[:n], inputs[n : n + len(_SUMS)]
    d_x, d_v, d_bias, d_spread, need, v_rows = inputs[n + len(_SUMS) :]
    v = batch[_BATCH.index("v")]
    results = _float32(sums[0], _some(need, [_of_rows(v, v_rows), (_behaviours(batch),)]))
    yield results
    d_x, d_v, d_bias, d_spread, v_rows = dense(d_x, d_v, d_bias, d_spread, v_rows)
    gradients = Histories(d_x, d_v, bias=d_bias, spread=d_spread)
    book = book_of(fingerprint)
    core.leaf_sums_backward(
        book._core, _histories(batch), as_histories(*sums), gradients, v_rows, *_some(need, results)
    )


# ------------------------------------------------------------------------------------------------------ attend

_ATTEND_INPUTS = (
    "Tensor q, Tensor keys, Tensor values, Tensor candidate_offsets, Tensor? bias, Tensor? token_offsets, "
    "SymInt longest, float scale"
)


@operator(f"attend({_ATTEND_INPUTS}) -> (Tensor out, Tensor lse)")
def _attend(q: Tensor, keys: Tensor, values: Tensor, *others: Any) -> Iterator[tuple[Tensor, Tensor]]:
    results = q.new_empty((*q.shape[:2], *values.shape[-1:])), q.new_empty(q.shape[:2], dtype=torch.float32)
    yield results
    core.attend(*dense(q, keys, values, *others[:-2]), *others[-2:], *results)


@operator(
    f"attend_backward(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, {_ATTEND_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _attend_backward(*inputs: Any) -> Iterator[tuple[Tensor, ...]]:
    *tensors, longest, scale = inputs
    bias = tensors[8]
    results = _float32(tensors[0], [None if t is None else t.shape for t in (*tensors[4:7], bias)])
    yield results
    core.attend_backward(*dense(*tensors), longest, scale, *results[:3], None if bias is None else results[3])


# ------------------------------------------------------------------------------------------------------ match

_MATCH_SCHEMA = (
    "int fingerprint, Tensor v, Tensor starts, Tensor ends, Tensor sum_codes, Tensor? bias, Tensor codes, Tensor? ids, "
    "Tensor candidate_offsets"
)
_MATCH = [argument.split()[1] for argument in _MATCH_SCHEMA.split(", ")]
_MATCH_WANTED = [_MATCH.index(name) for name in MatchGradients._fields]


def _match_arguments(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The codebook and the sums for the core; codes, ids and candidate_offsets."""
    v, starts, ends, sum_codes, bias, *candidates = dense(*inputs[1:])
    return book_of(inputs[0])._core, Histories(None, v, (starts, ends), sum_codes, bias=bias), candidates


@operator(f"match({_MATCH_SCHEMA}) -> (Tensor v, Tensor lse)")
def _match(*inputs: Any) -> Iterator[tuple[Tensor, Tensor]]:
    v, codes, ids = (inputs[_MATCH.index(name)] for name in ("v", "codes", "ids"))
    shape = (codes if ids is None else ids).shape[0], codes.shape[-1]
    results = v.new_empty((*shape, v.shape[-1])), v.new_empty(shape, dtype=torch.float32)
    yield results
    book, sums, candidates = _match_arguments(inputs)
    core.match(book, sums, *candidates, *results)


@operator(f"match_backward({_MATCH_SCHEMA}, Tensor? d_v, Tensor? d_lse, bool[] need) -> (Tensor, Tensor)")
def _match_backward(*inputs: Any) -> Iterator[tuple[Tensor, ...]]:
    *given, d_v, d_lse, need = inputs
    v = given[_MATCH.index("v")]
    results = _float32(v, _some(need, [v.shape, v.shape[:1]]))
    yield results
    book, sums, candidates = _match_arguments(given)
    core.match_backward(book, sums, *dense(d_v, d_lse), *candidates, *_some(need, results))


@operator("repeat_count(Tensor? own, Tensor starts, Tensor ends, Tensor ids, Tensor candidate_offsets) -> Tensor")
def _repeat_count(own: Tensor | None, starts: Tensor, ends: Tensor, *candidates: Tensor) -> Iterator[Tensor]:
    ids, _ = candidates
    count = ids.new_empty(ids.shape, dtype=torch.int64)
    yield count
    spans = starts.long(), ends.long()
    count.copy_(compose.repeat_count(torch, spans, *compose.counted(torch, len(starts), own, *candidates)))


# ------------------------------------------------------------------------------------------------------ autograd


def _gradients_by_input(ctx: Any, at: Sequence[int], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs `at`, None for every other input; torch casts them to the inputs' types."""
    found = {i: g for i, g in zip(at, grads, strict=True) if ctx.needs_input_grad[i]}
    return tuple(found.get(i) for i in range(len(ctx.needs_input_grad)))


def _refuse(verb: str, needs: dict[str, bool], *names: str) -> None:
    for name in names:
        if needs[name]:
            raise NotImplementedError(f"{verb}: {name} has no gradient, expected {name}.detach()")


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    needs = dict(zip(_ROUTE, ctx.needs_input_grad, strict=False))
    _refuse("route", needs, "x_scale")
    with_tokens, with_mean_x, ctx.sparse_grad = inputs[-3:]
    if with_mean_x and needs["x"]:
        raise NotImplementedError("route: mean_x has no gradient for x, expected x.detach()")
    ctx.mark_non_differentiable(*_unwanted(output, (with_tokens, True, with_mean_x)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *map(_tensor, inputs[1:_TENSORS]))
    ctx.options, ctx.fingerprint = inputs[_TENSORS : len(_ROUTE)], inputs[0]
    ctx.book = None if ctx.fingerprint is None else book_of(ctx.fingerprint)  # alive until the backward


def _tensor(a: Any) -> Tensor | None:
    """The sizes that a batch states are not kept for its backward, which needs none."""
    return a if isinstance(a, Tensor) else None


def _unwanted(output: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    return [a for a, w in zip(output, wanted, strict=True) if not w]


def _route_back(ctx: Any, d_tokens: Tensor | None, d_lse: Tensor | None, d_mean_x: Tensor | None) -> Any:
    tokens, lse, mean_x, *tensors = ctx.saved_tensors
    inputs = [ctx.fingerprint, *tensors, *ctx.options]
    need = [ctx.needs_input_grad[i] for i in _ROUTE_WANTED]
    wanted = zip("xv", ctx.sparse_grad, need[:2], strict=True)
    rows = [_sparse_rows(name, sparse and needed, inputs[1:]) for name, sparse, needed in wanted]
    forward = tokens, lse, mean_x, d_tokens, d_lse, d_mean_x
    grads = list(torch.ops.hisac.route_backward(*inputs, *forward, need, *rows))
    for at, listed in enumerate(rows):
        if listed is not None:
            grads[at] = sparse_gradient(grads[at], listed, inputs[_ROUTE_WANTED[at]].shape[0])
    return _gradients_by_input(ctx, _ROUTE_WANTED, grads)


def _sparse_rows(name: str, sparse: bool, batch: Sequence[Any]) -> Tensor | None:
    """The rows of the table, x or v, of a sparse gradient; None of any other."""
    table, ids, starts, ends = (batch[_BATCH.index(field)] for field in (name, f"{name}_ids", "starts", "ends"))
    return rows_used(ids, starts, ends, table.shape[0]) if sparse and ids is not None else None


def _leaf_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    needs = dict(zip(_LEAF, ctx.needs_input_grad, strict=False))
    _refuse("leaf_sums", needs, "x", "x_scale", "spread")
    moves = [name == "v" or (needs["bias"] and name in ("x", "bias", "spread")) for name in _SUMS]
    ctx.mark_non_differentiable(*_unwanted(output, moves))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *map(_tensor, inputs[1 : len(_LEAF)]))
    ctx.fingerprint, ctx.sparse = inputs[0], inputs[-1]
    ctx.book = book_of(ctx.fingerprint)  # alive until the backward


def _leaf_back(ctx: Any, *d_sums: Tensor | None) -> Any:
    sums, batch = ctx.saved_tensors[: len(_SUMS)], ctx.saved_tensors[len(_SUMS) :]
    need = [ctx.needs_input_grad[i] for i in _LEAF_WANTED]
    given = [d_sums[i] for i in _SUMS_WITH_GRADIENT]
    rows = _sparse_rows("v", ctx.sparse and need[0], batch)
    grads = list(torch.ops.hisac.leaf_sums_backward(ctx.fingerprint, *batch, *sums, *given, need, rows))
    if rows is not None:
        grads[0] = sparse_gradient(grads[0], rows, batch[_BATCH.index("v")].shape[0])
    return _gradients_by_input(ctx, _LEAF_WANTED, grads)


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:6])
    ctx.options = inputs[6:]


def _attend_back(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    grads = torch.ops.hisac.attend_backward(d_out, d_lse, out, lse, *tensors, *ctx.options)
    return _gradients_by_input(ctx, (0, 1, 2, 4), grads)


def _match_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[1:])
    ctx.fingerprint, ctx.book = inputs[0], book_of(inputs[0])  # alive until the backward


def _match_back(ctx: Any, d_v: Tensor | None, d_lse: Tensor | None) -> Any:
    need = [ctx.needs_input_grad[i] for i in _MATCH_WANTED]
    grads = torch.ops.hisac.match_backward(ctx.fingerprint, *ctx.saved_tensors, d_v, d_lse, need)
    return _gradients_by_input(ctx, _MATCH_WANTED, grads)


for _name, _back, _setup in (
    ("route", _route_back, _route_setup),
    ("leaf_sums", _leaf_back, _leaf_setup),
    ("attend", _attend_back, _attend_setup),
    ("match", _match_back, _match_setup),
):
    torch.library.register_autograd(f"hisac::{_name}", _back, setup_context=_setup, lib=library)
    torch.library.register_autograd(f"hisac::{_name}_backward", no_double_backward, lib=library)
