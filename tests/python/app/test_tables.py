# SPDX-License-Identifier: Apache-2.0
"""`compress` takes the tables that people have: events, lists, item tables, strings, .csv, int8. The same batch gives
the same output, bit for bit, whatever it is written in. Codes name their codebook."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hisac
from cli_support import done, refused, run
from hisac.app import commands, files
from hisac.app.cli import main

pa = pytest.importorskip("pyarrow")
csv = pytest.importorskip("pyarrow.csv")
pq = pytest.importorskip("pyarrow.parquet")

SIZES, USERS = (40, 1, 30, 19), (7, 3, 11, 2)
ITEMS, WIDTH = 60, 4
BUDGET = ("--budget", "6", "--normalize", "agents")


def compress(capsys, out, *options, budget=BUDGET):
    """What `compress` prints on the standard output."""
    return done(capsys, "compress", "book.safetensors", *options, *budget, "-o", out)


def data(path):
    with open(path, "rb") as f:
        return f.read()


def lists(values, sizes, kind=None):
    """An Arrow array of lists of these sizes."""
    return pa.ListArray.from_arrays(pa.array(np.r_[0, np.cumsum(sizes)], pa.int32()), pa.array(values, kind))


def matrix(x):
    return pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every kind of table of one batch: 4 users, 90 behaviours of 60 items."""
    here = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ITEMS, WIDTH)).astype(np.float32)
    v = rng.normal(size=(ITEMS, 3)).astype(np.float32)
    of = rng.integers(0, ITEMS, sum(SIZES))
    ids, shuffled = 7 * np.arange(ITEMS) + 3, rng.permutation(ITEMS)
    names, users = np.array([f"item-{i}" for i in ids]), np.repeat(USERS, SIZES)
    hisac.Codebook.fit(x, (5, 4), iterations=3).save(here / "book.safetensors")
    arrays = {"x": x[of], "v": v[of], "table": x, "values": v, "user": users, "row": of}
    arrays |= {"names": names[of], "table_names": names, "padded": of[:80].reshape(4, 20)}
    for name, array in arrays.items():
        np.save(here / f"{name}.npy", array)
    text, word = pa.array(users.astype(str)), pa.array(names[of])
    events = {"user": users, "name": text, "item": ids[of], "word": word, "x": matrix(x[of]), "v": matrix(v[of])}
    events |= {
        "kind": word.dictionary_encode(),
        "large": word.cast(pa.large_string()),
        "small": (7 * of + 3).astype("u2"),
    }
    pq.write_table(pa.table(events), here / "events.parquet", row_group_size=33)
    csv.write_csv(pa.table({name: events[name] for name in ("user", "item", "word")}), here / "events.csv")
    columns = {"id": ids, "name": names, "x": matrix(x), "list": lists(x.ravel(), [WIDTH] * ITEMS), "v": matrix(v)}
    columns |= {f"e{d}": x[:, d] for d in range(WIDTH)} | {"double": matrix(x.astype(np.float64))}
    items = pa.table(columns)
    pq.write_table(items, here / "items.parquet")
    pq.write_table(items.take(shuffled), here / "shuffled.parquet")
    csv.write_csv(items.select(["id", "name", *(f"e{d}" for d in range(WIDTH))]), here / "items.csv")
    of_users = {"user": np.array(USERS), "name": [str(u) for u in USERS], "items": lists(ids[of], SIZES)}
    of_users |= {"words": lists(names[of], SIZES), "large": lists(names[of], SIZES).cast(pa.large_list(pa.string()))}
    pq.write_table(pa.table(of_users), here / "users.parquet", row_group_size=3)
    return here


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


