# SPDX-License-Identifier: Apache-2.0
"""What the verbs take and return: named tuples of arrays, the same for every backend and for the reference.

Arrays live where the inputs live (NumPy or torch). Letters are dimensions: B users, T behaviours, D semantic width,
V value width, L levels, M agents a user, N candidates, H heads.
"""

import difflib
import itertools
import operator
import sys
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

Array = Any  # numpy.ndarray, torch.Tensor, or anything with DLPack
Normalize = Literal["history", "agents"]
Method = Literal["exact", "leaf"]
Missing = Literal["drop", "token"]
Precision = Literal["float32", "bfloat16"]


_tuple = tuple.__new__  # 0.1 us faster than by way of the named tuple's own


class _Fields(NamedTuple):
    x: Array = None
    v: Array = None
    offsets: Any = None
    codes: Array = None
    x_ids: Array = None
    v_ids: Array = None
    x_scale: Any = None
    bias: Array = None
    spread: Array = None
    weights: Array = None
    longest: int | None = None
    rows: int | None = None


class Histories(_Fields):
    """A batch of histories: the T behaviours of B users in one table. Each verb names the fields that it reads. The
    sizes of all fields that are given must agree.

        x        [T, D], or a table [items, D] with x_ids: semantic embeddings, float32, bfloat16, float16 or int8;
                 None: the prototypes of codes
        v        [T, V], or a table [rows, V] with v_ids: what tokens are means of, float32, bfloat16 or float16
        offsets  [B + 1], the last end too: user b has the rows offsets[b] .. offsets[b + 1]; or (starts [B], ends [B]),
                 which may overlap; int32 or int64, or lists of integers. Rows outside all ranges are nobody's. In
                 `hisac.torch` None where a field is a jagged tensor
        codes    [T, L] int32, or a table [items, L] with x_ids: semantic IDs; `route` reads them only where its book is
                 given
        x_ids    [T] int32 or int64: x and codes are tables of items, with the same rows, and behaviour i has row
                 x_ids[i]. Encode the table once. One whose id is outside (-1 for padding) is absent in every verb
        v_ids    [T] int32 or int64: v is a table, and behaviour i has row v_ids[i]. One whose id is outside votes, but
                 is not routed
        x_scale  a number, or float32 [1] or [rows of x], with x of int8: the embeddings are x_scale times x, in float32
        bias     [T] float32: the logarithm of a behaviour's weight in routing, a time decay for instance
        spread   [T] float32: added to a behaviour's squared distances; `leaf_sums` makes it
        weights  [T] of voting: float32, relative to the user's largest, or int64, votes; `leaf_sums` makes these
        longest  no user has more behaviours; None: on the CPU they are counted, on CUDA T is taken
        rows     all users have no more behaviours together; None: counted on the CPU, which on CUDA waits for the GPU
                 where offsets are (starts, ends). State it for CUDA and in traced programs

    In `hisac.torch` x and v may be an `nn.Embedding`, which stands for its weight. A behaviour whose id is its
    padding_idx has the id -1 then, in x_ids and in v_ids. Beside a bare weight, give -1 in place of padding_idx:
    `ids.masked_fill(ids == padding_idx, -1)`.

    Ids that are padded, [B, T] with a mask, become `x_ids = ids[mask]` with `lengths = mask.sum(1)`; or, of one shape,
    `x_ids = ids.flatten()` with -1 for padding and offsets 0, T, 2 T, ..

    Ids outside the table are no error, so ids of another table look like users without behaviours: look at the count of
    the agents once.

    `lengths` [B], in place of offsets: how many rows each user has, from the first row on. Raises ValueError where both
    are given or a length is negative, TypeError where lengths are no whole numbers, or a field has another name.

    >>> import numpy as np
    >>> x, v = np.zeros((3, 2), np.float32), np.zeros((3, 4), np.float32)
    >>> Histories(x, v, lengths=[1, 2]).offsets
    array([0, 1, 3])
    """

    __slots__ = ()

    def __new__(
        cls, x: Array = None, v: Array = None, offsets: Any = None, codes: Array = None, x_ids: Array = None,
        v_ids: Array = None, x_scale: Any = None, bias: Array = None, spread: Array = None, weights: Array = None,
        longest: int | None = None, rows: int | None = None, *, lengths: Any = None, **unknown: NoReturn,
    ) -> "Histories":  # fmt: skip
        if unknown:
            raise TypeError(_no_field(*unknown))
        if lengths is not None:
            if offsets is not None:
                raise ValueError("Histories: expected either offsets or lengths, got both")
            offsets = _offsets_of(lengths, codes if v is None else v)
        return _tuple(cls, (x, v, offsets, codes, x_ids, v_ids, x_scale, bias, spread, weights, longest, rows))


