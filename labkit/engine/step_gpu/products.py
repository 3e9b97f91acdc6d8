"""A decoder's Linears as the step wants them: one launch each, biases and gates taken in, weights shared not copied."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from labkit.quantization import QuantizedLinear
from labkit.quantization.int4 import Int4Linear
from labkit.quantization.int8 import Int8Linear
from labkit.quantization.kernels import cuda_products as cuda
from labkit.quantization.kernels.cuda_products import Packed
from labkit.quantization.kernels.cuda_tuning import tiles_for, tune
from labkit.quantization.linear import ScaledInput


class ModuleProduct:
    """Linears that are called as they are, whatever they are; several are laid side by side.

    ``bias`` is None: what the modules give has theirs.
    """

    bias: Tensor | None = None

    def __init__(self, *modules: nn.Module):
        self._modules = modules

    def parts(self, x: Tensor) -> Tensor:
        """x [M, K] -> [1, M, N] in its dtype."""
        outs = [module(x) for module in self._modules]
        return (outs[0] if len(outs) == 1 else torch.cat(outs, -1))[None]

    def sums(self, x: Tensor) -> Tensor:
        """x [M, K] -> fp32 [M, N], as a head that keeps its sums gives them (`labkit.quantization.logits`)."""
        return self.parts(x)[0].float()

    def gated(self, x: Tensor) -> Tensor:
        """x [M, K] -> silu(gate) * up [M, N/2], as the model's module has it."""
        gate, up = self.parts(x)[0].chunk(2, -1)
        return up * nn.functional.silu(gate)


class KernelProduct:
    """A weight of the kernels (`labkit.quantization.kernels`), always as tiles of eight rows.

    Args:
        packed: the weight.
        bias: [N] or None; who reads `parts` has to add it.
        is_gated: whether it is gate over up.
    """

    def __init__(self, packed: Packed, bias: Tensor | None = None, is_gated: bool = False):
        self.packed, self.bias, self.is_gated = packed, bias, is_gated
        rows = cuda.ROW_TILES[0]
        tune([(packed, is_gated)], [rows])
        self.tiles = tiles_for(packed, rows, is_gated)

    def parts(self, x: Tensor) -> Tensor:
        """x [M, K] -> fp32 [splits, M, N], without the bias."""
        return cuda.product(x, self.packed, self.tiles, partial=True)

    def sums(self, x: Tensor) -> Tensor:
        """x [M, K] -> fp32 [M, N], with the bias and not rounded."""
        out = self.parts(x).sum(0)
        return out if self.bias is None else out + self.bias.float()

    def gated(self, x: Tensor) -> Tensor:
        """x [M, K] -> silu(gate) * up [M, N/2]."""
        return cuda.product(x, self.packed, self.tiles, gated=True)


Product = KernelProduct | ModuleProduct


def product_of(*modules: nn.Module, dtype: torch.dtype, gated: bool = False) -> Product:
    """Linears that take the same input, as one product: by kernels if all are of one format that those know.

    Weights of several are joined, and the modules see their part of the joined weight from then on: nothing is there
    twice. ``dtype`` is the step's.
    """
    packed = [_packed(module) for module in modules]
    known = dtype == torch.bfloat16 and all(entry is not None and cuda.takes(entry) for entry in packed)
    if (
        not known
        or len({entry.format for entry in packed}) != 1
        or any(m.bias is not None and gated for m in modules)
    ):
        return ModuleProduct(*modules)
    if len(modules) == 1:
        return KernelProduct(packed[0], modules[0].bias, gated)
    biases = [module.bias for module in modules]
    if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
        return ModuleProduct(*modules)
    joined = _join(modules, packed)
    return KernelProduct(
        joined, None if biases[0] is None else torch.cat([bias.detach() for bias in biases]), gated
    )


def _packed(module: nn.Module) -> Packed | None:
    if isinstance(module, QuantizedLinear):
        return None if isinstance(module, ScaledInput) else module.packed_weight()
    plain = isinstance(module, nn.Linear) and module.weight.dtype == torch.bfloat16
    return Packed(module.weight.detach()) if plain and module.weight.is_contiguous() else None


def _join(modules: Sequence[nn.Module], packed: Sequence[Packed]) -> Packed:
    """One weight of several; the modules' own become views of it."""
    weight = torch.cat([entry.weight for entry in packed])
    lines = 1 if packed[0].group_size else 0
    scales = None if packed[0].scales is None else torch.cat([entry.scales for entry in packed], lines)
    start = 0
    for module in modules:
        part = slice(start, start + module.out_features)
        start = part.stop
        if isinstance(module, Int4Linear):
            module.packed, module.scale_zero = weight[part], scales[:, part]
        elif isinstance(module, Int8Linear):
            module.weight_int8, module.scale = weight[part], scales[part]
        else:
            module.weight.data = weight[part]
    return Packed(weight, scales, packed[0].group_size)
