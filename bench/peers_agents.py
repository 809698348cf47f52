# SPDX-License-Identifier: Apache-2.0
"""What else does the recommended mode of route: softmax over agents, then normalisation over rows, in NumPy and torch.

    s = softmax over agents of (2 p.x - |p|^2) / tau [M, T]     token_a = sum_i s_ai v_i / sum_i s_ai

|x|^2 is the same for all agents of a row, so the softmax drops it, and every form here leaves it out, the backward too.
Agents are rows of the product, which NumPy and torch.compile do fastest; torch has the other layout too.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from peers import COMPILE, Array, Call, Peer, compiled, looped, package

TINY = 1e-30  # what an absent agent's empty sum is divided by

# -------------------------------------------------------------------------------------------------------------- route


def expanded(p: Array, x: Array, v: Array, tau: float) -> Array:
    """One history in torch."""
    torch = package("torch")
    share = torch.softmax(torch.addmm(-(p * p).sum(1)[:, None] / tau, p, x.T, alpha=2 / tau), 0)
    return (share @ v) / share.sum(1)[:, None]


def by_rows(p: Array, x: Array, v: Array, tau: float) -> Array:
    """The same with behaviours as rows, so that the softmax runs along memory."""
    torch = package("torch")
    share = torch.softmax(torch.addmm(-(p * p).sum(1)[None] / tau, x, p.T, alpha=2 / tau), 1)
    return (share.T @ v) / share.sum(0)[:, None]


def by_rows_bf16(p: Array, x: Array, v: Array, tau: float) -> Array:
    """The products in bfloat16, the softmax in float32."""
    torch = package("torch")
    share = torch.softmax(torch.mm(x, p.bfloat16().T).float() * (2 / tau) - (p * p).sum(1)[None] / tau, 1)
    return ((share.bfloat16().T @ v).float() / share.sum(0)[:, None]).bfloat16()


def upcast(p: Array, x: Array, v: Array, tau: float) -> Array:
    """bfloat16 in and out, float32 between."""
    return expanded(p, x.float(), v.float(), tau).bfloat16()


def numpy_agents(p: Array, x: Array, v: Array, tau: float) -> Array:
    """In place where NumPy allows it; rows are divided by their sums in v, which is narrower."""
    z = p @ x.T
    z *= 2 / tau
    z -= np.einsum("ij,ij->i", p, p)[:, None] / tau
    z -= z.max(0)
    np.exp(z, out=z)
    part = 1 / z.sum(0)
    return (z @ (v * part[:, None])) / (z @ part)[:, None]


def bucketed(x: Array, v: Array, offsets: Array, p: Array, count: Array | None, tau: float, bucket: int) -> Array:
    """Users sorted by length, padded in buckets of `bucket`, one batched product each, as `peers.bucketed`; rows past a
    history's end have no share, absent agents neither."""
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
        xb, vb, pb = x[rows], v[rows], p[users, :m]
        shift = pb.square().sum(2) / -tau
        if count is not None:
            shift = shift.masked_fill(torch.arange(m) >= count[users][:, None], -torch.inf)
        share = torch.softmax(torch.baddbmm(shift[:, None], xb.float(), pb.mT, alpha=2 / tau), 2)
        share *= (column < lengths[users][:, None])[..., None]
        out[users, :m] = ((share.to(v.dtype).mT @ vb) / share.sum(1).clamp(min=TINY)[..., None]).to(v.dtype)
    return out


def route(x: Array, v: Array, offsets: Array, p: Array, count: Array | None, tau: float, bf16: bool) -> list[Peer]:
    """Peers of route in this mode; arguments as `peers.route`."""
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

    def in_buckets() -> Call:
        tx, tv, to, tp, tc = tensors()
        return lambda i: bucketed(tx, tv, to, tp, tc, tau, 64 if len(p) > 64 else 8)

    def in_numpy() -> Call:
        if single:
            return lambda i: numpy_agents(p[0], x, v, tau)[None]
        return lambda i: looped(numpy_agents, x, v, offsets, p, count, tau)

    loop = "" if single else " loop"
    if bf16:
        found: list[Peer] = [
            ("torch bf16 products" + loop, "peer", need, one(by_rows_bf16)),
            ("torch as float32" + loop, "peer", need, one(upcast)),
        ]
    else:
        found = [
            ("torch expanded" + loop, "peer", need, one(expanded)),
            ("torch by rows" + loop, "peer", need, one(by_rows)),
            ("NumPy" + loop, "peer", (), in_numpy),
        ]
    if not single:
        found.append(("torch padded buckets", "peer", need, in_buckets))
    if len(p) <= 64:
        f = upcast if bf16 else expanded
        found.append(("torch.compile" + loop, "peer", (*need, COMPILE), one(f, compile=True)))
    return found


