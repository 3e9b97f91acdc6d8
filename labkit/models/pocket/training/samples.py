"""Training samples: a screen, a request and the right answer as arrays of token ids and targets. No torch.

Every sequence is laid out alike, so that a whole batch shares its positions:

    [gMASK]<sop><|user|>\\n<|begin_of_image|> image tokens <|end_of_image|> (recording) text <|assistant|>\\n answer
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from labkit.common.actions import Action, format_action
from labkit.models.pocket.tokenizer import MARKS, SPECIAL_TOKENS
from labkit.models.pocket.training.text import PATCH, letters_by_patch, text_by_token
from labkit.phonetap import instructions, words
from labkit.phonetap.drawing.canvas import Written
from labkit.phonetap.screens import Element

TEXT_LENGTH = 112  # tokens beside the image's: prompt, recording and answer
ANSWER_LENGTH = 64
THINKING = {"typed": 0.4, "text": 0.5, "spoken": 0.35}  # share of the answers that begin with a thought
SLOTS = 5  # label tokens that an image token must name
DENSE = 20  # image tokens asked per screen and step
READ = 32  # image tokens with text on them asked to read it, per screen and step
SPELL = 64  # patches with letters on them asked to spell them, per screen and step
EMPTY = 16  # patches without
_SCREEN_INFO = '\n\n** Screen Info **\n\n{{"current_app": "{}"}}'


class Encoder:
    """Tokenizer calls without transformers' overhead; caches labels."""

    def __init__(self, tokenizer) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.id = {token: tokenizer.convert_tokens_to_ids(token) for token in (*SPECIAL_TOKENS, *MARKS)}
        self.numbers = [self(str(n))[0] for n in range(1000)]
        self.number_of = {token: n for n, token in enumerate(self.numbers)}
        self.before_image = self("[gMASK]<sop><|user|>\n<|begin_of_image|>")
        self.before_text = self("[gMASK]<sop><|user|>\n")
        self.after_image = self("<|end_of_image|>")
        self.assistant = self("<|assistant|>\n")
        self.no_thinking = self("<think></think>")
        self._labels: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def label(self, label: str) -> list[int]:
        """SLOTS token ids of a label, filled up with the end-of-text token."""
        if label not in self._labels:
            ids = self(label)[:SLOTS]
            self._labels[label] = ids + [self.id["<|endoftext|>"]] * (SLOTS - len(ids))
        return self._labels[label]


@dataclass
class Drawn:
    """What is kept of a drawn screen: its elements, which of them covers each image token, and where they are."""

    kind: str
    size: tuple[int, int]
    elements: Sequence[Element]
    cover: np.ndarray  # int16 [image tokens], -1 for none
    points: np.ndarray  # int16 [elements, 2], centres as coordinates 0..999
    text_at: np.ndarray  # int16 [cells], image tokens that have text on them
    text: np.ndarray  # int32 [cells, READ_TOKENS], which text tokens, IGNORE behind the last
    letters_at: np.ndarray  # int16 [patches], patches that have letters in them
    letters: np.ndarray  # int16 [patches, SPELLED], which letters, BLANK behind the last

    @classmethod
    def of(
        cls,
        kind: str,
        size: tuple[int, int],
        elements: Sequence[Element],
        written: Sequence[Written],
        encode: Encoder,
    ) -> Drawn:
        """Works out the covers, the centres and what can be read where."""
        boxes = np.array([e.box for e in elements], dtype=np.float32).reshape(-1, 4)
        overlap = patch_overlap(boxes, size)
        cover = np.full(overlap.shape[1], -1, dtype=np.int16)
        if len(elements):
            best = overlap.argmax(0)
            enough = overlap.max(0) > 0.2 * PATCH * PATCH
            cover[enough] = best[enough]
        centres = np.stack(
            [(boxes[:, 0] + boxes[:, 2]) / 2 / size[0], (boxes[:, 1] + boxes[:, 3]) / 2 / size[1]], -1
        )
        points = np.clip((centres * 1000).astype(np.int16), 0, 999).reshape(-1, 2)
        reading = (*text_by_token(written, size, encode), *letters_by_patch(written, size))
        return cls(kind, size, elements, cover, points, *reading)

    def pointed(self, index: int) -> np.ndarray:
        """Bool [image tokens]: those that show element `index`."""
        overlap = patch_overlap(np.array([self.elements[index].ink], dtype=np.float32), self.size)[0]
        return overlap >= 0.3 * overlap.max()


