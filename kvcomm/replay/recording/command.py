"""`kvcomm record`: stands between agents and their model server, passes everything on, and writes every call down."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from kvcomm.errors import InputError
from kvcomm.replay.recording.recorder import Recorder, redaction
from kvcomm.report import document, dumps

__all__ = ["add_arguments", "run"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm record`."""
    parser.add_argument("--upstream", required=True, metavar="URL", help="the base_url that the agents use now")
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="the file that calls are appended to")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)")
    parser.add_argument(
        "--port", type=int, default=8790, metavar="N", help="port to listen at, 0 for a free one (default: 8790)"
    )
    parser.add_argument("--redact", metavar="M:F", help="function of a module that every text passes before it is written")
    parser.add_argument("--session", metavar="NAME", help="session of calls that name none (default: named for the time)")
    parser.add_argument("--session-header", metavar="NAME", help="request header that names the session")


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted or terminated. 1 where calls were lost or are without their text."""
    origin, path = _upstream(args.upstream)
    if not 0 <= args.port < 1 << 16:
        raise InputError(f"--port is {args.port}; it must be 0 to 65535")
    if find_spec("aiohttp") is None:
        raise InputError(f"aiohttp is not installed here; add it with {sys.executable} -m pip install 'kvcomm[record]'")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module beside the caller, as `python -m` finds it
    session = args.session or f"run-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    with Recorder(args.output, redaction(args.redact) if args.redact else None) as recorder:
        asyncio.run(_serve(args, origin, path, session, recorder))
        doc = document(
            "kvcomm.record/1",
            upstream=origin,
            output=args.output,
            session=session,
            calls=recorder.written,
            calls_without_text=recorder.without_text,
            calls_lost=recorder.lost,
            problems=recorder.problems,
        )
    if args.format == "json":
        print(dumps(doc))
    else:
        print(f"{recorder.written} calls written to {args.output}", end="")
        print(f", {recorder.without_text} of them without text; {recorder.lost} lost" if recorder.problems else "")
        for problem, calls in recorder.problems.items():
            print(f"  {calls} x {problem}")
    return 1 if recorder.problems else 0


async def _serve(args: argparse.Namespace, origin: str, path: str, session: str, recorder: Recorder) -> None:
    from kvcomm.replay.recording._proxy import serve

    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def end() -> None:
        stop.set()
        for number in SIGNALS:
            loop.remove_signal_handler(number)  # a second one does not wait

    for number in SIGNALS:
        loop.add_signal_handler(number, end)

    def ready(port: int) -> None:
        host = f"[{args.host}]" if ":" in args.host else args.host
        if not args.quiet:
            say = f"recording to {args.output} until Ctrl-C; in place of {args.upstream} give your agents this base_url:"
            print(f"{say}\n  http://{host}:{port}{path}", file=sys.stderr, flush=True)

    await serve(
        origin,
        recorder,
        host=args.host,
        port=args.port,
        session=session,
        session_header=args.session_header,
        stop=stop,
        ready=ready,
    )


def _upstream(url: str) -> tuple[str, str]:
    """Scheme, host and port, and the path. Raises InputError for what is no base URL."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable or parts.query or parts.fragment or "@" in parts.netloc:
        raise InputError(f"--upstream is {url}; give a base_url such as https://api.example.com/v1, without keys or queries")
    return f"{parts.scheme}://{parts.netloc}", parts.path.rstrip("/")
