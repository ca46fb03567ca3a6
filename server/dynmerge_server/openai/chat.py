"""POST /v1/chat/completions."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dynmerge_server.json_body import read_object
from dynmerge_server.openai.asked import Asked, Terms
from dynmerge_server.openai.dialect import Answer
from dynmerge_server.openai.logprobs import Entry, Pieces, chat_shape
from dynmerge_server.openai.prompts import Prompt
from dynmerge_server.openai.replies import Endpoint, respond
from dynmerge_server.openai.requests import ChatRequest
from dynmerge_server.openai.run import Update
from dynmerge_server.openai.sampling import chat_logprobs, chat_max_tokens
from dynmerge_server.openai.templates import Conversation
from dynmerge_server.state import Serving


@dataclass(frozen=True, slots=True)
class ChatDialect:
    """Messages and deltas."""

    pieces: Pieces
    whole_object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"

    def opening(self, asked: Asked, index: int) -> dict[str, Any]:
        """The role, and in vLLM's way an empty content."""
        choice = _choice(index, "delta", {"role": "assistant", "content": ""})
        if asked.return_token_ids and index == 0:
            choice["prompt_token_ids"] = list(asked.prompts[0].ids)
        return choice

    def delta(self, asked: Asked, update: Update) -> dict[str, Any]:
        """The new text."""
        choice = _choice(update.index, "delta", {"content": update.text})
        choice["logprobs"] = self._logprobs(asked, update.entries)
        choice["finish_reason"] = update.finish_reason
        if update.finish_reason is not None:
            choice["stop_reason"] = update.stop_reason
        if asked.return_token_ids:
            choice["token_ids"] = list(update.token_ids)
        return choice

    def choice(self, asked: Asked, answer: Answer) -> dict[str, Any]:
        """The whole message."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = _choice(answer.index, "message", {**message, "tool_calls": []})
        choice["logprobs"] = self._logprobs(asked, answer.entries)
        choice["finish_reason"] = answer.finish_reason
        choice["stop_reason"] = answer.stop_reason
        if asked.return_token_ids:
            choice["token_ids"] = answer.token_ids
        return choice

    def extra(self, asked: Asked) -> dict[str, Any]:
        """The prompt, where it was asked for."""
        prompt = asked.prompts[0]
        extra: dict[str, Any] = {"prompt_logprobs": None}
        if asked.return_token_ids:
            extra["prompt_token_ids"] = list(prompt.ids)
        if asked.prompt_text:
            extra["prompt_text"] = prompt.text
        return extra

    def _logprobs(self, asked: Asked, entries: Sequence[Entry] | None) -> dict[str, Any] | None:
        return None if entries is None else chat_shape(entries, self.pieces, as_ids=asked.as_ids)


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    arrived = time.perf_counter()
    return await chat(request, await read_object(request), arrived)


async def chat(request: Request, body: dict[str, Any], arrived: float) -> Response:
    """Answer a conversation whose body has been read."""
    return await respond(request, body, arrived, CHAT)


def _terms(parts: Serving, wanted: ChatRequest) -> Terms:
    conversation = Conversation.of(wanted)

    async def prompts() -> list[Prompt]:
        return [await parts.prompts.chat(wanted, conversation)]

    return Terms(
        "chatcmpl",
        chat_max_tokens(wanted, parts.prompts.context),
        chat_logprobs(wanted),
        prompts,
        (lambda _prompts: [conversation.last_answer]) if wanted.echo else None,
        bool(wanted.return_prompt_text),
    )


CHAT = Endpoint(ChatRequest, _terms, ChatDialect)


def _choice(index: int, name: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, name: content, "logprobs": None, "finish_reason": None}
