# SPDX-License-Identifier: Apache-2.0
"""Codebooks that other libraries trained: faiss, vector-quantize-pytorch."""

import sys
import types

import numpy as np
import pytest

import hisac
from hisac import Codebook


def test_from_faiss():
    """The same codewords; its encoder at beam 1 is greedy and so agrees, but for near-ties in its float32."""
    faiss = pytest.importorskip("faiss")
    x = np.random.default_rng(1).normal(size=(600, 8)).astype(np.float32)
    quantizer = faiss.ResidualQuantizer(8, 2, 4)
    quantizer.train_type = faiss.ResidualQuantizer.Train_default
    quantizer.max_beam_size = 1
    quantizer.train(x)
    book = Codebook.from_faiss(quantizer)
    assert book.sizes == (16, 16) and book.width == 8 and book.report is None
    flat = faiss.vector_to_array(quantizer.codebooks).reshape(2, 16, 8)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(book.centers, flat, strict=True))
    packed = quantizer.compute_codes(x)
    theirs = np.stack([packed[:, 0] & 15, packed[:, 0] >> 4], axis=1)  # 4 bits a level, low bits first
    ours = book.encode(x)
    for i in np.flatnonzero((theirs != ours).any(axis=1)):
        level = int(np.flatnonzero(theirs[i] != ours[i])[0])
        residual = x[i] - sum((flat[n, ours[i, n]] for n in range(level)), np.zeros(8, np.float32))
        distance = ((residual - flat[level]).astype(np.float64) ** 2).sum(axis=1)
        assert abs(distance[ours[i, level]] - distance[theirs[i, level]]) < 1e-5 * distance[ours[i, level]]
    assert (theirs == ours).all(axis=1).mean() > 0.99


def test_from_faiss_reads_these_fields(monkeypatch):
    """A stand-in: levels of different sizes, where faiss is not installed."""
    levels = [np.arange(12, dtype=np.float32).reshape(4, 3), np.ones((2, 3), np.float32)]
    vector = np.concatenate(levels).ravel()
    nbits = types.SimpleNamespace(at=[2, 1].__getitem__)
    fields = {"d": 3, "M": 2, "nbits": nbits, "codebooks": vector, "is_trained": True}
    quantizer = type("ResidualQuantizer", (types.SimpleNamespace,), {})(**fields)
    monkeypatch.setitem(sys.modules, "faiss", types.SimpleNamespace(vector_to_array=np.asarray))
    assert Codebook.from_faiss(quantizer) == Codebook(levels)
    index = type("IndexResidualQuantizer", (types.SimpleNamespace,), {})(rq=quantizer, is_trained=True)
    assert Codebook.from_faiss(index) == Codebook(levels)


class Trained(types.SimpleNamespace):
    is_trained = True


def like(name, **fields):
    """A stand-in for an object of that class of faiss."""
    return type(name, (Trained,), {})(**fields)


@pytest.mark.parametrize(
    "given",
    [
        like("LocalSearchQuantizer", d=3, M=2),
        like("ProductQuantizer", d=3, M=2),
        like("ResidualQuantizer", d=3, M=2, is_trained=False),
        like("IndexResidualQuantizer", rq=like("ResidualQuantizer", is_trained=False)),
        like("IndexIVFResidualQuantizer", rq=like("ResidualQuantizer")),
        like("IndexPreTransform", index=like("Index")),
        like("IndexLocalSearchQuantizer", lsq=like("LocalSearchQuantizer")),
        np.zeros((4, 3), np.float32),
        None,
    ],
    ids=lambda given: type(given).__name__,
)
def test_from_faiss_refuses_by_name(given):
    """Whether faiss is installed or not."""
    with pytest.raises(TypeError) as error:
        Codebook.from_faiss(given)
    wanted = "expected a trained ResidualQuantizer, or an index of one"
    assert str(error.value) == f"from_faiss: {wanted}, got {type(given).__name__}"


def test_from_faiss_of_real_indexes():
    faiss = pytest.importorskip("faiss")
    x = np.random.default_rng(1).normal(size=(700, 8)).astype(np.float32)
    for kind in ("RQ2x4", "RQ2x4fs_Nrq2x4"):
        index = faiss.index_factory(8, kind)
        with pytest.raises(TypeError, match="trained"):
            Codebook.from_faiss(index)
        index.train(x)
        assert Codebook.from_faiss(index) == Codebook.from_faiss(index.rq)
    others = [faiss.index_factory(8, kind) for kind in ("IVF4,RQ2x4", "PCA4,RQ2x4", "PRQ2x2x4", "LSQ2x4")]
    for other in (*others, faiss.LocalSearchQuantizer(8, 2, 4), faiss.ProductQuantizer(8, 2, 4)):
        with pytest.raises(TypeError, match=f"got {type(other).__name__}$"):
            Codebook.from_faiss(other)


@pytest.mark.parametrize("prefix", ["", "model.tokenizer.", "a name, of? words."])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_from_state_dict(prefix, kind):
    make = np.asarray if kind == "numpy" else pytest.importorskip("torch").from_numpy
    levels = [np.full((c, 3), n, np.float32) for n, c in enumerate((4, 2, 5))]
    state = {f"{prefix}layers.{n}._codebook.embed": make(levels[n][None]) for n in (2, 0, 1)}
    state |= {f"{prefix}layers.0._codebook.cluster_size": make(np.ones((1, 4), np.float32))}
    state |= {f"{prefix}project_in.weight": make(np.ones((3, 3), np.float32))}
    assert Codebook.from_state_dict(state) == Codebook(levels)
    assert Codebook.from_state_dict({k: v[0] if "embed" in k else v for k, v in state.items()}) == Codebook(levels)


