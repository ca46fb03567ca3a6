"""What `calibrate` gives is what a bank carries and what requests get."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import product
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dynmerge.bank.bank import FactorBank
from dynmerge.bank.calibration import Calibration
from dynmerge.bank.edit import with_calibration
from dynmerge.calibration.calibrate import GAUSS_NEWTON, NORMS, calibrate, calibration_of, weighted
from dynmerge.calibration.judge import Judge
from dynmerge.calibration.learned import Learned
from dynmerge.calibration.plan import MAX_SEED, PULLS, UNITS, Objective, Plan, published
from dynmerge.calibration.teachers import alone, lessons
from dynmerge.calibration.train import Training
from dynmerge.cli.commands.quality import Objective as Offered
from dynmerge.errors import CalibrationError, ExamplesError
from dynmerge.merging.carried.granularity import GRANULARITIES
from dynmerge.merging.carried.maps import FORMS, LINEAR
from dynmerge.merging.choice import parse_method
from dynmerge.merging.diagonal import Diagonal, is_diagonal
from dynmerge.merging.merge import merge
from dynmerge.merging.methods import METHODS
from dynmerge.merging.support import normed
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from dynmerge.student import Student
from dynmerge.texts.passages import Passages
from tests.calibration.network import Points

Texts = dict[str, Passages]
Sheets = dict[str, Points]
AT = (0.25, 0.0, 0.75)
WISHES = ((0.2, 0.5, 0.3), (0.0, 0.375, 0.625), (0.0, 1.0, 0.0))
TRAINED = [form for form in FORMS if form != GAUSS_NEWTON]
QUICK = Plan("tara-a", steps=2, batch=2, check=2)


def recipe(bank: FactorBank, method: str, rho: tuple[float, ...]) -> Recipe:
    shares = dict(zip(bank.names, rho, strict=True))
    return Recipe(Preference.of(shares), parse_method(method), bank.digest)


def asked(bank: FactorBank, method: str, rho: tuple[float, ...]) -> list[Tensor]:
    """The cores that a request gets."""
    core = merge(bank, recipe(bank, method, rho)).core
    assert core is not None
    return bank.layout.split(core)


def carried(bank: FactorBank, found: Calibration, learned: Learned) -> FactorBank:
    """The bank with it; at request time it is what was learned, at every preference it serves."""
    assert METHODS[found.method].needs == found.method
    full = with_calibration(bank, found)
    wishes = WISHES if found.at is None else (found.at,)
    for rho in wishes:
        cores = learned.cores(torch.tensor(rho))
        for mine, theirs in zip(asked(full, found.method, rho), cores, strict=True):
            assert_close(mine, theirs.detach(), atol=1e-5, rtol=1e-5)
        if is_diagonal(parse_method(found.method)):
            diagonal = Diagonal(full)
            parts = diagonal.of(recipe(full, found.method, rho)).split(diagonal.sizes)
            for module, d, core in zip(full.modules, parts, cores, strict=True):
                assert_close((module.left * d) @ module.right, core.detach(), atol=1e-5, rtol=1e-5)
    if found.at is None:
        for mine, own in zip(asked(full, found.method, WISHES[2]), alone(bank, 1), strict=True):
            assert_close(mine, own, atol=1e-6, rtol=1e-6)
    json.dumps(dict(found.record), allow_nan=False)
    return full


def moved(one: Learned, other: Learned) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return any(not torch.equal(mine, theirs) for (_, mine), (_, theirs) in pairs)


@pytest.mark.parametrize(
    ("method", "form", "objective"),
    list(product(GRANULARITIES, TRAINED, ("distil", "entropy", "labels"))),
)
def test_what_was_trained_is_what_requests_get(
    method: str,
    form: str,
    objective: Objective,
    small: Student,
    points: Sheets,
    held_points: Sheets,
) -> None:
    at = AT if form == "fixed" else None
    plan = Plan(method, form, objective, at, steps=2, batch=2, check=2)
    training = Training(small, points, held_points, plan)
    training.run()
    assert moved(training.learned, Learned.start(small.bank, method, form))
    found = calibration_of(training.learned, plan, points, held_points, {})
    assert (found.method, found.form, found.at) == (method, form, at)
    carried(small.bank, found, training.learned)


def kept_tables(bank: FactorBank, found: Calibration) -> Learned:
    """The tables of a calibration, as they were learned."""
    full = with_calibration(bank, found)
    start = Learned.start(bank, found.method, found.form)
    groups = zip(full.learned(found.method), start.tables, strict=True)
    return start.holding([{label: own[label] for label in first} for own, first in groups])


def test_the_best_on_held_out_texts_is_kept_and_recorded(
    pupil: Student, texts: Texts, held_out: Texts
) -> None:
    plan = replace(QUICK, steps=12, check=4, batch=4)
    found = calibrate(pupil, texts, held_out, plan)
    record = cast("dict[str, Any]", found.record)
    assert record["kept"] == "learned"
    assert record["settings"]["seed"] == 0
    assert record["texts"]["bob"] == {"examples": 6, "sha256": texts["bob"].digest}
    assert record["held_out"]["ada"] == {"examples": 3, "sha256": held_out["ada"].digest}
    assert [check["step"] for check in record["checks"]] == [0, 4, 8, 12]
    assert record["checks"][0]["loss"] is None
    learned = kept_tables(pupil.bank, found)
    score = Judge.of(pupil, held_out, "distil").score(learned.cores)
    assert score == pytest.approx(min(check["score"] for check in record["checks"]), abs=1e-6)
    carried(pupil.bank, found, learned)


def test_it_goes_on_from_a_state(small: Student, points: Sheets, held_points: Sheets) -> None:
    plan = replace(QUICK, steps=4)
    states: list[Mapping[str, Any]] = []
    whole = calibrate(small, points, held_points, plan, lambda now: states.append(now.state()))
    steps: list[int] = []
    later = calibrate(
        small, points, held_points, plan, lambda now: steps.append(now.step), states[0]
    )
    assert steps == [4]
    assert later.digest == whole.digest
    assert later.record == whole.record


def test_certainty_that_leads_away_from_the_adapters_is_not_kept(
    pupil: Student, texts: Texts, held_out: Texts
) -> None:
    plan = Plan("tara-a", objective="entropy", steps=8, batch=4, rate=0.5, check=4)
    training = Training(pupil, texts, held_out, plan)
    training.run()
    centre = torch.full((3,), 1 / 3)
    entropies = []
    for learned in (training._origin, training.learned):
        with pupil.under(learned.cores(centre)):
            found = lessons(pupil, held_out, "entropy", 8)
            entropies.append(sum(lesson.mean(8) for lesson in found))
    assert entropies[1] < entropies[0] - 0.1
    assert training.checks[-1].score > training.checks[0].score + 0.1
    kept = calibrate(pupil, texts, held_out, plan)
    assert kept.record["kept"] == "start"
    start = Learned.start(pupil.bank, "tara-a", "ratio", LINEAR)
    assert not moved(kept_tables(pupil.bank, kept), start)


def test_a_training_that_ends_in_no_number_is_recorded(
    pupil: Student, texts: Texts, held_out: Texts
) -> None:
    plan = replace(QUICK, method="core", rate=1e30)
    found = calibrate(pupil, texts, held_out, plan)
    record = cast("dict[str, Any]", found.record)
    assert record["kept"] == "start"
    assert record["checks"][-1]["score"] is None
    json.dumps(record, allow_nan=False)


def test_as_published(small: Student, points: Sheets, held_points: Sheets) -> None:
    plan = replace(published("tara-b", AT), steps=2, check=1)
    assert (plan.objective, plan.mu, plan.normalise) == ("entropy", 1.0, False)
    assert plan.rate * UNITS["fixed"] == pytest.approx(1e-3)
    assert (plan.batch, plan.decay) == (16, 0.01)
    found = calibrate(small, points, held_points, plan)
    learned = kept_tables(small.bank, found)
    carried(small.bank, found, learned)
    # Of those who are absent nothing is learned.
    for group, own in zip(small.bank.groups, learned.tables, strict=True):
        owners = GRANULARITIES["tara-b"].owners(group)
        assert own["fixed"][:, owners == 1].unique().numel() <= 2
        assert torch.all((own["fixed"] - 0.4).abs() < 0.01)


def test_tuned_is_the_best_of_the_norms(pupil: Student, held_out: Texts) -> None:
    found = calibrate(pupil, {}, held_out, Plan("tuned"))
    assert found.record["texts"] == {}
    assert found.record["held_out"] == {
        name: {"examples": 3, "sha256": own.digest} for name, own in held_out.items()
    }
    scores = cast("dict[str, float]", found.record["scores"])
    assert list(scores) == [f"linear;p={p:g}" for p in NORMS]
    p = float(found.shared["p"])
    assert scores[f"linear;p={p:g}"] == min(scores.values())
    bank, judge = pupil.bank, Judge.of(pupil, held_out, "distil")
    again = judge.score(lambda rho: weighted(bank, normed(rho, p)))
    assert again == pytest.approx(min(scores.values()))
    full = with_calibration(bank, found)
    for mine, theirs in zip(
        asked(full, "tuned", WISHES[0]), asked(full, f"linear;p={p:g}", WISHES[0]), strict=True
    ):
        assert_close(mine, theirs)


def test_texts_that_a_method_would_ignore_are_refused(
    pupil: Student, texts: Texts, held_out: Texts
) -> None:
    reason = "tuned is chosen by the held-out score alone: hold out the texts of ada, bob, cyd too"
    with pytest.raises(ExamplesError, match=reason):
        calibrate(pupil, texts, held_out, Plan("tuned"))


def test_regmean_is_carried_where_it_helps(pupil: Student, texts: Texts, held_out: Texts) -> None:
    found = calibrate(pupil, texts, held_out, Plan("regmean"))
    scores = cast("dict[str, float]", found.record["scores"])
    assert scores["regmean"] < scores["linear"]
    full = with_calibration(pupil.bank, found)
    for mine, own in zip(asked(full, "regmean", WISHES[2]), alone(full, 1), strict=True):
        assert_close(mine, own, atol=1e-5, rtol=1e-5)
    judge = Judge.of(pupil, held_out, "distil", torch.tensor(WISHES[0]))
    asked_score = judge.at(torch.tensor(WISHES[0]), asked(full, "regmean", WISHES[0]))
    plain = judge.at(torch.tensor(WISHES[0]), weighted(full, torch.tensor(WISHES[0])))
    assert asked_score < plain


def test_gauss_newton_needs_no_training(pupil: Student, texts: Texts, held_out: Texts) -> None:
    plan, told = Plan("adamerging", GAUSS_NEWTON), list[tuple[int, int]]()
    found = calibrate(
        pupil, texts, held_out, plan, progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (18, 18)
    assert (found.form, found.labels) == (GAUSS_NEWTON, ("information",))
    scores = cast("dict[str, float]", found.record["scores"])
    best = f"ridge {cast('float', found.record['ridge']):g}"
    assert scores[best] == min(scores.values()) < scores["linear"]
    learned = kept_tables(pupil.bank, found)
    carried(pupil.bank, found, learned)
    again = Judge.of(pupil, held_out, "distil").score(learned.cores)
    assert again == pytest.approx(scores[best], abs=1e-6)


@pytest.mark.parametrize("plan", [Plan("regmean"), Plan("adamerging", GAUSS_NEWTON)])
def test_a_closed_form_that_does_not_help_is_refused(
    plan: Plan, pupil: Student, texts: Texts, strange: Texts
) -> None:
    with pytest.raises(CalibrationError, match=r"held-out score is .* no better than linear"):
        calibrate(pupil, texts, strange, plan)


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        (Plan("ties"), r"nothing is learned for the method 'ties' \(known: tuned, regmean, adam"),
        (Plan("tara-a", "spline"), r"no form 'spline' \(known: ratio, bubbles"),
        (Plan("core", GAUSS_NEWTON), "is for adamerging: the coefficients of core are too many"),
        (Plan("tara-a", GAUSS_NEWTON), "the coefficients of tara-a are too many"),
        (Plan("adamerging", GAUSS_NEWTON, "labels"), "of the objective distil; labels has none"),
        (Plan("tuned", objective="entropy"), "tuned is chosen by the held-out score"),
        (Plan("tuned", "bubbles"), "tuned trains nothing: it has no form to choose"),
        (
            Plan("regmean", "fixed", at=(0.5, 0.5, 0.0)),
            r"regmean trains nothing: .* has the form 'fixed' at \(0.5, 0.5, 0.0\)",
        ),
        (Plan("regmean", at=(0.5, 0.5, 0.0)), "regmean trains nothing"),
        (Plan("tara-a", "fixed"), "belongs to the form fixed"),
        (Plan("tara-a", at=(0.5, 0.5, 0.0)), "belongs to the form fixed"),
        (Plan("tara-a", "fixed", at=(0.5, 0.5)), "no preference over the bank's 3 skills"),
        (Plan("tara-a", "fixed", at=(0.5, 0.7, -0.2)), "no preference over"),
        (Plan("tara-a", "fixed", at=(0.5, 0.5, 0.5)), "no preference over"),
        (Plan("tara-a", "fixed", at=(math.nan, 0.5, 0.5)), "no preference over"),
        (Plan("tara-a", "fixed", at=(0.5, math.nan, 0.5)), "no preference over"),
        (Plan("tara-a", "fixed", at=(0.0, 1.0, 0.0)), "nothing to learn"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    plan: Plan, complaint: str, small: Student, points: Sheets, held_points: Sheets
) -> None:
    with pytest.raises(CalibrationError, match=complaint):
        calibrate(small, points, held_points, plan)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"objective": "x"}, r"no objective 'x' \(known: distil, entropy, labels\)"),
        ({"rate": math.nan}, "rate is nan, not a number from 0"),
        ({"rate": -0.1}, "rate is -0.1"),
        ({"rate": True}, "rate is True, not a number from 0"),
        ({"rate": "1"}, "rate is '1', not a number from 0"),
        ({"rate": 10**400}, "rate is 1000"),
        ({"decay": math.inf}, "decay is inf"),
        ({"pull": -1.0}, "pull is -1.0"),
        ({"pull": False}, "pull is False"),
        ({"mu": "1"}, "mu is '1', not a number above 0"),
        ({"mu": True}, "mu is True"),
        ({"mu": 0.0}, "mu is 0.0, not a number above 0"),
        ({"mu": math.nan}, "mu is nan"),
        ({"steps": 0}, "steps is 0, not a whole number from 1"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"batch": 0}, "batch is 0"),
        ({"check": 0}, "check is 0"),
        ({"patience": True}, "patience is True"),
        ({"seed": -1}, "seed is -1, not a whole number from 0"),
        ({"seed": 2**64}, r"seed is 18446744073709551616, not .* from 0 to 2\*\*64 - 1"),
        ({"seed": True}, "seed is True"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_where_it_is_made(
    setting: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(CalibrationError, match=complaint):
        Plan("tara-a", **setting)


def test_a_plan_says_the_pull_of_its_method() -> None:
    assert [Plan(method).pull for method in ("core", "tara-a", "regmean")] == [0.001, 0, 0]
    assert "pull=0.001," in repr(Plan("core"))
    assert repr(Plan("core")) == repr(Plan("core", pull=PULLS["core"]))
    assert asdict(Plan("core", pull=0.0))["pull"] == 0
    assert published("core", AT).pull == 0


def test_every_seed_that_a_plan_takes_is_one_of_torch() -> None:
    for seed in (0, MAX_SEED):
        torch.Generator().manual_seed(Plan("core", seed=seed).seed)


def test_the_command_offers_every_objective() -> None:
    assert [each.value for each in Offered] == list(get_args(Objective))


@pytest.mark.parametrize("plan", [QUICK, Plan("regmean"), Plan("adamerging", GAUSS_NEWTON)])
def test_every_skill_needs_texts(plan: Plan, pupil: Student, texts: Texts, held_out: Texts) -> None:
    some = {name: own for name, own in texts.items() if name != "cyd"}
    with pytest.raises(ExamplesError, match=r"no texts for the skill 'cyd' \(given: ada, bob\)"):
        calibrate(pupil, some, held_out, plan)
    with pytest.raises(ExamplesError, match="no texts for the skill 'ada'"):
        calibrate(pupil, texts, {}, plan)
    for given in ((texts | {"eve": texts["ada"]}, held_out), (texts, held_out | {"eve": {}})):
        with pytest.raises(ExamplesError, match=r"texts for no skill, 'eve' \(known: ada, bob, c"):
            calibrate(pupil, *given, plan)  # type: ignore[arg-type]
