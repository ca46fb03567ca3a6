"""Drain: pure ASGI around the application that ends what is in flight when the server must stop.

Knows nothing of signals and sockets: `listener.py` says when.
"""

from http import HTTPStatus

import anyio
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynmerge.errors import Overloaded
from dynmerge_server.errors import RETRY_AFTER, describe
from dynmerge_server.sse import DONE, EVENT_STREAM, event


class Drain:
    """Every request in flight, each in a scope of its own that can be cancelled."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._in_flight: set[_Exchange] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on. If it is ended meanwhile, tell its client in the error form."""
        exchange = _Exchange(send)
        self._in_flight.add(exchange)
        try:
            with exchange.scope:
                await self.app(scope, receive, exchange.send)
        finally:
            self._in_flight.discard(exchange)
        if exchange.scope.cancelled_caught:
            await exchange.tell(scope, receive)

    def end(self) -> int:
        """End all that can still be told so; how many these are."""
        ended = [exchange for exchange in self._in_flight if exchange.can_be_told]
        for exchange in ended:
            exchange.scope.cancel()
        return len(ended)


class _Exchange:
    """One request, and how far its reply has come."""

    def __init__(self, send: Send) -> None:
        self.scope = anyio.CancelScope()
        self._send = send
        self._started = False
        self._complete = False
        self._streams = False

    @property
    def can_be_told(self) -> bool:
        """Whether an error still fits: before the reply, or among a stream's events."""
        return not self._started or (self._streams and not self._complete)

    async def send(self, message: Message) -> None:
        """Send on. A message is sent whole or not at all, so that events stay whole too."""
        await self._send(message)
        if message["type"] == "http.response.start":
            self._started = True
            media = Headers(raw=message.get("headers", [])).get("content-type", "")
            self._streams = media.startswith(EVENT_STREAM)
        else:
            self._complete = not message.get("more_body", False)

    async def tell(self, scope: Scope, receive: Receive) -> None:
        """A 503, or the error as a stream's last event."""
        error = Overloaded("The server is shutting down and could not finish this request.")
        if not self._started:
            headers = {"Retry-After": str(RETRY_AFTER), "Connection": "close"}
            status = HTTPStatus.SERVICE_UNAVAILABLE
            await JSONResponse(describe(error), status, headers)(scope, receive, self._send)
        elif self.can_be_told:
            last = event(describe(error)) + DONE
            await self._send({"type": "http.response.body", "body": last, "more_body": False})
