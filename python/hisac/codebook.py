# SPDX-License-Identifier: Apache-2.0
"""The global hierarchical codebook: codewords, the tree of their prefixes, files."""

import math
import mmap
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _core
from .arrays import FLOAT32, INT32, INT64, check, empty, give, is_torch, take, take_one, whole
from .fitting import Progress, check_group, fit, moved, of_all_chunks
from .types import Agents, Array, FitReport, Moved


class Codebook:
    """L levels of codewords [C_l, D] float32 and the tree of all code prefixes; immutable.

    A leaf is a full code; its prototype is the sum of the codewords on its path. `fingerprint` names the codewords:
    agents and files carry it, and to use the agents of another codebook is an error; codes do not carry it. Codebooks
    of the same codewords are equal, whatever their temperature and report. Source: HiSAC, global hierarchical codebook.

    >>> import numpy as np
    >>> book = Codebook([np.eye(2, dtype=np.float32), np.zeros((3, 2), np.float32)])
    >>> book.sizes, book.width
    ((2, 3), 2)
    >>> book.encode(np.array([[0.9, 0.2]], np.float32)).tolist()
    [[0, 0]]
    """

    _moved: Moved | None = None

    def __init__(self, centers: Iterable[Array], *, temperature: float | None = None):
        """centers: 1 to 8 arrays [C_l, D] float32, finite; temperature: the default of `route` and `compress`, > 0, or
        None. Raises ValueError, TypeError."""
        if temperature is not None and not 0 < temperature < math.inf:
            raise ValueError(f"Codebook: temperature expected finite and > 0, got {temperature}")
        self._core = _core.Codebook([take_one("Codebook", "centers", c) for c in centers], temperature or 0)
        if temperature is not None and self.temperature is None:
            raise ValueError(f"Codebook: temperature expected above 0 in float32, got {temperature}")

    @classmethod
    def _of(cls, core: _core.Codebook) -> "Codebook":
        book = cls.__new__(cls)
        book._core = core
        return book

    # ---- where codebooks come from

    @classmethod
    def fit(
        cls, x: Any, sizes: int | Iterable[int] | None = None, *, iterations: int | None = None, seed: int = 0,
        init: "Codebook | None" = None, weights: Array = None, process_group: Any = None,
        progress: Progress | bool | None = None,
    ) -> "Codebook":  # fmt: skip
        """Residual k-means, level by level; the same bits on any number of threads, chunks and processes.

        A round assigns rows to their nearest codes exactly and sums rint(w x 2^k) as integers; codes without rows take
        the worst-quantised rows. Rows with a NaN or a value of 2^100 and more are left out and counted in `report`, and
        so are rows so large that they would coarsen the grid of the sums: a row's largest value is 2^(46 - b) times
        that of the median row, b the bits of the number of rows. Rows of zeros take part. Also left out and counted are
        rows whose weight is nothing beside the largest, below 2^(b - 56) of it. The default `temperature` is 0.05 times
        the mean squared distance of a row to its leaf, so it follows the scale of x; there is none where that is 0.

        Memory beside x: T (68 + 4 L) bytes, C (24 D + 150) with C the largest size, 4 D for each code of all levels,
        for each thread 72 C + 2,100 D + 1.6 million, and the chunk at hand; C (8 D + 8) more with a process group.
        No residuals are kept.
        Every pass reads x anew: 2 for a level, 1 for a round, and 1 more for a round in which codes lose their rows or
        which `progress` sees.

        Args:
            x: [T, D] float32, bfloat16 or float16. Or the same rows in chunks [n, D] of any sizes, which do not have to
                be in memory at once: a np.memmap, a function that returns an iterator of chunks, or an iterable that
                can be iterated again. An iterator itself is a TypeError, since it can be read once only. Rows have to
                be the same in every pass: the second one raises ValueError where the largest value of a row is not
                what it was in the first, later ones look at the number of rows alone.
            sizes: the codes of each level, a number alone for one level; (512, 512), or those of `init`.
            iterations: most rounds of a level; 20, or 5 with `init`.
            init: a codebook of these sizes to begin with: codes keep their numbers, and centers move to new means. What
                moved is counted at the end, in `moved`, which encodes x by both.
            weights: [T] float32, what a row counts in means and errors, one array of all chunks together. Rows of a
                weight that is not above 0 and finite are left out. Of the others, which become first centers does not
                depend on it.
            process_group: a torch.distributed.ProcessGroup each of whose processes makes this call with rows of its
                own: the codebook, in each, is that of all rows, process after process. Or an object with rank(), size()
                and add(numbers), which replaces int64 numbers by their sums over the processes. Where one process
                raises, the others wait for it, as long as the group lets them.
            progress: a function of (level, round, mean squared distance), called after a round; True for a bar.

        Raises ValueError, TypeError.
        """
        if init is not None:
            check(init, Codebook, "fit: init")
        given = (init.sizes if init else (512, 512)) if sizes is None else sizes
        counts = [whole("fit", "sizes", n) for n in (given if isinstance(given, Iterable) else [given])]
        for level, size in enumerate(counts):
            if not 1 <= size <= 2**20:
                raise ValueError(f"fit: sizes expected 1 to 2^20 at level {level}, got {size}")
        if init is not None and tuple(counts) != init.sizes:
            raise ValueError(f"fit: sizes expected {init.sizes}, those of init, got {tuple(counts)}")
        check_group(process_group)
        rounds = whole("fit", "iterations", (5 if init else 20) if iterations is None else iterations, 0, 10**6)
        w = None if weights is None else of_all_chunks("fit", "weights", weights)
        start = init.centers if init else ()
        book = cls._of(fit(x, counts, rounds, whole("fit", "seed", seed) % 2**64, start, w, process_group, progress))
        if init is not None:
            book._moved = moved(init, book, x, process_group)
        return book

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Codebook":
        """Read a safetensors file. Raises OSError, CorruptFileError."""
        return cls._of(_core.Codebook.load(_name(path)))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Codebook":
        """The inverse of `to_bytes`. Raises CorruptFileError."""
        return cls._of(_core.Codebook.parse(bytes(memoryview(data))))

    @classmethod
    def view(cls, image: Array) -> "Codebook":
        """A codebook that is an image, the bytes that `image` of another one has, without a copy of its centers: memory
        that processes share, or a mapped file. The image is kept alive and must not change. One that begins at no
        multiple of 64 is copied. Raises CorruptFileError.

        image: uint8 [any], or anything with the buffer protocol, such as bytes and mmap. A file of `save` is no image;
        write one by `path.write_bytes(book.image)`, and map it by `Codebook.view(np.memmap(path, np.uint8, "r"))`.
        """
        if isinstance(image, bytes | bytearray | memoryview | mmap.mmap):
            image = np.frombuffer(image, np.uint8)
        image = np.asarray(take_one("Codebook", "image", image, "any"))
        scratch = _lines(_core.Codebook.view_scratch(image))
        if image.ctypes.data % 64:
            given, image = image, _lines(image.size)
            image[:] = given
        return cls._of(_core.Codebook.view(image, scratch))

    @classmethod
    def from_faiss(cls, quantizer: Any) -> "Codebook":
        """The codewords of a trained faiss.ResidualQuantizer, or of the one in an index (its `rq`). Its beam search may
        choose other codes than `encode`. Raises TypeError for what a codebook cannot express: a LocalSearchQuantizer
        chooses its codewords together, not level by level; an IVF index subtracts a coarse centroid first."""
        kind = type(quantizer).__name__
        rq = quantizer if "IVF" in kind else getattr(quantizer, "rq", quantizer)
        if type(rq).__name__ != "ResidualQuantizer" or not rq.is_trained:
            raise TypeError(f"from_faiss: expected a trained ResidualQuantizer, or an index of one, got {kind}")
        sizes = [2 ** int(rq.nbits.at(level)) for level in range(rq.M)]
        import faiss

        flat = faiss.vector_to_array(rq.codebooks).reshape(-1, rq.d).astype(np.float32)
        return cls(np.split(flat, np.cumsum(sizes)[:-1]))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Array]) -> "Codebook":
        """The codewords of a vector-quantize-pytorch ResidualVQ: entries "...layers.N._codebook.embed" [1, C, D].

        Where it has a project_in, they are of projected x. Raises ValueError for what codewords do not express: an
        implicit neural codebook (mlps), affine parameters, and any other parameter of a layer.
        """
        found: dict[str, dict[int, Array]] = {}
        for name, value in state.items():
            prefix, _, rest = f".{name}".rpartition(".layers.")
            level, _, field = rest.partition(".")
            if field == "_codebook.embed" and level.isdecimal():
                found.setdefault(prefix[1:], {})[int(level)] = take_one("from_state_dict", name, value)
        if len(found) > 1:
            raise ValueError(f"from_state_dict: expected one quantizer, got layers of {sorted(found)}; pass one's part")
        levels = next(iter(found.values()), {})
        got = sorted(levels)
        if got != list(range(len(levels))) or not levels:
            raise ValueError(f"from_state_dict: expected layers.N._codebook.embed for N = 0, 1, .., got levels {got}")
        start = "".join(f"{prefix}." for prefix in found if prefix)
        known = tuple(f"._codebook.{field}" for field in ("embed", "embed_avg", "cluster_size", "initted"))
        if odd := [n for n in state if n.startswith((f"{start}layers.", f"{start}mlps.")) and not n.endswith(known)]:
            raise ValueError(
                f"from_state_dict: expected codewords alone, got {odd[0]!r} too, which they do not express"
            )
        centers = []
        for _, value in sorted(levels.items()):
            shape = tuple(value.shape)
            if len(shape) < 2 or shape[:-2] not in ((), (1,)):
                raise ValueError(f"from_state_dict: embed expected [1, C, D] or [C, D], got {list(shape)}")
            centers.append((value.float() if is_torch(value) else value.astype(np.float32)).reshape(shape[-2:]))
        return cls(centers)

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: aside first, then renamed. Raises OSError."""
        self._core.save(_name(path))

    def to_bytes(self) -> bytes:
        """The same bytes as `save` writes."""
        return self._core.serialize()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_bytes, (self.to_bytes(),)

    # ---- what it is

    @property
    def image(self) -> npt.NDArray[np.uint8]:
        """The codebook as bytes, where they lie, read-only: a head, the centers, and what the verbs read on a GPU. They
        are the same on every machine, and `view` makes a codebook of them."""
        return self._core.image

    @property
    def temperature(self) -> float | None:
        """The default temperature of `route` and `compress`; None where the codebook has none."""
        return self._core.temperature or None

    @property
    def report(self) -> FitReport | None:
        """How `fit` went; None for a codebook that came from elsewhere."""
        found = self._core.report
        return found and FitReport(*found)

    @property
    def moved(self) -> Moved | None:
        """What `fit` moved of the codes and items of `init`; None for any other codebook. Files do not keep it."""
        return self._moved

    @property
    def sizes(self) -> tuple[int, ...]:
        """C_1 .. C_L."""
        return self._core.sizes

    @property
    def levels(self) -> int:
        """L."""
        return self._core.levels

    @property
    def width(self) -> int:
        """D."""
        return self._core.width

    @property
    def fingerprint(self) -> int:
        """64-bit FNV-1a of D and, for each level, C_l and its centers."""
        return self._core.fingerprint

    @property
    def centers(self) -> tuple[npt.NDArray[np.float32], ...]:
        """The codewords, one array [C_l, D] a level (copies)."""
        return tuple(np.array(c) for c in self._core.centers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codebook) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"Codebook(sizes={self.sizes}, width={self.width}, fingerprint={self.fingerprint:016x})"

    # ---- what it does

    def encode(self, x: Array, *, out: Array = None) -> Array:
        """x [T, D] -> codes [T, L] int32; see `hisac.encode`."""
        (x,) = take("encode", "x T D", x)
        codes = give("encode", "out", out, x, (x.shape[0], self.levels), INT32)
        _core.encode(self._core, x, codes)
        return codes

    def leaves(self, codes: Array) -> Array:
        """codes [..., L] int32 -> [...] int64, the leaf's mixed-radix number; -1 for an invalid code.

        The parent's number is the child's, divided by the child level's size and rounded down.
        """
        return self._of_codes("leaves", codes, (), INT64)

    def prototypes(self, codes: Array) -> Array:
        """codes [..., L] int32, or Agents of this codebook -> [..., D] float32: the codewords added from the root down;
        zero for an invalid code. Raises ValueError for agents of another codebook."""
        if isinstance(codes, Agents):
            ours, theirs = self.fingerprint, codes.fingerprint
            if theirs != ours:
                raise ValueError(f"prototypes: agents expected of codebook {ours:016x}, got {theirs:016x}")
            codes = codes.codes
        return self._of_codes("prototypes", codes, (self.width,), FLOAT32)

    def _of_codes(self, verb: str, codes: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """What the core's `verb` makes of codes [..., L]: [..., *shape]."""
        (codes,) = take(verb, "codes", codes)
        if not codes.shape:
            take_one(verb, "codes", codes, "... L")
        rows, out = math.prod(codes.shape[:-1]), empty(codes, (*codes.shape[:-1], *shape), dtype)
        getattr(_core, verb)(self._core, codes.reshape(rows, codes.shape[-1]), out.reshape(rows, *shape))
        return out


def _lines(size: int) -> npt.NDArray[np.uint8]:
    """So many bytes from a multiple of 64 on, not filled."""
    room = np.empty(size + 63, np.uint8)
    begin = -room.ctypes.data % 64
    return room[begin : begin + size]


def _name(path: str | bytes | os.PathLike[Any]) -> bytes:
    name = os.fsencode(path)
    if b"\0" in name:  # C would open what stands before it
        raise ValueError(f"Codebook: path expected no null character, got {os.fsdecode(name)!r}")
    return name
