# SPDX-License-Identifier: Apache-2.0
"""Arrays are read from .csv, .npy, .npz, .parquet and .safetensors files, and written whole or not at all.

An array is named PATH or PATH:KEY. In .npz and .safetensors, KEY is the array's name; without one the file must hold
one array, beside which a fingerprint may stand. In a table, .parquet or .csv, KEY is a column. A matrix is a column of
lists of one length, or several columns: a,b,c or e*, or all where there is no KEY. A .csv file has a header. Its
columns are integers, where all are written as integers are (not 007), or floats, or strings. Reading tables needs
pyarrow. Embeddings are float16 or float32 (float64 is converted), or int8 with --scale.
"""

import difflib
import fcntl
import json
import math
import os
import re
import secrets
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .. import CorruptFileError

Array = NDArray[Any]

MOST_HEADER = 100 * 2**20  # bytes of a safetensors header; a longer one is a hostile or broken file
MOST_NAMES = 8  # in a message
# Rows of a table in Arrow's memory at once, and of a Column. Lists of 2^17 values, and of 2^15 strings of 60 bytes,
# still fit int32 offsets.
BATCH, LOOSE = 2**14, 2**10
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "BF16": "<u2",
}  # fmt: skip
NAMES = {np.dtype(code): name for name, code in DTYPES.items() if name != "BF16"}
PART = re.compile(r"\.hisac-(?P<pid>[1-9]\d{0,8})-[0-9a-f]{16}\.part")


# ------------------------------------------------------------------------------------------------------------ reading


class Refused(ValueError):
    """What is wrong with the question, not with the file."""


Column = tuple[Array, Array | None]
"""Of a table: numbers, or strings as objects, equal ones the same object; and, where the rows are lists, the length of
each, whose values then stand one list after the other."""


