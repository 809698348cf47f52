# SPDX-License-Identifier: Apache-2.0
"""The problems of vectors.bin, and what the reference says of them: every verb, all of its options."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from vector_candidates import attend_cases, match_cases
from vector_states import state_cases
from vectors import Case, Codes, Floats, Integers, Stored, Uniform, Whole, bits, number, offsets_of, to_bfloat16

from hisac import reference
from hisac.reference import bounds
from hisac.types import Histories, Tokens

NAN, INF = float("nan"), float("inf")
OPTIONS = {"normalize": ("history", "agents"), "precision": ("float32", "bfloat16")}
SUMS = ("x", "v", "bias", "spread")  # of leaf sums, what is float


def bounded(function: Any, *args: Any, fields: Any) -> list[tuple[Any, Any]]:
    """A bound without products of halves, and that on AMX, field by field; the same on every machine."""
    both = []
    for isa in ("baseline", "amx"):
        with mock.patch.object(bounds, "_core", SimpleNamespace(active_isa=lambda isa=isa: isa)):
            both.append(function(*args))
    return [(getattr(both[0], f), getattr(both[1], f)) for f in fields]


def book_of(seed: int, sizes: tuple[int, ...], width: int) -> dict[str, Any]:
    """A codebook, finer from level to level."""
    return {"book": number(seed, width, *sizes)}


def centers(records: dict[str, Any]) -> list[Any]:
    seed, width, *sizes = records["book"].array().tolist()
    return [Uniform(seed + level, (size, width), scale=0.25**level).array() for level, size in enumerate(sizes)]


def built(records: dict[str, Any]) -> Any:
    return reference.Codebook(centers(records))


# --------------------------------------------------------------------------------------------------------------- encode


def encode_cases() -> Iterator[Case]:
    def case(name: str, records: dict[str, Any], x: Any) -> Case:
        return f"encode/{name}", {**records, "codes": Integers(reference.encode(built(records), x))}

    for width in (1, 3, 16, 65):
        book = book_of(100 + width, (40, 7, 20), width)
        odd = {7 * width: NAN, 8 * width: -INF, 9 * width: 3.4028234663852886e38}
        x = Uniform(200 + width, (180, width), odd)
        yield case(f"{width}", book | {"x": x}, x.array())
        # halfway between two codewords, to the last bit or nearly
        first = centers(book)[0]
        pairs = Codes(220, (30 if width < 65 else 12, 2), {}, (40, 40), ("even", "even")).array()
        mid = (first[pairs[:, 0]] + first[pairs[:, 1]]) / np.float32(2)
        mid[1::2] = np.nextafter(mid[1::2], np.float32(2))
        yield case(f"{width} halfway", book | {"x": Stored(mid)}, mid)
    for name in ("float16", "bfloat16"):
        book, x = book_of(110, (33, 9), 17), Uniform(111, (40, 17)).array()
        x = x.astype(np.float16) if name == "float16" else to_bfloat16(x)
        stored = x if name == "float16" else (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        yield case(name, book | {"x": Stored(stored)}, x)


# ----------------------------------------------------------------------------------------------------------------- vote


def as_numpy(record: Any) -> Any:
    a = record.array()
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32) if a.dtype == np.uint16 else a


def histories_of(records: dict[str, Any]) -> Histories:
    """The histories that the records stand for."""
    fields = {name: as_numpy(records[name]) for name in Histories._fields if name in records}
    return Histories(**fields, offsets=(records["starts"].array(), records["ends"].array()))


def vote_case(name: str, records: dict[str, Any], levels: int, rule: dict[str, Any]) -> Case:
    found = reference.vote(built(records), histories_of(records), **rule)
    options = number(
        rule.get("budget") or 0, *(k for name in ("fanout", "beam") for k in rule.get(name, (0,) * levels))
    )
    expected = {name: Integers(getattr(found, name)) for name in ("votes", "count")}
    return f"vote/{name}", records | {"rule": options, "agents": Integers(found.codes), **expected}


def odd_weights() -> Iterator[tuple[str, dict[str, Any]]]:
    """Weights of five users, 700 rows, float32 and int64; three of the users have 100 rows and the fourth has one."""
    offsets = offsets_of(0, 100, 200, 300, 301, 700)
    floats = (bits(322, 700) >> np.uint64(33)).astype(np.uint32).view(np.float32)  # of all sizes, with NaN
    floats[:100].view(np.uint32)[:] >>= np.uint32(8)  # below 2^-126
    floats[100:200] = np.ldexp(np.abs(Uniform(323, (100,)).array()), np.arange(100) % 30 - 29)
    floats[100:106] = 1, 2.0**-149, 2.0**-25, np.nextafter(np.float32(2.0**-25), np.float32(1)), -1, -INF
    floats[[200, 300]] = INF
    floats[301:] = np.where(np.arange(399) % 3, -np.abs(floats[301:]), 0)  # none of them votes
    yield "floats", offsets | {"weights": Stored(floats)}
    whole = Whole(324, (700,), {300: 2**63 - 1}, 63).array()
    whole[100:200] = np.array([2**63 - 1, 2**40, 2**40 - 1, 2**40 - 2, 1])[np.arange(100) % 5]  # about the limit
    whole[200:300] = np.array([1, 0, -1, -(2**63)])[np.arange(100) % 4]
    whole[301:] = 0
    whole[310:315] = 2**39, 2**38, 2**37, 2**37, -1  # below 2^40 together, or just not
    yield "int64", offsets | {"weights": Stored(whole)}


def vote_cases() -> Iterator[Case]:
    offsets = offsets_of(0, 300, 300, 301, 700)
    for sizes in ((9,), (4, 5), (3, 4, 5), (2,) * 8):
        levels = len(sizes)
        wrong = {i * levels + i % levels: -1 if i % 40 else 1 << 30 for i in range(3, 700, 61)}
        codes = Codes(300 + levels, (700, levels), wrong, sizes, ("skewed",) * levels)
        records = book_of(310 + levels, sizes, 2) | offsets | {"codes": codes}
        weighed = {"weights": Uniform(320, (700,), {5: NAN, 300: INF}, 20.0)}
        whole = {"weights": Whole(321, (700,), {5: 0}, 12)}
        for kind, extra in (("", {}), (" weighed", weighed), (" int64", whole)):
            for budget in (1, 7, 30, 400):
                yield vote_case(f"{sizes} {budget}{kind}", records | extra, levels, {"budget": budget})
            for k in (1, 2, 3):
                fanout = tuple(k if level < 5 else 1 for level in range(levels))
                yield vote_case(f"{sizes} {fanout}{kind}", records | extra, levels, {"fanout": fanout})
            for beam in ((2,) * levels, (4096, 3) * 4, (7, 30) * 4):
                beam = beam[-levels:]
                yield vote_case(f"{sizes} beam {beam}{kind}", records | extra, levels, {"beam": beam})
        for kind, extra in odd_weights():
            yield vote_case(f"{sizes} odd {kind}", records | extra, levels, {"budget": 30})
    # long histories, whose leaves are counted and not sorted; the second one is too short
    offsets, zeros = offsets_of(0, 2100, 4147, 4147, 9000), {i: 0 for i in range(1, 9000, 37)}
    shapes = ((90,), (30, 20), (5, 6, 30), (1500, 3), (3, 9000))
    manners = (("halved", "skewed"), ("skewed", "skewed"), ("one", "one"), ("halved", "heavy in one"))
    for i, sizes in enumerate(shapes):
        levels = len(sizes)
        for k, (first, below) in enumerate(manners):
            wrong = {j * levels: -1 if j % 2 else 1 << 20 for j in range(5, 9000, 491)}
            codes = Codes(330 + 10 * i + k, (9000, levels), wrong, sizes, (first, *(below,) * (levels - 1)))
            records = book_of(340 + i, sizes, 1) | offsets | {"codes": codes}
            if (i + k) % 3:
                whole = Whole(351, (9000,), zeros, 20 + 20 * (i % 2))
                records["weights"] = whole if (i + k) % 3 == 2 else Uniform(350, (9000,), zeros | {7: NAN}, 20.0)
            budgets = [{"budget": 5}, {"budget": 60}, {"budget": (700, 4096)[k % 2]}]
            for rule in (
                *budgets,
                {"fanout": (6, 4, 2)[:levels]},
                {"beam": (3, 2, 20)[-levels:]},
                {"beam": (60,) * levels},
            ):
                (limit,) = rule.values()
                yield vote_case(f"{sizes} {first} {' '.join(rule)} {limit}", records, levels, rule)
    # 2^63 leaves and more
    for i, sizes in enumerate(((65536, 65536, 65536, 32768), (65536,) * 4, (1 << 20, 1, 1 << 20, 1 << 20, 16))):
        levels = len(sizes)
        ends = Codes(360 + i, (50, levels), {}, (4,) * levels, ("skewed",) * levels).array()
        codes = np.where(ends < 2, np.array(sizes) - 1 - np.minimum(ends, np.array(sizes) - 1), 0).astype(np.int32)
        records = book_of(370 + i, sizes, 1) | offsets_of(0, 40, 50) | {"codes": Stored(codes)}
        for rule in ({"budget": 16}, {"beam": (2, 3, 9, 5, 16)[-levels:]}):
            yield vote_case(f"{sizes} {' '.join(rule)}", records, levels, rule)


# ---------------------------------------------------------------------------------------------------------------- route


def route_args(records: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `reference.route` that the records and options stand for."""
    names = ("prototypes", "count", "temperature")
    args: dict[str, Any] = {name: as_numpy(records[name]) if name in records else None for name in names}
    book = built(records) if "codes" in records else None
    args["agents"] = args.pop("prototypes")
    usual = {name: choices[0] for name, choices in OPTIONS.items()}
    return {**args, **usual, **options, "book": book, "histories": histories_of(records)}


