# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies: codebooks, histories, whole problems of a verb, and the arrays in them."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import Codebook
from .. import reference as _reference
from ..reference import bounds
from ..types import Array, Attended, Histories, RouteGradients, Tokens

reference: Any = _reference

DTYPES = ("float32", "float16", "bfloat16")
# values that break careless kernels: not numbers, signed zeros, subnormals, squares at the edge of absence, extremes
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 1e-45, -1e-38, 2.0**49, -(2.0**50), 1e10, 3.4e38, -3.4e38], "f4")
# weights that are no votes, near the most of a row and of a user, and beyond; and floats that are far from others
VOTES = np.array([0, -1, 2**39 - 1, 2**39, 2**40 - 1, 2**40, 2**62, -(2**63)])
WEIGHTS = np.array([[0, -1, np.nan, 99], [np.inf, -np.inf, 3.4e38, 1e-45]], "f4")
SCALES = st.sampled_from([1.0, 0.1, 30.0])
HOSTILE_SCALES = st.sampled_from([1.0, 0.1, 30.0, 1.0, 1e-43, 1e-39])  # two of subnormal arrays
TORCH_ROWS = ("x", "v", "q", "keys", "values", "d_out", "tokens", "out")  # arguments in the rows' type


def rounded(a: Array, dtype: str) -> Array:
    """The nearest values of `dtype`; as NumPy has no bfloat16, its values come as float32."""
    a = np.asarray(a, np.float32)
    if dtype == "bfloat16":
        bits = a.view(np.uint32)
        even = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
        return np.where(np.isnan(a), a, even.view(np.float32))
    with np.errstate(over="ignore"):
        return a.astype(dtype)


def sprinkle(rng: np.random.Generator, a: Array, share: float, values: Array = SPECIAL) -> Array:
    """A copy of `a` with about `share` of its entries replaced by some of `values`."""
    a, hit = np.array(a), rng.random(np.shape(a)) < share
    with np.errstate(over="ignore"):
        a[hit] = rng.choice(values, int(hit.sum())).astype(a.dtype)
    return a


def shuffled(rng: np.random.Generator, *arrays: Array) -> tuple[Array, ...]:
    """Some rows of arrays [T, ..], the same of each, as tables in another order, and ids into them, a few of them
    outside: (*tables, ids [T]). None stays None."""
    rows = next(len(a) for a in arrays if a is not None)
    order = rng.permutation(rows)[: rng.integers(0, rows + 1)]
    ids = rng.integers(0, max(len(order), 1), rows).astype(rng.choice(["i4", "i8"]))
    ids = sprinkle(rng, ids, 0.1, np.array([-1, len(order), -(2**31), 2**31 - 1]))
    return *(None if a is None else a[order] for a in arrays), ids


def to_torch(args: Any, dtype: str = "float32") -> Any:
    """Arguments, results or arrays as torch tensors; rows (x, v, q, keys, values and their like) get `dtype`, but those
    of leaf sums, and of their gradients, beside their histories."""
    torch = importlib.import_module("hisac.torch.library").torch  # only that package imports torch

    def convert(name: Any, a: Any) -> Any:
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            of_sums = name in ("sums", "gradients") and isinstance(a, Histories) and "histories" in args
            return type(a)(*(convert(of_sums or field, value) for field, value in zip(a._fields, a, strict=True)))
        if isinstance(a, tuple):
            return tuple(convert(name, value) for value in a)
        if isinstance(a, np.ndarray):
            tensor = torch.from_numpy(np.array(a))
            return tensor.to(getattr(torch, dtype)) if name in TORCH_ROWS and a.dtype.kind == "f" else tensor
        return a

    return {name: convert(name, a) for name, a in args.items()} if isinstance(args, Mapping) else convert("x", args)


# -------------------------------------------------------------------------------------------------------- strategies


