"""The key-value cache of one conversation, and one attention step over the caches of several.

Conversations that are decoded together keep a cache each, of its own length: nothing is padded, a row joins
or leaves between two steps without touching the others, and each row's attention is computed by the very call
it would get alone. Only products with weights are shared, which is where a batch saves time.

transformers gives both ends: a `Cache` may return what it likes from ``update``, and an attention function
registered under a name gets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from labkit.engine.kv_cache import PLAIN, Band, Keeping, Store, attend_band, of_prompt

ATTENTION = "labkit_rows"
_PLAIN = {
    "sliding_window",
    "softcap",
    "s_aux",
    "position_bias",
}  # arguments that more than plain attention takes


class RowLayer(DynamicLayer):
    """One layer's keys and values ``[1, H, L, D]`` of one conversation, kept as `labkit.engine.kv_cache` says.

    Attributes:
        length: tokens so far, whether they are kept or not.
    """

    def __init__(self, keeping: Keeping = PLAIN):
        self._keeping = keeping
        self._plain = keeping == PLAIN
        self._store = Store(keeping)
        self._values: Store | None = (
            None  # for values of another width than the keys; else they are in `_store`
        )
        self._buffers: tuple[Tensor, Tensor] | None = None
        self.length = 0
        super().__init__()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor] | tuple[Band, Band]:
        """Append ``[1, H, n, D]``; returns what they may attend to.

        That is all keys and values that are kept; for a prompt, which is exact and sees a window token by
        token, its own (see `attend_band`).
        """
        self.is_initialized = True
        start, self.length = self.length, self.length + key_states.shape[-2]
        if key_states.shape != value_states.shape:  # they are not kept together
            self._values = self._values or Store(self._keeping)
            parts = (self._store, key_states), (self._values, value_states)
            kept = [store.append(states, start) for store, states in parts]
            if key_states.shape[-2] == 1 or self._plain:
                return kept[0], kept[1]
            return of_prompt(self._keeping, key_states, value_states, start)
        kept = self._store.append(torch.cat((key_states, value_states)), start)
        if key_states.shape[-2] == 1 or self._plain:
            return kept[:1], kept[1:]
        return of_prompt(self._keeping, key_states, value_states, start)

    @property
    def buffers(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values with room for more, ``[1, H, room, D]`` each, the same objects until they grow; None before
        the first token, and where numbers are not kept as they come."""
        numbers = self._store.numbers if self._plain and self._values is None else None
        if numbers is None:
            self._buffers = None
        elif self._buffers is None or self._buffers[0].data_ptr() != numbers.data_ptr():
            self._buffers = (numbers[:1], numbers[1:])
        return self._buffers

    def reserve(self) -> tuple[Tensor, Tensor]:
        """The buffers, with room for one more token; not before the first `update`."""
        self._store.reserve(self.length + 1)
        return self.buffers

    @property
    def keys(self) -> Tensor | None:
        """``[1, H, L, D]``, where there are `buffers`."""
        return None if self.buffers is None else self.buffers[0][:, :, : self.length]

    @property
    def values(self) -> Tensor | None:
        """``[1, H, L, D]``, where there are `buffers`."""
        return None if self.buffers is None else self.buffers[1][:, :, : self.length]

    @keys.setter
    def keys(self, value: None) -> None:
        """transformers' class begins with none."""

    @values.setter
    def values(self, value: None) -> None:
        """As `keys`."""

    def get_seq_length(self) -> int:
        """Tokens so far, whether they are kept or not."""
        return self.length

    @property
    def stored_bytes(self) -> int:
        """Bytes of the buffers."""
        return self._store.stored_bytes + (self._values.stored_bytes if self._values is not None else 0)


