"""Prompts as token ids: tokenised off the event loop, bounded before the work is done."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from dynmerge.engines.engine import Engine, Sampling
from dynmerge.errors import PromptTooLong, RequestError
from dynmerge_server.openai.requests import ChatRequest, CompletionRequest, GenerationRequest
from dynmerge_server.openai.templates import Conversation, render

WORKERS = 2  # tokenisers at once: the engine needs the other cores
# A text of more bytes is not tokenised, which takes seconds and tens of bytes of memory for each:
# this many bytes for each token of the context, far beyond what prose, code or blanks come to.
BYTES_PER_TOKEN = 16
LEAST_MAX_BYTES = 1 << 20

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; `text` is what it was before, where it was text."""

    ids: tuple[int, ...]
    text: str | None = None


class Prompts:
    """Makes prompts for one engine's model."""

    def __init__(self, engine: Engine, most: int) -> None:
        self.tokenizer = engine.tokenizer
        self.context = engine.context_length
        self._vocabulary = engine.vocabulary_size
        self._most = most
        self._most_bytes = max(LEAST_MAX_BYTES, BYTES_PER_TOKEN * self.context)
        self._longest = longest_token(engine.tokenizer)
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        normalizer = getattr(backend, "normalizer", None)
        self._normal: Callable[[str], str] | None = normalizer and normalizer.normalize_str
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="dynmerge-prompts")

    async def off_loop(self, work: Callable[[], Result]) -> Result:
        """`work` done in one of the few threads kept for prompts."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def chat(self, request: ChatRequest, conversation: Conversation) -> Prompt:
        """The prompt of a conversation. Raises RequestError or PromptTooLong."""

        def work() -> Prompt:
            text = render(self.tokenizer, conversation)
            return self._cut(self._bounded(text, request.add_special_tokens, request), request)

        return await self.off_loop(work)

    async def completion(self, request: CompletionRequest) -> list[Prompt]:
        """The prompts of a completion request. Raises RequestError or PromptTooLong."""
        given = self._listed(request.prompt)
        # One at a time: between them others get a thread.
        return [await self.off_loop(partial(self._made, prompt, request)) for prompt in given]

    def encode(self, text: str, special: bool) -> list[int]:
        """The token ids of a text, with the special tokens the tokenizer adds if `special`.

        Raises PromptTooLong for a text that is too large to be tokenised.
        """
        self._size(text)
        return self._tokenised(text, special)

    def render(self, conversation: Conversation, special: bool) -> list[int]:
        """The token ids of a conversation in the model's chat template.

        Raises RequestError where the template objects, and as `encode` does.
        """
        return self.encode(render(self.tokenizer, conversation), special)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens and all. Raises RequestError if one is none."""
        self._check(ids, "tokens")
        return str(self.tokenizer.decode(list(ids)))

    def fit(self, prompt: Prompt, sampling: Sampling, max_tokens: int | None) -> Sampling:
        """`sampling` for this prompt; `max_tokens` None is all the room. Raises PromptTooLong."""
        room = self.context - len(prompt.ids)
        if room < (1 if max_tokens is None else max_tokens):
            raise self._too_long(f"contains {len(prompt.ids)} input tokens", max_tokens or 0)
        filled = room if max_tokens is None else max_tokens
        if sampling.min_tokens > filled:
            raise RequestError(
                f"min_tokens must be less than or equal to max_tokens={filled}, "
                f"got {sampling.min_tokens}."
            )
        return replace(sampling, max_tokens=filled)

    def _listed(self, given: str | Sequence[object] | None) -> list[str | tuple[int, ...]]:
        """A request's one or several prompts, as texts or ids."""
        if not given:
            raise RequestError("The prompt must be provided and non-empty.", "prompt")
        if isinstance(given, str):
            return [given]
        if isinstance(given[0], int):
            return [tuple(given)]  # type: ignore[arg-type]
        if len(given) > self._most:
            message = f"{len(given)} prompts: this exceeds the maximum of {self._most}"
            raise RequestError(message, "prompt")
        if not all(given):
            raise RequestError("Each prompt must be provided and non-empty.", "prompt")
        return [item if isinstance(item, str) else tuple(item) for item in given]  # type: ignore[arg-type]

    def _made(self, given: str | tuple[int, ...], request: CompletionRequest) -> Prompt:
        return self._cut(self._read(given, request), request)

    def _read(self, given: str | tuple[int, ...], request: CompletionRequest) -> Prompt:
        if isinstance(given, str):
            return self._bounded(given, request.add_special_tokens, request)
        self._check(given, "prompt")
        return Prompt(given)

    def _bounded(self, text: str, special: bool, request: GenerationRequest) -> Prompt:
        """`text` tokenised, unless its length alone says that it is too long.

        Even what is to be cut is tokenised whole: part of a text may be other tokens than the
        part of its tokens.
        """
        size = self._size(text)
        if request.truncate_prompt_tokens is None and self._longest is not None:
            if self._normal is not None:
                size = len(self._normal(text).encode())
            at_least = -(-size // self._longest)
            if at_least > self.context:
                raise self._too_long(f"contains at least {at_least} input tokens")
        ids = self._tokenised(text, special)
        if not ids:
            raise RequestError("The prompt must be non-empty: it holds no token.", "prompt")
        return Prompt(tuple(ids), text)

    def _cut(self, prompt: Prompt, request: GenerationRequest) -> Prompt:
        most = request.truncate_prompt_tokens
        if most is None:
            return prompt
        if most == -1:
            most = self.context - 1
        if not 1 <= most <= self.context:
            raise RequestError(
                f"truncate_prompt_tokens value ({most}) must lie within 1 .. max_model_len "
                f"({self.context}), or be -1",
                "truncate_prompt_tokens",
            )
        ids = prompt.ids[:most] if request.truncation_side == "right" else prompt.ids[-most:]
        return prompt if ids == prompt.ids else Prompt(ids)

    def _tokenised(self, text: str, special: bool) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=special)]

    def _size(self, text: str) -> int:
        """Its bytes in UTF-8. Raises PromptTooLong for more than are tokenised."""
        size = len(text.encode())
        if size > self._most_bytes:
            reason = f"your prompt is {size} bytes, of which at most {self._most_bytes} are read"
            raise self._refusal(reason)
        return size

    def _check(self, ids: Sequence[int], param: str) -> None:
        for token in ids:
            if not 0 <= token < self._vocabulary:
                raise RequestError(f"Token id {token} is out of vocabulary", param)

    def _too_long(self, contains: str, wanted: int = 0) -> PromptTooLong:
        return self._refusal(f"you requested {wanted} output tokens and your prompt {contains}")

    def _refusal(self, reason: str) -> PromptTooLong:
        # LiteLLM recognises this sentence, up to "However".
        return PromptTooLong(
            f"This model's maximum context length is {self.context} tokens. However, {reason}. "
            "Please reduce the length of the input prompt or the number of requested output "
            "tokens.",
            "input_tokens",
        )


def longest_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most UTF-8 bytes that one token can stand for; None where no such bound is certain.

    It is certain for a BPE that can say every byte: it drops no character of the normalised text.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    vocabulary = tokenizer.get_vocab()
    # How byte level writes the bytes 0, space and line feed.
    byte_level = all(chr(code) in vocabulary for code in (0x100, 0x120, 0x10A))
    says_all = byte_level or getattr(model, "byte_fallback", False)
    if not says_all or type(model).__name__ != "BPE":
        return None
    return max(len(token.encode()) for token in vocabulary)
