"""`kvcomm bench pool`: what finding a span's nearest anchor tokens costs as the pool grows.

Rows are a mixture of Gaussian clusters (centres of deviation 1, rows of 0.5 around them), so that a cluster's rows have no
structure among themselves: the hard case for an index. Queries are perturbed copies (0.1) of rows that are in every pool. Each
pool is filled in batches, as anchors come. All sizes are searched in one run, in an order that changes with every repetition.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm

from kvcomm.anchors.index import ExactIndex, Found
from kvcomm.anchors.rows import Matrix
from kvcomm.errors import InputError
from kvcomm.report import document, dumps, write_json

__all__ = ["add_arguments", "measure", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm bench pool`."""
    parser.add_argument("--rows", default="10000,100000,1000000", metavar="N,N,...", help="anchor tokens in the pools")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--queries", type=int, default=512, help="tokens of the span that is searched for")
    parser.add_argument("--k", type=int, default=8, help="neighbours of each token")
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8192, help="rows added at a time")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="faiss threads (default: its choice)")
    parser.add_argument("--seed", type=int, default=0)


def clustered(rows: int, dim: int, clusters: int, rng: np.random.Generator) -> Matrix:
    """[rows, dim]"""
    centres = rng.standard_normal((clusters, dim), dtype=np.float32)
    out = rng.standard_normal((rows, dim), dtype=np.float32)
    out *= 0.5
    for start in range(0, rows, 1 << 16):
        part = out[start : start + (1 << 16)]
        part += centres[rng.integers(0, clusters, len(part))]
    return out


def recall(found: Found, exact: Found) -> float:
    """The share of the true neighbours that were found."""
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(found.ids, exact.ids, strict=True))
    return hits / exact.ids.size


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns its JSON document."""
    import faiss

    from kvcomm.anchors.faiss_index import FaissIndex

    sizes = _sizes(args.rows)
    for name in ("dim", "queries", "k", "clusters", "batch", "repetitions"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.k > sizes[0]:
        raise InputError(f"--k is {args.k}, the smallest pool has {sizes[0]} rows")
    if args.threads:
        faiss.omp_set_num_threads(args.threads)
    rng = np.random.default_rng(args.seed)
    rows = clustered(sizes[-1], args.dim, args.clusters, rng)
    copied = rows[rng.choice(sizes[0], args.queries, replace=args.queries > sizes[0])]
    queries = copied + 0.1 * rng.standard_normal(copied.shape, dtype=np.float32)

    indexes: list[FaissIndex] = []
    pools: list[dict[str, Any]] = []
    for size in sizes:
        index = FaissIndex(args.dim)
        began = perf_counter()
        for start in tqdm(range(0, size, args.batch), f"{size} rows", disable=args.quiet, leave=False):
            end = min(start + args.batch, size)
            index.add(np.arange(start, end), rows[start:end])
        indexes.append(index)
        pools.append({"rows": size, "structure": index.structure, "build_s": perf_counter() - began, "bytes": index.nbytes})

    times: list[list[float]] = [[] for _ in sizes]
    order = random.Random(args.seed)
    for repetition in range(-1, args.repetitions):  # the first one warms up
        for i in order.sample(range(len(sizes)), len(sizes)):
            began = perf_counter()
            indexes[i].search(queries, args.k)
            if repetition >= 0:
                times[i].append((perf_counter() - began) * 1e3)
    for size, index, pool, ms in zip(sizes, indexes, pools, times, strict=True):
        exact = ExactIndex(args.dim)
        exact.add(np.arange(size), rows[:size])
        pool |= {
            "search_ms": median(ms),
            "recall": recall(index.search(queries, args.k), exact.search(queries, args.k)),
            "all_ms": ms,
        }
    return document(
        "kvcomm.bench.pool/1",
        dim=args.dim,
        queries=args.queries,
        k=args.k,
        clusters=args.clusters,
        batch_rows=args.batch,
        repetitions=args.repetitions,
        threads=faiss.omp_get_max_threads(),
        pools=pools,
        largest_over_smallest=pools[-1]["search_ms"] / pools[0]["search_ms"] if len(pools) > 1 else None,
    )


def _sizes(text: str) -> list[int]:
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise InputError(f"--rows is {text!r}; it is a list of numbers, for example 10000,100000") from None
    if sizes[0] < 1:
        raise InputError(f"--rows holds {sizes[0]}; each size must be at least 1")
    return sizes


def run(args: argparse.Namespace) -> int:
    doc = measure(args)
    if args.format == "json":
        print(dumps(doc))
    else:
        print(
            f"{doc['queries']} queries of {doc['dim']} dimensions, k = {doc['k']}; {doc['threads']} threads; "
            f"median of {doc['repetitions']}"
        )
        print(f"{'rows':>9} {'build':>9} {'search':>10} {'recall':>7} {'memory':>10}  structure")
        for p in doc["pools"]:
            print(
                f"{p['rows']:>9} {p['build_s']:>7.2f} s {p['search_ms']:>7.2f} ms {p['recall']:>7.3f} "
                f"{p['bytes'] / 1e6:>7.1f} MB  {p['structure']}"
            )
        if doc["largest_over_smallest"] is not None:
            print(f"searching the largest takes {doc['largest_over_smallest']:.2f} times as long as the smallest")
    if args.output:
        write_json(Path(args.output) / "pool.json", doc)
    return 0
