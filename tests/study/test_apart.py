"""Processes of one thread: each gets its own words, and one that fails is told of."""

import subprocess

import pytest

from study.apart import run_apart


def test_every_call_runs_with_its_words_on_one_thread(capfd: pytest.CaptureFixture[str]) -> None:
    run_apart("tests.study.threads", [["one"], ["two"]], jobs=2)
    assert sorted(capfd.readouterr().out.splitlines()) == ["one 1", "two 1"]


def test_a_call_that_fails_is_told_of() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        run_apart("tests.study.threads", [["fail"]], jobs=1)
