"""`dynmerge push` to a vLLM that knows nothing of dynmerge."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import load_adapter
from dynmerge.bank.bank import BaseIdentity
from dynmerge.bank.build import build_bank
from dynmerge.bank.storage import save_bank
from dynmerge.cli import main
from tests.conftest import tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
PROMPT = "a preference chooses"
ENVIRONMENT = {
    "VLLM_PLUGINS": "",  # dynmerge is installed, and this server must be one without it
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

Run = Callable[..., tuple[int, str, str]]  # exit code, stdout, stderr


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model with heads as wide as vLLM's attention on a CPU wants them."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = tiny_model().config
    config.head_dim = 32
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A stock vLLM serving the tiny model, with room for adapters of rank 8."""
    port = free_port()
    words = f"--host 127.0.0.1 --port {port} --served-model-name tiny --dtype float32"
    lora = "--enable-lora --max-lora-rank 8 --max-loras 3 --max-model-len 256 --max-num-seqs 4"
    serve = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(base_folder)]
    log = tmp_path_factory.mktemp("vllm") / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [*serve, *words.split(), *lora.split()],
            env={**os.environ, **ENVIRONMENT},
            stdout=output,
            stderr=output,
        ) as process,
    ):
        address = f"http://127.0.0.1:{port}"
        while not answers(f"{address}/health"):
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        yield address
        process.terminate()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.TransportError:
        return False


@pytest.fixture
def bank(base_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path) -> Path:
    base = BaseModel.open(base_folder)
    adapters = {name: load_adapter(folder, base) for name, folder in adapter_folders.items()}
    built = build_bank(BaseIdentity(base.name, base.fingerprint), adapters)
    save_bank(built, tmp_path / "bank", source=str(base_folder))
    return tmp_path / "bank"


@pytest.fixture
def push(url: str, bank: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(preference: str, *words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["push", str(bank), "--preference", preference, "--to", url, *words])
        code = ended.value.code
        return (0 if code is None else int(code), *capsys.readouterr())

    return call


def written_by(url: str, model: str) -> list[int]:
    body = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status()
    return list(answer.json()["choices"][0]["token_ids"])


def written(model: PreTrainedModel | PeftModel, base_folder: Path) -> list[int]:
    """The same, by transformers."""
    prompt = AutoTokenizer.from_pretrained(base_folder)(PROMPT, return_tensors="pt")["input_ids"]
    tokens = prompt
    for _ in range(16):
        with torch.no_grad():
            following = model(tokens).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens[0, prompt.shape[1] :].tolist()


def test_a_pushed_merge_is_served_as_peft_runs_it(
    push: Run, url: str, bank: Path, base_folder: Path, base_model: PreTrainedModel
) -> None:
    plain = written(base_model, base_folder)
    assert written_by(url, "tiny") == plain
    code, out, _ = push("ada=0.4, dee=0.6", "--method", "ties")
    name = out.splitlines()[-1]
    assert code == 0
    folder = bank.with_name("bank-merges") / name
    expected = written(PeftModel.from_pretrained(base_model, folder), base_folder)
    assert expected != plain
    assert written_by(url, name) == expected


def test_a_rank_that_vllm_has_no_room_for_is_refused_and_can_be_cut(
    push: Run, url: str, base_folder: Path, base_model: PreTrainedModel, tmp_path: Path
) -> None:
    code, _, err = push("ada=0.2, bob=0.4, cyd=0.4")
    assert code == 2
    assert "LoRA rank 9 is greater than max_lora_rank 8" in err
    assert "cut the merge by --rank" in err
    folder = tmp_path / "adapters"
    code, out, _ = push(
        "ada=0.2, bob=0.4, cyd=0.4", "--rank", "8", "--name", "cut", "--folder", str(folder)
    )
    assert (code, out.splitlines()[-1]) == (0, "cut")
    (made,) = folder.iterdir()
    expected = written(PeftModel.from_pretrained(base_model, made), base_folder)
    assert written_by(url, "cut") == expected


def test_names_that_are_taken_and_folders_without_an_adapter_are_refused(
    push: Run, bank: Path
) -> None:
    assert "has a model named 'tiny' already" in push("bob=1", "--name", "tiny")[2]
    code, _, _ = push("bob=1", "--name", "bob")
    assert code == 0
    assert push("bob=1", "--name", "bob")[0] == 0
    assert "has a model named 'bob' already" in push("ada=1", "--name", "bob")[2]
    (made,) = bank.with_name("bank-merges").iterdir()
    for path in made.iterdir():
        path.unlink()
    code, _, err = push("bob=1", "--name", "gone")
    assert code == 2
    assert f"vLLM must be able to read {made}" in err


def test_a_route_that_is_off_is_told_from_an_adapter_that_is_not_found(url: str) -> None:
    missing = httpx.post(f"{url}/v1/no_such_route", json={})
    assert (missing.status_code, missing.json()) == (404, {"detail": "Not Found"})
