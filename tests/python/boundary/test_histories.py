# SPDX-License-Identifier: Apache-2.0
"""`Histories`, the noun of all verbs: one order of fields everywhere, offsets of every kind, what each verb reads."""

import copy
import inspect
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from test_boundary import BOOK, CODES, OFFSETS, PROTOTYPES, VALUE, WEIGHTS, B, X, bits

import hisac
from hisac import Histories, _core, reference

torch = pytest.importorskip("torch")
hisac_torch = pytest.importorskip("hisac.torch")


class Span(NamedTuple):
    starts: np.ndarray
    ends: np.ndarray


FIELDS = Histories._fields
PLAIN = Histories(X, VALUE, OFFSETS, CODES, weights=WEIGHTS)
LENGTHS = np.diff(OFFSETS)
VERBS = {
    "vote": lambda h: hisac.vote(BOOK, h, budget=3)[:3],
    "route": lambda h: hisac.route(h, PROTOTYPES, temperature=0.1),
    "leaf_sums": lambda h: hisac.leaf_sums(BOOK, h),
}
IN_TORCH = {
    "vote": lambda h: hisac_torch.vote(BOOK, h, budget=3)[:3],
    "route": lambda h: hisac_torch.route(h, torch.from_numpy(np.asarray(PROTOTYPES)), temperature=0.1)[:2],
    "Compressor": lambda h: hisac_torch.Compressor(BOOK, budget=3, learn_temperature=False, temperature=0.1)(h)[:2],
}


def in_torch(h):
    return h._replace(**{name: torch.from_numpy(a) for name, a in h._asdict().items() if isinstance(a, np.ndarray)})


@pytest.mark.parametrize("name, named", [
    ("ids", "x_ids, v_ids"), ("offset", "offsets"), ("weight", "weights"), ("xids", "x_ids, v_ids"),
    ("length", "lengths"), ("zz", ", ".join((*FIELDS, "lengths"))),
])  # fmt: skip
def test_another_name_is_refused_with_the_nearest_fields(name, named):
    with pytest.raises(TypeError) as caught:
        Histories(X, VALUE, OFFSETS, **{name: CODES})
    found = re.fullmatch(rf"Histories: expected one of the fields (.*), got {name}", str(caught.value))[1]
    assert found.startswith(named)


def test_the_fields_have_one_order_everywhere():
    """In Python, in its constructor, in the C++ header and in the schemas of torch's operators."""
    assert tuple(inspect.signature(Histories).parameters) == (*FIELDS, "lengths", "unknown")
    header = Path(__file__).parents[3] / "cpp/include/hisac/histories.h"
    body = re.search(r"struct Histories \{(.*?)\n\n", header.read_text(encoding="utf-8"), re.DOTALL)[1]
    members = re.sub(r"//.*|\{\}| = 0", "", body)
    declared = [
        re.sub(r".* ", "", name.strip()) for line in members.split(";") for name in re.split(r",(?![^<]*>)", line)
    ]
    assert tuple(filter(None, declared)) == FIELDS
    for name in ("vote", "route", "route_backward"):
        arguments = [a.name for a in getattr(torch.ops.hisac, name).default._schema.arguments]
        first = arguments.index("x")
        found = ["offsets" if a == "starts" else a for a in arguments[first:] if a != "ends"]
        assert tuple(found[: len(FIELDS)]) == FIELDS, name


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "offsets",
    [
        OFFSETS.astype(np.int32),
        OFFSETS.tolist(),
        (OFFSETS[:-1], OFFSETS[1:]),
        (OFFSETS[:-1].tolist(), OFFSETS[1:].tolist()),
        (OFFSETS[:-1].tolist(), OFFSETS[1:]),
        OFFSETS.tolist()[:1] + list(map(np.int64, OFFSETS[1:])),
        torch.from_numpy(OFFSETS),
        Span(OFFSETS[:-1], OFFSETS[1:]),
    ],
)
def test_offsets_of_every_kind(verb, offsets):
    expected = bits(VERBS[verb](PLAIN))
    assert bits(VERBS[verb](PLAIN._replace(offsets=offsets))) == expected
    assert bits(VERBS[verb](in_torch(PLAIN)._replace(offsets=offsets))) == expected


