"""KV in one Redis or Valkey server, cut into chunks. Knows nothing of deadlines for whole calls: see `Guarded`.

kvcomm:1:<namespace>:r:<key>                     a head, see `_redis_head`, and the record's first chunk
kvcomm:1:<namespace>:c:<key>:<generation>:<i>    its other chunks, i from 1
kvcomm:1:<namespace>:n:<name>                    a note

The head is written last and names chunks that only its writer wrote: a reader finds one record, or a head some of whose chunks
were evicted, which is a miss and is removed. Everything has a time to live, which use renews.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kvcomm.errors import InputError
from kvcomm.segments import Segment
from kvcomm.store._redis_client import Client
from kvcomm.store._redis_head import HEAD_BYTES, Head
from kvcomm.store.base import Kept
from kvcomm.store.notices import check_names, check_notes, seal, unseal
from kvcomm.store.record import DAMAGED, Record, empty
from kvcomm.store.remote import FULL, INCOMPLETE, Census, RemoteStore, peek

__all__ = ["CHUNK_BYTES", "RedisStore"]

CHUNK_BYTES = 1 << 20  # read four times as fast as 4 MiB, and sent within half a second over a slow line
LARGEST_CHUNK = 256 << 20  # a string of Redis has at most 512 MB
COUNTED = 10_000  # records that `census` looks at
LISTED = 1000  # records that `segments` reads
SCANS = 1000  # commands of one scan, of COUNT names each: what else the server holds is walked through as well
COUNT = 1000
WINDOW = 64 << 10  # bytes in which most headers end
FETCHED = 128 << 20  # bytes of records in one round trip, where they are cut as this store cuts them
BATCH = 8 << 20  # bytes of notes in one round trip

Command = tuple[Any, ...]


class RedisStore(RemoteStore):
    """Records and notes under `namespace` of a server, each gone `ttl_s` seconds after its last use."""

    name = "redis"

    def __init__(
        self,
        url: str,
        *,
        ttl_s: int = 86_400,
        timeout_s: float = 0.5,
        chunk_bytes: int = CHUNK_BYTES,
        namespace: str = "",
        connections: int = 16,
    ) -> None:
        """Connects when first used. `timeout_s`: for connecting, and for every piece that is sent or received."""
        if ttl_s < 1 or not timeout_s > 0 or connections < 1:
            raise InputError(f"ttl_s {ttl_s}, timeout_s {timeout_s}, connections {connections}; each must be above 0")
        if not 1024 <= chunk_bytes <= LARGEST_CHUNK:
            raise InputError(f"chunk_bytes is {chunk_bytes}; it must be from 1024 to {LARGEST_CHUNK}")
        if not re.fullmatch(r"[\w.-]{0,64}", namespace, re.ASCII):
            raise InputError(f"the namespace is {namespace!r}; up to 64 letters, digits, dots, lines and dashes are possible")
        super().__init__()
        self._client = Client(url, timeout_s=timeout_s, connections=connections)
        self._ttl_s, self._chunk_bytes, self._prefix = ttl_s, chunk_bytes, f"kvcomm:1:{namespace}"

    def put_record(self, record: Record) -> Kept:
        key = record.key
        earlier = self._head(key)
        if isinstance(earlier, Head) and self._renewed(key, earlier):
            return Kept(stored=True)
        head = Head.new(record.nbytes, self._chunk_bytes)
        if not self._written(record, head, anew=earlier is None):
            self._send([("UNLINK", *self._chunks(key, head))] if head.chunks > 1 else [])
            return self.counts.refused(FULL)
        if isinstance(earlier, Head) and earlier.chunks > 1:
            self._send([("UNLINK", *self._chunks(key, earlier))])
        return Kept(stored=True)

    def get_records(self, keys: Iterable[str]) -> dict[str, Record]:
        keys = list(dict.fromkeys(keys))
        firsts = self._fetched([self._name(key) for key in keys])
        heads: dict[str, Head] = {}
        for key, first in zip(keys, firsts, strict=True):
            head = Head.unpack(key, first) if isinstance(first, bytes) else None
            if head is not None:
                heads[key] = head
            elif first is not None:
                self._forget(key, None, DAMAGED)
        names = {key: self._chunks(key, head) for key, head in heads.items()}
        rest = iter(self._fetched([name for of_key in names.values() for name in of_key]))
        found: dict[str, Record] = {}
        for key, first in zip(keys, firsts, strict=True):
            if key in heads:
                parts = [memoryview(first)[HEAD_BYTES:], *(next(rest) for _ in names[key])]
                record = self._joined(key, heads[key], parts)
                if record is not None:
                    found[key] = record
        self.counts.looked_up(len(found), len(keys))
        return found

    def has(self, keys: Iterable[str]) -> set[str]:
        keys = list(dict.fromkeys(keys))
        there = self._send([("EXISTS", self._name(key)) for key in keys])
        return {key for key, yes in zip(keys, there, strict=True) if yes}

    def remove(self, key: str) -> bool:
        return self._unlink(key, self._head(key))

    def put_notes(self, notes: Mapping[str, bytes]) -> None:
        check_notes(notes)
        commands: list[Command] = []
        size = 0
        for name, value in notes.items():
            commands.append(("SET", f"{self._prefix}:n:{name}", seal(name, value), "EX", self._ttl_s))
            size += len(value)
            if size > BATCH:
                self._send(commands)
                commands, size = [], 0
        self._send(commands)

    def get_notes(self, names: Sequence[str]) -> dict[str, bytes]:
        check_names(names)
        values = self._send([("GETEX", f"{self._prefix}:n:{name}", "EX", self._ttl_s) for name in names])
        found = {}
        for name, sealed in zip(names, values, strict=True):
            value = unseal(name, sealed)
            if value is not None:
                found[name] = value
            elif sealed is not None:
                self.counts.fault(DAMAGED)
        return found

    def census(self) -> Census:
        """Of at most 10,000 records. The limit is the server's `maxmemory`, or its machine's memory where it has none."""
        names = self._scan(COUNTED)
        heads = [
            Head.unpack(self._key(n), h) for n, h in zip(names, self._send([_range(n, HEAD_BYTES) for n in names]), strict=True)
        ]
        with self._client.faults():
            memory = self._client.redis.info("memory")
        limit = int(memory.get("maxmemory") or memory.get("total_system_memory") or 0)
        return Census(len(names), sum(head.nbytes for head in heads if head is not None), limit)

    def segments(self) -> list[Segment]:
        """Of at most 1000 records, those first that were not used for longest."""
        names = self._scan(LISTED)
        left = self._send([("PTTL", name) for name in names])
        found: list[tuple[int, Segment]] = []
        for name, ms, beginning in zip(names, left, self._send([_range(n, WINDOW) for n in names]), strict=True):
            head = Head.unpack(self._key(name), beginning)
            if head is None:
                continue
            segment = peek(beginning[HEAD_BYTES:], head.nbytes) or self._longer(name, head)
            if segment is not None:
                found.append((ms, segment))
        return [segment for _, segment in sorted(found, key=lambda pair: pair[0])]

    def close(self) -> None:
        self._client.close()

    def _longer(self, name: str, head: Head) -> Segment | None:
        """The segment of a record whose header does not end in the window: chunk by chunk, until it does."""
        beginning = b""
        for i, part in enumerate([name, *self._chunks(self._key(name), head)]):
            (value,) = self._send([("GET", part)])
            beginning += (value or b"")[0 if i else HEAD_BYTES :]
            segment = peek(beginning, head.nbytes)
            if segment is not None or not value:
                return segment
        return None

    def _head(self, key: str) -> Head | bool | None:
        """None where nothing is kept, True where something is that is no head."""
        (value,) = self._send([_range(self._name(key), HEAD_BYTES)])
        if value == b"":
            return None
        return (isinstance(value, bytes) and Head.unpack(key, value)) or True

    def _renewed(self, key: str, head: Head) -> bool:
        """Is all of it there still? It then counts as used."""
        names = [self._name(key), *self._chunks(key, head)]
        return all(yes == 1 for yes in self._send([("EXPIRE", name, self._ttl_s) for name in names]))

    def _written(self, record: Record, head: Head, *, anew: bool) -> bool:
        """False where the server has no room. Who is second to write a new record leaves the first one's in place."""
        key, data, size = record.key, record.data, head.chunk_bytes
        for i, name in enumerate(self._chunks(key, head), start=1):
            if self._send([("SET", name, data[i * size : (i + 1) * size].tobytes(), "EX", self._ttl_s)]) == [FULL]:
                return False
        value = head.pack(key) + data[:size].tobytes()
        (done,) = self._send([("SET", self._name(key), value, "EX", self._ttl_s, *(["NX"] if anew else []))])
        if done is None and head.chunks > 1:
            self._send([("UNLINK", *self._chunks(key, head))])
        return bool(done != FULL)

    def _joined(self, key: str, head: Head, parts: list[Any]) -> Record | None:
        """The record, every byte of it compared with its checksum; None, counted and removed, where it is not whole."""
        if any(part is None for part in parts):
            self._forget(key, head, INCOMPLETE)
            return None
        if [len(part) for part in parts] != [head.size(i) for i in range(head.chunks)]:
            self._forget(key, head, DAMAGED)
            return None
        target = empty(head.nbytes)
        for i in range(head.chunks):
            a = i * head.chunk_bytes
            target[a : a + head.size(i)] = np.frombuffer(parts[i], np.uint8)
            parts[i] = None  # no second copy of a large record for longer than needed
        record = Record(target)
        if not self.counts.sound(record, key):
            self._unlink(key, head)
            return None
        return record

    def _forget(self, key: str, head: Head | None, reason: str) -> None:
        self.counts.fault(reason)
        self._unlink(key, head)

    def _unlink(self, key: str, head: Head | bool | None) -> bool:
        """Chunks that no head names any more are gone when their time is up."""
        chunks = self._chunks(key, head) if isinstance(head, Head) else []
        gone = self._send([("UNLINK", self._name(key)), *([("UNLINK", *chunks)] if chunks else [])])
        return bool(gone[0])

    def _fetched(self, names: list[str]) -> list[Any]:
        """Values, renewed: so many in a round trip that what waits to be sent does not press the server for memory."""
        most = max(FETCHED // self._chunk_bytes, 1)
        parts = (names[i : i + most] for i in range(0, len(names), most))
        return [value for part in parts for value in self._send([("GETEX", name, "EX", self._ttl_s) for name in part])]

    def _send(self, commands: Sequence[Command]) -> list[Any]:
        """One round trip. An answer is FULL where the server has no memory, False where another type is kept under the name."""
        if not commands:
            return []
        with self._client.faults():
            with self._client.redis.pipeline(transaction=False) as pipe:
                run: Callable[..., Any] = pipe.execute_command
                for command in commands:
                    run(*command)
                answers = pipe.execute(raise_on_error=False)
            return [self._answer(answer) for answer in answers]

    @staticmethod
    def _answer(answer: Any) -> Any:
        from redis.exceptions import OutOfMemoryError

        if not isinstance(answer, Exception):
            return answer
        if isinstance(answer, OutOfMemoryError):
            return FULL
        if "WRONGTYPE" in str(answer):
            return False
        raise answer

    def _scan(self, most: int) -> list[str]:
        """Names of heads, each once."""
        names: dict[str, None] = {}
        cursor: Any = 0
        for _ in range(SCANS):
            ((cursor, page),) = self._send([("SCAN", cursor, "MATCH", f"{self._prefix}:r:*", "COUNT", COUNT)])
            names.update(dict.fromkeys(name.decode() for name in page))
            if int(cursor) == 0 or len(names) >= most:
                break
        return list(names)[:most]

    def _name(self, key: str) -> str:
        return f"{self._prefix}:r:{key}"

    def _key(self, name: str) -> str:
        return name.removeprefix(f"{self._prefix}:r:")

    def _chunks(self, key: str, head: Head) -> list[str]:
        return [f"{self._prefix}:c:{key}:{head.generation.hex()}:{i}" for i in range(1, head.chunks)]


def _range(name: str, size: int) -> Command:
    return ("GETRANGE", name, 0, size - 1)
