"""TransformersEngine: the embedded engine, on a laptop's CPU or one GPU. Implements `Engine`.

One thread runs the model in a continuous batch (`batching`), each request's tokens under its own
merge (`layers`) and sampling (`sampling`); the event loop turns tokens into text (`engines.text`).
"""

import asyncio
import atexit
import threading
import weakref
from collections.abc import AsyncIterator

import torch
from transformers import PreTrainedTokenizerBase

from dynmerge.adapters.base_model import BaseModel
from dynmerge.bank.bank import FactorBank
from dynmerge.bank.storage import check_base
from dynmerge.engines.engine import Chunk, Generation, Load, Sampling, Token
from dynmerge.engines.text import Detokenizer, StopStrings
from dynmerge.engines.transformers.admission import check_choice, check_fits, check_tokens
from dynmerge.engines.transformers.config import EngineConfig
from dynmerge.engines.transformers.grammar import Grammars
from dynmerge.engines.transformers.layers import Layers, digest_of
from dynmerge.engines.transformers.model import LoadedModel, load_base_model
from dynmerge.engines.transformers.request import News, Request
from dynmerge.engines.transformers.sampling import Draw
from dynmerge.engines.transformers.selftest import start_worker
from dynmerge.engines.transformers.worker import Worker
from dynmerge.errors import DynmergeError, EngineDead, Overloaded