def test_offsets_of_a_range():
    """A user every five rows."""
    expected = bits(VERBS["leaf_sums"](PLAIN._replace(offsets=np.arange(0, 11, 5))))
    assert bits(VERBS["leaf_sums"](PLAIN._replace(offsets=range(0, 11, 5)))) == expected


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"offsets": (OFFSETS,) * 3}, "offsets expected an array, or a tuple (starts, ends), got another tuple"),
        (None, "histories expected hisac.Histories, got another tuple"),
    ],
)
def test_the_core_checks_tuples_itself(change, text):
    """As torch's operators call it: what is no Histories, and offsets that no caller has looked at."""
    given = (X, VALUE) if change is None else tuple(PLAIN._replace(**change))
    out = np.empty((2, 1, 2), np.int32), np.empty((2, 1), np.int64), np.empty(2, np.int32), np.empty((2, 1, 6), "f4")
    with pytest.raises((TypeError, ValueError)) as error:
        _core.vote(BOOK._core, given, 1, [], [], *out)
    assert str(error.value) == f"vote: {text}"


@pytest.mark.parametrize("verb", IN_TORCH)
@pytest.mark.parametrize("offsets", [OFFSETS, OFFSETS.tolist(), (OFFSETS[:-1], OFFSETS[1:].tolist())])
def test_lists_and_numpy_offsets_beside_tensors(verb, offsets):
    h = in_torch(PLAIN)
    assert bits(IN_TORCH[verb](h._replace(offsets=offsets))) == bits(IN_TORCH[verb](h))


@pytest.mark.parametrize(
    "lengths", [LENGTHS, LENGTHS.tolist(), tuple(LENGTHS), LENGTHS.astype(np.int32), torch.from_numpy(LENGTHS)]
)
def test_lengths_in_place_of_offsets(lengths):
    found = Histories(X, VALUE, codes=CODES, lengths=lengths)
    np.testing.assert_array_equal(found.offsets, OFFSETS)
    assert torch.is_tensor(found.offsets) == torch.is_tensor(lengths)
    assert Histories(X, lengths=[]).offsets.tolist() == [0]
    with pytest.raises(ValueError, match=r"^Histories: expected either offsets or lengths, got both$"):
        Histories(X, VALUE, OFFSETS, lengths=lengths)


@pytest.mark.parametrize(
    ("lengths", "kind", "text"),
    [
        ([4.7, 7.9], TypeError, "lengths expected whole numbers [B], got [4.7, 7.9]"),
        (np.float64([4, 8]), TypeError, "lengths expected whole numbers [B], got array([4., 8.])"),
        (torch.tensor([4.0, 8.0]), TypeError, "lengths expected whole numbers [B], got float32 [2]"),
        (np.array([[4, 8]]), TypeError, "lengths expected whole numbers [B], got array([[4, 8]])"),
        (torch.tensor([[4, 8]]), TypeError, "lengths expected whole numbers [B], got int64 [1, 2]"),
        (torch.tensor(4), TypeError, "lengths expected whole numbers [B], got int64 []"),
        (12, TypeError, "lengths expected whole numbers [B], got 12"),
        ("12", TypeError, "lengths expected whole numbers [B], got '12'"),
        ([4, -1], ValueError, "lengths expected 0 or more, got -1"),
        (np.array([4, -1]), ValueError, "lengths expected 0 or more, got -1"),
    ],
)
def test_lengths_are_whole_numbers(lengths, kind, text):
    with pytest.raises(kind) as error:
        Histories(X, VALUE, lengths=lengths)
    assert str(error.value) == f"Histories: {text}"


def test_lengths_of_a_list_lie_beside_the_batch():
    h = in_torch(PLAIN)
    for found in (Histories(h.x, h.v, lengths=[4, 6]), Histories(codes=h.codes, lengths=(4, 6))):
        assert torch.equal(found.offsets, torch.from_numpy(OFFSETS))


