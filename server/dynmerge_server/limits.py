"""Limits: pure ASGI middleware that refuses requests too large, too slow or of two lengths, unread.

The parser's own bounds are set in `listener.py`; the deadline for headers is in `connection.py`.
"""

import time
from collections.abc import Sequence

import anyio
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynmerge_server.config import Limits
from dynmerge_server.errors import reply

Headers = Sequence[tuple[bytes, bytes]]


class _TooLarge(Exception):
    """The body exceeds its limit."""


class _TooSlow(Exception):
    """The body did not arrive in time."""


class LimitsMiddleware:
    """Bounds headers by number and size, bodies by size and time."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 400, 408, 413 or 431."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif refusal := self._refusal(scope["headers"]):
            await refusal(scope, receive, send)
        else:
            await self._pass_on(scope, receive, send)

    def _refusal(self, headers: Headers) -> Response | None:
        limits = self.limits
        if len(headers) > limits.headers:
            return reply(431, f"{len(headers)} headers; at most {limits.headers} are taken")
        size = sum(len(name) + len(value) + 4 for name, value in headers)
        if size > limits.header_bytes:
            return reply(431, f"{size} bytes of headers; at most {limits.header_bytes} are taken")
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
            # A proxy that believes the other of the two would see another request in the rest.
            message = "Content-Length and Transfer-Encoding cannot both be given"
            return reply(400, message, {"Connection": "close"})
        announced = next((value for name, value in headers if name == b"content-length"), b"0")
        # h11 takes only digits here; int() of an absurd number of them would raise.
        if len(announced) > 18 or int(announced) > limits.body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> Response:
        return reply(413, f"The body is larger than the {self.limits.body_bytes} bytes taken")

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, self._bounded(receive), send)
        except _TooLarge:
            await self._too_large()(scope, receive, send)
        except _TooSlow:
            message = f"The body did not arrive within {self.limits.receive_seconds:g} seconds"
            await reply(408, message, {"Connection": "close"})(scope, receive, send)

    def _bounded(self, receive: Receive) -> Receive:
        deadline = time.monotonic() + self.limits.receive_seconds
        received = 0
        complete = False

        async def bounded() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            with anyio.move_on_after(max(deadline - time.monotonic(), 0)):
                message = await receive()
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if received > self.limits.body_bytes:
                    raise _TooLarge
                return message
            raise _TooSlow

        return bounded
