# SPDX-License-Identifier: Apache-2.0
"""The verbs over files: checked reading, work in chunks with progress, whole outputs. Raises what `files` raises."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import hisac

from ..progress import progress
from . import files
from .files import Array, Column

ROWS = 2**16  # behaviours a step; a user with more is one step


# ------------------------------------------------------------------------------------------------------------ reading


def checked(spec: str, name: str, dims: str, kinds: str | tuple[str, ...], expected: str) -> Array:
    """An array with the dimensions named in `dims`, such as "rows, levels", of a dtype whose code begins as `kinds`."""
    array: Array = files.read(spec)
    if array.ndim != dims.count(",") + 1:
        raise ValueError(f"{spec}: {name} is {list(array.shape)}, expected [{dims}]")
    if not array.dtype.str[1:].startswith(kinds):
        raise ValueError(f"{spec}: {name} is {array.dtype}, expected {expected}")
    return array


def matrix(spec: str, name: str, scale: str | None = None, book: Any = None) -> Array:
    """x, v: [rows, width], float16 or float32; or int8 times `scale`, a number or an array [rows]. book: whose width
    x has."""
    kinds, expected = ("f", "floats, or int8 X with --scale") if scale is None else ("i1", "int8, as --scale is given")
    array = checked(spec, name, "rows, width", kinds, expected)
    if book is not None and array.shape[1] != book.width:
        raise ValueError(f"{spec}: {name} is {list(array.shape)}, expected width {book.width}, the codebook's")
    if scale is None:
        kind = np.float16 if array.dtype.itemsize == 2 else np.float32
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, kind)
    factors = checked(scale, "scale", "rows", "f", "floats") if files.SPEC.fullmatch(scale) else np.r_[float(scale)]
    if len(factors) not in (1, len(array)):
        raise ValueError(f"{scale}: {len(factors)} rows, expected {len(array)}, as {name}")
    return np.multiply(array, factors[:, None], dtype=np.float32, casting="unsafe")


def integers(spec: str, name: str, dims: str) -> Array:
    """codes, offsets: integers with the dimensions named in `dims`."""
    array = checked(spec, name, dims, ("i", "u"), "integers")
    return np.asarray(array, array.dtype.newbyteorder("="))


def ids(spec: str, name: str, dims: str = "rows") -> Column:
    """Integers or strings, one a row; or, where `dims` says so, a list a row, as a matrix has."""
    found = files.read(spec, loose=True)
    values, lengths = found if isinstance(found, tuple) else (found, None)
    if values.ndim == 2 and "lists" in dims:
        values, lengths = values.reshape(-1), np.full(len(values), values.shape[1])
    if values.ndim != 1 or (lengths is not None and "lists" not in dims):
        raise ValueError(f"{spec}: {name} is {list(values.shape) if lengths is None else 'lists'}, expected [{dims}]")
    if values.dtype.kind not in "iuOU":
        raise ValueError(f"{spec}: {name} is {values.dtype}, expected integers or strings")
    return values.astype(values.dtype.newbyteorder("="), copy=False), lengths


def load_book(path: str) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return hisac.Codebook.load(path)
    except hisac.CorruptFileError as error:
        raise hisac.CorruptFileError(f"{path}: {error}") from error


def codes_of(spec: str, book: Any, rows: int, unchecked: bool) -> Array:
    """Codes [rows, levels] of `encode`, beside which the codebook's fingerprint stands; unchecked: or none."""
    codes = integers(spec, "codes", "rows, levels")
    codes = np.where((codes < 0) | (codes >= 2**31), -1, codes).astype(np.int32)
    if codes.shape != (rows, book.levels):
        raise ValueError(f"{spec}: codes is {list(codes.shape)}, expected {[rows, book.levels]}")
    ours = f"{book.fingerprint:016x}"
    try:
        theirs = " ".join(f"{int(mark):016x}" for mark in np.ravel(files.read(spec, beside="fingerprint")))
    except files.Refused:
        theirs = ours if unchecked else "none (`encode` writes it to .npz and .safetensors; or give --unchecked-codes)"
    if theirs != ours:
        raise ValueError(f"{spec}: fingerprint of the codes' codebook expected {ours}, got {theirs}")
    return codes


