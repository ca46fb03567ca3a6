"""What `dynmerge inspect --full` says in words: docs/diagnostics.md explains each number."""

from typing import TYPE_CHECKING

from dynmerge.cli.console import line, table
from dynmerge.diagnostics.bank import Diagnosis, Diagnostics, Spectrum

if TYPE_CHECKING:
    from dynmerge.diagnostics.sensitivity import Sensitivity

TOP = 3  # directions whose energy is said


def say_diagnostics(found: Diagnostics, sensitivity: "Sensitivity | None") -> None:
    """Tables by kind of module, over the modules that several skills change."""
    line()
    if not found.kinds:
        line("no module is changed by more than one skill")
    else:
        _say_overlap(found)
        _say_coverage(found)
        _say_spectra(found.kinds[-1])
    if sensitivity is not None:
        _say_sensitivity(sensitivity)


def _say_overlap(found: Diagnostics) -> None:
    line("overlap minus chance, and effective ranks of the factors, by kind of module")
    table(
        ("modules of kind", "count", "A: reads", "B: writes", "B > A", "erank A", "erank B"),
        [
            (
                kind.name,
                kind.modules,
                f"{kind.asymmetry.A.excess:+.3f}" if kind.asymmetry else "-",
                f"{kind.asymmetry.B.excess:+.3f}" if kind.asymmetry else "-",
                f"{kind.asymmetry.higher:.0%}" if kind.asymmetry else "-",
                kind.A.effective_rank,
                kind.B.effective_rank,
            )
            for kind in found.kinds
        ],
    )


def _say_coverage(found: Diagnostics) -> None:
    line()
    line("effective rank of all updates: their sum, and what a stack of them keeps of it")
    table(
        ("modules of kind", "sum", "dense", "rank-1, as trained", "rank-1, singular"),
        [
            (
                kind.name,
                kind.coverage.independent,
                f"{kind.coverage.dense_share:.0%}",
                f"{kind.coverage.rank_one_share:.0%}",
                f"{kind.coverage.singular_share:.0%}",
            )
            for kind in found.kinds
        ],
    )


def _say_spectra(whole: Diagnosis) -> None:
    line()
    line("singular values, mean over modules")
    rows = {
        "all B": whole.stacked.before,
        "all B after Pico": whole.stacked.after,
        "equal shares": whole.merged.before,
        "equal shares after Pico": whole.merged.after,
    }
    table(
        ("of", "norm", "omax", "erank", "stable rank", "condition", f"energy of {TOP}"),
        [(name, *_numbers(spectrum)) for name, spectrum in rows.items()],
    )


def _numbers(spectrum: Spectrum) -> tuple[float | str, ...]:
    return (
        spectrum.norm,
        spectrum.omax,
        spectrum.effective_rank,
        spectrum.stable_rank,
        spectrum.condition,
        f"{spectrum.top(TOP):.0%}",
    )


def _say_sensitivity(found: "Sensitivity") -> None:
    line()
    line(f"Jacobian of the {found.objective} at equal shares: condition {_kappa(found.condition)}")
    line(f"with every skill's row of norm 1: {_kappa(found.balanced_condition)}")
    table(
        ("skill", "examples", "predictions", found.objective, "norm of its row"),
        [
            (name, examples, predictions, value, sum(norm**2 for norm in norms) ** 0.5)
            for name, examples, predictions, value, norms in zip(
                found.skills,
                found.examples,
                found.predictions,
                found.values,
                found.norms,
                strict=True,
            )
        ],
    )
    line()
    line("misalignment xi between preferences (0: they ask for the same directions)")
    table(
        ("", *found.preferences),
        [
            (name, *(f"{value:.2f}" for value in row))
            for name, row in zip(found.preferences, found.misalignment, strict=True)
        ],
    )


def _kappa(condition: float | None) -> str:
    return "infinite" if condition is None else f"{condition:.3g}"
