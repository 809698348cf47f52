# SPDX-License-Identifier: Apache-2.0
"""Histories by the million: `Compress` makes tokens or states of batches, on Ray Data, on Spark, or by `run`.

    compress = hisac.bulk.Compress("book.safetensors", "x.npy", "codes.npy", ids="ids.npy", x_ids="items", budget=100)
    ray.data.read_parquet("histories").map_batches(compress, batch_format="pyarrow").write_parquet("tokens")
    spark.read.parquet("histories").mapInArrow(lambda batches: map(compress, batches), schema)
    hisac.bulk.run(compress, glob("histories/*.parquet"), "tokens", workers=16)

For Spark the schema has the columns that stay, and `tokens array<array<float>>, log_share array<float>`.
"""

import functools
import inspect
import json
import mmap
import multiprocessing
import os
import secrets
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import verbs
from .arrays import FLOAT32, INT64, NUMBERS, on_host
from .codebook import Codebook
from .columns import Kind, lists_of
from .life import Bundle
from .progress import progress as bar
from .runtime import get_num_threads, set_num_threads
from .state import UserState
from .types import Array, Histories

FIELDS = ("tokens", "log_share", "lse", "mean_x", "codes", "votes", "count")
NEVER = -(2**63)  # a time that is null


class Compress:
    """A function of batches, batch -> batch, that can be pickled. A row is a user, with behaviours in columns of lists.

    A batch is a dict of arrays [B, ..], or Arrow's: a record batch, a table, anything with `__arrow_c_array__` or
    `__arrow_c_stream__`. Arrow's lists are list, large_list or fixed_size_list, read in place; those of a dict stand in
    an array of lists, or in one [B, n]. Columns that are not read stay as they are: select before which you want.
    Beside them come columns of the names in `output`:

        tokens, log_share, lse, mean_x, codes, votes, count   as in the results of `hisac.compress` and its agents
        state                                                 the bytes of a `hisac.UserState`; alone

    For a dict they are arrays, such as tokens [B, M, V], and states objects. For pyarrow's batches they are pyarrow's,
    in types that Spark takes: lists of lists of float32, int32 or int64, and binary. For other Arrow batches the result
    is a dict, with `batch[name]` for what stays.

    A null list is a user without behaviours: tokens of 0, a log_share of -inf. A behaviour is absent whose id is null,
    or of no item, or whose bias or time is null. One with a null weight does not vote.

    The result of a user has the same bits in any batch, on any number of threads, and again in a task that is repeated;
    where processors differ, set HISAC_ISA to one that all have.

    Give tables that are big as paths. They are opened where batches come, once a process; .npy files are mapped, so the
    processes of a machine share their memory. A np.memmap of a whole file goes as its path. Other arrays are pickled
    with the function. It opens nothing, and checks no values, before its first batch: try one before you start workers.

    Args:
        book: a Codebook, or the path of its file. Or a Bundle, or the path of its folder, which has items, codes and
            ids too; a process reads it whole
        items: x [items, D] of Histories: an array, or the path of a .npy file, and so the next ones. None: prototypes
        codes: [items, L] int32. None: each process encodes x
        v: [items, V]. None: x
        ids: [items] integers or strings, the names that lists have for items. None: these are row numbers
        x_scale: of x of int8
        x_ids: the name of the column of lists of items
        bias, weights: names of columns of lists of numbers, of the same lengths; integers are votes. A state has no
            bias, and takes weights as float32
        times, positions: names of columns of lists of integers, as in `UserState.append`, for states; dates are seconds
            then. The oldest behaviour comes first
        output: the names of the columns that are made
        threads: of the verbs while a batch is worked on; engines start a worker for each processor
        options: those of `hisac.compress`; for states those of `UserState`, and `dtype` of its `to_bytes`. A state's
            ring keeps row numbers: append to the tables, and reorder nothing, as long as its states live

    Raises ValueError for an unknown output, TypeError for an unknown option or one that does not fit the output.
    Batches raise ValueError for a column that is not there, lists of different lengths, or a name that is taken;
    TypeError for columns of other types; and what `hisac.compress`, `UserState` and opening files raise.
    """

    def __init__(
        self, book: Any, items: Any = None, codes: Any = None, *, v: Any = None, ids: Any = None, x_scale: Any = None,
        x_ids: str = "x_ids", bias: str | None = None, weights: str | None = None, times: str | None = None,
        positions: str | None = None, output: str | Sequence[str] = ("tokens", "log_share"), threads: int = 1,
        **options: Any,
    ) -> None:  # fmt: skip
        self.output = (output,) if isinstance(output, str) else tuple(output)
        self.states = self.output == ("state",)
        if not self.states and (not self.output or not set(self.output) <= set(FIELDS)):
            raise ValueError(f"Compress: output expected some of {', '.join(FIELDS)}, or state alone, got {output}")
        takes: Any = UserState if self.states else verbs.compress
        known = {*inspect.signature(takes).parameters} - {"book", "width", "histories", "agents"}
        known = known | {"dtype"} if self.states else known - {"mean_x"}
        for name in options:
            if name not in known:
                raise TypeError(f"Compress: expected options {', '.join(sorted(known))}, got {name}")
        columns = {"x_ids": x_ids, "bias": bias, "weights": weights, "times": times, "positions": positions}
        self.columns = {field: name for field, name in columns.items() if name is not None}
        for field in ("bias",) if self.states else ("times", "positions"):
            if field in self.columns:
                raise TypeError(f"Compress: {field} expected None beside an output of {', '.join(self.output)}")
        self.tables = tuple(map(_by_path, (book, items, codes, v, ids, x_scale)))
        self.threads, self.options = threads, options
        self._opened: _Tables | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_opened": None}

    def opened(self) -> "_Tables":
        """The tables, of this process where it has had them."""
        if self._opened is None:
            plain = all(isinstance(table, str | float | int | Codebook | _Mapped | None) for table in self.tables)
            self._opened = _once(self.tables, tuple(map(_stamp, self.tables))) if plain else _open(*self.tables)
        return self._opened

    def mark(self) -> dict[str, Any]:
        """What results depend on: the book, checksums of the tables, columns, output, options."""
        book, items, ids, _ = self.opened()
        sums = {name: _sum(table) for name, table in (*items._asdict().items(), ("ids", ids)) if table is not None}
        known = {"book": f"{book.fingerprint:016x}", "tables": sums, "columns": self.columns, "output": self.output}
        return known | {"options": {name: repr(value) for name, value in sorted(self.options.items())}}

    def __call__(self, batch: Any) -> Any:
        before = get_num_threads()
        set_num_threads(self.threads)
        try:
            tables = self.opened()
            kinds = _KINDS | {"x_ids": Kind(tables.rows, -1)}
            wanted = [(name, kinds[field]) for field, name in self.columns.items()]
            with lists_of(batch, wanted) as (lengths, values, there):
                fields = dict(zip(self.columns, values, strict=True))
                made = (self._states if self.states else self._tokens)(tables, lengths, fields)
        finally:
            set_num_threads(before)
        kept = [name for name in there if name not in self.columns.values()]
        if taken := set(kept) & set(made):
            raise ValueError(f"Compress: a batch expected without a column {min(taken)}, which is made")
        pa = sys.modules.get("pyarrow")
        if pa is None or not isinstance(batch, pa.RecordBatch | pa.Table):
            return {name: batch[name] for name in kept} | made
        arrays = [*(batch.column(name) for name in kept), *(_arrow(pa, a) for a in made.values())]
        return type(batch).from_arrays(arrays, names=[*kept, *made])

    def _tokens(self, tables: "_Tables", lengths: Array, fields: dict[str, Array]) -> dict[str, Array]:
        batch = tables.items._replace(offsets=np.append(0, lengths.cumsum()), v_ids=fields["x_ids"], **fields)
        made = verbs.compress(tables.book, batch, mean_x="mean_x" in self.output, **self.options)
        every = made.agents._asdict() | made._asdict()
        return {name: every[name] for name in self.output}

    def _states(self, tables: "_Tables", lengths: Array, fields: dict[str, Array]) -> dict[str, Array]:
        dtype, tag = self.options.get("dtype", "float32"), self.options.get("model_tag", 0)
        options = {name: value for name, value in self.options.items() if name != "dtype"}
        if "weights" in fields:
            fields["weights"] = fields["weights"].astype(np.float32)
        if "times" in fields and (never := fields["times"] == NEVER).any():
            fields |= {"x_ids": np.where(never, -1, fields["x_ids"]), "times": np.where(never, 0, fields["times"])}
        ids, out = fields.pop("x_ids"), np.empty(len(lengths), object)
        for user, (end, n) in enumerate(zip(lengths.cumsum().tolist(), lengths.tolist(), strict=True)):
            state = UserState(tables.book, width=tables.items.v.shape[1], **options)
            own = {name: a[end - n : end] for name, a in fields.items()}
            state.append(tables.book, tables.items, ids[end - n : end], model_tag=tag, **own)
            out[user] = state.to_bytes(dtype)
        return {"state": out}


