"""The static path under vLLM's own compiler: Dynamo traces the model whole, updates are leaves.

vLLM does not compile where LoRA runs on a CPU. Here it is told to, so that the path a GPU takes is
taken; the CUDA graphs around it are not.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dynmerge.adapters.adapter import Adapter
from dynmerge.bank.bank import FactorBank
from tests.engines.vllm.asking import ONE_PROCESS, Answer, Ask, alone, answers, assert_right, engine
from tests.engines.vllm.asking import mixed as batch

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
]


def ask_compiled(
    base: Path, bank: Path, loaded: FactorBank, batches: list[list[Ask]]
) -> tuple[list[list[Answer]], dict[str, int], dict[str, int]]:
    from torch._dynamo.utils import counters
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    checked = CpuPlatform.check_and_update_config

    def compiling(vllm_config: Any) -> None:
        checked(vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE

    CpuPlatform.check_and_update_config = staticmethod(compiling)
    llm = engine(base, bank, {"static": True}, enforce_eager=False, max_loras=16)
    found = [answers(llm, loaded, asks, 1 + 100 * i) for i, asks in enumerate(batches)]
    return found, dict(counters["stats"]), dict(counters["graph_break"])


def test_merges_are_right_in_a_compiled_model(
    wide_folder: Path,
    wide_bank_folder: Path,
    wide_bank: FactorBank,
    wide_adapters: Mapping[str, Adapter],
    tmp_path: Path,
) -> None:
    batches = [batch(), batch("tsv-m")[2:6] + batch("knots-ties")[3:5] + batch()[7:]]
    environment = {**ONE_PROCESS, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    found, graphs, breaks = alone(
        ask_compiled, wide_folder, wide_bank_folder, wide_bank, batches, environment=environment
    )
    assert graphs["unique_graphs"] == 2  # the model, and how vLLM counts log probabilities
    assert not breaks
    for asks, given in zip(batches, found, strict=True):
        assert_right(given, wide_adapters, wide_bank, asks, 5e-5)
