# SPDX-License-Identifier: Apache-2.0
"""hisac compresses a user's history of 10,000 behaviours and more to a few hundred tokens (HiSAC, arXiv 2602.21009).

    item embeddings --fit--> codebook
    x --encode--> codes --vote--> agents --route--> tokens --attend--> candidates' features

`hisac.torch` has the same verbs with gradients, and modules; `hisac.reference` defines each verb in NumPy;
`hisac.testing` has Hypothesis strategies for tests of your own. `python -m hisac demo` shows it all on real data.
"""

import os
import warnings

from ._core import VERSION as __version__
from ._core import CorruptFileError
from .codebook import Codebook
from .types import Agents, Attended, AttendGradients, FitReport, LeafSums, RouteGradients, Tokens
from .verbs import (
    attend,
    attend_backward,
    backends,
    encode,
    fit,
    get_num_threads,
    leaf_sums,
    route,
    route_backward,
    set_num_threads,
    vote,
)

CorruptFileError.__module__ = "hisac"
__all__ = [
    "Agents",
    "AttendGradients",
    "Attended",
    "Codebook",
    "CorruptFileError",
    "FitReport",
    "LeafSums",
    "RouteGradients",
    "Tokens",
    "__version__",
    "attend",
    "attend_backward",
    "backends",
    "encode",
    "fit",
    "get_num_threads",
    "leaf_sums",
    "route",
    "route_backward",
    "set_num_threads",
    "vote",
]


def _default_threads() -> int:
    for name in ("HISAC_NUM_THREADS", "OMP_NUM_THREADS"):
        if os.environ.get(name, "").isdecimal() and int(os.environ[name]) > 0:
            return min(int(os.environ[name]), 256)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, 256)


set_num_threads(_default_threads())
if os.environ.get("HISAC_ISA", backends()["cpu"]) != backends()["cpu"]:
    warnings.warn(
        f"HISAC_ISA={os.environ['HISAC_ISA']} is not to be had here (there is {', '.join(backends()['available'])});"
        f" using {backends()['cpu']}",
        RuntimeWarning,
        stacklevel=2,
    )
