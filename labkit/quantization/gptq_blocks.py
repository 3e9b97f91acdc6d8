"""The innermost loops of `gptq.py`: they round the columns of a block in turn, on CUDA by a captured graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from labkit.quantization import affine

KEPT_BYTES = 2**30
"""Limit of the captured graphs' memory: a model has a few shapes of Linears, and two loops for each."""


def solve_block(
    values: Tensor,
    codes: Tensor,
    errors: Tensor,
    scales: Tensor,
    zeros: Tensor,
    factor: Tensor,
    num_bits: int,
    symmetric: bool,
) -> None:
    """Round the columns ``values`` [B, N]; each compensates for the errors of the columns before it in the block.

    scales, zeros [B, N] as stored; factor [B, B], the block on the diagonal of `gptq.Columns.factor`. Writes codes
    [B, N] and errors [B, N], each error divided by its entry of the factor's diagonal, as the update of the columns
    behind the block needs them. Overwrites ``values``.
    """
    for i in range(len(values)):
        codes[i] = affine.round_to_codes(values[i], scales[i], zeros[i], num_bits, symmetric)
        rounded = affine.value_of_codes(codes[i], scales[i], zeros[i], num_bits)
        errors[i] = (values[i] - rounded).div_(factor[i, i])
        if i + 1 < len(values):
            values[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)


def refine_block(
    codes: Tensor,
    errors: Tensor,
    slopes: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor,
    moment: Tensor,
    num_bits: int,
    symmetric: bool,
) -> None:
    """Give each column in turn its best code while all other columns stay fixed.

    values, scales, zeros [B, N]; moment [B, B], the block on the diagonal. Changes codes, errors (value minus
    dequantized code) and slopes (half the gradient), all [B, N].
    """
    for i in range(len(values)):
        optimum = values[i] - errors[i] + slopes[i] / moment[i, i]
        codes[i] = affine.round_to_codes(optimum, scales[i], zeros[i], num_bits, symmetric)
        error = values[i] - affine.value_of_codes(codes[i], scales[i], zeros[i], num_bits)
        slopes.addr_(moment[:, i], error - errors[i])
        errors[i] = error


def run_block(block: Callable, changed: Sequence[Tensor], given: Sequence[Tensor], *options: object) -> None:
    """``block(*changed, *given, *options)``, which updates ``changed`` in place.

    A column is a handful of operations on a few thousand numbers, so a GPU would mostly wait for Python. On CUDA the
    block's operations are therefore captured as a graph, once for each shape, and replayed on other numbers: one
    launch instead of two thousand, with the same arithmetic.
    """
    if changed[0].device.type != "cuda":
        block(*changed, *given, *options)
        return
    tensors = (*changed, *given)
    key = (block, tensors[0].device, *(tuple(tensor.shape) for tensor in tensors), *options)
    graph = _graphs.pop(key, None) or _Graph(block, tensors, options)
    _graphs[key] = graph  # moved to the end: the first is the least recently used
    graph.play(tensors, len(changed))
    while sum(stored.bytes for stored in _graphs.values()) > KEPT_BYTES and len(_graphs) > 1:
        del _graphs[next(iter(_graphs))]


def forget_graphs() -> None:
    """Free the captured graphs' memory: some hundred MB where Linears are large."""
    _graphs.clear()


class _Graph:
    """A captured CUDA graph of a block's operations, on tensors of its own."""

    def __init__(self, block: Callable, tensors: Sequence[Tensor], options: Sequence[object]) -> None:
        self._tensors = [
            torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors
        ]
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors)
        with torch.cuda.device(tensors[0].device):
            self._fill(tensors)
            # capture requires a first run on another stream, in which libraries initialize themselves
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                block(*self._tensors, *options)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # other batches' passes wait in their own threads and must not be captured
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                block(*self._tensors, *options)

    def _fill(self, tensors: Sequence[Tensor]) -> None:
        for own, tensor in zip(self._tensors, tensors):
            own.copy_(tensor)

    def play(self, tensors: Sequence[Tensor], changed: int) -> None:
        """Replay the graph on ``tensors`` and copy its results into the first ``changed`` of them."""
        self._fill(tensors)
        with torch.cuda.device(tensors[0].device):
            self._graph.replay()
        for tensor, own in zip(tensors[:changed], self._tensors):
            tensor.copy_(own)


_graphs: dict[tuple, _Graph] = {}
