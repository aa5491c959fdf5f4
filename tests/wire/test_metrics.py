"""What a server tells Prometheus, read by a parser written from the format's description; and the HTTP it is served over."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.errors import InputError
from kvcomm.store.base import StoreStats
from kvcomm.store.slabs import SlabStore
from kvcomm.wire import metrics
from kvcomm.wire.anchor_log import AnchorLog
from kvcomm.wire.library import Library
from kvcomm.wire.metrics import Responder, render
from kvcomm.wire.server import Server, ServerCounters

Sample = tuple[str, frozenset[tuple[str, str]]]


def parsed(text: str) -> tuple[dict[Sample, float], dict[str, str]]:
    """Samples and types of the text format 0.0.4, read a character at a time as the format's description says; strict."""
    assert text.endswith("\n")
    samples: dict[Sample, float] = {}
    types: dict[str, str] = {}
    helped, current = set(), ""
    for line in text[:-1].split("\n"):
        if line.startswith("#"):
            _, word, name, rest = line.split(" ", 3)
            assert rest
            if word == "HELP":
                assert name not in helped, "families are together, each once"
                helped.add(name)
                current = name
            else:
                assert (word, name) == ("TYPE", current)
                assert rest in ("counter", "gauge")
                types[name] = rest
            continue
        name = re.match(r"[a-zA-Z_:][a-zA-Z0-9_:]*", line)[0]  # type: ignore[index]  # no match fails the test as well
        assert name == current
        assert types[name] == ("counter" if name.endswith("_total") else "gauge")
        at, labels = len(name), []
        if line[at] == "{":
            at += 1
            while line[at] != "}":
                end = line.index("=", at)
                label, at = line[at:end], end + 2
                assert line[end + 1] == '"'
                assert re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", label)
                value = ""
                while line[at] != '"':
                    if line[at] == "\\":
                        at += 1
                        value += {"\\": "\\", '"': '"', "n": "\n"}[line[at]]
                    else:
                        value += line[at]
                    at += 1
                labels.append((label, value))
                at += 1
                at += line[at] == ","
            at += 1
        assert line[at] == " "
        key = (name, frozenset(labels))
        assert key not in samples
        samples[key] = float(line[at + 1 :])
    assert helped == types.keys()
    return samples, types


def sample(name: str, **labels: str) -> Sample:
    return f"kvcomm_server_{name}", frozenset(labels.items())


@pytest.fixture
def server() -> Server:
    return Server(Library(SlabStore(1 << 20)))


def test_every_number_of_a_status_is_told(server: Server) -> None:
    """Counters and gauges get numbers that occur nowhere else, and each is found again under its name."""
    numbers = iter(range(1001, 2000))
    for field in fields(ServerCounters):
        if field.name != "requests":
            setattr(server.counters, field.name, next(numbers))
    server.counters.requests.update({"find": next(numbers), "put": next(numbers)})
    status = server.status()
    gauges = [name for name, value in status.items() if type(value) is int and name != "pid"]
    status |= {name: next(numbers) for name in gauges}
    tier = StoreStats(
        next(numbers),
        next(numbers),
        next(numbers),
        next(numbers),
        next(numbers),
        next(numbers),
        {"in-use": next(numbers)},
        {"damaged": next(numbers)},
    )
    status["tiers"] = {"memory": vars(tier), "disk": vars(StoreStats(1, 2, 3))}
    anchors = {**vars(AnchorLog().stats()), **{name: next(numbers) for name in ("anchors", "nbytes", "limit_bytes", "added")}}
    status["anchors"] = {**anchors, "refused": {"duplicate": next(numbers)}, "faults": {"disk": next(numbers)}}
    told, _ = parsed(render(status))
    assert sorted(v for v in told.values() if v >= 1001) == list(range(1001, next(numbers)))
    counters = server.counters
    assert told[sample("requests_total", op="find")] == counters.requests["find"]
    assert told[sample("connections_made_total")] == counters.connections
    assert told[sample("handed_out_bytes_total")] == counters.handed_out_bytes
    assert told[sample("connections")] == status["connections"]
    assert told[sample("uptime_seconds")] == status["uptime_s"]
    assert told[sample("tier_bytes", tier="memory")] == tier.nbytes
    assert told[sample("tier_limit_bytes", tier="disk")] == 3
    assert told[sample("tier_refused_total", tier="memory", reason="in-use")] == tier.refused["in-use"]
    assert told[sample("tier_faults_total", tier="memory", reason="damaged")] == tier.faults["damaged"]
    assert told[sample("anchors")] == status["anchors"]["anchors"]
    assert told[sample("anchors_refused_total", reason="duplicate")] == status["anchors"]["refused"]["duplicate"]


def test_a_new_server_has_every_family(server: Server) -> None:
    busy = server.status()
    busy["tiers"]["memory"] |= {"refused": {"x": 1}, "faults": {"y": 1}}
    assert parsed(render(server.status()))[1] == parsed(render(busy))[1]


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 1 << 53)), st.text())
def test_any_reason_can_be_read_again(reasons: dict[str, int], version: str) -> None:
    tier = {**vars(StoreStats(0, 0, 0)), "faults": reasons}
    version = version.encode(errors="ignore").decode()
    told, _ = parsed(render({"kvcomm": version, "counters": {}, "tiers": {"memory": tier}}))
    faults = {dict(labels)["reason"]: n for (name, labels), n in told.items() if name == "kvcomm_server_tier_faults_total"}
    assert faults == reasons
    assert told[sample("info", version=version)] == 1


