"""The listener: uvicorn with the h11 parser, deadlines for both directions, and an orderly end.

httptools, uvicorn's other parser, accepts a header of any size and keeps it.
"""

import asyncio
import errno
import json
import logging
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from dynmerge.errors import ConfigError
from dynmerge_server.config import Limits, ServerConfig
from dynmerge_server.drain import Drain
from dynmerge_server.errors import STATUS_TYPES, body

GRACE = 1.0  # seconds between the last word to a client and the end of its connection
BACKLOG = 2048  # connections that wait to be accepted
ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

logger = logging.getLogger("dynmerge.server")


class Deadline:
    """Something that must happen in time, or else `late` is called."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def start(self, late: Callable[[], object]) -> None:
        """Wait from now on, unless it waits already."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, late)

    def stop(self) -> None:
        """It happened."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Connection(H11Protocol):
    """One client. Closed when a request is not received in time, idle connections included, and
    cut when what is sent is not taken in time.
    """

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receiving = Deadline(self.loop, limits.receive_seconds + GRACE)
        self._sending = Deadline(self.loop, limits.send_seconds)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for the first request."""
        super().connection_made(transport)
        # Writing is paused by a single byte not taken, so that no rest escapes its deadline.
        transport.set_write_buffer_limits(high=0)
        self._receiving.start(transport.close)

    def data_received(self, data: bytes) -> None:
        """Read on; the deadline ends with the request."""
        self._receiving.start(self.transport.close)
        super().data_received(data)
        received = self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)
        between = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        if received or between:
            self._receiving.stop()

    def pause_writing(self) -> None:
        """Give the client its time. Then abort: to close is to wait until it takes the rest."""
        super().pause_writing()
        self._sending.start(self.transport.abort)

    def resume_writing(self) -> None:
        """It took everything."""
        self._sending.stop()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadlines."""
        self._receiving.stop()
        self._sending.stop()
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


class Server(uvicorn.Server):
    """Says when it listens, drains on the first signal and stops at once on the second."""

    def __init__(
        self,
        config: uvicorn.Config,
        drain: Drain,
        drain_seconds: float,
        listening: Callable[[int], None],
    ) -> None:
        super().__init__(config)
        self._drain = drain
        self._drain_seconds = drain_seconds
        self._listening = listening
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer at `sockets`, and tell the port."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._listening(self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let requests finish; when their time is over, tell the clients, then cut the rest."""
        loop = asyncio.get_running_loop()
        timers = [
            loop.call_later(self._drain_seconds, self._end),
            loop.call_later(self._drain_seconds + GRACE, self._cut),
        ]
        try:
            await super().shutdown(sockets)
        finally:
            for timer in timers:
                timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; the second time, cut every connection."""
        if self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._cut)
        self.should_exit = True

    def _end(self) -> None:
        if ended := self._drain.end():
            logger.warning("the time to drain is over: ended %d requests", ended)

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        # Their tasks see that and end by themselves; uvicorn would log those that it cancels.
        asyncio.get_running_loop().call_later(GRACE, self._give_up)

    def _give_up(self) -> None:
        self.force_exit = True


def make_server(app: ASGIApp, config: ServerConfig, listening: Callable[[int], None]) -> Server:
    """A server of `app`, to be run with `listen`'s sockets; `listening` is called with the port."""
    limits = config.limits
    drain = Drain(app)
    settings = uvicorn.Config(
        drain,
        http=partial(Connection, limits=limits),  # type: ignore[arg-type]
        ws="none",
        backlog=BACKLOG,
        h11_max_incomplete_event_size=limits.header_bytes,
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        lifespan="off",
    )
    return Server(settings, drain, config.drain_seconds, listening)


def listen(host: str, port: int) -> list[socket.socket]:
    """A listening socket at each address of `host`; clients queue until a server is run with them.

    Raises ConfigError.
    """
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, address in _addresses(host, port):
            try:
                sockets.append(socket.create_server(address, family=family, backlog=BACKLOG))
            except OSError as error:
                if error.errno not in ABSENT:  # as localhost's ::1 where there is no IPv6
                    raise
                absent = error
        if not sockets and absent is not None:
            raise absent
    except OSError as error:
        close_all(sockets)
        raise ConfigError(_reason(error, shown(host, port))) from None
    return sockets


def close_all(sockets: Sequence[socket.socket]) -> None:
    """Listen no more."""
    for each in sockets:
        each.close()


def shown(host: str, port: int) -> str:
    """An address as in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((int(family), address) for family, _, _, _, address in found))


def _reason(error: OSError, place: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{place} is in use"
    # create_server adds words of its own to strerror.
    said = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
    return f"cannot listen at {place}: {said}"
