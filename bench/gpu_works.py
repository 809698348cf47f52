# SPDX-License-Identifier: Apache-2.0
"""The works on a GPU and their peers: the batches that a ranking model trains and serves on, larger than any cache.

Every work is made on the device by seed. hisac's rows are single calls replayed as a CUDA graph, as are the peers that
allow it, so that no variant waits for Python; "calls" are the same from Python. Truth is float64 on the device for the
first users of the batch; codes and agents are the CPU's.
"""

import functools
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import hisac
import hisac.torch as ht
from data import CLUSTERED, NORMAL, UNIT, structured
from harness import Case, Variant

Array = Any
Call = Callable[[int], Any]
TAU = 0.1
CHECKED = 4  # users whose results are compared with float64
GRADE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
PEER = 5e-2  # peers round logits and weights to bfloat16


def replayed(f: Callable[[], Any], device: str) -> Call:
    """f as a graph; f itself where it cannot be captured."""
    if device == "cpu":
        return lambda i: f()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                f()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = f()
    except RuntimeError:  # it waits for the device, or allocates by what it reads there
        torch.cuda.synchronize()
        return lambda i: f()

    def call(i: int) -> Any:
        graph.replay()
        return result

    return call


def both(name: str, f: Callable[[], Any], check: Any, bound: float, device: str, **more: Any) -> list[Variant]:
    """hisac's row, and the same without a graph."""
    return [
        Variant(name, lambda: replayed(f, device), check, bound, "hisac", **more),
        Variant(name + " calls", lambda: lambda i: f(), check, bound, "hisac", **more),
    ]


def peer(
    name: str, f: Callable[[], Any], check: Any, bound: float, device: str, needs: tuple[str, ...] = ()
) -> Variant:
    return Variant(name, lambda: replayed(f, device), check, bound, "peer", needs)


def relative(result: Array, truth: Array) -> float:
    """|result - truth|_F / |truth|_F over the first users."""
    a, b = result[: len(truth)].double(), truth.double()
    return float(((a - b).norm() / b.norm()).item())


class Batch:
    """B users of `lengths`, D, V, M: rows x, v [T, ..], offsets, prototypes, and the same padded."""

    def __init__(self, lengths: Array, width: int, value: int, agents: int, dtype: Any, device: str) -> None:
        g = torch.Generator(device).manual_seed(0)
        self.lengths = torch.as_tensor(lengths, device=device)
        self.offsets = functional.pad(self.lengths.cumsum(0), (1, 0))
        rows, users = int(self.offsets[-1]), len(lengths)
        make = functools.partial(torch.randn, generator=g, device=device)
        self.x = functional.normalize(make(rows, width), dim=1).to(dtype)
        self.v = make(rows, value).to(dtype)
        self.histories = hisac.Histories(self.x, self.v, self.offsets)
        self.p = functional.normalize(make(users, agents, width), dim=2)
        self.tau = torch.full((1,), TAU, device=device)
        self.longest = int(self.lengths.max())
        self.pairs = float(rows) * agents

    def padded(self) -> tuple[Array, Array, Array]:
        """x, v [B, longest, ..] and -|x|^2 / tau, -inf past the end."""
        column = torch.arange(self.longest, device=self.x.device)
        rows = (self.offsets[:-1, None] + column).clamp(max=len(self.x) - 1)
        x, v = self.x[rows], self.v[rows]
        shift = (x.float().square().sum(2) / -TAU).masked_fill(column >= self.lengths[:, None], -math.inf)
        return x, v, shift

    def truth(self, shares: bool = False) -> Array:
        """Tokens of the first users; `shares`: in agents mode."""
        tokens = []
        for b in range(min(CHECKED, len(self.p))):
            s = slice(int(self.offsets[b]), int(self.offsets[b + 1]))
            x, v, p = self.x[s].double(), self.v[s].double(), self.p[b].double()
            z = (2 * p @ x.T - x.square().sum(1) - p.square().sum(1)[:, None]) / TAU
            z = torch.log_softmax(z, 0) if shares else z
            tokens.append(torch.softmax(z, 1) @ v)
        return torch.stack(tokens)


