"""A skill replaced while vLLM serves: requests finish on their version, caches never mix them."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from dynmerge.adapters.adapter import Adapter
from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import load_adapter
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from dynmerge.bank.storage import save_bank
from tests.conftest import ADAPTERS, save_adapter
from tests.engines.conftest import prompt
from tests.engines.vllm.asking import (
    TOKENS,
    Answer,
    Ask,
    alone,
    answers,
    assert_right,
    engine,
    request,
    until_ready,
)
from tests.engines.vllm.conftest import SIZE

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
pytestmark = pytest.mark.vllm

SHARED = tuple(prompt(64))  # four whole blocks, which the prefix cache keeps
OLD = [Ask(SHARED, {"ada": 1.0}), Ask(SHARED, {"ada": 0.5, "bob": 0.5}), Ask(SHARED)]
CLOSE = 5e-5  # float32, 75 tokens long; another version is off by ones
NEW = [*OLD, Ask(SHARED, {"ada": 1.0}, "tsv-m")]


@pytest.fixture
def other_adapters(
    wide_folder: Path, wide_adapters: Mapping[str, Adapter], tmp_path: Path
) -> Mapping[str, Adapter]:
    """The same skills but `ada`, who was trained again, on more layers."""
    config = ADAPTERS["bob"]
    folder = save_adapter(wide_folder, tmp_path / "ada", config, seed=99, size=SIZE)
    return {**wide_adapters, "ada": load_adapter(folder, BaseModel.open(wide_folder))}


def replace_a_skill(
    base: Path, folder: Path, old: FactorBank, new: FactorBank, settings: Mapping[str, object]
) -> tuple[list[list[Answer]], list[int], list[list[str]]]:
    from vllm import SamplingParams

    llm = engine(base, folder, settings, enable_prefix_caching=True, max_num_seqs=8)
    llm.collective_rpc("dynmerge_hold", args=(0, [old.digest]))
    before = answers(llm, old, OLD)
    again = answers(llm, old, OLD)
    # A request of the old version is running while the other one comes.
    running = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True)
    running.add_request(
        "late", {"prompt_token_ids": list(SHARED)}, sampling, lora_request=_numbered(old, 1)
    )
    running.step()
    save_bank(new, folder, source=str(base), replace=True)
    llm.collective_rpc("dynmerge_hold", args=(0, [old.digest, new.digest]))
    until_ready(llm, "dynmerge_load", str(folder), new.digest)
    both = llm.collective_rpc("dynmerge_stats")[0]["banks"]
    late = []
    while running.has_unfinished_requests():
        late += [each for each in running.step() if each.finished]
    after = answers(llm, new, NEW, first=50)
    llm.collective_rpc("dynmerge_hold", args=(0, [new.digest]))
    left = llm.collective_rpc("dynmerge_stats")[0]["banks"]
    # Back, and forth again: neither keeps its place for ever.
    for bank in (old, new):
        save_bank(bank, folder, source=str(base), replace=True)
        llm.collective_rpc("dynmerge_hold", args=(0, [old.digest, new.digest]))
        until_ready(llm, "dynmerge_load", str(folder), bank.digest)
        llm.collective_rpc("dynmerge_hold", args=(0, [bank.digest]))
    assert llm.collective_rpc("dynmerge_stats")[0]["banks"] == [new.digest]
    ids = list(late[0].outputs[0].token_ids)
    return [before, again, after], ids, [both, left]


def _numbered(bank: FactorBank, number: int) -> object:
    return request(OLD[0].recipe(bank), number)


@pytest.mark.parametrize(
    "settings", [{}, {"static": True, "spare_rank": 4}], ids=["planned", "static"]
)
def test_a_replaced_skill_speaks_anew_and_requests_in_flight_as_before(
    settings: Mapping[str, object],
    wide_folder: Path,
    wide_bank_folder: Path,
    wide_bank: FactorBank,
    wide_adapters: Mapping[str, Adapter],
    other_adapters: Mapping[str, Adapter],
) -> None:
    base = BaseModel.open(wide_folder)
    new = build_bank(BaseIdentity(base.name, base.fingerprint), other_adapters)
    (before, again, after), late, (both, left) = alone(
        replace_a_skill, wide_folder, wide_bank_folder, wide_bank, new, settings
    )
    assert_right(before, wide_adapters, wide_bank, OLD, CLOSE)
    assert_right(again, wide_adapters, wide_bank, OLD, CLOSE)
    assert tuple(late) == before[0].ids
    assert_right(after[:3], other_adapters, new, OLD, CLOSE)
    assert_right(after[3:], other_adapters, new, NEW[3:], CLOSE)
    assert after[0].ids != before[0].ids
    assert after[2].ids == before[2].ids  # the base model
    assert both == [wide_bank.digest, new.digest]
    assert left == [new.digest]


def refuse(
    base: Path, folder: Path, new: FactorBank, stranger: FactorBank, elsewhere: FactorBank
) -> list[str]:
    """What is said to versions that cannot be served."""
    llm = engine(base, folder, {"static": True, "versions": 2})
    said = []
    for bank in (stranger, new, elsewhere):
        save_bank(bank, folder, replace=True)
        state = {"state": "pending"}
        while state["state"] == "pending":
            state = llm.collective_rpc("dynmerge_load", args=(str(folder), bank.digest))[0]
        said.append(state["reason"])
    missing = llm.collective_rpc("dynmerge_prepare", args=(_ticket(new),))[0]
    return [*said, missing["reason"]]


def _ticket(bank: FactorBank) -> str:
    from dynmerge.engines.vllm.ticket import ticket

    recipe = OLD[0].recipe(bank)
    assert recipe is not None
    return ticket(recipe)


def test_versions_that_cannot_be_served_are_refused_with_the_reason(
    wide_folder: Path,
    wide_bank: FactorBank,
    wide_adapters: Mapping[str, Adapter],
    tmp_path: Path,
) -> None:
    base = BaseModel.open(wide_folder)
    folder = save_adapter(wide_folder, tmp_path / "eve", ADAPTERS["bob"], seed=7, size=SIZE)
    identity = BaseIdentity(base.name, base.fingerprint)
    few = {name: wide_adapters[name] for name in ("ada", "bob")}  # attention only
    few_folder = tmp_path / "few"
    save_bank(build_bank(identity, few), few_folder)
    new = build_bank(identity, {**few, "eve": load_adapter(folder, base)})
    stranger = build_bank(BaseIdentity("tiny", "0" * 64), wide_adapters)
    said = alone(refuse, wide_folder, few_folder, new, stranger, wide_bank)
    assert "another base model" in said[0]
    assert "start it with spare_rank" in said[1]
    assert "no skill changed model.layers.0.mlp" in said[2]
    assert "is not resident" in said[3]
