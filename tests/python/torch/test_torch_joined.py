# SPDX-License-Identifier: Apache-2.0
"""Joined tokens in `hisac.torch`: TargetAttention and Similarity over several sets are those over all tokens."""

import importlib
import re

import pytest

from hisac import Histories

torch = pytest.importorskip("torch")
small = importlib.import_module("small_ranking")  # needs torch
hisac_torch = importlib.import_module("hisac.torch")
TokenSet, INF = hisac_torch.TokenSet, torch.inf
AT, RAGGED = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 3, 5, 5])  # the last user has no recent behaviour


def sets():
    torch.manual_seed(0)
    agents, share, raw, own = torch.randn(3, 4, 6), torch.randn(3, 4), torch.randn(5, 6), torch.randn(5)
    share[0, 2:], own[1] = -INF, -INF
    return torch.randn(9, 5), TokenSet(agents, share), TokenSet(raw, own, RAGGED)


def side_by_side(agents, raw):
    """Both as one set of 7 tokens, absent ones at the end."""
    tokens, share = torch.zeros(3, 7, 6), torch.full((3, 7), -INF)
    tokens[:, :4], share[:, :4] = agents.tokens, agents.bias
    for b in range(3):
        rows = slice(*RAGGED[b : b + 2].tolist())
        n = rows.stop - rows.start
        tokens[b, 4 : 4 + n], share[b, 4 : 4 + n] = raw.tokens[rows], raw.bias[rows]
    return tokens, share


@pytest.mark.parametrize("learn", [{}, {"learn_factor": True}, {"learn_scale": True, "learn_factor": True}])
def test_sets_are_joined_in_one_softmax(learn):
    candidates, agents, raw = sets()
    attention = hisac_torch.TargetAttention(5, 6, heads=2, head_width=3, **learn)
    for scale in [p for name, p in attention.named_parameters(recurse=False)]:
        scale.data += 0.3
    out, lse = attention(candidates, [agents, raw], AT)
    tokens, share = side_by_side(agents, raw)
    expected, expected_lse = attention(candidates, tokens, AT, bias=share)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    projected = [agents._replace(tokens=attention.keys_values(agents.tokens)), raw]
    torch.testing.assert_close(attention(candidates, projected, AT)[0], out)
    one = attention(candidates, agents, AT)
    for a, b in zip(one, attention(candidates, agents.tokens, AT, bias=agents.bias), strict=True):
        assert torch.equal(a, b)


def test_factor_and_scale_are_those_of_the_equation():
    candidates, agents, raw = sets()
    attention = hisac_torch.TargetAttention(5, 6, heads=2, head_width=3, learn_factor=True, learn_scale=True)
    plain = hisac_torch.TargetAttention(5, 6, heads=2, head_width=3)
    plain.load_state_dict({name: p for name, p in attention.state_dict().items() if "." in name})
    for a, b in zip(attention(candidates, [agents, raw], AT), plain(candidates, [agents, raw], AT), strict=True):
        torch.testing.assert_close(a, b)  # 1 at first
    with torch.no_grad():
        attention.factor.fill_(0.5)
        attention.log_scale.copy_(torch.tensor([2.0, 0.25]).log())
        for layer in (plain.query.weight, plain.query.bias):
            layer.copy_(
                (layer.unflatten(0, (2, -1)).transpose(0, -1) * torch.tensor([2.0, 0.25]))
                .transpose(0, -1)
                .flatten(0, 1)
            )
    halves = [s._replace(bias=0.5 * s.bias) for s in (agents, raw)]
    for a, b in zip(attention(candidates, [agents, raw], AT), plain(candidates, halves, AT), strict=True):
        torch.testing.assert_close(a, b)


