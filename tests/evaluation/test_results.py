import json

import pytest

from dynmerge.errors import ConfigError
from dynmerge.evaluation.results import Results
from dynmerge.evaluation.scores import evaluate
from dynmerge.student import Student
from dynmerge.texts.passages import Passages
from tests.evaluation.conftest import raw_recipe, recipe


def test_results_say_it_all(student: Student, examples: dict[str, Passages]) -> None:
    wishes = [{"ada": 1.0}, {"ada": 0.5, "bob": 0.5}, {"bob": 1.0}]
    methods = ["linear", "ties;density=0.5"]
    recipes = [recipe(student, wish, method) for method in methods for wish in wishes]
    found = evaluate(student, examples, recipes)
    results = Results.of(found, examples, "tiny", student.bank.digest, samples=200, seed=3)
    assert [entry.method for entry in results.methods] == methods
    assert [merge.preference for merge in results.merges[:3]] == [
        "ada=1",
        "ada=0.5, bob=0.5",
        "bob=1",
    ]
    assert results.methods[0].over_first.value == 0
    assert results.methods[0].monotonicity.steps == 4
    first = results.merges[0]
    assert first.skills["ada"].accuracy.value == found.scores[0][1]["ada"].accuracy
    assert first.skills["ada"].normalised.value == 1
    assert any(merge.on_front for merge in results.merges)
    ratios = [skill.normalised.value for skill in results.merges[1].skills.values()]
    assert results.merges[1].average.value == pytest.approx(sum(ratios) / 2)
    data = json.loads(results.to_json())
    assert data["merges"][4]["skills"]["bob"]["right"] == found.scores[4][1]["bob"].right.tolist()
    assert data["tasks"]["ada"]["predictions"] == examples["ada"].counts(range(14))
    assert data["tasks"]["ada"]["digest"] == examples["ada"].digest
    again = Results.of(found, examples, "tiny", student.bank.digest, samples=200, seed=3)
    assert again == results
    text = results.to_markdown()
    assert "| ties;density=0.5 | ada=0.5, bob=0.5 |" in text
    assert f"| {first.skills['ada'].accuracy} |" in text


def test_raw_weights_are_no_shares_and_no_steps(
    student: Student, examples: dict[str, Passages]
) -> None:
    wishes = [recipe(student, {"ada": 1}), raw_recipe(student, "ada=2, bob=-1;raw")]
    found = evaluate(student, examples, wishes)
    results = Results.of(found, examples, "tiny", student.bank.digest, samples=100)
    point, raw = results.merges
    assert (point.shares, point.raw_weights) == ({"ada": 1.0}, None)
    assert (raw.shares, raw.raw_weights) == (None, {"ada": 2.0, "bob": -1.0})
    assert results.methods[0].monotonicity.steps == 0
    assert "| linear | ada=2, bob=-1;raw |" in results.to_markdown()


def test_results_of_no_recipe_are_refused(student: Student, examples: dict[str, Passages]) -> None:
    found = evaluate(student, examples, [])
    with pytest.raises(ConfigError, match="no recipe was evaluated"):
        Results.of(found, examples, "tiny", student.bank.digest)
