"""Tasks for the phone: two to four steps, each with an instruction in held-out wording and the place it leads to."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from labkit.common.actions import Action
from labkit.common.errors import LabError
from labkit.phonetap import instructions, words
from labkit.phonetap.items import tap_action
from labkit.phonetap.phone import Phone, Place
from labkit.phonetap.screens import Element

LANGUAGES = ("zh", "en")


@dataclass(frozen=True)
class TaskStep:
    """One step: the instruction, a right action, and the place where the phone must be afterwards."""

    instruction: str
    action: Action
    place: Place


@dataclass(frozen=True)
class Task:
    """A task on one phone. `goal` joins all its steps, for models that plan by themselves."""

    seed: int
    lang: str
    steps: tuple[TaskStep, ...]

    @property
    def goal(self) -> str:
        """All steps in one sentence."""
        sentences = [step.instruction.rstrip("。.") for step in self.steps]
        return ("，然后" if self.lang == "zh" else ", then ").join(sentences)

    def phone(self) -> Phone:
        """The phone at the start of the task."""
        return Phone(self.seed, self.lang)


def tasks(count: int = 20, seed: int = 0, lang: str | None = None) -> list[Task]:
    """Tasks of two to four steps, the same for the same arguments; ``lang`` None alternates both.

    Raises:
        LabError: ``count`` is below 1, or the language is unknown.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise LabError(f"count must be a whole number of 1 or more; it is {count!r}")
    drawn: list[Task] = []
    number = 0
    while len(drawn) < count:
        chosen = lang or LANGUAGES[number % 2]
        task = _task(random.Random(f"phone task {seed} {number}"), seed * 100_003 + number, chosen)
        if task is not None:
            drawn.append(task)
        number += 1
    return drawn


def _task(rng: random.Random, seed: int, lang: str) -> Task | None:
    phone, steps = Phone(seed, lang), []
    for _ in range(rng.randint(2, 4)):
        choices = _choices(rng, phone, is_first=not steps)
        if not choices:
            break
        instruction, action = rng.choice(choices)()
        phone.do(action)
        steps.append(TaskStep(instruction.text, action, phone.place))
    return Task(seed, lang, tuple(steps)) if len(steps) > 1 else None


def _choices(
    rng: random.Random, phone: Phone, is_first: bool
) -> list[Callable[[], tuple[instructions.Instruction, Action]]]:
    """The possible next steps; repeated ones are drawn more often."""
    lang, screen = phone.lang, phone.screen

    def tap(element: Element) -> tuple[instructions.Instruction, Action]:
        return instructions.tap(rng, element.label, lang, "test"), tap_action(element, screen.size)

    def fixed(name: str) -> tuple[instructions.Instruction, Action]:
        instruction = instructions.fixed(rng, name, lang, "test")
        return instruction, instruction.action

    def write() -> tuple[instructions.Instruction, Action]:
        text = words.sample_labels(rng, "chip", lang, 1, "test")[0]
        instruction = instructions.type_text(rng, text, lang, "test")
        return instruction, instruction.action

    leading = [e for e in screen.elements if e.kind == "text" and e.role in ("app", "row", "chip")]
    choices: list = [lambda e=e: tap(e) for e in leading]
    if is_first:
        return choices
    if phone.field is not None:
        choices += [write] * 6
    return [*choices, *[lambda: fixed("Back")] * 2, lambda: fixed("Home")]
