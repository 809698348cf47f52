# SPDX-License-Identifier: Apache-2.0
"""What leaves the modules of hisac.torch is finite and in their type, for users without a behaviour too; so are all
gradients, and what a step of an optimiser makes of the parameters."""

import importlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hisac import Histories

torch = pytest.importorskip("torch")
small = importlib.import_module("small_ranking")  # needs torch
hisac_torch = importlib.import_module("hisac.torch")

nn = torch.nn
ITEMS, WIDTH, VALUES = 12, 8, 4
TYPES = ["float32", "float16", "bfloat16", "float64"]
OPTIONS = [
    {},
    {"normalize": "history"},
    {"method": "leaf"},
    {"missing": "token"},
    {"normalize": "history", "missing": "token", "method": "leaf"},
    {"refine": 2, "learn_temperature": False},
]


class Ranker(nn.Module):
    """README's recipe, which takes all that a Compressor hands out but its agents' integers."""

    def __init__(self, **options):
        super().__init__()
        self.compress = hisac_torch.Compressor(small.make_book(), budget=5, temperature=0.1, **options)
        self.attention = hisac_torch.TargetAttention(VALUES + WIDTH, VALUES + WIDTH + 2, heads=2, head_width=4)
        self.embedding = nn.Embedding(ITEMS, VALUES)
        self.network = nn.Linear(8 + 2, 1)

    def forward(self, x, ids, offsets, bias, codes, candidates, candidate_offsets):
        v = self.embedding.weight
        out = self.compress(Histories(x, v, offsets, codes, x_ids=ids, v_ids=ids, bias=bias))
        p = nn.functional.pad(out.agents.prototypes, (0, 0, 0, out.tokens.shape[1] - out.agents.prototypes.shape[1]))
        more = out.lse[..., None], out.log_share.exp()[..., None]
        asked = torch.cat([v, x.nan_to_num(0.0).clamp(-4, 4)], 1)[candidates]
        tokens = torch.cat([out.tokens, p, *more], 2)
        features, match = self.attention(asked, tokens, candidate_offsets, bias=out.log_share)
        return self.network(torch.cat([features, match], 1)).squeeze(1), out, features, match


def make_batch(seed, lengths):
    """Behaviours with items that are none, of x that is none, and without a weight; two candidates a user."""
    g = torch.Generator().manual_seed(seed)
    n, users = sum(lengths), len(lengths)
    x = torch.randn(ITEMS, WIDTH, generator=g)
    x[3], x[5, 1], x[7] = math.nan, math.inf, 2.0**60
    ids = torch.randint(-2, ITEMS + 2, (n,), generator=g)
    bias = torch.randn(n, generator=g)
    bias[torch.rand(n, generator=g) < 0.2] = math.nan
    bias[torch.rand(n, generator=g) < 0.1] = -math.inf
    codes = hisac_torch.encode(small.make_book(), x)
    candidates = torch.randint(ITEMS, (2 * users,), generator=g)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return x, ids, offsets, bias, codes, candidates, 2 * torch.arange(users + 1)


def finite(*tensors):
    return all(t.isfinite().all() for t in tensors)


def check_step(model, call, batch):
    """Forward, backward and a step; the types and numbers of what there is. Returns the results."""
    dtype = model.network.weight.dtype
    score, out, features, match = results = call(*batch)
    share = out.log_share
    assert {t.dtype for t in (score, out.tokens, out.lse, share, features, match)} == {dtype}
    assert finite(score, out.tokens, out.lse, share.exp(), out.agents.prototypes, features, match)
    loss = nn.functional.binary_cross_entropy_with_logits(score.float(), torch.ones(len(score)), reduction="sum")
    model.zero_grad()
    loss.backward()
    assert loss.isfinite()
    for name, p in model.named_parameters():
        assert not p.requires_grad or (p.grad is not None and p.grad.dtype == dtype and finite(p.grad)), name
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert finite(*model.parameters())
    assert finite(call(*batch)[0])
    return results


