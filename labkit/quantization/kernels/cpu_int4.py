"""torch's packed int4 product on the CPU, the order of bytes it needs, and dequantizing from that order.

Plain order: packed [N, K/2] (`affine.pack`). The kernel's order: blocks of
B output channels (64 with AVX-512, 32 with AVX2), each [K, B/2]; byte ``[k, i]`` holds in its low half the
code of channel ``i`` and in its high half that of channel ``B/2 + i``, both at input ``k``. Both orders have
the same size, and a module holds only one of them.

Weights are ``(code - 8) * scale + zero`` with scale and zero in ``scale_zero [K/G, N, 2]``.
"""

from functools import cache

import torch
from torch import Tensor

from labkit.quantization import affine
from labkit.quantization.kernels.reference import SLICE_ELEMENTS_CPU, row_slices
from labkit.quantization.native import library as native

PACKED_ROWS = 32  # more rows than this: dequantizing from the kernel's order and multiplying is faster
GROUP_SIZES = (32, 64, 128, 256)
_TYPES = {torch.float32: native.F32, torch.bfloat16: native.BF16, torch.float16: native.F16}


@cache
def block_rows() -> int | None:
    """B of the kernel's order on this CPU, determined by a trial; None if there is no such kernel."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (128, 64), dtype=torch.uint8, generator=generator, device="cpu")
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1).view(torch.uint8)
        for block in (64, 32):
            if torch.equal(packed.view(128, 32), to_blocks(affine.pack(codes, 4), block)):
                rows = torch.randint(-3, 4, (3, 64), generator=generator, device="cpu").bfloat16()
                scale_zero = torch.tensor([1.0, 0.0], device="cpu").expand(1, 128, 2).bfloat16().contiguous()
                product = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, 64, scale_zero)
                exact = rows.float() @ (codes.float() - 8).T
                return block if torch.allclose(product.float(), exact, rtol=0.01, atol=0.5) else None
    except (AttributeError, RuntimeError):
        return None
    return None


def wanted_layout(out_features: int, num_bits: int, group_size: int, device: torch.device) -> str:
    """``blocks64`` or ``blocks32`` if the kernel supports such a weight, else ``plain``."""
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
    """The same for many rows: dequantizes the weight, a large slice at a time, for a dense product.

    The slices are transposed, [K, n]: the kernel's order gives that form without a further transposition.
    """
    columns, out_features = rows.shape[1], packed.shape[0]
    step = max(SLICE_ELEMENTS_CPU // (columns * block), 1) * block
    if out_features <= step:
        return rows @ dequantize_turned(packed, scale_zero, group_size, block, rows.dtype)
    out = rows.new_empty(rows.shape[0], out_features)
    for start in range(0, out_features, step):
        part = slice(start, min(start + step, out_features))
        out[:, part] = rows @ dequantize_turned(
            packed[part], scale_zero[:, part], group_size, block, rows.dtype
        )
    return out


def dequantize_turned(
    packed: Tensor, scale_zero: Tensor, group_size: int, block: int, dtype: torch.dtype
) -> Tensor:
    """packed [n, K/2] in the kernel's order, scale_zero [K/G, n, 2] -> the weight's transpose [K, n] in ``dtype``."""
    library = native.available()
    if library is None or dtype not in _TYPES or scale_zero.dtype != torch.bfloat16:
        return dequantize_turned_reference(packed, scale_zero, group_size, block, dtype)
    scale_zero = scale_zero.contiguous()
    channels, columns = packed.shape[0], packed.shape[1] * 2
    out = torch.empty(columns, channels, dtype=dtype)
    linear = native.Linear(
        type=native.INT4, out=channels, in_=columns, group=group_size, block=block, stride=channels,
        weight=packed.data_ptr(), scale=scale_zero.data_ptr(),
    )  # fmt: skip
    library.dequantize(linear, out.data_ptr(), _TYPES[dtype], torch.get_num_threads())
    return out


def dequantize_turned_reference(
    packed: Tensor, scale_zero: Tensor, group_size: int, block: int, dtype: torch.dtype
) -> Tensor:
    """The same by torch."""
    channels, columns, half = packed.shape[0], packed.shape[1] * 2, block // 2
    compute = torch.float32 if dtype == torch.float16 else dtype
    # [K/G, n, 2] -> scale and zero, each [blocks, 2 halves, K/G, 1, B/2]
    groups = scale_zero.to(compute).view(columns // group_size, -1, 2, half, 2).permute(4, 1, 2, 0, 3)
    scale, zero = groups.unsqueeze(4).contiguous()
    blocks = packed.view(-1, columns, half)
    out = torch.empty(columns, channels // block, 2, half, dtype=compute)
    for side, codes in enumerate((blocks & 15, blocks >> 4)):
        values = (codes.view(torch.int8) - 8).to(compute).unflatten(1, (-1, group_size))
        place = out[:, :, side].permute(1, 0, 2).unflatten(1, (-1, group_size))
        torch.addcmul(zero[:, side], values, scale[:, side], out=place)
    return out.view(columns, channels).to(dtype)
