"""Control: methods added to vLLM's worker, for the API process to call over vLLM's own RPC."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynmerge.engines.vllm.assembly import Status
from dynmerge.engines.vllm.worker import Tenancy
from dynmerge.errors import ConfigError


class Control:
    """Given to vLLM as `--worker-extension-cls`. Every method answers at once."""

    model_runner: Any

    def dynmerge_prepare(self, ticket: str, gone: Sequence[str] = ()) -> Status:
        """Make a merge beside the step loop, or say how far it is; `gone` will not be asked for."""
        return self._dynmerge().prepare(ticket, gone)

    def dynmerge_load(self, folder: str, digest: str) -> Status:
        """Make a version of the bank resident, or say how far it is."""
        return self._dynmerge().load(Path(folder), digest)

    def dynmerge_hold(self, client: int, digests: list[str]) -> None:
        """Say which versions an API process may still send requests for; others may be freed."""
        self._dynmerge().hold(client, frozenset(digests))

    def dynmerge_stats(self) -> dict[str, Any]:
        """What is resident and what it took."""
        return self._dynmerge().stats()

    def _dynmerge(self) -> Tenancy:
        found = getattr(self.model_runner, "lora_manager", None)
        if not isinstance(found, Tenancy):
            raise ConfigError("dynmerge is not active in this worker")
        return found
