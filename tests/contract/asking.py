"""Ways to ask a running server for what it would always answer the same, and to read replies."""

from typing import Any

import httpx

from tests.server.asking import CHAT, CHAT_PATH, COMPLETION, COMPLETION_PATH, events, text_of

HEADER = "X-Dynmerge-Preference"
PRESET_HEADER = "X-Dynmerge-Preset"
METHOD_HEADER = "X-Dynmerge-Method"

ASKED_OF_ALL = "ada=0.5, bob=0.3, dee=0.2"  # what every method is asked for

GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}


async def reply_to(
    client: httpx.AsyncClient,
    headers: dict[str, str] | list[tuple[str, str]] | None = None,
    path: str = CHAT_PATH,
    **more: Any,
) -> httpx.Response:
    """The reply to a greedy request that must succeed."""
    body = {**(CHAT if path == CHAT_PATH else COMPLETION), **GREEDY, **more}
    reply = await client.post(path, json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply


async def say(
    client: httpx.AsyncClient, headers: dict[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    """The body of the reply to a greedy chat request."""
    return (await reply_to(client, headers, **more)).json()  # type: ignore[no-any-return]


async def complete(client: httpx.AsyncClient, **more: Any) -> dict[str, Any]:
    """The body of the reply to a greedy completion request."""
    reply = await reply_to(client, path=COMPLETION_PATH, **more)
    return reply.json()  # type: ignore[no-any-return]


async def chunks_of(client: httpx.AsyncClient, **more: Any) -> list[dict[str, Any]]:
    """The chunks of a greedy stream."""
    return events(await reply_to(client, stream=True, **more))


def said(reply: dict[str, Any]) -> str:
    """The text of a reply's only choice."""
    (choice,) = reply["choices"]
    return text_of(choice)


def merge_of(reply: dict[str, Any]) -> str:
    """The digest of the merge that a reply came from."""
    return str(reply["dynmerge"]["merge_id"])
