"""Speech synthesizers that training borrows: espeak-ng, flite, RHVoice, SVOX Pico, Kokoro and Piper, each optional.

Every engine is a small class over the synthesizer's library with the two methods

    has(voice) -> whether the library and this voice's data are installed
    speak(text, voice, speed, pitch) -> (samples float32 [n] in -1..1, sample rate in Hz)

where `speed` and `pitch` are ratios to the voice's own (2.0 is twice as fast, an octave higher). Libraries
are opened on first use and once a process, so workers that are forked before the first use each have their
own. Nothing here is needed to run the trained model.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
from typing import ClassVar

import numpy as np

from labkit.common.errors import LabError
from labkit.models.pocket.training.voices.libraries import LIBRARIES_VARIABLE, find_library, from_int16
from labkit.models.pocket.training.voices.neural import Kokoro, Piper
from labkit.models.pocket.training.voices.rhvoice import RHVoice


class Espeak:
    """espeak-ng (GPL-3.0-or-later), from the package espeakng-loader: formant synthesis, about 2 ms a phrase.

    A voice is a language with an optional variant: "en-us", "en" (British), "cmn+f3", "en-029+klatt2".
    """

    install = "pip install espeakng-loader==0.2.4"
    _RETRIEVE_AND_WAIT, _RATE, _PITCH, _RANGE, _UTF8 = 2, 1, 3, 4, 1

    def __init__(self) -> None:
        if importlib.util.find_spec("espeakng_loader") is None:
            raise LabError(f"espeak-ng was not found: {self.install}")
        import espeakng_loader

        folder = os.path.dirname(espeakng_loader.get_data_path())
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.sample_rate = self.library.espeak_Initialize(self._RETRIEVE_AND_WAIT, 0, folder.encode(), 0)
        if self.sample_rate <= 0:
            raise LabError(f"espeak-ng could not read its data in {folder}: {self.install}")
        self.chunks: list[np.ndarray] = []
        prototype = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self.callback = prototype(self._receive)  # kept alive for as long as the library may call it
        self.library.espeak_SetSynthCallback(self.callback)

    @staticmethod
    def has(voice: str) -> bool:
        return importlib.util.find_spec("espeakng_loader") is not None

    def _receive(self, samples, count, events) -> int:
        if samples and count > 0:
            self.chunks.append(from_int16(samples, count))
        return 0

    def speak(self, text: str, voice: str, speed: float, pitch: float) -> tuple[np.ndarray, int]:
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise LabError(f"espeak-ng has no voice {voice!r}")
        rate = round(min(450, max(80, 175 * speed)))
        height = round(min(100, max(0, 50 + 50 * math.log2(pitch))))
        for parameter, value in ((self._RATE, rate), (self._PITCH, height), (self._RANGE, 50)):
            self.library.espeak_SetParameter(parameter, value, 0)
        self.chunks.clear()
        data = text.encode() + b"\0"
        failed = self.library.espeak_Synth(data, len(data), 0, 1, 0, self._UTF8, None, None)
        if failed or not self.chunks:
            raise LabError(f"espeak-ng could not speak {text!r} with voice {voice!r}")
        return np.concatenate(self.chunks), self.sample_rate


class _FliteWave(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


class _FliteVoice(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("features", ctypes.c_void_p))


class Flite:
    """flite 2.2 (BSD-like licence of CMU): recorded-speech synthesis, English, 10 to 60 ms a phrase.

    Voices: kal, kal16 (diphones), awb, rms, slt (statistical). Debian's libflite1 has them all.
    """

    # each voice's own mean pitch in Hz: the statistical voices keep theirs to themselves (measured)
    mean_pitch: ClassVar = {"kal": 95.0, "kal16": 95.0, "awb": 128.0, "rms": 101.0, "slt": 165.0}

    install = f"apt-get install libflite1, or name the folder of its libraries in {LIBRARIES_VARIABLE}"

    def __init__(self) -> None:
        for companion in (
            "libasound.so.2",
        ):  # libflite's own need; opened here so that a named folder serves
            if path := find_library(companion):
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        core = find_library("libflite.so.1")
        if core is None:
            raise LabError(f"flite was not found: {self.install}")
        self.library = ctypes.CDLL(core, mode=ctypes.RTLD_GLOBAL)
        for companion in ("libflite_usenglish.so.1", "libflite_cmulex.so.1"):
            if path := find_library(companion):
                ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        self.library.flite_init()
        self.library.flite_text_to_wave.restype = ctypes.POINTER(_FliteWave)
        self.library.flite_text_to_wave.argtypes = (ctypes.c_char_p, ctypes.POINTER(_FliteVoice))
        self.library.delete_wave.argtypes = (ctypes.POINTER(_FliteWave),)
        self.library.flite_feat_set_float.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float)
        self.voices: dict[str, object] = {}

    @staticmethod
    def has(voice: str) -> bool:
        return None not in (find_library("libflite.so.1"), find_library(f"libflite_cmu_us_{voice}.so.1"))

    def _voice(self, name: str):
        if name not in self.voices:
            path = find_library(f"libflite_cmu_us_{name}.so.1") if name in self.mean_pitch else None
            if path is None:
                raise LabError(f"flite has no voice {name!r}: {self.install}")
            register = getattr(ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL), f"register_cmu_us_{name}")
            register.restype, register.argtypes = ctypes.POINTER(_FliteVoice), (ctypes.c_char_p,)
            self.voices[name] = register(None)
        return self.voices[name]

    def speak(self, text: str, voice: str, speed: float, pitch: float) -> tuple[np.ndarray, int]:
        handle = self._voice(voice)
        features = handle.contents.features
        self.library.flite_feat_set_float(features, b"duration_stretch", 1 / speed)
        self.library.flite_feat_set_float(features, b"int_f0_target_mean", self.mean_pitch[voice] * pitch)
        wave = self.library.flite_text_to_wave(text.encode("ascii", "ignore"), handle)
        if not wave or wave.contents.num_samples < 1:
            raise LabError(f"flite could not speak {text!r} with voice {voice!r}")
        samples, rate = (
            from_int16(wave.contents.samples, wave.contents.num_samples),
            wave.contents.sample_rate,
        )
        self.library.delete_wave(wave)
        return samples, rate


class Pico:
    """SVOX Pico (Apache-2.0), from the package py-nanotts: English "en-US" and "en-GB", 10 ms a phrase."""

    install = "pip install py-nanotts==0.1.1"

    def __init__(self) -> None:
        if not self.has(""):
            raise LabError(f"SVOX Pico was not found: {self.install}")
        from py_nanotts import NanoTTS

        self.engine = NanoTTS()

    @staticmethod
    def has(voice: str) -> bool:
        return importlib.util.find_spec("py_nanotts") is not None

    def speak(self, text: str, voice: str, speed: float, pitch: float) -> tuple[np.ndarray, int]:
        data = self.engine.speak(text, voice=voice, speed=speed, pitch=pitch)
        samples = np.frombuffer(data, np.int16).astype(np.float32) / 32768
        if not len(samples):
            raise LabError(f"SVOX Pico could not speak {text!r} with voice {voice!r}")
        return samples, 16_000


@functools.cache
def _engine(name: str, process: int):
    return ENGINES[name]()


def engine(name: str):
    """This process's own instance of an engine; unknown names and missing libraries raise LabError."""
    if name not in ENGINES:
        raise LabError(f"unknown speech engine {name!r}; known: {', '.join(ENGINES)}")
    return _engine(name, os.getpid())


ENGINES = {
    "espeak": Espeak, "flite": Flite, "rhvoice": RHVoice, "pico": Pico, "kokoro": Kokoro, "piper": Piper,
}  # fmt: skip
