"""Products of many fp16 and bf16 rows on a CPU without instructions for them: computed in fp32 and rounded once."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from labkit.quantization.kernels.reference import row_slices

LEAST_ROWS = 16  # fewer rows: reading the weight takes longer than multiplying, and widening it doubles that
SLICE_ELEMENTS = (
    2**16
)  # of each operand and of the product, which are thus in a core's cache and nowhere in the memory
HALVES = (torch.bfloat16, torch.float16)


@cache
def is_emulated(dtype: torch.dtype) -> bool:
    """Whether torch multiplies ``dtype`` by plain loops on this CPU: about seven times slower than fp32."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and torch.backends.mkldnn.is_available() and not supported[dtype]()


class _Upcast(TorchFunctionMode):
    """Widens the operands of Linears, convolutions and matrix products, and rounds what they return.

    The sums are those of an fp32 product, as with a CPU's or a GPU's own instructions for these types.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        compute = PRODUCTS.get(function)
        if compute is not None and not kwargs and _gains(function, *args[:2]):
            return compute(*args).to(args[0].dtype)
        return function(*args, **(kwargs or {}))


def _gains(function: Callable, rows: object, weight: object) -> bool:
    """Whether both are of one emulated type on the CPU, with rows enough."""
    return (
        isinstance(rows, Tensor)
        and isinstance(weight, Tensor)
        and rows.dtype == weight.dtype
        and rows.dtype in HALVES
        and rows.device.type == "cpu"
        and is_emulated(rows.dtype)
        and (function in CONVOLUTIONS or rows.numel() >= LEAST_ROWS * rows.shape[-1])
    )


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A slice of channels and of rows at a time: whole operands would take twice their bytes once more."""
    if torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad):
        return functional.linear(rows.float(), weight.float(), _widened(bias))
    flat = rows.flatten(0, -2)
    out = flat.new_empty(flat.shape[0], weight.shape[0])
    bias = _widened(bias)
    for part in row_slices(*weight.shape, weight.device, cpu_elements=SLICE_ELEMENTS):
        wide, part_bias = weight[part].float(), None if bias is None else bias[part]
        widest = max(wide.shape)
        for row_part in row_slices(flat.shape[0], widest, flat.device, cpu_elements=SLICE_ELEMENTS):
            out[row_part, part] = functional.linear(flat[row_part].float(), wide, part_bias)
    return out.view(*rows.shape[:-1], weight.shape[0])


def _widened(operand: object) -> object:
    return operand.float() if isinstance(operand, Tensor) else operand


def _matmul(rows: Tensor, weight: Tensor) -> Tensor:
    return _linear(rows, weight.T) if weight.ndim == 2 else torch.matmul(rows.float(), weight.float())


def _whole(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *operands: product(*map(_widened, operands))


CONVOLUTIONS = (functional.conv1d, functional.conv2d)
PRODUCTS = {
    functional.linear: _linear,
    **{convolution: _whole(convolution) for convolution in CONVOLUTIONS},
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
}


def upcast(device: torch.device) -> AbstractContextManager:
    """Within it, products of many rows on the CPU are computed in fp32 where that is faster."""
    emulated = device.type == "cpu" and any(is_emulated(dtype) for dtype in HALVES)
    return _Upcast() if emulated else nullcontext()
