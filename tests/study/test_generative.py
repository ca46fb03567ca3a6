"""The generative suite without its downloads: where adapters lie, how the others are trained."""

import random

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from dynmerge.calibration import osrm
from study.cells import Cell
from study.encoder import adapter_folder
from study.encoder_tasks import TASKS
from study.generative import OTHERS, SKILLS, adapters
from study.generative_starts import ranks
from study.generative_training import JOINT, PASSES
from study.suite import Suite
from study.suites import OTHER_BANKS, SUITES
from study.tables import aims_table, methods_table

from train import PLANS, Row, batches  # isort: skip (study.generative finds it)


def test_no_two_adapters_lie_in_one_folder() -> None:
    seeds = SUITES["generative"].seeds
    kinds = [adapters, *OTHERS.values()]
    folders = [folder for kind in kinds for seed in seeds for folder in kind(seed).values()]
    assert len(folders) == len(set(folders)) == len(seeds) * (2 * len(SKILLS) + 1)


def test_every_adapter_that_is_measured_is_shipped() -> None:
    first, *_ = seeds = SUITES["generative"].seeds
    folders = [*(adapters(seed) for seed in seeds), *(kind(first) for kind in OTHERS.values())]
    for folder in (folder for found in folders for folder in found.values()):
        assert (folder / "adapter_model.safetensors").is_file(), folder
    for seed in SUITES["encoder"].seeds:
        for task in TASKS:
            for variant in ("plain", "osrm"):
                folder = adapter_folder(seed, task, variant)
                assert (folder / "adapter_model.safetensors").is_file(), folder
        assert (adapter_folder(seed, "joint") / "adapter_model.safetensors").is_file(), seed


@pytest.mark.parametrize("name", PLANS)
def test_the_ranks_of_a_plan_are_those_that_peft_gives(
    name: str, base_model: PreTrainedModel
) -> None:
    plan = PLANS[name]
    layers = [name for name, part in base_model.named_modules() if isinstance(part, nn.Linear)]
    config = LoraConfig(r=plan.r, target_modules=list(plan.modules), rank_pattern=plan.ranks)
    assert ranks(plan, layers) == osrm.ranks(get_peft_model(base_model, config))


def test_the_joint_adapter_covers_every_skill_with_no_less_rank() -> None:
    for plan in PLANS.values():
        assert set(plan.modules) <= set(JOINT.modules)
        assert max([plan.r, *plan.ranks.values()]) <= JOINT.r


def test_a_batch_is_of_one_part_and_every_row_comes_once() -> None:
    parts = [[Row([part] * length, 1) for length in range(2, 22)] for part in (5, 6, 7)]
    made = list(batches(parts, random.Random(0)))
    assert all(len({row.tokens[0] for row in batch}) == 1 for batch in made)
    given = [row.tokens for part in parts for row in part]
    assert sorted(row.tokens for batch in made for row in batch) == given


def test_the_joint_training_sees_each_row_as_often_as_its_own_skills() -> None:
    joint = {skill: PASSES.count(skill) * JOINT.epochs for skill in SKILLS}
    assert joint == {skill: plan.epochs for skill, plan in PLANS.items()}


def test_other_adapters_of_the_first_seed_are_compared_on_that_seed() -> None:
    scope = SUITES["generative"]
    assert [set(OTHER_BANKS) <= set(scope.rows(seed)) for seed in scope.seeds] == [1, 0, 0]
    on_all = {"mean": [1, 0, 0, 0], "tara-a-map": [1, 1, 0, 0], "tuned": [1, 0, 0, 0]}
    on_first = {"joint": [1, 1, 1, 1], "osrm-mean": [1, 1, 1, 0]}
    cells = {
        (method, "centre", "t", seed): Cell(method, "centre", "t", right, [1] * 4, 0.0, None)
        for seed in scope.seeds
        for method, right in (on_all | (on_first if seed == scope.seeds[0] else {})).items()
    }
    suite = Suite("generative", cells)
    table = [line.split(" | ") for line in aims_table(suite).splitlines()]
    told = {row[0][2:]: row[-1] for row in table}
    assert told["the default over the joint adapter"] == "-50.0 |"
    assert told["OSRM's adapters over the others, by `linear`"] == "+50.0 |"
    assert "| joint |" in methods_table(suite)