def _no_field(name: str, *_: str) -> str:
    names = (*_Fields._fields, "lengths")
    near = difflib.get_close_matches(name, names, cutoff=0.5)
    return f"Histories: expected one of the fields {', '.join(near or names)}, got {name}"


def _offsets_of(lengths: Any, beside: Any) -> Any:
    """lengths [B] -> offsets [B + 1]; in torch where lengths or `beside` are tensors, in the latter's place."""
    torch = sys.modules.get("torch")
    found: Any
    if torch is not None and isinstance(lengths, torch.Tensor):
        if lengths.ndim != 1 or lengths.dtype not in (torch.int32, torch.int64):
            kind = f"{str(lengths.dtype).replace('torch.', '')} {list(lengths.shape)}"
            raise TypeError(f"Histories: lengths expected whole numbers [B], got {kind}")
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    if isinstance(lengths, np.ndarray) and lengths.ndim == 1 and lengths.dtype.kind in "iu":
        least, found = lengths.min(initial=0), np.append(0, lengths.cumsum(dtype=np.int64))
    else:
        try:
            whole = [operator.index(n) for n in lengths]
        except TypeError:
            raise TypeError(f"Histories: lengths expected whole numbers [B], got {lengths!r:.60}") from None
        least, found = min(whole, default=0), [0, *itertools.accumulate(whole)]
    if least < 0:
        raise ValueError(f"Histories: lengths expected 0 or more, got {least}")
    if torch is not None and isinstance(beside, torch.Tensor):
        return torch.as_tensor(found, device=beside.device)
    return np.asarray(found, np.int64)


class Agents(NamedTuple):
    """The interest-agents of B users: the leaves their behaviours voted for (paper, hierarchical voting).

    Present agents come first, sorted by votes (down) and then code (up); absent ones are code -1 and 0 votes.

        codes        [B, M, L] int32: the agent's leaf, one code a level.
        votes        [B, M] int64: votes of that leaf.
        count        [B] int32: how many of the M are present.
        fingerprint  64 bits that name the codebook; an agent means nothing in another one.
        prototypes   [B, M, D] float32: what `route` compares x with, zero for absent agents. None where they were not
                     kept: they follow from the codes and the codebook.
        lists        [B, C_1, K] int32: those of `agent_lists`, for sparse routing. None where they were not kept: they
                     follow from the codebook and the prototypes, those before any round of `refine`.
    """

    codes: Array
    votes: Array
    count: Array
    fingerprint: int
    prototypes: Array = None
    lists: Array = None


class RouteAgents(NamedTuple):
    """What `route` reads of the agents of B users.

    prototypes  [B, M, D] float32.
    count       [B] int32: how many of the M are present; None: all.
    codes       [B, M, L] int32, of sparse routing alone, which reads those of level 1.
    lists       [B, C_1, K] int32, K >= min(k, M), of sparse routing alone; None: they are made.
    """

    prototypes: Array
    count: Array = None
    codes: Array = None
    lists: Array = None


class Tokens(NamedTuple):
    """A compressed history (paper, soft-routing attention).

    tokens  [B, M, V], v's type; None where they are not wanted.
    lse     [B, M] float32: log of the mass an agent received; -inf where it received none.
    mean_x  [B, M, D] float32: the mean of x, weighted as the tokens are; None where it is not wanted.
    """

    tokens: Array
    lse: Array
    mean_x: Array = None


