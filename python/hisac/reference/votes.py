# SPDX-License-Identifier: Apache-2.0
"""The definition of one user's votes, and of the three rules that keep leaves by them."""

from typing import Any

import numpy as np

from ..types import Array
from .codebook import valid_codes

MAX_VOTERS = 2**24 - 1  # a user's later rows do not vote
VOTE_BITS = 40  # the votes of a user are below 2^VOTE_BITS together
WEIGHT_BITS = 24  # the votes of its largest float weight are at most 2^WEIGHT_BITS
MAX_WEIGHT = 2**40 - 1  # votes of a row, as int64

Node = tuple[int, ...]  # a code prefix; a whole code is a leaf
Votes = dict[Node, int]


def row_votes(book: Any, codes: Array, weights: Array = None) -> Array:
    """codes [n, L] of one user -> int64 [n], the votes of each row; 0 for one that does not vote: its code is invalid,
    its weight is NaN or not above 0, or it is past the first 2^24 - 1 rows. Of the n rows that vote, row i has

        no weights:       1
        weights int64:    min(w_i, 2^40 - 1) >> s, with the least s for which sum_i min(w_i, 2^40 - 1) < 2^(40 + s)
        weights float32:  rint(2^k q_i), q_i = w_i / max w rounded to float32, k = min(24, 40 - bits of n); infinity
                          is the largest float32
    """
    here = valid_codes(book, codes) & (np.arange(len(codes)) < MAX_VOTERS)
    votes = here.astype(np.int64)
    if weights is None:
        return votes
    if weights.dtype == np.int64:
        of_rows = np.clip(weights[here], 0, MAX_WEIGHT)
        votes[here] = of_rows >> max(int(of_rows.sum(dtype=np.uint64)).bit_length() - VOTE_BITS, 0)
        return votes
    largest = float(np.finfo(np.float32).max)
    w = np.clip(np.nan_to_num(weights[here].astype(np.float32), nan=0.0, posinf=largest, neginf=0.0), 0, largest)
    bits = min(WEIGHT_BITS, VOTE_BITS - int(np.count_nonzero(w)).bit_length())
    if w.any():
        w = w / w.max() * np.float32(2**bits)
    votes[here] = np.rint(w)
    return votes


def leaf_votes(book: Any, codes: Array, weights: Array = None) -> Votes:
    """codes [n, L] of one user -> {leaf: votes}, for each leaf with a vote."""
    votes: Votes = {}
    for row, n in zip(np.asarray(codes).tolist(), row_votes(book, np.asarray(codes), weights).tolist(), strict=True):
        if n:
            votes[tuple(row)] = votes.get(tuple(row), 0) + n
    return votes


def children(votes: Votes, prefix: Node) -> Votes:
    """{child prefix: votes of all leaves below it} of the node `prefix`."""
    found: Votes = {}
    for leaf, n in votes.items():
        if leaf[: len(prefix)] == prefix:
            child = leaf[: len(prefix) + 1]
            found[child] = found.get(child, 0) + n
    return found


def most_voted(votes: Votes, k: int) -> list[Node]:
    """The k nodes with most votes; ties go to the lower code."""
    return sorted(votes, key=lambda node: (-votes[node], node))[:k]


def by_fanout(votes: Votes, fanout: tuple[int, ...]) -> list[Node]:
    """The paper's rule: of the children of every kept node the k_l with most votes are kept."""
    kept: list[Node] = [()]
    for k in fanout:
        kept = [child for node in kept for child in most_voted(children(votes, node), k)]
    return kept


def by_beam(votes: Votes, beam: tuple[int, ...]) -> list[Node]:
    """Of all children of the kept nodes the k_l with most votes are kept, layer by layer."""
    kept: list[Node] = [()]
    for k in beam:
        kept = most_voted({child: n for node in kept for child, n in children(votes, node).items()}, k)
    return kept


def by_budget(votes: Votes, budget: int, levels: int, prefix: Node = ()) -> list[Node]:
    """Seats in proportion (D'Hondt at every node): a node merges its children's orders; the j-th leaf of child c has
    the key n_c / j; larger key, then larger n_c, then lower code first. (n_c << 24) // j decides like the fraction."""
    if len(prefix) == levels:
        return [prefix]
    ranked = []
    for child, n in children(votes, prefix).items():
        for j, leaf in enumerate(by_budget(votes, budget, levels, child), 1):
            ranked.append((-((n << 24) // j), -n, child, j, leaf))
    return [leaf for *_, leaf in sorted(ranked)[:budget]]
