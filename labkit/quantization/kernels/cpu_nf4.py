"""bitsandbytes' packed 4-bit product on the CPU, the order of bytes it needs, and undoing that order.

Plain order (`bitsandbytes.functional.quantize_4bit`): a row-major [N, K/2], the earlier of two neighbours in
the **high** half. The kernel's order (bitsandbytes 0.50, ``_convert_weight_packed_for_cpu``): blocks of 32
output channels, each [K/2, 32]; byte ``[k, 2 i + j]`` holds in its low half the code of channel ``i`` and in
its high half that of channel ``16 + i``, both at input ``2 k + j``.

bitsandbytes converts its own module at the first call and dequantizes the doubly quantized statistics
permanently, so that module grows. Here the statistics stay quantized and are dequantized for each product.
"""

from functools import cache

import torch
from torch import Tensor

BLOCK = 32
PACKED_ROWS = 32  # more rows than this: undoing the order and dequantizing is faster


@cache
def has_packed_nf4() -> bool:
    """Whether bitsandbytes has its packed product on this CPU and computes it correctly."""
    from labkit.quantization.kernels.bnb import bitsandbytes_functional

    functional = bitsandbytes_functional()
    try:
        if not functional.has_avx512bf16():
            return False
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(64, 128, generator=generator, dtype=torch.float32, device="cpu")
        rows = torch.randn(3, 128, generator=generator, dtype=torch.float32, device="cpu").bfloat16()
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        exact = rows.float() @ functional.dequantize_4bit(packed, state).float().T
        absmax = state.absmax.view(64, 2).T.bfloat16().contiguous()
        product = nf4_multiply(rows, to_blocks(packed.view(64, 64)), absmax, state.code, 64)
    except (AttributeError, RuntimeError, OSError):
        return False
    return bool((product.float() - exact).norm() < 0.01 * exact.norm())


def nf4_multiply(rows: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, group_size: int) -> Tensor:
    """rows [M, K] bf16 times packed [N, K/2] in the kernel's order, absmax [K/G, N] bf16 -> [M, N] bf16."""
    shape = (packed.shape[0], rows.shape[1])
    product = torch.ops.bitsandbytes.gemv_4bit.default
    return product(rows.contiguous(), packed, shape, absmax, code, group_size)


def to_blocks(packed: Tensor) -> Tensor:
    """packed [N, K/2] in plain order -> [N, K/2] in the kernel's; N is a multiple of 32."""
    blocks = packed.view(-1, 2, BLOCK // 2, packed.shape[1]).permute(0, 1, 3, 2)  # [blocks, 2, K/2, 16]
    earlier = (blocks[:, 0] >> 4) | (blocks[:, 1] & 0xF0)
    later = (blocks[:, 0] & 15) | (blocks[:, 1] << 4)
    return torch.stack((earlier, later), -1).reshape(packed.shape)


def from_blocks(packed: Tensor) -> Tensor:
    """The inverse of `to_blocks`, on any device."""
    half = packed.shape[1]
    pairs = packed.view(torch.int16).view(-1, half, BLOCK // 2)  # earlier in the low byte, later in the high
    pairs = pairs.transpose(1, 2).contiguous()  # [blocks, 16, K/2]
    out = torch.empty(pairs.shape[0], 2, BLOCK // 2, half, dtype=torch.uint8, device=packed.device)
    out[:, 0] = ((pairs & 0x000F) << 4) | ((pairs >> 8) & 0x000F)
    out[:, 1] = (pairs & 0x00F0) | ((pairs >> 12) & 0x000F)
    return out.view(packed.shape)