@given(
    st.integers(0, 2**32 - 1), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.sampled_from(OPTIONS),
    st.sampled_from(TYPES),
)  # fmt: skip
def test_a_step_stays_finite(seed, lengths, options, dtype):
    torch.manual_seed(0)
    model = Ranker(**options).to(getattr(torch, dtype))
    batch = make_batch(seed, lengths)
    _, out, features, match = check_step(model, model, batch)
    nobody = (out.log_share == -math.inf).all(1)
    nothing = nobody.repeat_interleave(2)
    assert nobody[torch.tensor(lengths) == 0].all()
    assert not out.tokens[nobody].any() and not out.lse[nobody].any() and (out.lse >= 0).all()
    assert not features[nothing].any() and not match[nothing].any()
    shares = out.log_share.double().exp().sum(1)
    torch.testing.assert_close(shares, (~nobody).double(), atol=0.02, rtol=0)  # of float16 and bfloat16


@pytest.mark.parametrize("options", OPTIONS)
def test_a_compiled_step_stays_finite(options):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Ranker(**options)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, lengths in ((0, [0, 7, 3]), (1, [5, 0])):
        check_step(model, compiled, make_batch(seed, lengths))


@pytest.mark.deep
@pytest.mark.parametrize("dtype", TYPES)
def test_a_step_compiled_by_inductor_stays_finite(dtype):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Ranker().to(getattr(torch, dtype))
    check_step(model, torch.compile(model, fullgraph=True), make_batch(0, [0, 7, 3]))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_whole_model_in_another_type_is_near(cast):
    """Its x too, as a buffer; the agents are the same, or of x rounded."""
    torch.manual_seed(0)
    model, batch = Ranker(), make_batch(2, [9, 0, 30])
    expected = model(*batch)
    x, *rest = batch
    x[3], x[5], x[7] = 0.1, 0.2, 0.3
    model(x, *rest)
    expected = model(x, *rest)
    mine = getattr(model, cast)()(getattr(x, cast)(), *rest)
    if cast == "double":
        assert all(map(torch.equal, mine[1].agents[:3], expected[1].agents[:3]))
    for a, b in zip(mine[1:2][0][:3] + mine[2:], expected[1][:3] + expected[2:], strict=True):
        torch.testing.assert_close(a.float(), b, atol=0.05 if cast != "double" else 1e-5, rtol=0.05)


def compressed(book, histories, normalize, **more):
    module = hisac_torch.Compressor(book, budget=4, temperature=0.5, normalize=normalize, **more)
    return module(histories), hisac_torch.compress(
        book, histories, budget=4, temperature=torch.tensor([0.5]), normalize=normalize, **more
    )


@pytest.mark.parametrize("normalize", ["agents", "history"])
def test_the_modules_lse_is_log_of_one_more_than_the_mass(normalize):
    """And log_share, which attend takes, is that of the function."""
    mine, function = compressed(small.make_book(), Histories(*small.rows(), small.OFFSETS), normalize)
    torch.testing.assert_close(mine.lse.double(), function.lse.double().exp().log1p(), rtol=1e-5, atol=0)
    assert torch.equal(mine.log_share, function.log_share) and torch.equal(mine.tokens, function.tokens)
    assert (mine.lse == 0).any() and torch.equal(mine.lse == 0, function.lse == -math.inf)
    some = function.lse > -80  # the digits of small masses are there
    torch.testing.assert_close(mine.lse.double().expm1().log()[some], function.lse.double()[some], rtol=1e-5, atol=1e-5)