def _arrow(pa: Any, a: Array) -> Any:
    """[B, ..] as pyarrow's lists of lists, without a copy of float32 and integers."""
    if a.dtype == object:
        return pa.array(a.tolist(), pa.binary())
    if a.size >= 2**31:
        raise ValueError(f"Compress: a column expected below 2^31 numbers, got {a.size}: take fewer rows a batch")
    out = pa.array((a if a.dtype.kind == "i" else a.astype(np.float32, copy=False)).reshape(-1))
    for axis in range(a.ndim - 1, 0, -1):
        ends = np.arange(np.prod(a.shape[:axis]) + 1, dtype=np.int32) * np.int32(a.shape[axis])
        out = pa.ListArray.from_arrays(pa.array(ends), out)
    return out


# -------------------------------------------------------------------------------------------------------------- tables


class _Mapped(NamedTuple):
    """A np.memmap of a whole file, as it is pickled."""

    path: str
    dtype: str
    offset: int
    shape: tuple[int, ...]


class _Tables(NamedTuple):
    """Fields: rows is f(the name of a column, its ids) -> rows of the tables, -1 for an id of no item."""

    book: Codebook
    items: Histories
    ids: Array
    rows: Callable[[str, Any], Array]


def _by_path(table: Any) -> Any:
    """A table as it is pickled: what is of a file, by its path."""
    if isinstance(table, np.memmap) and isinstance(table.base, mmap.mmap) and table.flags.c_contiguous:
        return _Mapped(os.path.abspath(str(table.filename)), table.dtype.str, table.offset, table.shape)
    table = table.path if isinstance(table, Bundle) else table
    return os.path.abspath(table) if isinstance(table, str | os.PathLike) else table


