# SPDX-License-Identifier: Apache-2.0
"""The verbs as differentiable functions of tensors, over the operators."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import Codebook, compose
from ..arrays import NUMBERS, behaviours_of, dtype_name, most_tokens, pair_of, whole
from ..reference import MAX_SEATS
from ..types import (
    Agents,
    Attended,
    Compressed,
    Histories,
    Match,
    Method,
    Missing,
    Normalize,
    Precision,
    Recent,
    RouteAgents,
    Tokens,
)
from . import operators as operators  # defines torch.ops.hisac
from .library import register

_FLOAT32 = "x_scale", "bias", "spread", "weights"


def _jagged(name: str, t: Tensor) -> Any:
    if not t.is_nested or t.layout != torch.jagged:
        got = "a strided nested tensor" if t.is_nested else "no offsets"
        raise TypeError(f"{name}: got {got}, expected a jagged nested tensor, or its values() and offsets()")
    return t


def rows_of(name: str, t: Tensor | None) -> Any:
    """The rows of a jagged nested tensor; any other tensor as it is."""
    return _jagged(name, t).values() if t is not None and t.is_nested else t


def _embeddings(verb: str, histories: Histories) -> Iterator[tuple[str, torch.nn.Embedding]]:
    """x and v, as far as they are modules, whose weight is the table."""
    for name, table in zip("xv", histories[:2], strict=True):
        if isinstance(table, torch.nn.Embedding):
            if table.max_norm is not None or table.scale_grad_by_freq:
                raise ValueError(f"{verb}: {name} expected an nn.Embedding without max_norm and scale_grad_by_freq")
            yield name, table


def _sparse_grads(verb: str, histories: Histories, sparse_grad: Any) -> list[bool]:
    """Whether the gradients of x and v are sparse: as the option says, or an embedding. A list is an answer."""
    if isinstance(sparse_grad, list):
        return sparse_grad
    tables = _embeddings(verb, histories) if isinstance(histories, Histories) else ()
    found = {name: bool(table.sparse) for name, table in tables}
    return [bool(sparse_grad) or found.get(name, False) for name in "xv"]


def flat(verb: str, histories: Histories, unread: Sequence[str] = ()) -> Histories:
    """Histories of dense tensors, offsets as (starts, ends): the rows of jagged nested tensors, whose offsets are taken
    where none are given, and else have to be the same; float32 but for x and v. Of the fields in `unread` only the
    sizes matter. Offsets that are no (starts, ends) state rows, T."""
    if not isinstance(histories, Histories):
        raise TypeError(f"{verb}: histories expected hisac.Histories, got {type(histories).__name__}")
    padding: list[Tensor] = []  # of each behaviour: whether it stands for none
    for name, table in _embeddings(verb, histories):
        weight, ids = table.weight, getattr(histories, f"{name}_ids")
        fields: dict[str, Any] = {name: weight.float() if weight.dtype == torch.float64 else weight}
        histories = histories._replace(**fields)
        if table.padding_idx is not None and isinstance(ids, Tensor):
            padding.append(rows_of(verb, ids) == table.padding_idx)
    tensors = [t for t in histories if isinstance(t, Tensor)]
    read: dict[str, Any] = {"offsets": _spans(verb, histories.offsets, tensors)}
    for name, field in histories._asdict().items():
        if field is None or name in read:
            continue
        if name in ("longest", "rows"):
            read[name] = field
            continue
        if name in unread:
            read[name] = rows_of(verb, field).detach() if isinstance(field, Tensor) else None
            continue
        if name == "x_scale" and isinstance(field, NUMBERS):
            field = torch.full((1,), float(field), dtype=torch.float32, device=tensors[0].device)
        if not isinstance(field, Tensor):
            raise TypeError(f"{verb}: {name} expected a tensor, got {type(field).__name__}")
        if field.is_nested and not torch.compiler.is_compiling():
            _check_jagged(verb, name, field, read["offsets"])
        rows = rows_of(verb, field)
        if name in ("x_ids", "v_ids"):
            for of_padding in padding:
                rows = rows.masked_fill(of_padding, -1)
        votes = name == "weights" and not rows.is_floating_point()
        read[name] = rows.long() if votes else rows.float() if name in _FLOAT32 else rows
    if "rows" not in read and tensors and not isinstance(histories.offsets, tuple):
        read["rows"] = behaviours_of(Histories(**read))
    return Histories(**read)


def _jagged_spans(verb: str, t: Tensor) -> tuple[Tensor, Tensor]:
    offsets, lengths = _jagged(verb, t).offsets(), _jagged(verb, t).lengths()
    return offsets[:-1], offsets[1:] if lengths is None else offsets[:-1] + lengths


def _check_jagged(verb: str, name: str, t: Tensor, spans: tuple[Tensor, Tensor]) -> None:
    own = _jagged_spans(verb, t)
    for a, b in zip(own, spans, strict=True):
        if a.data_ptr() != b.data_ptr() and not torch.equal(a.long(), b.long().to(a.device)):
            got, expected = ((e - s).tolist()[:8] for s, e in (own, spans))
            raise ValueError(f"{verb}: {name} expected the rows of the other fields, {expected} a user, got {got}")


def _spans(verb: str, offsets: Any, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Starts and ends of the users' rows, beside a batch's tensors; the first jagged one's where none are given."""
    if offsets is None:
        ragged = next((t for t in tensors if t.is_nested), None)
        if ragged is None:
            raise TypeError(f"{verb}: got no offsets, expected them, or a jagged nested tensor")
        return _jagged_spans(verb, ragged)
    device = tensors[0].device if tensors else None

    def tensor(name: str, a: Any, size: str) -> Tensor:
        found = torch.as_tensor(a, device=device)
        if found.ndim != 1 or found.dtype not in (torch.int32, torch.int64):
            got = f"{dtype_name(found)} {list(found.shape)}"
            text = f"{verb}: {name} expected int32 or int64 {size}, got {got}"
            raise TypeError(text) if found.ndim == 1 else ValueError(text)
        return found

    if isinstance(offsets, list) and any(isinstance(a, Tensor) for a in offsets):
        offsets = tuple(offsets)
    if pair := pair_of(verb, offsets):
        return tensor("starts", pair[0], "[B]"), tensor("ends", pair[1], "[B]")
    found = tensor("offsets", offsets, "[B + 1], or a tuple (starts, ends)")
    if found.shape[0] == 0:
        raise ValueError(f"{verb}: offsets expected [B + 1], got an empty array")
    return found[:-1], found[1:]