def rows_of(items: Array, item: str, names: str | None, table: str, size: int) -> Array:
    """The row of each item in the table, x or v, of `size` rows: by the names of these, or its number; -1 for none."""
    if names is None and items.dtype.kind not in "iu":
        raise ValueError(f"{item}: item is strings, expected integers, the rows of {table}, or --{table}-item")
    there = range(size) if names is None else ids(names, f"{table}-item")[0].tolist()
    if len(there) != size:
        raise ValueError(f"{names}: {len(there)} rows, expected {size}, as {table}")
    row = dict(zip(there, range(size), strict=True))
    if twice := [name for i, name in enumerate(there) if row[name] != i]:
        raise ValueError(f"{names}: item {twice[0]} has several rows, expected one")
    found = np.empty(len(items), np.int64)
    for begin in range(0, len(items), ROWS):
        found[begin : begin + ROWS] = [row.get(name, -1) for name in items[begin : begin + ROWS].tolist()]
    lost = items[found < 0]
    if there and 0 < len(lost) == len(items):
        raise ValueError(f"{item}: expected items of {table}, such as {there[0]!r}, got none, but {lost.tolist()[0]!r}")
    if len(lost):
        print(f"{item}: {len(lost):,} behaviours of {len(np.unique(lost)):,} items without a row of {table}")
    return found


def spans(user: str | None, offsets: str | None, rows: int, lengths: Array | None) -> tuple[Array, Array]:
    """(id of each user, offsets [users + 1] over `rows` behaviours), from either file, or of lists of these lengths."""
    if (offsets is None) == (user is None and lengths is None):
        raise ValueError("expected one of --user, --offsets and an --item of lists, whose users --user may name")
    if lengths is not None:
        bounds = np.append(0, np.cumsum(lengths, dtype=np.int64))
    elif offsets is not None:
        bounds = integers(offsets, "offsets", "users + 1").astype(np.int64)
        if len(bounds) == 0 or bounds[0] < 0 or bounds[-1] > rows or (np.diff(bounds) < 0).any():
            raise ValueError(f"{offsets}: expected offsets that never fall, within 0 .. {rows}, the behaviours")
    if user is None:
        return np.arange(len(bounds) - 1), bounds
    who, wanted = ids(user, "user")[0], rows if lengths is None else len(lengths)
    if len(who) != wanted:
        raise ValueError(f"{user}: {len(who)} rows, expected {wanted}, as there are behaviours or lists")
    if lengths is None:
        first = np.flatnonzero(np.r_[len(who) > 0, who[1:] != who[:-1]])
        who, bounds = who[first], np.append(first, rows)
    names, runs = np.unique(who, return_counts=True)
    if (runs > 1).any():
        raise ValueError(f"{user}: user {names[runs > 1][0]} has several histories, expected one; sort rows by user")
    return who.astype(str) if who.dtype == object else who, bounds


def steps(offsets: Array) -> Iterator[tuple[int, int]]:
    """Users in runs of about ROWS behaviours."""
    users, begin = len(offsets) - 1, 0
    while begin < users:
        end = max(begin + 1, int(np.searchsorted(offsets, offsets[begin] + ROWS, side="right")) - 1)
        yield begin, min(end, users)
        begin = end


# -------------------------------------------------------------------------------------------------------------- verbs


def fit(
    spec: str, out: str, *, scale: str | None, sizes: tuple[int, ...] | None, iterations: int | None, seed: int,
    init: str | None, weights: str | None,
) -> None:  # fmt: skip
    """X is of items, each once: items.npy, items.parquet:embedding (a column of lists), items.parquet:e* (columns).
    It is float16 or float32, or int8 with --scale. BOOK is a .safetensors file, and what it holds has a fingerprint.
    With --init codes keep their numbers: fit so the codebook of a catalogue that has changed."""
    files.check_out(out, (".safetensors",))
    old = None if init is None else load_book(init)
    x = matrix(spec, "x", scale, old)
    w = None if weights is None else checked(weights, "weights", "rows", ("f", "i", "u"), "numbers").astype(np.float32)
    book = hisac.fit(x, sizes, iterations=iterations, seed=seed, init=old, weights=w, progress=True)
    with files.aside(out) as f:
        f.write(book.to_bytes())
    report = book.report
    assert report is not None  # `fit` always leaves one
    left_out = f" ({report.left_out:,} left out: NaN or too large)" if report.left_out else ""
    print(f"{out}: {' x '.join(map(str, book.sizes))} codes of width {book.width} from {report.rows:,} rows{left_out}")
    print(f"mean squared error after each level: {', '.join(f'{e:.4g}' for e in report.error)}")
    if book.moved:
        codes, items = (", ".join(f"{n:,}" for n in numbers) for numbers in book.moved[:2])
        print(f"moved after each level: {codes} codes, {items} of {book.moved.rows:,} items")
    if any(report.unused):
        print(f"codes that no row has: {', '.join(map(str, report.unused))}; smaller --sizes would do")


def encode_rows(book: Any, x: Array) -> Array:
    return np.concatenate([np.empty((0, book.levels), np.int32), *map(book.encode, pieces("encode", x))])


