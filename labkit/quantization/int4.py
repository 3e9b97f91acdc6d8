"""int4: group-wise round-to-nearest with 2, 3, 4 or 8 bits really packed.

Memory: packed [N, K * num_bits / 8] uint8, scale_zero bf16 [K/G, N, 2], that is num_bits + 32/G bits a
weight (4.5 at G = 64). The weight's value is ``(code - 2**(num_bits-1)) * scale + zero`` with ``zero =
(2**(num_bits-1) - zero_point) * scale``: the form torch's packed products take. The integer zero point can
be read back from it exactly (`Int4Linear.zero_point`).

No calibration: GPTQ stores the same bytes with better chosen codes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.common.errors import SchemeError
from labkit.common.options import option
from labkit.quantization import affine
from labkit.quantization.kernels import cpu_int4, cuda
from labkit.quantization.kernels.cuda_products import Packed
from labkit.quantization.kernels.reference import CACHE_ELEMENTS, row_slices, sliced_multiply
from labkit.quantization.linear import QuantizedLinear
from labkit.quantization.scheme import Scheme, bias_bytes, check_group_size, register


class Int4Linear(QuantizedLinear):
    """packed [N, K * num_bits / 8] uint8, in the order `layout` names, and scale_zero [K/G, N, 2] bf16."""

    packed_name = "packed"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        has_bias: bool,
        num_bits: int = 4,
        group_size: int = 64,
        device: Any = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(in_features, out_features, has_bias, device, dtype)
        self.num_bits = num_bits
        self.group_size = group_size
        length = affine.packed_length(in_features, num_bits)
        groups = in_features // group_size
        self.register_buffer("packed", torch.empty(out_features, length, dtype=torch.uint8, device=device))
        scale_zero = torch.empty(groups, out_features, 2, dtype=torch.bfloat16, device=device)
        self.register_buffer("scale_zero", scale_zero)

    @torch.no_grad()
    def set_weight(self, weight: Tensor, symmetric: bool = False) -> None:
        """Round ``weight`` [N, K] to the nearest codes, a slice of channels at a time."""
        for part in row_slices(*weight.shape, weight.device):
            rows = weight[part]
            scale, zero_point = affine.choose_qparams(
                rows, self.num_bits, self.group_size, symmetric, self.scale_zero.dtype
            )
            codes = affine.quantize(rows, scale, zero_point, self.num_bits, symmetric)
            self.set_codes(codes, scale, zero_point, part)
        self.settle()

    def set_codes(self, codes: Tensor, scale: Tensor, zero_point: Tensor, part: slice = slice(None)) -> None:
        """Store codes [n, K] uint8, scale and zero_point [n, K/G] of the channels ``part``, in plain order;
        call `settle` after the last part."""
        scale = scale.to(self.scale_zero.dtype)
        self.set_codes_and_zero(codes, scale, affine.stored_zero(scale, zero_point, self.num_bits), part)

    @torch.no_grad()
    def set_codes_and_zero(
        self, codes: Tensor, scale: Tensor, zero: Tensor, part: slice = slice(None)
    ) -> None:
        """The same with the middle code's value [n, K/G], which need not be a multiple of scale."""
        self._set_layout("plain")
        self.packed[part] = affine.pack(codes, self.num_bits)
        self.scale_zero[:, part, 0] = scale.T
        self.scale_zero[:, part, 1] = zero.T

    @property
    def middle(self) -> int:
        """The code that means ``zero``: 8 for 4 bits."""
        return 2 ** (self.num_bits - 1)

    @property
    def scale(self) -> Tensor:
        """[N, K/G]."""
        return self.scale_zero[..., 0].T

    @property
    def zero_point(self) -> Tensor:
        """[N, K/G] int32: the code that means 0.0, recovered from ``zero``; where 0.0 lies between two codes
        (see `has_integer_zero_points`), the nearer code."""
        scale, zero = self.scale_zero.float().unbind(-1)
        return (self.middle - zero / scale).round().to(torch.int32).T

    @property
    def has_integer_zero_points(self) -> bool:
        """Whether every group has a code that means 0.0, as formats with integer zero points require."""
        zero = affine.stored_zero(self.scale, self.zero_point, self.num_bits)
        return torch.equal(zero, self.scale_zero[..., 1].T)

    @property
    def codes(self) -> Tensor:
        """[N, K] uint8."""
        return affine.unpack(self.relayout(self.packed, self.layout, "plain"), self.num_bits)

    def wanted_layout(self) -> str:
        return cpu_int4.wanted_layout(self.out_features, self.num_bits, self.group_size, self.packed.device)

    def relayout(self, packed: Tensor, old: str, new: str) -> Tensor:
        if old != "plain":
            packed = cpu_int4.from_blocks(packed, cpu_int4.block_of(old))
        return packed if new == "plain" else cpu_int4.to_blocks(packed, cpu_int4.block_of(new))

    def multiply(self, rows: Tensor) -> Tensor:
        if self.layout != "plain":
            block = cpu_int4.block_of(self.layout)
            return cpu_int4.int4_multiply(rows, self.packed, self.scale_zero, self.group_size, block)
        packed = self.kernel_weight(rows.device)
        if packed is not None:
            return cuda.multiply(rows, packed)
        return sliced_multiply(
            rows, self.out_features, lambda part: self._dequantize(part, rows.dtype), CACHE_ELEMENTS
        )

    def packed_weight(self) -> Packed | None:
        if self.num_bits != 4 or self.layout != "plain":
            return None
        return Packed(self.packed, self.scale_zero, self.group_size)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        packed = self.relayout(self.packed, self.layout, "plain")
        return self._dequantize(slice(None), dtype or self.dtype, packed)

    def _dequantize(self, part: slice, dtype: torch.dtype, packed: Tensor | None = None) -> Tensor:
        """The channels ``part`` [n, K] in ``dtype``, computed in fp32."""
        packed = self.packed if packed is None else packed
        codes = affine.unpack(packed[part], self.num_bits)
        # the code minus the middle, as a signed byte: 8-bit codes would overflow in a subtraction
        values = (codes ^ 128 if self.num_bits == 8 else codes - self.middle).view(torch.int8)
        scale, zero = (
            self.scale_zero[:, part].float().permute(2, 1, 0).unsqueeze(-1).contiguous()
        )  # [n, K/G, 1]
        groups = values.float().unflatten(1, (-1, self.group_size))
        return groups.mul_(scale).add_(zero).flatten(1).to(dtype)


