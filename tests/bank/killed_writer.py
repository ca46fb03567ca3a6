"""Kill a process that saves a bank at each of its steps in turn; print what each left, as JSON.

A step is anything Python audits: opening, renaming, making or removing a file or folder.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from dynmerge.bank.storage import load_bank, save_bank
from dynmerge.errors import BankError
from tests.bank_factory import RANKS, random_adapter, random_bank

BANKS = {name: random_bank({name: random_adapter(RANKS["bob"], 0)}) for name in ("old", "new")}


def save_until_killed(folder: Path, step: int) -> None:
    """Save the new bank and die at the given step, or live to the end."""
    steps = 0

    def count(event: str, _arguments: object) -> None:
        nonlocal steps
        if event == "open" or event.startswith(("os.", "shutil.")):
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    save_bank(BANKS["new"], folder, replace=True)


def left_behind(folder: Path) -> str:
    """The name of the one task of the bank at `folder`."""
    if not folder.exists():
        return "none"
    try:
        return load_bank(folder).names[0]
    except BankError as error:
        return str(error)


def outcomes(root: Path, *, replacing: bool) -> list[str]:
    """What each killed writer left, up to the first that lived."""
    found = []
    for step in range(1, 1000):
        folder = root / str(step) / "bank"
        folder.parent.mkdir(parents=True)
        if replacing:
            save_bank(BANKS["old"], folder)
        child = os.fork()
        if not child:
            save_until_killed(folder, step)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found.append(left_behind(folder))
        save_bank(BANKS["new"], folder, replace=True)  # whatever was left is no obstacle
        if status == 0:
            return found
        shutil.rmtree(folder.parent)
    raise AssertionError("every writer was killed")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    print(
        json.dumps(
            {
                "none": outcomes(root / "new", replacing=False),
                "old": outcomes(root / "replacing", replacing=True),
            }
        )
    )