TABLE = ("--x", "items.parquet:x", "--x-item", "items.parquet:id")
NAMED = ("--x", "items.parquet:x", "--x-item", "items.parquet:name")
USER = ("--user", "events.parquet:user", "--item")
EVENTS = (*USER, "events.parquet:item")
LISTS = ("--user", "users.parquet:user", "--item", "users.parquet:items")
CSV = ("--user", "events.csv:user", "--item")
WAYS = {
    "embeddings in events": ("--x", "events.parquet:x", *USER[:2]),
    "events and items": (*TABLE, *EVENTS),
    "shuffled items": ("--x", "shuffled.parquet:x", "--x-item", "shuffled.parquet:id", *EVENTS),
    "lists of floats": ("--x", "items.parquet:list", *TABLE[2:], *EVENTS),
    "columns of floats": ("--x", "items.parquet:e*", *TABLE[2:], *EVENTS),
    "doubles": ("--x", "items.parquet:double", *TABLE[2:], *EVENTS),
    "uint16": (*TABLE, *USER, "events.parquet:small"),
    "strings": (*NAMED, *USER, "events.parquet:word"),
    "categories": (*NAMED, *USER, "events.parquet:kind"),
    "large strings": (*NAMED, *USER, "events.parquet:large"),
    "csv": ("--x", "items.csv:e*", "--x-item", "items.csv:id", *CSV, "events.csv:item"),
    "csv, strings": ("--x", "items.csv:e0,e1,e2,e3", "--x-item", "items.csv:name", *CSV, "events.csv:word"),
    "csv and parquet": (*TABLE, *CSV, "events.csv:item"),
    "row numbers": ("--x", "table.npy", "--user", "user.npy", "--item", "row.npy"),
    "NumPy's strings": ("--x", "table.npy", "--x-item", "table_names.npy", "--user", "user.npy", "--item", "names.npy"),
    "lists": (*TABLE, *LISTS),
    "lists of strings": (*NAMED, *LISTS[:3], "users.parquet:words"),
    "large lists": ("--x", "items.parquet:x", "--x-item", "table_names.npy", *LISTS[:3], "users.parquet:large"),
}


@pytest.fixture(scope="module")
def wanted(folder):
    """The output of arrays with a row for each behaviour."""
    place = os.getcwd()
    os.chdir(folder)
    try:
        options = ("--x", "x.npy", "--user", "user.npy", *BUDGET, "-o", "wanted.safetensors")
        assert main(["compress", "book.safetensors", *options]) == 0
        return data("wanted.safetensors")
    finally:
        os.chdir(place)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [7, 2**14])
def test_every_way_gives_the_same_file(here, wanted, capsys, monkeypatch, way, batch):
    for name in ("BATCH", "LOOSE"):
        monkeypatch.setattr(files, name, batch)
    monkeypatch.setattr(commands, "ROWS", 25 if batch == 7 else 2**16)
    said = compress(capsys, "found.safetensors", *WAYS[way])
    assert said.startswith("found.safetensors: tokens [4, 6, 4] float32 of 90 behaviours; ") and said.count("\n") == 1
    assert data("found.safetensors") == wanted


VALUES = [
    (*TABLE, "--v", "items.parquet:v", *EVENTS),  # a row for each of x
    (*TABLE, "--v", "shuffled.parquet:v", "--v-item", "shuffled.parquet:id", *EVENTS),  # by its own items
    (*TABLE, "--v", "events.parquet:v", *EVENTS),  # a row for each behaviour
    ("--x", "table.npy", "--v", "values.npy", "--user", "user.npy", "--item", "row.npy"),
    (*TABLE, "--v", "items.parquet:v", *LISTS),
]


@pytest.mark.parametrize("options", VALUES)
def test_values_of_items_and_of_behaviours(here, capsys, options):
    compress(capsys, "wanted-v.safetensors", "--x", "x.npy", "--v", "v.npy", "--user", "user.npy")
    compress(capsys, "found.safetensors", *options)
    assert data("found.safetensors") == data("wanted-v.safetensors")


