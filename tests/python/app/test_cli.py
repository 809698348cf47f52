# SPDX-License-Identifier: Apache-2.0
"""`python -m hisac`: the subcommands end to end on tiny files, every error in one line with exit code 2."""

import os
import subprocess
import sys

import numpy as np
import pytest

import hisac
from cli_support import done, refused, run
from hisac import reference
from hisac.app import commands, files
from hisac.progress import fit_progress, progress

WIDTH = 4


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with items.npy, events.npy (5 users, one without events), users.npy and offsets.npy."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    items = rng.normal(size=(60, WIDTH)).astype(np.float32)
    sizes = (40, 1, 0, 30, 19)
    np.save("items.npy", items)
    np.save("events.npy", items[rng.integers(0, 60, sum(sizes))])
    np.save("offsets.npy", np.concatenate([[0], np.cumsum(sizes)]))
    np.save("users.npy", np.repeat([7, 3, 5, 11, 2], sizes))
    return tmp_path


@pytest.fixture
def book(here, capsys):
    done(capsys, "fit", "items.npy", "--sizes", "5,4", "-o", "book.safetensors", "--iterations", "5")
    return hisac.Codebook.load("book.safetensors")


# -------------------------------------------------------------------------------------------------------- subcommands


def test_fit_is_the_verb(here, capsys):
    out = done(
        capsys, "fit", "items.npy", "--sizes", "5,4", "-o", "book.safetensors", "--iterations", "5", "--seed", "3"
    )
    wanted = hisac.fit(np.load("items.npy"), (5, 4), iterations=5, seed=3)
    found = hisac.Codebook.load("book.safetensors")
    for a, b in zip(found.centers, wanted.centers, strict=True):
        np.testing.assert_array_equal(a, b)
    assert out.startswith(
        "book.safetensors: 5 x 4 codes of width 4 from 60 rows\nmean squared error after each level: "
    )


def test_fit_tells_of_rows_left_out_and_of_unused_codes(here, capsys):
    x = np.repeat(np.eye(WIDTH, dtype=np.float32), 5, 0)
    x[0] = np.nan
    np.save("few.npy", x)
    out = done(capsys, "fit", "few.npy", "--sizes", "6", "-o", "book.safetensors")
    assert "from 19 rows (1 left out: NaN or too large)" in out
    assert "codes that no row has: 2; smaller --sizes would do" in out


def test_encode_is_the_verb(book, capsys):
    x = np.load("items.npy")
    x[3] = np.inf
    np.save("holes.npy", x)
    out = done(capsys, "encode", "book.safetensors", "holes.npy", "-o", "codes.npy")
    assert out == "codes.npy: codes [60, 2] int32, 1 rows of -1 (NaN or infinity)\n"
    np.testing.assert_array_equal(np.load("codes.npy"), book.encode(x))


