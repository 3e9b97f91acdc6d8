"""Batches for training, made by worker processes that draw screens and write questions about them. No torch.

Each worker owns a shard of screen slots per size: it draws into shared memory, remembers the elements, and asks many
questions of each screen. Slots are redrawn while the trainer has enough batches, so that screens keep changing.
Workers are forked before anything touches the GPU and never call torch.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import queue
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from labkit.models.pocket.training.samples import (
    ANSWER_LENGTH,
    DENSE,
    EMPTY,
    READ,
    SLOTS,
    SPELL,
    TEXT_LENGTH,
    THINKING,
    Drawn,
    Encoder,
    SampleMaker,
    Utterances,
)
from labkit.models.pocket.training.text import BLANK, IGNORE, PATCH, READ_TOKENS, SPELLED
from labkit.phonetap.screens import KINDS, render_with_text

SIZES = {(196, 420): 0.3, (224, 476): 0.7}  # pixels of a screen -> share of the batches
PLAIN_SIZES = {(168, 364): 0.1, (196, 420): 0.15, (224, 476): 0.4, (252, 532): 0.15, (280, 588): 0.2}
NEAR = 3  # thousandths: how far an x that is written before its y may be from the true one
DRAW_AT_ONCE = 16  # screens; `slots` and `first_slots` are multiples of it
_KIND_WEIGHTS = dict(zip(KINDS, (22, 16, 9, 9, 14, 12, 6, 4, 1, 7)))


_NO_SCREEN = Drawn("text", (PATCH, PATCH), (), *(np.zeros(0, dtype=np.int16) for _ in range(6)))


@dataclass
class Batch:
    """One training batch: B samples about S screens of one size (N image tokens, L = N + TEXT_LENGTH positions).

    The first B / S samples are about the first screen, the next about the second, and so on. Of each sample:

    ids [B, L]; audio_source [B, L]: which speech token of its recording stands there, -1 for none;
    prompt [B]: length of the prompt; position, token, coordinate [B, ANSWER_LENGTH]: the answer's places (of the token
    before), its tokens (IGNORE where it has ended), and its coordinates (-1 where none); point_at [B, 2]: which of them
    are the tap's x and y (-1 without a tap);
    pointed [B, N]: image tokens that show the target; rows [B]: rows of the speech pool (-1: typed).

    Of each screen: slots [S], its slot; dense_at [S, DENSE], dense_label [S, DENSE, SLOTS], dense_point [S, DENSE, 2]: what
    image tokens must name and where that element's centre is (IGNORE: background); read_at [S, READ],
    read [S, READ, READ_TOKENS]: the text tokens that are drawn on an image token; spell_at [S, SPELL + EMPTY],
    spell [S, SPELL + EMPTY, SPELLED]: the letters in a patch, in the image processor's order.
    """

    kind: str
    size: int  # which of the source's sizes, -1 for text alone
    arrays: dict[str, np.ndarray]


def image_tokens(size: tuple[int, int]) -> int:
    """Image tokens of a screen of this size in pixels."""
    return (size[0] // PATCH) * (size[1] // PATCH)


class BatchMaker:
    """Draws screens and makes batches from them; one per worker, usable alone in tests."""

    def __init__(
        self, encoder: Encoder, seed: int, style: str = "train", part: str = "train", hard: float = 0.4
    ) -> None:
        self.rng = random.Random(seed)
        self.encode, self.style, self.part, self.hard = encoder, style, part, hard
        self.maker = SampleMaker(encoder, self.rng, part)

    def draw(self, size: tuple[int, int]) -> tuple[np.ndarray, Drawn]:
        """A new random screen: pixels uint8 [h, w, 3] and what is known of it."""
        kind = self.rng.choices(list(_KIND_WEIGHTS), _KIND_WEIGHTS.values())[0]
        pixels, elements, written = render_with_text(
            self.rng.getrandbits(48), size=size, kind=kind, style=self.style, part=self.part,
            hard=self.rng.random() < self.hard,
        )  # fmt: skip
        return pixels, Drawn.of(kind, size, elements, written, self.encode)

    def batch(
        self,
        kind: str,
        size: int,
        shard: list[Drawn],
        count: int,
        utterances: Utterances | None = None,
        questions: int = 1,
    ) -> Batch:
        """`count` samples, `questions` about each screen (of an "eye" batch: `count` screens).

        kind: "typed", "spoken", "text" (no screen; `shard` unused) or "eye" (screens, no questions).
        """
        tokens = image_tokens(shard[0].size) if kind != "text" else 0
        rows: list[dict] = []
        screens: list[dict] = []
        questions = 1 if kind == "eye" else questions
        while len(rows) < count:
            slot = self.rng.randrange(len(shard)) if shard else 0
            drawn = shard[slot] if shard else None
            asked = [{}] if kind == "eye" else self._ask(kind, tokens, drawn, utterances, questions)
            if asked is None:
                continue
            rows += asked
            if kind != "text":
                screens.append({"slots": slot, **self._dense(drawn, tokens)})
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if screens:
            arrays |= {name: np.stack([row[name] for row in screens]) for name in screens[0]}
        return Batch(kind, size if kind != "text" else -1, arrays)

    def _ask(self, kind, tokens, drawn, utterances, questions: int) -> list[dict] | None:
        """`questions` samples about one screen; None where it does not lend itself to as many."""
        asked: list[dict] = []
        for _ in range(4 * questions):
            sample = self._sample(kind, tokens, drawn, utterances)
            if sample is not None:
                asked.append(sample)
            if len(asked) == questions:
                return asked
        return None

    def _sample(
        self, kind: str, tokens: int, drawn: Drawn | None, utterances: Utterances | None
    ) -> dict | None:
        rng, audio_tokens, row = self.rng, 0, -1
        if kind == "spoken":
            found = self.maker.spoken(drawn, utterances)
            if found is None:
                return None
            utterance, thought, answer, target = found
            request, audio_tokens, row = "", utterance["tokens"], utterance["row"]
        else:
            request, thought, answer, target = self.maker.typed(_NO_SCREEN if kind == "text" else drawn)
        made = self.maker.sequence(
            tokens, audio_tokens, request, thought if rng.random() < THINKING[kind] else None, answer
        )
        if made is None:
            return None
        ids, start = made
        return self._arrays(ids, start, tokens, drawn, target) | {"rows": np.int64(row)}

    def _arrays(self, ids: list[int], start: int, tokens: int, drawn: Drawn | None, target: int) -> dict:
        length = tokens + TEXT_LENGTH
        end = self.encode.id["<|endoftext|>"]
        padded = np.full(length, end, dtype=np.int32)
        padded[: len(ids)] = ids
        written = ids[start:]
        token = np.full(ANSWER_LENGTH, IGNORE, dtype=np.int32)
        token[: len(written)] = written
        coordinate = np.full(ANSWER_LENGTH, -1, dtype=np.int16)
        if target >= 0:
            coordinate[: len(written)] = self.maker.coordinates(written)
        point_at = np.full(2, -1, dtype=np.int16)
        found = np.flatnonzero(coordinate >= 0)
        if len(found) == 2:
            point_at[:] = found
            padded[start + found[0]] = self._near(coordinate[found[0]])
        is_audio = padded == self.encode.id["<|audio|>"]
        arrays = {
            "ids": padded,
            "audio_source": np.where(is_audio, np.cumsum(is_audio) - 1, -1).astype(np.int16),
            "prompt": np.int32(start),
            "position": np.minimum(np.arange(ANSWER_LENGTH) + start - 1, length - 1).astype(np.int32),
            "token": token,
            "coordinate": coordinate,
            "point_at": point_at,
        }
        if drawn is not None:
            arrays["pointed"] = drawn.pointed(target) if target >= 0 else np.zeros(tokens, dtype=bool)
        return arrays

    def _near(self, x: int) -> int:
        """The token that the model reads where x stands: half of the time a neighbour's, so that it learns the right y
        behind an x that is slightly off, which is what it meets where rounding has changed a logit."""
        if self.rng.random() < 0.5:
            x = min(max(x + self.rng.randint(-NEAR, NEAR), 0), 999)
        return self.encode.numbers[x]

    def _dense(self, drawn: Drawn, tokens: int) -> dict:
        at = np.array(self.rng.sample(range(tokens), min(DENSE, tokens)), dtype=np.int16)
        label = np.full((len(at), SLOTS), IGNORE, dtype=np.int32)
        point = np.full((len(at), 2), IGNORE, dtype=np.int16)
        for i, element in enumerate(drawn.cover[at]):
            if element < 0:
                label[i, 0] = self.encode.id["[MASK]"]
                continue
            what = drawn.elements[element]
            label[i] = self.encode.label(f"[MASK]{what.label}" if what.kind == "icon" else what.label)
            point[i] = drawn.points[element]
        read_at, read = np.zeros(READ, dtype=np.int16), np.full((READ, READ_TOKENS), IGNORE, dtype=np.int32)
        count = len(drawn.text_at)
        chosen = self.rng.sample(range(count), min(READ, count))
        read_at[: len(chosen)], read[: len(chosen)] = drawn.text_at[chosen], drawn.text[chosen]
        spell_at = np.array(self.rng.choices(range(4 * tokens), k=SPELL + EMPTY), dtype=np.int16)
        spell = np.full((SPELL + EMPTY, SPELLED), BLANK, dtype=np.int16)
        spell[np.isin(spell_at, drawn.letters_at)] = IGNORE  # drawn as empty and not so
        count = len(drawn.letters_at)
        chosen = self.rng.sample(range(count), min(SPELL, count))
        spell_at[: len(chosen)], spell[: len(chosen)] = drawn.letters_at[chosen], drawn.letters[chosen]
        return {
            "dense_at": at, "dense_label": label, "dense_point": point, "read_at": read_at, "read": read,
            "spell_at": spell_at, "spell": spell,
        }  # fmt: skip


def load_utterances(path: Path) -> Utterances:
    """Reads the speech pool's index (one JSON object a line)."""
    return Utterances([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])


