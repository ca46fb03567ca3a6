"""Where the engine meets transformers' own continuous batching, whose internals may move."""

from collections.abc import Sequence
from dataclasses import fields, make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoTokenizer, ContinuousBatchingConfig

from dynmerge.engines.engine import Token
from dynmerge.engines.transformers import batching
from dynmerge.engines.transformers.batching import ContinuousWorker
from dynmerge.engines.transformers.sampling import Draw, sample
from dynmerge.errors import BaseModelError
from tests.conftest import tiny_model
from tests.engines.conftest import GREEDY, SMALL, Bench, answer, answers, bench_of, prompt


def test_no_option_is_dropped_that_transformers_does_not_know(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [field.name for field in fields(ContinuousBatchingConfig)]
    known.remove("allow_block_sharing")
    older = make_dataclass("Older", [(name, object, None) for name in known])
    monkeypatch.setattr(batching, "ContinuousBatchingConfig", older)
    worker = ContinuousWorker(bench.model, bench.engine._layers, SMALL, 64)
    with pytest.raises(TypeError, match="allow_block_sharing"):
        worker._batching()


def test_the_start_finds_blocks_that_are_shared_between_merges(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsafe = ContinuousWorker._batching

    def sharing(worker: ContinuousWorker) -> Any:
        options = unsafe(worker)
        options.allow_block_sharing = True
        return options

    monkeypatch.setattr(ContinuousWorker, "_batching", sharing)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    with pytest.raises(BaseModelError, match="log probability"):
        bench_of(tiny_model(), tokenizer, replace(SMALL, batching="continuous"))


async def test_a_token_that_the_batch_did_not_go_on_with_is_an_error(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misreport(draws: Sequence[Draw], scores: Tensor) -> list[Token | Exception]:
        outcomes = sample(draws, scores)
        for row, draw in enumerate(draws):
            outcome = outcomes[row]
            if draw.logprobs == 1 and len(draw.generated) == 3 and isinstance(outcome, Token):
                outcomes[row] = replace(outcome, id=(outcome.id + 1) % scores.shape[1])
        return outcomes

    monkeypatch.setattr(batching, "sample", misreport)
    fine, wrong = await answers(
        bench.engine,
        [
            bench.ask(prompt(7), ada=1.0),
            bench.ask(prompt(7), replace(GREEDY, logprobs=1), bob=1.0),
        ],
    )
    assert (wrong.last.finish_reason, len(wrong.ids)) == ("error", 2)
    monkeypatch.undo()
    assert fine.ids == (await answer(bench.engine, bench.ask(prompt(7), ada=1.0))).ids
    assert bench.engine.load().running == 0
