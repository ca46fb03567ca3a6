"""Target: the layer of a loaded model that a module of a bank stands for."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from dynmerge.bank.bank import ModuleFactors
from dynmerge.errors import BankError


def target(model: nn.Module, module: ModuleFactors) -> nn.Module:
    """The layer a module names. Raises BankError where the model has no such linear layer."""
    try:
        layer = model.get_submodule(module.name)
    except AttributeError:
        raise BankError(f"the base model has no module named {module.name!r}") from None
    if layer is _output_layer(model):
        # It sees only the rows that are sampled from, not every token of the batch.
        raise BankError(f"{module.name} is the output layer, which the engine cannot change")
    if isinstance(layer, nn.Linear):
        shape = (layer.out_features, layer.in_features)
    elif isinstance(layer, Conv1D):
        shape = (layer.nf, layer.nx)
    else:
        raise BankError(f"{module.name} is a {type(layer).__name__}, not a linear layer")
    if shape != (module.U.shape[0], module.V.shape[0]):
        raise BankError(
            f"{module.name} is {shape}, but the bank's is {(module.U.shape[0], module.V.shape[0])}"
        )
    return layer


def _output_layer(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter else None