def generators() -> st.SearchStrategy[np.random.Generator]:
    """A NumPy generator from a drawn seed."""
    return st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def codebooks(
    draw: st.DrawFn, *, max_levels: int = 3, max_codes: int = 6, min_width: int = 1, max_width: int = 12
) -> Codebook:
    """Codebooks of any depth; half of them on a coarse grid, where ties, duplicates and equal leaves are common."""
    sizes = draw(st.lists(st.integers(1, max_codes), min_size=1, max_size=max_levels))
    width, rng, grid = draw(st.integers(min_width, max_width)), draw(generators()), draw(st.booleans())
    centers = [rng.integers(-2, 3, (n, width)) if grid else rng.normal(size=(n, width)) for n in sizes]
    return Codebook([c.astype(np.float32) / 2**level for level, c in enumerate(centers)])


@st.composite
def embeddings(
    draw: st.DrawFn, rows: int | None = None, width: int | None = None, *, dtype: str = "float32", hostile: bool = False
) -> Array:
    """Rows [T, D] of a scale between 0.1 and 30; `hostile` adds NaN, infinities, subnormals and huge values."""
    shape = (draw(st.integers(0, 64)) if rows is None else rows, draw(st.integers(1, 12)) if width is None else width)
    rng, scale = draw(generators()), draw(HOSTILE_SCALES if hostile else SCALES)
    a = scale * rng.normal(size=shape).astype(np.float32)
    return rounded(sprinkle(rng, a, draw(st.sampled_from([0.02, 0.3]))) if hostile else a, dtype)


