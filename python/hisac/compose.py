# SPDX-License-Identifier: Apache-2.0
"""What is composed of verbs: the way from histories to tokens, once for NumPy, torch and the definition."""

import functools
import operator
from typing import Any, NamedTuple

from .types import Agents, Compressed, Histories, Recent, RouteAgents


class Verbs(NamedTuple):
    """The verbs of one face of hisac."""

    encode: Any
    vote: Any
    prototypes: Any
    agent_lists: Any
    leaf_sums: Any
    missing: Any
    route: Any
    numbers: Any
    """numpy or torch"""
    as_type: Any
    """f(a, like): a in the type of `like`"""
    constant: Any = lambda a: a
    """f(a): the same Histories or array, as a constant for gradients"""
    beside: Any = lambda a: a
    """f(a): the same where v is"""
    fingerprint: Any = lambda book: book.fingerprint
    """f(book), which torch.compile takes for a constant"""
    default_temperature: Any = operator.attrgetter("temperature")
    """f(book), likewise"""
    log_share: Any = None
    """f(lse, votes or None), where it is no composition as below"""


def routed(verbs: Verbs, verb: str, agents: Any, count: Any, book: Any, sparse: int | None = None) -> RouteAgents:
    """What `route` takes of Agents, or of bare prototypes with their count. What Agents have not kept is made. Sparse
    routing needs codes too: bare prototypes have those of `encode`."""
    if sparse is not None and book is None:
        raise TypeError(f"{verb}: book expected beside sparse, got none")
    if isinstance(agents, RouteAgents):
        if count is not None:
            raise TypeError(f"{verb}: count expected None beside RouteAgents, which have their own")
        return agents
    if not isinstance(agents, Agents):
        if sparse is None:
            return RouteAgents(agents, count)
        users, m, width = agents.shape
        codes = verbs.encode(book, verbs.constant(agents).reshape((users * m, width)))
        return RouteAgents(agents, count, codes.reshape((users, m, codes.shape[1])))
    if count is not None:
        raise TypeError(f"{verb}: count expected None beside Agents, which have their own")
    if book is not None and int(agents.fingerprint) != (wanted := verbs.fingerprint(book)):
        raise ValueError(f"{verb}: agents expected of codebook {wanted:016x}, got {int(agents.fingerprint):016x}")
    if agents.prototypes is None and book is None:
        raise TypeError(f"{verb}: agents expected with prototypes, or with the book that makes them")
    prototypes = verbs.prototypes(book, agents) if agents.prototypes is None else agents.prototypes
    return RouteAgents(prototypes, agents.count, *((agents.codes, agents.lists) if sparse is not None else ()))


def temperature_of(verb: str, temperature: Any, book: Any, default_of: Any = operator.attrgetter("temperature")) -> Any:
    """The temperature, or the default one of the codebook, default_of(book)."""
    if temperature is not None:
        return temperature
    found = None if book is None else default_of(book)
    if found is None:
        why = "there is no codebook with a default one" if book is None else "the codebook has no default one"
        raise ValueError(f"{verb}: temperature expected, since {why}, got None")
    return found


def coded(verbs: Verbs, verb: str, book: Any, histories: Histories) -> Histories:
    """Histories with codes: those of x where there are none."""
    h = histories
    if h.codes is not None:
        return h
    if h.x is None or h.x_ids is not None:
        got = "neither x nor codes" if h.x is None else "no codes beside x_ids: encode the table once and keep them"
        raise ValueError(f"{verb}: codes expected, or x to encode, got {got}")
    return h._replace(codes=verbs.encode(book, h.x))


def _votes(verbs: Verbs, agents: Agents, lse: Any) -> Any:
    """Those of agents beside lse; 1 each where they have none."""
    if agents.votes is None:
        return verbs.numbers.ones_like(lse, dtype=verbs.numbers.int64)
    if tuple(agents.votes.shape) != tuple(lse.shape):
        expected, got = list(lse.shape), list(agents.votes.shape)
        raise ValueError(f"compress: agents' votes expected {expected}, got {got}")
    return verbs.beside(agents.votes)


def log_share(verbs: Verbs, lse: Any, votes: Any = None) -> Any:
    """z_a - log sum_a exp z_a, over the tokens of each user, where lse is not -inf: z = lse, or log votes where there
    are some; -inf for any other token. [B, M] -> [B, M]."""
    if verbs.log_share is not None:
        return verbs.log_share(lse, votes)
    np, z = verbs.numbers, lse
    if not lse.shape[1]:
        return lse
    if votes is not None:
        z = np.where((lse > -np.inf) & (votes > 0), np.log(verbs.as_type(votes.clip(1), lse)), -np.inf)
    top = np.amax(verbs.constant(z), 1, keepdims=True)
    z = z - np.where(top > -np.inf, top, 0.0)
    total = np.exp(z).sum(1)[:, None]
    return verbs.as_type(np.where(z > -np.inf, z - np.log(np.where(total > 0, total, 1.0)), -np.inf), lse)


