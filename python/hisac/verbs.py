# SPDX-License-Identifier: Apache-2.0
"""The verbs over NumPy arrays and torch tensors (without gradients; `hisac.torch` has those).

Arguments, meaning and order are those of `hisac.reference`, which defines each verb; here they run compiled, in float32
accumulation, without a T x M matrix, on `set_num_threads` threads and without the GIL, or on a GPU's current stream.
All arrays of a call lie in one place, and so do the results: NumPy's beside NumPy's codes (vote) or v (the others),
tensors beside tensors. `fit` and `Codebook.leaves` are the CPU's. candidates.py has the verbs of candidates.
Letters: B users, T behaviours, D semantic width, V value width, L levels, M agents a user, N candidates, H heads.
"""

import math
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from . import compose
from .arrays import (
    FLOAT32,
    INT32,
    INT64,
    NUMBERS,
    behaviours_of,
    beside,
    check,
    core,
    empty,
    first_rows,
    give,
    is_cuda,
    is_torch,
    maker,
    number,
    on_host,
    per_level,
    rows_of,
    take,
    take_histories,
    wanted_of,
    whole,
)
from .codebook import Codebook
from .types import (
    Agents,
    Array,
    Compressed,
    Histories,
    LeafGradients,
    Method,
    Missing,
    Normalize,
    Precision,
    RouteGradients,
    Tokens,
)

fit = Codebook.fit


def encode(book: Codebook, x: Array, *, out: Array = None) -> Array:
    """Multi-level semantic IDs: at level l the code c minimising |r - c|^2, then r <- r - c.

    The paper's residual quantiser. Exact: ties go to the lower code, and every backend and the reference agree.

    Args:
        book: the codebook of L levels
        x: [T, D] float32, bfloat16 or float16. A row with a NaN or an infinity gets the code -1 at every level
        out: an int32 array [T, L] to write into

    Returns codes [T, L] int32. Raises ValueError for a wrong shape, TypeError for a wrong type.
    """
    return check(book, Codebook, "encode: book").encode(x, out=out)


def vote(
    book: Codebook, histories: Histories, *, budget: int | None = None, fanout: Iterable[int] | None = None,
    beam: Iterable[int] | None = None,
) -> Agents:  # fmt: skip
    """The interest-agents of each user: the leaves of the code tree kept by their behaviours' votes.

    The paper's hierarchical voting. Exactly one rule. `budget`: seats in proportion to votes at every node (D'Hondt).
    `fanout`: the paper's rule, the k_l children with most votes under every kept node. `beam`: level by level the k_l
    with most votes of all children of the kept nodes; ties go to the lower code. Blind to the order of rows.

    Args:
        book: the codebook of the codes
        histories: read are codes [T, L] (a table with x_ids), x_ids, offsets and weights [T]. A row has one vote, or w
            votes where weights are int64: min(w, 2^40 - 1), halved s times where a user's sum is 2^(40 + s - 1) or
            more. Float weights count relative to the user's largest: rint(2^k q) votes, q = w / max w rounded to
            float32, k = min(24, 40 - bits of the number of rows that vote); infinity is the largest float32. A row with
            an invalid code, an id outside the table, or a weight that is NaN or not above 0 does not vote, nor does one
            past a user's first 2^24 - 1
        budget: M, 1 to 4096
        fanout: (k_1, .., k_L), each at least 1; M is their product, at most 4096
        beam: (k_1, .., k_L), each 1 to 4096; M is k_L. Where the other k_l leave no node with votes out, the agents are
            the M most voted leaves

    Returns Agents, with prototypes. Raises ValueError, TypeError.
    """
    given = (budget is not None) + (fanout is not None) + (beam is not None)
    if given != 1:
        raise ValueError(f"vote: expected exactly one of budget, fanout and beam, got {given}")
    tree = check(book, Codebook, "vote: book")._core
    histories = take_histories("vote", _VOTES, histories)
    fans: tuple[int, ...] = ()
    beams: tuple[int, ...] = ()
    levels = tree.levels
    if beam is not None:
        beams = per_level("vote", "beam", beam, levels, 4096)
        seats = beams[-1]
    elif fanout is not None:
        fans = per_level("vote", "fanout", fanout, levels)
        seats = math.prod(fans)
        if seats > 4096:
            raise ValueError(f"vote: fanout expected a product of 1 to 4096, got {seats}")
    else:
        seats = whole("vote", "budget", budget, 1, 4096)
    spans, new = histories.offsets, maker(histories.codes)
    users = spans[0].shape[0] if isinstance(spans, tuple) else spans.shape[0] - 1
    agents, votes, count = new((users, seats, levels), INT32), new((users, seats), INT64), new((users,), INT32)
    prototypes = new((users, seats, tree.width), FLOAT32)
    core.vote(tree, histories, 0 if budget is None else seats, fans, beams, agents, votes, count, prototypes)
    return Agents(agents, votes, count, tree.fingerprint, prototypes)


