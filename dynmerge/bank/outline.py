"""Outline: what a bank is, without its tensors: enough to say what may be asked of it.

Made from the bank itself or from the manifest of one on disk; both give the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dynmerge.bank.bank import BaseIdentity, FactorBank
from dynmerge.bank.manifest import Manifest


@dataclass(frozen=True, slots=True)
class ModuleOutline:
    """One linear layer: its size, the widths p and q of its bases, each task's rank."""

    name: str
    d_out: int
    d_in: int
    p: int
    q: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outline:
    """A bank's base model, its tasks sorted by name, its digest and the shapes of its modules.

    `calibrated` are the methods that it carries a calibration for; `fixed_at` has those among them
    that serve one preference only, and it.
    """

    base: BaseIdentity
    names: tuple[str, ...]
    digest: str
    has_soups: bool
    modules: tuple[ModuleOutline, ...]
    calibrated: tuple[str, ...] = ()
    fixed_at: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def carries(self) -> tuple[str, ...]:
        """What methods may need: soups, and the methods that it carries a calibration for."""
        return (*(("soups",) if self.has_soups else ()), *self.calibrated)

    @classmethod
    def of_bank(cls, bank: FactorBank) -> "Outline":
        """The outline of a bank in memory."""
        modules = tuple(
            ModuleOutline(
                module.name, len(module.U), len(module.V), *module.core_shape, module.ranks
            )
            for module in bank.modules
        )
        return cls(
            base=bank.base,
            names=bank.names,
            digest=bank.digest,
            has_soups=bank.has_soups,
            modules=modules,
            calibrated=bank.calibrated,
            fixed_at=bank.fixed_at,
        )

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> "Outline":
        """The outline of the bank that `manifest` describes."""
        modules = tuple(
            ModuleOutline(entry.name, entry.d_out, entry.d_in, entry.p, entry.q, entry.ranks)
            for entry in manifest.modules
        )
        return cls(
            base=manifest.base.identity(),
            names=tuple(task.name for task in manifest.tasks),
            digest=manifest.digest,
            has_soups=manifest.modules[0].soup is not None,
            modules=modules,
            calibrated=tuple(entry.method for entry in manifest.calibrations),
            fixed_at={
                entry.method: entry.at for entry in manifest.calibrations if entry.at is not None
            },
        )
