"""The maker of pools of spoken instructions, in parallel processes.

    python -m labkit.models.pocket.training.voices.pool --texts texts.jsonl --output DIR --workers 16

`texts.jsonl` holds one {"id", "text", "lang"} a line. DIR/speech.npy (int16, 16 kHz, all utterances end to
end) and DIR/speech.jsonl (one line an utterance: id, text, lang, voice, engine, split, start, samples) come
out; `read_pool(DIR)` reads them. Nothing here imports torch; synthesizers are opened in the workers only.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labkit.common.errors import LabError
from labkit.common.files import atomic_path
from labkit.models.pocket.training.voices import speakers
from labkit.models.pocket.training.voices.choose import SPLITS, Voice, choose_voice, require_voice, synthesize
from labkit.models.pocket.training.voices.natural_pool import RawPool
from labkit.models.pocket.training.voices.sound import SAMPLE_RATE, trim
from labkit.phonetap.recordings import SpeechPool


@dataclass(frozen=True)
class PoolOptions:
    """How a pool is spoken; each recording of a natural pool comes as it is and as other speakers, copies in all."""

    split: str = "train"
    seed: int = 0
    max_seconds: float = 4.5
    natural: tuple[Path, ...] = ()
    natural_copies: int = 4


def _speak_texts(rows: Sequence[Mapping[str, Any]], options: PoolOptions):
    for row in rows:
        rng = random.Random(f"{options.seed} {row['id']}")
        voice = choose_voice(rng, row["lang"], options.split)
        speed, pitch = rng.uniform(0.8, 1.25), rng.uniform(0.8, 1.25)
        samples = synthesize(row["text"], row["lang"], voice.name, speed=speed, pitch=pitch)
        if (excess := len(samples) / SAMPLE_RATE / options.max_seconds) > 1 and speed * excess < 2:
            samples = synthesize(
                row["text"], row["lang"], voice.name, speed=min(2, speed * excess * 1.05), pitch=pitch
            )
        yield dict(row), voice, samples


def _speak_natural(rows: Sequence[tuple[str, Mapping[str, Any]]], options: PoolOptions):
    for path, row in rows:
        samples = _natural_pool(path).load(row["id"])
        rng = random.Random(f"{options.seed} {row['id']}")
        analysis = speakers.Analysis(samples) if options.natural_copies > 1 else None
        for copy in range(options.natural_copies):
            speaker = speakers.random_speaker(rng) if copy else speakers.SAME
            spoken = analysis.speak(speaker) if copy else samples
            engine = row["voice"].partition("/")[0]
            voice = Voice(f"{row['voice']}/{speaker.name}", engine, row["lang"], "train", "")
            asked = {key: row[key] for key in ("text", "lang", "task", "target", "content")}
            yield {"id": f"{row['id']}-{copy}", **asked}, voice, trim(spoken)


@functools.cache
def _natural_pool(path: str) -> SpeechPool | RawPool:
    return SpeechPool(path) if path.endswith(".zip") else RawPool(path)


def _work(job) -> tuple[bytes, list[dict[str, Any]], list[str]]:
    """Speak one chunk: (int16 bytes, index entries with starts inside the chunk, complaints)."""
    kind, rows, options = job
    speak = _speak_natural if kind == "natural" else _speak_texts
    data, index, complaints, start = [], [], [], 0
    for entry, voice, samples in speak(rows, options):
        if len(samples) > options.max_seconds * SAMPLE_RATE:
            complaints.append(f"{entry['id']}: longer than {options.max_seconds} s, left out")
            continue
        data.append(np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16))
        entry |= {"voice": voice.name, "engine": voice.engine, "split": voice.split}
        index.append(entry | {"start": start, "samples": len(samples)})
        start += len(samples)
    return b"".join(part.tobytes() for part in data), index, complaints


def _jobs(rows: Sequence[Mapping[str, Any]], options: PoolOptions) -> Iterator[tuple]:
    for path in map(str, options.natural):
        entries = [(path, entry) for entry in _natural_pool(path).entries]
        for start in range(0, len(entries), 16):
            yield "natural", entries[start : start + 16], options
    for start in range(0, len(rows), 32):
        yield "texts", rows[start : start + 32], options


def make_pool(
    rows: Sequence[Mapping[str, Any]], folder: Path, workers: int, options: PoolOptions | None = None
) -> dict[str, Any]:
    """Speak all rows into folder/speech.npy and folder/speech.jsonl; returns counts and seconds taken."""
    options, began = options or PoolOptions(), time.monotonic()
    if options.natural and options.split != "train":
        raise LabError("a natural pool holds training voices: it goes with the split train alone")
    for row in rows:
        if not {"id", "text", "lang"} <= row.keys():
            raise LabError(f"a text needs id, text and lang; this one has {sorted(row)}")
    for lang in {row["lang"] for row in rows}:
        require_voice(lang, options.split)
    jobs = list(_jobs(rows, options))
    index: list[dict[str, Any]] = []
    total, complaints, raw = 0, [], folder / "speech.raw"
    folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("fork").Pool(workers) as crew, raw.open("wb") as file:
        for data, entries, words in crew.imap_unordered(_work, jobs):
            file.write(data)
            index += [entry | {"start": entry["start"] + total} for entry in entries]
            total, complaints = total + len(data) // 2, complaints + words
    header = {"descr": "<i2", "fortran_order": False, "shape": (total,)}
    with atomic_path(folder / "speech.npy") as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        with raw.open("rb") as samples:
            shutil.copyfileobj(samples, file, 1 << 24)
    raw.unlink()
    with atomic_path(folder / "speech.jsonl") as temporary:
        temporary.write_text(
            "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in index), "utf-8"
        )
    return {
        "utterances": len(index),
        "left_out": complaints,
        "hours": total / SAMPLE_RATE / 3600,
        "seconds": time.monotonic() - began,
    }


def read_pool(folder: str | os.PathLike) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A pool's samples (int16 [total], mapped from disk) and its index entries."""
    folder = Path(folder)
    lines = (folder / "speech.jsonl").read_text("utf-8").splitlines()
    return np.load(folder / "speech.npy", mmap_mode="r"), [json.loads(line) for line in lines]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the pool maker; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m labkit.models.pocket.training.voices.pool", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--texts", type=Path, required=True, help='JSON lines of {"id", "text", "lang"}')
    parser.add_argument("--output", type=Path, required=True, help="folder for speech.npy and speech.jsonl")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--split", choices=SPLITS, default="train", help="whose voices speak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, default=4.5, help="longer utterances are left out")
    parser.add_argument(
        "--natural",
        type=Path,
        nargs="+",
        default=[],
        help="pools of natural speech (zip, or as recorded) to add in many speakers",
    )
    parser.add_argument("--natural-copies", type=int, default=4, help="speakers for each natural recording")
    options = parser.parse_args(argv)
    try:
        rows = [json.loads(line) for line in options.texts.read_text("utf-8").splitlines() if line.strip()]
        pool = PoolOptions(
            options.split,
            options.seed,
            options.max_seconds,
            tuple(options.natural),
            options.natural_copies,
        )
        done = make_pool(rows, options.output, options.workers, pool)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for complaint in done["left_out"][:10]:
        print(complaint, file=sys.stderr)
    rate, hours = done["utterances"] / done["seconds"], done["hours"]
    print(f"{done['utterances']} utterances, {hours:.2f} h, in {done['seconds']:.1f} s ({rate:.0f} a second)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
