"""A product with any number of rows on a GPU: few rows through the kernels, many by dequantizing and cuBLAS."""

import torch
from torch import Tensor

from labkit.quantization.kernels import cuda_products as cuda
from labkit.quantization.kernels.cuda_products import Packed
from labkit.quantization.kernels.cuda_tuning import tiles_for
from labkit.quantization.kernels.reference import sliced_multiply


def multiply(rows: Tensor, packed: Packed) -> Tensor:
    """rows [M, K] times a weight that `cuda_products.takes` -> [M, N] in the dtype of ``rows``.

    Only bf16 rows go through the kernels; others are multiplied by the weight dequantized to their dtype.
    """
    tiles = tiles_for(packed, rows.shape[0]) if rows.dtype == torch.bfloat16 else None
    if tiles is not None:
        return cuda.product(rows, packed, tiles)
    return sliced_multiply(rows, packed.out_features, lambda part: cuda.dequantize(packed, rows.dtype, part))


def sums(rows: Tensor, packed: Packed) -> Tensor:
    """The same in fp32: rows [M, K] -> fp32 [M, N], the kernels' unrounded sums."""
    tiles = tiles_for(packed, rows.shape[0]) if rows.dtype == torch.bfloat16 else None
    if tiles is not None:
        return cuda.product(rows, packed, tiles, partial=True).sum(0)
    return multiply(rows.float(), packed)
