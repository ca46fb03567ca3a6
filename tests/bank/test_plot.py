import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from dynmerge.adapters.adapter import Adapter
from dynmerge.bank.inspection import inspect_bank
from dynmerge.bank.plot import (
    EnergyMap,
    check_picture,
    excess_table,
    plot_report,
    save_plot,
    split_name,
)
from dynmerge.errors import BankError
from tests.bank_factory import RANKS, random_adapter, random_adapters, random_bank

REPORT = inspect_bank(random_bank())
COLLECTIONS: dict[str, dict[str, Adapter]] = {
    "one": {"ada": random_adapter(RANKS["ada"], 0)},
    "nothing shared": {name: random_adapters()[name] for name in ("ada", "cyd")},
    "32": {f"s{seed}": random_adapter(RANKS["bob"], seed) for seed in range(32)},
}


@pytest.mark.parametrize("adapters", COLLECTIONS.values(), ids=COLLECTIONS.keys())
def test_a_picture_is_drawn_for_any_number_of_skills(
    adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    save_plot(inspect_bank(random_bank(adapters)), tmp_path / "bank.png")
    height, width, _ = imread(tmp_path / "bank.png").shape
    assert width > 1500
    assert 400 < height < 3000


def test_every_number_in_the_heat_maps_is_the_report_s() -> None:
    table = excess_table(REPORT, "B")
    assert table[0, 1] == table[1, 0] == REPORT.pairs[0].B.excess
    assert np.isnan(table[0, 2])
    assert np.isnan(np.diag(table)).all()
    figure = plot_report(REPORT)
    heat_map = next(axes for axes in figure.axes if axes.get_title(loc="left").startswith("Over"))
    texts = {text.get_text() for text in heat_map.texts}
    expected = {f"{pair.A.excess:+.3f}" for pair in REPORT.pairs if pair.A}
    assert texts == expected


def test_energy_is_shared_out_over_layers_and_kinds() -> None:
    energy = EnergyMap.of(REPORT.modules)
    assert energy.layers == ("0", "1")
    assert energy.kinds == ("q", "v", "up")
    assert np.nansum(energy.energy) == pytest.approx(1)
    assert np.isnan(energy.energy[1, 1])
    assert energy.ranks.tolist() == [[5, 6], [4, 0], [0, 5]]


def test_a_module_s_name_gives_its_layer_and_kind() -> None:
    assert split_name("model.layers.3.mlp.up_proj") == ("3", "mlp.up_proj")
    assert split_name("layers.11.mlp.experts.7.w1") == ("11", "mlp.experts.*.w1")
    assert split_name("lm_head") == ("-", "lm_head")


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"bank\.doc: its ending must be one of .*png"):
        save_plot(REPORT, tmp_path / "bank.doc")
    with pytest.raises(BankError, match=r"there is no folder .*nowhere"):
        save_plot(REPORT, tmp_path / "nowhere" / "bank.png")
    (tmp_path / "bank.png").mkdir()
    with pytest.raises(BankError, match=r"cannot draw .*bank\.png: it is a folder"):
        save_plot(REPORT, tmp_path / "bank.png")


def test_where_nothing_can_be_drawn_is_known_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(BankError, match=rf"bank\.png: {tmp_path} is not writable"):
        check_picture(tmp_path / "bank.png")
