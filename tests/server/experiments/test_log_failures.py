"""What a full, read-only or vanished disk does to the log: nothing to requests, and all counted."""

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dynmerge.errors import LogError, OutcomeConflict, UnknownRequest
from dynmerge_server.experiments import log as log_module
from dynmerge_server.experiments.log import Log, LogConfig
from dynmerge_server.experiments.reading import open_readonly
from dynmerge_server.experiments.records import Revision
from tests.server.experiments.logged import exposure, finish, outcome, until, written

ROOT = Path(__file__).parents[3]
LONG = "ada=0.5, bob=0.5" * 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs" / "log.sqlite"


@pytest.fixture
def log(path: Path) -> Iterator[Log]:
    log = Log(LogConfig(path, queue=200, batch=50, flush_seconds=0.02))
    yield log
    log.close()


def fill(log: Log) -> None:
    """Leave the file no page more; SQLite fails as on a full disk."""
    connection = log._writer.handle.connection()
    connection.execute("PRAGMA max_page_count = 1")  # as few as there are


def make_room(log: Log) -> None:
    log._writer.handle.connection().execute("PRAGMA max_page_count = 1000000")


def count(path: Path, table: str = "exposures", where: str = "TRUE") -> int:
    with closing(open_readonly(path)) as connection:
        [(found,)] = connection.execute(f"SELECT count(*) FROM {table} WHERE {where}").fetchall()
    return int(found)


async def test_a_full_disk_loses_the_oldest_only_and_writing_goes_on_by_itself(
    log: Log, path: Path
) -> None:
    log.expose(exposure("before"))
    written(log)
    fill(log)
    slowest = 0.0
    for index in range(300):
        shown = exposure(f"r{index}", preference=LONG)
        began = time.thread_time()
        log.expose(shown)
        log.finish(finish(shown))
        slowest = max(slowest, time.thread_time() - began)
    assert slowest < 0.05
    until(lambda: "full" in (log.stats().last_error or ""))
    stats = log.stats()
    assert stats.waiting <= 200 + 50
    make_room(log)
    written(log)
    stats = log.stats()
    assert stats.errors >= 1
    there = count(path, where="request_id != 'before'")
    assert 0 < there == 300 - stats.lost_exposures
    assert count(path, where="status = 200") == 300 - stats.lost_finishes
    assert stats.written == 601 - stats.lost_exposures - stats.lost_finishes
    with closing(open_readonly(path)) as connection:
        newest = connection.execute("SELECT request_id FROM exposures ORDER BY rowid").fetchall()
    assert newest[1:] == [(f"r{index}",) for index in range(300 - there, 300)]


async def test_an_outcome_for_a_full_disk_is_queued_and_lands_when_there_is_room(
    log: Log, path: Path
) -> None:
    log.expose(exposure("written"))
    written(log)
    fill(log)
    log.expose(exposure("waits", preference=LONG * 40))
    assert await log.outcome(outcome("waits", comment="x" * 4000)) == "queued"
    assert await log.outcome(outcome("written", "id", comment="x" * 4000)) == "queued"
    with pytest.raises(UnknownRequest):
        await log.outcome(outcome("unknown", comment="x" * 4000))
    assert await log.outcome(outcome("written", "id", value=9.0)) == "queued"  # unseen
    make_room(log)
    written(log)
    assert count(path, "outcomes") == 2
    until(lambda: log.stats().lost_outcomes == 1)  # the one that said something else
    with pytest.raises(OutcomeConflict):
        await log.outcome(outcome("written", "id", value=9.0))


def test_an_arm_is_kept_while_the_disk_is_full(log: Log) -> None:
    fill(log)
    log.expose(exposure(unit="u", preference=LONG * 40))
    until(lambda: log.stats().errors)
    assert log.kept("tone", "u") == ("warm", 0)
    make_room(log)
    written(log)
    assert log.kept("tone", "u") == ("warm", 0)


def test_closing_with_a_full_disk_ends_and_counts_what_is_lost(log: Log) -> None:
    fill(log)
    for _ in range(20):
        log.expose(exposure(preference=LONG * 10))
    began = time.monotonic()
    log.close()
    assert time.monotonic() - began < 5
    assert log.stats().lost_exposures == 20


async def test_a_folder_that_vanishes_and_returns_loses_nothing_that_fits(
    log: Log, path: Path
) -> None:
    log.expose(exposure("before", unit="before"))
    written(log)
    away = path.parent.with_name("away")
    path.parent.rename(away)
    log.expose(exposure("meanwhile"))
    assert await log.outcome(outcome("meanwhile")) == "queued"
    assert log.kept("tone", "before") is None
    with pytest.raises(LogError) as raised:
        log.add(Revision("tone", 1, 0, 1.0, "api", "{}"))
    assert str(path.parent) not in str(raised.value)
    with pytest.raises(LogError):
        log.revisions()
    assert log.version() == 0
    stats = log.stats()
    assert (stats.errors > 3, stats.bytes) == (True, 0)
    assert str(path.parent) not in str(stats.last_error)
    away.rename(path.parent)
    written(log)
    assert (count(path), count(path, "outcomes")) == (2, 1)
    assert log.kept("tone", "before") == ("warm", 0)