def test_a_table_is_encoded_once_and_its_codes_may_be_kept(here, wanted, capsys, monkeypatch):
    seen = []
    encode = commands.encode_rows
    monkeypatch.setattr(commands, "encode_rows", lambda book, x: seen.append(len(x)) or encode(book, x))
    compress(capsys, "found.safetensors", *TABLE, *EVENTS)
    assert seen == [ITEMS]
    for kept in ("codes.npz", "codes.safetensors"):
        assert run(capsys, "encode", "book.safetensors", "items.parquet:x", "-o", kept)[0] == 0
        seen.clear()
        for spec in (kept, f"{kept}:codes"):
            compress(capsys, "found.safetensors", *TABLE, *EVENTS, "--codes", spec)
            assert data("found.safetensors") == wanted and seen == []


# -------------------------------------------------------------------------------------------------------------- users


def test_users_are_written_as_they_came(here, wanted, capsys):
    compress(capsys, "names.npz", *TABLE, "--user", "events.parquet:name", "--item", "events.parquet:item")
    compress(capsys, "lists.npz", *TABLE, "--user", "users.parquet:name", "--item", "users.parquet:items")
    with np.load("names.npz") as found, np.load("lists.npz") as other:
        assert found["users"].dtype.kind == "U" and found["users"].tolist() == ["7", "3", "11", "2"]
        for name in found:
            np.testing.assert_array_equal(found[name], other[name])
            if name != "users":
                np.testing.assert_array_equal(found[name], files.read(f"wanted.safetensors:{name}"))
    assert files.read("wanted.safetensors:users").dtype == np.int64
    np.save("unsigned.npy", np.repeat(np.array([2**64 - 1, 2**63, 1, 0], np.uint64), SIZES))
    compress(capsys, "found.safetensors", *TABLE, "--user", "unsigned.npy", "--item", "events.parquet:item")
    assert files.read("found.safetensors:users").tolist() == [2**64 - 1, 2**63, 1, 0]


@pytest.mark.parametrize(
    ("texts", "users"),
    [
        (("7", "3", "11", "-2"), [7, 3, 11, -2]),
        (("007", "3", "11", "2"), ["007", "3", "11", "2"]),
        (("7", "3", "1e1", "u2"), ["7", "3", "1e1", "u2"]),
        (("18446744073709551615", "3", "11", "2"), [2**64 - 1, 3, 11, 2]),
        (("NA", "null", "\u00e9\u4e2d", '"a, b"'), ["NA", "null", "\u00e9\u4e2d", "a, b"]),
    ],
)
def test_users_in_csv_stay_what_they_are(here, capsys, texts, users):
    with open("u.csv", "w", encoding="utf-8") as f:
        f.write("\n".join(["row,who", *(f"{i},{t}" for i, t in zip(range(90), np.repeat(texts, SIZES), strict=True))]))
    compress(capsys, "u.npz", *TABLE, "--user", "u.csv:who", "--item", "events.parquet:item")
    with np.load("u.npz") as found:
        assert found["users"].tolist() == users


def test_lists_without_users_are_numbered_and_may_be_empty(here, capsys):
    sizes = (0, 50, 0, 40, 0)
    rows = np.load("row.npy")
    pq.write_table(pa.table({"items": lists(7 * rows + 3, sizes), "who": list("edcba")}), "gaps.parquet")
    np.save("offsets.npy", np.r_[0, np.cumsum(sizes)])
    compress(capsys, "found.safetensors", *TABLE, "--item", "gaps.parquet:items")
    compress(capsys, "wanted-gaps.safetensors", "--x", "x.npy", "--offsets", "offsets.npy")
    assert data("found.safetensors") == data("wanted-gaps.safetensors")
    compress(capsys, "gaps.npz", *TABLE, "--item", "gaps.parquet:items", "--user", "gaps.parquet:who")
    with np.load("gaps.npz") as found:
        assert found["users"].tolist() == list("edcba") and found["count"].tolist()[::2] == [0, 0, 0]
        assert (found["tokens"][::2] == 0).all() and (found["lse"][::2] == -np.inf).all()


