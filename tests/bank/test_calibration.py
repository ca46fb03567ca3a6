"""What a bank carries beside its factors, in memory."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import FactorBank, ModuleFactors
from dynmerge.bank.build import with_soups
from dynmerge.bank.calibration import Calibration
from dynmerge.bank.edit import (
    with_adapter,
    with_calibration,
    without,
    without_calibration,
    without_calibrations,
)
from dynmerge.bank.outline import Outline
from dynmerge.errors import BankError
from tests.bank_factory import (
    RANKS,
    random_adapter,
    random_bank,
    random_calibration,
)

BANK = random_bank()


def per_direction(module: ModuleFactors) -> dict[str, tuple[int, ...]]:
    return {"ratio": (len(module.ranks), sum(module.ranks)), "offset": (2,)}


def made(method: str = "tara-a", bank: FactorBank = BANK) -> Calibration:
    return random_calibration(bank, method, per_direction, shared={"p": torch.tensor(4.0)})


def changed(calibration: Calibration, name: str, tensor: torch.Tensor | None) -> Calibration:
    tensors = {key: value for key, value in calibration.tensors.items() if key != name}
    return replace(calibration, tensors=tensors if tensor is None else {**tensors, name: tensor})


def test_a_bank_without_calibrations_keeps_its_name() -> None:
    assert BANK.digest == BANK.factors_digest
    assert without_calibrations(with_calibration(BANK, made())).digest == BANK.digest


def test_what_was_learned_names_another_bank_of_the_same_factors() -> None:
    banks = [BANK, with_calibration(BANK, made())]
    banks.append(with_calibration(banks[-1], made("core")))
    moved = changed(made(), ".p", torch.tensor(4.5))
    banks.append(with_calibration(banks[1], moved))
    assert len({bank.digest for bank in banks}) == 4
    assert {bank.factors_digest for bank in banks} == {BANK.digest}
    assert [bank.calibrated for bank in banks] == [
        (),
        ("tara-a",),
        ("core", "tara-a"),
        ("tara-a",),
    ]
    assert banks[-1].calibration("tara-a") is moved


def test_everything_but_the_record_is_in_the_digest_and_the_order_of_tensors_is_not() -> None:
    calibration = made()
    backwards = dict(reversed(calibration.tensors.items()))
    same = [
        replace(calibration, record={"seed": 5}),
        replace(calibration, tensors=backwards),
        calibration.to("cpu"),
    ]
    assert {each.digest for each in same} == {calibration.digest}
    first = calibration.tensors["layers.0.q.ratio"]
    others = [
        replace(calibration, method="tara-b"),
        replace(calibration, form="bubbles"),
        replace(calibration, factors="1" * 64),
        changed(calibration, "layers.0.q.ratio", first + 1e-6),
        changed(calibration, "layers.0.q.ratio", first.reshape(-1)),
        changed(calibration, "layers.0.q.ratio", None),
        changed(calibration, ".q", torch.zeros(())),
    ]
    assert len({calibration.digest, *(each.digest for each in others)}) == 1 + len(others)


def test_a_calibration_made_for_other_factors_is_refused_by_both_names() -> None:
    other = random_bank({"eve": random_adapter({"layers.0.q": 2}, 3)})
    with pytest.raises(
        BankError,
        match=r"for tara-a was made for the factors "
        rf"{other.coordinates_digest[:12]}, not .*{BANK.coordinates_digest[:12]}",
    ):
        with_calibration(BANK, made(bank=other))
    soups = {module.name: dict.fromkeys(BANK.names, 1.0) for module in BANK.modules}
    with pytest.raises(BankError, match="was made for the factors"):
        with_soups(with_calibration(BANK, made()), soups)


def test_the_same_skills_in_other_coordinates_refuse_it() -> None:
    """Of orthonormal rows every rotation is as good a basis: an edit and back finds another."""
    apart = ({"layers.0.q": 2}, {"layers.1.q": 4, "layers.1.up": 3})
    adapters = {
        name: orthonormal(random_adapter(ranks, seed))
        for seed, (name, ranks) in enumerate(zip(("ada", "bob"), apart, strict=True))
    }
    bank = random_bank(adapters)
    edited = without(with_adapter(bank, "eve", random_adapter(RANKS["bob"], 7)), "eve")
    assert edited.digest == bank.digest
    pairs = zip(bank.modules, edited.modules, strict=True)
    assert max(float((one.right - other.right).abs().max()) for one, other in pairs) > 0.1
    assert with_calibration(bank.to("cpu"), made(bank=bank)).calibrated == ("tara-a",)
    with pytest.raises(BankError, match="was made for the factors"):
        with_calibration(edited, made(bank=bank))


def orthonormal(adapter: Adapter) -> Adapter:
    """The adapter with orthonormal rows in A and columns in B: its singular values are all 1."""
    updates = {
        name: LowRank(A=torch.linalg.qr(update.A.mT).Q.mT, B=torch.linalg.qr(update.B).Q)
        for name, update in adapter.modules.items()
    }
    return replace(adapter, modules=updates)


def test_every_method_has_a_draw_of_its_own() -> None:
    first, second = (made(method).tensors["layers.0.q.ratio"] for method in ("tara-a", "tara-b"))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("name", "tensor", "complaint"),
    [
        ("layers.0.k.ratio", torch.zeros(3, 5), r"'layers.0.k.ratio' is of a module the bank"),
        ("layers.0.q.offset", None, r"'layers.0.q.offset' is missing"),
        ("layers.0.q.more", torch.zeros(3), r"'layers.\d.\w.more' is missing"),
        ("layers.0.q.offset", torch.full((2,), torch.nan), "holds NaN or infinity"),
        ("layers.0.q.offset", torch.zeros(2).double(), r"is torch.float64, not float32"),
        ("ratio", torch.zeros(2), "is not named MODULE.LABEL"),
        ("layers.0.q.Ratio", torch.zeros(2), "is not named MODULE.LABEL"),
        ("../layers.ratio", torch.zeros(2), "is not named MODULE.LABEL"),
        (".at", torch.tensor([0.5, 0.5]), "serves a preference over 2 skills; this bank has 3"),
        (".at", torch.tensor([1.0, 1.0, 0.0]), r"'\.at' is no preference: \(1\.0, 1\.0, 0\.0\)"),
        (".at", torch.tensor([1.5, -0.5, 0.0]), r"'\.at' is no preference"),
    ],
)
def test_tensors_that_do_not_fit_the_bank_are_refused(
    name: str, tensor: torch.Tensor | None, complaint: str
) -> None:
    with pytest.raises(BankError, match=f"calibration for tara-a.*{complaint}"):
        with_calibration(BANK, changed(made(), name, tensor))


def test_modules_alike_have_tensors_alike() -> None:
    same = random_adapter({"layers.0.q": 2, "layers.1.q": 2}, 1)
    bank = random_bank({"one": same, "two": same})
    wrong = changed(made(bank=bank), "layers.1.q.offset", torch.zeros(3))
    with pytest.raises(BankError, match=r"offset' differs in shape from modules like it: .*3"):
        with_calibration(bank, wrong)


@pytest.mark.parametrize(("method", "form"), [("", "ratio"), ("tara a", "ratio"), ("core", "")])
def test_a_calibration_is_for_a_method_and_has_a_form(method: str, form: str) -> None:
    with pytest.raises(BankError, match="not names"):
        Calibration(method, form, BANK.digest, {".p": torch.ones(())})
    with pytest.raises(BankError, match="holds no tensors"):
        Calibration("core", "ratio", BANK.digest, {})


def test_two_for_one_method_are_refused() -> None:
    with pytest.raises(BankError, match="one per method, sorted"):
        replace(BANK, calibrations=(made(), made()))
    with pytest.raises(BankError, match=r"no calibration for core \(it has: tara-a"):
        with_calibration(BANK, made()).calibration("core")


def test_tensors_are_stacked_as_the_factors_are() -> None:
    same = random_adapter({"layers.0.q": 2, "layers.1.q": 2, "layers.1.up": 3}, 1)
    bank = random_bank({"one": same})
    calibration = made(bank=bank)
    bank = with_calibration(bank, calibration)
    learned = bank.learned("tara-a")
    assert learned is bank.learned("tara-a")
    assert sum(len(group.members) > 1 for group in bank.groups) == 1
    for group, tables in zip(bank.groups, learned, strict=True):
        assert set(tables) == {"ratio", "offset", "p"}
        assert tables["p"] is calibration.tensors[".p"]
        for place, member in enumerate(group.members):
            name = bank.modules[member].name
            for label, tensor in calibration.of(name).items():
                assert torch.equal(tables[label][place], tensor)


def test_an_outline_says_which_methods_are_calibrated_and_for_what() -> None:
    at = torch.tensor([0.5, 0.25, 0.25])
    fixed = changed(replace(made("core"), form="fixed"), ".at", at)
    bank = with_calibration(with_calibration(BANK, made()), fixed)
    outline = Outline.of_bank(bank)
    assert outline.calibrated == ("core", "tara-a")
    expected: Mapping[str, tuple[float, ...]] = {"core": (0.5, 0.25, 0.25)}
    assert outline.fixed_at == expected


def test_a_bank_with_calibrations_is_not_edited() -> None:
    bank = with_calibration(BANK, made())
    edits = (
        lambda: without(bank, "bob"),
        lambda: with_adapter(bank, "bea", random_adapter({"layers.0.q": 2}, 3)),
    )
    for edit in edits:
        with pytest.raises(BankError, match=r"\(tara-a\).*dynmerge calibrate BANK --drop tara-a;"):
            edit()
    assert without(without_calibrations(bank), "bob").calibrated == ()


def test_one_calibration_goes_and_the_others_stay() -> None:
    bank = with_calibration(with_calibration(BANK, made()), made("core"))
    assert without_calibration(bank, "tara-a").calibrated == ("core",)
    with pytest.raises(BankError, match=r"no calibration for tuned \(it has: core, tara-a\)"):
        without_calibration(bank, "tuned")