def test_lengths_in_a_compiled_program():
    torch.compiler.reset()
    compress, h = hisac_torch.Compressor(BOOK, budget=3, temperature=0.1), in_torch(PLAIN)

    def tokens(x, v, lengths):
        return compress(Histories(x, v, lengths=lengths)).tokens

    compiled = torch.compile(tokens, fullgraph=True, backend="aot_eager")
    for lengths in (torch.from_numpy(LENGTHS), torch.tensor([9, 1]), [4, 6], (9, 1)):
        assert torch.equal(compiled(h.x, h.v, lengths), tokens(h.x, h.v, lengths))


def test_it_is_a_tuple_and_a_pytree():
    for same in (pickle.loads(pickle.dumps(PLAIN)), copy.deepcopy(PLAIN), PLAIN._replace()):
        assert type(same) is Histories and bits(same) == bits(PLAIN)
    doubled = torch.utils._pytree.tree_map(lambda t: t if t is None else 2 * t, in_torch(PLAIN))
    assert type(doubled) is Histories and torch.equal(doubled.x, 2 * torch.from_numpy(X)) and doubled.bias is None


@pytest.mark.parametrize("call", [*VERBS.values(), *IN_TORCH.values()])
@pytest.mark.parametrize("other", [X, tuple(PLAIN), None, {"x": X}])
def test_nothing_else_is_taken_for_histories(call, other):
    text = rf"^\w+: histories expected hisac.Histories, got {type(other).__name__}$"
    with pytest.raises(TypeError, match=text):
        call(other)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (
            {"offsets": (0, 4, 10)},
            ValueError,
            "offsets expected an array, a list, or a tuple (starts, ends), got a tuple of 3",
        ),
        ({"offsets": (0, 10)}, ValueError, "starts expected int32 or int64 [B], got int64 []"),
        (
            {"offsets": torch.tensor(3)},
            ValueError,
            "offsets expected int32 or int64 [B + 1], or a tuple (starts, ends), got int64 []",
        ),
        (
            {"offsets": [0.0, 4.0, 10.0]},
            TypeError,
            "offsets expected int32 or int64 [B + 1], or a tuple (starts, ends), got float32 [3]",
        ),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, ValueError, "offsets expected [B + 1], got an empty array"),
        ({"offsets": None}, TypeError, "got no offsets, expected them, or a jagged nested tensor"),
        ({"codes": CODES}, TypeError, "codes expected a tensor, got ndarray"),
        ({"codes": None}, TypeError, "codes expected in the histories, got None"),
    ],
)
def test_torch_says_what_is_missing(change, kind, text):
    with pytest.raises(kind) as error:
        hisac_torch.vote(BOOK, in_torch(PLAIN)._replace(**change), budget=3)
    assert str(error.value) == f"vote: {text}"


def test_torch_says_which_rows_are_missing():
    h, p = in_torch(PLAIN), torch.from_numpy(np.asarray(PROTOTYPES))
    for change, text in (
        ({"v": None}, "v expected in the histories, got None"),
        ({"bias": [1]}, "bias expected a tensor"),
    ):
        with pytest.raises(TypeError, match=f"^route: {text}"):
            hisac_torch.route(h._replace(**change), p, temperature=0.1)


def test_a_verb_reads_the_fields_that_it_names():
    """And no other: whatever those hold."""
    junk = "nothing that could be read"
    others = dict.fromkeys(("x", "v", "v_ids", "x_scale", "bias", "spread"), junk)
    assert bits(VERBS["vote"](PLAIN._replace(**others))) == bits(VERBS["vote"](PLAIN))
    assert bits(VERBS["route"](PLAIN._replace(codes=junk, weights=junk))) == bits(VERBS["route"](PLAIN))
    tensors = in_torch(PLAIN)
    assert bits(IN_TORCH["vote"](tensors._replace(**others))) == bits(IN_TORCH["vote"](tensors))
    assert bits(IN_TORCH["route"](tensors._replace(codes=junk, weights=junk))) == bits(IN_TORCH["route"](tensors))


