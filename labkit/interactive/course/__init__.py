"""The exercises of the course: check an answer, ask for a hint.

``course.check("02-a", answer)`` says whether it is right and why, or what to look at.
Answers are checked by computing wherever that is possible: a learner's function is run, a plan is laid over the
model, a tap is compared with its target. ``course.hint("02-a")`` gives the next hint. One file a notebook.

In the Chinese edition (a folder called ``zh``), or where ``$LABKIT_LANGUAGE`` is ``zh``, it speaks Chinese.
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
    """The exercise with this id; raises LabError that lists what is known."""
    if id not in _EXERCISES:
        raise LabError(f"there is no exercise {id!r}; there are {', '.join(_EXERCISES)}")
    return _EXERCISES[id]


def check(id: str, answer: Any = ...) -> Verdict:
    """Judge an answer. Whatever the answer is, the verdict is a sentence that helps.

    Raises LabError for an unknown exercise.
    """
    return _spoken(judged(get_exercise(id), answer))


def hint(id: str) -> Verdict:
    """The next hint for an exercise, each time a plainer one; the last one stays.

    Raises LabError for an unknown exercise.
    """
    exercise = get_exercise(id)
    given = min(_hints_given.get(id, 0), len(exercise.hints) - 1)
    _hints_given[id] = given + 1
    told = f"Hint {given + 1} of {len(exercise.hints)}: {exercise.hints[given]}"
    return _spoken(Verdict(id, False, told, answered=False))


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
