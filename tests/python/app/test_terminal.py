# SPDX-License-Identifier: Apache-2.0
"""What the command line does to its terminal: pipes that close, full disks, names and messages of any bytes."""

import os
import subprocess
import sys

import numpy as np
import pytest

import hisac
from hisac.app import cli, files

ODD = os.fsdecode(b"x\xff\xfe")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with x.npy and book.safetensors."""
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    np.save("x.npy", x)
    hisac.Codebook([x[:5], x[:3]]).save("book.safetensors")


def shell(*argv, **streams):
    """(exit code, stdout, stderr) of `python -m hisac`, as bytes; a stream that is given is not read."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    found = subprocess.run([sys.executable, "-m", "hisac", *argv], timeout=60, check=False, **streams)
    return found.returncode, found.stdout, found.stderr


@pytest.fixture
def closed():
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


INSPECT = ("inspect", "book.safetensors")


def test_a_reader_that_goes_away_ends_the_command_quietly(here, closed):
    assert shell(*INSPECT, stdout=closed) == (141, None, b"")
    code, _, err = shell(*INSPECT, "--x", "x.npy", stdout=closed)
    assert code == 141 and b"Error" not in err and b"roken" not in err
    assert shell(*INSPECT, stdout=closed, stderr=closed)[0] == 141


def test_so_does_one_in_the_middle_of_long_output(here):
    """More than any buffer holds, of which the reader takes a line."""
    code = "import hisac.app.cli as c; c.commands.inspect = lambda **options: [print('x' * 99) for _ in range(10**5)];"
    command = [sys.executable, "-c", f"{code} import sys; sys.exit(c.main(['inspect', 'book']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("argv", [("--help",), ("fit", "--help"), ("--version",)])
def test_help_that_nobody_reads_is_quiet(closed, argv):
    assert shell(*argv, stdout=closed)[2] == b""


def test_errors_that_nobody_reads_end_the_command(here, closed):
    assert shell("inspect", "none", stderr=closed)[0] != 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_one_line(here):
    with open("/dev/full", "wb") as full:
        code, _, err = shell(*INSPECT, stdout=full)
    assert (code, err) == (2, b"hisac inspect: [Errno 28] No space left on device\n")


def test_a_closed_output_is_no_error(here):
    for closing in (">&-", "2>&-", ">&- 2>&-"):
        command = f"{sys.executable} -m hisac inspect book.safetensors {closing}"
        assert subprocess.run(command, shell=True, capture_output=True, timeout=60, check=False).returncode == 0


@pytest.mark.skipif(sys.platform == "darwin", reason="a file system of UTF-8 only")
@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_paths_that_are_not_utf8(here, locale):
    """Every command reads and writes them, and prints their bytes as escapes."""
    env = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    os.rename("x.npy", f"{ODD}.npy")
    shown = rb"x\udcff\udcfe"
    book, codes, tokens = f"{ODD}.safetensors", f"{ODD}.codes.npz", f"{ODD}.npz"
    compress = ("compress", book, "--x", f"{ODD}.npy", "--codes", codes, "--offsets", "two.npy", "--budget", "3")
    np.save("two.npy", np.array([0, 20, 60]))
    for *command, wanted in (
        ("fit", f"{ODD}.npy", "--sizes", "5,4", "-o", book, shown + b".safetensors: 5 x 4 codes of width 4 from 60"),
        ("encode", book, f"{ODD}.npy", "-o", codes, shown + b".codes.npz: codes [60, 2] int32"),
        (*compress, "-o", tokens, shown + b".npz: tokens [2, 3, 4]"),
        ("inspect", book, "--x", f"{ODD}.npy", shown + b".safetensors: 2 levels"),
    ):
        code, out, err = shell(*command, env=env)
        assert code == 0 and out.startswith(wanted), (out, err)
    assert files.read(codes).shape == (60, 2)
    for command in (("inspect", f"{ODD}.none"), ("inspect", book, "--x", f"{ODD}.none")):
        code, out, err = shell(*command, env=env)
        assert (code, out, err.count(b"\n")) == (2, b"", 1) and shown + b".none: " in err
    with open(book, "r+b") as f:
        f.truncate(50)
    code, out, err = shell("inspect", book, env=env)
    assert (code, out, err.count(b"\n")) == (2, b"", 1) and err.startswith(b"hisac inspect: " + shown + b".safetensors")


def test_parquet_of_an_odd_name(here):
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"a": [1.0, 2.0]}), "a.parquet")
    os.rename("a.parquet", f"{ODD}.parquet")
    np.testing.assert_array_equal(files.read(f"{ODD}.parquet"), [1, 2])


def refused(capsys, *argv):
    """What a refused command prints."""
    try:
        code = cli.main(list(argv))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    return err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("inspect", "a\nb\x1b[31m\udcff"), "hisac inspect: a b\\x1b[31m\\udcff: no such file\n"),
        (("inspect", "a", "b\n\x07\u4e2d"), "unrecognized arguments: b \\x07\u4e2d (see python -m hisac --help)\n"),
    ],
)
def test_errors_are_one_line_that_any_terminal_prints(here, capsys, argv, text):
    assert refused(capsys, *argv).endswith(text)


@pytest.mark.parametrize(
    "argv",
    [
        ("fit", "x.npy", "-o", "b.safetensors", "--sizes", "1," * 30_000 + "1"),
        ("fit", "x.npy", "-o", "b.safetensors", "--sizes", "1," * 30_000 + "x"),
        ("fit", "x.npy", "-o", "b.safetensors", "--iterations", "1" * 60_000),
        ("inspect", "x" * 60_000),
        ("inspect", "book.safetensors", "x" * 60_000),
        ("compress", "book.safetensors", "--x", "x.npy", "--offsets", "o.npy", "-o", "t.npz", "--fanout", "1" * 4_000),
        ("x" * 60_000,),
    ],
    ids=lambda argv: argv[0][:9],
)
def test_errors_are_short(here, capsys, argv):
    np.save("o.npy", np.array([0, 60]))
    text = refused(capsys, *argv)
    assert text.count("\n") == 1 and len(text) < 1200


@pytest.mark.parametrize("verb", ["fit", "encode", "compress"])
@pytest.mark.parametrize("kind", ["FIFO", "folder", "long"])
def test_an_output_that_cannot_be_is_refused_before_any_work(here, capsys, monkeypatch, verb, kind):
    for name in ("fit", "encode", "vote"):
        monkeypatch.setattr(hisac, name, None)  # calling it would be a TypeError
    name = {"fit": "out.safetensors", "encode": "out.npy", "compress": "out.npz"}[verb]
    if kind == "long":
        name = "x" * 250 + name
    else:
        (os.mkfifo if kind == "FIFO" else os.mkdir)(name)
    argv = {
        "fit": ("x.npy",),
        "encode": ("book.safetensors", "x.npy"),
        "compress": ("book.safetensors", "--x", "x.npy"),
    }
    more = ("--offsets", "x.npy", "--budget", "2") if verb == "compress" else ()
    text = refused(capsys, verb, *argv[verb], *more, "-o", name)
    assert text.count("\n") == 1 and ("too long" if kind == "long" else f"{name}: is a ") in text
