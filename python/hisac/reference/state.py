# SPDX-License-Identifier: Apache-2.0
"""The definition of a user's state between requests, by the verbs of `hisac.reference`."""

from typing import Any

import numpy as np

from ..types import Array, Histories, Tokens
from .verbs import route, vote


class UserState:
    """One user's history between requests, by its meaning: the rows so far and the agents in force. A state of running
    sums must give these tokens to float32 rounding.

    revote="pinned": the agents stay until `refresh`; "always": every `append` and `forget` votes again. Parts of a
    history with the same agents `merge` (associative; an empty part changes nothing). Codebook and model_tag (the
    version of v) must agree.
    """

    def __init__(
        self, book: Any, *, budget: int | None = None, fanout: Any = None, beam: Any = None, revote: str = "pinned",
        model_tag: int = 0, **route_options: Any,
    ) -> None:  # fmt: skip
        self.book, self.revote, self.model_tag, self.options = book, revote, model_tag, route_options
        self.rule: dict[str, Any] = {"budget": budget, "fanout": fanout, "beam": beam}
        self.rows: Any = None
        self.agents: Any = None

    def append(self, x: Array, v: Array, codes: Array, *, bias: Array = None, weights: Array = None) -> None:
        """Add n behaviours: x [n, D], v [n, V], codes [n, L], bias [n], weights [n]; these are 1 if not given."""
        n = len(v)
        new = (x, v, codes, np.zeros(n) if bias is None else bias, np.ones(n, int) if weights is None else weights)
        old = self.rows or tuple(np.asarray(a)[:0] for a in new)
        self.rows = tuple(np.concatenate([a, b]) for a, b in zip(old, new, strict=True))
        if self.agents is None or self.revote == "always":
            self.refresh()

    def refresh(self) -> None:
        """Vote again over everything."""
        self.agents = vote(self.book, self._histories(), **self.rule)

    def forget(self, rows: Array) -> None:
        """Delete the rows with these indices as if they had never been."""
        self.rows = tuple(np.delete(a, rows, 0) for a in self.rows)
        if self.revote == "always":
            self.refresh()

    def merge(self, other: "UserState") -> None:
        """Add another part of the same user's history, taken under the same agents."""
        for name, mine, theirs in (
            ("codebook", self.book.fingerprint, other.book.fingerprint),
            ("model_tag", self.model_tag, other.model_tag),
        ):
            if mine != theirs:
                raise ValueError(f"merge: {name} differs: expected {mine}, got {theirs}")
        if other.rows is None or len(other.rows[1]) == 0:
            return
        if self.agents is None:
            self.rows, self.agents = other.rows, other.agents
            return
        if not np.array_equal(self.agents.codes, other.agents.codes):
            raise ValueError("merge: the agents differ; expected the same ones")
        self.rows = tuple(np.concatenate([a, b]) for a, b in zip(self.rows, other.rows, strict=True))

    def tokens(self) -> Tokens:
        """The Tokens [1, M, V] of the history so far."""
        p = self.book.prototypes(self.agents)
        return route(self._histories(), p, count=self.agents.count, book=self.book, **self.options)

    def _histories(self) -> Histories:
        x, v, codes, bias, weights = self.rows
        return Histories(x, v, np.array([0, len(v)]), codes, bias=bias, weights=weights)