@st.composite
def offsets(draw: st.DrawFn, *, max_users: int = 4, max_history: int = 64, long: bool = False) -> Array:
    """Ragged offsets [B + 1], int32 or int64, with empty users; sometimes none at all. long: a user who has at least
    half of the most."""
    lengths = draw(st.lists(st.integers(0, max_history), max_size=max_users - long))
    if long:
        lengths.insert(draw(st.integers(0, len(lengths))), draw(st.integers(max_history // 2, max_history)))
    return np.cumsum([0, *lengths], dtype=draw(st.sampled_from([np.int64, np.int32])))


@st.composite
def spans(draw: st.DrawFn, *, max_users: int = 4, max_history: int = 64, long: bool = False) -> tuple[int, Any]:
    """(T, offsets): ragged offsets over all T rows or only a middle part, or (starts, ends) that overlap. long: as in
    offsets."""
    row = draw(offsets(max_users=max_users, max_history=max_history, long=long))
    before, after = (draw(st.integers(0, 3)), draw(st.integers(0, 3))) if draw(st.booleans()) else (0, 0)
    rows = int(row[-1]) + before + after
    if draw(st.booleans()):
        return rows, (row + before).astype(row.dtype)
    rng = draw(generators())
    ends = np.sort(rng.integers(0, min(rows, max_history) + 1, (2, len(row) - 1)), 0).astype(row.dtype)
    return rows, (ends[0].copy(), ends[1].copy())


@st.composite
def codes(draw: st.DrawFn, book: Codebook, rows: int | None = None, *, invalid: bool = True) -> Array:
    """Codes [T, L] int32, some leaves more common than others; `invalid` adds -1, C_l and extremes."""
    rng, n = draw(generators()), draw(st.integers(0, 64)) if rows is None else rows
    sizes = np.array(book.sizes)
    if draw(st.booleans()):
        found = rng.integers(0, sizes, (n, len(sizes)))
    else:
        found = np.minimum(rng.geometric(0.4, (n, len(sizes))) - 1, sizes - 1)
    if invalid and draw(st.booleans()):
        found = sprinkle(rng, found, 0.1, np.array([-1, -(2**31), 2**31 - 1, sizes.max()]))
    return found.astype(np.int32)


@st.composite
def _weights(draw: st.DrawFn, rows: int, share: float = 0.0) -> Array:
    """Weights [T] of voting: int64, few of them large, or float32 of any scale; `share` of these are hostile."""
    rng, odd = draw(generators()), draw(st.sampled_from([0.1, 0.0]))
    if draw(st.booleans()):
        return sprinkle(rng, rng.integers(0, 4, rows), odd, VOTES[: draw(st.sampled_from([2, len(VOTES)]))])
    found = draw(st.sampled_from([1.0, 1e-43, 1e-30, 1e37])) * rng.exponential(size=rows)
    return sprinkle(rng, sprinkle(rng, found.astype(np.float32), odd, WEIGHTS[draw(st.integers(0, 1))]), share)


def _some(rng: np.random.Generator, given: dict[str, Any]) -> dict[str, Any]:
    """Most of the arrays."""
    return {name: a if rng.random() < 0.8 else None for name, a in given.items()}


class Shown:
    """Arguments that print small arrays only."""

    def __repr__(self) -> str:
        def show(a: Any) -> str:
            if isinstance(a, Codebook):
                return f"<{' x '.join(map(str, a.sizes))} codes>"
            if isinstance(a, Histories):
                given = ((name, field) for name, field in a._asdict().items() if field is not None)
                return f"Histories({', '.join(f'{name}={show(field)}' for name, field in given)})"
            return f"{a.dtype}{list(a.shape)}" if isinstance(a, np.ndarray) and a.size > 12 else repr(a)

        fields = ", ".join(f"{name}={show(a)}" for name, a in vars(self).items() if name[0] != "_")
        return f"{type(self).__name__}({fields})"

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        printer.text(repr(self))  # else hypothesis prints every array in full


@dataclass(frozen=True, eq=False, repr=False)
class Problem(Shown):
    """Histories and the options of every verb on them; arrays are named as in `hisac`. `dtype` is the type of x and v,
    whose values NumPy holds as float32 when it is bfloat16; x may be int8. `routed_codes`: `route` reads the codes.
    method, refine and missing are options of `compress`; sparse is None unless it was asked for."""

    book: Codebook
    histories: Histories
    prototypes: Array
    routed_codes: bool
    count: Array | None
    temperature: Any
    normalize: str
    sparse: int | None
    precision: str
    mean_x: bool
    method: str
    refine: int
    missing: str
    budget: int | None
    fanout: tuple[int, ...] | None
    beam: tuple[int, ...] | None
    dtype: str
    seed: int

    @cached_property
    def _reference_book(self) -> Any:
        return reference.Codebook(self.book.centers)

    def encode_args(self) -> dict[str, Any]:
        """The arguments of `encode`, in NumPy; a problem without float x encodes its prototypes."""
        rows = self.prototypes.reshape(-1, self.prototypes.shape[2])
        x = self.histories.x
        return {"book": self.book, "x": rounded(rows, self.dtype) if x is None or x.dtype == np.int8 else x}

    def vote_args(self) -> dict[str, Any]:
        """The arguments of `vote`."""
        names = "book", "histories", "budget", "fanout", "beam"
        return {name: getattr(self, name) for name in names}

    def route_args(self) -> dict[str, Any]:
        """The arguments of `route`, in NumPy; `to_torch(p.route_args(), p.dtype)` has them as tensors."""
        names = ("histories", "count", "temperature", "normalize", "precision", "mean_x")
        args = {"agents": self.prototypes} | {name: getattr(self, name) for name in names}
        return args | ({"book": self.book, "sparse": self.sparse} if self.routed_codes else {})

    def compress_args(self) -> dict[str, Any]:
        """The arguments of `compress`, in NumPy."""
        names = "normalize", "method", "refine", "missing", "sparse", "precision", "mean_x"
        tau = self.temperature if np.size(self.temperature) == 1 else self.temperature[:1]  # M is that of `vote`
        return self.vote_args() | {name: getattr(self, name) for name in names} | {"temperature": tau}

    def leaf_args(self) -> dict[str, Any]:
        """The arguments of `leaf_sums`, in NumPy."""
        return {"book": self.book, "histories": self.histories}

    def leaf_backward_args(self, sums: Histories) -> dict[str, Any]:
        """The arguments of `leaf_sums_backward`: random gradients of what `leaf_sums` returned, some of them None."""
        rng = np.random.default_rng(self.seed)
        sums = Histories(*(None if a is None else bounds.as_numpy(a) for a in sums))
        given = {name: rng.normal(size=getattr(sums, name).shape).astype("f4") for name in ("x", "v", "bias", "spread")}
        return {**self.leaf_args(), "sums": sums, "gradients": Histories(**_some(rng, given)), "need": ("v", "bias")}

    def backward_args(self, forward: Tokens) -> dict[str, Any]:
        """The arguments of `route_backward`: random gradients of what `route` returned, some of them None; every one
        that there is."""
        rng = np.random.default_rng(self.seed)
        args = {name: a for name, a in self.route_args().items() if name != "mean_x"}
        forward = Tokens(*(None if a is None else bounds.as_numpy(a) for a in forward))
        kinds: dict[str, str] = {"tokens": self.dtype, "lse": "float32", "mean_x": "float32"}
        returned = {name: a for name, a in forward._asdict().items() if a is not None}
        every = {name: rounded(rng.normal(size=a.shape), kinds[name]) for name, a in returned.items()}
        gradients = Tokens(**dict.fromkeys(kinds) | _some(rng, every))
        without = () if self.histories.x is not None and gradients.mean_x is None else ("x",)
        need = tuple(name for name in RouteGradients._fields if name not in without)
        return {**args, "forward": forward, "gradients": gradients, "need": need}

    def by_reference(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """The same arguments with the reference's own codebook, so that nothing compiled takes part."""
        return {name: self._reference_book if name == "book" else a for name, a in args.items()}

    def reference(self) -> Tokens:
        """What `route` means here."""
        return reference.route(**self.by_reference(self.route_args()))  # type: ignore[no-any-return]

    def bound(self) -> Tokens:
        """How far `route` may be from `reference`, cell by cell."""
        return bounds.route_bound(self.by_reference(self.route_args()), self.dtype)


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    max_users: int = 4,
    max_history: int = 64,
    max_levels: int = 3,
    max_codes: int = 6,
    max_width: int = 12,
    max_agents: int = 9,
    dtypes: Sequence[str] | None = None,
    hostile: bool = False,
    gathered: bool = False,
    sparse: bool = False,
    plain: bool = False,
) -> Problem:
    """Whole problems: ragged or overlapping histories, absent rows and agents, every option. `hostile` puts NaN,
    infinities, subnormals and huge values into every array, and temperatures and counts that make no sense. `gathered`
    makes x with codes, and v, tables with ids, some of them outside, and x int8 with a scale, now and then each.
    `sparse` makes the routing sparse, and a long history and many agents; that saves work, so that a user is routed
    sparsely, where the bounds allow for histories of 100 and more, 15 agents and few codes.

    `plain` leaves what any system takes: users one after another, each with behaviours, all of them present; finite x
    and v, float32 unless `dtypes` say another; valid codes; no bias, spread, weights or count. Options are those of
    `hisac` that are not given, but for the temperature, and budget, fanout or beam."""
    if plain and (hostile or gathered or sparse):
        raise ValueError("problems: expected plain alone, got it beside hostile, gathered or sparse")
    dtypes = dtypes or (("float32",) if plain else DTYPES)
    book = draw(codebooks(max_levels=max_levels, max_codes=max_codes, max_width=max_width))
    if plain:
        ragged: Any = np.cumsum([0, *draw(st.lists(st.integers(1, max_history), min_size=1, max_size=max_users))])
        rows = int(ragged[-1])
    else:
        rows, ragged = draw(spans(max_users=max_users, max_history=max_history, long=sparse))
    users = len(ragged[0]) if isinstance(ragged, tuple) else len(ragged) - 1
    agents = draw(st.integers(1 + sparse * (max_agents // 2), max_agents))
    wide = draw(st.integers(1, max_width))
    dtype, routed_codes = draw(st.sampled_from(dtypes)), not plain and (sparse or draw(st.booleans()))
    leaf = draw(codes(book, rows, invalid=not plain))
    seed, share = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0.02, 0.2])) if hostile else 0.0
    rng = np.random.default_rng(seed)

    def noise(*shape: int) -> Array:
        return rng.normal(size=shape).astype(np.float32)

    scale, size = (draw(HOSTILE_SCALES if hostile else s) for s in (SCALES, st.just(1.0)))
    x = scale * (np.asarray(book.prototypes(leaf)) + noise(rows, book.width) * draw(st.sampled_from([0.2, 0.0, 1.0])))
    leaves = rng.integers(0, np.array(book.sizes), (users, agents, book.levels))
    prototypes = scale * (np.asarray(book.prototypes(leaves.astype(np.int32))) + 0.1 * noise(users, agents, book.width))
    if sparse:  # agents that are equally near to every codeword
        twin = np.where(rng.random((users, agents)) < 0.2, rng.integers(0, agents, (users, agents)), np.arange(agents))
        prototypes = np.take_along_axis(prototypes, twin[:, :, None], 1)
    bias = None if draw(st.booleans()) else sprinkle(rng, 3 * noise(rows), 0.1, SPECIAL[:3])
    spread = None
    if draw(st.integers(0, 3)) == 0:
        spread = sprinkle(rng, scale * np.abs(noise(rows)), 0.1, np.array([-1, np.nan, np.inf, 0]))
    weights = draw(st.none() | _weights(rows, share))
    count = None if draw(st.booleans()) else rng.integers(-hostile, agents + 1 + 2 * hostile, users).astype(np.int32)
    tau: Any = draw(st.sampled_from([0.1, 0.02, 1.0, 50.0]))
    if draw(st.booleans()):
        tau = np.full(draw(st.sampled_from([1, agents])), tau, np.float32) * np.float32(rng.uniform(0.5, 2))
        tau = sprinkle(rng, tau, 0.2, np.array([0, -1, np.nan, np.inf, 1e-42, 1e-30, 1e30])) if hostile else tau
    elif hostile:
        tau = draw(st.sampled_from([0.1, 1e-30, 1e-42, 1e30]))
    v, x_ids, v_ids, x_scale = noise(rows, wide), None, None, None
    x = None if routed_codes and draw(st.booleans()) else rounded(sprinkle(rng, x, share), dtype)
    v = rounded(sprinkle(rng, np.float32(size) * v, share), dtype)
    if gathered:
        if draw(st.booleans()):
            v, v_ids = shuffled(rng, v)
        if draw(st.booleans()):
            x, leaf, x_ids = shuffled(rng, x, leaf)
        if x is not None and draw(st.booleans()):
            x_scale = draw(HOSTILE_SCALES if hostile else SCALES) / 100 * rng.uniform(0.5, 2, len(x) or 1)
            x = np.clip(np.nan_to_num(x.astype(np.float64)) / x_scale[:, None][: len(x)], -128, 127).astype(np.int8)
            x_scale = sprinkle(rng, x_scale.astype(np.float32), share)
            x_scale = x_scale[:1] if draw(st.booleans()) else x_scale
    rule, most = draw(st.sampled_from([("budget", max_agents), ("fanout", 3), ("beam", max_agents)]))
    numbers = tuple(draw(st.integers(1, most)) for _ in range(book.levels))
    prototypes = sprinkle(rng, prototypes, share)
    bias = None if bias is None else sprinkle(rng, bias, share)
    problem = Problem(
        book=book,
        histories=Histories(x, v, ragged, leaf, x_ids, v_ids, x_scale, bias, spread, weights),
        prototypes=prototypes,
        routed_codes=routed_codes,
        count=count,
        temperature=tau,
        normalize=draw(st.sampled_from(["history", "agents"])),
        sparse=draw(st.sampled_from([1, 1, 2, 3, max_agents])) if sparse else None,
        precision=draw(st.sampled_from(["float32", "float32", "bfloat16"])),
        mean_x=draw(st.booleans()),
        method=draw(st.sampled_from(["exact", "leaf"])),
        refine=draw(st.integers(0, 2)),
        missing=draw(st.sampled_from(["drop", "token"])),
        budget=numbers[0] if rule == "budget" else None,
        fanout=numbers if rule == "fanout" else None,
        beam=numbers if rule == "beam" else None,
        dtype=dtype,
        seed=seed,
    )
    if not plain:
        return problem
    bare = problem.histories._replace(bias=None, spread=None, weights=None)
    options: dict[str, Any] = {"normalize": "agents", "precision": "float32", "mean_x": False, "method": "exact"}
    options |= {"refine": 0, "missing": "drop", "temperature": float(np.ravel(tau)[0])}
    return replace(problem, histories=bare, count=None, **options)


@dataclass(frozen=True, eq=False, repr=False)
class Attention(Shown):
    """Candidates on the tokens of their users; arrays as in `hisac.attend`, of the type `dtype` as in Problem."""

    q: Array
    keys: Array
    values: Array
    candidate_offsets: Array
    bias: Array | None
    scale: float | None
    dtype: str
    seed: int
    token_offsets: Array | None = None
    longest: int | None = None

    def attend_args(self) -> dict[str, Any]:
        """The arguments of `attend`, in NumPy."""
        return {name: a for name, a in vars(self).items() if name not in ("dtype", "seed")}

    def backward_args(self, forward: Attended) -> dict[str, Any]:
        """The arguments of `attend_backward`, with random gradients of what `attend` returned."""
        rng, forward = np.random.default_rng(self.seed), Attended(*map(bounds.as_numpy, forward))
        d_lse = rng.normal(size=forward.lse.shape).astype(np.float32) if rng.random() < 0.7 else None
        d_out = rounded(rng.normal(size=forward.out.shape), self.dtype)
        return {"d_out": d_out, "d_lse": d_lse, "forward": forward, **self.attend_args()}

    def reference(self) -> Attended:
        """What `attend` means here."""
        return reference.attend(**self.attend_args())  # type: ignore[no-any-return]

    def bound(self) -> Attended:
        """How far `attend` may be from `reference`, cell by cell."""
        return bounds.attend_bound(self.attend_args(), self.dtype)


@st.composite
def attentions(
    draw: st.DrawFn,
    *,
    max_users: int = 3,
    max_candidates: int = 9,
    dtypes: Sequence[str] = DTYPES,
    hostile: bool = False,
    ragged: bool = False,
) -> Attention:
    """Attention problems: users without candidates, absent tokens, candidates outside every range. `ragged`: users have
    tokens by token_offsets, some none, and there are tokens of nobody."""
    rows, row = draw(
        spans(max_users=max_users, max_history=max_candidates).filter(lambda h: isinstance(h[1], np.ndarray))
    )
    m, h, d, wide = (draw(st.integers(1, n)) for n in (9, 3, 8, 8))
    seed, dtype = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(dtypes))
    rng, scale, users = np.random.default_rng(seed), draw(st.sampled_from([1.0, 5.0])), len(row) - 1
    size = draw(HOSTILE_SCALES if hostile else st.just(1.0)) * scale  # of the values
    share = draw(st.sampled_from([0.02, 0.2])) if hostile else 0.0

    def noise(by: float, *shape: int) -> Array:
        return sprinkle(rng, (by * rng.normal(size=shape)).astype(np.float32), share)

    tokens: tuple[int, ...] = users, m
    offsets = longest = None
    if ragged:
        offsets = np.cumsum(rng.integers(0, m + 1, users + 1)).astype(row.dtype)
        tokens = (int(offsets[-1]) + draw(st.integers(0, 2)),)
        longest = draw(st.sampled_from([None, m, int(np.diff(offsets).max(initial=0))]))
    q, k = noise(scale, rows, h, d), noise(scale, *tokens, h, d)
    v, bias = noise(size, *tokens, h, wide), noise(scale, *tokens)
    return Attention(
        q=rounded(q, dtype),
        keys=rounded(k, dtype),
        values=rounded(v, dtype),
        candidate_offsets=row,
        bias=None if draw(st.booleans()) else sprinkle(rng, bias, 0.1, SPECIAL[:3]),
        scale=draw(st.sampled_from([None, 0.3, 1.0])),
        dtype=dtype,
        seed=seed,
        token_offsets=offsets,
        longest=longest,
    )
