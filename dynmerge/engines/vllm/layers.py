"""Layers: vLLM's linear layers, each with a place where updates are added to what it computed.

They are vLLM's own LoRA layers but for their weights, of which they have none: what is added comes
from the bank's shared factors (`residents.py`). vLLM's classes know how a layer is packed and how
it is cut for tensor parallelism; that is taken from them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.lora import layers as stock
from vllm.lora.utils import _all_lora_classes, process_packed_modules_mapping, replace_submodule

from dynmerge.bank.outline import ModuleOutline, Outline
from dynmerge.engines.vllm.layer import Layer
from dynmerge.errors import BankError, ConfigError

Add = Callable[[Tensor, Tensor], None]  # (x (tokens, d_in), y (tokens, d_out)): y += update


class UpdateMixin:
    """A linear layer that adds an update where its LoRA would be."""

    add: Add | None = None

    def create_lora_weights(
        self, max_loras: int, lora_config: Any, model_config: Any = None
    ) -> None:
        """None are created; what vLLM reads of a layer's shape is set."""
        self.lora_config = lora_config
        if not hasattr(self, "output_slices"):
            self.output_slices = (self.output_size,)  # type: ignore[attr-defined]
        self.lora_a_stacked = self.lora_b_stacked = ()

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """There is nothing to set: slots are the table's rows."""

    def reset_lora(self, index: int) -> None:
        """There is nothing to reset."""

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        if self.add is not None:
            # The transformers backend has a batch dimension of one.
            self.add(x.reshape(-1, x.shape[-1]), output.view(-1, output.shape[-1]))
        return output


class ColumnUpdate(UpdateMixin, stock.ColumnParallelLinearWithLoRA):  # type: ignore[misc]
    """Cut by outputs."""


class MergedColumnUpdate(UpdateMixin, stock.MergedColumnParallelLinearWithLoRA):  # type: ignore[misc]
    """Gate and up in one, cut by outputs each."""


class QKVUpdate(UpdateMixin, stock.QKVParallelLinearWithLoRA):  # type: ignore[misc]
    """Queries, keys and values in one layer of the checkpoint too."""


class MergedQKVUpdate(UpdateMixin, stock.MergedQKVParallelLinearWithLoRA):  # type: ignore[misc]
    """Queries, keys and values in one, cut by heads; key heads may be repeated."""


class RowUpdate(UpdateMixin, stock.RowParallelLinearWithLoRA):  # type: ignore[misc]
    """Cut by inputs; the layer's own sum over ranks adds the parts."""


class ReplicatedUpdate(UpdateMixin, stock.ReplicatedLinearWithLoRA):  # type: ignore[misc]
    """Whole on every rank."""


# By the class that vLLM itself would take: a layer for which it has another is not understood here.
KINDS: Mapping[type[Any], type[Any]] = {
    stock.ColumnParallelLinearWithLoRA: ColumnUpdate,
    stock.MergedColumnParallelLinearWithLoRA: MergedColumnUpdate,
    stock.QKVParallelLinearWithLoRA: QKVUpdate,
    stock.MergedQKVParallelLinearWithLoRA: MergedQKVUpdate,
    stock.RowParallelLinearWithLoRA: RowUpdate,
    stock.ReplicatedLinearWithLoRA: ReplicatedUpdate,
}


