"""Two processes, each with a model of its own, and a server between them: what one has prefilled, the other finds.

Run it: python examples/05_processes.py
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing import get_context
from pathlib import Path

from kvcomm import KVComm
from kvcomm.wire.client import ServerStore

REPORTS = (
    "report about bob : city is oslo . pet is cat . food is rice . the old river waits slowly . "
    "report about carol : city is lima . boss is bob . the small market opens early . color is blue . "
    "report about dan : pet is owl . the busy train moves again . boss is carol . food is soup ."
)
ROLE = "you are the {} , a careful agent of the team . your style is {} . use only what is said below ."
ASK = "questions : {} now write the final answer in the style of your role only ."


@contextmanager
def server(socket: Path) -> Iterator[None]:
    """The server of this machine, as long as the block runs; in earnest a service manager keeps it running."""
    command = [sys.executable, "-m", "kvcomm", "server", "--socket", str(socket), "--memory", "256M", "--quiet"]
    process = subprocess.Popen(command)
    try:
        while not socket.exists():
            if process.poll() is not None:
                sys.exit("the server did not start")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait()


def agent(address: str, role: str, style: str, question: str) -> None:
    """One process: an engine whose store is the server's."""
    messages = [
        {"role": "system", "content": ROLE.format(role, style)},
        {"role": "user", "content": f"{REPORTS} {ASK.format(question)}"},
    ]
    with closing(ServerStore(address)) as store:
        comm = KVComm.from_pretrained(store=store)  # all that is different from one process
        output = comm.generate(messages, agent=role, max_new_tokens=32, do_sample=False)
    report = output.report
    print(f"{role}: {output.text}")
    print(f"  {report.reused_tokens} of {report.prompt_tokens} prompt tokens reused, first token after {output.ttft_ms:.1f} ms")
    for span in report.spans:
        print(f"  [{span.start:3}, {span.end:3})  {span.rung}, computed by the process of {span.producer}", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, server(socket := Path(folder) / "kvcomm.sock"):
        for role, style, question in (("scout", "plain", "city of bob ?"), ("critic", "loud", "food of dan ?")):
            process = get_context("spawn").Process(target=agent, args=(f"unix:{socket}", role, style, question))
            process.start()
            process.join()  # its process ends; what it computed stays
            if process.exitcode:
                sys.exit(f"the process of {role} ended with {process.exitcode}")


if __name__ == "__main__":
    main()
