"""Routes added to vLLM's server: names, merges, the playground, and the life of the bank.

They come before vLLM's own, and so in place of those with the same path.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dynmerge.errors import BankError, Overloaded, RequestError
from dynmerge_server.app import PLAYGROUND
from dynmerge_server.catalogue import merges_reply, presets_reply
from dynmerge_server.json_body import read_object, validate
from dynmerge_server.vllm.skills import Skills
from dynmerge_server.vllm.state import door


class NotServed(Overloaded):
    """The bank on disk cannot be served; the one before still is."""


class LoadAdapter(BaseModel):
    """vLLM's body of /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadAdapter(BaseModel):
    """vLLM's body of /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: int | None = None


async def list_models(request: Request) -> Response:
    """GET /v1/models."""
    cards = door(request.app).versions.served.models.cards()
    return JSONResponse({"object": "list", "data": cards})


async def get_model(request: Request) -> Response:
    """GET /v1/models/{id}."""
    models = door(request.app).versions.served.models
    return JSONResponse(models.card(request.path_params["id"]))


async def list_presets(request: Request) -> Response:
    """GET /v1/preferences/presets."""
    return presets_reply(door(request.app).versions.served.models)


async def list_merges(request: Request) -> Response:
    """GET /v1/merges: the counters of this API process, and the merges used last."""
    residents = door(request.app).residents
    return merges_reply(residents.recipes(), asdict(residents.stats()))


async def show_bank(request: Request) -> Response:
    """GET /v1/bank: what is served, what the workers hold, and a switch under way."""
    parts = door(request.app)
    versions = parts.versions
    workers = await parts.workers.ask("dynmerge_stats")
    return JSONResponse(
        {
            "object": "bank",
            "digest": versions.outline.digest,
            "base": versions.outline.base.name,
            "skills": versions.outline.names,
            "calibrations": versions.outline.calibrated,
            "default_method": str(versions.served.preferences.default_method),
            "switching": versions.switching,
            "failure": versions.failure,
            "workers": workers,
        }
    )


async def reload_bank(request: Request) -> Response:
    """POST /v1/bank/reload: serve the bank on disk; a failure leaves the old one."""
    with _bank_faults(request):
        await door(request.app).versions.reload()
    return await show_bank(request)


async def load_adapter(request: Request) -> Response:
    """POST /v1/load_lora_adapter, with vLLM's body and reply."""
    skills = _skills(request)
    wanted = validate(LoadAdapter, await read_object(request))
    if wanted.is_3d_lora_weight:
        raise RequestError("experts' weights are not offered", "is_3d_lora_weight")
    with _bank_faults(request):
        await skills.load(wanted.lora_name, wanted.lora_path, replace=wanted.load_inplace)
    return PlainTextResponse(f"Success: LoRA adapter '{wanted.lora_name}' added successfully.")


async def unload_adapter(request: Request) -> Response:
    """POST /v1/unload_lora_adapter, with vLLM's body and reply."""
    skills = _skills(request)
    wanted = validate(UnloadAdapter, await read_object(request))
    with _bank_faults(request):
        await skills.unload(wanted.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{wanted.lora_name}' removed successfully.")


def _skills(request: Request) -> Skills:
    skills = door(request.app).skills
    if skills is None:
        raise HTTPException(404, "Skills are not loaded while serving: no adapter_root is set")
    return skills


@contextmanager
def _bank_faults(request: Request) -> Iterator[None]:
    """Tell the client of these routes what is wrong with the bank, but not where it is."""
    try:
        yield
    except BankError as error:
        folder = str(door(request.app).versions.folder)
        raise NotServed(str(error).replace(folder, "the bank")) from error


ROUTES = (
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{id:path}", get_model, methods=["GET"]),
    Route("/v1/preferences/presets", list_presets, methods=["GET"]),
    Route("/v1/merges", list_merges, methods=["GET"]),
    Route("/v1/bank", show_bank, methods=["GET"]),
    Route("/v1/bank/reload", reload_bank, methods=["POST"]),
    Route("/v1/load_lora_adapter", load_adapter, methods=["POST"]),
    Route("/v1/unload_lora_adapter", unload_adapter, methods=["POST"]),
    Mount("/playground", StaticFiles(directory=PLAYGROUND, html=True)),
)