class Compressed(NamedTuple):
    """What `compress` makes of a batch of histories.

    log_share is the bias of `attend` in either mode: the log of the share of its user's history that a token stands
    for. Of the tokens that received mass, exp(lse) > 0,

        normalize="agents":  share_a = exp(lse_a) / sum_a exp(lse_a)
        normalize="history": share_a = votes_a / sum_a votes_a, for the masses of a user's agents overlap there

    Agents that were given without votes have 1 each; those with 0 votes or fewer have no share in history mode. The
    extra token of `missing="token"` counts in the first sum as the others do. In history mode it has the same share,

        exp(lse) / (exp(lse) + w)     w = sum e^bias_i over routed behaviours; 0 where no agent has a share

    and the agents have theirs times w / (exp(lse) + w).

        tokens     [B, M, V], v's type; [B, M + 1, V] with `missing="token"`.
        lse        [B, M] or [B, M + 1] float32: log of the mass a token received; -inf where it received none. That of
                   `hisac.torch.Compressor`, a module, is log(1 + mass), 0 where there is none.
        log_share  [B, M] or [B, M + 1] float32: its exp sums to 1 over a user's tokens with a share; -inf for any other
                   token.
        agents     The interest-agents; their prototypes are those in use, after `refine` rounds.
        mean_x     [B, M, D] or [B, M + 1, D] float32: the mean of x, weighted as the tokens are: tokens in the space of
                   the embeddings. Zero for the extra token. None where it is not wanted.
    """

    tokens: Array
    lse: Array
    log_share: Array
    agents: Agents
    mean_x: Array = None


class Recent(NamedTuple):
    """Histories without their most recent behaviours, and these by themselves; see `hisac.recent`.

    Fields:
        older        The histories, but for the most recent behaviours of each user: their offsets are (starts, ends).
        rows         [B, n] int64: which of the T behaviours are recent, the latest last; 0 after them where a user has
                     fewer.
        x_ids        [B, n]: those of these behaviours, or None; 0 after them. So every one may be looked up.
        v_ids        [B, n]: likewise.
        log_share    [B, n] float32: the log of the share of its user's history that a recent behaviour is; -inf after
                     them.
        older_share  [B] float32: the log of the share that the older ones are; -inf where there are none. Add it to the
                     log_share of their tokens: then all biases of a user are logs of numbers that sum to 1.
    """

    older: Histories
    rows: Array
    x_ids: Array
    v_ids: Array
    log_share: Array
    older_share: Array


class StateRecent(NamedTuple):
    """The recent rows of a user's state, the oldest first, and what they are of the whole.

    Fields:
        ids          [R] int64: of the rows, in the tables of items.
        times        [R] int64: when they were.
        log_share    [R] float32: the log of a row's share in the mass of the ring and the table together.
        table_share  The log of the table's share; -inf where it is empty. Add it to the log_share of its tokens: then
                     all biases of `attend` are logs of numbers that sum to 1.
    """

    ids: Array
    times: Array
    log_share: Array
    table_share: float


class StateStats(NamedTuple):
    """What a user's state has come to.

    Fields:
        leaves          Different leaves in the table.
        ring            Rows in the ring.
        seen            Rows that were appended, ever.
        votes           Of the table.
        absent_share    Of the rows that are not in the ring, the share that had no valid weight, or, when they left it,
                        no valid item or code.
        dropped_leaves  Leaves that a full table, or `expire`, has dropped.
        dropped_votes   The votes of these, as they were then.
        outside         The share of votes at leaves that are no agent's; 0 without agents.
        churn           The share of agents that are none of the agents before; 0 without these.
    """

    leaves: int
    ring: int
    seen: int
    votes: int
    absent_share: float
    dropped_leaves: int
    dropped_votes: int
    outside: float
    churn: float


class Attended(NamedTuple):
    """Target attention over the tokens.

    out  [N, H, V], q's type.
    lse  [N, H] float32: log-sum-exp of the logits, that is how well the best tokens match; -inf without tokens.
    """

    out: Array
    lse: Array


class Match(NamedTuple):
    """What the leaf sums of a user say of its candidates, on each level of the code tree.

    v    [N, L, V], the type of the sums' v: the mean v of the sums below a candidate's first l codes; 0 without one.
    lse  [N, L] float32: the log of their mass; -inf without one. That of `hisac.torch.TreeMatch`, a module, is
         log(1 + mass), 0 without one.
    """

    v: Array
    lse: Array


class RouteGradients(NamedTuple):
    """Gradients of `route`, float32; None where not asked for.

    x            [T, D], or the table's with x_ids.
    v            [T, V], or the table's with v_ids.
    bias         [T].
    spread       [T].
    prototypes   [B, M, D].
    temperature  [1] or [M], as the temperature.
    """

    x: Array
    v: Array
    bias: Array
    spread: Array
    prototypes: Array
    temperature: Array


class LeafGradients(NamedTuple):
    """Gradients of `leaf_sums`, float32; None where not asked for.

    v     [T, V], or the table's with v_ids.
    bias  [T].
    """

    v: Array
    bias: Array


