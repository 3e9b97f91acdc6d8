"""Packing what natural_mandarin.py and neural_voices.py wrote as a speech pool, to be carried to the training machine.

    python -m labkit.models.pocket.training.voices.natural_pool RAW [RAW ...] --output natural.zip

RAW.npy and RAW.jsonl hold the utterances; the pool is a zip of Ogg/Opus files of 32 utterances each. On one machine
`speech_pool` takes RAW itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from labkit.phonetap.recordings import write_pool

KEPT = ("id", "text", "lang", "voice", "task", "target", "content")


class RawPool:
    """RAW.npy and RAW.jsonl opened for reading, as `labkit.phonetap.recordings.SpeechPool` is: `.entries`, `.load(id)`."""

    def __init__(self, stem: str | Path) -> None:
        stem = Path(stem)
        self._samples = np.load(stem.with_suffix(".npy"), mmap_mode="r")
        lines = [json.loads(line) for line in stem.with_suffix(".jsonl").read_text("utf-8").splitlines()]
        self._places = {line["id"]: (line["start"], line["start"] + line["samples"]) for line in lines}
        self.entries: list[dict[str, Any]] = [{key: line[key] for key in KEPT} for line in lines]

    def load(self, name: str) -> np.ndarray:
        """A recording's samples, float32 [n] at 16 kHz."""
        start, end = self._places[name]
        return self._samples[start:end].astype(np.float32) / 32768


def raw_utterances(stems: Sequence[Path]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Every utterance of the raw pools: (index entry, samples float32 [n] at 16 kHz)."""
    for pool in map(RawPool, stems):
        for entry in pool.entries:
            yield entry, pool.load(entry["id"])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m labkit.models.pocket.training.voices.natural_pool", description=__doc__.split("\n")[0]
    )
    parser.add_argument("raw", type=Path, nargs="+", help="RAW.npy and RAW.jsonl, without the suffix")
    parser.add_argument("--output", type=Path, required=True, help="the pool's file, ending in .zip")
    parser.add_argument("--compression", type=float, default=0.98, help="0.99 smallest, 0.95 better")
    parser.add_argument("--per-file", type=int, default=32, help="utterances in each Opus file")
    options = parser.parse_args(argv)
    try:
        utterances = raw_utterances(options.raw)
        count = write_pool(
            options.output, utterances, per_file=options.per_file, compression=options.compression
        )
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} utterances in {options.output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
