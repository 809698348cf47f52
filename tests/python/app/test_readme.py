# SPDX-License-Identifier: Apache-2.0
"""The pages say what is so: README's blocks run, its numbers are the committed results', links lead somewhere,
the change log is short."""

import copy
import doctest
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import hisac

ROOT = Path(__file__).resolve().parents[3]
BENCH = ROOT / "bench"
sys.path.insert(0, str(BENCH))

import headline  # noqa: E402

README = (ROOT / "README.md").read_text()
PAGES = ("README.md", "CHANGELOG.md", "bench/README.md", "bench/DIARY.md", "cpp/README.md")
NEWEST = sorted((BENCH / "results").glob("*.json"))[-1]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_readme_is_for_a_first_visit():
    assert len(README.splitlines()) <= 200


def test_every_block_is_run():
    """Two commands by CI, the others below."""
    assert re.findall(r"^```(\w+)$", README, re.M) == ["sh", "sh", "python", "sh", "cpp", "python", "python"]
    assert len(re.findall(r"^```", README, re.M)) == 14


# ------------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("planted", ["", "items[7] = 0\n"], ids=["as it stands", "with a row of zeros"])
def test_python_blocks_run_in_order(planted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, *others = blocks("python")
    assert first.count("history = ") == 1
    found, alone, shapes = {}, {}, []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for i, block in enumerate([first.replace("history = ", f"{planted}history = "), *others]):
            code = compile(block, f"README's block {i}", "exec")  # no file's name: Hypothesis reads its tests' source
            exec(
                code, alone if "given" in block else found
            )  # the torch block goes on from the first, the property does not
            shapes.append((found["features"].shape, found["lse"].shape))
    assert found["made"].tokens.shape == (2, 100, 16) and found["made"].lse.shape == (2, 100)
    assert shapes == [((7, 1, 16), (7, 1)), ((9, 16), (9, 2)), ((9, 16), (9, 2))]
    assert (found["items"][7] == 0).all() == bool(planted)
    assert hisac.Codebook.load("book.safetensors") == found["book"]
    assert found["score"].isfinite().all() and found["lse"][:7].all()
    assert not found["features"][7:].any() and not found["lse"][7:].any()  # of the new user
    modules = [found[name] for name in ("compress", "attention", "similar", "network", "embedding")]
    gradients = [p.grad for module in modules for p in module.parameters()]
    assert all(g is not None and g.isfinite().all() and g.any() for g in gradients)
    alone["test_mine"]()


def test_the_first_block_takes_a_user_without_behaviours(tmp_path, monkeypatch):
    """Its candidates get zeros and -inf; the others what they get without that user."""
    monkeypatch.chdir(tmp_path)
    (first, *_), found = blocks("python"), []
    added = {"lengths=[1_000, 2_000]": "lengths=[1_000, 0, 2_000]", "np.array([0, 3, 7])": "np.array([0, 3, 3, 7])"}
    asked = {"np.array([0, 3, 7])": "np.array([0, 2, 3, 7])"}  # the third candidate is the new user's
    for change in ({}, added, added | asked):
        code = first
        for old, new in change.items():
            assert code.count(old) == 1
            code = code.replace(old, new)
        exec(code, names := {})
        found.append((names["features"], names["lse"]))
        assert np.isfinite(names["features"]).all()
    for mine, expected in zip(found[1], found[0], strict=True):
        np.testing.assert_array_equal(mine, expected)
    assert not found[2][0][2].any() and found[2][1][2] == -np.inf and np.isfinite(np.delete(found[2][1], 2)).all()


def test_the_error_shown_is_the_error():
    (shown,) = re.findall(r"`ValueError: (.*)`", README)
    x, v = np.zeros((300, 32), np.float32), np.zeros((200, 16), np.float32)
    book = hisac.Codebook([np.eye(4, 32, dtype=np.float32)], temperature=1)
    with pytest.raises(ValueError, match=f"^{re.escape(shown)}$"):
        hisac.compress(book, hisac.Histories(x, v, np.array([0, 100, 300])), budget=100)


MODULES = [
    "codebook",
    "candidates",
    "life",
    "torch.candidates",
    "torch.functions",
    "torch.library",
    "torch.modules",
]  # that have examples


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    failed, tried = doctest.testmod(importlib.import_module(f"hisac.{name}"), optionflags=doctest.ELLIPSIS)
    assert failed == 0 and tried > 0


# --------------------------------------------------------------------------------------------------- C++ and commands


def run(*command, cwd, **more):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300, **more)


