"""Acoustic augmentation of a batch on its device: each recording gets a speed, microphone, room and noise.

`augment(audio, lengths, strength=..., generator=...)` takes float32 [B, S] with zeros behind each recording's
length. Everything random is drawn from the generator, so the same generator state gives the same batch.
`strength` from 0 (nothing changes) to 1 scales both how often a change happens and how far it goes. At 1:
speed and pitch by resampling 0.78 to 1.28, equalizer of +-14 dB, band limits, missing bands, rooms with 0.1
to 0.7 s of reverberation, coloured noise or other recordings at 3 to 40 dB, saturation, gaps of up to 0.1 s.
"""

from __future__ import annotations

import math

import torch

SAMPLE_RATE = 16_000
FACTOR = (0.78, 1.28)
EQUALIZER_DB = 14.0
SNR_DB = (3.0, 40.0)


class _Dice:
    """Random draws on the audio's device from one generator."""

    def __init__(self, generator: torch.Generator | None, device: torch.device) -> None:
        self.options = {"generator": generator, "device": device}

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(shape, **self.options) * (high - low) + low

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, **self.options)

    def happens(self, probability: float, count: int) -> torch.Tensor:
        """True for about `probability` of `count` recordings: [count, 1]."""
        return torch.rand((count, 1), **self.options) < probability


def resample(audio: torch.Tensor, factor: torch.Tensor, width: int) -> torch.Tensor:
    """Play each recording `factor` [B] times as fast, by cubic interpolation: [B, S] → [B, width]."""
    place = torch.arange(width, device=audio.device)[None] * factor[:, None]
    whole = place.floor()
    t = (place - whole).to(audio.dtype)
    padded = torch.nn.functional.pad(audio, (1, 3))
    index = whole.long().clamp(max=audio.shape[1])
    a, b, c, d = (padded.gather(1, index + step) for step in range(4))
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return curve * (place < audio.shape[1])


def stretch(audio: torch.Tensor, rate: torch.Tensor, size: int = 512, hop: int = 128) -> torch.Tensor:
    """Change each recording's tempo but not its pitch by a phase vocoder: `rate` [B] above 1 is faster.

    [B, S] → [B, S] of the same width: what a slower recording has beyond it is lost, so give room for it.
    """
    window = torch.hann_window(size, device=audio.device)
    spectrum = torch.stft(audio, size, hop, window=window, return_complex=True)  # [B, F, T]
    frames = spectrum.shape[2]
    place = torch.arange(frames, device=audio.device)[None] * rate[:, None]  # [B, T]
    padded = torch.nn.functional.pad(spectrum, (0, 2))
    index = place.floor().long().clamp(max=frames)[:, None].expand(-1, spectrum.shape[1], -1)
    part = (place - place.floor())[:, None]
    here, there = padded.gather(2, index), padded.gather(2, index + 1)
    size_of = here.abs() * (1 - part) + there.abs() * part
    bins = torch.arange(spectrum.shape[1], device=audio.device)
    advance = (2 * math.pi * hop / size * bins)[None, :, None]
    turn = there.angle() - here.angle() - advance
    turn = turn - 2 * math.pi * torch.round(turn / (2 * math.pi)) + advance
    phase = here[:, :, :1].angle() + torch.cat(
        [torch.zeros_like(turn[:, :, :1]), turn[:, :, :-1].cumsum(2)], 2
    )
    return torch.istft(torch.polar(size_of, phase), size, hop, window=window, length=audio.shape[1])


def _change_speed(audio, lengths, strength, dice, keep_length):
    count = len(audio)
    low, high = (math.log(value) * strength for value in FACTOR)
    factor = torch.exp(dice.uniform(low, high, count))
    factor = torch.where(dice.happens(min(1.0, 0.3 + 0.5 * strength), count)[:, 0], factor, 1.0)
    if not keep_length:
        lengths = torch.floor((lengths - 1) / factor).long() + 1
        return resample(audio, factor, int(lengths.max())), lengths
    # a lower voice would be longer: hurry it first; a higher one is shorter: quiet follows
    slower = factor < 1
    hurried = torch.where(slower[:, None], stretch(audio, torch.where(slower, 1 / factor, 1.0)), audio)
    return resample(hurried, factor, audio.shape[1]), lengths


def _equalizer(bins: int, count: int, strength: float, dice: _Dice) -> torch.Tensor:
    """A smooth random response, band limits and a missing band, as factors of the spectrum: [count, bins]."""
    device = dice.options["device"]
    hertz = torch.linspace(0, SAMPLE_RATE / 2, bins, device=device)[None]
    points = 10
    gains = dice.uniform(-EQUALIZER_DB, EQUALIZER_DB, count, points) * strength
    gains = gains * dice.happens(0.3 + 0.6 * strength, count)
    place = torch.log2(hertz.clamp(min=60) / 60) / math.log2(SAMPLE_RATE / 2 / 60) * (points - 1)
    left = place.floor().long().clamp(max=points - 2).expand(count, -1)
    part = 0.5 - 0.5 * torch.cos(math.pi * (place - left))
    decibels = gains.gather(1, left) * (1 - part) + gains.gather(1, left + 1) * part
    top = torch.exp2(dice.uniform(math.log2(2800), math.log2(7800), count, 1))
    top = torch.where(dice.happens(0.4 * strength, count), top, 1e6)
    bottom = torch.where(dice.happens(0.4 * strength, count), dice.uniform(80, 450, count, 1), 0.0)
    decibels = decibels - 0.06 * (hertz - top).clamp(min=0) - 0.15 * (bottom - hertz).clamp(min=0)
    start = dice.uniform(200, 6000, count, 1)
    gap = (hertz > start) & (hertz < start * dice.uniform(1.02, 1.25, count, 1))
    decibels = decibels - 40.0 * (gap & dice.happens(0.4 * strength, count))
    return torch.pow(10.0, decibels.clamp(min=-80) / 20)


