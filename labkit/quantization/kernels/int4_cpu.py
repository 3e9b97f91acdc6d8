"""torch's packed int4 product on the CPU, the order of bytes it wants, and dequantizing from that order.

Plain order: packed [N, K/2] (`affine.pack`). The kernel's order: blocks of
B output channels (64 with AVX-512, 32 with AVX2), each [K, B/2]; byte ``[k, i]`` holds in its low half the
code of channel ``i`` and in its high half that of channel ``B/2 + i``, both at input ``k``. Both orders take
the same bytes, so a module keeps only one of them.

Weights are ``(code - 8) * scale + zero`` with scale and zero in ``scale_zero [K/G, N, 2]``.
"""

from functools import cache

import torch
from torch import Tensor

from labkit.quantization import affine
from labkit.quantization.kernels.reference import CACHE_ELEMENTS, row_slices

PACKED_ROWS = 48  # more rows than this: dequantizing from the kernel's order and multiplying is faster
GROUP_SIZES = (32, 64, 128, 256)


@cache
def block_rows() -> int | None:
    """B of the kernel's order on this CPU, found by trying; None if there is no such kernel."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (128, 64), dtype=torch.uint8, generator=generator)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1).view(torch.uint8)
        for block in (64, 32):
            if torch.equal(packed.view(128, 32), to_blocks(affine.pack(codes, 4), block)):
                rows = torch.randint(-3, 4, (3, 64), generator=generator).bfloat16()
                scale_zero = torch.tensor([1.0, 0.0]).expand(1, 128, 2).bfloat16().contiguous()
                got = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, 64, scale_zero)
                exact = rows.float() @ (codes.float() - 8).T
                return block if torch.allclose(got.float(), exact, rtol=0.01, atol=0.5) else None
    except (AttributeError, RuntimeError):
        return None
    return None


def wanted_layout(out_features: int, num_bits: int, group_size: int, device: torch.device) -> str:
    """``blocks64`` or ``blocks32`` where the kernel takes such a weight, else ``plain``."""
    if device.type != "cpu" or num_bits != 4 or group_size not in GROUP_SIZES:
        return "plain"
    block = block_rows()
    return f"blocks{block}" if block and out_features % block == 0 else "plain"


def block_of(layout: str) -> int:
    """64 of ``blocks64``."""
    return int(layout.removeprefix("blocks"))


def to_blocks(packed: Tensor, block: int) -> Tensor:
    """packed [N, K/2] in plain order -> [N, K/2] in the kernel's; N is a multiple of ``block``."""
    out = torch.empty_like(packed)
    columns = packed.shape[1] * 2
    for part in row_slices(packed.shape[0], columns, packed.device, block):
        codes = affine.unpack(packed[part], 4).view(-1, 2, block // 2, columns)
        pairs = codes[:, 0] | (codes[:, 1] << 4)  # [blocks, B/2, K]
        out[part] = pairs.transpose(1, 2).reshape(-1, columns // 2)
    return out


def from_blocks(packed: Tensor, block: int) -> Tensor:
    """The inverse of `to_blocks`, on any device."""
    out = torch.empty_like(packed)
    columns = packed.shape[1] * 2
    for part in row_slices(packed.shape[0], columns, packed.device, block):
        pairs = packed[part].view(-1, columns, block // 2).transpose(1, 2)  # [blocks, B/2, K]
        codes = torch.stack((pairs & 15, pairs >> 4), 1)  # [blocks, 2, B/2, K]
        out[part] = affine.pack(codes.reshape(-1, columns), 4)
    return out


def int4_multiply(rows: Tensor, packed: Tensor, scale_zero: Tensor, group_size: int, block: int) -> Tensor:
    """rows [M, K] times the weight in the kernel's order -> [M, N] in the dtype of ``rows``."""
    if rows.dtype == torch.bfloat16 and rows.shape[0] <= PACKED_ROWS:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.contiguous(), packed, group_size, scale_zero.to(rows.dtype)
        )
    return int4_multiply_dequantized(rows, packed, scale_zero, group_size, block)


def int4_multiply_dequantized(
    rows: Tensor, packed: Tensor, scale_zero: Tensor, group_size: int, block: int
) -> Tensor:
    """The same for many rows: half a block becomes a matrix [K, B/2] that multiplies from the right, so
    nothing is transposed but the result."""
    count, columns = rows.shape
    out_features, half = packed.shape[0], block // 2
    compute = torch.float32 if rows.dtype == torch.float16 else rows.dtype
    # [K/G, N, 2] -> scale and zero, each [blocks, 2 halves, K/G, 1, B/2]
    groups = scale_zero.to(compute).view(columns // group_size, -1, 2, half, 2).permute(4, 1, 2, 0, 3)
    scale, zero = groups.unsqueeze(4).contiguous()
    blocks = packed.view(-1, columns, half)
    out = rows.new_empty(blocks.shape[0], 2, count, half)
    step = max(CACHE_ELEMENTS // (columns * half), 1)
    for start in range(0, blocks.shape[0], step):
        part = slice(start, start + step)
        for side, codes in enumerate((blocks[part] & 15, blocks[part] >> 4)):
            values = (
                (codes.view(torch.int8) - 8).to(compute).view(-1, columns // group_size, group_size, half)
            )
            weight = torch.addcmul(zero[part, side], values, scale[part, side]).to(rows.dtype)
            for i, matrix in enumerate(weight.view(-1, columns, half)):
                torch.mm(rows, matrix, out=out[start + i, side])
    return out.permute(2, 0, 1, 3).reshape(count, out_features)