def compress(
    book: Codebook, histories: Histories, *, budget: int | None = None, fanout: Iterable[int] | None = None,
    beam: Iterable[int] | None = None, agents: Agents | None = None, temperature: Any = None,
    normalize: Normalize = "agents", method: Method = "exact", refine: int = 0, missing: Missing = "drop",
    sparse: int | None = None, precision: Precision = "float32", mean_x: bool = False,
) -> Compressed:  # fmt: skip
    """Histories -> tokens in one call: `encode`, where there are no codes; `vote`, or agents that are given; `route`.

    Args:
        book: the codebook
        histories: every field is read. With x_ids, codes are needed: encode the table once
        budget, fanout, beam: as in `vote`; one of them, unless there are agents
        agents: those of an earlier vote. Their prototypes are used where they have them
        temperature, normalize, sparse, precision: as in `route`
        method: "exact", or "leaf": `route` takes the `leaf_sums` of the behaviours, which is faster where many of them
            share a leaf
        refine: n rounds of p_a <- mean_x_a first, for agents that received mass. With sparse, lists stay those of the
            prototypes before the first round, and come back with the agents
        mean_x: whether it is wanted beside the tokens
        missing: "drop", or "token": one more token, the last, the mean v and log count of behaviours that are `missing`

    Returns Compressed. Raises ValueError, TypeError.
    """
    check(book, Codebook, "compress: book")
    histories = take_histories("compress", _EVERY, histories)
    refine, v = whole("compress", "refine", refine, 0, 10**6), histories.v
    verbs = VERBS._replace(beside=lambda a: beside(v, a), numbers=sys.modules["torch"] if is_torch(v) else np)
    return compose.compress(
        verbs, book, histories, agents=agents, budget=budget, fanout=fanout, beam=beam, temperature=temperature,
        normalize=normalize, method=method, refine=refine, missing=missing, sparse=sparse, precision=precision,
        mean_x=mean_x,
    )  # fmt: skip


def agent_lists(book: Codebook, agents: Agents, k: int) -> Agents:
    """The agents with their lists for sparse routing, to be kept with them: for each codeword of level 1 the k present
    agents that are nearest to it, by the square distance of the codeword and the prototype.

    Exact: ties go to the earlier agent, and every backend and the reference agree. Lists depend on agents alone, not on
    behaviours or temperatures; `route` makes those that it needs where there are none.

    Args:
        book: the codebook of the agents, whose C_1 codewords of level 1 are meant
        agents: those of `vote`; the prototypes are used where they have them
        k: >= 1

    Returns Agents with lists [B, C_1, min(k, M)] int32, nearest first, -1 past the present agents. Raises ValueError,
    TypeError.
    """
    verb, tree = "agent_lists", check(book, Codebook, "agent_lists: book")._core
    to = compose.routed(VERBS, verb, check(agents, Agents, f"{verb}: agents"), None, book)
    prototypes, count = take(verb, "prototypes B M D, count?", *to[:2])
    users, m, _ = prototypes.shape
    lists = empty(prototypes, (users, book.sizes[0], min(whole(verb, "k", k, 1, 2**31 - 1), m)), INT32)
    core.agent_lists(tree, prototypes, count, lists)
    return agents._replace(prototypes=prototypes, lists=lists)


