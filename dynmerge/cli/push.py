"""`dynmerge push`: one merge of a bank -> an adapter that a vLLM without dynmerge has loaded.

vLLM reads the files by itself, now and again later, so they stay where they were written.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pydantic

from dynmerge.bank.outline import Outline
from dynmerge.bank.storage import read_manifest
from dynmerge.cli.console import line
from dynmerge.cli.export import run as export
from dynmerge.errors import ConfigError, DynmergeError
from dynmerge.merging.choice import parse_method
from dynmerge.offer import Offer
from dynmerge.preference import Preference

# Loading is reading a file and copying it to every worker: minutes at worst.
TIMEOUT = httpx.Timeout(10, read=600)


class Refused(DynmergeError):
    """The server answered, and did not do as asked."""


class Card(pydantic.BaseModel):
    """A model that the server lists; `root` is the folder it was loaded from."""

    id: str
    root: str | None = None


class Listing(pydantic.BaseModel):
    """The answer of /v1/models."""

    data: list[Card]


def run(
    bank: Path,
    preference: str,
    server: str,
    *,
    method: str | None,
    rank: int | None,
    name: str | None,
    folder: Path | None,
    api_key_env: str | None,
) -> None:
    """Export the merge, have the server load it, and say its name there, alone on the last line."""
    made = (folder or _beside(bank)).resolve() / _merge_name(bank, preference, method, rank)
    name = name or made.name
    with _client(server, api_key_env) as client:
        if not _has(client, name, made):
            with _kept_unless_refused(made):
                if not made.exists():
                    export(bank, preference, made, method=method, rank=rank, uniform=True)
                _load(client, name, made)
    line(f"loaded  by {client.base_url}, which reads the folder again at times: keep it")
    line(name)


def _beside(bank: Path) -> Path:
    """Where a bank's merges are written by default: `BANK-merges`, beside it."""
    bank = bank.resolve()
    return bank.with_name(f"{bank.name}-merges")


def _merge_name(bank: Path, preference: str, method: str | None, rank: int | None) -> str:
    """The merge's digest, and the rank it is cut to: what a folder of that name holds."""
    wish = Preference.parse(preference, allow_negative=True, source="--preference")
    choice = None if method is None else parse_method(method, source="--method")
    offer = Offer(Outline.of_manifest(read_manifest(bank)))
    digest = offer.recipe(wish, choice, "--preference", "--method").digest
    return digest if rank is None else f"{digest}-r{rank}"


@contextmanager
def _kept_unless_refused(made: Path) -> Iterator[None]:
    """What an earlier push left at `made` stays: it is whole, and its name is its content."""
    earlier = made.exists()
    try:
        yield
    except Refused:
        if not earlier:
            shutil.rmtree(made)
        raise


@contextmanager
def _client(server: str, api_key_env: str | None) -> Iterator[httpx.Client]:
    """A client of the server; what it cannot reach is an error that says so."""
    url = server.rstrip("/").removesuffix("/v1")
    try:
        with httpx.Client(base_url=url, headers=_key(api_key_env), timeout=TIMEOUT) as client:
            yield client
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise DynmergeError(f"--to {server}: cannot be reached: {reason}") from error


def _key(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    if not os.environ.get(variable):
        raise ConfigError(f"--api-key-env {variable}: there is no such environment variable")
    return {"Authorization": f"Bearer {os.environ[variable]}"}


def _has(client: httpx.Client, name: str, made: Path) -> bool:
    """Whether the server has loaded `made` as `name`; ConfigError if it has another so named."""
    answer = client.get("/v1/models")
    _check_key(answer)
    try:
        models = Listing.model_validate_json(answer.raise_for_status().content).data
    except (httpx.HTTPStatusError, pydantic.ValidationError):
        raise Refused(
            f"{answer.url} answers {answer.status_code} and no list of models: is it a vLLM server?"
        ) from None
    roots = [model.root for model in models if model.id == name]
    if roots and roots != [str(made)]:
        raise ConfigError(
            f"{client.base_url} has a model named {name!r} already: choose another by --name"
        )
    return bool(roots)


def _load(client: httpx.Client, name: str, made: Path) -> None:
    body = {"lora_name": name, "lora_path": str(made)}
    answer = client.post("/v1/load_lora_adapter", json=body)
    _check_key(answer)
    if answer.is_success:
        return
    said = _message(answer)
    if answer.status_code == httpx.codes.NOT_FOUND and said is None:
        raise Refused(
            f"{client.base_url} loads no adapters while it runs: start vLLM with --enable-lora and"
            " VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
        )
    reason = f"{said or answer.status_code}{_advice(answer, made)}"
    raise Refused(f"{client.base_url} refused the adapter: {reason}")


def _message(answer: httpx.Response) -> str | None:
    """What vLLM says went wrong, None where it is not vLLM's code that says it."""
    try:
        said = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(said)


def _advice(answer: httpx.Response, made: Path) -> str:
    """What to do about the two refusals that have a remedy here."""
    if "max_lora_rank" in answer.text:
        return " (cut the merge by --rank, or start vLLM with a higher --max-lora-rank)"
    if answer.status_code == httpx.codes.NOT_FOUND:  # it hides the path that it looked at
        return f" (vLLM must be able to read {made}: by --folder choose a folder that it sees)"
    return ""


def _check_key(answer: httpx.Response) -> None:
    if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise Refused(
            f"{answer.url} answers {answer.status_code}: name the environment variable that holds"
            " the server's API key by --api-key-env"
        )
