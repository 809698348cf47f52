# SPDX-License-Identifier: Apache-2.0
"""`hisac.bulk` on what people run: batches of pyarrow, folders of parquet files, Ray Data. Each skips where that is not
installed; `.ci/run` installs all of them."""

import json
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest

from bulk_support import BOOK, CODES, IDS, KEYS, V, X, histories, named, saved, whole
from hisac import bulk

# ------------------------------------------------------------------------------------------------------ pyarrow and run


def spark_takes(pa, kind):
    """Whether Spark has a type of this one."""
    if pa.types.is_list(kind):
        return spark_takes(pa, kind.value_type)
    return kind in (pa.float32(), pa.float64(), pa.int32(), pa.int64(), pa.string(), pa.binary())


@pytest.mark.parametrize("kind", sorted(IDS))
@pytest.mark.parametrize("large", [False, True])
def test_pyarrow(kind, large):
    pa = pytest.importorskip("pyarrow")
    rows = histories(11)
    lists = [None if i == 4 else [*row, None] for i, row in enumerate(row.tolist() for row in named(rows, IDS[kind]))]
    value = pa.string() if kind == "names" else pa.int64()
    items = pa.array(lists, (pa.large_list if large else pa.list_)(value))
    if kind == "names" and large:
        items = pa.LargeListArray.from_arrays(items.offsets, items.values.dictionary_encode(), mask=items.is_null())
    batch = pa.RecordBatch.from_pydict(
        {"user": pa.array([f"u{i}" for i in range(23)]).dictionary_encode(), "items": items}
    )
    names = ("tokens", "log_share", "codes", "votes", "count")
    compress = bulk.Compress(BOOK, X, CODES, v=V, ids=IDS[kind], x_ids="items", output=names, budget=9)
    known = [row[:0] if i == 4 else np.append(row, -1) for i, row in enumerate(rows)]
    for begin, end in ((0, 23), (3, 20), (9, 9)):
        cut = batch.slice(begin, end - begin)
        wanted = whole(known[begin:end])
        table = (
            pa.Table.from_batches([batch.slice(begin, 2), batch.slice(begin + 2, end - begin - 2)]) if end > 9 else None
        )
        for given_batch in (cut, pa.Table.from_batches([cut]), *([] if table is None else [table])):
            made = compress(given_batch)
            assert type(made) is type(given_batch) and made.column_names == ["user", *names]
            assert made.column("user").equals(given_batch.column("user"))
            assert all(spark_takes(pa, made.schema.field(name).type) for name in names)
            assert made.column("tokens").to_pylist() == wanted.tokens.tolist()
            assert made.column("log_share").to_pylist() == wanted.log_share.tolist()
            for name in names[2:]:
                assert made.column(name).to_pylist() == getattr(wanted.agents, name).tolist()
    states = bulk.Compress(BOOK, X, CODES, v=V, ids=IDS[kind], x_ids="items", output="state", leaves=5)(batch)
    assert states.schema.field("state").type == pa.binary()


@pytest.fixture
def files(tmp_path):
    return saved(tmp_path)


@pytest.fixture
def parts(files):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [histories(seed, users) for seed, users in ((20, 9), (21, 0), (22, 31))]
    folder = files / "in"
    folder.mkdir()
    for i, some in enumerate(rows):
        user = [f"u{i}-{j}" for j in range(len(some))]
        items = pa.array(named(some, KEYS), pa.list_(pa.int64()))
        table = pa.table({"user": pa.array(user, pa.string()), "items": items, "more": items})
        parquet.write_table(table, folder / f"part-{i}.parquet")
    return [folder / f"part-{i}.parquet" for i in range(3)], rows


def of_files(files, **more):
    names = {"v": files / "v.npy", "ids": files / "ids.npy"}
    return bulk.Compress(
        files / "book.safetensors",
        files / "x.npy",
        files / "codes.npy",
        x_ids="items",
        **{**names, "budget": 9, **more},
    )


def check_parts(out, rows):
    parquet = pytest.importorskip("pyarrow.parquet")
    for i, some in enumerate(rows):
        table = parquet.read_table(out / f"part-{i}.parquet")
        assert table.column_names == ["user", "tokens", "log_share"]
        assert table["tokens"].to_pylist() == whole(some).tokens.tolist()
        assert table["user"].to_pylist() == [f"u{i}-{j}" for j in range(len(some))]


@pytest.mark.parametrize("workers", [1, 2])
def test_run(parts, files, workers, capfd):
    paths, rows = parts
    out = files / "out"
    args = {"workers": workers, "rows": 4, "columns": ["user", "items"]}
    made = bulk.run(of_files(files), paths, out, progress=True, **args)
    assert made == [out / path.name for path in paths] and "40" in capfd.readouterr().err
    check_parts(out, rows)
    assert sorted(os.listdir(out)) == ["_hisac.json", *(path.name for path in paths)]
    stamps = [path.stat().st_mtime_ns for path in made]
    made[2].unlink()
    bulk.run(of_files(files), paths, out, **args)
    assert [path.stat().st_mtime_ns for path in made[:2]] == stamps[:2]
    check_parts(out, rows)


