"""What a format cannot express: the reasons, one error for all of them, and the nearest that it can."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from labkit.common.errors import LabError
from labkit.quantization import QuantizedLinear, Scheme, SchemeError, get_scheme
from labkit.quantization.int4 import Int4Linear
from labkit.quantization.int8 import Int8Linear
from labkit.quantization.int8_dynamic import Int8DynamicLinear
from labkit.quantization.nf4 import NF4Linear


@dataclass(frozen=True)
class Refusal:
    """Why a format cannot store a quantized Linear, and in words the nearest scheme that it can store."""

    reason: str
    nearest: str


def refuse(
    format: str, refused: Mapping[str, Refusal], schemes: Mapping[str, Scheme], roles: Mapping[str, str]
) -> None:
    """Raise a `LabError` that names all Linears that ``format`` cannot express, by scheme and reason."""
    if not refused:
        return
    grouped: dict[tuple[str, Refusal], list[str]] = {}
    for name, refusal in refused.items():
        grouped.setdefault((schemes[name].name, refusal), []).append(name)
    phrases = []
    for (scheme, refusal), names in grouped.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        phrases.append(f"{scheme} of {names[0]}{more}: {refusal.reason}; nearest: {refusal.nearest}")
    parts = ",".join(dict.fromkeys(roles.get(name, name) for name in refused))
    raise LabError(
        f"{format} cannot express {'. Nor '.join(phrases)}. Take the nearest with --dequantize auto, or write these "
        f"parts unquantized with --dequantize {parts}"
    )


def keeps_integers(module: nn.Module) -> bool:
    """Whether `nearest_module` holds the module's own integers: only its inputs are no longer rounded."""
    return type(module) is Int8DynamicLinear


def nearest_module(module: nn.Module) -> QuantizedLinear | None:
    """A Linear under the nearest scheme with an affine integer weight; None for what has none.

    int8-dynamic becomes int8 with the same integers; other weights are rounded anew from the values they multiply by.
    """
    if not isinstance(module, QuantizedLinear):
        return None
    if keeps_integers(module):
        sizes = module.in_features, module.out_features, module.bias is not None
        plain = Int8Linear(*sizes, device="meta", dtype=module.dtype)
        plain.load_state_dict(module.state_dict(), assign=True)
        return plain
    dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    dense.weight = nn.Parameter(module.dequantize(torch.float32), requires_grad=False)
    dense.bias = module.bias
    try:
        return _nearest_scheme(module).quantize_linear(dense, dtype=module.dtype)
    except SchemeError:
        return None


def _nearest_scheme(module: QuantizedLinear) -> Scheme:
    if isinstance(module, Int8Linear):
        return get_scheme("int8")
    if isinstance(module, Int4Linear):  # codes of 3 bits, real zero points, or an input scale
        num_bits = 4 if module.num_bits == 3 else module.num_bits
        return get_scheme("int4", num_bits=num_bits, group_size=module.group_size, symmetric=True)
    if isinstance(module, NF4Linear):
        return get_scheme("int4", group_size=min(module.group_size, 64), symmetric=True)
    return get_scheme("int8")