def test_the_documentation_names_every_metric_and_reason(server: Server, checkout: Path) -> None:
    """Those of `render`, and the constants of the modules that count reasons."""
    text = (checkout / "docs" / "server.md").read_text("utf-8")
    status = server.status() | {"anchors": vars(AnchorLog().stats())}
    for name in parsed(render(status))[1]:
        assert re.search(rf"`{name.removeprefix('kvcomm_server_')}[`{{]", text), name
    said = re.compile(r'^[A-Z_]+ = "([a-z-]+)"  # .*(?:why|reason|lost|refused|kept|read|raised|finished|failed)', re.MULTILINE)
    found = 0
    for path in (*(checkout / "kvcomm/store").glob("*.py"), *(checkout / "kvcomm/wire").glob("*.py")):
        for reason in said.findall(path.read_text("utf-8")):
            assert f"`{reason}`" in text, f"{reason} of {path.name}"
            found += 1
    assert found > 20


# -- HTTP -------------------------------------------------------------------------------------------------------------


async def exchange(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


def served(
    talk: Callable[[int], Awaitable[Any]], status: Callable[[], Mapping[str, Any]] = lambda: STATUS, host: str = "127.0.0.1"
) -> Any:
    async def main() -> Any:
        async def told() -> Mapping[str, Any]:
            return status()

        responder = Responder(told)
        port = await responder.listen(host, 0)
        try:
            return await talk(port)
        finally:
            await responder.close()

    return asyncio.run(main())


STATUS: dict[str, Any] = {"kvcomm": "1", "counters": {"malformed": 7}, "tiers": {}}


@pytest.mark.parametrize(
    ("request_", "code", "said"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"200 OK", render(STATUS).encode()),
        (b"GET /metrics?a=b HTTP/1.0\r\n\r\n", b"200 OK", render(STATUS).encode()),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", b"200 OK", b"ok\n"),
        (b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n", b"200 OK", b""),
        (b"GET / HTTP/1.1\r\n\r\n", b"404 Not Found", None),
        (b"GET /metrics/../etc HTTP/1.1\r\n\r\n", b"404 Not Found", None),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 2\r\n\r\nxx", b"405 Method Not Allowed", None),
        (b"GET /metrics HTTP/2\r\n\r\n", b"400 Bad Request", None),
        (b"GET /metrics\r\n\r\n", b"400 Bad Request", None),
        (b"\x16\x03\x01\xff\r\n\r\n", b"400 Bad Request", None),
        (b"GET /" + b"x" * 7000 + b" HTTP/1.1\r\nA: " + b"y" * 3000 + b"\r\n\r\n", b"400 Bad Request", None),
    ],
)  # fmt: skip
def test_responses(request_: bytes, code: bytes, said: bytes | None) -> None:
    answer = served(lambda port: exchange(port, request_))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + code + b"\r\n")
    length = int(re.search(rb"Content-Length: (\d+)", head)[1])  # type: ignore[index]  # no match fails the test as well
    assert len(body) == (0 if request_.startswith(b"HEAD") else length)
    assert said is None or body == said
    if said == render(STATUS).encode():
        assert b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n" in head


def test_a_status_that_fails_costs_one_request(caplog: pytest.LogCaptureFixture) -> None:
    async def talk(port: int) -> list[bytes]:
        return [await exchange(port, f"GET {path} HTTP/1.1\r\n\r\n".encode()) for path in ("/metrics", "/healthz")]

    first, second = served(talk, status=dict)
    assert first.startswith(b"HTTP/1.1 500 ")
    assert second.startswith(b"HTTP/1.1 200 ")
    assert "metrics cannot be told" in caplog.text


def test_who_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PATIENCE", 0.05)
    assert served(lambda port: exchange(port, b"GET /metrics HT")) == b""


def test_many_at_once_and_then_others_again() -> None:
    async def talk(port: int) -> bytes:
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(metrics.CONNECTIONS)]
        for _, writer in held:
            writer.write(b"GET")
        while (answer := await over(port)) != b"":  # until the server has seen them all
            assert answer.startswith(b"HTTP/1.1 200 ")
        for reader, writer in held:
            writer.close()
            await reader.read()
        while (answer := await over(port)) == b"":
            pass
        return answer

    async def over(port: int) -> bytes:
        try:
            return await exchange(port, b"GET /healthz HTTP/1.1\r\n\r\n")
        except ConnectionResetError:
            return b""

    assert served(talk).startswith(b"HTTP/1.1 200 ")


def test_closing_waits_for_nobody() -> None:
    async def main() -> bytes:
        responder = Responder(lambda: asyncio.sleep(0, STATUS))
        port = await responder.listen("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET")
        await exchange(port, b"GET /healthz HTTP/1.1\r\n\r\n")  # answered: so the other one is being read
        await asyncio.wait_for(responder.close(), 2)
        try:
            return await reader.read()
        finally:
            writer.close()

    assert asyncio.run(main()) == b""


def test_a_port_that_is_taken() -> None:
    async def talk(port: int) -> None:
        with pytest.raises(InputError, match="--metrics-port"):
            await Responder(lambda: asyncio.sleep(0, STATUS)).listen("127.0.0.1", port)
        with pytest.raises(InputError, match="--metrics-port"):
            await Responder(lambda: asyncio.sleep(0, STATUS)).listen("127.0.0.1", 1 << 20)

    served(talk)
