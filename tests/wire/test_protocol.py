"""Frames and requests: what is packed is read back, and any other bytes are Malformed, not something else."""

from __future__ import annotations

import struct
from dataclasses import fields
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.wire import protocol as p

whole = st.integers(0, (1 << 63) - 1)
finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(codec="utf-8"), max_size=50)
key = st.text("0123456789abcdef", min_size=32, max_size=32)
BY_TYPE: dict[str, st.SearchStrategy[Any]] = {
    "bool": st.booleans(),
    "int": whole,
    "float": finite,
    "float | None": st.none() | finite,
    "str": text,
    "bytes": st.binary(max_size=50),
    "list[str]": st.lists(text, max_size=5),
    "list[int]": st.lists(whole, max_size=5),
}
BY_NAME: dict[str, st.SearchStrategy[Any]] = {  # fields whose values must mean something
    "ids": st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=1).map(lambda ids: struct.pack(f"<{len(ids)}i", *ids)),
    "ms_per_token": st.none() | finite.map(abs),
    "ms_per_mib": st.none() | finite.map(abs),
    "wait_ms": finite.map(abs),
    "client": key,
    "key": key,
    "keys": st.lists(key, max_size=5),
    "after": st.just("") | key,
    "nbytes": st.integers(1, p.MAX_BODY),
    "lost": st.lists(st.tuples(whole, whole), max_size=3).map(lambda pairs: [number for pair in pairs for number in pair]),
}


def requests_of(kind: type[p.Request]) -> st.SearchStrategy[p.Request]:
    return st.builds(kind, **{f.name: BY_NAME.get(f.name, BY_TYPE[str(f.type)]) for f in fields(kind)})


requests = st.sampled_from(list(p.REQUESTS.values())).flatmap(requests_of)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | text | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=10,
)


@given(requests)
def test_a_request_is_read_as_it_was_packed(request_: p.Request) -> None:
    payload = p.pack_request(request_)
    assert p.request_of(payload) == request_
    framed = p.frame(payload, 7)
    assert p.lengths(framed[: p.PREFIX.size]) == (len(payload), 7)
    assert framed[p.PREFIX.size :] == payload


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_malformed(data: bytes) -> None:
    for read in (p.request_of, p.reply_of):
        try:
            read(data)
        except p.Malformed as fault:
            assert len(str(fault)) < 500  # noqa: PT017  # one of two outcomes


@given(st.dictionaries(text, anything, max_size=4))
def test_a_reply_is_read_as_it_was_packed(reply: dict[str, Any]) -> None:
    packed = msgpack.packb(reply)
    assert msgpack.packb(p.reply_of(packed)) == packed  # bytes: NaN is not equal to itself


@given(st.data())
def test_a_field_of_another_type_is_malformed(data: st.DataObject) -> None:
    """Beside the hints of the dataclasses, read here by name."""
    request_ = data.draw(requests.filter(lambda r: bool(fields(r))))
    field = data.draw(st.sampled_from(fields(request_)))
    value = data.draw(anything.filter(lambda value: not _fits(str(field.type), value)))
    payload = msgpack.packb({"op": request_.op, **vars(request_), field.name: value})
    with pytest.raises(p.Malformed):
        p.request_of(payload)


def _fits(hint: str, value: object) -> bool:
    kinds: dict[str, tuple[type, ...]] = {
        "bool": (bool,),
        "int": (int,),
        "float": (int, float),
        "float | None": (int, float, type(None)),
        "str": (str,),
        "bytes": (bytes,),
    }
    if hint in kinds:
        return isinstance(value, kinds[hint])
    inner = str if hint == "list[str]" else int
    return isinstance(value, list) and all(isinstance(v, inner) for v in value)


@given(requests, st.data())
def test_fields_are_neither_missing_nor_unknown_nor_said_twice(request_: p.Request, data: st.DataObject) -> None:
    given_fields = {"op": request_.op, **vars(request_)}
    left_out = data.draw(st.sampled_from(sorted(given_fields)))
    without = {name: value for name, value in given_fields.items() if name != left_out}
    unknown = {**given_fields, data.draw(text.filter(lambda name: name not in given_fields)): 0}
    pairs = [msgpack.packb(name) + msgpack.packb(value) for name, value in given_fields.items()]
    twice = bytes([0x80 | len(pairs) + 1]) + b"".join([*pairs, data.draw(st.sampled_from(pairs))])
    for payload in (msgpack.packb(without), msgpack.packb(unknown), twice):
        with pytest.raises(p.Malformed):
            p.request_of(payload)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (p.Find("f", b"abc", None, 0.0, kv=True, ms_per_mib=None), "3 bytes of token ids"),
        (p.Find("f", b"", None, 0.0, kv=True, ms_per_mib=None), "0 bytes of token ids"),
        (p.Find("f", bytes(4 * (p.MAX_TOKENS + 1)), None, 0.0, kv=True, ms_per_mib=None), "8388612 bytes"),
        (p.Find("f", bytes(4), None, -1.0, kv=True, ms_per_mib=None), "negative"),
        (p.Find("f", bytes(4), -1.0, 1.0, kv=True, ms_per_mib=None), "negative"),
        (p.Find("f", bytes(4), float("nan"), 1.0, kv=True, ms_per_mib=None), "ms_per_token is a float"),
        (p.Find("f", bytes(4), None, float("inf"), kv=True, ms_per_mib=None), "wait_ms is a float"),
        (p.Find("f" * 5000, bytes(4), None, 1.0, kv=True, ms_per_mib=None), "fingerprint"),
        (p.Get(["A" * 32]), "is no key"),
        (p.Get(["0" * 32 + "\n"]), "is no key"),
        (p.Get(["0" * 32] * (p.MAX_KEYS + 1)), "a list of 65537"),
        (p.Reserve("0" * 32, 0, None), "0 bytes"),
        (p.Reserve("0" * 32, p.MAX_BODY + 1, None), "bytes"),
        (p.Release([-1], []), "numbers"),
        (p.Release([], [1]), "no pairs"),
        (p.Land(1 << 63), "flight"),
    ],
)
def test_values_that_mean_nothing(wrong: p.Request, says: str) -> None:
    with pytest.raises(p.Malformed, match=says):
        p.request_of(p.pack_request(wrong))


@given(st.binary(min_size=p.PREFIX.size, max_size=p.PREFIX.size), st.integers(0, p.MAX_BODY))
def test_any_prefix_is_within_the_limits_or_malformed(prefix: bytes, most: int) -> None:
    try:
        payload, body = p.lengths(prefix, most)
    except p.Malformed:
        return
    assert prefix.startswith(b"KV\x01\x00")
    assert payload <= p.MAX_PAYLOAD
    assert body <= most


@given(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1))
def test_lengths_up_to_the_limit_are_read(payload: int, body: int) -> None:
    prefix = b"KV\x01\x00" + struct.pack("<IQ", payload, body)
    if payload <= p.MAX_PAYLOAD and body <= p.MAX_BODY:
        assert p.lengths(prefix) == (payload, body)
    else:
        with pytest.raises(p.Malformed, match=f"{payload} \\+ {body}"):
            p.lengths(prefix)


def test_nobody_sends_a_payload_that_nobody_reads() -> None:
    with pytest.raises(p.Malformed, match="16777217"):
        p.frame(bytes(p.MAX_PAYLOAD + 1))