def test_a_run_that_broke_goes_on(parts, files):
    paths, rows = parts
    broken = paths[2].read_bytes()
    paths[2].write_bytes(broken[: len(broken) // 2] + bytes(len(broken) - len(broken) // 2))
    with pytest.raises(Exception, match="arquet"):
        bulk.run(of_files(files), paths, files / "out", columns=["user", "items"])
    assert sorted(os.listdir(files / "out")) == ["_hisac.json", "part-0.parquet", "part-1.parquet"]
    paths[2].write_bytes(broken)
    bulk.run(of_files(files), paths, files / "out", columns=["user", "items"])
    check_parts(files / "out", rows)


class Killed(bulk.Compress):
    """Ends its process in the middle of a file, once."""

    def __call__(self, batch):
        flag = os.environ["HISAC_TEST_KILLED"]
        if multiprocessing.parent_process() and len(batch) == 3 and not os.path.exists(flag):
            open(flag, "x").close()
            os._exit(9)
        return super().__call__(batch)


SCRIPT = """
import sys
from concurrent.futures.process import BrokenProcessPool
sys.path[:0] = {here!r}
import test_bulk_engines as t
from pathlib import Path
if __name__ == "__main__":
    files, paths = Path({files!r}), sorted(Path({files!r}).glob("in/*.parquet"))
    c = t.of_files(files)
    c.__class__ = t.Killed
    for end in (BrokenProcessPool, None):
        try:
            t.bulk.run(c, paths, files / "out", workers=1 + 1, rows=4, columns=["user", "items"])
        except BrokenProcessPool:
            assert end, "killed twice"
        else:
            assert not end, "not killed"
"""


def test_a_killed_worker(parts, files):
    _, rows = parts
    text = SCRIPT.format(here=sys.path, files=str(files))
    (files / "script.py").write_text(text, encoding="utf-8")
    env = {**os.environ, "HISAC_TEST_KILLED": str(files / "killed")}
    subprocess.run([sys.executable, files / "script.py"], check=True, env=env, timeout=120)
    check_parts(files / "out", rows)


@pytest.mark.parametrize("change", [{"budget": 8}, {"v": "w"}, {"bias": "more"}, {"output": "tokens"}])
def test_a_folder_takes_one_run(parts, files, change):
    paths, _ = parts
    bulk.run(of_files(files), paths[:1], files / "out")
    mark = json.loads((files / "out/_hisac.json").read_text())
    assert mark["book"] == f"{BOOK.fingerprint:016x}" and mark["options"] == {"budget": "9"}
    if "v" in change:
        np.save(files / "w.npy", 2 * V)
        change = {"v": files / "w.npy"}
    with pytest.raises(ValueError, match=r"out expected empty or of the same run, got one of another _hisac\.json"):
        bulk.run(of_files(files, **change), paths, files / "out")
    with pytest.raises(ValueError, match="run: files expected of different names"):
        bulk.run(of_files(files), [paths[0], paths[0]], files / "out")


# ------------------------------------------------------------------------------------------------------------- Ray Data


@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.parametrize("way", ["pyarrow", "numpy", "actors"])
def test_ray(parts, files, way, ray):
    _, rows = parts
    source = ray.data.read_parquet(str(files / "in")).select_columns(["user", "items"])
    if way == "actors":
        tables = [str(files / name) for name in ("book.safetensors", "x.npy", "codes.npy")]
        named_args = {"v": files / "v.npy", "ids": files / "ids.npy", "x_ids": "items", "budget": 9}
        more = {"fn_constructor_args": tables, "fn_constructor_kwargs": named_args, "concurrency": 1}
        made = source.map_batches(bulk.Compress, batch_format="pyarrow", batch_size=5, **more)
    else:
        made = source.map_batches(of_files(files), batch_format=way, batch_size=5, concurrency=1)
    found = {row["user"]: row for row in made.take_all()}
    for i, some in enumerate(rows):
        wanted = whole(some)
        for j in range(len(some)):
            row = found.pop(f"u{i}-{j}")
            assert np.array_equal(np.array([*row["tokens"]], np.float32), wanted.tokens[j])
            assert np.array_equal(np.array(row["log_share"], np.float32), wanted.log_share[j])
    assert not found


@pytest.fixture(scope="module")
def ray():
    found = pytest.importorskip("ray")
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    found.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    found.data.DataContext.get_current().enable_progress_bars = False
    yield found
    found.shutdown()
