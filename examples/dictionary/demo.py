"""The demo: make the bank, serve it, ask one question under three preferences, keep serving.

The server is the `dynmerge` command in a process of its own, and the questions go through the
unmodified `openai` client: what a user would do.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from bank import demo_bank
from openai import OpenAI
from rich.console import Console

PROMPT = "Define: politics"
PREFERENCES = ("dictionary=1", "cynic=1", "dictionary=0.5, cynic=0.5")
OUT = Console(highlight=False)


@contextmanager
def served(bank: Path, port: int, *options: str) -> Iterator[str]:
    """The URL of a server of `bank`, which ends with the block."""
    dynmerge = Path(sys.executable).with_name("dynmerge")
    command = [str(dynmerge), "serve", str(bank), "--port", str(port), *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = next((line.split()[1] for line in server.stdout if line.startswith("ready ")), None)
        if url is None:
            raise SystemExit(f"the server ended with status {server.wait()} before it was ready")
        yield url
    finally:
        server.terminate()
        server.wait(30)


def answer(client: OpenAI, preference: str) -> None:
    """Stream the answer to PROMPT under `preference`, then what was applied."""
    OUT.print(f"\n[bold]{preference}[/]")
    reply = client.chat.completions.with_raw_response.create(
        model="",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=80,
        temperature=0,
        stream=True,
        extra_headers={"X-Dynmerge-Preference": preference},
    )
    for chunk in reply.parse():
        for choice in chunk.choices:
            OUT.print(choice.delta.content or "", end="", markup=False)
    applied, merge = (reply.headers[f"x-dynmerge-{name}"] for name in ("applied", "merge-id"))
    OUT.print(f"\n[dim]applied {applied}, merge {merge}[/]", soft_wrap=True)


def main() -> None:
    """Run the demo until Ctrl-C; with --once, stop after the three answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bank", type=Path, default=Path(".cache/demo-bank"))
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--once", action="store_true", help="stop after the three answers")
    arguments = parser.parse_args()
    # Ended by another process, too, it takes its server along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    started = time.perf_counter()
    OUT.print("making the bank (the first time, the base model is unpacked too) ...")
    bank = demo_bank(arguments.bank.resolve())
    OUT.print("starting the server ...")
    with served(bank, arguments.port) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        OUT.print(f"ready after {time.perf_counter() - started:.0f} s\n\n{PROMPT}")
        for preference in PREFERENCES:
            answer(client, preference)
        if not arguments.once:
            stay(url)


def stay(url: str) -> None:
    """Print how to go on, and serve until Ctrl-C."""
    OUT.print(
        f"\nServing at {url} (Ctrl-C ends it); a page with sliders is at {url}/playground/\n\n"
        f"curl {url}/v1/chat/completions \\\n"
        "  -H 'Content-Type: application/json' \\\n"
        "  -H 'X-Dynmerge-Preference: hacker=0.6, cynic=0.4' \\\n"
        '  -d \'{"messages": [{"role": "user", "content": "Define: computer"}]}\'',
        markup=False,
        soft_wrap=True,
    )
    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
