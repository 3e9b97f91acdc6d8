"""Dequantize and multiply, a slice of output channels at a time: the reference for all other paths.

A slice stays in the cache between dequantizing and multiplying, and the whole dequantized weight never exists:
the peak memory of a layer is that of one slice.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

SLICE_ELEMENTS_CPU = 4 * 2**20
SLICE_ELEMENTS_GPU = 128 * 2**20
CACHE_ELEMENTS = 2**19  # for conversions of several steps: intermediate results stay in a core's cache


def row_slices(
    out_features: int,
    in_features: int,
    device: torch.device,
    multiple: int = 1,
    cpu_elements: int = SLICE_ELEMENTS_CPU,
    gpu_elements: int = SLICE_ELEMENTS_GPU,
) -> Iterator[slice]:
    """Slices of output channels of about ``cpu_elements`` or ``gpu_elements`` values each, beginning at
    multiples of ``multiple``."""
    limit = cpu_elements if device.type == "cpu" else gpu_elements
    step = max(limit // (in_features * multiple), 1) * multiple
    for start in range(0, out_features, step):
        yield slice(start, min(start + step, out_features))


def sliced_multiply(
    rows: Tensor,
    out_features: int,
    weight_of: Callable[[slice], Tensor],
    cpu_elements: int = SLICE_ELEMENTS_CPU,
    multiple: int = 1,
) -> Tensor:
    """rows [M, K] times the weight whose channels ``weight_of(slice)`` [n, K] gives -> [M, N]."""
    slices = list(row_slices(out_features, rows.shape[1], rows.device, multiple, cpu_elements))
    if len(slices) == 1:
        return rows @ weight_of(slices[0]).T
    out = rows.new_empty(rows.shape[0], out_features)
    for part in slices:
        out[:, part] = rows @ weight_of(part).T
    return out
