"""Products on a GPU: a `Packed` weight in any of three formats, multiplied by the kernels or dequantized.

`product` multiplies up to `MOST_ROWS` rows with the kernels of `cuda_triton`; `dequantize` writes a slice of the
weight out for more rows. `cuda_tuning` gives the faster method and the tile sizes. Triton is imported on first use.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

MOST_ROWS = 32
DEQUANTIZED = (32, 64, 1, 4)
"""Of a program that dequantizes int4: channels, bytes of each channel, repetitions, warps."""
ROW_TILES = (8, 16, 32)
"""Row counts of the kernels; fewer rows are padded, so that each row's result does not depend on the others."""


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of a product: ``bn`` channels by ``bk`` bytes (int4) or values a step, ``splits`` of the reduction,
    and Triton's ``warps`` and ``stages``."""

    bn: int
    bk: int
    splits: int = 1
    warps: int = 4
    stages: int = 4


@dataclass(frozen=True)
class Packed:
    """A weight [N, K] for the kernels.

    Attributes:
        weight: bf16 [N, K], int8 [N, K], or uint8 [N, K/2] (two codes a byte, `affine.pack`).
        scales: int8: bf16 [N]; uint8: bf16 [K/G, N, 2], scale and zero (`int4.Int4Linear`), with rows of any
            stride; bf16: None.
        group_size: G of uint8, else 0.
    """

    weight: Tensor
    scales: Tensor | None = None
    group_size: int = 0

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1] * (2 if self.group_size else 1)

    @property
    def format(self) -> str:
        """``bf16``, ``int8`` or ``int4-g64``: the name in tuning files."""
        if self.group_size:
            return f"int4-g{self.group_size}"
        return "bf16" if self.scales is None else "int8"

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self.weight.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def steps(self) -> tuple[int, ...]:
        """Tile lengths ``bk`` that divide the reduction, longest first; empty: the kernels do not support it."""
        length, lengths = self.in_features, (128, 64, 32)
        if self.group_size:
            return tuple(k for k in lengths if not (length // 2 % k or self.group_size % k or length % 32))
        return tuple(k for k in lengths if not length % k)


@cache
def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def interpreted() -> bool:
    """Whether Triton's kernels run on the CPU, one operation at a time (``TRITON_INTERPRET=1``, for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on ``device``: triton is installed and the GPU has bf16 tensor cores (from Ampere on)."""
    if device.type != "cuda":
        return interpreted() and _triton_version() is not None
    return _triton_version() is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def takes(packed: Packed) -> bool:
    """Whether the kernels can multiply by this weight on its device."""
    return bool(packed.steps) and available(packed.weight.device)


def on(tensor: Tensor) -> AbstractContextManager:
    """A context that makes the tensor's device the current device, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def row_tile(rows: int) -> int:
    """The row count that ``rows`` rows are padded to."""
    return next(tile for tile in ROW_TILES if rows <= tile)


def product(
    rows: Tensor,
    packed: Packed,
    tiles: Tiles,
    *,
    bias: Tensor | None = None,
    gated: bool = False,
    partial: bool = False,
) -> Tensor:
    """rows [M, K] bf16, M up to `MOST_ROWS` -> [M, N] bf16.

    Args:
        tiles: its ``bk`` must be one of ``packed.steps``.
        bias: [N], added to the rounded product, as a module does; not with ``gated`` or several splits.
        gated: the weight is gate above up; the result is silu(gate) * up, [M, N/2].
        partial: return the splits' sums, fp32 [splits, M, N].
    """
    from labkit.quantization.kernels import cuda_triton as kernels

    if gated and tiles.splits > 1:
        return _gate(product(rows, packed, tiles, partial=True))
    count = rows.shape[0]
    width = packed.out_features // (2 if gated else 1)
    summed = tiles.splits > 1 or partial
    if summed and (gated or bias is not None):
        raise ValueError("a bias or a gate needs the whole sum: one split, not partial")
    out = rows.new_empty((tiles.splits, count, width), dtype=torch.float32 if summed else torch.bfloat16)
    grid = (-(-width // tiles.bn), tiles.splits)
    sizes = {"BN": tiles.bn, "BK": tiles.bk, "BM": row_tile(count), "STAGES": tiles.stages}
    options = {
        "BIAS": bias is not None,
        "GATED": gated,
        "NATIVE": not interpreted(),
        "num_warps": tiles.warps,
        **sizes,
    }
    offset = rows if bias is None else bias
    rows = rows.contiguous()
    length = packed.in_features
    with on(rows):
        if packed.group_size:
            pairs = packed.scales.view(torch.int32)
            kernels.nibbles_product[grid](
                rows, packed.weight, pairs, offset, out, count, width, packed.scales.stride(0) // 2,
                length, length // 2, tiles.splits, GROUP=packed.group_size, **options,
            )  # fmt: skip
        else:
            scales = rows if packed.scales is None else packed.scales
            kernels.bytes_product[grid](
                rows, packed.weight, scales, offset, out, count, width, length, tiles.splits,
                SCALED=packed.scales is not None, **options,
            )  # fmt: skip
    if partial:
        return out
    return out[0] if tiles.splits == 1 else reduce(out)


def reduce(partial: Tensor) -> Tensor:
    """fp32 [splits, M, N] -> their sum [M, N] bf16, added in the order of the splits."""
    from labkit.quantization.kernels import cuda_triton as kernels

    splits, count, width = partial.shape
    out = partial.new_empty((count, width), dtype=torch.bfloat16)
    block = 1024
    with on(partial):
        kernels.sum_splits[(-(-count * width // block),)](partial, out, count * width, splits, BLOCK=block)
    return out


def _gate(partial: Tensor) -> Tensor:
    """fp32 [splits, M, 2 N] of gate over up -> silu(gate) * up [M, N] bf16."""
    from labkit.quantization.kernels import cuda_triton as kernels

    splits, count, width = partial.shape
    out = partial.new_empty((count, width // 2), dtype=torch.bfloat16)
    block = 256
    grid = (-(-width // (2 * block)), count)
    with on(partial):
        kernels.gate_splits[grid](partial, out, count, width // 2, splits, BLOCK=block)
    return out


def dequantize(packed: Packed, dtype: torch.dtype, part: slice = slice(None)) -> Tensor:
    """The channels ``part`` of the weight [n, K] in ``dtype``, computed in fp32 like the reference path."""
    from labkit.quantization.kernels import cuda_triton as kernels

    start, stop, _ = part.indices(packed.out_features)
    rows, length = stop - start, packed.in_features
    out = torch.empty(rows, length, dtype=dtype, device=packed.weight.device)
    with on(packed.weight):
        if packed.group_size:
            half, (bn, bk, tiles, warps) = length // 2, DEQUANTIZED
            bk = min(bk, packed.steps[0])
            kernels.nibbles_dequantize[(-(-rows // bn), -(-half // (bk * tiles)))](
                packed.weight, packed.scales.view(torch.int32), out, start, rows, packed.scales.stride(0) // 2, length,
                half, GROUP=packed.group_size, BN=bn, BK=bk, TILES=tiles, num_warps=warps,
            )  # fmt: skip
        else:
            bn, bk = 8, 512
            kernels.bytes_dequantize[(-(-rows // bn), -(-length // bk))](
                packed.weight, packed.scales, out, start, rows, length, BN=bn, BK=bk
            )
    return out
