import asyncio
import json
from typing import Any

import httpx
import pytest

from dynmerge.engines.vllm.ticket import recipe_of
from dynmerge_server.vllm.middleware import PATHS
from dynmerge_server.vllm.residents import Residents
from dynmerge_server.vllm.state import Door
from tests.server.vllm.stand_ins import EchoClient, EchoServer

HEADER = "X-Dynmerge-Preference"
PATH = "/v1/completions"
SAGEMAKER = {"X-Amzn-SageMaker-Adapter-Identifier": "ada"}
GENERATING = sorted(path for path, use in PATHS.items() if use == "generates")
NAMING = sorted(path for path, use in PATHS.items() if use == "names")


async def ask(client: httpx.AsyncClient, headers: Any = None, path: str = PATH, **body: Any) -> Any:
    reply = await client.post(path, json={"prompt": "a", **body}, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("path", GENERATING)
async def test_vllm_gets_the_merge_and_the_client_its_own_name_for_it(
    client: httpx.AsyncClient, server: EchoServer, path: str
) -> None:
    reply = await client.post(path, json={"model": "random@ada=0.7,bob=0.3", "top_k": 3})
    assert reply.json()["model"] == "random@ada=0.7,bob=0.3"
    block = reply.json()["dynmerge"]
    assert server.seen == [{"model": block["merge_id"], "top_k": 3}]
    [request] = server.merges
    recipe = recipe_of(request["lora_path"])
    assert recipe.digest == request["lora_name"] == block["merge_id"]
    assert str(recipe.preference) == block["text"] == "ada=0.7, bob=0.3"
    assert reply.headers["x-dynmerge-merge-id"] == block["merge_id"]
    assert reply.headers["cache-status"] == "dynmerge; fwd=miss; stored"
    assert int(reply.headers["content-length"]) == len(reply.content)


@pytest.mark.parametrize("model", [None, "random", "alias", "random@base", "alias@ada=0"])
async def test_the_base_model_needs_no_merge(
    client: httpx.AsyncClient, server: EchoServer, door: Door, model: str | None
) -> None:
    said = await ask(client, model=model)
    assert server.seen == [{"prompt": "a", "model": "random"}]
    assert server.merges == [None]
    assert (said["model"], said["dynmerge"]["text"]) == (model or "random", "base=1")
    assert door.residents.stats().entries == 0


@pytest.mark.parametrize("path", NAMING)
async def test_where_only_the_name_counts_it_is_the_base_models(
    client: httpx.AsyncClient, server: EchoServer, door: Door, path: str
) -> None:
    said = await ask(client, path=path, model="careful")
    assert (said["model"], "dynmerge" in said) == ("careful", False)
    assert server.seen[0]["model"] == "random"
    assert door.residents.stats().entries == 0
    assert (await client.post(path, json={"model": "eve"})).status_code == 404


async def test_what_is_ours_is_taken_out_and_the_rest_is_left(
    client: httpx.AsyncClient, server: EchoServer
) -> None:
    await ask(client, vllm_xargs={"method": "linear;scale=2", "other": 1}, preset="careful")
    await ask(client, vllm_xargs={"preset": "careful"}, x={"preference": 1})
    assert server.seen[0]["vllm_xargs"] == {"other": 1}
    assert set(server.seen[0]) == {"prompt", "model", "vllm_xargs"}
    assert set(server.seen[1]) == {"prompt", "model", "x"}


async def test_header_over_body_over_model(client: httpx.AsyncClient) -> None:
    body = {"preference": {"bob": 1}, "model": "cyd"}
    for headers, more, source, text in (
        ({HEADER: "ada"}, body, "header", "ada=1"),
        ({}, body, "body", "bob=1"),
        ({}, {"model": "cyd"}, "model", "cyd=1"),
        ({}, {}, "default", "base=1"),
    ):
        block = (await ask(client, headers, **more))["dynmerge"]
        assert (block["source"], block["text"]) == (source, text)


@pytest.mark.parametrize("root", ["", "/", "/models", "/models/", "/v"])
async def test_a_merge_is_given_whatever_a_proxy_puts_before_the_path(
    server: EchoServer, root: str
) -> None:
    transport = httpx.ASGITransport(app=server.app, root_path=root)
    async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as client:
        for path in {PATH, f"{root.rstrip('/')}{PATH}"}:
            reply = await client.post(path, json={"model": "ada"})
            if reply.status_code == 200:
                assert "dynmerge" in reply.json()
        assert server.merges


async def test_sagemaker_names_the_model_in_a_header(
    client: httpx.AsyncClient, server: EchoServer
) -> None:
    said = await ask(client, SAGEMAKER, path="/invocations")
    assert (said["model"], said["dynmerge"]["text"]) == ("ada", "ada=1")
    assert (await ask(client, SAGEMAKER))["dynmerge"]["text"] == "base=1"
    assert len(server.merges) == 2


@pytest.mark.parametrize(
    ("headers", "body", "wrong"),
    [
        ({HEADER: "Ada=1"}, {}, (400, HEADER)),
        ({HEADER: "ada=1"}, {"preset": "none"}, (400, "preset")),
        ({"X-Dynmerge-Colour": "red"}, {}, (400, "x-dynmerge-colour")),
        ({}, {"preference": {"eve": 1}}, (400, "preference")),
        ({}, {"preference": 3}, (400, "body.preference.dict[str,any]")),
        ({}, {"vllm_xargs": {"preference": 1}}, (400, "vllm_xargs.preference")),
        ({}, {"preference": "ada", "preset": "careful"}, (400, "preset")),
        ({}, {"method": "magic"}, (400, "method")),
        ({}, {"model": "ada", "method": "iso-c-dense"}, (400, "method")),
        ({}, {"model": "eve", "stream": True}, (404, "model")),
        ({}, {"model": "ada", "background": True}, (400, "background")),
    ],
)
async def test_a_mistake_never_reaches_vllm(
    client: httpx.AsyncClient,
    server: EchoServer,
    headers: dict[str, str],
    body: dict[str, Any],
    wrong: tuple[int, str],
) -> None:
    reply = await client.post(PATH, json=body, headers=headers)
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == wrong
    assert reply.status_code == wrong[0]
    assert server.seen == []


async def test_what_is_no_object_is_vllms_to_refuse_and_a_bad_header_ours(
    client: httpx.AsyncClient,
) -> None:
    for content in (b"{", b"[1]", b"\xff"):
        reply = await client.post(PATH, content=content)
        assert "vLLM" in reply.json()["error"]
        reply = await client.post(PATH, content=content, headers={HEADER: "Ada"})
        assert reply.json()["error"]["param"] == HEADER


@pytest.mark.parametrize(
    "content",
    [b'{"preset": "a", "preset": "b"}', b'{"x": NaN}', '{"preset": "a"}'.encode("utf-16")],
)
async def test_what_python_would_read_and_we_do_not_is_refused(
    client: httpx.AsyncClient, server: EchoServer, content: bytes
) -> None:
    reply = await client.post(PATH, content=content)
    assert reply.json()["error"]["type"] == "Bad Request"
    assert server.seen == []


def events(text: str) -> list[Any]:
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("usage", [False, True])
async def test_a_stream_says_what_was_applied_once_and_last(
    client: httpx.AsyncClient, usage: bool
) -> None:
    body = {"model": "ada", "stream": True, "stream_options": {"include_usage": usage}}
    reply = await client.post(PATH, json=body)
    chunks = events(reply.text)
    assert reply.headers["x-dynmerge-applied"] == "ada=1;source=model"
    assert len(chunks) == 4 + usage
    assert {chunk["model"] for chunk in chunks} == {"ada"}
    assert ["dynmerge" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["dynmerge"]["text"] == "ada=1"


async def test_an_error_of_vllms_passes_as_it_is(
    client: httpx.AsyncClient, server: EchoServer, door: Door
) -> None:
    server.status = 422
    reply = await client.post(PATH, json={"model": "ada"})
    assert (reply.status_code, reply.json()) == (422, {"model": "ada", "choices": []})
    assert "x-dynmerge-applied" not in reply.headers
    assert door.residents.stats().pinned == 0


async def test_an_answer_without_its_merge_is_never_sent(
    client: httpx.AsyncClient, server: EchoServer
) -> None:
    server.models.lora_requests = {}
    server.careless = True
    for body in ({"model": "ada"}, {"model": "ada", "stream": True}):
        reply = await client.post(PATH, json=body)
        assert reply.status_code == 500
        assert reply.json()["error"]["type"] == "InternalServerError"


async def test_a_merge_that_takes_long_is_made_once_and_waited_for(
    client: httpx.AsyncClient, vllm: EchoClient, door: Door
) -> None:
    vllm.pending = 2
    body = {"model": "random@ada,bob", "method": "tsv-m"}
    said = await asyncio.gather(*(ask(client, **body) for _ in range(3)))
    assert [each["dynmerge"]["cache"] for each in said] == ["stored", "collapsed", "collapsed"]
    assert vllm.count("dynmerge_prepare") == 3
    assert (await ask(client, **body))["dynmerge"]["cache"] == "hit"
    assert vllm.count("dynmerge_prepare") == 3
    assert door.residents.stats().pinned == 0


async def test_a_merge_that_fails_is_an_error_and_the_next_request_is_fine(
    client: httpx.AsyncClient, vllm: EchoClient, door: Door, server: EchoServer
) -> None:
    vllm.failing = "out of memory at /home/secret"
    body = {"model": "random@ada,bob", "method": "ties"}
    reply = await client.post(PATH, json=body)
    assert (reply.status_code, "secret" in reply.text) == (500, False)
    assert (server.seen, door.residents.stats().pinned) == ([], 0)
    vllm.failing = ""
    await ask(client, **body)


async def test_a_dead_engine_is_503(client: httpx.AsyncClient, vllm: EchoClient) -> None:
    vllm.dead = True
    reply = await client.post(PATH, json={"model": "random@ada,bob", "method": "ties"})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")


async def test_all_places_taken_and_too_many_waiting_is_503(
    client: httpx.AsyncClient, server: EchoServer
) -> None:
    one = {"diagonal": 1, "core": 1, "own": 1}
    full = Residents(one, max_waiting=0)
    old = server.app.state.dynmerge
    server.app.state.dynmerge = Door(old.versions, full, old.workers, old.metrics, None)
    server.gate.clear()
    first = asyncio.create_task(ask(client, model="ada"))
    while not server.merges:
        await asyncio.sleep(0)
    same = asyncio.create_task(ask(client, model="ada"))
    reply = await client.post(PATH, json={"model": "bob"})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    server.gate.set()
    await asyncio.gather(first, same)
    await ask(client, model="bob")


async def test_a_client_that_leaves_gives_its_place_back(server: EchoServer, door: Door) -> None:
    async def request(body: dict[str, Any], leave: asyncio.Event) -> None:
        content = json.dumps(body).encode()
        inbox: list[Any] = [{"type": "http.request", "body": content}]

        async def receive() -> Any:
            if inbox:
                return inbox.pop()
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        scope = {"type": "http", "method": "POST", "path": PATH, "headers": [], "query_string": b""}
        await server.app(scope, receive, send)

    # While it streams; and while it waits for its merge, of which vLLM then never hears.
    server.gate.clear()
    leave = asyncio.Event()
    streaming = asyncio.create_task(request({"model": "ada", "stream": True}, leave))
    while not server.merges:
        await asyncio.sleep(0)
    assert door.residents.stats().pinned == 1
    door.workers._engine.pending = 10**6
    waiting = asyncio.create_task(request({"model": "random@ada,bob", "method": "ties"}, leave))
    while door.residents.stats().pinned < 2:
        await asyncio.sleep(0)
    leave.set()
    await asyncio.gather(streaming, waiting)
    while door.residents.stats().pinned:
        await asyncio.sleep(0.01)
    assert len(server.seen) == 1


async def test_other_paths_and_methods_pass_untouched(client: httpx.AsyncClient) -> None:
    assert (await client.get(PATH)).status_code == 405
    assert (await client.post("/nowhere", content=b"{", headers={HEADER: "A"})).status_code == 404
