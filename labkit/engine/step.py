"""What a conversation keeps between two tokens, and what a decoding step beside the model's own modules offers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

PADDED_ROWS = 8
"""Rows that are always multiplied together where a product's rounding depends on their number."""


class ConversationCache(Protocol):
    """The keys and values of one conversation."""

    layers: Sequence[Any]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the buffers."""

    @property
    def room(self) -> int:
        """The number of tokens that fit into the buffers."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, whether they are kept or not."""


@dataclass
class Row:
    """One conversation between two tokens.

    Attributes:
        cache: its keys and values.
        positions: of the last token that the model's own modules took, ``[…, 1, 1]`` as the model takes them; None
            where the model counts itself.
        mask: the tokens that it may see, ``[1, L]``, where the model needs to be told.
        position: of its last token, where that is one number for all of the model's axes and a `Step` was there.
        ahead: tokens that a `Step` has taken since ``positions`` was counted.
        state: what the `Step` stores here.
    """

    cache: ConversationCache
    positions: Tensor | None
    mask: Tensor | None
    position: int | None = None
    ahead: int = 0
    state: object = None

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.cache.get_seq_length()

    def advance(self) -> None:
        """The model's own modules take the next token."""
        self.state = None
        if self.positions is not None:
            self.positions = self.positions + (1 + self.ahead)
        self.ahead = 0
        if self.position is not None:
            self.position += 1

    def advance_by_step(self) -> None:
        """A `Step` takes the next token: no tensor changes."""
        self.position += 1
        self.ahead += 1


class Step(Protocol):
    """A decoding step that takes the place of the model's own modules; prefill goes through those.

    It belongs to one model and keeps nothing of a conversation: that is in the `Row`. A row's logits do not depend on
    the rows beside it, and it may go on by the model's modules after any token.

    Attributes:
        route: the name of the step, for records.
    """

    route: str

    def new_cache(self) -> ConversationCache:
        """An empty cache, which the model's own modules can fill."""

    def takes(self, row: Row) -> bool:
        """Whether it can go on with a row that has a ``position`` and no ``mask``."""

    def step(self, rows: Sequence[Row], tokens: Tensor, alone: bool = False) -> Tensor:
        """As `labkit.engine.forward.Forward.step`. The next call may overwrite what it returns.

        Raises:
            StepUnavailableError: it cannot be had on this device. Nothing is appended, and it takes no row from now on.
        """

    def likeliest(self, logits: Tensor) -> tuple[list[float], Tensor]:
        """As the function `likeliest`."""


class StepUnavailableError(Exception):
    """A step turns out to be impossible when it is first needed."""


def likeliest(logits: Tensor) -> tuple[list[float], Tensor]:
    """The largest number of each row of ``logits [B, vocabulary]``, NaN if there is any, and its place ``[B]``, the
    first of several. Waits for the GPU."""
    best, tokens = logits.max(dim=-1)
    return best.tolist(), tokens


def decoder_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that a `Step` replaces."""
    yield from model.get_decoder().modules()
    ends = model.get_output_embeddings(), model.get_input_embeddings()
    yield from (module for module in ends if module is not None)


def is_watched(module: nn.Module) -> bool:
    """Whether someone wants to see or change what a module computes: by hooks, or by a forward of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def signature(model: nn.Module) -> tuple[tuple[object, ...], ...]:
    """Changes when a module of the decoder or the head is replaced, moved, or hooked."""
    if not hasattr(model, "get_decoder"):
        return ()
    return tuple(
        (
            id(module),
            is_watched(module),
            *(
                _place(tensor)
                for tensor in (*module._parameters.values(), *module._buffers.values())
                if tensor is not None
            ),
        )
        for module in decoder_modules(model)
    )


def _place(tensor: Tensor) -> object:
    if tensor.device.type == "cpu":
        return tensor.data_ptr()
    return tensor.device, tensor.dtype  # the captured step moves weights itself: it lays several side by side
