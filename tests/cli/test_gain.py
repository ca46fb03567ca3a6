"""What `dynmerge calibrate` says of scores and of what serves where nobody names a method."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.calibration import Calibration
from dynmerge.bank.edit import with_calibration
from dynmerge.bank.storage import load_bank, save_bank
from dynmerge.cli.gain import say_gain, say_serving

TEXTS = {"ada": {"examples": 2, "sha256": "a"}}
OTHERS = {"ada": {"examples": 2, "sha256": "b"}}
AT = torch.tensor([0.5, 0.25, 0.25])


@pytest.fixture(scope="module")
def bank(built: Path) -> FactorBank:
    return load_bank(built)


def trained(
    bank: FactorBank,
    method: str,
    score: float,
    held_out: Mapping[str, object] = TEXTS,
    objective: str = "distil",
    at: torch.Tensor | None = None,
) -> Calibration:
    """What a training whose best held-out score is `score` leaves; that of linear is 0.5."""
    checks = [{"step": 0, "loss": None, "score": 0.9}, {"step": 2, "loss": 1.0, "score": score}]
    record = {
        "settings": {"objective": objective},
        "held_out": held_out,
        "linear": 0.5,
        "checks": checks,
        "kept": "learned",
    }
    tensors = {".p": torch.tensor(score)} | ({} if at is None else {".at": at})
    return Calibration(method, "norm", bank.coordinates_digest, tensors, record)


@pytest.mark.parametrize(
    ("before", "found", "said"),
    [
        (
            [("adamerging", 0.321)],
            ("tara-a", 0.614),
            "now serves tara-a;scale=1 where nobody names a method (held-out score 0.614, worse "
            "than adamerging's 0.321 on the same texts: --drop tara-a goes back)",
        ),
        (
            [("adamerging", 0.321)],
            ("tara-a", 0.3),
            "now serves tara-a;scale=1 where nobody names a method (held-out score 0.3, no worse "
            "than adamerging's 0.321 on the same texts: --drop tara-a goes back)",
        ),
        (
            [("adamerging", 0.3, OTHERS)],
            ("tara-a", 0.3),
            "now serves tara-a;scale=1 where nobody names a method (adamerging served before, "
            "whose held-out score is of other texts: --drop tara-a goes back)",
        ),
        # Cross-entropy and divergence are no two scores of one kind.
        (
            [("adamerging", 0.3, TEXTS, "labels")],
            ("tara-a", 0.3, TEXTS, "entropy"),
            "now serves tara-a;scale=1 where nobody names a method (adamerging served before, "
            "whose held-out score is of other texts: --drop tara-a goes back)",
        ),
        (
            [],
            ("tuned", 0.4),
            "now serves tuned;scale=1 where nobody names a method (held-out score 0.4, no worse "
            "than linear's 0.5 on the same texts: --drop tuned goes back)",
        ),
        (
            [("tara-a", 0.3)],
            ("tara-a", 0.4),
            "serves  tara-a;scale=1 where nobody names a method (held-out score 0.4, worse than "
            "the former tara-a's 0.3 on the same texts)",
        ),
        (
            [("tara-a", 0.3)],
            ("adamerging", 0.2),
            "serves  tara-a;scale=1 where nobody names a method",
        ),
        (
            [("tara-a", 0.3), ("tuned", 0.4)],
            ("tara-a", 0.3, TEXTS, "distil", AT),
            "now serves tuned;scale=1 where nobody names a method (tara-a did)",
        ),
    ],
)  # fmt: skip
def test_what_serves_now_is_said_with_the_scores_of_both(
    bank: FactorBank,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    before: Sequence[tuple],  # type: ignore[type-arg]
    found: tuple,  # type: ignore[type-arg]
    said: str,
) -> None:
    for each in before:
        bank = with_calibration(bank, trained(bank, *each))
    new = trained(bank, *found)
    say_serving(new, bank, save_bank(with_calibration(bank, new), tmp_path / "bank"))
    assert capsys.readouterr().out == f"{said}\n"


def test_a_record_that_says_nothing_is_compared_with_nothing(
    bank: FactorBank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = Calibration("tuned", "norm", bank.coordinates_digest, {".p": torch.tensor(2.0)})
    bank = with_calibration(bank, silent)
    new = trained(bank, "tara-a", 0.3)
    say_serving(new, bank, save_bank(with_calibration(bank, new), tmp_path / "bank"))
    assert "(tuned served before, whose held-out score is of other texts: " in (
        capsys.readouterr().out
    )


def test_linear_stands_beside_what_was_learned_and_what_is_worse_is_named(
    bank: FactorBank, capsys: pytest.CaptureFixture[str]
) -> None:
    say_gain(trained(bank, "tara-a", 0.4))
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1].split() == ["linear", "-", "0.5"]
    say_gain(trained(bank, "tara-a", 0.6, at=AT))
    assert capsys.readouterr().out.splitlines()[-2:] == [
        shown.splitlines()[-1],
        "what was kept, 0.6, is worse there than linear, 0.5: it serves where it is asked for by "
        "name, and nowhere else",
    ]
