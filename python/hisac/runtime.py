# SPDX-License-Identifier: Apache-2.0
"""Where the verbs run: threads and backends."""

from typing import Any

from .arrays import core, cuda_missing, whole


def set_num_threads(n: int) -> None:
    """Threads that the verbs use, 1 to 256. Results do not depend on it."""
    core.set_num_threads(whole("threads", "n", n, 1, 256))


def get_num_threads() -> int:
    """Threads that the verbs use. By default HISAC_NUM_THREADS or OMP_NUM_THREADS, the first number of a list, else the
    processors that affinity and the container's quota allow; at most 256."""
    return int(core.get_num_threads())


def backends() -> dict[str, Any]:
    """What this build can run on: the CPU's instruction sets, and the one in use (HISAC_ISA forces one); under "cuda"
    True, or why there is none."""
    isas = tuple(core.available_isas().split())
    return {"cpu": core.active_isa(), "available": isas, "cuda": cuda_missing() or True}