@pytest.mark.parametrize("rule", [("--budget", "6"), ("--fanout", "3,2"), ("--beam", "3,6")])
@pytest.mark.parametrize("normalize", ["history", "agents"])
@pytest.mark.parametrize("sparse", [None, 1])
def test_compress_is_the_definition(book, capsys, rule, normalize, sparse):
    command = ("compress", "book.safetensors", "--x", "events.npy", *rule, "--normalize", normalize)
    command += ("--temperature", "0.5", *(() if sparse is None else ("--sparse", str(sparse))))
    out = done(capsys, *command, "--offsets", "offsets.npy", "-o", "tokens.npz")
    assert out.startswith("tokens.npz: tokens [5, 6, 4] float32 of 90 behaviours; agents a user: ")
    x, offsets = np.load("events.npy"), np.load("offsets.npy")
    options = {"--budget": {"budget": 6}, "--fanout": {"fanout": (3, 2)}, "--beam": {"beam": (3, 6)}}[rule[0]]
    histories = hisac.Histories(x, x, offsets, book.encode(x))
    agents = reference.vote(reference.Codebook(book.centers), histories, **options)
    exact = reference.Codebook(book.centers)
    routing = {"temperature": 0.5, "normalize": normalize, "book": exact, "sparse": sparse}
    wanted = reference.route(histories, agents, **routing)
    with np.load("tokens.npz") as f:
        np.testing.assert_array_equal(f["codes"], agents.codes)
        np.testing.assert_array_equal(f["votes"], agents.votes)
        np.testing.assert_array_equal(f["count"], agents.count)
        np.testing.assert_allclose(f["tokens"], wanted.tokens, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(f["lse"], wanted.lse, rtol=1e-4, atol=1e-4)
        routing.pop("book")
        share = reference.compress(exact, histories, **options, **routing).log_share
        np.testing.assert_allclose(f["log_share"], share, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(f["users"], np.arange(5))
        assert f["fingerprint"].tolist() == [book.fingerprint]


def test_compress_by_ids_by_codes_and_in_steps_agree(book, capsys, monkeypatch):
    command = ("compress", "book.safetensors", "--x", "events.npy", "--budget", "6")
    done(capsys, *command, "--offsets", "offsets.npy", "-o", "a.npz")
    done(capsys, "encode", "book.safetensors", "events.npy", "-o", "codes.npz")
    monkeypatch.setattr(commands, "ROWS", 25)
    done(capsys, *command, "--user", "users.npy", "--codes", "codes.npz", "-o", "b.safetensors")
    with np.load("a.npz") as a:
        assert files.read("b.safetensors:users").tolist() == [7, 3, 11, 2]  # the user without events has no id
        for name in ("tokens", "lse", "codes", "votes", "count"):
            np.testing.assert_array_equal(files.read(f"b.safetensors:{name}"), a[name][[0, 1, 3, 4]])


def test_compress_takes_values_of_another_width_and_type(book, capsys):
    v = np.random.default_rng(1).normal(size=(90, 7)).astype(np.float16)
    np.savez("v.npz", v=v, other=v)
    command = ("compress", "book.safetensors", "--x", "events.npy", "--v", "v.npz:v", "--budget", "3")
    out = done(capsys, *command, "--user", "users.npy", "-o", "tokens.npz")
    assert out.startswith("tokens.npz: tokens [4, 3, 7] float16 ")


def test_compress_takes_ids_of_any_byte_order(book, capsys):
    for name in ("users", "offsets"):
        np.save(f"{name}.npy", np.load(f"{name}.npy").astype(">i8"))
    command = ("compress", "book.safetensors", "--x", "events.npy", "--budget", "3", "-o", "tokens.safetensors")
    done(capsys, *command, "--user", "users.npy")
    assert files.read("tokens.safetensors:users").tolist() == [7, 3, 11, 2]
    done(capsys, *command, "--offsets", "offsets.npy")


def test_steps_cover_all_users_in_order():
    offsets = np.array([0, 0, 100_000, 100_001, 100_002, 300_000, 300_000])
    found = list(commands.steps(offsets))
    assert found == [(0, 1), (1, 2), (2, 4), (4, 5), (5, 6)]
    assert list(commands.steps(np.array([0]))) == []


def test_inspect_counts_what_is_there(here, capsys):
    centers = [np.array([[0.0], [10.0], [20.0], [20.0]]), np.array([[0.0], [1.0]])]
    hisac.Codebook([c.astype(np.float32) for c in centers]).save("line.safetensors")
    np.save("line.npy", np.array([[0.0], [0.0], [1.0], [10.5], [np.nan]], np.float32))
    out = done(capsys, "inspect", "line.safetensors", "--x", "line.npy").splitlines()
    assert out[0].startswith("line.safetensors: 2 levels, 4 x 2 codes, 8 leaves, width 1, fingerprint ")
    assert [line.split() for line in out[2:4]] == [["1", "4", "3", "12.5"], ["2", "2", "2", "0.5"]]
    assert out[5] == "line.npy: 5 rows, 1 absent (NaN or infinity)"
    # Level 1: codes 0, 0, 0, 1 (effective exp of their entropy); level 2: 0, 0, 1, 0 with 10.5 left .5 away.
    first, second = out[7].split(), out[8].split()
    effective = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    variance = np.var([0, 0, 1, 10.5])
    assert first == ["1", "2", "2", f"{effective:.1f}", f"{1.25 / 4:.4g}", f"{1.25 / 4 / variance:.1%}"]
    assert second == ["2", "2", "0", f"{effective:.1f}", f"{0.25 / 4:.4g}", f"{0.25 / 4 / variance:.1%}"]
    assert out[10] == "leaves in use: 3; rows a leaf: mean 1.3, median 1, most 2"
    assert out[11] == "collisions: 50.0% of the rows share their leaf; of the 3 distinct rows 0.0%"


def test_inspect_without_x_shows_the_codebook_alone(book, capsys):
    out = done(capsys, "inspect", "book.safetensors")
    assert len(out.splitlines()) == 4
    assert f"fingerprint {book.fingerprint:016x}" in out


def test_a_codebooks_life(book, capsys):
    """A refit from the old codebook, the map between both, and a bundle that new items come into."""
    items = np.load("items.npy")
    np.save("day.npy", np.concatenate([items, items[:6] + 0.01]))
    np.save("votes.npy", np.arange(66))
    out = done(
        capsys, "fit", "day.npy", "--init", "book.safetensors", "-o", "new.safetensors", "--weights", "votes.npy"
    )
    new = hisac.Codebook.load("new.safetensors")
    wanted = hisac.fit(np.load("day.npy"), init=book, weights=np.arange(66, dtype=np.float32))
    assert new == wanted and new.report == wanted.report
    assert f"moved after each level: {', '.join(map(str, wanted.moved.codes))} codes, " in out
    out = done(capsys, "migrate", "book.safetensors", "new.safetensors", "--x", "day.npy", "--votes", "votes.npy",
               "-o", "map.npz")  # fmt: skip
    found = hisac.migrate(book, new, np.load("day.npy"), votes=np.arange(66))
    with np.load("map.npz") as file:
        for name, array in {"leaves": found.leaves, "to": found.to, "codes_1": found.codes[1]}.items():
            np.testing.assert_array_equal(file[name], array)
        assert file["fingerprints"].tolist() == [book.fingerprint, new.fingerprint]
    assert f"of the votes, moved after each level: {found.moved_votes[0]:.2%}, {found.moved_votes[1]:.2%};" in out

    np.save("ids.npy", np.arange(60))
    np.save("more.npy", np.arange(60, 66))
    np.save("later.npy", items[:6] + 9)
    out = done(capsys, "bundle", "kept", "--x", "items.npy", "--item", "ids.npy", "--book", "book.safetensors")
    assert out == f"kept: 60 items, 60 of them new, of codebook {book.fingerprint:016x}\n"
    out = done(capsys, "bundle", "kept", "--x", "later.npy", "--item", "more.npy")
    assert out.startswith("kept: 66 items, 6 of them new,") and out.endswith("; a refit is due (fit --init)\n")
    assert hisac.Bundle("kept").codes[60:].tolist() == book.encode(items[:6] + 9).tolist()
    text = "Bundle: ids expected once each, got 60 again"
    assert refused(capsys, "bundle", "kept", "--x", "later.npy", "--item", "more.npy") == f"hisac bundle: {text}"


def test_inspect_warns(here, capsys):
    np.save("apart.npy", np.random.default_rng(0).normal(size=(90, WIDTH)).astype(np.float32))
    done(capsys, "fit", "apart.npy", "--sizes", "32,32", "-o", "book.safetensors")
    out = done(capsys, "inspect", "book.safetensors", "--x", "apart.npy")
    assert "\nwarning: " in out and "fit smaller sizes, such as 8 x 8 (hisac.sizes_for)" in out


@pytest.mark.parametrize("verb", ["demo", "fit", "encode", "compress", "inspect"])
def test_help_of_every_verb(capsys, verb):
    assert f"python -m hisac {verb}" in done(capsys, verb, "--help")
    assert verb in done(capsys, "--help")


def test_version_and_threads(here, capsys):
    assert done(capsys, "--version") == f"hisac {hisac.__version__}\n"
    before = hisac.get_num_threads()
    try:
        done(capsys, "fit", "items.npy", "--sizes", "2", "-o", "b.safetensors", "--threads", "1")
        assert hisac.get_num_threads() == 1
    finally:
        hisac.set_num_threads(before)


def test_the_module_runs(here):
    command = [sys.executable, "-m", "hisac", "fit", "none.npy", "-o", "b.safetensors"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (2, "", "hisac fit: none.npy: no such file\n")


# ------------------------------------------------------------------------------------------------------------- errors

FIT = ("fit", "{x}", "--sizes", "2", "-o", "b.safetensors")
ENCODE = ("encode", "book.safetensors", "items.npy", "-o", "codes.npy")
COMPRESS = ("compress", "book.safetensors", "--x", "events.npy", "--user", "users.npy", "--budget", "4", "-o", "t.npz")


def replaced(command, old, new):
    assert old in command
    return tuple(new if part == old else part for part in command)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (replaced(FIT, "{x}", "none.npy"), "hisac fit: none.npy: no such file"),
        (
            replaced(FIT, "{x}", "x.txt"),
            "hisac fit: x.txt: unknown kind of file, expected PATH or PATH:KEY with .csv, .npy, .npz, .parquet, "
            ".safetensors",
        ),
        (replaced(FIT, "{x}", "users.npy"), "hisac fit: users.npy: x is [90], expected [rows, width]"),
        (replaced(FIT, "{x}", "ints.npy"), "hisac fit: ints.npy: x is int64, expected floats, or int8 X with --scale"),
        (replaced(FIT, "{x}", "items.npy:a"), "hisac fit: items.npy: a .npy file holds one array, got the key 'a'"),
        (
            replaced(FIT, "{x}", "two.npz"),
            "hisac fit: two.npz: several arrays, none named; expected two.npz:KEY with KEY one of a, b",
        ),
        (
            replaced(FIT, "{x}", "two.npz:c"),
            "hisac fit: two.npz: no array 'c'; expected two.npz:KEY with KEY one of a, b",
        ),
        (replaced(FIT, "{x}", "text.npz"), "hisac fit: text.npz: not a readable .npz file (File is not a zip file)"),
        (replaced(FIT, "{x}", "nan.npy"), "hisac fit: x is [3, 4] without a usable row, expected at least one"),
        (
            replaced(replaced(FIT, "{x}", "items.npy"), "b.safetensors", "b.npy"),
            "hisac fit: b.npy: unknown kind of output, expected .safetensors",
        ),
        (
            replaced(replaced(FIT, "{x}", "items.npy"), "b.safetensors", "away/b.safetensors"),
            "hisac fit: away: no such folder",
        ),
        (
            replaced(replaced(FIT, "{x}", "items.npy"), "b.safetensors", "folder.safetensors"),
            "hisac fit: folder.safetensors: is a folder, expected a file",
        ),
        (
            replaced(replaced(FIT, "{x}", "items.npy"), "2", "2,x"),
            "python -m hisac fit: argument --sizes: expected numbers with commas, such as 512,512, got '2,x' "
            "(see python -m hisac fit --help)",
        ),
        (
            (*replaced(FIT, "{x}", "items.npy"), "--iterations", "0"),
            "python -m hisac fit: argument --iterations: expected a number from 1 to 1,000,000, got '0' "
            "(see python -m hisac fit --help)",
        ),
        (replaced(ENCODE, "book.safetensors", "none.safetensors"), "hisac encode: none.safetensors: no such file"),
        (
            replaced(ENCODE, "items.npy", "narrow.npy"),
            "hisac encode: narrow.npy: x is [5, 3], expected width 4, the codebook's",
        ),
        (
            replaced(ENCODE, "codes.npy", "codes.txt"),
            "hisac encode: codes.txt: unknown kind of output, expected .npy or .npz or .safetensors",
        ),
        (
            replaced(COMPRESS, "users.npy", "mixed.npy"),
            "hisac compress: mixed.npy: user 1 has several histories, expected one; sort rows by user",
        ),
        (
            replaced(COMPRESS, "users.npy", "short.npy"),
            "hisac compress: short.npy: 3 rows, expected 90, as there are behaviours or lists",
        ),
        (replaced(COMPRESS, "users.npy", "items.npy"), "hisac compress: items.npy: user is [60, 4], expected [rows]"),
        (
            replaced(COMPRESS, "users.npy", "floats.npy"),
            "hisac compress: floats.npy: user is float64, expected integers or strings",
        ),
        (
            replaced(replaced(COMPRESS, "--user", "--offsets"), "users.npy", "falling.npy"),
            "hisac compress: falling.npy: expected offsets that never fall, within 0 .. 90, the behaviours",
        ),
        (
            replaced(replaced(COMPRESS, "--user", "--offsets"), "users.npy", "beyond.npy"),
            "hisac compress: beyond.npy: expected offsets that never fall, within 0 .. 90, the behaviours",
        ),
        ((*COMPRESS, "--v", "items.npy"), "hisac compress: items.npy: v is [60, 4], expected 90 rows, as x"),
        ((*COMPRESS, "--codes", "three.npy"), "hisac compress: three.npy: codes is [90, 3], expected [90, 2]"),
        ((*COMPRESS, "--codes", "items.npy"), "hisac compress: items.npy: codes is float32, expected integers"),
        (
            (*COMPRESS, "--fanout", "2,2"),
            "python -m hisac compress: argument --fanout: not allowed with argument --budget "
            "(see python -m hisac compress --help)",
        ),
        (
            (*COMPRESS, "--sparse", "0"),
            "python -m hisac compress: argument --sparse: expected a number from 1 to 1,000,000, got '0' "
            "(see python -m hisac compress --help)",
        ),
        (
            (*COMPRESS, "--normalize", "both"),
            "python -m hisac compress: argument --normalize: invalid choice: 'both' (choose from history, agents) "
            "(see python -m hisac compress --help)",
        ),
        (
            replaced(COMPRESS, "t.npz", "t.npy"),
            "hisac compress: t.npy: unknown kind of output, expected .npz or .safetensors",
        ),
        (
            (),
            "python -m hisac: the following arguments are required: COMMAND (see python -m hisac --help)",
        ),
        (
            ("demo", "--png", "picture.svg"),
            "hisac demo: picture.svg: unknown kind of output, expected .png",
        ),
    ],
)
def test_errors_are_one_line(book, capsys, command, text):
    np.save("ints.npy", np.zeros((3, 4), np.int64))
    np.savez("two.npz", a=np.zeros(2), b=np.zeros(2))
    os.mkdir("folder.safetensors")
    with open("text.npz", "w") as f:
        f.write("not an archive")
    np.save("nan.npy", np.full((3, 4), np.nan, np.float32))
    np.save("narrow.npy", np.zeros((5, 3), np.float32))
    np.save("mixed.npy", np.array([1] * 30 + [2] * 30 + [1] * 30))
    np.save("short.npy", np.array([1, 2, 3]))
    np.save("floats.npy", np.zeros(90))
    np.save("falling.npy", np.array([0, 50, 40]))
    np.save("beyond.npy", np.array([0, 50, 91]))
    np.save("three.npy", np.zeros((90, 3), np.int32))
    before = sorted(os.listdir())
    assert refused(capsys, *command).replace("'history', 'agents'", "history, agents") == text  # quoted before 3.12
    assert sorted(os.listdir()) == before


def test_inspect_needs_a_row(book, capsys):
    np.save("nan.npy", np.full((3, 4), np.nan, np.float32))
    code, out, err = run(capsys, "inspect", "book.safetensors", "--x", "nan.npy")
    text = "hisac inspect: nan.npy: x is [3, 4] without a row free of NaN and infinity, expected at least one"
    assert (code, out, err.splitlines()[-1]) == (2, "", text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--budget", "4", "--temperature", "0"), "route: temperature expected finite and > 0, got 0.0"),
        (("--budget", "4", "--temperature", "nan"), "route: temperature expected finite and > 0, got nan"),
        (("--budget", "5000"), "vote: budget expected 1 to 4096, got 5000"),
        (("--fanout", "2"), "vote: fanout expected one number >= 1 for each of 2 levels, got (2,)"),
        (("--fanout", "0,2"), "vote: fanout expected one number >= 1 for each of 2 levels, got (0, 2)"),
        (("--beam", "2"), "vote: beam expected one number of 1 to 4096 for each of 2 levels, got (2,)"),
    ],
)
def test_a_bad_option_is_refused_before_any_work(book, capsys, monkeypatch, options, text):
    monkeypatch.setattr(commands, "encode_rows", None)  # calling it would be a TypeError
    command = ("compress", "book.safetensors", "--x", "events.npy", "--user", "users.npy", *options, "-o", "t.npz")
    assert refused(capsys, *command) == f"hisac compress: {text}"
    assert not os.path.exists("t.npz")


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ("0", "sizes expected 1 to 2^20 at level 0, got 0"),
        ("2,9999999", "sizes expected 1 to 2^20 at level 1, got 9999999"),
        ("2,2,2,2,2,2,2,2,2", "sizes expected 1 to 8 levels, got 9"),
    ],
)
def test_wrong_sizes_are_refused(here, capsys, sizes, text):
    assert refused(capsys, "fit", "items.npy", "--sizes", sizes, "-o", "b.safetensors") == f"hisac fit: {text}"
    assert not os.path.exists("b.safetensors")


