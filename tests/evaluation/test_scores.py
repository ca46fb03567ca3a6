from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.lowrank import LowRank
from dynmerge.bank.bank import BaseIdentity
from dynmerge.bank.build import build_bank
from dynmerge.errors import ConfigError, ExamplesError
from dynmerge.evaluation import scores
from dynmerge.evaluation.bootstrap import resamplings, share
from dynmerge.evaluation.scores import Judgement, check_samples, evaluate, own_recipe, score, stated
from dynmerge.merging.choice import default_method, parse_method
from dynmerge.student import Student
from dynmerge.texts.language import Choices
from dynmerge.texts.passages import Passages
from dynmerge.texts.rows import Row
from tests.conftest import tiny_model
from tests.evaluation.conftest import LABELS, recipe
from tests.reference import accuracy_and_nats, merged_deltas, written_out


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


def test_without_examples_nothing_can_be_evaluated(student: Student) -> None:
    assert isinstance(student.model, PreTrainedModel)
    with pytest.raises(ExamplesError, match="no examples of any skill"):
        evaluate(student, {}, [own_recipe(student.bank, "ada")])
    with pytest.raises(ExamplesError, match="the examples of 'ada' ask for no prediction"):
        evaluate(student, {"ada": Passages(student.model, [])}, [])


def with_one_too_large(adapters: Mapping[str, Adapter], skill: str) -> Student:
    """That skill's adapter makes float32 overflow, as one whose training diverged."""
    updates = adapters[skill].modules.items()
    modules = {name: LowRank(A=update.A, B=update.B * 1e37) for name, update in updates}
    changed = {**adapters, skill: Adapter(modules, "tiny")}
    return Student(tiny_model(), build_bank(BaseIdentity("tiny", "0" * 64), changed))


def test_a_merge_that_predicts_nan_is_refused_by_name(
    adapters: Mapping[str, Adapter], examples: dict[str, Passages]
) -> None:
    student = with_one_too_large(adapters, "cyd")
    asked = {"bob": moved(examples["bob"], student)}
    wish = recipe(student, {"bob": 0.5, "cyd": 0.5}, "ties;density=0.5")
    expected = r"^ties;density=0.5 at bob=0.5, cyd=0.5 predicts NaN on the examples of 'bob'"
    with pytest.raises(ExamplesError, match=expected):
        evaluate(student, asked, [wish])
    student.close()


def test_an_own_adapter_that_predicts_nan_is_found_before_any_merge_is_run(
    adapters: Mapping[str, Adapter], examples: dict[str, Passages]
) -> None:
    student = with_one_too_large(adapters, "bob")
    asked = {skill: moved(examples[skill], student) for skill in ("ada", "bob")}
    wishes = [recipe(student, {"ada": 0.8, "cyd": 0.2}), recipe(student, {"ada": 0.5, "bob": 0.5})]
    done: list[int] = []
    with pytest.raises(ExamplesError, match=r"^linear at bob=1 predicts NaN on .* 'bob'"):
        evaluate(student, asked, wishes, progress=lambda now, total: done.append(now))
    assert done[-1] == len(asked["ada"]) + len(asked["bob"])
    student.close()


def moved(examples: Passages, student: Student) -> Passages:
    """The same examples of another student's model."""
    assert isinstance(student.model, PreTrainedModel)
    return Passages(student.model, examples.passages, examples.classes)


def test_a_prediction_that_is_none_is_not_right(examples: dict[str, Passages]) -> None:
    """Though the likeliest of NaNs is the first class, which is right for a third of bob's."""
    head = examples["bob"].model.lm_head
    head.register_forward_hook(lambda _layer, _inputs, output: output * torch.nan)
    found = score(examples["bob"])
    assert found.accuracy == 0
    assert found.nats.isnan().all()


def test_estimates_are_those_of_the_resamplings_whole(
    student: Student, examples: dict[str, Passages]
) -> None:
    wishes = [own_recipe(student.bank, "ada"), recipe(student, {"ada": 0.5, "bob": 0.5})]
    found = evaluate(student, examples, wishes)
    judgement = Judgement(found, samples=200, seed=3)
    for by_skill in (found.alone, *(by_skill for _, by_skill in found.scores)):
        for skill, estimate in judgement.accuracies(by_skill).items():
            one, weights = by_skill[skill], resamplings(14, 200, 3, skill)
            expected = share(one.right, one.counts, weights)
            assert estimate.value == expected.value
            assert torch.equal(estimate.draws, expected.draws)


def test_more_numbers_than_memory_should_hold_are_refused(
    student: Student, examples: dict[str, Passages], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_samples(100_000, 165, 3)
    with pytest.raises(ConfigError, match=r"are 120300000 numbers, and .* at most 41562 resampl"):
        check_samples(100_000, 400, 3)
    found = evaluate(student, examples, [own_recipe(student.bank, "ada")])
    monkeypatch.setattr(scores, "HELD", 799)
    with pytest.raises(ConfigError, match="200 resamplings of 1 merges"):
        Judgement(found, samples=200)


def test_a_method_is_told_without_its_defaults() -> None:
    assert stated(default_method()) == "linear"
    for text in ("ties;density=0.5", "pico+linear+svc;floor=0.2;p=2", "dare-ties;seed=4"):
        assert stated(parse_method(text)) == text
    assert parse_method(stated(parse_method("ties;density=0.2"))) == parse_method("ties")
