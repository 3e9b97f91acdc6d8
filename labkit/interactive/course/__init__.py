"""The exercises of the course: check an answer, ask for a hint.

``course.check("02-a", answer)`` says whether an answer is right and why, ``course.hint("02-a")`` gives the next hint;
in Chinese where `labkit.interactive.language` says so. Each notebook's exercises have a file of their own.
"""

import dataclasses
from typing import Any

from labkit.common.errors import LabError
from labkit.interactive.course import (
    beyond,
    by_hand,
    chinese,
    chinese_hints,
    cost,
    mixing,
    outliers,
    parts,
    serving,
    talk,
    tour,
)
from labkit.interactive.course.exercise import Exercise, Verdict, judged
from labkit.interactive.language import language

_EXERCISES: dict[str, Exercise] = {
    exercise.id: exercise
    for chapter in (tour, parts, by_hand, outliers, mixing, cost, serving, talk, beyond)
    for exercise in chapter.EXERCISES
}
_hints_given: dict[str, int] = {}

__all__ = ["Exercise", "Verdict", "check", "exercises", "get_exercise", "hint"]


def exercises() -> list[Exercise]:
    """All exercises, in the order of the course."""
    return list(_EXERCISES.values())


def get_exercise(id: str) -> Exercise:
    """The exercise with this id. Raises LabError with a list of the ids for an unknown one."""
    if id not in _EXERCISES:
        raise LabError(f"there is no exercise {id!r}; there are {', '.join(_EXERCISES)}")
    return _EXERCISES[id]


def check(id: str, answer: Any = ...) -> Verdict:
    """Judge an answer; a wrong one gets a hint, never an exception.

    Raises LabError for an unknown exercise.
    """
    return _spoken(judged(get_exercise(id), answer))


def hint(id: str) -> Verdict:
    """The next hint for an exercise, more explicit each time; the last one repeats.

    Raises LabError for an unknown exercise.
    """
    exercise = get_exercise(id)
    index = min(_hints_given.get(id, 0), len(exercise.hints) - 1)
    _hints_given[id] = index + 1
    message = f"Hint {index + 1} of {len(exercise.hints)}: {exercise.hints[index]}"
    return _spoken(Verdict(id, False, message, answered=False))


def _spoken(verdict: Verdict) -> Verdict:
    """The verdict in the language of the edition."""
    if language() != "zh":
        return verdict
    exercise = get_exercise(verdict.exercise)
    task, because, hints = chinese.EXERCISES[exercise.id]
    message = chinese_hints.translated(verdict.message)
    for english, translation in (
        (exercise.task, task),
        (exercise.because, because),
        *zip(exercise.hints, hints),
    ):
        message = message.replace(english, translation)
    return dataclasses.replace(verdict, message=message, is_chinese=True)
