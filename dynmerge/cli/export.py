"""`dynmerge export`: one merge of a bank -> an ordinary PEFT adapter."""

from pathlib import Path

from dynmerge.adapters.checkpoint import check_new, save_adapter
from dynmerge.bank.outline import Outline
from dynmerge.bank.storage import load_bank, read_manifest
from dynmerge.cli.console import line, progress_bar
from dynmerge.errors import MethodError, PreferenceError
from dynmerge.merging.choice import parse_method
from dynmerge.merging.materialize import materialize
from dynmerge.merging.merge import merge
from dynmerge.offer import Offer
from dynmerge.preference import Preference


def run(
    folder: Path,
    preference: str,
    output: Path,
    *,
    method: str | None,
    rank: int | None,
    uniform: bool,
) -> None:
    """Write the merge to `output` and say how much of it the rank keeps."""
    check_new(output)
    wish = Preference.parse(preference, allow_negative=True, source="--preference")
    choice = None if method is None else parse_method(method, source="--method")
    bank = load_bank(folder)
    recipe = Offer(Outline.of_bank(bank)).recipe(wish, choice, "--preference", "--method")
    if wish.is_base:
        raise PreferenceError("--preference asks for the base model: there is nothing to export")
    line(f"merge   {wish} by {recipe.method}, {recipe.digest}")
    with progress_bar() as start:
        step = start("merging")
        whole = merge(bank, recipe)
        step(1, 1)
        made = materialize(bank, whole, rank, start("finding the rank"))
    if not made.rank:
        reason = f"--method {recipe.method} leaves nothing of the merge: there is nothing to export"
        raise MethodError(reason)
    base = read_manifest(folder).base
    save_adapter(made.adapter, output, base_name=base.source or base.name, uniform=uniform)
    line(f"rank    {made.rank}, which keeps {made.energy:.2%} of the energy")
    line(f"{output}")
