# SPDX-License-Identifier: Apache-2.0
"""`hisac.bulk` gives the bits of `hisac.compress` on the whole, however batches come: dicts, and Arrow's by capsules
made by hand, so that its interface is met without pyarrow."""

import itertools
import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hisac
from bulk_support import (
    BOOK,
    CODES,
    IDS,
    KEYS,
    NAMES,
    RNG,
    Capsules,
    Streamed,
    V,
    X,
    bits,
    histories,
    listed,
    named,
    objects,
    same,
    saved,
    strings,
    viewed,
    whole,
)
from hisac import UserState, bulk, columns

# --------------------------------------------------------------------------------------------------------------- Arrow


@given(st.integers(0, 999), st.sampled_from(["+l", "+L"]), st.integers(0, 9), st.integers(0, 9), st.data())
def test_capsules(seed, code, offset, junk, data):
    """Lists and ids at any offset, with null lists above values, and null ids."""
    rows = histories(seed)
    here = np.array(data.draw(st.lists(st.booleans(), min_size=23, max_size=23)))
    flat = np.concatenate([np.full(junk, 7), *rows]).astype(np.int64)
    valid = np.random.default_rng(seed).random(len(flat)) < 0.9
    before = data.draw(st.integers(0, 9))
    ids = np.append(np.full(before, 5), np.where(valid, flat, 3))
    inner = ("l", len(ids), [bits(np.append(np.full(before, True), valid)), ids], {}, None, before)
    user = ("l", 23, [None, np.arange(23)], {}, None)
    batch = Capsules({"user": user, "items": listed(rows, code, here, inner, junk)}, offset=offset)
    made = bulk.Compress(BOOK, X, CODES, v=V, x_ids="items", budget=9)(batch)
    ends = np.cumsum([junk, *map(len, rows)])
    nulls = [np.where(valid[end : end + len(row)], row, -1) for row, end in zip(rows, ends, strict=False)]
    wanted = whole([row if there else row[:0] for row, there in zip(nulls, here, strict=True)][offset:])
    assert made["user"] == "the column user" and list(made) == ["user", "tokens", "log_share"]
    assert same(made["tokens"], wanted.tokens) and same(made["log_share"], wanted.log_share)


@pytest.mark.parametrize("kind", ["u", "U", "vu", "dictionary", "dictionary with nulls"])
def test_capsules_of_strings(kind):
    rows = histories(1)
    texts = [str(t) for row in named(rows, NAMES) for t in row]
    if kind in ("u", "U"):
        inner, wanted = strings(texts, kind), rows
    elif kind == "vu":
        inner = viewed(texts, lost=3)
        flat = np.concatenate(rows)
        flat[3] = -1
        wanted = np.split(flat, np.cumsum([len(row) for row in rows])[:-1])
    else:
        words = sorted(set(texts))
        index = np.array([words.index(t) for t in texts], np.uint8 if len(words) < 256 else np.int16)
        valid = np.arange(len(index)) % 5 > 0 if "nulls" in kind else np.ones(len(index), bool)
        code = {"uint8": "C", "int16": "s"}[str(index.dtype)]
        inner = (code, len(index), [bits(valid), np.where(valid, index, 255).astype(index.dtype)], {}, strings(words))
        ends = np.cumsum([0, *map(len, rows)])
        wanted = [np.where(valid[e : e + len(r)], r, -1) for r, e in zip(rows, ends, strict=False)]
    made = bulk.Compress(BOOK, X, CODES, v=V, ids=NAMES, x_ids="items", budget=9)(
        Capsules({"items": listed(rows, "+l", None, inner)})
    )
    assert same(made["tokens"], whole(wanted).tokens)


