"""PhoneTap's recordings of spoken instructions, and the zip file that holds them: a pool (`SpeechPool`)."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from labkit.common.actions import Action, parse_action
from labkit.common.errors import LabError
from labkit.common.files import assets_folder, atomic_path

SAMPLE_RATE = 16_000
PARTS = ("test", "calibration")
GROUPS = ("unseen_voice", "unseen_speaker")
_DATE = (2026, 1, 1, 0, 0, 0)  # a fixed date for every member, so that equal contents make equal files


def recordings_folder() -> Path:
    """The folder of the shipped pools."""
    return assets_folder() / "speech"


@dataclass(frozen=True)
class Recording:
    """One shipped recording: its text, its speaker, and the action it asks for.

    `target` is the label to be tapped; None if the answer is no tap, and `action` is then the whole right answer. Any
    screen that shows the label can be used with it. `group` says how far the speaker is from the training data:
    "unseen_voice", a new voice of a synthesizer used in training; "unseen_speaker", for English another synthesizer, for
    Mandarin a natural speaker, neither used in training.
    """

    id: str
    part: str
    lang: str
    text: str
    task: str
    target: str | None
    action_text: str | None
    voice: str
    engine: str
    group: str
    seconds: float
    sha256: str

    @property
    def action(self) -> Action | None:
        """The right action, or None for a tap, whose point depends on the screen."""
        return None if self.action_text is None else parse_action(self.action_text)


def encode(samples: np.ndarray, compression: float = 0.95) -> bytes:
    """Samples float32 [n] at 16 kHz as Ogg/Opus; `compression` 0.95 gives about 20 kbit/s, 0.99 about 9."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=compression)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    """An Ogg/Opus (or any other sound) file's first channel as float32 [n]; it must be at 16 kHz."""
    import soundfile

    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    if rate != SAMPLE_RATE:
        raise LabError(f"a recording has {rate} samples a second; {SAMPLE_RATE} are needed")
    return np.ascontiguousarray(samples[:, 0])


def write_pool(
    path: str | os.PathLike,
    entries: Iterable[tuple[Mapping[str, Any], np.ndarray]],
    *,
    per_file: int = 1,
    compression: float = 0.95,
) -> int:
    """Write a pool of (index entry with "id", samples float32 [n]), `per_file` recordings in each Opus file.

    With one recording a file the entry gets the file's "sha256". Returns the number of recordings.
    """
    index: list[str] = []
    entries = iter(entries)
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        while group := list(itertools.islice(entries, per_file)):
            data = encode(np.concatenate([samples for _, samples in group]), compression)
            name, start = f"{group[0][0]['id']}.ogg", 0
            archive.writestr(zipfile.ZipInfo(name, _DATE), data)
            for entry, samples in group:
                where = {"file": name, "start": start, "samples": len(samples)}
                extra = where if per_file > 1 else {"sha256": hashlib.sha256(data).hexdigest()}
                index.append(json.dumps({**entry, **extra}, ensure_ascii=False))
                start += len(samples)
        info = zipfile.ZipInfo("index.jsonl", _DATE)
        archive.writestr(info, "\n".join(index) + "\n", zipfile.ZIP_DEFLATED)
    return len(index)


class SpeechPool:
    """A pool opened for reading: `.entries` (index, in order) and `.load(id)` → float32 [n] at 16 kHz.

    The zip file holds `index.jsonl` (one JSON object for each recording, with at least "id") and Ogg/Opus files, 16 kHz
    mono: one for each recording, named ID.ogg, or one for many recordings end to end (the entry then has "file", "start"
    and "samples"), which saves the 0.9 kB that every Opus file costs.

    The file is read whole, so a pool may be handed to forked workers.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise LabError(f"no pool of recordings at {self.path}")
        try:
            self._archive = zipfile.ZipFile(io.BytesIO(self.path.read_bytes()))
            lines = self._archive.read("index.jsonl").decode().splitlines()
        except (zipfile.BadZipFile, KeyError) as error:
            raise LabError(f"{self.path} is not a pool of recordings ({error})") from error
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self._by_id = {entry["id"]: entry for entry in self.entries}
        self._last: tuple[str, np.ndarray] = ("", np.zeros(0, np.float32))

    def raw(self, name: str) -> bytes:
        """The encoded file that holds a recording."""
        if name not in self._by_id:
            raise LabError(f"{self.path.name} has no recording {name!r}")
        return self._archive.read(self._by_id[name].get("file", f"{name}.ogg"))

    def load(self, name: str) -> np.ndarray:
        """A recording's samples, float32 [n] at 16 kHz."""
        entry = self._by_id.get(name, {})
        if "file" not in entry:
            return decode(self.raw(name))
        if self._last[0] != entry["file"]:
            self._last = (entry["file"], decode(self.raw(name)))
        return self._last[1][entry["start"] : entry["start"] + entry["samples"]]


@functools.cache
def _shipped(part: str) -> tuple[SpeechPool, tuple[Recording, ...]]:
    if part not in PARTS:
        raise LabError(f"unknown part {part!r} of the recordings; known: {', '.join(PARTS)}")
    pool = SpeechPool(recordings_folder() / f"{part}.zip")
    names = {field.name for field in fields(Recording)}
    return pool, tuple(Recording(**{k: v for k, v in entry.items() if k in names}) for entry in pool.entries)


def recordings(part: str = "test", lang: str | None = None, group: str | None = None) -> list[Recording]:
    """The shipped recordings of a part ("test" or "calibration"), optionally of one language or group."""
    if group is not None and group not in GROUPS:
        raise LabError(f"unknown group {group!r}; known: {', '.join(GROUPS)}")
    return [
        recording
        for recording in _shipped(part)[1]
        if lang in (None, recording.lang) and group in (None, recording.group)
    ]


def load_recording(name: str) -> np.ndarray:
    """A shipped recording's samples by its id, float32 [n] in -1..1 at 16 kHz, mono."""
    part = name.split("-", 1)[0]
    if part not in PARTS:
        raise LabError(f"unknown recording {name!r}; ids look like test-zh-003")
    return _shipped(part)[0].load(name)
