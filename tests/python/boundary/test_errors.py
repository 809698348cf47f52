# SPDX-License-Identifier: Apache-2.0
"""Every refusal of the verbs that Python sees, word for word: what was expected and what came. One table a verb; what
only C++ sees stands in tests/cpp/test_status.cpp."""

import numpy as np
import pytest

import hisac
from hisac import Attended, Codebook, Histories, Tokens
from support import by_field, said

RNG = np.random.default_rng(7)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


BOOK = Codebook([normal(4, 6), normal(3, 6)])
OTHER = Codebook([normal(4, 5), normal(3, 5)])
X, VALUE = normal(10, 6), normal(10, 3)
OFFSETS = np.array([0, 4, 10])
STARTS, ENDS = OFFSETS[:-1], OFFSETS[1:]
CODES = BOOK.encode(X)
AGENTS = hisac.vote(BOOK, Histories(offsets=OFFSETS, codes=CODES), budget=4)
PROTOTYPES = BOOK.prototypes(AGENTS)
ONE = np.ones((10, 1), np.float32)
NAN, INF = float("nan"), float("inf")
KIND = "expected a NumPy array, a torch tensor or anything with DLPack, got"


# ---------------------------------------------------------------------------------------------------- codebook, encode

LEVEL = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("centers", "kind", "text"),
    [
        ([LEVEL, LEVEL[:, :2]], ValueError, "centers of level 1 are [2, 2], level 0 has D = 3: D differs"),
        ([LEVEL[:0]], ValueError, "expected 1 to 2^20 codes at level 0, got 0"),
        ([LEVEL[:, :0]], ValueError, "expected a width of 1 to 2^20, got 0"),
        ([LEVEL, LEVEL * NAN], ValueError, "expected finite centers, got nan at [0, 0] of level 1"),
        ([np.array([[0, -INF]], np.float32)], ValueError, "expected finite centers, got -inf at [0, 1] of level 0"),
        (LEVEL, ValueError, "centers expected float32 [C, D], got float32 [3]"),
        ([LEVEL.astype(float)], TypeError, "centers expected float32 [C, D], got float64 [2, 3]"),
        ([LEVEL.tolist()], TypeError, f"centers {KIND} list"),
    ],
)
def test_codebook(centers, kind, text):
    said(lambda: Codebook(centers), kind, f"Codebook: {text}")


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"sizes": ()}, ValueError, "sizes expected 1 to 8 levels, got 0"),
        ({"sizes": [1] * 9}, ValueError, "sizes expected 1 to 8 levels, got 9"),
        ({"sizes": (4, 0)}, ValueError, "sizes expected 1 to 2^20 at level 1, got 0"),
        ({"sizes": (2.5,)}, TypeError, "sizes expected a whole number, got 2.5"),
        ({"iterations": 1.5}, TypeError, "iterations expected a whole number, got 1.5"),
        ({"seed": "a"}, TypeError, "seed expected a whole number, got 'a'"),
        ({"sizes": (2**21,)}, ValueError, "sizes expected 1 to 2^20 at level 0, got 2097152"),
        ({"iterations": "x"}, TypeError, "iterations expected a whole number, got 'x'"),
        ({"iterations": -1}, ValueError, "iterations expected 0 to 1000000, got -1"),
        ({"iterations": 2**20}, ValueError, "iterations expected 0 to 1000000, got 1048576"),
        ({"x": X[:0]}, ValueError, "x is [0, 6] without a usable row, expected at least one"),
        ({"x": X * NAN}, ValueError, "x is [10, 6] without a usable row, expected at least one"),
        ({"x": X[:, :0]}, ValueError, "x expected [T, D] with D from 1 to 2^20, got D = 0"),
        ({"x": X[0]}, ValueError, "x expected [T, D], got float32 [6]"),
        ({"x": X.astype(int)}, TypeError, "x expected float32, bfloat16 or float16 [T, D], got int64 [10, 6]"),
    ],
)
def test_fit(change, kind, text):
    said(lambda: hisac.fit(**{"x": X, "sizes": (3, 2), **change}), kind, f"fit: {text}")


