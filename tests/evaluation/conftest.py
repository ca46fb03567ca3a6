"""Fixtures: a student of three skills on the tiny model, and examples for two of them."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedModel

from dynmerge.adapters.adapter import Adapter
from dynmerge.bank.bank import BaseIdentity
from dynmerge.bank.build import build_bank
from dynmerge.merging.choice import parse_method
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from dynmerge.student import Student
from dynmerge.texts.language import Choices
from dynmerge.texts.passages import Passage, Passages
from dynmerge.texts.rows import Row
from tests.conftest import tiny_model
from tests.engines.conftest import greedy_steps, prompt, skills
from tests.reference import merged_deltas, written_out

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


def raw_recipe(student: Student, text: str) -> Recipe:
    preference = Preference.parse(text, allow_negative=True)
    return Recipe(preference, parse_method("linear"), student.bank.digest)
