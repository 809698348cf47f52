# SPDX-License-Identifier: Apache-2.0
"""What else does a part of this job: route and attend in NumPy and torch (expanded square, compile, SDPA).

SDPA computes a soft routing by augmented keys: q = [2 p / tau, 1, 1], k = [x, -|x|^2 / tau in two parts], because
-|x - p|^2 / tau and q . k differ by a constant of each agent, which the softmax drops.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Array = Any
Call = Callable[[int], Any]
Peer = tuple[str, str, tuple[str, ...], Callable[[], Call]]
"""name, role, packages needed, make"""

PACKAGES = {"torch": "torch", "faiss": "faiss-cpu", "sklearn": "scikit-learn", "pandas": "pandas"}
"""Module -> its distribution."""
COMPILE = "torch.compile"  # needed by its peers as if it were a package, so that a quick run can do without
PAD = 16  # extra columns of augmented keys: a multiple of 16 keeps SDPA on its fast path


@functools.cache
def installed() -> dict[str, str | None]:
    """Version of each package a peer may need; None where it is not installed."""
    found: dict[str, str | None] = {}
    for module, distribution in PACKAGES.items():
        try:
            found[module] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[module] = "unknown" if importlib.util.find_spec(module) else None
    return found


def package(name: str) -> Any:
    """An optional package."""
    return importlib.import_module(name)


def settle(threads: int) -> None:
    """Set what the environment's thread variables do not reach, and no gradients unless a peer asks."""
    # torch.compile's workers would take a core each while others are timed
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if installed()["torch"]:
        torch = package("torch")
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)


def compiled(f: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
    """torch.compile, of fixed shapes unless `dynamic`; nothing kept from other cases."""
    torch = package("torch")
    torch._dynamo.reset()
    return torch.compile(f, dynamic=dynamic)  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------- route, one history


def expanded(p: Array, x: Array, v: Array, tau: float) -> Array:
    """softmax over rows of (2 p.x - |x|^2) / tau, times v."""
    torch = package("torch")
    z = torch.addmm(-(x * x).sum(1)[None] / tau, p, x.T, alpha=2 / tau)
    return torch.softmax(z, 1) @ v


def expanded_bf16(p: Array, x: Array, v: Array, tau: float) -> Array:
    """The products in bfloat16, the softmax in float32."""
    torch = package("torch")
    z = torch.mm(p.bfloat16(), x.T).float() * (2 / tau) - x.float().square().sum(1)[None] / tau
    return torch.softmax(z, 1).bfloat16() @ v


def upcast(p: Array, x: Array, v: Array, tau: float) -> Array:
    """bfloat16 in and out, float32 between."""
    return expanded(p, x.float(), v.float(), tau).bfloat16()


def cdist(p: Array, x: Array, v: Array, tau: float) -> Array:
    """The distances as such."""
    torch = package("torch")
    return torch.softmax(-torch.cdist(p, x).square() / tau, 1) @ v


def augment(p: Array, x: Array, v: Array, tau: float, dtype: Any) -> tuple[Array, Array, Array]:
    """q, k, v of SDPA; the norm is split in two so that bfloat16 keeps it."""
    torch = package("torch")
    width = x.shape[1] + PAD
    q = torch.zeros(1, 1, len(p), width, dtype=dtype)
    q[0, 0, :, : x.shape[1]] = p * (2 / tau)
    q[0, 0, :, x.shape[1] : x.shape[1] + 2] = 1
    k = torch.zeros(1, 1, len(x), width, dtype=dtype)
    k[0, 0, :, : x.shape[1]] = x
    norm = x.float().square().sum(1) / -tau
    high = norm.to(dtype)
    k[0, 0, :, x.shape[1]] = high
    k[0, 0, :, x.shape[1] + 1] = norm - high
    values = torch.zeros(1, 1, len(x), width, dtype=dtype)
    values[0, 0, :, : v.shape[1]] = v
    return q, k, values


def attention(q: Array, k: Array, v: Array, width: int) -> Array:
    """SDPA over augmented keys -> [agents, width]."""
    return package("torch").nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)[0, 0, :, :width]


def sdpa(p: Array, x: Array, v: Array, tau: float) -> Array:
    """End to end: augment, then attend."""
    return attention(*augment(p, x, v, tau, x.dtype), v.shape[1])


