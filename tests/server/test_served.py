"""A real bank and a real tiny model, served by `serve` in its own process; and the conformance
cases.
"""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from dynmerge.adapters import base_model
from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import load_adapter
from dynmerge.bank.bank import BaseIdentity
from dynmerge.bank.build import build_bank
from dynmerge.bank.storage import save_bank
from dynmerge.cli import main
from dynmerge.errors import BankError, BaseModelError
from dynmerge_server.config import SamplingDefaults, ServerConfig
from dynmerge_server.listener import close_all, listen
from dynmerge_server.main import open_runtime, sampling_of

ROOT = Path(__file__).parents[2]
CONFORMANCE = ROOT.parent / "shared" / "conformance" / "run_conformance.py"
SCRIPT = """
import sys
from pathlib import Path
from dynmerge_server.config import ServerConfig
from dynmerge_server.main import serve
serve(Path(sys.argv[1]), ServerConfig.load(Path(sys.argv[2]), port=0))
"""
SETTINGS = "drain_seconds = 120\n[engine]\nthreads = 1\n[presets]\ncareful = 'ada=0.75, bob=0.25'\n"


@pytest.fixture(scope="session")
def bank_folder(
    base_folder: Path, adapter_folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    base = BaseModel.open(base_folder)
    adapters = {name: load_adapter(folder, base) for name, folder in adapter_folders.items()}
    folder = tmp_path_factory.mktemp("banks") / "bank"
    bank = build_bank(BaseIdentity(base.name, base.fingerprint), adapters)
    save_bank(bank, folder, source=str(base_folder))
    return folder


class Served:
    """A server process, its address, and what it printed."""

    def __init__(self, bank: Path, folder: Path) -> None:
        settings = folder / "dynmerge.toml"
        settings.write_text(SETTINGS)
        self.stderr = folder / "stderr"
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(bank), str(settings)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=ROOT,
                env={"PYTHONPATH": f"{ROOT}:{ROOT / 'server'}", "HF_HUB_OFFLINE": "1"},
            )
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline()
        self.url = self.ready.removeprefix("ready ").strip()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *error: object) -> None:
        """Whatever happened, no process is left."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def ask(self, **more: Any) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, **more}
        body.setdefault("temperature", 0)
        reply = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        return reply.json()  # type: ignore[no-any-return]

    def say(self, **more: Any) -> str:
        return str(self.ask(**more)["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def served(bank_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(bank_folder, tmp_path_factory.mktemp("served")) as server:
        assert server.url, server.stderr.read_text()
        yield server


def test_it_says_ready_and_answers(served: Served) -> None:
    assert re.fullmatch(r"ready http://127\.0\.0\.1:\d+\n", served.ready)
    assert httpx.get(f"{served.url}/health").status_code == 200
    data = httpx.get(f"{served.url}/v1/models").json()["data"]
    assert [card["id"] for card in data] == ["tiny", "ada", "bob", "cyd", "dee", "careful"]


@pytest.mark.skipif(not CONFORMANCE.exists(), reason=f"no conformance cases at {CONFORMANCE}")
def test_it_conforms_to_vllm(served: Served) -> None:
    command = [sys.executable, str(CONFORMANCE), "--url", served.url, "--model", "tiny"]
    run = subprocess.run(
        [*command, "--lora", "ada", "--have", "lora,request_id"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(r"(\d+) passed, 0 failed, 0 skipped", run.stdout), run.stdout + run.stderr


def test_each_preference_has_its_own_voice(served: Served) -> None:
    wishes = [{}, {"ada": 1}, {"bob": 1}, {"ada": 0.5, "bob": 0.5}, {"dee": 1}]
    said = [served.say(**({"preference": wish} if wish else {})) for wish in wishes]
    assert len(set(said)) == len(said)
    assert served.say(preference={"base": 1}) == said[0]
    assert served.say(preference={"ada": 0}) == said[0]
    assert served.say(model="ada") == said[1]


def test_concurrent_preferences_do_not_mix(served: Served) -> None:
    wishes = [f"tiny@ada={weight},bob={10 - weight}" for weight in range(1, 9)]
    alone = [served.say(model=wish) for wish in wishes]
    together: dict[str, str] = {}

    def ask(wish: str) -> None:
        together[wish] = served.say(model=wish)

    threads = [threading.Thread(target=ask, args=(wish,)) for wish in wishes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[wish] for wish in wishes] == alone


def test_answers_obey_their_grammar(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2]}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for body in ({"response_format": format}, {"structured_outputs": {"json": schema}}):
        answer = json.loads(served.say(max_tokens=60, **body))
        assert set(answer) == {"ok", "n"}
    choices = ['yes "sir"\n', "non ☃", "a|b"]
    assert served.say(max_tokens=60, structured_outputs={"choice": choices}) in choices
    assert re.fullmatch("[ab]{3}c", served.say(structured_outputs={"regex": "[ab]{3}c"}))
    assert served.say(structured_outputs={"grammar": 'start: "x" "y"+ "z"'}).startswith("xy")


def test_logprobs_join_to_the_text_when_a_stop_string_cuts_it(served: Served) -> None:
    whole = served.say(max_tokens=20)
    stop = whole[5:7]
    reply = served.ask(max_tokens=20, stop=[stop], logprobs=True, top_logprobs=3)
    (choice,) = reply["choices"]
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    assert choice["stop_reason"] == stop
    rows = choice["logprobs"]["content"]
    assert "".join(row["token"] for row in rows) == choice["message"]["content"]
    assert len(rows) == reply["usage"]["completion_tokens"]
    assert all(row["top_logprobs"][0]["logprob"] >= row["logprob"] - 1e-6 for row in rows)


async def test_the_asynchronous_client_streams(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x") as api:
        stream = await api.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=12,
            temperature=0,
            stream=True,
            extra_headers={"X-Dynmerge-Preference": "ada"},
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == served.say(model="ada")


def test_a_foreign_base_model_is_refused(
    bank_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in base_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(BankError, match="another base model"):
        open_runtime(bank_folder, ServerConfig(base=str(other)))
    with pytest.raises(BankError):
        open_runtime(tmp_path / "none", ServerConfig())


def test_the_base_model_is_opened_once(bank_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def counting(folder: Path) -> str:
        opened.append(folder)
        return fingerprint(folder)

    fingerprint = base_model.fingerprint
    monkeypatch.setattr(base_model, "fingerprint", counting)
    runtime, _ = open_runtime(bank_folder, ServerConfig())
    runtime.close()
    assert len(opened) == 1


def test_a_port_in_use_is_told_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = listen("127.0.0.1", 0)
    port = taken[0].getsockname()[1]
    with pytest.raises(SystemExit) as end:
        main(["serve", str(tmp_path / "no bank"), "--port", str(port)])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: 127.0.0.1:{port} is in use\n"
    close_all(taken)


def test_the_models_own_sampling_is_the_default(tmp_path: Path) -> None:
    assert sampling_of(tmp_path) == SamplingDefaults()
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.6, "top_k": null, "do_sample": true, "eos_token_id": 2}')
    assert sampling_of(tmp_path) == SamplingDefaults(temperature=0.6)
    file.write_text('{"temperature": "warm"}')
    with pytest.raises(BaseModelError, match="generation_config"):
        sampling_of(tmp_path)
    file.write_text('{"top_p": 1.5}')
    with pytest.raises(BaseModelError, match=r"generation_config.json: top_p: .* equal to 1$"):
        sampling_of(tmp_path)


def test_the_end(served: Served) -> None:
    """The last test of this file: one signal lets requests finish, a second one does not."""
    endless = {"prompt": "x", "max_tokens": 500, "n": 8, "ignore_eos": True, "stream": True}
    cut: list[bool] = []
    answers: list[str] = []

    def listen() -> None:
        url = f"{served.url}/v1/completions"
        try:
            with httpx.stream("POST", url, json=endless, timeout=60) as reply:
                cut.append("[DONE]" not in reply.read().decode())
        except httpx.TransportError:
            cut.append(True)

    def ask() -> None:
        answers.append(served.say(max_tokens=30))

    threads = [threading.Thread(target=listen), threading.Thread(target=ask)]
    for thread, busy in zip(threads, (1, 2), strict=True):
        thread.start()
        while httpx.get(f"{served.url}/load").json()["server_load"] < busy and thread.is_alive():
            time.sleep(0.01)
    served.process.send_signal(signal.SIGTERM)
    threads[1].join(60)
    assert answers
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{served.url}/health")
    assert served.process.poll() is None
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(60) == 0, served.stderr.read_text()  # half the time to drain
    threads[0].join(10)
    assert cut == [True]
    assert "Traceback" not in served.stderr.read_text()
    assert served.process.stdout is not None
    assert served.process.stdout.read() == ""
