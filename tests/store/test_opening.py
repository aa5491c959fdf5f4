"""Stores by their names: what is made of each form, sizes against plain arithmetic, and what is said of all others."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.errors import InputError
from kvcomm.store.disk import DiskStore
from kvcomm.store.guarded import Guarded
from kvcomm.store.mooncake import MooncakeStore
from kvcomm.store.opening import FORMS, nbytes_of, open_remote, open_store
from kvcomm.store.record import Record
from kvcomm.store.redis import RedisStore
from kvcomm.store.slabs import SlabStore

if TYPE_CHECKING:
    from tests.services import MooncakeMaster, RedisServer

Made = Callable[..., Record]


@given(st.integers(0, 10**6), st.sampled_from(["", "K", "M", "G", "T"]), st.sampled_from(["", "B", "iB", "b"]))
def test_sizes(n: int, unit: str, end: str) -> None:
    expected = n * 1024 ** " KMGT".index(unit or " ")
    assert nbytes_of(f"{n}{unit}{end}") == nbytes_of(f" {n} {unit.lower()}{end} ") == expected


def test_fractions_of_sizes() -> None:
    assert [nbytes_of(text) for text in ("1.5G", "0.25K", "0.5T")] == [3 << 29, 256, 1 << 39]


@pytest.mark.parametrize("text", ["", "G", "-1G", "4X", "1e9", "4 G G", "0x10", "1,5G", "inf", "1_000", "٤G", "4GiBs"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InputError, match="no size") as caught:
        nbytes_of(text)
    assert repr(text) in str(caught.value)


def test_memory_and_disk(tmp_path: Path, record: Made) -> None:
    a = record(0)
    with closing(open_store("memory:64M")) as memory:
        assert isinstance(memory, SlabStore)
        assert memory.limit_bytes == 64 << 20
    folder = tmp_path / "kept here"
    with closing(open_store(f"disk:{folder}?bytes=1M")) as disk:
        assert isinstance(disk, DiskStore)
        assert disk.stats().limit_bytes == 1 << 20
        assert disk.put_record(a)
    with closing(open_store(f"disk:{folder}?bytes=1M")) as again:
        assert again.has([a.key]) == {a.key}


@pytest.mark.parametrize("scheme", ["redis", "valkey"])
def test_redis(redis_server: RedisServer, record: Made, scheme: str) -> None:
    a = record(0)
    url = redis_server.url.replace("redis", scheme)
    text = f"{url}?namespace={scheme}&ttl=77&timeout=3&chunk=1K&deadline=9&db=2"
    with closing(open_store(text)) as store:
        assert isinstance(store, Guarded)
        assert (store.name, store.deadline_s) == ("redis", 9.0)
        assert isinstance(store.inner, RedisStore)
        assert store.put_record(a)
        assert store.get_records([a.key])[a.key].data.tobytes() == a.data.tobytes()
        redis = store.inner._client.redis
        assert redis.connection_pool.connection_kwargs["db"] == 2
        assert redis.connection_pool.connection_kwargs["socket_timeout"] == 3
        keys = set(redis.keys(f"kvcomm:1:{scheme}:*"))
        assert len(keys) == -(-a.nbytes // 1024)
        assert all(0 < redis.ttl(key) <= 77 for key in keys)


def test_mooncake(mooncake_master: MooncakeMaster, record: Made) -> None:
    a = record(0)
    text = f"{mooncake_master.url}?segment=16M&namespace=x&timeout=10&deadline=11&host=127.0.0.1"
    with closing(open_remote(text)) as store:
        assert (store.name, store.deadline_s) == ("mooncake", 11.0)
        assert isinstance(store.inner, MooncakeStore)
        assert store.put_record(a)
        assert store.get_records([a.key])[a.key].data.tobytes() == a.data.tobytes()
        store.put_notes({"ab": b"1"})
        assert store.get_notes(["ab"]) == {"ab": b"1"}
        assert store.stats().limit_bytes == 16 << 20


@pytest.mark.parametrize("text", ["", "redis", "http://host", "Memory:4G", "s3://bucket", "/path", "rediss"])
def test_no_stores(text: str) -> None:
    with pytest.raises(InputError, match=re.escape(FORMS)) as caught:
        open_store(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("memory:", "'' is no size"),
        ("memory:lots", "'lots' is no size"),
        ("disk:/path", r"disk:/path\?bytes=20G"),
        ("disk:?bytes=1G", r"disk:/path\?bytes=20G"),
        ("disk:/path?bytes=much", "bytes='much'.*no size"),
        ("disk:/path?byte=1G", "option 'byte'; there are bytes"),
        ("redis://host?", "question mark"),
        ("redis://host?ttl=day", "ttl='day'"),
        ("redis://host?ttl=0", "ttl_s 0"),
        ("redis://host?timeout=nan", "timeout='nan'.*above 0"),
        ("redis://host?deadline=-1", "deadline='-1'.*above 0"),
        ("redis://host?chunk=1", "chunk_bytes is 1"),
        ("redis://host?socket_timeout=9", "'socket_timeout'"),
        ("redis://host:port", "redis://host:port"),
        ("mooncake://host", "'host'; host:port"),
        ("mooncake://host:1?segments=1G", "'segments'; there are segment"),
        ("mooncake://host:1?segment=-1", "segment='-1'.*no size"),
    ],
)
def test_unusable_options(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        open_store(text)


@pytest.mark.parametrize("text", ["memory:4G", "disk:/path?bytes=1G", "host:6379", ""])
def test_remote_only(text: str) -> None:
    with pytest.raises(InputError, match="no store on another machine; there are redis://"):
        open_remote(text)


@pytest.mark.parametrize("text", ["redis://u:hush@host:1x", "postgres://u:hush@host", "redis://u:hush@host?x=1&password=hush"])
def test_passwords_are_not_told(text: str) -> None:
    with pytest.raises(InputError) as caught:
        open_store(text)
    assert "hush" not in str(caught.value)
    assert "host" in str(caught.value)


@pytest.mark.parametrize(
    ("module", "text", "command"),
    [
        ("redis", "redis://host", "pip install 'kvcomm[redis]'"),
        ("mooncake", "mooncake://host:1", "pip install 'kvcomm[mooncake]'"),
    ],
)
def test_a_missing_package_is_named(module: str, text: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=re.escape(command)):
        open_store(text)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcomm.store.mooncake.LIBRARIES", ("libc.so.6", "libnowhere.so.1"))
    with pytest.raises(InputError, match=re.escape("needs libnowhere.so.1: as root, apt-get install -y libibverbs1")):
        open_store("mooncake://host:1")


def test_opening_loads_no_client() -> None:
    """Of the services; only what is opened is imported."""
    code = "import sys, kvcomm.store.opening; print(sorted({'redis', 'mooncake'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[]\n", done.stderr
