# SPDX-License-Identifier: Apache-2.0
"""What the works share: the temperature, the bounds that results are checked by, peers as variants, torch's arrays."""

from collections.abc import Callable
from typing import Any

import peers
from harness import Variant

Array = Any
TAU = 0.1

FLOAT32 = 2e-5  # |out - truth|_F / |truth|_F that counts as float32-grade
BFLOAT16 = 2.0**-9 + FLOAT32  # hisac rounds its output to bfloat16 and nothing before
PEER_BFLOAT16 = 5e-2  # the peers round logits and weights too
NEAR_TIE = 1e-9  # squared distance: float64's rounding, with room
PEER_CODES = 1e-3  # share of rows where float32 distances pick a near-tie's other code
INERTIA = 1e-2


def by_role(
    found: list[peers.Peer], check: Callable[[Any, int], float], bound: float, flops: float | None = None
) -> list[Variant]:
    """Peers as variants."""
    return [Variant(name, make, check, bound, role, needs, flops=flops) for name, role, needs, make in found]


def as_bf16(*arrays: Array) -> tuple[Array, ...]:
    """NumPy -> torch, rounded to bfloat16."""
    torch = peers.package("torch")
    return tuple(torch.as_tensor(a).bfloat16() for a in arrays)


def as_torch(*arrays: Array) -> tuple[Array, ...]:
    """NumPy (or None) -> torch."""
    torch = peers.package("torch")
    return tuple(None if a is None else torch.as_tensor(a) for a in arrays)


def has_torch() -> bool:
    """Whether bfloat16 arrays can be made at all."""
    return peers.installed()["torch"] is not None
