"""A bank of random skills for any model, and a way to ask an engine."""

import asyncio
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from dynmerge.engines.engine import Chunk, Engine, Generation, Sampling, Token
from dynmerge.engines.transformers import EngineConfig, LoadedModel, TransformersEngine
from dynmerge.merging.choice import default_method
from dynmerge.merging.merge import Merge, merge
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests.conftest import tiny_model
from tests.reference import merged_deltas, written_out

GREEDY = Sampling(max_tokens=12, temperature=0.0, logprobs=3, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=400, logprobs=None)

# Every third module, beginning elsewhere, each skill of its own rank: sets that overlap and differ.
RANKS: Mapping[str, int] = {"ada": 2, "bob": 3, "cyd": 5}


def skills(model: PreTrainedModel, size: float = 0.3) -> dict[str, Adapter]:
    """Random adapters for whatever linear layers the model has, the output layer excepted."""
    shapes = {}
    for name, module in model.named_modules():
        if module is model.get_output_embeddings():
            continue
        if isinstance(module, nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nf, module.nx)
    generator = torch.Generator().manual_seed(7)

    def factor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * size

    return {
        skill: Adapter(
            {
                name: LowRank(A=factor(rank, d_in), B=factor(d_out, rank))
                for place, (name, (d_out, d_in)) in enumerate(shapes.items())
                if place % 3 != index
            },
            "tiny",
        )
        for index, (skill, rank) in enumerate(RANKS.items())
    }


@dataclass(frozen=True)
class Bench:
    """An engine, the skills in it, and an untouched copy of its base model."""

    engine: TransformersEngine
    model: PreTrainedModel
    adapters: Mapping[str, Adapter]
    bank: FactorBank

    def merge(self, **weights: float) -> Merge:
        preference = Preference.of(weights, normalize=False, allow_negative=True)
        return merge(self.bank, Recipe(preference, default_method(), self.bank.digest))

    def written_out(self, model: PreTrainedModel, **weights: float) -> nn.Module:
        """`model`, changed: W + Delta in its own weights."""
        modules = dict(model.named_modules())
        deltas = merged_deltas(self.adapters, weights)
        turned = {
            name: delta.T if isinstance(modules[name], Conv1D) else delta
            for name, delta in deltas.items()
        }
        return written_out(model, turned)

    def ask(
        self, prompt: Sequence[int], sampling: Sampling = GREEDY, **weights: float
    ) -> Generation:
        return Generation(tuple(prompt), self.merge(**weights) if weights else None, sampling)


def bench_of(model: PreTrainedModel, tokenizer: object, config: EngineConfig) -> Bench:
    adapters = skills(model)
    bank = build_bank(BaseIdentity("tiny", "0" * 64), adapters)
    engine = TransformersEngine(LoadedModel(model, tokenizer), bank, config)  # type: ignore[arg-type]
    return Bench(engine, model, adapters, bank)


SMALL = EngineConfig(device="cpu", max_batch=9, max_batch_tokens=24, cache_tokens=1024)


@pytest.fixture(scope="session")
def bench(base_folder: Path) -> Iterator[Bench]:
    """One engine for all tests that leave it alone; prompts above 24 tokens come in pieces."""
    made = bench_of(tiny_model(), AutoTokenizer.from_pretrained(base_folder), SMALL)
    yield made
    made.engine.close()


@dataclass(frozen=True)
class Answer:
    """All chunks of one generation, joined."""

    text: str
    tokens: tuple[Token, ...]
    last: Chunk

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


async def answer(engine: Engine, generation: Generation) -> Answer:
    chunks = [chunk async for chunk in engine.generate(generation)]
    assert [chunk.finish_reason is None for chunk in chunks[:-1]] == [True] * (len(chunks) - 1)
    return Answer(
        "".join(chunk.text for chunk in chunks),
        tuple(token for chunk in chunks for token in chunk.tokens),
        chunks[-1],
    )


async def answers(engine: Engine, generations: Sequence[Generation]) -> list[Answer]:
    """All at once, so that they share batches."""
    return await asyncio.gather(*(answer(engine, generation) for generation in generations))


# Eight merges and the base model; prompts longer than a step (24 tokens) are taken in pieces.
ASKED: list[tuple[int, dict[str, float]]] = [
    (5, {"ada": 1.0}),
    (61, {"bob": 1.0}),
    (9, {"cyd": 1.0}),
    (17, {"ada": 0.5, "bob": 0.5}),
    (33, {"ada": 0.2, "bob": 0.3, "cyd": 0.5}),
    (1, {"bob": 0.9, "cyd": 0.1}),
    (26, {"ada": -0.4, "cyd": 0.8}),
    (12, {"ada": 1.5, "bob": -1.0}),
    (40, {}),
]


def prompt(length: int, start: int = 0) -> list[int]:
    return [3 + (start + 7 * i * i + i) % 317 for i in range(length)]


def checksum(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def greedy_steps(
    model: nn.Module, ids: Sequence[int], tokens: int
) -> tuple[list[int], list[float]]:
    """The plain model, everything computed anew for each token."""
    sequence, logprobs = list(ids), []
    with torch.no_grad():
        for _ in range(tokens):
            row = torch.log_softmax(model(torch.tensor([sequence])).logits[0, -1], dim=-1)
            sequence.append(int(row.argmax()))
            logprobs.append(float(row.max()))
    return sequence[len(ids) :], logprobs


def logprobs(found: Answer) -> list[float]:
    return [token.logprob for token in found.tokens if token.logprob is not None]


async def check_batch(bench: Bench, tolerance: float) -> None:
    """Everyone in a ragged batch gets what it gets alone and what its merge written out gives.

    `tolerance` is of log probabilities. Greedy answers are compared until rounding parts them; that
    must be rare. The model written out has the same rounded weights, and computes in float32.
    """
    asked = [bench.ask(prompt(length, length), **weights) for length, weights in ASKED]
    together = await answers(bench.engine, asked)
    alike = 0
    for (length, weights), generation, found in zip(ASKED, asked, together, strict=True):
        alone = await answer(bench.engine, generation)
        dense = bench.written_out(tiny_model().to(bench.engine.dtype).float(), **weights)
        expected = greedy_steps(dense, prompt(length, length), GREEDY.max_tokens)
        for ids, steps in ((alone.ids, logprobs(alone)), expected):
            same = steps_alike(found.ids, ids)
            alike += same
            until_then = slice(0, same + 1)
            assert logprobs(found)[until_then] == pytest.approx(steps[until_then], abs=tolerance)
    assert alike > 0.7 * 2 * len(ASKED) * GREEDY.max_tokens


def steps_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids agree before the first that does not."""
    pairs = zip(one, other, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(one))


async def until(condition: object) -> None:
    """Wait for something another thread does within a second."""
    for _ in range(200):
        if condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to pass")
