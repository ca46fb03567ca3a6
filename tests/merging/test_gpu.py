"""Merges made on a CUDA device are those made on the CPU: run by `make gpu`."""

from dataclasses import replace

import pytest
import torch

from dynmerge.adapters.lowrank import LowRank
from dynmerge.merging.choice import parse_method
from dynmerge.merging.merge import Merge, merge
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe
from tests.merging.dense import BANK, assert_same, written_out

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def on_cpu(made: Merge) -> Merge:
    own = {name: LowRank(A=u.A.cpu(), B=u.B.cpu()) for name, u in (made.own or {}).items()}
    core = None if made.core is None else made.core.cpu()
    return replace(made, core=core, own=own or None)


@pytest.mark.parametrize(
    "method",
    [
        "linear;p=4",
        "lora-soups",
        "tuned",
        "adamerging",
        "tara-a",
        "tara-b",
        "core",
        "regmean",
        *(f"{name};space={s}" for name in ("ties", "dare-ties") for s in ("core", "knots", "full")),
        "dare-linear",
        "della",
        "tsv-m",
        "iso-c",
        "iso-cts",
        "lego",
        "pico+ties+svc",
        "pico+knots-ties+svc",
    ],
)
def test_a_merge_made_on_the_device_is_the_one_made_on_the_cpu(method: str) -> None:
    preference = Preference.of({"ada": 0.5, "bob": 0.3, "cyd": 0.2})
    recipe = Recipe(preference, parse_method(method), BANK.digest)
    there, here = merge(BANK.to("cuda"), recipe), merge(BANK, recipe)
    held = [there.core] if there.core is not None else [u.B for u in (there.own or {}).values()]
    assert all(tensor.device.type == "cuda" for tensor in held)
    assert there.energy == pytest.approx(here.energy, abs=1e-4)
    assert_same(written_out(BANK, on_cpu(there)), written_out(BANK, here), tolerance=1e-3)