def test_capsules_of_one_length():
    rows = [RNG.integers(0, 300, 5) for _ in range(8)]
    inner = ("i", 40, [None, np.concatenate(rows).astype(np.int32)], {}, None)
    batch = Capsules({"items": ("+w:5", 8, [bits([1, 0, 1, 1, 1, 1, 1, 1])], {"item": inner}, None)}, offset=1)
    made = bulk.Compress(BOOK, X, CODES, v=V, x_ids="items", budget=9)(batch)
    assert same(made["tokens"], whole([rows[1][:0], *rows[2:]]).tokens)


@pytest.mark.parametrize("times", [0, 1, 3])
def test_capsules_in_a_stream(times):
    rows = histories(2)
    batch = Streamed({"items": listed(rows, "+l")}, stream=times)
    made = bulk.Compress(BOOK, X, CODES, v=V, x_ids="items", budget=9)(batch)
    assert same(made["tokens"], whole(rows * times).tokens)
    assert batch.released == 1 + times  # of the schema and each batch
    with pytest.raises(OSError, match="the Arrow stream failed: out of disk"):
        bulk.Compress(BOOK, X, CODES, v=V, x_ids="items", budget=9)(Streamed(batch.columns, fail=True))


def test_arrow_memory_is_read_in_place():
    rows = histories(3)
    column = listed(rows, "+l")
    seen = []
    kind = columns.Kind(lambda name, given: seen.append(given) or given, -1)
    with columns.lists_of(Capsules({"items": column}), [("items", kind)]) as (_, (values,), _):
        flat = column[3]["item"][2][1]
        assert np.shares_memory(values, flat) and np.shares_memory(seen[0], flat) and not values.flags.writeable


# -------------------------------------------------------------------------------------------------------------- dicts


OPTIONS = [{}, {"sparse": 3}, {"method": "leaf"}, {"missing": "token"}, {"normalize": "history"}]


@given(
    st.integers(0, 999),
    st.sampled_from(sorted(IDS)),
    st.lists(st.integers(0, 23)),
    st.sampled_from([1, 2]),
    st.sampled_from(OPTIONS),
)
def test_however_the_rows_are_cut(seed, kind, cuts, threads, options):
    rows, names = histories(seed), ("tokens", "log_share", "lse", "mean_x", "codes", "votes", "count")
    compress = bulk.Compress(
        BOOK, X, CODES, v=V, ids=IDS[kind], x_ids="items", output=names, threads=threads, budget=9, **options
    )
    wanted = whole(rows, mean_x=True, **options)
    lists, cuts = named(rows, IDS[kind]), [0, *sorted(cuts), 23]
    before = hisac.get_num_threads()
    parts = [
        pickle.loads(pickle.dumps(compress))({"user": np.arange(a, b), "items": objects(lists[a:b])})
        for a, b in itertools.pairwise(cuts)
    ]
    assert hisac.get_num_threads() == before
    for name in names:
        found = np.concatenate([part[name] for part in parts])
        whole_one = getattr(wanted, name, None) if name != "count" and hasattr(wanted, name) else None
        assert same(found, getattr(wanted.agents, name) if whole_one is None else whole_one), name
    assert np.array_equal(np.concatenate([part["user"] for part in parts]), np.arange(23))


@pytest.mark.parametrize("kind", sorted(IDS))
def test_lists_of_every_kind(kind):
    rows = [RNG.integers(0, 300, 6) for _ in range(4)]
    compress = bulk.Compress(BOOK, X, CODES, v=V, ids=IDS[kind], x_ids="items", budget=9)
    lists, wanted = named(rows, IDS[kind]), whole(rows).tokens
    for column in (
        np.stack(lists),
        objects(lists),
        lists,
        [row.tolist() for row in lists],
        objects(map_objects(lists)),
    ):
        assert same(compress({"items": column})["tokens"], wanted)
    gap = [lists[0], None, [], [None, *lists[3].tolist()], float("nan")]
    absent = whole([rows[0], rows[0][:0], rows[0][:0], np.append(-1, rows[3]), rows[0][:0]])
    made = compress({"items": gap})
    assert same(made["tokens"], absent.tokens) and same(made["log_share"], absent.log_share)
    assert not made["tokens"][1].any() and (made["log_share"][1] == -np.inf).all()
    for none in (objects([]), [], np.empty((0, 6), np.int64), np.empty(0)):
        assert compress({"items": none})["tokens"].shape == (0, 9, 4)


