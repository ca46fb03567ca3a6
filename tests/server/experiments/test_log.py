import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest

from dynmerge.errors import ConfigError, LogError, OutcomeConflict, UnknownRequest
from dynmerge_server.experiments.log import Log, LogConfig
from dynmerge_server.experiments.reading import open_readonly
from dynmerge_server.experiments.records import Revision
from dynmerge_server.experiments.rows import STEP
from tests.server.experiments.logged import exposure, finish, outcome, until, written

Open = Callable[..., Log]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.sqlite"


@pytest.fixture
def opened(path: Path) -> Iterator[Open]:
    """Opens logs of `path` with other settings, and closes them."""
    logs: list[Log] = []

    def opened(**settings: Any) -> Log:
        logs.append(Log(LogConfig(**{"path": path, "flush_seconds": 0.02, **settings})))
        return logs[-1]

    yield opened
    for log in logs:
        log.close()


def rows(path: Path, query: str, *values: object) -> list[Any]:
    with closing(open_readonly(path)) as connection:
        return connection.execute(query, values).fetchall()


async def test_an_exposure_its_end_and_its_outcome_are_one_story(opened: Open, path: Path) -> None:
    log = opened()
    shown = exposure("r1", pair=None, position=None, phase=2)
    ended = finish(shown)
    log.expose(shown)
    log.finish(ended)
    said = outcome("r1", value=0.75, comment="fine")
    assert await log.outcome(said) == "stored"
    assert rows(path, "SELECT * FROM exposures") == [(*astuple(shown), *astuple(ended)[1:])]
    assert rows(path, "SELECT * FROM outcomes") == [(*astuple(said), shown.id)]
    assert log.stats().written == 3
    assert rows(path, "PRAGMA journal_mode") == [("wal",)]


async def test_an_end_lands_whether_its_exposure_is_in_the_file_or_still_waits(
    opened: Open, path: Path
) -> None:
    log = opened()
    early, late = exposure("early"), exposure("late")
    log.expose(early)
    written(log)
    log.finish(finish(early))
    log.expose(late)
    log.finish(finish(late, status=499))
    written(log)
    assert rows(path, "SELECT status FROM exposures ORDER BY time") == [(200,), (499,)]


async def test_an_outcome_joins_the_newest_exposure_of_its_request(
    opened: Open, path: Path
) -> None:
    log = opened()
    first, second = exposure("again", time=1000.0), exposure("again", time=2000.0)
    log.expose(second)
    written(log)
    log.expose(first)
    await log.outcome(outcome("again"))
    assert rows(path, "SELECT exposure FROM outcomes") == [(second.id,)]


async def test_a_vote_joins_its_pair_and_feedback_on_one_answer_joins_that(
    opened: Open, path: Path
) -> None:
    log = opened()
    for position in (0, 1):
        log.expose(exposure(f"a{position}", kind="pair", pair="p1", position=position))
    vote = outcome("p1", name="vote", data_type="CATEGORICAL", category="tie")
    assert await log.outcome(vote) == "stored"
    assert await log.outcome(outcome("a1")) == "stored"
    joined = rows(path, "SELECT exposure FROM outcomes ORDER BY time")
    assert joined == [("p1",), rows(path, "SELECT id FROM exposures WHERE position = 1")[0]]


async def test_an_outcome_of_nothing_logged_is_refused(opened: Open) -> None:
    log = opened()
    log.expose(exposure("known"))
    with pytest.raises(UnknownRequest, match="'unknown'"):
        await log.outcome(outcome("unknown"))
    assert log.stats().lost_outcomes == 0


async def test_an_id_counts_once_and_its_first_content_counts(opened: Open, path: Path) -> None:
    log = opened()
    log.expose(exposure("r"))
    first = outcome("r", "id", value=1.0)
    assert await log.outcome(first) == "stored"
    assert await log.outcome(replace(first, time=first.time + 9)) == "again"
    with pytest.raises(OutcomeConflict, match="'id'"):
        await log.outcome(replace(first, value=0.0))
    both = [log.outcome(outcome("r", "twin", value=2.0)) for _ in range(2)]
    assert sorted(await asyncio.gather(*both)) == ["again", "stored"]
    assert rows(path, "SELECT value FROM outcomes ORDER BY value") == [(1.0,), (2.0,)]