def options_record(options: dict[str, Any]) -> Stored:
    return number(*(choices.index(options.get(name, choices[0])) for name, choices in OPTIONS.items()))


def sparse_records(args: dict[str, Any]) -> dict[str, Any]:
    """What a C++ caller of sparse routing gives beside the rest."""
    if args.get("sparse") is None:
        return {}
    users, m, width = args["agents"].shape
    codes = reference.encode(args["book"], args["agents"].reshape(-1, width)).reshape(users, m, -1)
    return {"sparse": number(args["sparse"]), "agent_codes": Stored(codes)}


def route_case(name: str, records: dict[str, Any], options: dict[str, Any], stride: int = 1) -> Case:
    args = route_args(records, options)
    records = records | sparse_records(args)
    found = reference.route(**args)
    fields = [f for f in Tokens._fields if getattr(found, f) is not None]
    limits = bounded(bounds.route_bound, args, type_of(records), fields=fields)
    expected = {f: Floats(getattr(found, f), *limit, stride=stride) for f, limit in zip(fields, limits, strict=True)}
    return f"route/{name}", records | {"options": options_record(options), **expected}


def type_of(records: dict[str, Any]) -> str:
    """The type of v."""
    kind = str(records["v"].array().dtype) if "v" in records else "float32"
    return {"float16": "float16", "uint16": "bfloat16"}.get(kind, "float32")


