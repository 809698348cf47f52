# SPDX-License-Identifier: Apache-2.0
"""The modules of a ranking model: histories to tokens, candidates that attend to them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import Codebook
from ..compose import coded, temperature_of
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
    RouteAgents,
    Tokens,
)
from .functions import VERBS, attend, compress, leaf_sums, match, tau_tensor
from .library import register


class KeysValues(NamedTuple):
    """The tokens of a request, projected once for all its candidates: keys [B, M, H, d], values [B, M, H, V]."""

    keys: Tensor
    values: Tensor


# of a saved torch.export program
for _type in (Histories, Agents, RouteAgents, Tokens, Attended, KeysValues, Compressed, Match):
    torch.utils._pytree._register_namedtuple(_type, serialized_type_name=f"hisac.{_type.__name__}")
cast(Any, torch.serialization).add_safe_globals([Histories, Agents])  # example inputs are loaded by weights_only


def _single(a: Any) -> Any:
    """A tensor of float64 as float32, in which every verb computes, also as x and v of histories; any other as it
    is."""
    if isinstance(a, Histories):
        return a._replace(x=_single(a.x), v=_single(a.v))
    return a.float() if isinstance(a, Tensor) and a.dtype == torch.float64 else a


class _OfBook(nn.Module):
    """A module of a codebook, which travels in its state dict."""

    def __init__(self, book: Codebook) -> None:
        super().__init__()
        if not isinstance(book, Codebook):
            raise TypeError(f"{type(self).__name__}: book expected hisac.Codebook, got {type(book).__name__}")
        self.book = book

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


def _type_of(v: Any) -> torch.dtype:
    """Of v of histories."""
    return cast(torch.dtype, v.weight.dtype if isinstance(v, nn.Embedding) else v.dtype)


def _check_all_asked(module: str, offsets: Tensor, candidates: Tensor) -> None:
    """No candidate is left out, as far as the CPU can tell."""
    if not torch.compiler.is_compiling() and offsets.is_cpu and len(offsets):
        first, last, n = int(offsets[0]), int(offsets[-1]), len(candidates)
        if (first, last) != (0, n):
            raise ValueError(f"{module}: candidate_offsets expected from 0 to N = {n}, got from {first} to {last}")


class Compressor(_OfBook):
    """`compress` as a module, under a learned temperature (log tau, [1]).

    Args:
        book: the codebook
        budget, fanout, beam: the rule of `hisac.vote`, one of them
        temperature: the first tau; None: the default of the codebook
        learn_temperature: whether log tau is a parameter. Give it no weight decay
        normalize, sparse, precision: as in `hisac.route`
        method, refine, missing, mean_x: as in `hisac.compress`; the token of missing="token" is the last of
            [B, M + 1, V]
        sparse_grad: COO gradients for tables of x and v, which must then be leaves, such as weights; an
            `nn.Embedding(sparse=True)` as x or v needs no option. Look rows up by that module elsewhere too: a gradient
            by weight[ids] is dense, and so is its sum with this one. In torch.compile the call is outside of the graph

    The codebook is no parameter: it stays float32 under `half()`, `bfloat16()`, `double()` and autocast, so codes stay
    the same integers. It travels in the state dict; one of other sizes is refused. Raises ValueError.

    What a network takes of the result is finite, and a token without mass gives no gradient. Tokens are zero there and
    of v's type. lse and log_share are of the module's type. lse is not that of `compress`, which is -inf there. It has
    one more logit, 0:

        lse_a = log(e^0 + sum_i u_ai) = log(1 + mass)

    It is 0 for a token without mass, rises with the mass, and keeps float32's digits for masses down to 2^-126. It is a
    feature, and no bias of TargetAttention.
    log_share is that of `compress`: its -inf tells `attend` that there is no such token. As a feature, take
    log_share.exp(), the share, which is 0 there. Agents are for verbs, and absent ones have codes of -1: to embed
    codes, take codes + 1 and padding_idx=0.

    >>> compress = Compressor(Codebook([torch.eye(2)], temperature=0.1), budget=2)
    >>> out = compress(Histories(torch.eye(2), torch.randn(2, 3), torch.tensor([0, 2])))
    >>> out.tokens.shape, out.agents.count.tolist()
    (torch.Size([1, 2, 3]), [2])
    """

    def __init__(
        self, book: Codebook, *, budget: int | None = None, fanout: Sequence[int] | None = None,
        beam: Sequence[int] | None = None, temperature: float | None = None, learn_temperature: bool = True,
        normalize: Normalize = "agents", method: Method = "exact", refine: int = 0, missing: Missing = "drop",
        sparse: int | None = None, precision: Precision = "float32", mean_x: bool = False, sparse_grad: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(book)
        self.budget, self.fanout, self.beam = budget, fanout, beam
        self.normalize, self.method, self.refine, self.missing = normalize, method, refine, missing
        self.sparse, self.precision, self.mean_x, self.sparse_grad = sparse, precision, mean_x, sparse_grad
        self.log_tau = nn.Parameter(
            tau_tensor(temperature_of("Compressor", temperature, book)).log(), learn_temperature
        )
        rows = torch.empty(0, book.width, dtype=torch.float32)
        self(Histories(rows, rows, torch.zeros(1, dtype=torch.int64)))  # checks every option

    def forward(self, histories: Histories) -> Compressed:
        """Histories -> Compressed, as `compress`, but for lse: log(1 + mass). x and v may be float64 too; x is
        rounded to float32."""
        made = compress(
            self.book, _single(histories), budget=self.budget, fanout=self.fanout, beam=self.beam,
            temperature=self.log_tau.float().exp(), normalize=self.normalize, method=self.method, refine=self.refine,
            missing=self.missing, sparse=self.sparse, precision=self.precision, mean_x=self.mean_x,
            sparse_grad=self.sparse_grad,
        )  # fmt: skip
        lse, share = (t.to(self.log_tau.dtype) for t in (nn.functional.softplus(made.lse), made.log_share))
        return made._replace(tokens=made.tokens.to(_type_of(histories.v)), lse=lse, log_share=share)

    def extra_repr(self) -> str:
        names = "budget", "fanout", "beam", "normalize", "method", "refine", "missing", "sparse", "precision", "mean_x"
        return ", ".join([repr(self.book), *(f"{name}={getattr(self, name)!r}" for name in names)])


class TargetAttention(nn.Module):
    """Multi-head attention of candidates on cached tokens, with the log-sum-exp of the logits as a feature.

    Softmax hides how similar the best match is: give the scoring net `lse` beside `out`. It is that of `attend`, but 0
    in place of -inf for a candidate without tokens:

        lse = log sum_m exp z_m     without tokens: log(1 e^0) = 0

    That is as if the candidate's user had one token, of key and value 0, whose share is 1. `out` is 0 there, and so is
    every gradient. Both come in the module's type; `out` under autocast in autocast's. Candidates and tokens may have
    another type. Sums of float64 are those of float32.

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
        tokens = tokens.to(self.key.weight.dtype)
        keys, values = (f(tokens).unflatten(-1, (self.heads, -1)) for f in (self.key, self.value))
        return KeysValues(keys, values)

    def forward(
        self, candidates: Tensor, tokens: Tensor | KeysValues, candidate_offsets: Tensor, *, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """candidates [N, C], tokens [B, M, W] or KeysValues, candidate_offsets [B + 1], bias [B, M], as log_share of
        a Compressor, but not its lse (-inf: no such token; without bias an absent token is one of zeros) ->
        out [N, H V], lse [N, H]. Raises ValueError where the users' ranges leave candidates out (on the CPU)."""
        if isinstance(tokens, Compressed):
            raise TypeError("TargetAttention: tokens expected [B, M, W] or KeysValues, got Compressed; give its tokens")
        offsets = torch.as_tensor(candidate_offsets, device=candidates.device)
        _check_all_asked("TargetAttention", offsets, candidates)
        keys, values = tokens if isinstance(tokens, KeysValues) else self.keys_values(tokens)
        q = self.query(candidates.to(self.query.weight.dtype)).unflatten(-1, (self.heads, -1))
        out, lse = attend(_single(q), keys, values, offsets, bias=bias)
        lse = lse.masked_fill(lse == -torch.inf, 0.0).to(self.query.weight.dtype)
        return out.flatten(1).to(q.dtype), lse


class Similarity(nn.Module):
    """How similar a candidate is to its user's tokens: log-sum-exp of sharp cosines, for each of several sharpnesses s.

        out = log sum_m exp(bias_m + s (cos(candidate, token_m) - 1))       without tokens: -2 s, the least there can be

    With log_share as the bias it is between -2 s and 0: near 0 where all of the history is like the candidate, about
    log_share of the only token that is. Softmax attention does not tell this. Give it a scoring network in the space
    of the embeddings (candidates' x, tokens' mean_x) and in that of the values, by a module for each.

    Args:
        sharpness: the first s, one a feature; they are learned. `parameter_groups` gives them a rate of their own

    >>> out = Similarity((5.0, 20.0))(torch.eye(3), torch.eye(3)[None], torch.tensor([0, 3]))
    >>> out.shape, (out < 0.02).all().item()
    (torch.Size([3, 2]), True)
    """

    def __init__(self, sharpness: Sequence[float] = (5.0, 20.0)) -> None:
        super().__init__()
        given = [float(s) for s in sharpness]
        if not given or not all(0 < s < math.inf for s in given):
            raise ValueError(f"Similarity: sharpness expected finite numbers > 0, got {sharpness!r}")
        self.log_sharpness = nn.Parameter(torch.tensor(given).log())

    def forward(
        self, candidates: Tensor, tokens: Tensor, candidate_offsets: Tensor, *, bias: Tensor | None = None
    ) -> Tensor:
        """candidates [N, W], tokens [B, M, W], candidate_offsets [B + 1], bias [B, M], as log_share of a Compressor
        (-inf: no such token) -> [N, number of sharpnesses], in the module's type. A vector of zeros has a cosine of 0
        with every other. Raises ValueError where the users' ranges leave candidates out (on the CPU)."""
        offsets = torch.as_tensor(candidate_offsets, device=candidates.device)
        _check_all_asked("Similarity", offsets, candidates)
        s = self.log_sharpness.float().exp()
        q, keys = (nn.functional.normalize(a.float(), dim=-1) for a in (candidates, tokens))
        q, keys = q[:, None] * s[:, None], keys[:, :, None].expand(-1, -1, len(s), -1)
        nothing = keys.new_zeros((*keys.shape[:-1], 1))
        lse = attend(q, keys, nothing, offsets, bias=bias, scale=1.0).lse
        return torch.where(lse > -torch.inf, lse - s, -2 * s).to(self.log_sharpness.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.log_sharpness)} sharpnesses"


