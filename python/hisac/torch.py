# SPDX-License-Identifier: Apache-2.0
"""The verbs in torch: differentiable functions, and the modules of a ranking model.

`torch.ops.hisac.*` stand between torch and the core, so that autograd, torch.compile, torch.export, checkpointing and
DDP see ordinary operators. They know a codebook by its fingerprint, a constant of the program. The semantic side
(codebook, x, prototypes) follows neither a module's dtype nor autocast. First derivatives in reverse mode only: double
backward and forward mode raise. All results are deterministic. Letters are the dimensions of `hisac.reference`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import Codebook
from .reference import MAX_SEATS
from .results import Agents, Attended, Tokens
from .torch_library import UnknownCodebookError as UnknownCodebookError
from .torch_library import book_of, core, dense, library, no_double_backward, operator, register, table_gradient

Offsets = Tensor | tuple[Tensor, Tensor] | None


# ---------------------------------------------------------------------------------------------------------- operators


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


# ----------------------------------------------------------------------------------------------------------- functions


def _jagged(name: str, t: Tensor) -> Any:
    if not t.is_nested or t.layout != torch.jagged:
        got = "a strided nested tensor" if t.is_nested else "no offsets"
        raise TypeError(f"{name}: got {got}, expected a jagged nested tensor, or its values() and offsets()")
    return t


def _rows(name: str, *tensors: Tensor | None) -> list[Any]:
    """The rows of jagged nested tensors; any other tensor as it is."""
    return [_jagged(name, t).values() if t is not None and t.is_nested else t for t in tensors]


def _spans(name: str, offsets: Offsets, ragged: Tensor) -> tuple[Tensor, Tensor]:
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


def _tau(temperature: float | Tensor, device: torch.device | None = None) -> Tensor:
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
    return cast(Tensor, torch.ops.hisac.encode(*_rows("encode", x), register(book)))


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
    starts, ends = _spans("vote", offsets, codes)
    codes, weights = _rows("vote", codes, weights)
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
    starts, ends = _spans("route", offsets, v if v_ids is None else v_ids)
    x, v, bias, spread, codes, x_ids, v_ids = _rows("route", x, v, bias, spread, codes, x_ids, v_ids)
    tau = _tau(temperature, v.device)
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
    (q,) = _rows("attend", q)
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


# ------------------------------------------------------------------------------------------------------------- modules


class KeysValues(NamedTuple):
    """The tokens of a request, projected once for all its candidates: keys [B, M, H, d], values [B, M, H, V]."""

    keys: Tensor
    values: Tensor


class Compressed(NamedTuple):
    """The fields of `Tokens`; the agents, of which `log_share` makes the paper's bias; codes [T, L] to use again."""

    tokens: Tensor
    lse: Tensor
    prototypes: Tensor
    agents: Agents
    codes: Tensor


for _type in (Agents, Tokens, Attended, KeysValues, Compressed):  # as results of a saved torch.export program
    torch.utils._pytree._register_namedtuple(_type, serialized_type_name=f"hisac.{_type.__name__}")