def encode(path: str, spec: str, out: str, *, scale: str | None) -> None:
    """CODES are [rows, levels] int32, -1 for a row with a NaN or an infinity. In .npz and .safetensors they are named
    `codes`, and the codebook's `fingerprint` stands beside them, so that `compress --codes` can refuse those of another
    codebook. In .npy they stand alone, and `compress` takes them with --unchecked-codes only."""
    files.check_out(out, (".npy", ".npz", ".safetensors"))
    book = load_book(path)
    codes = encode_rows(book, matrix(spec, "x", scale, book))
    mark = {} if out.endswith(".npy") else {"fingerprint": np.array([book.fingerprint], np.uint64)}
    files.write(out, {"codes": codes, **mark})
    absent = int((codes < 0).any(1).sum())
    print(f"{out}: codes {list(codes.shape)} int32" + (f", {absent:,} rows of -1 (NaN or infinity)" if absent else ""))


def compress(
    path: str, spec: str, out: str, *, scale: str | None, v: str | None, codes: str | None, unchecked_codes: bool,
    item: str | None, x_item: str | None, v_item: str | None, user: str | None, offsets: str | None,
    temperature: float | None, normalize: hisac.types.Normalize, **rule: Any,
) -> None:  # fmt: skip
    """Tables of events and of items, the commonest case. A row of events is a behaviour; a user's rows stand together:

      --x items.parquet:embedding --x-item items.parquet:id --user events.parquet:user --item events.parquet:item

    A table with a row for each user, and a list of items of any length:

      --x items.parquet:embedding --x-item items.parquet:id --user users.parquet:id --item users.parquet:items

    An embedding in each event, without a table of items:

      --x events.parquet:embedding --user events.parquet:user

    Users and items are integers or strings, in .csv files too (events.csv:item); items and --x-item are the same kind.
    With --item, X is a table of items: each is encoded once, and CODES are of its rows. Without --x-item an item is a
    row number of X, from 0. A behaviour whose item has no row in X is left out, and such are counted.

    V has a row for each row of X; or one for each behaviour; or one for each of --v-item. A behaviour whose item has no
    row in V votes, but is not aggregated.

    CODES are checked: `encode` writes the fingerprint of their codebook into .npz and .safetensors files.

    --normalize: the softmax is over a user's behaviours (history, as in the paper), or over the agents, which is better
    in the demo with --budget.

    TOKENS holds, for each user, in the order they came: users (integers, or strings, which only .npz can hold), tokens
    [users, M, width of V], lse and log_share [users, M], the agents' codes [users, M, levels] and votes [users, M], and
    their count [users]; and the codebook's fingerprint. With --offsets, or lists without --user, users are 0, 1, .."""
    files.check_out(out, (".npz", ".safetensors"))
    book = load_book(path)
    x = matrix(spec, "x", scale, book)
    values = x if v is None else matrix(v, "v")
    items, x_ids, v_ids, lengths = x, None, None, None
    if item is not None:
        items, lengths = ids(item, "item", "rows] or [users, lists")
        x_ids = v_ids = rows_of(items, item, x_item, "x", len(x))
        if v_item is not None:
            v_ids = rows_of(items, item, v_item, "v", len(values))
        elif v is not None and len(values) == len(items):
            v_ids = None
            if len(x) == len(items):
                raise ValueError(f"{v}: {len(x)} rows, as x and as there are behaviours; name its items with --v-item")
    elif x_item or v_item:
        raise ValueError("--x-item and --v-item need an --item")
    if v_item is None and len(values) not in (len(x), len(items)):
        raise ValueError(f"{v}: v is {list(values.shape)}, expected {len(x)} rows, as x")
    who, bounds = spans(user, offsets, len(items), lengths)
    if who.dtype.kind == "U" and out.endswith(".safetensors"):
        raise ValueError(f"{out}: users are strings, expected .npz")

    def results(batch: hisac.Histories) -> dict[str, Array]:
        """What is written of some histories."""
        made = hisac.compress(book, batch, temperature=temperature, normalize=normalize, **rule)
        votes = {"codes": made.agents.codes, "votes": made.agents.votes, "count": made.agents.count}
        return {"tokens": made.tokens, "lse": made.lse, "log_share": made.log_share, **votes}

    # refuses bad options before any work
    nobody = results(hisac.Histories(x[:0], values[:0], [0], np.empty((0, book.levels), np.int32)))
    own = encode_rows(book, x) if codes is None else codes_of(codes, book, len(x), unchecked_codes)
    whole = {name: np.empty((len(who), *array.shape[1:]), array.dtype) for name, array in nobody.items()}
    with progress("compress users", len(who)) as advance:
        for begin, end in steps(bounds):
            some = bounds[begin:end], bounds[begin + 1 : end + 1]
            for name, part in results(hisac.Histories(x, values, some, own, x_ids, v_ids)).items():
                whole[name][begin:end] = part
            advance(end - begin)
    files.write(out, {**whole, "users": who, "fingerprint": np.array([book.fingerprint], np.uint64)})
    tokens, count = whole["tokens"], whole["count"]
    print(
        f"{out}: tokens {list(tokens.shape)} {tokens.dtype} of {bounds[-1] - bounds[0]:,} behaviours;"
        f" agents a user: {count.mean() if len(who) else 0:.1f} of {tokens.shape[1]}"
    )