def parameter_groups(model: nn.Module, lr: float, *, weight_decay: float = 0.0, faster: float = 10.0) -> list[Any]:
    """Groups for an optimiser of torch.optim: the log temperatures of Compressors and the log sharpnesses of
    Similarities learn `faster` times as fast, without decay; all other parameters at lr, with weight_decay. On the rate
    of the weights a temperature hardly moves from where it begins.

    >>> model = nn.ModuleList([nn.Linear(2, 2), Similarity()])
    >>> [(group["lr"], len(group["params"])) for group in parameter_groups(model, 0.01)]
    [(0.01, 2), (0.1, 1)]
    """
    scaled = [m for m in model.modules() if isinstance(m, Compressor | Similarity)]
    of_scale = {id(p) for m in scaled for p in m.parameters(recurse=False)}
    every = [p for p in model.parameters() if p.requires_grad]
    slow, quick = [p for p in every if id(p) not in of_scale], [p for p in every if id(p) in of_scale]
    groups = [
        {"params": slow, "lr": lr, "weight_decay": weight_decay},
        {"params": quick, "lr": faster * lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class TreeMatch(_OfBook):
    """`match` as a module: features of candidates, from behaviours or their leaf sums.

    On each level of the code tree: the mean v of the user's behaviours below the candidate's first l codes, and, in the
    place of the log of their mass, which is -inf without one,

        lse = log(e^0 + sum_i e^bias_i) = log(1 + mass)

    Both are 0 for a candidate of which the history says nothing, finite, of the type of v, and have gradients for v and
    for the biases of behaviours.

    Args:
        book: the codebook of all codes. It travels in the state dict
        sparse_grad: a COO gradient for a table v, which must then be a leaf; as in `Compressor`

    >>> book = Codebook([torch.eye(2), torch.eye(2)])
    >>> codes = torch.tensor([[0, 1], [0, 1], [1, 0]], dtype=torch.int32)
    >>> history = Histories(None, torch.randn(3, 4), torch.tensor([0, 3]), codes)
    >>> out = TreeMatch(book)(history, torch.tensor([[0, 0]], dtype=torch.int32), torch.tensor([0, 1]))
    >>> out.v.shape, out.lse.exp().round()
    (torch.Size([1, 2, 4]), tensor([[3., 1.]]))
    """

    def __init__(self, book: Codebook, *, sparse_grad: bool = False) -> None:
        super().__init__(book)
        self.sparse_grad = sparse_grad

    def forward(
        self, histories: Histories, codes: Tensor, candidate_offsets: Tensor | None, *, ids: Tensor | None = None,
        summed: bool = False,
    ) -> Match:  # fmt: skip
        """histories, with their codes, or x to encode, or with `summed` what `leaf_sums` returned; candidates' codes
        [N, L] int32, or a table of codes with ids [N]; candidate_offsets [B + 1], or None for jagged codes or ids ->
        Match: v [N, L, V] and lse [N, L], log(1 + mass). x is held constant. Raises ValueError where the users' ranges
        leave candidates out (on the CPU)."""
        h, asked = _single(histories), codes if ids is None else ids
        if candidate_offsets is not None:
            _check_all_asked("TreeMatch", torch.as_tensor(candidate_offsets, device=asked.device), asked)
        if not summed:
            h = leaf_sums(self.book, coded(VERBS, "TreeMatch", self.book, h), sparse_grad=self.sparse_grad)
        found, dtype = match(self.book, h, codes, candidate_offsets, ids=ids), _type_of(histories.v)
        return Match(found.v.to(dtype), nn.functional.softplus(found.lse).to(dtype))

    def extra_repr(self) -> str:
        return f"{self.book!r}, sparse_grad={self.sparse_grad}"
