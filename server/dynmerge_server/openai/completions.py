"""POST /v1/completions."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dynmerge_server.json_body import read_object, validate
from dynmerge_server.openai.asked import Asked, Terms, ask
from dynmerge_server.openai.dialect import Answer
from dynmerge_server.openai.fields import check_fields
from dynmerge_server.openai.logprobs import Entry, Pieces, completion_shape
from dynmerge_server.openai.replies import answer
from dynmerge_server.openai.requests import CompletionRequest
from dynmerge_server.openai.run import Update
from dynmerge_server.openai.sampling import completion_logprobs, completion_max_tokens
from dynmerge_server.state import serving


@dataclass(frozen=True, slots=True)
class CompletionDialect:
    """Plain text; a stream's chunks have the same object as the whole."""

    pieces: Pieces
    whole_object: str = "text_completion"
    chunk_object: str = "text_completion"

    def opening(self, _asked: Asked, _index: int) -> dict[str, Any] | None:
        """Nothing: a completion has no role."""
        return None

    def delta(self, asked: Asked, update: Update) -> dict[str, Any]:
        """The new text."""
        return self._choice(asked, update, list(update.token_ids))

    def choice(self, asked: Asked, answer: Answer) -> dict[str, Any]:
        """The whole text."""
        choice = self._choice(asked, answer, answer.token_ids)
        choice["prompt_logprobs"] = None
        if asked.return_token_ids:
            choice["prompt_token_ids"] = list(asked.prompt(answer.index).ids)
        return choice

    def extra(self, _asked: Asked) -> dict[str, Any]:
        """Nothing: what is asked for stands in the choices."""
        return {}

    def _choice(self, asked: Asked, news: Update | Answer, token_ids: list[int]) -> dict[str, Any]:
        choice = {
            "index": news.index,
            "text": news.text,
            "logprobs": self._logprobs(asked, news.entries),
            "finish_reason": news.finish_reason,
            "stop_reason": news.stop_reason,
        }
        return {**choice, "token_ids": token_ids} if asked.return_token_ids else choice

    def _logprobs(self, asked: Asked, entries: Sequence[Entry] | None) -> dict[str, Any] | None:
        if entries is None:
            return None
        return completion_shape(entries, self.pieces, as_ids=asked.as_ids)


async def completions(request: Request) -> Response:
    """Continue one or several texts."""
    arrived = time.perf_counter()
    return await complete(request, await read_object(request), arrived)


async def complete(request: Request, body: dict[str, Any], arrived: float) -> Response:
    """Continue texts whose body has been read."""
    parts = serving(request)
    wanted = validate(CompletionRequest, body)
    check_fields(body, CompletionRequest.model_fields)
    terms = Terms(
        "cmpl",
        completion_max_tokens(wanted, parts.prompts.context),
        completion_logprobs(wanted),
        lambda: parts.prompts.completion(wanted),
    )
    asked = await ask(parts, request.headers, wanted, terms, arrived)
    if wanted.echo:
        texts = [prompt.text or parts.prompts.decode(prompt.ids) for prompt in asked.prompts]
        asked = replace(asked, prefix=tuple(texts))
    return await answer(request, asked, CompletionDialect(parts.pieces))
