import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from dynmerge.adapters.adapter import Adapter
from dynmerge.bank.bank import BaseIdentity
from dynmerge.bank.build import build_bank
from dynmerge.errors import ExamplesError
from dynmerge.evaluation.curves import draw_curves, draw_front
from dynmerge.evaluation.results import Results, stated
from dynmerge.evaluation.scores import Judgement, evaluate, own_recipe
from dynmerge.merging.choice import default_method, parse_method
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from dynmerge.student import Student
from dynmerge.texts.language import Choices
from dynmerge.texts.passages import Passage, Passages
from dynmerge.texts.rows import Row
from tests.conftest import tiny_model
from tests.engines.conftest import greedy_steps, prompt, skills
from tests.reference import accuracy_and_nats, merged_deltas, written_out

LABELS = ("yes", "no", "mix")


@pytest.fixture
def adapters() -> Mapping[str, Adapter]:
    return skills(tiny_model())


@pytest.fixture
def student(adapters: Mapping[str, Adapter]) -> Iterator[Student]:
    made = Student(tiny_model(), build_bank(BaseIdentity("tiny", "0" * 64), adapters))
    yield made
    made.close()


@pytest.fixture
def examples(
    student: Student, adapters: Mapping[str, Adapter], base_folder: Path
) -> dict[str, Passages]:
    """For ada, what she says herself and what the base model says; for bob, labels."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    assert isinstance(student.model, PreTrainedModel)
    speakers = [written_out(tiny_model(), merged_deltas(adapters, {"ada": 1.0})), tiny_model()]
    said = []
    for n in range(14):
        asked = prompt(9 + n, n)
        answer, _ = greedy_steps(speakers[n % 3 == 0], asked, 1 + n % 5)
        said.append(Passage((*asked, *answer[:-1]), tuple(answer)))
    labelled = [Row(prompt=f"mix {n}", answer=LABELS[n % 3]) for n in range(14)]
    return {
        "ada": Passages(student.model, said),
        "bob": Choices(student.model, tokenizer, labelled, LABELS),
    }


def recipe(student: Student, weights: Mapping[str, float], method: str = "linear") -> Recipe:
    return Recipe(Preference.of(weights), parse_method(method), student.bank.digest)


def by_hand(
    adapters: Mapping[str, Adapter], weights: Mapping[str, float], asked: Passages
) -> tuple[float, float]:
    """With W + Delta written out, one row at a time. Labels: a model whose vocabulary they are."""
    model = written_out(tiny_model(), merged_deltas(adapters, weights))
    if asked.classes:
        # The other tokens' logits are taken away.
        keep = torch.full((384,), -1e9)
        keep[list(asked.classes)] = 0
        head = model.lm_head
        head.register_forward_hook(lambda _layer, _inputs, output: output + keep)
    passages = [(passage.tokens, passage.targets) for passage in asked.passages]
    with torch.no_grad():
        return accuracy_and_nats(model, passages)  # type: ignore[arg-type]


def test_accuracies_are_what_a_loop_over_the_model_written_out_counts(
    student: Student, adapters: Mapping[str, Adapter], examples: dict[str, Passages]
) -> None:
    weights = {"ada": 0.5, "bob": 0.3, "cyd": 0.2}
    recipes = [recipe(student, weights), recipe(student, {"base": 1})]
    told: list[tuple[int, int]] = []
    found = evaluate(
        student, examples, recipes, batch=4, progress=lambda done, total: told.append((done, total))
    )
    for made, expected in ((found.scores[0][1], weights), (found.scores[1][1], {})):
        for skill, asked in examples.items():
            accuracy, nats = by_hand(adapters, expected, asked)
            assert made[skill].accuracy == pytest.approx(accuracy)
            assert made[skill].loss == pytest.approx(nats, abs=1e-3)
    for skill, asked in examples.items():
        accuracy, nats = by_hand(adapters, {skill: 1.0}, asked)
        assert found.alone[skill].accuracy == pytest.approx(accuracy)
        assert found.alone[skill].loss == pytest.approx(nats, abs=1e-3)
    assert found.scores[0][0] is recipes[0]
    assert told[-1] == (14 * 6, 14 * 6)
    assert found.alone["ada"].accuracy > found.scores[1][1]["ada"].accuracy


def test_batches_change_nothing_and_examples_keep_their_places(
    student: Student, examples: dict[str, Passages]
) -> None:
    recipes = [recipe(student, {"ada": 0.5, "bob": 0.5})]
    one, many = (
        evaluate(student, examples, recipes, batch=size).scores[0][1]["ada"] for size in (1, 5)
    )
    assert torch.equal(one.right, many.right)
    assert one.counts.tolist() == examples["ada"].counts(range(14))
    torch.testing.assert_close(one.nats, many.nats, atol=1e-4, rtol=1e-4)


def test_a_skill_alone_is_one_in_its_own_unit(
    student: Student, examples: dict[str, Passages]
) -> None:
    found = evaluate(student, examples, [own_recipe(student.bank, "ada")])
    judgement = Judgement(found, samples=200)
    one = judgement.normalised(found.scores[0][1])["ada"].interval()
    assert (one.low, one.value, one.high) == (1, 1, 1)


def test_what_has_no_answers_cannot_be_evaluated(student: Student, base_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    assert isinstance(student.model, PreTrainedModel)
    unlabelled = Choices(student.model, tokenizer, [Row(prompt="mix")], LABELS)
    with pytest.raises(ExamplesError, match="the examples of 'bob' have no answers"):
        evaluate(student, {"bob": unlabelled}, [])


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


def test_a_method_is_told_without_its_defaults() -> None:
    assert stated(default_method()) == "linear"
    for text in ("ties;density=0.5", "pico+linear+svc;floor=0.2;p=2", "dare-ties;seed=4"):
        assert stated(parse_method(text)) == text
    assert parse_method(stated(parse_method("ties;density=0.2"))) == parse_method("ties")


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
