"""The base of the modules that replace a Linear: shapes, dtypes, bias, and the order of its bytes."""

from typing import Any

import torch
from torch import Tensor, nn

from labkit.quantization.fixed_dtypes import FixedDtypes
from labkit.quantization.kernels import cuda, cuda_products
from labkit.quantization.kernels.cuda_products import Packed


class QuantizedLinear(FixedDtypes, nn.Module):
    """Base of the modules that replace `nn.Linear`: ``y = x @ weight.T + bias``.

    Takes ``x [..., in_features]`` of any leading shape, including no rows, in fp32, fp16 or bf16 and returns
    ``[..., out_features]`` in the same dtype. Gradients flow to ``x`` (through the dequantized weight), never
    to the weight. A cast of the model changes the bias alone.

    Subclasses hold their tensors as buffers and implement the product and dequantizing. Where a device's kernels
    need another order of bytes (`kernels`), the module keeps a single copy of the weight, in that order, which
    `layout` names. State dictionaries always hold the plain order, so that a file written on one machine loads on
    another.
    """

    packed_name: str | None = None  # the buffer whose order `layout` names
    gives_logits = False  # returns fp32 for any dtype of x: see `labkit.quantization.logits`

    def __init__(
        self, in_features: int, out_features: int, has_bias: bool, device: Any, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.layout = "plain"
        bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False)
        self.register_parameter("bias", bias if has_bias else None)

    def multiply(self, rows: Tensor) -> Tensor:
        """rows [M, K], M > 0 -> [M, N] in the same dtype, without the bias."""
        raise NotImplementedError

    def sums(self, rows: Tensor) -> Tensor:
        """`multiply` in fp32: rows [M, K] of any of the three types -> fp32 [M, N]."""
        packed = self.kernel_weight(rows.device)
        return self.multiply(rows.float()) if packed is None else cuda.sums(rows, packed)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K] the module multiplies by, in ``dtype`` (default: the bias's): a full copy."""
        raise NotImplementedError

    def packed_weight(self) -> Packed | None:
        """The weight for `kernels.cuda_products`, sharing memory; None: the kernels do not support its format."""
        return None

    def kernel_weight(self, device: torch.device) -> Packed | None:
        """`packed_weight` if the kernels of ``device`` can multiply by it, else None."""
        packed = self.packed_weight() if cuda_products.available(device) else None
        return packed if packed is not None and cuda_products.takes(packed) else None

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, for code that reads `Linear.weight`. Costs a full copy each time."""
        return self.dequantize()

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the last dimension is {x.shape[-1]}, the layer takes {self.in_features}")
        shape = (*x.shape[:-1], self.out_features)
        rows = x.reshape(-1, self.in_features)
        trained = torch.is_grad_enabled() and x.requires_grad
        if self.gives_logits and (trained or rows.shape[0] == 0):
            rows = rows.float()
        if rows.shape[0] == 0:
            return rows.new_empty(shape)
        multiply = self.sums if self.gives_logits else self.multiply
        out = _Multiply.apply(rows, self) if trained else multiply(rows)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        return out.view(shape)

    # -- a single copy of the weight, in the order of bytes that is fastest on the device -------------------

    def wanted_layout(self) -> str:
        """The order of bytes that is fastest on the current device."""
        return "plain"

    def relayout(self, packed: Tensor, old: str, new: str) -> Tensor:
        """``packed`` in another order of bytes, same shape."""
        raise NotImplementedError

    def settle(self) -> None:
        """Bring the packed buffer into the order that is fastest on the current device."""
        self._set_layout(self.wanted_layout())

    def _set_layout(self, layout: str) -> None:
        if layout != self.layout:
            packed = self._buffers[self.packed_name]
            if not packed.is_meta:
                self._buffers[self.packed_name] = self.relayout(packed, self.layout, layout)
            self.layout = layout

    def _apply(self, fn, recurse: bool = True):  # moves between devices and dtypes
        super()._apply(fn, recurse)
        if self.packed_name is not None:
            self.settle()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != "plain":
            key = prefix + self.packed_name
            destination[key] = self.relayout(destination[key], self.layout, "plain")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        has_packed = self.packed_name is not None and prefix + self.packed_name in state_dict
        if has_packed:
            self._set_layout("plain")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if has_packed:
            self.settle()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, layout={self.layout}"
        )


class ScaledInput:
    """Mixed into a `QuantizedLinear`: inputs are multiplied by input_scale [K] bf16 before the product.

    The stored weight is W / input_scale, so that the output is that of W: the factors move from the input channels
    to the weight's columns or back.
    """

    def __init__(self, in_features: int, *args: Any, device: Any = None, **options: Any) -> None:
        super().__init__(in_features, *args, device=device, **options)
        self.register_buffer("input_scale", torch.empty(in_features, dtype=torch.bfloat16, device=device))

    def multiply(self, rows: Tensor) -> Tensor:
        return super().multiply(rows * self.input_scale.to(rows.dtype))

    def sums(self, rows: Tensor) -> Tensor:
        return self.multiply(rows.float())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        return (super().dequantize(torch.float32) * self.input_scale.float()).to(dtype or self.dtype)


class _Multiply(torch.autograd.Function):
    """`QuantizedLinear.multiply` with the gradient of its input, for adapters trained on top."""

    @staticmethod
    def forward(ctx, rows: Tensor, module: QuantizedLinear) -> Tensor:
        ctx.module = module
        return module.multiply(rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ ctx.module.dequantize(grad.dtype), None
