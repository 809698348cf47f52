# SPDX-License-Identifier: Apache-2.0
"""Writing a user's files: whole or not at all, over regular files only, with nothing left behind."""

import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest

from hisac.app import files

X = np.arange(12, dtype=np.float32).reshape(3, 4)
ENDINGS = (".npy", ".npz", ".safetensors")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, as the current one, and a umask of 022."""
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o022)
    yield tmp_path
    os.umask(before)


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def text(path):
    with open(path) as f:
        return f.read()


def put(path, data=b"new"):
    with files.aside(path) as f:
        f.write(data)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_new_file_has_the_umasks_mode_and_an_old_one_its_own(here, ending):
    path = f"x{ending}"
    files.write(path, {"x": X})
    assert mode(path) == 0o644
    for kept in (0o600, 0o640, 0o666, 0o444):
        os.chmod(path, kept)
        files.write(path, {"x": X + kept})
        assert mode(path) == kept
        np.testing.assert_array_equal(files.read(path), X + kept)
    assert os.listdir() == [path]


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser gives files away")
def test_the_owner_stays(here):
    put("x")
    os.chown("x", 1234, 2345)
    os.chmod("x", 0o600)
    put("x")
    assert (os.stat("x").st_uid, os.stat("x").st_gid, mode("x")) == (1234, 2345, 0o600)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_links_target_is_replaced(here, ending):
    os.mkdir("store")
    real, link, chain = f"store/real{ending}", f"link{ending}", f"chain{ending}"
    files.write(real, {"x": X})
    os.chmod(real, 0o600)
    os.symlink(real, link)
    os.symlink(link, chain)
    for path in (link, chain):
        files.check_out(path, ENDINGS)
        files.write(path, {"x": X + len(path)})
        assert os.readlink(link) == real and os.readlink(chain) == link and mode(real) == 0o600
        np.testing.assert_array_equal(files.read(real), X + len(path))
    os.unlink(real)
    files.write(link, {"x": X})  # where the link leads to nothing yet
    assert os.readlink(link) == real and os.listdir("store") == [f"real{ending}"]


def special(kind):
    """Something that is no regular file, at "it"."""
    if kind == "FIFO":
        os.mkfifo("it")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind("it")
    elif kind == "folder":
        os.mkdir("it")
    else:
        os.symlink("/dev/null", "it")


@pytest.mark.parametrize("kind", ["FIFO", "socket", "folder", "device behind a link"])
def test_only_regular_files_are_replaced(here, kind):
    special(kind)
    before = os.lstat("it")
    told = "a folder" if kind == "folder" else "a device, FIFO or socket"
    for call in (lambda: files.check_out("it", ("it",)), lambda: put("it")):
        with pytest.raises(OSError) as error:
            call()
        assert str(error.value) == f"it: is {told}, expected a file"
    assert os.lstat("it") == before and os.listdir() == ["it"]


def test_links_that_lead_in_a_circle_or_nowhere(here):
    os.symlink("a", "b")
    os.symlink("b", "a")
    with pytest.raises(OSError, match="symbolic links"):
        files.check_out("a", ("a",))
    os.symlink("away/x", "c")
    with pytest.raises(FileNotFoundError, match="away: no such folder"):
        files.check_out("c", ("c",))


def test_names_as_long_and_odd_as_the_system_takes(here):
    for name in ("x" * 255, os.fsdecode(b"\xff\xfe"), "new\nline", ".hidden", "\u4e2d" * 85):
        files.check_out(name, (name,))
        put(name, b"there")
        assert text(name) == "there"
    with pytest.raises(OSError, match="too long"):
        files.check_out("x" * 256, ("x",))


def test_a_planted_link_is_not_written_through(here, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda size: "0123456789abcdef")
    put("victim", b"old")
    os.symlink("victim", f".hisac-{os.getpid()}-0123456789abcdef.part")
    with pytest.raises(FileExistsError):
        put("x")
    assert text("victim") == "old" and not os.path.exists("x")


def test_names_cannot_be_foretold(here):
    seen = set()
    for _ in range(20):
        with files.aside("x"):
            (name,) = set(os.listdir()) - {"x"}
            assert files.PART.fullmatch(name)
            seen.add(name)
    assert len(seen) == 20


def test_an_error_leaves_the_old_file_alone(here):
    put("x", b"old")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)), files.aside("x") as f:
            f.write(b"half")
            raise error
    assert text("x") == "old" and os.listdir() == ["x"]


def test_threads_that_write_to_one_path(here):
    def run(k):
        for _ in range(20):
            put("x", bytes([k]) * 1000)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(65, 69)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert os.listdir() == ["x"] and len(text("x")) == 1000 and len(set(text("x"))) == 1


WRITER = """
import sys
from hisac.app import files
with files.aside("x") as f:
    f.write(b"half")
    f.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


def writer():
    """A process in the middle of writing x."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", WRITER], **pipes)
    assert process.stdout.readline() == b"writing\n"
    return process


def test_what_a_killed_writer_left_is_swept(here):
    put("x", b"old")
    for _ in range(3):
        with writer() as process:
            put("x", b"mine")  # a writer that lives keeps its file
            (part,) = set(os.listdir()) - {"x"}
            assert text(part) == "half" and text("x") == "mine"
            process.send_signal(signal.SIGKILL)
        assert set(os.listdir()) == {"x", part}
    put("x")
    assert os.listdir() == ["x"] and text("x") == "new"


def test_a_writer_that_lives_ends_well(here):
    with writer() as process:
        put("x")
        process.communicate(b"", timeout=60)
    assert process.returncode == 0 and os.listdir() == ["x"] and text("x") == "half"


def test_nothing_else_is_swept(here):
    """Another's name, a link, a folder, a process that lives, a lock that is held, another's file: all stay."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    dead, token = process.pid, "0123456789abcdef"
    names = [
        f".hisac-{os.getpid()}-{token}.part", ".hisac-1-" + token + ".part", f".hisac-{dead}-{token}",
        f".hisac-{dead}-{token[:-1]}.part", f".hisac-{dead}-{token.upper()}.part", f"hisac-{dead}-{token}.part",
        f".hisac-0-{token}.part", f".hisac--1-{token}.part", f".x.{dead}.part", f".hisac-{dead}-{token}.part.npz",
    ]  # fmt: skip
    for name in names:
        put(name)
    link, folder, locked, stale = (f".hisac-{dead}-{k}{token[1:]}.part" for k in "abcd")
    put("target")
    os.symlink("target", link)
    os.mkdir(folder)
    kept = {*names, "target", link, folder, locked}
    if os.geteuid() == 0:
        put(foreign := f".hisac-{dead}-e{token[1:]}.part")
        os.chown(foreign, 1234, 2345)
        kept.add(foreign)
    for name in (locked, stale):
        with open(name, "w"):
            pass
    with open(locked) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        put("x")
    assert set(os.listdir()) == {*kept, "x"}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes anywhere")
def test_a_folder_that_is_locked(here):
    os.mkdir("locked", 0o500)
    with pytest.raises(PermissionError, match="locked: cannot write here"):
        files.check_out("locked/x.npy", ENDINGS)
