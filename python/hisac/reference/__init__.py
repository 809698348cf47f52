# SPDX-License-Identifier: Apache-2.0
"""The definition of every hisac operation: NumPy, float64, written to be read.

Whatever a kernel does, it must agree with this page: codes, votes and agents exactly, floats within a bound derived
from sizes and rounding. Arrays follow one naming: B users, T behaviours, D semantic width, V value width, L levels,
M agents a user, N candidates, H heads. Values never raise: invalid codes mean absent, NaN loses, an empty sum is a zero
token with lse -inf. codebook.py has `Codebook`, `encode` and `fit`; votes.py one user's votes and the rules that keep
leaves by them; lists.py which agents a behaviour is routed to in sparse routing; tree_match.py `match`, `merge`,
`recent` and `repeat_count`; verbs.py the other verbs; tables.py what ids mean; state.py what is kept between requests;
bounds.py how far a float32 kernel may be from all this, by the rules of rounding.py.

Source: HiSAC, arXiv 2602.21009. Semantic IDs and the code tree: its hierarchical codebook; `vote`: hierarchical
voting (`fanout`), our apportionment (`budget`) and a beam search (`beam`); `route`: soft-routing attention; `attend`:
target attention; `match`, the leaf sums below a candidate's codes, and `merge` are ours.
"""

from .codebook import FIT_LIMIT, Codebook, encode, first_distinct, fit, priorities, valid_codes
from .lists import agent_lists
from .state import UserState
from .tree_match import match, match_backward, merge, recent, repeat_count
from .verbs import (
    MAX_SEATS,
    attend,
    attend_backward,
    compress,
    each_history,
    leaf_sums,
    leaf_sums_backward,
    logsumexp,
    missing,
    ranges,
    route,
    route_backward,
    vote,
)

__all__ = [
    "FIT_LIMIT",
    "MAX_SEATS",
    "Codebook",
    "UserState",
    "agent_lists",
    "attend",
    "attend_backward",
    "compress",
    "each_history",
    "encode",
    "first_distinct",
    "fit",
    "leaf_sums",
    "leaf_sums_backward",
    "logsumexp",
    "match",
    "match_backward",
    "merge",
    "missing",
    "priorities",
    "ranges",
    "recent",
    "repeat_count",
    "route",
    "route_backward",
    "valid_codes",
    "vote",
]
