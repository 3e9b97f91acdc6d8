"""Exercises of notebook 06."""

from typing import Any

from labkit.interactive.course.exercise import Exercise, Hint, is_near, number

STEP, STEPS = 0.97, 8


def _tasks(answer: Any) -> None:
    """Share of tasks of eight steps that are done when 97 of 100 steps are right."""
    value, right = number(answer), STEP**STEPS
    if is_near(value, right, 0.01) or is_near(value, 100 * right, 0.01):
        return
    if is_near(value, 1 - STEPS * (1 - STEP), 0.005) or is_near(value, 100 - STEPS * 100 * (1 - STEP), 0.005):
        raise Hint(
            "Losses do not add up: a task that has failed already cannot fail again. Multiply what is right."
        )
    if is_near(value, 1 - right, 0.01):
        raise Hint("That is the share which fails. The share that is done is asked for.")
    raise Hint("Every step must be right: the first, and the second, and so on, eight times.")


EXERCISES = (
    Exercise(
        "06-a",
        "A plan gets 97 of 100 steps right. Which share of its tasks of eight steps will it finish?",
        _tasks,
        "0.97 to the power of 8 is 0.78: three points lost a step are twenty-two lost a task.",
        ("A task is done when every one of its steps was right.", "0.97 ** 8."),
    ),
)