def test_a_file_that_was_replaced_by_its_copy_is_written_on_and_by_another_is_not(
    log: Log, path: Path, tmp_path: Path
) -> None:
    log.expose(exposure("first"))
    written(log)
    copy = tmp_path / "copy"
    with closing(open_readonly(path)) as connection:
        connection.execute("VACUUM INTO ?", (str(copy),))
    Log(LogConfig(tmp_path / "other")).close()
    for each in path.parent.iterdir():
        each.unlink()
    (tmp_path / "other").rename(path)
    log.expose(exposure("second"))
    until(lambda: "another log" in (log.stats().last_error or ""))
    assert count(path) == 0
    path.unlink()
    shutil.move(copy, path)
    written(log)
    assert count(path) == 2


def test_past_max_bytes_records_are_lost_and_what_is_too_old_makes_room(path: Path) -> None:
    limits: dict[str, Any] = {"max_bytes": 200_000, "flush_seconds": 0.01}
    log = Log(LogConfig(path, **limits))
    old = time.time() - 10 * 86_400
    for _ in range(1000):
        log.expose(exposure(preference=LONG, time=old))
    with pytest.raises(LogError, match="max_bytes"):
        asyncio.run(_told_until_full(log))
    assert log.stats().lost_outcomes == 1
    log.add(Revision("tone", 1, 0, 1.0, "api", "{}"))
    log.close()
    lost = log.stats()
    assert lost.lost_exposures == 1000 - count(path)
    assert 0 < lost.lost_exposures < 1000
    assert "max_bytes" in (lost.last_error or "")
    assert path.stat().st_size < 600_000

    log = Log(LogConfig(path, **limits, retention_days=9.0))
    shown = exposure("new")
    log.expose(shown)
    log.close()
    assert log.stats().lost_exposures == 0
    assert count(path, where="request_id = 'new'") == 1


async def _told_until_full(log: Log) -> None:
    written(log)
    await log.outcome(outcome("r"))


def test_a_record_that_no_row_can_hold_does_not_stop_the_others(log: Log, path: Path) -> None:
    log.expose(exposure("one"))
    log.expose(exposure("\ud800"))
    log.expose(exposure("two", phase=2**70))
    log.expose(exposure("three", merge_id=None))
    log.expose(exposure("four"))
    written(log)
    until(lambda: log.stats().lost_exposures == 3)
    assert count(path) == 2


def test_a_lost_exposure_takes_its_end_along(log: Log) -> None:
    log.finish(finish(exposure()))
    until(lambda: log.stats().lost_finishes == 1)


async def test_another_process_that_holds_the_file_only_delays(log: Log, path: Path) -> None:
    log.expose(exposure("r"))
    written(log)
    with closing(open_readonly(path)):
        other = Log(LogConfig(path))
        holding = other._writer.handle.connection()
        holding.execute("BEGIN IMMEDIATE")
        began = time.thread_time()
        log.expose(exposure("s"))
        assert log.kept("tone", "u") == ("warm", 0)
        assert time.thread_time() - began < 0.05
        assert await log.outcome(outcome("s")) == "queued"
        holding.execute("ROLLBACK")
        other.close()
    written(log)
    assert (count(path), count(path, "outcomes")) == (2, 1)


def test_who_is_forgotten_on_a_full_disk_is_so_when_there_is_room(
    log: Log, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "FORGET_SECONDS", 0.5)
    fill(log)
    log.expose(exposure(unit=log.hashed("ada"), preference=LONG * 40))
    with pytest.raises(LogError, match="when it can"):
        log.forget("ada")
    make_room(log)
    written(log)
    assert count(path) == 0


def test_who_is_to_be_forgotten_is_so_however_much_else_waits(
    log: Log, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "FORGET_SECONDS", 0.1)
    log.expose(exposure(unit=log.hashed("ada")))
    written(log)
    fill(log)
    log.expose(exposure(preference=LONG * 40))
    with pytest.raises(LogError, match="when it can"):
        log.forget("ada")
    for _ in range(300):
        log.expose(exposure(unit="bob", preference=LONG * 40))
    make_room(log)
    written(log)
    assert count(path, where="unit != 'bob'") == 0
    assert 200 <= count(path) == 301 - log.stats().lost_exposures


AS_NOBODY = """
import os, sys
from pathlib import Path
from dynmerge.errors import ConfigError
from dynmerge_server.experiments.log import Log, LogConfig
from dynmerge_server.experiments.reading import open_readonly
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    Log(LogConfig(Path(sys.argv[1])))
except ConfigError as error:
    print(error)
print(open_readonly(Path(sys.argv[1])).execute("SELECT count(*) FROM exposures").fetchall())
"""


def test_a_read_only_folder_is_refused_at_the_start_and_can_be_reported_on() -> None:
    def asked() -> tuple[str, str]:
        found = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(path)],
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stderr
        refused, counted = found.stdout.splitlines()
        return refused, counted

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        path = folder / "log.sqlite"
        log = Log(LogConfig(path))
        log.expose(exposure())
        written(log)
        folder.chmod(0o555)
        try:
            while_served = asked()
            folder.chmod(0o755)
            log.close()
            folder.chmod(0o555)
            after = asked()
        finally:
            log.close()
            folder.chmod(0o755)
    for refused, counted in (while_served, after):
        assert str(path) in refused
        assert "is read-only" in refused
        assert counted == "[(1,)]"
