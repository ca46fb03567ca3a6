"""Connection: one client on uvicorn's h11 protocol, with deadlines for both directions."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from dynmerge_server.config import Limits
from dynmerge_server.errors import STATUS_TYPES, body

GRACE = 1.0  # seconds between the last word to a client and the end of its connection


class Connection(H11Protocol):
    """One client. Closed when a request is not received in time, idle connections included, and
    cut when what is sent is not taken in time.
    """

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receiving = _Deadline(self.loop, limits.receive_seconds + GRACE)
        self._sending = _Deadline(self.loop, limits.send_seconds)

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


class _Deadline:
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
