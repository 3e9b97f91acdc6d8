"""A module's own tensors, in the form in which files hold them."""

from collections.abc import Mapping

from torch import Tensor, nn

from labkit.quantization.linear import QuantizedLinear


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors by their names, on the CPU, packed ones in plain order of bytes."""
    stored: dict[str, Tensor] = {}
    module._save_to_state_dict(stored, "", keep_vars=False)
    for name in module._non_persistent_buffers_set:
        if module._buffers[name] is not None:
            stored[name] = module._buffers[name]
    return {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}


def assign_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace a module's own tensors, and bring packed ones into the order that is fastest on its device."""
    for name, tensor in tensors.items():
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[name] = tensor
    if isinstance(module, QuantizedLinear) and module.packed_name in tensors:
        module.layout = "plain"
        module.settle()
