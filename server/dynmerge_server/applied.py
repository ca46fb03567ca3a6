"""What was applied, told back: reply headers, and the `dynmerge` block of a body.

Feeding back `preference`, `normalize` and `method`, or the header X-Dynmerge-Applied without its
`source`, names the same merge again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynmerge.recipe import Recipe
from dynmerge.runtime import Lease
from dynmerge_server.preferences import METHOD_HEADER, REQUEST_HEADERS

APPLIED_HEADER = "X-Dynmerge-Applied"
MERGE_ID_HEADER = "X-Dynmerge-Merge-Id"
REPLY_HEADERS = (APPLIED_HEADER, METHOD_HEADER, MERGE_ID_HEADER)

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

    recipe: Recipe
    source: str
    outcome: str
    # Where the method left the shared bases: the rank of the merge, and the share of energy kept.
    rank: int | None = None
    energy: float = 1.0

    @classmethod
    def of(cls, lease: Lease, source: str) -> "Applied":
        """What holding `lease` means for a reply."""
        made = lease.merge
        if made is None or made.own is None:
            return cls(lease.recipe, source, lease.outcome)
        return cls(lease.recipe, source, lease.outcome, made.rank, made.energy)

    def headers(self, timings: Mapping[str, float]) -> dict[str, str]:
        """The reply's headers; `timings` are seconds."""
        return {
            APPLIED_HEADER: f"{self.recipe.preference};source={self.source}",
            METHOD_HEADER: str(self.recipe.method),
            MERGE_ID_HEADER: self.recipe.digest,
            "Cache-Status": CACHE_STATUS[self.outcome],
            "Server-Timing": ", ".join(
                f"{name};dur={seconds * 1000:.3g}" for name, seconds in timings.items()
            ),
            "Vary": ", ".join(REQUEST_HEADERS),
        }

    def block(self) -> dict[str, Any]:
        """The `dynmerge` block."""
        recipe = self.recipe
        own = {} if self.rank is None else {"rank": self.rank, "energy": self.energy}
        return {
            "preference": recipe.preference.weights,
            "normalize": not recipe.preference.is_raw,
            "text": str(recipe.preference),
            "method": str(recipe.method),
            "merge_id": recipe.digest,
            "bank": recipe.bank,
            "source": self.source,
            "cache": self.outcome,
            **own,
        }
