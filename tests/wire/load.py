"""Clients of a server under test, in processes of their own: forked, as importing torch takes longer than what they are to do.

For every line `KIND SOCKET FOLDER NUMBER` of its standard input this script forks one, and says its process id; they end with
it. One works until there is a file FOLDER/stop, then writes what it saw to FOLDER/seen-NUMBER.

`raw` and `large` put and get records whose bytes follow from their number, so that every byte read can be checked;
FOLDER/acks-* says which of them the server has confirmed. `engine` answers prompts that share documents with other engines:
each answer is compared with what the model says without a cache or, where moved text was reused, with the same plan over the
same KV kept here; FOLDER/truth has digests of all that any engine has put, FOLDER/stored the keys that were confirmed.
`writer` writes large records until it is killed.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import Any

import numpy as np
import xxhash

from kvcomm.config import Config
from kvcomm.errors import CacheFault
from kvcomm.matching import Found
from kvcomm.segments import Ids, Segment, SegmentKV
from kvcomm.store.base import Kept
from kvcomm.store.record import Record, Unreadable
from kvcomm.wire import protocol as p
from kvcomm.wire.client import ServerStore
from kvcomm.wire.index import ServerIndex
from kvcomm.wire.transport import Unreachable

KEPT = 150  # records that a raw client leaves at the server
SPACE = 1 << 20  # numbers of records for each client
SIZES = {"raw": (16, 16, 40, 300), "large": (1000, 4000), "writer": (8000,), "whole": (30_000,)}  # tokens of 2 KiB
WRITTEN = range(2 * SPACE, 2 * SPACE + 4)  # numbers of what writers write


@dataclass
class Seen:
    """What one client saw; lists hold the first of what must never happen."""

    requests: int = 0  # prompts, or calls of a raw client
    hits: int = 0
    misses: int = 0
    reused: int = 0  # tokens
    exact: int = 0  # answers compared with dense ones
    moved: int = 0  # answers compared with the same plan over sound KV
    put: int = 0  # confirmed
    faults: dict[str, int] = field(default_factory=dict)  # reason -> times that a request went on without the server
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)  # confirmed by the server, and not found by a call that did not fail
    longest_s: float = 0.0
    slowest: str = ""  # what took longest

    def took(self, seconds: float, what: str) -> None:
        if seconds > self.longest_s:
            self.longest_s, self.slowest = seconds, what

    def fault(self, reason: str) -> None:
        self.faults[reason] = self.faults.get(reason, 0) + 1


@lru_cache(maxsize=32)
def record(number: int, kind: str = "raw") -> Record:
    """The same bytes for the same number."""
    import torch

    made = np.random.default_rng(number)
    tokens = int(made.choice(SIZES[kind]))
    ids = made.integers(0, 1 << 30, tokens).astype(np.int32)
    parts = tuple(torch.from_numpy(made.random((2, tokens, 64), np.float32)) for _ in range(4))
    return Record.of(Segment(ids, ids[:0], "raw"), SegmentKV(parts[:2], parts[2:], 0, tokens))


def kind_of(number: int) -> str:
    return list(SIZES)[number // SPACE % len(SIZES)]


def digest(record: Record) -> str:
    return xxhash.xxh3_128_hexdigest(record.data.data)


def acknowledged(folder: Path) -> dict[int, str]:
    """Number -> kind of every record that some client left at the server, and was told that it is kept."""
    found: dict[int, str] = {}
    for path in folder.glob("acks-*"):
        for line in path.read_text().split("\n")[:-1]:
            if line[0] == "+":
                found[int(line[1:])] = kind_of(int(line[1:]))
            else:
                found.pop(int(line[1:]), None)
    return found


def stored(folder: Path) -> set[str]:
    """Keys of what some engine was told is kept, and has not removed."""
    found = set[str]()
    path = folder / "stored"
    for line in path.read_text().split("\n")[:-1] if path.exists() else ():
        (found.add if line[0] == "+" else found.discard)(line[1:])
    return found


def reason_of(fault: CacheFault) -> str:
    return str(getattr(fault, "reason", type(fault).__name__))


# -- raw clients -----------------------------------------------------------------------------------------------------------


class Raw:
    """Puts new records, gets old ones of all clients, and takes the oldest of its own away."""

    def __init__(self, kind: str, store: ServerStore, folder: Path, number: int) -> None:
        self.kind, self.store, self.folder, self.seen = kind, store, folder, Seen()
        self._random = random.Random(number)
        self._next = (number * len(SIZES) + list(SIZES).index(kind)) * SPACE
        self._mine: deque[int] = deque()
        self._others: list[int] = []
        record(0)  # what is loaded for the first one is no time of a call
        self._acks = os.open(folder / f"acks-{kind}-{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def step(self) -> None:
        began, work = monotonic(), self._random.choice((self.put, self.get, self.get))
        try:
            work()
        except Unreadable as fault:
            self.seen.wrong.append(f"{work.__name__}: {fault}")
        except CacheFault as fault:
            self.seen.fault(reason_of(fault))
            sleep(0.02)  # a client has something else to do than to ask again
        except Exception as fault:  # noqa: BLE001  # whatever it is, it is what the test looks for
            self.seen.failed.append(f"{work.__name__}: {fault!r}")
        self.seen.requests += 1
        self.seen.took(monotonic() - began, work.__name__)

    def put(self) -> None:
        number, self._next = self._next, self._next + 1
        if self.store.put_record(record(number, self.kind)):
            self._say(f"+{number}")
            self._mine.append(number)
            self.seen.put += 1
        if len(self._mine) > KEPT // (1 if self.kind == "raw" else 20):
            oldest = self._mine.popleft()
            self._say(f"-{oldest}")  # first: whether a call that fails has removed it is not known
            self.store.remove(record(oldest, self.kind).key)

    def get(self) -> None:
        if self._random.random() < 0.05:
            self._others = list(acknowledged(self.folder))
        numbers = self._random.sample(self._others, min(2, len(self._others)))
        numbers += self._random.sample(list(self._mine), min(2, len(self._mine)))
        records = {number: record(number, kind_of(number)) for number in dict.fromkeys(numbers)}
        found = self.store.get_records([r.key for r in records.values()])
        for number, r in records.items():
            if r.key not in found:
                self.seen.misses += 1
                if number in self._mine:
                    self.seen.missing.append(number)
            elif np.array_equal(found[r.key].data, r.data):
                self.seen.hits += 1
            else:
                self.seen.wrong.append(f"other bytes for {number}")

    def _say(self, line: str) -> None:
        os.write(self._acks, f"{line}\n".encode())


# -- engines ---------------------------------------------------------------------------------------------------------------


class Watched(ServerStore):
    """A server's store that compares what it gets with the digests of what was put, by whatever process."""

    def __init__(self, address: str, folder: Path, seen: Seen, **options: Any) -> None:
        super().__init__(address, **options)
        self.index: WatchedIndex = WatchedIndex(self)
        self.records: dict[str, Record] = {}  # of the last prompt
        self._truth, self._seen = folder / "truth", seen
        self._truth.mkdir(exist_ok=True)

    def put(self, segment: Segment, kv: SegmentKV) -> Kept:
        made = Record.of(segment, kv)
        with (self._truth / made.key).open("a") as file:
            file.write(f"{digest(made)}\n")
        kept = self.put_record(made)
        if kept:
            self._seen.put += 1
            self._say(f"+{made.key}")
        return kept

    def remove(self, key: str) -> bool:
        self._say(f"-{key}")  # first: whether a call that fails has removed it is not known
        return super().remove(key)

    def find(self, tenant: str, request: p.Find) -> tuple[dict[str, Any], dict[str, Record]]:
        reply, self.records = super().find(tenant, request)
        self._compare(self.records)
        return reply, self.records

    def get_records(self, keys: Iterable[str]) -> dict[str, Record]:
        found = super().get_records(keys)
        self._compare(found)
        return found

    def close(self) -> None:
        self.records = {}
        super().close()

    def sound(self, found: Record) -> bool:
        """Is it what somebody put under this key?"""
        path = self._truth / found.key
        return path.exists() and digest(found) in path.read_text().split()

    def _say(self, line: str) -> None:
        with (self._truth.parent / "stored").open("a") as file:
            file.write(f"{line}\n")

    def _compare(self, records: dict[str, Record]) -> None:
        for key, found in records.items():
            if not self.sound(found):
                self._seen.wrong.append(f"{key} is not what anybody put")