def test_what_a_progress_callback_raises_comes_through():
    with pytest.raises(KeyError, match="mine"):
        hisac.fit(X, (3, 2), progress=lambda *_: {}["mine"])


@pytest.mark.parametrize(
    ("function", "kind", "text"),
    [
        (lambda: hisac.encode(BOOK, X[0]), ValueError, "encode: x expected [T, D], got float32 [6]"),
        (lambda: hisac.encode(BOOK, X[:, :5]), ValueError, "encode: x is [10, 5], the codebook has D = 6: D differs"),
        (lambda: hisac.encode(None, X), TypeError, "encode: book expected hisac.Codebook, got NoneType"),
        (lambda: BOOK.leaves(CODES[:, :1]), ValueError, "leaves: codes expected [10, 2], got [10, 1]"),
        (lambda: BOOK.leaves(CODES[:, :0]), ValueError, "leaves: codes expected [10, 2], got [10, 0]"),
        (lambda: BOOK.leaves(CODES[0, 0:1].reshape(())), ValueError, "leaves: codes expected [..., L], got int32 []"),
        (lambda: BOOK.prototypes(CODES[:, :1]), ValueError, "prototypes: codes expected [10, 2], got [10, 1]"),
        (lambda: BOOK.prototypes(CODES[:, :0]), ValueError, "prototypes: codes expected [10, 2], got [10, 0]"),
        (
            lambda: BOOK.prototypes(CODES.astype(int)),
            TypeError,
            "prototypes: codes expected int32 [T, L], got int64 [10, 2]",
        ),
        (
            lambda: OTHER.prototypes(AGENTS),
            ValueError,
            f"prototypes: agents expected of codebook {OTHER.fingerprint:016x}, got {BOOK.fingerprint:016x}",
        ),
        (
            lambda: Codebook([np.zeros((256, 1), np.float32)] * 8).leaves(np.zeros((1, 8), np.int32)),
            ValueError,
            "leaves: expected fewer than 2^63 leaves in the codebook, got more",
        ),
    ],
)
def test_encode_leaves_prototypes(function, kind, text):
    said(function, kind, text)


# ------------------------------------------------------------------------------------------------------------ histories

ROWS = "offsets expected 0 <= start <= end <= 10 for every user, got"
HISTORIES = [
    (np.array([0, 5, 4]), ValueError, f"{ROWS} [5, 4) for user 1"),
    (np.array([0, 4, 11]), ValueError, f"{ROWS} [4, 11) for user 1"),
    (np.array([-1, 4, 10]), ValueError, f"{ROWS} [-1, 4) for user 0"),
    (np.array([0, 4, 2**31 - 1], np.int32), ValueError, f"{ROWS} [4, 2147483647) for user 1"),
    (np.array([0, 2**36, 10]), ValueError, f"{ROWS} [0, 68719476736) for user 0"),
    (np.array([0, 2**62, 10]), ValueError, f"{ROWS} [0, 4611686018427387904) for user 0"),
    (np.array([-(2**63), 2**63 - 1, 10]), ValueError, f"{ROWS} [-9223372036854775808, 9223372036854775807) for user 0"),
    ((STARTS, ENDS - 5), ValueError, f"{ROWS} [0, -1) for user 0"),
    ((STARTS, ENDS[:1]), ValueError, "ends expected the type and length of starts, int64 [2], got int64 [1]"),
    (
        (STARTS, ENDS.astype(np.int32)),
        ValueError,
        "ends expected the type and length of starts, int64 [2], got int32 [2]",
    ),
    ((STARTS, ENDS[None]), ValueError, "ends expected [B], got int64 [1, 2]"),
    ((STARTS,), ValueError, "offsets expected an array, a list, or a tuple (starts, ends), got a tuple of 1"),
    ((0, 4, 10), ValueError, "offsets expected an array, a list, or a tuple (starts, ends), got a tuple of 3"),
    ([0, 5, 4], ValueError, f"{ROWS} [5, 4) for user 1"),
    ([0, 4.0, 10], TypeError, "offsets expected a whole number, got 4.0"),
    ([0, 4, 2**63], ValueError, f"offsets expected {-(2**63)} to {2**63 - 1}, got {2**63}"),
    (([0, 4], [4, 11]), ValueError, f"{ROWS} [4, 11) for user 1"),
    ([], ValueError, "offsets expected [B + 1], got an empty array"),
    (None, TypeError, "offsets expected in the histories, got None"),
    (np.array([], int), ValueError, "offsets expected [B + 1], got an empty array"),
    (np.array(3), ValueError, "offsets expected [B + 1], got int64 []"),
    (OFFSETS[None], ValueError, "offsets expected [B + 1], got int64 [1, 3]"),
    (OFFSETS.astype(float), TypeError, "offsets expected int32 or int64 [B + 1], got float64 [3]"),
]


