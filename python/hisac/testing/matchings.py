# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies: candidates with codes, and the leaf sums of their users."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import Codebook
from ..reference import bounds
from ..types import Array, Histories, Match, MatchGradients
from .problems import DTYPES, HOSTILE_SCALES, SPECIAL, Shown, codebooks, codes, reference, rounded, sprinkle


@dataclass(frozen=True, eq=False, repr=False)
class Matching(Shown):
    """Candidates on the leaf sums of their users; arrays as in `hisac.match`. `dtype` is the type of the sums' v, whose
    values NumPy holds as float32 when it is bfloat16."""

    book: Codebook
    sums: Histories
    codes: Array
    candidate_offsets: Array
    ids: Array | None
    dtype: str
    seed: int

    @cached_property
    def _reference_book(self) -> Any:
        return reference.Codebook(self.book.centers)

    def match_args(self) -> dict[str, Any]:
        """The arguments of `match`, in NumPy."""
        return {name: a for name, a in vars(self).items() if name not in ("dtype", "seed") and name[0] != "_"}

    def backward_args(self, forward: Match) -> dict[str, Any]:
        """The arguments of `match_backward`, with random gradients of what `match` returned, some of them None."""
        rng = np.random.default_rng(self.seed)
        v, lse = (np.shape(bounds.as_numpy(a)) for a in forward)
        d_v = rounded(rng.normal(size=v), self.dtype) if rng.random() < 0.8 else None
        d_lse = rng.normal(size=lse).astype(np.float32) if rng.random() < 0.8 else None
        return {**self.match_args(), "gradients": Match(d_v, d_lse), "need": MatchGradients._fields}

    def by_reference(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """The same arguments with the reference's own codebook, so that nothing compiled takes part."""
        return {name: self._reference_book if name == "book" else a for name, a in args.items()}

    def reference(self) -> Match:
        """What `match` means here."""
        return reference.match(**self.by_reference(self.match_args()))  # type: ignore[no-any-return]

    def bound(self) -> Match:
        """How far `match` may be from `reference`, cell by cell."""
        return bounds.match_bound(self.by_reference(self.match_args()), self.dtype)


def _sorted(drawn: Array, repeated: bool) -> Array:
    """Codes of one user, ascending; each leaf once, unless `repeated`."""
    order = drawn[np.lexsort(drawn.T[::-1])]
    first = np.ones(len(order), bool)
    first[1:] = (order[1:] != order[:-1]).any(1)
    return order if repeated else order[first]


@st.composite
def matchings(
    draw: st.DrawFn,
    *,
    max_users: int = 4,
    max_sums: int = 40,
    max_candidates: int = 9,
    max_levels: int = 3,
    max_width: int = 8,
    dtypes: Sequence[str] = DTYPES,
    hostile: bool = False,
) -> Matching:
    """Match problems: users without sums or candidates, users who share sums, absent sums, candidates with invalid
    codes or ids, candidates of no user. `hostile` puts NaN, infinities, subnormals and huge values into v and biases;
    sums may then have invalid codes, and a leaf more than once."""
    book = draw(codebooks(max_levels=max_levels))
    seed, dtype, wide = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(dtypes)), draw(st.integers(1, max_width))
    rng, share = np.random.default_rng(seed), draw(st.sampled_from([0.02, 0.2])) if hostile else 0.0
    users, shared = draw(st.integers(0, max_users)), draw(st.booleans())
    parts = [
        _sorted(draw(codes(book, draw(st.integers(0, max_sums)), invalid=hostile)), hostile)
        for _ in range(1 if shared else users)
    ]
    of_sums = np.concatenate([np.zeros((0, book.levels), np.int32), *parts])
    ends = np.cumsum([0, *map(len, parts)], dtype=draw(st.sampled_from([np.int32, np.int64])))
    spans: Any = ends
    if shared:  # every range of sorted rows is sorted
        pair = np.sort(rng.integers(0, len(of_sums) + 1, (2, users)), 0).astype(ends.dtype)
        spans = pair[0].copy(), pair[1].copy()
    size = draw(HOSTILE_SCALES if hostile else st.just(1.0))
    v = rounded(sprinkle(rng, (size * rng.normal(size=(len(of_sums), wide))).astype(np.float32), share), dtype)
    bias = None
    if draw(st.booleans()):
        bias = (draw(st.sampled_from([1.0, 30.0])) * rng.normal(size=len(of_sums))).astype(np.float32)
        bias = sprinkle(rng, sprinkle(rng, bias, 0.1, SPECIAL[:3]), share)
    counts = draw(st.lists(st.integers(0, max_candidates), min_size=users, max_size=users))
    row = np.cumsum([0, *counts], dtype=draw(st.sampled_from([np.int64, np.int32])))
    before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    candidates = int(row[-1]) + before + after
    table = draw(codes(book, candidates))
    near = rng.random(candidates) < 0.5  # of leaves that some user has
    if len(of_sums):
        table[near] = of_sums[rng.integers(0, len(of_sums), int(near.sum()))]
    ids = None
    if draw(st.booleans()):
        ids = rng.integers(0, max(candidates, 1), candidates).astype(rng.choice(["i4", "i8"]))
        ids = sprinkle(rng, ids, 0.1, np.array([-1, candidates, -(2**31), 2**31 - 1]))
    return Matching(
        book=book,
        sums=Histories(None, v, spans, of_sums, bias=bias),
        codes=table,
        candidate_offsets=(row + before).astype(row.dtype),
        ids=ids,
        dtype=dtype,
        seed=seed,
    )
