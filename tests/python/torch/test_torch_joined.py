# SPDX-License-Identifier: Apache-2.0
"""Joined tokens in `hisac.torch`: TargetAttention and Similarity over several sets are those over all tokens."""

import importlib

import pytest

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


def test_the_way_of_older_and_recent_behaviours():
    """README's: older behaviours compressed, recent ones raw, all biases logs of shares that sum to 1."""
    book, (x, v) = small.make_book(), small.rows()
    h = hisac_torch.functions.Histories(x, v, small.OFFSETS)
    parted = hisac_torch.recent(h, 3)
    made = hisac_torch.Compressor(book, budget=4, temperature=0.2)(parted.older)
    agents = TokenSet(made.tokens, made.log_share + parted.older_share[:, None])
    raw = TokenSet(v[parted.rows], parted.log_share, parted.offsets)
    for b in range(3):
        rows = slice(*parted.offsets[b : b + 2].tolist())
        total = agents.bias[b].exp().sum() + raw.bias[rows].exp().sum()
        assert total.isclose(torch.ones(())) or small.OFFSETS[b] == small.OFFSETS[b + 1]
    out, lse = hisac_torch.TargetAttention(8, v.shape[1])(torch.randn(9, 8), [agents, raw], AT)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()


def test_shares_of_recent_behaviours_learn_from_biases():
    h = hisac_torch.functions.Histories(v=torch.zeros(6, 1), offsets=torch.tensor([0, 4, 4, 6]), bias=torch.randn(6))
    bias = h.bias.requires_grad_()
    found = hisac_torch.recent(h, 2)
    weight = torch.arange(4.0)
    ((found.log_share * weight).sum() + found.older_share[0]).backward()
    other = bias.detach().clone().requires_grad_()
    first, last = other[:4].logsumexp(0), other[4:].logsumexp(0)
    share = torch.cat([other[2:4] - first, other[4:] - last])
    ((share * weight).sum() + other[:2].logsumexp(0) - first).backward()
    torch.testing.assert_close(bias.grad, other.grad)
    torch.testing.assert_close(found.log_share, share)
    assert found.older_share[1:].tolist() == [-INF, -INF]


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
    attention = hisac_torch.TargetAttention(5, 6, heads=2, head_width=3)
    with pytest.raises(TypeError, match=r"^TargetAttention: bias expected in the TokenSet, got it beside"):
        attention(candidates, [agents, raw], AT, bias=agents.bias)
    with pytest.raises(ValueError, match=r"^TargetAttention: tokens expected one set or more, got \[\]"):
        attention(candidates, [], AT)
    with pytest.raises(ValueError, match=r"^attend: token_offsets expected at most M = 1 tokens a user, got 3"):
        attention(candidates, raw._replace(longest=1), AT)
    with pytest.raises(ValueError, match=r"^attend: token_offsets expected for 3 users, got 2"):
        attention(candidates, raw._replace(offsets=RAGGED[:3]), AT)
    with pytest.raises(ValueError, match=r"^attend: longest expected beside token_offsets, got 3 without"):
        attention(candidates, agents._replace(longest=3), AT)
    with pytest.raises(ValueError, match=r"^attend: keys expected q's type, \[R, H, d\], got float32 \[3, 4, 2, 3\]"):
        attention(candidates, agents._replace(offsets=RAGGED), AT)
    similar = hisac_torch.Similarity()
    with pytest.raises(TypeError, match=r"^Similarity: bias expected in the TokenSet, got it beside"):
        similar(candidates, agents, AT, bias=agents.bias)
    with pytest.raises(ValueError, match=r"^Similarity: tokens expected one set or more, got \[\]"):
        similar(candidates, [], AT)
    with pytest.raises(TypeError, match=r"^Similarity: tokens expected a tensor, got KeysValues"):
        similar(candidates, [agents._replace(tokens=attention.keys_values(agents.tokens))], AT)
