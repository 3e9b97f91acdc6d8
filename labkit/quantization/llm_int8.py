"""llm-int8: bitsandbytes' LLM.int8(), W8A8 with the outlier columns of the activations in 16 bits.

Input columns in which any token exceeds ``outlier_threshold`` are multiplied in the input's dtype by the
dequantized weight columns; all others as int8 per token by int8 per channel (Dettmers et al., "LLM.int8()",
2022).
Memory: weight int8 [N, K], its largest magnitudes fp32 [N].
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.common.options import option
from labkit.quantization.kernels.bnb import bitsandbytes_functional
from labkit.quantization.linear import QuantizedLinear
from labkit.quantization.scheme import Scheme, bias_bytes, register


class LLMInt8Linear(QuantizedLinear):
    """weight_int8 [N, K] int8 and absmax [N] fp32 (bitsandbytes' ``CB`` and ``SCB``).

    The weight's value is ``weight_int8 * absmax / 127``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        has_bias: bool,
        outlier_threshold: float = 6.0,
        device: Any = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(in_features, out_features, has_bias, device, dtype)
        self.outlier_threshold = outlier_threshold
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("weight_int8", codes)
        self.register_buffer("absmax", torch.empty(out_features, dtype=torch.float32, device=device))

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Quantize ``weight`` [N, K] into the buffers (through fp16, as bitsandbytes does)."""
        codes, absmax, _ = bitsandbytes_functional().int8_vectorwise_quant(
            weight.to(torch.float16).contiguous()
        )
        self.weight_int8.copy_(codes)
        self.absmax.copy_(absmax)

    def multiply(self, rows: Tensor) -> Tensor:
        functional = bitsandbytes_functional()
        half = rows.to(torch.float16).contiguous()
        codes, row_absmax, outliers = functional.int8_vectorwise_quant(half, threshold=self.outlier_threshold)
        product, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            rows.contiguous(), codes, self.weight_int8, row_absmax, self.absmax, outliers, None
        )
        # bitsandbytes turns NaN into code 0, and its CUDA kernel ignores it in the row's largest magnitude
        broken = ~torch.isfinite(rows).all(1, keepdim=True)
        return product.masked_fill_(broken, torch.nan)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return (self.weight_int8 * (self.absmax[:, None] / 127)).to(dtype or self.dtype)


@register("llm-int8")
@dataclass(frozen=True)
class LLMInt8(Scheme):
    """LLM.int8() of bitsandbytes: 8-bit weights and activations, outlier columns in 16 bits."""

    outlier_threshold: float = option(6.0, "input columns with a larger value are multiplied in 16 bits")

    def validate_environment(self, device) -> None:
        super().validate_environment(device)
        bitsandbytes_functional()

    def empty_linear(self, in_features, out_features, has_bias, *, device=None, dtype=torch.bfloat16):
        return LLMInt8Linear(in_features, out_features, has_bias, self.outlier_threshold, device, dtype)

    def predict_bytes(self, out_features, in_features, has_bias, *, dtype=torch.bfloat16) -> int:
        return out_features * (in_features + 4) + bias_bytes(out_features, has_bias, dtype)
