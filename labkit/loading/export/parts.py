"""A model's own tensors, module by module, as every format writes them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from labkit.loading.tensors import tensor_entries
from labkit.quantization import QuantizedLinear
from labkit.quantization.int8_storage import StoredInt8
from labkit.quantization.module_tensors import module_tensors


def module_names(model: nn.Module) -> Iterator[tuple[str, set[str]]]:
    """The names of all modules with tensors, in model order, and of their tensors; a shared tensor comes once."""
    entries, _ = tensor_entries(model)
    attributes: dict[str, set[str]] = {}
    for entry in entries:
        attributes.setdefault(entry.prefix.removesuffix("."), set()).add(entry.attribute)
    yield from attributes.items()


def unquantized_tensors(
    module: nn.Module, attributes: set[str], dtype: torch.dtype, without_weight: bool = False
) -> dict[str, Tensor]:
    """The module's own tensors by their names, a quantized weight dequantized, or left out."""
    if isinstance(module, (QuantizedLinear, StoredInt8)):
        bias = module._parameters.get("bias")
        tensors = {} if bias is None else {"bias": bias.detach()}
        if without_weight:
            return tensors
        weight = module.dequantize(dtype) if isinstance(module, QuantizedLinear) else module.weight.to(dtype)
        return {"weight": weight, **tensors}
    computed = module._non_persistent_buffers_set
    return {
        key: tensor
        for key, tensor in module_tensors(module).items()
        if key in attributes and key not in computed
    }
