"""A checkpoint's tensors by the names of an unquantized model; quantized weights are dequantized as they are read.

Names of a quantized weight's tensors, for the weight ``W`` (``layers.0.up_proj.weight``): ``W`` in int8 or FP8, or
``W_packed`` in int32; ``W_scale`` or ``W_scale_inv``; ``W_zero_point``, ``W_g_idx`` (each input's group), ``W_shape``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import EllipsisType

import torch
from torch import Tensor

from labkit.common.errors import LoadError
from labkit.models.source_formats import Layout, SourceFormat
from labkit.models.weight_files import Header, WeightFiles

QUANTIZED_DTYPES = ("I8", "F8_E4M3", "F8_E5M2")
_SCALES = ("_scale", "_scale_inv")
_OF_ACTIVATIONS = re.compile(
    r"(?:input|output|activation|[qkv])_(?:scale|scale_inv|scale_ub|global_scale|zero_point)"
)
"""Last parts of names of scales for activations and the KV cache, which the lab keeps unquantized."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint under the name that an unquantized model has for it.

    Attributes:
        shape: its shape when read.
        parts: what it is read from: ``{"": stored name}``, and for a quantized weight ``scale`` and so on.
        layout: how a quantized weight is stored; None for a plain tensor.
    """

    files: WeightFiles = field(repr=False)
    shape: tuple[int, ...]
    parts: Mapping[str, str]
    layout: Layout | None = None

    @property
    def header(self) -> Header:
        """The header of its values."""
        return self.files.headers[self.parts[""]]

    @property
    def path(self) -> Path:
        """The file of its values."""
        return self.header.path

    @property
    def is_integer(self) -> bool:
        """Whether it is read as integers."""
        return self.layout is None and self.header.dtype.startswith(("I", "U"))

    @property
    def bytes(self) -> int:
        """Its size when read."""
        return self.header.bytes if self.layout is None else 4 * math.prod(self.shape)

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        """The tensor on a device: as stored, on the CPU in the file's memory map; a quantized weight in float32."""
        if self.layout is None:
            return self.files.read(self.parts[""]).to(device)
        parts = {part: self.files.read(name).to(device) for part, name in self.parts.items()}
        return dequantized(parts, self.shape, self.layout)

    def __getitem__(self, whole: EllipsisType) -> Tensor:
        """``[...]`` is how transformers reads a tensor of a file."""
        return self.read()