def _fields(histories: Histories) -> tuple[Any, ...]:
    """The arguments of an operator."""
    x, v, spans, *others = histories
    return x, v, *spans, *others


def _reverse_mode_only(name: str, *inputs: Tensor | None) -> None:
    dual = (t is not None and cast(Any, forward_ad.unpack_dual)(t).tangent is not None for t in inputs)
    if not torch.compiler.is_compiling() and any(dual):
        raise NotImplementedError(f"{name}: forward-mode differentiation is not supported")


def _default_temperature(book: Codebook) -> float | None:
    return book.temperature


vars(_default_temperature)["_dynamo_marked_constant"] = True  # as `register`


def tau_tensor(temperature: float | Tensor, device: torch.device | None = None) -> Tensor:
    if isinstance(temperature, Tensor):
        return temperature.float().reshape(-1) if temperature.ndim == 0 else temperature.float()
    if not isinstance(temperature, NUMBERS):
        raise TypeError(f"route: temperature expected a number or a tensor, got {type(temperature).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"route: temperature expected finite and > 0, got {temperature}")
    return torch.full((1,), temperature, dtype=torch.float32, device=device)


def encode(book: Codebook, x: Tensor) -> Tensor:
    """Semantic IDs as `hisac.encode`, without gradient: x [T, D] or jagged -> codes [T, L] int32.

    >>> encode(Codebook([torch.eye(2)]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])).tolist()
    [[0], [1]]
    """
    return cast(Tensor, torch.ops.hisac.encode(register(book), rows_of("encode", x)))


def vote(
    book: Codebook, histories: Histories, *, budget: int | None = None, fanout: Sequence[int] | None = None,
    beam: Sequence[int] | None = None,
) -> Agents:  # fmt: skip
    """The interest-agents of each user as `hisac.vote`, without gradient.

    Reads codes [T, L] int32 (a table, with x_ids), offsets (or None for a jagged tensor) and weights [T] of the
    histories -> Agents, with prototypes.

    >>> codes = torch.tensor([[1], [0], [1]], dtype=torch.int32)
    >>> vote(Codebook([torch.eye(2)]), Histories(codes=codes, offsets=torch.tensor([0, 3])), budget=2).votes
    tensor([[2, 1]])
    """
    h = flat("vote", histories, ("x", "v", "v_ids", "x_scale", "bias", "spread"))
    if h.codes is None:
        raise TypeError("vote: codes expected in the histories, got None")
    name = register(book)
    seats = 0 if budget is None else whole("vote", "budget", budget, 1, MAX_SEATS)
    numbers = [[whole("vote", rule, k) for k in of or ()] for rule, of in (("fanout", fanout), ("beam", beam))]
    found = torch.ops.hisac.vote(name, *_fields(h), seats, *numbers)
    return Agents(found[0], found[1], found[2], name % 2**64, found[3])


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


def agent_lists(book: Codebook, agents: Agents, k: int) -> Agents:
    """The agents with their lists for sparse routing, as `hisac.agent_lists`, without gradient.

    >>> found = vote(Codebook([torch.eye(2)]), Histories(codes=torch.zeros(1, 1).int(), offsets=[0, 1]), budget=2)
    >>> agent_lists(Codebook([torch.eye(2)]), found, 1).lists.tolist()
    [[[0], [0]]]
    """
    to = compose.routed(VERBS, "agent_lists", agents, None, book)
    k = whole("agent_lists", "k", k, 1, 2**31 - 1)
    lists = torch.ops.hisac.agent_lists(register(book), to.prototypes.detach(), to.count, k)
    return agents._replace(prototypes=to.prototypes, lists=lists)


def route(
    histories: Histories, agents: Agents | RouteAgents | Tensor, *, count: Tensor | None = None,
    temperature: float | Tensor | None = None, normalize: Normalize = "agents", book: Codebook | None = None,
    sparse: int | None = None, precision: Precision = "float32", tokens: bool = True, mean_x: bool = False,
    sparse_grad: bool = False,
) -> Tokens:  # fmt: skip
    """Soft-routing attention as `hisac.route`; what it returns has gradients for v, bias, spread, x, prototypes and
    temperature.

        token_a = sum_i u_ai v_i / sum_i u_ai          lse_a = log sum_i u_ai

    Of the histories it reads every field but weights; codes only where `book` is given; offsets may be None beside a
    jagged tensor; x and v may be `nn.Embedding`s, for their weights and padding_idx. agents: those of `vote`, or
    prototypes [B, M, D] with their count [B]; temperature a number, [1] or [M], or None, the default of `book` ->
    Tokens. mean_x has no gradient for x (else NotImplementedError). precision="bfloat16" lets products round to it
    where that is faster. sparse = k: sparse routing, with `book` and codes; lists of agents have no gradient.

    With x_ids, x and codes are tables, and with v_ids v is one: an id outside is an absent behaviour. The gradient of a
    table is the sum over the behaviours of each row, in their order and in float64: dense, or with `sparse_grad`, and
    of an `nn.Embedding(sparse=True)` without it, COO of the rows that some history has. Then a table that learns is a
    leaf (else ValueError), and torch.compile runs the call outside of its graph; fullgraph=True and export refuse it,
    but for a call under torch.no_grad().

    >>> v = torch.tensor([[1.0], [2.0]], requires_grad=True)
    >>> out = route(Histories(torch.eye(2), v, torch.tensor([0, 2])), torch.eye(2)[None], temperature=0.01)
    >>> out.tokens.sum().backward()
    >>> out.tokens.tolist(), v.grad.tolist()
    ([[[1.0], [2.0]]], [[1.0], [1.0]])
    """
    sparse_grads = _sparse_grads("route", histories, sparse_grad)
    k = 0 if sparse is None else whole("route", "sparse", sparse, 1, 2**31 - 1)
    h = flat("route", histories, ("weights", "codes") if book is None else ("weights",))
    if tokens and h.v is None:
        raise TypeError("route: v expected in the histories, got None")
    to = compose.routed(VERBS, "route", agents, count, book, sparse)
    to = to if k else RouteAgents(*to[:2])
    tau = tau_tensor(compose.temperature_of("route", temperature, book, _default_temperature), to.prototypes.device)
    _check_sparse_grads("route", h, sparse_grads)
    _reverse_mode_only("route", h.x, h.v, to.prototypes, tau, h.bias, h.spread)
    options = tau, normalize, k, precision, tokens, mean_x, sparse_grads
    found = torch.ops.hisac.route(None if book is None else register(book), *_fields(h), *to, *options)
    return Tokens(found[0] if tokens else None, found[1], found[2] if mean_x else None)


def _check_sparse_grads(verb: str, histories: Histories, sparse: list[bool]) -> None:
    """Raises where an operator of torch made a table: most refuse its COO gradient in the backward, and name nothing.
    Raises while torch.compile traces too, which then runs the call outside of its graph, or with fullgraph=True tells
    why it cannot."""
    if not any(sparse) or not torch.is_grad_enabled():
        return
    if torch.compiler.is_compiling():
        text = (
            "sparse gradients are in no graph, expected torch.no_grad(), or neither sparse_grad nor sparse embeddings"
        )
        raise NotImplementedError(f"{verb}: {text}")
    tables = zip("xv", histories[:2], (histories.x_ids, histories.v_ids), sparse, strict=True)
    for name, table, ids, is_sparse in tables:
        made_by = None if ids is None or table is None or not is_sparse else table.grad_fn
        if made_by is not None and not isinstance(made_by, torch.autograd.function.BackwardCFunction):  # one's own may
            got = f"what {made_by.name()} made"
            raise ValueError(f"{verb}: with sparse_grad {name} expected a leaf, as an nn.Embedding's weight, got {got}")


def leaf_sums(book: Codebook, histories: Histories, *, sparse_grad: bool = False) -> Histories:
    """A row for each leaf of each user as `hisac.leaf_sums`; x, v, bias and spread have gradients for v and bias.

    Reads what `route` reads, codes and weights -> Histories of the same users. Their offsets are (starts, ends): the
    sums of a user lie where its rows do, among histories.rows ones, and what lies between is not defined, so no value
    decides a shape. rows that are not stated are T, or where offsets are (starts, ends), which may overlap, counted.
    sparse_grad: as in `route`, for a table v.

    >>> h = Histories(torch.eye(2), torch.ones(2, 1), torch.tensor([0, 2]), torch.zeros(2, 1, dtype=torch.int32))
    >>> leaf_sums(Codebook([torch.eye(2)]), h).x[:1]
    tensor([[0.5000, 0.5000]])
    """
    _, sparse = _sparse_grads("leaf_sums", histories, sparse_grad)
    h = flat("leaf_sums", histories)
    for name in ("v", "codes"):
        if getattr(h, name) is None:
            raise TypeError(f"leaf_sums: {name} expected in the histories, got None")
    _check_sparse_grads("leaf_sums", h, [False, sparse])
    _reverse_mode_only("leaf_sums", h.x, h.v, h.bias, h.spread)
    if h.rows is None:
        starts, ends = h.offsets
        h = h._replace(rows=int((ends - starts).sum()))
    return operators.as_histories(*torch.ops.hisac.leaf_sums(register(book), *_fields(h), sparse))


def missing(histories: Histories, *, book: Codebook | None = None) -> Tensor:
    """0 for each missing behaviour and -inf for any other, [T], as `hisac.missing`, without gradient.

    >>> h = Histories(torch.tensor([[1.0], [torch.nan]]), torch.ones(2, 1), torch.tensor([0, 2]))
    >>> missing(h)
    tensor([-inf, 0.])
    """
    h = _constant(flat("missing", histories, ("weights", "codes") if book is None else ("weights",)))
    if h.v is None:
        raise TypeError("missing: v expected in the histories, got None")
    return cast(Tensor, torch.ops.hisac.missing(None if book is None else register(book), *_fields(h)))


def compress(
    book: Codebook, histories: Histories, *, budget: int | None = None, fanout: Sequence[int] | None = None,
    beam: Sequence[int] | None = None, agents: Agents | None = None, temperature: float | Tensor | None = None,
    normalize: Normalize = "agents", method: Method = "exact", refine: int = 0, missing: Missing = "drop",
    sparse: int | None = None, precision: Precision = "float32", mean_x: bool = False, sparse_grad: bool = False,
) -> Compressed:  # fmt: skip
    """Histories -> tokens in one call as `hisac.compress`, with the gradients of its verbs: `vote` without, `route`
    with. Refined prototypes are constants; method="leaf" has gradients for v, bias and temperature. log_share has those
    of lse in agents mode, and none in history mode, but for bias beside `missing="token"`.

    >>> h = Histories(torch.eye(2), torch.ones(2, 1), torch.tensor([0, 2]))
    >>> compress(Codebook([torch.eye(2)]), h, budget=2, temperature=0.1).tokens
    tensor([[[1.],
             [1.]]])
    """
    sparse_grads: Any = _sparse_grads("compress", histories, sparse_grad)
    h, refine = flat("compress", histories), whole("compress", "refine", refine, 0, 10**6)
    verbs = VERBS._replace(
        route=partial(route, sparse_grad=sparse_grads),
        leaf_sums=partial(leaf_sums, sparse_grad=sparse_grads),
    )
    return compose.compress(
        verbs, book, h, agents=agents, budget=budget, fanout=fanout, beam=beam, temperature=temperature,
        normalize=normalize, method=method, refine=refine, missing=missing, sparse=sparse, precision=precision,
        mean_x=mean_x,
    )  # fmt: skip


def _constant(a: Any) -> Any:
    if isinstance(a, tuple):
        return Histories(*map(_constant, a)) if isinstance(a, Histories) else tuple(map(_constant, a))
    return a.detach() if isinstance(a, Tensor) else a


VERBS = compose.Verbs(
    encode, vote, prototypes, agent_lists, leaf_sums, missing, route, torch, lambda a, like: a.to(like.dtype),
    _constant, fingerprint=lambda book: register(book) % 2**64, default_temperature=_default_temperature,
)  # fmt: skip


def attend(
    q: Tensor, keys: Tensor, values: Tensor, candidate_offsets: Tensor | None, *, bias: Tensor | None = None,
    scale: float | None = None, token_offsets: Tensor | None = None, longest: int | None = None,
) -> Attended:  # fmt: skip
    """Target attention as `hisac.attend`; out and lse have gradients for q, keys, values and bias.

        z_m = scale q . k_m + bias_m        out = softmax(z) values        lse = log sum_m exp z_m

    q [N, H, d], keys [B, M, H, d], values [B, M, H, V], candidate_offsets [B + 1] or None for jagged q, bias [B, M]
    (-inf: no such token), scale 1 / sqrt(d) -> Attended. With token_offsets [B + 1], for tokens that differ in number:
    keys [R, H, d], values [R, H, V], bias [R]; on a GPU state the `longest` then. A candidate in no user's range has a
    row of zeros and an lse of -inf.

    >>> q, keys, values = torch.zeros(3, 1, 4), torch.randn(1, 2, 1, 4), torch.ones(1, 2, 1, 5)
    >>> attend(q, keys, values, torch.tensor([0, 3])).lse.exp().round().flatten()
    tensor([2., 2., 2.])
    """
    candidate_offsets = _jagged("attend", q).offsets() if candidate_offsets is None else candidate_offsets
    candidate_offsets = torch.as_tensor(candidate_offsets, device=q.device)
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"attend: bias expected floating-point numbers, as log_share, got {dtype_name(bias)}")
    q = rows_of("attend", q)
    _reverse_mode_only("attend", q, keys, values, bias)
    keys, values = keys.to(q.dtype), values.to(q.dtype)  # autocast casts q in a model that caches keys and values
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    bias = None if bias is None else bias.float()
    most = most_tokens("attend", token_offsets, longest)
    token_offsets = None if token_offsets is None else torch.as_tensor(token_offsets, device=q.device)
    inputs = q, keys, values, candidate_offsets, bias, token_offsets, most, scale
    return Attended(*torch.ops.hisac.attend(*inputs))


