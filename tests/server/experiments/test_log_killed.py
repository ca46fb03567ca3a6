"""kill -9 in the middle of logging: what is lost is the end, and no more of it than promised."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from dynmerge_server.experiments.log import Log, LogConfig
from dynmerge_server.experiments.reading import open_readonly
from tests.server.experiments.logged import exposure, written

ROOT = Path(__file__).parents[3]
CHILD = Path(__file__).with_name("logging_child.py")
SLOW = 0.3  # seconds that a machine may take for a batch


@pytest.mark.parametrize("seconds", [1.5, 2.9])
def test_kill_9_loses_what_was_not_flushed_and_nothing_that_was_said_to_be_stored(
    tmp_path: Path, seconds: float
) -> None:
    path, told = tmp_path / "log.sqlite", tmp_path / "told"
    with told.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, str(CHILD), str(path)],
            stdout=output,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'server'}", "PATH": os.environ["PATH"]},
        )
        while not told.stat().st_size:
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
        child.send_signal(signal.SIGKILL)
        child.wait()
    lines = [line.split() for line in told.read_text().splitlines()]
    exposed = [record for what, record, _ in lines if what == "exposed"]
    finished = [record for what, record, _ in lines if what == "finished"]
    stored = [record for what, record, _ in lines if what == "stored"]
    assert len(exposed) > 50
    assert stored

    log = Log(LogConfig(path))  # the server starts again, and goes on
    log.expose(exposure("after"))
    written(log)
    log.close()
    with closing(open_readonly(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = connection.execute("SELECT id, status FROM exposures ORDER BY rowid").fetchall()
        outcomes = [each for (each,) in connection.execute("SELECT id FROM outcomes").fetchall()]
    ids = [record for record, _ in rows[:-1]]
    assert len(ids) == len(set(ids))
    assert len(outcomes) == len(set(outcomes))
    assert set(stored) <= set(outcomes)
    # Records are written in their order, so that nothing but an end can be missing. The last line
    # may have been lost before it was told.
    assert ids[: len(exposed)] == exposed[: len(ids)]
    assert len(ids) <= len(exposed) + 1
    ended = [record for record, status in rows[:-1] if status == 200]
    assert ended[: len(finished)] == finished[: len(ended)]
    assert len(ids) - 1 <= len(ended) <= len(ids)

    # By the child's own clock: the last flush_seconds, and those before, as their batch may have
    # been in the middle of being written. A machine that is busy holds the child up too.
    times = [float(seconds) for what, _, seconds in lines if what == "exposed"]
    longest = max(after - before for before, after in pairwise(times))
    lost = times[len(ids) :]
    ago = times[-1] - lost[0] if lost else 0.0
    print(f"killed after {seconds} s: lost {len(lost)} of {len(exposed)} exposures,", end=" ")
    print(f"the last {ago:.3f} s, {len(finished) - len(ended)} of {len(finished)} ends,", end=" ")
    print(f"0 of {len(stored)} stored; {longest:.3f} s without any")
    assert ago <= 2 * LogConfig(path).flush_seconds + SLOW + longest
