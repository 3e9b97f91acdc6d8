"""int8-dynamic: int8 weights and int8 activations (W8A8), with activation scales computed for each token.

Memory as int8. The product multiplies integers and sums in int32, the fastest product for many rows on a CPU with
VNNI or AMX and on a GPU's tensor cores; the price is the activations' rounding error, which is large where a few
channels are much larger than the rest (they set the token's scale).

``smoothing: rms`` reduces the large channels before rounding: each input channel is divided by a power of its root
mean square on calibration items, and the weight's column is multiplied by it, so the output stays the same.
Memory: the divisor as bf16 [K] in addition to the weight.

Source of the smoothing: Xiao et al., "SmoothQuant" (2023), with the root mean square in place of the maximum.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.common.errors import SchemeError
from labkit.common.options import option
from labkit.quantization.int8 import Int8Linear, Int8Scheme
from labkit.quantization.kernels.int8 import int8_dynamic_multiply
from labkit.quantization.linear import ScaledInput
from labkit.quantization.scheme import register
from labkit.quantization.statistics import InputStatistics


class Int8DynamicLinear(Int8Linear):
    """The buffers of `Int8Linear`; inputs are quantized per token before the product."""

    def multiply(self, rows: Tensor) -> Tensor:
        return int8_dynamic_multiply(rows, self.weight_int8, self.scale)

    def packed_weight(self) -> None:
        """None: its product rounds the inputs too, which the kernels do not."""
        return None


class SmoothedInt8DynamicLinear(ScaledInput, Int8DynamicLinear):
    """The buffers of `Int8DynamicLinear`, and input_scale [K] bf16, the reciprocal of the channels' divisors."""


def smoothing_scale(mean_square: Tensor, strength: float) -> Tensor:
    """mean_square [K] of the inputs -> the factors [K] bf16 they are multiplied by, of geometric mean 1.

    Channels without calibration inputs count as a thousandth of the mean.
    """
    rms = mean_square.float().sqrt()
    rms = rms.clamp(min=1e-3 * float(rms.mean()) + 1e-30)
    logarithm = -strength * rms.log()
    return (logarithm - logarithm.mean()).exp().to(torch.bfloat16)


@register("int8-dynamic")
@dataclass(frozen=True)
class Int8Dynamic(Int8Scheme):
    """8-bit weights per channel and 8-bit activations, each token's scale found as it comes (W8A8)."""

    needs_full_moment = False

    smoothing: str = option(
        "none", "rms: divide input channels by their calibrated root mean square", choices=("none", "rms")
    )
    smoothing_strength: float = option(
        0.5,
        "power of the root mean square: 1 makes all channels alike, and their columns as unlike as they were",
    )

    @property
    def requires_calibration(self) -> bool:
        return self.smoothing != "none"

    def validate_environment(self, device) -> None:
        super().validate_environment(device)
        if device is not None and torch.device(device).type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability < (7, 5):
                raise SchemeError(
                    f"int8 products need a GPU of compute capability 7.5 (Turing), this one has "
                    f"{'.'.join(map(str, capability))}; use int8"
                )

    def empty_linear(
        self, in_features, out_features, has_bias, *, device=None, dtype=torch.bfloat16
    ) -> nn.Module:
        module = SmoothedInt8DynamicLinear if self.requires_calibration else Int8DynamicLinear
        return module(in_features, out_features, has_bias, device=device, dtype=dtype)

    def fill_calibrated(self, module: nn.Module, weight: Tensor, statistics: InputStatistics) -> None:
        module.input_scale.copy_(smoothing_scale(statistics.mean_square, self.smoothing_strength))
        module.set_weight(weight.float() / module.input_scale.float())

    def predict_bytes(self, out_features, in_features, has_bias, *, dtype=torch.bfloat16) -> int:
        extra = 2 * in_features if self.requires_calibration else 0
        return super().predict_bytes(out_features, in_features, has_bias, dtype=dtype) + extra
