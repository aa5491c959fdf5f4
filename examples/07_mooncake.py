"""A team of five agents on two hosts, each agent a process with its own model; the hosts share KV through Mooncake: each
gives a part of its memory, and KV travels from host to host.

Here both hosts are this machine, and the master runs for as long as the example does. On real hosts, one line on each of them:

    kvcomm server --remote mooncake://10.0.0.5:50051?segment=16G

Run it: python examples/07_mooncake.py   (it needs: pip install 'kvcomm[mooncake]', see docs/remote.md)
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from kvcomm import KVComm, Output
from kvcomm.agents.team import Team
from kvcomm.wire.client import ServerStore

HOSTS = {"scout": "a", "analyst": "b", "writer": "a", "critic": "b", "judge": "a"}  # who runs where
REQUEST = {  # a field per slot of the templates in team.yaml
    "input": (
        "report about bob : city is oslo . pet is cat . food is rice . the old river waits slowly . "
        "report about carol : city is lima . boss is bob . the small market opens early . color is blue . "
        "report about dan : pet is owl . the busy train moves again . boss is carol . food is soup . "
        "report about erin : city is rome . color is red . the warm garden rests today . code is 4 2 ."
    ),
    "scout": "note a : city of bob ?",
    "analyst": "note b : food of dan ?",
    "writer": "color of erin ? note a ?",
    "critic": "note c : city of boss of dan ?",
    "judge": "note a ? note c ? pet of bob ?",
}


def engine(address: str, pipe: Connection) -> None:
    """A process: answers the calls of one agent until it is told that there are no more."""
    with closing(ServerStore(address)) as store:
        comm = KVComm.from_pretrained(store=store)
        while (call := pipe.recv()) is not None:
            messages, options = call
            pipe.send(comm.generate(messages, **options))


class Engines:
    """What the team runs on: the call of an agent goes to its process, by its pipe."""

    def __init__(self, pipes: Mapping[str, Connection]) -> None:
        self.pipes = pipes

    def generate(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Output:
        pipe = self.pipes[options["agent"]]
        pipe.send((messages, options))
        output: Output = pipe.recv()
        return output


@contextmanager
def engines(addresses: Mapping[str, str]) -> Iterator[Engines]:
    """One for each agent; `addresses` are those of the servers, by host."""
    spawn, pipes, processes = get_context("spawn"), {}, []
    for name, host in HOSTS.items():
        pipes[name], theirs = spawn.Pipe()
        processes.append(spawn.Process(target=engine, args=(addresses[host], theirs), daemon=True))
        processes[-1].start()
        theirs.close()
    yield Engines(pipes)
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()


@contextmanager
def running(*command: str, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A program, as long as the block runs. What it says goes to `log`."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log.open("w") if log else None)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def wait_for(process: subprocess.Popen[bytes], where: str | tuple[str, int]) -> None:
    """Until it listens at a path, or at a port."""
    for _ in range(1500):
        with socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET) as s:
            if process.poll() is not None:
                sys.exit(f"{process.args!r} ended with {process.returncode}")
            if s.connect_ex(where) == 0:
                return
        time.sleep(0.02)
    sys.exit(f"nothing listens at {where}")


def free_ports() -> tuple[int, int]:
    """Two that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        return one.getsockname()[1], other.getsockname()[1]


def main() -> None:
    program = shutil.which("mooncake_master", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None or find_spec("mooncake") is None:
        sys.exit("this example needs Mooncake: pip install 'kvcomm[mooncake]' (on Linux), and what docs/remote.md says")
    port, metrics = free_ports()

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp"))
        options = ["--rpc_address=127.0.0.1", f"--rpc_port={port}", f"--metrics_port={metrics}", "--metrics_host=127.0.0.1"]
        wait_for(stack.enter_context(running(program, *options, log=Path(folder) / "log")), ("127.0.0.1", port))
        addresses = {}
        for host in ("a", "b"):
            path = str(Path(folder) / host)
            options = ["--socket", path, "--memory", "256M", "--remote", f"mooncake://127.0.0.1:{port}?segment=64M", "--quiet"]
            wait_for(stack.enter_context(running(sys.executable, "-m", "kvcomm", "server", *options)), path)
            addresses[host] = f"unix:{path}"

        team = Team.from_yaml(Path(__file__).with_name("team.yaml"))
        run = team.run(stack.enter_context(engines(addresses)), REQUEST)
        for turn in run.turns:
            report = turn.output.report
            source = ", ".join(f"{p} ({HOSTS[p]})" for p in dict.fromkeys(span.producer for span in report.spans))
            print(f"{turn.agent:8} {turn.output.text}")
            print(
                f"         host {HOSTS[turn.agent]}: {report.reused_tokens} of {report.prompt_tokens} prompt tokens reused",
                end="",
            )
            print(f", computed by {source}" if source else "")
        print(f"\nthe team's answer: {run.answer}")


if __name__ == "__main__":
    main()