class Compressor(nn.Module):
    """Histories to tokens: encode and vote without gradient, route with, under a learned temperature (log tau, [1]).

    The codebook is no parameter: it stays float32 under `half()`, `bfloat16()`, `double()` and autocast, so codes stay
    the same integers. It travels in the state dict; one of other sizes is refused. Raises ValueError.

    >>> compress = Compressor(Codebook([torch.eye(2)]), budget=2, normalize="agents")
    >>> out = compress(torch.eye(2), torch.randn(2, 3), torch.tensor([0, 2]))
    >>> out.tokens.shape, out.agents.count.tolist()
    (torch.Size([1, 2, 3]), [2])
    """

    def __init__(
        self, book: Codebook, *, budget: int | None = None, fanout: Sequence[int] | None = None,
        temperature: float = 0.1, learn_temperature: bool = True, normalize: str = "history", method: str = "exact",
        refine: int = 0, missing: str = "drop", precision: str = "float32", sparse: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.book, self.budget, self.fanout = book, budget, fanout
        self.normalize, self.method, self.refine, self.missing = normalize, method, refine, missing
        self.precision, self.sparse = precision, sparse
        self.log_tau = nn.Parameter(_tau(temperature).log(), learn_temperature)
        rows = torch.empty(0, book.width, dtype=torch.float32)
        self(rows, rows, torch.zeros(1, dtype=torch.int64))  # checks every option

    def forward(
        self, x: Tensor | None, v: Tensor, offsets: Offsets, *, codes: Tensor | None = None,
        weights: Tensor | None = None, bias: Tensor | None = None, x_ids: Tensor | None = None,
        v_ids: Tensor | None = None, x_scale: float | Tensor | None = None,
    ) -> Compressed:  # fmt: skip
        """x [T, D] (None: codes), v [T, V], offsets [B + 1] or (starts, ends) or None for jagged v, codes [T, L] of an
        earlier call, weights [T] of the votes, bias [T] of the routing (log weight, time decay); x_ids, v_ids, x_scale
        of gathered x and v as in `route`: with x_ids, codes are those of a table encoded once -> Compressed."""
        if codes is None:
            if x is None:
                raise ValueError("Compressor: neither x nor codes given, expected one of them")
            if x_ids is not None:
                raise ValueError("Compressor: codes expected with x_ids, got none: encode the table once, index it")
            codes = encode(self.book, x)
        (codes,), spans = _rows("Compressor", codes), _spans("Compressor", offsets, v if v_ids is None else v_ids)
        agents = vote(self.book, codes, spans, budget=self.budget, fanout=self.fanout, weights=weights)
        out = route(
            x, v, spans, prototypes(self.book, agents), count=agents.count, temperature=self.log_tau.float().exp(),
            normalize=self.normalize, bias=bias, codes=codes, book=self.book, method=self.method, refine=self.refine,
            missing=self.missing, precision=self.precision, x_ids=x_ids, v_ids=v_ids, x_scale=x_scale,
            sparse=self.sparse,
        )  # fmt: skip
        return Compressed(*out, agents, codes)

    def get_extra_state(self) -> Tensor:
        """The codebook's file as uint8, so that `torch.load(weights_only=True)` reads it."""
        return torch.frombuffer(bytearray(self.book.to_bytes()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the codebook of a state dict; ValueError where its sizes differ."""
        book = Codebook.from_bytes(state.cpu().numpy().tobytes())
        got, expected = ((*b.sizes, b.width) for b in (book, self.book))
        if got != expected:
            raise ValueError(f"load_state_dict: codebook (C_1, .., C_L, D) is {got}, expected {expected}")
        self.book = book
        register(book)

    def __setstate__(self, state: dict[str, Any]) -> None:
        cast(Any, super()).__setstate__(state)
        register(self.book)

    def extra_repr(self) -> str:
        names = "budget", "fanout", "normalize", "method", "refine", "missing", "precision"
        return ", ".join([repr(self.book), *(f"{name}={getattr(self, name)!r}" for name in names)])


class TargetAttention(nn.Module):
    """Multi-head attention of candidates on cached tokens, with the log-sum-exp of the logits as a feature.

    Softmax hides how similar the best match is: give the scoring net `lse` beside `out`.

    >>> attention = TargetAttention(6, 3, heads=2, head_width=4)
    >>> cached = attention.keys_values(torch.randn(1, 5, 3))
    >>> out, lse = attention(torch.randn(7, 6), cached, torch.tensor([0, 7]))
    >>> out.shape, lse.shape
    (torch.Size([7, 8]), torch.Size([7, 2]))
    """

    def __init__(
        self, candidate_width: int, token_width: int, *, heads: int = 4, head_width: int = 16,
        value_width: int | None = None, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(candidate_width, heads * head_width, bias=bias)
        self.key = nn.Linear(token_width, heads * head_width, bias=bias)
        self.value = nn.Linear(token_width, heads * (value_width or head_width), bias=bias)

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """tokens [B, M, W] -> KeysValues, to be passed to `forward` in place of the tokens."""
        keys, values = (f(tokens).unflatten(-1, (self.heads, -1)) for f in (self.key, self.value))
        return KeysValues(keys, values)

    def forward(
        self, candidates: Tensor, tokens: Tensor | KeysValues, candidate_offsets: Tensor, *, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """candidates [N, C], tokens [B, M, W] or KeysValues, candidate_offsets [B + 1], bias [B, M], that is `lse` or
        `log_share` (-inf: no such token; without bias an absent token is one of zeros) -> out [N, H V], lse [N, H]."""
        keys, values = tokens if isinstance(tokens, KeysValues) else self.keys_values(tokens)
        q = self.query(candidates).unflatten(-1, (self.heads, -1))
        out, lse = attend(q, keys, values, candidate_offsets, bias=bias)
        return out.flatten(1), lse
