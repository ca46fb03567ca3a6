"""Server-sent events as text: what a stream of the API is made of."""

import json
from typing import Any

EVENT_STREAM = "text/event-stream"
DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"
