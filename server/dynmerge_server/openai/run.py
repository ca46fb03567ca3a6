"""Run: one request in the engine, from the lease on its merge to its last token; and its end,
however it ends.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

from dynmerge.engines.engine import Chunk, FinishReason
from dynmerge.errors import DynmergeError
from dynmerge.runtime import Lease
from dynmerge_server.applied import Applied
from dynmerge_server.errors import LEFT, status_of
from dynmerge_server.experiments.trial import Trial, begin
from dynmerge_server.openai.asked import Asked
from dynmerge_server.openai.logprobs import Aligner, Entry
from dynmerge_server.state import Serving

Source = Callable[[], AsyncIterator[Chunk]]


@dataclass(frozen=True, slots=True)
class Update:
    """What is new in one sequence. `entries` is None where no log probabilities were asked for."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    entries: tuple[Entry, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    first: bool = False  # to be told of its sequence


class Interleaved:
    """Several streams of chunks as one, at most `at_once` of them running."""

    def __init__(self, sources: Sequence[Source], at_once: int) -> None:
        self._slots = asyncio.Semaphore(at_once)
        self._arrived: asyncio.Queue[tuple[int, Chunk] | asyncio.Task[None]] = asyncio.Queue()
        self._tasks = {
            asyncio.create_task(self._pump(index, source)) for index, source in enumerate(sources)
        }
        self._running = len(self._tasks)
        for task in self._tasks:
            task.add_done_callback(self._arrived.put_nowait)

    async def next(self) -> tuple[int, Chunk] | None:
        """The next chunk and its stream's number, None after the last. Raises what one raised."""
        while self._running:
            item = await self._arrived.get()
            if isinstance(item, tuple):
                return item
            self._running -= 1
            item.result()
        return None

    async def close(self) -> None:
        """Cancel what still runs, and wait until it has let go."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pump(self, index: int, source: Source) -> None:
        # The engine's protocol promises that the iterator can be closed.
        async with self._slots, aclosing(cast(AsyncGenerator[Chunk, None], source())) as chunks:
            async for chunk in chunks:
                self._arrived.put_nowait((index, chunk))


class Run:
    """`async with Run(...) as run` returns once the first chunk is there, so that a full queue, a
    dead engine or a merge that failed is an error before anything is sent.
    """

    def __init__(self, serving: Serving, asked: Asked) -> None:
        self.asked = asked
        self._serving = serving
        self._lease: Lease | None = None
        self._chunks: Interleaved | None = None
        self._first: tuple[int, Chunk] | None = None
        self._counts = [0] * asked.count
        self._last = [0.0] * asked.count
        self._aligners = [self._aligner(index) for index in range(asked.count)]
        self._timings: dict[str, float] = {}
        self._open = False
        self._trial: Trial | None = None
        self._reasons: list[FinishReason] = []
        self._empty = True
        self._failure: BaseException | None = None
        self.open_sequences = asked.count

    async def __aenter__(self) -> "Run":
        self._serving.metrics.in_flight += 1
        self._open = True
        try:
            await self._start()
        except BaseException as error:
            self.fail(error)
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.fail(error)
        await self.close()

    def fail(self, error: BaseException) -> None:
        """Say what ended it, where its end is not its last token."""
        self._failure = error

    async def close(self) -> None:
        """Cancel the sequences and give the merge back, unless that has been done."""
        if not self._open:
            return
        self._open = False
        self._serving.metrics.in_flight -= 1
        chunks, self._chunks = self._chunks, None
        try:
            if chunks is not None:
                await chunks.close()
        finally:
            if self._lease is not None:
                self._lease.release()
            self._tell()

    @property
    def applied(self) -> Applied:
        """Which merge runs."""
        assert self._lease is not None
        return Applied.of(self._lease, self.asked.resolved)

    def headers(self) -> dict[str, str]:
        """The reply's headers, as far as is known when the first token is there."""
        return {**self.applied.headers(self._timings), "X-Request-Id": self.asked.request_id}

    def usage(self) -> dict[str, Any]:
        """OpenAI's token counts so far; a prompt counts once, however many answers it gets."""
        prompt = sum(len(prompt.ids) for prompt in self.asked.prompts)
        completion = sum(self._counts)
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": None,
        }

    async def updates(self) -> AsyncIterator[Update]:
        """Everything that is generated, as it comes."""
        assert self._chunks is not None
        item = self._first
        while item is not None:
            yield self._update(*item)
            item = await self._chunks.next()

    async def _start(self) -> None:
        asked, metrics = self.asked, self._serving.metrics
        queued = time.perf_counter() - asked.arrived
        experiments = self._serving.experiments
        if experiments is not None:
            self._trial = begin(experiments.log, asked.resolved, asked.request_id, asked.arrived)
        self._lease = await self._serving.runtime.lease(asked.recipe)
        sizes = [len(prompt.ids) for prompt in asked.prompts]
        metrics.began(asked.resolved.source, asked.n, sizes, asked.samplings[0].max_tokens, queued)
        submitted = time.perf_counter()
        at_once = self._serving.config.limits.sequences
        sources = [self._source(index) for index in range(asked.count)]
        self._chunks = Interleaved(sources, at_once)
        self._first = await self._chunks.next()
        now = time.perf_counter()
        if self._trial:
            self._trial.first_token()
        metrics.first_token(now - asked.arrived, now - submitted)
        merging = self._lease.seconds
        self._timings = {"queue": queued, "merge": merging, "prefill": now - submitted}

    def _tell(self) -> None:
        """Tell the log how it ended."""
        if self._trial is None:
            return
        whole = not self.open_sequences
        status = status_of(self._failure) if self._failure else 200 if whole else LEFT
        usage = self.usage()
        self._trial.end(
            status,
            cache=self._lease.outcome if self._lease else None,
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            reasons=self._reasons,
            empty=self._empty if whole else None,
        )

    def _source(self, index: int) -> Source:
        assert self._lease is not None
        generation = self.asked.generation(index, self._lease.merge)
        if generation.sampling.max_tokens == 0:
            return _nothing
        return lambda: self._serving.runtime.generate(generation)

    def _aligner(self, index: int) -> Aligner | None:
        chosen = self.asked.samplings[index // self.asked.n]
        if chosen.logprobs is None:
            return None
        tokenizer = self._serving.prompts.tokenizer
        return Aligner(tokenizer, self.asked.prompt(index).ids, chosen.skip_special_tokens)

    def _update(self, index: int, chunk: Chunk) -> Update:
        self._measure(index, chunk)
        if chunk.finish_reason == "error":
            raise DynmergeError("the engine failed on one sequence")
        last = chunk.finish_reason is not None
        aligner = self._aligners[index]
        entries = tuple(aligner.add(chunk.tokens, chunk.text, last=last)) if aligner else None
        ids = tuple(token.id for token in chunk.tokens)
        return Update(index, chunk.text, ids, entries, chunk.finish_reason, chunk.stop_reason)

    def _measure(self, index: int, chunk: Chunk) -> None:
        metrics, count, now = self._serving.metrics, len(chunk.tokens), time.perf_counter()
        metrics.tokens(count, now - self._last[index] if self._counts[index] else None)
        self._counts[index] += count
        self._last[index] = now
        self._empty = self._empty and not chunk.text.strip()
        if chunk.finish_reason is not None:
            self._reasons.append(chunk.finish_reason)
            self.open_sequences -= 1
            metrics.finished(chunk.finish_reason, self._counts[index], now - self.asked.arrived)


async def _nothing() -> AsyncIterator[Chunk]:
    """A sequence of no tokens: `echo` with `max_tokens` 0."""
    yield Chunk("", (), "length")