def _stamp(table: Any) -> Any:
    """What changes where the file of a table does."""
    path = table.path if isinstance(table, _Mapped) else table
    seen = os.stat(path) if isinstance(path, str) else None
    return seen and (seen.st_ino, seen.st_size, seen.st_mtime_ns)


def _array(table: Any) -> Any:
    if isinstance(table, _Mapped):
        table = np.memmap(table.path, table.dtype, "r", table.offset, table.shape)
    if isinstance(table, str):
        table = np.load(table, mmap_mode="r", allow_pickle=False)
    return table if table is None or isinstance(table, NUMBERS) else on_host(table)


def _sum(table: Any) -> Any:
    if isinstance(table, NUMBERS):
        return repr(table)
    return zlib.crc32(np.ascontiguousarray(table).reshape(-1).view(np.uint8).data)


def _open(book: Any, items: Any, codes: Any, v: Any, ids: Any, x_scale: Any) -> _Tables:
    if isinstance(book, str) and os.path.isdir(book):
        bundle = Bundle(book)
        book = bundle.book
        if items is None and codes is None and ids is None:
            items, codes, ids = bundle.x, bundle.codes, bundle.ids
    book = Codebook.load(book) if isinstance(book, str) else book
    x, codes, v, ids, x_scale = map(_array, (items, codes, v, ids, x_scale))
    codes = verbs.encode(book, x) if codes is None else codes
    v = x if v is None else v
    for name, table in (("x", x), ("v", v), ("ids", ids)):
        if table is not None and len(table) != len(codes):
            raise ValueError(f"Compress: {name} expected of {len(codes)} rows, as codes, got {len(table)}")
    return _Tables(book, Histories(x, v, codes=codes, x_scale=x_scale), ids, _integers if ids is None else _index(ids))