def eager(h: Batch, group: int, shares: bool = False) -> Callable[[], Array]:
    """The expanded square in float32 sums, `group` users at a time."""
    x, v, shift = h.padded()
    p, norm = h.p.to(x.dtype), h.p.square().sum(2) / TAU

    def call() -> Array:
        out = []
        for b in range(0, len(p), group):
            s = slice(b, b + group)
            if x.dtype == torch.float32:
                z = torch.baddbmm(shift[s, None], p[s] * (2 / TAU), x[s].mT)
            else:
                z = (p[s] @ x[s].mT).float() * (2 / TAU) + shift[s, None]
            if shares:
                z = z - norm[s, :, None]
                z = (z - z.logsumexp(1, keepdim=True)).nan_to_num(nan=-math.inf)
            out.append(torch.softmax(z, 2).to(v.dtype) @ v[s])
        return torch.cat(out)

    return call


def augmented(h: Batch) -> tuple[Array, Array, Array]:
    """q, k, v of SDPA: q . k = 2 p . x / tau - |x|^2 / tau, the norm in a high and a low column."""
    x, v, shift = h.padded()
    users, m, width = h.p.shape
    wide = -(-(width + 2) // 64) * 64
    q = h.p.new_zeros((users, 1, m, wide), dtype=x.dtype)
    q[:, 0, :, :width], q[:, 0, :, width : width + 2] = h.p * (2 / TAU), 1
    k = x.new_zeros((users, 1, h.longest, wide))
    shift = shift.clamp(min=-1e4)
    k[:, 0, :, :width], k[:, 0, :, width] = x, shift.to(x.dtype)
    k[:, 0, :, width + 1] = (shift - shift.to(x.dtype).float()).to(x.dtype)
    return q, k, functional.pad(v[:, None], (0, wide - v.shape[2]))


def flex(h: Batch) -> Callable[[], Array]:
    """FlexAttention over the padded batch, its score less the norm."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    x, v, shift = h.padded()
    shift = shift.clamp(min=-1e30)
    run = torch.compile(module.flex_attention, dynamic=False)
    q = (h.p * (2 / TAU)).to(x.dtype)[:, None]

    def score(z: Array, b: Array, head: Array, i: Array, j: Array) -> Array:
        return z + shift[b, j]

    return lambda: run(q, x[:, None], v[:, None], score_mod=score, scale=1.0)[:, 0]


def flash3(h: Batch) -> Callable[[], Array]:
    """FlashAttention-3 where it is installed; it wants V as wide as D."""
    run = importlib.import_module("flash_attn_interface").flash_attn_func
    q, k, v = (a.transpose(1, 2).contiguous() for a in augmented(h))
    return lambda: run(q, k, v, softmax_scale=1.0)[0][:, :, 0, : h.v.shape[1]]


def route(work: str, lengths: Array, device: str, *, agents: int, width: int, value: int = 64) -> Iterator[Case]:
    """Forward, in both modes. Peers get padded batches, as their users keep them; what they need beyond that is timed,
    or `packed` beforehand."""
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        h = Batch(lengths, width, value, agents, dtype, device)
        size, flops = f"{len(lengths)} users, T {len(h.x)}, M {agents}, D {width}, V {value}", 2 * h.pairs
        yield from (route_case(f"{work}{end}", name, size, flops * (width + value), h, device, end != "")
                    for end in ("", " agents"))  # fmt: skip


def route_case(work: str, dtype: str, size: str, flops: float, h: Batch, device: str, shares: bool) -> Case:
    truth, group = h.truth(shares), max(1, 2**28 // (h.p.shape[1] * h.longest))
    bound = PEER if dtype == "bfloat16" else 1e-2  # TF32 where torch takes it

    def check(result: Any, i: int) -> float:
        return relative(result.tokens if isinstance(result, hisac.Tokens) else result, truth)

    def call(precision: str = "float32") -> Any:
        mode = "agents" if shares else "history"
        return ht.route(h.histories, h.p, temperature=h.tau, normalize=mode, precision=precision)

    def sdpa(q: Array, k: Array, v: Array) -> Array:
        return functional.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0, :, : h.v.shape[1]]

    def packed() -> Callable[[], Array]:
        q, k, v = augmented(h)
        return lambda: sdpa(q, k, v)

    def compiled() -> Callable[[], Array]:
        return torch.compile(eager(h, group, shares))

    def made(f: Callable[[], Callable[[], Any]]) -> Callable[[], Call]:
        return lambda: replayed(f(), device)

    variants = both("route", call, check, GRADE[dtype], device)
    variants += both("bf16 products", lambda: call("bfloat16"), check, GRADE["bfloat16"], device)
    variants += [
        Variant("torch padded", made(lambda: eager(h, group, shares)), check, bound),
        Variant("torch.compile", made(compiled), check, bound, needs=("c",)),
    ]
    if not shares:
        variants += [
            Variant("SDPA", made(lambda: lambda: sdpa(*augmented(h))), check, bound),
            Variant("SDPA packed", made(packed), check, bound, "packed"),
            Variant("FlexAttention", made(lambda: flex(h)), check, bound, needs=("cuda",)),
        ]
        if dtype == "bfloat16":
            needs = ("flash_attn_interface",)
            variants.append(Variant("FlashAttention-3 packed", made(lambda: flash3(h)), check, bound, "packed", needs))
    return Case(work, dtype, size, UNIT, len(h.x), flops, "float64", tuple(variants))


def backward(work: str, lengths: Array, device: str, *, agents: int, width: int, value: int = 64) -> Iterator[Case]:
    """Gradients from d_tokens, given the forward: of v and tau, then of all. Autograd's forward is not timed."""
    h = Batch(lengths, width, value, agents, torch.bfloat16, device)
    forward = hisac.route(h.histories, h.p, temperature=h.tau, normalize="history")
    d_tokens = torch.randn_like(forward.tokens)
    given = hisac.Tokens(d_tokens, None)

    def expected() -> Array:
        s = slice(0, int(h.offsets[1]))
        x, v, p = h.x[s].double(), h.v[s].double().clone().requires_grad_(), h.p[0].double()
        with torch.enable_grad():
            tokens = torch.softmax((2 * p @ x.T - x.square().sum(1)) / TAU, 1) @ v
            (tokens * d_tokens[0].double()).sum().backward()
        return v.grad

    truth = expected()

    def check(result: Any, i: int) -> float:
        return relative(result.v if hasattr(result, "v") else result[0], truth)

    def mine(need: tuple[str, ...]) -> Callable[[], Any]:
        return lambda: hisac.route_backward(
            h.histories, h.p, forward, given, temperature=h.tau, normalize="history", need=need
        )

    def autograd() -> Call:
        q, k, v = augmented(h)
        v.requires_grad_()
        grown = functional.pad(d_tokens[:, None].to(v.dtype), (0, v.shape[3] - d_tokens.shape[2]))
        with torch.enable_grad():
            out = functional.scaled_dot_product_attention(q, k, v, scale=1.0)

        def call(i: int) -> Any:
            (grad,) = torch.autograd.grad(out, v, grown, retain_graph=True)
            return [torch.cat([grad[b, 0, :n, : h.v.shape[1]] for b, n in enumerate(h.lengths[:1].tolist())])]

        return call

    pair = 2 * h.pairs
    variants = [
        *both("v, tau", mine(("v", "temperature")), check, 2e-2, device, flops=pair * (width + 2 * value)),
        *both("all", mine(("v", "temperature", "bias", "x", "prototypes")), check, 2e-2, device,
              flops=pair * (3 * width + 2 * value)),
        Variant("SDPA autograd, v only", autograd, check, PEER),
    ]  # fmt: skip
    size = f"{len(lengths)} users, T {len(h.x)}, M {agents}, D {width}, V {value}"
    flops = pair * (width + 2 * value)
    yield Case(work, "bfloat16", size, UNIT, len(h.x), flops, "float64", tuple(variants))


def vote(work: str, users: int, rows: int, device: str, sizes: tuple[int, int] = (512, 512)) -> Iterator[Case]:
    """Fan-out (20, 10), budget 200 and beam (40, 200) on two levels."""
    rng = np.random.default_rng(0)
    few = [structured(rng, rows, sizes, 4) for _ in range(min(users, 16))]
    book = hisac.Codebook([np.ones((n, 4), np.float32) * np.arange(n)[:, None].astype(np.float32) for n in sizes])
    on_cpu = np.concatenate([few[b % len(few)][1] for b in range(users)])
    codes = torch.from_numpy(on_cpu).to(device)
    offsets = torch.arange(users + 1, device=device) * rows
    batch = hisac.Histories(codes=codes, offsets=offsets)
    leaf = (codes[:, 0].long() * sizes[1] + codes[:, 1]).view(users, rows)

    def case(rule: dict[str, Any], name: str) -> Iterator[Variant]:
        expected = hisac.vote(book, hisac.Histories(codes=on_cpu, offsets=np.arange(users + 1) * rows), **rule)

        def check(result: Any, i: int) -> float:
            return float(any((a.cpu().numpy() != b).any() for a, b in zip(result[:3], expected[:3], strict=True)))

        yield from both(name, lambda: hisac.vote(book, batch, **rule), check, 0, device)

    most = np.sort(np.bincount(leaf[0].cpu().numpy()))[::-1][:10].copy()

    def dense() -> Array:
        zeros = torch.zeros(users, sizes[0] * sizes[1], dtype=torch.int32, device=device)
        return zeros.scatter_add_(1, leaf, torch.ones_like(leaf, dtype=torch.int32)).topk(200, dim=1).values

    def flat() -> Array:
        return (leaf + torch.arange(users, device=device)[:, None] * (sizes[0] * sizes[1])).view(-1)

    def bincount() -> Array:
        found = torch.bincount(flat(), minlength=users * sizes[0] * sizes[1])
        return found.view(users, -1).topk(200, dim=1).values

    def unique() -> tuple[Array, Array]:
        return torch.unique(flat(), return_counts=True)

    def right(result: Array, i: int) -> float:
        return float((result[0, : len(most)].cpu().numpy() != most).any())

    def right_unique(result: tuple[Array, Array], i: int) -> float:
        of_first = result[1][result[0] < sizes[0] * sizes[1]].sort(descending=True).values
        return float((of_first[: len(most)].cpu().numpy() != most).any())

    rules: dict[str, Any] = {"fanout": (20, 10), "budget": 200, "beam": (40, 200)}
    variants = [v for name, numbers in rules.items() for v in case({name: numbers}, name)]
    variants.append(peer("scatter_add, leaves only", dense, right, 0, device))
    variants.append(peer("bincount, leaves only", bincount, right, 0, device))
    variants.append(peer("unique, leaves only", unique, right_unique, 0, device))
    size = f"{users} users of {rows}, levels {sizes}"
    yield Case(work, "int32", size, CLUSTERED, users * rows, 0, "hisac on the CPU", tuple(variants))


def encode(
    work: str, rows: int, device: str, *, width: int = 128, sizes: tuple[int, ...] = (256,) * 3
) -> Iterator[Case]:
    """x [rows, width] through all levels."""
    for dtype in (torch.float32, torch.bfloat16):
        g = torch.Generator(device).manual_seed(1)
        x = functional.normalize(torch.randn(rows, width, generator=g, device=device), dim=1).to(dtype)
        centers = [functional.normalize(torch.randn(n, width, generator=g, device=device), dim=1) / 2**i
                   for i, n in enumerate(sizes)]  # fmt: skip
        book = hisac.Codebook([c.cpu() for c in centers])
        some = min(rows, 20_000)
        expected = book.encode(x[:some].cpu())

        def check(result: Any, i: int, expected: Array = expected, some: int = some) -> float:
            return float((result[:some].cpu() != expected).float().mean().item())

        def by(nearest: Callable[[Array, Array], Array], x: Array = x, centers: Any = centers) -> Callable[[], Array]:
            def call() -> Array:
                out = []
                for chunk in x.split(1 << 17):
                    r, codes = chunk.float(), []
                    for c in centers:
                        codes.append(nearest(r, c))
                        r = r - c[codes[-1]]
                    out.append(torch.stack(codes, 1))
                return torch.cat(out)

            return call

        def cdist(r: Array, c: Array) -> Array:
            return torch.cdist(r, c).argmin(1)

        def product(r: Array, c: Array) -> Array:
            return torch.addmm(c.square().sum(1)[None], r, c.T, alpha=-2).argmin(1)

        variants = both("encode", lambda x=x, book=book: book.encode(x), check, 0, device)
        variants += [peer("cdist, argmin", by(cdist), check, 1e-3, device)]
        variants += [peer("product, argmin", by(product), check, 2e-2, device)]
        name = str(dtype).removeprefix("torch.")
        flops = 2.0 * rows * width * sum(sizes)
        size = f"{rows} x {width}, levels {sizes}"
        yield Case(work, name, size, UNIT, rows, flops, "hisac on the CPU", tuple(variants))


def attend(work: str, users: int, candidates: int, device: str, *, agents: int = 200, heads: int = 4, width: int = 64) \
        -> Iterator[Case]:  # fmt: skip
    """Candidates on cached tokens."""
    for dtype in (torch.bfloat16, torch.float32):
        g = torch.Generator(device).manual_seed(2)
        make = functools.partial(torch.randn, generator=g, device=device)
        q = make(users * candidates, heads, width).to(dtype)
        keys, values = (make(users, agents, heads, width).to(dtype) for _ in range(2))
        offsets = torch.arange(users + 1, device=device) * candidates
        grouped = q.view(users, candidates, heads, width).transpose(1, 2)
        k, v = keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()
        few = [a[:CHECKED].double() for a in (grouped, k, v)]
        truth = functional.scaled_dot_product_attention(*few).transpose(1, 2).reshape(-1, heads, width)

        def check(result: Any, i: int, truth: Array = truth) -> float:
            return relative(result[0] if isinstance(result, tuple) else result, truth)

        def sdpa(q: Array = grouped, k: Array = k, v: Array = v) -> Array:
            return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, heads, width)

        def mine(q: Array = q, keys: Array = keys, values: Array = values, offsets: Array = offsets) -> Any:
            return ht.attend(q, keys, values, offsets)

        name = str(dtype).removeprefix("torch.")
        variants = [*both("attend", mine, check, GRADE[name], device), peer("SDPA", sdpa, check, PEER, device)]
        flops = 4.0 * users * candidates * heads * agents * width
        size = f"{users} users, {candidates} candidates, M {agents}, H {heads}, d {width}"
        yield Case(work, name, size, NORMAL, users * candidates, flops, "float64", tuple(variants))


