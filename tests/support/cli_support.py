# SPDX-License-Identifier: Apache-2.0
"""The command line in this process."""

from hisac.app.cli import main


def run(capsys, *argv):
    """(exit code, stdout, stderr) of the command line, in this process."""
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *argv):
    """The one line that a refused command prints."""
    code, out, err = run(capsys, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
    return err.splitlines()[-1]  # a wiped progress bar ends in a carriage return


def done(capsys, *argv):
    """What a command prints on the standard output, which has to end well."""
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    return out
