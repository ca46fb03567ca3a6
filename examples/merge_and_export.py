"""Without a server: load a bank, merge a preference, write it as an ordinary PEFT adapter.

Usage: python examples/merge_and_export.py BANK
"""

import sys
import tempfile
from pathlib import Path

from dynmerge.adapters.checkpoint import save_adapter
from dynmerge.bank.storage import load_bank
from dynmerge.merging.choice import parse_method
from dynmerge.merging.materialize import materialize
from dynmerge.merging.merge import merge
from dynmerge.preference import Preference
from dynmerge.recipe import Recipe


def main() -> None:
    """Merge dictionary and cynic half and half, and export the merge at a few ranks."""
    bank = load_bank(Path(sys.argv[1]))
    preference = Preference.parse("dictionary=0.5, cynic=0.5")
    recipe = Recipe(preference, parse_method("linear"), bank.digest)
    made = merge(bank, recipe)
    print(f"{recipe.preference} is merge {recipe.digest}, {made.nbytes / 2**20:.1f} MiB")
    for rank in (4, 8, 16, 32):
        cut = materialize(bank, made, rank)
        print(f"as an adapter of rank {cut.rank:2}: {cut.energy:.1%} of its energy")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "dictionary-cynic"
        save_adapter(cut.adapter, target, base_name=bank.base.name)
        size = sum(file.stat().st_size for file in target.iterdir())
        print(f"written as {', '.join(sorted(p.name for p in target.iterdir()))}: {size} bytes")


if __name__ == "__main__":
    main()
