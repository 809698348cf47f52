# SPDX-License-Identifier: Apache-2.0
"""The modules of candidates: attention to their user's tokens, and how similar these are."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..arrays import NUMBERS, dtype_name
from ..types import Attended, Compressed
from .functions import attend, merge
from .modules import Compressor, check_all_asked, single


class KeysValues(NamedTuple):
    """Tokens projected once for all candidates of a request: keys [B, M, H, d] or [R, H, d], values with V for d."""

    keys: Tensor
    values: Tensor


class TokenSet(NamedTuple):
    """One of several sets of tokens that a TargetAttention joins.

    Fields:
        tokens   [B, M, W], or KeysValues of it. With offsets [R, W]: users' tokens one after another.
        bias     [B, M], with offsets [R], or None: 0. A token whose bias is -inf is absent.
        offsets  [B + 1]: user b has the tokens offsets[b] .. [b + 1]. None: M each.
        longest  The most tokens of a user, with offsets; saves work on a GPU.
    """

    tokens: Tensor | KeysValues
    bias: Tensor | None = None
    offsets: Tensor | None = None
    longest: int | None = None


for _type in (KeysValues, TokenSet):  # of a saved torch.export program
    torch.utils._pytree._register_namedtuple(_type, serialized_type_name=f"hisac.{_type.__name__}")


def _sets(module: str, tokens: Any, bias: Tensor | None, kinds: tuple[type, ...], width: int) -> list[TokenSet]:
    """Tokens, or a list of them, as sets, each of a kind that the module takes and of its width."""
    several = isinstance(tokens, list) or type(tokens) is tuple
    if bias is not None and (several or isinstance(tokens, TokenSet)):
        raise TypeError(f"{module}: bias expected in the TokenSet, got it beside")
    if several and not tokens:
        raise ValueError(f"{module}: tokens expected one set or more, got {tokens}")
    sets = [one if isinstance(one, TokenSet) else TokenSet(one, bias) for one in (tokens if several else [tokens])]
    for one in sets:
        if not isinstance(one.tokens, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            why = "; give its tokens" if isinstance(one.tokens, Compressed) else ""
            raise TypeError(f"{module}: tokens expected {expected}, got {type(one.tokens).__name__}{why}")
        if isinstance(one.tokens, Tensor):
            shape, letters = list(one.tokens.shape), "[B, M, W]" if one.offsets is None else "[R, W] beside offsets"
            if len(shape) != 3 - (one.offsets is not None) or shape[-1] != width or one.tokens.is_nested:
                got = "a nested tensor" if one.tokens.is_nested else shape
                raise ValueError(f"{module}: tokens expected {letters} with W = {width}, got {got}")
        if isinstance(one.bias, Tensor) and not one.bias.is_floating_point():
            raise TypeError(f"{module}: bias expected floating-point numbers, as log_share, got {dtype_name(one.bias)}")
    return sets


def _asked(module: str, candidate_offsets: Any, candidates: Tensor) -> Tensor:
    if candidate_offsets is None or isinstance(candidate_offsets, tuple):
        got = type(candidate_offsets).__name__
        raise TypeError(f"{module}: candidate_offsets expected a tensor or a list [B + 1], got {got}")
    offsets = torch.as_tensor(candidate_offsets, device=candidates.device)
    check_all_asked(module, offsets, candidates)
    return offsets


def _present(given: TokenSet) -> TokenSet:
    """With zeros for tokens whose bias says that there is none: what lies there, a NaN even, reaches no gradient."""
    if given.bias is None or not isinstance(given.tokens, Tensor) or given.bias.shape != given.tokens.shape[:-1]:
        return given  # `attend` refuses the last
    return given._replace(tokens=given.tokens.masked_fill(~torch.isfinite(given.bias)[..., None], 0.0))


class TargetAttention(nn.Module):
    """Multi-head attention of candidates on their user's tokens, with the log-sum-exp of the logits as a feature.

        z_m = s q . k_m / sqrt(d) + f bias_m        out = softmax(z) values        lse = log sum_m exp z_m

    Softmax hides how similar the best match is: give the scoring net `lse` beside `out`. It is that of `attend`, but 0
    in place of -inf for a candidate without tokens:

        lse = log sum_m exp z_m     without tokens: log(1 e^0) = 0

    That is as if the candidate's user had one token, of key and value 0, whose share is 1. `out` is 0 there, and so is
    every gradient. Both come in the module's type; `out` under autocast in autocast's. Candidates and tokens may have
    another type; float64 is computed in float32.

    Several sets of tokens are joined in one softmax: of users with as many tokens each, and of users who differ.

    Args:
        candidate_width, token_width: C and W
        heads, head_width, value_width: H, d and V; without value_width d
        bias: whether the projections of candidates and tokens have biases
        learn_factor: whether f is a parameter, of all heads: how much a token's share counts; else 1
        learn_scale: whether log s is a parameter of each head; else s is 1. `parameter_groups` has both learn faster

    >>> attention = TargetAttention(6, 3, heads=2, head_width=4)
    >>> cached = attention.keys_values(torch.randn(1, 5, 3))
    >>> out, lse = attention(torch.randn(7, 6), cached, torch.tensor([0, 7]))
    >>> out.shape, lse.shape
    (torch.Size([7, 8]), torch.Size([7, 2]))
    >>> agents, raw = torch.randn(1, 5, 3), TokenSet(torch.randn(2, 3), offsets=torch.tensor([0, 2]))
    >>> attention(torch.randn(7, 6), [agents, raw], torch.tensor([0, 7]))[0].shape
    torch.Size([7, 8])
    """

    def __init__(
        self, candidate_width: int, token_width: int, *, heads: int = 4, head_width: int = 16,
        value_width: int | None = None, bias: bool = True, learn_factor: bool = False, learn_scale: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(candidate_width, heads * head_width, bias=bias)
        self.key = nn.Linear(token_width, heads * head_width, bias=bias)
        self.value = nn.Linear(token_width, heads * (value_width or head_width), bias=bias)
        self.factor = nn.Parameter(torch.ones(())) if learn_factor else None
        self.log_scale = nn.Parameter(torch.zeros(heads)) if learn_scale else None

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """tokens [.., W] -> KeysValues, to be passed to `forward` in place of the tokens."""
        tokens = tokens.to(self.key.weight.dtype)
        keys, values = (f(tokens).unflatten(-1, (self.heads, -1)) for f in (self.key, self.value))
        return KeysValues(keys, values)

    def forward(
        self, candidates: Tensor, tokens: Tensor | KeysValues | TokenSet | list[Any], candidate_offsets: Tensor, *,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """candidates [N, C]; tokens [B, M, W], KeysValues, a TokenSet, or a list of such, which are joined;
        candidate_offsets [B + 1]; bias [B, M] of tokens that are no TokenSet, as log_share of a Compressor, but not its
        lse (-inf: no such token; without bias an absent token is one of zeros) -> out [N, H V], lse [N, H]. Raises
        ValueError where the users' ranges leave candidates out (on the CPU)."""
        sets = _sets("TargetAttention", tokens, bias, (Tensor, KeysValues), self.key.in_features)
        offsets = _asked("TargetAttention", candidate_offsets, candidates)
        q = self.query(candidates.to(self.query.weight.dtype)).unflatten(-1, (self.heads, -1))
        if self.log_scale is not None:
            q = q * self.log_scale.exp()[:, None].to(q.dtype)
        found = [self._attend(single(q), one, offsets) for one in sets]
        out, lse = functools.reduce(merge, found)
        lse = lse.masked_fill(lse == -torch.inf, 0.0).to(self.query.weight.dtype)
        return out.flatten(1).to(q.dtype), lse

    def _attend(self, q: Tensor, given: TokenSet, candidate_offsets: Tensor) -> Attended:
        given = _present(given)
        keys, values = given.tokens if isinstance(given.tokens, KeysValues) else self.keys_values(given.tokens)
        widths = [[self.heads, layer.out_features // self.heads] for layer in (self.key, self.value)]
        if (got := [list(a.shape[-2:]) for a in (keys, values)]) != widths:
            raise ValueError(f"TargetAttention: keys and values expected [H, d], [H, V] = {widths}, got {got}")
        bias = given.bias
        if bias is not None and self.factor is not None:  # 0 inf is NaN, and so would be the factor's gradient
            absent = ~torch.isfinite(bias)
            bias = (self.factor.float() * bias.float().masked_fill(absent, 0.0)).masked_fill(absent, -torch.inf)
        return attend(q, keys, values, candidate_offsets, bias=bias, token_offsets=given.offsets, longest=given.longest)


class Similarity(nn.Module):
    """How similar a candidate is to its user's tokens: log-sum-exp of sharp cosines, for each of several sharpnesses s.

        out = log sum_m exp(bias_m + s (cos(candidate, token_m) - 1))       without tokens: -2 s, the least there can be

    Several sets of tokens are joined in one sum. With log_share as the bias it is between -2 s and 0: near 0 where all
    of the history is like the candidate, about log_share of the only token that is. Softmax attention does not tell
    this. Give it a scoring network in the space of the embeddings (candidates' x, tokens' mean_x) and in that of the
    values, by a module for each.

    Args:
        sharpness: the first s, one a feature; they are learned. `parameter_groups` gives them a rate of their own

    >>> out = Similarity((5.0, 20.0))(torch.eye(3), torch.eye(3)[None], torch.tensor([0, 3]))
    >>> out.shape, (out < 0.02).all().item()
    (torch.Size([3, 2]), True)
    """

    def __init__(self, sharpness: float | Sequence[float] = (5.0, 20.0)) -> None:
        super().__init__()
        given = [float(s) for s in ([sharpness] if isinstance(sharpness, NUMBERS) else sharpness)]
        if not given or not all(0 < s < math.inf for s in given):
            raise ValueError(f"Similarity: sharpness expected finite numbers > 0, got {sharpness!r}")
        self.log_sharpness = nn.Parameter(torch.tensor(given).log())

    def forward(
        self, candidates: Tensor, tokens: Tensor | TokenSet | list[Any], candidate_offsets: Tensor, *,
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """candidates [N, W]; tokens [B, M, W], a TokenSet without KeysValues, or a list of such, which are joined;
        candidate_offsets [B + 1]; bias [B, M] of tokens that are no TokenSet, as log_share of a Compressor (-inf: no
        such token) -> [N, number of sharpnesses], in the module's type. A vector of zeros has a cosine of 0 with every
        other. Raises ValueError where the users' ranges leave candidates out (on the CPU)."""
        offsets = _asked("Similarity", candidate_offsets, candidates)
        s = self.log_sharpness.float().exp()
        q = nn.functional.normalize(candidates.float(), dim=-1)[:, None] * s[:, None]
        sets = _sets("Similarity", tokens, bias, (Tensor,), candidates.shape[-1])
        lse = functools.reduce(merge, [self._attend(q, one, offsets) for one in sets]).lse
        return torch.where(lse > -torch.inf, lse - s, -2 * s).to(self.log_sharpness.dtype)

    def _attend(self, q: Tensor, given: TokenSet, candidate_offsets: Tensor) -> Attended:
        keys = nn.functional.normalize(cast(Tensor, _present(given).tokens).float(), dim=-1)[..., None, :]
        keys = keys.expand(*keys.shape[:-2], q.shape[1], -1)
        return attend(
            q, keys, keys.new_zeros((*keys.shape[:-1], 1)), candidate_offsets, bias=given.bias, scale=1.0,
            token_offsets=given.offsets, longest=given.longest,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{len(self.log_sharpness)} sharpnesses"


def parameter_groups(model: nn.Module, lr: float, *, weight_decay: float = 0.0, faster: float = 10.0) -> list[Any]:
    """Groups for an optimiser of torch.optim. Scales learn `faster` times as fast, without decay: the log temperatures
    of Compressors, the log sharpnesses of Similarities, the factors and log scales of TargetAttentions. All other
    parameters learn at lr, with weight_decay. On the rate of the weights a temperature hardly moves from where it
    begins. Raises TypeError for what is no module.

    >>> model = nn.ModuleList([nn.Linear(2, 2), Similarity()])
    >>> [(group["lr"], len(group["params"])) for group in parameter_groups(model, 0.01)]
    [(0.01, 2), (0.1, 1)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parameter_groups: model expected nn.Module, got {type(model).__name__}")
    of_scale = {
        id(p)
        for m in model.modules()
        if isinstance(m, Compressor | Similarity | TargetAttention)
        for p in m.parameters(recurse=False)  # their weights are those of modules inside
    }
    every = [p for p in model.parameters() if p.requires_grad]
    slow, quick = [p for p in every if id(p) not in of_scale], [p for p in every if id(p) in of_scale]
    groups = [
        {"params": slow, "lr": lr, "weight_decay": weight_decay},
        {"params": quick, "lr": faster * lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
