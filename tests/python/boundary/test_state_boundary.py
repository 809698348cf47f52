# SPDX-License-Identifier: Apache-2.0
"""What goes into a `UserState` and comes out of it: arrays of other kinds, bytes, and every refusal that Python sees,
word for word."""

import pickle
import threading

import numpy as np
import pytest

import hisac
from hisac import Codebook, Histories, UserState
from support import said

RNG = np.random.default_rng(11)
BOOK = Codebook([RNG.normal(size=(4, 6)).astype(np.float32), RNG.normal(size=(3, 6)).astype(np.float32)])
OTHER = Codebook([RNG.normal(size=(4, 6)).astype(np.float32)])
X = RNG.normal(size=(30, 6)).astype(np.float32)
V = RNG.normal(size=(30, 3)).astype(np.float32)
ITEMS = Histories(X, V, codes=BOOK.encode(X))
OTHER_ITEMS = ITEMS._replace(codes=OTHER.encode(X))
IDS = RNG.integers(0, 30, 50)
OPTIONS = {"width": 3, "leaves": 12}


def state(**options):
    return UserState(BOOK, **OPTIONS | options)


def filled(**options):
    made = state(**options)
    made.append(BOOK, ITEMS, IDS)
    return made


@pytest.mark.parametrize(
    ("function", "kind", "text"),
    [
        (lambda: UserState("book", **OPTIONS), TypeError, "UserState: book expected hisac.Codebook, got str"),
        (lambda: state(leaves=1.5), TypeError, "UserState: leaves expected a whole number, got 1.5"),
        (lambda: state(half_life=-1), ValueError, "UserState: half_life expected 0 to 1099511627776, got -1"),
        (lambda: state(model_tag=2**64), ValueError, f"UserState: model_tag expected 0 to {2**64 - 1}, got {2**64}"),
        (
            lambda: state(leaves=0),
            ValueError,
            "state: expected leaves of 1 to 2^24, a ring of 0 to 2^24, a width of 1 to 2^20 and a half-life of 0 to "
            "107374182 units of time, got 0, 0, 3 and 0",
        ),
        (
            lambda: state(half_life=30 * 86_400_000),  # in milliseconds
            ValueError,
            "state: expected leaves of 1 to 2^24, a ring of 0 to 2^24, a width of 1 to 2^20 and a half-life of 0 to "
            "107374182 units of time, got 12, 0, 3 and 2592000000",
        ),
        (lambda: state().append(BOOK, X, IDS), TypeError, "append: histories expected hisac.Histories, got ndarray"),
        (
            lambda: state().append(BOOK, ITEMS._replace(codes=None), IDS),
            TypeError,
            "append: codes expected in the histories, got None",
        ),
        (
            lambda: state().append(BOOK, ITEMS, IDS.astype(float)),
            TypeError,
            "append: ids expected int32 or int64 [n], got float64 [50]",
        ),
        (
            lambda: state().append(BOOK, ITEMS, IDS, weights=np.ones(50)),
            TypeError,
            "append: weights expected float32 [n], got float64 [50]",
        ),
        (
            lambda: state().append(BOOK, ITEMS, IDS, times=np.arange(50, dtype=np.int32)),
            TypeError,
            "append: times expected int64 [n], got int32 [50]",
        ),
        (
            lambda: state().append(BOOK, ITEMS, IDS, times=np.arange(49)),
            ValueError,
            "append: times expected [50], got [49]",
        ),
        (
            lambda: state().append(BOOK, ITEMS._replace(x=X[:, :5].copy()), IDS),
            ValueError,
            "append: x is [30, 5], the codebook has D = 6: D differs",
        ),
        (
            lambda: state().append(BOOK, ITEMS._replace(v=V[:, :2].copy()), IDS),
            ValueError,
            "append: v expected [items, 3], got [30, 2]",
        ),
        (lambda: state().append(BOOK, ITEMS, IDS, model_tag=3), ValueError, "append: model_tag expected 0, got 3"),
        (
            lambda: state().append(OTHER, ITEMS, IDS),
            ValueError,
            f"append: codebook expected {BOOK.fingerprint:016x}, got {OTHER.fingerprint:016x}",
        ),
        (
            lambda: filled().forget(BOOK, ITEMS, IDS[:1]),
            ValueError,
            "forget: kept expected, rows or a function, since the table has their leaves, got none",
        ),
        (
            lambda: filled().merge(BOOK, "other", ITEMS),
            TypeError,
            "merge: other expected hisac.UserState, got str",
        ),
        (
            lambda: filled().to_bytes("float16"),
            ValueError,
            "to_bytes: dtype expected 'float32', 'bfloat16' or 'int8', got 'float16'",
        ),
        (
            lambda: UserState.from_bytes(filled().to_bytes("int8")).append(BOOK, ITEMS, IDS),
            NotImplementedError,
            "append: a state of float32 expected, got int8, which is for reading",
        ),
        (
            lambda: filled().forget(BOOK, ITEMS, IDS[:1], kept=(IDS, None)),
            ValueError,
            "forget: kept expected (ids, weights, times), got 2",
        ),
        (
            lambda: filled().forget(BOOK, ITEMS, IDS[:1], kept=()),
            ValueError,
            "forget: kept expected (ids, weights, times), got 0",
        ),
        (
            lambda: filled().forget(BOOK, ITEMS, IDS[:1], kept=lambda code: IDS),
            ValueError,
            "forget: kept expected (ids, weights, times), got ndarray",
        ),
        (
            lambda: filled().forget(BOOK, ITEMS, IDS[:1], kept=lambda code: (IDS, np.ones(2, np.float32), None)),
            ValueError,
            "forget: weights expected [50], got [2]",
        ),
        (
            lambda: filled().forget(BOOK, ITEMS, IDS[:1], kept=(None, None, None)),
            TypeError,
            "forget: ids expected a NumPy array, a torch tensor or anything with DLPack, got NoneType",
        ),
        (
            lambda: filled().forget(BOOK, ITEMS, IDS[:1], whole=True),
            ValueError,
            "forget: kept expected, rows, of which the whole table is made again, got none",
        ),
        (
            lambda: filled().migrate(BOOK, OTHER)[0].forget(OTHER, OTHER_ITEMS, IDS[:1], kept=(IDS, None, None)),
            ValueError,
            "forget: whole expected, since the state has been migrated, got false",
        ),
        (lambda: UserState.from_bytes(b""), hisac.CorruptFileError, "state: expected at least 256 bytes, got 0"),
        (lambda: UserState.from_bytes(bytes(256)), hisac.CorruptFileError, "state: the bytes are no state"),
        (
            lambda: UserState.from_bytes(filled().to_bytes()[:-64]),
            hisac.CorruptFileError,
            f"state: expected {len(filled().to_bytes())} bytes, got {len(filled().to_bytes()) - 64}",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(function, kind, text):
    said(function, kind, text)


def test_a_changed_byte_is_refused():
    data = filled(ring=3).to_bytes()
    for at in range(0, len(data), 61):
        with pytest.raises(hisac.CorruptFileError):
            UserState.from_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])


def test_other_kinds_of_arrays():
    whole = filled()
    torch = pytest.importorskip("torch")
    tensors = state()
    given = Histories(torch.from_numpy(X), torch.from_numpy(V), codes=torch.from_numpy(ITEMS.codes))
    tensors.append(BOOK, given, torch.from_numpy(IDS))
    strided = state()
    strided.append(BOOK, ITEMS._replace(x=np.asfortranarray(X)), np.repeat(IDS, 2)[::2])
    assert whole.to_bytes() == tensors.to_bytes() == strided.to_bytes()
    small = state()
    small.append(BOOK, ITEMS._replace(x=np.int8(np.rint(X * 40)), x_scale=np.float32([1 / 40])), IDS)
    np.testing.assert_allclose(small.sums(BOOK).x, whole.sums(BOOK).x, atol=1 / 80)
    np.testing.assert_array_equal(small.sums(BOOK).weights, whole.sums(BOOK).weights)


def test_what_a_state_says():
    made = state(half_life=60, model_tag=2**64 - 1, weighting=4)
    rows = {"weights": np.full(30, 2, np.float32), "times": np.full(30, 130)}
    made.append(BOOK, ITEMS, np.arange(30), **rows, model_tag=2**64 - 1)
    assert (made.epoch, made.position, made.revision, made.dtype) == (120, -(2**63), 1, "float32")
    assert made.params == {
        "width": 3, "leaves": 12, "ring": 0, "half_life": 60, "mean_x": True, "model_tag": 2**64 - 1, "weighting": 4,
    }  # fmt: skip
    assert made.fingerprint == BOOK.fingerprint
    assert made.options != state(half_life=61, weighting=4).options
    assert made.nbytes >= len(made.to_bytes())


def test_a_state_pickles_and_threads_share_it():
    whole, shared = filled(ring=2), state(ring=2)
    back = pickle.loads(pickle.dumps(whole))
    assert back.to_bytes() == whole.to_bytes()
    served = UserState.from_bytes(whole.to_bytes("bfloat16"))
    assert pickle.loads(pickle.dumps(served)).dtype == "bfloat16"
    lock, at = threading.Lock(), iter(range(50))

    def work():
        while True:
            with lock:
                i = next(at, None)
                if i is None:
                    return
                shared.append(BOOK, ITEMS, IDS[i : i + 1])
            shared.compress(BOOK, budget=4, temperature=1.0)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    a, b = shared.sums(BOOK), whole.sums(BOOK)
    np.testing.assert_array_equal(a.v, b.v)
    np.testing.assert_array_equal(a.weights, b.weights)


def test_the_ring_is_joined_raw():
    """Tokens of the table and rows of the ring in one softmax: their biases are logs of shares of one whole."""
    made = filled(ring=6)
    tokens, recent = made.compress(BOOK, budget=5, temperature=1.0), made.recent()
    np.testing.assert_array_equal(recent.ids, IDS[-6:])
    bias = np.concatenate([tokens.log_share[0] + recent.table_share, recent.log_share])
    assert np.exp(bias).sum() == pytest.approx(1, rel=1e-5)


def test_what_is_forgotten_by_a_function():
    """It may give None for nothing, and leave out weights and times; tensors are taken too."""
    torch = pytest.importorskip("torch")
    gone, leaf = IDS[:1], BOOK.leaves(ITEMS.codes)
    left = np.setdiff1d(IDS, gone)
    own = IDS[leaf[IDS] == leaf[gone[0]]]
    by_rows, by_function, by_tensors, to_nothing = (filled() for _ in range(4))
    by_rows.forget(BOOK, ITEMS, gone, kept=(IDS, np.ones(50, np.float32), np.zeros(50, np.int64)))
    by_function.forget(BOOK, ITEMS, gone, kept=lambda code: (own, None, None))
    given = Histories(torch.from_numpy(X), torch.from_numpy(V), codes=torch.from_numpy(ITEMS.codes))
    by_tensors.forget(BOOK, given, torch.from_numpy(gone), kept=lambda code: (torch.from_numpy(own), None, None))
    assert by_rows.to_bytes() == by_function.to_bytes() == by_tensors.to_bytes()
    to_nothing.forget(BOOK, ITEMS, gone, kept=lambda code: None)
    sums = to_nothing.sums(BOOK)
    assert leaf[gone[0]] not in BOOK.leaves(sums.codes)
    assert sums.weights.sum() == (leaf[IDS] != leaf[gone[0]]).sum()
    assert set(leaf[left]) >= set(BOOK.leaves(sums.codes).tolist())


def test_a_later_time_shrinks_masses_alone():
    """So far ahead that a bias in float32 would lose the shares of tokens."""
    made = filled(half_life=10)
    now = made.epoch + 20_000_000
    early, late = (made.compress(BOOK, budget=5, temperature=1.0, now=at) for at in (None, now))
    np.testing.assert_array_equal(early.log_share, late.log_share)
    np.testing.assert_array_equal(early.tokens, late.tokens)
    np.testing.assert_allclose(late.lse, early.lse - np.log(2) * 2e6, rtol=1e-7)
    codes = ITEMS.codes
    early, late = (made.match(BOOK, codes, now=at) for at in (None, now))
    np.testing.assert_array_equal(early.v, late.v)
    np.testing.assert_allclose(late.lse, early.lse - np.log(2) * 2e6, rtol=1e-7)


def test_two_versions_of_a_model_live_side_by_side():
    """Each state follows the log under its own tag and from its own position; a rollback goes on with the older one."""
    values = {1: V, 2: np.flip(V, 1).copy()}
    states = {tag: state(model_tag=tag) for tag in values}

    def follow(tag, first, last):
        at = np.arange(first, last)
        states[tag].append(BOOK, ITEMS._replace(v=values[tag]), IDS[at], positions=at, model_tag=tag)

    follow(1, 0, 20)
    follow(2, 0, 40)
    follow(1, 0, 50)  # rolled back: the log again, from its start
    whole = filled(model_tag=0)
    np.testing.assert_array_equal(states[1].sums(BOOK).v, whole.sums(BOOK).v)
    assert [states[tag].position for tag in (1, 2)] == [49, 39]
    said(lambda: states[1].merge(BOOK, states[2], ITEMS, model_tag=1), ValueError, "merge: model_tag expected 1, got 2")