class WatchedIndex(ServerIndex):
    """It remembers what it said of the last prompt."""

    found = Found([])

    def look(self, ids: Ids, **options: Any) -> Found:
        self.found = Found([])
        self.found = super().look(ids, **options)
        return self.found


class Said:
    """An index that knows of a prompt what another one said of it, and nothing else."""

    def __init__(self) -> None:
        self.found = Found([])

    def look(self, ids: Ids, **_: object) -> Found:
        return Found(self.found.matches)

    def add(self, segment: Segment) -> tuple[str, ...]:
        return ()

    def remove(self, key: str) -> bool:
        return False

    def awaited(self, flight: int, tenant: str = "") -> bool:
        return False

    def land(self, flight: int, tenant: str = "") -> None:
        return

    def __contains__(self, key: object) -> bool:
        return False


class Engine:
    """Answers prompts made of a few documents, in any order, each behind a question that nobody has asked before."""

    def __init__(self, address: str, folder: Path, number: int) -> None:
        import torch

        from kvcomm.engine import KVComm
        from kvcomm.store.memory import MemoryStore
        from kvcomm.testing import tiny_random

        torch.set_num_threads(1)
        self.seen = Seen()
        self.store = Watched(address, folder, self.seen)
        self._random = random.Random(number)
        self._model: Any = tiny_random("llama")
        config = Config(anchors="off")
        self.comm = KVComm.from_model(self._model, config=config, store=self.store)
        self._dense: Any = self._model.generate
        self._alone = MemoryStore(64 << 20)
        self._said = Said()
        setattr(self._alone, "index", self._said)  # noqa: B010  # a store that is shared brings its own
        self._sound = KVComm.from_model(self._model, config=config, store=self._alone)
        made = np.random.default_rng(7)
        self._documents = [made.integers(0, 200, 60).tolist() for _ in range(12)]
        self._plain(torch.tensor([self._documents[0]]))  # what is loaded for the first one is no time of a request

    def step(self) -> None:
        import torch

        documents = self._random.sample(self._documents, self._random.randint(1, 4))
        question = [self._random.randrange(200) for _ in range(20)]
        ids = torch.tensor([[token for document in documents for token in document] + question])
        rule = self._random.choice(("exact", "auto"))
        began = monotonic()
        self.seen.requests += 1
        try:
            answer, report = self._ask(self.comm, ids, rule)
        except Exception as fault:  # noqa: BLE001  # whatever it is, a request has failed
            self.seen.failed.append(repr(fault))
            return
        self.seen.took(monotonic() - began, str(report))
        self.seen.reused += report.reused_tokens
        self.seen.hits += bool(report.spans)
        self.seen.misses += not report.spans
        if report.fallback and report.fallback.startswith("fault"):
            self.seen.fault(report.fallback.removeprefix("fault: ").split(":")[0])
        if all(span.rung == "exact" for span in report.spans):
            wanted, self.seen.exact = self._plain(ids), self.seen.exact + 1
        else:
            wanted, self.seen.moved = self._replayed(ids, rule, report), self.seen.moved + 1
        if answer != wanted:
            self.seen.wrong.append(f"{answer} in place of {wanted}: {report}")

    def _ask(self, comm: Any, ids: Any, rule: Any) -> tuple[list[int], Any]:
        with comm.attach(rule=rule):
            result = self._model.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=4, do_sample=False)
        return result[0, ids.shape[1] :].tolist(), comm.reports[-1]

    def _plain(self, ids: Any) -> list[int]:
        result = self._dense(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=4, do_sample=False)
        answer: list[int] = result[0, ids.shape[1] :].tolist()
        return answer

    def _replayed(self, ids: Any, rule: Any, report: Any) -> list[int]:
        """The answer of an engine that keeps the same KV in a store of its own."""
        self._said.found = self.store.index.found
        for match in self.store.index.found.matches:
            kv = self.store.records[match.segment.key].kv()
            sound = SegmentKV(tuple(k.clone() for k in kv.keys), tuple(v.clone() for v in kv.values), kv.start, kv.length)
            self._alone.remove(match.segment.key)
            assert self._alone.put(match.segment, sound)
        answer, mine = self._ask(self._sound, ids, rule)
        if mine.spans != report.spans:
            self.seen.wrong.append(f"another plan than over the same KV: {report} beside {mine}")
        return answer