def read(spec: str, *, loose: bool = False, beside: str | None = None) -> Any:
    """The array that `spec` (PATH or PATH:KEY) names, or that of the key `beside` in the same file.

    Returns a NumPy array; a .npy file is mapped (changes stay in memory); bfloat16 becomes float32. loose: of a table
    its Column, which may have strings, and lists of any length. Raises ValueError (unknown ending, no such key),
    CorruptFileError, OSError.
    """
    match = SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f"{spec}: unknown kind of file, expected PATH or PATH:KEY with {', '.join(READERS)}")
    path, key = Path(match["path"]), beside or match["key"]
    if not path.is_file():  # opening a FIFO would wait
        raise FileNotFoundError(f"{path}: no {'regular' if path.exists() else 'such'} file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return READERS[path.suffix](path, key, loose)
    except Exception as error:  # whatever a damaged file brings about
        if isinstance(error, (Refused, CorruptFileError)) or (isinstance(error, OSError) and error.filename):
            raise
        kind = OSError if isinstance(error, MemoryError) else CorruptFileError
        text = cut(" ".join(str(error).split()) or type(error).__name__, 300)
        raise kind(f"{path}: not a readable {path.suffix} file ({text})") from error


def cut(text: str, most: int) -> str:
    """`text` without its middle, where it is longer than `most`."""
    return text if len(text) <= most else f"{text[: most - 54]} .. {text[-50:]}"


def few(names: Sequence[str], wanted: str | None) -> str:
    """Names for a message: a few of them, those like `wanted` first, and how many more there are."""
    alike = [name for name in names[: 2**16] if len(name) < 200]  # comparing takes some 40 us a name
    shown = [*dict.fromkeys([*difflib.get_close_matches(wanted or "", alike, MOST_NAMES), *names])][:MOST_NAMES]
    more = f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else ""
    return ", ".join(cut(name, 200) for name in shown) + more


def pick(path: Path, names: Sequence[str], key: str | None) -> str:
    """The name to read: `key`, or the only one there is beside a fingerprint."""
    if key is None and len(others := [name for name in names if name != "fingerprint"]) == 1:
        return others[0]
    if key is None or key not in names:
        asked = "several arrays, none named" if key is None else f"no array {key!r}"
        raise Refused(f"{path}: {asked}; expected {path.name}:KEY with KEY one of {few(sorted(names), key)}")
    return key


def read_npy(path: Path, key: str | None, loose: bool) -> Array:
    if key is not None:
        raise Refused(f"{path}: a .npy file holds one array, got the key {key!r}")
    array: np.memmap[Any, Any] = np.load(path, mmap_mode="c", allow_pickle=False)
    if path.stat().st_size != array.offset + array.nbytes:
        raise ValueError(f"expected {array.offset + array.nbytes} bytes, got {path.stat().st_size}")
    return array


def read_npz(path: Path, key: str | None, loose: bool) -> Array:
    with zipfile.ZipFile(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        with archive.open(members[pick(path, list(members), key)]) as member:
            array: Array = np.lib.format.read_array(member, allow_pickle=False)
            if member.read(1):  # the checksum is compared at the end of the member
                raise ValueError("more bytes than its header says")
            return array


# ------------------------------------------------------------------------------------------------------------- tables


def read_table(path: Path, key: str | None, loose: bool) -> Array | Column:
    """Columns of .parquet or .csv as an array [T] or [T, D], or one as a Column, copied from Arrow batch by batch: no
    column is in memory twice."""
    try:
        import pyarrow as pa
        from pyarrow import csv, parquet
    except ImportError:
        raise Refused(f"{path}: reading {path.suffix} needs pyarrow, try: pip install pyarrow") from None
    with open(path, "rb") as f:
        if path.suffix == ".csv":
            names = columns(path, csv.open_csv(f).schema.names, key, loose)
            f.seek(0)
            kinds, missing = dict.fromkeys(names, pa.string()), {"null_values": [""], "strings_can_be_null": True}
            options = csv.ConvertOptions(include_columns=list(kinds), column_types=kinds, **missing)
            texts = csv.read_csv(f, convert_options=options)
            table = pa.table({name: typed(texts[name]) for name in kinds})
            schema, rows, batches = table.schema, len(table), iter(table.to_batches(BATCH))
        else:
            file = parquet.ParquetFile(f, pre_buffer=False, buffer_size=2**20)  # reads no more than it decodes
            schema, rows = file.schema_arrow, file.metadata.num_rows
            names = columns(path, schema.names, key, loose)
            batches = file.iter_batches(LOOSE if loose else BATCH, columns=names)
        first = next(batches, None) or pa.RecordBatch.from_pylist([], schema)
        return gather(path, names, rows, chain([first], batches), {} if loose else None)


def columns(path: Path, there: list[str], key: str | None, loose: bool) -> list[str]:
    """The columns that `key` names, or all; loose: one."""
    if loose:
        return [pick(path, there, key)]
    found = []
    for pattern in (key or "*").split(","):
        some = [n for n in there if n == pattern] or [n for n in there if fnmatchcase(n, pattern)]
        if not some and key:
            raise Refused(f"{path}: no column {pattern!r}; expected some of {few(there, pattern)}")
        found += some
    return found


def typed(texts: Any) -> Any:
    """A column of .csv, read as strings: integers where each is written as one is (not 007), or floats, or strings."""
    import pyarrow as pa

    for kind in (pa.int64(), pa.uint64(), pa.float64()):
        with suppress(pa.ArrowInvalid):
            found = texts.cast(kind)
            return found if kind == pa.float64() or found.cast(texts.type).equals(texts) else texts
    return texts


def gather(path: Path, names: list[str], rows: int, batches: Any, known: dict[str, str] | None) -> Array | Column:
    """What `read_table` returns, of one batch or more; known: for the strings of a Column, None for an array."""
    sizes: list[Any] = []
    widths, seen = [-1] * len(names), 0
    for batch in batches:
        if known is None:
            parts = [numbers(path, name, batch.column(name), width) for name, width in zip(names, widths, strict=True)]
            values, lengths, widths = np.concatenate(parts, axis=1), None, [part.shape[1] for part in parts]
        else:
            values, lengths = pieces(path, names[0], batch.column(names[0]), known)
        if not seen:
            out: Array = np.empty((0, *values.shape[1:]), values.dtype)
        begin, seen = len(out), seen + len(batch)
        out.resize((begin + len(values), *values.shape[1:]), refcheck=False)  # in place, where the system can
        out[begin:] = values
        sizes.append(lengths)
    if seen != rows:
        raise ValueError(f"expected {rows} rows, got {seen}")
    if known is None:
        return out if len(names) > 1 or batch.schema.field(names[0]).type.num_fields else out[:, 0]
    return out, None if lengths is None else np.concatenate(sizes)


def numbers(path: Path, name: str, column: Any, width: int) -> Array:
    """[n, D]: a piece of a column, of numbers (D = 1) or of lists of `width` each, -1 for any."""
    values, lengths = pieces(path, name, column, None)
    found = np.unique(np.ones(1, int) if lengths is None else lengths)
    found = found if width < 0 else np.union1d(found, width)
    if len(found) > 1:
        text = f"expected one length, got {found[0]} to {found[-1]}"
        raise Refused(f"{path}: lists of column {name!r} differ in length, {text}")
    return values.reshape(len(column), found[0] if len(found) else getattr(column.type, "list_size", 0))


def pieces(path: Path, name: str, column: Any, known: dict[str, str] | None) -> Column:
    """A piece of a column; a missing float is NaN. known: the strings before it; None where there may be none."""
    import pyarrow.types as pt

    lists = pt.is_list(column.type) or pt.is_large_list(column.type) or pt.is_fixed_size_list(column.type)
    values = column.flatten() if lists else column
    if pt.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind, what = values.type, "numbers" if known is None else "numbers or strings"
    words = known is not None and (pt.is_string(kind) or pt.is_large_string(kind))
    if not (words or pt.is_integer(kind) or pt.is_floating(kind) or pt.is_boolean(kind)):
        raise Refused(f"{path}: column {name!r} is {column.type}, expected {what} or lists of {what}")
    if lists and column.null_count:
        raise Refused(f"{path}: column {name!r} has missing rows, expected a list in each")
    if values.null_count and not pt.is_floating(kind):
        raise Refused(f"{path}: column {name!r} of {kind} has missing {what}, expected none")
    lengths = column.value_lengths().to_numpy(zero_copy_only=False) if lists else None
    if known is not None and words:
        values = values.dictionary_encode()
        texts = np.array([known.setdefault(text, text) for text in values.dictionary.to_pylist()], object)
        return texts[values.indices.to_numpy(zero_copy_only=False)], lengths
    return values.to_numpy(zero_copy_only=False), lengths


# ------------------------------------------------------------------------------------------------------- safetensors


def read_safetensors(path: Path, key: str | None, loose: bool) -> Array:
    """One tensor of a safetensors file: 8 bytes of header length, a JSON header, then the bytes, without gaps."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        header = safetensors_header(path, f.read(8), f.read, size)
        name = pick(path, list(header), key)
        dtype, shape, begin, _ = header[name]
        if dtype not in DTYPES:
            raise Refused(f"{path}: {name!r} is {cut(dtype, 200)}, expected one of {', '.join(DTYPES)}")
        f.seek(begin)
        array: Array = np.fromfile(f, DTYPES[dtype], math.prod(shape)).reshape(shape)
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array


Entry = tuple[str, tuple[int, ...], int, int]


def safetensors_header(path: Path, prefix: bytes, read_bytes: Callable[[int], bytes], size: int) -> dict[str, Entry]:
    """{name: (dtype, shape, first byte, byte after the last)}, checked to tile the rest of the file exactly.

    A dtype that is not one of DTYPES may stand beside what is read.
    """

    def corrupt(what: str) -> CorruptFileError:
        return CorruptFileError(f"{path}: not a safetensors file: {cut(what, 300)}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise corrupt("a name occurs twice")
        return dict(pairs)

    if len(prefix) < 8:
        raise corrupt(f"expected at least 8 bytes, got {len(prefix)}")
    length = int.from_bytes(prefix, "little")
    if length > min(MOST_HEADER, size - 8):
        raise corrupt(f"a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(read_bytes(length).decode(), object_pairs_hook=unique)
    except CorruptFileError:
        raise
    except (ValueError, RecursionError):  # UTF-8, JSON, a number of 5,000 digits
        raise corrupt("its header is not JSON") from None
    if not isinstance(header, dict):
        raise corrupt("its header is not an object")
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise corrupt(f"{name!r} lacks dtype, shape or data_offsets")
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not (isinstance(dtype, str) and naturals(shape) and naturals(span) and len(span) == 2):
            raise corrupt(f"{name!r} has a bad dtype, shape or data_offsets")
        if dtype in DTYPES and span[1] - span[0] != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
            raise corrupt(f"{name!r} has {span[1] - span[0]} bytes, which does not fit {dtype} {shape}")
        entries[name] = (dtype, tuple(shape), 8 + length + span[0], 8 + length + span[1])
    at = 8 + length
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != at:
            raise corrupt(f"{name!r} overlaps another tensor or leaves a gap")
        at = end
    if at != size:
        raise corrupt(f"expected {at} bytes, got {size}")
    return entries


def naturals(values: Any) -> bool:
    """At most 64 numbers, NumPy's limit of dimensions, each below 2^63."""
    return isinstance(values, list) and len(values) <= 64 and all(type(v) is int and 0 <= v < 2**63 for v in values)


def to_safetensors(arrays: Mapping[str, Array]) -> list[bytes]:
    """The parts of a safetensors file, header first."""
    header: dict[str, Any] = {}
    end = 0
    for name, array in arrays.items():
        if array.dtype not in NAMES:
            raise ValueError(f"{name} is {array.dtype}, which safetensors has no name for")
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    return [len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays.values())]


READERS = {
    ".csv": read_table, ".npy": read_npy, ".npz": read_npz, ".parquet": read_table, ".safetensors": read_safetensors,
}  # fmt: skip
SPEC = re.compile(rf"(?P<path>.*({'|'.join(map(re.escape, READERS))}))(:(?P<key>.+))?", re.DOTALL)


# ------------------------------------------------------------------------------------------------------------ writing


def destination(path: str | Path) -> tuple[Path, os.stat_result | None]:
    """Where writing to `path` goes, behind links, and the regular file there or None. Raises OSError."""
    place = Path(os.path.realpath(path) if os.path.islink(path) else path)
    try:
        old = place.stat()
    except FileNotFoundError:
        return place, None
    if not stat.S_ISREG(old.st_mode):
        kind = "a folder" if stat.S_ISDIR(old.st_mode) else "a device, FIFO or socket"
        raise OSError(f"{path}: is {kind}, expected a file")
    return place, old


@contextmanager
def aside(path: str | Path) -> Iterator[BinaryIO]:
    """A new file to write to, which takes the place of `path` at the end and goes if anything fails before.

    A link stays, and what it leads to is replaced. The mode stays too, and where the system lets us the owner. Nobody
    can foretell the new file's name, or put a link there. It is locked while it is written: see `sweep`.
    """
    place, old = destination(path)
    sweep(place.parent)
    part = place.with_name(f".hisac-{os.getpid()}-{secrets.token_hex(8)}.part")
    try:
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags, 0o600 if old else 0o666)) as f:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(f, fcntl.LOCK_EX)
            yield f
            f.flush()
            os.fsync(f.fileno())
            if old:
                with suppress(OSError):
                    os.fchown(f.fileno(), old.st_uid, old.st_gid)
                os.fchmod(f.fileno(), stat.S_IMODE(old.st_mode))
            os.replace(part, place)
    finally:
        part.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in `folder`: regular files of our name and user, of no process and unlocked."""
    with suppress(OSError):
        for part in folder.glob(".hisac-*.part"):
            found, info = PART.fullmatch(part.name), part.lstat()
            if found and stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid():
                try:
                    os.kill(int(found["pid"]), 0)
                except ProcessLookupError:
                    with open(part, "rb") as f, suppress(BlockingIOError):
                        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by a writer in another container
                        part.unlink()


def check_out(path: str, endings: tuple[str, ...]) -> None:
    """Before any work: can `path` be written, and is it one of the kinds we write? Raises ValueError, OSError."""
    if not path.endswith(endings):
        raise ValueError(f"{path}: unknown kind of output, expected {' or '.join(endings)}")
    folder = destination(path)[0].parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder}: cannot write here")


def write(path: str, arrays: Mapping[str, Array]) -> None:
    """Write .npy (one array), .npz or .safetensors, by the ending; whole or not at all."""
    with aside(path) as f:
        if path.endswith(".npy"):
            (array,) = arrays.values()
            np.save(f, array, allow_pickle=False)
        elif path.endswith(".npz"):
            np.savez(f, **dict(arrays))  # type: ignore[arg-type]  # NumPy's stub takes a name for allow_pickle
        else:
            f.writelines(to_safetensors(arrays))
