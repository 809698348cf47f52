# SPDX-License-Identifier: Apache-2.0
"""A user's arrays in .npy, .npz, .parquet and .safetensors files, read strictly and written whole or not at all.

An array is named PATH or PATH:KEY. KEY is the array's name in a .npz or .safetensors file; in a .parquet file it is a
column (of numbers or of equally long lists), or several with commas or a `*`, which become the columns of a matrix.
Without KEY the file must hold one array; a .parquet file without KEY gives all its columns.
"""

import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import CorruptFileError

Array = NDArray[Any]

MOST_HEADER = 100 * 2**20  # bytes of a safetensors header; a longer one is a hostile or broken file
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "BF16": "<u2",
}  # fmt: skip
NAMES = {np.dtype(code): name for name, code in DTYPES.items() if name != "BF16"}
READABLE = (".npy", ".npz", ".parquet", ".safetensors")
SPEC = re.compile(r"(?P<path>.*\.(npy|npz|parquet|safetensors))(:(?P<key>.+))?", re.DOTALL)


# ------------------------------------------------------------------------------------------------------------ reading


def read(spec: str) -> Array:
    """The array that `spec` (PATH or PATH:KEY) names.

    Returns a NumPy array; a .npy file is mapped (changes stay in memory); bfloat16 becomes float32. Raises ValueError
    (unknown ending, no such key), CorruptFileError, OSError.
    """
    match = SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f"{spec}: unknown kind of file, expected PATH or PATH:KEY with {', '.join(READABLE)}")
    path, key = Path(match["path"]), match["key"]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    readers: dict[str, Callable[[Path, str | None], Array]]
    readers = {".npy": read_npy, ".npz": read_npz, ".parquet": read_parquet, ".safetensors": read_safetensors}
    return readers[path.suffix](path, key)


def pick(path: Path, names: list[str], key: str | None) -> str:
    """The name to read: `key`, or the only one there is."""
    if key is None and len(names) == 1:
        return names[0]
    if key not in names:
        asked = "several arrays, none named" if key is None else f"no array {key!r}"
        raise ValueError(f"{path}: {asked}; expected {path.name}:KEY with KEY one of {', '.join(sorted(names))}")
    return key


def read_npy(path: Path, key: str | None) -> Array:
    if key is not None:
        raise ValueError(f"{path}: a .npy file holds one array, got the key {key!r}")
    with broken(path, ".npy"):
        array: Array = np.load(path, mmap_mode="c", allow_pickle=False)
    return array


def read_npz(path: Path, key: str | None) -> Array:
    if not zipfile.is_zipfile(path):
        raise CorruptFileError(f"{path}: not a .npz file")
    with broken(path, ".npz"):
        arrays = np.load(path, allow_pickle=False)
    with arrays:
        name = pick(path, list(arrays.files), key)
        with broken(path, ".npz"):
            array: Array = arrays[name]
            return array


@contextmanager
def broken(path: Path, kind: str) -> Iterator[None]:
    """What NumPy says of a broken file, in one line and one type."""
    try:
        yield
    except CorruptFileError:
        raise
    except (ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile, SyntaxError) as error:
        raise CorruptFileError(f"{path}: not a readable {kind} file ({' '.join(str(error).split())})") from error


def read_parquet(path: Path, key: str | None) -> Array:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(f"{path}: reading .parquet needs pyarrow, try: pip install pyarrow") from None
    try:
        file = pq.ParquetFile(path)
        there = file.schema_arrow.names
        names = there if key is None else [n for part in key.split(",") for n in matching(path, there, part)]
        table = file.read(columns=names)
    except pa.ArrowException as error:
        raise CorruptFileError(f"{path}: not a readable .parquet file ({' '.join(str(error).split())})") from error
    columns = [column_of(path, name, table[name]) for name in names]
    return columns[0] if len(columns) == 1 else np.column_stack(columns)


def matching(path: Path, names: list[str], pattern: str) -> list[str]:
    found = [n for n in names if n == pattern] or [n for n in names if fnmatchcase(n, pattern)]
    if not found:
        raise ValueError(f"{path}: no column {pattern!r}; expected some of {', '.join(names)}")
    return found


