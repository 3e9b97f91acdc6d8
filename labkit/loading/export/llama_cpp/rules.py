"""GGUF, which llama.cpp and what is built on it read: Q4_0, Q4_1 and Q8_0 in blocks of 32 weights.

A group of the lab's is one or more blocks, each with the group's scale in fp16; a scale per channel is that of all its
blocks. Two and three bits are stored in four. Q4_K and Q6_K are not written: their blocks of 16 or 32 share a scale in
6 or 8 bits times one in fp16, which holds the lab's scales exactly only for groups of 256 and more, and there Q4_0
has as few bits. llama.cpp rounds the inputs of quantized products to 8 bits itself.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from labkit.loading.export.integers import Kind, kind_of
from labkit.loading.export.refusal import Refusal
from labkit.quantization import QuantizedLinear
from labkit.quantization.int4 import Int4Linear
from labkit.quantization.int8_storage import StoredInt8

BLOCK = 32
EMBEDDINGS = True  # llama.cpp looks rows up in Q8_0
NEAREST = {
    "nf4": "int4 with group_size 32 or 64",
    "llm-int8": "int8",
    "int8-dynamic": "int8",
    "awq": "gptq, or int4",
    "hqq": "gptq, or int4",
    "*": "int4, or int8",
}
ROUNDING = 2.0**-11  # relative error of fp16


def cannot_hold(name: str, role: str, module: QuantizedLinear | StoredInt8) -> Refusal | None:
    """Why the format cannot store this Linear or embedding; None if it can."""
    kind = kind_of(module)
    if isinstance(module, StoredInt8) and role != "embedding":
        return Refusal("llama.cpp resizes positions in fp32", "unquantized")
    if (length := row_length(module)) % BLOCK:
        return Refusal(f"rows of {length} weights are no multiple of {BLOCK}, its block", "unquantized")
    if kind.group_size is not None and kind.group_size % BLOCK:
        return Refusal(
            f"groups of {kind.group_size} are no multiple of {BLOCK}, its block", "int4 with group_size 32"
        )
    if kind.num_bits == 8 and not kind.symmetric:
        return Refusal(
            "its 8-bit blocks have no zero point", "int4 with num_bits 8 and symmetric: true, or int8"
        )
    if kind.dynamic:
        return Refusal(
            "llama.cpp rounds inputs in blocks of its own, not token by token", NEAREST["int8-dynamic"]
        )
    scale = module.scale.float()
    if not torch.equal(scale.to(torch.float16).float(), scale):
        return Refusal("its scales are fp16, which cannot hold scales so small or large", "unquantized")
    if not kind.symmetric:
        offset = offsets(module)
        if not ((offset.to(torch.float16).float() - offset).abs() <= ROUNDING * offset.abs()).all():
            return Refusal("its offsets are fp16, which cannot hold offsets so small or large", "unquantized")
    return None


def row_length(module: QuantizedLinear | StoredInt8) -> int:
    """Weights of a row."""
    return module.in_features if isinstance(module, QuantizedLinear) else module.weight_int8.shape[1]


def offsets(module: Int4Linear) -> Tensor:
    """The value of code 0 in each group, [N, K/G] fp32."""
    scale, zero = module.scale_zero.float().unbind(-1)
    return (zero - module.middle * scale).T


def block_type(kind: Kind) -> str:
    """The name of the format's block that holds weights of this kind."""
    if kind.num_bits == 8:
        return "Q8_0"
    return "Q4_0" if kind.symmetric else "Q4_1"


def notes(kinds: Mapping[str, Kind]) -> list[str]:
    """Notes for the readers of this export, in sentences."""
    sentences = []
    if few := sum(kind.num_bits < 4 for kind in kinds.values()):
        sentences.append(f"{few} Linears have fewer than 4 bits, and take 4 here: the values are the same.")
    if kinds:
        sentences.append(
            "llama.cpp rounds the inputs of quantized products to 8 bits, 32 at a time: its logits differ from the "
            "lab's by that."
        )
    return sentences
