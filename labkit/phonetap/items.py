"""Items of the PhoneTap benchmark, generated from seeds in three splits; boxes and points in thousandths of the screen.

- `typed`: a screen in the test style and a typed request in held-out wording: taps by label or by icon, swipes,
  launches, typing, back, home, waiting, questions.
- `spoken`: the same, asked by a shipped recording of a speaker who is not in the training data.
- `hard`: small labels, twenty and more elements, look-alike names, pop-ups, requests that describe an element instead
  of naming it; a tap must hit the element's middle, within `FINE_TARGET`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from labkit.common.actions import COORDINATE_MAX, Action
from labkit.common.errors import LabError, ScreenError
from labkit.phonetap import instructions, words
from labkit.phonetap.recordings import Recording, load_recording, recordings
from labkit.phonetap.screens import Element, Screen, draw_screen

SPLITS = ("typed", "spoken", "hard")
PARTS = ("train", "calibration", "test")
SIZE = (224, 476)
STANDARD_SEED = 0
FINE_TARGET = (30.0, 6.0)
"""Largest width and height of a hard target in thousandths of the screen: 32 x 14 pixels of a phone's 1080 x 2400, the
letter height of small print; a quarter of ScreenSpot-Pro's mean target (Li et al., 2025). Even the unquantized pocket
model misses some of these: targets that every plan hits cannot tell plans apart."""
_SCREENS_FOR = {
    "app": ("home", "menu"), "setting": ("settings", "menu"), "contact": ("contacts", "messages"),
    "menu": ("menu", "settings"), "chip": ("search",), "button": ("dialog", "detail"), "tab": ("menu",),
}  # fmt: skip
_TARGETLESS = tuple(task for task in instructions.FIXED_TASKS if task not in ("who", "outside", "done"))


@dataclass(frozen=True)
class Item:
    """One question with its right answer; `action` taps the centre of `box`.

    `box` (x0, y0, x1, y1 in thousandths), `target` (label or icon name) and `target_kind` are None if the answer
    is no tap. `task` is tap, icon, what, launch, type or a fixed request; `group` is the `Recording.group`
    of a spoken item.
    """

    id: str
    split: str
    lang: str
    task: str
    target: str | None
    target_kind: str | None
    instruction: str
    recording: str | None
    group: str | None
    screen: Screen
    action: Action
    box: tuple[float, float, float, float] | None

    def messages(self) -> list[dict[str, Any]]:
        """One user turn for an engine: the screenshot, then the recording or the typed request."""
        parts: list[dict[str, Any]] = [{"type": "image", "image": self.screen.image}]
        if self.recording is not None:
            parts.append({"type": "audio", "audio": load_recording(self.recording)})
        else:
            parts.append({"type": "text", "text": self.instruction})
        return [{"role": "user", "content": parts}]


def box_of(element: Element, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """An element's tap box in thousandths of the screen."""
    x0, y0, x1, y1 = element.box
    return (x0 / size[0] * 1000, y0 / size[1] * 1000, x1 / size[0] * 1000, y1 / size[1] * 1000)


