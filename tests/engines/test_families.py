"""Other architectures, tiny and random: windows, soft caps, biases, fused layers, experts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from dynmerge.engines.transformers.batching import ContinuousWorker
from dynmerge.engines.transformers.single import SingleWorker
from tests.engines.conftest import (
    GREEDY,
    SMALL,
    answers,
    bench_of,
    greedy_steps,
    logprobs,
    prompt,
)

SIZES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def gpt2() -> PreTrainedConfig:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 384}
    return GPT2Config(**sizes, initializer_range=0.3, bos_token_id=None, eos_token_id=2)


def qwen3_next() -> PreTrainedConfig:
    return Qwen3NextConfig(
        **SIZES,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"],
        num_experts=0,
        tie_word_embeddings=True,
    )


FAMILIES: dict[str, tuple[Callable[[], PreTrainedConfig], type]] = {
    "qwen2": (lambda: Qwen2Config(**SIZES), ContinuousWorker),
    "gemma2": (lambda: Gemma2Config(**SIZES, sliding_window=16), ContinuousWorker),
    "gpt2": (gpt2, ContinuousWorker),
    "mixtral": (lambda: MixtralConfig(**SIZES, num_local_experts=2), ContinuousWorker),
    "qwen3_next": (qwen3_next, SingleWorker),
}


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_ragged_batch_gives_each_its_merge_written_out(
    family: str, base_folder: Path
) -> None:
    config, worker = FAMILIES[family]

    def fresh() -> torch.nn.Module:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config()).eval()

    bench = bench_of(fresh(), AutoTokenizer.from_pretrained(base_folder), SMALL)
    assert isinstance(bench.engine._worker, worker)
    sampling = replace(GREEDY, max_tokens=6)
    asked = [(40, {"ada": 1.0}), (7, {"bob": 0.6, "cyd": 0.4}), (30, {}), (3, {"cyd": -1.0})]
    found = await answers(
        bench.engine, [bench.ask(prompt(n, n), sampling, **weights) for n, weights in asked]
    )
    for (length, weights), one in zip(asked, found, strict=True):
        dense = bench.written_out(fresh(), **weights)
        ids, expected = greedy_steps(dense, prompt(length, length), 6)
        assert one.ids == ids
        assert logprobs(one) == pytest.approx(expected, abs=1e-3)
    bench.engine.close()