@functools.lru_cache(maxsize=2)
def _once(tables: tuple[Any, ...], stamps: Any) -> _Tables:
    return _open(*tables)


def _typed(name: str, given: Any, kinds: str, what: str) -> Array:
    """Values of these kinds of NumPy's; strings come as a list."""
    if not isinstance(given, np.ndarray) or given.dtype.kind not in kinds:
        got = given.dtype if isinstance(given, np.ndarray) else "strings"
        why = " (of nulls in NumPy? Arrow keeps integers beside them)" if str(got).startswith("float") else ""
        raise TypeError(f"Compress: column {name} expected {what}, got {got}{why}")
    return given


def _integers(name: str, given: Any) -> Array:
    found = _typed(name, given, "iu", "lists of integers")
    return found if found.dtype in (np.int32, INT64) else found.astype(INT64)


def _floats(name: str, given: Any) -> Array:
    return _typed(name, given, "iuf", "lists of numbers").astype(FLOAT32, copy=False)


def _votes(name: str, given: Any) -> Array:
    integers = isinstance(given, np.ndarray) and given.dtype.kind in "iu"
    return given.astype(INT64, copy=False) if integers else _floats(name, given)


def _times(name: str, given: Any) -> Array:
    found = _typed(name, given, "iuM", "lists of integers or dates")
    return (found.astype("M8[s]") if found.dtype.kind == "M" else found).astype(INT64, copy=False)


_KINDS = {"bias": Kind(_floats, np.nan), "weights": Kind(_votes, 0)}
_KINDS |= {"times": Kind(_times, NEVER), "positions": Kind(_times, NEVER)}


def _index(ids: Array) -> Callable[[str, Any], Array]:
    """ids [n] -> f(the name of a column, its ids) -> rows, -1 for an id that is not there."""
    if ids.ndim != 1 or ids.dtype.kind not in "iuUO":
        raise ValueError(f"Compress: ids expected integers or strings [items], got {ids.dtype} {list(ids.shape)}")
    strings = ids.dtype.kind in "UO"
    find = _named(ids) if strings else _hashed(ids.astype(INT64))
    twice = np.flatnonzero(find("ids", ids.tolist() if strings else ids) != np.arange(len(ids)))
    if twice.size:
        raise ValueError(f"Compress: ids expected once each, got {ids.tolist()[twice[0]]!r} again")
    return find


def _named(ids: Array) -> Callable[[str, Any], Array]:
    get = {name: row for row, name in enumerate(ids.tolist())}.get

    def find(name: str, given: Any) -> Array:
        if isinstance(given, np.ndarray) and given.size:
            raise TypeError(f"Compress: column {name} expected lists of strings, as ids are, got {given.dtype}")
        return np.fromiter((get(text, -1) for text in given), np.int32, len(given))

    return find


def _hashed(ids: Array) -> Callable[[str, Any], Array]:
    """A row stands where the hash of its id says, or in the next free place."""
    n, bits = len(ids), (2 * len(ids) + 1).bit_length()
    places, last = np.full(2**bits, -1, np.int32), 2**bits - 1
    ids = np.append(ids, 0)  # what the row -1 is compared with

    def place(keys: Array) -> Array:
        k = keys.view(np.uint64)
        return ((k ^ k >> np.uint64(32)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - bits)).astype(INT64)

    rest, at = np.arange(n, dtype=np.int32), place(ids[:n])
    while len(rest):
        free = places[at] < 0
        places[at[free]] = rest[free]
        on = ids[places[at]] != ids[rest]  # another id has the place
        rest, at = rest[on], (at[on] + 1) & last

    def find(name: str, given: Any) -> Array:
        keys = _integers(name, given).astype(INT64, copy=False)
        at = place(keys)
        found = places[at]
        on = np.flatnonzero((found >= 0) & (ids[found] != keys))
        while len(on):
            at[on] = (at[on] + 1) & last
            found[on] = places[at[on]]
            on = on[(found[on] >= 0) & (ids[found[on]] != keys[on])]
        return found

    return find


