# SPDX-License-Identifier: Apache-2.0
"""Similarity and parameter_groups of `hisac.torch`, and mean_x of a Compressor, which they are made for."""

import importlib
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
small = importlib.import_module("small_ranking")  # needs torch
hisac_torch = importlib.import_module("hisac.torch")
INF, OFFSETS = torch.inf, torch.tensor([0, 4, 4, 9])


def by_hand(candidates, tokens, bias, sharpness):
    """The equation, in float64, one candidate after another."""
    out = []
    for b, rows in enumerate(itertools.pairwise(OFFSETS)):
        for q in candidates[slice(*rows)].double():
            t = tokens[b].double()
            norm = (q.norm() * t.norm(dim=1)).clamp(min=1e-12)
            z = bias[b].double() + sharpness[:, None] * ((t @ q / norm) - 1)
            out.append(torch.where(torch.isneginf(z).all(1), -2 * sharpness, z.logsumexp(1)))
    return torch.stack(out)


def inputs():
    torch.manual_seed(0)
    candidates, tokens, bias = torch.randn(9, 6), torch.randn(3, 5, 6), torch.randn(3, 5)
    bias[0, 2:], bias[2] = -INF, -INF
    tokens[0, 1] = candidates[4] = 0  # a cosine of 0
    return candidates, tokens, bias


def test_similarity_is_its_equation():
    candidates, tokens, bias = inputs()
    module = hisac_torch.Similarity((2.0, 30.0, 0.5))
    s = module.log_sharpness.detach().double().exp()
    found = module(candidates, tokens, OFFSETS, bias=bias)
    torch.testing.assert_close(found.double(), by_hand(candidates, tokens, bias, s), rtol=1e-5, atol=1e-4)
    assert torch.equal(found[4:], (-2 * s.float()).expand(5, 3))  # a user without tokens
    without = module(candidates, tokens, OFFSETS)
    torch.testing.assert_close(
        without.double(), by_hand(candidates, tokens, 0 * bias.nan_to_num(), s), atol=1e-4, rtol=0
    )


def test_everything_learns_and_stays_finite():
    candidates, tokens, bias = (t.requires_grad_() for t in inputs())
    module = hisac_torch.Similarity()
    module(candidates, tokens, OFFSETS, bias=bias).sum().backward()
    for t in (candidates, tokens, bias, module.log_sharpness):
        assert torch.isfinite(t.grad).all() and t.grad.abs().sum() > 0
    assert (tokens.grad[2] == 0).all() and (bias.grad[0, 2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_similarity_in_the_modules_type(dtype):
    candidates, tokens, bias = inputs()
    module = hisac_torch.Similarity().to(dtype)
    found = module(candidates.to(dtype), tokens.to(dtype), OFFSETS, bias=bias)
    assert found.dtype == dtype and torch.isfinite(found).all()


def test_similarity_compiles_and_exports():
    candidates, tokens, bias = inputs()
    module = hisac_torch.Similarity()
    expected = module(candidates, tokens, OFFSETS, bias=bias)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(candidates, tokens, OFFSETS, bias=bias), expected)
    program = torch.export.export(module, (candidates, tokens, OFFSETS), {"bias": bias})
    torch.testing.assert_close(program.module()(candidates, tokens, OFFSETS, bias=bias), expected)


def test_one_sharpness_and_no_module():
    assert len(hisac_torch.Similarity(5.0).log_sharpness) == 1
    with pytest.raises(TypeError, match=r"^parameter_groups: model expected nn.Module, got generator"):
        hisac_torch.parameter_groups(torch.nn.Linear(2, 2).parameters(), 0.1)


@pytest.mark.parametrize("sharpness", [(), (0.0,), (1.0, -2.0), (np.inf,)])
def test_a_sharpness_is_a_finite_number_above_0(sharpness):
    with pytest.raises(ValueError, match=r"^Similarity: sharpness expected finite numbers > 0, got \("):
        hisac_torch.Similarity(sharpness)


def test_parameter_groups():
    book = small.make_book()
    compress = hisac_torch.Compressor(book, budget=3, temperature=0.2)
    fixed = hisac_torch.Compressor(book, budget=3, temperature=0.2, learn_temperature=False)
    similar, linear = hisac_torch.Similarity(), torch.nn.Linear(3, 2)
    attention = hisac_torch.TargetAttention(2, 3, heads=2, learn_factor=True, learn_scale=True)
    model = torch.nn.ModuleList([compress, fixed, similar, linear, similar, attention])  # one twice
    slow, quick = hisac_torch.parameter_groups(model, 0.01, weight_decay=0.1)
    weights = [p for layer in (attention.query, attention.key, attention.value) for p in layer.parameters()]
    assert slow == {"params": [linear.weight, linear.bias, *weights], "lr": 0.01, "weight_decay": 0.1}
    scales = [compress.log_tau, similar.log_sharpness, attention.factor, attention.log_scale]
    assert quick == {"params": scales, "lr": 0.1, "weight_decay": 0.0}
    torch.optim.AdamW([slow, quick]).step()
    assert len(hisac_torch.parameter_groups(linear, 0.01)) == 1


def test_a_compressor_hands_out_mean_x():
    book, (x, v) = small.make_book(), small.rows()
    batch = hisac_torch.functions.Histories(x, v, small.OFFSETS)
    compress = hisac_torch.Compressor(book, budget=4, temperature=0.2, mean_x=True, missing="token")
    made = compress(batch)
    assert made.mean_x.shape == (*made.tokens.shape[:2], x.shape[1])
    as_values = hisac_torch.Compressor(book, budget=4, temperature=0.2)(batch._replace(v=x))
    torch.testing.assert_close(made.mean_x[:, :4], as_values.tokens)
    assert (made.mean_x[:, 4] == 0).all() and hisac_torch.Compressor(book, budget=4, temperature=0.2)(
        batch
    ).mean_x is None
    similar = hisac_torch.Similarity()(x[:9], made.mean_x, OFFSETS, bias=made.log_share)
    similar.sum().backward()
    assert torch.isfinite(compress.log_tau.grad).all() and compress.log_tau.grad != 0
