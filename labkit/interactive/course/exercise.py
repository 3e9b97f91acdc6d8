"""An exercise of the course, and the verdict on an answer: right with the reason, or a hint."""

import html
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from labkit.common.errors import LabError

RIGHT, NOT_YET, OPEN = "#0072B2", "#D55E00", "#7A7A7A"
"""Colours of the bar beside a verdict (from Okabe and Ito's palette); the first word carries the same state."""


class Hint(Exception):
    """Raised when an answer is wrong; its message tells the learner what to look at again."""


@dataclass(frozen=True)
class Exercise:
    """One question whose answer can be checked.

    Attributes:
        id: notebook and letter, ``02-a``.
        task: the question, in a sentence.
        judge: takes the answer; returns if it is right, raises `Hint` if not.
        because: the reason for the right answer.
        hints: from vague to nearly the answer, for `labkit.interactive.course.hint`.
    """

    id: str
    task: str
    judge: Callable[[Any], None]
    because: str
    hints: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """The result of `labkit.interactive.course.check`; true if the answer is right."""

    exercise: str
    right: bool
    message: str
    answered: bool = True
    is_chinese: bool = False

    def __bool__(self) -> bool:
        return self.right

    @property
    def word(self) -> str:
        """Right, Not yet, or Open; 正确, 还没有, 待答."""
        state = 0 if self.right else 1 if self.answered else 2
        return (("正确", "还没有", "待答") if self.is_chinese else ("Right", "Not yet", "Open"))[state]

    def __repr__(self) -> str:
        return f"{self.exercise} · {self.word}. {self.message}"

    def _repr_html_(self) -> str:
        colour = RIGHT if self.right else NOT_YET if self.answered else OPEN
        return (
            f'<div style="border-left:6px solid {colour};padding:6px 14px;margin:4px 0;font-size:14px;'
            f'max-width:88ch"><b>{self.exercise} · {self.word}.</b> {html.escape(self.message)}</div>'
        )


def judged(exercise: Exercise, answer: Any) -> Verdict:
    """The verdict on an answer; ``...`` is no answer yet. Never raises for what a learner wrote."""
    if answer is ...:
        return Verdict(
            exercise.id, False, f"{exercise.task} Replace the three dots, and run the cell again.", False
        )
    try:
        exercise.judge(answer)
    except Hint as hint:
        return Verdict(exercise.id, False, str(hint))
    except LabError as error:
        return Verdict(exercise.id, False, f"The lab refuses this: {error}.")
    return Verdict(exercise.id, True, exercise.because)


def number(answer: Any, unit: str = "") -> float:
    """An answer as a number; raises `Hint` for anything else."""
    if hasattr(answer, "item") and getattr(answer, "size", None) is not None:
        try:
            answer = answer.item()
        except (ValueError, RuntimeError):
            raise Hint("This is many numbers; one is asked for.") from None
    if isinstance(answer, bool) or not isinstance(answer, numbers.Real):
        in_unit = f", in {unit}" if unit else ""
        raise Hint(f"A number is asked for{in_unit}; this is of the type {type(answer).__name__}.")
    return float(answer)


def is_near(value: float, right: float, tolerance: float = 0.02) -> bool:
    """Whether a value is within a share of the right one."""
    return abs(value - right) <= tolerance * abs(right)
