"""nf4: bitsandbytes' 4-bit NormalFloat: blocks of 64 weights, each with a statistic of 8 bits.

The sixteen values are quantiles of a normal distribution, scaled by each block's largest magnitude (Dettmers
et al., "QLoRA", 2023). Memory: packed [N, K/2], absmax uint8 per block, and per 256 blocks an fp32 scale:
about 4.13 bits a weight, plus 1,092 bytes of tables a layer that bitsandbytes keeps.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.common.options import option
from labkit.quantization.kernels import cpu_nf4
from labkit.quantization.kernels.bnb import bitsandbytes_functional
from labkit.quantization.kernels.reference import CACHE_ELEMENTS, sliced_multiply
from labkit.quantization.linear import QuantizedLinear
from labkit.quantization.scheme import DTYPES, Scheme, bias_bytes, check_group_size, register

NESTED_BLOCK = 256  # statistics that share one scale, fixed in bitsandbytes


class NF4Linear(QuantizedLinear):
    """bitsandbytes' tensors as buffers, under its own names.

    packed [N, K/2] uint8 in the order `layout` names; quant_map [16] fp32. Double quantization: absmax
    [N*K/G] uint8, nested_absmax [N*K/G/256] fp32, nested_quant_map [256] fp32, nested_offset [] fp32; without
    it only absmax [N*K/G] fp32.
    """

    packed_name = "packed"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        has_bias: bool,
        group_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: Any = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(in_features, out_features, has_bias, device, dtype)
        self.group_size, self.double_quant, self.compute_dtype = group_size, double_quant, compute_dtype
        blocks = out_features * in_features // group_size

        def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

        buffer("packed", (out_features, in_features // 2), torch.uint8)
        buffer("absmax", (blocks,), torch.uint8 if double_quant else torch.float32)
        buffer("quant_map", (16,), torch.float32)
        if double_quant:
            buffer("nested_absmax", (-(-blocks // NESTED_BLOCK),), torch.float32)
            buffer("nested_quant_map", (256,), torch.float32)
            buffer("nested_offset", (), torch.float32)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Quantize ``weight`` [N, K] into the buffers."""
        packed, state = bitsandbytes_functional().quantize_4bit(
            weight.contiguous(),
            blocksize=self.group_size,
            compress_statistics=self.double_quant,
            quant_type="nf4",
        )
        self._set_layout("plain")
        self.packed.copy_(packed.view(self.packed.shape))
        self.absmax.copy_(state.absmax)
        self.quant_map.copy_(state.code)
        if self.double_quant:
            self.nested_absmax.copy_(state.state2.absmax)
            self.nested_quant_map.copy_(state.state2.code)
            self.nested_offset.copy_(state.offset)
        self.settle()

    def wanted_layout(self) -> str:
        if self.packed.device.type != "cpu" or self.out_features % cpu_nf4.BLOCK:
            return "plain"
        if self.in_features % self.group_size or not cpu_nf4.has_packed_nf4():
            return "plain"
        return "blocks32"

    def relayout(self, packed: Tensor, old: str, new: str) -> Tensor:
        if old != "plain":
            packed = cpu_nf4.from_blocks(packed)
        return packed if new == "plain" else cpu_nf4.to_blocks(packed)

    def multiply(self, rows: Tensor) -> Tensor:
        return self._multiply(rows.to(self.compute_dtype)).to(rows.dtype)

    def sums(self, rows: Tensor) -> Tensor:
        return self._multiply(rows.float())

    def _multiply(self, rows: Tensor) -> Tensor:
        if self.layout != "plain" and rows.shape[0] <= cpu_nf4.PACKED_ROWS and rows.dtype == torch.bfloat16:
            absmax = self._absmax().view(self.out_features, -1).T.to(torch.bfloat16).contiguous()
            return cpu_nf4.nf4_multiply(rows, self.packed, absmax, self.quant_map, self.group_size)
        if rows.device.type == "cpu":
            absmax = self._absmax().view(self.out_features, -1)
            return sliced_multiply(
                rows,
                self.out_features,
                lambda part: self._dequantize(part, absmax, rows.dtype),
                CACHE_ELEMENTS,
                cpu_nf4.BLOCK,
            )
        import bitsandbytes

        packed = self.packed.view(-1, 1)
        return bitsandbytes.matmul_4bit(rows.contiguous(), packed, quant_state=self._state(rows.dtype))

    def _dequantize(self, part: slice, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """The channels ``part`` [n, K], given absmax [N, K/G] fp32; a slice at a time is several times faster
        than the whole, which does not fit the cache."""
        packed = self.relayout(self.packed[part], self.layout, "plain")
        shape = (packed.shape[0], self.in_features)
        flat = packed.reshape(-1, 1), absmax[part].reshape(-1)
        return torch.ops.bitsandbytes.dequantize_4bit.default(*flat, self.group_size, "nf4", shape, dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        packed = self.relayout(self.packed, self.layout, "plain").view(-1, 1)
        dtype = dtype or self.dtype
        state = self._state(dtype if dtype in DTYPES.values() else torch.float32)
        return bitsandbytes_functional().dequantize_4bit(packed, state).to(dtype)

    def _absmax(self) -> Tensor:
        """[N*K/G] fp32: each block's largest magnitude."""
        if not self.double_quant:
            return self.absmax
        functional = bitsandbytes_functional()
        return functional.dequantize_blockwise(self.absmax, self._nested_state()).add_(self.nested_offset)

    def _nested_state(self):
        return bitsandbytes_functional().QuantState(
            absmax=self.nested_absmax,
            code=self.nested_quant_map,
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )

    def _state(self, dtype: torch.dtype):
        """The buffers as bitsandbytes' own state; shares their memory."""
        return bitsandbytes_functional().QuantState(
            absmax=self.absmax,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.quant_map,
            blocksize=self.group_size,
            quant_type="nf4",
            dtype=dtype,
            offset=self.nested_offset if self.double_quant else None,
            state2=self._nested_state() if self.double_quant else None,
        )


@register("nf4")
@dataclass(frozen=True)
class NF4(Scheme):
    """4-bit NormalFloat of bitsandbytes, with double quantization and bf16 products (QLoRA's format)."""

    group_size: int = option(64, "weights that share one statistic", choices=(32, 64, 128, 256, 512, 1024))
    double_quant: bool = option(True, "quantize the statistics too, to 8 bits", choices=(True, False))
    compute_dtype: str = option("bf16", "dtype of the product", choices=tuple(DTYPES))

    def validate_environment(self, device) -> None:
        super().validate_environment(device)
        bitsandbytes_functional()

    def validate(self, in_features, out_features, device=None) -> None:
        super().validate(in_features, out_features, device)
        check_group_size(self.group_size, in_features)

    def empty_linear(self, in_features, out_features, has_bias, *, device=None, dtype=torch.bfloat16):
        compute = DTYPES[self.compute_dtype]
        return NF4Linear(
            in_features, out_features, has_bias, self.group_size, self.double_quant, compute, device, dtype
        )

    def predict_bytes(self, out_features, in_features, has_bias, *, dtype=torch.bfloat16) -> int:
        weights = out_features * in_features
        blocks = weights // self.group_size
        statistics = (
            blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 * 256 + 4 if self.double_quant else 4 * blocks
        )
        return weights // 2 + statistics + 4 * 16 + bias_bytes(out_features, has_bias, dtype)
