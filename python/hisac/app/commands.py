# SPDX-License-Identifier: Apache-2.0
"""The verbs over files: checked reading, work in chunks with progress, whole outputs. Raises what `files` raises."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import hisac

from . import files
from .files import Array
from .progress import fit_progress, progress

ROWS = 2**16  # behaviours a step; a user with more is one step


# ------------------------------------------------------------------------------------------------------------ reading


def checked(spec: str, name: str, dims: str, kinds: str, expected: str) -> Array:
    """An array with the dimensions named in `dims`, such as "rows, levels", and a dtype of one of NumPy's `kinds`."""
    array = files.read(spec)
    if array.ndim != dims.count(",") + 1:
        raise ValueError(f"{spec}: {name} is {list(array.shape)}, expected [{dims}]")
    if array.dtype.kind not in kinds:
        raise ValueError(f"{spec}: {name} is {array.dtype}, expected {expected}")
    return array


def matrix(spec: str, name: str) -> Array:
    """x, v: [rows, width], float16 or float32."""
    array = checked(spec, name, "rows, width", "f", "float16 or float32")
    kind = np.float16 if array.dtype.itemsize == 2 else np.float32
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, kind)


def integers(spec: str, name: str, dims: str) -> Array:
    """codes, ids, offsets: integers with the dimensions named in `dims`."""
    array = checked(spec, name, dims, "iu", "integers")
    return np.asarray(array, array.dtype.newbyteorder("="))


def load_book(path: str) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return hisac.Codebook.load(path)
    except hisac.CorruptFileError as error:
        raise hisac.CorruptFileError(f"{path}: {error}") from error


def same_width(book: Any, x: Array, spec: str) -> None:
    if x.shape[1] != book.width:
        raise ValueError(f"{spec}: x is {list(x.shape)}, expected width {book.width}, the codebook's")


def spans(users: str | None, offsets: str | None, rows: int) -> tuple[Array, Array]:
    """(id of each user, offsets [users + 1] over `rows` behaviours), from either file."""
    if users is not None:
        ids = integers(users, "user", "rows")
        if len(ids) != rows:
            raise ValueError(f"{users}: {len(ids)} rows, expected {rows}, as x")
        first = np.flatnonzero(np.r_[len(ids) > 0, ids[1:] != ids[:-1]])
        names, runs = np.unique(ids[first], return_counts=True)
        if (runs > 1).any():
            raise ValueError(f"{users}: the rows of user {names[runs > 1][0]} do not stand together, sort by user")
        return ids[first], np.append(first, rows)
    assert offsets is not None
    found = integers(offsets, "offsets", "users + 1").astype(np.int64)
    if len(found) == 0 or found[0] < 0 or found[-1] > rows or (np.diff(found) < 0).any():
        raise ValueError(f"{offsets}: expected offsets that never fall, within 0 .. {rows}, the rows of x")
    return np.arange(len(found) - 1), found


def steps(offsets: Array) -> Iterator[tuple[int, int]]:
    """Users in runs of about ROWS behaviours."""
    users, begin = len(offsets) - 1, 0
    while begin < users:
        end = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + ROWS, side="right")) - 1)
        yield begin, min(end, users)
        begin = end


# -------------------------------------------------------------------------------------------------------------- verbs


def fit(spec: str, out: str, *, sizes: tuple[int, ...], iterations: int, seed: int) -> None:
    files.check_out(out, (".safetensors",))
    x = matrix(spec, "x")
    with fit_progress(len(sizes), iterations) as tell:
        book = hisac.fit(x, sizes, iterations=iterations, seed=seed, progress=tell)
    with files.aside(out) as f:
        f.write(book.to_bytes())
    report = book.report
    assert report is not None  # `fit` always leaves one
    left_out = f" ({report.left_out:,} left out: NaN or too large)" if report.left_out else ""
    print(f"{out}: {' x '.join(map(str, book.sizes))} codes of width {book.width} from {report.rows:,} rows{left_out}")
    print(f"mean squared error after each level: {', '.join(f'{e:.4g}' for e in report.error)}")
    if any(report.unused):
        print(f"codes that no row has: {', '.join(map(str, report.unused))}; smaller --sizes would do")


def encode_rows(book: Any, x: Array) -> Array:
    codes = np.empty((len(x), book.levels), np.int32)
    with progress("encode", len(x)) as advance:
        for begin in range(0, len(x), ROWS):
            codes[begin : begin + ROWS] = hisac.encode(book, x[begin : begin + ROWS])
            advance(len(x[begin : begin + ROWS]))
    return codes


def encode(path: str, spec: str, out: str) -> None:
    files.check_out(out, (".npy",))
    book, x = load_book(path), matrix(spec, "x")
    same_width(book, x, spec)
    codes = encode_rows(book, x)
    files.write(out, {"codes": codes})
    absent = int((codes < 0).any(1).sum())
    print(f"{out}: codes {list(codes.shape)} int32" + (f", {absent:,} rows of -1 (NaN or infinity)" if absent else ""))