def test_a_matrix_of_row_numbers_is_lists_and_minus_one_pads_it(here, capsys):
    padded = np.load("padded.npy")
    compress(capsys, "whole.safetensors", "--x", "table.npy", "--item", "padded.npy")
    np.save("wide.npy", np.pad(padded, ((0, 0), (0, 5)), constant_values=-1))
    said = compress(capsys, "wide.safetensors", "--x", "table.npy", "--item", "wide.npy")
    assert said.startswith("wide.npy: 20 behaviours of 1 items without a row of x\n")
    assert data("wide.safetensors") == data("whole.safetensors")


# --------------------------------------------------------------------------------------------------------------- items


def test_items_without_a_row_are_left_out_and_counted(here, capsys):
    events = pq.read_table("events.parquet").to_pydict()
    known = [i % 3 > 0 for i in range(90)]
    other = [item if k else -item for item, k in zip(events["item"], known, strict=True)]
    words = [word if k else f"no {word}" for word, k in zip(events["word"], known, strict=True)]
    some = {name: [a for a, k in zip(events[name], known, strict=True) if k] for name in ("user", "item")}
    pq.write_table(pa.table({"user": events["user"], "item": other, "word": words}), "odd.parquet")
    pq.write_table(pa.table(some), "some.parquet")
    compress(capsys, "some.safetensors", *TABLE, "--user", "some.parquet:user", "--item", "some.parquet:item")
    lost = len({item for item, k in zip(events["item"], known, strict=True) if not k})
    for column, ids in (("item", "id"), ("word", "name")):
        table = ("--x", "items.parquet:x", "--x-item", f"items.parquet:{ids}")
        said = compress(
            capsys, "odd.safetensors", *table, "--user", "odd.parquet:user", "--item", f"odd.parquet:{column}"
        )
        assert said.startswith(
            f"odd.parquet:{column}: 30 behaviours of {lost} items without a row of x\nodd.safetensors: "
        )
        for name in ("tokens", "lse", "votes", "count", "users"):
            found, wanted = (files.read(f"{path}.safetensors:{name}") for path in ("odd", "some"))
            np.testing.assert_array_equal(found, wanted, err_msg=name)


def test_values_without_a_row_vote_only(here, capsys):
    pq.write_table(pq.read_table("items.parquet").slice(0, 30), "half.parquet")
    values = ("--v", "half.parquet:v", "--v-item", "half.parquet:id")
    said = compress(capsys, "half.safetensors", *TABLE, *values, *EVENTS)
    assert said.splitlines()[0].endswith(" items without a row of v")
    for name in ("votes", "count", "codes"):
        np.testing.assert_array_equal(files.read(f"half.safetensors:{name}"), files.read(f"wanted.safetensors:{name}"))


# ---------------------------------------------------------------------------------------------------------------- int8


@pytest.mark.parametrize("kind", ["number", "rows", "table"])
def test_int8_times_a_scale_is_its_floats(here, capsys, kind):
    rng = np.random.default_rng(2)
    x = rng.integers(-127, 128, (ITEMS, WIDTH)).astype(np.int8)
    scale = np.float32(0.013) if kind == "number" else rng.uniform(0.01, 0.02, ITEMS).astype(np.float32)
    np.save("int8.npy", x)
    np.save("scale.npy", scale)
    np.save("floats.npy", x * (scale if kind == "number" else scale[:, None]))
    pq.write_table(pa.table({"x": matrix(x), "scale": np.broadcast_to(scale, ITEMS)}), "int8.parquet")
    specs = {"number": ("int8.npy", "0.013"), "rows": ("int8.npy", "scale.npy")}
    spec, given = specs.get(kind, ("int8.parquet:x", "int8.parquet:scale"))
    more = ("--user", "user.npy", "--item", "row.npy", "--x")
    for name, options in (("a", ("floats.npy",)), ("b", (spec, "--scale", given))):
        assert run(capsys, "fit", *options, "--sizes", "4,3", "-o", f"{name}.safetensors")[0] == 0
        assert run(capsys, "encode", "book.safetensors", *options, "-o", f"{name}.npy")[0] == 0
        compress(capsys, f"{name}-tokens.safetensors", *more, *options)
    for one, other in (("a.safetensors", "b.safetensors"), ("a.npy", "b.npy")):
        assert data(one) == data(other)
    assert data("a-tokens.safetensors") == data("b-tokens.safetensors")
    code, out, _ = run(capsys, "inspect", "book.safetensors", "--x", spec, "--scale", given)
    assert code == 0 and f"{spec}: 60 rows\n" in out


