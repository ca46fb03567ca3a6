"""Models that vLLM packs in different ways: what is added is right in each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from dynmerge.adapters.base_model import BaseModel
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from dynmerge.bank.storage import save_bank
from tests.conftest import tiny_tokenizer
from tests.engines.conftest import skills
from tests.engines.vllm.asking import Answer, Ask, alone, answers, engine, mixed
from tests.reference import merged_deltas, written_out

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
pytestmark = pytest.mark.vllm

SIZES: Mapping[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
# Biases; norms of heads; queries, keys and values in one layer of the checkpoint; tied embeddings.
FAMILIES: Mapping[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "phi3": Phi3Config(**SIZES),
    "gemma": GemmaConfig(**SIZES, head_dim=32),
}
ASKS = [ask for ask in mixed() if "dee" not in ask.weights]


def ask_family(
    base: Path, bank: Path, loaded: FactorBank, options: Mapping[str, Any]
) -> list[Answer]:
    return answers(engine(base, bank, {}, **options), loaded, ASKS)


@pytest.mark.parametrize(
    ("family", "ranks"), [("qwen2", 1), ("qwen3", 1), ("phi3", 1), ("phi3", 2), ("gemma", 1)]
)
def test_a_family_of_models_is_served_right(family: str, ranks: int, tmp_path: Path) -> None:
    base = tmp_path / family
    made(family).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    opened = BaseModel.open(base)
    adapters = skills(made(family), size=0.1)
    bank = build_bank(BaseIdentity(opened.name, opened.fingerprint), adapters)
    save_bank(bank, tmp_path / "bank", source=str(base))
    options = {"tensor_parallel_size": ranks}
    for answer, ask in zip(
        alone(ask_family, base, tmp_path / "bank", bank, options), ASKS, strict=True
    ):
        model = written_out(made(family), merged_deltas(adapters, ask.weights)).double()
        check(model, ask, answer)


def made(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they begin at zero, where nobody would miss them
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def check(model: torch.nn.Module, ask: Ask, answer: Answer) -> None:
    with torch.no_grad():
        sequence = torch.tensor([[*ask.prompt, *answer.ids]])
        rows = model(sequence).logits[0, len(ask.prompt) - 1 : -1].log_softmax(-1)
    assert rows.argmax(1).tolist() == list(answer.ids), ask
    picked = rows.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
    assert answer.logprobs == pytest.approx(picked.tolist(), abs=5e-5)
