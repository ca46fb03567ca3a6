from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import BaseIdentity
from dynmerge.bank.build import build_bank
from dynmerge.engines.transformers.layers import Layers, Piece, pieces
from dynmerge.errors import BankError
from dynmerge.merging.choice import parse_method
from dynmerge.merging.merge import Merge, merge
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests.conftest import tiny_model
from tests.engines.conftest import Bench, skills
from tests.merging.dense import written_out
from tests.reference import merged_deltas
from tests.reference import written_out as dense_model

WEIGHTS = [
    {"ada": 1.0},
    {"ada": 0.2, "bob": 0.5, "cyd": 0.3},
    {},
    {"cyd": -0.7, "bob": 1.1},
    {"ada": 1.0},
]


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**size, initializer_range=0.3)).eval()


MODELS = {"linear": tiny_model, "conv1d": gpt2}


def parts(kind: str) -> tuple[Bench, Layers]:
    model = MODELS[kind]()
    adapters = skills(model)
    bank = build_bank(BaseIdentity("tiny", "0" * 64), adapters)
    bench = Bench(None, model, adapters, bank)  # type: ignore[arg-type]
    return bench, Layers(model, bank, len(WEIGHTS))


def merges(bench: Bench) -> list[Merge | None]:
    return [bench.merge(**weights) if weights else None for weights in WEIGHTS]


# Merges with factors of their own among cores in the shared bases and the base model.
MIXED: Sequence[tuple[Mapping[str, float], str] | None] = (
    ({"ada": 0.2, "bob": 0.5, "cyd": 0.3}, "ties;space=full"),
    ({"ada": 1.0}, "linear"),
    None,
    ({"cyd": -0.7, "bob": 1.1}, "knots-ties;density=0.6"),
    ({"ada": 0.6, "cyd": 0.4}, "pico+tsv-m"),
)
OWN_AND_BASE = (None, MIXED[0], MIXED[3], None, MIXED[0])
ALL_OWN = (MIXED[0], MIXED[0], MIXED[3], ({"bob": 1.0}, "iso-c-dense"), MIXED[3])
BATCHES = {"mixed": MIXED, "own and base": OWN_AND_BASE, "all own": ALL_OWN}


def made(bench: Bench, asked: tuple[Mapping[str, float], str] | None) -> Merge | None:
    if asked is None:
        return None
    weights, method = asked
    preference = Preference.of(weights, normalize=False, allow_negative=True)
    return merge(bench.bank, Recipe(preference, parse_method(method), bench.bank.digest))