def compress(
    path: str, spec: str, out: str, *, v: str | None, codes: str | None, user: str | None, offsets: str | None,
    budget: int | None, fanout: tuple[int, ...] | None, temperature: float, normalize: str,
) -> None:  # fmt: skip
    files.check_out(out, (".npz", ".safetensors"))
    book, x = load_book(path), matrix(spec, "x")
    same_width(book, x, spec)
    values = x if v is None else matrix(v, "v")
    if len(values) != len(x):
        raise ValueError(f"{v}: v is {list(values.shape)}, expected {len(x)} rows, as x")
    ids, bounds = spans(user, offsets, len(x))

    def results(batch: hisac.Histories) -> dict[str, Array]:
        """What is written of some histories."""
        made = hisac.compress(book, batch, budget=budget, fanout=fanout, temperature=temperature, normalize=normalize)
        votes = {"codes": made.agents.codes, "votes": made.agents.votes, "count": made.agents.count}
        return {"tokens": made.tokens, "lse": made.lse, **votes}

    none = np.empty((0, book.levels), np.int32)
    nobody = results(hisac.Histories(x[:0], values[:0], [0], none))  # refuses bad options before any work
    if codes is None:
        own = encode_rows(book, x)
    else:
        own = integers(codes, "codes", "rows, levels")
        own = np.where((own < 0) | (own >= 2**31), -1, own).astype(np.int32)
        if own.shape != (len(x), book.levels):
            raise ValueError(f"{codes}: codes is {list(own.shape)}, expected {[len(x), book.levels]}")
    whole = {name: np.empty((len(ids), *array.shape[1:]), array.dtype) for name, array in nobody.items()}
    with progress("compress users", len(ids)) as advance:
        for begin, end in steps(bounds):
            some = bounds[begin:end], bounds[begin + 1 : end + 1]
            for name, part in results(hisac.Histories(x, values, some, own)).items():
                whole[name][begin:end] = part
            advance(end - begin)
    files.write(out, {**whole, "users": ids, "fingerprint": np.array([book.fingerprint], np.uint64)})
    tokens, count = whole["tokens"], whole["count"]
    print(
        f"{out}: tokens {list(tokens.shape)} {tokens.dtype} of {bounds[-1] - bounds[0]:,} behaviours;"
        f" agents a user: {count.mean() if len(ids) else 0:.1f} of {tokens.shape[1]}"
    )


def inspect(path: str, spec: str | None) -> None:
    book = load_book(path)
    seen = None if spec is None else tried_on(book, spec)
    leaves = int(np.prod([float(size) for size in book.sizes]))
    print(
        f"{path}: {book.levels} level{'s' * (book.levels > 1)}, {' x '.join(map(str, book.sizes))} codes,"
        f" {leaves:,} leaves, width {book.width}, fingerprint {book.fingerprint:016x}"
    )
    print("level  codes  distinct  mean norm")
    for level, c in enumerate(book.centers, 1):
        norm = float(np.linalg.norm(c.astype(np.float64), axis=1).mean())
        print(f"{level:5}  {len(c):5}  {len(np.unique(c, axis=0)):8}  {norm:9.4g}")
    if seen is not None:
        print(f"\n{seen}")


def tried_on(book: Any, spec: str) -> str:
    """How the codebook does on the rows of a file, as text."""
    x = matrix(spec, "x")
    same_width(book, x, spec)
    codes = encode_rows(book, x)
    present = (codes >= 0).all(1)
    if not present.any():
        raise ValueError(f"{spec}: x is {list(x.shape)} without a row free of NaN and infinity, expected at least one")
    absent = f", {(~present).sum():,} absent (NaN or infinity)" if not present.all() else ""
    return f"{spec}: {len(x):,} rows{absent}\n{health(book, x[present].astype(np.float32), codes[present])}"


def health(book: Any, x: Array, codes: Array) -> str:
    """What the rows x [n, D] with codes [n, L] say of the codebook, as text."""
    rest = x.astype(np.float64)
    variance = float(np.square(rest - rest.mean(0)).sum(1).mean())
    lines = ["level   used   dead  effective   error  of variance"]
    for level, c in enumerate(book.centers):
        rest = rest - c[codes[:, level]]
        share = np.bincount(codes[:, level], minlength=len(c)) / len(codes)
        used = share[share > 0]
        effective = float(np.exp(-(used * np.log(used)).sum()))
        error = float(np.square(rest).sum(1).mean())
        part = f"{error / variance:11.1%}" if variance > 0 else f"{'-':>11}"
        lines.append(f"{level + 1:5}  {len(used):5}  {len(c) - len(used):5}  {effective:9.1f}  {error:6.4g}  {part}")
    _, first = np.unique(x, axis=0, return_index=True)
    rows, distinct = (np.unique(book.leaves(c), return_counts=True)[1] for c in (codes, codes[first]))  # of each leaf
    shared, shared_distinct = (n[n > 1].sum() / n.sum() for n in (rows, distinct))
    spread = f"mean {rows.mean():.1f}, median {np.median(rows):g}, most {rows.max():,}"
    lines += [
        "used: codes that a row has; dead: the others; effective: exp of the entropy of their use",
        f"leaves in use: {len(rows):,}; rows a leaf: {spread}",
        f"collisions: {shared:.1%} of the rows share their leaf;"
        f" of the {len(first):,} distinct rows {shared_distinct:.1%}",
    ]
    return "\n".join(lines)
