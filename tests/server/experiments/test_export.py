import asyncio
import threading
from datetime import datetime, timezone
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dynmerge.errors import ConfigError, LogError, UnknownExperiment
from dynmerge_server.experiments import export as export_module
from dynmerge_server.experiments.export import EXPOSURES, OUTCOMES, export
from dynmerge_server.experiments.log import Log, LogConfig
from dynmerge_server.experiments.records import Revision
from tests.server.experiments.logged import exposure, finish, outcome, written


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.sqlite"


def test_both_files_say_what_the_log_says(path: Path, tmp_path: Path) -> None:
    log = Log(LogConfig(path))
    shown = exposure("r", time=1_700_000_000.25)
    log.expose(shown)
    log.finish(finish(shown, empty=True))
    log.expose(exposure("open", experiment=None, arm=None, kind="outside"))
    asyncio.run(log.outcome(outcome("r", "o", value=0.5, comment="né 😀")))
    made = export(path, tmp_path / "out")
    log.close()
    assert made == [tmp_path / "out" / f"{name}.parquet" for name in ("exposures", "outcomes")]
    exposures, outcomes = (pq.read_table(each).to_pylist() for each in made)
    assert [tuple(row) for row in exposures] == [tuple(EXPOSURES)] * 2
    first = exposures[0]
    assert first["id"] == shown.id
    assert first["time"] == datetime(2023, 11, 14, 22, 13, 20, 250_000, timezone.utc)
    assert (first["empty"], first["status"], first["ttft"]) == (True, 200, 0.125)
    assert (exposures[1]["empty"], exposures[1]["arm"]) == (None, None)
    assert [tuple(row) for row in outcomes] == [tuple(OUTCOMES)]
    assert (outcomes[0]["exposure"], outcomes[0]["value"]) == (shown.id, 0.5)
    assert outcomes[0]["comment"] == "né 😀"


def test_one_experiment_comes_with_its_outcomes_and_votes_and_no_others(
    path: Path, tmp_path: Path
) -> None:
    log = Log(LogConfig(path))
    log.add(Revision("tone", 1, 0, 0.0, "api", '{"arms": {"A": {}, "B": {}}}'))
    log.expose(exposure("mine"))
    log.expose(exposure("pair", kind="pair", pair="p"))
    log.expose(exposure("other", experiment="other"))
    for request in ("mine", "p", "other"):
        asyncio.run(log.outcome(outcome(request)))
    log.close()
    exposures, outcomes = (pq.read_table(each) for each in export(path, tmp_path, "tone"))
    assert exposures["request_id"].to_pylist() == ["mine", "pair"]
    assert outcomes["request_id"].to_pylist() == ["mine", "p"]


def test_it_is_of_one_moment_while_a_server_writes_and_in_batches(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "ROWS", 100)
    log = Log(LogConfig(path, flush_seconds=0.005, batch=50))
    ending = threading.Event()

    def serve() -> None:
        while not ending.wait(0.002):
            shown = exposure(request)
            log.expose(shown)
            log.finish(finish(shown))

    request = "r"
    for _ in range(1000):
        log.expose(exposure())
    written(log)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        sizes = [pq.read_table(export(path, tmp_path)[0]).num_rows for _ in range(5)]
    finally:
        ending.set()
        thread.join()
        log.close()
    assert sizes == sorted(sizes)
    assert sizes[0] >= 1000
    assert log.stats().lost_exposures == 0
    assert pq.ParquetFile(tmp_path / "exposures.parquet").num_row_groups >= 10


def test_an_export_that_fails_leaves_what_was_there(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    log = Log(LogConfig(path))
    log.expose(exposure())
    written(log)
    before = {each: each.read_bytes() for each in export(path, out)}
    log._writer.handle.connection().execute("DROP TABLE outcomes")
    log.close()
    with pytest.raises(ConfigError, match="outcomes"):
        export(path, out)
    assert {each: each.read_bytes() for each in out.iterdir()} == before


def test_a_log_that_is_not_there_is_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(LogError, match="no such file"):
        export(path, tmp_path)
    assert not path.exists()


def test_an_experiment_that_is_not_there_is_named(path: Path, tmp_path: Path) -> None:
    Log(LogConfig(path)).close()
    with pytest.raises(UnknownExperiment, match=r"no experiment named 'tine' \(known: none\)"):
        export(path, tmp_path / "made", "tine")
