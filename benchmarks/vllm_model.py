"""What the vLLM benchmark serves, made on the spot: a random Llama, a bank, adapters in folders.

Knows shapes and folders, not vLLM.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.adapters import random_adapters
from dynmerge.adapters.checkpoint import save_adapter
from dynmerge.bank.bank import BaseIdentity
from dynmerge.bank.build import build_bank
from dynmerge.bank.storage import save_bank

TASKS = 8
RANK = 16
STACKED = TASKS * RANK  # the rank of a merge of all tasks
VOCABULARY = 2048


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int

    def config(self) -> LlamaConfig:
        """As transformers wants it."""
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
        )

    def packed(self) -> list[tuple[int, list[int]]]:
        """(d_in, d_out of each slice) of vLLM's linear layers in one of the model's layers."""
        head = self.hidden // self.heads
        kv = head * self.kv_heads
        return [
            (self.hidden, [self.hidden, kv, kv]),
            (self.hidden, [self.hidden]),
            (self.hidden, [self.intermediate, self.intermediate]),
            (self.intermediate, [self.hidden]),
        ]

    def work_allowance(self) -> float:
        """Base weights over these and the shared factors: by FLOPs and by bytes alike."""
        layers = self.packed()
        base = sum(d_in * sum(outs) for d_in, outs in layers) * self.layers
        head = VOCABULARY * self.hidden
        added = sum(d_in * len(outs) + sum(outs) for d_in, outs in layers) * STACKED * self.layers
        return (base + head) / (base + head + added)


SIZES = {
    "quick": Size(512, 1408, 4, 8, 4),
    "cpu": Size(1024, 2816, 8, 16, 8),
    "cuda": Size(4096, 14_336, 8, 32, 8),
}


@dataclass(frozen=True, slots=True)
class Served:
    """Folders of everything; `adapter` is of RANK, `merged` of the rank of a merge."""

    base: Path
    bank: Path
    digest: str
    adapter: Path
    merged: Path


def make(folder: Path, size: Size, seed: int) -> Served:
    """Write a model, a bank of TASKS adapters, and an adapter of either rank."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(size.config()).bfloat16()
    model.save_pretrained(folder / "base")
    shapes = {
        name: (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    bank = build_bank(BaseIdentity("random", ""), random_adapters(shapes, TASKS, RANK, seed))
    save_bank(bank, folder / "bank")
    return Served(
        folder / "base",
        folder / "bank",
        bank.digest,
        _saved(folder, shapes, RANK, seed),
        _saved(folder, shapes, STACKED, seed),
    )


def _saved(folder: Path, shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> Path:
    target = folder / f"adapter-{rank}"
    made = random_adapters(shapes, 1, rank, seed + 1)["task0"]
    save_adapter(made, target, base_name="random")
    return target