def patch_overlap(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Area in pixels that each box [E, 4] shares with each image token: [E, rows * columns]."""
    columns, rows = size[0] // PATCH, size[1] // PATCH
    left, top = np.arange(columns) * PATCH, np.arange(rows) * PATCH
    wide = np.clip(np.minimum(boxes[:, 2:3], left + PATCH) - np.maximum(boxes[:, 0:1], left), 0, None)
    high = np.clip(np.minimum(boxes[:, 3:4], top + PATCH) - np.maximum(boxes[:, 1:2], top), 0, None)
    return (high[:, :, None] * wide[:, None, :]).reshape(len(boxes), -1)


@dataclass
class Utterances:
    """Recordings by what they ask for: rows of the speech pool with their instruction."""

    rows: Sequence[Mapping]  # each: row, tokens, text, lang, task, target
    by_target: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    fixed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if row["task"] in ("tap", "icon"):
                self.by_target.setdefault((row["task"], row["target"]), []).append(number)
            elif row["task"] != "other":  # known to the ear alone
                self.fixed.append(number)


class SampleMaker:
    """Makes samples of one worker's screens with its own random numbers."""

    def __init__(self, encoder: Encoder, rng: random.Random, part: str = "train") -> None:
        self.encode, self.rng, self.part = encoder, rng, part

    # -- what is asked and answered -------------------------------------------------------------------------

    def typed(self, drawn: Drawn) -> tuple[str, str, str, int]:
        """(request, thought, answer, index of the target element or -1) for a typed instruction."""
        rng = self.rng
        lang = drawn.elements[0].lang if drawn.elements else rng.choice(words.LANGS)
        if rng.random() < 0.05:
            lang = "zh" if lang == "en" else "en"
        if drawn.kind == "loading" and rng.random() < 0.8:
            label = words.sample_labels(rng, "app", lang, 1, self.part)[0]
            asked = instructions.tap(rng, label, lang, self.part)
            return (
                asked.text,
                instructions.think("Wait", lang),
                self.act(instructions.fixed_action("Wait", lang)),
                -1,
            )
        draw = rng.random()
        if draw < 0.78 and drawn.elements:
            return self.tap(drawn, lang)
        if draw < 0.82 and drawn.elements:
            return self.name(drawn, lang)
        if draw < 0.88:
            asked = instructions.launch(
                rng, words.sample_labels(rng, "app", lang, 1, self.part)[0], lang, self.part
            )
        elif draw < 0.92:
            asked = instructions.type_text(
                rng, words.sample_labels(rng, "chip", lang, 1, self.part)[0], lang, self.part
            )
        else:
            asked = instructions.fixed(rng, rng.choice(instructions.FIXED_TASKS), lang, self.part)
        return asked.text, instructions.think(asked.task, lang), self.act(asked.action), -1

    def choose(self, drawn: Drawn) -> int:
        """An element to ask for: keys seldom; icons, of which a screen has few, more often than labels."""
        weights = [{"key": 0.08}.get(e.role, 1.5 if e.kind == "icon" else 1.0) for e in drawn.elements]
        return self.rng.choices(range(len(weights)), weights)[0]

    def tap(self, drawn: Drawn, lang: str) -> tuple[str, str, str, int]:
        rng = self.rng
        described = [i for i, e in enumerate(drawn.elements) if e.label in instructions.DESCRIPTIONS[e.lang]]
        if described and rng.random() < 0.2:
            index = rng.choice(described)
            element = drawn.elements[index]
            asked = instructions.what(rng, element.label, element.lang, self.part)
        else:
            index = self.choose(drawn)
            element = drawn.elements[index]
            make = instructions.icon if element.kind == "icon" else instructions.tap
            asked = make(rng, element.label, lang, self.part)
        text = asked.text
        if rng.random() < 0.05:
            text += _SCREEN_INFO.format(rng.choice(words.concepts("app", asked.lang)))
        elif rng.random() < 0.05:
            extra = words.filler(rng, asked.lang, rng.randrange(3, 12))
            text = f"{text} {extra}" if rng.random() < 0.5 else f"{extra} {text}"
        return text, self.thought(drawn, index, asked.lang), self.tap_answer(drawn, index), index

    def name(self, drawn: Drawn, lang: str) -> tuple[str, str, str, int]:
        """ "What is at x, y?": the answer is the label there."""
        index = self.choose(drawn)
        x, y = drawn.points[index]
        text = f"[{x},{y}]是什么?" if lang == "zh" else f"What is at [{x},{y}]?"
        element = drawn.elements[index]
        thing = words.ICONS[element.label][lang][0] if element.kind == "icon" else element.label
        return text, instructions.think("name", lang), self.act(Action("finish", {"message": thing})), -1

    def thought(self, drawn: Drawn, index: int, lang: str) -> str:
        element = drawn.elements[index]
        thing = words.ICONS[element.label][lang][0] if element.kind == "icon" else element.label
        return instructions.describe(thing, lang, drawn.points[index][1] / 1000)

    def tap_answer(self, drawn: Drawn, index: int) -> str:
        x, y = drawn.points[index]
        return self.act(Action("Tap", {"element": (int(x), int(y))}))

    def act(self, action: Action) -> str:
        return f"<answer>{format_action(action)}</answer>"

    def spoken(self, drawn: Drawn, utterances: Utterances) -> tuple[Mapping, str, str, int] | None:
        """(utterance, thought, answer, target) for a recording that fits the screen; None if there is none."""
        rng = self.rng
        if rng.random() < 0.1:
            row = utterances.rows[rng.choice(utterances.fixed)]
            lang = row["lang"]
            if row["task"] == "launch":
                action = Action("Launch", {"app": row["content"]})
            elif row["task"] == "type":
                action = Action("Type", {"text": row["content"]})
            else:
                action = instructions.fixed_action(row["task"], lang)
            thought = instructions.heard(row["text"], lang) + instructions.think(row["task"], lang)
            return row, thought, self.act(action), -1
        for _ in range(3):
            if not drawn.elements:
                return None
            index = self.choose(drawn)
            element = drawn.elements[index]
            found = utterances.by_target.get(("icon" if element.kind == "icon" else "tap", element.label))
            if found:
                row = utterances.rows[rng.choice(found)]
                lang = row["lang"]
                thought = instructions.heard(row["text"], lang) + self.thought(drawn, index, lang)
                return row, thought, self.tap_answer(drawn, index), index
        return None

    # -- arrays ---------------------------------------------------------------------------------------------

    def sequence(self, image_tokens: int, audio_tokens: int, request: str, thought: str | None, answer: str):
        """Token ids, their sources, and the answer's start; None when it is too long.

        Sources index the table [image | audio | text] of features: see `Batch`.
        """
        encode = self.encode
        head = [*(encode.before_image if image_tokens else encode.before_text)]
        middle = [*encode.after_image] if image_tokens else []
        if audio_tokens:
            audio = [
                encode.id["<|begin_of_audio|>"],
                *[encode.id["<|audio|>"]] * audio_tokens,
                encode.id["<|end_of_audio|>"],
            ]
        else:
            audio = []
        tail = [*encode(request), *encode.assistant]
        if thought is None:
            tail += encode.no_thinking
            written = encode(answer)
        else:
            written = encode(f"<think>{thought}</think>{answer}")
        written.append(encode.id["<|endoftext|>"])
        ids = head + [encode.id["<|image|>"]] * image_tokens + middle + audio + tail + written
        if len(ids) > image_tokens + TEXT_LENGTH or len(written) > ANSWER_LENGTH:
            return None
        return ids, len(ids) - len(written)

    def coordinates(self, written: Sequence[int]) -> list[int]:
        """For each answer token the coordinate it is (0..999), or -1; only inside element=[x,y]."""
        encode, found, inside = self.encode, [], False
        opening = encode("=[")[0]
        for token in written:
            inside = token == opening or (inside and (token in encode.number_of or token == encode(",")[0]))
            found.append(encode.number_of.get(token, -1) if inside else -1)
        return found
