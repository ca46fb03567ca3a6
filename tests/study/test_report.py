"""The report: paired intervals, shares of a gap, and a page whose other text stays."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from study.cells import Cell, cells_file, read_cells, restore, write_row
from study.places import places
from study.report import examples_of, quality_of, replaced
from study.suite import Suite
from study.tables import gap_closed, methods_table, regret_table


def cell(method: str, task: str, right: list[int], at: str = "centre") -> Cell:
    return Cell(method, at, task, right, [1] * len(right), 0.0, None)


def suite(**rights: list[int]) -> Suite:
    """One task, one seed, a method for each keyword."""
    found = {(name, "centre", "t", 0): cell(name, "t", right) for name, right in rights.items()}
    return Suite("encoder", found)


def test_the_share_of_a_gap_is_paired() -> None:
    tuned, single = [1, 0] * 50, [1, 1] * 50
    half = [1, 0, 1, 1] * 25
    found = gap_closed(suite(tuned=tuned, single=single, half=half), "half", [0])
    assert found is not None
    assert found.value == pytest.approx(0.5)
    assert found.interval().low < 0.5 < found.interval().high
    whole = gap_closed(suite(tuned=tuned, single=single), "single", [0])
    assert whole is not None
    assert set(whole.draws.tolist()) == {1.0}


def test_quality_names_the_default_after_its_row() -> None:
    found = quality_of(suite(**{"tara-a-map": [1, 1, 0, 1], "tuned": [0, 1, 0, 1]}))
    assert found["tuned"] == {
        "t": {"0": {"accuracy": 0.5, "interval": pytest.approx([0, 1])}},
    }
    assert found["default"] == found["tara-a-map"]


def test_a_method_counts_only_where_every_seed_and_task_has_it() -> None:
    cells = dict(suite(mean=[1, 1], pico=[1, 0]).cells)
    cells["pico", "centre", "t", 1] = cell("pico", "t", [1, 1])
    whole = Suite("encoder", cells)
    assert whole.average("mean") is None
    assert whole.average("pico") is not None


def test_what_stands_around_a_table_stays() -> None:
    page = "before\n\n<!-- begin x -->\nold\n<!-- end x -->\n\nafter\n"
    assert replaced(page, "x", "new") == page.replace("old", "new")
    assert replaced("text\n", "y", "new").endswith("<!-- begin y -->\nnew\n<!-- end y -->\n")


@pytest.mark.parametrize("tasks", [5, 6])
def test_places_are_preferences(tasks: int) -> None:
    for rho in places(tasks).values():
        assert rho.shape == (tasks,)
        assert float(rho.sum()) == pytest.approx(1)
        assert (rho >= 0).all()


def test_a_row_shows_its_seeds_and_is_compared_on_those() -> None:
    cells = dict(suite(tuned=[1, 0, 1, 0], pico=[1, 1, 1, 0]).cells)
    cells["tuned", "centre", "t", 1] = cell("tuned", "t", [1, 1, 1, 1])
    lines = methods_table(Suite("encoder", cells)).splitlines()
    assert [line.split(" | ")[3] for line in lines if "| pico" in line] == ["0.750"]
    assert "+25.0 [" in next(line for line in lines if "pico" in line)
    assert [line.split(" | ")[3] for line in lines if "| tuned" in line] == ["0.500 1.000"]


def test_regret_is_the_share_of_the_gap_that_a_map_loses() -> None:
    tasks, cells = "abcde", {}
    for at, rho in places(len(tasks)).items():
        for task, share in zip(tasks, rho.tolist(), strict=True):
            for method, right in (("mean", 0), ("tara-a-map", 3), ("tara-a-for-each", 4)):
                if share:
                    rights = [1] * right + [0] * (8 - right)
                    cells[method, at, task, 0] = cell(method, task, rights, at)
    (row,) = regret_table(Suite("encoder", cells)).splitlines()[2:]
    assert row.startswith("| tara-a | 0.000 [0.000, 0.000] | 0.375 [")
    assert "| +12.5 [" in row
    assert "| 0.250 [" in row


def test_rows_that_saw_other_examples_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("study.cells.cache_folder", lambda: tmp_path)
    write_row("encoder", 0, [cell("mean", "t", [1, 0, 1]), cell("pico", "t", [1, 0])])
    with pytest.raises(ValueError, match="encoder 0 pico: other examples of t"):
        Suite.read("encoder")


def test_the_record_gives_back_every_cell_and_overwrites_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = {
        ("mean", "centre", "t", 0): replace(cell("mean", "t", [1, 0]), nats=1.5, seconds=2.0),
        ("mean", "centre", "u", 1): Cell("mean", "centre", "u", [3, 0], [4, 1], 2.0, {"p": 4}),
    }
    record = tmp_path / "record.json.gz"
    written = {"encoder": examples_of(Suite("encoder", cells))}
    record.write_bytes(gzip.compress(json.dumps(written).encode()))
    monkeypatch.setattr("study.cells.cache_folder", lambda: tmp_path)
    cells_file("encoder", 1).write_text("")
    assert restore(record) == ["encoder-0"]
    assert read_cells("encoder", 0) == [cells["mean", "centre", "t", 0]]
    assert read_cells("encoder", 1) == []
    cells_file("encoder", 1).unlink()
    assert restore(record) == ["encoder-1"]
    assert read_cells("encoder", 1) == [cells["mean", "centre", "u", 1]]