def test_a_candidate_without_tokens_matches_as_one_null_token_would():
    attention = hisac_torch.TargetAttention(6, 5, heads=2, head_width=4)
    candidates, tokens = torch.randn(9, 6), small.wanted(torch.randn(3, 4, 5))
    bias = small.wanted(torch.full((3, 4), -math.inf))
    with torch.no_grad():
        bias[0, :2], bias[2, 3] = torch.tensor([-0.2, -5.0]), -1e4
    cached = attention.keys_values(tokens)
    out, match = attention(candidates, cached, small.CANDIDATES, bias=bias)
    q = attention.query(candidates).unflatten(-1, (2, -1))
    function = hisac_torch.attend(q, *cached, small.CANDIDATES, bias=bias)
    none = torch.zeros(9, dtype=torch.bool)
    none[4] = True  # the user in the middle
    assert torch.equal(function.lse == -math.inf, none[:, None].expand(9, 2))
    assert torch.equal(match[~none], function.lse[~none]) and torch.equal(out, function.out.flatten(1))
    zero = torch.zeros(1, 1, 2, 4)
    alone = hisac_torch.attend(q[4:5], zero, zero, torch.tensor([0, 1]), bias=torch.zeros(1, 1))
    assert torch.equal(alone.out.flatten(1), out[4:5]) and torch.equal(alone.lse, match[4:5])
    (out.sum() + match.sum()).backward()
    assert not tokens.grad[1].any() and not bias.grad[1].any() and finite(tokens.grad, bias.grad) and bias.grad[0].any()


@pytest.mark.parametrize("normalize", ["agents", "history"])
@pytest.mark.parametrize("missing", ["drop", "token"])
def test_gradients_of_log_share(normalize, missing):
    """By differences; none for a user of absent rows, whatever is asked of its -inf."""
    torch.manual_seed(0)
    book, (x, v) = small.make_book(), small.rows()
    x[2], x[7:9] = math.nan, math.nan
    offsets = torch.tensor([0, 7, 9, 20])
    bias, tau = small.wanted(torch.randn(20)), torch.tensor([2.0], requires_grad=True)
    options = {"budget": 4, "normalize": normalize, "missing": missing}

    def weighed(bias, tau):
        share = hisac_torch.compress(book, Histories(x, v, offsets, bias=bias), temperature=tau, **options).log_share
        w = torch.linspace(-1, 2, share.numel()).view_as(share)
        return (w * share.double()).masked_fill(share == -math.inf, 0.0).sum()

    made = hisac_torch.compress(book, Histories(x, v, offsets, bias=bias), temperature=tau, **options)
    assert made.log_share.requires_grad == (normalize == "agents" or missing == "token")
    if not made.log_share.requires_grad:
        return
    grads = torch.autograd.grad(weighed(bias, tau), (bias, tau), allow_unused=True, materialize_grads=True)
    for which, mine in enumerate(grads):
        for i in range(len(mine)):
            steps = []
            for step in (0.03, -0.03):
                moved = [t.detach().clone() for t in (bias, tau)]
                moved[which][i] += step
                steps.append(weighed(*moved))
            torch.testing.assert_close(mine[i].double(), (steps[0] - steps[1]).detach() / 0.06, atol=2e-3, rtol=2e-3)
    (everything,) = torch.autograd.grad(made.log_share.sum(), bias)
    assert finite(everything) and not everything[7:9].any() and everything.any()


def test_gradients_of_lse_alone():
    """Those of log softmax over the tokens with mass, and 0 for every other, whatever is asked of it."""
    verbs = importlib.import_module("hisac.torch.functions").VERBS
    lse = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    lse[0, 2:], lse[1], lse[3] = -math.inf, -math.inf, torch.tensor([200.0, -200.0, 0.0, 3e37, -3e37])
    lse.requires_grad_()
    asked = torch.linspace(-1, 2, 20).view(4, 5)
    log_share = importlib.import_module("hisac.compose").log_share
    (mine,) = torch.autograd.grad(log_share(verbs, lse), lse, asked)
    some = lse > -math.inf
    for row in range(4):
        one = lse[row][some[row]].detach().requires_grad_()
        (expected,) = torch.autograd.grad(one.log_softmax(0), one, asked[row][some[row]])
        torch.testing.assert_close(mine[row][some[row]], expected)
    assert not mine[~some].any()
