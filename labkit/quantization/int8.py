"""int8: a byte per weight, a scale per output channel, unquantized activations.

Memory: weight int8 [N, K], scale bf16 [N]. The weight error is about 1/256 of a channel's largest value, so
quality hardly changes; the gain is half of bf16's bytes. On the CPU few rows go through torch's packed product, and
many rows are multiplied by the integers, converted slice by slice (`kernels/int8.py`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.quantization import affine
from labkit.quantization.kernels import cuda
from labkit.quantization.kernels.cuda_products import Packed
from labkit.quantization.kernels.int8 import int8_multiply
from labkit.quantization.kernels.reference import row_slices
from labkit.quantization.linear import QuantizedLinear
from labkit.quantization.scheme import Scheme, bias_bytes, register


class Int8Linear(QuantizedLinear):
    """weight_int8 [N, K] int8 and scale [N] bf16; the weight's value is their product."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        has_bias: bool,
        device: Any = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(in_features, out_features, has_bias, device, dtype)
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("weight_int8", codes)
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.bfloat16, device=device))

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Quantize ``weight`` [N, K] into the buffers, a slice of channels at a time."""
        for part in row_slices(*weight.shape, weight.device):
            scale, zero_point = affine.choose_qparams(weight[part], 8, None, True, self.scale.dtype)
            codes = affine.quantize(weight[part], scale, zero_point, 8, symmetric=True)
            self.weight_int8[part] = (codes.to(torch.int16) - 128).to(torch.int8)
            self.scale[part] = scale[:, 0]

    def multiply(self, rows: Tensor) -> Tensor:
        packed = self.kernel_weight(rows.device)
        if packed is not None:
            return cuda.multiply(rows, packed)
        return int8_multiply(rows, self.weight_int8, self.scale)

    def packed_weight(self) -> Packed | None:
        return Packed(self.weight_int8, self.scale)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return (self.weight_int8 * self.scale[:, None].float()).to(dtype or self.dtype)


class Int8Scheme(Scheme):
    """Base of the schemes that store an int8 weight per channel."""

    def empty_linear(self, in_features, out_features, has_bias, *, device=None, dtype=torch.bfloat16):
        return Int8Linear(in_features, out_features, has_bias, device, dtype)

    def predict_bytes(self, out_features, in_features, has_bias, *, dtype=torch.bfloat16) -> int:
        return out_features * (in_features + 2) + bias_bytes(out_features, has_bias, dtype)


@register("int8")
@dataclass(frozen=True)
class Int8(Int8Scheme):
    """8-bit weights, symmetric, one scale per output channel; activations keep their dtype."""

    module_kinds = ("linear", "embedding", "conv")
