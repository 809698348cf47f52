# SPDX-License-Identifier: Apache-2.0
"""The verbs as differentiable functions of tensors, over the operators."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import Codebook
from ..reference import MAX_SEATS
from ..types import Agents, Attended, Histories, Tokens
from . import operators as operators  # defines torch.ops.hisac
from .library import register


def _jagged(name: str, t: Tensor) -> Any:
    if not t.is_nested or t.layout != torch.jagged:
        got = "a strided nested tensor" if t.is_nested else "no offsets"
        raise TypeError(f"{name}: got {got}, expected a jagged nested tensor, or its values() and offsets()")
    return t


def row_tensors(name: str, *tensors: Tensor | None) -> list[Any]:
    """The rows of jagged nested tensors; any other tensor as it is."""
    return [_jagged(name, t).values() if t is not None and t.is_nested else t for t in tensors]


def flat(name: str, histories: Histories) -> Histories:
    """Histories of dense tensors, offsets as (starts, ends): the rows of jagged nested tensors, whose offsets are taken
    where none are given; float32 but for x and v."""
    if not isinstance(histories, Histories):
        raise TypeError(f"{name}: histories expected hisac.Histories, got {type(histories).__name__}")
    tensors = [t for t in histories if isinstance(t, Tensor)]
    device, offsets = tensors[0].device if tensors else None, histories.offsets
    if offsets is None:
        ragged = next((t for t in tensors if t.is_nested), None)
        if ragged is None:
            raise TypeError(f"{name}: got no offsets, expected them, or a jagged nested tensor")
        t = _jagged(name, ragged)
        starts, lengths = t.offsets()[:-1], t.lengths()
        offsets = starts, t.offsets()[1:] if lengths is None else starts + lengths
    elif isinstance(offsets, tuple):
        offsets = tuple(torch.as_tensor(a, device=device) for a in offsets)
    else:
        offsets = torch.as_tensor(offsets, device=device)
        offsets = offsets[:-1], offsets[1:]
    x, v, _, codes, x_ids, v_ids, scale, *others = histories
    if scale is not None and not isinstance(scale, Tensor):
        scale = torch.full((1,), scale, dtype=torch.float32, device=device)
    x, v, codes, x_ids, v_ids, *others = row_tensors(name, x, v, codes, x_ids, v_ids, scale, *others)
    return Histories(x, v, offsets, codes, x_ids, v_ids, *(None if t is None else t.float() for t in others))


def _fields(histories: Histories) -> tuple[Any, ...]:
    """The arguments of an operator."""
    x, v, spans, *others = histories
    return x, v, *spans, *others


def _reverse_mode_only(name: str, *inputs: Tensor | None) -> None:
    dual = (t is not None and cast(Any, forward_ad.unpack_dual)(t).tangent is not None for t in inputs)
    if not torch.compiler.is_compiling() and any(dual):
        raise NotImplementedError(f"{name}: forward-mode differentiation is not supported")


def tau_tensor(temperature: float | Tensor, device: torch.device | None = None) -> Tensor:
    if isinstance(temperature, Tensor):
        return temperature.float()
    if not 0 < temperature < math.inf:
        raise ValueError(f"route: temperature expected finite and > 0, got {temperature}")
    return torch.full((1,), temperature, dtype=torch.float32, device=device)


def encode(book: Codebook, x: Tensor) -> Tensor:
    """Semantic IDs as `hisac.encode`, without gradient: x [T, D] or jagged -> codes [T, L] int32.

    >>> encode(Codebook([torch.eye(2)]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])).tolist()
    [[0], [1]]
    """
    return cast(Tensor, torch.ops.hisac.encode(register(book), *row_tensors("encode", x)))


def vote(
    book: Codebook, histories: Histories, *, budget: int | None = None, fanout: Sequence[int] | None = None
) -> Agents:
    """The interest-agents of each user as `hisac.vote`, without gradient.

    Reads codes [T, L] int32, offsets (or None for a jagged tensor) and weights [T] of the histories -> Agents.

    >>> codes = torch.tensor([[1], [0], [1]], dtype=torch.int32)
    >>> vote(Codebook([torch.eye(2)]), Histories(codes=codes, offsets=torch.tensor([0, 3])), budget=2).votes
    tensor([[2, 1]])
    """
    h = flat("vote", histories)
    name = register(book)
    if budget is not None and budget < 1:  # for the core 0 is none
        raise ValueError(f"vote: budget expected 1 to {MAX_SEATS}, got {budget}")
    voting = Histories(None, None, h.offsets, h.codes, weights=h.weights)  # the others may need a gradient
    found = torch.ops.hisac.vote(name, *_fields(voting), int(budget or 0), list(fanout or ()))
    return Agents(found[0], found[1], found[2], name % 2**64)


def prototypes(book: Codebook, codes: Tensor | Agents) -> Tensor:
    """As `Codebook.prototypes`: codes [..., L] int32, or Agents of this codebook -> [..., D] float32.

    >>> prototypes(Codebook([torch.eye(2)]), torch.tensor([[1]], dtype=torch.int32))
    tensor([[0., 1.]])
    """
    name = register(book)
    if isinstance(codes, Agents):
        if codes.fingerprint != name % 2**64:
            raise ValueError(f"prototypes: agents of {codes.fingerprint:016x}, expected {name % 2**64:016x}")
        codes = codes.codes
    return cast(Tensor, torch.ops.hisac.prototypes(name, codes))


def route(
    histories: Histories, prototypes: Tensor, *, count: Tensor | None = None, temperature: float | Tensor = 0.1,
    normalize: str = "history", book: Codebook | None = None, method: str = "exact", refine: int = 0,
    missing: str = "drop", precision: str = "float32", sparse: bool = False,
) -> Tokens:  # fmt: skip
    """Soft-routing attention as `hisac.route`; tokens and lse have gradients for v, temperature, bias, x, prototypes.

        token_a = sum_i u_ai v_i / sum_i u_ai          lse_a = log sum_i u_ai

    Of the histories it reads all but weights, and codes where `book` is given; offsets may be None beside a jagged
    tensor. prototypes [B, M, D], count [B], temperature a number, [1] or [M] -> Tokens. spread and refined prototypes
    are constants; method="leaf" has gradients for v and temperature only (else NotImplementedError).
    precision="bfloat16" lets products round to bfloat16 where that is faster.

    With x_ids and v_ids, x and v are tables, as the weight of an `nn.Embedding`: an id outside is an absent behaviour.
    A table's gradient is the sum over the behaviours of each row, in their order and in float64: dense, or `sparse` COO
    (not in torch.compile).

    >>> v = torch.tensor([[1.0], [2.0]], requires_grad=True)
    >>> out = route(Histories(torch.eye(2), v, torch.tensor([0, 2])), torch.eye(2)[None], temperature=0.01)
    >>> out.tokens.sum().backward()
    >>> out.tokens.tolist(), v.grad.tolist()
    ([[[1.0], [2.0]]], [[1.0], [1.0]])
    """
    h = flat("route", histories)
    if h.v is None:
        raise TypeError("route: v expected a tensor, got None")
    tau = tau_tensor(temperature, h.v.device)
    if sparse and torch.compiler.is_compiling():
        raise NotImplementedError("route: sparse gradients are not for torch.compile, expected sparse=False")
    _reverse_mode_only("route", h.x, h.v, prototypes, tau, h.bias, h.spread)
    routed = h._replace(weights=None, codes=None if book is None else h.codes)
    tokens, lse, refined = torch.ops.hisac.route(
        None if book is None else register(book), *_fields(routed), prototypes, count, tau, normalize, method, missing,
        precision, refine, sparse,
    )  # fmt: skip
    return Tokens(tokens, lse, refined if refine else prototypes)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, candidate_offsets: Tensor | None, *, bias: Tensor | None = None,
    scale: float | None = None,
) -> Attended:  # fmt: skip
    """Target attention as `hisac.attend`; out and lse have gradients for q, keys, values and bias.

        z_m = scale q . k_m + bias_m        out = softmax(z) values        lse = log sum_m exp z_m

    q [N, H, d], keys [B, M, H, d], values [B, M, H, V], candidate_offsets [B + 1] or None for jagged q, bias [B, M]
    (-inf: no such token), scale 1 / sqrt(d) -> Attended.

    >>> q, keys, values = torch.zeros(3, 1, 4), torch.randn(1, 2, 1, 4), torch.ones(1, 2, 1, 5)
    >>> attend(q, keys, values, torch.tensor([0, 3])).lse.exp().round().flatten()
    tensor([2., 2., 2.])
    """
    candidate_offsets = _jagged("attend", q).offsets() if candidate_offsets is None else candidate_offsets
    (q,) = row_tensors("attend", q)
    _reverse_mode_only("attend", q, keys, values, bias)
    keys, values = keys.to(q.dtype), values.to(q.dtype)  # autocast casts q in a model that caches keys and values
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    bias = None if bias is None else bias.float()
    return Attended(*torch.ops.hisac.attend(q, keys, values, candidate_offsets, bias, scale))


def log_share(agents: Agents) -> Tensor:
    """The paper's bias of target attention: log(votes_a / sum of votes), [B, M] float32, -inf for an absent agent.

    >>> log_share(Agents(None, torch.tensor([[3, 1, 0]]), None, 0)).exp()
    tensor([[0.7500, 0.2500, 0.0000]])
    """
    return cast(Tensor, (agents.votes / agents.votes.sum(1, keepdim=True).clamp(min=1)).log())