def leaf_sums(book: Codebook, histories: Histories) -> Histories:
    """The behaviours of each user as one row a leaf, sorted by code. Of those that are present, with w_i = e^bias_i,

        W = sum w_i     x = sum w_i x_i / W     v = sum w_i v_i / W     bias = log W
        spread = sum w_i (spread_i + |x_i - x|^2) / W

    and weights, int64: the votes of all that vote. A leaf that has votes and no present behaviour has a bias of -inf,
    and zeros for x, v and spread.

    In `route` and in `vote` the sums stand for the behaviours, and they may be kept between requests. In `missing` they
    do not: sums do not keep the v of absent behaviours. Sums add up: those of kept sums and new behaviours, as the rows
    of one user, are the sums of all. Votes do where the weights of both are int64 or none, and the user has fewer than
    2^40 votes.

    Args:
        book: the codebook of the codes
        histories: read are codes, weights, and what `route` reads

    Returns Histories with x, v, offsets, codes, bias, spread and weights, float32 but for integers. Raises ValueError,
    TypeError.
    """
    sums = _sum_leaves(book, histories, apart=False)
    used = int(sums.offsets[-1])
    return Histories(*(a if a is None or a is sums.offsets else first_rows(a, used) for a in sums[:-2]))


def leaf_sums_backward(
    book: Codebook,
    histories: Histories,
    sums: Histories,
    gradients: Histories,
    *,
    need: Iterable[str] = ("v", "bias"),
    v_rows: Array = None,
) -> LeafGradients:
    """Gradients of `leaf_sums`. With the share s_i = exp(bias_i - bias) of a behaviour in the sum of its leaf:

        dv_i = s_i dv
        dbias_i = s_i (dv . (v_i - v) + dx . (x_i - x) + dbias + dspread (spread_i + |x_i - x|^2 - spread))

    Args:
        book, histories: those of the call of `leaf_sums`. x is held constant
        sums, gradients: what it returned, and the gradients of its x, v, bias and spread; each of these may be None
        need: the gradients wanted, of "v" and "bias"
        v_rows: with v_ids, as in `route_backward`

    Returns LeafGradients, float32, None where not wanted; with v_ids v's is the table's. Raises ValueError, TypeError.
    """
    verb, wanted = "leaf_sums_backward", wanted_of("leaf_sums_backward", need, LeafGradients)
    check(book, Codebook, f"{verb}: book")
    histories = take_histories(verb, _CODED_ROWS, histories)
    sums = take_histories(verb, _SUMS, sums)
    gradients = take_histories(verb, _OF_SUMS, gradients)
    (v_rows,), v = take(verb, "v_rows? U", v_rows), histories.v
    shapes = {"v": (rows_of(v, v_rows), v.shape[1]), "bias": (behaviours_of(histories),)}
    out = LeafGradients(*(empty(v, shapes[f], FLOAT32) if f in wanted else None for f in LeafGradients._fields))
    core.leaf_sums_backward(book._core, histories, sums, gradients, v_rows, *out)
    return out


def missing(histories: Histories, *, book: Codebook | None = None) -> Array:
    """Which behaviours of the histories are missing: absent for `route`, though they have a v without NaN and infinity.

    As the x [T, 1] of another `route`, to one prototype of 0, the result gives the mean v and the log count of the
    missing: that is the token of `compress(missing="token")`.

    Args:
        histories: read is what `route` reads
        book: needed where x is None; codes are read where it is given

    Returns [T] float32: 0 for a behaviour that is missing, -inf for any other. Raises ValueError, TypeError.
    """
    tree, histories = _rows("missing", book, histories)
    found = empty(histories.v, (behaviours_of(histories),), FLOAT32)
    core.missing(tree, histories, found)
    return found


