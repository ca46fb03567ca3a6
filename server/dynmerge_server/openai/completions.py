"""POST /v1/completions."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from dynmerge_server.json_body import read_object
from dynmerge_server.openai.asked import Asked, Terms
from dynmerge_server.openai.dialect import Answer
from dynmerge_server.openai.logprobs import Entry, Pieces, completion_shape
from dynmerge_server.openai.prompts import Prompt
from dynmerge_server.openai.replies import Endpoint, respond
from dynmerge_server.openai.requests import CompletionRequest
from dynmerge_server.openai.run import Update
from dynmerge_server.openai.sampling import completion_logprobs, completion_max_tokens
from dynmerge_server.state import Serving


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
        """The new text; in vLLM's way the first one of a sequence brings its prompt."""
        choice = self._choice(asked, update, list(update.token_ids))
        return {**choice, **self._prompt(asked, update)} if update.first else choice

    def choice(self, asked: Asked, answer: Answer) -> dict[str, Any]:
        """The whole text."""
        choice = self._choice(asked, answer, answer.token_ids)
        return {**choice, "prompt_logprobs": None, **self._prompt(asked, answer)}

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

    def _prompt(self, asked: Asked, news: Update | Answer) -> dict[str, Any]:
        ids = asked.prompt(news.index).ids
        return {"prompt_token_ids": list(ids)} if asked.return_token_ids else {}

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
    return await respond(request, body, arrived, COMPLETION)


def _terms(parts: Serving, wanted: CompletionRequest) -> Terms:
    def echo(prompts: Sequence[Prompt]) -> list[str]:
        return [prompt.text or parts.prompts.decode(prompt.ids) for prompt in prompts]

    return Terms(
        "cmpl",
        completion_max_tokens(wanted, parts.prompts.context),
        completion_logprobs(wanted),
        lambda: parts.prompts.completion(wanted),
        echo if wanted.echo else None,
    )


COMPLETION = Endpoint(CompletionRequest, _terms, CompletionDialect)
