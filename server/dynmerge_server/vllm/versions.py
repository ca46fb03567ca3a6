"""Versions: which version of the bank is served, and the switch to another while requests run.

The folder's `bank.json` is the commit point for everybody: whoever writes it, every API process
notices, lets the workers load what it names, and offers that once all of them have it. Requests
keep the recipe they came with, which names its version.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from dynmerge.bank.manifest import NAME
from dynmerge.bank.outline import Outline
from dynmerge.bank.storage import read_manifest
from dynmerge.errors import BankError, DynmergeError
from dynmerge_server.vllm.served import Served
from dynmerge_server.vllm.workers import Workers

LOOK_EVERY = 1.0  # seconds
AGAIN_AFTER = 30.0  # seconds

logger = logging.getLogger("dynmerge.server")

Stamp = tuple[int, int] | None


class Versions:
    """The version in `served`. `switching` is the digest of one on its way, `failure` why the last
    attempt ended.
    """

    def __init__(
        self,
        folder: Path,
        workers: Workers,
        offer: Callable[[Outline], Served],
        client: int = 0,
        forget: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Serve the bank in `folder`; `offer` says how, `client` is this API process.

        `forget` is told of each version that requests name no more.

        Raises BankError or ConfigError.
        """
        self.folder = folder
        self.offer = offer
        self._workers = workers
        self._client = client
        self._forget = forget
        self._known: set[str] = set()
        self._stamp = self._look()
        self.served = offer(self._on_disk())
        self.switching: str | None = None
        self.failure: str | None = None
        self._again = 0.0
        self._users: Counter[str] = Counter()
        self._one_at_a_time = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def outline(self) -> Outline:
        """The bank that is served."""
        return self.served.offer.outline

    async def open(self) -> None:
        """Have the workers load what is served, and watch the folder from now on.

        Raises workers.Failed.
        """
        await self._hold()
        await self._workers.until_ready("dynmerge_load", str(self.folder), self.outline.digest)
        self._begin(self._watch())

    async def reload(self) -> None:
        """Serve the bank on disk. Raises BankError, and the old one stays."""
        # Shielded: who asked may leave, the switch goes on.
        await asyncio.shield(self._begin(self._switch()))

    def enter(self, digest: str) -> None:
        """A request begins whose merge is of this version: the workers keep it until `leave`."""
        self._users[digest] += 1

    def leave(self, digest: str) -> None:
        """It ended."""
        self._users[digest] -= 1
        if not self._users[digest]:
            del self._users[digest]
            if digest != self.outline.digest:
                self._begin(self._hold())

    def close(self) -> None:
        """Watch no more."""
        for task in self._tasks:
            task.cancel()

    def _begin(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.warning("dynmerge: %s", error)

    async def _watch(self) -> None:
        """Switch when somebody else wrote the folder; an idle process lets old versions go too."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            if self._look() != self._stamp or self._is_behind():
                try:
                    await self.reload()
                except Exception as error:  # whatever it was, the next look may go better
                    self._again = time.monotonic() + AGAIN_AFTER
                    logger.warning("the bank on disk is not served: %s", error)

    def _is_behind(self) -> bool:
        """Whether the last attempt failed long enough ago to try again."""
        return self.failure is not None and time.monotonic() >= self._again

    async def _switch(self) -> None:
        async with self._one_at_a_time:
            self._stamp = self._look()
            try:
                await self._switch_to(await asyncio.to_thread(self._on_disk))
                self.failure = None
            except DynmergeError as error:
                self.failure = str(error).replace(str(self.folder), "the bank")
                raise BankError(self.failure) from error
            finally:
                self.switching = None
                await self._hold()

    async def _switch_to(self, outline: Outline) -> None:
        if outline.digest == self.outline.digest:
            return
        if outline.base.fingerprint != self.outline.base.fingerprint:
            raise BankError(f"the bank on disk is for another base model, {outline.base.name}")
        served = self.offer(outline)
        self.switching = outline.digest
        await self._hold()
        await self._workers.until_ready("dynmerge_load", str(self.folder), outline.digest)
        self.served = served

    async def _hold(self) -> None:
        """Tell the workers which versions requests may name; they may free the others."""
        digests = {self.outline.digest, *self._users}
        if self.switching is not None:
            digests.add(self.switching)
        for digest in self._known - digests:
            self._forget(digest)
        self._known = digests
        await self._workers.ask("dynmerge_hold", self._client, sorted(digests))

    def _on_disk(self) -> Outline:
        return Outline.of_manifest(read_manifest(self.folder))

    def _look(self) -> Stamp:
        try:
            found = (self.folder / NAME).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino
