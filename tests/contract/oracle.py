"""What the base model says once an update is written into its weights, according to transformers.

Knows no server: weights and token ids in, log probabilities out.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import load_adapter
from tests import reference


def base_of(folder: Path) -> PreTrainedModel:
    """The base model as it is, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_adapter(base: Path, adapter: Path) -> PreTrainedModel:
    """The base model with one adapter merged into its weights by PEFT."""
    return PeftModel.from_pretrained(base_of(base), adapter).merge_and_unload().eval()


def with_weights(
    base: Path, adapters: Mapping[str, Path], weights: Mapping[str, float]
) -> PreTrainedModel:
    """The base model with the weighted sum of the adapters' deltas written into its weights."""
    opened = BaseModel.open(base)
    loaded = {name: load_adapter(folder, opened) for name, folder in adapters.items()}
    return with_deltas(base, reference.merged_deltas(loaded, weights))


def with_deltas(base: Path, deltas: Mapping[str, Tensor]) -> PreTrainedModel:
    """The base model with dense updates written into its weights."""
    model = base_of(base)
    reference.written_out(model, deltas)
    return model


@torch.no_grad()
def greedy_logprobs(
    model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]
) -> list[float]:
    """The log probability of each token of `answer`, all of which must be the likeliest ones."""
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    rows = logits.log_softmax(-1)
    assert rows.argmax(-1).tolist() == list(answer)
    return [float(row[token]) for row, token in zip(rows, answer, strict=True)]
