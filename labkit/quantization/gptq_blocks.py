"""The innermost loops of `gptq.py`: a block of columns, rounded one after the other.

A column is a handful of operations on a few thousand numbers. On a CPU that is work enough; a GPU would wait for Python
most of the time. So on CUDA the operations of a whole block are recorded once for each shape, as a graph, and played
back with other numbers: one launch instead of two thousand. The arithmetic is the same on both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from labkit.quantization import affine

KEPT_BYTES = 2**30
"""What recordings may hold: a model has a few shapes of Linears, and two loops for each."""


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
    """Round the columns ``values`` [B, N], each making up for the errors of those before it in the block.

    scales, zeros [B, N] as stored; factor [B, B], the block on the diagonal of `gptq.Columns.factor`. Written are codes
    [B, N] and errors [B, N], each divided by its entry of the factor's diagonal, as the columns behind the block want
    them; ``values`` are used up.
    """
    for i in range(len(values)):
        codes[i] = affine.round_to_codes(values[i], scales[i], zeros[i], num_bits, symmetric)
        given = affine.value_of_codes(codes[i], scales[i], zeros[i], num_bits)
        errors[i] = (values[i] - given).div_(factor[i, i])
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
    """Give each column in turn the code that is best with all others as they are.

    values, scales, zeros [B, N]; moment [B, B], the block on the diagonal. Changed are codes, errors (value less what the
    code means) and slopes (half the gradient), all [B, N].
    """
    for i in range(len(values)):
        wanted = values[i] - errors[i] + slopes[i] / moment[i, i]
        codes[i] = affine.round_to_codes(wanted, scales[i], zeros[i], num_bits, symmetric)
        error = values[i] - affine.value_of_codes(codes[i], scales[i], zeros[i], num_bits)
        slopes.addr_(moment[:, i], error - errors[i])
        errors[i] = error


def run_block(block: Callable, changed: Sequence[Tensor], given: Sequence[Tensor], *options: object) -> None:
    """``block(*changed, *given, *options)`` in place of ``changed``, on CUDA by a recorded graph."""
    if changed[0].device.type != "cuda":
        block(*changed, *given, *options)
        return
    tensors = (*changed, *given)
    key = (block, tensors[0].device, *(tuple(tensor.shape) for tensor in tensors), *options)
    graph = _graphs.pop(key, None) or _Graph(block, tensors, options)
    _graphs[key] = graph  # behind all others: the first is the one that was not used for longest
    graph.play(tensors, len(changed))
    while sum(graph.bytes for graph in _graphs.values()) > KEPT_BYTES and len(_graphs) > 1:
        del _graphs[next(iter(_graphs))]


def forget_graphs() -> None:
    """Free what recordings hold: some hundred MB where Linears are large."""
    _graphs.clear()


class _Graph:
    """A block's operations on tensors of its own, recorded."""

    def __init__(self, block: Callable, tensors: Sequence[Tensor], options: Sequence[object]) -> None:
        self._tensors = [
            torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors
        ]
        self.bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors)
        with torch.cuda.device(tensors[0].device):
            self._fill(tensors)
            stream = (
                torch.cuda.Stream()
            )  # a first run outside, as recording asks for: libraries set themselves up
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                block(*self._tensors, *options)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # passes of other batches wait in threads of their own, and must not be taken for a part of this
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                block(*self._tensors, *options)

    def _fill(self, tensors: Sequence[Tensor]) -> None:
        for own, given in zip(self._tensors, tensors):
            own.copy_(given)

    def play(self, tensors: Sequence[Tensor], changed: int) -> None:
        """Run it on ``tensors``; the first ``changed`` get what it made of them."""
        self._fill(tensors)
        with torch.cuda.device(tensors[0].device):
            self._graph.replay()
        for given, own in zip(tensors[:changed], self._tensors):
            given.copy_(own)


_graphs: dict[tuple, _Graph] = {}
