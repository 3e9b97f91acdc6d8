"""Embeddings and convolutions with an 8-bit stored weight, which is dequantized for each use.

The modules keep their classes and behaviour; their ``weight`` is dequantized on access. An embedding dequantizes only
the rows it looks up. Memory: weight int8, a scale in bf16 for each row or output channel.
"""

import copy
from functools import cache

import torch
from torch import Tensor, nn

from labkit.quantization import affine
from labkit.quantization.fixed_dtypes import FixedDtypes
from labkit.quantization.kernels.reference import row_slices

KINDS: dict[str, type[nn.Module]] = {
    "linear": nn.Linear,
    "embedding": nn.Embedding,
    "conv": nn.modules.conv._ConvNd,
}
"""A plan's names for the kinds of modules that schemes replace."""


def module_kind(module: nn.Module) -> str | None:
    """``linear``, ``embedding`` or ``conv``; None for any other module."""
    return next((kind for kind, cls in KINDS.items() if isinstance(module, cls)), None)


class StoredInt8(FixedDtypes):
    """Mixin for a module's class: weight_int8 [N, ...] int8 and scale [N] bf16 replace ``weight``."""

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in `dtype`: a full copy at each access."""
        scale = self.scale.float().view(-1, *[1] * (self.weight_int8.ndim - 1))
        return (self.weight_int8 * scale).to(self.dtype)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Quantize ``weight`` [N, ...] into the buffers, a slice of rows at a time."""
        rows = weight.flatten(1)
        for part in row_slices(*rows.shape, rows.device):
            scale, zero_point = affine.choose_qparams(rows[part], 8, None, True, self.scale.dtype)
            codes = affine.quantize(rows[part], scale, zero_point, 8, symmetric=True)
            signed = (codes.to(torch.int16) - 128).to(torch.int8)
            self.weight_int8[part] = signed.view(self.weight_int8[part].shape)
            self.scale[part] = scale[:, 0]


class StoredEmbedding(StoredInt8):
    """Dequantizes only the rows that are looked up."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight_int8[ids] * self.scale[ids].float()[..., None]
        return rows.to(self.dtype)


def empty_stored(module: nn.Module, device: torch.device | str | None, dtype: torch.dtype) -> nn.Module:
    """The stored counterpart of ``module`` (an embedding or convolution), its buffers not filled."""
    shape = module.weight.shape
    stored = copy.copy(module)
    stored.__class__ = _stored_class(type(module))
    for name in ("_parameters", "_buffers"):
        setattr(stored, name, dict(getattr(module, name)))
    del stored._parameters["weight"]
    stored.dtype = dtype
    stored.register_buffer("weight_int8", torch.empty(shape, dtype=torch.int8, device=device))
    stored.register_buffer("scale", torch.empty(shape[0], dtype=torch.bfloat16, device=device))
    bias = stored._parameters.get("bias")
    if bias is not None:
        empty = torch.empty(bias.shape, dtype=dtype, device=device)
        stored._parameters["bias"] = nn.Parameter(empty, requires_grad=False)
    return stored


def stored_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the module that `empty_stored` returns, computed without building it."""
    bias = module._parameters.get("bias")
    extra = 0 if bias is None else bias.numel() * dtype.itemsize
    return module.weight.numel() + 2 * module.weight.shape[0] + extra


@cache
def _stored_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class with a stored weight; an embedding class that overrides forward keeps its own."""
    plain = issubclass(cls, nn.Embedding) and cls.forward is nn.Embedding.forward
    return type(f"Stored{cls.__name__}", (StoredEmbedding if plain else StoredInt8, cls), {})
