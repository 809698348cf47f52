# SPDX-License-Identifier: Apache-2.0
"""The verbs in torch: differentiable functions, and the modules of a ranking model.

    Compressor       a module: histories to tokens, under a learned temperature
    TargetAttention  a module: candidates attend to their user's tokens, which may be projected once, as KeysValues
    TokenSet         tokens with their biases, of which TargetAttention joins several
    TreeMatch        a module: what the history says of each candidate, by their codes
    Similarity       a module: how similar candidates are to their user's tokens
    parameter_groups parameters for an optimiser, temperatures and sharpnesses apart
    compress         what Compressor does, as a function: encode, vote and route in one call; returns Compressed
    encode           x to codes, without gradient
    vote             histories to interest-agents, without gradient
    agent_lists      agents to agents with lists, which sparse routing else makes; without gradient
    route            histories and agents to tokens
    attend           candidates' queries, keys and values of tokens to features
    leaf_sums        histories to a row for each leaf of each user
    match            leaf sums and candidates' codes to features
    recent           histories without their most recent behaviours, and these by themselves
    repeat_count     how often a candidate's item is in its user's history
    merge            two results of attend, match or route, of disjoint parts, to that of both
    missing          which behaviours `route` takes for absent, though their v is there; without gradient
    prototypes       codes or agents to what `route` compares x with
    register         makes a codebook known to an exported program, which else raises UnknownCodebookError

Each has its own page, `help(hisac.torch.route)`. The pages of the modules end with what every nn.Module has.

`torch.ops.hisac.*` stand between torch and the core, so that autograd, torch.compile, torch.export, checkpointing and
DDP see ordinary operators. They know a codebook by its fingerprint, a constant of the program. The semantic side
(codebook, x, prototypes) follows neither a module's dtype nor autocast. First derivatives in reverse mode only: double
backward and forward mode raise. All results are deterministic. Letters are the dimensions of `hisac.reference`.
"""

from ..types import Compressed
from .candidates import KeysValues, Similarity, TargetAttention, TokenSet, parameter_groups
from .functions import (
    agent_lists,
    attend,
    compress,
    encode,
    leaf_sums,
    match,
    merge,
    missing,
    prototypes,
    recent,
    repeat_count,
    route,
    vote,
)
from .library import UnknownCodebookError, register
from .modules import Compressor, TreeMatch

__all__ = [
    "Compressed",
    "Compressor",
    "KeysValues",
    "Similarity",
    "TargetAttention",
    "TokenSet",
    "TreeMatch",
    "UnknownCodebookError",
    "agent_lists",
    "attend",
    "compress",
    "encode",
    "leaf_sums",
    "match",
    "merge",
    "missing",
    "parameter_groups",
    "prototypes",
    "recent",
    "register",
    "repeat_count",
    "route",
    "vote",
]