def match(work: str, users: int, leaves: int, candidates: int, device: str, *, size: int = 512, value: int = 64) \
        -> Iterator[Case]:  # fmt: skip
    """Candidates, 7 in 10 of a leaf of their user, on kept leaf sums; then the backward."""
    g = torch.Generator(device).manual_seed(3)
    whole = functools.partial(torch.randint, generator=g, device=device)
    make = functools.partial(torch.randn, generator=g, device=device)
    own = whole(1, size * size // leaves, (users, leaves)).cumsum(1)  # in order, each once
    asked = own.gather(1, whole(0, leaves, (users, candidates)))
    asked = torch.where(whole(0, 10, asked.shape) < 3, whole(0, size * size, asked.shape), asked)
    codes, at = (torch.stack([a // size, a % size], 2).view(-1, 2).int() for a in (own, asked))
    offsets, row = (torch.arange(users + 1, device=device) * n for n in (leaves, candidates))
    sums = hisac.Histories(None, make(users * leaves, value), offsets, codes, bias=make(users * leaves))
    given = hisac.Match(make(users * candidates, 2, value), make(users * candidates, 2))
    book = hisac.Codebook([np.zeros((size, 2), np.float32)] * 2)

    def expected() -> tuple[Array, Array]:
        """v, and its gradient, of the first users in float64."""
        n, v = min(CHECKED, users), sums.v.view(users, leaves, value)[:CHECKED].double().requires_grad_()
        bias, found = sums.bias.view(users, 1, leaves)[:n].double(), []
        with torch.enable_grad():
            for below in (size, 1):
                same = (asked[:n] // below)[:, :, None] == (own[:n] // below)[:, None]
                some = same.any(2, keepdim=True)
                found.append(torch.softmax(bias.masked_fill(~same & some, -math.inf), 2) * some @ v)
            mean = torch.stack(found, 2).view(-1, 2, value)
            (mean * given.v[: len(mean)]).sum().backward()
        return mean.detach(), v.grad.view(-1, value)

    truth, slope = expected()
    node = torch.arange(users, device=device)[:, None] * size
    of_sums, of_candidates = ((node + a // size).view(-1) for a in (own, asked))
    leaf, wanted = ((node * size + a).view(-1) for a in (own, asked))

    def index_add() -> Array:
        top = torch.full((users * size,), -math.inf, device=device).scatter_reduce(0, of_sums, sums.bias, "amax")
        w = (sums.bias - top[of_sums]).exp()
        total = torch.zeros_like(top).index_add(0, of_sums, w)
        mean = torch.zeros(users * size, value, device=device).index_add(0, of_sums, w[:, None] * sums.v)
        first = (mean / total.clamp(min=1e-30)[:, None])[of_candidates]
        place = torch.searchsorted(leaf, wanted).clamp(max=len(leaf) - 1)
        return torch.stack([first, torch.where((leaf[place] == wanted)[:, None], sums.v[place], 0.0)], 1)

    def check(result: Any, i: int) -> float:
        return relative(result[0] if isinstance(result, tuple) else result, truth)

    def back(need: str) -> Callable[[], Any]:
        return lambda: hisac.match_backward(book, sums, given, at, row, need=need.split(", "))

    variants = [
        *both("match", lambda: hisac.match(book, sums, at, row), check, GRADE["float32"], device),
        peer("index_add", index_add, check, GRADE["float32"], device),
    ]
    for need in ("v", "v, bias"):
        variants += both(f"backward {need}", back(need), lambda r, i: relative(r.v, slope), GRADE["float32"], device)
    text = f"{users} users, {leaves} leaves, {candidates} candidates, {size} x {size} codes, V {value}"
    flops = 2.0 * 2 * users * leaves * value
    yield Case(work, "float32", text, NORMAL, users * candidates, flops, "float64", tuple(variants))


def cases(device: str, quick: bool) -> Iterator[Case]:
    """All works; quick: so small that the CPU does them in seconds."""
    rng = np.random.default_rng(0)
    some, rows = (3, 40) if quick else (512, 10_000)
    ragged = np.maximum(20, rng.lognormal(math.log(3000) - 0.32, 0.8, some)).astype(np.int64)
    shape = {"agents": 8 if quick else 200, "width": 16 if quick else 128}
    yield from route("route/batch", np.full(some, rows), device, **shape)
    yield from route("route/ragged", ragged // (50 if quick else 1), device, **shape)
    short = rng.integers(5, 20, 9) if quick else rng.integers(50, 201, 4096)
    yield from route("route/short", short, device, agents=shape["agents"] // 4, width=shape["width"])
    yield from backward("backward/batch", np.full(some, rows), device, **shape)
    yield from vote("vote/batch", some, rows, device)
    yield from encode("encode/items", 200 if quick else 1 << 20, device, width=shape["width"])
    yield from attend("attend/batch", some, 30 if quick else 500, device)
    yield from match("match/batch", some, 40 if quick else 2000, 30 if quick else 500, device)
