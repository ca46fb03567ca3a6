"""What was applied, told back: reply headers, and the `dynmerge` block of a body.

Feeding back `preference`, `normalize` and `method`, or the header X-Dynmerge-Applied without its
`source`, names the same merge again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynmerge.runtime import Lease
from dynmerge_server.experiments.entry import SESSION_HEADER, Resolved
from dynmerge_server.experiments.live import Placed
from dynmerge_server.preferences import EXPERIMENT_HEADER, METHOD_HEADER, REQUEST_HEADERS

APPLIED_HEADER = "X-Dynmerge-Applied"
MERGE_ID_HEADER = "X-Dynmerge-Merge-Id"
REPLY_HEADERS = (APPLIED_HEADER, METHOD_HEADER, MERGE_ID_HEADER, EXPERIMENT_HEADER)

# RFC 9211, by the outcome of the lease. The base model needs no merge, so nothing is looked up.
CACHE_STATUS = {
    "base": "dynmerge; fwd=bypass",
    "hit": "dynmerge; hit",
    "stored": "dynmerge; fwd=miss; stored",
    "collapsed": "dynmerge; fwd=miss; collapsed",
}


@dataclass(frozen=True, slots=True)
class Applied:
    """One request's merge: its recipe, who chose it and what the cache said."""

    resolved: Resolved
    outcome: str
    # Where the method left the shared bases: the rank of the merge, and the share of energy kept.
    rank: int | None = None
    energy: float = 1.0

    @classmethod
    def of(cls, lease: Lease, resolved: Resolved) -> "Applied":
        """What holding `lease` means for a reply."""
        made = lease.merge
        if made is None or made.own is None:
            return cls(resolved, lease.outcome)
        return cls(resolved, lease.outcome, made.rank, made.energy)

    def headers(self, timings: Mapping[str, float]) -> dict[str, str]:
        """The reply's headers; `timings` are seconds."""
        recipe, placed = self.resolved.recipe, self.resolved.placed
        return {
            APPLIED_HEADER: f"{recipe.preference};source={self.resolved.source}",
            METHOD_HEADER: str(recipe.method),
            MERGE_ID_HEADER: recipe.digest,
            **({EXPERIMENT_HEADER: _in_header(placed)} if placed and placed.arm else {}),
            "Cache-Status": CACHE_STATUS[self.outcome],
            "Server-Timing": ", ".join(
                f"{name};dur={seconds * 1000:.3g}" for name, seconds in timings.items()
            ),
            "Vary": ", ".join((*REQUEST_HEADERS, SESSION_HEADER)),
        }

    def block(self) -> dict[str, Any]:
        """The `dynmerge` block."""
        recipe, placed = self.resolved.recipe, self.resolved.placed
        own = {} if self.rank is None else {"rank": self.rank, "energy": self.energy}
        return {
            "preference": recipe.preference.weights,
            "normalize": not recipe.preference.is_raw,
            "text": str(recipe.preference),
            "method": str(recipe.method),
            "merge_id": recipe.digest,
            "bank": recipe.bank,
            "source": self.resolved.source,
            "cache": self.outcome,
            **({"experiment": _in_body(placed)} if placed and placed.experiment else {}),
            **own,
        }


def _in_header(placed: Placed) -> str:
    forced = ";forced" if placed.kind == "forced" else ""
    return f"{placed.experiment}={placed.arm}{forced}"


def _in_body(placed: Placed) -> dict[str, str | None]:
    return {"name": placed.experiment, "arm": placed.arm, "kind": placed.kind}