def shared_pixels(slots: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 [slots, h, w, 3] in memory that forked workers share."""
    shape = (slots, size[1], size[0], 3)
    return np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), dtype=np.uint8).reshape(shape)


@dataclass(frozen=True)
class SourceSettings:
    """How batches are made.

    sizes: of the screens, in pixels, with their shares of the batches.
    slots, first_slots: screens a worker and size keeps, and has before its batches begin; rounds: how often at most a
    worker draws DRAW_AT_ONCE new screens of each size while it waits to hand over a batch.
    """

    workers: int = 15
    slots: int = 960
    first_slots: int = 64
    rounds: int = 4
    batch: int = 256
    questions: int = 4
    seed: int = 1
    speech_index: Path | None = None
    spoken_share: float = 0.5
    text_share: float = 0.02
    eye_seconds: float = 0
    sizes: Mapping[tuple[int, int], float] = field(default_factory=lambda: SIZES)


class BatchSource:
    """Worker processes and their queue. Iterating gives ("slots", size, first, count) and `Batch` messages.

    Start it before CUDA is used. Processes that train together (`rank`) have workers and screens of their own.
    """

    def __init__(self, encoder: Encoder, settings: SourceSettings, rank: int = 0) -> None:
        context = multiprocessing.get_context("fork")
        self.settings = settings
        self.pixels = [shared_pixels(settings.workers * settings.slots, size) for size in settings.sizes]
        self.queue = context.Queue(maxsize=3 * settings.workers)
        self.stop_event = context.Event()
        eye_until = time.monotonic() + settings.eye_seconds
        self.processes = [
            context.Process(target=self._work, args=(encoder, number, rank, eye_until), daemon=True)
            for number in range(settings.workers)
        ]
        for process in self.processes:
            process.start()

    def _kind(self, rng: random.Random, eye_until: float, can_hear: bool) -> str:
        if time.monotonic() < eye_until:
            return "eye"
        if can_hear and rng.random() < self.settings.spoken_share:
            return "spoken"
        return "text" if rng.random() < self.settings.text_share else "typed"

    def _work(self, encoder: Encoder, number: int, rank: int, eye_until: float) -> None:
        settings = self.settings
        maker = BatchMaker(encoder, settings.seed * 1000 + rank * 100 + number)
        sizes, weights = list(settings.sizes), settings.sizes.values()
        shards: list[list[Drawn]] = [[] for _ in sizes]
        base, turn, utterances, pending, may_draw = number * settings.slots, 0, None, None, settings.rounds
        index = settings.speech_index
        while not self.stop_event.is_set():
            if pending is None and min(map(len, shards)) >= settings.first_slots:
                if utterances is None and index is not None and index.exists():
                    utterances = load_utterances(index)
                kind = self._kind(maker.rng, eye_until, utterances is not None)
                size = maker.rng.choices(range(len(sizes)), weights)[0]
                shard = shards[size] if kind != "text" else []
                pending = maker.batch(kind, size, shard, settings.batch, utterances, settings.questions)
                if kind != "text":
                    pending.arrays["slots"] = pending.arrays["slots"] + base
            if pending is not None:
                try:
                    self.queue.put(pending, timeout=0.02)
                    pending, may_draw = None, settings.rounds
                except queue.Full:
                    pass
            full = min(map(len, shards)) == settings.slots
            if not may_draw or (pending is None and full):
                continue
            may_draw -= min(map(len, shards)) >= settings.first_slots
            for size in range(len(sizes)):
                where = turn % settings.slots
                for offset in range(DRAW_AT_ONCE):
                    pixels, drawn = maker.draw(sizes[size])
                    slot = (where + offset) % settings.slots
                    self.pixels[size][base + slot] = pixels
                    if slot < len(shards[size]):
                        shards[size][slot] = drawn
                    else:
                        shards[size].append(drawn)
                self.queue.put(("slots", size, base + where, DRAW_AT_ONCE))
            turn += DRAW_AT_ONCE

    def __iter__(self) -> Iterator:
        while True:
            yield self.queue.get()

    def close(self) -> None:
        """Ends the workers."""
        self.stop_event.set()
        for process in self.processes:
            process.terminate()