def map_objects(lists):
    return [row.astype(object) for row in lists]


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_ids_of_every_integer(dtype):
    rows = [RNG.integers(0, 100, 6).astype(dtype) for _ in range(4)]
    for ids in (None, np.arange(300), np.arange(300, dtype=np.uint64)):
        compress = bulk.Compress(BOOK, X, CODES, v=V, ids=ids, x_ids="items", budget=9)
        assert same(compress({"items": rows})["tokens"], whole(rows).tokens)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=60), st.data())
def test_the_rows_of_ids(ids, data):
    """Also of ids that all want one place."""
    ids = ids + [i * 2**40 for i in range(data.draw(st.integers(0, 40))) if i * 2**40 not in ids]
    some = st.sampled_from(ids) if ids else st.nothing()
    asked = data.draw(st.lists(some | st.integers(-(2**63), 2**63 - 1), max_size=50))
    found = bulk._index(np.array(ids, np.int64))("items", np.array(asked, np.int64))
    assert found.tolist() == [ids.index(i) if i in ids else -1 for i in asked]


def test_weights_and_biases():
    rows = histories(5)
    sizes = [len(row) for row in rows]
    weights = [RNG.random(n) for n in sizes]
    votes = [RNG.integers(0, 5, n) for n in sizes]
    bias = [RNG.normal(size=n).astype(np.float32) for n in sizes]
    compress = bulk.Compress(BOOK, X, CODES, v=V, x_ids="items", bias="decay", weights="w", budget=9)
    ids = np.concatenate(rows)
    batch = hisac.Histories(X, V, codes=CODES, x_ids=ids, v_ids=ids, lengths=sizes, bias=np.concatenate(bias))
    for given_weights, dtype in ((weights, np.float32), (votes, np.int64)):
        wanted = hisac.compress(BOOK, batch._replace(weights=np.concatenate(given_weights).astype(dtype)), budget=9)
        made = compress({"items": rows, "decay": bias, "w": given_weights})
        assert list(made) == ["tokens", "log_share"] and same(made["tokens"], wanted.tokens)
    nulls = compress({"items": [[3, 4, 5]], "decay": [[0.5, None, 1.0]], "w": [[None, 2, 1]]})
    few = hisac.Histories(
        X, V, [0, 3], CODES, np.array([3, 4, 5]), np.array([3, 4, 5]),
        bias=np.float32([0.5, np.nan, 1]), weights=np.int64([0, 2, 1]),
    )  # fmt: skip
    assert same(nulls["tokens"], hisac.compress(BOOK, few, budget=9).tokens)


def test_states():
    rows = histories(6)
    times = [np.sort(RNG.integers(0, 10**6, len(row))) for row in rows]
    dates = [np.array(t, "M8[s]").astype("M8[us]") for t in times]
    weights = [RNG.random(len(row)) for row in rows]
    kinds = {"leaves": 12, "ring": 5, "half_life": 3600, "model_tag": 7}
    compress = bulk.Compress(
        BOOK, X, CODES, v=V, x_ids="items", weights="w", times="t", output="state", dtype="bfloat16", **kinds
    )
    tables = hisac.Histories(X, V, codes=CODES)
    for given_times in (times, dates):
        made = compress({"items": rows, "w": weights, "t": given_times, "user": np.arange(23)})
        for row, w, t, found in zip(rows, weights, times, made["state"], strict=True):
            state = UserState(BOOK, width=4, **kinds)
            state.append(BOOK, tables, row, weights=w.astype(np.float32), times=t, model_tag=7)
            assert found == state.to_bytes("bfloat16")
    assert list(made) == ["user", "state"]
    lost = compress({"items": [[1, 2]], "w": [[1, 1]], "t": [[None, 5]]})["state"][0]
    assert UserState.from_bytes(lost).recent().ids.tolist() == [2]
    placed = bulk.Compress(BOOK, X, CODES, v=V, positions="p", output="state", leaves=12)
    assert UserState.from_bytes(placed({"x_ids": [[1, 2]], "p": [[8, 9]]})["state"][0]).position == 9


