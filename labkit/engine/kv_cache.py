"""How the keys and values of one layer of one conversation are kept: in which type, and how many of them.

**int8.** Each token's vector of each head is stored as 8-bit integers and one scale (bf16), the largest
magnitude over 127. A scale for every token and head is what lets tokens be added one at a time: a scale that
spans tokens would change when a larger one comes. It is the per-token granularity of KIVI (Liu et al., 2024),
which needs finer scales for keys at 2 bits only; at 8 bits the error is about 0.4 % of a vector's largest
number. A prompt's own attention is computed on its exact numbers; every later token reads what is stored.

**Window.** Each token attends to the last N tokens, itself counted, and to the first `SINKS` of the
conversation. Softmax must put its weight somewhere, and trained models put what is left over on the first
tokens, whatever these say: a window that drops them ruins the answers, four of them restore it (Xiao et al.,
"Efficient Streaming Language Models with Attention Sinks", 2024). Positions stay true: a key is rotated once,
by the place it has in the conversation; StreamingLLM renumbers, so as to go on beyond the context that a model
was trained for, which is no aim here. What falls out of the window is overwritten. A prompt longer than the
window sees it too: token by token it attends to what it would have seen had it been written one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from labkit.common.errors import LabError
from labkit.quantization import DTYPES

SINKS = 4
"""Tokens at a conversation's beginning that a window keeps."""
GROWTH = 128
"""Tokens by which a cache grows at a time."""
BLOCK = 256
"""Queries of a prompt whose attention over a window is computed together."""
SCALE_DTYPE = torch.bfloat16
SMALLEST = 1e-20  # the scale of a vector of zeros


def quantize_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """vectors [..., D] -> codes [..., D] int8, symmetric, and scale [..., 1] bf16.

    The same to the last bit on every device, and in `labkit.engine.step_gpu.kernels`:
    a division by a number is a product on GPUs.
    """
    largest = vectors.abs().amax(-1, keepdim=True).float()
    scale = largest.mul_(1 / 127).clamp_(min=SMALLEST).to(SCALE_DTYPE)
    codes = vectors.float().div(scale).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scale


