"""What every test lives in: no network beyond this machine, one compute thread, and a way to find the checkout.

The suite runs in two places: in the checkout, and from a copy of tests/ and examples/ against an installed wheel. Tests that
need files of the repository itself take the fixture `checkout`.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar

import pytest

# Before torch or transformers is imported, here and in the subprocesses of tests.
os.environ.update(
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    LANGCHAIN_TRACING_V2="false",
    LANGSMITH_TRACING="false",
    MKL_NUM_THREADS="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_OFFLINE="1",
)
for _name in [name for name in os.environ if name.startswith("KVCOMM_") and name != "KVCOMM_TEST_CHECKOUT"]:
    del os.environ[_name]  # a developer's settings must not change what is tested


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a skipped test is a failed one: all that tests need is here")


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)


R = TypeVar("R", pytest.TestReport, pytest.CollectReport)


def _ran(report: R, config: pytest.Config) -> R:
    """Under --no-skips, a failure in place of a skip."""
    if report.skipped and config.getoption("--no-skips") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"--no-skips: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _ran((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _ran((yield), collector.config)


class NetworkBlockedError(OSError):
    """A test tried to leave this machine."""


def _refuse_remote(address: object) -> None:
    """Raise unless `address` is a Unix socket's path or a loopback (host, port)."""
    if not isinstance(address, tuple):
        return
    host = address[0]
    if host in ("", "localhost"):
        return
    try:
        remote = not ipaddress.ip_address(host).is_loopback
    except ValueError:
        remote = True
    if remote:
        raise NetworkBlockedError(f"tests have no network; this one wanted {host!r}")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets reach loopback and Unix sockets only, and names other than localhost are not looked up."""
    connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        _refuse_remote(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        _refuse_remote(address)
        return connect_ex(self, address)

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host is not None:
            _refuse_remote((host.decode() if isinstance(host, bytes) else host,))
        return lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_lookup)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The repository's root: the folder above tests/, or KVCOMM_TEST_CHECKOUT when the suite runs from a copy."""
    root = Path(os.environ.get("KVCOMM_TEST_CHECKOUT") or Path(__file__).parents[1]).resolve()
    assert (root / "setup.cfg").is_file(), f"{root} is not the checkout; set KVCOMM_TEST_CHECKOUT to its root"
    return root