def column_of(path: Path, name: str, chunked: Any) -> Array:
    """A parquet column as [T], or [T, D] from lists of D values each; a missing number is NaN."""
    import pyarrow as pa

    column = chunked.combine_chunks()
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = np.unique(column.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False))
        if len(lengths) > 1 or (lengths < 0).any():
            got = "missing rows" if (lengths < 0).any() else f"{lengths.min()} to {lengths.max()}"
            raise ValueError(f"{path}: lists of column {name!r} differ in length, expected one length, got {got}")
        width = int(lengths[0]) if len(lengths) else 0
        return numbers(path, name, column.flatten()).reshape(len(column), width)
    return numbers(path, name, column)


def numbers(path: Path, name: str, column: Any) -> Array:
    import pyarrow as pa

    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"{path}: column {name!r} is {kind}, expected numbers or lists of numbers")
    values: Array = column.to_numpy(zero_copy_only=False)
    return values


# ------------------------------------------------------------------------------------------------------- safetensors


def read_safetensors(path: Path, key: str | None) -> Array:
    """One tensor of a safetensors file: 8 bytes of header length, a JSON header, then the bytes, without gaps."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        header = safetensors_header(path, f.read(8), f.read, size)
        name = pick(path, list(header), key)
        dtype, shape, begin, end = header[name]
        f.seek(begin)
        data = f.read(end - begin)
    if len(data) != end - begin:
        raise CorruptFileError(f"{path}: cut short, expected {end - begin} bytes of {name!r}, got {len(data)}")
    array: Array = np.frombuffer(bytearray(data), DTYPES[dtype]).reshape(shape)
    if dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array


Entry = tuple[str, tuple[int, ...], int, int]


def safetensors_header(path: Path, prefix: bytes, read_bytes: Callable[[int], bytes], size: int) -> dict[str, Entry]:
    """{name: (dtype, shape, first byte, byte after the last)}, checked to tile the rest of the file exactly."""

    def corrupt(what: str) -> CorruptFileError:
        return CorruptFileError(f"{path}: not a safetensors file: {what}")

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
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise corrupt("its header is not JSON") from None
    if not isinstance(header, dict):
        raise corrupt("its header is not an object")
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise corrupt(f"{name!r} lacks dtype, shape or data_offsets")
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise corrupt(f"{name!r} has the unknown dtype {dtype!r}")
        if not (naturals(shape) and naturals(span) and len(span) == 2):
            raise corrupt(f"{name!r} has a bad shape or data_offsets")
        if span[1] - span[0] != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
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
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def to_safetensors(arrays: Mapping[str, Array]) -> list[bytes]:
    """The parts of a safetensors file, header first."""
    header: dict[str, Any] = {}
    parts, at = [], 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array)
        if data.dtype not in NAMES:
            raise ValueError(f"{name} is {data.dtype}, which safetensors has no name for")
        span = [at, at + data.nbytes]
        header[name] = {"dtype": NAMES[data.dtype], "shape": list(array.shape), "data_offsets": span}
        parts.append(data.tobytes())
        at += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    return [len(text).to_bytes(8, "little"), text, *parts]


# ------------------------------------------------------------------------------------------------------------ writing


@contextmanager
def aside(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed onto `path` at the end, removed if anything fails before."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_out(path: str, endings: tuple[str, ...]) -> None:
    """Before any work: can `path` be written, and is it one of the kinds we write? Raises ValueError, OSError."""
    if not path.endswith(endings):
        raise ValueError(f"{path}: unknown kind of output, expected {' or '.join(endings)}")
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: is a folder, expected a file")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder}: cannot write here")


def write(path: str, arrays: Mapping[str, Array]) -> None:
    """Write .npy (one array), .npz or .safetensors, by the ending; whole or not at all."""
    with aside(path) as part:
        if path.endswith(".npy"):
            (array,) = arrays.values()
            np.save(part, array, allow_pickle=False)
        elif path.endswith(".npz"):
            np.savez(part, **dict(arrays))  # type: ignore[arg-type]  # NumPy's stub takes a name for allow_pickle
        else:
            with open(part, "wb") as f:
                f.writelines(to_safetensors(arrays))