@pytest.mark.parametrize(("offsets", "kind", "text"), HISTORIES)
def test_histories(offsets, kind, text):
    said(lambda: hisac.vote(BOOK, Histories(offsets=offsets, codes=CODES), budget=4), kind, f"vote: {text}")
    said(lambda: hisac.route(Histories(X, VALUE, offsets), PROTOTYPES, temperature=0.1), kind, f"route: {text}")


# ----------------------------------------------------------------------------------------------------------------- vote


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"budget": None}, ValueError, "expected exactly one of budget, fanout and beam, got 0"),
        ({"fanout": (2, 2)}, ValueError, "expected exactly one of budget, fanout and beam, got 2"),
        ({"budget": 0}, ValueError, "budget expected 1 to 4096, got 0"),
        ({"budget": -3}, ValueError, "budget expected 1 to 4096, got -3"),
        ({"budget": 4097}, ValueError, "budget expected 1 to 4096, got 4097"),
        ({"budget": 2**70}, ValueError, f"budget expected 1 to 4096, got {2**70}"),
        ({"budget": 2.7}, TypeError, "budget expected a whole number, got 2.7"),
        *(
            (
                {"budget": None, "fanout": fanout},
                ValueError,
                f"fanout expected one number >= 1 for each of 2 levels, got {fanout}",
            )
            for fanout in ((), (2,), (2, 0), (-2, -2))
        ),
        ({"budget": None, "fanout": (65, 64)}, ValueError, "fanout expected a product of 1 to 4096, got 4160"),
        ({"budget": None, "fanout": (2**40,) * 2}, ValueError, f"fanout expected a product of 1 to 4096, got {2**80}"),
        ({"budget": None, "fanout": (2, 2.5)}, TypeError, "fanout expected a whole number, got 2.5"),
        ({"beam": (2, 2)}, ValueError, "expected exactly one of budget, fanout and beam, got 2"),
        ({"beam": (2, 2), "fanout": (2, 2)}, ValueError, "expected exactly one of budget, fanout and beam, got 3"),
        *(
            (
                {"budget": None, "beam": beam},
                ValueError,
                f"beam expected one number of 1 to 4096 for each of 2 levels, got {beam}",
            )
            for beam in ((), (2,), (2, 2, 2), (0, 2), (2, -1), (4097, 1), (1, 2**70))
        ),
        ({"budget": None, "beam": (2, 2.5)}, TypeError, "beam expected a whole number, got 2.5"),
        ({"weights": ONE}, ValueError, "weights expected float32 or int64 [T], got float32 [10, 1]"),
        ({"codes": CODES[:, :1]}, ValueError, "codes expected [10, 2], got [10, 1]"),
        ({"codes": CODES[0]}, ValueError, "codes expected [T, L], got int32 [2]"),
        ({"codes": CODES.astype(int)}, TypeError, "codes expected int32 [T, L], got int64 [10, 2]"),
        ({"codes": None}, TypeError, "codes expected in the histories, got None"),
        ({"book": 3}, TypeError, "book expected hisac.Codebook, got int"),
    ],
)
def test_vote(change, kind, text):
    right = {"book": BOOK, "codes": CODES, "offsets": OFFSETS, "budget": 4}
    said(lambda: by_field(hisac.vote)(**{**right, **change}), kind, f"vote: {text}")


