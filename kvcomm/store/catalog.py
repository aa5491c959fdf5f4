"""What the disk tier knows of its objects without reading them: in memory, and in the journal so that it is known again.

Knows nothing of the files themselves. Not thread safe: its owner has a lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, KeysView
from contextlib import suppress
from heapq import nsmallest
from typing import Any, NamedTuple

import xxhash

from kvcomm.store.base import Kept
from kvcomm.store.eviction import IN_USE, Book, Quotas
from kvcomm.store.journal import Journal, read
from kvcomm.store.record import Record

__all__ = ["Catalog", "Entry", "digest", "replayed"]

_SLACK = 1024  # lines of a journal that are not worth writing it anew
_USES = 1024  # objects whose latest uses may be forgotten when the process is killed
_MOST_USES = 16  # what earlier uses count for at most when the folder is opened again
_PREFIX = 32  # bytes of a record that hold its header's digest, and so depend on every byte of it


class Entry(NamedTuple):
    """One object; in the journal a line of `+` and these, in this order."""

    key: str
    nbytes: int
    digest: int  # of the record as it was put
    tenant: str
    fingerprint: str
    producer: str
    tokens: int
    cost_ms: float | None
    uses: int = 1

    @classmethod
    def of(cls, record: Record) -> Entry:
        """Raises Unreadable where its header is damaged."""
        s = record.segment
        return cls(s.key, record.nbytes, digest(record), s.tenant, s.fingerprint, s.producer, len(s.ids), s.cost_ms)


class Catalog:
    """Entries by key, and who leaves first."""

    def __init__(self, limit_bytes: int, quotas: Quotas | None) -> None:
        """Raises InputError for a negative limit."""
        self.book: Book[str] = Book(limit_bytes, quotas)
        self.journal: Journal | None = None  # None: nothing is written
        self._entries: dict[str, Entry] = {}
        self._uses: Counter[str] = Counter()
        self._news: set[str] = set()  # whose uses the journal does not know yet
        self._gone: set[str] = set()  # of whose removal it does not know yet
        self._slack = _SLACK

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def keys(self) -> KeysView[str]:
        return self._entries.keys()

    def get(self, key: str) -> Entry | None:
        """The same object for as long as the key stays."""
        return self._entries.get(key)

    def entries(self) -> list[Entry]:
        """With their uses until now, the next to be evicted first."""
        return [self._entries[key]._replace(uses=self._uses[key]) for key in self.book.order()]

    def page(self, tenant: str, after: str, count: int) -> list[Entry]:
        """Of the tenant's in the order of their keys, the first `count` behind `after`."""
        return nsmallest(count, (e for key, e in self._entries.items() if key > after and e.tenant == tenant))

    def room(self, entry: Entry) -> Kept:
        """What keeping it would mean: who leaves, or why it cannot be. Changes nothing."""
        victims = self.book.victims(entry.nbytes, entry.tenant)
        if victims is None:
            return Kept(stored=False, reason=self.book.refusal(entry.nbytes, entry.tenant) or IN_USE)
        return Kept(stored=True, evicted=tuple(victims))

    def admit(self, entry: Entry) -> tuple[str, ...]:
        """Take in what the folder holds already, and tell no journal. Returns who has to leave it, perhaps itself."""
        victims = self.book.victims(entry.nbytes, entry.tenant)
        if victims is None:
            return (entry.key,)
        self._replace(victims, entry)
        for _ in range(min(entry.uses, _MOST_USES) - 1):
            self.book.use(entry.key)
        return tuple(victims)

    def put(self, entry: Entry, victims: tuple[str, ...]) -> None:
        """Tell the journal of it and of who leaves for it, then do it. Raises OSError: then nothing has changed."""
        self._tell([*self._uses_lines(), *(["-", key] for key in victims), ["+", *entry]])
        self._news.clear()
        self._replace(victims, entry)

    def use(self, key: str) -> None:
        self.book.use(key)
        self._uses[key] += 1
        self._news.add(key)
        if len(self._news) >= _USES:
            self.tell_uses()

    def remove(self, key: str) -> None:
        """Its file is gone; until the journal can be told, it has an entry without a file, which is nothing."""
        self.book.remove(key)
        self._drop(key)
        self._gone.add(key)
        with suppress(OSError):
            self._tell([])

    def tell_uses(self) -> None:
        with suppress(OSError):  # they are an estimate
            self._tell(self._uses_lines())
        self._news.clear()

    def compact(self) -> None:
        """Write the journal anew. Raises OSError: then it is as it was."""
        if self.journal is not None:
            self.journal.replace(["+", *entry] for entry in self.entries())
            self._news.clear()
            self._gone.clear()
            self._slack = _SLACK

    def check_integrity(self) -> None:
        """Raise AssertionError when its parts contradict each other, or the journal."""
        self.book.check_integrity()
        assert set(self.book.order()) == self._entries.keys() == self._uses.keys() >= self._news
        assert self.book.nbytes == sum(entry.nbytes for entry in self._entries.values())
        if self.journal is not None:
            contents = read(self.journal.path)
            assert (contents.damaged, contents.torn, len(contents.entries)) == (0, 0, self.journal.count)
            known = {entry.key: entry._replace(uses=1) for entry in replayed(contents.entries)}
            assert {key: known.get(key) for key in self._entries} == {k: e._replace(uses=1) for k, e in self._entries.items()}
            assert known.keys() - self._entries.keys() <= self._gone

    def _replace(self, victims: Iterable[str], entry: Entry) -> None:
        for key in victims:
            self.book.evict(key)
            self._drop(key)
        self.book.add(entry.key, entry.nbytes, entry.tenant, entry.cost_ms)
        self._entries[entry.key] = entry
        self._uses[entry.key] = entry.uses

    def _drop(self, key: str) -> None:
        del self._entries[key], self._uses[key]
        self._news.discard(key)

    def _uses_lines(self) -> list[Any]:
        return [["u", key, self._uses[key]] for key in self._news]

    def _tell(self, lines: list[Any]) -> None:
        """Add lines; first write the journal anew when more than half of it does not matter any more."""
        if self.journal is None:
            return
        if self.journal.count > 2 * len(self._entries) + self._slack:
            try:
                self.compact()
            except OSError:
                self._slack += self.journal.count  # not again at once
        self.journal.append([*(["-", key] for key in self._gone), *lines])
        self._gone.clear()


def digest(record: Record) -> int:
    """Tells apart records with any other byte; not what makes one sound."""
    return xxhash.xxh3_64_intdigest(record.data[:_PREFIX].data)


def replayed(lines: Iterable[Any]) -> Iterator[Entry]:
    """What a journal says is kept, what was used last at the end."""
    entries: dict[str, Entry] = {}
    for kind, *facts in lines:
        entry = entries.pop(facts[0], None)
        if kind == "+":
            entries[facts[0]] = Entry._make(facts)
        elif kind == "u" and entry:
            entries[entry.key] = entry._replace(uses=facts[1])
    return iter(entries.values())
