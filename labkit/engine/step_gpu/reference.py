"""The operations between a step's products in plain torch, as transformers' modules have them, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.models.glm4v.modeling_glm4v import apply_rotary_pos_emb

from labkit.engine.step_gpu.cache import Storage
from labkit.engine.step_gpu.decoder import Decoder


class TorchOperations:
    """What `labkit.engine.step_gpu.step.KernelOperations` does, for some rows: their caches and next positions."""

    def __init__(self, decoder: Decoder, caches: Sequence[Storage], positions: Sequence[int]):
        self._decoder, self._caches = decoder, caches
        for cache in caches:
            cache.reserve(cache.length + 1)
        angles = (
            torch.tensor(positions, dtype=torch.float32, device=decoder.device)[:, None] * decoder.frequency
        )
        turns = [turn.repeat_interleave(2, -1).to(decoder.dtype) for turn in (angles.cos(), angles.sin())]
        self._cosine, self._sine = turns  # [M, rotated]

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [M, hidden], normed."""
        values = x.float()
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self._decoder.eps)
        return weight * values.to(x.dtype)

    def add_norm(
        self, parts: Tensor, residual: Tensor, post: Tensor, following: Tensor
    ) -> tuple[Tensor, Tensor]:
        """parts [splits, M, hidden] of a product, normed and added to the residual; and that normed."""
        total = residual + self.norm(_sum(parts, residual.dtype), post)
        return total, self.norm(total, following)

    def rotate(self, parts: Tensor, bias: Tensor | None, layer: int) -> Tensor:
        """parts [splits, M, ...] of q, k and v -> queries [M, heads, D]; keys and values go into the caches."""
        decoder = self._decoder
        values = _sum(parts, decoder.dtype)
        values = values if bias is None else values + bias
        heads = values.unflatten(-1, (-1, decoder.head_dim))
        query, key, value = heads.split((decoder.heads, decoder.groups, decoder.groups), 1)
        query, key = apply_rotary_pos_emb(query, key, self._cosine, self._sine, unsqueeze_dim=1)
        for index, cache in enumerate(self._caches):
            cache.write(layer, key[index, :, None], value[index, :, None], cache.length)
        return query

    def attend(self, query: Tensor, layer: int) -> Tensor:
        """query [M, heads, D] -> [M, heads * D]."""
        decoder = self._decoder
        outs = []
        for row, cache in zip(query, self._caches):
            keys, values = (kept[None] for kept in cache.read(layer, cache.length + 1, decoder.dtype))
            grouped = row.view(1, decoder.groups, -1, decoder.head_dim)
            out = torch.nn.functional.scaled_dot_product_attention(
                grouped, keys, values, scale=decoder.scaling
            )
            outs.append(out.reshape(-1))
        return torch.stack(outs)

    def finish(self) -> None:
        """After the last layer: the rows have one token more."""
        for cache in self._caches:
            cache.length += 1


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0].to(dtype) if parts.shape[0] == 1 else parts.sum(0).to(dtype)
