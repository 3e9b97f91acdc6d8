"""Batches that training checks itself with: the test's style and phrases, voices that training never hears."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from labkit import phonetap
from labkit.models.pocket.configuration import PocketConfig
from labkit.models.pocket.modeling import speech_tokens
from labkit.models.pocket.training.batches import SIZES, Batch, BatchMaker, image_tokens
from labkit.models.pocket.training.samples import Drawn, Encoder
from labkit.phonetap.recordings import load_recording


def typed_checks(
    encoder: Encoder, count: int, sizes: Sequence[tuple[int, int]], seed: int = 987
) -> list[Batch]:
    """Typed batches on screens, labels and phrases of the test style, with their pixels [S, H, W, 3]."""
    batches = []
    for number, size in enumerate(sizes):
        maker = BatchMaker(encoder, seed + number, style="test", part="test", hard=0.3)
        drawn = [maker.draw(size) for _ in range(count)]
        batch = maker.batch("typed", number, [d for _, d in drawn], count)
        batch.arrays["pixels"] = np.stack([drawn[slot][0] for slot in batch.arrays["slots"]])
        batches.append(batch)
    return batches


def spoken_checks(
    encoder: Encoder, config: PocketConfig, count: int, size: tuple[int, int] = max(SIZES)
) -> list[Batch]:
    """A batch of those of PhoneTap's first `count` spoken calibration items that ask for a tap, with their recordings.

    Beside what every batch has: pixels [S, H, W, 3], audio float32 [B, samples], audio_lengths [B].
    """
    maker = BatchMaker(encoder, 0, style="test", part="calibration")
    tokens, rows, recordings, pixels = image_tokens(size), [], [], []
    for item in phonetap.items("spoken", count=count, part="calibration", size=size):
        if item.box is None:
            continue
        elements = item.screen.elements
        drawn = Drawn.of(item.screen.kind, size, elements, (), encoder)
        target = next(
            i for i, e in enumerate(elements) if (e.label, e.kind) == (item.target, item.target_kind)
        )
        sound = load_recording(item.recording)
        answer = maker.maker.tap_answer(drawn, target)
        ids, start = maker.maker.sequence(tokens, speech_tokens(len(sound), config), "", None, answer)
        row = maker._arrays(ids, start, tokens, drawn, target) | maker._dense(drawn, tokens)
        rows.append(row)
        recordings.append(sound)
        pixels.append(np.asarray(item.screen.image))
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    audio = np.zeros((len(rows), max(map(len, recordings))), dtype=np.float32)
    for row, sound in zip(audio, recordings):
        row[: len(sound)] = sound
    lengths = np.array([len(sound) for sound in recordings])
    arrays |= {"pixels": np.stack(pixels), "audio": audio, "audio_lengths": lengths}
    return [Batch("spoken", list(SIZES).index(size), arrays)]
