"""Kill a process that writes a bank at each of its steps in turn; print what each left, as JSON.

A step is anything Python audits: opening, renaming, making or removing a file or folder.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from dynmerge.bank.edit import with_calibration
from dynmerge.bank.storage import add_calibration, load_bank, save_bank
from dynmerge.errors import BankError
from tests.bank_factory import RANKS, random_adapter, random_bank, random_calibration

BANKS = {name: random_bank({name: random_adapter(RANKS["bob"], 0)}) for name in ("old", "new")}
# Calibrations of the new bank; which one it carries says whether it is the old version.
LEARNED = {
    name: random_calibration(
        BANKS["new"], "tara-a", lambda module: {"ratio": (1, sum(module.ranks))}, form
    )
    for name, form in (("old", "fixed"), ("new", "ratio"))
}
Write = Callable[[Path], object]


def write_until_killed(write: Write, folder: Path, step: int) -> None:
    """Write the new bank and die at the given step, or live to the end."""
    steps = 0

    def count(event: str, _arguments: object) -> None:
        nonlocal steps
        if event == "open" or event.startswith(("os.", "shutil.")):
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    write(folder)


def left_behind(folder: Path) -> str:
    """The name of the one task of the bank at `folder`, or that of its calibration."""
    if not folder.exists():
        return "none"
    try:
        bank = load_bank(folder)
    except BankError as error:
        return str(error)
    for each in bank.calibrations:
        return next(name for name, one in LEARNED.items() if one.digest == each.digest)
    return bank.names[0]


def nothing(_folder: Path) -> None:
    """The start of a bank that is new."""


def replaced(folder: Path) -> object:
    """Save the new bank, whatever is there."""
    return save_bank(BANKS["new"], folder, replace=True)


def outcomes(root: Path, before: Write, write: Write) -> list[str]:
    """What each killed writer left, up to the first that lived."""
    found = []
    for step in range(1, 1000):
        folder = root / str(step) / "bank"
        folder.parent.mkdir(parents=True)
        before(folder)
        child = os.fork()
        if not child:
            write_until_killed(write, folder, step)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found.append(left_behind(folder))
        write(folder)  # whatever was left is no obstacle
        if status == 0:
            return found
        shutil.rmtree(folder.parent)
    raise AssertionError("every writer was killed")


if __name__ == "__main__":
    root = Path(sys.argv[1])
    calibrated = with_calibration(BANKS["new"], LEARNED["old"])
    found = {
        "none": [outcomes(root / "new", nothing, replaced)],
        "old": [
            outcomes(root / "replacing", lambda folder: save_bank(BANKS["old"], folder), replaced),
            outcomes(
                root / "calibrating",
                lambda folder: save_bank(calibrated, folder),
                lambda folder: add_calibration(folder, LEARNED["new"]),
            ),
        ],
    }
    print(json.dumps(found))
