"""The adapters every benchmark merges: random factors at given shapes."""

from collections.abc import Mapping

import torch

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank


def random_adapters(
    shapes: Mapping[str, tuple[int, int]], tasks: int, rank: int, seed: int
) -> dict[str, Adapter]:
    """`task0`, `task1`, ... with Gaussian factors on every module of `shapes`, (d_out, d_in) each.

    Scaled by the width, so that activations stay finite in half precision.
    """
    generator = torch.Generator().manual_seed(seed)

    def update(d_out: int, d_in: int) -> LowRank:
        return LowRank(
            A=torch.randn(rank, d_in, generator=generator) / d_in**0.5,
            B=torch.randn(d_out, rank, generator=generator) / d_out**0.5,
        )

    return {
        f"task{index}": Adapter(
            {name: update(*shape) for name, shape in shapes.items()}, base="random"
        )
        for index in range(tasks)
    }
