"""One decoding step of a few rows: products, and between them the kernels of `labkit.engine.step_gpu.kernels`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from labkit.engine.kv_cache import PLAIN, SCALE_DTYPE, SINKS, Keeping
from labkit.engine.step_gpu.cache import Storage
from labkit.engine.step_gpu.decoder import Decoder, Layer
from labkit.engine.step_gpu.products import ModuleProduct, Product, product_of
from labkit.quantization.kernels.cuda_products import interpreted

SHARES = 64
"""Programs that attend to one row's tokens for one group of heads; each takes at least `TOKENS` of them."""
TOKENS = 64


@dataclass(frozen=True)
class Products:
    """A decoder's products: of each layer q, k and v together, o, gate and up together, down; and the head."""

    layers: tuple[tuple[Product, Product, Product, Product], ...]
    head: Product

    @classmethod
    def of(cls, decoder: Decoder, kernels: bool = True) -> Products:
        """Made once for a model: joins weights, and measures tile sizes that are not known yet on this device.

        kernels: where they know a weight's format; without, all modules are called as they are.
        """

        def make(*modules: nn.Module, gated: bool = False) -> Product:
            if not kernels:
                return ModuleProduct(*modules)
            return product_of(*modules, dtype=decoder.dtype, gated=gated)

        def of_layer(layer: Layer) -> tuple[Product, Product, Product, Product]:
            return make(*layer.qkv), make(layer.o), make(layer.gate_up, gated=True), make(layer.down)

        return cls(tuple(map(of_layer, decoder.layers)), make(decoder.head))


