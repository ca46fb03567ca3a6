"""Folders, hub ids, and what is neither. The hub's cache is real; the hub itself is never asked."""

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import fetch_adapter, load_adapter
from dynmerge.adapters.hub import display_name
from dynmerge.errors import AdapterError, BaseModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, repository: str, folder: Path) -> None:
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, place / "snapshots" / COMMIT)


def test_a_cached_repository_is_opened_under_its_own_name(
    cache: Path, base: BaseModel, base_folder: Path, adapter_folders: dict[str, Path]
) -> None:
    cached(cache, "org/Tiny", base_folder)
    cached(cache, "org/skill", adapter_folders["ada"])
    hub = BaseModel.open("org/Tiny")
    assert hub.name == "Tiny"
    assert hub.fingerprint == base.fingerprint
    adapter = load_adapter(fetch_adapter("org/skill", revision="main"), hub)
    assert adapter.digest == load_adapter(adapter_folders["ada"], base).digest


def test_an_adapter_may_lie_in_a_subfolder_of_a_repository(
    cache: Path, tmp_path: Path, base: BaseModel, adapter_folders: dict[str, Path]
) -> None:
    shutil.copytree(adapter_folders["bob"], tmp_path / "repository" / "step-10")
    cached(cache, "org/skills", tmp_path / "repository")
    folder = fetch_adapter("org/skills", subfolder="step-10")
    assert load_adapter(folder, base).ranks == (3,)


def test_a_repository_that_cannot_be_had_is_an_error_that_says_what_was_tried() -> None:
    tried = "'org/none' is no folder here, and the Hugging Face hub could not be asked"
    with pytest.raises(BaseModelError, match=tried):
        BaseModel.open("org/none")
    with pytest.raises(AdapterError, match=tried):
        fetch_adapter("org/none")


class Hub(BaseHTTPRequestHandler):
    """Answers every request as the hub does when the repository's name is the error's code."""

    def do_GET(self) -> None:
        code = self.path.split("/")[4]
        self.send_response({"GatedRepo": 403, "Broken": 500}.get(code, 404))
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("RepoNotFound", "no Hugging Face repository this login can see"),
        ("GatedRepo", "is gated: accept its terms there and log in"),
        ("RevisionNotFound", "has no revision 'v9'"),
        ("Broken", "could not be asked"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_the_hub_refuses_is_said_in_our_words(code: str, reason: str) -> None:
    with pytest.raises(BaseModelError, match=reason):
        BaseModel.open(f"org/{code}", revision="v9")


@pytest.mark.parametrize(
    "source",
    ["/no/such", "./x", "~/none/x", "a/b/c", "x y", "", "org/x--y", "org\\x", "a\nb"],
)
def test_what_is_neither_a_folder_nor_an_id_is_refused_at_once(source: str) -> None:
    with pytest.raises(AdapterError, match="no folder here and no Hugging Face repository id"):
        fetch_adapter(source)


def test_a_file_and_a_missing_path_are_no_folders(tmp_path: Path, base_folder: Path) -> None:
    for path in (base_folder / "config.json", tmp_path / "none"):
        with pytest.raises(BaseModelError, match="is no folder here") as caught:
            BaseModel.open(path)
        assert str(path.parent) not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
        ("/models/tiny/", "tiny"),
        (Path("/models/tiny"), "tiny"),
        ("C:\\models\\tiny\\", "tiny"),
        ("tiny", "tiny"),
        (f"/cache/models--org--Llama-3/snapshots/{COMMIT}", "Llama-3"),
        (f"/cache/models--gpt2/snapshots/{COMMIT}/", "gpt2"),
        ("/data/snapshots/one", "one"),
        ("", ""),
    ],
)
def test_the_display_name_is_the_last_component(source: str | Path, name: str) -> None:
    assert display_name(source) == name