# ---------------------------------------------------------------------------------------------------------------- route

TOKENS = hisac.route(Histories(X, VALUE, OFFSETS), PROTOTYPES, mean_x=True, temperature=0.1)
TAU = "temperature expected a number, or float32 [1] or [M]"
NO_TAU = "temperature expected, since {}, got None"
NEEDED = "codes and their codebook expected where x is not given, got no codebook"
ROUTE = [
    ({"x": X[0]}, ValueError, "x expected [T, D], got float32 [6]"),
    ({"v": VALUE[0]}, ValueError, "v expected [T, V], got float32 [3]"),
    ({"x": X[:9]}, ValueError, "x is [9, 6], v is [10, 3]: T differs (9, 10)"),
    ({"x": X[:, :5]}, ValueError, "prototypes is [2, 4, 6], x is [10, 5]: D differs (6, 5)"),
    ({"v": VALUE[:, :0]}, ValueError, "expected D and V of 1 to 2^20, got 6 and 0"),
    ({"offsets": np.array([0, 10])}, ValueError, "prototypes is [2, 4, 6], offsets name 1 users: B differs (2, 1)"),
    ({"count": AGENTS.count[:1]}, ValueError, "count expected [2], got [1]"),
    ({"count": AGENTS.count.astype(int)}, TypeError, "count expected int32 [B], got int64 [2]"),
    ({"bias": ONE[:9, 0]}, ValueError, "bias expected [10], got [9]"),
    ({"bias": ONE}, ValueError, "bias expected float32 [T], got float32 [10, 1]"),
    ({"spread": ONE[:9, 0]}, ValueError, "spread expected [10], got [9]"),
    ({"book": BOOK}, TypeError, "codes expected in the histories, got None"),
    ({"codes": CODES, "book": "b"}, TypeError, "book expected hisac.Codebook, got str"),
    ({"codes": CODES[:9], "book": BOOK}, ValueError, "codes expected [10, 2], got [9, 2]"),
    ({"codes": CODES[:, :1], "book": BOOK}, ValueError, "codes expected [10, 2], got [10, 1]"),
    (
        {"codes": CODES, "book": OTHER, "x": None},
        ValueError,
        "prototypes is [2, 4, 6], the codebook has D = 5: D differs",
    ),
    ({"x": None}, ValueError, NEEDED),
    ({"x": None, "codes": CODES}, ValueError, NEEDED),
    ({"temperature": None}, ValueError, NO_TAU.format("there is no codebook with a default one")),
    ({"temperature": None, "codes": CODES, "book": BOOK}, ValueError, NO_TAU.format("the codebook has no default one")),
    ({"temperature": 0}, ValueError, "temperature expected finite and > 0, got 0.0"),
    ({"temperature": -1.0}, ValueError, "temperature expected finite and > 0, got -1.0"),
    ({"temperature": NAN}, ValueError, "temperature expected finite and > 0, got nan"),
    ({"temperature": INF}, ValueError, "temperature expected finite and > 0, got inf"),
    ({"temperature": 1e-60}, ValueError, "temperature expected finite and > 0, got 1e-60"),
    ({"temperature": np.float32(0)}, ValueError, "temperature expected finite and > 0, got 0.0"),
    ({"temperature": ONE[:3, 0]}, ValueError, "temperature expected [1] or [4], got [3]"),
    ({"temperature": ONE[:1]}, ValueError, f"{TAU}, got float32 [1, 1]"),
    ({"temperature": np.array(1, np.float32)}, ValueError, f"{TAU}, got float32 []"),
    ({"temperature": np.ones(1)}, TypeError, f"{TAU}, got float64 [1]"),
    ({"temperature": "warm"}, TypeError, f"temperature {KIND} str"),
    ({"normalize": "users"}, ValueError, "normalize expected 'history' or 'agents', got 'users'"),
    ({"normalize": None}, ValueError, "normalize expected 'history' or 'agents', got 'None'"),
    ({"normalize": b"agents"}, ValueError, """normalize expected 'history' or 'agents', got 'b'agents''"""),
    ({"precision": "float16"}, ValueError, "precision expected 'float32' or 'bfloat16', got 'float16'"),
    ({"agents": PROTOTYPES[0]}, ValueError, "prototypes expected [B, M, D], got float32 [4, 6]"),
    ({"agents": "leaves"}, TypeError, f"prototypes {KIND} str"),
]


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        *ROUTE,
        ({"v": None}, TypeError, "v expected in the histories, got None"),
        ({"out": PROTOTYPES}, TypeError, "out expected hisac.Tokens, got ndarray"),
        (
            {"out": Tokens(PROTOTYPES, None, None)},
            ValueError,
            "out tokens expected float32 [2, 4, 3], got float32 [2, 4, 6]",
        ),
        (
            {"out": Tokens(None, PROTOTYPES, None)},
            ValueError,
            "out lse expected float32 [2, 4], got float32 [2, 4, 6]",
        ),
        (
            {"out": Tokens(None, None, TOKENS.lse), "mean_x": True},
            ValueError,
            "out mean_x expected float32 [2, 4, 6], got float32 [2, 4]",
        ),
    ],
)
def test_route(change, kind, text):
    right = {"x": X, "v": VALUE, "offsets": OFFSETS, "agents": PROTOTYPES, "temperature": 0.1}
    said(lambda: by_field(hisac.route)(**{**right, **change}), kind, f"route: {text}")


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"spread": ONE[:9, 0]}, ValueError, "spread expected [10], got [9]"),
        ({"codes": CODES[:9]}, ValueError, "codes expected [10, 2], got [9, 2]"),
        ({"v": VALUE[:9]}, ValueError, "x is [10, 6], v is [9, 3]: T differs (10, 9)"),
    ],
)
def test_leaf_sums(change, kind, text):
    right = {"x": X, "v": VALUE, "offsets": OFFSETS, "codes": CODES, "book": BOOK}
    said(lambda: by_field(hisac.leaf_sums)(**{**right, **change}), kind, f"leaf_sums: {text}")