def route(
    histories: Histories, agents: Agents | Array, *, count: Array = None, temperature: Any = None,
    normalize: Normalize = "agents", book: Codebook | None = None, sparse: int | None = None,
    precision: Precision = "float32", tokens: bool = True, mean_x: bool = False, out: Tokens | None = None,
) -> Tokens:  # fmt: skip
    """Soft-routing attention: each agent aggregates its user's whole history by semantic similarity.

    The paper's reading is normalize="history"; "agents", the default, shares each behaviour out among the agents.

        d_ai = |x_i - p_a|^2 + spread_i
        normalize="history": u_ai = exp(bias_i - d_ai / tau)
        normalize="agents":  u_ai = exp(bias_i) softmax over present a of (-d_ai / tau)
        token_a = sum_i u_ai v_i / sum_i u_ai     mean_x_a = sum_i u_ai x_i / sum_i u_ai     lse_a = log sum_i u_ai

    A behaviour is absent with an invalid code, a NaN in x or |x|^2 of 2^100 and more, a NaN or infinite bias, a spread
    that is NaN, infinite or negative, or an id outside the table of x or v. An agent is absent past its user's count,
    where tau is not positive, and with a NaN in p or |p|^2 of 2^100 and more. Both take part in no sum: an absent
    agent in no softmax. A NaN or an infinity in v makes no behaviour absent; it makes that column of the tokens to
    which the behaviour is routed NaN or infinite. Rows gathered by ids give the bits of rows that are copied out.

    With `sparse` = k behaviour i is routed to few agents alone, by c, its code of level 1: those whose own code of
    level 1 is c, and the k present agents nearest to the codeword of c (`agent_lists`). For any other agent u_ai is 0,
    and the softmax over agents is over these. Only users whom that saves work are routed so, all others to all agents:
    where m > k and n (m - k) > g (m + 48 k). n are the user's rows, absent ones too; g the different codes of level 1
    among them that are in range; m the agents below the count with |p|^2 < 2^100, whatever their temperature. CUDA has
    the same results without the saving.

    Args:
        histories: every field but weights is read; codes only where `book` is given. Both are needed where x is None. v
            may be None without tokens
        agents: those of `vote`, RouteAgents, or bare prototypes [B, M, D] float32; for sparse routing these are given
            the codes that `encode` gives prototypes. Lists that agents have are used as they are, the first k of each:
            an entry that is no present agent is passed over
        count: [B] int32, with bare prototypes: how many are present; None: M each
        temperature: tau, a number > 0, or float32 [1] or [M]; an entry that is not positive empties its tokens. None:
            the default of the codebook, an error where it has none or is not given
        normalize: "history" or "agents"
        book: the codebook of the codes
        sparse: k >= 1, with book and codes; None: every behaviour is routed to every agent
        precision: "float32", or "bfloat16": x, prototypes, weights and v may be rounded to bfloat16 where the processor
            multiplies that faster (AVX512-BF16 on AMD, AMX, CUDA), and not elsewhere; sums stay float32.
            `hisac.reference.bounds` has the error of both
        tokens, mean_x: whether these are wanted
        out: Tokens to write into

    Returns Tokens. Raises ValueError, TypeError.
    """
    tree, histories = _rows("route", book, histories, tokens)
    prototypes, count, codes, lists, tau, k = _agents("route", book, agents, count, temperature, sparse)
    v, (users, m, width) = histories.v, prototypes.shape
    like = prototypes if v is None else v
    given = _NO_TOKENS if out is None else check(out, Tokens, "route: out")
    made = Tokens(
        give("route", "out tokens", given.tokens, v, (users, m, v.shape[1])) if tokens else None,
        give("route", "out lse", given.lse, like, (users, m), FLOAT32),
        give("route", "out mean_x", given.mean_x, like, (users, m, width), FLOAT32) if mean_x else None,
    )
    core.route(tree, histories, prototypes, count, codes, lists, tau, normalize, k, precision, *made)
    return made