def compress(
    verbs: Verbs, book: Any, histories: Histories, *, agents: Agents | None, budget: Any, fanout: Any, beam: Any,
    temperature: Any, normalize: str, method: str, refine: int, missing: str, sparse: int | None, mean_x: bool,
    **options: Any,
) -> Compressed:  # fmt: skip
    """`vote`, then `route`; see `hisac.compress`. `options` go to `route`."""
    for name, given, known in (("method", method, ("exact", "leaf")), ("missing", missing, ("drop", "token"))):
        if given not in known:
            raise ValueError(f"compress: {name} expected {known[0]!r} or {known[1]!r}, got {given!r}")
    h, np = histories, verbs.numbers
    temperature = temperature_of("compress", temperature, book, verbs.default_temperature)
    h = coded(verbs, "compress", book, h)
    if agents is not None and (budget, fanout, beam) != (None, None, None):
        raise ValueError("compress: expected either agents or a rule, got both")
    if agents is None:
        agents = verbs.vote(book, h, budget=budget, fanout=fanout, beam=beam)
    to = routed(verbs, "compress", agents, None, book, sparse)
    if h.x is not None and h.x.shape[-1] != to.prototypes.shape[-1]:
        shape, d = list(h.x.shape), to.prototypes.shape[-1]
        raise ValueError(f"compress: x is {shape}, the codebook has D = {d}: D differs ({shape[-1]}, {d})")
    if refine:
        to = to._replace(prototypes=verbs.constant(to.prototypes))
        if sparse is not None and to.lists is None:  # of the prototypes before any round
            lists = verbs.agent_lists(book, agents._replace(prototypes=to.prototypes), sparse).lists
            to = to._replace(lists=lists)
    to, rows = RouteAgents(*(a if a is None else verbs.beside(a) for a in to)), h
    options |= {"normalize": normalize, "book": book, "sparse": sparse}
    if method == "leaf":
        rows = verbs.leaf_sums(book, h)
        options["book"] = None if sparse is None else book
    for _ in range(refine):
        fixed = verbs.constant(rows), to
        found = verbs.route(*fixed, temperature=verbs.constant(temperature), tokens=False, mean_x=True, **options)
        kept = np.where((found.lse > -np.inf)[..., None], found.mean_x, to.prototypes)
        to = to._replace(prototypes=kept)
    tokens, lse, mean = verbs.route(rows, to, temperature=temperature, mean_x=mean_x, **options)
    tokens = verbs.as_type(tokens, h.v)  # that of leaf sums is float32
    votes = None if normalize == "agents" else _votes(verbs, agents, lse)
    share = log_share(verbs, lse, votes)
    if missing == "token":
        absent = verbs.missing(h, book=book)[:, None]  # as x: -inf is no row
        only = Histories(absent, h.v, h.offsets, v_ids=h.v_ids)
        one = verbs.route(only, np.zeros_like(lse[:, :1, None]), temperature=1.0)
        if votes is None:
            share = log_share(verbs, np.concatenate((lse, one.lse), 1))
        else:
            options |= {"normalize": "agents", "sparse": None}
            whole = verbs.route(rows, np.zeros_like(to.prototypes[:, :1]), temperature=1.0, tokens=False, **options).lse
            whole = np.where((share > -np.inf).any(1)[:, None], whole, -np.inf)
            parts = log_share(verbs, np.concatenate((whole, one.lse), 1))
            share = np.concatenate((share + parts[:, :1], parts[:, 1:]), 1)
        tokens, lse = np.concatenate((tokens, one.tokens), 1), np.concatenate((lse, one.lse), 1)
        mean = np.concatenate((mean, np.zeros_like(mean[:, :1])), 1) if mean_x else None
    kept = agents.lists if sparse is None else to.lists
    return Compressed(tokens, lse, share, agents._replace(prototypes=to.prototypes, lists=kept), mean)


