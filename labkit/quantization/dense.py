"""fp32, fp16, bf16: the weight as it is, in one of the three floating-point types."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from labkit.common.errors import SchemeError
from labkit.quantization.scheme import DTYPES, Scheme, register


class DenseLinear(nn.Linear):
    """A Linear whose dtype may differ from its neighbours': casts its input, and its output back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


@dataclass(frozen=True)
class _Dense(Scheme):
    weight_dtype: ClassVar[torch.dtype]

    def validate_environment(self, device) -> None:
        """Any device of torch multiplies these."""

    def empty_linear(self, in_features, out_features, has_bias, *, device=None, dtype=torch.bfloat16):
        module = DenseLinear(in_features, out_features, has_bias, device="meta", dtype=self.weight_dtype)
        return module.to_empty(device=device or "cpu").requires_grad_(False)

    def quantize_linear(self, linear: nn.Linear, *, device=None, dtype=None, statistics=None) -> nn.Module:
        if linear.weight.is_meta:
            raise SchemeError("the model is on the meta device and has no weights: load them first")
        device = device or linear.weight.device
        module = self.empty_linear(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        for name, value in linear.named_parameters(recurse=False):
            cast = value.detach().to(device=device, dtype=self.weight_dtype)
            setattr(module, name, nn.Parameter(cast, requires_grad=False))
        return module

    def predict_bytes(self, out_features, in_features, has_bias, *, dtype=torch.bfloat16) -> int:
        return (in_features + has_bias) * out_features * self.weight_dtype.itemsize


@register("fp32")
@dataclass(frozen=True)
class FP32(_Dense):
    """32-bit floating point: 4 bytes a value, 24 significant bits."""

    weight_dtype = DTYPES["fp32"]


@register("fp16")
@dataclass(frozen=True)
class FP16(_Dense):
    """16-bit floating point: 2 bytes a value, 11 significant bits, largest value 65,504."""

    weight_dtype = DTYPES["fp16"]


@register("bf16")
@dataclass(frozen=True)
class BF16(_Dense):
    """Brain floating point: 2 bytes a value, 8 significant bits, the range of fp32."""

    weight_dtype = DTYPES["bf16"]
