"""A row of a resident bank holds the merge that was written to it, in every form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.edit import with_calibration
from dynmerge.engines.vllm.config import Slots
from dynmerge.engines.vllm.forms import Form, form_of
from dynmerge.engines.vllm.layer import Layer
from dynmerge.engines.vllm.residents import ResidentBank, check_fit, widths_of
from dynmerge.engines.vllm.steps import Run
from dynmerge.errors import BankError
from dynmerge.merging.choice import parse_method
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests.bank_factory import random_adapter
from tests.merging.dense import ADAPTERS, BANK, bank_of, written_out

SLOTS = Slots(3, 3, 3, 10)
METHODS = (
    "linear",
    "lora-soups;scale=2",
    "tara-a",
    "adamerging;scale=0.8",
    "linear;p=4",
    "ties",
    "pico+linear",
    "tsv-m",
    "tara-b",
    "ties;space=full",
    "ties;space=full;rank=2",
    "knots-ties",
    "iso-c-dense",
)
ONE: Mapping[str, float] = {"ada": 0.5, "bob": -0.25, "cyd": 0.75}
OTHER: Mapping[str, float] = {"bob": 1.5}


@dataclass(frozen=True)
class Whole:
    """What Layer asks of a linear layer of vLLM's that is not cut."""

    input_size: int
    output_slices: tuple[int, ...]
    tp_size: int = 1

    def slice_lora_a(self, factor: Tensor) -> Tensor:
        return factor

    def slice_lora_b(self, factor: Tensor) -> Tensor:
        return factor


def layers() -> list[Layer]:
    """Packed and plain, with slices that no skill changes before, between and after."""
    return [
        Layer("qkv", Whole(10, (12, 4, 4)), ["layers.0.q", None, "layers.0.v"]),
        Layer("q", Whole(10, (12,)), ["layers.1.q"]),
        Layer("gate_up", Whole(10, (20, 20)), [None, "layers.1.up"]),
    ]


def resident(bank: FactorBank = BANK, spare: int = 0, of: Sequence[Layer] = ()) -> ResidentBank:
    places = list(of) or layers()
    widths = widths_of(bank, places, SLOTS.own_rank, spare)
    made = ResidentBank(places, widths, SLOTS, torch.float32, torch.device("cpu"))
    made.load(bank)
    return made


def write(made: ResidentBank, row: int, weights: Mapping[str, float], method: str) -> Recipe:
    """Make `row` of the method's table hold the merge."""
    assert made.bank is not None
    preference = Preference.of(weights, normalize=False, allow_negative=True)
    recipe = Recipe(preference, parse_method(method), made.bank.digest)
    form = form_of(recipe.method)
    if form == "diagonal":
        made.write_diagonal(row, recipe)
    else:
        made.write(form, row, made.merger.merge(recipe))
    return recipe


def update(made: ResidentBank, layer: Layer, form: Form, row: int) -> Tensor:
    """(d_out, d_in): what a layer adds under a row, input by input."""
    x = torch.eye(layer.d_in)
    y = torch.zeros(layer.d_in, layer.spans[-1].stop)
    part, index = made.parts[layer.name][form], torch.full((layer.d_in,), row)
    part.add(x, y, index, [Run(0, layer.d_in, row)])
    static = torch.zeros_like(y)
    part.add(x, static, index, None)
    assert_close(static, y)
    return y.mT


def assert_holds(made: ResidentBank, row: int, recipe: Recipe) -> None:
    """The row is the merge, slice by slice, and nothing where no skill has a module."""
    assert made.bank is not None
    expected = written_out(made.bank, made.merger.merge(recipe))
    for layer in made.layers:
        found = update(made, layer, form_of(recipe.method), row)
        for name, span in zip(layer.modules, layer.spans, strict=True):
            wanted = torch.zeros_like(found[span])
            if name in expected:
                wanted = expected[name].float()
            size = max(float(wanted.abs().max()), 1.0)
            assert_close(found[span] / size, wanted / size, rtol=0, atol=2e-6)


def addresses(made: ResidentBank) -> list[int]:
    return [tensor.data_ptr() for tensor in made._tensors()]


