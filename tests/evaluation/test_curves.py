from dynmerge.evaluation.curves import draw_curves, draw_front
from dynmerge.evaluation.results import Results
from dynmerge.evaluation.scores import evaluate
from dynmerge.student import Student
from dynmerge.texts.passages import Passages
from tests.evaluation.conftest import raw_recipe, recipe


def test_figures_have_a_panel_for_each_skill_and_pair(
    student: Student, examples: dict[str, Passages]
) -> None:
    recipes = [
        recipe(student, {"ada": 1}),
        recipe(student, {"bob": 1}),
        recipe(student, {"bob": 1}, "ties"),
    ]
    found = evaluate(student, examples, recipes)
    results = Results.of(found, examples, "tiny", student.bank.digest, samples=100)
    curves, front = draw_curves(results), draw_front(results)
    assert len(curves.axes) == 2
    assert "ada" in curves.axes[0].get_title(loc="left")
    assert [text.get_text() for text in curves.axes[0].get_legend().get_texts()] == [
        "linear",
        "ties",
    ]
    assert len(front.axes) == 1
    assert (front.axes[0].get_xlabel(), front.axes[0].get_ylabel()) == ("ada", "bob")
    alone = {"ada": examples["ada"]}
    found = evaluate(student, alone, recipes[:1])
    results = Results.of(found, alone, "tiny", student.bank.digest, samples=100)
    assert draw_front(results).axes[0].get_ylabel() == "worst skill"


def test_raw_weights_are_on_the_front_alone(
    student: Student, examples: dict[str, Passages]
) -> None:
    wishes = [recipe(student, {"ada": 1}), raw_recipe(student, "ada=2, bob=-1;raw")]
    found = evaluate(student, examples, wishes)
    results = Results.of(found, examples, "tiny", student.bank.digest, samples=100)
    curves, front = draw_curves(results), draw_front(results)
    for axes, share in zip(curves.axes, (1.0, 0.0), strict=True):
        line = next(line for line in axes.lines if line.get_label() == "linear")
        assert list(line.get_xdata()) == [share]
        assert len(axes.containers) == 1  # one merge's interval
    drawn = [line for line in front.axes[0].lines if line.get_marker() == "o"]
    assert sum(len(line.get_xdata()) for line in drawn) == 2
