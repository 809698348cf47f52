# SPDX-License-Identifier: Apache-2.0
"""The modules that have a codebook: histories to tokens, and what a history says of each candidate."""

from collections.abc import Sequence
from typing import Any, cast

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
    Recent,
    RouteAgents,
    Tokens,
)
from .functions import VERBS, compress, leaf_sums, match, tau_tensor
from .library import register

# of a saved torch.export program
for _type in (Histories, Agents, RouteAgents, Tokens, Attended, Compressed, Match, Recent):
    torch.utils._pytree._register_namedtuple(_type, serialized_type_name=f"hisac.{_type.__name__}")
cast(Any, torch.serialization).add_safe_globals([Histories, Agents])  # example inputs are loaded by weights_only


def single(a: Any) -> Any:
    """A tensor of float64 as float32, in which every verb computes, also as x and v of histories; any other as it
    is."""
    if isinstance(a, Histories):
        return a._replace(x=single(a.x), v=single(a.v))
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


def check_all_asked(module: str, offsets: Tensor, candidates: Tensor) -> None:
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
            self.book, single(histories), budget=self.budget, fanout=self.fanout, beam=self.beam,
            temperature=self.log_tau.float().exp(), normalize=self.normalize, method=self.method, refine=self.refine,
            missing=self.missing, sparse=self.sparse, precision=self.precision, mean_x=self.mean_x,
            sparse_grad=self.sparse_grad,
        )  # fmt: skip
        lse, share = (t.to(self.log_tau.dtype) for t in (nn.functional.softplus(made.lse), made.log_share))
        return made._replace(tokens=made.tokens.to(_type_of(histories.v)), lse=lse, log_share=share)

    def extra_repr(self) -> str:
        names = "budget", "fanout", "beam", "normalize", "method", "refine", "missing", "sparse", "precision", "mean_x"
        return ", ".join([repr(self.book), *(f"{name}={getattr(self, name)!r}" for name in names)])


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
        h, asked = single(histories), codes if ids is None else ids
        if candidate_offsets is not None:
            check_all_asked("TreeMatch", torch.as_tensor(candidate_offsets, device=asked.device), asked)
        if not summed:
            h = leaf_sums(self.book, coded(VERBS, "TreeMatch", self.book, h), sparse_grad=self.sparse_grad)
        found, dtype = match(self.book, h, codes, candidate_offsets, ids=ids), _type_of(histories.v)
        return Match(found.v.to(dtype), nn.functional.softplus(found.lse).to(dtype))

    def extra_repr(self) -> str:
        return f"{self.book!r}, sparse_grad={self.sparse_grad}"
