"""int8-dynamic: int8 weights and int8 activations (W8A8), the activations' scales found anew for each token.

Memory as int8. The product runs on integers and is summed in int32, the fastest way that a CPU with VNNI or
AMX and a GPU's tensor cores have for many rows; the price is the activations' rounding, which hurts where a
few channels are much larger than the rest (they set the token's scale).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.quantization.int8 import Int8Linear, Int8Scheme
from labkit.quantization.kernels.int8 import int8_dynamic_multiply
from labkit.quantization.scheme import SchemeError, register


class Int8DynamicLinear(Int8Linear):
    """The buffers of `Int8Linear`; inputs are quantized per token before the product."""

    def multiply(self, rows: Tensor) -> Tensor:
        return int8_dynamic_multiply(rows, self.weight_int8, self.scale)


@register("int8-dynamic")
@dataclass(frozen=True)
class Int8Dynamic(Int8Scheme):
    """8-bit weights per channel and 8-bit activations, each token's scale found as it comes (W8A8)."""

    module = Int8DynamicLinear

    def validate_environment(self, device) -> None:
        super().validate_environment(device)
        if device is not None and torch.device(device).type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability < (7, 5):
                raise SchemeError(
                    f"int8 products need a GPU of compute capability 7.5 (Turing), this one has "
                    f"{'.'.join(map(str, capability))}; use int8"
                )