def without(records: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: r for name, r in records.items() if name not in names}


def usual(rows: int, users: int, agents: int, width: int, wide: int, offsets: dict[str, Any]) -> dict[str, Any]:
    """Codes in two levels, absent rows and agents, a temperature for each agent."""
    wrong = {2 * i + i % 2: -1 for i in range(11, rows, 97)}
    return {
        **book_of(400, (3, 4), width),
        "x": Uniform(410, (rows, width), {i * width: NAN for i in range(0, rows, 50)}),
        "v": Uniform(411, (rows, wide)),
        "bias": Uniform(412, (rows,), {i: -INF for i in range(1, rows, 70)}, 2.0),
        "codes": Codes(413, (rows, 2), wrong, (3, 4), ("even", "skewed")),
        "prototypes": Uniform(414, (users, agents, width)),
        **offsets,
    }


def small(rows: int = 60) -> dict[str, Any]:
    """Two users of few rows, one of whom has none, and one more that overlaps."""
    records = usual(rows, 3, 4, 6, 5, {"starts": number(0, 30, 10), "ends": number(30, 30, rows)})
    return records | {"temperature": number(0.8, kind=np.float32)}


def gathered() -> dict[str, Any]:
    """Items and values as tables, and int8."""
    records = without(small(), "x", "v")
    records["codes"] = Codes(413, (25, 2), {23: -1}, (3, 4), ("even", "skewed"))
    records["x"] = Stored(Codes(420, (25, 6), {}, (256,) * 6, ("even",) * 6).array().astype(np.uint8).view(np.int8))
    records["v"] = Uniform(421, (20, 5))
    records["x_ids"] = Stored(Codes(422, (60, 1), {3: 25, 4: -1}, (25,), ("even",)).array()[:, 0].astype(np.int64))
    records["v_ids"] = Stored(Codes(423, (60, 1), {3: 20, 9: -7}, (20,), ("even",)).array()[:, 0])
    return records | {"x_scale": Stored(np.abs(Uniform(424, (25,), scale=0.01).array()))}