def client(kind: str, path: str, folder: Path, number: int) -> None:
    """Until it is told to stop, or whoever has forked us has gone."""
    parent, address = os.getppid(), f"unix:{path}"
    if kind == "writer":
        write(ServerStore(address), parent)
        return
    made = Engine(address, folder, number) if kind == "engine" else Raw(kind, ServerStore(address), folder, number)
    made.step()
    (folder / f"ready-{number}").touch()
    while os.getppid() == parent and not (folder / "stop").exists():
        made.step()
    (folder / f"seen-{number}.new").write_text(json.dumps(asdict(made.seen)))
    (folder / f"seen-{number}.new").rename(folder / f"seen-{number}")


def write(store: ServerStore, parent: int) -> None:
    """The same four records for ever: puts each, reads it, and takes it away."""
    records = [record(number, "writer") for number in WRITTEN]
    while os.getppid() == parent:
        for r in records:
            with suppress(Unreachable):
                store.put_record(r)
                found = store.get_records([r.key])
                store.remove(r.key)
                del found


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for written in WRITTEN:
        record(written, "writer")
    with TemporaryDirectory() as folder:
        Engine("unix:/nobody", Path(folder), 0).step()  # all that is imported for it
    for line in sys.stdin:
        kind, path, place, number = line.split()
        pid = os.fork()
        if not pid:
            log = os.open(Path(place) / "clients", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                client(kind, path, Path(place), int(number))
            except BaseException:  # noqa: BLE001  # the fork must never go on as its parent
                traceback.print_exc()
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