@pytest.mark.parametrize("levels", [(), (1, 2), (0, 2)])
def test_from_state_dict_names_the_levels_it_found(levels):
    state = {f"layers.{n}._codebook.embed": np.zeros((1, 2, 3), np.float32) for n in levels}
    with pytest.raises(ValueError) as error:
        Codebook.from_state_dict({**state, "head.weight": np.zeros(3)})
    text = f"from_state_dict: expected layers.N._codebook.embed for N = 0, 1, .., got levels {list(levels)}"
    assert str(error.value) == text


def test_from_state_dict_of_half_precision_and_of_what_does_not_fit():
    torch, key = pytest.importorskip("torch"), "layers.0._codebook.embed"
    level = torch.arange(6.0).reshape(1, 2, 3)
    for kept in (level.bfloat16(), level.half(), level.double(), level.double().numpy()):
        assert Codebook.from_state_dict({key: kept}) == Codebook([level[0]])
    for state, text in (
        ({key: level, f"b.{key}": level}, "expected one quantizer, got layers of ['', 'b']; pass one's part"),
        ({key: torch.zeros(2, 2, 3)}, "embed expected [1, C, D] or [C, D], got [2, 2, 3]"),
        ({key: torch.zeros(3)}, "embed expected [1, C, D] or [C, D], got [3]"),
    ):
        with pytest.raises(ValueError) as error:
            Codebook.from_state_dict(state)
        assert str(error.value) == f"from_state_dict: {text}"


@pytest.mark.parametrize("prefix", ["", "model.tokenizer."])
@pytest.mark.parametrize(
    "odd",
    [
        "mlps.0.proj_in.weight",  # implicit_neural_codebook: what is added depends on the sum so far
        "mlps.0.layers.1.weight",
        "layers.1._codebook.codebook_mean",  # affine_param: codewords are scaled and moved
        "layers.1._codebook.batch_variance",
        "layers.0.project_in.weight",
        "layers.0.codebook_transform.weight",
    ],
)
def test_from_state_dict_refuses_what_codewords_do_not_express(prefix, odd):
    levels = [np.full((c, 3), n, np.float32) for n, c in enumerate((4, 2))]
    names = ("embed_avg", "cluster_size", "initted")
    state = {f"{prefix}layers.{n}._codebook.embed": level[None] for n, level in enumerate(levels)}
    state |= {f"{prefix}layers.{n}._codebook.{name}": np.ones((1, 4)) for n in range(2) for name in names}
    state |= {f"other.{odd}": np.ones(3), f"{prefix}head.weight": np.ones(3), f"{prefix}project_in.bias": np.ones(3)}
    assert Codebook.from_state_dict(state) == Codebook(levels)
    with pytest.raises(ValueError) as error:
        Codebook.from_state_dict({**state, f"{prefix}{odd}": np.ones(3)})
    wanted = f"expected codewords alone, got '{prefix}{odd}' too, which they do not express"
    assert str(error.value) == f"from_state_dict: {wanted}"


def test_to_faiss_and_back():
    """A fitted codebook as a ResidualQuantizer: the same codewords, and at beam 1 the same codes but for near ties."""
    faiss = pytest.importorskip("faiss")
    x = np.random.default_rng(3).normal(size=(900, 8)).astype(np.float32)
    book = hisac.fit(x, (16, 16))
    quantizer = faiss.ResidualQuantizer(8, 2, 4)
    faiss.copy_array_to_vector(np.concatenate(book.centers).ravel(), quantizer.codebooks)
    quantizer.is_trained, quantizer.max_beam_size = True, 1
    assert Codebook.from_faiss(quantizer) == book
    packed = quantizer.compute_codes(x)
    theirs = np.stack([packed[:, 0] & 15, packed[:, 0] >> 4], axis=1)
    assert (theirs == book.encode(x)).all(1).mean() > 0.99


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"kmeans_init": True},
        {"use_cosine_sim": True},
        {"shared_codebook": True},
        {"shared_codebook": True, "kmeans_init": True},
        {"learnable_codebook": True, "ema_update": False},
        {"rotation_trick": True},
    ],
    ids=str,
)
def test_round_trip_with_vector_quantize_pytorch(kind):
    """A trained ResidualVQ gives the codes that its codebook here gives, and takes the codewords of a fit."""
    torch, library = pytest.importorskip("torch"), pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    x = torch.randn(1000, 8)
    theirs = library.ResidualVQ(dim=8, num_quantizers=2, codebook_size=16, **kind)

    def codes():
        with torch.no_grad():
            quantised, found, *_ = theirs.eval()(x[None])
        return quantised[0], found[0].to(torch.int32)

    for _ in range(20):
        theirs.train()(x[None])
    book = Codebook.from_state_dict(theirs.state_dict())
    quantised, found = codes()
    ours = book.encode(x)
    assert (ours == found).all(1).float().mean() > 0.99  # but for near ties in its float32
    np.testing.assert_allclose(book.prototypes(found), quantised, atol=1e-6)
    if "use_cosine_sim" in kind or "shared_codebook" in kind:
        return  # whose codewords have length 1, or are one level's
    fitted = hisac.fit(x, (16, 16), iterations=5)
    state = theirs.state_dict()
    for level, center in enumerate(fitted.centers):
        state[f"layers.{level}._codebook.embed"] = torch.from_numpy(center)[None]
    theirs.load_state_dict(state)
    assert Codebook.from_state_dict(theirs.state_dict()) == fitted
    assert (fitted.encode(x) == codes()[1]).all(1).float().mean() > 0.99