SUMS = hisac.leaf_sums(BOOK, Histories(X, VALUE, OFFSETS, CODES))
ROWS, LENGTH = {"x": X, "v": VALUE, "offsets": OFFSETS, "codes": CODES, "book": BOOK}, len(SUMS.bias)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"v": VALUE[:9]}, ValueError, "x is [10, 6], v is [9, 3]: T differs (10, 9)"),
        ({"book": None}, TypeError, "book expected hisac.Codebook, got NoneType"),
        ({"sums": tuple(SUMS)}, TypeError, "histories expected hisac.Histories, got tuple"),
        ({"sums": SUMS._replace(bias=None)}, TypeError, "sums.bias expected in the histories, got None"),
        ({"sums": SUMS._replace(x=SUMS.x.astype("f2"))}, TypeError,
         f"sums.x expected float32 [S, D], got float16 [{LENGTH}, 6]"),
        ({"sums": SUMS._replace(offsets=np.array([0, LENGTH]))}, ValueError,
         f"sums expected of 2 users, x [{LENGTH}, 6], v [{LENGTH}, 3], bias and spread [{LENGTH}]"),
        ({"sums": SUMS._replace(offsets=np.array([0, 1, 99]))}, ValueError,
         f"offsets of sums expected 0 <= start <= end <= {LENGTH} for every user, got [1, 99) for user 1"),
        ({"gradients": Histories(X[:1])}, ValueError, f"d_x expected [{LENGTH}, 6], got [1, 6]"),
        ({"gradients": Histories(v=X)}, ValueError, f"d_v expected [{LENGTH}, 3], got [10, 6]"),
        ({"gradients": Histories(bias=X[0])}, ValueError, f"d_bias expected [{LENGTH}], got [6]"),
        ({"gradients": Histories(spread=X[0])}, ValueError, f"d_spread expected [{LENGTH}], got [6]"),
        ({"need": ("x",)}, ValueError, "need expected names of ('v', 'bias'), got ('x',)"),
    ],
)  # fmt: skip
def test_leaf_sums_backward(change, kind, text):
    right = {**ROWS, "sums": SUMS, "gradients": Histories(v=SUMS.v)}
    said(lambda: by_field(hisac.leaf_sums_backward)(**{**right, **change}), kind, f"leaf_sums_backward: {text}")


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"v": None}, TypeError, "v expected in the histories, got None"),
        ({"x": None, "book": None}, ValueError, NEEDED),
        ({"bias": ONE[:9, 0]}, ValueError, "bias expected [10], got [9]"),
    ],
)
def test_missing(change, kind, text):
    said(lambda: by_field(hisac.missing)(**{**ROWS, **change}), kind, f"missing: {text}")


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"method": "exactly"}, ValueError, "compress: method expected 'exact' or 'leaf', got 'exactly'"),
        ({"missing": "keep"}, ValueError, "compress: missing expected 'drop' or 'token', got 'keep'"),
        ({"temperature": None}, ValueError, "compress: " + NO_TAU.format("the codebook has no default one")),
        ({"refine": -1}, ValueError, "compress: refine expected 0 to 1000000, got -1"),
        ({"refine": 1.5}, TypeError, "compress: refine expected a whole number, got 1.5"),
        ({"refine": 10**30}, ValueError, f"compress: refine expected 0 to 1000000, got {10**30}"),
        ({"book": "b"}, TypeError, "compress: book expected hisac.Codebook, got str"),
        ({"x": None, "codes": None}, ValueError,
         "compress: codes expected, or x to encode, got neither x nor codes"),
        ({"x_ids": np.arange(10), "codes": None}, ValueError,
         "compress: codes expected, or x to encode, got no codes beside x_ids: encode the table once and keep them"),
        ({"budget": None}, ValueError, "vote: expected exactly one of budget, fanout and beam, got 0"),
        ({"normalize": "users"}, ValueError, "route: normalize expected 'history' or 'agents', got 'users'"),
    ],
)  # fmt: skip
def test_compress(change, kind, text):
    said(lambda: by_field(hisac.compress)(**{**ROWS, "budget": 3, "temperature": 0.1, **change}), kind, text)