def _room(count: int, strength: float, dice: _Dice, longest: int = 8_000) -> torch.Tensor:
    """Impulse responses [count, longest]: the direct sound, then noise that dies away."""
    time = torch.arange(longest, device=dice.options["device"])[None] / SAMPLE_RATE
    decay = dice.uniform(0.1, 0.1 + 0.6 * strength, count, 1)
    tail = dice.normal(count, longest) * torch.exp(-6.9 * time / decay)
    tail = tail * (time > dice.uniform(0.001, 0.02, count, 1))
    ratio = dice.uniform(18 - 18 * strength, 20, count, 1)  # direct to reverberant, in dB
    energy = tail.square().sum(1, keepdim=True).clamp(min=1e-9)
    tail = tail * torch.sqrt(torch.pow(10.0, -ratio / 10) / energy)
    tail = tail * dice.happens(0.6 * strength, count)
    tail[:, 0] = 1.0
    return tail


def _filter(audio: torch.Tensor, strength: float, dice: _Dice) -> torch.Tensor:
    count, width = audio.shape
    size = 1 << (width + 8_000 - 1).bit_length()
    response = _equalizer(size // 2 + 1, count, strength, dice) * torch.fft.rfft(
        _room(count, strength, dice), size
    )
    return torch.fft.irfft(torch.fft.rfft(audio, size) * response, size)[:, :width]


def _noise(audio: torch.Tensor, inside: torch.Tensor, strength: float, dice: _Dice) -> torch.Tensor:
    count, width = audio.shape
    size = 1 << (width - 1).bit_length()
    hertz = torch.fft.rfftfreq(size, 1 / SAMPLE_RATE, device=audio.device)[None].clamp(min=20)
    colour = dice.uniform(-0.5, 2.0, count, 1)  # power falls as 1 / f ** colour
    noise = torch.fft.rfft(dice.normal(count, size)) * hertz.pow(-colour / 2)
    noise = torch.fft.irfft(noise, size)[:, :width]
    others = audio.roll(1, 0) + audio.roll(2, 0) + audio.roll(5, 0)
    babble = dice.happens(0.15, count)
    ratio = dice.uniform(SNR_DB[1] - (SNR_DB[1] - SNR_DB[0]) * strength, SNR_DB[1], count, 1)
    noise, ratio = torch.where(babble, others, noise), torch.where(babble, ratio.clamp(min=8), ratio)
    loud = (audio * inside).square().sum(1, keepdim=True) / inside.sum(1, keepdim=True)
    quiet = noise.square().mean(1, keepdim=True).clamp(min=1e-12)
    scale = torch.sqrt(loud / quiet * torch.pow(10.0, -ratio / 10))
    return audio + noise * scale * dice.happens(0.2 + 0.7 * strength, count)


def _saturate(audio: torch.Tensor, strength: float, dice: _Dice) -> torch.Tensor:
    count = len(audio)
    peak = audio.abs().amax(1, keepdim=True).clamp(min=1e-6)
    drive = dice.uniform(1.0, 1.0 + 5.0 * strength, count, 1)
    hot = torch.tanh(audio / peak * drive) * peak
    return torch.where(dice.happens(0.25 * strength, count), hot, audio)


def _gaps(audio: torch.Tensor, lengths: torch.Tensor, strength: float, dice: _Dice) -> torch.Tensor:
    count, place = len(audio), torch.arange(audio.shape[1], device=audio.device)[None]
    for _ in range(2):
        start = dice.uniform(0, 1, count, 1) * lengths[:, None]
        span = dice.uniform(0.01, 0.1, count, 1) * strength * SAMPLE_RATE
        gap = (place >= start) & (place < start + span) & dice.happens(0.5 * strength, count)
        audio = audio.masked_fill(gap, 0.0)
    return audio


@torch.no_grad()
def augment(
    audio: torch.Tensor,
    lengths: torch.Tensor,
    *,
    strength: float = 1.0,
    generator: torch.Generator | None = None,
    keep_length: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augmented copies of a batch: float32 [B, S'], zeros behind each length, and lengths [B].

    `audio` float32 [B, S], `lengths` int [B]. With `keep_length` every recording keeps its length (a lower
    voice is hurried first, a higher one is followed by quiet), for batches whose token counts are fixed.
    Raises ValueError for a strength outside 0..1 or shapes that do not match.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; it must lie between 0 and 1")
    if audio.ndim != 2 or lengths.shape != audio.shape[:1]:
        raise ValueError(
            f"audio {tuple(audio.shape)} and lengths {tuple(lengths.shape)}; [B, S] and [B] are needed"
        )
    if strength == 0:
        return audio, lengths
    dice = _Dice(generator, audio.device)
    audio, lengths = _change_speed(audio.float(), lengths, strength, dice, keep_length)
    inside = torch.arange(audio.shape[1], device=audio.device)[None] < lengths[:, None]
    audio = _gaps(audio, lengths, strength, dice)
    audio = _saturate(_filter(audio, strength, dice), strength, dice)
    audio = _noise(audio, inside, strength, dice)
    gain = torch.pow(10.0, dice.uniform(-20 * strength, 0, len(audio), 1) / 20)
    peak = audio.abs().amax(1, keepdim=True).clamp(min=1.0)
    return audio / peak * gain * inside, lengths
