# SPDX-License-Identifier: Apache-2.0
"""The modules of hisac.torch in a small ranking model: compiled, exported, cast, copied, saved, trained."""

import copy
import gc
import importlib
import io
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

import hisac
from hisac import Histories, testing

torch = pytest.importorskip("torch")
small = importlib.import_module("small_ranking")  # needs torch
hisac_torch = importlib.import_module("hisac.torch")
ops = torch.ops.hisac
OFFSETS, CANDIDATES = small.OFFSETS, small.CANDIDATES
make_book, rows, wanted = small.make_book, small.rows, small.wanted


class Ranker(torch.nn.Module):
    """History and candidates to scores: Compressor, TargetAttention and the log-sum-exp as a feature."""

    def __init__(self, book, width=5, candidate=6, **options):
        super().__init__()
        self.compress = hisac_torch.Compressor(book, **({"budget": 4, "temperature": 0.5} | options))
        self.attention = hisac_torch.TargetAttention(candidate, width, heads=2, head_width=4)
        self.score = torch.nn.Linear(10, 1)

    def forward(self, x, v, offsets, candidates, candidate_offsets):
        found = self.compress(Histories(x, v, offsets))
        out, lse = self.attention(candidates, found.tokens, candidate_offsets, bias=found.log_share)
        return self.score(torch.cat([out, lse], 1)).squeeze(1)


@pytest.fixture
def book():
    return make_book()


@pytest.fixture
def ranker(book):
    torch.manual_seed(0)
    return Ranker(book)


def make_batch():
    return (*rows(), OFFSETS, torch.randn(9, 6, generator=torch.Generator().manual_seed(1)), CANDIDATES)


@pytest.fixture
def batch():
    return make_batch()


def gradients(module, batch):
    """Output, and the gradients of all parameters and of v."""
    x, v, *rest = batch
    v = wanted(v)
    out = module(x, v, *rest)
    grads = torch.autograd.grad(out.square().sum(), [v, *module.parameters()])
    return [out.detach(), *grads]


# ------------------------------------------------------------------------------------------------------------- programs


