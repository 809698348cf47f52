# SPDX-License-Identifier: Apache-2.0
"""Codebooks that other libraries trained: faiss, vector-quantize-pytorch."""

import sys
import types

import numpy as np
import pytest

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
    quantizer = types.SimpleNamespace(d=3, M=2, nbits=nbits, codebooks=vector)
    monkeypatch.setitem(sys.modules, "faiss", types.SimpleNamespace(vector_to_array=np.asarray))
    assert Codebook.from_faiss(quantizer) == Codebook(levels)


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