def hidden(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """The logits of one sequence."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "lengths", [[1] * 5, [2, 1, 3, 2, 2], [1, 1, 1, 4, 1]], ids=["decode", "prefill", "both"]
)
def test_every_token_passes_through_its_own_merge(kind: str, lengths: list[int]) -> None:
    bench, layers = parts(kind)
    names = dict(bench.model.named_modules())
    module = bench.bank.modules[1]
    target = names[module.name]
    x = torch.randn(1, sum(lengths), module.V.shape[0])
    with torch.no_grad():
        plain = target(x)[0].split(lengths)
        layers.prepare(merges(bench), lengths)
        found = target(x)[0].split(lengths)
    for weights, part, before, after in zip(
        WEIGHTS, x[0].split(lengths), plain, found, strict=True
    ):
        delta = merged_deltas(bench.adapters, weights)[module.name]
        expected = before.double() + part.double() @ delta.T
        torch.testing.assert_close(after.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "lengths", [[1] * 5, [2, 1, 3, 2, 2], [1, 1, 1, 4, 1]], ids=["decode", "prefill", "both"]
)
def test_every_token_passes_through_its_own_merge_whatever_bases_the_others_are_in(
    kind: str, batch: str, lengths: list[int]
) -> None:
    bench, layers = parts(kind)
    names = dict(bench.model.named_modules())
    found = {id(asked): made(bench, asked) for asked in BATCHES[batch]}
    merges = [found[id(asked)] for asked in BATCHES[batch]]
    assert any(each is not None and each.own is not None for each in merges)
    generator = torch.Generator().manual_seed(1)
    for module in bench.bank.modules:
        target = names[module.name]
        x = torch.randn(1, sum(lengths), len(module.V), generator=generator)
        with torch.no_grad():
            layers.clear()
            plain = target(x)[0].split(lengths)
            layers.prepare(merges, lengths)
            after = target(x)[0].split(lengths)
        for each, part, before, now in zip(merges, x[0].split(lengths), plain, after, strict=True):
            if each is None:
                assert torch.equal(now, before)
            else:
                delta = written_out(bench.bank, each)[module.name]
                expected = before.double() + part.double() @ delta.T
                torch.testing.assert_close(now.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_batches_in_and_outside_the_shared_bases_follow_one_another(kind: str) -> None:
    bench, layers = parts(kind)
    untouched = hidden(MODELS[kind](), range(3, 9))
    found = {}
    for asked in (*MIXED, *reversed(MIXED)):
        layers.prepare([made(bench, asked)], [6])
        logits = hidden(bench.model, range(3, 9))
        if asked is None:
            assert torch.equal(logits, untouched)
        else:
            assert (logits - untouched).abs().max() > 1e-2
        assert torch.equal(found.setdefault(id(asked), logits), logits)


@pytest.mark.parametrize("kind", MODELS)
def test_the_hooked_model_is_the_model_with_a_merge_of_its_own_factors_written_out(
    kind: str,
) -> None:
    bench, layers = parts(kind)
    each = made(bench, MIXED[0])
    assert each is not None
    layers.prepare([each], [6])
    found = hidden(bench.model, range(3, 9))
    plain = MODELS[kind]()
    names = dict(plain.named_modules())
    deltas = {
        name: delta.T if isinstance(names[name], Conv1D) else delta
        for name, delta in written_out(bench.bank, each).items()
    }
    dense = dense_model(plain, deltas)
    torch.testing.assert_close(found, hidden(dense, range(3, 9)), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_the_hooked_model_is_the_model_with_the_merge_written_out(kind: str) -> None:
    bench, layers = parts(kind)
    for weights in (WEIGHTS[1], WEIGHTS[3]):
        layers.prepare([bench.merge(**weights)], [6])
        found = hidden(bench.model, range(3, 9))
        dense = bench.written_out(MODELS[kind](), **weights)
        torch.testing.assert_close(found, hidden(dense, range(3, 9)), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_the_base_model_is_itself_to_the_bit(kind: str) -> None:
    bench, layers = parts(kind)
    untouched = hidden(MODELS[kind](), range(3, 9))
    layers.prepare([bench.merge(ada=1.0)], [6])
    assert not torch.equal(hidden(bench.model, range(3, 9)), untouched)
    layers.prepare([None, None], [3, 3])
    assert torch.equal(hidden(bench.model, range(3, 9)), untouched)
    layers.clear()
    assert torch.equal(hidden(bench.model, range(3, 9)), untouched)


def test_removed_hooks_leave_nothing_behind() -> None:
    bench, layers = parts("linear")
    layers.prepare([bench.merge(ada=1.0)], [6])
    layers.remove()
    assert torch.equal(hidden(bench.model, range(3, 9)), hidden(tiny_model(), range(3, 9)))


def test_a_batch_of_another_size_than_planned_is_an_error() -> None:
    bench, layers = parts("linear")
    layers.prepare([bench.merge(ada=1.0)], [5])
    with pytest.raises(RuntimeError, match="6 tokens came, 5 planned"):
        hidden(bench.model, range(3, 9))


def test_a_row_left_half_written_serves_nobody() -> None:
    bench, layers = parts("linear")
    ada, bob = bench.merge(ada=1.0), bench.merge(bob=1.0)

    def logits() -> Tensor:
        layers.prepare([ada, bob], [3, 3])
        return hidden(bench.model, range(3, 9))

    expected = logits()
    cut = bench.merge(cyd=1.0)
    cut = replace(cut, core=cut.core[: cut.core.numel() // 2])
    for broken in ([cut, bob], [bench.merge(cyd=0.5), cut]):
        with pytest.raises(RuntimeError):
            layers.prepare(broken, [3, 3])
        torch.testing.assert_close(logits(), expected)


def test_pieces_join_single_tokens_and_neighbours_under_one_merge() -> None:
    assert pieces(["a", "b", "b", "", "b"], [1, 1, 3, 2, 4]) == (
        Piece(0, 2, 0, 2),
        Piece(2, 5, 2, 1),
        Piece(7, 11, 4, 1),
    )
    assert pieces(["a", "a", ""], [2, 3, 1]) == (Piece(0, 5, 0, 1), Piece(5, 6, 2, 1))


def test_the_check_at_the_start_finds_a_layer_that_bypasses_its_hooks() -> None:
    bench, layers = parts("linear")
    layers.check()
    target = dict(bench.model.named_modules())[bench.bank.modules[0].name]
    target._call_impl = target.forward
    with pytest.raises(BankError, match="does not add its update"):
        layers.check()


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("model.layers.9.mlp.up_proj", (48, 32), "no module named"),
        ("model.embed_tokens", (384, 32), "not a linear layer"),
        ("lm_head", (384, 32), "output layer"),
        ("model.layers.0.mlp.up_proj", (47, 32), "but the bank's is"),
    ],
)
def test_a_bank_that_does_not_fit_is_refused(
    name: str, shape: tuple[int, int], problem: str
) -> None:
    update = LowRank(A=torch.randn(2, shape[1]), B=torch.randn(shape[0], 2))
    bank = build_bank(BaseIdentity("tiny", "0" * 64), {"ada": Adapter({name: update}, "tiny")})
    with pytest.raises(BankError, match=problem):
        Layers(tiny_model(), bank, 4)