def _present(np: Any, h: Histories, behaviours: Any) -> Any:
    """[T]: whether a behaviour's ids are rows of the tables, and its bias is finite."""
    parts = [] if h.bias is None else [np.isfinite(h.bias)]
    for table, ids in ((h.x, h.x_ids), (h.v, h.v_ids)):
        if ids is not None:
            parts += [ids >= 0] if table is None else [ids >= 0, ids < table.shape[0]]
    for name in ("x_ids", "v_ids", "bias"):
        if (a := getattr(h, name)) is not None and tuple(a.shape) != (behaviours,):
            raise ValueError(f"recent: {name} expected [T] = [{behaviours}], got {list(a.shape)}")
    if parts:
        return functools.reduce(operator.and_, parts)
    rows = next(a for a in (h.v, h.x, h.codes, h.spread, h.weights) if a is not None)
    return np.ones_like(rows if rows.ndim == 1 else rows[:, 0], dtype=bool)


def recent(verbs: Verbs, histories: Histories, spans: tuple[Any, Any], behaviours: Any, n: Any) -> Recent:
    """`hisac.recent` of users with the behaviours [starts, ends) of T = `behaviours`, n <= T. No shape depends on
    a value. The mass of the older ones is the lse in history mode of an agent at 0, with all behaviours at 0."""
    np, h, (starts, ends) = verbs.numbers, histories, spans
    present = _present(np, h, behaviours)
    total = np.cumsum(present, 0)
    until = total.new_zeros(1) if hasattr(total, "new_zeros") else np.zeros(1, np.int64)
    until = np.concatenate((until, total))  # [T + 1] how many present ones lie before
    first = until[ends] - until[starts] - n  # how many of the user's are older
    cut = np.minimum(np.where(first > 0, np.searchsorted(total, until[ends] - n + 1), starts), ends)
    place = np.cumsum(np.ones_like(np.broadcast_to(cut[:, None], (cut.shape[0], n))), 1)  # 1 .. n
    inside = place <= (until[ends] - until[cut])[:, None]
    rows = np.where(inside, np.searchsorted(total, until[cut][:, None] + place), 0)
    if h.bias is None:
        count = verbs.as_type(first.clip(0), np.zeros(0, dtype=np.float32))
        old = np.where(count > 0, np.log(count.clip(1)), -np.inf)
        own = np.where(inside, 0.0 * count[:, None], -np.inf)
    else:
        own = np.where(inside, h.bias[rows], -np.inf)
        older = Histories(np.zeros_like(h.bias)[:, None], None, (starts, cut), bias=np.where(present, h.bias, -np.inf))
        agent = verbs.as_type(np.zeros_like(starts)[:, None, None], own)
        old = verbs.route(older, agent, temperature=1.0, normalize="history", tokens=False).lse[:, 0]
    share = log_share(verbs, np.concatenate((own, old[:, None]), 1))
    x_ids, v_ids = (a if a is None else np.where(inside, a[rows], 0) for a in (h.x_ids, h.v_ids))
    return Recent(h._replace(offsets=(starts, cut)), rows, x_ids, v_ids, share[:, :-1], share[:, -1])


def counted(np: Any, users: int, own: Any, ids: Any, candidate_offsets: Any) -> tuple[Any, Any, Any]:
    """What `repeat_count` takes, checked, as int64. Values of candidate_offsets are on the CPU."""
    if own is None:
        raise TypeError("repeat_count: v_ids or x_ids expected in the histories, got neither")
    for name, a in (("ids of the histories", own), ("ids", ids), ("candidate_offsets", candidate_offsets)):
        got = str(a.dtype).removeprefix("torch.")
        if got not in ("int32", "int64"):
            raise TypeError(f"repeat_count: {name} expected int32 or int64, got {got}")
        if a.ndim != 1:
            raise ValueError(f"repeat_count: {name} expected one dimension, got {list(a.shape)}")
    if len(candidate_offsets) != users + 1:
        raise ValueError(
            f"repeat_count: candidate_offsets expected [B + 1] = [{users + 1}], got [{len(candidate_offsets)}]"
        )
    checked_spans(np, "repeat_count", "candidate_offsets", (candidate_offsets[:-1], candidate_offsets[1:]), len(ids))
    own, ids, offsets = (np.asarray(a, dtype=np.int64) for a in (own, ids, candidate_offsets))
    return own, ids, offsets


def repeat_count(np: Any, spans: tuple[Any, Any], own: Any, ids: Any, offsets: Any) -> Any:
    """`hisac.repeat_count` of users with the behaviours [starts, ends), whose ids are own [T]."""
    if not len(ids):
        return ids
    candidate = np.cumsum(np.ones_like(ids), 0) - 1
    asked = (candidate >= offsets[0]) & (candidate < offsets[-1])
    limit = 2**62 // len(offsets)  # 2^40 and more, for 2^22 users

    def pair_of(user: Any, item: Any, wanted: Any) -> Any:
        return np.where(wanted & (item >= 0) & (item < limit), user * limit + item, -1)

    pairs, at = np.unique(
        pair_of(np.searchsorted(offsets[1:], candidate, side="right"), ids, asked), return_inverse=True
    )
    rows, user = rows_of(np, *spans)
    mine = pair_of(user, own[rows], user >= 0)
    found = np.searchsorted(pairs, mine).clip(0, len(pairs) - 1)
    counts = np.bincount(found[(pairs[found] == mine) & (mine >= 0)], minlength=len(pairs))
    return counts[at]