async def test_many_outcomes_share_a_commit(opened: Open) -> None:
    log = opened(flush_seconds=0.2)
    log.expose(exposure("r"))
    written(log)
    began = time.monotonic()
    said = await asyncio.gather(*(log.outcome(outcome("r")) for _ in range(100)))
    assert set(said) == {"stored"}
    assert time.monotonic() - began < 100 * 0.2 / 4


async def test_an_outcome_whose_sender_left_is_stored(opened: Open, path: Path) -> None:
    log = opened(flush_seconds=0.1)
    log.expose(exposure("r"))
    task = asyncio.create_task(log.outcome(outcome("r")))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    written(log)
    assert rows(path, "SELECT count(*) FROM outcomes") == [(1,)]


def test_a_unit_keeps_the_arm_of_its_first_exposure(opened: Open) -> None:
    log = opened(flush_seconds=0.1)
    assert log.kept("tone", "u") is None
    log.expose(exposure(unit="u", kind="forced", arm="cold"))
    assert log.kept("tone", "u") is None
    log.expose(exposure(unit="u", arm="warm", phase=1))
    assert log.kept("tone", "u") == ("warm", 1)
    log.expose(exposure(unit="u", arm="cold", phase=2))
    assert log.kept("tone", "u") == ("warm", 1)
    written(log)
    assert log.kept("tone", "u") == ("warm", 1)
    log.expose(exposure(unit="u", arm="cold", phase=2))
    assert log.kept("tone", "u") == ("warm", 1)
    assert log.kept("other", "u") is None
    log.expose(exposure(unit="flagged", kind="flagged", arm="cold"))
    assert log.kept("tone", "flagged") == ("cold", 0)


def test_a_unit_keeps_its_arm_after_a_restart_and_in_another_process(opened: Open) -> None:
    first, second = opened(), opened()
    first.expose(exposure(unit="u", arm="cold"))
    first.close()
    assert second.kept("tone", "u") == ("cold", 0)
    assert opened().kept("tone", "u") == ("cold", 0)


def test_an_arm_is_kept_at_every_moment_while_it_is_written(opened: Open) -> None:
    log = opened(flush_seconds=0.001, batch=7)
    units = [f"u{index}" for index in range(500)]
    for unit in units:
        log.expose(exposure(unit=unit))
        assert log.kept("tone", unit) == ("warm", 0)
    assert {log.kept("tone", unit) for unit in units} == {("warm", 0)}


def test_units_are_hashed_alike_in_every_process_and_otherwise_in_every_log(
    opened: Open, tmp_path: Path
) -> None:
    one, same = opened(), opened()
    other = opened(path=tmp_path / "other.sqlite")
    assert one.hashed("ada") == same.hashed("ada") != other.hashed("ada")
    assert len(one.hashed("ada")) == 32
    assert one.hashed("\ud800") != one.hashed("ada")


def test_revisions_come_back_in_their_order_and_are_seen_by_others(opened: Open) -> None:
    one, other = opened(), opened()
    before = other.version()
    made = [
        Revision("tone", 1, 0, 1.0, "file", "{}"),
        Revision("length", 1, 0, 2.0, "api", '{"a": 1}', "why"),
        Revision("tone", 2, 1, 3.0, "guardrail", "{}", "errors"),
    ]
    one.add(made[0])
    one.add(*made[1:])
    assert other.revisions() == one.revisions() == made
    assert other.version() == one.version() != before
    one.expose(exposure())
    written(one)
    assert other.version() == one.version()


def test_of_two_processes_one_gets_a_revision_and_of_several_all_or_none(opened: Open) -> None:
    one, other = opened(), opened()
    one.add(Revision("tone", 1, 0, 1.0, "api", "{}"))
    late = [Revision("new", 1, 0, 2.0, "api", "{}"), Revision("tone", 1, 0, 2.0, "api", "{}")]
    with pytest.raises(LogError, match="new 1, tone 1"):
        other.add(*late)
    assert len(other.revisions()) == 1


