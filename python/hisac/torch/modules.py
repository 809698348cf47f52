# SPDX-License-Identifier: Apache-2.0
"""The modules of a ranking model: histories to tokens, candidates that attend to them."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import Codebook
from ..compose import temperature_of
from ..types import Agents, Attended, Compressed, Histories, Method, Missing, Normalize, Precision, Tokens
from .functions import attend, compress, tau_tensor
from .library import register


class KeysValues(NamedTuple):
    """The tokens of a request, projected once for all its candidates: keys [B, M, H, d], values [B, M, H, V]."""

    keys: Tensor
    values: Tensor


for _type in (Histories, Agents, Tokens, Attended, KeysValues, Compressed):  # of a saved torch.export program
    torch.utils._pytree._register_namedtuple(_type, serialized_type_name=f"hisac.{_type.__name__}")
cast(Any, torch.serialization).add_safe_globals([Histories, Agents])  # example inputs are loaded by weights_only


class Compressor(nn.Module):
    """`compress` as a module, under a learned temperature (log tau, [1]).

    Args:
        book: the codebook
        budget, fanout, beam: the rule of `hisac.vote`, one of them
        temperature: the first tau; None: the default of the codebook
        learn_temperature: whether log tau is a parameter. Give it no weight decay
        normalize, precision: as in `hisac.route`
        method, refine, missing: as in `hisac.compress`
        sparse_grad: COO gradients for tables of x and v, not in torch.compile; v must then be a leaf, such as the
            weight of an `nn.Embedding(sparse=True)`

    The codebook is no parameter: it stays float32 under `half()`, `bfloat16()`, `double()` and autocast, so codes stay
    the same integers. It travels in the state dict; one of other sizes is refused. Raises ValueError.

    >>> compress = Compressor(Codebook([torch.eye(2)], temperature=0.1), budget=2)
    >>> out = compress(Histories(torch.eye(2), torch.randn(2, 3), torch.tensor([0, 2])))
    >>> out.tokens.shape, out.agents.count.tolist()
    (torch.Size([1, 2, 3]), [2])
    """

    def __init__(
        self, book: Codebook, *, budget: int | None = None, fanout: Sequence[int] | None = None,
        beam: Sequence[int] | None = None, temperature: float | None = None, learn_temperature: bool = True,
        normalize: Normalize = "agents", method: Method = "exact", refine: int = 0, missing: Missing = "drop",
        precision: Precision = "float32", sparse_grad: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.book, self.budget, self.fanout, self.beam = book, budget, fanout, beam
        self.normalize, self.method, self.refine, self.missing = normalize, method, refine, missing
        self.precision, self.sparse_grad = precision, sparse_grad
        self.log_tau = nn.Parameter(
            tau_tensor(temperature_of("Compressor", temperature, book)).log(), learn_temperature
        )
        rows = torch.empty(0, book.width, dtype=torch.float32)
        self(Histories(rows, rows, torch.zeros(1, dtype=torch.int64)))  # checks every option

    def forward(self, histories: Histories) -> Compressed:
        """Histories -> Compressed, as `compress`."""
        return compress(
            self.book, histories, budget=self.budget, fanout=self.fanout, beam=self.beam,
            temperature=self.log_tau.float().exp(), normalize=self.normalize, method=self.method, refine=self.refine,
            missing=self.missing, precision=self.precision, sparse_grad=self.sparse_grad,
        )  # fmt: skip

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
        names = "budget", "fanout", "beam", "normalize", "method", "refine", "missing", "precision"
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
