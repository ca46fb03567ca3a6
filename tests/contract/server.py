"""A server in a process of its own, whichever engine runs the model: started by the command, asked
over HTTP, ended by a signal.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from dynmerge.bank.bank import FactorBank

ROOT = Path(__file__).parents[2]
HAS_VLLM = importlib.util.find_spec("vllm") is not None
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'server'}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
SLOTS = 8
FLAGS: Mapping[str, Sequence[str]] = {
    "embedded": (),
    "vllm": (
        *("--engine", "vllm", "--max-model-len", "512"),
        *("--dtype", "float32", "--max-loras", str(SLOTS)),
    ),
}
# Both engines read this file, so it holds nothing that is one engine's alone.
SETTINGS = """
allow_negative = true
[presets]
mixed = "ada=0.7, bob=0.3"
careful = { cyd = 1 }
[experiments]
file = "experiments.toml"
[experiments.log]
path = "experiments.sqlite"
flush_seconds = 0.02
"""
# Only requests that name a unit are in it.
EXPERIMENTS = """
[experiments.tone]
primary = { outcome = "helpful" }
[experiments.tone.arms]
plain = { preference = "ada=1" }
mixed = { preset = "mixed", method = "linear;scale=0.9" }
none = {}
"""
START_SECONDS = 600
END_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Served:
    """A running server, what it serves, and what that was made from."""

    engine: str
    url: str
    bank: FactorBank
    base_folder: Path
    adapter_folders: Mapping[str, Path]
    folder: Path  # its own
    model: str = "tiny"


@contextmanager
def running(engine: str, bank: Path, folder: Path) -> Iterator[str]:
    """`dynmerge serve` on a free port until it is healthy; the address. `folder` is its own."""
    settings, log = folder / "dynmerge.toml", folder / "log"
    settings.write_text(SETTINGS)
    (folder / "experiments.toml").write_text(EXPERIMENTS)
    port = free_port()
    command = [sys.executable, "-m", "dynmerge.cli", "serve", str(bank), *FLAGS[engine]]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--config", str(settings), "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,  # its children can be ended with it
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(process, url, log)
        yield url
        process.send_signal(signal.SIGTERM)
        process.wait(END_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return once /health answers 200; fail with the log's end when that will not happen."""
    deadline = time.monotonic() + START_SECONDS
    while not is_healthy(url):
        code = process.poll()
        assert code is None, f"the server ended with {code}:\n{end_of(log)}"
        assert time.monotonic() < deadline, f"the server is not healthy yet:\n{end_of(log)}"
        time.sleep(0.1)


def is_healthy(url: str) -> bool:
    """Whether something answers at `url` and says that it is well."""
    try:
        return httpx.get(f"{url}/health", timeout=5, verify=False).status_code == 200
    except httpx.TransportError:
        return False


def end_of(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-60:])


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