async def test_who_is_forgotten_is_nowhere(opened: Open, path: Path) -> None:
    log = opened(flush_seconds=30)
    unit = log.hashed("ada")
    kept = exposure("kept", unit=log.hashed("bob"))
    log.expose(exposure("r1", unit=unit))
    log.expose(exposure("r2", unit=unit, kind="pair", pair="p"))
    log.expose(kept)
    said = [log.outcome(outcome(request)) for request in ("r1", "p", "kept")]
    tasks = [asyncio.create_task(each) for each in said]
    await asyncio.sleep(0)
    assert log.kept("tone", unit) is not None
    assert await asyncio.to_thread(log.forget, "ada") == 2
    assert await asyncio.gather(*tasks) == ["stored"] * 3
    assert log.kept("tone", unit) is None
    assert rows(path, "SELECT id FROM exposures") == [(kept.id,)]
    assert rows(path, "SELECT exposure FROM outcomes") == [(kept.id,)]
    assert unit.encode() not in path.read_bytes()
    assert await asyncio.to_thread(log.forget, "nobody") == 0


def test_what_is_too_old_goes_with_its_outcomes_in_steps(opened: Open, path: Path) -> None:
    log = opened()
    old = time.time() - 10 * 86_400
    for index in range(2 * STEP + 10):
        log.expose(exposure(f"old{index}", time=old + index))
    log.expose(exposure("new"))
    asyncio.run(log.outcome(outcome("old5", time=old)))
    asyncio.run(log.outcome(outcome("new")))
    log.close()
    opened(retention_days=9.0)
    until(lambda: rows(path, "SELECT request_id FROM exposures") == [("new",)])
    assert rows(path, "SELECT request_id FROM outcomes") == [("new",)]


def test_several_processes_write_one_file(path: Path) -> None:
    script = (
        "import asyncio, sys; from pathlib import Path\n"
        "from dynmerge_server.experiments.log import Log, LogConfig\n"
        "from tests.server.experiments.logged import exposure, finish, outcome\n"
        "log = Log(LogConfig(Path(sys.argv[1]), flush_seconds=0.01, batch=20))\n"
        "for index in range(300):\n"
        "    shown = exposure(f'{sys.argv[2]}-{index}')\n"
        "    log.expose(shown); log.finish(finish(shown))\n"
        "    if index % 30 == 0:\n"
        "        asyncio.run(log.outcome(outcome(shown.request_id)))\n"
        "log.close(); stats = log.stats()\n"
        "assert stats.written == 610 and stats.lost_exposures == 0, stats\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(path), str(number)],
            cwd=ROOT,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'server'}"},
        )
        for number in range(3)  # all make the file
    ]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    assert rows(path, "SELECT count(*), count(status) FROM exposures") == [(900, 900)]
    assert rows(path, "SELECT count(*) FROM outcomes") == [(30,)]


def test_any_thread_may_log(opened: Open, path: Path) -> None:
    log = opened(batch=10)

    def work() -> None:
        for _ in range(200):
            log.expose(exposure())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written(log)
    assert rows(path, "SELECT count(*) FROM exposures") == [(800,)]


def test_closing_writes_what_waits_and_leaves_one_file(opened: Open, path: Path) -> None:
    log = opened(flush_seconds=60)
    log.expose(exposure())
    log.close()
    log.close()
    assert rows(path, "SELECT count(*) FROM exposures") == [(1,)]
    log.expose(exposure())
    assert log.stats().lost_exposures == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "folder does not exist"),
        ("INSERT INTO meta VALUES ('schema', '0')", "schema 0"),
        ("CREATE TABLE birds (name)", "something else"),
    ],
)
def test_a_file_that_is_no_log_of_this_version_is_refused_by_name(
    tmp_path: Path, content: str, reason: str
) -> None:
    path = tmp_path / "absent" / "log" if not content else tmp_path / "old.sqlite"
    if content:
        with closing(sqlite3.connect(path)) as connection:
            if "meta" in content:
                connection.execute("CREATE TABLE meta (key, value)")
            connection.execute(content)
            connection.commit()
    with pytest.raises(ConfigError, match=reason) as raised:
        Log(LogConfig(path))
    assert str(path) in str(raised.value)


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.write_bytes(b"birds\n" * 1000)
    with pytest.raises(ConfigError, match="not a database"):
        Log(LogConfig(path))
    assert path.read_bytes() == b"birds\n" * 1000
