"""`dynmerge experiments` and `dynmerge tune`: a server as it is, a log as it was left."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from dynmerge.runtime import Runtime
from dynmerge_server.app import create_app
from dynmerge_server.config import ServerConfig
from tests.bank_factory import random_bank
from tests.cli.conftest import Run
from tests.conftest import tiny_tokenizer
from tests.server.asking import CHAT
from tests.server.conftest import served
from tests.server.echo_engine import EchoEngine

TONE = """
[experiments.tone]
weights = { plain = 1, warm = 3 }
primary = { outcome = "helpful" }
[experiments.tone.arms]
plain = { preference = "ada=1" }
warm = { preference = "ada=0.5, bob=0.5" }
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experiments.toml"
    path.write_text(TONE)
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.sqlite"


@pytest.fixture
def app(file: Path, log: Path) -> Iterator[Starlette]:
    config = ServerConfig.load(
        experiments={"file": file, "log": {"path": log, "flush_seconds": 0.01}}
    )
    runtime = Runtime(random_bank(), EchoEngine(tiny_tokenizer()))
    app = create_app(runtime, config)
    yield app
    app.state.serving.prompts.close()
    app.state.lab.close()
    runtime.close()


@pytest.fixture
def url(app: Starlette) -> Iterator[str]:
    with served(app, ServerConfig(port=0)) as address:
        yield address


def ask(url: str, unit: str) -> Any:
    reply = httpx.post(
        f"{url}/v1/chat/completions", json=CHAT, headers={"X-Dynmerge-Unit": unit}, verify=False
    )
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_file_is_checked_without_a_server(run: Run, file: Path) -> None:
    code, out, _ = run("experiments", "check", file)
    assert (code, out) == (
        0,
        "tone: running, traffic 1; plain 0.25, warm 0.75; control plain\n",
    )
    file.write_text(TONE.replace("preference", "preferenc", 1))
    code, _, err = run("experiments", "check", file)
    assert code == 2
    assert "arms.plain.preferenc (known: preference, preset, method)" in err


def test_a_server_is_listed_and_turned(run: Run, url: str) -> None:
    code, out, err = run("experiments", "list", "--server", url)
    assert code == 0
    assert "plain 0.25, warm 0.75" in out
    assert "0 lost" in err
    for words, said in (
        (("pause", "tone"), "tone: paused, traffic 1\n"),
        (("start", "tone"), "tone: running, traffic 1\n"),
        (("ramp", "tone", 0.5), "tone: running, traffic 0.5\n"),
        (("stop", "tone"), "tone: stopped, traffic 0.5\n"),
    ):
        assert run("experiments", *words, "--server", url)[:2] == (0, said)
    code, _, err = run("experiments", "start", "tone", "--server", url)
    assert (code, "stopped, for good" in err) == (2, True)
    code, _, err = run("experiments", "pause", "tine", "--server", url)
    assert (code, "no experiment named 'tine' (known: tone)" in err) == (2, True)


def test_a_server_that_is_not_there_is_said(run: Run) -> None:
    code, _, err = run("experiments", "list", "--server", "http://127.0.0.1:9")
    assert code == 2
    assert "cannot ask http://127.0.0.1:9" in err


def test_a_unit_is_forgotten(run: Run, url: str) -> None:
    ask(url, "somebody")
    code, out, _ = run("experiments", "forget", "somebody", "--server", url)
    assert (code, out) == (0, "deleted 1 exposures, and their outcomes\n")


def test_a_log_is_reported_exported_and_too_little_to_tune(
    run: Run, url: str, app: Starlette, log: Path, tmp_path: Path
) -> None:
    for number in range(8):
        ask(url, f"u{number}")
    app.state.lab.log.close()
    page, folder = tmp_path / "tone.html", tmp_path / "parquet"
    code, out, _ = run("experiments", "report", "tone", "--log", log, "--html", page)
    assert code == 0
    assert "tone: running" in out
    assert page.read_text().startswith("<!doctype html>")
    code, out, _ = run("experiments", "report", "tone", "--log", log, "--json")
    assert sum(json.loads(out)["units"]) == 8
    code, out, _ = run("experiments", "export", "--log", log, "-o", folder)
    assert sorted(Path(path).name for path in out.split()) == [
        "exposures.parquet",
        "outcomes.parquet",
    ]
    code, _, err = run("tune", "tone", "--log", log)
    assert (code, "different preferences have helpful" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("report", "tine"), "no experiment named 'tine' (known: tone)"),
        (("report", "tone", "--html", "/nowhere/x.html"), "cannot write /nowhere/x.html"),
    ],
)
def test_what_cannot_be_reported_is_said(
    run: Run, app: Starlette, log: Path, words: tuple[str, ...], message: str
) -> None:
    code, _, err = run("experiments", *words, "--log", log)
    assert code == 2
    assert message in err


def test_a_log_that_is_none_is_refused(run: Run, file: Path, tmp_path: Path) -> None:
    for path in (file, tmp_path / "nothing"):
        code, _, err = run("experiments", "report", "tone", "--log", path)
        assert code == 2
        assert f"cannot read the log of experiments {path}" in err
