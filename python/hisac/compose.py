# SPDX-License-Identifier: Apache-2.0
"""What is composed of verbs: the way from histories to tokens, once for NumPy, torch and the definition."""

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


def recent(np: Any, attend: Any, histories: Histories, starts: Any, ends: Any, bias: Any, most: int, n: int) -> Recent:
    """`hisac.recent`, by numpy or torch and their `attend`: a candidate of zeros has the log of its tokens' mass as its
    log-sum-exp. Users have the behaviours [starts, ends) of at most T = `most`, and bias [T] or None."""
    starts, ends = _checked_spans(np, "recent", "offsets", starts, ends, most)
    cut = np.maximum(starts, ends - n)
    count_of = np.asarray(ends - starts, dtype=np.float32)

    def log_mass(rows: Any, offsets: Any) -> Any:
        if bias is None:
            count = np.asarray(offsets[1:] - offsets[:-1], dtype=np.float32)
            return np.where(count > 0, np.log(np.where(count > 0, count, 1.0)), -np.inf)
        zeros, q = np.zeros_like(bias[rows])[:, None, None], np.zeros_like(count_of)[:, None, None]
        users = np.arange(len(starts) + 1)
        return attend(q, zeros, zeros, users, bias=bias[rows], token_offsets=offsets, scale=1.0).lse[:, 0]

    rows, offsets = _rows_of(np, cut, ends)
    old, new = log_mass(*_rows_of(np, starts, cut)), log_mass(rows, offsets)
    total = np.logaddexp(old, new)
    total = np.where(total > -np.inf, total, 0.0)
    own = np.zeros_like(count_of[:1]) if bias is None else np.where(np.isfinite(bias[rows]), bias[rows], -np.inf)
    share = own - _repeat(np, total, offsets[1:] - offsets[:-1])
    return Recent(histories._replace(offsets=(starts, cut)), rows, offsets, share, old - total)


def repeat_count(np: Any, starts: Any, ends: Any, own: Any, most: int, ids: Any, candidate_offsets: Any) -> Any:
    """`hisac.repeat_count`, by numpy or torch. Users have the behaviours [starts, ends) of at most T = `most`, whose
    ids are own [T]."""
    for name, a in (("ids of the histories", own), ("ids", ids), ("candidate_offsets", candidate_offsets)):
        if (got := str(a.dtype).removeprefix("torch.")) not in ("int32", "int64"):
            raise TypeError(f"repeat_count: {name} expected int32 or int64, got {got}")
    own, ids, offsets = (np.asarray(a, dtype=np.int64) for a in (own, ids, candidate_offsets))
    starts, ends = _checked_spans(np, "repeat_count", "offsets", starts, ends, most)
    if len(offsets) != len(starts) + 1:
        users = len(starts) + 1
        raise ValueError(f"repeat_count: candidate_offsets expected [B + 1] = [{users}], got [{len(offsets)}]")
    _checked_spans(np, "repeat_count", "candidate_offsets", offsets[:-1], offsets[1:], len(ids))
    if not len(ids):
        return ids
    candidate = np.cumsum(np.ones_like(ids), 0) - 1
    asked = (candidate >= offsets[0]) & (candidate < offsets[-1]) & (ids >= 0)
    user = np.searchsorted(offsets[1:], candidate, side="right")
    items, item = np.unique(ids, return_inverse=True)
    pairs, pair = np.unique(np.where(asked, user * len(items) + item, -1), return_inverse=True)  # of a user, an item

    rows, bounds = _rows_of(np, starts, ends)
    history = _repeat(np, np.cumsum(np.ones_like(starts), 0) - 1, bounds[1:] - bounds[:-1])
    mine, mine_found = _find(np, items, own[rows])
    of, found = _find(np, pairs, history * len(items) + mine)
    counts = np.bincount(of[mine_found & found], minlength=len(pairs))
    return np.where(asked, counts[pair], 0)


def _find(np: Any, known: Any, wanted: Any) -> tuple[Any, Any]:
    """known [K], ascending, and wanted [T] -> the index in `known`, and whether the value is there."""
    at = np.searchsorted(known, wanted).clip(0, len(known) - 1)
    return at, known[at] == wanted


def _checked_spans(np: Any, verb: str, name: str, starts: Any, ends: Any, most: int) -> tuple[Any, Any]:
    starts, ends = np.asarray(starts, dtype=np.int64), np.asarray(ends, dtype=np.int64)
    if bool(((starts < 0) | (ends < starts) | (ends > most)).any()):
        raise ValueError(f"{verb}: {name} expected 0 <= start <= end <= {most} for every user, got others")
    return starts, ends


def _rows_of(np: Any, first: Any, last: Any) -> tuple[Any, Any]:
    """The rows first_b .. last_b of each user one after another [R], and where each user's begin [B + 1]."""
    count = last - first
    zero = count.new_zeros(1) if hasattr(count, "new_zeros") else np.zeros(1, np.int64)
    offsets = np.concatenate((zero, np.cumsum(count, 0)))
    steps = _repeat(np, first - offsets[:-1], count)
    return steps + np.cumsum(np.ones_like(steps), 0) - 1, offsets


def _repeat(np: Any, a: Any, counts: Any) -> Any:
    return (np.repeat_interleave if hasattr(np, "repeat_interleave") else np.repeat)(a, counts)


def _check_pairs(a: Any, b: Any) -> None:
    """Two of the same fields, of out [.., V] and lse [..]."""
    if type(a) is not type(b):
        raise TypeError(f"merge: b expected {type(a).__name__}, as a, got {type(b).__name__}")
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
