"""The speech encoder's first lessons: CTC on synthesized instructions, alone, before it joins the agent.

Also the speech pool's other half: which instruction each utterance asks for (`write_texts`, `join_texts`).
"""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from labkit.common.files import atomic_path
from labkit.models.pocket.configuration import PocketConfig
from labkit.models.pocket.modeling import speech_tokens
from labkit.models.pocket.training.augment import augment
from labkit.models.pocket.training.forward import hear, normalize_channels
from labkit.models.pocket.training.losses import LETTERS, ctc_loss
from labkit.models.pocket.training.optimizer import Gradients, make_optimizers, step_all
from labkit.phonetap import instructions, words
from labkit.phonetap.recordings import load_recording, recordings

WIDTH = 12_000  # batches are padded to multiples of this, so that few shapes occur


def spell(text: str) -> str:
    """The letters of a text for CTC: lower-case English, pinyin without tones for Chinese, single spaces."""
    from pypinyin import Style, lazy_pinyin

    spelled = " ".join(lazy_pinyin(text, style=Style.NORMAL, errors="default"))
    return re.sub(r"\s+", " ", re.sub(r"[^a-z' ]", " ", spelled.lower())).strip()


def write_texts(path: Path, count: int, seed: int = 0, part: str = "train") -> None:
    """`count` spoken instructions as JSON lines, with what each asks for. Every label comes at least once."""
    rng = random.Random(seed)
    found = []
    for lang in words.LANGS:
        labels = set()
        for (_, of), (firsts, seconds) in words.COMPOUNDS.items():
            if of == lang:
                labels.update(
                    label
                    for a in firsts
                    for b in seconds
                    if words.part_of(label := words.join(lang, a, b)) == part
                )
        for kind in ("app", "setting", "button", "tab"):
            labels.update(words.concepts(kind, lang))
        made = [instructions.tap(rng, label, lang, part, spoken=True) for label in sorted(labels)]
        for kind in ("app", "setting", "button", "tab"):
            made += [
                instructions.tap(rng, label, lang, part, spoken=True)
                for label in words.concepts(kind, lang) * 10
            ]
        made += [instructions.icon(rng, name, lang, part, spoken=True) for name in list(words.ICONS) * 15]
        made += [
            instructions.fixed(rng, task, lang, part, spoken=True) for task in instructions.FIXED_TASKS * 40
        ]
        made += instructions.spoken_texts(rng, lang, part, max(0, count // 2 - len(made)))
        rng.shuffle(made)
        found += made[: count // 2]
    rng.shuffle(found)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, one in enumerate(found):
            content = (
                next(iter(one.action.arguments.values()), None) if one.task in ("launch", "type") else None
            )
            row = {
                "id": f"t{number:06d}",
                "text": one.text,
                "lang": one.lang,
                "task": one.task,
                "target": one.target,
            }
            file.write(json.dumps(row | {"content": content}, ensure_ascii=False) + "\n")


def join_texts(pool: Path, texts: Path, config: PocketConfig) -> Path:
    """Writes pool/utterances.jsonl: the pool's index with each utterance's task, target, letters and token count.

    What an utterance asks for stands in `texts`, under its id, or (of a natural pool's) in the pool's own index.
    """
    asked = {row["id"]: row for row in map(json.loads, texts.read_text(encoding="utf-8").splitlines())}
    path = pool / "utterances.jsonl"
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, line in enumerate((pool / "speech.jsonl").read_text(encoding="utf-8").splitlines()):
            entry = json.loads(line)
            known = entry if "task" in entry else asked[entry["id"]]
            row = {
                "row": number, "start": entry["start"], "samples": entry["samples"], "text": entry["text"],
                "lang": entry["lang"], "voice": entry["voice"], "letters": spell(entry["text"]),
                "tokens": speech_tokens(entry["samples"], config),
                "task": known["task"], "target": known["target"], "content": known["content"],
            }  # fmt: skip
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


class SpeechPool:
    """All utterances on one device; batches by row. Audio is float [B, S], normalized, with lengths [B]."""

    def __init__(self, folder: Path, rows: list[Mapping], device: torch.device) -> None:
        samples = np.load(folder / "speech.npy", mmap_mode="r")
        self.samples = torch.from_numpy(np.array(samples)).to(device)
        self.start = torch.tensor([row["start"] for row in rows], device=device)
        self.length = torch.tensor([row["samples"] for row in rows], device=device)
        letters = [[LETTERS.index(letter) for letter in row["letters"]] for row in rows]
        width = max(map(len, letters))
        self.letters = torch.tensor([row + [0] * (width - len(row)) for row in letters], device=device)
        self.letter_lengths = torch.tensor([len(row) for row in letters], device=device)

    def audio(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw audio float [B, S] in -1..1 with zeros at the end, and lengths [B]."""
        lengths = self.length[rows]
        index = self.start[rows][:, None] + torch.arange(int(lengths.max()), device=rows.device)
        audio = self.samples[index.clamp(max=len(self.samples) - 1)].float() / 32768
        return audio * (torch.arange(audio.shape[1], device=rows.device)[None] < lengths[:, None]), lengths


def normalize(audio: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance over each recording's own samples, padded to a multiple of WIDTH: [B, S']."""
    audio = nn.functional.pad(audio, (0, -audio.shape[1] % WIDTH))
    inside = torch.arange(audio.shape[1], device=audio.device)[None] < lengths[:, None]
    mean = (audio * inside).sum(1) / lengths
    centred = (audio - mean[:, None]) * inside
    variance = centred.square().sum(1) / lengths
    return centred / torch.sqrt(variance + 1e-7)[:, None]


def strength_at(progress: float) -> float:
    """How strong augmentation is: light for a fifth of the way, then rising to full at half of it."""
    return min(1.0, max(0.15, (progress - 0.2) / 0.3))


class Recordings:
    """PhoneTap's calibration recordings, whose voices training never hears, and how well they are spelled."""

    def __init__(self, device: torch.device) -> None:
        known = recordings("calibration")
        sounds = [load_recording(entry.id) for entry in known]
        self.letters = [spell(entry.text) for entry in known]
        self.lengths = torch.tensor([len(sound) for sound in sounds], device=device)
        self.audio = torch.zeros(len(sounds), max(map(len, sounds)))
        for row, sound in zip(self.audio, sounds):
            row[: len(sound)] = torch.from_numpy(sound)
        self.audio = self.audio.to(device)

    @torch.no_grad()
    def letter_error_rate(self, encoder: nn.Module, letters_head: nn.Linear, config: PocketConfig) -> float:
        """Wrong, missing and added letters for each letter that was said, spelled greedily."""
        frames = hear(encoder, normalize(self.audio, self.lengths), self.lengths)
        best = letters_head(frames.float()).argmax(-1).tolist()
        wrong = 0
        for row, count, said in zip(best, frame_lengths(self.lengths, config).tolist(), self.letters):
            merged = [letter for letter, _ in itertools.groupby(row[:count])]
            wrong += edit_distance("".join(LETTERS[letter] for letter in merged if letter), said)
        return wrong / sum(map(len, self.letters))


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's distance: the fewest letters to change, add or leave out to make `other` of `one`."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, start=1):
        before, row[0] = row[0], number
        for place, right in enumerate(other, start=1):
            before, row[place] = (
                row[place],
                min(row[place] + 1, row[place - 1] + 1, before + (letter != right)),
            )
    return row[-1]


def train_speech(
    encoder: nn.Module, letters_head: nn.Linear, pool: SpeechPool, config: PocketConfig, *, seconds: float,
    batch: int = 384, learning_rate: float = 1e-3, steps: int | None = None, log=print, check_every: int = 500,
) -> None:  # fmt: skip
    """CTC training in place, for `seconds` or `steps`."""
    device = pool.samples.device
    holder = nn.ModuleDict({"speech": encoder, "letters": letters_head})
    gradients = Gradients([*holder.parameters()])
    optimizers = make_optimizers(holder.named_parameters(), learning_rate, device)
    generator = torch.Generator(device=device).manual_seed(0)
    checks = Recordings(device)
    encoder.train()
    norm = torch.compile(normalize_channels, dynamic=True) if device.type == "cuda" else normalize_channels
    began, step = time.monotonic(), 0
    while True:
        progress = (time.monotonic() - began) / seconds if steps is None else step / steps
        factor = min(1.0, (step + 1) / 300) * min(1.0, max(0.02, (1 - progress) / 0.35))
        if step % check_every == 0 or progress >= 1:
            said = {"stage": "speech", "step": step, "seconds": round(time.monotonic() - began, 1)}
            log({**said, "letters_wrong": checks.letter_error_rate(encoder, letters_head, config)})
        if progress >= 1:
            break
        candidates = torch.randint(0, len(pool.start), (4 * batch,), generator=generator, device=device)
        candidates = candidates[pool.length[candidates].argsort()]
        first = int(torch.randint(0, 3 * batch + 1, (), generator=generator, device=device))
        rows = candidates[first : first + batch]
        audio, lengths = pool.audio(rows)
        audio, lengths = augment(audio, lengths, strength=strength_at(progress), generator=generator)
        audio = normalize(audio, lengths)
        gradients.flat.zero_()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            frames = hear(encoder, audio, lengths, norm)
            count = frame_lengths(lengths, config)
            loss = ctc_loss(holder, frames, count, pool.letters[rows], pool.letter_lengths[rows])
        loss.backward()
        gradients.settle()
        step_all(optimizers, factor)
        step += 1
        if step % 100 == 0:
            log(
                {
                    "stage": "speech",
                    "step": step,
                    "seconds": round(time.monotonic() - began, 1),
                    "ctc": loss.item(),
                }
            )


def frame_lengths(samples: torch.Tensor, config: PocketConfig) -> torch.Tensor:
    """Encoder frames of recordings with `samples` [B] samples."""
    for kernel, stride in zip(config.speech_config.conv_kernel, config.speech_config.conv_stride):
        samples = torch.div(samples - kernel, stride, rounding_mode="floor") + 1
    return samples.clamp(min=0)