# --------------------------------------------------------------------------------------------------------------- codes


def test_codes_of_another_codebook_are_refused_before_any_work(here, capsys, monkeypatch):
    book = hisac.Codebook.load("book.safetensors")
    hisac.Codebook.fit(np.load("x.npy"), (5, 4), iterations=1, seed=9).save("other.safetensors")
    other = hisac.Codebook.load("other.safetensors")
    for kept in ("theirs.npz", "theirs.safetensors"):
        assert run(capsys, "encode", "other.safetensors", "items.parquet:x", "-o", kept)[0] == 0
        options = ("compress", "book.safetensors", *TABLE, *EVENTS, *BUDGET, "--codes", kept, "-o", "t.npz")
        text = f"hisac compress: {kept}: fingerprint of the codes' codebook expected {book.fingerprint:016x}"
        for flag in ((), ("--unchecked-codes",)):
            assert refused(capsys, *options, *flag) == f"{text}, got {other.fingerprint:016x}"
    assert not os.path.exists("t.npz")


def test_codes_without_a_fingerprint_need_the_flag(here, wanted, capsys):
    book = hisac.Codebook.load("book.safetensors")
    codes = book.encode(np.load("table.npy"))
    np.save("plain.npy", codes)
    np.savez("plain.npz", codes=codes)
    pq.write_table(pa.table({"c0": codes[:, 0], "c1": codes[:, 1]}), "plain.parquet")
    for spec in ("plain.npy", "plain.npz", "plain.parquet"):
        options = (*TABLE, *EVENTS, "--codes", spec)
        text = refused(capsys, "compress", "book.safetensors", *options, *BUDGET, "-o", "t.npz")
        assert text == (
            f"hisac compress: {spec}: fingerprint of the codes' codebook expected {book.fingerprint:016x}, got none"
            " (`encode` writes it to .npz and .safetensors; or give --unchecked-codes)"
        )
        compress(capsys, "found.safetensors", *options, "--unchecked-codes")
        assert data("found.safetensors") == wanted


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            (*TABLE, *EVENTS[2:]),
            "expected one of --user, --offsets and an --item of lists, whose users --user may name",
        ),
        (
            (*TABLE, "--item", "users.parquet:items", "--offsets", "two.npy"),
            "expected one of --user, --offsets and an --item of lists, whose users --user may name",
        ),
        (("--x", "x.npy", "--x-item", "row.npy", *USER[:2]), "--x-item and --v-item need an --item"),
        (
            (*TABLE, *USER, "events.parquet"),
            "events.parquet: several arrays, none named; expected events.parquet:KEY with KEY one of item, kind, large,"
            " name, small, user, v, word and 1 more",
        ),
        (
            (*TABLE, *USER, "events.parquet:items"),
            "events.parquet: no array 'items'; expected events.parquet:KEY with KEY one of item, kind, large, name,"
            " small, user, v, word and 1 more",
        ),
        (
            (*TABLE, "--user", "users.parquet:items", *EVENTS[2:]),
            "users.parquet:items: user is lists, expected [rows]",
        ),
        (
            (*TABLE, "--user", "events.parquet:user", "--item", "users.parquet:items"),
            "events.parquet:user: 90 rows, expected 4, as there are behaviours or lists",
        ),
        (
            (*TABLE, "--user", "users.parquet:user", *EVENTS[2:]),
            "users.parquet:user: 4 rows, expected 90, as there are behaviours or lists",
        ),
        (
            (*TABLE, "--user", "twice.npy", "--item", "users.parquet:items"),
            "twice.npy: user 5 has several histories, expected one; sort rows by user",
        ),
        (
            (*TABLE, *USER, "events.parquet:word"),
            "events.parquet:word: expected items of x, such as 3, got none, but 'ITEM'",
        ),
        (
            ("--x", "items.parquet:x", *USER, "events.parquet:word"),
            "events.parquet:word: item is strings, expected integers, the rows of x, or --x-item",
        ),
        (
            ("--x", "items.parquet:x", *USER, "far.npy"),
            "far.npy: expected items of x, such as 0, got none, but 1000",
        ),
        (
            ("--x", "items.parquet:x", "--x-item", "twice-60.npy", *EVENTS),
            "twice-60.npy: item 5 has several rows, expected one",
        ),
        (("--x", "items.parquet:x", "--x-item", "user.npy", *EVENTS), "user.npy: 90 rows, expected 60, as x"),
        (
            (*TABLE, "--v", "items.parquet:v", "--v-item", "user.npy", *EVENTS),
            "user.npy: 90 rows, expected 60, as v",
        ),
        ((*TABLE, "--v", "narrow.npy", *EVENTS), "narrow.npy: v is [5, 3], expected 60 rows, as x"),
        (
            ("--x", "x.npy", "--v", "v.npy", "--item", "row.npy", "--user", "user.npy"),
            "v.npy: 90 rows, as x and as there are behaviours; name its items with --v-item",
        ),
        ((*TABLE, *USER, "events.parquet:v"), "events.parquet:v: item is float32, expected integers or strings"),
        (
            (*TABLE, *USER, "gone.parquet:item"),
            "gone.parquet: column 'item' of int64 has missing numbers or strings, expected none",
        ),
        (
            (*TABLE, "--user", "gone.csv:user", *EVENTS[2:]),
            "gone.csv: column 'user' of int64 has missing numbers or strings, expected none",
        ),
        (
            (*TABLE, *USER, "gone.parquet:lists"),
            "gone.parquet: column 'lists' has missing rows, expected a list in each",
        ),
        (
            (*TABLE, *USER, "gone.parquet:time"),
            "gone.parquet: column 'time' is timestamp[us], expected numbers or strings or lists of numbers or strings",
        ),
        ((*TABLE, "--scale", "0.1", *EVENTS), "items.parquet:x: x is float32, expected int8, as --scale is given"),
        (("--x", "int8-60.npy", *EVENTS), "int8-60.npy: x is int8, expected floats, or int8 X with --scale"),
        (("--x", "int8-60.npy", "--scale", "user.npy", *EVENTS), "user.npy: scale is int64, expected floats"),
        (("--x", "int8-60.npy", "--scale", "half.npy", *EVENTS), "half.npy: 7 rows, expected 60, as x"),
        (("--x", "int8-60.npy", "--scale", "none", *EVENTS), "could not convert string to float: 'none'"),
        (
            (*TABLE, "--user", "events.parquet:name", *EVENTS[2:]),
            "t.safetensors: users are strings, expected .npz",
        ),
    ],
)
def test_errors_are_one_line_before_any_work(here, capsys, monkeypatch, options, text):
    monkeypatch.setattr(commands, "encode_rows", None)  # calling it would be a TypeError
    np.save("two.npy", np.array([0, 90]))
    np.save("twice.npy", np.array([5, 6, 5, 7]))
    np.save("twice-60.npy", np.r_[5, np.arange(59)])
    np.save("far.npy", np.full(90, 1000))
    np.save("narrow.npy", np.zeros((5, 3), np.float32))
    np.save("int8-60.npy", np.zeros((60, 4), np.int8))
    np.save("half.npy", np.zeros(7, np.float16))
    gone = {"item": [None, *range(89)], "lists": [None, *[[1]] * 89], "time": pa.array([0] * 90, pa.timestamp("us"))}
    pq.write_table(pa.table(gone), "gone.parquet")
    csv.write_csv(pa.table({"user": [1] * 89 + [None], "row": range(90)}), "gone.csv")
    word = pq.read_table("events.parquet", columns=["word"])["word"][0].as_py()
    found = refused(capsys, "compress", "book.safetensors", *options, *BUDGET, "-o", "t.safetensors")
    assert found.replace(word, "ITEM") == f"hisac compress: {text}"
    assert not os.path.exists("t.safetensors")