# ------------------------------------------------------------------------------------------------------ without engines


def run(
    compress: Compress, files: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str], *, workers: int = 1,
    rows: int = 1024, columns: Sequence[str] | None = None, progress: bool = False,
) -> list[Path]:  # fmt: skip
    """Parquet files through `compress`, each to one of its name in the folder `out`. Needs pyarrow.

    Files that are there are done: however a run has ended, the same call goes on with it. A file is written aside and
    renamed, so it is there whole or not at all; *.part are remains of what was killed. _hisac.json, beside the files,
    is the `mark` of the run: a folder takes no files of another book, table, column or option.

    Args:
        compress: with paths, where workers are several
        files: paths of different names
        out: a folder, which is made
        workers: processes, each of which takes a file at a time. A script needs `if __name__ == "__main__":` then
        rows: of a batch
        columns: names of the columns that are read. None: all
        progress: True for a bar of histories

    Returns the paths in `out`, in the order of `files`. Raises ValueError for two files of one name, or a folder of
    another run; BrokenProcessPool where a worker was killed; and what `compress` raises.
    """
    from pyarrow import parquet

    sources, folder = [Path(file) for file in files], Path(out)
    ends = [folder / source.name for source in sources]
    if len(set(ends)) < len(ends):
        raise ValueError("run: files expected of different names, got two of one")
    folder.mkdir(parents=True, exist_ok=True)
    mark, known = json.dumps(compress.mark(), indent=1) + "\n", folder / "_hisac.json"
    if known.exists() and known.read_text() != mark:
        raise ValueError(f"run: {folder} expected empty or of the same run, got one of another {known.name}")
    with _aside(known) as file:
        file.write(mark.encode())
    tasks = [(source, end, rows, columns) for source, end in zip(sources, ends, strict=True) if not end.exists()]
    total = sum(parquet.read_metadata(source).num_rows for source, *_ in tasks) if progress else 0
    with bar("compress histories", total) if progress else nullcontext(lambda n: None) as advance:
        if workers <= 1:
            for task in tasks:
                advance(_file(compress, *task))
            return ends
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (compress,)) as pool:
            try:
                for done in as_completed([pool.submit(_work, task) for task in tasks]):
                    advance(done.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return ends


_mine: Compress  # of a worker of `run`


def _begin(compress: Compress) -> None:
    global _mine
    _mine = compress


def _work(task: Any) -> int:
    return _file(_mine, *task)


def _file(compress: Compress, source: Path, end: Path, rows: int, columns: Any) -> int:
    """One file to the other -> how many rows it has."""
    from pyarrow import parquet

    with parquet.ParquetFile(source) as file, _aside(end) as aside, ExitStack() as stack:
        writer, n = None, int(file.metadata.num_rows)
        schema = file.schema_arrow
        empty = schema.empty_table().select(schema.names if columns is None else columns)
        for batch in file.iter_batches(rows, columns=columns) if n else [empty]:
            made = compress(batch)
            writer = writer or stack.enter_context(parquet.ParquetWriter(aside, made.schema))
            writer.write(made) if n else writer.write_table(made)
    return n


@contextmanager
def _aside(end: Path) -> Iterator[Any]:
    """A file to be written, renamed to `end` when it is whole."""
    aside = end.with_name(f".{end.name}.{secrets.token_hex(8)}.part")
    try:
        with open(aside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, end)
    finally:
        aside.unlink(missing_ok=True)
