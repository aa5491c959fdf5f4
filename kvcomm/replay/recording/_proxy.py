"""The pass-through: an HTTP server whose every answer is the upstream's.

Paths, headers and bodies go both ways as they are, pieces of a stream as they come. Only headers about the connection itself
are not passed on (RFC 9110, 7.6.1), and `Host` is the upstream's. Copies of the bodies of model calls are read after the
answer has ended, in a thread of their own. The one module that needs aiohttp.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, hdrs, web
from aiohttp.typedefs import RawHeaders
from multidict import CIMultiDict
from yarl import URL

from kvcomm.replay.recording.exchange import Exchange, is_call
from kvcomm.replay.recording.recorder import Recorder

__all__ = ["serve"]

HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect", "host"}
)
ADDED = (hdrs.CONTENT_TYPE, hdrs.DATE, hdrs.SERVER)  # by the server library where the upstream sent none
IDLE_S = 2.0  # connections to the upstream are kept for less long than servers keep theirs
LINE = 1 << 16  # bytes of one header
BACKLOG = 256 << 20  # bytes of bodies that wait to be written; calls beyond it are lost to the record
GRACE_S = 2.0  # for answers under way when the recorder is stopped


async def serve(
    upstream: str,
    recorder: Recorder,
    *,
    host: str,
    port: int,
    session: str,
    session_header: str | None,
    stop: asyncio.Event,
    ready: Callable[[int], None],
) -> None:
    """Forward until `stop` is set; `ready` is told the port. Every call is written when this returns. Raises OSError."""
    # A server may hang up on a connection just as it is used again, and a request that a model may have seen is not sent twice.
    once = upstream.startswith("http:")  # without encryption a new connection costs next to nothing
    connector = TCPConnector(limit=0, force_close=True) if once else TCPConnector(limit=0, keepalive_timeout=IDLE_S)
    async with ClientSession(
        connector=connector,
        cookie_jar=DummyCookieJar(),
        timeout=ClientTimeout(total=None, sock_connect=None),
        auto_decompress=False,
        skip_auto_headers=(hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE, hdrs.USER_AGENT),
        max_line_size=LINE,
        max_field_size=LINE,
    ) as client:
        proxy = _Proxy(upstream, client, recorder, session, session_header)
        app = web.Application(client_max_size=0)
        app.router.add_route("*", "/{path:.*}", proxy.forward)
        app.on_response_prepare.append(_only_theirs)
        runner = web.AppRunner(
            app,
            access_log=None,
            auto_decompress=False,
            handler_cancellation=True,
            max_field_size=LINE,
            max_line_size=LINE,
            shutdown_timeout=GRACE_S,
        )
        await runner.setup()
        try:
            site = web.TCPSite(runner, host, port)
            await site.start()
            ready(runner.addresses[0][1])
            await stop.wait()
            proxy.stopping = True
        finally:
            await runner.cleanup()
            await proxy.finish()


class _Proxy:
    def __init__(
        self, upstream: str, client: ClientSession, recorder: Recorder, session: str, session_header: str | None
    ) -> None:
        self.upstream, self.client, self.recorder = upstream, client, recorder
        self.session, self.session_header = session, session_header
        place = urlsplit(upstream)
        self.via = None if proxy_bypass(place.hostname or "") else getproxies().get(place.scheme)
        self.stopping = False
        self._thread = ThreadPoolExecutor(1, "recorder")  # one: calls are written in the order in which they end
        self._waiting: set[asyncio.Future[None]] = set()
        self._waiting_bytes = 0

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """One request and its answer."""
        exchange = Exchange(
            upstream=self.upstream,
            path=request.raw_path,
            headers={name.lower(): value for name, value in request.headers.items()},
            started_ns=time.time_ns(),
        )
        try:
            return await self._answer(request, exchange)
        except asyncio.CancelledError:
            exchange.error = "recorder_stopped" if self.stopping else "client_disconnected"
            raise
        finally:
            exchange.ended_ns = time.time_ns()
            if is_call(request.method, exchange.path):
                self._keep(exchange)

    async def finish(self) -> None:
        """Until everything is written."""
        await asyncio.gather(*self._waiting)
        self._thread.shutdown()

    async def _answer(self, request: web.Request, exchange: Exchange) -> web.StreamResponse:
        if not exchange.path.startswith("/"):
            return _error(400, f"the request is for {exchange.path}; kvcomm record forwards paths, and is no general proxy")
        call = is_call(request.method, exchange.path)
        try:
            async with self.client.request(
                request.method,
                URL(self.upstream + exchange.path, encoded=True),
                headers=_passed_on(request.raw_headers),
                data=_body(request, exchange, copy=call) if request.can_read_body else None,
                allow_redirects=False,
                proxy=self.via,
            ) as answer:
                return await _pass_on(answer, request, exchange, copy=call)
        except (ClientError, OSError, ValueError) as why:  # OSError: time-outs and sockets; ValueError: a path that is none
            _note(exchange, request, "upstream_unreachable", why)
            return _error(502, f"kvcomm record got no answer from {self.upstream}: {exchange.reason}")

    def _keep(self, exchange: Exchange) -> None:
        size = len(exchange.request.data) + len(exchange.answer.data)
        if self._waiting_bytes + size > BACKLOG:
            return self.recorder.lose(f"more than {BACKLOG} bytes wait to be written")
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._thread, self._write, exchange)
        self._waiting.add(future)
        self._waiting_bytes += size

        def done(future: asyncio.Future[None]) -> None:
            self._waiting.discard(future)
            self._waiting_bytes -= size

        future.add_done_callback(done)
        return None

    def _write(self, exchange: Exchange) -> None:
        self.recorder.add(lambda: exchange.records(self.session, self.session_header))


class _Theirs(web.StreamResponse):
    """An answer of the upstream's."""

    def __init__(self, *, status: int, reason: str | None, headers: CIMultiDict[str]) -> None:
        super().__init__(status=status, reason=reason, headers=headers)
        self.missing = [name for name in ADDED if name not in headers]


