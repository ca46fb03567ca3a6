"""Request: one generation in the engine. The worker thread writes, an event loop reads."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from dynmerge.engines.engine import FinishReason, Generation, Token
from dynmerge.engines.transformers.layers import digest_of
from dynmerge.engines.transformers.sampling import Draw
from dynmerge.errors import RequestError

logger = logging.getLogger(__name__)

_numbers = count()


@dataclass(frozen=True, slots=True)
class News:
    """What happened to a request in one step; the last one has a `reason`."""

    tokens: tuple[Token, ...]
    reason: FinishReason | None = None
    refusal: RequestError | None = None  # why it ended in an error, where the caller can mend it


class Request:
    """A generation, the state of its sampling, and the mailbox of whoever waits for its tokens.

    `id` ends in the merge's digest: the prefix cache knows requests by nothing else.
    """

    def __init__(self, generation: Generation, stop: frozenset[int], draw: Draw) -> None:
        self.generation = generation
        self.stop = stop  # token ids that end it
        self.draw = draw
        self.started = False  # whether it was ever in a batch
        self.failure: Exception | None = None  # of its own, not of the engine
        self.cancelled = False
        self.pending: list[Token] = []  # drawn in this step, not yet posted
        self._loop = asyncio.get_running_loop()
        self._mailbox: asyncio.Queue[News] = asyncio.Queue()
        self.id = f"{next(_numbers)}:{digest_of(generation.merge)}"

    def __deepcopy__(self, memo: object) -> "Request":
        """Itself: the batch processor copies a request's arguments when it preempts it."""
        return self

    def fail(self, reason: Exception) -> News:
        """The end of a request that failed by itself. Logged, but not what the caller wrote."""
        told = type(reason).__name__ if isinstance(reason, RequestError) else reason
        logger.warning("request %s failed: %s", self.id, told)
        self.failure = reason
        return self.failed()

    def failed(self) -> News:
        """The news of a failure."""
        refused = self.failure if isinstance(self.failure, RequestError) else None
        return News((), "error", refused)

    async def news(self) -> News:
        """The next step's outcome."""
        return await self._mailbox.get()

    def finish_reason(self, token: Token) -> FinishReason | None:
        """Whether the token just drawn is the last, and why."""
        if token.id in self.stop:
            return "stop"
        full = len(self.draw.generated) >= self.generation.sampling.max_tokens
        return "length" if full else None

    @classmethod
    def post(cls, letters: Sequence[tuple["Request", News]]) -> list["Request"]:
        """Deliver news, from any thread; return the requests nobody waits for any more."""
        by_loop = defaultdict(list)
        for request, news in letters:
            by_loop[request._loop].append((request, news))
        lost: list[Request] = []
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, deliveries)
            except RuntimeError:  # the loop was closed under its requests
                lost.extend(request for request, _ in deliveries)
        return lost


def _deliver(letters: Sequence[tuple[Request, News]]) -> None:
    for request, news in letters:
        request._mailbox.put_nowait(news)
