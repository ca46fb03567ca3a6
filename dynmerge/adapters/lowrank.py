"""LowRank: one layer's update as a product of two thin factors. Knows no files and no scaling."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The update ΔW = B @ A. The adapter's scaling is already inside B."""

    A: Tensor  # (r, d_in)
    B: Tensor  # (d_out, r)

    @property
    def rank(self) -> int:
        """The inner size r; the numerical rank may be smaller."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in), the shape of the base weight it belongs to."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Tensor:
        """The dense update (d_out, d_in). For tests and small layers."""
        return self.B @ self.A