def inspect(path: str, spec: str | None, *, scale: str | None) -> None:
    """Without X: the codebook alone. With it: how many codes its rows use, how evenly, and how far away they are, with
    warnings that say what to do (hisac.health)."""
    book = load_book(path)
    seen = None if spec is None else tried_on(book, spec, scale)
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


def pieces(text: str, x: Array) -> Iterator[Array]:
    """x in steps, with progress."""
    with progress(text, len(x)) as advance:
        for begin in range(0, len(x), ROWS):
            yield x[begin : begin + ROWS]
            advance(len(x[begin : begin + ROWS]))


def tried_on(book: Any, spec: str, scale: str | None) -> str:
    """How the codebook does on the rows of a file, as text."""
    x = matrix(spec, "x", scale, book)
    try:
        seen = hisac.health(book, lambda: pieces("encode", x))
    except ValueError:
        text = "without a row free of NaN and infinity, expected at least one"
        raise ValueError(f"{spec}: x is {list(x.shape)} {text}") from None
    absent = f", {seen.absent:,} absent (NaN or infinity)" if seen.absent else ""
    lines = [f"{spec}: {len(x):,} rows{absent}", "level   used   dead  effective   error  of variance"]
    for number, level in enumerate(seen.levels, 1):
        part = f"{level.error / seen.variance:11.1%}" if seen.variance > 0 else f"{'-':>11}"
        dead = level.size - level.used
        lines.append(f"{number:5}  {level.used:5}  {dead:5}  {level.effective:9.1f}  {level.error:6.4g}  {part}")
    mean, median, most = seen.rows_a_leaf
    lines += [
        "used: codes that a row has; dead: the others; effective: exp of the entropy of their use",
        f"leaves in use: {seen.leaves:,}; rows a leaf: mean {mean:.1f}, median {median:g}, most {most:,}",
        f"collisions: {seen.shared:.1%} of the rows share their leaf;"
        f" of the {seen.distinct:,} distinct rows {seen.shared_distinct:.1%}",
        *(f"warning: {warning}" for warning in seen.warnings),
    ]
    return "\n".join(lines)


def migrate(path: str, new: str, spec: str, out: str, *, scale: str | None, votes: str | None) -> None:
    """MAP has leaves [n, levels] and to [n, levels], an old leaf and the new one of its items, -1 where they have no
    common one; codes_0, codes_1, .., the same of the codes of each level; and both fingerprints, old and new."""
    files.check_out(out, (".npz", ".safetensors"))
    old, book = load_book(path), load_book(new)
    x = matrix(spec, "x", scale, old)
    v = None if votes is None else checked(votes, "votes", "rows", ("f", "i", "u"), "numbers").astype(np.float32)
    found = hisac.migrate(old, book, x, votes=v)
    codes = {f"codes_{level}": c for level, c in enumerate(found.codes)}
    marks = np.array([old.fingerprint, book.fingerprint], np.uint64)
    files.write(out, {"leaves": found.leaves, "to": found.to, **codes, "fingerprints": marks})
    for what, moved, lost in (
        ("items", found.moved_items, found.lost_items),
        ("votes", found.moved_votes, found.lost_votes),
    ):
        levels = ", ".join(f"{part:.2%}" for part in moved)
        print(
            f"{out}: of the {what}, moved after each level: {levels}; in leaves that no new one stands for: {lost:.2%}"
        )


def bundle(path: str, spec: str, item: str, *, scale: str | None, book: str | None) -> None:
    """With --book a new BUNDLE, a folder of the codebook and the items that it was fitted on. Without, items that are
    new are encoded and added, and it says whether they have drifted so far that a refit is due. IDS are integers or
    strings."""
    names = ids(item, "item")[0]
    names = names.astype(str) if names.dtype == object else names
    if book is None:
        kept = hisac.Bundle(path)
        x = matrix(spec, "x", scale, kept.book)
        kept.append(names, x)
    else:
        made = load_book(book)
        x = matrix(spec, "x", scale, made)
        kept = hisac.Bundle.create(path, made, names, x)
    print(f"{path}: {len(kept.ids):,} items, {len(x):,} of them new, of codebook {kept.book.fingerprint:016x}")
    if book is None and kept.book.report:
        seen = kept.drift()
        due = "a refit is due (fit --init)" if seen.due else "no refit is due"
        print(f"error of {seen.items:,} items since the fit: {seen.ratio:.2f} times what is to be expected; {due}")