def test_the_cpp_block_builds_and_runs(tmp_path):
    """By the CMakeLists.txt that README names, against the package as it is installed."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not (shutil.which("cmake") and compiler):
        pytest.skip("README's program: CMake or a C++ compiler is not installed")
    (listed,) = re.findall(r"\]\((\S+CMakeLists\.txt)\)", README)
    shutil.copy(ROOT / listed, tmp_path)
    (tmp_path / "main.cpp").write_text(blocks("cpp")[0])
    configure = ("cmake", "-S", ".", "-B", "build", f"-Dhisac_ROOT={Path(hisac.__file__).parent}")
    for command in ((*configure, "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror"), ("cmake", "--build", "build")):
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    items = np.random.default_rng(0).standard_normal((500, 32)).astype(np.float32)
    hisac.Codebook.fit(items, (16, 16), iterations=3).save(tmp_path / "book.safetensors")
    done = run("build/consumer", cwd=tmp_path)
    agents, votes = map(int, re.fullmatch(r"(\d+) agents, (\d+) votes for the first\n", done.stdout).groups())
    assert done.returncode == 0 and agents == 100 and 100 <= votes <= 10_000
    (tmp_path / "damaged").write_bytes((tmp_path / "book.safetensors").read_bytes()[:-1])
    for name in ("damaged", "missing"):
        done = run("build/consumer", name, cwd=tmp_path)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.startswith("codebook file: ") and done.stderr.count("\n") == 1


def test_commands_name_what_exists():
    install, test, _ = blocks("sh")
    extras = re.search(r"\[project.optional-dependencies\](.*?)\n\n", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    for command in (install, test):
        assert re.search(r"pip install '\.\[(\w+)\]'", command)[1] in extras
    (pinned,) = re.findall(r"pip install (torch==\S+)", README)
    assert f'"{pinned}"' in extras  # what the tests need is then there already


def test_the_command_line_block_runs(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(0)
    users, ids = np.repeat([11, 12, 13], [40, 1, 60]), [f"item {i}" for i in range(200)]
    items = {"id": ids, "embedding": rng.standard_normal((200, 8)).astype(np.float32).tolist()}
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    pq.write_table(pa.table({"user": users, "item": rng.choice(ids, len(users))}), tmp_path / "events.parquet")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = run("bash", "-ec", blocks("sh")[2], cwd=tmp_path, env=os.environ | {"PATH": path})
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "tokens.npz") as made:
        assert made["tokens"].shape == (3, 100, 8) and made["users"].tolist() == [11, 12, 13]
        assert made["count"][1] == 1


# ------------------------------------------------------------------------------------------------------------ numbers


def between(text, begin, end):
    return text[text.index(begin) + len(begin) + 1 : text.index(end)]


def test_readmes_numbers_are_the_newest_results():
    assert between(README, headline.BEGIN, headline.END) == headline.render(json.loads(NEWEST.read_text()))


def test_where_hisac_is_slower_is_the_newest_results():
    """And bench/README.md says it of the backward on an older processor."""

    def ratios(path, work):
        rows = json.loads(path.read_text())["rows"]
        mine = [r for r in rows if r["work"].startswith(work) and r["role"] == "hisac" and r["threads"] == 1]
        return sorted(r["ratio_to_best_peer"] for r in mine if r["ratio_to_best_peer"])

    slower = [ratio for ratio in ratios(NEWEST, "") if ratio < 1]
    said = f"on one thread {len(slower)} of them are slower than a peer, by {1 - slower[0]:.0%} at most"
    assert said.replace("%", " %") in " ".join(README.split())
    least, *_, most = ratios(BENCH / "results/2026-11-30-amd-epyc.json", "backward/")
    said = f"the backward of `route` on one user had {least:.2f} to {most:.2f} of the speed of torch.compile's autograd"
    assert said in " ".join((BENCH / "README.md").read_text().split())


def test_quality_is_the_demos():
    """The table, and what is said below it."""
    log = (BENCH / "results/2026-11-30-demo.txt").read_text()
    rows = [re.split(r"  +", line) for line in log.splitlines() if re.search(r"  \.\d+ \[", line)]
    table = {name: re.sub(r"(?<!\d)\.", "0.", f"{rest[0]} {rest[3]}").split(" ") for name, *rest in rows}
    gauc = {name: " ".join(values[:3]) for name, values in table.items()}
    shown = {}
    for line in between(README, "| method |", "## For a service").splitlines():
        if line.startswith("| ") and "---" not in line:
            name, *cells = line.strip("| ").split(" | ")
            shown[name] = cells
    assert list(shown.values()) == [
        [gauc["full history"], *[gauc["full history"].split(" ")[0]] * 2],
        [gauc[f"most recent {m}"] for m in (50, 100, 200)],
        [gauc[f"fan-out {rule}, history"] for rule in ("10x5", "20x5", "20x10")],
        [gauc[f"budget {m}, agents"] for m in (50, 100, 200)],
        ["-", "-", gauc["budget 200, agents, sparse 32"]],
    ]
    words = " ".join(README.split())
    assert f"item before gives {gauc['repeat count'].split(' ')[0]}, more than every method here" in words
    assert "where that is 0.5, none can be told from the most recent 100" in words
    assert table["repeat count"][3] == "0.500" and log.count("not told apart from the most recent 100") == 2
    trained = re.findall(r"^trained +(.*)", (BENCH / "results/2026-11-30-recipe.txt").read_text(), re.M)[0]
    every, _, new = re.split(r"  +", trained)
    assert f"has {every}, and {new.split(' ')[0]} on new items" in words
    assert "600 requests of 145 households" in words and re.search(r"^600 requests .*, 145 households", log, re.M)


@pytest.fixture
def result():
    """A small run: `route` in both modes, `vote`, and a row of two threads."""

    def row(work, variant, size, ms, ratio, threads=1):
        found = {"work": work, "variant": variant, "size": size, "median_ms": ms, "ratio_to_best_peer": ratio}
        return found | {"peer": "NumPy", "role": "hisac", "threads": threads}

    size = "1 user, T 10000, M 200, D 128, V 64"
    return {
        "quick": False,
        "date": "2026-11-30T00:00:00",
        "commit": "0123456789abcdef",
        "machine": {"cpu": "AMD EPYC", "cores": 2, "blas": [{}]},
        "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
        "rows": [
            row("route/10k", "fp32", size, 4.0, 2.0),
            row("route/10k/agents", "fp32", f"{size}, agents mode", 4.5, 1.5),
            row("sparse/10k", "sparse 32", "1 user, T 10000 of 106 codes, M 200, D 128, V 64, agents mode", 1.5, 4.0),
            row("vote/10k", "budget", "1 user, T 10000, 512 x 512 codes, budget 200", 0.025, 15.0),
            row("vote/10k", "budget", "1 user, T 10000, 512 x 512 codes, budget 200", 0.5, 1.0, threads=2),
        ],
    }


AGENTS = "| `route`, agents mode: 10,000 behaviours of width 128 to 200 tokens | 4.5 ms | NumPy, 6.75 ms | 1.5 |"
HISTORY = "| `route`, history mode: 10,000 behaviours of width 128 to 200 tokens | 4 ms | NumPy, 8 ms | 2 |"
SPARSE = "| the same with `sparse=32`: 10,000 behaviours, 200 agents | 1.5 ms | NumPy, 6 ms | 4 |"
VOTE = "| `vote`: 10,000 behaviours, 200 agents | 25 us | NumPy, 0.375 ms | 15 |"


def test_numbers_of_what_a_run_has(result):
    assert headline.render(result).splitlines()[2:-2] == [AGENTS, SPARSE, VOTE]
    del result["rows"][1]
    assert headline.render(result).splitlines()[2:-2] == [HISTORY, SPARSE, VOTE]
    del result["rows"][0]
    assert headline.render(result).splitlines()[2:-2] == [SPARSE, VOTE]
    del result["rows"][0]
    assert headline.render(result).splitlines()[2:-2] == [VOTE]


def test_a_run_without_a_record_of_its_kernels_says_so(result):
    said = "is not recorded"
    assert said not in headline.render(result)
    older = copy.deepcopy(result)
    del older["machine"]["blas"]
    assert said in headline.render(older)


def test_a_run_that_gives_no_numbers_is_refused(result):
    with pytest.raises(ValueError, match="quick"):
        headline.render(result | {"quick": True})
    with pytest.raises(ValueError, match="none of the works"):
        headline.render(result | {"rows": []})
    result["rows"][3]["size"] = "something else"
    with pytest.raises(ValueError, match="vote/10k: its size"):
        headline.render(result)


def test_headline_writes_and_checks(result, tmp_path):
    rows, page = tmp_path / "rows.json", tmp_path / "README.md"
    rows.write_text(json.dumps(result))
    command = (sys.executable, str(BENCH / "headline.py"), str(rows), "--readme", str(page))
    page.write_text(f"before\n{headline.BEGIN}\nold\n{headline.END}\nafter\n")
    assert run(*command, "--check", cwd=tmp_path).returncode == 1
    assert run(*command, cwd=tmp_path).returncode == 0
    assert page.read_text() == f"before\n{headline.BEGIN}\n{headline.render(result)}{headline.END}\nafter\n"
    assert run(*command, "--check", cwd=tmp_path).returncode == 0
    page.write_text("no markers")
    assert run(*command, cwd=tmp_path).returncode == 2


# -------------------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


def test_the_change_log_is_for_users():
    (release,) = re.findall(r"^(## 0\.1\.0\n.*?)(?=^## |\Z)", (ROOT / "CHANGELOG.md").read_text(), re.M | re.S)
    assert len(release.splitlines()) <= 25


def test_the_built_package_has_the_projects_version():
    """tests/python/test_layout.py compares the files that name it with each other."""
    (version,) = re.findall(r'^version = "(\S+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert hisac.__version__ == version


def test_the_walk_of_x_names_what_there_is():
    """At most 28 functions from `hisac.compress` to the innermost loop (cpp/README.md), each defined in the code."""
    text = (ROOT / "cpp/README.md").read_text(encoding="utf-8")
    walk = re.search(r"The functions on this way, .*?\n\n", text, re.S)[0]
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("python/hisac", "cpp")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".h", ".cpp", ".inl"}
    )
    names = re.findall(r"`([\w.:]+)`", walk)
    assert len(names) <= 28
    for name in names:
        assert re.search(rf"\b{re.split(r'[.:]+', name)[-1]}(<\w+>)?\(", code), name
