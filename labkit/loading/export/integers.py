"""A quantized Linear as integers for other engines' formats, or the reason why it has none."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.common.errors import LabError
from labkit.quantization import QuantizedLinear, Scheme
from labkit.quantization.int4 import Int4Linear
from labkit.quantization.int8 import Int8Linear
from labkit.quantization.int8_dynamic import Int8DynamicLinear
from labkit.quantization.linear import ScaledInput

# Classes whose weight is ``(code - zero_point) * scale``, and the buffers that hold it.
AFFINE = {
    Int4Linear: {"packed", "scale_zero"},
    Int8Linear: {"weight_int8", "scale"},
    Int8DynamicLinear: {"weight_int8", "scale"},
}


@dataclass(frozen=True)
class Kind:
    """The properties that Linears in one group of a configuration share.

    Attributes:
        num_bits: bits a code.
        group_size: weights of a row that share a scale; None: the whole row.
        symmetric: every zero point is the middle of the range.
        dynamic: the input is quantized to 8 bits, token by token, before the product.
    """

    num_bits: int
    group_size: int | None
    symmetric: bool
    dynamic: bool

    def __str__(self) -> str:
        groups = "per channel" if self.group_size is None else f"groups of {self.group_size}"
        form = "symmetric" if self.symmetric else "asymmetric"
        return f"W{self.num_bits}A{8 if self.dynamic else 16}, {groups}, {form}"


@dataclass(frozen=True)
class Integers:
    """One quantized weight: ``(codes - zero_point) * scale``.

    codes [N, K] uint8, scale [N, K/G] (G is K for one group a channel), zero_point [N, K/G] uint8.
    """

    kind: Kind
    codes: Tensor
    scale: Tensor
    zero_point: Tensor


def cannot_be_integers(module: nn.Module) -> str | None:
    """Why a quantized module has no affine integer weight, in words; None if it has."""
    buffers = next((AFFINE[cls] for cls in type(module).__mro__ if cls in AFFINE), None)
    if buffers is None:
        return "its weight is no integer times a scale"
    if isinstance(module, ScaledInput):
        return (
            "its inputs are multiplied by an input_scale of its own; siblings such as q, k and v have others, so the norm "
            "before them cannot take it up"
        )
    if more := sorted(set(module._buffers) - buffers):
        return f"it also holds {', '.join(more)}"
    if isinstance(module, Int4Linear) and not _zero_points_fit(module):
        return "its zero points are real numbers"
    return None


def kind_of(module: QuantizedLinear) -> Kind:
    """Width, groups and symmetry of an affine module."""
    if isinstance(module, Int4Linear):
        symmetric = not module.scale_zero[..., 1].any()
        return Kind(module.num_bits, module.group_size, bool(symmetric), False)
    return Kind(8, None, True, isinstance(module, Int8DynamicLinear))


def integers_of(module: QuantizedLinear) -> Integers:
    """The module's weight as integers; requires that `cannot_be_integers` is None."""
    kind = kind_of(module)
    if isinstance(module, Int4Linear):
        return Integers(kind, module.codes, module.scale.contiguous(), module.zero_point.to(torch.uint8))
    codes = (module.weight_int8.to(torch.int16) + 128).to(torch.uint8)
    scale = module.scale[:, None]
    return Integers(kind, codes, scale.contiguous(), torch.full_like(scale, 128, dtype=torch.uint8))


@dataclass(frozen=True)
class Refusal:
    """Why a format cannot store a quantized Linear, and the nearest scheme that it can store."""

    reason: str
    nearest: str


def refuse(format: str, refused: Mapping[str, tuple[Scheme, Refusal]]) -> None:
    """Raise `LabError` if there are Linears that ``format`` cannot express, grouped by scheme and reason."""
    if not refused:
        return
    grouped: dict[tuple[str, Refusal], list[str]] = {}
    for name, (scheme, refusal) in refused.items():
        grouped.setdefault((scheme.name, refusal), []).append(name)
    phrases = []
    for (scheme, refusal), names in grouped.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        phrases.append(f"{scheme} of {names[0]}{more}: {refusal.reason}; nearest: {refusal.nearest}")
    raise LabError(
        f"{format} cannot express {'. Nor '.join(phrases)}. Quantize with the nearest, or write these parts "
        "unquantized with --dequantize PART,…"
    )


def _zero_points_fit(module: Int4Linear) -> bool:
    """Whether every zero point is an integer in the range of the codes."""
    zero_point = module.zero_point
    in_range = zero_point.min() >= 0 and zero_point.max() < 2**module.num_bits
    return bool(in_range) and module.has_integer_zero_points
