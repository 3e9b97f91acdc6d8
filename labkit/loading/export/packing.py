"""Codes of 2, 3, 4 or 8 bits as one stream of bits in 32-bit words, lowest bits first.

Word ``w`` of a row holds bits ``32 w … 32 w + 31`` of the row's stream, and code ``i`` its bits ``i * num_bits …
(i + 1) * num_bits - 1``. Widths that divide 32 never straddle two words; at 3 bits, 32 codes fill three.
"""

import torch
from torch import Tensor

from labkit.quantization.kernels.reference import row_slices


def pack_words(codes: Tensor, num_bits: int) -> Tensor:
    """codes [R, L] uint8 below 2**num_bits -> [R, ceil(L * num_bits / 32)] int32; the last word is padded
    with zeros."""
    rows, length = codes.shape
    words = -(-length * num_bits // 32)
    out = torch.empty(rows, words, dtype=torch.int32)
    for part in row_slices(rows, length * (num_bits if 32 % num_bits else 1), codes.device):
        values = codes[part]
        if 32 % num_bits:  # one bit at a time
            values = torch.stack([(values >> bit) & 1 for bit in range(num_bits)], -1).flatten(1)
        out[part] = _pack_bytes(values, 1 if 32 % num_bits else num_bits, 4 * words).view(torch.int32)
    return out


def _pack_bytes(values: Tensor, num_bits: int, count: int) -> Tensor:
    """values [R, L] of a width that divides 8 -> [R, count] uint8, padded with zeros."""
    each = 8 // num_bits
    values = torch.nn.functional.pad(values, (0, count * each - values.shape[1])).unflatten(1, (count, each))
    packed = values[..., 0].clone()
    for place in range(1, each):
        packed |= values[..., place] << (place * num_bits)
    return packed


def unpack_words(packed: Tensor, num_bits: int, length: int) -> Tensor:
    """The inverse of `pack_words`: [R, W] int32 -> codes [R, length] uint8."""
    stream = packed.contiguous().view(torch.uint8)
    bits = torch.stack([(stream >> bit) & 1 for bit in range(8)], -1).flatten(1)
    bits = bits[:, : length * num_bits].view(-1, length, num_bits)
    codes = bits[..., 0].clone()
    for bit in range(1, num_bits):
        codes |= bits[..., bit] << bit
    return codes