def stored_tensors(
    files: WeightFiles, source_format: SourceFormat | None, model: str
) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint by the names of an unquantized model; ``source_format`` is None for one.

    Raises:
        LoadError: a quantized weight's tensors do not fit each other or the format.
    """
    headers = files.headers
    tensors = {name: StoredTensor(files, header.shape, {"": name}) for name, header in headers.items()}
    if source_format is None:
        return tensors
    shapes = files.read_all(name for name in headers if name.endswith(".weight_shape"))
    for name in headers:
        if _OF_ACTIVATIONS.fullmatch(name.rpartition(".")[2]):
            del tensors[name]
            continue
        suffix = next((suffix for suffix in _SCALES if name.endswith(suffix)), None)
        weight = name.removesuffix(suffix) if suffix else ""
        main = next((main for main in (weight, f"{weight}_packed") if main in headers), None)
        if main is None:
            continue
        parts = {"": main, "scale": name}
        parts |= {
            part: f"{weight}_{part}"
            for part in ("zero_point", "g_idx", "shape")
            if f"{weight}_{part}" in headers
        }
        layout = source_format.layout_of(weight.rpartition(".")[0])
        packed_shape = shapes.get(parts.get("shape", ""))
        shape = headers[main].shape if packed_shape is None else tuple(map(int, packed_shape.flatten()))
        try:
            check_parts({part: headers[name] for part, name in parts.items()}, shape, layout)
        except ValueError as error:
            raise LoadError(f"{model}: {weight} cannot be dequantized: {error}") from None
        for part in parts.values():
            tensors.pop(part, None)
        tensors[weight] = StoredTensor(files, shape, parts, layout)
    for name, tensor in tensors.items():
        if tensor.layout is None and tensor.header.dtype in QUANTIZED_DTYPES:
            raise LoadError(f"{model}: {name} is stored in {tensor.header.dtype} and has no scale beside it")
    return tensors


def dequantized(parts: Mapping[str, Tensor], shape: tuple[int, ...], layout: Layout) -> Tensor:
    """``(integers - zero_point) * scale`` in float32.

    Args:
        parts: ``""``, the integers or FP8 numbers [..., N, K], or packed [..., N, words]; ``scale`` [1], [N],
            [N, 1], or a value for each block; ``zero_point``, shaped as the scale or packed along N; ``g_idx`` [K].
        shape: the weight's shape, [..., N, K].
        layout: the width of the integers, and the block that shares a scale.
    """
    bits, block = layout.num_bits, layout.block
    values = parts[""]
    if values.dtype == torch.int32:
        values = _unpacked(values, bits, shape[-1])
    weight = values.to(torch.float32)
    groups = parts.get("g_idx")
    if groups is not None and (groups < 0).any():
        groups = None  # -1 stands for an order that was never set
    if "zero_point" in parts:
        zero_point = parts["zero_point"]
        if zero_point.dtype == torch.int32:
            zero_point = _unpacked(zero_point.mT, bits, shape[-2]).mT
        weight -= _spread(zero_point, shape, block, groups)
    return weight.mul_(_spread(parts["scale"], shape, block, groups))


def _unpacked(words: Tensor, bits: int, length: int) -> Tensor:
    """int32 words [..., W] -> signed integers [..., length] of ``bits`` bits."""
    if 32 % bits == 0 or words.shape[-1] != -(-length * bits // 32):
        per_word = 32 // bits
        shifts = torch.arange(per_word, dtype=torch.int32, device=words.device) * bits
        codes = (words[..., None] >> shifts) & (2**bits - 1)
        codes = codes.flatten(-2)[..., :length]
    else:  # a stream of bits: an integer may begin in one word and end in the next
        place = torch.arange(length * bits, device=words.device)
        stream = (words[..., place // 32] >> (place % 32).to(torch.int32)) & 1
        weights = 2 ** torch.arange(bits, dtype=torch.int32, device=words.device)
        codes = (stream.unflatten(-1, (length, bits)) * weights).sum(-1)
    return codes - 2 ** (bits - 1)  # stored shifted to unsigned


def _spread(
    values: Tensor, shape: tuple[int, ...], block: tuple[int, int] | None, groups: Tensor | None
) -> Tensor:
    """Scales or zero points in float32, repeated until they multiply a weight of ``shape``."""
    values = values.to(torch.float32)
    if groups is not None:
        if int(groups.max()) >= values.shape[-1]:
            raise LoadError(f"a g_idx names the group {int(groups.max())} of {values.shape[-1]}")
        return values[..., groups.long()]
    values = values.view(_aligned(tuple(values.shape), len(shape)))
    for dim, times in enumerate(_repeats(tuple(values.shape), shape, block)):
        if times > 1:
            values = values.repeat_interleave(times, dim).narrow(dim, 0, shape[dim])
    return values


def _aligned(shape: tuple[int, ...], dims: int) -> tuple[int, ...]:
    """One value, or one for each row, as a shape of ``dims`` dimensions."""
    if math.prod(shape) == 1:
        return (1,) * dims
    return (*shape, *(1,) * (dims - 1)) if len(shape) == 1 else shape


def _repeats(shape: tuple[int, ...], target: tuple[int, ...], block: tuple[int, int] | None) -> list[int]:
    """How often a scale of ``shape`` is repeated along each dimension of a weight.

    Raises:
        ValueError: the scale does not belong to a weight of this shape.
    """
    blocks = (1,) * (len(target) - 2) + (block or (1, 1))
    if len(shape) == len(target) == len(blocks):
        if math.prod(shape) == 1:
            return [1] * len(target)
        expected = [-(-whole // step) for whole, step in zip(target, blocks)]
        if all(size == needed or (size == 1 and block is None) for size, needed in zip(shape, expected)):
            return list(blocks)
    per = f", {block[0]} x {block[1]} weights each" if block else ""
    raise ValueError(f"its scales or zero points are {list(shape)}{per}, the weight is {list(target)}")


def check_parts(headers: Mapping[str, Header], shape: tuple[int, ...], layout: Layout) -> None:
    """Raise ValueError if a weight's tensors do not fit each other or the layout."""
    main, scale, bits = headers[""], headers["scale"], layout.num_bits
    if main.dtype == "I32":
        if "shape" not in headers or len(shape) < 2 or not 1 <= bits <= 8:
            raise ValueError(f"it is packed at {bits} bits with the shape {list(shape)}")
        if main.shape[:-1] != shape[:-1]:
            raise ValueError(f"its words are {list(main.shape)}, the weight is {list(shape)}")
        _check_words(main.shape[-1], bits, shape[-1])
    elif main.dtype not in QUANTIZED_DTYPES:
        raise ValueError(f"it is stored in {main.dtype} and has scales beside it, as if it were quantized")
    if not scale.dtype.startswith(("F", "BF")):
        raise ValueError(f"its scales are {scale.dtype}")
    _repeats(_aligned(scale.shape, len(shape)), shape, layout.block)
    if layout.ordered and "g_idx" not in headers:
        raise ValueError("it has no g_idx, the order of its inputs")
    if layout.zero_points and "zero_point" not in headers:
        raise ValueError("it has no zero points, and is not symmetric")
    if (order := headers.get("g_idx")) is not None and (order.shape != shape[-1:] or order.dtype[0] != "I"):
        raise ValueError(f"its g_idx is {list(order.shape)} {order.dtype}, the weight is {list(shape)}")
    if (zero_point := headers.get("zero_point")) is None:
        return
    if zero_point.dtype == "I32" and len(zero_point.shape) == len(scale.shape) == len(shape):
        _check_words(zero_point.shape[-2], bits, shape[-2])
        packed = zero_point.shape[-1:] == scale.shape[-1:]
    else:
        packed = False
    if not packed and (zero_point.shape != scale.shape or zero_point.dtype != "I8"):
        raise ValueError(
            f"its zero points are {list(zero_point.shape)} {zero_point.dtype}, its scales {list(scale.shape)}"
        )


def _check_words(words: int, bits: int, length: int) -> None:
    """Raise ValueError if so many words do not hold ``length`` integers."""
    if words not in (-(-length * bits // 32), -(-length // (32 // bits))):
        raise ValueError(f"{words} words do not hold {length} integers of {bits} bits")