FIELDS = "('x', 'v', 'bias', 'spread', 'prototypes', 'temperature')"
RETURNED = "expected tokens and d_tokens [2, 4, 3], lse and d_lse [2, 4]"
OF_TOKENS = Tokens(TOKENS.tokens, None)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        *ROUTE,
        ({"gradients": Tokens(TOKENS.tokens[:1], None)}, ValueError, RETURNED),
        ({"gradients": Tokens(None, TOKENS.lse[:1])}, ValueError, RETURNED),
        ({"gradients": Tokens(None, None, PROTOTYPES[:1])}, ValueError, "d_mean_x expected [2, 4, 6], got [1, 4, 6]"),
        ({"gradients": (None, None)}, TypeError, "gradients expected hisac.Tokens, got tuple"),
        ({"forward": TOKENS._replace(lse=TOKENS.lse[:, :3])}, ValueError, RETURNED),
        ({"forward": TOKENS._replace(tokens=TOKENS.tokens[:, :, :2])}, ValueError, RETURNED),
        ({"forward": TOKENS._replace(tokens=None)}, TypeError,
         "tokens expected float32, bfloat16 or float16 [B, M, V], got None"),
        ({"forward": TOKENS._replace(mean_x=None), "gradients": Tokens(None, None, PROTOTYPES)}, ValueError,
         "mean_x expected [2, 4, 6], got [0, 0, 0]"),
        ({"forward": tuple(TOKENS)}, TypeError, "forward expected hisac.Tokens, got tuple"),
        ({"need": ("q",)}, ValueError, f"need expected names of {FIELDS}, got ('q',)"),
        ({"need": iter(["v", "q"])}, ValueError, f"need expected names of {FIELDS}, got ('v', 'q')"),
        ({"need": ("x",), "x": None, "codes": CODES, "book": BOOK}, ValueError, "a gradient of x expected x, got none"),
        ({"need": ("v",), "v": None, "gradients": Tokens(None, TOKENS.lse)}, ValueError,
         "a gradient of v expected v, got none"),
        ({"x_rows": np.array([0])}, ValueError, "x_rows expected with x_ids, got none"),
        ({"v_rows": np.array([0])}, ValueError, "v_rows expected with v_ids, got none"),
        ({"v_rows": np.array([0.5])}, TypeError, "v_rows expected int32 or int64 [U], got float64 [1]"),
        ({"need": ("x",), "gradients": Tokens(None, None, PROTOTYPES)}, NotImplementedError,
         "mean_x has no gradient for x"),
    ],
)  # fmt: skip
def test_route_backward(change, kind, text):
    right = {"forward": TOKENS, "gradients": OF_TOKENS, "x": X, "v": VALUE, "offsets": OFFSETS}
    right |= {"agents": PROTOTYPES, "temperature": 0.1}
    said(lambda: by_field(hisac.route_backward)(**{**right, **change}), kind, f"route_backward: {text}")