def test_a_corrupt_codebook_is_named(book, capsys):
    with open("book.safetensors", "rb") as f:
        whole = f.read()
    for data in (b"", whole[:7], whole[:-1], whole + b"\0", b"\xff" * len(whole)):
        with open("bad.safetensors", "wb") as f:
            f.write(data)
        with pytest.raises(hisac.CorruptFileError) as error:
            hisac.Codebook.load("bad.safetensors")
        assert refused(capsys, "inspect", "bad.safetensors") == f"hisac inspect: bad.safetensors: {error.value}"


def test_a_truncated_array_is_corrupt(here, capsys):
    data = open("items.npy", "rb").read()
    with open("cut.npy", "wb") as f:
        f.write(data[:-5])
    assert refused(capsys, *replaced(FIT, "{x}", "cut.npy")).startswith(
        "hisac fit: cut.npy: not a readable .npy file ("
    )
    np.save("objects.npy", np.array([None, 1]), allow_pickle=True)
    assert "not a readable .npy file" in refused(capsys, *replaced(FIT, "{x}", "objects.npy"))


def test_parquet_without_pyarrow_names_the_extra(here, capsys, monkeypatch):
    open("x.parquet", "wb").close()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    text = "hisac fit: x.parquet: reading .parquet needs pyarrow, try: pip install pyarrow"
    assert refused(capsys, *replaced(FIT, "{x}", "x.parquet")) == text


