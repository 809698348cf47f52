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
from ..types import Agents, Attended, Tokens
from . import operators as operators  # defines torch.ops.hisac
from .library import register

Offsets = Tensor | tuple[Tensor, Tensor] | None


def _jagged(name: str, t: Tensor) -> Any:
    if not t.is_nested or t.layout != torch.jagged:
        got = "a strided nested tensor" if t.is_nested else "no offsets"
        raise TypeError(f"{name}: got {got}, expected a jagged nested tensor, or its values() and offsets()")
    return t


def row_tensors(name: str, *tensors: Tensor | None) -> list[Any]:
    """The rows of jagged nested tensors; any other tensor as it is."""
    return [_jagged(name, t).values() if t is not None and t.is_nested else t for t in tensors]


def spans_of(name: str, offsets: Offsets, ragged: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and ends of the users' rows; those of the jagged tensor `ragged` where no offsets are given."""
    if offsets is None:
        t = _jagged(name, ragged)
        starts, lengths = t.offsets()[:-1], t.lengths()
        return starts, t.offsets()[1:] if lengths is None else starts + lengths
    return offsets if isinstance(offsets, tuple) else (offsets[:-1], offsets[1:])


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
    return cast(Tensor, torch.ops.hisac.encode(*row_tensors("encode", x), register(book)))


def vote(
    book: Codebook, codes: Tensor, offsets: Offsets, *, budget: int | None = None,
    fanout: Sequence[int] | None = None, weights: Tensor | None = None,
) -> Agents:  # fmt: skip
    """The interest-agents of each user as `hisac.vote`, without gradient.

    codes [T, L] int32, offsets [B + 1] or (starts, ends) or None for jagged codes, weights [T] -> Agents.

    >>> codes = torch.tensor([[1], [0], [1]], dtype=torch.int32)
    >>> vote(Codebook([torch.eye(2)]), codes, torch.tensor([0, 3]), budget=2).votes
    tensor([[2, 1]])
    """
    starts, ends = spans_of("vote", offsets, codes)
    codes, weights = row_tensors("vote", codes, weights)
    name = register(book)
    weights = None if weights is None else weights.float()
    if budget is not None and budget < 1:  # for the core 0 is none
        raise ValueError(f"vote: budget expected 1 to {MAX_SEATS}, got {budget}")
    found = torch.ops.hisac.vote(codes, starts, ends, name, int(budget or 0), list(fanout or ()), weights)
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
    return cast(Tensor, torch.ops.hisac.prototypes(codes, name))


def route(
    x: Tensor | None, v: Tensor, offsets: Offsets, prototypes: Tensor, *, count: Tensor | None = None,
    temperature: float | Tensor = 0.1, normalize: str = "history", bias: Tensor | None = None,
    spread: Tensor | None = None, codes: Tensor | None = None, book: Codebook | None = None, method: str = "exact",
    refine: int = 0, missing: str = "drop", precision: str = "float32", x_ids: Tensor | None = None,
    v_ids: Tensor | None = None, x_scale: float | Tensor | None = None, sparse: bool = False,
) -> Tokens:  # fmt: skip
    """Soft-routing attention as `hisac.route`; tokens and lse have gradients for v, temperature, bias, x, prototypes.

        token_a = sum_i u_ai v_i / sum_i u_ai          lse_a = log sum_i u_ai

    x [T, D] (None: codes and book), v [T, V], offsets [B + 1] or (starts, ends) or None for jagged v, prototypes
    [B, M, D], count [B], temperature a number, [1] or [M], bias, spread [T], codes [T, L] -> Tokens. spread and refined
    prototypes are constants; method="leaf" has gradients for v and temperature only (else NotImplementedError).
    precision="bfloat16" lets products round to bfloat16 where that is faster.

    x_ids and v_ids [T] (or jagged, then without offsets too) make x and v tables, as the weight of an `nn.Embedding`:
    an id outside is an absent behaviour, x may be int8 with x_scale, a number, [1] or [rows]. A table's gradient is the
    sum over the behaviours of each row, in their order and in float64: dense, or `sparse` COO (not in torch.compile).

    >>> v = torch.tensor([[1.0], [2.0]], requires_grad=True)
    >>> out = route(torch.eye(2), v, torch.tensor([0, 2]), torch.eye(2)[None], temperature=0.01)
    >>> out.tokens.sum().backward()
    >>> out.tokens.tolist(), v.grad.tolist()
    ([[[1.0], [2.0]]], [[1.0], [1.0]])
    """
    starts, ends = spans_of("route", offsets, v if v_ids is None else v_ids)
    x, v, bias, spread, codes, x_ids, v_ids = row_tensors("route", x, v, bias, spread, codes, x_ids, v_ids)
    tau = tau_tensor(temperature, v.device)
    if x_scale is not None:
        x_scale = x_scale.float() if isinstance(x_scale, Tensor) else tau.new_full((1,), x_scale)
    if sparse and torch.compiler.is_compiling():
        raise NotImplementedError("route: sparse gradients are not for torch.compile, expected sparse=False")
    _reverse_mode_only("route", x, v, prototypes, tau, bias, spread)
    tokens, lse, refined = torch.ops.hisac.route(
        x, v, starts, ends, prototypes, tau, count, None if bias is None else bias.float(), codes,
        x_ids, v_ids, x_scale, None if book is None else register(book), normalize, method, refine, missing,
        precision, None if spread is None else spread.float(), sparse,
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