class TransformersEngine:
    """Runs one base model with one bank's skills, many requests at once, through transformers."""

    def __init__(self, base: LoadedModel, bank: FactorBank, config: EngineConfig) -> None:
        """Take over an already loaded model: it gets hooks, and its weights are never written.

        Raises BankError when the bank does not fit the model and EngineDead when nothing runs it.
        """
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._base = base
        self._bank = bank.digest
        self._config = config
        self._eos = base.eos
        self._grammars = Grammars(base.tokenizer, base.vocabulary, self._eos)
        self._layers = Layers(base.model, bank, config.max_batch)
        self._lock = threading.Lock()  # held while the worker is being restarted
        self._closed = False
        self._fruitless = 0  # restarts since a request was last served
        self._worker: Worker
        try:
            self._worker, self._context = start_worker(base, bank, self._layers, config)
        except BaseException:
            self._layers.remove()
            raise
        atexit.register(_close, weakref.ref(self))

    @classmethod
    def from_base(
        cls, base: BaseModel, bank: FactorBank, config: EngineConfig | None = None
    ) -> "TransformersEngine":
        """Load the base model of `bank` and start serving.

        Raises BaseModelError for a model that cannot be served and BankError for another one.
        """
        config = config or EngineConfig()
        check_base(bank, base.fingerprint)
        return cls(load_base_model(base.folder, config), bank, config)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's."""
        return self._base.tokenizer

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together: what the model and the cache can hold."""
        return self._context

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this."""
        return self._base.vocabulary

    @property
    def dtype(self) -> torch.dtype:
        """What merges must be cast to."""
        return self._layers.dtype

    @property
    def device(self) -> torch.device:
        """Where merges must be."""
        return self._layers.device

    def check(self, generation: Generation) -> None:
        """Raise RequestError or PromptTooLong for what can never run, Overloaded for now."""
        self._check_runnable(generation)
        if generation.sampling.grammar is not None:
            self._grammars.check(generation.sampling.grammar)
        self._check_room()

    async def generate(self, generation: Generation) -> AsyncIterator[Chunk]:
        """Queue and stream one sequence; the first step may raise Overloaded or EngineDead.

        Any step may raise RequestError, when its sampling comes to allow no token.
        Closing the iterator cancels the request and frees its blocks.
        """
        self._check_runnable(generation)
        self._check_room()
        request = await self._request(generation)
        answer = _Answer(self.tokenizer, request)
        await self._submit(request)
        try:
            while True:
                news = await request.news()
                if news.refusal is not None:
                    raise news.refusal
                chunk = answer.push(news)
                if chunk.finish_reason not in ("error", "abort"):
                    self._fruitless = 0
                if chunk.finish_reason is not None:
                    self._worker.cancel(request)
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            self._worker.cancel(request)

    def load(self) -> Load:
        """How busy it is."""
        return self._worker.load()

    def healthy(self) -> bool:
        """Whether requests are served; if not, and it may help, a restart begins meanwhile."""
        if self._worker.alive():
            return True
        if not self._closed and not self._fruitless and not self._lock.locked():
            threading.Thread(target=self._revive, daemon=True).start()
        return False

    def close(self) -> None:
        """Stop at once; what is running ends with "abort". The model is left without hooks."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._worker.stop()
            self._layers.remove()

    def _check_runnable(self, generation: Generation) -> None:
        check_tokens(generation, self.vocabulary_size)
        check_choice(generation.sampling, self._stop(generation.sampling))
        check_fits(generation, self._context)
        merge = generation.merge
        if digest_of(merge) and merge is not None and merge.recipe.bank != self._bank:
            raise DynmergeError(f"the merge {merge.recipe.digest} is of another bank")

    def _check_room(self) -> None:
        if self._worker.load().waiting >= self._config.max_queue:
            raise Overloaded(f"{self._config.max_queue} requests are waiting already")

    def _stop(self, sampling: Sampling) -> frozenset[int]:
        eos = frozenset[int]() if sampling.ignore_eos else self._eos
        return eos | frozenset(sampling.stop_token_ids)

    async def _request(self, generation: Generation) -> Request:
        sampling = generation.sampling
        stop, grammar = self._stop(sampling), sampling.grammar
        # `check` has compiled it, but it may have been forgotten since.
        matcher = None
        if grammar is not None:
            matcher = await asyncio.to_thread(self._grammars.matcher, grammar)
        return Request(generation, stop, Draw(sampling, generation.prompt, stop, matcher))

    async def _submit(self, request: Request) -> None:
        if self._worker.submit(request):
            return
        await asyncio.to_thread(self._revive)
        if not self._worker.submit(request):
            raise EngineDead("the engine stopped and could not be restarted")

    def _revive(self) -> None:
        """Restart a dead worker, once: it must serve a request before it may die again."""
        with self._lock:
            if self._closed or self._worker.alive() or self._fruitless:
                return
            self._fruitless += 1
            self._worker.start()


class _Answer:
    """Turns one request's news into chunks of text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, request: Request) -> None:
        sampling = request.generation.sampling
        self._request = request
        self._sampling = sampling
        self._text = Detokenizer(
            tokenizer, request.generation.prompt, skip_special_tokens=sampling.skip_special_tokens
        )
        self._stop = StopStrings(sampling.stop, include=sampling.include_stop_str_in_output)
        self._count = 0

    def push(self, news: News) -> Chunk:
        """The chunk that follows; after one with a `finish_reason` there are no more."""
        shown = ""
        for index, token in enumerate(news.tokens):
            text, stop = self._read(token)
            shown += text
            if stop is not None:
                return Chunk(shown, news.tokens[: index + 1], "stop", stop)
        if news.reason is None:
            return Chunk(shown, news.tokens)
        rest, stop = self._stop.push(self._text.finish())
        shown += rest
        if stop is not None:
            return Chunk(shown, news.tokens, "stop", stop)
        return Chunk(shown + self._stop.finish(), news.tokens, news.reason, self._stop_id(news))

    def _read(self, token: Token) -> tuple[str, str | None]:
        self._count += 1
        if token.id in self._request.stop and not self._sampling.include_stop_str_in_output:
            return "", None
        text = self._text.push(token.id)
        if self._count < self._sampling.min_tokens:
            return text, None
        return self._stop.push(text)

    def _stop_id(self, news: News) -> int | None:
        if news.reason != "stop" or news.tokens[-1].id not in self._sampling.stop_token_ids:
            return None
        return news.tokens[-1].id


def _close(reference: "weakref.ref[TransformersEngine]") -> None:
    engine = reference()
    if engine is not None:
        engine.close()
