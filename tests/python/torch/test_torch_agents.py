# SPDX-License-Identifier: Apache-2.0
"""Agents as the second argument of `hisac.torch.route`, and agents that are kept."""

import importlib
import io

import pytest
from hypothesis import given

import hisac
from hisac import Histories, testing

torch = pytest.importorskip("torch")
small = importlib.import_module("small_ranking")  # needs torch
hisac_torch = importlib.import_module("hisac.torch")
OFFSETS, make_book, rows, wanted = small.OFFSETS, small.make_book, small.rows, small.wanted


@pytest.fixture
def book():
    return make_book()


def history(book, seed=0):
    x, v = rows(seed)
    return Histories(x, v, OFFSETS, hisac_torch.encode(book, x))


def equal(mine, expected):
    """To the bit, and of the same fields."""
    assert [a is None for a in mine] == [b is None for b in expected]
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True) if torch.is_tensor(b))


def bare(agents):
    return {"agents": agents.prototypes, "count": agents.count}


def with_gradients(histories, **options):
    """Tokens, lse, and gradients of v and the temperature."""
    v, tau = wanted(histories.v), wanted(torch.tensor([0.5]))
    out = hisac_torch.route(histories._replace(v=v), temperature=tau, **options)
    (out.tokens.sin().sum() + out.lse[[0, 2]].sum()).backward()
    assert v.grad.any() and tau.grad.any()
    return out.tokens.detach(), out.lse.detach(), v.grad, tau.grad


@given(testing.problems())
def test_vote_is_that_of_numpy(p):
    mine = hisac_torch.vote(**testing.to_torch(p.vote_args(), p.dtype))
    testing.assert_agents_equal(mine, hisac.vote(**p.vote_args()))
    assert torch.equal(mine.prototypes, hisac_torch.prototypes(p.book, mine)) and not mine.prototypes.requires_grad


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("normalize", ["history", "agents"])
def test_agents_are_their_prototypes_and_count(book, normalize, coded):
    h = history(book)
    agents, options = hisac_torch.vote(book, h, budget=4), {"normalize": normalize, "book": book if coded else None}
    expected = with_gradients(h, **bare(agents), **options)
    equal(with_gradients(h, agents=agents, **options), expected)
    if coded:
        equal(with_gradients(h, agents=agents._replace(prototypes=None), **options), expected)


def test_prototypes_of_agents_may_learn(book):
    h = history(book)
    agents = hisac_torch.vote(book, h, budget=4)
    found = []
    for give in (lambda p: {"agents": agents._replace(prototypes=p)}, lambda p: {"agents": p, "count": agents.count}):
        p = wanted(agents.prototypes)
        hisac_torch.route(h, temperature=0.5, **give(p)).tokens.sin().sum().backward()
        found.append(p.grad)
    assert found[0].any() and torch.equal(*found)


@pytest.mark.parametrize("kept", [True, False])
def test_compiled_with_agents(book, kept):
    """As an argument, and as what the compiled function voted for. Another codebook has other agents."""
    torch.compiler.reset()

    def tokens(h, agents, book):
        return hisac_torch.route(h, agents, temperature=0.5, book=book)

    def voted(h, book):
        agents = hisac_torch.vote(book, h, budget=4)
        return hisac_torch.route(h, agents if kept else agents._replace(prototypes=None), temperature=0.5, book=book)

    compiled = [torch.compile(function, fullgraph=True, backend="aot_eager") for function in (tokens, voted)]
    for codebook in (book, make_book(1), make_book(2)):
        h = history(codebook)
        agents = hisac_torch.vote(codebook, h, budget=4)
        expected = hisac_torch.route(h, **bare(agents), temperature=0.5, book=codebook)
        agents = agents if kept else agents._replace(prototypes=None)
        equal(compiled[0](h, agents, codebook), expected)
        equal(compiled[1](h, codebook), expected)


def test_compiled_gradients(book):
    torch.compiler.reset()
    h, offsets = history(book), OFFSETS
    agents = hisac_torch.vote(book, h, budget=4)

    def tokens(v, tau, agents):
        return hisac_torch.route(Histories(h.x, v, offsets), agents, temperature=tau).tokens

    found = []
    for function in (tokens, torch.compile(tokens, fullgraph=True, backend="aot_eager")):
        v, tau = wanted(h.v), wanted(torch.tensor([0.5]))
        function(v, tau, agents).sin().sum().backward()
        found.append((v.grad, tau.grad))
    equal(found[1], found[0])


class Serve(torch.nn.Module):
    def forward(self, histories, agents):
        return hisac_torch.route(histories, agents, temperature=0.5)


def test_agents_may_be_an_input_of_an_exported_program(book):
    file, h = io.BytesIO(), history(book)
    args = h, hisac_torch.vote(book, h, budget=4)
    torch.export.save(torch.export.export(Serve(), args), file)
    file.seek(0)
    equal(torch.export.load(file).module()(*args), Serve()(*args))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("weights_only", [True, False])
def test_agents_can_be_saved(book, kept, weights_only):
    h, file = history(book), io.BytesIO()
    agents = hisac_torch.vote(book, h, budget=4)
    torch.save(agents if kept else agents._replace(prototypes=None), file)
    file.seek(0)
    found = torch.load(file, weights_only=weights_only)
    assert type(found) is hisac.Agents and found.fingerprint == book.fingerprint
    equal(
        hisac_torch.route(h, found, book=book, temperature=0.1),
        hisac_torch.route(h, agents, book=book, temperature=0.1),
    )


def test_kept_agents_in_compress(book):
    """Refined prototypes are used as they are; agents without them begin again."""
    h = history(book)
    first = hisac_torch.compress(book, h, budget=4, temperature=0.5, refine=2)
    again = hisac_torch.compress(book, h, agents=first.agents, temperature=0.5)
    equal(again[:2], first[:2])
    equal(again.agents, first.agents)
    bare_ = first.agents._replace(prototypes=None)
    equal(hisac_torch.compress(book, h, agents=bare_, temperature=0.5, refine=2)[:2], first[:2])
    plain = hisac_torch.compress(book, h, agents=bare_, temperature=0.5)
    assert torch.equal(plain.agents.prototypes, hisac_torch.prototypes(book, bare_))
    assert not torch.equal(plain.tokens, first.tokens)


def test_numpy_agents_beside_tensors(book):
    """`hisac.compress` takes agents kept as arrays with histories of tensors."""
    h = history(book)
    plain = Histories(*(a.numpy() if torch.is_tensor(a) else a for a in h))
    agents = hisac.compress(book, plain, budget=4, refine=2, temperature=0.1).agents
    expected = hisac.compress(book, plain, agents=agents, temperature=0.1)
    for kept in (agents, testing.to_torch(agents)):
        equal(hisac.compress(book, h, agents=kept, temperature=0.1)[:2], testing.to_torch(tuple(expected[:2])))