async def _pass_on(answer: ClientResponse, request: web.Request, exchange: Exchange, *, copy: bool) -> web.StreamResponse:
    exchange.status = answer.status
    exchange.answer_headers = {name.lower(): value for name, value in answer.headers.items()}
    response = _Theirs(status=answer.status, reason=answer.reason, headers=_passed_on(answer.raw_headers))
    try:
        await response.prepare(request)
        async for piece in answer.content.iter_any():
            exchange.first_ns = exchange.first_ns or time.time_ns()
            if copy:
                exchange.answer.add(piece)
            await response.write(piece)
    except (ClientError, OSError) as why:
        _note(exchange, request, "upstream_broke_off", why)
        if request.transport is not None:
            request.transport.close()  # what has come is delivered, and then the client sees the connection end, as we did
    return response


def _note(exchange: Exchange, request: web.Request, error: str, why: Exception) -> None:
    """What kept an answer from ending well: `error`, unless it was the client that went away."""
    gone = request.transport is None or request.transport.is_closing()
    exchange.error = "client_disconnected" if gone else error
    exchange.reason = "" if gone else f"{type(why).__name__}: {why}".rstrip(": ")


async def _body(request: web.Request, exchange: Exchange, *, copy: bool) -> AsyncIterator[bytes]:
    async for piece in request.content.iter_any():
        if copy:
            exchange.request.add(piece)
        yield piece


def _passed_on(raw: RawHeaders) -> CIMultiDict[str]:
    """All headers but those about the connection itself, their names written as they came."""
    headers = CIMultiDict((k.decode("utf-8", "surrogateescape"), v.decode("utf-8", "surrogateescape")) for k, v in raw)
    named = {name.strip().lower() for value in headers.getall(hdrs.CONNECTION, ()) for name in value.split(",")}
    return CIMultiDict((k, v) for k, v in headers.items() if k.lower() not in HOP_BY_HOP | named)


async def _only_theirs(request: web.Request, response: web.StreamResponse) -> None:
    """Takes away what the library is about to add to the upstream's headers."""
    if isinstance(response, _Theirs):
        for name in response.missing:
            response.headers.popall(name, None)


def _error(status: int, text: str) -> web.Response:
    """In the shape that clients of the API read."""
    body = {"error": {"message": text, "type": "kvcomm_record", "param": None, "code": None}}
    return web.Response(status=status, text=json.dumps(body), content_type="application/json")
