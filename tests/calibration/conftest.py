"""A bank of real adapters that differ in rank, alpha, scaling rule and modules, and its student."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import load_adapter
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from dynmerge.student import Student
from dynmerge.texts.passages import Passage, Passages
from tests.calibration.network import Network, Points, network_bank
from tests.conftest import tiny_model

NAMES = ("ada", "bob", "cyd")


@pytest.fixture(scope="session")
def skilled(base_folder: Path, adapter_folders: dict[str, Path]) -> dict[str, Adapter]:
    base = BaseModel.open(base_folder)
    return {name: load_adapter(adapter_folders[name], base) for name in NAMES}


@pytest.fixture(scope="session")
def skill_bank(skilled: dict[str, Adapter]) -> FactorBank:
    return build_bank(BaseIdentity("tiny", "0" * 64), skilled)


@pytest.fixture
def pupil(skill_bank: FactorBank) -> Iterator[Student]:
    made = Student(tiny_model(), skill_bank)
    yield made
    made.close()


def passages(
    model: PreTrainedModel, seed: int, rows: int, words: range, known: bool = True
) -> Passages:
    """Random words in rows of different lengths; of each, one to three are predicted."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> tuple[int, ...]:
        places = torch.randint(len(words), (count,), generator=generator)
        return tuple(words[place] for place in places.tolist())

    made = []
    for row in range(rows):
        tokens, right = drawn(4 + row % 3), drawn(1 + row % 3)
        made.append(Passage(tokens, right if known else (None,) * len(right)))
    return Passages(model, made)


def own_words(task: int) -> range:
    """Two for each skill, so that what is learned on some of its texts holds on others."""
    return range(3 + 100 * task, 5 + 100 * task)


@pytest.fixture
def texts(pupil: Student) -> dict[str, Passages]:
    """What is learned from."""
    assert isinstance(pupil.model, PreTrainedModel)
    return {
        name: passages(pupil.model, task, 5 + task, own_words(task))
        for task, name in enumerate(NAMES)
    }


@pytest.fixture
def held_out(pupil: Student) -> dict[str, Passages]:
    """What guards it: as the texts are."""
    assert isinstance(pupil.model, PreTrainedModel)
    return {
        name: passages(pupil.model, 10 + task, 3, own_words(task))
        for task, name in enumerate(NAMES)
    }


@pytest.fixture
def strange(pupil: Student) -> dict[str, Passages]:
    """What guards it and has little to do with the texts."""
    assert isinstance(pupil.model, PreTrainedModel)
    words = range(3, 300)
    return {name: passages(pupil.model, 20 + task, 3, words) for task, name in enumerate(NAMES)}


@pytest.fixture
def small() -> Student:
    """A student whose model is a network of four layers: for many trainings."""
    return Student(Network(), network_bank())


@pytest.fixture
def points(small: Student) -> dict[str, Points]:
    return {name: Points(small.model, task, 6 + task, task) for task, name in enumerate(NAMES)}


@pytest.fixture
def held_points(small: Student) -> dict[str, Points]:
    return {name: Points(small.model, 10 + task, 4, task) for task, name in enumerate(NAMES)}
