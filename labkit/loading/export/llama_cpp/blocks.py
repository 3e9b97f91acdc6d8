"""A weight as the bytes of GGUF's blocks, row by row.

Q4_0: fp16 scale and 16 bytes, weight i in the low and weight i + 16 in the high half of byte i; ``(code - 8) * scale``.
Q4_1: the same after the fp16 value of code 0; ``code * scale + offset``. Q8_0: fp16 scale and 32 signed bytes.
"""

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor, nn

from labkit.loading.export.integers import kind_of
from labkit.loading.export.llama_cpp.rules import BLOCK, block_type, offsets, row_length
from labkit.quantization.int4 import Int4Linear

PLAIN = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


def type_of(module: nn.Module) -> GGMLQuantizationType:
    """The block type of a quantized module."""
    return GGMLQuantizationType[block_type(kind_of(module))]


def row_bytes(length: int, type: GGMLQuantizationType) -> int:
    """Bytes of a row of ``length`` values."""
    size, bytes = GGML_QUANT_SIZES[type]
    return length // size * bytes


def quantized(module: nn.Module) -> np.ndarray:
    """The weight of a Linear or embedding that `rules.cannot_hold` accepts: [N, bytes of a row] uint8."""
    kind = kind_of(module)
    if not isinstance(module, Int4Linear):
        codes, scale = module.weight_int8, module.scale[:, None]
    elif kind.num_bits == 8:
        codes, scale = (module.codes ^ 128).view(torch.int8), module.scale
    else:
        codes, scale = module.codes, module.scale
        if kind.symmetric:
            codes = codes + (8 - module.middle)
        low, high = codes.unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
        codes = (low | high << 4).flatten(1)
    blocks = row_length(module) // BLOCK
    halves = [scale] if kind.symmetric else [scale, offsets(module)]
    parts = [_halves(values, blocks) for values in halves]
    parts.append(codes.contiguous().view(torch.uint8).unflatten(1, (blocks, -1)))
    return torch.cat(parts, -1).flatten(1).cpu().numpy()


def rounded_offsets(module: nn.Module) -> tuple[int, int]:
    """How many of an asymmetric module's groups have an offset that fp16 rounds, and how many it has; else 0, 0."""
    if kind_of(module).symmetric:
        return 0, 0
    offset = offsets(module)
    return int((offset.to(torch.float16).float() != offset).sum()), offset.numel()


def plain(tensor: Tensor) -> np.ndarray:
    """A tensor as it is, in bytes: [..., bytes of a row] uint8."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()


def _halves(values: Tensor, blocks: int) -> Tensor:
    """[N, K/G] -> the same in fp16 for each of a row's blocks, as bytes [N, blocks, 2]."""
    halves = values.to(torch.float16).repeat_interleave(blocks // values.shape[1], 1)
    return halves.contiguous().view(torch.uint8).unflatten(1, (blocks, 2))
