"""`dynmerge push` against a small server that answers as vLLM does; with vLLM itself it is held
together in tests/engines/vllm/test_push.py.
"""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dynmerge.bank.storage import save_bank
from tests.bank_factory import random_bank
from tests.cli.conftest import Run

LOAD = "/v1/load_lora_adapter"


class Server(ThreadingHTTPServer):
    """Lists the base model and what it was told to load; `refusal` is its answer to the next."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.loaded: dict[str, str] = {}
        self.refusal: tuple[int, object] | None = None
        self.key: str | None = None
        self.models = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def listing(self) -> dict[str, object]:
        cards = {"tiny": "/models/tiny", **self.loaded}
        return {"data": [{"id": name, "root": root} for name, root in cards.items()]}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer(*((200, self.server.listing()) if self.server.models else (200, "hello")))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != LOAD or set(body) != {"lora_name", "lora_path"}:
            return self.answer(404, {"detail": "Not Found"})
        if self.server.refusal is None:
            assert (Path(body["lora_path"]) / "adapter_config.json").is_file()
            self.server.loaded[body["lora_name"]] = body["lora_path"]
        return self.answer(*(self.server.refusal or (200, "Success")))

    def answer(self, status: int, content: object) -> None:
        key = self.server.key
        if key and self.headers["Authorization"] != f"Bearer {key}":
            status, content = 401, {"error": "Unauthorized"}
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    save_bank(random_bank(), tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture
def push(server: Server, bank: Path, run: Run) -> Run:
    def call(*words: str, to: str = server.url) -> tuple[int, str, str]:
        return run("push", bank, "--preference", "ada=0.7, bob=0.3", "--to", to, *words)

    return call


def made(bank: Path) -> list[str]:
    folder = bank.with_name("bank-merges")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_merge_is_written_beside_the_bank_and_loaded_under_its_digest(
    push: Run, server: Server, bank: Path
) -> None:
    code, out, _ = push()
    name = out.splitlines()[-1]
    assert (code, made(bank)) == (0, [name])
    assert server.loaded == {name: str(bank.with_name("bank-merges") / name)}
    assert f", {name}\n" in out  # as export says it
    assert push(to=f"{server.url}/v1/")[1].splitlines()[-1] == name


def test_the_adapter_has_one_rank_in_all_modules(push: Run, server: Server) -> None:
    _, out, _ = push("--rank", "3", "--method", "ties")
    name = out.splitlines()[-1]
    assert name.endswith("-r3")
    folder = Path(server.loaded[name])
    settings = json.loads((folder / "adapter_config.json").read_bytes())
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (3, 3, {})
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.shape["lora_B" in name] for name, tensor in tensors.items()} == {3}


def test_name_and_folder_are_as_asked(
    push: Run, server: Server, bank: Path, tmp_path: Path
) -> None:
    code, out, _ = push("--name", "mine", "--folder", str(tmp_path / "shared"))
    assert (code, out.splitlines()[-1], made(bank)) == (0, "mine", [])
    (folder,) = (tmp_path / "shared").iterdir()
    assert server.loaded == {"mine": str(folder)}


def test_the_same_again_is_loaded_already(push: Run, server: Server, bank: Path) -> None:
    first = push()[1].splitlines()[-1]
    server.refusal = (400, {"error": {"message": "asked twice"}})
    code, out, _ = push()
    assert (code, out.splitlines()[-1]) == (0, first)
    assert "merge" not in out
    # After a restart the server has forgotten it, and the folder is still there.
    server.loaded, server.refusal = {}, None
    assert push()[0] == 0
    assert server.loaded.keys() == {first}


def test_a_name_of_another_model_is_refused_before_the_merge(
    push: Run, server: Server, bank: Path
) -> None:
    for name in ("tiny", "other"):
        server.loaded["other"] = "/adapters/other"
        code, out, err = push("--name", name)
        assert (code, out, made(bank)) == (2, "", [])
        assert f"{server.url} has a model named {name!r} already: choose another by --name" in err


@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        ((404, {"detail": "Not Found"}), "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"),
        (
            (500, {"error": {"message": "LoRA rank 7 is greater than max_lora_rank 4."}}),
            "LoRA rank 7 is greater than max_lora_rank 4. (cut the merge by --rank,",
        ),
        ((400, {"error": {"message": "it is late"}}), "refused the adapter: it is late\n"),
        ((502, "bad gateway"), "refused the adapter: 502\n"),
    ],
)
def test_a_refusal_is_shown_and_leaves_no_folder(
    refusal: tuple[int, object], says: str, push: Run, server: Server, bank: Path
) -> None:
    server.refusal = refusal
    code, _, err = push()
    assert (code, made(bank)) == (2, [])
    assert says in err


def test_a_folder_that_vllm_does_not_see_is_named(push: Run, server: Server, bank: Path) -> None:
    _, out, _ = push()
    name = out.splitlines()[-1]
    server.loaded = {}
    folder = bank.with_name("bank-merges") / name
    server.refusal = (404, {"error": {"message": "No adapter found for <path>"}})
    code, _, err = push()
    assert f"vLLM must be able to read {folder}: by --folder" in err
    assert (code, made(bank)) == (2, [name])  # it was another push's


def test_the_key_is_read_from_the_environment_and_never_shown(
    push: Run, server: Server, bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "secret"
    code, _, err = push()
    assert (code, made(bank)) == (2, [])
    assert "answers 401: name the environment variable" in err
    assert "--api-key-env VLLM_KEY: there is no such" in push("--api-key-env", "VLLM_KEY")[2]
    monkeypatch.setenv("VLLM_KEY", "secret")
    code, out, err = push("--api-key-env", "VLLM_KEY")
    assert code == 0
    assert "secret" not in out + err


def test_a_server_that_is_none_is_an_error_before_the_merge(
    push: Run, server: Server, bank: Path
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for url in (f"http://127.0.0.1:{closed.getsockname()[1]}", "nowhere", "http://a b"):
            code, _, err = push(to=url)
            assert (code, made(bank)) == (2, [])
            assert f"error: --to {url}: cannot be reached: " in err
    server.models = False
    assert "answers 200 and no list of models: is it a vLLM server?" in push()[2]


def test_what_no_merge_is_made_of_is_refused(push: Run) -> None:
    assert "no skill named 'eve'" in push("--preference", "eve=1")[2]
    assert "nothing to export" in push("--preference", "base=1")[2]
    assert "--method" in push("--method", "magic")[2]