def fine_box(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """The middle of a tap box, at most `FINE_TARGET` large; all in thousandths."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    wide, tall = (min(a, b) for a, b in zip((box[2] - box[0], box[3] - box[1]), FINE_TARGET, strict=True))
    return (x - wide / 2, y - tall / 2, x + wide / 2, y + tall / 2)


def tap_action(element: Element, size: tuple[int, int]) -> Action:
    """The tap on an element's centre."""
    x0, y0, x1, y1 = box_of(element, size)
    point = (min(COORDINATE_MAX, int((x0 + x1) / 2)), min(COORDINATE_MAX, int((y0 + y1) / 2)))
    return Action("Tap", {"element": point})


def splits_of(split: str) -> tuple[str, ...]:
    """The splits of "all", or of names between commas.

    Raises:
        LabError: an unknown split, or one that is named twice.
    """
    names = SPLITS if split == "all" else tuple(split.split(","))
    for name in names:
        if name not in SPLITS or names.count(name) > 1:
            raise LabError(
                f"unknown split {split!r}; known: all, {', '.join(SPLITS)}, or several with commas between"
            )
    return names


def items(
    split: str = "all",
    count: int = 200,
    seed: int | None = None,
    part: str = "test",
    size: tuple[int, int] | None = None,
) -> list[Item]:
    """`count` items of a split, or of several in turn ("typed,hard"; "all": typed, spoken and hard), the same for the
    same arguments.

    seed None is the standard set; another seed draws other items (spoken ones use the shipped recordings on new
    screens). part: "test" for reporting; "calibration" for calibrating and searching, which never use test items.
    size: the screens' pixels (default 224 x 476). Screens are drawn when their image is first used.
    """
    splits = splits_of(split)
    if part not in ("test", "calibration"):
        raise LabError(f"unknown part {part!r}; known: test, calibration")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise LabError(f"count must be a whole number of 1 or more; it is {count!r}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise LabError(f"seed must be a whole number of 0 or more; it is {seed!r}")
    base = STANDARD_SEED if seed is None else seed
    streams = {name: _stream(name, base, part, size or SIZE) for name in splits}
    return [next(streams[splits[number % len(splits)]]) for number in range(count)]


def _stream(split: str, seed: int, part: str, size: tuple[int, int]) -> Iterator[Item]:
    make = {"typed": _typed, "hard": _hard}.get(split)
    spoken = _shuffled_recordings(seed, part) if split == "spoken" else None
    number = 0
    while True:
        rng = random.Random(f"{part} {split} {seed} {number}")
        name = f"{part}-{split}-{seed}-{number:05d}"
        item = _spoken(rng, next(spoken), name, part, size) if spoken else make(rng, name, part, size)
        if item is not None:
            yield item
        number += 1


def _shuffled_recordings(seed: int, part: str) -> Iterator[Recording]:
    turn = 0
    while True:
        order = list(recordings(part))
        random.Random(f"{part} recordings {seed} {turn}").shuffle(order)
        yield from order
        turn += 1


def _screen_seed(rng: random.Random) -> int:
    return rng.getrandbits(48)


def _item(name, split, instruction, screen, element=None, recording=None) -> Item:
    box = box_of(element, screen.size) if element else None
    return Item(
        id=name, split=split, lang=instruction.lang, task=instruction.task,
        target=element.label if element else None,
        target_kind=element.kind if element else None,
        instruction=instruction.text,
        recording=recording.id if recording else None, group=recording.group if recording else None,
        screen=screen,
        action=tap_action(element, screen.size) if element else instruction.action,
        box=fine_box(box) if box and split == "hard" else box,
    )  # fmt: skip


def _typed(rng: random.Random, name: str, part: str, size: tuple[int, int]) -> Item | None:
    screen = draw_screen(_screen_seed(rng), size=size, style="test", part=part)
    lang = screen.lang
    if screen.kind == "loading":
        return _item(name, "typed", instructions.fixed(rng, "Wait", lang, part), screen)
    if rng.random() < 0.8:
        kind = "icon" if rng.random() < 0.25 else "text"
        choices = [e for e in screen.elements if e.kind == kind and e.role != "key"]
        if not choices:
            return None
        element = rng.choice(choices)
        make = instructions.icon if kind == "icon" else instructions.tap
        return _item(name, "typed", make(rng, element.label, lang, part), screen, element)
    task = rng.choice(("fixed", "fixed", "launch", "type", "talk"))
    if task == "launch":
        instruction = instructions.launch(rng, words.sample_labels(rng, "app", lang, 1, part)[0], lang, part)
    elif task == "type":
        instruction = instructions.type_text(
            rng, words.sample_labels(rng, "chip", lang, 1, part)[0], lang, part
        )
    else:
        instruction = instructions.fixed(
            rng, rng.choice(_TARGETLESS if task == "fixed" else ("who", "done")), lang, part
        )
    return _item(name, "typed", instruction, screen)


def _hard(rng: random.Random, name: str, part: str, size: tuple[int, int]) -> Item | None:
    kind = rng.choice(
        ("home", "home", "settings", "contacts", "messages", "menu", "menu", "search", "dialog")
    )
    screen = draw_screen(_screen_seed(rng), size=size, style="test", part=part, kind=kind, hard=True)
    described = [
        e for e in screen.elements if e.kind == "text" and e.label in instructions.DESCRIPTIONS[e.lang]
    ]
    if described and rng.random() < 0.35:
        element = rng.choice(described)
        return _item(name, "hard", instructions.what(rng, element.label, element.lang, part), screen, element)
    texts = [e for e in screen.elements if e.kind == "text" and e.role not in ("key", "field")]
    if not texts:
        return None
    labels = {e.label for e in texts}
    alike = [e for e in texts if labels & set(words.lookalikes(rng, e.label, e.lang, part))]
    element = rng.choice(alike if alike and rng.random() < 0.9 else texts)
    return _item(name, "hard", instructions.tap(rng, element.label, element.lang, part), screen, element)


def _kinds_for(label: str, lang: str) -> tuple[str, ...]:
    for kind, screens in _SCREENS_FOR.items():
        if label in words.concepts(kind, lang):
            return screens
        firsts, seconds = words.COMPOUNDS.get((kind, lang), ((), ()))
        if any(label == words.join(lang, a, b) for a in firsts if label.startswith(a) for b in seconds):
            return screens
    return ("home",)


def _spoken(
    rng: random.Random, recording: Recording, name: str, part: str, size: tuple[int, int]
) -> Item | None:
    instruction = instructions.Instruction(
        recording.text, recording.lang, recording.task, recording.target, recording.action
    )
    if recording.target is None:
        screen = draw_screen(_screen_seed(rng), size=size, style="test", part=part, lang=recording.lang)
        return _item(name, "spoken", instruction, screen, recording=recording)
    if recording.task == "icon":
        for _ in range(200):
            screen = draw_screen(_screen_seed(rng), size=size, style="test", part=part, lang=recording.lang)
            icons = [e for e in screen.elements if e.kind == "icon" and e.label == recording.target]
            if icons:
                return _item(name, "spoken", instruction, screen, icons[0], recording)
        return None
    kind = rng.choice(_kinds_for(recording.target, recording.lang))
    try:
        screen = draw_screen(
            _screen_seed(rng), size=size, style="test", part=part, kind=kind, must_have=[recording.target]
        )
    except ScreenError:
        return None
    return _item(name, "spoken", instruction, screen, screen.find(recording.target), recording)
