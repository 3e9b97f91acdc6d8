"""Keys and values of one conversation in one buffer, where the captured step finds them by a single address."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from labkit.engine.kv_cache import (
    PLAIN,
    SCALE_DTYPE,
    Band,
    Keeping,
    dequantize_vectors,
    of_prompt,
    quantize_vectors,
)

ROOM = 256
"""Tokens a cache has room for beyond those it gets at first, and the least by which it grows."""


class Storage:
    """What a cache and its layers share; they do not hold each other, so that its memory is free with the last of them.

    A token's place is that of `Keeping.slots`: its number, or with a window that in a ring behind the sinks.

    Attributes:
        keeping: in which type, and how many.
        buffer: ``[layers, 2, groups, capacity, D]``, keys before values; None until the first prompt comes.
        scales: of an int8 buffer, bf16 ``[layers, 2, groups, capacity, 1]``; else None.
        length: tokens that have come, whether they are kept or not.
    """

    def __init__(self, layers: int, keeping: Keeping = PLAIN):
        self.layers = layers
        self.keeping = keeping
        self.buffer: Tensor | None = None
        self.scales: Tensor | None = None
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens it has room for."""
        return 0 if self.buffer is None else self.buffer.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(part.nbytes for part in (self.buffer, self.scales) if part is not None)

    def reserve(self, needed: int, like: Tensor | None = None) -> None:
        """Make room for ``needed`` tokens, of which a window keeps some; the first time, of the type and sizes of
        ``like [1, groups, n, D]``."""
        if self.keeping.kept(needed) <= self.capacity:
            return
        room = self.keeping.kept(-(-max(needed + ROOM, self.capacity * 5 // 4) // ROOM) * ROOM)
        if self.buffer is None:
            self.allocate(room, like)
        else:  # what has gone round a ring has all the room there will be
            self.buffer = _grown(self.buffer, room)
            self.scales = None if self.scales is None else _grown(self.scales, room)

    def allocate(self, room: int, like: Tensor) -> None:
        """Buffers for ``room`` tokens, with nothing in them."""
        keeping, sizes = self.keeping, (self.layers, 2, like.shape[1], room)
        dtype = torch.int8 if keeping.int8 else keeping.dtype or like.dtype
        self.buffer = like.new_empty((*sizes, like.shape[3]), dtype=dtype)
        self.scales = like.new_empty((*sizes, 1), dtype=SCALE_DTYPE) if keeping.int8 else None

    def write(self, layer: int, keys: Tensor, values: Tensor, start: int) -> None:
        """Store ``[groups, n, D]`` of one layer, the tokens from ``start`` on, for which there is room."""
        for first, last in self.keeping.staying(start, start + keys.shape[1]):
            place = self.keeping.place(first, last)
            for half, given in enumerate((keys, values)):
                vectors = given[:, first - start : last - start]
                if self.scales is not None:
                    vectors, self.scales[layer, half][:, place] = quantize_vectors(vectors)
                self.buffer[layer, half][:, place] = vectors.to(self.buffer.dtype)

    def read(self, layer: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer that are kept of so many tokens, ``[groups, kept, D]`` in ``dtype``."""
        kept = self.keeping.kept(tokens)
        numbers = self.buffer[layer, :, :, :kept]
        if self.scales is None:
            keys, values = numbers.to(dtype)
        else:
            keys, values = dequantize_vectors(numbers, self.scales[layer, :, :, :kept], dtype)
        return keys, values


def _grown(old: Tensor, room: int) -> Tensor:
    grown = old.new_empty(*old.shape[:3], room, old.shape[4])
    grown[..., : old.shape[3], :] = old
    return grown


class StaticCache(DynamicCache):
    """One conversation's keys and values, in ``storage``."""

    def __init__(self, layers: int, keeping: Keeping = PLAIN):
        super().__init__()
        self.storage = Storage(layers, keeping)
        self.layers = [StaticLayer(self.storage, index) for index in range(layers)]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the buffers."""
        return self.storage.nbytes

    @property
    def room(self) -> int:
        """The number of tokens that fit into the buffers."""
        return self.storage.capacity

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, whether they are kept or not."""
        return self.storage.length


class StaticLayer(DynamicLayer):
    """One layer of a `StaticCache`, as transformers' attention fills it."""

    def __init__(self, storage: Storage, index: int):
        super().__init__()
        self._storage, self._index = storage, index

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor] | tuple[Band, Band]:
        """Append ``[1, groups, n, D]``; returns what they may attend to, as `labkit.engine.row_cache.RowLayer` does.

        The tokens count after the last layer.
        """
        kept, layer = self._storage, self._index
        self.is_initialized = True
        start, end = kept.length, kept.length + key_states.shape[-2]
        kept.reserve(end, key_states)
        kept.write(layer, key_states[0], value_states[0], start)
        if layer == kept.layers - 1:
            kept.length = end
        if end - start > 1 and kept.keeping != PLAIN:
            return of_prompt(kept.keeping, key_states, value_states, start)
        keys, values = kept.read(layer, end, key_states.dtype)
        return keys[None], values[None]

    def get_seq_length(self) -> int:
        """Tokens so far, those of the layers below that this one does not have yet left out."""
        return self._storage.length
