# SPDX-License-Identifier: Apache-2.0
"""The verbs in torch: differentiable functions, and the modules of a ranking model.

`torch.ops.hisac.*` stand between torch and the core, so that autograd, torch.compile, torch.export, checkpointing and
DDP see ordinary operators. They know a codebook by its fingerprint, a constant of the program. The semantic side
(codebook, x, prototypes) follows neither a module's dtype nor autocast. First derivatives in reverse mode only: double
backward and forward mode raise. All results are deterministic. Letters are the dimensions of `hisac.reference`.
"""

from ..types import Compressed
from .functions import attend, compress, encode, leaf_sums, log_share, missing, prototypes, route, vote
from .library import UnknownCodebookError, register
from .modules import Compressor, KeysValues, TargetAttention

__all__ = [
    "Compressed",
    "Compressor",
    "KeysValues",
    "TargetAttention",
    "UnknownCodebookError",
    "attend",
    "compress",
    "encode",
    "leaf_sums",
    "log_share",
    "missing",
    "prototypes",
    "register",
    "route",
    "vote",
]
