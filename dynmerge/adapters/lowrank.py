"""LowRank: one layer's update as a product of two thin factors. Knows no files and no scaling."""

from dataclasses import dataclass

import torch
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

    def compress(self, rank: int) -> "LowRank":
        """The nearest update of at most `rank`, found without forming the dense one."""
        Q_B, R_B = torch.linalg.qr(self.B)
        Q_A, R_A = torch.linalg.qr(self.A.mT)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.mT)
        root = S[:rank].sqrt()
        keep = root.shape[0]
        return LowRank(A=root[:, None] * (Vh[:keep] @ Q_A.mT), B=(Q_B @ U[:, :keep]) * root)