def gathered(table: Array, x_ids: Array, values: Array, v_ids: Array, p: Array, tau: float) -> list[Peer]:
    """Peers of route from ids into tables, one history: they gather its rows first."""

    def in_torch(f: Callable[..., Any], compile: bool = False) -> Callable[[], Call]:
        def whole(p: Array, table: Array, x_ids: Array, values: Array, v_ids: Array) -> Array:
            return f(p, table[x_ids], values[v_ids], tau)[None]

        def make() -> Call:
            torch = package("torch")
            a = tuple(torch.as_tensor(b) for b in (p[0], table, x_ids, values, v_ids))
            g = compiled(whole) if compile else whole
            return lambda i: g(*a)

        return make

    def in_numpy() -> Call:
        return lambda i: numpy_agents(p[0], table[x_ids], values[v_ids], tau)[None]

    return [
        ("torch gathered", "peer", ("torch",), in_torch(expanded)),
        ("torch gathered by rows", "peer", ("torch",), in_torch(by_rows)),
        ("NumPy gathered", "peer", (), in_numpy),
        ("torch.compile gathered", "peer", ("torch", COMPILE), in_torch(expanded, compile=True)),
    ]


# ----------------------------------------------------------------------------------------------------------- backward


def backward(x: Array, v: Array, p: Array, tau: float, d_tokens: Array, tokens: Array, lse: Array) -> list[Peer]:
    """Gradients of v and temperature of one history; arguments and rules as `peers.backward`."""

    def leaves() -> tuple[Array, ...]:
        torch = package("torch")
        tx, tp, dt = (torch.as_tensor(a) for a in (x, p[0], d_tokens[0]))
        return tx, tp, dt, torch.tensor(v, requires_grad=True), torch.tensor([tau], requires_grad=True)

    def plain(p: Array, x: Array, v: Array, tau: Array) -> Array:
        torch = package("torch")
        share = torch.softmax(torch.addmm(-(p * p).sum(1)[None], x, p.T, alpha=2) / tau, 1)
        return (share.T @ v) / share.sum(0)[:, None]

    def autograd(compile: bool) -> Callable[[], Call]:
        def make() -> Call:
            torch = package("torch")
            tx, tp, dt, tv, tt = leaves()
            if compile:
                package("torch._functorch.config").donated_buffer = False  # the graph is kept for the next run
            f = compiled(plain) if compile else plain
            with torch.enable_grad():
                out = f(tp, tx, tv, tt)
            return lambda i: torch.autograd.grad(out, (tv, tt), dt, retain_graph=True)

        return make

    def torch_by_hand() -> Call:
        torch = package("torch")
        tx, tp, dt, tv, _ = leaves()
        tv = tv.detach()
        tok, total = torch.as_tensor(tokens[0]), torch.as_tensor(lse[0])

        def call(i: int) -> Any:
            z = torch.addmm(-(tp * tp).sum(1)[None] / tau, tx, tp.T, alpha=2 / tau)
            share = torch.softmax(z, 1)
            scaled = dt * torch.exp(-total)[:, None]
            dz = share * torch.addmm(-(tok * scaled).sum(1)[None], tv, scaled.T)
            dz -= share * dz.sum(1, keepdim=True)
            return share @ scaled, -(dz * z).sum()[None] / tau

        return call

    def numpy_by_hand() -> Call:
        def call(i: int) -> Any:
            z = x @ p[0].T
            z *= 2 / tau
            z -= np.einsum("ij,ij->i", p[0], p[0]) / tau
            share = np.exp(z - z.max(1, keepdims=True))
            share /= share.sum(1, keepdims=True)
            scaled = d_tokens[0] * np.exp(-lse[0])[:, None]
            dz = v @ scaled.T
            dz -= (tokens[0] * scaled).sum(1)
            dz *= share
            # dz less share times its row's sum is the gradient of z: two sums over agents instead of another T x M
            inner = np.einsum("ij,ij->i", share, z)
            return share @ scaled, np.array([(dz.sum(1) @ inner - np.vdot(dz, z)) / tau])

        return call

    need = ("torch",)
    return [
        ("torch autograd", "peer", need, autograd(False)),
        ("torch.compile autograd", "peer", (*need, COMPILE), autograd(True)),
        ("torch by hand", "peer", need, torch_by_hand),
        ("NumPy by hand", "peer", (), numpy_by_hand),
    ]
