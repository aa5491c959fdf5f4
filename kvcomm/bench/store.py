"""`kvcomm bench store`: what the tiers cost, beside a plain copy of the same bytes in memory, in the same run.

Every object size is measured over the same number of bytes, in batches as one prompt gets its segments: `put` writes new
records, `get` returns verified tensors. The copy goes into memory that is there already, the fastest there is. The server runs
in a process of its own. "first" is a client's first get of those pages, which the system has to map; the others follow it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from kvcomm.errors import InputError
from kvcomm.report import document, dumps, write_json
from kvcomm.segments import Segment, SegmentKV
from kvcomm.store.disk import DiskStore
from kvcomm.store.opening import open_store
from kvcomm.store.record import Record
from kvcomm.store.records import RecordStore
from kvcomm.wire.client import ServerStore
from kvcomm.wire.local import serving, small_segments

__all__ = ["add_arguments", "measure", "run"]

LAYERS, HEADS, DIM = 16, 8, 128  # 64 KiB a token in bfloat16
TOKEN_BYTES = LAYERS * 2 * HEADS * DIM * 2
BATCH = 64  # keys of one lookup
MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm bench store`."""
    parser.add_argument("--sizes", default="1,16,128", metavar="MIB,...", help="object sizes (default: 1,16,128)")
    parser.add_argument("--total", type=int, default=128, metavar="MIB", help="bytes of each batch (default: 128)")
    parser.add_argument("--remote", action="append", default=[], metavar="URL", help="also this tier; may be repeated")
    parser.add_argument("--keys", default="1000,1000000", metavar="N,...", help="objects in the server during lookups")
    parser.add_argument("--lookups", type=int, default=2000, help="lookups of 64 keys (default: 2000)")
    parser.add_argument("--clients", type=int, default=8, help="processes that get at once (default: 8)")
    parser.add_argument("--seconds", type=float, default=5.0, help="for how long they do (default: 5)")
    parser.add_argument("--repetitions", type=int, default=7)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns its JSON document."""
    sizes, keys = _numbers("sizes", args.sizes, 1), _numbers("keys", args.keys, BATCH)
    for name in ("total", "lookups", "clients", "repetitions"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kvcomm-") as folder:
        objects = _objects(args, sizes, Path(folder))
        lookups = [_lookups(Path(folder) / f"keys{n}", n, args.lookups, quiet=args.quiet) for n in keys]
        fairness = _fairness(Path(folder) / "fair", args.clients, args.seconds)
    return document(
        "kvcomm.bench.store/1",
        batch_bytes=args.total * MIB,
        token_bytes=TOKEN_BYTES,
        repetitions=args.repetitions,
        objects=objects,
        lookups=lookups,
        most_keys_over_fewest=lookups[-1]["lookup_p50_ms"] / lookups[0]["lookup_p50_ms"] if len(lookups) > 1 else None,
        clients=fairness,
    )


def run(args: argparse.Namespace) -> int:
    doc = measure(args)
    if args.output:
        write_json(Path(args.output) / "store.json", doc)
    print(dumps(doc) if args.format == "json" else "\n".join(_lines(doc)))
    return 0


# -- objects ----------------------------------------------------------------------------------------------------------------


def _objects(args: argparse.Namespace, sizes: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """By size and tier: seconds per batch, as bandwidths."""
    out = []
    with ExitStack() as stack:
        limit = 3 * args.total * MIB
        server = stack.enter_context(serving(folder / "objects", limit))
        tiers: dict[str, RecordStore] = {
            "memory": ServerStore(server, deadline_s=30.0),
            "disk": DiskStore(folder / "disk", limit),
            **{url: open_store(url) for url in args.remote},
        }
        for size in tqdm(sizes, "object sizes", disable=args.quiet, leave=False):
            batch = _batch(size * MIB, max(args.total // size, 1))
            nbytes = sum(record.nbytes for record in batch)
            source = torch.from_numpy(np.concatenate([record.data for record in batch]))
            target = torch.empty_like(source)
            times: dict[str, dict[str, list[float]]] = {name: {"put": [], "get": []} for name in tiers}
            copies: list[float] = []
            for _ in range(args.repetitions + 1):  # the first one has pages mapped, files made and connections opened
                copies.append(_timed(partial(target.copy_, source)))
                for name, tier in tiers.items():
                    times[name]["put"].append(_timed(partial(_put, tier, batch)))
                    times[name]["get"].append(_timed(partial(_get, tier, batch)))
                    for record in batch:
                        tier.remove(record.key)
            copy_s = median(copies[1:])
            out += [
                {
                    "tier": name.partition("://")[0],
                    "object_bytes": batch[0].nbytes,
                    "objects": len(batch),
                    "copy_gb_per_s": nbytes / copy_s / 1e9,
                    **{f"{kind}_gb_per_s": nbytes / median(seconds[1:]) / 1e9 for kind, seconds in times[name].items()},
                    "first_get_gb_per_s": nbytes / times[name]["get"][0] / 1e9,
                    "get_over_copy": copy_s / median(times[name]["get"][1:]),
                    "put_over_copy": copy_s / median(times[name]["put"][1:]),
                }
                for name in tiers
            ]
        for tier in tiers.values():
            tier.close()
    return out


def _batch(nbytes: int, count: int) -> list[Record]:
    tokens = max(nbytes // TOKEN_BYTES, 16)
    made = torch.Generator().manual_seed(tokens)
    return [_record(seed, tokens, made) for seed in range(count)]


def _record(seed: int, tokens: int, made: torch.Generator) -> Record:
    ids = np.random.default_rng(seed).integers(0, 1 << 17, tokens).astype(np.int32)
    segment = Segment(ids, ids[:0], "bench")
    keys, values = (
        tuple(torch.randn(HEADS, tokens, DIM, generator=made).to(torch.bfloat16) for _ in range(LAYERS)) for _ in range(2)
    )
    return Record.of(segment, SegmentKV(keys, values, 0, tokens))


def _put(tier: RecordStore, batch: Sequence[Record]) -> None:
    for record in batch:
        kept = tier.put_record(record)
        assert kept, f"{tier.name} keeps nothing: {kept.reason}"


def _get(tier: RecordStore, batch: Sequence[Record]) -> None:
    found = tier.get_many([record.key for record in batch])
    assert len(found) == len(batch), f"{tier.name} has {len(found)} of {len(batch)}"


def _timed(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


# -- lookups ----------------------------------------------------------------------------------------------------------------


def _lookups(path: Path, count: int, repetitions: int, *, quiet: bool) -> dict[str, Any]:
    """Round trips for 64 keys, half of them there, with `count` objects in the server."""
    with serving(path, max(count * 4096 * 2, 64 * MIB), filled=count) as server:
        store = ServerStore(server, deadline_s=10.0)
        there = [segment.key for segment in islice(small_segments(count), 1000)]
        rng = np.random.default_rng(0)
        lookups, gets = [], []
        for _ in tqdm(range(repetitions), f"lookups among {count}", disable=quiet, leave=False):
            asked = [*rng.choice(there, BATCH // 2, replace=False).tolist(), *(rng.bytes(16).hex() for _ in range(BATCH // 2))]
            lookups.append(_timed(partial(store.has, asked)) * 1e3)
            gets.append(_timed(partial(store.get_records, asked)) * 1e3)
        objects = store.stats().objects
        store.close()
    return {
        "objects": objects,
        "keys": BATCH,
        "lookup_p50_ms": median(lookups),
        "lookup_p99_ms": float(np.percentile(lookups, 99)),
        "lease_p50_ms": median(gets),  # of the half that is there: found, leased, verified
    }


# -- clients at once ----------------------------------------------------------------------------------------------------------


def _fairness(path: Path, clients: int, seconds: float) -> dict[str, Any]:
    """Clients in processes of their own, each getting batches as fast as it can."""
    with serving(path, 256 * MIB) as server:
        store = ServerStore(server, deadline_s=30.0)
        batch = _batch(MIB, 32)
        _put(store, batch)
        keys = [record.key for record in batch]
        context = multiprocessing.get_context("spawn")
        go, results = context.Event(), context.Queue()
        processes = [context.Process(target=_client, args=(server, keys, seconds, go, results)) for _ in range(clients)]
        for process in processes:
            process.start()
        for _ in processes:
            assert results.get(timeout=120) == "ready"
        go.set()
        gets = [results.get(timeout=120 + seconds) for _ in processes]
        for process in processes:
            process.join()
        store.close()
    return {
        "clients": clients,
        "seconds": seconds,
        "gets_per_s": sum(gets) / seconds,
        "gets_by_client": sorted(gets),
        "fewest_over_most": min(gets) / max(gets),
        "jain_index": sum(gets) ** 2 / (len(gets) * sum(g * g for g in gets)),  # 1: all alike; Jain, Chiu, Hawe 1984
    }


def _client(server: str, keys: list[str], seconds: float, go: Event, results: Any) -> None:
    torch.set_num_threads(1)
    store, rng, count = ServerStore(server, deadline_s=30.0), np.random.default_rng(), 0
    store.get_records(keys)
    results.put("ready")
    go.wait()
    end = perf_counter() + seconds
    while perf_counter() < end:
        wanted = rng.choice(keys, 4, replace=False).tolist()
        assert len(store.get_records(wanted)) == len(wanted)
        count += 1
    store.close()
    results.put(count)


# -- the result ---------------------------------------------------------------------------------------------------------------


def _numbers(name: str, text: str, least: int) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise InputError(f"--{name} is {text!r}; it is a list of numbers, for example 1,16") from None
    if found[0] < least:
        raise InputError(f"--{name} holds {found[0]}; each must be at least {least}")
    return found


def _lines(doc: dict[str, Any]) -> Iterator[str]:
    yield f"{'tier':>9} {'object':>9} {'n':>4} {'copy':>9} {'put':>9} {'get':>9} {'first get':>10}  get/copy   (GB/s)"
    for row in doc["objects"]:
        yield (
            f"{row['tier']:>9} {row['object_bytes'] / MIB:>5.0f} MiB {row['objects']:>4} {row['copy_gb_per_s']:>9.2f} "
            f"{row['put_gb_per_s']:>9.2f} {row['get_gb_per_s']:>9.2f} {row['first_get_gb_per_s']:>10.2f}  "
            f"{row['get_over_copy']:>8.2f}"
        )
    for row in doc["lookups"]:
        yield (
            f"{row['objects']:>9} objects: {row['keys']} keys looked up in {row['lookup_p50_ms']:.3f} ms (p99 "
            f"{row['lookup_p99_ms']:.3f}), half of them leased and verified in {row['lease_p50_ms']:.3f} ms"
        )
    c = doc["clients"]
    yield (
        f"{c['clients']} clients at once: {c['gets_per_s']:.0f} gets of 4 MiB a second, the slowest has "
        f"{c['fewest_over_most']:.2f} of the fastest (Jain's index {c['jain_index']:.3f})"
    )
