"""Workers: the questions that the API process puts to every worker of every engine.

`dynmerge.engines.vllm.control` answers them, on the other side of vLLM's `collective_rpc`.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from dynmerge.errors import DynmergeError, EngineDead

FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.25  # seconds between two questions

Answer = Mapping[str, Any]


class Failed(DynmergeError):
    """A worker could not do what it was asked; the message is its reason."""


class Workers:
    """All workers behind vLLM's engine client."""

    def __init__(self, engine: Any, dead: type[Exception]) -> None:
        """`dead` is what the client raises once the engine is."""
        self._engine = engine
        self._dead = dead

    async def ask(self, question: str, *args: object) -> list[Answer]:
        """Every worker's answer. Raises EngineDead."""
        try:
            return await self._ask(question, args)
        except self._dead:
            raise EngineDead("vLLM's engine stopped") from None

    async def until_ready(self, question: str, *args: object) -> list[Answer]:
        """Ask again until every worker is ready. Raises Failed with the first reason not to be."""
        pause = FIRST_PAUSE
        while True:
            answers = await self.ask(question, *args)
            failed = next((each for each in answers if each["state"] == "failed"), None)
            if failed is not None:
                raise Failed(str(failed.get("reason")))
            if all(each["state"] == "ready" for each in answers):
                return answers
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _ask(self, question: str, args: tuple[object, ...]) -> list[Answer]:
        core = self._engine.engine_core
        engines = getattr(core, "core_engines", ())
        if len(engines) < 2:
            return list(await self._engine.collective_rpc(question, args=args))
        # `collective_rpc` asks all engines but returns what the first one said.
        asked = [
            core._call_utility_async("collective_rpc", question, None, args, None, engine=engine)
            for engine in engines
        ]
        return [answer for answers in await asyncio.gather(*asked) for answer in answers]