# --------------------------------------------------------------------------------------------------------------- attend

Q, KEYS, VALUES, CANDIDATES = normal(5, 2, 3), normal(2, 4, 2, 3), normal(2, 4, 2, 5), np.array([0, 2, 5])
HALF = KEYS.astype(np.float16)
SHAPES = "expected q [N, H, d], keys [B, M, H, d] and values [B, M, H, V], got float32"
FIVE = "candidate_offsets expected 0 <= start <= end <= 5 for every user, got"
ATTEND = [
    ({"q": Q[0]}, ValueError, "q expected [N, H, d], got float32 [2, 3]"),
    ({"keys": KEYS[0]}, ValueError, "keys expected [B, M, H, d], got float32 [4, 2, 3]"),
    ({"values": VALUES[0]}, ValueError, "values expected [B, M, H, V], got float32 [4, 2, 5]"),
    ({"q": Q[:, :1]}, ValueError, f"{SHAPES} [5, 1, 3], float32 [2, 4, 2, 3] and float32 [2, 4, 2, 5]"),
    ({"q": Q[:, :, :2]}, ValueError, f"{SHAPES} [5, 2, 2], float32 [2, 4, 2, 3] and float32 [2, 4, 2, 5]"),
    ({"keys": KEYS[:1]}, ValueError, f"{SHAPES} [5, 2, 3], float32 [1, 4, 2, 3] and float32 [2, 4, 2, 5]"),
    ({"values": VALUES[:, :3]}, ValueError, f"{SHAPES} [5, 2, 3], float32 [2, 4, 2, 3] and float32 [2, 3, 2, 5]"),
    ({"keys": HALF}, TypeError, "keys and values expected q's type, float32, got float16 and float32"),
    ({"candidate_offsets": CANDIDATES[:2]}, ValueError, "candidate_offsets expected [3], got int64 [2]"),
    ({"candidate_offsets": np.array([0, 3, 2])}, ValueError, f"{FIVE} [3, 2) for user 1"),
    ({"candidate_offsets": np.array([0, 2, 6])}, ValueError, f"{FIVE} [2, 6) for user 1"),
    ({"candidate_offsets": np.array([-1, 2, 5])}, ValueError, f"{FIVE} [-1, 2) for user 0"),
    (
        {"candidate_offsets": CANDIDATES[None]},
        ValueError,
        "candidate_offsets expected int32 or int64 [B + 1], got int64 [1, 3]",
    ),
    (
        {"candidate_offsets": CANDIDATES * 1.0},
        TypeError,
        "candidate_offsets expected int32 or int64 [B + 1], got float64 [3]",
    ),
    ({"candidate_offsets": (CANDIDATES[:-1], CANDIDATES[1:])}, TypeError, f"candidate_offsets {KIND} tuple"),
    ({"bias": ONE[:2]}, ValueError, "bias expected [2, 4], got [2, 1]"),
    ({"bias": ONE[:4, 0]}, ValueError, "bias expected float32 [B, M], got float32 [4]"),
    ({"scale": NAN}, ValueError, "scale expected finite, got nan"),
    ({"scale": INF}, ValueError, "scale expected finite, got inf"),
    ({"q": Q[..., :0], "keys": KEYS[..., :0]}, ValueError, "expected H, d and V of 1 to 2^20, got 2, 0 and 5"),
]
RIGHT = {"q": Q, "keys": KEYS, "values": VALUES, "candidate_offsets": CANDIDATES}


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        *ATTEND,
        ({"out": Q}, TypeError, "out expected hisac.Attended, got ndarray"),
        ({"out": Attended(Q, None)}, ValueError, "out expected float32 [5, 2, 5], got float32 [5, 2, 3]"),
        ({"out": Attended(None, Q)}, ValueError, "out lse expected float32 [5, 2], got float32 [5, 2, 3]"),
    ],
)
def test_attend(change, kind, text):
    said(lambda: hisac.attend(**{**RIGHT, **change}), kind, f"attend: {text}")


ATTENDED = hisac.attend(**RIGHT)
GIVEN = "expected out and d_out [5, 2, 5], lse and d_lse [5, 2]"


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        *ATTEND,
        ({"d_out": ATTENDED.out[:1]}, ValueError, GIVEN),
        ({"d_lse": ATTENDED.lse[:, :1]}, ValueError, GIVEN),
        ({"forward": ATTENDED._replace(lse=ATTENDED.lse[:1])}, ValueError, GIVEN),
        ({"forward": tuple(ATTENDED)}, TypeError, "forward expected hisac.Attended, got tuple"),
    ],
)
def test_attend_backward(change, kind, text):
    right = {"d_out": ATTENDED.out, "d_lse": None, "forward": ATTENDED, **RIGHT}
    said(lambda: hisac.attend_backward(**{**right, **change}), kind, f"attend_backward: {text}")


# -------------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize(
    ("n", "kind", "text"),
    [
        (0, ValueError, "threads: n expected 1 to 256, got 0"),
        (-1, ValueError, "threads: n expected 1 to 256, got -1"),
        (257, ValueError, "threads: n expected 1 to 256, got 257"),
        (10**20, ValueError, f"threads: n expected 1 to 256, got {10**20}"),
        (2.5, TypeError, "threads: n expected a whole number, got 2.5"),
        ("2", TypeError, "threads: n expected a whole number, got '2'"),
    ],
)
def test_set_num_threads(n, kind, text):
    before = hisac.get_num_threads()
    said(lambda: hisac.set_num_threads(n), kind, text)
    assert hisac.get_num_threads() == before


@pytest.mark.parametrize("end", [2**40, 2**62])
def test_huge_offsets_ask_for_no_memory(end):
    """The workspace of leaf sums grows with the longest history: wrong offsets are still named as such."""
    book, x = hisac.Codebook([np.eye(2, dtype=np.float32)]), np.zeros((3, 2), np.float32)
    histories = Histories(x, x, np.array([0, end]), np.zeros((3, 1), np.int32))
    with pytest.raises(ValueError, match=r"^leaf_sums: offsets expected 0 <= start <= end <= 3 for every user"):
        hisac.leaf_sums(book, histories)
