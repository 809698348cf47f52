# SPDX-License-Identifier: Apache-2.0
"""Users, items, and Arrow record batches made by hand, for the tests of `hisac.bulk`."""

import ctypes

import numpy as np

import hisac
from hisac import columns

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 6)).astype(np.float32)
V = RNG.normal(size=(300, 4)).astype(np.float32)
BOOK = hisac.fit(X, (8, 8))
CODES = BOOK.encode(X)
KEYS = RNG.choice(10**12, 300, replace=False) - 10**11
NAMES = np.array([f"item-{i}" if i % 7 else f"Gegenstand-ü{i}" for i in range(300)])
IDS = {"numbers": None, "keys": KEYS, "names": NAMES}


def histories(seed, users=23, most=40):
    """Lists of rows; -1 for items that are not there."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-1, 300, rng.integers(0, most)) for _ in range(users)]


def named(rows, ids):
    """The same lists by ids."""
    if ids is None:
        return list(rows)
    lost = -5 if ids.dtype.kind == "i" else "nothing"
    return [np.array([ids[i] if i >= 0 else lost for i in row], ids.dtype) for row in rows]


def objects(rows):
    out = np.empty(len(rows), object)
    out[:] = rows
    return out


def whole(rows, **options):
    """What `hisac.compress` says of all users at once."""
    ids = np.concatenate([np.empty(0, np.int64), *rows]).astype(np.int64)
    batch = hisac.Histories(X, V, codes=CODES, x_ids=ids, v_ids=ids, lengths=[len(row) for row in rows])
    return hisac.compress(BOOK, batch, **{"budget": 9, **options})


def same(a, b):
    return np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


# -------------------------------------------------------------------------------------------- Arrow's capsules by hand


class Capsules:
    """An Arrow record batch without pyarrow, of columns {name: (format, length, [buffers], [children], dictionary)},
    with an offset of the column at the end where it has one."""

    FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    NEW = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
        ("PyCapsule_New", ctypes.pythonapi)
    )

    TEXT = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)

    def __init__(self, columns, *, offset=0, stream=1, fail=False):
        length = next(iter(columns.values()))[1] - offset
        self.kept, self.columns, self.offset, self.length = [], columns, offset, length
        self.stream, self.fail, self.released = stream, fail, 0
        self.free, self.why = self.FREE(self.release), ctypes.create_string_buffer(b"out of disk")

    def __getitem__(self, name):
        return f"the column {name}"

    def release(self, address):
        self.released += 1

    def node(self, kind, children, dictionary, **fields):
        pointers = (ctypes.c_void_p * max(len(children), 1))(*map(ctypes.addressof, children))
        node = kind(n_children=len(children), release=ctypes.cast(self.free, ctypes.c_void_p).value, **fields)
        node.children = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))
        node.dictionary = None if dictionary is None else ctypes.addressof(dictionary)
        self.kept += [node, pointers, children, dictionary]
        return node

    def schema(self, name, column):
        code, _, _, children, dictionary, *_ = column
        below = [self.schema(n, c) for n, c in children.items()]
        words = None if dictionary is None else self.schema("", dictionary)
        return self.node(columns._Schema, below, words, format=code.encode(), name=name.encode())

    def array(self, column, offset=0):
        _, length, buffers, children, dictionary, *own = column
        offset += sum(own)
        addresses = [None if b is None else np.asarray(b).ctypes.data for b in buffers]
        below = [self.array(c) for c in children.values()]
        words = None if dictionary is None else self.array(dictionary)
        pointers = (ctypes.c_void_p * max(len(buffers), 1))(*addresses)
        self.kept += [pointers, buffers]
        sizes = {"length": length - offset, "offset": offset, "null_count": -1, "n_buffers": len(buffers)}
        return self.node(columns._Array, below, words, buffers=pointers, **sizes)

    def pair(self):
        top = ("+s", self.length + self.offset, [None], self.columns, None)
        return self.schema("", top), self.array(top, self.offset)

    def __arrow_c_array__(self, requested_schema=None):
        if self.stream != 1:
            raise AttributeError
        schema, array = self.pair()
        names = (b"arrow_schema", b"arrow_array")
        return tuple(self.NEW(ctypes.addressof(n), name, None) for n, name in zip((schema, array), names, strict=True))


class Streamed(Capsules):
    """The same batch so many times, in a stream."""

    __arrow_c_array__ = property()

    def __arrow_c_stream__(self, requested_schema=None):
        left = [self.stream]

        def give_schema(stream, out):
            ctypes.memmove(out, ctypes.addressof(self.pair()[0]), ctypes.sizeof(columns._Schema))
            return 0

        def give_next(stream, out):
            if self.fail:
                return 5
            if left[0]:
                ctypes.memmove(out, ctypes.addressof(self.pair()[1]), ctypes.sizeof(columns._Array))
            else:
                ctypes.memset(out, 0, ctypes.sizeof(columns._Array))
            left[0] -= 1
            return 0

        calls = [
            columns._FILL(give_schema),
            columns._FILL(give_next),
            self.TEXT(lambda stream: ctypes.addressof(self.why)),
        ]
        fields = ("get_schema", "get_next", "get_last_error")
        found = {n: ctypes.cast(c, ctypes.c_void_p).value for n, c in zip(fields, calls, strict=True)}
        stream = columns._Stream(**found)
        self.kept += [calls, stream]
        return self.NEW(ctypes.addressof(stream), b"arrow_array_stream", None)


def bits(valid):
    return np.packbits(np.asarray(valid, bool), bitorder="little")


def strings(texts, code="u"):
    data = [t.encode() for t in texts]
    ends = np.append(0, np.cumsum([len(d) for d in data])).astype(np.int32 if code == "u" else np.int64)
    return code, len(texts), [None, ends, np.frombuffer(b"".join(data) or b"\0", np.uint8)], {}, None


def viewed(texts, lost):
    """Views of strings, the text of long ones in two buffers; the one that is null points nowhere."""
    data, views = [b"junk", b""], np.zeros((len(texts), 4), np.int32)
    for i, text in enumerate(t.encode() for t in texts):
        views[i, 0] = len(text)
        if len(text) <= 12:
            views[i, 1:].view(np.uint8)[: len(text)] = list(text)
        else:
            views[i, 2:] = i % 2, len(data[i % 2])
            data[i % 2] += text
    views[lost] = 2**31 - 1
    buffers = [np.frombuffer(d or b"\0", np.uint8) for d in data]
    return "vu", len(texts), [bits(np.arange(len(texts)) != lost), views, *buffers, np.zeros(2, np.int64)], {}, None


def listed(rows, code, valid=None, values=None, junk=0):
    """Lists of int64, or of what `values` is, after `junk` values that are no list's."""
    flat = np.concatenate([np.full(junk, 7), *rows]).astype(np.int64)
    ends = np.append(0, np.cumsum([len(row) for row in rows])) + junk
    inner = ("l", len(flat), [None, flat], {}, None) if values is None else values
    kind = np.int32 if code == "+l" else np.int64
    return code, len(rows), [None if valid is None else bits(valid), ends.astype(kind)], {"item": inner}, None


def saved(folder):
    """The folder, with the codebook and the tables in files."""
    BOOK.save(folder / "book.safetensors")
    for name, table in (("x", X), ("v", V), ("codes", CODES), ("ids", KEYS), ("names", NAMES)):
        np.save(folder / f"{name}.npy", table)
    return folder