def sdpa_mask(p: Array, x: Array, v: Array, tau: float) -> Array:
    """SDPA with -|x|^2 / tau as its additive mask."""
    torch = package("torch")
    mask = (x.float().square().sum(1) / -tau).to(x.dtype)[None].expand(len(p), -1)
    values = torch.nn.functional.pad(v, (0, max(0, x.shape[1] - v.shape[1])))
    out = torch.nn.functional.scaled_dot_product_attention(
        p.to(x.dtype)[None, None], x[None, None], values[None, None], attn_mask=mask[None, None], scale=2 / tau
    )
    return out[0, 0, :, : v.shape[1]]


def numpy_route(p: Array, x: Array, v: Array, tau: float) -> Array:
    """The expanded form, in place where NumPy allows it."""
    z = p @ x.T
    z *= 2 / tau
    z -= np.einsum("ij,ij->i", x, x) / tau
    z -= z.max(1, keepdims=True)
    np.exp(z, out=z)
    return (z @ v) / z.sum(1, keepdims=True)


def histories(
    x: Array, v: Array, offsets: Array, p: Array, count: Array | None
) -> Iterator[tuple[Array, Array, Array]]:
    """p, x, v of each user, absent agents cut off."""
    for b in range(len(p)):
        m = p.shape[1] if count is None else int(count[b])
        yield p[b, :m], x[offsets[b] : offsets[b + 1]], v[offsets[b] : offsets[b + 1]]


def looped(
    f: Callable[..., Any], x: Array, v: Array, offsets: Array, p: Array, count: Array | None, tau: float
) -> Array:
    """A user at a time -> [B, M, V]."""
    out = p.new_zeros((*p.shape[:2], v.shape[1]), dtype=v.dtype) if hasattr(p, "new_zeros") else None
    if out is None:
        out = np.zeros((*p.shape[:2], v.shape[1]), np.float32)
    for b, (pb, xb, vb) in enumerate(histories(x, v, offsets, p, count)):
        out[b, : len(pb)] = f(pb, xb, vb, tau)
    return out


def bucketed(x: Array, v: Array, offsets: Array, p: Array, count: Array | None, tau: float, bucket: int) -> Array:
    """Users sorted by length, padded in buckets of `bucket`, one batched product each: torch's best form for many short
    histories. The softmax runs over the longest of a bucket; absent agents are set to zero."""
    torch = package("torch")
    lengths = offsets[1:] - offsets[:-1]
    order = torch.argsort(lengths)
    out = torch.zeros((*p.shape[:2], v.shape[1]), dtype=v.dtype)
    for i in range(0, len(order), bucket):
        users = order[i : i + bucket]
        n = int(lengths[users].max())
        m = p.shape[1] if count is None else int(count[users].max())
        column = torch.arange(n)
        rows = (offsets[users][:, None] + column).clamp(max=len(x) - 1)
        xb, vb, pb = x[rows], v[rows], p[users, :m].to(x.dtype)
        shift = (xb.float().square().sum(2) / -tau).masked_fill(column >= lengths[users][:, None], -math.inf)
        z = torch.baddbmm(shift[:, None], pb.float(), xb.float().mT, alpha=2 / tau)
        tokens = torch.softmax(z, 2).to(v.dtype) @ vb
        if count is not None:
            tokens *= (torch.arange(m) < count[users][:, None])[..., None]
        out[users, :m] = tokens
    return out