# ------------------------------------------------------------------------------------------------------ whole outputs


def test_no_half_written_output(book, capsys, monkeypatch):
    done(capsys, *COMPRESS)
    old = open("t.npz", "rb").read()

    def fails(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    before = sorted(os.listdir())
    monkeypatch.setattr(np, "savez", fails)
    code, out, err = run(capsys, *COMPRESS)
    assert (code, out, err.splitlines()[-1]) == (2, "", "hisac compress: [Errno 28] No space left on device")
    assert sorted(os.listdir()) == before
    assert open("t.npz", "rb").read() == old


def test_an_interrupted_command_leaves_nothing(book, capsys, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", stopped)
    before = sorted(os.listdir())
    code, _, err = run(capsys, *ENCODE)
    assert (code, err.splitlines()[-1]) == (130, "hisac encode: interrupted")
    assert sorted(os.listdir()) == before


# ----------------------------------------------------------------------------------------------------------- progress


def test_progress_without_tqdm_is_plain_lines(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr("hisac.progress.SILENCE", 0.0)
    with progress("work", 3) as advance:
        advance(1)
        advance(2)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("work: 1 of 3 after ")
    assert last.startswith("work: 3 of 3 in ")


def test_fit_progress_jumps_over_levels_that_stop_early(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with fit_progress(2, 10) as tell:
        tell(0, 1, 0.5)
        tell(1, 3, 0.2)
    assert capsys.readouterr().err.splitlines()[-1].startswith("fit: 20 of 20 in ")