def route_backward(
    histories: Histories,
    agents: Agents | Array,
    forward: Tokens,
    gradients: Tokens,
    *,
    count: Array = None,
    temperature: Any = None,
    normalize: Normalize = "agents",
    book: Codebook | None = None,
    sparse: int | None = None,
    precision: Precision = "float32",
    need: Iterable[str] = ("v", "bias", "temperature"),
    x_rows: Array = None,
    v_rows: Array = None,
) -> RouteGradients:
    """Gradients of `route`. Weights are recomputed, and nothing of size T x M is kept.

        w_ai = exp(z_ai - lse_a)     dz_ai = w_ai (dtoken_a . (v_i - token_a) + dmean_x_a . (x_i - mean_x_a) + dlse_a)

    Args:
        histories, agents, count, temperature, normalize, book, sparse: those of the call of `route`
        forward, gradients: what it returned, and the gradients of that, as Tokens; each field of these may be None
        precision: as in the forward: x and prototypes are rounded alike. Products with gradients are float32 on the
            CPU, and rounded too on CUDA
        need: the gradients wanted, of "x", "v", "bias", "spread", "prototypes", "temperature"
        x_rows, v_rows: with ids, [U] int32 or int64: the rows of the table that are wanted, 0 outside it; None: all

    Returns RouteGradients, float32, None where not wanted. With ids those of x and v are the tables', [items, D] and
    [rows, V], or of the rows listed, [U, ..]: sums over the behaviours of all histories, in their order and in float64.
    That of int8 is its scaled rows'. mean_x's does not reach x. Raises ValueError, TypeError, NotImplementedError.
    """
    verb, wanted = "route_backward", wanted_of("route_backward", need, RouteGradients)
    check(forward, Tokens, f"{verb}: forward")
    check(gradients, Tokens, f"{verb}: gradients")
    back = take(verb, "tokens?, lse, mean_x?, d_tokens?, d_lse?, d_mean_x?", *forward, *gradients)
    tree, histories = _rows(verb, book, histories, False)
    prototypes, *to, tau, k = _agents(verb, book, agents, count, temperature, sparse)
    if x_rows is not None or v_rows is not None:
        x_rows, v_rows = take(verb, "x_rows? U, v_rows? U", x_rows, v_rows)
    size, (x, v) = behaviours_of(histories), histories[:2]
    shapes = (
        (rows_of(x, x_rows), prototypes.shape[2]),
        (rows_of(v, v_rows), 0 if v is None else v.shape[1]),
        *((size,), (size,), tuple(prototypes.shape)),
        (1 if isinstance(tau, float) else math.prod(tau.shape),),
    )
    new, each = maker(prototypes if v is None else v), zip(RouteGradients._fields, shapes, strict=True)
    out = RouteGradients(*[new(shape, FLOAT32) if name in wanted else None for name, shape in each])
    core.route_backward(tree, histories, prototypes, *to, tau, normalize, k, precision, *back, x_rows, v_rows, *out)
    return out


_NO_TOKENS = Tokens(None, None, None)


def _agents(
    verb: str, book: Codebook | None, agents: Any, count: Array, temperature: Any, sparse: int | None
) -> tuple[Any, ...]:
    """Prototypes, count, codes and lists of the agents, and the temperature, borrowed; k of sparse routing, or 0."""
    if sparse is None:
        if isinstance(agents, tuple):
            agents, count, *_ = compose.routed(VERBS, verb, agents, count, book)
        k, codes, lists = 0, None, None
        prototypes, count = take(verb, "prototypes B M D, count?", agents, count)
    else:
        k = whole(verb, "sparse", sparse, 1, 2**31 - 1)
        to = compose.routed(VERBS, verb, agents, count, book, sparse)
        prototypes, count, codes, lists = take(verb, _AGENTS, *to)
    if temperature is None:
        temperature = compose.temperature_of(verb, None, book)
    if not isinstance(temperature, NUMBERS):
        (temperature,) = take(verb, "temperature", temperature)
    elif is_cuda(prototypes):  # kernels read it where the data is
        if not 0 < temperature < math.inf:
            raise ValueError(f"{verb}: temperature expected finite and > 0, got {temperature}")
        temperature = number(float(temperature), prototypes)
    else:
        temperature = float(temperature)
    return prototypes, count, codes, lists, temperature, k


