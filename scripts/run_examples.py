"""Run every example as a user would, against one server of the demo bank. Fails if any fails."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES / "dictionary"))

from bank import demo_bank
from demo import served


def run(*command: str) -> None:
    """Run one example with this interpreter, its output shown."""
    print(f"== examples/{' '.join(command)}", flush=True)
    subprocess.run([sys.executable, str(EXAMPLES / command[0]), *command[1:]], check=True, cwd=ROOT)


def main() -> None:
    """The demo once, then the examples that want its base model, a bank or a server."""
    folder = ROOT / ".cache" / "demo-bank"
    run("dictionary/demo.py", "--bank", str(folder), "--port", "0", "--once")
    bank = demo_bank(folder)
    run("merge_and_export.py", str(bank))
    run("osrm_training.py", "--steps", "2", "--targets", "v_proj")
    run("ab_test.py", str(bank))
    with served(bank, 0) as url:
        run("openai_client.py", url)


if __name__ == "__main__":
    main()
