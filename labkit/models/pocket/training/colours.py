"""Other colours for training screens, on their device: order of channels, brightness, contrast, negatives, softness.

What is written where does not change, so that the eye cannot rely on the palettes that training draws with.
"""

from __future__ import annotations

import torch

GAIN, OFFSET, TINT = (0.75, 1.2), 24.0, 0.08
NEGATIVE, SOFT = 0.1, 0.3  # how often


def vary_colours(pixels: torch.Tensor, generator: torch.Generator, change=None) -> torch.Tensor:
    """Screens uint8 [B, H, W, 3] -> float32 0..255 [B, H, W, 3]; half of them with their channels in another order.

    `change`: `change_colours` or a compiled form of it.
    """
    count, device = len(pixels), pixels.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator, device=device) * (high - low) + low

    def happens(probability: float) -> torch.Tensor:
        return (torch.rand(count, 1, generator=generator, device=device) < probability).float()

    order = torch.rand(count, 3, generator=generator, device=device).argsort(-1)
    order = torch.where(happens(0.5) > 0, torch.arange(3, device=device), order)
    gain = uniform(*GAIN, 1) * (1 + uniform(-TINT, TINT, 3))
    sign = 1 - 2 * happens(NEGATIVE)
    softness = uniform(0.0, 0.7, 1) * happens(SOFT)
    values = (order, gain * sign, uniform(-OFFSET, OFFSET, 1), softness)
    return (change or change_colours)(pixels, *values)


def change_colours(pixels, order, gain, offset, softness) -> torch.Tensor:
    """Channels [B, 3] in `order`, contrast `gain` [B, 3] about the middle grey, `offset` [B, 1], blur `softness` [B, 1]."""
    moved = pixels.gather(-1, order[:, None, None].expand(-1, *pixels.shape[1:3], -1)).float()
    near = (moved.roll(1, 1) + moved.roll(1, 2) + moved.roll((1, 1), (1, 2))) / 3
    soft = softness[:, None, None]
    moved = moved * (1 - soft) + (moved * 0.25 + near * 0.75) * soft
    return ((moved - 127.5) * gain[:, None, None] + 127.5 + offset[:, None, None]).clamp(0, 255)
