import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynmerge.errors import OutcomeConflict, UnknownRequest
from dynmerge_server.errors import SchemaError, kind_of
from dynmerge_server.experiments.feedback import Feedback, answer, bare, outcome_of
from dynmerge_server.experiments.log import Log, LogConfig
from dynmerge_server.json_body import validate
from tests.server.experiments.logged import exposure, written

GOOD = {"request_id": "r", "name": "thumbs", "value": True}


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(LogConfig(tmp_path / "log.sqlite", flush_seconds=0.02))
    log.expose(exposure("r"))
    yield log
    log.close()


@pytest.mark.parametrize(
    ("value", "data_type", "number", "category"),
    [
        (True, "BOOLEAN", 1.0, None),
        (False, "BOOLEAN", 0.0, None),
        (3, "NUMERIC", 3.0, None),
        (-0.5, "NUMERIC", -0.5, None),
        ("good", "CATEGORICAL", None, "good"),
        ("true", "CATEGORICAL", None, "true"),
    ],
)
def test_the_type_of_a_value_is_what_it_is_and_may_be_said(
    value: Any, data_type: str, number: float | None, category: str | None
) -> None:
    for said in ({}, {"data_type": data_type}):
        feedback = validate(Feedback, {**GOOD, "value": value, **said})
        found = outcome_of(feedback, 7.0)
        assert (found.data_type, found.value, found.category) == (data_type, number, category)
        assert (found.time, found.name, found.request_id) == (7.0, "thumbs", "r")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"value": 1, "data_type": "BOOLEAN"}, "the value is NUMERIC, and data_type says BOOLEAN"),
        ({"value": True, "data_type": "NUMERIC"}, "the value is BOOLEAN"),
        ({"value": "1", "data_type": "NUMERIC"}, "the value is CATEGORICAL"),
        ({"value": 2, "data_type": "CATEGORICAL"}, "the value is NUMERIC"),
        ({"value": 2, "data_type": "numeric"}, "body.data_type"),
        ({"value": float("nan")}, "finite"),
        ({"value": float("-inf")}, "finite"),
        ({"value": 10**400}, "body.value"),
        ({"value": None}, "body.value"),
        ({"value": ""}, "body.value"),
        ({"value": [1]}, "body.value"),
        ({"value": "x" * 257}, "body.value"),
        ({"name": "a b"}, "body.name"),
        ({"name": "a\n"}, "body.name"),
        ({"name": ""}, "body.name"),
        ({"name": "n" * 65}, "body.name"),
        ({"request_id": ""}, "body.request_id"),
        ({"request_id": 3}, "body.request_id"),
        ({"comment": "c" * 4097}, "body.comment"),
        ({"id": "i" * 129}, "body.id"),
        ({"id": ""}, "body.id"),
        ({"score": 1}, "body.score"),
        ({"dataType": "NUMERIC"}, "body.dataType"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(SchemaError) as raised:
        validate(Feedback, {**GOOD, **change})
    assert named in str(raised.value)
    assert len(str(raised.value)) < 2000


def test_a_reply_is_found_by_its_id_and_by_its_header() -> None:
    for given in ("abc", "chatcmpl-abc", "cmpl-abc", "chatcmpl-chatcmpl-abc"):
        assert bare(given) == "abc"
    assert bare("cmpl-") == "cmpl-"
    assert bare("my-chatcmpl-abc") == "my-chatcmpl-abc"


async def test_feedback_is_answered_with_what_became_of_it(log: Log) -> None:
    body = {**GOOD, "request_id": "chatcmpl-r", "id": "mine", "comment": "x" * 4096}
    for status in ("stored", "again"):
        reply = await answer(log, body)
        assert reply.status_code == 200
        said = {"object": "feedback", "id": "mine", "status": status}
        assert json.loads(bytes(reply.body)) == said
    unnamed = [json.loads(bytes((await answer(log, GOOD)).body)) for _ in range(2)]
    assert [each["status"] for each in unnamed] == ["stored", "stored"]
    assert unnamed[0]["id"] != unnamed[1]["id"]


async def test_mistakes_have_their_statuses(log: Log) -> None:
    with pytest.raises(UnknownRequest) as unknown:
        await answer(log, {**GOOD, "request_id": "absent"})
    assert kind_of(unknown.value).status == 404
    await answer(log, {**GOOD, "id": "mine"})
    with pytest.raises(OutcomeConflict) as conflict:
        await answer(log, {**GOOD, "id": "mine", "value": False})
    assert kind_of(conflict.value).status == 409


async def test_feedback_that_cannot_be_written_now_is_accepted(log: Log, tmp_path: Path) -> None:
    written(log)
    tmp_path.rename(away := tmp_path.with_name("away"))
    reply = await answer(log, GOOD)
    assert (reply.status_code, json.loads(bytes(reply.body))["status"]) == (202, "queued")
    away.rename(tmp_path)
    written(log)
    assert log.stats().lost_outcomes == 0