def test_everything_learns_and_stays_finite_without_tokens():
    candidates, agents, raw = sets()
    agents.bias[2] = -INF  # and no recent behaviour: a new user
    leaves = [t.requires_grad_() for t in (candidates, agents.tokens, agents.bias, raw.tokens, raw.bias)]
    attention = hisac_torch.TargetAttention(5, 6, heads=2, head_width=3, learn_factor=True, learn_scale=True)
    out, lse = attention(candidates, [agents, raw], AT)
    assert (out[4:] == 0).all() and (lse[4:] == 0).all()
    (out.square().sum() + lse.square().sum()).backward()
    for t in [*leaves, *attention.parameters()]:
        assert torch.isfinite(t.grad).all() and t.grad.abs().sum() > 0
    assert (candidates.grad[4:] == 0).all() and (raw.tokens.grad[1] == 0).all() and raw.bias.grad[1] == 0


def test_joined_sets_compile_and_export():
    candidates, agents, raw = sets()
    attention = hisac_torch.TargetAttention(5, 6, heads=2, head_width=3, learn_factor=True)
    expected = attention(candidates, [agents, raw], AT)
    for a, b in zip(torch.compile(attention, fullgraph=True)(candidates, [agents, raw], AT), expected, strict=True):
        torch.testing.assert_close(a, b)
    program = torch.export.export(attention, (candidates, [agents, raw], AT))
    for a, b in zip(program.module()(candidates, [agents, raw], AT), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_joined_sets_in_the_modules_type(dtype):
    candidates, agents, raw = sets()
    attention = hisac_torch.TargetAttention(5, 6, heads=2, head_width=3, learn_factor=True, learn_scale=True).to(dtype)
    out, lse = attention(candidates.to(dtype), [agents, raw._replace(tokens=raw.tokens.to(dtype))], AT)
    assert out.dtype == lse.dtype == dtype and torch.isfinite(out).all() and torch.isfinite(lse).all()


@pytest.mark.parametrize("offsets", [small.OFFSETS, (small.OFFSETS[:-1], small.OFFSETS[1:])])
def test_the_way_of_older_and_recent_behaviours(offsets):
    """README's: older behaviours compressed, recent ones raw, all biases logs of shares that sum to 1."""
    book, (x, v) = small.make_book(), small.rows()
    embedding = torch.nn.Embedding(20, v.shape[1], padding_idx=3)
    ids = torch.arange(20)
    h = Histories(x, embedding, offsets, x_ids=ids, v_ids=ids, codes=torch.from_numpy(book.encode(x.numpy())))
    parted = hisac_torch.recent(h, 3)
    assert parted.older.v is embedding and (parted.v_ids != 3).all() and parted.rows.shape == (3, 3)
    made = hisac_torch.Compressor(book, budget=4, temperature=0.2, mean_x=True)(parted.older)
    share = torch.cat([made.log_share + parted.older_share[:, None], parted.log_share], 1)
    total = share.exp().sum(1)
    torch.testing.assert_close(total, torch.tensor([1.0, 0.0, 1.0]))  # the second user has no history
    tokens = torch.cat([made.tokens, embedding(parted.v_ids)], 1)
    attention, similar = hisac_torch.TargetAttention(8, v.shape[1]), hisac_torch.Similarity()
    out, lse = attention(torch.randn(9, 8), tokens, AT, bias=share)
    near = similar(torch.randn(9, 8), torch.cat([made.mean_x, x[parted.x_ids]], 1), AT, bias=share)
    for t in (out, lse, near):
        assert torch.isfinite(t).all()
    (out.sum() + lse.sum() + near.sum()).backward()
    for p in (*embedding.parameters(), *attention.parameters(), *similar.parameters()):
        assert torch.isfinite(p.grad).all()


def test_recent_and_repeat_count_in_traced_programs():
    ids = torch.randint(-1, 20, (30,), generator=torch.Generator().manual_seed(0))
    item, at, bias = torch.arange(9) * 2, torch.tensor([0, 3, 5, 9]), torch.randn(30)

    class Both(torch.nn.Module):
        def forward(self, ids, offsets, bias, item, at):
            h = Histories(v_ids=ids, offsets=offsets, bias=bias)
            found = hisac_torch.recent(h, 4)
            return found.v_ids, found.log_share, found.older_share, hisac_torch.repeat_count(h, item, at)

    inputs = ids, torch.tensor([0, 17, 17, 30]), bias, item, at
    other = ids[:23], torch.tensor([0, 2, 23]), bias[:23], item, torch.tensor([0, 3, 9])
    dynamic = {"ids": {0: "t"}, "offsets": {0: "b"}, "bias": {0: "t"}, "item": None, "at": {0: "b"}}
    dynamic = {name: None if d is None else {0: torch.export.Dim.AUTO} for name, d in dynamic.items()}
    program = torch.export.export(Both(), inputs, dynamic_shapes=dynamic).module()
    compiled = torch.compile(Both(), fullgraph=True, dynamic=True)
    for given in (inputs, other):
        for a, b, c in zip(Both()(*given), compiled(*given), program(*given), strict=True):
            torch.testing.assert_close(b, a)
            assert torch.equal(c, a)


def test_recent_of_jagged_behaviours_keeps_its_embedding():
    ids = torch.nested.nested_tensor([torch.tensor([1, 0, 5]), torch.tensor([4, 4])], layout=torch.jagged)
    embedding = torch.nn.Embedding(6, 2, padding_idx=0, sparse=True)
    found = hisac_torch.recent(Histories(v=embedding, v_ids=ids), 2)
    assert found.v_ids.tolist() == [[1, 5], [4, 4]] and found.older.v is embedding
    flat = Histories(v=embedding, v_ids=ids.values(), offsets=[0, 3, 5])
    assert hisac_torch.recent(flat, 2).v_ids.tolist() == found.v_ids.tolist()
    for h in (Histories(v=embedding, v_ids=ids), flat):
        assert hisac_torch.repeat_count(h, torch.tensor([0, 1, 4]), [0, 2, 3]).tolist() == [0, 1, 2]


def test_shares_of_recent_behaviours_learn_from_biases():
    h = Histories(v=torch.zeros(6, 1), offsets=torch.tensor([0, 4, 4, 6]), bias=torch.randn(6))
    bias = h.bias.requires_grad_()
    found = hisac_torch.recent(h, 2)
    weight = torch.arange(4.0).unflatten(0, (2, 2))
    ((found.log_share[[0, 2]] * weight).sum() + found.older_share[0]).backward()
    other = bias.detach().clone().requires_grad_()
    first, last = other[:4].logsumexp(0), other[4:].logsumexp(0)
    share = torch.stack([other[2:4] - first, other[4:] - last])
    ((share * weight).sum() + other[:2].logsumexp(0) - first).backward()
    torch.testing.assert_close(bias.grad, other.grad)
    torch.testing.assert_close(found.log_share[[0, 2]], share)
    assert found.older_share[1:].tolist() == [-INF, -INF] and (found.log_share[1] == -INF).all()


def test_what_lies_in_absent_tokens_reaches_no_gradient():
    candidates, agents, raw = sets()
    agents.tokens[0, 2:], raw.tokens[1] = float("nan"), INF  # those of bias -inf
    attention = hisac_torch.TargetAttention(5, 6, heads=2, head_width=3, learn_factor=True)
    similar = hisac_torch.Similarity()
    out, lse = attention(candidates, [agents, raw], AT)
    near = similar(torch.randn(9, 6), [agents, raw], AT)
    (out.sum() + lse.sum() + near.sum()).backward()
    for p in (*attention.parameters(), *similar.parameters()):
        assert torch.isfinite(p.grad).all()


def test_similarity_to_sets_is_that_to_all_tokens():
    _, agents, raw = sets()
    candidates = torch.randn(9, 6)
    module = hisac_torch.Similarity((2.0, 30.0))
    tokens, share = side_by_side(agents, raw)
    expected = module(candidates, tokens, AT, bias=share)
    torch.testing.assert_close(module(candidates, [agents, raw], AT), expected)
    assert torch.equal(module(candidates, TokenSet(tokens, share), AT), expected)
    only = module(candidates, [raw], AT)
    assert torch.equal(only[4:], (-2 * module.log_sharpness.exp()).expand(5, 2))  # none recent


def test_similarity_to_sets_learns_and_stays_finite_without_tokens():
    _, agents, raw = sets()
    agents.bias[2] = -INF  # a new user
    candidates, module = torch.randn(9, 6), hisac_torch.Similarity()
    leaves = [t.requires_grad_() for t in (candidates, agents.tokens, agents.bias, raw.tokens, raw.bias)]
    module(candidates, [agents, raw], AT).square().sum().backward()
    for t in [*leaves, module.log_sharpness]:
        assert torch.isfinite(t.grad).all() and t.grad.abs().sum() > 0
    assert (candidates.grad[4:] == 0).all() and raw.bias.grad[1] == 0


def test_errors():
    candidates, agents, raw = sets()
    attention, keys = hisac_torch.TargetAttention(5, 6, heads=2, head_width=3), hisac_torch.KeysValues

    def refused(kind, text, tokens, module=attention, candidates=candidates, at=AT, **options):
        with pytest.raises(kind, match="^" + re.escape(text)):
            module(candidates, tokens, at, **options)

    refused(TypeError, "TargetAttention: bias expected in the TokenSet, got it beside", [agents, raw], bias=agents.bias)
    refused(ValueError, "TargetAttention: tokens expected one set or more, got []", [])
    refused(TypeError, "TargetAttention: tokens expected Tensor or KeysValues, got NoneType", [agents, None])
    refused(TypeError, "TargetAttention: tokens expected Tensor or KeysValues, got ndarray", agents.tokens.numpy())
    text = "TargetAttention: tokens expected [B, M, W] with W = 6, got "
    refused(ValueError, text + "[3, 4, 5]", (agents._replace(tokens=agents.tokens[..., :5]), raw))
    refused(ValueError, text + "[5, 6]", raw._replace(offsets=None))
    text = "TargetAttention: tokens expected [R, W] beside offsets with W = 6, got [3, 4, 6]"
    refused(ValueError, text, agents._replace(offsets=RAGGED))
    text = "TargetAttention: bias expected floating-point numbers, as log_share, got bool"
    refused(TypeError, text, agents._replace(bias=agents.bias > 0))
    text = "TargetAttention: candidate_offsets expected a tensor or a list [B + 1], got "
    refused(TypeError, text + "NoneType", agents, at=None)
    refused(TypeError, text + "tuple", agents, at=(AT[:-1], AT[1:]))
    other = hisac_torch.TargetAttention(5, 6, heads=2, head_width=3, value_width=2).keys_values(agents.tokens)
    text = "TargetAttention: keys and values expected [H, d], [H, V] = [[2, 3], [2, 3]], got [[2, 3], [2, 2]]"
    refused(ValueError, text, agents._replace(tokens=keys(*other)))
    refused(ValueError, "attend: token_offsets expected at most M = 1 tokens a user, got 3", raw._replace(longest=1))
    refused(ValueError, "attend: token_offsets expected for 3 users, got 2", raw._replace(offsets=RAGGED[:3]))
    refused(ValueError, "attend: longest expected beside token_offsets, got 3 without", agents._replace(longest=3))
    refused(ValueError, "attend: bias expected", agents._replace(bias=agents.bias[:, :2]))
    similar = {"module": hisac_torch.Similarity(), "candidates": torch.randn(9, 6)}
    refused(TypeError, "Similarity: bias expected in the TokenSet, got it beside", agents, bias=agents.bias, **similar)
    refused(ValueError, "Similarity: tokens expected one set or more, got []", [], **similar)
    projected = agents._replace(tokens=attention.keys_values(agents.tokens))
    refused(TypeError, "Similarity: tokens expected Tensor, got KeysValues", [projected], **similar)
    similar["candidates"] = candidates
    refused(ValueError, "Similarity: tokens expected [B, M, W] with W = 5, got [3, 4, 6]", agents, **similar)
