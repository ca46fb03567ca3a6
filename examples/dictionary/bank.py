"""Make the demo bank from the adapters beside this file, unless it is there already.

Prints the bank's folder as its last line. Knows nothing of serving.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from base import base_model
from rich.console import Console
from rich.progress import Progress

from dynmerge.adapters.base_model import BaseModel
from dynmerge.adapters.checkpoint import load_adapter
from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.build import build_bank
from dynmerge.bank.storage import load_bank, save_bank
from dynmerge.errors import BankError

ADAPTERS = Path(__file__).parent / "adapters"
STDERR = Console(stderr=True)


def build(base: BaseModel) -> FactorBank:
    """The bank of every adapter folder under `adapters/`, named after its folder."""
    folders = sorted(path.parent for path in ADAPTERS.glob("*/adapter_config.json"))
    adapters = {folder.name: load_adapter(folder, base) for folder in folders}
    with Progress(console=STDERR, transient=True) as progress:
        bar = progress.add_task("sharing bases", total=None)
        return build_bank(
            BaseIdentity(base.name, base.fingerprint),
            adapters,
            provenance={folder.name: {"source": f"adapters/{folder.name}"} for folder in folders},
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )


def is_there(folder: Path, wanted: FactorBank) -> bool:
    """Whether `folder` holds this very bank, whole."""
    try:
        return load_bank(folder).digest == wanted.digest
    except BankError:
        return False


def demo_bank(folder: Path) -> Path:
    """The folder of the demo bank, made if it is missing or out of date."""
    base = BaseModel.open(base_model())
    bank = build(base)
    if not is_there(folder, bank):
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_bank(bank, folder, source=str(base.folder), replace=True)
        STDERR.print(f"made the bank of {', '.join(bank.names)}")
    return folder


def main() -> None:
    """Make the bank and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bank", type=Path, default=Path(".cache/demo-bank"))
    print(demo_bank(parser.parse_args().bank.resolve()))


if __name__ == "__main__":
    main()