class Operations(Protocol):
    """The work between two products, for some rows: `KernelOperations`, or plain torch in `reference.py`."""

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [M, hidden], normed."""

    def add_norm(
        self, parts: Tensor, residual: Tensor, post: Tensor, following: Tensor
    ) -> tuple[Tensor, Tensor]:
        """parts [splits, M, hidden] of a product, normed and added to the residual; and that normed."""

    def rotate(self, parts: Tensor, bias: Tensor | None, layer: int) -> Tensor:
        """parts [splits, M, ...] of q, k and v -> queries [M, heads, D]; keys and values go into the caches."""

    def attend(self, query: Tensor, layer: int) -> Tensor:
        """query [M, heads, D] -> [M, heads * D]."""

    def finish(self) -> None:
        """After the last layer: rows that live have one token more."""


def decode(decoder: Decoder, products: Products, operations: Operations, tokens: Tensor) -> Tensor:
    """Append one token to each row, ``tokens [M]``; returns the logits after it, fp32 ``[M, vocabulary]``."""
    hidden = decoder.embed(tokens)
    layers = decoder.layers
    following = [layer.before_attention for layer in layers[1:]] + [decoder.last_norm]
    x = operations.norm(hidden, layers[0].before_attention)
    for index, (layer, (qkv, o, gate_up, down)) in enumerate(zip(layers, products.layers)):
        query = operations.rotate(qkv.parts(x), qkv.bias, index)
        attended = operations.attend(query, index)
        hidden, x = operations.add_norm(o.parts(attended), hidden, layer.after_attention, layer.before_mlp)
        hidden, x = operations.add_norm(
            down.parts(gate_up.gated(x)), hidden, layer.after_mlp, following[index]
        )
    operations.finish()
    return products.head.sums(x)


class KernelOperations:
    """The kernels over static buffers for ``rows`` rows.

    Attributes:
        state: int64 [5, rows], what the kernels know of the rows: see `labkit.engine.step_gpu.kernels`.
    """

    def __init__(self, decoder: Decoder, rows: int, keeping: Keeping = PLAIN):
        self._decoder, self._rows = decoder, rows
        self._native = not interpreted()
        device, dtype = decoder.device, decoder.dtype
        self.state = torch.zeros(5, rows, dtype=torch.int64, device=device)
        kept = torch.int8 if keeping.int8 else keeping.dtype or dtype
        self._anchor = torch.zeros(64, dtype=kept, device=device)  # where addresses are counted from
        self._scales = torch.zeros(64, dtype=SCALE_DTYPE, device=device)  # and those of scales
        self._kept = {"WINDOW": keeping.window or 0, "SINKS": SINKS}
        heads = (rows, decoder.heads)
        self._acc = torch.empty(*heads, SHARES, decoder.head_dim, dtype=torch.float32, device=device)
        self._stats = torch.empty(2, *heads, SHARES, dtype=torch.float32, device=device)

    def addresses(self, cache: Storage) -> tuple[int, int]:
        """Where a cache's numbers and its scales begin, as `state` has them; 0 for scales that are not there."""
        return _from(self._anchor, cache.buffer), 0 if cache.scales is None else _from(
            self._scales, cache.scales
        )

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [M, hidden], normed."""
        return self._add_norm(x[None], x, weight, weight, True)[1]

    def add_norm(
        self, parts: Tensor, residual: Tensor, post: Tensor, following: Tensor
    ) -> tuple[Tensor, Tensor]:
        """parts [splits, M, hidden] of a product, normed and added to the residual; and that normed."""
        return self._add_norm(parts, residual, post, following, False)

    def _add_norm(
        self, parts: Tensor, residual: Tensor, post: Tensor, following: Tensor, first: bool
    ) -> tuple[Tensor, Tensor]:
        from labkit.engine.step_gpu import kernels

        rows, size = residual.shape
        block = _power(size)
        total, out = torch.empty_like(residual), torch.empty_like(residual)
        kernels.add_norm[(rows,)](
            parts, residual, post, following, total, out, rows, size, self._decoder.eps,
            SPLITS=parts.shape[0], FIRST=first, BLOCK=block, num_warps=min(max(block // 256, 1), 16),
        )  # fmt: skip
        return total, out

    def rotate(self, parts: Tensor, bias: Tensor | None, layer: int) -> Tensor:
        """parts [splits, M, ...] of q, k and v -> queries [M, heads, D]; keys and values go into the caches."""
        from labkit.engine.step_gpu import kernels

        decoder, rows = self._decoder, self._rows
        query = torch.empty(rows, decoder.heads, decoder.head_dim, dtype=decoder.dtype, device=decoder.device)
        offset = decoder.last_norm if bias is None else bias
        kernels.rotate[(rows, decoder.heads + 2 * decoder.groups)](
            parts, offset, decoder.frequency, self.state, self._anchor, self._scales, query, rows, layer,
            HEADS=decoder.heads, GROUPS=decoder.groups, D=decoder.head_dim, ROTATED=decoder.rotated,
            SPLITS=parts.shape[0], BIAS=bias is not None, **self._kept, num_warps=1,
        )  # fmt: skip
        return query

    def attend(self, query: Tensor, layer: int) -> Tensor:
        """query [M, heads, D] -> [M, heads * D]."""
        from labkit.engine.step_gpu import kernels

        decoder, rows = self._decoder, self._rows
        sizes: dict[str, Any] = {
            "HEADS": decoder.heads,
            "D": decoder.head_dim,
            "SHARES": SHARES,
            "BT": TOKENS,
            **self._kept,
        }
        kernels.attend[(rows, decoder.groups, SHARES)](
            query, self.state, self._anchor, self._scales, self._acc, self._stats, rows, layer, decoder.scaling,
            GROUPS=decoder.groups, BH=max(_power(decoder.heads // decoder.groups), 16), NATIVE=self._native,
            num_warps=4, **sizes,
        )  # fmt: skip
        out = torch.empty_like(query)
        kernels.combine[(rows, decoder.heads)](self._acc, self._stats, self.state, out, rows, **sizes)
        return out.view(rows, -1)

    def finish(self) -> None:
        """After the last layer: rows that live have one token more."""
        from labkit.engine.step_gpu import kernels

        kernels.advance[(1,)](self.state, self._rows, BM=_power(self._rows))


def _from(anchor: Tensor, buffer: Tensor) -> int:
    """How far a buffer is from an anchor of its type, in values."""
    return (buffer.data_ptr() - anchor.data_ptr()) // buffer.element_size()


def _power(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << (number - 1).bit_length()


def capture(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of ``call``, which is run before, and what its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out
