# SPDX-License-Identifier: Apache-2.0
"""What else does a part of this job: vote, encode and fit with NumPy, torch, faiss, scikit-learn and pandas.

Votes are compared as integers, so every form breaks ties as hisac does: more votes, then the lower code. All start from
codes [T, 2], as hisac does; the `packed` ones from leaf numbers made beforehand.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from peers import Call, Peer, package

Array = Any
Rule = dict[str, Any]
"""{"fanout": (k_1, k_2)} or {"budget": M}"""

# --------------------------------------------------------------------------------------------------------------- vote


def seats(rule: Rule) -> int:
    """M."""
    return int(rule["budget"]) if "budget" in rule else int(np.prod(rule["fanout"]))


def numpy_leaves(codes: Array, sizes: tuple[int, ...]) -> Array:
    """codes [T, 2] -> leaf numbers [T] int64."""
    return codes[:, 0].astype(np.int64) * sizes[1] + codes[:, 1]


def numpy_keys(leaf: Array, offsets: Array, sizes: tuple[int, ...]) -> Array:
    """leaf [T] -> user and leaf as one number."""
    if len(offsets) == 2:
        return leaf
    return np.repeat(np.arange(len(offsets) - 1) * (sizes[0] * sizes[1]), np.diff(offsets)) + leaf


def numpy_select(key: Array, c: Array, users: int, sizes: tuple[int, ...], rule: Rule) -> tuple[Array, Array, Array]:
    """Distinct keys, ascending, and their counts -> codes [B, M, 2], votes [B, M], count [B]."""
    m = seats(rule)

    def ranked(group: Array, order: Array) -> Array:
        """Rank of each within its group, in `order`, which keeps groups together and ascending."""
        first = np.flatnonzero(np.diff(group[order], prepend=-1))
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
        return rank

    def descending(group: Array, n: Array) -> Array:
        """Order by group, then n down, then as it stands."""
        return np.argsort(group * (int(n.max(initial=0)) + 1) + (n.max(initial=0) - n), kind="stable")

    parent = key // sizes[1]
    first = np.flatnonzero(np.diff(parent, prepend=-1))
    inner = np.add.reduceat(c, first)
    if "fanout" in rule:
        user = parent[first] // sizes[0]
        keep = ranked(user, descending(user, inner)) < rule["fanout"][0]
        keep = np.repeat(keep, np.diff(first, append=len(c)))
        key, c, parent = key[keep], c[keep], parent[keep]
        keep = ranked(parent, descending(parent, c)) < rule["fanout"][1]
    else:
        n = np.repeat(inner, np.diff(first, append=len(c)))
        j = ranked(parent, descending(parent, c)) + 1
        user = parent // sizes[0]
        keep = ranked(user, np.lexsort((parent, -n, -((n << 24) // j), user))) < m
    key, c = key[keep], c[keep]
    user = key // (sizes[0] * sizes[1])
    order = descending(user, c)
    user, key, c = user[order], key[order] % (sizes[0] * sizes[1]), c[order]
    count = np.bincount(user, minlength=users)
    at = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    codes, votes = np.full((users, m, 2), -1, np.int32), np.zeros((users, m), np.int64)
    codes[user, at, 0], codes[user, at, 1], votes[user, at] = key // sizes[1], key % sizes[1], c
    return codes, votes, count


def torch_select(key: Array, c: Array, users: int, sizes: tuple[int, ...], rule: Rule) -> tuple[Array, Array, Array]:
    """`numpy_select` in torch."""
    torch = package("torch")
    m = seats(rule)

    def ranked(group: Array, order: Array) -> Array:
        _, n = torch.unique_consecutive(group[order], return_counts=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order)) - torch.repeat_interleave(n.cumsum(0) - n, n)
        return rank

    def descending(group: Array, n: Array) -> Array:
        return torch.argsort(group * (n.max() + 1) + (n.max() - n), stable=True)

    parent = key // sizes[1]
    nodes, of, _ = torch.unique_consecutive(parent, return_inverse=True, return_counts=True)
    inner = torch.zeros_like(nodes).index_add_(0, of, c)
    if "fanout" in rule:
        user = nodes // sizes[0]
        keep = (ranked(user, descending(user, inner)) < rule["fanout"][0])[of]
        key, c, parent = key[keep], c[keep], parent[keep]
        keep = ranked(parent, descending(parent, c)) < rule["fanout"][1]
    else:
        n = inner[of]
        j = ranked(parent, descending(parent, c)) + 1
        order = torch.argsort(-n, stable=True)  # rows ascend by parent, which breaks the last tie
        order = order[torch.argsort(-((n << 24) // j)[order], stable=True)]
        user = parent // sizes[0]
        order = order[torch.argsort(user[order], stable=True)] if users > 1 else order
        keep = ranked(user, order) < m
    key, c = key[keep], c[keep]
    user = key // (sizes[0] * sizes[1])
    order = descending(user, c)
    user, key, c = user[order], key[order] % (sizes[0] * sizes[1]), c[order]
    count = torch.bincount(user, minlength=users)
    at = torch.arange(len(user)) - torch.repeat_interleave(count.cumsum(0) - count, count)
    codes = torch.full((users, m, 2), -1, dtype=torch.int32)
    votes = torch.zeros((users, m), dtype=torch.int64)
    codes[user, at] = torch.stack([key // sizes[1], key % sizes[1]], 1).int()
    votes[user, at] = c
    return codes, votes, count


def torch_topk(leaf: Array, sizes: tuple[int, ...], rule: Rule) -> tuple[Array, Array, Array]:
    """The paper's rule for one user on the dense histogram: topk over parents, then over their children."""
    torch = package("torch")
    k1, k2 = rule["fanout"]
    c = torch.bincount(leaf, minlength=sizes[0] * sizes[1]).view(sizes)
    # n * C + (C - 1 - code) is distinct, so topk breaks ties to the lower code
    _, p = torch.topk(c.sum(1) * sizes[0] + torch.arange(sizes[0] - 1, -1, -1), k1)
    votes, child = torch.topk(c[p] * sizes[1] + torch.arange(sizes[1] - 1, -1, -1), k2, dim=1)
    leaf, votes = (p[:, None] * sizes[1] + child).flatten(), (votes // sizes[1]).flatten()
    size = sizes[0] * sizes[1]
    order = torch.argsort(votes * size + (size - 1 - leaf), descending=True)
    leaf, votes = leaf[order], votes[order]
    codes = torch.stack([leaf // sizes[1], leaf % sizes[1]], 1)
    codes[votes == 0] = -1
    return codes[None].int(), votes[None], (votes > 0).sum()[None]


def pandas_vote(leaf: Array, sizes: tuple[int, ...], rule: Rule) -> tuple[Array, Array, Array]:
    """One user with group-bys."""
    pandas = package("pandas")
    s = pandas.Series(leaf).value_counts(sort=False)
    d = pandas.DataFrame({"u": s.index.values, "c": s.values})
    d["p"] = d.u // sizes[1]
    n = d.groupby("p").c.sum()
    if "fanout" in rule:
        kept = n.reset_index().sort_values(["c", "p"], ascending=[False, True]).head(rule["fanout"][0]).p
        d = d[d.p.isin(kept)].sort_values(["c", "u"], ascending=[False, True]).groupby("p").head(rule["fanout"][1])
    else:
        d = d.sort_values(["c", "u"], ascending=[False, True])
        d["n"] = d.p.map(n)
        d["key"] = d.n.to_numpy() * 2**24 // (d.groupby("p").cumcount().to_numpy() + 1)
        d = d.sort_values(["key", "n", "p"], ascending=[False, False, True], kind="stable").head(rule["budget"])
    d = d.sort_values(["c", "u"], ascending=[False, True])
    codes, votes = np.full((1, seats(rule), 2), -1, np.int32), np.zeros((1, seats(rule)), np.int64)
    codes[0, : len(d)] = np.stack([d.u // sizes[1], d.u % sizes[1]], 1)
    votes[0, : len(d)] = d.c
    return codes, votes, np.array([len(d)])


def vote(copies: list[Array], offsets: Array, sizes: tuple[int, ...], rule: Rule) -> list[Peer]:
    """Peers of vote over several copies of codes [T, 2] int32; the histogram forms are for one user only."""
    users, single = len(offsets) - 1, len(offsets) == 2

    def numpy_unique() -> Call:
        def call(i: int) -> Any:
            key, c = np.unique(numpy_keys(numpy_leaves(copies[i], sizes), offsets, sizes), return_counts=True)
            return numpy_select(key, c, users, sizes, rule)

        return call

    def numpy_bincount() -> Call:
        def call(i: int) -> Any:
            c = np.bincount(numpy_leaves(copies[i], sizes), minlength=sizes[0] * sizes[1])
            key = np.flatnonzero(c)
            return numpy_select(key, c[key], 1, sizes, rule)

        return call

    def in_torch(f: Callable[[Array], Any], packed: bool = False) -> Callable[[], Call]:
        def make() -> Call:
            torch = package("torch")
            at = torch.as_tensor(offsets)
            base = torch.repeat_interleave(torch.arange(users) * (sizes[0] * sizes[1]), at[1:] - at[:-1])

            def leaves(codes: Array) -> Array:
                leaf = codes[:, 0].long() * sizes[1] + codes[:, 1]
                return leaf if single else base + leaf

            ts = [torch.as_tensor(codes) for codes in copies]
            if packed:
                ready = [leaves(t) for t in ts]
                return lambda i: f(ready[i])
            return lambda i: f(leaves(ts[i]))

        return make

    def unique(key: Array) -> Any:
        found, c = package("torch").unique(key, return_counts=True)
        return torch_select(found, c, users, sizes, rule)

    def bincount(leaf: Array) -> Any:
        c = package("torch").bincount(leaf, minlength=sizes[0] * sizes[1])
        key = c.nonzero()[:, 0]
        return torch_select(key, c[key], 1, sizes, rule)

    def topk(leaf: Array) -> Any:
        return torch_topk(leaf, sizes, rule)

    def in_pandas() -> Call:
        return lambda i: pandas_vote(numpy_leaves(copies[i], sizes), sizes, rule)

    name = " budget" if "budget" in rule else " fanout"
    found: list[Peer] = [
        ("np.unique" + name, "peer", (), numpy_unique),
        ("torch.unique" + name, "peer", ("torch",), in_torch(unique)),
        ("torch.unique packed" + name, "packed", ("torch",), in_torch(unique, packed=True)),
    ]
    if single:
        found += [
            ("np.bincount" + name, "peer", (), numpy_bincount),
            ("torch.bincount" + name, "peer", ("torch",), in_torch(bincount)),
            ("pandas" + name, "peer", ("pandas",), in_pandas),
        ]
    if single and "fanout" in rule:
        found += [
            ("torch bincount+topk", "peer", ("torch",), in_torch(topk)),
            ("torch bincount+topk packed", "packed", ("torch",), in_torch(topk, packed=True)),
        ]
    return found


# ------------------------------------------------------------------------------------------------------------- encode


def faiss_unpack(packed: Array, levels: int, bits: int) -> Array:
    """faiss's bit-packed codes -> [T, L]; done outside the timing."""
    flat = np.unpackbits(packed, axis=1, bitorder="little")
    each = flat[:, : levels * bits].reshape(len(packed), levels, bits).astype(np.int64)
    return (each << np.arange(bits)).sum(2)


def encode(x: Array, centers: list[Array], threads: int) -> list[Peer]:
    """Peers of encode; each level has as many codes."""
    size, width = centers[0].shape

    def in_torch(block: int) -> Callable[[], Call]:
        def make() -> Call:
            torch = package("torch")
            tx, tc = torch.as_tensor(x), [torch.as_tensor(c) for c in centers]

            def call(i: int) -> Any:
                out = torch.empty((len(tx), len(tc)), dtype=torch.int64)
                norms = [(c * c).sum(1)[None] for c in tc]
                for at in range(0, len(tx), block):
                    r = tx[at : at + block]
                    for level, c in enumerate(tc):
                        near = torch.addmm(norms[level], r, c.T, alpha=-2).argmin(1)
                        out[at : at + block, level] = near
                        r = r - c[near]
                return out

            return call

        return make

    def in_numpy() -> Call:
        def call(i: int) -> Any:
            out = np.empty((len(x), len(centers)), np.int64)
            norms = [np.einsum("ij,ij->i", c, c) for c in centers]
            for at in range(0, len(x), 4096):
                r = x[at : at + 4096]
                for level, c in enumerate(centers):
                    d = r @ c.T
                    d *= -2
                    d += norms[level]
                    near = d.argmin(1)
                    out[at : at + 4096, level] = near
                    r = r - c[near]
            return out

        return call

    def faiss_flat() -> Call:
        faiss = package("faiss")

        def call(i: int) -> Any:
            out, r = np.empty((len(x), len(centers)), np.int64), x
            for level, c in enumerate(centers):
                index = faiss.IndexFlatL2(width)
                index.add(c)
                out[:, level] = index.search(r, 1)[1][:, 0]
                r = r - c[out[:, level]] if level + 1 < len(centers) else r
            return out

        return call

    def faiss_rq() -> Call:
        faiss = package("faiss")
        quantiser = faiss.ResidualQuantizer(width, len(centers), int(np.log2(size)))
        quantiser.max_beam_size = 1
        faiss.copy_array_to_vector(np.concatenate(centers).ravel(), quantiser.codebooks)
        quantiser.is_trained = True
        return lambda i: quantiser.compute_codes(x)

    def in_sklearn() -> Call:
        cluster = package("sklearn.cluster")
        models = []
        for c in centers:
            model = cluster.KMeans(size, n_init=1, max_iter=1)
            # what `fit` would have left behind
            model.cluster_centers_, model._n_threads = c.copy(), threads
            model._n_features_out, model.n_features_in_ = size, width
            models.append(model)

        def call(i: int) -> Any:
            out, r = np.empty((len(x), len(centers)), np.int64), x
            for level, c in enumerate(centers):
                out[:, level] = models[level].predict(r)
                r = r - c[out[:, level]]
            return out

        return call

    return [
        ("torch", "peer", ("torch",), in_torch(8192)),
        ("torch, blocks of 1024", "peer", ("torch",), in_torch(1024)),
        ("NumPy", "peer", (), in_numpy),
        ("faiss flat", "peer", ("faiss",), faiss_flat),
        ("faiss RQ beam 1", "peer", ("faiss",), faiss_rq),
        ("scikit-learn", "peer", ("sklearn",), in_sklearn),
    ]


# ---------------------------------------------------------------------------------------------------------------- fit


def fit(x: Array, start: Array, iterations: int) -> list[Peer]:
    """Peers of fit at one level, from the centers `start` [C, D]: rounds from other starts end up to 5 % apart. Each
    returns its centers."""
    size = len(start)

    def faiss_kmeans() -> Call:
        faiss = package("faiss")

        def call(i: int) -> Any:
            model = faiss.Kmeans(
                x.shape[1], size, niter=iterations, seed=1, min_points_per_centroid=1, max_points_per_centroid=10**9
            )
            model.train(x, init_centroids=start)
            return model.centroids

        return call

    def in_sklearn() -> Call:
        cluster = package("sklearn.cluster")

        def call(i: int) -> Any:
            model = cluster.MiniBatchKMeans(
                size,
                init=start,
                n_init=1,
                batch_size=4096,
                max_iter=iterations,
                max_no_improvement=None,
                random_state=0,
            )
            return model.fit(x).cluster_centers_

        return call

    def in_torch() -> Call:
        torch = package("torch")
        tx, first = torch.as_tensor(x), torch.as_tensor(start)

        def call(i: int) -> Any:
            c = first
            for _ in range(iterations):
                total, n = torch.zeros(c.shape), torch.zeros(size)
                norm = (c * c).sum(1)[None]
                for at in range(0, len(tx), 8192):
                    rows = tx[at : at + 8192]
                    near = torch.addmm(norm, rows, c.T, alpha=-2).argmin(1)
                    total.index_add_(0, near, rows)
                    n.index_add_(0, near, torch.ones(len(near)))
                c = torch.where(n[:, None] > 0, total / n[:, None].clamp(min=1), c)
            return c

        return call

    return [
        ("faiss Kmeans", "peer", ("faiss",), faiss_kmeans),
        ("torch Lloyd", "peer", ("torch",), in_torch),
        ("scikit-learn MiniBatchKMeans", "peer", ("sklearn",), in_sklearn),
    ]
