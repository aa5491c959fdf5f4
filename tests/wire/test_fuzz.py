"""The wire under fire: tens of thousands of frames here, a million by `make fuzz`. What is done to it is in `fuzz.py`."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from kvcomm.wire import protocol as p
from kvcomm.wire.client import ServerStore
from tests.wire import fuzz
from tests.wire.conftest import equal, kv_of, segment

pytestmark = pytest.mark.once

FUZZ = [sys.executable, str(Path(fuzz.__file__))]
MEMORY = 6 * p.MAX_PAYLOAD  # bytes that one frame may cost: received, copied, fed to the parser, and what is parsed


def counted(said: str) -> int:
    """Frames, as the fuzzer counts them."""
    found = re.search(r"([\d,]+) frames", said)
    assert found, said
    return int(found[1].replace(",", ""))


@pytest.fixture
def served(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A server in a process of its own, at `s`."""
    with subprocess.Popen(
        [*FUZZ, "serve", str(folder / "s")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        yield server
        server.kill()
        server.communicate()


def peak(process: int) -> int:
    """Bytes of memory that it has had at most."""
    (line,) = (line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def test_steered_by_coverage() -> None:
    """Every input as a payload, a reply, a prefix and a conversation; libFuzzer watches time and memory."""
    done = subprocess.run([*FUZZ, "decode", "--frames", "20000"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert counted(done.stdout) >= 20_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of another process's memory is read from /proc")
def test_a_server_under_attack_serves_others(served: subprocess.Popen[str], folder: Path) -> None:
    """A healthy client gets what it put, byte by byte, as long as the attack lasts; the server is one process throughout, and
    no frame costs it more than a small multiple of its size.
    """
    store = ServerStore(f"unix:{folder / 's'}", deadline_s=fuzz.SLOWEST)
    kept = [segment(50, seed=seed) for seed in range(4)]
    for s in kept:
        assert store.put(s, kv_of(s))
    before, calls = peak(served.pid), 0
    attack = [*FUZZ, "attack", str(folder / "s"), "--frames", "3000"]
    with subprocess.Popen(attack, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as attacker:
        while attacker.poll() is None:
            s = kept[calls % 4]
            found = store.get(s.key)
            assert found is not None
            assert equal(found, kv_of(s))
            looked = store.index.look(s.ids, fingerprint="f")
            assert [m.segment.key for m in looked.matches] == [s.key]
            assert looked.flight is not None
            store.index.land(looked.flight)
            calls += 1
        assert attacker.stdout is not None
        said = attacker.stdout.read()
    assert attacker.returncode == 0, said
    assert counted(said) >= 3000
    assert calls > 10
    assert served.poll() is None
    status, _ = store.call("", p.Stats())
    assert status["pid"] == served.pid
    assert status["counters"]["malformed"] > 1000
    assert status["tiers"]["memory"]["faults"] == {}
    assert peak(served.pid) - before < MEMORY
    store.close()


@pytest.mark.parametrize("what", fuzz.large())
def test_the_largest_frames_cost_little(what: str) -> None:
    payload = fuzz.large()[what]
    tracemalloc.start()
    try:
        began = monotonic()
        assert fuzz.malformed(payload)
        assert monotonic() - began < fuzz.SLOWEST
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