class AttendGradients(NamedTuple):
    """Gradients of `attend`, float32.

    q       [N, H, d].
    keys    [B, M, H, d].
    values  [B, M, H, V].
    bias    [B, M]; None where no bias was given.
    """

    q: Array
    keys: Array
    values: Array
    bias: Array


class MatchGradients(NamedTuple):
    """Gradients of `match` for its sums, float32; None where not asked for.

    v     [S, V].
    bias  [S].
    """

    v: Array
    bias: Array


class FitReport(NamedTuple):
    """What `fit` saw.

    rows        Rows that took part.
    left_out    Rows with a NaN, with values too large to be summed beside the others, or with a weight too small (see
                `Codebook.fit`), which did not.
    iterations  Rounds a level until nothing moved, or the most allowed.
    error       Mean squared distance of a row to its quantisation after each level.
    unused      Codes of each level that no row has.
    """

    rows: int
    left_out: int
    iterations: tuple[int, ...]
    error: tuple[float, ...]
    unused: tuple[int, ...]


class Moved(NamedTuple):
    """What `fit(init=book)` moved.

    codes  Centers of each level that are not those of `init`.
    items  Rows whose code, or one of a level above it, is another one, after each level.
    rows   Rows with codes.
    """

    codes: tuple[int, ...]
    items: tuple[int, ...]
    rows: int


class LevelHealth(NamedTuple):
    """One level in `Health`: its codes, those that a row has, exp of the entropy of their use, the largest share of
    rows that one has, and the mean squared distance after it."""

    size: int
    used: int
    effective: float
    most: float
    error: float


class Health(NamedTuple):
    """What `hisac.health` sees.

    rows, absent     Rows with codes, and without: those with a NaN or an infinity.
    variance         Mean squared distance of the rows to their mean.
    levels           Of each level.
    leaves           Leaves that a row has.
    rows_a_leaf      Mean, median and most rows of these.
    shared           The share of the rows that are not alone in their leaf: collisions.
    distinct         Rows of different values, told apart by 64 bits; and
    shared_distinct  the share of these that are not alone in their leaf.
    warnings         What is wrong, and what to do about it.
    """

    rows: int
    absent: int
    variance: float
    levels: tuple[LevelHealth, ...]
    leaves: int
    rows_a_leaf: tuple[float, float, int]
    shared: float
    distinct: int
    shared_distinct: float
    warnings: tuple[str, ...]


class Drift(NamedTuple):
    """What `hisac.drift` sees.

    items     New rows with codes.
    error     Their mean squared distance after each level.
    expected  What it would be for items of the kind of the fit's.
    ratio     Of both, at the last level whose expectation is finite and above 0; 0 where there is none.
    low       The lower end of its 95 % interval; -infinity where no two items differ in their error.
    due       Whether a refit is.
    """

    items: int
    error: tuple[float, ...]
    expected: tuple[float, ...]
    ratio: float
    low: float
    due: bool


class Migration(NamedTuple):
    """What `hisac.migrate` finds.

    items        Rows with codes of both books.
    codes        int32 [C_l] of each level: the new code of an old one; -1 where there is none to name.
    leaves       int32 [U, L] the old leaves that have items, in order.
    to           int32 [U, L'] the new leaf of each, -1 where there is none to name.
    moved_items  The share of items whose code, or one of a level above it, has another number, after each level.
    moved_votes  The same of votes.
    lost_items   The share of items in leaves that are not mapped.
    lost_votes   The same of votes.
    """

    items: int
    codes: tuple[Array, ...]
    leaves: Array
    to: Array
    moved_items: tuple[float, ...]
    moved_votes: tuple[float, ...]
    lost_items: float
    lost_votes: float

    def apply(self, codes: Array) -> Array:
        """Old codes [..., L] -> new codes [..., L'] int32, all -1 for a leaf that is not mapped, or has no item."""
        flat = np.asarray(codes, np.int32).reshape(-1, self.leaves.shape[1])
        _, at = np.unique(np.concatenate([self.leaves, flat]), axis=0, return_inverse=True)
        place = np.full((int(at.max(initial=-1)) + 1, self.to.shape[1]), -1, np.int32)
        place[at.reshape(-1)[: len(self.leaves)]] = self.to
        return place[at.reshape(-1)[len(self.leaves) :]].reshape(*np.shape(codes)[:-1], self.to.shape[1])
