"""The arithmetic of affine quantization: pure functions from tensors to tensors.

A real weight ``w`` becomes an integer ``q`` of ``num_bits`` bits by

    q = clamp(round(w / scale) + zero_point),        w' = (q - zero_point) * scale

``scale`` is a positive real number and ``zero_point`` an integer in the quantized domain (the ``q`` that
means 0.0); both are shared by the ``group_size`` values of a group, which lie next to each other in a row
(``group_size`` None: the whole row, that is one scale per output channel).

Symmetric: the range is [-max|w|, max|w|], the code in the middle means 0.0 and the lowest code is not used,
so that -w has the code opposite to w's. Asymmetric: the range is [min(w, 0), max(w, 0)].

Codes are unsigned here, 0 ... 2**num_bits - 1, so that every width packs alike; int8 modules subtract 128.

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (2018), sections 2.1 and 3; group-wise scales as in GPTQ (Frantar et al., 2023).
"""

import torch
from torch import Tensor

PACKABLE_BITS = (2, 3, 4, 8)


def packed_length(length: int, num_bits: int) -> int:
    """Bytes that ``length`` values of ``num_bits`` bits take; ValueError if they fill no whole bytes."""
    if num_bits not in PACKABLE_BITS:
        raise ValueError(f"num_bits must be one of {PACKABLE_BITS}, not {num_bits}")
    unit = values_per_unit(num_bits)
    if length % unit:
        raise ValueError(f"{length} values of {num_bits} bits fill no whole bytes: use a multiple of {unit}")
    return length * num_bits // 8


def values_per_unit(num_bits: int) -> int:
    """How many values are packed together: 8 bits 1 (a byte), 4 bits 2, 2 bits 4, 3 bits 8 (three bytes)."""
    return 8 if num_bits == 3 else 8 // num_bits


def choose_qparams(
    weight: Tensor,
    num_bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Scales and zero points by the range of each group (round-to-nearest, no calibration).

    weight [N, K], group_size G (None: K) -> scale [N, K/G] in ``scale_dtype``, zero_point [N, K/G] int32.
    The zero point is chosen for the scale as it is stored, so a coarse ``scale_dtype`` costs range, not bias.
    A group of zeros gets scale 1. Raises ValueError if G does not divide K.
    """
    groups = _groups(weight.float(), group_size)
    return qparams_of_range(groups.amin(-1), groups.amax(-1), num_bits, symmetric, scale_dtype)


def qparams_of_range(
    low: Tensor, high: Tensor, num_bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The scale and zero point whose codes span ``low`` ... ``high`` and 0, all of one shape; see
    `choose_qparams`."""
    top = 2**num_bits - 1
    if symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / (2 ** (num_bits - 1) - 1)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / top
    scale = scale.to(scale_dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if symmetric:
        zero_point = torch.full_like(scale, 2 ** (num_bits - 1), dtype=torch.int32)
    else:
        zero_point = (-low / scale.float()).round().clamp(0, top).to(torch.int32)
    return scale, zero_point


def stored_zero(scale: Tensor, zero_point: Tensor, num_bits: int) -> Tensor:
    """The middle code's value, (middle - zero_point) * scale, in the dtype of ``scale``: the form in
    which group-wise modules keep their zero points (see `int4.py`)."""
    return ((2 ** (num_bits - 1) - zero_point) * scale.float()).to(scale.dtype)


def round_to_codes(
    values: Tensor, scale: Tensor, zero: Tensor, num_bits: int, symmetric: bool = False
) -> Tensor:
    """The nearest codes to ``values`` for the stored zero, as floating-point numbers; shapes broadcast."""
    codes = ((values - zero) / scale).add_(2 ** (num_bits - 1)).round_()
    return codes.clamp_(1 if symmetric else 0, 2**num_bits - 1)


def value_of_codes(codes: Tensor, scale: Tensor, zero: Tensor, num_bits: int) -> Tensor:
    """The values of codes for the stored zero: (code - middle) * scale + zero; shapes broadcast."""
    return (codes - 2 ** (num_bits - 1)) * scale + zero


def quantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor, num_bits: int, symmetric: bool = False
) -> Tensor:
    """weight [N, K], scale and zero_point [N, K/G] -> codes [N, K] uint8, 0 ... 2**num_bits - 1.

    ``symmetric`` leaves the lowest code unused (see the top of this file).
    """
    groups = _groups(weight.float(), weight.shape[1] // scale.shape[1])
    codes = (groups / scale.float()[..., None]).round_() + zero_point[..., None]
    return codes.clamp_(1 if symmetric else 0, 2**num_bits - 1).to(torch.uint8).reshape(weight.shape)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """codes [N, K], scale and zero_point [N, K/G] -> weight [N, K] in ``dtype``."""
    groups = _groups(codes, codes.shape[1] // scale.shape[1])
    weight = (groups.float() - zero_point[..., None]) * scale.float()[..., None]
    return weight.to(dtype).reshape(codes.shape)


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """codes [..., K] uint8 below 2**num_bits -> packed [..., K * num_bits / 8] uint8.

    Values that share a byte lie far apart, so unpacking writes long runs. 4 bits: byte j holds value j in
    its low half and value j + K/2 in its high half. 2 bits: values j, j + K/4, j + K/2, j + 3K/4, low bits
    first. 3 bits: K/4 bytes with the low two bits of each value, packed so, then K/8 bytes with the third:
    bit i of byte j is that of value j + i K/8.
    """
    packed_length(codes.shape[-1], num_bits)
    if num_bits == 3:
        return torch.cat((_pack_runs(codes & 3, 2), _pack_runs(codes >> 2, 1)), -1)
    return _pack_runs(codes, num_bits)


def unpack(packed: Tensor, num_bits: int) -> Tensor:
    """packed [..., B] uint8 -> codes [..., B * 8 / num_bits] uint8: the inverse of `pack`."""
    if num_bits == 3:
        third = packed.shape[-1] // 3
        low, high = packed.split((2 * third, third), -1)
        return _unpack_runs(low, 2) | (_unpack_runs(high, 1) << 2)
    return _unpack_runs(packed, num_bits)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantization-noise ratio in decibels: 10 log10(|reference|² / |reference - approximation|²).

    Each bit of a uniform quantizer is worth about 6 dB. Infinite if the two are equal.
    """
    reference, approximation = reference.double(), approximation.double()
    noise = (reference - approximation).square().sum()
    return (10 * torch.log10(reference.square().sum() / noise)).item() if noise > 0 else float("inf")


def _groups(matrix: Tensor, group_size: int | None) -> Tensor:
    """[N, K] -> [N, K/G, G]."""
    size = group_size or matrix.shape[1]
    if matrix.shape[1] % size:
        raise ValueError(f"group_size {size} does not divide a row of {matrix.shape[1]} values")
    return matrix.unflatten(1, (-1, size))


def _pack_runs(codes: Tensor, num_bits: int) -> Tensor:
    runs = codes.unflatten(-1, (8 // num_bits, -1)).unbind(-2)
    out = runs[0].clone()
    for i, run in enumerate(runs[1:], 1):
        out |= run << (i * num_bits)
    return out


def _unpack_runs(packed: Tensor, num_bits: int) -> Tensor:
    mask = 2**num_bits - 1
    return torch.cat([(packed >> shift) & mask for shift in range(0, 8, num_bits)], -1)
