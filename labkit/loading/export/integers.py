"""A quantized Linear as integers for other engines' formats, or the reason why it has none."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.quantization.int4 import Int4Linear
from labkit.quantization.int8 import Int8Linear
from labkit.quantization.int8_dynamic import Int8DynamicLinear
from labkit.quantization.linear import ScaledInput

AffineLinear = Int4Linear | Int8Linear

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

    def split(self, count: int) -> list["Integers"]:
        """``count`` weights with an equal share of the rows each, in order."""
        chunks = (tensor.chunk(count) for tensor in (self.codes, self.scale, self.zero_point))
        return [Integers(self.kind, *tensors) for tensors in zip(*chunks)]


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


def kind_of(module: AffineLinear) -> Kind:
    """Width, groups and symmetry of an affine module."""
    if isinstance(module, Int4Linear):
        symmetric = not module.scale_zero[..., 1].any()
        return Kind(module.num_bits, module.group_size, bool(symmetric), False)
    return Kind(8, None, True, isinstance(module, Int8DynamicLinear))


def integers_of(module: AffineLinear) -> Integers:
    """The module's weight as integers; requires that `cannot_be_integers` is None."""
    kind = kind_of(module)
    if isinstance(module, Int4Linear):
        return Integers(kind, module.codes, module.scale.contiguous(), module.zero_point.to(torch.uint8))
    codes = (module.weight_int8.to(torch.int16) + 128).to(torch.uint8)
    scale = module.scale[:, None]
    return Integers(kind, codes, scale.contiguous(), torch.full_like(scale, 128, dtype=torch.uint8))


def _zero_points_fit(module: Int4Linear) -> bool:
    """Whether every zero point is an integer in the range of the codes."""
    zero_point = module.zero_point
    in_range = zero_point.min() >= 0 and zero_point.max() < 2**module.num_bits
    return bool(in_range) and module.has_integer_zero_points
