"""Passages: sequences of tokens whose last ones are predicted, run together as one batch.

Batches are padded on the left, so that the output layer runs on the last tokens alone. What all
passages begin with (a system prompt) is run once for a batch, gradients included: a merge changes
the keys and values of those tokens too.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

SHARED_FROM = 8  # tokens in common below which a pass of their own costs more than it saves
PAD = 0  # masked, so its value does not matter


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens to read; what is asked is what follows each of the last `len(targets)` of them.

    A target is the token that does follow, or None where nobody knows.
    """

    tokens: tuple[int, ...]
    targets: tuple[int | None, ...]


class Passages:
    """Examples of a causal language model: passages, and the classes its predictions are over.

    A watcher of the model sees the tokens that all passages share once in a batch.
    """

    def __init__(
        self, model: PreTrainedModel, passages: Sequence[Passage], classes: Sequence[int] = ()
    ) -> None:
        """`classes` are the tokens that can be the answer, by default all of the vocabulary."""
        self.model = model
        self.passages = tuple(passages)
        self.classes = tuple(classes)
        self._shared = self._common_start()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the tokens read, asked for and chosen from."""
        content = [[passage.tokens, passage.targets] for passage in self.passages]
        return hashlib.sha256(json.dumps([content, self.classes]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.passages)

    def counts(self, rows: Sequence[int]) -> list[int]:
        """Of each of these passages, how many tokens are predicted."""
        return [len(self.passages[row].targets) for row in rows]

    def lengths(self) -> list[int]:
        """Of each passage, how many tokens are read: rows of like length make good batches."""
        return [len(passage.tokens) for passage in self.passages]

    def logits(self, rows: Sequence[int]) -> Tensor:
        """(n, classes) float32, passage after passage. Differentiable."""
        counts = self.counts(rows)
        last = self._last_logits([self.passages[row].tokens for row in rows], max(counts))
        places = torch.arange(last.shape[1], device=last.device)
        first = last.shape[1] - torch.tensor(counts, device=last.device)
        found = last[places >= first[:, None]]
        return (found[:, list(self.classes)] if self.classes else found).float()

    def targets(self, rows: Sequence[int]) -> Tensor | None:
        """(n,): the place among the classes of each token that follows; None if any is unknown."""
        right = [target for row in rows for target in self.passages[row].targets]
        places = {token: place for place, token in enumerate(self.classes)}
        known = [places.get(token, token) for token in right if token is not None]
        if len(known) < len(right):
            return None
        return torch.tensor(known, device=self.model.device)

    def _common_start(self) -> int:
        """How many first tokens all passages share and none predicts from; 0 if not worth it."""
        # Windows and recurrent states count the padding that would stand behind what is shared.
        layers = DynamicCache(config=self.model.config).layers
        if len(self.passages) < 2 or any(type(layer) is not DynamicLayer for layer in layers):
            return 0
        asides = [passage.tokens[: -len(passage.targets)] for passage in self.passages]
        shortest = min(map(len, asides))
        columns = zip(*(aside[:shortest] for aside in asides), strict=True)
        shared = next((n for n, column in enumerate(columns) if len(set(column)) > 1), shortest)
        return shared if shared >= SHARED_FROM else 0

    def _last_logits(self, tokens: Sequence[tuple[int, ...]], keep: int) -> Tensor:
        """(rows, keep, vocabulary): what follows each of the last tokens."""
        shared = self._shared if len(tokens) > 1 else 0
        rest = [row[shared:] for row in tokens]
        width = max(map(len, rest))
        device = self.model.device
        ids = torch.tensor([[PAD] * (width - len(row)) + list(row) for row in rest], device=device)
        lengths = torch.tensor([[len(row)] for row in rest], device=device)
        places = torch.arange(width, device=device) - (width - lengths)
        mask = (places >= 0).long()
        cache = None
        if shared:
            cache = self._read(tokens[0][:shared], len(tokens))
            mask = torch.cat([mask.new_ones(len(tokens), shared), mask], dim=1)
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=places.clamp(min=0) + shared,
            past_key_values=cache,
            use_cache=shared > 0,
            # Places, not their number: a slice is a view, whose product with the head is a batched
            # one, 1.7 times as slow on a CPU.
            logits_to_keep=torch.arange(width - keep, width, device=device),
        )
        logits: Tensor = output.logits
        return logits

    def _read(self, tokens: tuple[int, ...], rows: int) -> DynamicCache:
        """Keys and values of what the rows share, once for each of them."""
        ids = torch.tensor([tokens], device=self.model.device)
        cache = DynamicCache(config=self.model.config)
        self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(rows)
        return cache
