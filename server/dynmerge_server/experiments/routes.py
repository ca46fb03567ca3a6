"""Routes of experiments: declared, changed, read and voted on, the same on both engines."""

import time
from dataclasses import asdict
from typing import Any

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from dynmerge.errors import ConfigError, ExperimentError, LogError, Unavailable, UnknownExperiment
from dynmerge_server.experiments import feedback
from dynmerge_server.experiments.compare import compare
from dynmerge_server.experiments.course import Course
from dynmerge_server.experiments.declaration import State
from dynmerge_server.experiments.lab import Lab, lab
from dynmerge_server.experiments.report.report import Report, report_of
from dynmerge_server.json_body import read_object

TURNS: dict[str, State] = {"start": "running", "pause": "paused", "stop": "stopped"}


async def list_experiments(request: Request) -> Response:
    """GET /v1/experiments: all of them, the state of the file and of the log."""
    here = lab(request)
    data = [_shown(here, course) for course in here.experiments.courses.values()]
    return JSONResponse(
        {
            "object": "list",
            "data": data,
            "file_error": here.experiments.file_error,
            "unreadable": here.experiments.unreadable,
            "error": here.experiments.error,
            "log": asdict(here.log.stats()),
            "flags": [asdict(each) for each in here.flags.refusals()] if here.flags else [],
        }
    )


async def declare(request: Request) -> Response:
    """POST /v1/experiments: a new one."""
    here, body = lab(request), await read_object(request)
    name = body.pop("name", None)
    if not isinstance(name, str):
        raise ExperimentError("name: an experiment has one", "name")
    course = await to_thread.run_sync(here.experiments.declare, name, body)
    return JSONResponse(_shown(here, course), 201)


async def change(request: Request) -> Response:
    """PATCH /v1/experiments/{name}: other values under some keys."""
    here, body = lab(request), await read_object(request)
    course = await to_thread.run_sync(here.experiments.change, _name(request), body)
    return JSONResponse(_shown(here, course))


async def turn(request: Request) -> Response:
    """POST /v1/experiments/{name}/start, /pause or /stop: {}."""
    here, wanted = lab(request), str(request.path_params["turn"])
    if wanted not in TURNS:
        raise UnknownExperiment(f"an experiment has {', '.join(TURNS)}, ramp and compare")
    if await read_object(request):  # JSON, which no other site's page can send
        raise ExperimentError("the body is {}")
    course = await to_thread.run_sync(here.experiments.turn, _name(request), TURNS[wanted])
    return JSONResponse(_shown(here, course))


async def ramp(request: Request) -> Response:
    """POST /v1/experiments/{name}/ramp: {"traffic": 0.5}."""
    here, body = lab(request), await read_object(request)
    if set(body) != {"traffic"}:
        raise ExperimentError('the body is {"traffic": 0.5}', "traffic")
    course = await to_thread.run_sync(here.experiments.change, _name(request), body)
    return JSONResponse(_shown(here, course))


async def show(request: Request) -> Response:
    """GET /v1/experiments/{name}: its declaration and its report."""
    here = lab(request)
    course = here.experiments.course(_name(request))
    found = await to_thread.run_sync(_report, here, course, limiter=here.reports)
    return JSONResponse({**_shown(here, course), "report": found.json()})


async def show_page(request: Request) -> Response:
    """GET /v1/experiments/{name}/report.html: the same as one page."""
    from dynmerge_server.experiments.report.page import page

    here = lab(request)
    course = here.experiments.course(_name(request))
    text = await to_thread.run_sync(lambda: page(_report(here, course)), limiter=here.reports)
    return HTMLResponse(text, headers={"Content-Security-Policy": CLOSED})


async def two_answers(request: Request) -> Response:
    """POST /v1/experiments/{name}/compare."""
    here = lab(request)
    experiment = here.experiments.course(_name(request)).experiment
    if not experiment.runs_at(time.time()):
        raise ExperimentError(f"experiment {experiment.name} does not run, so nothing is compared")
    return await compare(request, experiment, await read_object(request))


async def give_feedback(request: Request) -> Response:
    """POST /v1/feedback: what came of a request."""
    return await feedback.answer(lab(request).log, await read_object(request))


async def forget(request: Request) -> Response:
    """POST /v1/feedback/forget: {"unit": "u_123"}: delete all that is known of a unit."""
    here, body = lab(request), await read_object(request)
    if set(body) != {"unit"} or not isinstance(body["unit"], str) or not body["unit"]:
        raise ExperimentError('the body is {"unit": "u_123"}', "unit")
    deleted = await to_thread.run_sync(here.log.forget, body["unit"])
    return JSONResponse({"object": "forgotten", "exposures": deleted})


def _name(request: Request) -> str:
    return str(request.path_params["name"])


def _report(here: Lab, course: Course) -> Report:
    """Raises Unavailable, or LogError without saying where the log is."""
    try:
        return report_of(here.path, course.experiment.name)
    except ConfigError as error:
        raise Unavailable(str(error)) from error
    except LogError as error:
        raise LogError(str(error).replace(f" {here.path}", "")) from error


def _shown(here: Lab, course: Course) -> dict[str, Any]:
    last = course.last
    return {
        "object": "experiment",
        **course.experiment.table(),
        "runs": course.experiment.runs_at(time.time()),
        "revision": last.number,
        "phase": last.phase,
        "changed": last.time,
        "changed_by": last.source,
        "reason": last.reason,
        "failure": here.experiments.failure(course.experiment.name, here.preferences().bank),
    }


CLOSED = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_ONE = "/v1/experiments/{name}"

ROUTES = (
    Route("/v1/experiments", list_experiments, methods=["GET"]),
    Route("/v1/experiments", declare, methods=["POST"]),
    Route(_ONE, show, methods=["GET"]),
    Route(_ONE, change, methods=["PATCH"]),
    Route(f"{_ONE}/report.html", show_page, methods=["GET"]),
    Route(f"{_ONE}/ramp", ramp, methods=["POST"]),
    Route(f"{_ONE}/compare", two_answers, methods=["POST"]),
    Route(f"{_ONE}/{{turn}}", turn, methods=["POST"]),
    Route("/v1/feedback", give_feedback, methods=["POST"]),
    Route("/v1/feedback/forget", forget, methods=["POST"]),
)