# ------------------------------------------------------------------------------------------------------------ property


@settings(max_examples=30, deadline=None)
@given(
    histories=st.lists(st.lists(st.integers(0, 11), max_size=9), min_size=1, max_size=6),
    strings=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_batch_gives_the_same_file_in_every_way(tmp_path_factory, histories, strings, seed):
    """Items 10 and 11 are in no table; users without behaviours have a list, and no event."""
    here = tmp_path_factory.mktemp("batch")
    rng = np.random.default_rng(seed)
    histories = [[0, *histories[0]], *histories[1:]]  # one at least is known
    x = rng.normal(size=(10, 3)).astype(np.float32)
    of, sizes = np.concatenate(histories).astype(int), [len(h) for h in histories]
    name = (lambda i: f"n{99 - i}") if strings else (lambda i: int(1000 - 7 * i))
    order = rng.permutation(10)
    hisac.Codebook([x[:3], x[:2]], temperature=0.1).save(here / "book.safetensors")
    behaviours = {"offsets": np.r_[0, np.cumsum(sizes)], "x": np.vstack([x, np.full((2, 3), np.nan, "f4")])[of]}
    for key, array in behaviours.items():
        np.save(here / f"{key}.npy", array)
    pq.write_table(pa.table({"id": [name(i) for i in order], "x": matrix(x[order])}), here / "items.parquet")
    names = [name(i) for i in of]
    kind = pa.string() if strings else pa.int64()
    pq.write_table(pa.table({"items": lists(names, sizes, kind), "user": range(len(sizes))}), here / "users.parquet")
    events = pa.table({"user": np.repeat(np.arange(len(sizes)), sizes), "item": pa.array(names, kind)})
    pq.write_table(events, here / "events.parquet", row_group_size=5)
    csv.write_csv(events, here / "events.csv")

    def made(out, *options):
        """Every array of the output, as bytes."""
        paths = [f"{here}/{o}" if "." in o else o for o in options]
        assert main(["compress", f"{here}/book.safetensors", *paths, "--budget", "4", "-o", f"{here}/{out}.npz"]) == 0
        with np.load(here / f"{out}.npz") as f:
            return {key: f[key] for key in f}

    table = ("--x", "items.parquet:x", "--x-item", "items.parquet:id")
    wanted = made("arrays", "--x", "x.npy", "--offsets", "offsets.npy")
    there = np.array(sizes) > 0
    for found, rows in (
        (made("lists", *table, "--item", "users.parquet:items"), slice(None)),
        (made("users", *table, "--item", "users.parquet:items", "--user", "users.parquet:user"), slice(None)),
        (made("events", *table, "--item", "events.parquet:item", "--user", "events.parquet:user"), there),
        (made("csv", *table, "--item", "events.csv:item", "--user", "events.csv:user"), there),
    ):
        for key, array in wanted.items():
            array = array if key == "fingerprint" else array[rows]
            assert found[key].dtype == array.dtype and found[key].tobytes() == array.tobytes(), key
