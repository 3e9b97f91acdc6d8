"""Augmentation of recordings: repeatable, within its bounds, and each change does what its name says."""

import math

import pytest
import torch

from labkit.models.pocket.training.augment import FACTOR, augment, resample, stretch


def batch(count: int = 6, width: int = 16_000):
    """Tones of several lengths with zeros behind."""
    time = torch.arange(width) / 16_000
    audio = torch.stack([0.5 * torch.sin(2 * math.pi * 200 * (row + 1) * time) for row in range(count)])
    lengths = torch.linspace(width // 2, width, count).long()
    return audio * (torch.arange(width)[None] < lengths[:, None]), lengths


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loudest(samples: torch.Tensor) -> float:
    spectrum = torch.fft.rfft(samples * torch.hann_window(len(samples))).abs()
    return spectrum.argmax().item() * 16_000 / len(samples)


@pytest.mark.parametrize("keep_length", [False, True])
def test_one_generator_state_gives_one_batch(keep_length):
    audio, lengths = batch()
    first, first_lengths = augment(audio, lengths, generator=dice(), keep_length=keep_length)
    again, again_lengths = augment(audio, lengths, generator=dice(), keep_length=keep_length)
    other, _ = augment(audio, lengths, generator=dice(1), keep_length=True)
    assert torch.equal(first, again)
    assert torch.equal(first_lengths, again_lengths)
    assert not torch.equal(other, augment(audio, lengths, generator=dice(), keep_length=True)[0])


def test_strength_zero_changes_nothing():
    audio, lengths = batch()
    same, same_lengths = augment(audio, lengths, strength=0, generator=dice())
    assert same is audio
    assert same_lengths is lengths


def test_more_strength_changes_more():
    audio, lengths = batch(64)

    def change(strength):
        made, _ = augment(audio, lengths, strength=strength, generator=dice(), keep_length=True)
        alike = torch.cosine_similarity(made, audio).abs()
        return 1 - alike.mean().item()

    assert change(0.05) < change(0.3) < change(1.0)


def test_lengths_follow_the_speed_and_quiet_stays_quiet_behind_them():
    audio, lengths = batch(64)
    made, made_lengths = augment(audio, lengths, generator=dice())
    ratio = made_lengths / lengths
    assert 1 / FACTOR[1] - 0.01 < ratio.min() < 0.9
    assert 1.1 < ratio.max() < 1 / FACTOR[0] + 0.01
    assert made.shape[1] == made_lengths.max()
    assert made[torch.arange(made.shape[1])[None] >= made_lengths[:, None]].abs().max() == 0


def test_kept_lengths_are_kept_and_values_stay_finite_and_in_range():
    audio, lengths = batch(64)
    made, made_lengths = augment(audio, lengths, generator=dice(), keep_length=True)
    assert made.shape == audio.shape
    assert torch.equal(made_lengths, lengths)
    assert torch.isfinite(made).all()
    assert made.abs().max() <= 1


def test_resampling_moves_the_pitch_and_stretching_does_not():
    tone = torch.sin(2 * math.pi * 440 * torch.arange(32_000) / 16_000)[None]
    rate = torch.tensor([1.25])
    assert loudest(resample(tone, rate, 25_600)[0]) == pytest.approx(550, abs=1)
    hurried = stretch(tone, rate)[0]
    assert loudest(hurried[:25_000]) == pytest.approx(440, abs=1)
    assert hurried[:25_000].std() == pytest.approx(0.707, abs=0.01)
    assert hurried[26_500:].abs().max() < 1e-3
    assert torch.allclose(stretch(tone, torch.tensor([1.0])), tone, atol=1e-2)


def test_wrong_shapes_and_strengths_are_refused():
    audio, lengths = batch()
    with pytest.raises(ValueError, match="between 0 and 1"):
        augment(audio, lengths, strength=1.5)
    with pytest.raises(ValueError, match="are needed"):
        augment(audio[0], lengths)
    with pytest.raises(ValueError, match="are needed"):
        augment(audio, lengths[:2])
