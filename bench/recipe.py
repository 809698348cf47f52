# SPDX-License-Identifier: Apache-2.0
"""The recipe: a ranking model of every piece that hisac has for one, trained on the bundled sample.

    python bench/recipe.py [--steps 450] [--agents 50] [--recent 50] [--sparse 32] [--seed 0]

A candidate is scored by its household's history: attention to the tokens of the older purchases and, raw, to the recent
ones; similarity to both, in the space of embeddings and in that of values; tree match; a repeat count. Requests,
candidates and GAUC are those of the demo (hisac/app/protocol.py): training sees baskets of weeks 20 to 43, the test
those of weeks 48 to 53, once. One seed is no evidence for one setting over another.
"""

import argparse
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import hisac
import hisac.torch
from hisac.app import protocol

SIZES = (64, 128)
TRAINING_WEEKS = (20, protocol.FITTED_WEEKS)
BATCH = 32  # requests of a step
RATE = 4e-3


class Ranker(nn.Module):
    """Scores candidates of requests.

    Args:
        book: the codebook
        x: [K, D], the embeddings of texts
        text: [I] int64, the text of each item
        history: [T] int64, the item of each behaviour of all users, in the order of time
        agents, recent: how many tokens of older behaviours a user has, and how many raw recent behaviours
        sparse: as in `hisac.route`
        width: of values
    """

    def __init__(
        self, book: hisac.Codebook, x: Tensor, text: Tensor, history: Tensor, *, agents: int = 50, recent: int = 50,
        sparse: int | None = None, width: int = 32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.recent = recent
        tables = {"x": x, "codes": torch.from_numpy(book.encode(x.numpy())), "text": text, "history": history}
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        self.embedding = nn.Embedding(len(text), width)
        nn.init.normal_(self.embedding.weight, 0, 0.15)
        self.project = nn.Linear(x.shape[1], width)
        self.compress = hisac.torch.Compressor(book, budget=agents, sparse=sparse, mean_x=True)
        self.attention = hisac.torch.TargetAttention(width, width, heads=2, head_width=16, learn_factor=True)
        self.near = hisac.torch.Similarity((10.0, 30.0))  # by embeddings
        self.alike = hisac.torch.Similarity((10.0, 30.0))  # by values
        self.match = hisac.torch.TreeMatch(book)
        features = 3 * width + 2 + 2 + 2 + book.levels * (width + 1) + 1
        self.network = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, starts: Tensor, ends: Tensor, item: Tensor, offsets: Tensor) -> Tensor:
        """Request b has the history [starts_b, ends_b) and the candidates item [offsets_b, offsets_b+1) -> scores [N].
        An item's value is learned, beside a projection of its embedding, which is all that a rare item has."""
        v = self.embedding.weight + self.project(self.x)[self.text]
        rows = self.text[self.history]
        histories = hisac.Histories(self.x, v, (starts, ends), self.codes, x_ids=rows, v_ids=self.history)
        parts = hisac.torch.recent(histories, self.recent)
        older = self.compress(parts.older)
        share = torch.cat([older.log_share + parts.older_share[:, None], parts.log_share], 1)
        values = torch.cat([older.tokens, v[parts.v_ids]], 1)
        embeddings = torch.cat([older.mean_x, self.x[parts.x_ids]], 1)
        q, of_text = v[item], self.text[item]
        attended, lse = self.attention(q, values, offsets, bias=share)
        matched = self.match(histories, self.codes, offsets, ids=of_text)
        bought = hisac.torch.repeat_count(histories, item, offsets)
        features = [
            q, attended, q * attended, lse,
            self.near(self.x[of_text], embeddings, offsets, bias=share), self.alike(q, values, offsets, bias=share),
            (q[:, None] * matched.v).flatten(1), matched.lse, bought[:, None].float().log1p(),
        ]  # fmt: skip
        return self.network(torch.cat(features, 1)).squeeze(1)


