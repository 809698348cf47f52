# SPDX-License-Identifier: Apache-2.0
"""What a million histories cost by `hisac.bulk`, and the same function on Spark.

python bench/bulk.py cost     times one worker on Arrow batches of histories; needs pyarrow
python bench/bulk.py spark    runs mapInArrow on parquet files and compares with `hisac.compress` on the whole; needs
                              pyspark and a Java runtime
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import hisac
from hisac import bulk

ITEMS, D, V, USERS, INTERESTS = 300_000, 64, 64, 64, 30


def catalogue(folder, items=ITEMS):
    """Files of a codebook and tables: items around 2,000 places, named by random 64-bit keys."""
    rng = np.random.default_rng(0)
    place = rng.integers(0, 2_000, items)
    x = rng.normal(size=(2_000, D))[place] + 0.4 * rng.normal(size=(items, D))
    x = x.astype(np.float32)
    book = hisac.fit(x, hisac.sizes_for(items), iterations=5)
    book.save(folder / "book.safetensors")
    keys = rng.choice(2**62, items, replace=False)
    v = rng.normal(size=(items, V)).astype(np.float32)
    for name, table in (("x", x), ("codes", book.encode(x)), ("v", v), ("ids", keys)):
        np.save(folder / f"{name}.npy", table)
    return np.argsort(place, kind="stable"), np.sort(place), keys


def histories(users, length, order, places, rng):
    """[users, length] rows of items: of each user some interests, Zipf-like, and a tenth of anything."""
    interest = rng.integers(0, 2_000, (users, INTERESTS))
    rank = np.minimum(rng.zipf(1.5, (users, length)) - 1, INTERESTS - 1)
    wanted = np.take_along_axis(interest, rank, 1)
    begin, end = np.searchsorted(places, wanted), np.searchsorted(places, wanted, "right")
    some = order[np.minimum(begin + (rng.random(wanted.shape) * (end - begin)).astype(np.int64), len(order) - 1)]
    return np.where(rng.random(wanted.shape) < 0.1, rng.integers(0, len(order), wanted.shape), some)


def tables(folder):
    return [str(folder / name) for name in ("book.safetensors", "x.npy", "codes.npy")], {
        "v": str(folder / "v.npy"),
        "ids": str(folder / "ids.npy"),
        "x_ids": "items",
    }


def cost(folder):
    """One worker of one thread: medians of processor time a history, and so the hours of a core for a million."""
    import pyarrow as pa

    order, places, keys = catalogue(folder)
    files, more = tables(folder)
    kinds = {
        "tokens, budget=100": {"budget": 100},
        "tokens, budget=100, sparse=32": {"budget": 100, "sparse": 32},
        "tokens, budget=100, method='leaf'": {"budget": 100, "method": "leaf"},
        "states, leaves=512, ring=100": {"output": "state", "leaves": 512, "ring": 100},
    }
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    print(f"{ITEMS:,} items, D {D}, V {V}, int64 keys, {hisac.sizes_for(ITEMS)} codes; batches of {USERS} histories")
    print(f"{'length':>7}  {'what':35}{'ms a history':>13}{'core hours a million':>22}{'of it, finding rows':>21}")
    for length in (100, 1_000, 10_000):
        rows = histories(USERS, length, order, places, np.random.default_rng(1))
        batch = pa.RecordBatch.from_pydict({"user": np.arange(USERS), "items": pa.array(list(keys[rows]))})
        for text, options in kinds.items():
            compress = bulk.Compress(*files, **more, **options)
            compress(batch)
            find, flat = compress.opened().rows, keys[rows].reshape(-1)
            times, finds = [], []
            for _ in range(9):
                begin = time.process_time()
                compress(batch)
                middle = time.process_time()
                find("items", flat)
                times.append(middle - begin)
                finds.append(time.process_time() - middle)
            taken = statistics.median(times) / USERS
            part = statistics.median(finds) / USERS / taken
            print(f"{length:7,}  {text:35}{1e3 * taken:13.3f}{taken * 1e6 / 3600:22.3g}{part:21.1%}", flush=True)


def spark(folder):
    """Two workers, each of one thread, on four files; what they wrote is what one call of `hisac.compress` says."""
    import pyarrow as pa
    import pyspark
    from pyarrow import parquet
    from pyspark.sql import SparkSession

    order, places, keys = catalogue(folder, 20_000)
    (folder / "in").mkdir()
    lists, rng = [], np.random.default_rng(2)
    for part in range(4):
        rows = histories(500, 300, order, places, rng)
        some = [None if rng.random() < 0.02 else row[: rng.integers(0, 300)] for row in rows]
        lists += some
        named = [None if row is None else [*keys[row].tolist(), None] for row in some]
        user = np.arange(part * 500, (part + 1) * 500)
        parquet.write_table(
            pa.table({"user": user, "items": pa.array(named, pa.list_(pa.int64()))}), folder / f"in/{part}.parquet"
        )
    files, more = tables(folder)
    settings = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false"}
    settings |= {"spark.sql.execution.arrow.maxRecordsPerBatch": "128"}
    settings |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
    settings |= {"spark.sql.execution.arrow.useLargeVarTypes": "false"}
    build = SparkSession.builder.master("local[2]").appName("hisac")
    for name, value in settings.items():
        build = build.config(name, value)
    session = build.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    java = session.sparkContext._jvm.System.getProperty("java.version")
    print(f"pyspark {pyspark.__version__}, Java {java}, pyarrow {pa.__version__}, local[2]")
    made = {}
    for what, schema, options in (
        ("tokens", "user long, tokens array<array<float>>, log_share array<float>, codes array<array<int>>, "
         "votes array<long>, count int", {"output": ("tokens", "log_share", "codes", "votes", "count"), "budget": 100}),
        ("states", "user long, state binary", {"output": "state", "leaves": 64, "ring": 20}),
    ):  # fmt: skip
        compress = bulk.Compress(*files, **more, **options)
        frame = session.read.parquet(str(folder / "in")).select("user", "items")
        begin = time.perf_counter()
        frame.mapInArrow(lambda batches, f=compress: map(f, batches), schema).write.parquet(str(folder / what))
        taken = time.perf_counter() - begin
        made[what] = parquet.read_table(folder / what).sort_by("user")
        print(f"\n{what}: {made[what].num_rows:,} histories in {taken:.1f} s, with the start of Python's workers")
        print(f"mapInArrow's schema: {schema}\nwritten: {', '.join(f'{f.name} {f.type}' for f in made[what].schema)}")
    session.stop()
    full = [np.empty(0, np.int64) if row is None else row for row in lists]
    ids, sizes = np.concatenate(full), [len(row) for row in full]
    x, codes, v = (np.load(folder / f"{name}.npy") for name in ("x", "codes", "v"))
    book = hisac.Codebook.load(folder / "book.safetensors")
    batch = hisac.Histories(x, v, codes=codes, x_ids=ids, v_ids=ids, lengths=sizes)
    whole = hisac.compress(book, batch, budget=100)
    wanted = {"tokens": whole.tokens, "log_share": whole.log_share}
    wanted |= {name: getattr(whole.agents, name) for name in ("codes", "votes", "count")}
    assert made["tokens"]["user"].to_pylist() == list(range(2_000))
    for name, array in wanted.items():
        column = made["tokens"][name].combine_chunks()
        while hasattr(column, "flatten") and column.type.num_fields:
            column = column.flatten()
        found = column.to_numpy(zero_copy_only=False)
        assert np.array_equal(found.view(np.uint8), array.reshape(-1).view(np.uint8)), name
    for row, state in zip(lists, made["states"]["state"].to_pylist(), strict=True):
        own = hisac.UserState(book, width=V, leaves=64, ring=20)
        own.append(book, hisac.Histories(x, v, codes=codes), np.array([] if row is None else [*row, -1], np.int64))
        assert own.to_bytes() == state
    nulls = sum(row is None for row in lists)
    print(f"\nall {len(full):,} users, {nulls} of null lists: the bits of one call, and of states event by event")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "spark"))
    what = parser.parse_args().what
    print(f"python {platform.python_version()}, numpy {np.__version__}, hisac on {hisac.backends()['cpu']}", flush=True)
    os.environ |= {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    with tempfile.TemporaryDirectory() as folder:
        {"cost": cost, "spark": spark}[what](Path(folder))


if __name__ == "__main__":
    main()