def halved(name: str) -> dict[str, Any]:
    """x and v of a type of 16 bits."""
    halves = {}
    for of in ("x", "v"):
        a = np.nan_to_num(small()[of].array())
        upper = (to_bfloat16(a).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        halves[of] = Stored(a.astype(np.float16) if name == "float16" else upper)
    return small() | halves


def odd_inputs() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Small problems, each with something else that an input may be."""
    yield "a spread", small() | {"spread": Stored(np.abs(Uniform(425, (60,)).array()))}, {}
    yield "without x", without(small(), "x"), {"normalize": "agents"}
    yield "gathered", gathered(), {}
    yield "gathered, one scale", gathered() | {"x_scale": number(0.01, kind=np.float32)}, {"normalize": "agents"}
    for name in ("float16", "bfloat16"):
        yield name, halved(name), {"normalize": "agents"}


def route_cases() -> Iterator[Case]:
    long = usual(4500, 3, 9, 6, 5, offsets_of(0, 4400, 4400, 4500)) | {
        "count": number(8, 9, 5, kind=np.int32),
        "temperature": number(0.3, 0.5, 1, 2, 0.3, 0, 0.7, 0.2, 1, kind=np.float32),  # agent 5 is absent
    }
    means, tau = {"mean_x": True}, number(3, kind=np.float32)
    for normalize in OPTIONS["normalize"]:
        mode = {"normalize": normalize}
        yield route_case(f"long {normalize}", long, mode)
        yield route_case(f"long {normalize} mean_x", long, mode | means)
        yield route_case(f"long {normalize} mean_x alone", without(long, "v"), mode | means)
        tails = usual(130, 2, 21, 35, 19, offsets_of(0, 113, 130)) | {"temperature": tau}
        for precision in OPTIONS["precision"]:
            options = mode | {"precision": precision}
            yield route_case(f"tails {normalize} {precision}", tails, options, 9)
            yield route_case(f"tails {normalize} {precision} mean_x", tails, options | means, 9)
        few = usual(4500, 3, 21, 20, 5, offsets_of(0, 4400, 4400, 4500)) | {"temperature": tau}
        for k in (1, 4):
            yield route_case(f"sparse {k} {normalize}", few, mode | means | {"sparse": k}, 3)
        # logits that rise within a tile, so that sums made before are scaled down
        rising = usual(300, 1, 5, 6, 5, offsets_of(0, 300)) | {"temperature": number(0.3, kind=np.float32)}
        rising["bias"] = Uniform(415, (300,), {i: -9.0 - 30.0 * (i < 100) for i in range(200)})
        yield route_case(f"rising {normalize}", rising, mode | means)
        # of the AMX unit: without bounds of its own; bfloat16 has inputs that are bfloat16's
        for exact in (False, True):
            inputs = {
                "x": Uniform(430, (2300, 70), bfloat16=not exact),
                "v": Uniform(431, (2300, 9)),
                "bias": Uniform(432, (2300,)),
                "prototypes": Uniform(433, (3, 33, 70), bfloat16=not exact),
                "temperature": tau,
                **offsets_of(0, 2100, 2100, 2300),
            }
            options = mode | {"precision": "float32" if exact else "bfloat16"}
            _, records = route_case("", inputs, options | means, 5)
            records["mean_x"].stride = 23
            yield f"amx/{normalize} {options['precision']}", records
    for name, records, options in odd_inputs():
        yield route_case(name, records, options)
        yield route_case(f"{name}, mean_x", records, options | means)
    unread = {"tokens": False}  # v is given, and decides who is absent
    yield route_case("no tokens", gathered(), unread | means)
    yield route_case("lse alone", gathered(), unread)
    yield route_case("lse alone, without v", without(small(), "v"), {})


def missing_cases() -> Iterator[Case]:
    odd = {0: NAN, 50 * 5 + 4: INF, 20 * 5: -INF, 1 * 5 + 2: NAN}  # of rows 0, 50 and 1, which are absent, and of 20
    problems = [(name, records) for name, records, _ in odd_inputs()]
    problems.append(("odd values", small() | {"v": Uniform(411, (60, 5), odd)}))
    problems.append(("without codes", without(small(), "codes", "book")))
    problems.append(("long", usual(4500, 3, 1, 6, 5, offsets_of(0, 4400, 4400, 4500))))
    for name, records in problems:
        given = without(records, "prototypes", "temperature")
        found = reference.missing(histories_of(given), book=built(given) if "codes" in given else None)
        yield f"missing/{name}", given | {"missing": Integers(np.isfinite(found).astype(np.int32))}


# ------------------------------------------------------------------------------------------- leaf sums and gradients


def leaf_problems() -> Iterator[tuple[str, dict[str, Any]]]:
    rows, width, wide = 9100, 7, 5
    records = usual(rows, 3, 1, width, wide, offsets_of(0, 9000, 9000, 9100))
    records["bias"] = Uniform(440, (rows,), {i: INF for i in range(1, rows, 370)}, 3.0)
    records["spread"] = Uniform(441, (rows,), {i: -1.0 for i in range(3, rows, 911)}, 1.0)
    records["weights"] = Whole(442, (rows,), {}, 30)
    floats, few = {"weights": Uniform(443, (60,), {4: NAN})}, {"weights": Whole(444, (60,), {}, 8)}
    problems = (("long", records), ("gathered", gathered()), ("without x", without(small(), "x") | floats))
    problems += (("float16", halved("float16")), ("without v", without(small(), "v") | few))
    problems += tuple((f"voters{kind}", voters(weights)) for kind, weights in (("", {}), (" f", floats), (" i", few)))
    for name, given in problems:
        yield name, without(given, "prototypes", "temperature")


def voters(weights: dict[str, Any]) -> dict[str, Any]:
    """Some leaves have votes and no present behaviour, for every reason there is; the last user has only such ones.
    With weights, one leaf has neither."""
    records = gathered()
    codes, ids = records["codes"].array(), records["x_ids"].array()
    first, second = codes[np.clip(ids, 0, 24)].T
    bias, spread, v_ids = records["bias"].array(), np.abs(Uniform(425, (60,)).array()), records["v_ids"].array().copy()
    scale = records["x_scale"].array().copy()
    bias[(first == 2) & (second > 0)] = NAN
    bias[50:] = -INF
    spread[(first == 0) & (second == 1)] = -1
    v_ids[(first == 1) & (second == 1)] = -1
    scale[(codes == 0).all(1)] = INF
    fields = {"bias": bias, "spread": spread, "v_ids": v_ids, "x_scale": scale}
    for name, record in weights.items():
        fields[name] = np.where((first == 1) & (second == 1), 0, record.array())
    of_users = {"starts": number(0, 30, 10, 50), "ends": number(30, 30, 60, 60)}
    return records | of_users | {name: Stored(a) for name, a in fields.items()}


def leaf_sums_cases() -> Iterator[Case]:
    for name, given in leaf_problems():
        args = {"book": built(given), "histories": histories_of(given)}
        found, limit = reference.leaf_sums(**args), bounds.leaf_sums_bound(args)
        sums = {f"sum {f}": Floats(getattr(found, f), getattr(limit, f)) for f in SUMS if f != "v" or "v" in given}
        integers = {f"sum {f}": Integers(getattr(found, f)) for f in ("offsets", "codes", "weights")}
        yield f"leaf_sums/{name}", given | sums | integers


def leaf_backward_cases() -> Iterator[Case]:
    every = {name: SUMS for name, _ in leaf_problems()}
    for name, given in leaf_problems():
        if "v" not in given:
            continue
        args = {"book": built(given), "histories": histories_of(given)}
        found = reference.leaf_sums(**args)
        sums = {f: np.float32(getattr(found, f)) for f in SUMS} | {"codes": found.codes, "offsets": found.offsets}
        for some in (every[name],) if name == "long" else (every[name], ("v",), ("bias", "spread"), ("x",)):
            wanted = {f: Uniform(460 + i, sums[f].shape) for i, f in enumerate(SUMS) if f in some}
            gradients = Histories(**{f: r.array() for f, r in wanted.items()})
            all_args = args | {"sums": Histories(**sums), "gradients": gradients}
            exact, limit = reference.leaf_sums_backward(**all_args), bounds.leaf_sums_backward_bound(all_args)
            stride = 97 if name == "long" else 7
            expected = {f"grad {f}": Floats(getattr(exact, f), getattr(limit, f), stride=stride) for f in ("v", "bias")}
            stored = {f"sum {f}": Stored(a) for f, a in sums.items()} | {f"d_{f}": r for f, r in wanted.items()}
            yield f"leaf_sums_backward/{name}, of {' '.join(some)}", given | stored | expected


RETURNED = {"tokens": 450, "lse": 451, "mean_x": 452}  # by route, and the seeds of their gradients


def backward_case(
    name: str, records: dict[str, Any], options: dict[str, Any], stride: int, of: tuple[str, ...] = ("tokens", "lse"),
    listed: tuple[str, ...] = (),
) -> Case:  # fmt: skip
    """of: what has a gradient. listed: the tables of which only some rows have."""
    args = route_args(records, options)
    records = records | sparse_records(args)
    forward = reference.route(**args, mean_x="mean_x" in of)
    kind = type_of(records)

    def in_type(a: Any) -> Any:
        if kind == "bfloat16":
            return Stored((to_bfloat16(a).view(np.uint32) >> np.uint32(16)).astype(np.uint16))
        return Stored(np.asarray(a, kind))

    given = {f: Stored(a.astype(np.float32)) for f, a in forward._asdict().items() if a is not None}
    given |= {f"d_{f}": Uniform(RETURNED[f], given[f].array().shape) for f in of}
    for f in ("tokens", "d_tokens"):
        if f in given:
            given[f] = in_type(given[f].array() if f == "d_tokens" else forward.tokens)
    lacks = {"x"} if "mean_x" in of or "x" not in records else set()
    lacks |= set() if "v" in records else {"v"}
    need = [f for f in ("v", "temperature", "bias", "spread", "x", "prototypes") if f not in lacks]
    arrays = {f: as_numpy(record) for f, record in given.items()}
    args["forward"] = Tokens(*(arrays.get(f) for f in Tokens._fields))
    args["gradients"] = Tokens(*(arrays.get(f"d_{f}") for f in Tokens._fields))
    args["need"] = tuple(need)
    for f in listed:
        given[f"{f}_rows"] = Stored(np.array([7, 0, 3, 7, -1, 19, 25, 1, 2**40]))
        args[f"{f}_rows"] = given[f"{f}_rows"].array()
    found = reference.route_backward(**args)
    limits = bounded(bounds.route_backward_bound, args, fields=need)
    expected = {
        f"grad {f}": Floats(getattr(found, f), *limit, stride=stride if f in ("v", "x", "bias", "spread") else 1)
        for f, limit in zip(need, limits, strict=True)
    }
    return f"route_backward/{name}", records | {"options": options_record(options), **given, **expected}


def backward_cases() -> Iterator[Case]:
    every = tuple(RETURNED)
    for normalize in OPTIONS["normalize"]:
        mode = {"normalize": normalize}
        each = small() | {"temperature": number(0.5, 0.6, 0.7, 0.8, kind=np.float32)}
        for some in (every[:2], every, ("mean_x",), ("tokens",), ("lse",)):
            yield backward_case(f"each tau {normalize}, of {' '.join(some)}", each, mode, 7, some)
        yield backward_case(f"one tau {normalize}", small(), mode, 7)
        yield backward_case(f"without v {normalize}", without(small(), "v"), mode, 7, every[1:])
        long = usual(2400, 2, 5, 6, 5, offsets_of(0, 2300, 2400)) | {"temperature": number(0.9, kind=np.float32)}
        tails = usual(50, 1, 17, 35, 19, offsets_of(0, 50)) | {"temperature": number(3, kind=np.float32)}
        few = usual(2400, 2, 21, 6, 5, offsets_of(0, 2300, 2400)) | {"temperature": number(3, kind=np.float32)}
        for some in (every[:2], every):
            yield backward_case(f"long {normalize}, of {' '.join(some)}", long, mode, 97, some)
            yield backward_case(f"sparse {normalize}, of {' '.join(some)}", few, mode | {"sparse": 2}, 97, some)
            yield backward_case(f"tails {normalize}, of {' '.join(some)}", tails, mode, 7, some)
    for name, records, options in odd_inputs():
        yield backward_case(name, records, options, 7)
        yield backward_case(f"{name}, of mean_x too", records, options, 7, every)
        if "x_ids" in records:
            yield backward_case(f"{name}, of listed rows", records, options, 1, listed=("x", "v"))


def cases() -> Iterator[Case]:
    yield from encode_cases()
    yield from vote_cases()
    yield from route_cases()
    yield from missing_cases()
    yield from leaf_sums_cases()
    yield from leaf_backward_cases()
    yield from backward_cases()
    yield from attend_cases()
    yield from match_cases()
    yield from state_cases()
