"""The report: paired intervals, shares of a gap, and a page whose other text stays."""

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dynmerge.evaluation.simplex import even_grid
from study.cells import Cell, cells_file, read_cells, restore, write_row
from study.places import grid_skills, places
from study.report import DOCS, TABLES, examples_of, quality_of, replaced
from study.suite import Suite
from study.suites import GRID_STEPS, SUITES
from study.tables import (
    elsewhere_table,
    fronts_table,
    gap_closed,
    methods_table,
    preferences_table,
    regret_table,
)


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
    rows = regret_table(Suite("encoder", cells)).splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == ["average", "centre"]
    for row in rows:
        assert "| 0.000 [0.000, 0.000] | 0.375 [" in row
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


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Suite]]:
    """Both suites as the record has them."""
    folder = tmp_path_factory.mktemp("record")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("study.cells.cache_folder", lambda: folder)
        restore()
        yield [Suite.read(name) for name in SUITES]


def test_every_recorded_row_says_what_it_depends_on(recorded: list[Suite]) -> None:
    for each in recorded:
        assert all(re.fullmatch("[0-9a-f]{16}-[0-9a-f]{16}", c.inputs) for c in each.cells.values())


def test_what_the_page_and_the_figures_say_is_what_the_record_has(recorded: list[Suite]) -> None:
    page = (DOCS / "quality.md").read_text("utf-8")
    figures = json.loads((DOCS / "quality.json").read_text("utf-8"))
    for each in recorded:
        assert figures[each.name] == quality_of(each)
        for name, table_of in TABLES.items():
            if table := table_of(each):
                assert replaced(page, f"{each.name}-{name}", table) == page, name


def test_a_front_counts_what_each_step_towards_a_task_does_to_it() -> None:
    skills, cells = grid_skills("abcde"), {}
    for preference in even_grid(skills, GRID_STEPS):
        for skill, share in zip(skills, preference.vector(skills), strict=True):
            for name, right in (("grid:mean", round(4 * share)), ("grid:linear-p4", 2)):
                rights = [1] * right + [0] * (4 - right)
                cells[name, str(preference), skill, 0] = cell(name, skill, rights, str(preference))
    whole = Suite("encoder", cells | _five_tasks())
    first, second = fronts_table(whole).splitlines()[2:]
    assert first.startswith("| mean | 0.0")
    assert first.endswith("| 60/60 | 60 |")
    assert second.startswith("| linear-p4 | 0.125 [")
    assert second.endswith("| 60/60 | 60 |")


def test_elsewhere_tells_where_a_method_is_least_above_another() -> None:
    cells = {}
    for at, rho in places(5).items():
        for task, share in zip("abcde", rho.tolist(), strict=True):
            for method, right in (("mean", 2), ("tara-a-map", 1 if at == "edge-third" else 4)):
                if share:
                    rights = [1] * right + [0] * (4 - right)
                    cells[method, at, task, 0] = cell(method, task, rights, at)
    whole = Suite("encoder", cells)
    (row,) = elsewhere_table(whole).splitlines()[2:]
    assert row.startswith("| the default over `linear` | +37.5 [")  # (5 * .5 - .25) / 6
    assert "| edge-third: -25.0 [" in row
    mean, default = preferences_table(whole).splitlines()[2:]
    assert mean.endswith("| 0.500 | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 |")
    assert default.endswith("| 1.000 | 1.000 | 1.000 | 1.000 | 0.250 | 1.000 | 0.875 |")


def _five_tasks() -> dict[tuple[str, str, str, int], Cell]:
    return {("single", "centre", task, 0): cell("single", task, [1] * 4) for task in "abcde"}
