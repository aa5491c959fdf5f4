"""No altered byte is ever served: every byte of small files, a sample of a large one, false headers under right checksums."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from kvcomm.segments import Segment, SegmentKV
from kvcomm.store import record as format_
from kvcomm.store.base import ALTERED
from kvcomm.store.disk import DiskStore
from kvcomm.store.record import BLOCK, DAMAGED, OTHER_KEY, OTHER_VERSION, Record, Unreadable
from kvcomm.wire.protocol import MAX_TOKENS

CHANGES = (0x01, 0x80, 0xFF)  # low bit, high bit, all bits
SHAPES = {  # layers, heads of keys and values, dims of keys and values, tokens, tokens in front, type
    "float32": (1, 1, (4, 4), 2, 0, torch.float32),
    "float16": (2, 2, (4, 4), 5, 3, torch.float16),
    "bfloat16": (1, 3, (8, 2), 3, 1, torch.bfloat16),
    "float64": (3, 1, (1, 3), 1, 7, torch.float64),
    "float8": (1, 2, (16, 16), 4, 0, torch.float8_e4m3fn),
}


def made(
    layers: int, heads: int, dims: tuple[int, int], tokens: int, start: int, dtype: torch.dtype, tenant: str = "t"
) -> tuple[Segment, SegmentKV]:
    rng = np.random.default_rng(tokens)
    ids = rng.integers(1, 1000, start + tokens).astype(np.int32)
    s = Segment(ids[start:], ids[:start], "model", tenant, "agent", length=2, cost_ms=3.5)

    def tensors(dim: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(heads, tokens, dim).to(dtype) for _ in range(layers))

    return s, SegmentKV(tensors(dims[0]), tensors(dims[1]), start, start + tokens)


def file_of(folder: Path, key: str) -> Path:
    return folder / "objects" / key[:2] / f"{key}.kv"


def alter(path: Path, at: int, change: int) -> None:
    os.chmod(path, 0o600)
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ change]))


def same(a: SegmentKV | None, b: SegmentKV) -> bool:
    return a is not None and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_every_byte_of_a_small_file(tmp_path: Path, shape: str) -> None:
    s, kv = made(*SHAPES[shape])
    record = Record.of(s, kv)
    store = DiskStore(tmp_path, 1 << 20)
    assert store.put_record(record)
    assert same(store.get(s.key), kv)
    for at in range(record.nbytes):
        for change in CHANGES:
            alter(file_of(tmp_path, s.key), at, change)
            assert store.get(s.key) is None, f"byte {at}, xor {change}"
            assert s.key not in store
            assert store.put_record(record)
    stats = store.stats()
    assert sum(stats.faults.values()) == stats.misses == len(CHANGES) * record.nbytes
    assert set(stats.faults) == {DAMAGED, OTHER_VERSION}
    assert stats.faults[OTHER_VERSION] == 2 * len(CHANGES)  # two bytes hold the version
    assert same(store.get(s.key), kv)
    store.check_integrity()
    store.close()


@pytest.mark.parametrize("shape", ["float32", "float16"])
def test_every_byte_of_a_file_that_the_journal_does_not_know(tmp_path: Path, shape: str) -> None:
    """What is adopted by its header alone is verified when it is read."""
    s, kv = made(*SHAPES[shape])
    record = Record.of(s, kv)
    path = file_of(tmp_path, s.key)
    adopted = 0
    for at in range(0, record.nbytes, 2):
        store = DiskStore(tmp_path, 1 << 20)
        assert store.put_record(record)
        store.close()
        (tmp_path / "journal").unlink()
        alter(path, at, CHANGES[at % 3])
        store = DiskStore(tmp_path, 1 << 20)
        adopted += store.opened.adopted
        assert (store.opened.adopted, store.opened.removed) in ((1, 0), (0, 1))
        assert store.get(s.key) is None, f"byte {at}"
        assert sum(store.stats().faults.values()) == 1
        store.close()
    assert 0 < adopted < record.nbytes // 2


def test_a_sample_of_a_large_file(tmp_path: Path) -> None:
    """First and last byte of the prefix, the header, every tensor and every block of a checksum; and 500 others."""
    s, kv = made(4, 8, (128, 64), 140, 20, torch.float32)
    record = Record.of(s, kv)
    assert record.nbytes > 3 * BLOCK
    store = DiskStore(tmp_path, 1 << 30)
    assert store.put_record(record)
    start = record.nbytes - sum(-(-t.nbytes // 64) * 64 for t in (*kv.keys, *kv.values))
    edges = {0, 24, 32, start, record.nbytes, *range(start, record.nbytes, BLOCK)}
    at = start
    for t in (*kv.keys, *kv.values):
        edges |= {at, at + t.nbytes}
        at += -(-t.nbytes // 64) * 64
    places = {at for edge in edges for at in (edge - 1, edge) if 0 <= at < record.nbytes}
    places |= set(np.random.default_rng(0).integers(0, record.nbytes, 500).tolist())
    path = file_of(tmp_path, s.key)
    looking = DiskStore(tmp_path, 1 << 30, read_only=True)  # finds what `store` finds, and leaves it there
    for at in sorted(places):
        for change in CHANGES:
            alter(path, at, change)
            assert looking.get(s.key) is None, f"byte {at}, xor {change}"
            alter(path, at, change)
    assert sum(looking.stats().faults.values()) == len(CHANGES) * len(places)
    assert same(looking.get(s.key), kv)
    for at in sorted(places)[::50]:
        alter(path, at, 0xFF)
        assert store.get(s.key) is None
        assert store.put_record(record)
    assert same(store.get(s.key), kv)
    store.close()


def remade(record: Record, version: int = format_.VERSION, payload: bytes | None = None, **facts: Any) -> bytes:
    """`record` with these facts in its header (and this payload), and every checksum right."""
    if payload is None:
        payload = record.data[record._start :].tobytes()
    tensors = np.frombuffer(payload, np.uint8)
    header = msgpack.packb({**record.head, "digests": format_._digests(tensors), **facts})
    start = format_._aligned(format_._START + len(header))
    region = np.zeros(start, np.uint8)
    prefix = format_._PREFIX.pack(format_._MAGIC, version, len(header), 0, start + len(payload))
    region[: len(prefix)] = np.frombuffer(prefix, np.uint8)
    region[format_._START : format_._START + len(header)] = np.frombuffer(header, np.uint8)
    digest = format_._DIGEST.pack(format_._header_digest(region))
    region[len(prefix) : format_._START] = np.frombuffer(digest, np.uint8)
    return region.tobytes() + payload


S, KV = made(2, 2, (16, 16), 5, 3, torch.float32)
SOUND = Record.of(S, KV)
OTHER = Segment(S.ids, S.context, "model", "other tenant", "agent", length=2, cost_ms=3.5)


IDENTITY: dict[str, tuple[bytes, str]] = {  # found by the header's own facts
    "fingerprint": (remade(SOUND, fingerprint="other model"), OTHER_KEY),
    "tenant": (remade(SOUND, tenant="other tenant"), OTHER_KEY),
    "whole record of another tenant": (Record.of(OTHER, KV).data.tobytes(), OTHER_KEY),
    "key": (remade(SOUND, key="0" * 32), OTHER_KEY),
    "exactness": (remade(SOUND, exact=False), OTHER_KEY),
    "length": (remade(SOUND, length=3), OTHER_KEY),
    "one id": (remade(SOUND, ids=(S.ids ^ (np.arange(5) == 2)).astype("<i4").tobytes()), OTHER_KEY),
    "an id less": (remade(SOUND, ids=S.ids[:-1].tobytes()), DAMAGED),
    "an id more": (remade(SOUND, ids=np.append(S.ids, np.int32(1)).tobytes()), DAMAGED),
    "half an id": (remade(SOUND, ids=S.ids.tobytes()[:-2]), DAMAGED),
    "context": (remade(SOUND, context=S.context[::-1].tobytes()), OTHER_KEY),
    "ids and context": (remade(SOUND, ids=S.ids[1:].tobytes(), context=np.append(S.context, S.ids[:1]).tobytes()), DAMAGED),
    "version": (remade(SOUND, version=format_.VERSION + 1), OTHER_VERSION),
}
RUNS = SOUND.head["runs"]
assert RUNS == [[4, "float32", 2, 16]]
LAYOUT: dict[str, tuple[bytes, str]] = {  # found by the tensors' places
    "float16": (remade(SOUND, runs=[[4, "float16", 2, 16]]), DAMAGED),
    "float64": (remade(SOUND, runs=[[4, "float64", 2, 16]]), DAMAGED),
    "no type": (remade(SOUND, runs=[[4, "nn", 2, 16]]), DAMAGED),
    "integers": (remade(SOUND, runs=[[4, "int32", 2, 16]]), DAMAGED),
    "a head less": (remade(SOUND, runs=[[4, "float32", 1, 16]]), DAMAGED),
    "two channels less": (remade(SOUND, runs=[[4, "float32", 2, 14]]), DAMAGED),
    "a layer less": (remade(SOUND, runs=[[2, "float32", 2, 16]]), DAMAGED),
    "a layer more": (remade(SOUND, runs=[[6, "float32", 2, 16]]), DAMAGED),
    "no layers": (remade(SOUND, runs=[]), DAMAGED),
    "an odd number": (remade(SOUND, runs=[[3, "float32", 2, 16]]), DAMAGED),
    "an odd number of as many bytes": (remade(SOUND, runs=[[1, "float32", 8, 16]]), DAMAGED),
    "shorter sequence": (remade(SOUND, kv_length=7), DAMAGED),
    "shorter payload": (remade(SOUND, payload=SOUND.data[SOUND._start : -64].tobytes()), DAMAGED),
    "longer payload": (remade(SOUND, payload=SOUND.data[SOUND._start :].tobytes() + bytes(64)), DAMAGED),
    "runs of another kind": (remade(SOUND, runs=[1, 2]), DAMAGED),
    "no whole number": (remade(SOUND, runs=[[4.0, "float32", 2, 16]]), DAMAGED),
    "negative shape": (remade(SOUND, runs=[[-4, "float32", -2, 16]]), DAMAGED),
}
CONTENT: dict[str, tuple[bytes, str]] = {  # sound records of this key: found by what the journal says was put
    "float16, of as many bytes": (remade(SOUND, runs=[[4, "float16", 2, 32]]), ALTERED),
    "longer sequence": (remade(SOUND, kv_length=9), ALTERED),
    "other numbers": (remade(SOUND, payload=bytes(SOUND.nbytes - SOUND._start)), ALTERED),
    "producer": (remade(SOUND, producer="somebody"), ALTERED),
    "a channel less, of as many blocks": (remade(SOUND, runs=[[4, "float32", 2, 15]]), ALTERED),
    "other heads": (remade(SOUND, runs=[[4, "float32", 4, 8]]), ALTERED),
}
FALSE = IDENTITY | LAYOUT | CONTENT


@pytest.mark.parametrize("what", FALSE)
def test_false_facts_under_right_checksums(tmp_path: Path, what: str) -> None:
    data, reason = FALSE[what]
    store = DiskStore(tmp_path, 1 << 20)
    assert store.put_record(SOUND)
    path = file_of(tmp_path, S.key)
    path.unlink()
    path.write_bytes(data)
    assert store.get(S.key) is None
    assert store.stats().faults == {reason: 1}
    assert not path.exists()
    assert store.put_record(SOUND)
    assert same(store.get(S.key), KV)
    store.check_integrity()
    store.close()


@pytest.mark.parametrize("what", IDENTITY | LAYOUT)
def test_false_facts_that_no_journal_knows(tmp_path: Path, what: str) -> None:
    data, _ = FALSE[what]
    DiskStore(tmp_path, 1 << 20).close()
    path = file_of(tmp_path, S.key)
    path.parent.mkdir()
    path.write_bytes(data)
    store = DiskStore(tmp_path, 1 << 20)
    assert store.get(S.key) is None
    assert store.get(OTHER.key) is None
    assert sum(store.stats().faults.values()) == 1
    assert not path.exists()
    store.close()


def test_what_is_remade_without_a_change_is_served(tmp_path: Path) -> None:
    """The tests above would also pass if `remade` made nothing but rubbish."""
    assert remade(SOUND) == SOUND.data.tobytes()
    DiskStore(tmp_path, 1 << 20).close()
    path = file_of(tmp_path, S.key)
    path.parent.mkdir()
    path.write_bytes(remade(SOUND, producer="somebody"))
    store = DiskStore(tmp_path, 1 << 20)
    assert store.opened.adopted == 1
    assert same(store.get(S.key), KV)
    store.close()


COSTLY: dict[str, dict[str, Any]] = {
    "empty lists": {"more": [[]] * (1 << 20)},
    "lists in lists": {"more": [[[[]] * (1 << 10)] * (1 << 10)]},
    "empty maps": {"more": [{}] * (1 << 20)},
    "runs of nothing": {"runs": [[]] * (1 << 20)},
    "runs of lists": {"runs": [[[]] * (1 << 20)]},
    "a text so many times": {"runs": [["a" * 1000, "float32", 1 << 10, 1 << 10]]},
    "many fields": {str(number): 0 for number in range(1 << 18)},
    "a long name": {"producer": "a" * (1 << 20)},
    "more tensors than any model has": {"runs": [[1 << 16, "float32", 1, 1]], "payload": bytes(64 << 16)},
}


@pytest.mark.parametrize("what", COSTLY)
def test_headers_made_to_be_costly_cost_little(what: str) -> None:
    """Whoever puts records over a network chooses what is in their headers."""
    record = Record(np.frombuffer(remade(SOUND, **COSTLY[what]), np.uint8))
    tracemalloc.start()
    try:
        with pytest.raises(Unreadable, match=DAMAGED) as fault:
            record.head  # noqa: B018  # reading it is what is tried
        assert tracemalloc.get_traced_memory()[1] < 3 * record.nbytes + (1 << 20)
    finally:
        tracemalloc.stop()
    assert len(str(fault.value)) < 1000


def test_as_many_tokens_as_a_prompt_may_have() -> None:
    """Behind a long context a record is one as any other; behind more than the wire bears it is none."""
    assert format_.MOST_TOKENS == MAX_TOKENS
    for start in (1_000_000, MAX_TOKENS):
        s = Segment(S.ids, np.arange(start, dtype=np.int32), "model", "t")
        kv = SegmentKV(KV.keys, KV.values, start, start + len(S.ids))
        assert Record(Record.of(s, kv).data).verify(s.key).segment.start == start
    context = np.zeros(MAX_TOKENS + 1, "<i4").tobytes()
    with pytest.raises(Unreadable, match=DAMAGED):
        Record(np.frombuffer(remade(SOUND, context=context, kv_length=1 << 30), np.uint8)).head  # noqa: B018  # as above
