"""Making the recordings that PhoneTap ships in assets/speech (needed only to make them anew).

    python -m labkit.models.pocket.training.recordings --output assets/speech

Texts are held-out paraphrases about labels of the part ("test" or "calibration"). In each language half the
test recordings come from voices that training leaves out of the synthesizers it uses, half from strangers:
SVOX Pico for English, of which training hears nothing, and two natural speakers of Kokoro for Mandarin, of whom
it hears nothing. Calibration recordings use other left-out voices than the test and no strangers but a mixture.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit.common.actions import format_action
from labkit.common.errors import LabError
from labkit.models.pocket.training.voices.choose import Voice, available_voices, synthesize
from labkit.models.pocket.training.voices.sound import SAMPLE_RATE
from labkit.phonetap.instructions import Instruction, spoken_texts
from labkit.phonetap.recordings import GROUPS, recordings_folder, write_pool

COUNTS = {"test": 150, "calibration": 30}  # recordings of each language
SECONDS = (0.5, 4.5)
CALIBRATION_VOICES = frozenset(
    f"{stem}{name}"
    for stem in ("espeak/cmn+", "espeak/en-gb-x-gbcwmd+", "kokoro/jm_kumo~jf_tebukuro~")
    for name in (("0.50",) if "kokoro" in stem else ("quincy", "edward2", "belinda"))
)
UNSEEN_VOICE, UNSEEN_SPEAKER = GROUPS
_SPLITS = {"held_out_voice": UNSEEN_VOICE, "held_out_speaker": UNSEEN_SPEAKER}


def cast(part: str, lang: str) -> dict[str, list[Voice]]:
    """The voices of a part and language: group → voices, evenly by synthesizer."""
    mine = [
        voice
        for voice in available_voices(lang)
        if voice.split != "train" and (voice.name in CALIBRATION_VOICES) == (part == "calibration")
    ]
    needed = {"en": ("espeak", "flite", "rhvoice", "pico", "kokoro"), "zh": ("espeak", "kokoro")}[lang]
    missing = set(needed) - {voice.engine for voice in available_voices(lang)}
    if missing:
        raise LabError(f"not installed, but needed for the recordings: {', '.join(sorted(missing))}")
    groups = {group: [voice for voice in mine if _SPLITS[voice.split] == group] for group in GROUPS}
    return {group: voices for group, voices in groups.items() if voices}


def choose_texts(part: str, lang: str, seed: int = 0) -> list[Instruction]:
    """Distinct held-out requests; calibration ones differ in their labels' part."""
    rng, chosen = random.Random(f"{part} {lang} {seed}"), {}
    while len(chosen) < COUNTS[part]:
        for asked in spoken_texts(rng, lang, part, 20):
            chosen.setdefault(asked.text, asked)
    return list(chosen.values())[: COUNTS[part]]


def assign(part: str, lang: str) -> list[tuple[dict[str, Any], Voice, random.Random]]:
    """Each recording's index entry, voice and random numbers, before anything is spoken."""
    groups, rows = cast(part, lang), []
    for number, asked in enumerate(choose_texts(part, lang)):
        group = list(groups)[number % len(groups)]
        rng = random.Random(f"{part} {lang} {number} voice")
        kinds = sorted({voice.engine for voice in groups[group]})
        kind = rng.choice(kinds)
        voice = rng.choice([voice for voice in groups[group] if voice.engine == kind])
        entry = {
            "id": f"{part}-{lang}-{number:03d}", "part": part, "lang": lang, "text": asked.text,
            "task": asked.task, "target": asked.target,
            "action_text": format_action(asked.action) if asked.action is not None else None,
            "voice": voice.name, "engine": voice.engine, "group": group,
        }  # fmt: skip
        rows.append((entry, voice, rng))
    return rows


def speak_all(rows: Sequence) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Every row spoken: (index entry, samples float32 [n]); LabError if one is too short or long."""
    for entry, voice, rng in rows:
        speed, pitch = rng.uniform(0.85, 1.15), rng.uniform(0.9, 1.1)
        samples = synthesize(entry["text"], entry["lang"], voice.name, speed=speed, pitch=pitch)
        seconds = len(samples) / SAMPLE_RATE
        if not SECONDS[0] <= seconds <= SECONDS[1]:
            raise LabError(f"{entry['id']} by {voice.name} lasts {seconds:.2f} s: {entry['text']!r}")
        yield {**entry, "seconds": round(seconds, 3)}, samples


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m labkit.models.pocket.training.recordings", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=recordings_folder(), help="folder for PART.zip")
    parser.add_argument("--part", choices=sorted(COUNTS), action="append", help="default: both")
    options = parser.parse_args(argv)
    try:
        for part in options.part or sorted(COUNTS):
            rows = [row for lang in ("zh", "en") for row in assign(part, lang)]
            path = options.output / f"{part}.zip"
            count = write_pool(path, speak_all(rows))
            print(f"{path}: {count} recordings, {path.stat().st_size / 1e6:.2f} MB")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