class Split(NamedTuple):
    """Requests, and how often each candidate had been bought before."""

    requests: protocol.Requests
    bought: protocol.Ints

    def batch(self, chosen: protocol.Ints) -> tuple[protocol.Ints, tuple[Tensor, ...]]:
        """The candidates' rows of some requests, and the arguments of Ranker."""
        r = self.requests
        count = np.diff(r.candidate_offsets)[chosen]
        offsets = np.concatenate([[0], count.cumsum()])
        rows = np.repeat(r.candidate_offsets[chosen] - offsets[:-1], count) + np.arange(offsets[-1])
        return rows, tuple(map(torch.from_numpy, (r.starts[chosen], r.ends[chosen], r.item[rows], offsets)))

    def gauc(self, score: protocol.Floats) -> list[tuple[float, float, float]]:
        """With intervals: over all candidates, over those bought before, over the new ones."""
        r, user = self.requests, protocol.users_of(self.requests)
        masks = np.ones(len(user), bool), self.bought > 0, self.bought == 0
        return [protocol.gauc(protocol.user_aucs(user[m], score[m], r.label[m])) for m in masks]


def split(events: protocol.Events, weeks: tuple[int, int], most: int, seed: int, history: int = 500) -> Split:
    requests = protocol.requests(events, weeks, most=most, seed=seed, history=history)
    return Split(requests, protocol.repeat_counts(events, requests))


def make(events: protocol.Events, seed: int = 0, **options: Any) -> Ranker:
    """A Ranker, not trained. Its codebook is fitted on purchases of the fitted weeks."""
    torch.manual_seed(seed)
    text = events.text_of_item[events.item]
    seen = np.random.default_rng(seed).permutation(text[events.week <= protocol.FITTED_WEEKS])[:20_000]
    book = hisac.Codebook.fit(events.x[seen], SIZES, iterations=10, seed=seed)
    tables = map(torch.from_numpy, (events.x, events.text_of_item, events.item))
    return Ranker(book, *tables, **options)


def train(model: Ranker, data: Split, steps: int, seed: int = 0) -> list[float]:
    """Adam over batches of requests, cosine decay of the rate after 20 steps of warm-up -> the loss of each step."""
    groups = hisac.torch.parameter_groups(model, RATE)
    optimiser = torch.optim.Adam(groups, lr=RATE)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min(1.0, (i + 1) / 20) * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * i / steps)))
    )
    rng, losses, order = np.random.default_rng(seed), [], np.zeros(0, np.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = rng.permutation(len(data.requests.user))
        chosen, order = np.sort(order[:BATCH]), order[BATCH:]
        rows, inputs = data.batch(chosen)
        label = torch.from_numpy(data.requests.label[rows]).float()
        loss = nn.functional.binary_cross_entropy_with_logits(model(*inputs), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def score(model: Ranker, data: Split) -> protocol.Floats:
    """[N]: the score of each candidate."""
    scores = np.zeros(len(data.bought), np.float32)
    for chosen in np.array_split(np.arange(len(data.requests.user)), -(-len(data.requests.user) // BATCH)):
        rows, inputs = data.batch(chosen)
        scores[rows] = model(*inputs).numpy()
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 450), ("agents", 50), ("recent", 50), ("sparse", None), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    hisac.set_num_threads(given.threads)
    events = protocol.load()
    training = split(events, TRAINING_WEEKS, given.steps * BATCH, seed=2, history=1)
    test = split(events, protocol.TEST_WEEKS, 600, seed=1)
    model = make(events, given.seed, agents=given.agents, recent=given.recent, sparse=given.sparse)

    def tell(name: str, scores: protocol.Floats) -> None:
        texts = (f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in test.gauc(scores))
        print(f"{name:<24}", *texts, sep="  ", flush=True)

    print(f"{'':<24}  {'GAUC [95 %]':<20}  {'bought before':<20}  new")
    tell("repeat count", test.bought.astype(float))
    tell("not trained", score(model, test))
    begin = time.perf_counter()
    losses = train(model, training, given.steps, given.seed)
    seconds = time.perf_counter() - begin
    tell("trained", score(model, test))
    print(
        f"{vars(given)}\n{seconds:.0f} s of training, loss {np.mean(losses[-50:]):.4f},"
        f" temperature {model.compress.log_tau.exp().item():.4f}; {len(test.requests.user)} requests of"
        f" {len(np.unique(test.requests.user))} households"
    )


if __name__ == "__main__":
    main()