def rows_of(np: Any, first: Any, last: Any) -> tuple[Any, Any]:
    """The rows first_b .. last_b of each user one after another [R], and the user of each [R]."""
    repeat = np.repeat_interleave if hasattr(np, "repeat_interleave") else np.repeat
    count = last - first
    user = repeat(np.cumsum(np.ones_like(count), 0) - 1, count)
    step = np.cumsum(np.ones_like(user), 0) - 1 + (last - np.cumsum(count, 0))[user]
    return step, user


def checked_spans(np: Any, verb: str, name: str, spans: tuple[Any, Any], most: int) -> tuple[Any, Any]:
    """(starts, ends) as int64, of ranges in order of at most `most` rows. Their values are on the CPU."""
    for a in spans:
        if (got := str(a.dtype).removeprefix("torch.")) not in ("int32", "int64"):
            raise TypeError(f"{verb}: {name} expected int32 or int64, got {got}")
    if len(spans[0]) != len(spans[1]):
        raise ValueError(f"{verb}: {name} expected as many starts as ends, got {len(spans[0])} and {len(spans[1])}")
    starts, ends = (np.asarray(a, dtype=np.int64) for a in spans)
    wrong = (starts < 0) | (ends < starts) | (ends > most)
    if bool(wrong.any()):
        b = wrong.tolist().index(True)
        got = f"[{int(starts[b])}, {int(ends[b])}) for user {b}"
        raise ValueError(f"{verb}: {name} expected 0 <= start <= end <= {most} for every user, got {got}")
    return starts, ends


def _check_pairs(a: Any, b: Any) -> None:
    """Two of the same fields, of out [.., V] and lse [..]."""
    if type(a) is not type(b):
        raise TypeError(f"merge: b expected {type(a).__name__}, as a, got {type(b).__name__}")
    if hasattr(a[1], "new_zeros") != hasattr(b[1], "new_zeros"):
        raise TypeError(f"merge: b expected arrays as those of a, got {type(b[1]).__name__}")
    if len(a) != len(b) or any((x is None) != (y is None) for x, y in zip(a, b, strict=True)):
        raise ValueError(f"merge: b expected the fields of a, {type(a).__name__} of {len(a)}, got {len(b)}")
    shape = list(a[1].shape)
    names = getattr(a, "_fields", ("out", "lse"))
    for i, (name, x, y) in enumerate(zip(names, a, b, strict=True)):
        if x is None:
            continue
        expected = shape if i == 1 else [*shape, *x.shape[-1:]]
        for who, given in (("a", x), ("b", y)):
            if list(given.shape) != expected:
                raise ValueError(f"merge: {who}'s {name} expected {expected}, got {list(given.shape)}")


def merge(np: Any, a: Any, b: Any) -> Any:
    """`hisac.merge`, by numpy or torch. A side whose lse is -inf is not multiplied, so that no gradient is NaN."""
    _check_pairs(a, b)
    in_a, in_b = a[1] != -np.inf, b[1] != -np.inf  # NaN is, and spoils the result
    both = in_a & in_b
    top = np.where(in_a | in_b, np.maximum(a[1], b[1]), 0.0)
    top = top.detach() if hasattr(top, "detach") else top
    mass_a, mass_b = np.exp(a[1] - top), np.exp(b[1] - top)
    total = np.where(both, mass_a + mass_b, 1.0)
    alone = np.where(in_a, a[1], np.where(in_b, b[1], -np.inf))

    def mean(x: Any, y: Any) -> Any:
        zero = np.zeros_like(x)
        x, y = np.where(in_a[..., None], x, zero), np.where(in_b[..., None], y, zero)
        mixed = (mass_a / total)[..., None] * x + (mass_b / total)[..., None] * y
        found = np.where(both[..., None], mixed, np.where(in_a[..., None], x, y))
        return found.to(zero.dtype) if hasattr(found, "detach") else found.astype(zero.dtype, copy=False)

    out = [None if x is None or i == 1 else mean(x, b[i]) for i, x in enumerate(a)]
    out[1] = np.where(both, top + np.log(total), alone)
    return getattr(type(a), "_make", tuple)(out)