_AGENTS = "prototypes B M D, count?, agents.codes?, agents.lists?"
_VOTES = "-, -, offsets B+1, codes T L, x_ids?, -, -, -, -, weights?"
_CODED_ROWS = "x? T D, v T V, offsets B+1, codes T L, x_ids?, v_ids?, x_scale?, bias?, spread?, -"
_ROWS = _CODED_ROWS.replace("codes T L", "-")
_WEIGHTED = _CODED_ROWS[:-1] + "weights?"
_EVERY = _WEIGHTED.replace("codes", "codes?")
_SUMS = "sums.x S D, sums.v S V, offsets B+1, sums.codes S L, -, -, -, sums.bias, sums.spread, -"
_OF_SUMS = "gradients.x? S D, gradients.v? S V, -, -, -, -, -, gradients.bias?, gradients.spread?, -"
_WITHOUT_V = {True: _CODED_ROWS.replace("v T V", "v? T V"), False: _ROWS.replace("v T V", "v? T V")}


def _rows(verb: str, book: Codebook | None, histories: Histories, values: bool = True) -> tuple[Any, Histories]:
    """The codebook and the histories that are routed, as the core takes them; values: v is needed."""
    tree = None if book is None else check(book, Codebook, f"{verb}: book")._core
    names = _WITHOUT_V[tree is not None] if not values else _ROWS if tree is None else _CODED_ROWS
    return tree, take_histories(verb, names, histories)


def _sum_leaves(book: Codebook, histories: Histories, *, apart: bool = True) -> Histories:
    """Leaf sums in arrays with a row for each row of the histories. apart: where the user's rows are, offsets are
    (starts, ends); else those of all users together."""
    check(book, Codebook, "leaf_sums: book")
    histories = take_histories("leaf_sums", _WEIGHTED, histories)
    x, v, spans = histories[:3]
    starts, ends = map(on_host, spans) if isinstance(spans, tuple) else (on_host(spans)[:-1], on_host(spans)[1:])
    ordered = starts.shape == ends.shape and starts.dtype.kind == "i"  # the core checks the offsets
    size = int((ends - starts).clip(0, behaviours_of(histories)).sum(dtype=np.int64)) if ordered else 0
    histories = histories if histories.rows is not None else histories._replace(rows=size)
    new = maker(v)
    width = book.width if x is None else x.shape[1]
    sum_x, sum_v = new((size, width), FLOAT32), new((size, v.shape[1]), FLOAT32)
    first = new((len(starts) + (not apart),), INT64)
    last = new((len(starts),), INT64) if apart else None
    codes, votes = new((size, book.levels), INT32), new((size,), INT64)
    bias, spread = new((size,), FLOAT32), new((size,), FLOAT32)
    core.leaf_sums(book._core, histories, sum_x, sum_v, first, last, codes, bias, spread, votes)
    spans = first if last is None else (first, last)
    return Histories(sum_x, sum_v, spans, codes, bias=bias, spread=spread, weights=votes)


def _as_type(a: Array, like: Array) -> Array:
    return a.to(like.dtype) if is_torch(a) else a.astype(like.dtype, copy=False)


def _log_share(lse: Array, votes: Array) -> Array:
    """That of `compress`, by the core."""
    out = empty(lse, tuple(lse.shape), FLOAT32)
    core.log_share(lse, votes, out)
    return out


VERBS = compose.Verbs(
    encode, vote, Codebook.prototypes, agent_lists, _sum_leaves, missing, route, np, _as_type, log_share=_log_share
)