def route(x: Array, v: Array, offsets: Array, p: Array, count: Array | None, tau: float, bf16: bool) -> list[Peer]:
    """Peers of route. x, v, p, count and offsets are NumPy, or torch for bfloat16 x and v."""
    single = len(p) == 1
    need = ("torch",)

    def tensors() -> tuple[Array, ...]:
        torch = package("torch")
        return tuple(a if a is None else torch.as_tensor(a) for a in (x, v, offsets, p, count))

    def one(f: Callable[..., Any], compile: bool = False) -> Callable[[], Call]:
        def make() -> Call:
            tx, tv, to, tp, tc = tensors()
            g = compiled(f, dynamic=not single) if compile else f
            if single:
                return lambda i: g(tp[0], tx, tv, tau)[None]
            at, counts = to.tolist(), None if tc is None else tc.tolist()
            return lambda i: looped(g, tx, tv, at, tp, counts, tau)

        return make

    def packed() -> Call:
        tx, tv, _, tp, _ = tensors()
        q, k, values = augment(tp[0], tx, tv, tau, tx.dtype)
        return lambda i: attention(q, k, values, tv.shape[1])[None]

    def in_buckets(bucket: int) -> Callable[[], Call]:
        def make() -> Call:
            tx, tv, to, tp, tc = tensors()
            return lambda i: bucketed(tx, tv, to, tp, tc, tau, bucket)

        return make

    def in_numpy() -> Call:
        if single:
            return lambda i: numpy_route(p[0], x, v, tau)[None]
        return lambda i: looped(numpy_route, x, v, offsets, p, count, tau)

    loop = "" if single else " loop"
    if bf16:
        found: list[Peer] = [
            ("torch bf16 products" + loop, "peer", need, one(expanded_bf16)),
            ("torch as float32" + loop, "peer", need, one(upcast)),
            ("SDPA bf16" + loop, "peer", need, one(sdpa)),
        ]
    else:
        found = [
            ("torch expanded" + loop, "peer", need, one(expanded)),
            ("SDPA" + loop, "peer", need, one(sdpa)),
            ("SDPA mask" + loop, "peer", need, one(sdpa_mask)),
            ("NumPy" + loop, "peer", (), in_numpy),
        ]
        if single:
            found.append(("torch cdist", "peer", need, one(cdist)))
    if single:
        found.append(("SDPA packed", "packed", need, packed))
    else:
        found.append(("torch padded buckets", "peer", need, in_buckets(64 if len(p) > 64 else 8)))
    if len(p) <= 64:
        found.append(
            ("torch.compile" + loop, "peer", (*need, COMPILE), one(upcast if bf16 else expanded, compile=True))
        )
    return found


# ----------------------------------------------------------------------------------------------------- route backward


def backward(x: Array, v: Array, p: Array, tau: float, d_tokens: Array, tokens: Array, lse: Array) -> list[Peer]:
    """Gradients of v and temperature of one history. Autograd's forward is not timed; the forms by hand start, as
    hisac does, from the forward's tokens and lse."""

    def leaves() -> tuple[Array, ...]:
        torch = package("torch")
        tx, tp, dt = (torch.as_tensor(a) for a in (x, p[0], d_tokens[0]))
        return tx, tp, dt, torch.tensor(v, requires_grad=True), torch.tensor([tau], requires_grad=True)

    def plain(p: Array, x: Array, v: Array, tau: Array) -> Array:
        torch = package("torch")
        z = torch.addmm(-(x * x).sum(1)[None], p, x.T, alpha=2)
        return torch.softmax(z / tau, 1) @ v

    def attend(p: Array, x: Array, v: Array, tau: Array) -> Array:
        torch = package("torch")
        pad = torch.nn.functional.pad
        q = torch.cat([p * (2 / tau), torch.ones(len(p), 1), torch.zeros(len(p), PAD - 1)], 1)
        k = torch.cat([x, (x * x).sum(1, keepdim=True) / -tau, torch.zeros(len(x), PAD - 1)], 1)
        return attention(q[None, None], k[None, None], pad(v, (0, k.shape[1] - v.shape[1]))[None, None], v.shape[1])

    def autograd(f: Callable[..., Any], compile: bool = False) -> Callable[[], Call]:
        def make() -> Call:
            torch = package("torch")
            tx, tp, dt, tv, tt = leaves()
            if compile:
                package("torch._functorch.config").donated_buffer = False  # the graph is kept for the next run
            g = compiled(f) if compile else f
            with torch.enable_grad():
                out = g(tp, tx, tv, tt)
            return lambda i: torch.autograd.grad(out, (tv, tt), dt, retain_graph=True)

        return make

    def torch_by_hand() -> Call:
        torch = package("torch")
        tx, tp, dt, tv, _ = leaves()
        tv = tv.detach()
        tok, total = torch.as_tensor(tokens[0]), torch.as_tensor(lse[0])[:, None]

        def call(i: int) -> Any:
            d = torch.addmm((tx * tx).sum(1)[None], tp, tx.T, alpha=-2) + (tp * tp).sum(1)[:, None]
            w = torch.exp(d / -tau - total)
            dz = w * (dt @ tv.T - (tok * dt).sum(1)[:, None])
            return w.T @ dt, (dz * d).sum()[None] / tau**2

        return call

    def numpy_by_hand() -> Call:
        def call(i: int) -> Any:
            d = p[0] @ x.T
            d *= -2
            d += np.einsum("ij,ij->i", x, x)
            d += np.einsum("ij,ij->i", p[0], p[0])[:, None]
            w = d * np.float32(-1 / tau)
            w -= lse[0][:, None]
            np.exp(w, out=w)
            dz = d_tokens[0] @ v.T
            dz -= (tokens[0] * d_tokens[0]).sum(1)[:, None]
            dz *= w
            return w.T @ d_tokens[0], np.array([np.vdot(dz, d) / tau**2])

        return call

    need = ("torch",)
    return [
        ("torch autograd", "peer", need, autograd(plain)),
        ("torch.compile autograd", "peer", (*need, COMPILE), autograd(plain, compile=True)),
        ("SDPA autograd", "peer", need, autograd(attend)),
        ("torch by hand", "peer", need, torch_by_hand),
        ("NumPy by hand", "peer", (), numpy_by_hand),
    ]


