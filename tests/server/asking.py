"""Ways to ask a server under test, and to read its streams."""

import json
from typing import Any

import httpx

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
COMPLETION: dict[str, Any] = {"prompt": "hello", "max_tokens": 8}
CHAT_PATH = "/v1/chat/completions"
COMPLETION_PATH = "/v1/completions"


async def chat(
    client: httpx.AsyncClient, headers: dict[str, str] | None = None, **more: Any
) -> Any:
    """The reply to a chat request that must succeed."""
    reply = await client.post(CHAT_PATH, json={**CHAT, **more}, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def complete(client: httpx.AsyncClient, **more: Any) -> Any:
    """The reply to a completion request that must succeed."""
    reply = await client.post(COMPLETION_PATH, json={**COMPLETION, **more})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def refused(
    client: httpx.AsyncClient,
    status: int = 400,
    path: str = CHAT_PATH,
    headers: list[tuple[str, str]] | dict[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The error of a request that must be refused with `status`, in OpenAI's form."""
    body = {**(CHAT if path == CHAT_PATH else COMPLETION), **more}
    reply = await client.post(path, json=body, headers=headers)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["code"] == status
    assert set(error) >= {"message", "type", "param", "code"}
    return error  # type: ignore[no-any-return]


def events(reply: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in reply.text.split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


async def stream(
    client: httpx.AsyncClient, path: str = CHAT_PATH, **more: Any
) -> list[dict[str, Any]]:
    """The chunks of a streamed request that must succeed."""
    body = {**(CHAT if path == CHAT_PATH else COMPLETION), "stream": True, **more}
    reply = await client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return events(reply)


def text_of(choice: dict[str, Any]) -> str:
    """A choice's text, whatever its shape."""
    if "text" in choice:
        return str(choice["text"])
    return str((choice.get("message") or choice["delta"]).get("content") or "")
