"""One decoding step on the CPU without torch's calls in between: hundreds of small ones, which take most of the time.

The compiled library reads the weights as the schemes store them, and keys and values from the same `RowCache`.
Values are rounded where torch would have stored them, so both ways give the same answers up to the order of sums.

What can be described: Llama, Qwen2, Mistral and Glm4v decoders with SiLU, whose Linears are dense, int8, or int4
in blocks (int4, gptq, hqq). Anything else, hooks included, stays with torch.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from labkit.common.errors import LabError
from labkit.engine.kv_cache import PLAIN, Keeping
from labkit.engine.row_cache import RowCache, RowLayer, keeps_rows
from labkit.engine.step import Row, likeliest
from labkit.engine.step_cpu.decoder import describe_decoder, rotate
from labkit.quantization.native import library as native

COMPILED = "compiled for the processor"
TABLE_GROWTH = 512  # positions


@dataclass
class RowPointers:
    """The library's view of one conversation: pointers to its keys and values, which change as these grow.

    Attributes:
        owner: the step that checked the cache.
        buffers: the first layer's, to which the pointers belong.
        room: tokens that fit into them.
    """

    owner: CompiledStep
    keys: ctypes.Array
    values: ctypes.Array
    buffers: tuple[Tensor, Tensor] | None = None
    room: int = 0


class CompiledStep:
    """A decoder on the CPU, computed by the compiled library: a `labkit.engine.step.Step`.

    Args:
        model, keeping: as `labkit.engine.forward.Forward` takes them.

    Raises:
        LabError: a decoder, a Linear, a cache or a device that the library does not know; names it.
        NativeError: there is no library.
    """

    route = COMPILED

    def __init__(self, model: nn.Module, keeping: Keeping = PLAIN):
        self._config = model.config.get_text_config(decoder=True)
        if not keeps_rows(self._config):
            raise LabError("its caches are not plain")
        if keeping != PLAIN:
            raise LabError("its cache is not kept as it comes")
        self._described, self._weights = describe_decoder(model)
        self._decoder = model.get_decoder()
        self._lock = threading.Lock()
        self._cosine = self._sine = torch.empty(0, dtype=torch.float32, device="cpu")
        self._library = native.library()

    def new_cache(self) -> RowCache:
        """As `labkit.engine.step.Step.new_cache`."""
        return RowCache(self._config)

    def takes(self, row: Row) -> bool:
        """As `labkit.engine.step.Step.takes`: a row with a plain cache of the model's dtype."""
        if row.state is None or row.state.owner is not self:
            cache = row.cache
            if type(cache) is not RowCache or not cache.is_plain or not self._fits(cache):
                return False
            row.state = RowPointers(self, _pointers(cache, 0), _pointers(cache, 1))
        return True

    def _fits(self, cache: RowCache) -> bool:
        """Whether the library can read and write the cache: its layers, their dtype and sizes."""
        model = self._described
        sizes = (1, model.key_heads, model.head_width)
        return len(cache.layers) == model.layers and all(
            layer.buffers is not None
            and all(
                part.dtype == self._weights.dtype
                and (*part.shape[:2], part.shape[3]) == sizes
                and part.is_contiguous()
                for part in layer.buffers
            )
            for layer in cache.layers
        )

    def step(self, rows: Sequence[Row], tokens: Tensor, alone: bool = False) -> Tensor:
        """Append one token to each row, ``tokens [B]`` int64; logits ``[B, vocabulary]`` fp32.

        Raises:
            IndexError: a token that the embedding does not have; nothing is appended.
        """
        model, numbers = self._described, tokens.tolist()
        for token in numbers:
            if not 0 <= token < self._weights.embeddings:  # the library reads its embedding unchecked
                raise IndexError(f"the token {token} is not one of {self._weights.embeddings}")
        with self._lock:
            self._extend_table(max(row.position for row in rows) + 1)  # before any row points into it
            described = (native.Row * len(rows))()
            for target, row, token in zip(described, rows, numbers):
                self._append(target, row, token)
            logits = torch.empty(len(rows), model.vocabulary, dtype=torch.float32, device="cpu")
            pointer = native.pointer(logits, torch.float32, len(rows), model.vocabulary)
            self._library.step(model, described, len(rows), pointer, torch.get_num_threads())
        return logits

    def likeliest(self, logits: Tensor) -> tuple[list[float], Tensor]:
        """As `labkit.engine.step.likeliest`."""
        if logits.dtype != torch.float32 or logits.device.type != "cpu":
            return likeliest(logits)
        logits = logits.contiguous()
        count, vocabulary = logits.shape
        largest = (ctypes.c_float * count)()
        tokens = torch.empty(count, dtype=torch.int64, device="cpu")
        self._library.largest(
            native.pointer(logits, torch.float32, count, vocabulary),
            count,
            vocabulary,
            largest,
            native.pointer(tokens, torch.int64, count),
        )
        return list(largest), tokens

    def _append(self, target: native.Row, row: Row, token: int) -> None:
        layers, state = row.cache.layers, row.state
        length = layers[0].length
        if layers[0].buffers is not state.buffers or length == state.room:
            for layer in layers:
                layer.reserve()
            state.keys, state.values = _pointers(row.cache, 0), _pointers(row.cache, 1)
            state.buffers, state.room = layers[0].buffers, layers[0].buffers[0].shape[-2]
        row.advance_by_step()
        offset = row.position * self._described.rotary * torch.float32.itemsize
        target.cosine, target.sine = self._cosine.data_ptr() + offset, self._sine.data_ptr() + offset
        target.keys, target.values = ctypes.addressof(state.keys), ctypes.addressof(state.values)
        target.length, target.room, target.token = length, state.room, token
        for layer in layers:
            layer.length = length + 1

    def _extend_table(self, position: int) -> None:
        """Cosines and sines of the positions up to this one and some more, fp32 [P, R]."""
        if position < len(self._cosine):
            return
        count = (position // TABLE_GROWTH + 1) * TABLE_GROWTH
        positions = torch.arange(count, dtype=torch.int64, device="cpu")[None]
        turns = rotate(self._decoder, positions, self._weights.dtype)
        self._cosine, self._sine = (part[0].float().contiguous() for part in turns)


def compiled_step(model: nn.Module, keeping: Keeping = PLAIN) -> tuple[CompiledStep | None, str]:
    """The compiled step of a model; or None, and the reason."""
    try:
        return CompiledStep(model, keeping), ""
    except LabError as error:
        return None, str(error)


def _pointers(cache: RowCache, index: int) -> ctypes.Array:
    """Of each layer's keys (0) or values (1)."""
    layers: list[RowLayer] = cache.layers
    return (ctypes.c_void_p * len(layers))(*(layer.buffers[index].data_ptr() for layer in layers))
