"""What the other tests promise on a CPU, on a CUDA device: run by `make gpu`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from dynmerge.engines.transformers.batching import ContinuousWorker
from dynmerge.merging.merge import merge
from tests.conftest import tiny_model
from tests.engines.conftest import SMALL, Bench, bench_of, check_batch, checksum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DEVICE = "cuda"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}  # of log probabilities


@pytest.fixture(params=TOLERANCE, ids=str)
def on_device(request: pytest.FixtureRequest, base_folder: Path) -> Iterator[Bench]:
    """The model and the bank on the device, so that merges are made there."""
    model = tiny_model().to(DEVICE, request.param)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    made = bench_of(model, tokenizer, replace(SMALL, device=DEVICE))
    yield replace(made, bank=made.bank.to(DEVICE))
    made.engine.close()


async def test_a_ragged_batch_gives_each_its_merge_and_leaves_the_base_model_alone(
    on_device: Bench,
) -> None:
    engine = on_device.engine
    assert isinstance(engine._worker, ContinuousWorker)
    assert engine.device.type == DEVICE
    before = checksum(on_device.model)
    assert before == checksum(tiny_model().to(engine.dtype))
    await check_batch(on_device, TOLERANCE[engine.dtype])
    assert checksum(on_device.model) == before


@pytest.mark.parametrize("weights", [{"ada": 1.0}, {"ada": 0.2, "bob": -0.3, "cyd": 0.5}])
def test_a_merge_made_on_the_device_is_the_one_made_on_the_cpu(
    on_device: Bench, weights: dict[str, float]
) -> None:
    recipe = on_device.merge(**weights).recipe
    dtype = on_device.engine.dtype
    there = merge(on_device.bank, recipe, dtype).core
    here = merge(on_device.bank.to("cpu"), recipe, dtype).core
    assert there.device.type == DEVICE
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(there.cpu(), here, rtol=2 * rounding, atol=10 * rounding)
