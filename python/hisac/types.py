# SPDX-License-Identifier: Apache-2.0
"""What the verbs return: plain named tuples of arrays, the same for every backend and for the reference.

Arrays live where the inputs live (NumPy or torch). Letters are dimensions: B users, T behaviours, D semantic width,
V value width, L levels, M agents a user, N candidates, H heads.
"""

from typing import Any, NamedTuple

Array = Any  # numpy.ndarray, torch.Tensor, or anything with DLPack


class Agents(NamedTuple):
    """The interest-agents of B users: the leaves their behaviours voted for (paper, hierarchical voting).

    Present agents come first, sorted by votes (down) and then code (up); absent ones are code -1 and 0 votes.
    """

    codes: Array
    """[B, M, L] int32: the agent's leaf, one code a level."""
    votes: Array
    """[B, M] int64: votes of that leaf; with weights in units of 2^-12."""
    count: Array
    """[B] int32: how many of the M are present."""
    fingerprint: int
    """64 bits that name the codebook; an agent means nothing in another one."""


class Tokens(NamedTuple):
    """A compressed history (paper, soft-routing attention)."""

    tokens: Array
    """[B, M, V], v's type; [B, M + 1, V] with `missing="token"`."""
    lse: Array
    """[B, M] float32: log of the mass an agent received; -inf where it received none."""
    prototypes: Array
    """[B, M, D] float32: the prototypes in use, after `refine` rounds."""


class Attended(NamedTuple):
    """Target attention over the tokens."""

    out: Array
    """[N, H, V], q's type."""
    lse: Array
    """[N, H] float32: log-sum-exp of the logits, that is how well the best tokens match; -inf without tokens."""


class LeafSums(NamedTuple):
    """A user's behaviours summed by leaf: rows for `route` that may be kept between requests."""

    x: Array
    """[G, D] float32: mean x of a leaf's behaviours, weighted by e^bias."""
    v: Array
    """[G, V] float32: mean v."""
    offsets: Array
    """[B + 1] int64: user b's leaves are the rows offsets[b] .. offsets[b + 1], sorted by code."""
    bias: Array
    """[G] float32: log of the sum of e^bias."""
    spread: Array
    """[G] float32: mean square distance of x from its mean."""
    codes: Array
    """[G, L] int32: the leaf."""


class RouteGradients(NamedTuple):
    """Gradients of `route`; None where not asked for."""

    v: Array
    """[T, V] float32."""
    temperature: Array
    """[1] or [M] float32, as the temperature."""
    bias: Array
    """[T] float32."""
    x: Array
    """[T, D] float32."""
    prototypes: Array
    """[B, M, D] float32."""


class AttendGradients(NamedTuple):
    """Gradients of `attend`, float32."""

    q: Array
    """[N, H, d]."""
    keys: Array
    """[B, M, H, d]."""
    values: Array
    """[B, M, H, V]."""
    bias: Array
    """[B, M]; None where no bias was given."""


class FitReport(NamedTuple):
    """What `fit` saw."""

    rows: int
    """Rows that took part."""
    left_out: int
    """Rows with a NaN, or with values too large to be summed beside the others (see `Codebook.fit`), which did not."""
    iterations: tuple[int, ...]
    """Rounds a level until nothing moved, or the most allowed."""
    error: tuple[float, ...]
    """Mean squared distance of a row to its quantisation after each level."""
    unused: tuple[int, ...]
    """Codes of each level that no row has."""
