"""Hold: one request's grip on its merge, from a place in the engine to the end of the reply."""

import asyncio

from dynmerge.engines.vllm.ticket import ticket
from dynmerge.recipe import Recipe
from dynmerge_server.vllm.residents import Resident, Residents
from dynmerge_server.vllm.versions import Versions
from dynmerge_server.vllm.workers import Workers


class Hold:
    """`outcome` is what Applied calls it. Release it, taken or not, however the request ends."""

    def __init__(
        self, versions: Versions, residents: Residents, workers: Workers, recipe: Recipe
    ) -> None:
        """From now on the workers keep the bank's version that the recipe names."""
        self._versions = versions
        self._residents = residents
        self._workers = workers
        self._recipe = recipe
        self._resident: Resident | None = None
        self.outcome = "stored"
        versions.enter(recipe.bank)

    async def take(self) -> Resident:
        """Wait for a place, and until the workers have the merge where that takes longer.

        Raises Overloaded, EngineDead or workers.Failed.
        """
        resident = self._resident = await self._residents.pin(self._recipe)
        if resident.ready:
            self.outcome = "hit" if resident.uses > 1 else "stored"
            return resident
        self.outcome = "collapsed" if resident.making.locked() else "stored"
        # Whoever holds the lock asks; when that client leaves, the next one goes on asking.
        async with resident.making:
            if not resident.ready:
                await self._make(resident)
        return resident

    def release(self, after: float) -> None:
        """Give the place back, in `after` seconds; once."""
        if after:
            asyncio.get_running_loop().call_later(after, self._release)
        else:
            self._release()

    def _release(self) -> None:
        if self._resident is not None:
            self._residents.unpin(self._resident)
        self._versions.leave(self._recipe.bank)

    async def _make(self, resident: Resident) -> None:
        # Each is told once, before the newcomer needs its row; asking again tells nothing new.
        gone = self._residents.gone()
        first, *_ = await self._workers.until_ready("dynmerge_prepare", ticket(self._recipe), gone)
        resident.rank, resident.energy = first.get("rank"), first.get("energy", 1.0)
        resident.ready = True