def dequantize_vectors(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [..., D] int8 and scale [..., 1] -> [..., D] in ``dtype``, multiplied in that type."""
    return codes * scale.to(dtype)


def vector_bytes(width: int, kept: str, itemsize: int) -> int:
    """Bytes of one token's key, or value, of one head with ``width`` numbers: ``kept`` as ``int8`` with its scale, or
    in a type of ``itemsize`` bytes."""
    return width + SCALE_DTYPE.itemsize if kept == "int8" else width * itemsize


@dataclass(frozen=True)
class Keeping:
    """What a plan's runtime says of the cache.

    Attributes:
        dtype: what numbers are stored in; None: as they come.
        int8: store integers and scales.
        window: how many tokens are kept besides the first `SINKS`; None: all.
    """

    dtype: torch.dtype | None = None
    int8: bool = False
    window: int | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens that are kept."""
        return None if self.window is None else self.window + SINKS

    def kept(self, tokens: int) -> int:
        """How many of a conversation's tokens are there."""
        return tokens if self.limit is None else min(tokens, self.limit)

    def room(self, tokens: int) -> int:
        """For how many tokens there is memory, once so many have come."""
        room = -(-tokens // GROWTH) * GROWTH
        return room if self.limit is None else min(room, self.limit)

    def slots(self, start: int, end: int) -> Tensor:
        """Where the tokens ``start`` to ``end`` - 1 are stored: a ring behind the sinks, if there is a window."""
        tokens = torch.arange(start, end, dtype=torch.int64, device="cpu")
        if self.window is None:
            return tokens
        return torch.where(tokens < SINKS, tokens, SINKS + (tokens - SINKS) % self.window)

    def place(self, start: int, end: int) -> slice | Tensor:
        """`slots` as an index: a slice, where nothing goes round."""
        return slice(start, end) if end <= (self.limit or end) else self.slots(start, end)

    def staying(self, start: int, end: int) -> list[tuple[int, int]]:
        """Stretches (first, end) of the tokens ``start`` to ``end`` - 1 that are there once all have come: those that
        would overwrite one another when they come at once are left out."""
        first = start if self.window is None else max(start, end - self.window)
        sinks = min(SINKS, end) if first > start else start
        stretches = (start, sinks), (max(first, sinks), end)
        return [(begin, last) for begin, last in stretches if begin < last]


PLAIN = Keeping()


class CacheOptions(Protocol):
    """What a plan's runtime options (`labkit.plans.plan.RuntimeOptions`) say of the cache."""

    kv_cache: str | None
    sliding_window: int | None


def keeping_of(runtime: CacheOptions | None) -> Keeping:
    """What a plan's runtime options mean for the cache (None: nothing)."""
    if runtime is None:
        return PLAIN
    dtype = runtime.kv_cache
    return Keeping(DTYPES.get(dtype), dtype == "int8", runtime.sliding_window)


class Store:
    """Vectors [B, H, n, D] of one conversation (B: its keys and its values) in buffers that grow.

    Their order is that of `Keeping.slots`: attention without a mask does not depend on it.
    """

    def __init__(self, keeping: Keeping) -> None:
        self._keeping = keeping
        self._numbers: Tensor | None = None  # [B, H, room, D]
        self._scale: Tensor | None = None  # [B, H, room, 1]

    def append(self, vectors: Tensor, start: int) -> Tensor:
        """Store the vectors [B, H, n, D] of the tokens from ``start`` on; returns all that are kept, in their dtype."""
        keeping, end = self._keeping, start + vectors.shape[-2]
        self._grow(keeping.room(end), vectors)
        for first, last in keeping.staying(start, end):
            self._write(vectors[:, :, first - start : last - start], first)
        return self.read(keeping.kept(end), vectors.dtype)

    def read(self, count: int, dtype: torch.dtype) -> Tensor:
        """The vectors [B, H, count, D] that are kept."""
        numbers = self._numbers[:, :, :count]
        if self._scale is None:
            return numbers.to(dtype)
        return dequantize_vectors(numbers, self._scale[:, :, :count], dtype)

    @property
    def numbers(self) -> Tensor | None:
        """The buffer [B, H, room, D]; None before the first token."""
        return self._numbers

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in all; not before the first `append`."""
        self._grow(self._keeping.room(tokens), self._numbers)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(part.nbytes for part in (self._numbers, self._scale) if part is not None)

    def _write(self, vectors: Tensor, start: int) -> None:
        place = self._keeping.place(start, start + vectors.shape[-2])
        if self._keeping.int8:
            self._numbers[:, :, place], self._scale[:, :, place] = quantize_vectors(vectors)
        else:
            self._numbers[:, :, place] = vectors.to(self._numbers.dtype)

    def _grow(self, room: int, vectors: Tensor) -> None:
        if self._numbers is not None and self._numbers.shape[-2] >= room:
            return
        dtype = torch.int8 if self._keeping.int8 else self._keeping.dtype or vectors.dtype
        self._numbers = _grown(self._numbers, room, vectors, vectors.shape[-1], dtype)
        if self._keeping.int8:
            self._scale = _grown(self._scale, room, vectors, 1, SCALE_DTYPE)


@dataclass(frozen=True)
class Band:
    """A prompt's keys or values [1, H, L, D], of which each token sees a window alone."""

    tensor: Tensor
    window: int


def of_prompt(keeping: Keeping, keys: Tensor, values: Tensor, start: int) -> tuple[Any, Any]:
    """What a prompt attends to: its own ``keys`` and ``values [1, H, n, D]``, exact whatever is stored; over a window
    that it does not fit in, as `Band`.

    Raises:
        LabError: it is not the conversation's first (``start`` tokens were before).
    """
    if start:
        raise LabError("a prompt in several parts is not possible with kv_cache or sliding_window")
    window = keeping.window
    if window is None or keys.shape[-2] <= window:
        return keys, values
    return Band(keys, window), Band(values, window)


def attend_band(query: Tensor, keys: Band, values: Band, scale: float | None) -> Tensor:
    """Attention of a prompt over a window and the sinks, `BLOCK` queries at a time.

    query [1, heads, L, D], keys and values [1, groups, L, D] -> [1, L, heads, D]. Memory and time grow with
    L * window.
    """
    length, window = query.shape[-2], keys.window
    groups = query.shape[1] // keys.tensor.shape[1]
    pieces = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        first = max(start - window + 1, 0)
        sinks = min(SINKS, first)
        numbers = torch.arange(end, dtype=torch.int64, device=query.device)
        seen, own = torch.cat((numbers[:sinks], numbers[first:])), numbers[start:, None]
        mask = (seen <= own) & ((seen > own - window) | (seen < SINKS))
        k, v = (part.tensor[:, :, seen].repeat_interleave(groups, 1) for part in (keys, values))
        out = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, start:end], k, v, attn_mask=mask, scale=scale
        )
        pieces.append(out)
    return torch.cat(pieces, 2).transpose(1, 2)


def _grown(old: Tensor | None, room: int, like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    grown = torch.empty(*like.shape[:2], room, width, dtype=dtype, device=like.device)
    if old is not None:
        grown[:, :, : old.shape[-2]] = old
    return grown
