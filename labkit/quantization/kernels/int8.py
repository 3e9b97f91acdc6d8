"""Products with an int8 weight that has one scale per output channel.

weight [N, K] int8, scale [N]; the weight's value is ``weight * scale``.
"""

from functools import cache

import torch
from torch import Tensor

from labkit.quantization.kernels.reference import sliced_multiply

PACKED_ROWS = 24  # more rows than this: dequantize and multiply is faster than torch's packed product
PACKED_COLUMNS = 16  # torch's packed product reads beyond the row if K is no multiple of this


def int8_multiply(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """rows [M, K] times the weight -> [M, N], weight-only: activations keep their dtype."""
    if (
        rows.dtype == torch.bfloat16
        and rows.shape[0] <= PACKED_ROWS
        and rows.device.type == "cpu"
        and rows.shape[1] % PACKED_COLUMNS == 0
        and has_packed_int8()
    ):
        return torch._weight_int8pack_mm(rows.contiguous(), weight, scale.to(rows.dtype))
    return int8_multiply_reference(rows, weight, scale)


def int8_multiply_reference(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The same by dequantizing.

    Integers up to 127 are exact in bf16 and in fp32, so those multiply the integers and scale the product;
    in fp16 such a product could pass 65,504, so the weight is scaled first.
    """
    dtype = rows.dtype
    if dtype == torch.float16:
        return sliced_multiply(
            rows, weight.shape[0], lambda part: (weight[part] * scale[part, None].float()).to(dtype)
        )
    return sliced_multiply(rows, weight.shape[0], lambda part: weight[part].to(dtype)).mul_(scale.to(dtype))


def quantize_tokens(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 activations with a scale per row (token), computed for each input.

    rows [M, K] -> int8 [M, K] in -127 ... 127, scale [M, 1] fp32. A row of zeros gets scale 1, and a row
    with NaN or inf a scale that is not finite, so that its products are not numbers either.
    """
    scale = rows.abs().amax(1, keepdim=True).float() / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.div(rows, scale).round_().to(torch.int8), scale


def int8_dynamic_multiply(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """rows [M, K], quantized token by token, times the weight -> [M, N]: W8A8, summed in int32."""
    codes, row_scale = quantize_tokens(rows)
    product = integer_product(codes, weight)
    return (product.float().mul_(row_scale).mul_(scale.float())).to(rows.dtype)


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes [M, K] int8 times weight [N, K] int8 transposed -> [M, N], exact int32, or fp32 where the
    device has no integer product (exact while the sums stay below 2**24)."""
    if codes.device.type == "cpu" and has_integer_product():
        return torch._int_mm(codes, weight.T)
    if codes.device.type == "cuda" and not (codes.shape[1] % 8 or weight.shape[0] % 8):
        missing = max(17 - codes.shape[0], 0)  # cuBLAS requires more than 16 rows
        padded = torch.nn.functional.pad(codes, (0, 0, 0, missing)) if missing else codes
        return torch._int_mm(padded, weight.T)[: codes.shape[0]]
    return integer_product_reference(codes, weight)


def integer_product_reference(codes: Tensor, weight: Tensor) -> Tensor:
    """The same in fp32, sliced."""
    return sliced_multiply(codes.float(), weight.shape[0], lambda part: weight[part].float())


@cache
def has_packed_int8() -> bool:
    """Whether torch has its packed int8 product on this CPU and computes it correctly."""
    try:
        weight = torch.arange(-64, 64, dtype=torch.int8, device="cpu").reshape(4, 32)
        rows = torch.ones(3, 32, dtype=torch.bfloat16, device="cpu")
        product = torch._weight_int8pack_mm(rows, weight, torch.ones(4, dtype=torch.bfloat16, device="cpu"))
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(product.float(), weight.float().sum(1).expand(3, 4), rtol=0.01)


@cache
def has_integer_product() -> bool:
    """Whether torch's int8 product is fast on this CPU: without AVX-512 it is a plain loop."""
    try:
        if torch.backends.cpu.get_cpu_capability() != "AVX512":
            return False
        codes = torch.full((5, 64), 127, dtype=torch.int8, device="cpu")
        return bool((torch._int_mm(codes, -codes.T) == -127 * 127 * 64).all())
    except (AttributeError, RuntimeError):
        return False
