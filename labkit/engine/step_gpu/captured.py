"""The captured decoding step, for models and devices that can have one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from labkit.engine.kv_cache import PLAIN, Keeping
from labkit.engine.step import PADDED_ROWS, Row, StepUnavailableError, likeliest
from labkit.engine.step_gpu.cache import StaticCache, Storage
from labkit.engine.step_gpu.decoder import Decoder, Layer, UnknownDecoderError, decoder_of
from labkit.engine.step_gpu.products import KernelProduct
from labkit.engine.step_gpu.reference import TorchOperations
from labkit.engine.step_gpu.step import KernelOperations, Products, capture, decode
from labkit.quantization.int4 import Int4Linear
from labkit.quantization.int8 import Int8Linear
from labkit.quantization.kernels.cuda_products import available, on
from labkit.quantization.nf4 import NF4Linear

CAPTURED = (nn.Linear, nn.Embedding, Int4Linear, Int8Linear, NF4Linear)
"""Modules whose products never look at a value on the host, so that a graph can hold them."""


def why_not(model: nn.Module) -> str | None:
    """Why a model cannot decode by a captured step here; None if it can."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return "a captured step is for GPUs"
    if not available(device):
        return "there is no triton, or the GPU is older than Ampere"
    try:
        decoder = decoder_of(model)
    except UnknownDecoderError as error:
        return str(error)
    for module in _modules(decoder):
        if not isinstance(module, CAPTURED):
            return f"a {type(module).__name__} looks at its inputs on the host, which cannot be captured"
    return None


class CapturedStep:
    """A step of a few kernels a layer, captured for one row and for eight: a `labkit.engine.step.Step`.

    Args:
        model: one that `decoder_of` knows.
        keeping: how its caches are kept.
        plain: no kernels and no graph: the step's operations in plain torch, row by row, on any device.
    """

    def __init__(self, model: nn.Module, keeping: Keeping = PLAIN, plain: bool = False):
        self.route = "plain torch, row by row" if plain else "one CUDA graph a token"
        self._keeping = keeping
        self._plain = plain
        self._decoder = decoder_of(model)
        self._products: Products | None = None
        self._steps: dict[int, _Step] = {}
        self._failed = False  # to capture the step

    def new_cache(self) -> StaticCache:
        """As `labkit.engine.step.Step.new_cache`."""
        return StaticCache(len(self._decoder.layers), self._keeping)

    def takes(self, row: Row) -> bool:
        """As `labkit.engine.step.Step.takes`."""
        return not self._failed and isinstance(row.cache, StaticCache)

    def step(self, rows: Sequence[Row], tokens: Tensor, alone: bool = False) -> Tensor:
        """As `labkit.engine.step.Step.step`."""
        parts = [slice(start, start + PADDED_ROWS) for start in range(0, len(rows), PADDED_ROWS)]
        for part in parts:  # what cannot be captured shows before any row has its token
            self._capture(self._size(len(rows[part]), alone))
        if len(parts) == 1:
            return self._decode(rows, tokens, alone)
        return torch.cat([self._decode(rows[part], tokens[part], alone).clone() for part in parts])

    def likeliest(self, logits: Tensor) -> tuple[list[float], Tensor]:
        """As `labkit.engine.step.likeliest`."""
        return likeliest(logits)

    def _decode(self, rows: Sequence[Row], tokens: Tensor, alone: bool) -> Tensor:
        """Up to `PADDED_ROWS` rows."""
        for row in rows:
            row.cache.storage.reserve(row.length + 1)
        if self._plain:
            operations = TorchOperations(
                self._decoder, [row.cache.storage for row in rows], [row.position + 1 for row in rows]
            )
            logits = decode(self._decoder, self.products, operations, tokens)
        else:
            with on(self._decoder.last_norm):
                logits = self._steps[self._size(len(rows), alone)](rows, tokens)
            for row in rows:
                row.cache.storage.length += 1
        for row in rows:
            row.advance_by_step()
        return logits

    def _size(self, rows: int, alone: bool) -> int:
        """The rows of the step that takes so many."""
        return 1 if rows == 1 and (alone or self.together) else PADDED_ROWS

    def _capture(self, size: int) -> None:
        if self._plain or size in self._steps:
            return
        try:
            with on(self._decoder.last_norm):
                self._steps[size] = _Step(self._decoder, self._keeping, self.products, size)
        except RuntimeError as error:
            self._failed = True
            self.route = f"the model's own modules: the step cannot be captured ({error})".splitlines()[0]
            raise StepUnavailableError(self.route) from error

    @property
    def products(self) -> Products:
        """The decoder's products; made at the first call, which may measure tile sizes."""
        if self._products is None:
            with on(self._decoder.last_norm):
                self._products = Products.of(self._decoder, kernels=not self._plain)
        return self._products

    @property
    def together(self) -> bool:
        """Whether rows may be multiplied in any number: all products are kernels', whose tile is always eight rows."""
        products = [product for layer in self.products.layers for product in layer] + [self.products.head]
        return all(isinstance(product, KernelProduct) for product in products)


class _Step:
    """A step for a fixed number of rows: captured on a GPU, called elsewhere (under Triton's interpreter)."""

    def __init__(self, decoder: Decoder, keeping: Keeping, products: Products, size: int):
        self._operations = KernelOperations(decoder, size, keeping)
        self._tokens = torch.zeros(size, dtype=torch.int64, device=decoder.device)
        self._filling = Storage(len(decoder.layers), keeping)
        vector = torch.empty(
            (1, decoder.groups, 1, decoder.head_dim), dtype=decoder.dtype, device=decoder.device
        )
        self._filling.allocate(1, vector)
        self._size = size
        self._known: list[tuple[int, ...]] = []  # what the device holds of the rows
        self._upload([])
        self._call = lambda: decode(decoder, products, self._operations, self._tokens)
        self._graph = None
        if decoder.device.type == "cuda":
            self._graph, self._logits = capture(self._call)

    def __call__(self, rows: Sequence[Row], tokens: Tensor) -> Tensor:
        """Logits ``[B, vocabulary]`` after one token more in each row, ``tokens [B]``."""
        wanted = [self._entry(row.cache.storage, row.position + 1) for row in rows]
        if wanted != self._known:
            self._upload(wanted)
        self._tokens[: len(rows)].copy_(tokens)
        if self._graph is None:
            self._logits = self._call()
        else:
            self._graph.replay()
        self._known = [
            (at, room, length + 1, position + 1, scales) for at, room, length, position, scales in wanted
        ]
        return self._logits[: len(rows)]

    def _upload(self, rows: list[tuple[int, ...]]) -> None:
        filling = self._entry(self._filling, 0)
        lines = [*rows, *[filling] * (self._size - len(rows))]
        self._operations.state.copy_(torch.tensor(lines, dtype=torch.int64, device="cpu").T)
        self._known = rows

    def _entry(self, storage: Storage, position: int) -> tuple[int, ...]:
        at, scales = self._operations.addresses(storage)
        return at, storage.capacity, storage.length, position, scales


def captured_step(model: nn.Module, keeping: Keeping = PLAIN) -> tuple[CapturedStep | None, str]:
    """The captured step of a model; or None, and the reason."""
    reason = why_not(model)
    return (CapturedStep(model, keeping), "") if reason is None else (None, reason)


def _modules(decoder: Decoder) -> list[nn.Module]:
    def of_layer(layer: Layer) -> tuple[nn.Module, ...]:
        return *layer.qkv, layer.o, layer.gate_up, layer.down

    return [decoder.embed, decoder.head, *(module for layer in decoder.layers for module in of_layer(layer))]