# -------------------------------------------------------------------------------------------------------------- tables


@pytest.fixture
def files(tmp_path):
    return saved(tmp_path)


def test_tables_of_files(files):
    rows = histories(7)
    paths = bulk.Compress(
        str(files / "book.safetensors"), files / "x.npy", files / "codes.npy", v=files / "v.npy", ids=files / "ids.npy",
        budget=9,
    )  # fmt: skip
    mapped = [np.load(files / f"{name}.npy", mmap_mode="r") for name in ("x", "codes", "v", "ids")]
    maps = bulk.Compress(BOOK, mapped[0], mapped[1], v=mapped[2], ids=mapped[3], budget=9)
    batch = {"x_ids": named(rows, KEYS)}
    for compress in (paths, maps):
        assert len(pickle.dumps(compress)) < 6_000
        again = pickle.loads(pickle.dumps(compress))
        assert same(again(batch)["tokens"], whole(rows).tokens) and len(pickle.dumps(again)) < 6_000
        assert pickle.loads(pickle.dumps(again)).opened() is again.opened()  # once a process
    part = bulk.Compress(BOOK, mapped[0][:200], mapped[1][:200], v=mapped[2][:200], ids=mapped[3][:200], budget=9)
    first = [np.where(row < 200, row, -1) for row in rows]
    assert same(pickle.loads(pickle.dumps(part))(batch)["tokens"], whole(first).tokens)


def test_a_file_that_changes_is_opened_again(files):
    np.save(files / "w.npy", V)
    compress = bulk.Compress(BOOK, files / "x.npy", files / "codes.npy", v=files / "w.npy", budget=9)
    before = compress({"x_ids": [[1, 2]]})["tokens"]
    np.save(files / "new.npy", 2 * V)
    os.replace(files / "new.npy", files / "w.npy")
    assert same(pickle.loads(pickle.dumps(compress))({"x_ids": [[1, 2]]})["tokens"], 2 * before)


@pytest.mark.parametrize("ids", [KEYS, NAMES])
def test_a_bundle(tmp_path, ids):
    bundle = hisac.Bundle.create(tmp_path / "bundle", BOOK, ids[:250], X[:250])
    bundle.append(ids[250:], X[250:])
    rows = histories(8)
    wanted = hisac.compress(BOOK, hisac.Histories(
        X, X, codes=CODES, x_ids=np.concatenate(rows), v_ids=np.concatenate(rows), lengths=[len(r) for r in rows]
    ), budget=9)  # fmt: skip
    for given_book in (bundle, tmp_path / "bundle", str(tmp_path / "bundle")):
        compress = pickle.loads(pickle.dumps(bulk.Compress(given_book, budget=9)))
        assert same(compress({"x_ids": named(rows, ids)})["tokens"], wanted.tokens)