class RowCache(DynamicCache):
    """The cache of one conversation: `RowLayer` where the model's layers are plain, else transformers' own."""

    def __init__(self, config: Any, keeping: Keeping = PLAIN):
        super().__init__(config=config)
        self._keeping = keeping
        if getattr(config, "kv_lora_rank", None) is None:  # DeepSeek's layers keep latent vectors
            self.layers = [
                RowLayer(keeping) if type(layer) is DynamicLayer else layer for layer in self.layers
            ]

    @property
    def is_plain(self) -> bool:
        """Whether it can be one of several rows: no windows of the model's own, no states of another kind."""
        return bool(self.layers) and all(type(layer) is RowLayer for layer in self.layers)

    @property
    def room(self) -> int:
        """The number of tokens that fit into the buffers."""
        return self._keeping.room(self.get_seq_length())

    @property
    def stored_bytes(self) -> int:
        """Bytes that this conversation's keys and values take."""
        return sum(layer.stored_bytes for layer in self.layers if isinstance(layer, RowLayer))


def keeps_rows(config: Any) -> bool:
    """Whether all layers of a model with this text configuration keep plain keys and values."""
    return RowCache(config).is_plain and config._attn_implementation in (None, "sdpa", ATTENTION)


class JoinedLayer(CacheLayerMixin):
    """One layer of several conversations; what `update` returns is understood by `attend_rows` alone."""

    is_sliding = False

    def __init__(self, rows: Sequence[RowLayer]):
        super().__init__()
        self._rows = rows
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the rows are there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Append one token a row, ``[B, H, 1, D]``; rows beyond the conversations are filling and are dropped."""
        kept = [
            row.update(key_states[index : index + 1], value_states[index : index + 1])
            for index, row in enumerate(self._rows)
        ]
        return [keys for keys, _ in kept], [values for _, values in kept]

    def get_seq_length(self) -> int:
        """Tokens of the longest conversation."""
        return max(row.get_seq_length() for row in self._rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of the longest conversation; no mask is made for one token a row."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Rows grow without a limit of their own."""
        return -1


class JoinedCache(Cache):
    """Several conversations' caches as one, for one decoding step."""

    def __init__(self, caches: Sequence[RowCache]):
        layers = zip(*(cache.layers for cache in caches))
        super().__init__(layers=[JoinedLayer(rows) for rows in layers])


def attend_rows(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | list[Tensor] | Band,
    value: Tensor | list[Tensor] | Band,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention; for the rows of a `JoinedCache`, one call a row.

    query ``[B, heads, 1, D]``, keys and values B lists' entries ``[1, groups, L_b, D]`` -> ``[B, 1, heads, D]``.
    Query heads that share keys are computed together, without repeating the keys.
    """
    if isinstance(key, Band):
        return attend_band(query, key, value, scaling), None
    if isinstance(key, Tensor):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if any(kwargs.get(name) is not None for name in _PLAIN):
        rows = [
            sdpa_attention_forward(module, query[i : i + 1], k, v, None, scaling=scaling, **kwargs)[0]
            for i, (k, v) in enumerate(zip(key, value))
        ]
    else:
        heads, width = query.shape[1], query.shape[3]
        rows = []
        for index, (k, v) in enumerate(zip(key, value)):
            grouped = query[index].view(1, k.shape[1], heads // k.shape[1], width)
            out = torch.nn.functional.scaled_dot_product_attention(grouped, k, v, scale=scaling)
            rows.append(out.reshape(1, 1, heads, -1))
    if missing := query.shape[0] - len(rows):
        rows.append(rows[0].new_zeros(missing, *rows[0].shape[1:]))
    return torch.cat(rows), None


AttentionInterface.register(ATTENTION, attend_rows)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_rows(model: torch.nn.Module) -> bool:
    """Let a model's decoder use `attend_rows`, where it can: SDPA attention, plain caches. Says whether it does."""
    config = model.config.get_text_config(decoder=True)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    # a family that does not ask for its attention by name would take this one's for eager attention (Falcon)
    plain = RowCache(config).is_plain and decoder._can_set_attn_implementation()
    if plain and config._attn_implementation == "sdpa":
        config._attn_implementation = ATTENTION
    return plain and config._attn_implementation == ATTENTION
