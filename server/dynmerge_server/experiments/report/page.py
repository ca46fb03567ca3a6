"""Page: a report as one HTML file that asks nobody for anything and runs nothing."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dynmerge_server.experiments.report import words
from dynmerge_server.experiments.report.plots import plots
from dynmerge_server.experiments.report.report import Report

TEMPLATE = "page.html"


def page(report: Report) -> str:
    """The page. Whatever came from outside is text in it."""
    template = _environment().get_template(TEMPLATE)
    return template.render(report=report, words=words, plots=plots(report), svg=Markup)


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: words.plain(value) if type(value) is str else value,
    )
