"""What updates must cost at least: their products alone, timed at the shapes of the model.

Runs within an engine's process, so that the machine and its libraries are the same. Weights differ
from layer to layer and the base model's own products run in between, as in a forward pass, so that
caches hold what they would hold there.
"""

import time
from statistics import median

import torch
from torch import Tensor

from benchmarks.harness import settle
from benchmarks.vllm_engine import Engine, Load
from benchmarks.vllm_model import STACKED, Size


def added_seconds(engine: Engine, size: Size, load: Load, slots: int, repeats: int) -> float:
    """Seconds that the updates of all layers add to one step of `load`, median of `repeats`."""
    device = engine.start.device
    tokens = load.batch * (1 if load.new > 1 else load.prompt)
    dtype = getattr(torch, engine.start.dtype)
    layers = [Shared(*shape, dtype, device) for _ in range(size.layers) for shape in size.packed()]
    index = torch.arange(tokens, device=device) % slots
    inputs = {layer.d_in: torch.randn(tokens, layer.d_in).to(layer.down) for layer in layers}
    table = torch.randn(slots + 1, max(layer.columns for layer in layers)).to(layers[0].down)
    # The processor's time on a CPU, where others may share it; a GPU's is told by the clock.
    clock = time.process_time if device == "cpu" else time.perf_counter
    found = []
    for _ in range(repeats + 1):
        total = 0.0
        for layer in layers:
            x = inputs[layer.d_in]
            y = torch.mm(x, layer.base.mT)
            settle(device)
            started = clock()
            layer.add(x, y, table, index)
            settle(device)
            total += clock() - started
        found.append(total)
    return median(found[1:])


class Shared:
    """One of vLLM's layers with the shared factors of its slices, random."""

    def __init__(self, d_in: int, outs: list[int], dtype: torch.dtype, device: str) -> None:
        def factor(*shape: int) -> Tensor:
            return torch.randn(shape).to(device, dtype)

        self.d_in = d_in
        self.outs = outs
        self.base = factor(sum(outs), d_in)
        self.down = factor(d_in, STACKED * len(outs))
        self.ups = [factor(out, STACKED) for out in outs]

    @property
    def columns(self) -> int:
        """Of the shrunk inputs, over all slices."""
        return self.down.shape[1]

    def add(self, x: Tensor, y: Tensor, table: Tensor, index: Tensor) -> None:
        """y += B (d * (A x)): the least that has to be done."""
        h = torch.mm(x, self.down) * table[index, : self.columns]
        start = 0
        for place, up in enumerate(self.ups):
            part = h[:, place * STACKED : (place + 1) * STACKED]
            y[:, start : start + len(up)].addmm_(part, up.mT)
            start += len(up)
