"""Modules whose codes, scales and tables keep their dtypes when a model is cast."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class FixedDtypes:
    """Mixed into a module: its buffers keep their dtypes, because products read each in one dtype only.

    ``model.half()``, ``model.to(dtype)`` and the like cast parameters (the bias), and `dtype` follows them; a move to
    another device moves all. A state dictionary whose tensors were cast is refused.
    """

    dtype: torch.dtype  # of dequantized weights

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def apply_to(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # `type` casts integers too, so the codes need this as much as the scales
            keeps = isinstance(tensor, nn.Parameter) or moved.dtype == tensor.dtype
            return moved if keeps else tensor.to(moved.device)

        super()._apply(apply_to, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        cast = [
            f"{prefix}{name} is {state_dict[prefix + name].dtype}, not {buffer.dtype}: the tensors of a quantized "
            "module cannot be cast"
            for name, buffer in self._buffers.items()
            if buffer is not None and state_dict.get(prefix + name, buffer).dtype != buffer.dtype
        ]
        if cast:
            error_msgs += cast
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