def test_codes_are_made_and_x_may_be_left_out():
    rows = histories(9)
    assert same(bulk.Compress(BOOK, X, v=V, budget=9)({"x_ids": rows})["tokens"], whole(rows).tokens)
    ids = np.concatenate(rows)
    bare = hisac.Histories(None, V, codes=CODES, x_ids=ids, v_ids=ids, lengths=[len(r) for r in rows])
    made = bulk.Compress(BOOK, None, CODES, v=V, budget=9)({"x_ids": rows})
    assert same(made["tokens"], hisac.compress(BOOK, bare, budget=9).tokens)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (
            {"output": "token"},
            ValueError,
            "output expected some of tokens, log_share, lse, mean_x, codes, votes, count,",
        ),
        ({"output": ("tokens", "state")}, ValueError, "or state alone"),
        ({"output": ()}, ValueError, "output expected"),
        ({"bugdet": 3}, TypeError, "expected options beam, budget, fanout, .*, got bugdet"),
        ({"agents": 3}, TypeError, "got agents"),
        ({"times": "t"}, TypeError, "times expected None beside an output of tokens, log_share"),
        ({"output": "state", "bias": "b"}, TypeError, "bias expected None beside an output of state"),
        ({"output": "state", "width": 3}, TypeError, "expected options dtype, half_life, leaves, .*, got width"),
    ],
)
def test_options_are_refused_at_once(change, kind, text):
    with pytest.raises(kind, match=f"^Compress: .*{text}"):
        bulk.Compress(BOOK, X, CODES, **change)


@pytest.mark.parametrize(
    ("change", "batch", "kind", "text"),
    [
        ({}, {"items": [[1]], "user": [1]}, ValueError, "a batch expected with a column x_ids, got items, user"),
        ({"weights": "w"}, {"x_ids": [[1, 2], [3]], "w": [[1, 2], []]}, ValueError,
         "lists of w expected of length 1 in row 1, as x_ids, got 0"),
        ({}, {"x_ids": [[1]], "tokens": [1]}, ValueError, "a batch expected without a column tokens, which is made"),
        ({}, {"x_ids": [1, 2]}, TypeError, "column x_ids expected lists, got 1"),
        ({}, {"x_ids": [["a"]]}, TypeError, "column x_ids expected lists of integers, got strings"),
        ({}, {"x_ids": [np.array([1, np.nan])]}, TypeError, r"expected lists of integers, got float64 \(of nulls in"),
        ({"ids": NAMES}, {"x_ids": [[1]]}, TypeError, "expected lists of strings, as ids are, got int64"),
        ({"ids": KEYS}, {"x_ids": [["1"]]}, TypeError, "expected lists of integers, got strings"),
        ({"bias": "b"}, {"x_ids": [[1]], "b": [["1"]]}, TypeError, "column b expected lists of numbers, got strings"),
        ({}, [[1]], TypeError, "a batch expected as a dict of arrays or Arrow's, got list"),
        ({}, Capsules({"x_ids": strings(["a"])}), TypeError,
         "expected list, large_list or fixed_size_list, got Arrow's 'u'"),
        ({}, Capsules({"x_ids": listed([[1]], "+l", None, ("tDs", 1, [None, np.zeros(1)], {}, None))}), TypeError,
         "expected lists of numbers or strings, got Arrow's 'tDs': cast it"),
        ({"ids": KEYS[:5]}, {"x_ids": []}, ValueError, "ids expected of 300 rows, as codes, got 5"),
        ({"v": V[:5]}, {"x_ids": []}, ValueError, "v expected of 300 rows, as codes, got 5"),
        ({"ids": KEYS.astype(float)}, {"x_ids": []}, ValueError, r"integers or strings .*, got float64 \[300\]"),
        ({"ids": np.append(KEYS[1], KEYS[1:])}, {"x_ids": []}, ValueError, "once each, got -?[0-9]+ again"),
        ({"ids": np.append(NAMES[1], NAMES[1:])}, {"x_ids": []}, ValueError, "once each, got 'item-1' again"),
        ({"budget": 0}, {"x_ids": []}, ValueError, "budget expected 1 to 4096, got 0"),
    ],
)  # fmt: skip
def test_batches_are_refused(change, batch, kind, text):
    compress = bulk.Compress(BOOK, X, CODES, **{"budget": 9, **change})
    threads = hisac.get_num_threads()
    with pytest.raises(kind, match=text):
        compress(batch)
    assert hisac.get_num_threads() == threads
