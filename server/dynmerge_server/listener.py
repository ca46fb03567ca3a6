"""The listener: uvicorn with the h11 parser, a deadline for requests, and an orderly end.

httptools, uvicorn's other parser, accepts a header of any size and keeps it.
"""

import asyncio
import json
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from dynmerge_server.config import ServerConfig
from dynmerge_server.errors import STATUS_TYPES, body

GRACE = 1.0  # seconds between the middleware's 408 and the end of the connection


class Connection(H11Protocol):
    """One client. Closed when a request is not received in time, idle connections included."""

    def __init__(self, *args: Any, receive_seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receive_seconds = receive_seconds
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for the first request."""
        super().connection_made(transport)
        self._start()

    def data_received(self, data: bytes) -> None:
        """Read on; the deadline ends with the request."""
        self._start()
        super().data_received(data)
        received = self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)
        between = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        if received or between:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, in the error form where an answer can still be sent."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = json.dumps(body(400, msg, STATUS_TYPES[400])).encode()
            headers = [("content-type", "application/json"), ("connection", "close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=content),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _start(self) -> None:
        if self._timer is None:
            seconds = self._receive_seconds + GRACE
            self._timer = self.loop.call_later(seconds, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """Says when it listens, drains on the first signal and stops at once on the second."""

    def __init__(self, config: uvicorn.Config, listening: Callable[[int], None]) -> None:
        super().__init__(config)
        self._listening = listening

    async def startup(self, *args: Any, **kwargs: Any) -> None:
        """Listen, and tell the port."""
        await super().startup(*args, **kwargs)
        if self.started:
            self._listening(self.servers[0].sockets[0].getsockname()[1])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; the second time, cut every connection."""
        if self.should_exit:
            self.force_exit = True
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        self.should_exit = True


def make_server(app: ASGIApp, config: ServerConfig, listening: Callable[[int], None]) -> Server:
    """A server of `app` at the configured address; `listening` is called with the port."""
    limits = config.limits
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=partial(Connection, receive_seconds=limits.receive_seconds),  # type: ignore[arg-type]
        ws="none",
        h11_max_incomplete_event_size=limits.header_bytes,
        timeout_graceful_shutdown=config.drain_seconds,
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        lifespan="off",
    )
    return Server(settings, listening)
