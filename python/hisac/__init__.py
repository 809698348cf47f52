# SPDX-License-Identifier: Apache-2.0
"""hisac compresses a user's history of 10,000 behaviours and more to a few hundred tokens (HiSAC, arXiv 2602.21009).

    item embeddings --fit--> codebook
    x --encode--> codes --vote--> agents --route--> tokens --attend--> candidates' features
                  codes, v --leaf_sums--> leaf sums --match--> candidates' features

`compress` is the way from histories to tokens in one call.

`hisac.torch` has the same verbs with gradients, and modules; `hisac.reference` defines each verb in NumPy;
`hisac.testing` has Hypothesis strategies for tests of your own; `hisac.bulk` compresses histories by the million, on
Ray Data, Spark or by itself. `python -m hisac demo` shows it all on a sample.
"""

import math
import os
import warnings

from . import _core
from ._core import VERSION as __version__
from ._core import CorruptFileError
from .candidates import attend, attend_backward, match, match_backward, merge, recent, repeat_count
from .codebook import Codebook
from .life import Bundle, drift, health, migrate, sizes_for
from .runtime import backends, get_num_threads, set_num_threads
from .state import UserState
from .types import (
    Agents,
    Attended,
    AttendGradients,
    Compressed,
    Drift,
    FitReport,
    Health,
    Histories,
    LeafGradients,
    LevelHealth,
    Match,
    MatchGradients,
    Migration,
    Moved,
    Recent,
    RouteAgents,
    RouteGradients,
    StateRecent,
    StateStats,
    Tokens,
)
from .verbs import (
    agent_lists,
    compress,
    encode,
    fit,
    leaf_sums,
    leaf_sums_backward,
    missing,
    route,
    route_backward,
    vote,
)

CorruptFileError.__module__ = "hisac"
__all__ = [
    "Agents",
    "AttendGradients",
    "Attended",
    "Bundle",
    "Codebook",
    "Compressed",
    "CorruptFileError",
    "Drift",
    "FitReport",
    "Health",
    "Histories",
    "LeafGradients",
    "LevelHealth",
    "Match",
    "MatchGradients",
    "Migration",
    "Moved",
    "Recent",
    "RouteAgents",
    "RouteGradients",
    "StateRecent",
    "StateStats",
    "Tokens",
    "UserState",
    "__version__",
    "agent_lists",
    "attend",
    "attend_backward",
    "backends",
    "compress",
    "drift",
    "encode",
    "fit",
    "get_num_threads",
    "health",
    "leaf_sums",
    "leaf_sums_backward",
    "match",
    "match_backward",
    "merge",
    "migrate",
    "missing",
    "recent",
    "repeat_count",
    "route",
    "route_backward",
    "set_num_threads",
    "sizes_for",
    "vote",
]


def _quota(root: str = "/") -> float:
    """Processors that the control groups of this process allow, of versions 1 and 2; infinite without a quota."""

    def text(path: str) -> str:
        try:
            with open(root + path, errors="surrogateescape") as file:
                return file.read()
        except OSError:
            return ""

    least = math.inf
    for line in text("proc/self/cgroup").splitlines():
        kinds, _, group = line.partition(":")[2].partition(":")
        if kinds and "cpu" not in kinds.split(","):
            continue
        folder = "sys/fs/cgroup/cpu" if kinds else "sys/fs/cgroup"
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if kinds else ("cpu.max",)
        while True:  # the group and those that hold it; of a path from outside the container only the last is seen
            quota, _, period = " ".join(text(f"{folder}{group}/{name}") for name in names).partition(" ")
            if quota.strip().isdecimal() and period.strip().isdecimal():  # neither "max" nor -1
                least = min(least, int(quota) / max(int(period), 1))
            if group in ("", "/"):
                break
            group = os.path.dirname(group)
    return least


def _warn(name: str, expected: str, used: str) -> None:
    got = f"{os.environ[name][:20]!r}"
    warnings.warn(f"{name} expected {expected}, got {got}; using {used}", RuntimeWarning, stacklevel=3)


def _default_threads() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, refused = max(math.ceil(min(available, _quota(), 256)), 1), []
    for name in ("HISAC_NUM_THREADS", "OMP_NUM_THREADS"):
        first = os.environ.get(name, "").partition(",")[0].strip()
        number = int(first.lstrip("0")[:4] or 0) if first.isdecimal() else 0
        if os.environ.get(name) and not 1 <= number <= 256:
            refused.append(name)
        if number:
            threads = min(number, 256)
            break
    for name in refused:
        _warn(name, "1 to 256", f"{threads} threads")
    return threads


set_num_threads(_default_threads())
if os.environ.get("HISAC_ISA", "") not in ("", _core.active_isa()):
    _warn("HISAC_ISA", f"one of {_core.available_isas()}", _core.active_isa())