def match(
    book: Codebook, sums: Histories, codes: Tensor, candidate_offsets: Tensor | None, *, ids: Tensor | None = None
) -> Match:
    """What the history says of each candidate as `hisac.match`; v and lse have gradients for v and bias of the sums.

        lse = log sum_s exp(bias_s)        v = sum_s exp(bias_s) v_s / sum_s exp(bias_s)        none: v = 0, lse = -inf

    sums are what `leaf_sums` returned; codes [N, L] int32, or a table [items, L] with ids [N]; candidate_offsets
    [B + 1], or None for jagged codes or ids -> Match. lse is -inf, and has no gradient, where there are no sums;
    `TreeMatch` has log(1 + mass).

    >>> book, codes = Codebook([torch.eye(2), torch.eye(2)]), torch.tensor([[0, 0], [0, 1]], dtype=torch.int32)
    >>> sums = leaf_sums(book, Histories(None, torch.tensor([[1.0], [3.0]]), torch.tensor([0, 2]), codes))
    >>> match(book, sums, codes, torch.tensor([0, 2])).v.squeeze(2)
    tensor([[2., 1.],
            [2., 3.]])
    """
    h = flat("match", sums, ("x", "x_scale", "spread", "weights"))
    for name in ("v", "codes"):
        if getattr(h, name) is None:
            raise TypeError(f"match: sums.{name} expected in the histories, got None")
    for name in ("x_ids", "v_ids"):
        if getattr(h, name) is not None:
            raise ValueError(f"match: sums expected without ids, got {name}")
    if candidate_offsets is None:
        candidate_offsets = _jagged("match", codes if ids is None else ids).offsets()
    candidate_offsets = torch.as_tensor(candidate_offsets, device=codes.device)
    codes, ids = rows_of("match", codes), rows_of("match", ids)
    _reverse_mode_only("match", h.v, h.bias)
    inputs = h.v, *h.offsets, h.codes, h.bias, codes, ids, candidate_offsets
    return Match(*torch.ops.hisac.match(register(book), *inputs))