class Layers:
    """The layers of one model, each wrapped when a bank first changes it."""

    SEPARATOR: ClassVar[str] = "."

    def __init__(self, model: nn.Module, lora_config: Any) -> None:
        self.model = model
        self._lora_config = lora_config
        self._packed: dict[str, list[str]] = process_packed_modules_mapping(model)
        self._packers = {
            part: packed for packed, parts in self._packed.items() for part in parts if packed
        }
        self.found: dict[str, Layer] = {}  # by vLLM's name

    def of(self, outline: Outline) -> list[Layer]:
        """The layers that a bank changes, in the model's order.

        Raises BankError on a module that the model has not, or that has no place for updates. One
        that is on another pipeline stage is left to that.
        """
        wanted: dict[str, dict[str, ModuleOutline]] = {}
        for module in outline.modules:
            name = self._home(module.name)
            if not self._elsewhere(name):
                wanted.setdefault(name, {})[module.name] = module
        return [self._layer(name, modules) for name, modules in wanted.items()]

    def _home(self, name: str) -> str:
        """The vLLM layer that a module of the checkpoint is in."""
        renamed = self._renamed(name)
        prefix, _, last = renamed.rpartition(self.SEPARATOR)
        packed = self._packers.get(last)
        if packed is not None:
            candidate = f"{prefix}.{packed}" if prefix else packed
            if self._has(candidate):
                return candidate
        return renamed

    def _renamed(self, name: str) -> str:
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        if mapper is None:
            return name
        if hasattr(mapper, "get_rename_mapper"):
            mapper = mapper.get_rename_mapper()
        renamed = mapper.apply_list([f"{name}.weight"])
        return str(renamed[0]).removesuffix(".weight") if renamed else name

    def _has(self, name: str) -> bool:
        try:
            self.model.get_submodule(name)
        except AttributeError:
            return False
        return True

    def _elsewhere(self, name: str) -> bool:
        """Whether a module is on another pipeline stage."""
        from vllm.model_executor.models.utils import PPMissingLayer

        parts = name.split(self.SEPARATOR)
        for end in range(1, len(parts)):
            above = self.SEPARATOR.join(parts[:end])
            if self._has(above) and isinstance(self.model.get_submodule(above), PPMissingLayer):
                return True
        return False

    def _layer(self, name: str, modules: dict[str, ModuleOutline]) -> Layer:
        layer = self.found.get(name)
        if layer is None:
            layer = self.found[name] = self._wrap(name, next(iter(modules)))
        slices = [module for module in layer.modules if module is not None]
        for module in modules:
            if module not in slices:
                raise BankError(f"{module} has no slice in vLLM's layer {name}")
        _check_shapes(layer, modules)
        return layer

    def _wrap(self, name: str, module: str) -> Layer:
        if not self._has(name):
            raise BankError(f"the model in vLLM has no layer {name} for the bank's {module}")
        source = self.model.get_submodule(name)
        last = name.rpartition(self.SEPARATOR)[2]
        parts = self._packed.get(last, [])
        config = getattr(self.model, "config", None)
        taken = next(
            (
                kind
                for kind in _all_lora_classes
                if kind.can_replace_layer(
                    source_layer=source,
                    lora_config=self._lora_config,
                    packed_modules_list=parts,
                    model_config=config,
                )
            ),
            None,
        )
        if taken is None or taken not in KINDS:
            raise BankError(
                f"{name} is a {type(source).__name__}, to which dynmerge adds no updates "
                "(experts' fused layers, embeddings and the output layer are among these)"
            )
        wrapped = KINDS[taken](source)
        wrapped.create_lora_weights(0, self._lora_config, config)
        replace_submodule(self.model, name, wrapped)
        return Layer(name, wrapped, self._slices(module, parts, len(wrapped.output_slices)))

    def _slices(self, module: str, parts: Sequence[str], count: int) -> list[str | None]:
        """The checkpoint's name of every slice, from that of one."""
        if count == 1:
            return [module]
        if len(parts) != count:
            raise BankError(f"{module}: vLLM packs {len(parts)} modules into {count} slices")
        prefix = module.rpartition(self.SEPARATOR)[0]
        return [f"{prefix}.{part}" for part in parts]


def _check_shapes(layer: Layer, modules: dict[str, ModuleOutline]) -> None:
    wrapped = layer.wrapped
    for place, name in enumerate(layer.modules):
        module = modules.get(name or "")
        if module is None:
            continue
        empty = torch.empty(0)
        down: list[Tensor | None] = [None] * len(layer.modules)
        up: list[Tensor | None] = [None] * len(layer.modules)
        down[place] = empty.new_empty(1, module.d_in)
        up[place] = empty.new_empty(module.d_out, 1)
        cut_down, cut_up = layer.down(down)[place], layer.up(up)[place]
        assert cut_down is not None and cut_up is not None  # noqa: PT018
        here = (len(cut_up), cut_down.shape[1])
        width = layer.spans[place].stop - layer.spans[place].start
        if here != (width, layer.d_in):
            raise BankError(
                f"{module.name} is ({module.d_out}, {module.d_in}); vLLM's {layer.name} on rank "
                f"{wrapped.tp_rank} of {wrapped.tp_size} takes ({width}, {layer.d_in}), not {here}"
            )


def check_config(vllm_config: Any) -> None:
    """Raise ConfigError on options of vLLM under which updates would not be added."""
    from vllm import envs

    if vllm_config.parallel_config.enable_dbo:
        raise ConfigError("--enable-dbo is not supported: a step would be two")
    if vllm_config.lora_config.fully_sharded_loras:
        raise ConfigError("--fully-sharded-loras is not supported: its layers add no updates")
    if getattr(envs, "VLLM_LORA_ENABLE_DUAL_STREAM", False):
        raise ConfigError("VLLM_LORA_ENABLE_DUAL_STREAM is not supported: unset it")