@register("int4")
@dataclass(frozen=True)
class Int4(Scheme):
    """4-bit weights (or 2, 3, 8), rounded to the nearest, a scale and a zero point per group."""

    num_bits: int = option(4, "bits a weight takes", choices=(2, 3, 4, 8))
    group_size: int = option(64, "neighbouring weights of a row that share one scale and zero point")
    symmetric: bool = option(False, "keep the zero point in the middle of the range", choices=(False, True))

    def validate(self, in_features, out_features, device=None) -> None:
        super().validate(in_features, out_features, device)
        check_group_size(self.group_size, in_features)
        unit = affine.values_per_unit(self.num_bits)
        if in_features % unit:
            raise SchemeError(
                f"{self.num_bits}-bit values are packed by {unit} and {in_features} input features are no "
                f"multiple of that; use int8"
            )

    def empty_linear(self, in_features, out_features, has_bias, *, device=None, dtype=torch.bfloat16):
        return Int4Linear(in_features, out_features, has_bias, self.num_bits, self.group_size, device, dtype)

    def fill(self, module: Int4Linear, weight: Tensor) -> None:
        module.set_weight(weight, self.symmetric)

    def predict_bytes(self, out_features, in_features, has_bias, *, dtype=torch.bfloat16) -> int:
        packed = in_features * self.num_bits // 8
        groups = in_features // self.group_size
        return out_features * (packed + 4 * groups) + bias_bytes(out_features, has_bias, dtype)