def _time_order(verb: str, histories: Histories) -> Histories:
    """Flat histories, whose offsets are checked where their values are at hand."""
    h = flat(verb, histories)
    if not torch.compiler.is_compiling() and h.offsets[0].is_cpu:
        compose.checked_spans(torch, verb, "offsets", h.offsets, behaviours_of(h))
    return h


def recent(histories: Histories, n: int) -> Recent:
    """Each user's n most recent behaviours apart from the older ones, as `hisac.recent`; the shares have gradients for
    bias. An embedding's padding_idx is padding.

    >>> found = recent(Histories(v=torch.zeros(6, 1), offsets=torch.tensor([0, 4, 6])), 3)
    >>> found.rows.tolist(), found.older_share.exp().tolist()
    ([[1, 2, 3], [4, 5, 0]], [0.25, 0.0])
    """
    h, n = _time_order("recent", histories), whole("recent", "n", n, 0)
    starts, ends = (a.long() for a in h.offsets)
    t = behaviours_of(h)
    found = compose.recent(VERBS, h, (starts, ends), t, cast(Any, torch.sym_min)(n, t))
    tables: dict[str, Any] = {name: getattr(histories, name) for name, _ in _embeddings("recent", histories)}
    return found._replace(older=found.older._replace(**tables))


def repeat_count(histories: Histories, ids: Tensor, candidate_offsets: Any) -> Tensor:
    """How often each candidate's item is in its user's history, as `hisac.repeat_count`; no gradients.

    >>> h = Histories(v_ids=torch.tensor([4, 4, 7, 4]), offsets=[0, 3, 4])
    >>> repeat_count(h, torch.tensor([4, 9, 4]), [0, 2, 3])
    tensor([2, 0, 1])
    """
    h = _time_order("repeat_count", histories)
    own, offsets = h.x_ids if h.v_ids is None else h.v_ids, torch.as_tensor(candidate_offsets, device=ids.device)
    return cast(Tensor, torch.ops.hisac.repeat_count(own, *h.offsets, ids, offsets))


def merge(a: Any, b: Any) -> Any:
    """`hisac.merge` of tensors, with gradients: two pairs (out, lse), of disjoint parts of one softmax or one sum, to
    that of both. Where an lse is -inf, its side has no part in the result, and no gradient. Not of what the modules
    TreeMatch and TargetAttention return, whose lse is finite where there is nothing.

    >>> one, none = (torch.ones(1, 2), torch.zeros(1)), (torch.zeros(1, 2), torch.tensor([-torch.inf]))
    >>> merge(one, one)[1].exp(), merge(one, none)[0]
    (tensor([2.]), tensor([[1., 1.]]))
    """
    return compose.merge(torch, a, b)