@pytest.mark.parametrize("method", METHODS)
def test_a_row_holds_the_merge_that_was_written_to_it(method: str) -> None:
    made = resident()
    assert_holds(made, 1, write(made, 1, ONE, method))


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_apart_and_one_that_is_written_again_has_nothing_left(method: str) -> None:
    made = resident()
    write(made, 2, ONE, method)
    first = write(made, 0, ONE, method)
    again = write(made, 2, OTHER, method)
    assert_holds(made, 0, first)
    assert_holds(made, 2, again)


def test_own_factors_of_a_lower_rank_leave_nothing_of_those_before() -> None:
    made = resident()
    write(made, 0, ONE, "iso-c-dense")
    assert_holds(made, 0, write(made, 0, OTHER, "ties;space=full;rank=1"))


@pytest.mark.parametrize("form", ["diagonal", "core"])
def test_the_row_of_the_base_model_adds_nothing_whatever_the_others_hold(form: Form) -> None:
    made = resident()
    for row in range(SLOTS.of(form)):
        write(made, row, ONE, {"diagonal": "linear", "core": "ties"}[form])
    for layer in made.layers:
        assert not update(made, layer, form, SLOTS.of(form)).any()


@pytest.mark.parametrize("method", ["linear", "ties", "ties;space=full"])
def test_another_bank_in_the_same_memory_leaves_nothing_of_the_one_before(method: str) -> None:
    made = resident(spare=4)
    before = addresses(made)
    write(made, 0, ONE, method)
    fewer = {name: ADAPTERS[name] for name in ("ada", "bob")}
    more = random_adapter({"layers.0.q": 7, "layers.0.v": 4}, 9)
    for bank in (bank_of(fewer), bank_of({**fewer, "bob": more}), BANK):
        made.load(bank)
        assert made.digest == bank.digest
        assert_holds(made, 1, write(made, 1, OTHER, method))
    assert addresses(made) == before


def test_memory_is_that_of_its_tensors_and_grows_with_nothing() -> None:
    made = resident()
    before = made.nbytes
    for method in METHODS:
        write(made, 0, ONE, method)
    made.load(BANK)
    assert made.nbytes == before


def test_memory_counts_calibrations_and_what_follows_from_them() -> None:
    without = replace(BANK, calibrations=())
    learned = sum(t.nbytes for each in BANK.calibrations for t in each.tensors.values())
    # As learned, and stacked by shape or side by side; and tara-b's joint bases.
    assert resident(BANK).nbytes > resident(without).nbytes + 1.5 * learned


def test_the_first_request_for_a_calibrated_merge_finds_everything_made() -> None:
    made = resident()
    assert made.bank is not None
    before = set(made.bank._kept)
    for method in ("tara-a", "tara-b", "adamerging", "core", "regmean"):
        write(made, 0, {"ada": 0.5, "cyd": 0.75}, method)
    assert set(made.bank._kept) == before


def test_loading_forgets_which_merges_are_in_the_rows() -> None:
    made = resident()
    for rows in made.rows.values():
        rows.take(1, "a", ())
    made.load(BANK)
    assert [len(rows) for rows in made.rows.values()] == [0, 0, 0]


def test_a_bank_of_more_ranks_than_were_set_aside_is_refused_and_changes_nothing() -> None:
    made = resident()
    held = write(made, 0, ONE, "linear")
    larger = bank_of({**ADAPTERS, "ada": random_adapter({"layers.1.q": 3}, 5)})
    with pytest.raises(
        BankError, match=r"^layers\.1\.q has 7 ranks, where this server set aside 6"
    ):
        made.load(larger)
    assert_holds(made, 0, held)
    check_fit(larger, layers(), widths_of(BANK, layers(), SLOTS.own_rank, 1))


def test_a_calibration_that_nobody_can_read_is_refused_and_changes_nothing() -> None:
    made = resident()
    held = write(made, 0, ONE, "linear")
    odd = replace(BANK.calibration("tara-a"), form="spline")
    with pytest.raises(BankError, match="tara-a is of form 'spline'"):
        made.load(with_calibration(BANK, odd))
    assert made.digest == BANK.digest
    assert_holds(made, 0, held)


@pytest.mark.parametrize("method", ["linear", "ties", "ties;space=full"])
@pytest.mark.parametrize("there", [(0,), (1,), (2,), (0, 2)])
def test_modules_on_another_stage_change_nothing_here(method: str, there: tuple[int, ...]) -> None:
    made = resident(of=[layers()[place] for place in there])
    assert_holds(made, 1, write(made, 1, ONE, method))