def check_compiled(ranker, batch, backend):
    torch.compiler.reset()
    compiled = torch.compile(ranker, fullgraph=True, dynamic=True, backend=backend)
    torch.testing.assert_close(gradients(compiled, batch), gradients(ranker, batch))
    other = (*rows(5, n=31), torch.tensor([0, 9, 31]), torch.randn(6, 6), torch.tensor([0, 1, 6]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(gradients(compiled, other), gradients(ranker, other))
    return compiled


@pytest.mark.parametrize("options", [
    {"method": "leaf"}, {"missing": "token"}, {"refine": 2}, {"method": "leaf", "missing": "token", "refine": 1},
])  # fmt: skip
def test_compositions_trace_in_one_graph(book, batch, options):
    """What is composed of operators: no value decides a shape."""
    torch.manual_seed(0)
    check_compiled(Ranker(book, normalize="agents", **options), batch, "aot_eager")


def test_compile_traces_both_ways_in_one_graph(ranker, batch):
    compiled = check_compiled(ranker, batch, "aot_eager")
    before = compiled(*batch)
    ranker.load_state_dict(
        ranker.state_dict() | {"compress._extra_state": Ranker(make_book(9)).compress.get_extra_state()}
    )
    assert torch.equal(compiled(*batch), ranker(*batch)) and not torch.equal(compiled(*batch), before)


@pytest.mark.deep
def test_compile_with_inductor(ranker, batch):
    check_compiled(ranker, batch, "inductor")


def export(ranker, batch):
    t, b, n = (torch.export.Dim(name, min=3, max=4096) for name in ("T", "B1", "N"))
    return torch.export.export(ranker, batch, dynamic_shapes=({0: t}, {0: t}, {0: b}, {0: n}, {0: b}))


def test_an_exported_program_runs_at_other_sizes_and_asks_for_its_codebook(batch):
    torch.manual_seed(0)
    ranker, file = Ranker(make_book(17)), io.BytesIO()
    other = (*rows(5, n=31), torch.tensor([0, 9, 31]), torch.randn(6, 6), torch.tensor([0, 1, 6]))
    expected = ranker(*batch).detach(), ranker(*other).detach()
    torch.export.save(export(ranker, batch), file)
    del ranker
    gc.collect()
    file.seek(0)
    program = torch.export.load(file).module()
    fingerprint = make_book(17).fingerprint
    with pytest.raises(hisac_torch.UnknownCodebookError, match=f"codebook {fingerprint:016x} is not registered"):
        program(*batch)
    book = make_book(17)
    hisac_torch.register(book)
    torch.testing.assert_close((program(*batch), program(*other)), expected)


def test_a_compressor_can_be_exported_and_saved(book):
    file, args = io.BytesIO(), (Histories(*rows(), OFFSETS),)
    compress = hisac_torch.Compressor(book, budget=4, temperature=0.1)
    torch.export.save(torch.export.export(compress, args), file)
    file.seek(0)
    mine, expected = torch.export.load(file).module()(*args), compress(*args)
    assert type(mine) is hisac_torch.Compressed and mine.agents.fingerprint == book.fingerprint
    torch.testing.assert_close(mine, expected)


@pytest.mark.deep
def test_aot_inductor_package(ranker, batch, tmp_path):
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(export(ranker, batch), package_path=str(tmp_path / "m.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(*batch), ranker(*batch))


def test_checkpoint(ranker, batch):
    def checkpointed(*args):
        return torch.utils.checkpoint.checkpoint(ranker, *args, use_reentrant=False)

    checkpointed.parameters = ranker.parameters
    assert all(map(torch.equal, gradients(checkpointed, batch), gradients(ranker, batch)))


def test_deterministic_mode_and_threads_change_nothing(ranker, batch):
    expected = gradients(ranker, batch)
    torch.use_deterministic_algorithms(True)
    threads, found = hisac.get_num_threads(), []
    try:
        for n in (1, 2, 7):
            hisac.set_num_threads(n)
            found.append(gradients(ranker, batch))
    finally:
        hisac.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in found for a, b in zip(run, expected, strict=True))


def test_autocast_leaves_the_semantic_side_alone(ranker, batch):
    x, v, offsets, candidates, candidate_offsets = batch
    project = torch.nn.Linear(5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ranker.compress(Histories(x, project(v), offsets))
        cached = ranker.attention.keys_values(found.tokens)
        out, lse = ranker.attention(candidates, cached, candidate_offsets, bias=found.log_share)
        mixed = hisac_torch.attend(torch.randn(9, 2, 4).bfloat16(), *map(torch.Tensor.float, cached), CANDIDATES)
        scores = ranker(*batch)
    assert [t.dtype for t in (found.tokens, out, mixed.out)] == [torch.bfloat16] * 3
    assert [t.dtype for t in (found.lse, found.agents.prototypes, lse, mixed.lse)] == [torch.float32] * 4
    expected = ranker.compress(Histories(x, v, offsets))
    assert torch.equal(found.agents.codes, expected.agents.codes) and torch.equal(found.lse, expected.lse)
    torch.testing.assert_close(scores.float(), ranker(*batch), atol=0.05, rtol=0.05)
    (scores.float().sum() + out.float().sum()).backward()
    assert project.weight.grad.dtype == torch.float32 and project.weight.grad.abs().sum() > 0


CHILD = "import runpy, sys; runpy.run_path(sys.argv[1])['train_one_step'](*sys.argv[2:])"


def train_one_step(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=2)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(Ranker(make_book()))
    model(*rows(int(rank)), OFFSETS, torch.ones(9, 6), CANDIDATES).square().sum().backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.deep
def test_ddp_on_two_processes(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # pytest has put the helpers' folders there
    command = [sys.executable, "-c", CHILD, __file__]
    children = [subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment) for rank in (0, 1)]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.manual_seed(0)
    model = Ranker(make_book())
    for rank in (0, 1):
        model(*rows(rank), OFFSETS, torch.ones(9, 6), CANDIDATES).square().sum().backward()
    for a, b, p in zip(first, second, model.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, p.grad / 2, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- modules


@pytest.mark.parametrize("offsets", [[0, 0, 0], [0]])
def test_empty_users_and_empty_batches(ranker, offsets):
    offsets = torch.tensor(offsets)
    x, v = rows(n=0)
    users, n = len(offsets) - 1, 2 * (len(offsets) - 1)
    out, *grads = gradients(ranker, (x, v, offsets, torch.ones(n, 6), 2 * torch.arange(users + 1)))
    assert out.shape == (n,) and out.isfinite().all() and all(g.isfinite().all() for g in grads)
    found = ranker.compress(Histories(x, v, offsets))
    assert found.tokens.shape == (users, 4, 5) and found.tokens.count_nonzero() == 0
    assert (found.lse == 0).all() and (found.log_share == -math.inf).all()
    assert found.agents.count.tolist() == [0] * users


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_modules_type_leaves_the_codebook_alone(book, cast):
    args = (Histories(*rows(), OFFSETS),)
    compress = hisac_torch.Compressor(book, budget=4, temperature=0.5)
    expected = compress(*args)
    found = getattr(copy.deepcopy(compress), cast)()(*args)
    assert torch.equal(found.agents.prototypes, expected.agents.prototypes)
    assert all(map(torch.equal, found.agents[:3], expected.agents[:3]))
    torch.testing.assert_close(found.tokens, expected.tokens, atol=0.02, rtol=0.02)  # tau is rounded


@pytest.mark.parametrize("way", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal(ranker, batch, way):
    assert torch.equal(way(ranker)(*batch), ranker(*batch))


def test_unpickling_registers_the_codebook():
    data = pickle.dumps(hisac_torch.Compressor(make_book(31), budget=4, temperature=0.1))
    gc.collect()
    x, _ = rows()
    module = pickle.loads(data)
    fingerprint = make_book(31).fingerprint
    assert torch.equal(ops.encode(fingerprint - 2**64 * (fingerprint >= 2**63), x), hisac_torch.encode(module.book, x))


def test_a_state_dict_brings_its_codebook(ranker, batch):
    file = io.BytesIO()
    torch.save(ranker.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert sorted(k for k in state if k.startswith("compress")) == ["compress._extra_state", "compress.log_tau"]
    other = Ranker(make_book(5), temperature=3.0)
    assert not torch.equal(other(*batch), ranker(*batch))
    other.load_state_dict(state)
    assert (
        torch.equal(other(*batch), ranker(*batch))
        and other.compress.book.fingerprint == ranker.compress.book.fingerprint
    )


def test_a_state_dict_of_other_sizes_or_damaged_is_refused(book):
    compress = hisac_torch.Compressor(book, budget=4, temperature=0.1)
    other = hisac_torch.Compressor(make_book(0, sizes=(6, 4)), budget=4, temperature=0.1)
    with pytest.raises(ValueError, match=r"codebook \(C_1, .., C_L, D\) is \(6, 4, 8\), expected \(6, 5, 8\)"):
        compress.load_state_dict(other.state_dict())
    state = compress.state_dict()
    state["_extra_state"] = state["_extra_state"][:-3]
    with pytest.raises(hisac.CorruptFileError):
        compress.load_state_dict(state)
    assert compress.book is book


@pytest.mark.parametrize("options, message", [
    ({}, "vote: expected exactly one of budget, fanout and beam, got 0"),
    ({"budget": 4, "fanout": (2, 2)}, "vote: expected exactly one of budget, fanout and beam, got 2"),
    ({"budget": 4, "temperature": None}, "temperature expected, since the codebook has no default one, got None"),
    ({"budget": 4, "temperature": 0.0}, "temperature expected finite and > 0, got 0.0"),
    ({"budget": 4, "temperature": math.inf}, "temperature expected finite and > 0, got inf"),
    ({"budget": -1}, "vote: budget expected 1 to 4096, got -1"),
    ({"budget": 0}, "vote: budget expected 1 to 4096, got 0"),
    ({"budget": 10**9}, "vote: budget expected 1 to 4096, got 1000000000"),
    ({"fanout": (2, 2, 2)}, "vote: fanout expected one number >= 1 for each of 2 levels"),
    ({"fanout": (1000, 1000)}, "vote: fanout expected a product of at most 4096"),
    ({"beam": (2, 0)}, "vote: beam expected one number of 1 to 4096 for each of 2 levels"),
    ({"budget": 4, "normalize": "rows"}, "route: normalize expected 'history' or 'agents', got 'rows'"),
    ({"budget": 4, "method": "fast"}, "compress: method expected 'exact' or 'leaf', got 'fast'"),
    ({"budget": 4, "missing": "zero"}, "compress: missing expected 'drop' or 'token', got 'zero'"),
    ({"budget": 4, "refine": -1}, "compress: refine expected 0 to 1000000, got -1"),
    ({"budget": 4, "refine": 2**40}, f"compress: refine expected 0 to 1000000, got {2**40}"),
])  # fmt: skip
def test_a_compressor_refuses_bad_options_when_made(book, options, message):
    with pytest.raises(ValueError, match=message):
        hisac_torch.Compressor(book, **{"temperature": 0.1} | options)


@pytest.mark.parametrize("rule", [{"budget": 4}, {"fanout": (2, 3)}, {"beam": (3, 5)}])
def test_a_compressor_votes_by_its_rule(book, rule):
    x, v = rows()
    compress = hisac_torch.Compressor(book, **rule, temperature=0.1)
    h = Histories(x, v, OFFSETS, hisac_torch.encode(book, x))
    testing.assert_agents_equal(compress(h).agents, hisac.vote(book, h, **rule))
    ((name, numbers),) = rule.items()
    assert f"{name}={numbers}" in repr(compress)


def test_a_compressor_needs_rows_or_codes_and_takes_either(book):
    x, v = rows()
    compress = hisac_torch.Compressor(book, fanout=(2, 2), learn_temperature=False, temperature=0.1)
    with pytest.raises(ValueError, match="compress: codes expected, or x to encode, got neither x nor codes"):
        compress(Histories(None, v, OFFSETS))
    codes = hisac_torch.encode(book, x)
    own = compress(Histories(x, v, OFFSETS))
    torch.testing.assert_close(compress(Histories(x, v, OFFSETS, codes)), own, rtol=0, atol=0)
    by_codes = compress(Histories(None, v, OFFSETS, codes))
    expected = compress(Histories(book.prototypes(codes), v, OFFSETS, codes))
    torch.testing.assert_close(by_codes, expected, rtol=0, atol=0)
    assert not by_codes.tokens.requires_grad


def test_cached_keys_and_absent_tokens(ranker, batch):
    x, v, offsets, candidates, candidate_offsets = batch
    attention, found = ranker.attention, ranker.compress(Histories(x, v, offsets))
    for bias in (found.log_share, None):
        direct = attention(candidates, found.tokens, candidate_offsets, bias=bias)
        cached = attention(candidates, attention.keys_values(found.tokens), candidate_offsets, bias=bias)
        assert [t.shape for t in direct] == [(9, 8), (9, 2)] and all(map(torch.equal, direct, cached))
        none = direct[1][4] == 0  # the candidate of the user without a history
        assert none.all() == (bias is not None) and direct[1].isfinite().all()
    torch.testing.assert_close(found.log_share.exp().sum(1), torch.tensor([1.0, 0.0, 1.0]))


def test_a_model_learns_and_its_temperature_moves():
    """Candidates near the user's history are positive; without tokens the loss stays at .69."""
    torch.manual_seed(0)
    centers = torch.randn(6, 8)
    book = hisac.Codebook([centers.numpy()])
    model = Ranker(book, width=8, candidate=8, normalize="agents")
    tau, losses = model.compress.log_tau.item(), []
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    offsets, candidate_offsets = torch.arange(0, 97, 12), torch.arange(0, 33, 4)
    for _ in range(80):
        kinds = torch.stack([torch.randperm(6) for _ in range(8)])  # the first two are this user's
        x = centers[kinds[:, :2].repeat_interleave(6, 1)].flatten(0, 1) + 0.3 * torch.randn(96, 8)
        candidates, label = centers[kinds[:, :4]].flatten(0, 1), torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(8)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            model(x, x, offsets, candidates, candidate_offsets), label
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[:2]) > 0.6 and np.mean(losses[-10:]) < 0.35, losses
    assert abs(model.compress.log_tau.item() - tau) > 0.01
