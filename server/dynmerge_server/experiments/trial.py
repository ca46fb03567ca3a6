"""Trial: one request as the log sees it, from the moment its arm is decided to its end."""

import os
import secrets
import time
from collections.abc import Sequence
from itertools import count

from dynmerge_server.experiments.entry import Resolved
from dynmerge_server.experiments.feedback import bare
from dynmerge_server.experiments.log import Log
from dynmerge_server.experiments.records import Exposure, Finish

# Ids of exposures: a random one for each would cost as much as finding the arm.
_OURS = secrets.token_hex(8)
_NUMBER = count()


class Trial:
    """Begins with the exposure; ends once, with what became of it."""

    def __init__(self, log: Log, exposure: Exposure, arrived: float) -> None:
        self._log = log
        self._exposure = exposure.id
        self._arrived = arrived
        self._first: float | None = None
        self._open = True
        log.expose(exposure)

    def first_token(self) -> None:
        """The first piece of an answer is there; later ones change nothing."""
        if self._first is None:
            self._first = time.perf_counter() - self._arrived

    def end(
        self,
        status: int,
        *,
        cache: str | None = None,
        prompt_tokens: int | None = None,
        completion_tokens: int | None = None,
        reasons: Sequence[str] = (),
        empty: bool | None = None,
    ) -> None:
        """Tell how it ended; `reasons` are why its sequences did. The first time counts."""
        if not self._open:
            return
        self._open = False
        self._log.finish(
            Finish(
                self._exposure,
                status,
                cache,
                prompt_tokens,
                completion_tokens,
                self._first,
                time.perf_counter() - self._arrived,
                "+".join(sorted(set(reasons))) or None,
                empty,
            )
        )


def begin(log: Log | None, resolved: Resolved, request_id: str, arrived: float) -> Trial | None:
    """The trial of a request that came at `arrived` (perf_counter); None where none is kept."""
    placed = resolved.placed
    if log is None or placed is None:
        return None
    recipe = resolved.recipe
    exposure = Exposure(
        id=f"{_OURS}-{os.getpid():x}-{next(_NUMBER):x}",
        request_id=bare(request_id),  # as feedback will look for it
        time=time.time(),
        unit=placed.unit,
        kind=placed.kind,
        preference=str(recipe.preference),
        method=str(recipe.method),
        merge_id=recipe.digest,
        experiment=placed.experiment,
        arm=placed.arm,
        phase=placed.phase,
        pair=placed.pair,
        position=placed.position,
    )
    return Trial(log, exposure, arrived)
