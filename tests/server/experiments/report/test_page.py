"""The page and the text: all there, nothing from outside obeyed, and nobody asked for more."""

import re
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from dynmerge_server.experiments.report.page import page
from dynmerge_server.experiments.report.report import Report, report_of
from dynmerge_server.experiments.report.text import text
from tests.server.experiments.report.log_factory import BEGAN, DAY, LogFile, run_experiment
from tests.server.experiments.report.test_report import TONE

EVIL = "</td><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>\x1b[31m[red]"
VOID = {"meta", "img", "br", "link", "input", "hr"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    log = LogFile(tmp_path_factory.mktemp("log") / "log.db")
    metrics = [{"outcome": "other"}, {"measure": "latency"}]
    course = log.declare("tone", {**TONE, "metrics": metrics})
    log.change(course, BEGAN + DAY, EVIL, traffic=0.5)
    run_experiment(log, 3000, {"A": 0.3, "B": 0.45, "C": 0.3}, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    for index in range(60):
        one, other = (str(arm) for arm in rng.permutation(["A", "B", "C"])[:2])
        log.pair((one, other), str(rng.choice(["first", "second", "tie"])), f"u{index}")
    return report_of(log.path, "tone")


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Report:
    log = LogFile(tmp_path_factory.mktemp("log") / "log.db")
    log.declare("tone", {**TONE, "weights": {"A": 0.5, "B": 0.25, "C": 0.25}})
    run_experiment(log, 3000, {"A": 0.3, "B": 0.45, "C": 0.3}, np.random.default_rng(0))
    return report_of(log.path, "tone")


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return page(report)


def printed(report: Report) -> str:
    console = Console(width=240, file=StringIO())
    console.print(text(report))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


class Tags(HTMLParser):
    """Checks that elements close in order, and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags(html: str) -> Tags:
    found = Tags()
    found.feed(html)
    assert found.open == []
    return found


def attributes(html: str) -> Iterator[tuple[str, str]]:
    for _, given in tags(html).seen:
        yield from ((name, value or "") for name, value in given.items())


def test_the_page_asks_no_other_host_for_anything(html: str) -> None:
    for name, value in attributes(html):
        assert "//" not in value or name.startswith("xmlns")
    assert not re.search(r"url\(\s*['\"]?\s*(?!#)", html)
    assert "@import" not in html


def test_the_page_runs_nothing_and_obeys_nothing_from_outside(html: str) -> None:
    names = {tag for tag, _ in tags(html).seen}
    assert not names & {"script", "img", "iframe", "link", "object", "embed", "form", "base"}
    assert not [name for name, _ in attributes(html) if name.startswith("on")]
    assert "&lt;script&gt;alert(1)" in html
    assert "\x1b" not in html


def test_the_page_is_of_light_and_dark_and_of_small_screens(html: str) -> None:
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    assert "width=device-width" in html
    assert '<html lang="en">' in html


def test_every_picture_says_what_it_shows_and_has_names_of_its_own(html: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(pictures) == 4  # two differences, means, units
    figures = [given for tag, given in tags(html).seen if tag == "figure"]
    assert [each["role"] for each in figures] == ["img"] * 4
    assert all(len(str(each["aria-label"])) > 30 for each in figures)
    ids: list[str] = []
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "#010203" not in picture
        assert "var(--soft)" in picture
        ids += re.findall(r'\bid="([^"]*)"', picture)
    assert len(ids) == len(set(ids))


def test_page_and_text_say_the_same(html: str, report: Report) -> None:
    shown, html = printed(report), unescape(html)
    for part in (report.verdict.text, *report.caveats, *(each.text for each in report.guardrails)):
        assert part in html
        assert part in shown
    assert report.verdict.better == ("B",)
    for each in ("Side by side", "History", "Guardrails", "exploratory", "The planned run of"):
        assert each in html
        assert each in shown or each == "Side by side"


def test_a_terminal_obeys_nothing_from_outside(report: Report) -> None:
    shown = printed(report)
    assert "\x1b" not in shown
    assert "[red]" in shown


def test_a_mismatch_shows_no_winner_anywhere(red: Report) -> None:
    html, shown = page(red), printed(red)
    for each in (html, shown):
        assert "Sample ratio mismatch" in each
        assert "better than" not in each
        assert "points" not in each
        assert "against A" not in each
        assert "liked" not in each or "of liked" in each
    assert [tag for tag, _ in tags(html).seen].count("figure") == 1  # units only
    assert str(red.units[0]) in html


def test_a_report_of_nothing_is_a_page(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log.db")
    log.declare("tone", TONE)
    found = report_of(log.path, "tone")
    assert "Not enough units yet" in page(found)
    assert "Not enough units yet" in printed(found)
