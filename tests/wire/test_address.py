"""Addresses: what is written is read, and what is none is refused with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.errors import InputError
from kvcomm.wire.address import Address, default_path


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/run/kv.sock", Address(path=Path("/run/kv.sock"))),
        ("unix:/run/kv.sock", Address(path=Path("/run/kv.sock"))),
        ("tcp://10.0.0.1:70", Address(host="10.0.0.1", port=70)),
        ("tls://host.example:7000", Address(host="host.example", port=7000, tls=True)),
        ("tls://[::1]:7000", Address(host="::1", port=7000, tls=True)),
        ("tls://host:7000/", Address(host="host", port=7000, tls=True)),
    ],
)
def test_is_read_and_written(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    ["", "kv.sock", "unix:kv.sock", "http://host:1", "tcp://host", "tcp://:70", "tcp://host:0", "tcp://host:99999", "tcp://host:x",
     "tls://host:1/path", "tcp://[::1:70", "unix://run/kv.sock"],
)  # fmt: skip
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="write") as refusal:
        Address.parse(text)
    assert repr(text) in str(refusal.value)


def test_a_path_that_no_system_takes_is_refused() -> None:
    Address.parse("/" + "a" * 99)
    with pytest.raises(InputError, match="100 bytes"):
        Address.parse("/" + "a" * 100)
    with pytest.raises(InputError, match="100 bytes"):
        Address.parse("/" + "\N{EURO SIGN}" * 40)  # 120 bytes


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = Address.parse(text)
    except InputError:
        return
    assert (address.path is None) != (address.port == 0)
    assert Address.parse(str(address)) == address


def test_the_users_own_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_path() == tmp_path / "kvcomm.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_path().is_absolute()
