# SPDX-License-Identifier: Apache-2.0
"""One household in words and as a picture: its interest-agents as category paths, their votes, what each one reads.

The weights shown are those of `route` with normalize="agents", for one history and in plain NumPy:
    w_ai = s_ai / sum_i s_ai      s_ai = softmax over agents a of (-|x_i - p_a|^2 / tau)
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

import hisac

from . import files
from .protocol import Floats, Ints

SEATS = 24  # agents in the picture
SPOKEN = 8  # agents in the text
FAINT = 1e-5  # weights below it are drawn as it


class Node(NamedTuple):
    """A level-1 code of the tree and the agents kept below it, as rows of the weights."""

    name: str
    votes: int
    agents: list[int]


class Portrait(NamedTuple):
    """One user's agents: M of them, over n behaviours."""

    names: list[str]
    """M category paths."""
    votes: Ints
    """[M]."""
    weights: Floats
    """[n, M]: each agent's weights, summing to 1 over the behaviours."""
    nodes: list[Node]
    """The tree's first level, most votes first."""
    behaviours: list[str]
    """n texts, oldest first."""


def most_common(values: Iterable[Any]) -> Any:
    """The most frequent value; the first seen wins a tie."""
    return Counter(values).most_common(1)[0][0]


def routing_weights(x: Floats, prototypes: Floats, tau: float) -> Floats:
    """x [n, D], prototypes [M, D] -> w [n, M] float64."""
    x, p = x.astype(np.float64), prototypes.astype(np.float64)
    z = -(np.square(x).sum(1)[:, None] - 2 * x @ p.T + np.square(p).sum(1)) / tau
    s = np.exp(z - z.max(1, keepdims=True))
    s /= s.sum(1, keepdims=True)
    return np.asarray(s / s.sum(0))


def portrait(book: Any, codes: Ints, x: Floats, texts: list[tuple[str, ...]], tau: float) -> Portrait:
    """codes [n, L], x [n, D] and texts (department, category, type, brand, size) of one history, oldest first."""
    agents = hisac.vote(book, hisac.Histories(codes=codes, lengths=[len(codes)]), budget=SEATS)
    count = int(agents.count[0])
    kept, votes = agents.codes[0, :count], agents.votes[0, :count]
    leaf = book.leaves(codes)

    def inside(mask: Ints) -> list[tuple[str, ...]]:
        return [texts[i] for i in np.flatnonzero(mask)]

    names = [" > ".join(most_common(t[:3] for t in inside(leaf == name))) for name in book.leaves(kept)]
    nodes = []
    for code in dict.fromkeys(kept[:, 0].tolist()):
        members = codes[:, 0] == code
        path = " > ".join(most_common(t[:2] for t in inside(members)))
        nodes.append(Node(path, int(members.sum()), np.flatnonzero(kept[:, 0] == code).tolist()))
    nodes.sort(key=lambda node: -node.votes)
    weights = routing_weights(x, book.prototypes(kept), tau)
    return Portrait(names, votes, weights, nodes, ["; ".join(filter(None, (t[2], t[4]))) or t[0] for t in texts])


def strongest(p: Portrait, agent: int, most: int = 3) -> str:
    """The texts with the largest share of an agent's weights, behaviours of one text added up."""
    total: Counter[str] = Counter()
    for text, weight in zip(p.behaviours, p.weights[:, agent].tolist(), strict=True):
        total[text] += weight
    return ", ".join(f"{text} {share:.0%}" for text, share in total.most_common(most) if share >= 0.01)


def words(p: Portrait) -> str:
    """The agents with most votes, a line each and a line of what they read."""
    lines = []
    for a, name in enumerate(p.names[:SPOKEN]):
        lines += [f"  {p.votes[a]:4} votes  {name}", f"              reads {strongest(p, a)}"]
    if len(p.names) > SPOKEN:
        lines.append(f"  .. and {len(p.names) - SPOKEN} more agents with {p.votes[SPOKEN:].sum()} votes")
    return "\n".join(lines)


def tree(p: Portrait) -> str:
    """The voted tree as text: level-1 codes with the votes of all their leaves, then the agents kept below."""
    lines = []
    for node in p.nodes:
        lines.append(f"  {node.votes:4}  {node.name}")
        lines += [f"        {p.votes[a]:4}  {p.names[a]}" for a in node.agents]
    return "\n".join(lines)


def draw(p: Portrait, title: str, path: str) -> None:
    """The voted tree beside the routing weights, as a PNG. Raises ImportError without matplotlib."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    order = [a for node in p.nodes for a in node.agents]
    place = {a: i for i, a in enumerate(order)}
    figure = Figure(figsize=(15, 0.6 + 0.3 * len(order)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2), sharey=True)
    root = (len(order) - 1) / 2
    most = max(node.votes for node in p.nodes)
    for node in p.nodes:
        y = float(np.mean([place[a] for a in node.agents]))
        left.plot((0, 1), (root, y), color="tab:blue", linewidth=0.5 + 5 * node.votes / most, alpha=0.6)
        for a in node.agents:
            left.plot((1, 2), (y, place[a]), color="tab:blue", linewidth=0.5 + 5 * p.votes[a] / most, alpha=0.6)
            left.text(2.04, place[a], f"{p.votes[a]}  {p.names[a]}", va="center", fontsize=7)
    left.set(xlim=(-0.05, 5.5), title="voted tree: root, level-1 code, agent (votes)")
    left.axis("off")
    image = right.imshow(
        np.maximum(p.weights[:, order].T, FAINT), aspect="auto", norm=LogNorm(FAINT, 1.0), cmap="viridis",
        interpolation="nearest",
    )  # fmt: skip
    right.set(title="routing weights (each row sums to 1)", xlabel="behaviour, oldest first", yticks=[])
    figure.colorbar(image, ax=right)
    figure.suptitle(title)
    with files.aside(path) as f:
        figure.savefig(f, dpi=110, format="png")


def user(book: Any, codes: Ints, x: Floats, texts: list[tuple[str, ...]], *, name: str, tau: float, png: str) -> None:
    """Print one user in words and draw the PNG; without matplotlib, print the tree instead."""
    p = portrait(book, codes, x, texts, tau)
    print(
        f"{name} in words: {len(codes):,} purchases, {len(p.names)} agents (budget {SEATS}) that hold"
        f" {p.votes.sum() / len(codes):.0%} of the votes; their tokens read all of it.\n{words(p)}"
    )
    try:
        draw(p, f"{name}: {len(codes):,} purchases, temperature {tau:g}", png)
    except ImportError:
        print(f"Its voted tree (a picture needs matplotlib, try: pip install matplotlib):\n{tree(p)}")
    else:
        print(f"Its voted tree and routing weights: {png}")
