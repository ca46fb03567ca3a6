"""Auth: pure ASGI middleware that asks for an API key, except for probes and static files."""

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from dynmerge_server.errors import reply

OPEN_PATHS = ("/health", "/ping", "/version")
OPEN_FOLDERS = ("/playground/",)


class AuthMiddleware:
    """`Authorization: Bearer KEY`, compared in constant time; no keys, no check."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] != "http" or not self.keys or is_open(scope["path"]):
            return await self.app(scope, receive, send)
        if self.allows(dict(scope["headers"]).get(b"authorization", b"")):
            return await self.app(scope, receive, send)
        refusal = reply(401, "Unauthorized: an API key is needed", {"WWW-Authenticate": "Bearer"})
        return await refusal(scope, receive, send)

    def allows(self, authorization: bytes) -> bool:
        """Whether the header holds one of the keys; every key is compared, whatever the outcome."""
        scheme, _, given = authorization.partition(b" ")
        matches = [hmac.compare_digest(given.strip(), key) for key in self.keys]
        return scheme.lower() == b"bearer" and any(matches)


def is_open(path: str) -> bool:
    """Whether `path` is served to everybody."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS) or path == "/playground"
