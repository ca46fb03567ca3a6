"""POST /invocations, SageMaker's one endpoint: the body says which of the two it means."""

import time

from starlette.requests import Request
from starlette.responses import Response

from dynmerge_server.errors import SchemaError
from dynmerge_server.json_body import read_object
from dynmerge_server.openai.chat import chat
from dynmerge_server.openai.completions import complete


async def invocations(request: Request) -> Response:
    """A conversation if there are messages, else a completion."""
    arrived = time.perf_counter()
    body = await read_object(request)
    if "messages" in body:
        return await chat(request, body, arrived)
    if "prompt" in body:
        return await complete(request, body, arrived)
    raise SchemaError("The body has neither messages nor a prompt", "body")
