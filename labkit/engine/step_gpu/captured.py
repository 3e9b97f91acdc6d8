"""A model's passes with a captured decoding step: `labkit.engine.forward.Forward` for models and devices that have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labkit.engine.forward import PADDED_ROWS, Forward, Row
from labkit.engine.kv_cache import Keeping
from labkit.engine.own_way import has_own_way, plain_forward
from labkit.engine.row_cache import PLAIN
from labkit.engine.step_gpu.cache import StaticCache, Storage
from labkit.engine.step_gpu.decoder import Decoder, Layer, UnknownDecoderError, decoder_of
from labkit.engine.step_gpu.products import KernelProduct
from labkit.engine.step_gpu.reference import TorchOperations
from labkit.engine.step_gpu.step import KernelOperations, Products, capture, decode
from labkit.engine.trial import try_family
from labkit.quantization.int4 import Int4Linear
from labkit.quantization.int8 import Int8Linear
from labkit.quantization.kernels.cuda_products import available, on
from labkit.quantization.nf4 import NF4Linear

CAPTURED = (nn.Linear, nn.Embedding, Int4Linear, Int8Linear, NF4Linear)
"""Modules whose products never look at a value on the host, so that a graph can hold them."""


@dataclass
class StaticRow(Row):
    """A conversation whose cache the captured step writes.

    Attributes:
        position: of its last token, the same in all of the model's grids.
    """

    position: int = 0


def forward_of(model: nn.Module, keeping: Keeping = PLAIN) -> Forward:
    """The passes of a model: with a captured step where there can be one, else through the model's own modules.

    ``keeping`` says how its cache is kept; ``route`` of what is returned, which of the two it is, and why.
    """
    if has_own_way(type(model)):
        return plain_forward(model, keeping)
    reason = why_not(model)
    if reason is None:
        return StaticForward(model, keeping)
    forward = plain_forward(model, keeping, try_family(type(model), model.config).joins)
    forward.route = f"the model's own modules: {reason}"
    return forward


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


class StaticForward(Forward):
    """Passes with a step of a few kernels a layer, captured for one row and for eight.

    Prefill goes through the model's own modules into a `StaticCache`; so do, token by token, conversations that are
    not plain (a padded prompt). A row's logits do not depend on its company: see `Forward`.

    Args:
        model: one that `decoder_of` knows.
        keeping: how its caches are kept.
        plain: no kernels and no graph: the step's operations in plain torch, row by row, on any device.
    """

    def __init__(self, model: nn.Module, keeping: Keeping = PLAIN, plain: bool = False):
        super().__init__(model, keeping)
        self.native = None
        self.route = "plain torch, row by row" if plain else "one CUDA graph a token"
        self._plain = plain
        self._decoder = decoder_of(model)
        self._products: Products | None = None
        self._steps: dict[int, _Step] = {}
        self._failed = False  # to capture the step

    @torch.inference_mode()
    def prefill(self, inputs: Mapping[str, Tensor]) -> tuple[Row, Tensor]:
        """As `Forward.prefill`."""
        row, logits = super().prefill(inputs)
        if row.mask is None and row.positions is not None:
            positions = set(row.positions.flatten()[-3:].tolist())
            if len(positions) == 1:
                row = StaticRow(row.cache, row.positions, None, position=positions.pop())
        return row, logits

    @torch.inference_mode()
    def step(self, rows: Sequence[Row], tokens: Tensor, alone: bool = False) -> Tensor:
        """As `Forward.step`. What it returns may be overwritten by the next step."""
        if self._failed or not all(isinstance(row, StaticRow) for row in rows):
            parts = [self._step_of_any(row, tokens[i : i + 1], alone).clone() for i, row in enumerate(rows)]
            return torch.cat(parts)
        if len(rows) <= PADDED_ROWS:
            return self._decode(rows, tokens, alone)
        starts = range(0, len(rows), PADDED_ROWS)
        return torch.cat(
            [
                self._decode(rows[at : at + PADDED_ROWS], tokens[at : at + PADDED_ROWS], alone).clone()
                for at in starts
            ]
        )

    def _step_of_any(self, row: Row, token: Tensor, alone: bool) -> Tensor:
        """One row, by the captured step if it is one of that."""
        if not isinstance(row, StaticRow):
            return self._step(row, token)
        if not self._failed:
            return self._decode([row], token, alone)
        logits = self._step(Row(row.cache, torch.full_like(row.positions, row.position), None), token)
        row.position += 1
        return logits

    def _decode(self, rows: Sequence[StaticRow], tokens: Tensor, alone: bool) -> Tensor:
        """Up to `PADDED_ROWS` rows."""
        for row in rows:
            row.cache.storage.reserve(row.length + 1)
        products = self.products
        if self._plain:
            operations = TorchOperations(
                self._decoder, [row.cache.storage for row in rows], [row.position + 1 for row in rows]
            )
            logits = decode(self._decoder, products, operations, tokens)
        else:
            single = len(rows) == 1 and (alone or self.together)
            size = 1 if single else PADDED_ROWS
            if size not in self._steps:
                try:
                    with on(self._decoder.last_norm):
                        self._steps[size] = _Step(self._decoder, self._keeping, products, size)
                except RuntimeError as error:
                    self._failed = True
                    self.route = (
                        f"the model's own modules: the step cannot be captured ({error})".splitlines()[0]
                    )
                    return self.step(rows, tokens, alone)
            with on(self._decoder.last_norm):
                logits = self._steps[size](rows, tokens)
            for row in rows:
                row.cache.storage.length += 1
        for row in rows:
            row.position += 1
        return logits

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
        found = [product for layer in self.products.layers for product in layer] + [self.products.head]
        return all(isinstance(product, KernelProduct) for product in found)

    def new_cache(self) -> Any:
        """As `Forward.new_cache`."""
        return StaticCache(len(self._decoder.layers), self._keeping)

    def room(self, row: Row) -> int:
        """As `Forward.room`."""
        return row.cache.storage.capacity


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

    def __call__(self, rows: Sequence[StaticRow], tokens: Tensor) -> Tensor:
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
        self._operations.state.copy_(torch.tensor(lines, dtype=torch.int64).T)
        self._known = rows

    def _entry(self, storage: Storage, position: int) -> tuple[int, ...]:
        at, scales = self._operations.addresses(storage)
        return at, storage.capacity, storage.length, position, scales


def _modules(decoder: Decoder) -> list[nn.Module]:
    def of_layer(layer: Layer) -> tuple[nn.Module, ...]:
        return *layer.qkv, layer.o, layer.gate_up, layer.down

    return [decoder.embed, decoder.head, *(module for layer in decoder.layers for module in of_layer(layer))]