@pytest.mark.parametrize("verb", ["vote", "leaf_sums"])
@pytest.mark.parametrize(
    ("weights", "kind", "text"),
    [
        (WEIGHTS[:9], ValueError, "[10], got [9]"),
        (np.ones(11, int), ValueError, "[10], got [11]"),
        (X, ValueError, "float32 or int64 [T], got float32 [10, 6]"),
        (np.ones((10, 1), int), ValueError, "float32 or int64 [T], got int64 [10, 1]"),
        (np.array(1, np.float32), ValueError, "float32 or int64 [T], got float32 []"),
        (np.ones(10), TypeError, "float32 or int64 [T], got float64 [10]"),
        (np.ones(10, np.float16), TypeError, "float32 or int64 [T], got float16 [10]"),
        (np.ones(10, np.int32), TypeError, "float32 or int64 [T], got int32 [10]"),
        (np.ones(10, np.uint64), TypeError, "float32 or int64 [T], got uint64 [10]"),
        ([1] * 10, TypeError, "a NumPy array, a torch tensor or anything with DLPack, got list"),
    ],
)
def test_weights_are_read_where_they_are_votes(verb, weights, kind, text):
    with pytest.raises(kind) as error:
        VERBS[verb](PLAIN._replace(weights=weights))
    assert str(error.value) == f"{verb}: weights expected {text}"


@pytest.mark.parametrize("verb", VERBS)
def test_what_a_batch_states_of_itself(verb):
    """Enough changes nothing, too little is an error on the CPU, where the offsets are counted."""
    longest, rows = int(LENGTHS.max()), int(LENGTHS.sum())
    for stated in ({"longest": longest}, {"rows": rows}, {"longest": 10**6, "rows": np.int64(10**6)}):
        assert bits(VERBS[verb](PLAIN._replace(**stated))) == bits(VERBS[verb](PLAIN))
        assert bits(IN_TORCH.get(verb, VERBS[verb])(in_torch(PLAIN._replace(**stated)))) == bits(VERBS[verb](PLAIN))
    for name, least in (("longest", longest), ("rows", rows)):
        with pytest.raises(ValueError, match=rf"^{verb}: {name} expected at least {least}, got {least - 1}$"):
            VERBS[verb](PLAIN._replace(**{name: least - 1}))
        with pytest.raises(ValueError, match=rf"^{verb}: {name} expected 0 or more, got -1$"):
            VERBS[verb](PLAIN._replace(**{name: -1}))
        for other in (2.0, "9", True):
            with pytest.raises(TypeError, match=rf"^{verb}: {name} expected a whole number, got {other!r}$"):
                VERBS[verb](PLAIN._replace(**{name: other}))


def test_codes_count_in_route_with_their_book_only():
    wrong = CODES.copy()
    wrong[::2, 1] = 99
    plain, coded = (
        hisac.route(PLAIN._replace(codes=wrong), PROTOTYPES, book=book, temperature=0.1) for book in (None, BOOK)
    )
    assert bits(plain) == bits(hisac.route(PLAIN, PROTOTYPES, temperature=0.1)) and bits(plain) != bits(coded)
    definition = reference.Codebook(BOOK.centers)
    for found, book in ((plain, None), (coded, definition)):
        expected = reference.route(PLAIN._replace(codes=wrong), PROTOTYPES, book=book, temperature=0.1)
        np.testing.assert_allclose(found.tokens, expected.tokens, atol=1e-4)
    assert len(plain.tokens) == B


def test_sums_are_histories():
    sums = hisac.leaf_sums(BOOK, PLAIN)
    assert type(sums) is Histories and [name for name in FIELDS if getattr(sums, name) is not None] == [
        "x", "v", "offsets", "codes", "bias", "spread", "weights"]  # fmt: skip
    by_leaf = hisac.compress(BOOK, PLAIN, budget=4, method="leaf", temperature=0.1)
    assert bits(hisac.route(sums, by_leaf.agents, temperature=0.1)) == bits(by_leaf[:2])
    assert bits(hisac.vote(BOOK, sums, budget=4)[:3]) == bits(by_leaf.agents[:3])
