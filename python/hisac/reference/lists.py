# SPDX-License-Identifier: Apache-2.0
"""Sparse routing: the agents that a behaviour is routed to, by its code of level 1."""

from typing import Any

import numpy as np

from ..types import Agents, Array, RouteAgents
from .codebook import distances

ABSENT_NORM = 2.0**100  # a row whose |x|^2 is not below is absent


def present_agents(prototypes: Array, count: Any) -> Array:
    """[M, D] float32 of one user -> [M] bool: below the count, without NaN, and |p|^2, summed in index order in
    float64, below 2^100."""
    with np.errstate(over="ignore", invalid="ignore"):
        small = distances(prototypes, np.zeros((1, prototypes.shape[1]), np.float32))[:, 0] < ABSENT_NORM
    return small & (np.arange(len(prototypes)) < (len(prototypes) if count is None else int(count)))


def agent_lists(book: Any, agents: Agents, k: int) -> Agents:
    """The same agents with lists [B, C_1, K] int32, K = min(k, M): for each codeword of level 1 the K present agents
    nearest to it, by `distances` of the codeword and the prototype; nearest first, of equals the earlier agent; -1 in
    what is left where fewer are present. They do not depend on behaviours nor on a temperature."""
    prototypes = book.prototypes(agents) if agents.prototypes is None else np.asarray(agents.prototypes)
    users, m, _ = prototypes.shape
    lists = np.full((users, book.sizes[0], min(k, m)), -1, np.int32)
    for b in range(users):
        lists[b] = user_lists(book, prototypes[b], agents.count[b], lists.shape[2])
    return agents._replace(lists=lists)


def user_lists(book: Any, prototypes: Array, count: Any, k: int) -> Array:
    """Those of one user [C_1, k]."""
    here = np.flatnonzero(present_agents(prototypes, count))
    near = distances(book.centers[0], prototypes[here]).argsort(1, kind="stable")[:, :k]
    return np.pad(here[near], ((0, 0), (0, max(k - len(here), 0))), constant_values=-1)


def is_sparse(rows: int, groups: int, present: int, sparse: int) -> bool:
    """Whether a user of so many behaviours, of so many valid codes of level 1, and so many present agents is routed
    sparsely. Where lists would cost more than they save, every behaviour is routed to every agent."""
    return present > sparse and rows * (present - sparse) > groups * (present + 48 * sparse)


def listed(book: Any, codes: Array, to: RouteAgents, b: int, sparse: int) -> Array:
    """codes [n, L] of the behaviours of user b -> [n, M] bool: whether a behaviour is routed to an agent. Its code of
    level 1 is c. It is routed to the agents whose own code of level 1 is c, and to the first `sparse` agents in the
    list of c; of a user for whom is_sparse says no, to all, and lists are not read."""
    p = np.asarray(to.prototypes[b])
    m, count = len(p), None if to.count is None else to.count[b]
    first = np.asarray(codes)[:, 0].astype(np.int64)
    inside = (first >= 0) & (first < book.sizes[0])  # a behaviour with an invalid code is absent
    if not is_sparse(len(codes), len(np.unique(first[inside])), int(present_agents(p, count).sum()), sparse):
        return np.ones((len(codes), m), bool)
    first = np.where(inside, first, 0)
    lists = user_lists(book, p, count, sparse) if to.lists is None else np.asarray(to.lists[b])[:, :sparse]
    near = (lists[first][:, :, None] == np.arange(m)).any(1)
    return inside[:, None] & (near | (first[:, None] == np.asarray(to.codes[b])[:, 0]))
