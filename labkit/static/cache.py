"""Keys and values of one conversation in one buffer, where the captured step finds them by a single address."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 256
"""Tokens a cache has room for beyond those it gets at first, and the least by which it grows."""


class Storage:
    """What a cache and its layers share; they do not hold each other, so that its memory is free with the last of them.

    Attributes:
        buffer: ``[layers, 2, groups, capacity, D]``, keys before values; None until the first prompt comes.
        length: tokens in it.
    """

    def __init__(self, layers: int):
        self.layers = layers
        self.buffer: Tensor | None = None
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens it has room for."""
        return 0 if self.buffer is None else self.buffer.shape[3]

    def reserve(self, needed: int, like: Tensor | None = None) -> None:
        """Make room for ``needed`` tokens; the first time, of the type and head size of ``like [1, groups, n, D]``."""
        if needed <= self.capacity:
            return
        room = -(-max(needed + ROOM, self.capacity * 5 // 4) // ROOM) * ROOM
        if self.buffer is None:
            self.buffer = like.new_empty((self.layers, 2, like.shape[1], room, like.shape[3]))
        else:
            grown = self.buffer.new_empty(*self.buffer.shape[:3], room, self.buffer.shape[4])
            grown[..., : self.length, :] = self.buffer[..., : self.length, :]
            self.buffer = grown


class StaticCache(DynamicCache):
    """One conversation's keys and values, in ``storage``."""

    def __init__(self, layers: int):
        super().__init__()
        self.storage = Storage(layers)
        self.layers = [StaticLayer(self.storage, index) for index in range(layers)]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the buffer."""
        return 0 if self.storage.buffer is None else self.storage.buffer.nbytes

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in it."""
        return self.storage.length


class StaticLayer(DynamicLayer):
    """One layer of a `StaticCache`, as transformers' attention fills it."""

    def __init__(self, storage: Storage, index: int):
        super().__init__()
        self._storage, self._index = storage, index

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[1, groups, n, D]``; returns all keys and values so far. The tokens count after the last layer."""
        kept = self._storage
        self.is_initialized = True
        end = kept.length + key_states.shape[-2]
        kept.reserve(end, key_states)
        stored = kept.buffer[self._index]
        stored[0, :, kept.length : end] = key_states[0]
        stored[1, :, kept.length : end] = value_states[0]
        if self._index == kept.layers - 1:
            kept.length = end
        return stored[0, None, :, :end], stored[1, None, :, :end]

    def get_seq_length(self) -> int:
        """Tokens in it, those of the layers below that this one does not have yet left out."""
        return self._storage.length
