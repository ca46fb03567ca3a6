"""`dynmerge experiments` and `dynmerge tune`: a running server's routes, or its log, read here."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from dynmerge.cli.console import line, note, show, table
from dynmerge.errors import ConfigError, DynmergeError
from dynmerge_server.config import API_KEY_VARIABLE
from dynmerge_server.experiments.lab import declarations
from dynmerge_server.experiments.reading import open_readonly

TIMEOUT = httpx.Timeout(10, read=120)


class Refused(DynmergeError):
    """The server answered, and did not do as asked."""


def show_all(server: str) -> None:
    """One row for each experiment, then what is wrong with the file or the log, if anything."""
    found = _ask(server, "GET", "/v1/experiments")
    rows = [_row(each) for each in found["data"]]
    table(("experiment", "state", "traffic", "arms", "control", "changed by"), rows)
    for each in found["data"]:
        if each["failure"]:
            note(f"{each['name']} gives no arms: {each['failure']}")
    for name, reason in found["unreadable"].items():
        note(f"{name} cannot be read by this version: {reason}")
    for what, reason in (("the file is not followed", "file_error"), ("not looked after", "error")):
        if found[reason]:
            note(f"{what}: {found[reason]}")
    for each in found["flags"]:
        note(
            f"{each['experiment']}: {each['count']} requests without an arm, {each['reason']}: "
            f"{each['last']}"
        )
    log = found["log"]
    lost = sum(log[name] for name in ("lost_exposures", "lost_finishes", "lost_outcomes"))
    note(f"log: {log['written']} records written, {log['waiting']} wait, {lost} lost")
    if log["last_error"]:
        note(f"log: {log['last_error']}")


def check_file(file: Path) -> None:
    """The experiments of a file, or the ConfigError of what is wrong."""
    found = declarations(file)
    if not found:
        note(f"{file} declares no experiment")
    for name, each in found.items():
        shares = ", ".join(f"{arm} {share:.3g}" for arm, share in each.weights.items())
        line(f"{name}: {each.state}, traffic {each.traffic:g}; {shares}; control {each.control}")


def post(server: str, name: str, what: str, body: Mapping[str, Any] | None = None) -> None:
    """Change an experiment, and say what it is then."""
    found = _ask(server, "POST", f"/v1/experiments/{quote(name, safe='')}/{what}", body or {})
    waits = "" if found["runs"] or found["state"] != "running" else ", but not at this time"
    line(f"{found['name']}: {found['state']}{waits}, traffic {found['traffic']:g}")


def forget_unit(server: str, unit: str) -> None:
    """Have a unit deleted, and say how much that was."""
    found = _ask(server, "POST", "/v1/feedback/forget", {"unit": unit})
    line(f"deleted {found['exposures']} exposures, and their outcomes")


def show_report(name: str, log: Path, html: Path | None, *, as_json: bool) -> None:
    """A report as tables or JSON, and as a page where one is wanted."""
    from dynmerge_server.experiments.report.page import page
    from dynmerge_server.experiments.report.report import report_of
    from dynmerge_server.experiments.report.text import text

    found = report_of(log, name)
    if html is not None:
        _write(html, page(found))
    if as_json:
        line(json.dumps(found.json()))
    else:
        show(text(found))


def export_log(log: Path, folder: Path, experiment: str | None) -> None:
    """Parquet files; their paths, one a line."""
    from dynmerge_server.experiments.export import export

    for path in export(log, folder, experiment):
        line(str(path))


def propose_next(
    name: str,
    log: Path,
    also: Sequence[str],
    skills: Sequence[str] | None,
    count: int,
    seed: int,
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    """Proposals as text or JSON, and as the TOML of an experiment where that is wanted."""
    from dynmerge_server.experiments.tune import propose

    with closing(open_readonly(log)) as connection:
        found = propose(
            connection, name, experiments=also, count=count, seed=seed, skills=skills or None
        )
    if output is not None:
        _write(output, found.toml())
    if as_json:
        line(json.dumps(found.table()))
    else:
        for each in str(found).splitlines():
            line(each)


def _row(each: Mapping[str, Any]) -> Sequence[object]:
    arms = ", ".join(f"{arm} {share:.3g}" for arm, share in each["weights"].items())
    names = ("name", "state", "traffic")
    return (*(each[name] for name in names), arms, each["control"], each["changed_by"])


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _ask(
    server: str, method: str, path: str, body: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The server's answer. Raises Refused with its own words, or saying that it cannot be asked."""
    key = os.environ.get(API_KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=server, headers=headers, timeout=TIMEOUT) as client:
            reply = client.request(method, path, json=body)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Refused(f"cannot ask {server}: {error}") from None
    try:
        content = reply.json()
    except ValueError:
        content = {}
    if reply.status_code >= 400 or not isinstance(content, dict):
        said = content.get("error", {}) if isinstance(content, dict) else {}
        message = said.get("message") if isinstance(said, dict) else None
        raise Refused(f"{server}: {message or f'it answered {reply.status_code}'}")
    return content
