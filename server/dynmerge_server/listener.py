"""The listener: the sockets, and uvicorn with the h11 parser at them, which ends in order.

httptools, uvicorn's other parser, accepts a header of any size and keeps it.
"""

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from dynmerge.errors import ConfigError
from dynmerge_server.config import ServerConfig
from dynmerge_server.connection import GRACE, Connection
from dynmerge_server.drain import Drain

BACKLOG = 2048  # connections that wait to be accepted
ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

logger = logging.getLogger("dynmerge.server")


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
                sockets.append(_listening(address, family))
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


def _listening(address: Any, family: int) -> socket.socket:
    made = socket.create_server(address, family=family, backlog=BACKLOG)
    # Connections inherit it. asyncio sets it only on sockets made with a protocol, and without it
    # the second packet of a reply waits for the client to acknowledge the first: 40 ms.
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((int(family), address) for family, _, _, _, address in found))


def _reason(error: OSError, place: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{place} is in use"
    # create_server adds words of its own to strerror.
    said = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
    return f"cannot listen at {place}: {said}"
