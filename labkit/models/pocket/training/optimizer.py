"""Optimizer steps: gradients in one buffer, averaged over processes; Muon for matrices inside layers, AdamW for the rest.

Muon (Jordan et al., 2024) is scaled so that its steps are as large as AdamW's (Liu et al., "Muon is scalable for LLM
training", 2025): one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import distributed, nn

SPEECH_RATE = 0.3  # the ear's learning rate in the joint training, relative to the rest
_LAYERS = ("layers.", "blocks.", "merger.")  # where matrices are Muon's


class Gradients:
    """The gradients of all parameters in one buffer, so that zeroing, averaging and clipping are one operation each."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        starts = [0]  # each on a multiple of 64 values, where vector loads are aligned
        for parameter in parameters:
            starts.append(starts[-1] + parameter.numel() + -parameter.numel() % 64)
        self.flat = torch.zeros(starts[-1], device=parameters[0].device)
        for parameter, start in zip(parameters, starts):
            parameter.grad = self.flat[start : start + parameter.numel()].view_as(parameter)

    def settle(self, longest: float = 1.0) -> torch.Tensor:
        """Averages over all processes and clips to a norm of `longest`; returns the norm before."""
        if distributed.is_initialized():
            distributed.all_reduce(self.flat)
            self.flat /= distributed.get_world_size()
        norm = self.flat.norm()
        self.flat *= (longest / (norm + 1e-6)).clamp(max=1.0)
        return norm


def make_optimizers(
    named: Iterable[tuple[str, nn.Parameter]], rate: float, device: torch.device
) -> list[torch.optim.Optimizer]:
    """Muon and AdamW over named parameters; the ear of a whole model (`model.speech.`) at SPEECH_RATE."""
    groups: dict[str, dict[tuple[bool, float], list]] = {"muon": {}, "adamw": {}}
    for name, parameter in named:
        kind = "muon" if parameter.ndim == 2 and any(part in name for part in _LAYERS) else "adamw"
        scale = SPEECH_RATE if name.startswith("model.speech.") else 1.0
        groups[kind].setdefault((parameter.ndim >= 2, scale), []).append(parameter)

    def listed(kind: str) -> list[dict]:
        return [
            {"params": parameters, "weight_decay": 0.05 if matrix else 0.0, "rate": rate * scale}
            for (matrix, scale), parameters in groups[kind].items()
        ]

    muon = torch.optim.Muon(listed("muon"), lr=rate, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(listed("adamw"), lr=rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    return [muon, adamw]


def step_all(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """One step of each at `factor` times its learning rates."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        optimizer.step()
