"""Gain: what a calibration reaches on held-out texts, beside `linear` and what served before it.

Lower scores are better. Decides nothing: what serves is dynmerge.merging.demands's to say.
"""

from collections.abc import Mapping
from typing import Any

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.calibration import Calibration
from dynmerge.bank.inspection import CalibrationReport
from dynmerge.bank.manifest import Manifest
from dynmerge.bank.outline import Outline
from dynmerge.calibration.calibrate import ROUNDING
from dynmerge.cli.console import line, table
from dynmerge.merging.demands import default_for


def say_gain(found: Calibration) -> None:
    """The held-out scores of what was just found: of a training's checks, or of what was tried."""
    record: Mapping[str, Any] = found.record
    if "checks" not in record:
        table(("", "held-out score"), list(record["scores"].items()))
        return
    keys, linear = ("step", "loss", "score"), record["linear"]
    rows = [
        ["-" if check[key] is None else check[key] for key in keys] for check in record["checks"]
    ]
    table(("steps", "loss", "held-out score"), [*rows, ["linear", "-", linear]])
    if record["kept"] == "start":
        line("nothing learned was better on the held-out texts: the start was kept")
    best = CalibrationReport.of(found).best
    if best is not None and best > linear + ROUNDING:
        line(
            f"what was kept, {best:.4g}, is worse there than linear, {linear:.4g}: it serves where"
            " it is asked for by name, and nowhere else"
        )


def say_serving(found: Calibration, before: FactorBank, written: Manifest) -> None:
    """Which method serves now where nobody names one, and where that changed, at what score."""
    old, new = default_for(before), default_for(Outline.of_manifest(written))
    serving = f"{new} where nobody names a method"
    if found.method != new.name:
        line(f"serves  {serving}" if new == old else f"now serves {serving} ({old.name} did)")
        return
    comparison = _compared(found, before, old.name)
    if new == old:
        line(f"serves  {serving} ({comparison})")
    else:
        line(f"now serves {serving} ({comparison}: --drop {new.name} goes back)")


def _compared(found: Calibration, before: FactorBank, old: str) -> str:
    """The held-out score of what was found beside that of `old`, which served before."""
    own, other = CalibrationReport.of(found).best, _score_of(old, before, found)
    name = f"the former {old}" if old == found.method else old
    if own is None or other is None:
        return f"{name} served before, whose held-out score is of other texts"
    how = "worse than" if own > other + ROUNDING else "no worse than"
    return f"held-out score {own:.4g}, {how} {name}'s {other:.4g} on the same texts"


def _score_of(old: str, before: FactorBank, found: Calibration) -> float | None:
    """The held-out score of the method `old`, where that is of the texts that guarded `found`."""
    if old not in before.calibrated:
        return _linear(found.record)
    earlier = before.calibration(old)
    reports = [CalibrationReport.of(each) for each in (earlier, found)]
    measures = {report.objective == "labels" for report in reports}
    alike = earlier.record.get("held_out") == found.record["held_out"]
    return reports[0].best if alike and len(measures) == 1 else None


def _linear(record: Mapping[str, Any]) -> float:
    scores = record.get("scores", {})
    return float(record["linear"] if "linear" in record else scores["linear;p=1"])
