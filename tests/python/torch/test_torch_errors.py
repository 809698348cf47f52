# SPDX-License-Identifier: Apache-2.0
"""Arrays of the wrong shape in hisac.torch: refused in NumPy's words. Values of another codebook are absent. And the
page that help() shows."""

import importlib

import numpy as np
import pytest

import hisac
from hisac import Agents, Histories

torch = pytest.importorskip("torch")
small = importlib.import_module("small_ranking")  # needs torch
hisac_torch = importlib.import_module("hisac.torch")
N = 20


def codes(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


def kept(shape):
    return Agents(codes(*shape), codes(*shape[:2]).long(), codes(shape[0]), small.make_book().fingerprint)


# what is spoilt, and the message; small.make_book() has two levels
WRONG = [
    ({"codes": codes(N, 3)}, "vote: codes expected [20, 2], got [20, 3]"),
    ({"codes": codes(N, 1)}, "vote: codes expected [20, 2], got [20, 1]"),
    ({"codes": codes(N + 1, 2)}, "vote: codes expected [20, 2], got [21, 2]"),
    ({"codes": codes(N, 2, dtype=torch.int64)}, "vote: codes expected int32 [T, L], got int64 [20, 2]"),
    ({"agents": kept((3, 4, 3))}, "prototypes: codes expected [12, 2], got [12, 3]"),
    ({"agents": kept((2, 4, 2))}, "route: prototypes is [2, 4, 8], offsets name 3 users: B differs (2, 3)"),
]


@pytest.mark.parametrize("spoilt, message", WRONG)
def test_codes_of_another_shape_are_refused_in_numpys_words(spoilt, message):
    book, (x, v) = small.make_book(), small.rows()
    agents = spoilt.get("agents")
    rule = {"temperature": 0.1} | ({"budget": 4} if agents is None else {"agents": agents})
    histories = Histories(x, v, small.OFFSETS, spoilt.get("codes", hisac_torch.encode(book, x)))
    in_numpy = Histories(*(None if a is None else a.numpy() for a in histories[:-2]))
    if agents is not None:
        in_numpy_rule = {"temperature": 0.1, "agents": Agents(*(a.numpy() for a in agents[:3]), agents.fingerprint)}
    kinds = [(hisac_torch, histories, rule), (hisac, histories, rule)]
    kinds.append((hisac, in_numpy, rule if agents is None else in_numpy_rule))
    for module, given, options in kinds:
        with pytest.raises((ValueError, TypeError)) as caught:
            module.compress(book, given, **options)
        assert str(caught.value) == message
    if agents is None:
        with pytest.raises((ValueError, TypeError)) as caught:
            hisac_torch.Compressor(book, budget=4, temperature=0.1)(histories)
        assert str(caught.value) == message


def test_a_compiled_program_refuses_them_too():
    torch.compiler.reset()
    compress, (x, v) = hisac_torch.Compressor(small.make_book(), budget=4, temperature=0.1), small.rows()
    run = torch.compile(compress, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"vote: codes expected \[20, 2\], got \[20, 3\]"):
        run(Histories(x, v, small.OFFSETS, codes(N, 3)))


def test_codes_of_a_larger_codebook_are_absent():
    book, (x, v) = small.make_book(), small.rows()
    own = hisac_torch.encode(book, x)
    foreign = own + torch.tensor([[0, 5]], dtype=torch.int32)  # of a codebook of 6 x 10
    made = hisac_torch.Compressor(book, budget=4, temperature=0.1)(Histories(x, v, small.OFFSETS, foreign))
    assert made.agents.count.tolist() == [0, 0, 0] and not made.tokens.any()
    mixed = torch.where(torch.arange(N)[:, None] % 2 == 0, own, foreign)
    found = hisac_torch.compress(book, Histories(x, v, small.OFFSETS, mixed), budget=8, temperature=0.1)
    bias = torch.from_numpy(np.where(np.arange(N) % 2 == 0, 0, np.nan).astype("f4"))
    expected = hisac_torch.compress(
        book, Histories(x, v, small.OFFSETS, own, bias=bias), agents=found.agents, temperature=0.1
    )
    assert found.agents.votes.sum(1).tolist() == [4, 0, 6] and torch.equal(found.tokens, expected.tokens)


def test_the_page_of_the_package_begins_with_every_entry():
    """help() of it goes on with hundreds of lines of nn.Module's."""
    for name in hisac_torch.__all__:
        assert f" {name}" in hisac_torch.__doc__.split("Each has its own page")[0], name


def test_attention_refuses_what_would_pass_silently():
    """Lengths in place of offsets left candidates out, and lse as a bias gave a new user tokens."""
    attention = hisac_torch.TargetAttention(3, 3, heads=1, head_width=2)
    candidates, tokens = torch.zeros(5, 3), torch.zeros(2, 4, 3)
    for offsets in ([2, 3], [0, 2, 4], [1, 2, 5], np.array([0, 2, 6])):
        text = rf"^TargetAttention: candidate_offsets expected from 0 to N = 5, got from {offsets[0]} to {offsets[-1]}$"
        with pytest.raises(ValueError, match=text):
            attention(candidates, tokens, offsets)
        tree, book = hisac_torch.TreeMatch, hisac.Codebook([torch.eye(3)])
        history = Histories(torch.eye(3), torch.zeros(3, 1), [0, 1, 3])
        with pytest.raises(ValueError, match=text.replace("TargetAttention", "TreeMatch")):
            tree(book)(history, torch.zeros(5, 1, dtype=torch.int32), offsets)
    for offsets in ([0, 2, 5], np.array([0, 2, 5]), torch.tensor([0, 2, 5])):
        assert attention(candidates, tokens, offsets)[0].shape == (5, 2)
    with pytest.raises(TypeError, match=r"^TargetAttention: bias expected floating-point numbers, .*, got int64$"):
        attention(candidates, tokens, [0, 2, 5], bias=torch.zeros(2, 4, dtype=torch.int64))
    book = hisac.Codebook([np.eye(3, dtype=np.float32)], temperature=1.0)
    made = hisac_torch.Compressor(book, budget=2)(Histories(torch.eye(3), torch.eye(3), [0, 2, 3]))
    with pytest.raises(TypeError, match=r"^TargetAttention: tokens expected .*, got Compressed; give its tokens$"):
        attention(candidates, made, [0, 2, 5])
    with pytest.raises(TypeError, match=r"^Compressor: book expected hisac.Codebook, got str$"):
        hisac_torch.Compressor("book.safetensors", budget=2)
