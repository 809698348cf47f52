# SPDX-License-Identifier: Apache-2.0
"""README says what is so: its Python runs, its error is the error, its links lead somewhere, its versions agree."""

import doctest
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

import hisac

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_python_blocks_run_in_order():
    namespace = {}
    for i, block in enumerate(blocks("python")):  # by a name that is no file: Hypothesis reads the source of its tests
        exec(compile(block, f"README's block {i}", "exec"), namespace)
    assert namespace["tokens"].shape == (2, 100, 16)
    assert namespace["embedding"].weight.grad.any()
    assert np.abs(namespace["close"].tokens - namespace["tokens"]).max() < 0.2
    assert namespace["value"].grad is not None and namespace["compress"].log_tau.grad is not None
    namespace["test_mine"]()


def test_the_error_shown_is_the_error():
    (shown,) = re.findall(r"^ValueError: (.*)$", README, re.M)
    x, v, p = np.zeros((300, 48), np.float32), np.zeros((300, 8), np.float32), np.zeros((2, 64, 32), np.float32)
    with pytest.raises(ValueError, match=f"^{re.escape(shown)}$"):
        hisac.route(x, v, np.array([0, 100, 300]), p)


def test_commands_name_what_exists():
    install, test = blocks("sh")
    extras = re.search(r"\[project.optional-dependencies\](.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    for command in (install, test):
        assert re.search(r"pip install '\.\[(\w+)\]'", command)[1] in extras
    from hisac.app.cli import make_parser

    text = make_parser().format_help()
    for name in ("demo", "fit", "encode", "compress", "inspect"):
        assert name in text


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_versions_agree():
    (cmake,) = re.findall(r"project\(hisac VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    (citation,) = re.findall(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.M)
    (changes,) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[:1]
    assert hisac.__version__ == cmake == citation == changes


MODULES = ["codebook", "torch.functions", "torch.library", "torch.modules"]  # that have examples


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(f"hisac.{name}"), optionflags=doctest.ELLIPSIS)
    assert failed == 0 and tried > 0