# --------------------------------------------------------------------------------------------------------------- leaf


def torch_means(x: Array, v: Array, leaf: Array) -> tuple[Array, ...]:
    """Leaf means by index_add."""
    torch = package("torch")
    found, group, n = torch.unique(leaf, return_inverse=True, return_counts=True)
    count = n.float()[:, None]
    mu = torch.zeros(len(found), x.shape[1]).index_add_(0, group, x) / count
    mean_v = torch.zeros(len(found), v.shape[1]).index_add_(0, group, v) / count
    square = torch.zeros(len(found)).index_add_(0, group, (x * x).sum(1)) / count[:, 0]  # |mu|^2 + variance
    return mu, mean_v, count[:, 0].log(), square


def torch_leaf(p: Array, mu: Array, mean_v: Array, log_count: Array, square: Array, tau: float) -> Array:
    """The expanded form over leaves with log count and minus variance / tau."""
    torch = package("torch")
    return torch.softmax(torch.addmm((log_count - square / tau)[None], p, mu.T, alpha=2 / tau), 1) @ mean_v


def numpy_means(x: Array, v: Array, leaf: Array) -> tuple[Array, ...]:
    """The same by sorting and reduceat."""
    order = np.argsort(leaf, kind="stable")
    ordered = leaf[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    n = np.diff(starts, append=len(leaf)).astype(np.float32)[:, None]
    mu, mean_v = (np.add.reduceat(a[order], starts) / n for a in (x, v))
    square = np.add.reduceat(np.einsum("ij,ij->i", x, x)[order], starts) / n[:, 0]
    return mu, mean_v, np.log(n[:, 0]), square


def numpy_leaf(p: Array, mu: Array, mean_v: Array, log_count: Array, square: Array, tau: float) -> Array:
    """As torch_leaf."""
    z = (2 / tau) * (p @ mu.T) + (log_count - square / tau)
    z -= z.max(1, keepdims=True)
    np.exp(z, out=z)
    return (z @ mean_v) / z.sum(1, keepdims=True)


def leaf(x: Array, v: Array, codes: Array, sizes: tuple[int, ...], p: Array, tau: float) -> list[Peer]:
    """Peers of `route` over leaf sums for one history."""

    def in_torch() -> Call:
        torch = package("torch")
        tx, tv, tc, tp = (torch.as_tensor(a) for a in (x, v, codes, p[0]))
        return lambda i: torch_leaf(tp, *torch_means(tx, tv, tc[:, 0].long() * sizes[1] + tc[:, 1]), tau)[None]

    def in_numpy() -> Call:
        def call(i: int) -> Array:
            return numpy_leaf(p[0], *numpy_means(x, v, codes[:, 0].astype(np.int64) * sizes[1] + codes[:, 1]), tau)[
                None
            ]

        return call

    return [("torch leaf", "peer", ("torch",), in_torch), ("NumPy leaf", "peer", (), in_numpy)]


def kept_leaf(x: Array, v: Array, codes: Array, sizes: tuple[int, ...], p: Array, tau: float) -> list[Peer]:
    """Peers of route from kept leaf sums."""
    means = numpy_means(x, v, codes[:, 0].astype(np.int64) * sizes[1] + codes[:, 1])

    def in_torch() -> Call:
        kept = tuple(package("torch").as_tensor(np.ascontiguousarray(a)) for a in (p[0], *means))
        return lambda i: torch_leaf(*kept, tau)[None]

    def in_numpy() -> Call:
        return lambda i: numpy_leaf(p[0], *means, tau)[None]

    return [("torch kept", "peer", ("torch",), in_torch), ("NumPy kept", "peer", (), in_numpy)]


# ------------------------------------------------------------------------------------------------------------- attend


def attend(q: Array, k: Array, v: Array, bf16: bool) -> list[Peer]:
    """Peers of attend for one user: q [N, H, d], k [1, M, H, d], v [1, M, H, V]."""

    def tensors() -> tuple[Array, ...]:
        torch = package("torch")
        tq, tk, tv = (torch.as_tensor(a) for a in (q, k, v))
        return tq.transpose(0, 1)[None], tk.transpose(1, 2), tv.transpose(1, 2)

    def sdpa(pack: bool) -> Callable[[], Call]:
        def make() -> Call:
            torch = package("torch")
            tq, tk, tv = (a.contiguous() if pack else a for a in tensors())
            f = torch.nn.functional.scaled_dot_product_attention
            return lambda i: f(tq, tk, tv)[0].transpose(0, 1)

        return make

    def plain(tq: Array, tk: Array, tv: Array) -> Array:
        torch = package("torch")
        z = (tq[0] @ tk[0].mT) * (1 / math.sqrt(tq.shape[3]))
        return (torch.softmax(z, 2) @ tv[0]).transpose(0, 1)

    def in_torch(compile: bool) -> Callable[[], Call]:
        def make() -> Call:
            a = tensors()
            f = compiled(plain) if compile else plain
            return lambda i: f(*a)

        return make

    def in_numpy() -> Call:
        def call(i: int) -> Any:
            z = q.transpose(1, 0, 2) @ k[0].transpose(1, 2, 0)
            z *= 1 / math.sqrt(q.shape[2])
            z -= z.max(2, keepdims=True)
            np.exp(z, out=z)
            return ((z @ v[0].transpose(1, 0, 2)) / z.sum(2, keepdims=True)).transpose(1, 0, 2)

        return call

    need = ("torch",)
    found: list[Peer] = [
        ("SDPA", "peer", need, sdpa(False)),
        ("SDPA packed", "packed", need, sdpa(True)),
        ("torch products", "peer", need, in_torch(False)),
        ("torch.compile", "peer", (*need, COMPILE), in_torch(True)),
    ]
    return found if bf16 else [*found, ("NumPy", "peer", (), in_numpy)]


def attend_backward(q: Array, k: Array, v: Array, d_out: Array) -> list[Peer]:
    """Gradients of q, keys and values of one user; autograd's forward is not timed."""

    def autograd(f: Callable[..., Any]) -> Callable[[], Call]:
        def make() -> Call:
            torch = package("torch")
            leaves = [torch.tensor(a, requires_grad=True) for a in (q, k, v)]
            dt = torch.as_tensor(d_out)
            with torch.enable_grad():
                out = f(leaves[0].transpose(0, 1)[None], leaves[1].transpose(1, 2), leaves[2].transpose(1, 2))
                out = out[0].transpose(0, 1)
            return lambda i: torch.autograd.grad(out, leaves, dt, retain_graph=True)

        return make

    def sdpa(tq: Array, tk: Array, tv: Array) -> Array:
        return package("torch").nn.functional.scaled_dot_product_attention(tq, tk, tv)

    def plain(tq: Array, tk: Array, tv: Array) -> Array:
        return package("torch").softmax((tq @ tk.mT) * (1 / math.sqrt(tq.shape[3])), 3) @ tv

    def in_numpy() -> Call:
        def call(i: int) -> Any:
            hq, hk, hv, g = (a.transpose(1, 0, 2) for a in (q, k[0], v[0], d_out))
            scale = np.float32(1 / math.sqrt(q.shape[2]))
            w = hq @ hk.mT * scale
            w -= w.max(2, keepdims=True)
            np.exp(w, out=w)
            w /= w.sum(2, keepdims=True)
            dz = g @ hv.mT
            dz -= (w * dz).sum(2, keepdims=True)
            dz *= w
            dz *= scale
            return tuple(a.transpose(1, 0, 2) for a in (dz @ hk,)) + tuple(
                a.transpose(1, 0, 2)[None] for a in (dz.mT @ hq, w.mT @ g)
            )

        return call

    return [
        ("SDPA autograd", "peer", ("torch",), autograd(sdpa)),
        ("torch autograd", "peer", ("torch",), autograd(plain)),
        ("NumPy by hand", "peer", (), in_numpy),
    ]
