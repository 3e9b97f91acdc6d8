"""Exercises of notebook 03."""

from typing import Any

from labkit.interactive.course.exercise import Exercise, Hint, is_near, number

LARGEST = 254.0
WEIGHTS = (0.4, 0.4, 0.4)
"""Three weights whose inputs are always equal; codes are whole numbers, the scale is 1."""


def _drowned(answer: Any) -> None:
    """The size below which activations become zero beside one of `LARGEST`, in symmetric 8 bits."""
    value, step = number(answer), LARGEST / 127
    if is_near(value, step / 2, 0.001):
        return
    if is_near(value, step, 0.001):
        raise Hint(
            "That is a whole step. A value is rounded to the nearest code: from half a step on it becomes 1."
        )
    if is_near(value, LARGEST / 255, 0.001) or is_near(value, LARGEST / 510, 0.001):
        raise Hint("255 steps would cover both signs together. Symmetric: 127 of them lie between 0 and 254.")
    raise Hint("One step is the largest value over 127. What is smaller than half of it rounds to 0.")


def _together(answer: Any) -> None:
    """Whole numbers for `WEIGHTS` that leave the smallest error of the output when all inputs are equal."""
    if not isinstance(answer, tuple | list) or len(answer) != len(WEIGHTS):
        raise Hint("Give three whole numbers, one code for each weight, as (0, 0, 0).")
    codes = [number(code) for code in answer]
    if any(code != round(code) for code in codes):
        raise Hint("Codes are whole numbers: that is what rounding is about.")
    error = abs(sum(WEIGHTS) - sum(codes))
    if error > 0.201:
        nearest = " Each is rounded to its nearest; together they are off." if not any(codes) else ""
        raise Hint(
            f"With all inputs 1 the output should be {sum(WEIGHTS):.1f}; these codes give {sum(codes):g}.{nearest}"
        )
    if sorted(codes) != [0, 0, 1]:
        raise Hint(
            "The output is as near as can be, but by codes far from their weights: 0 and 1 are enough."
        )


EXERCISES = (
    Exercise(
        "03-a",
        "A token's largest activation is 254. Below which size do its other activations become 0 in int8-dynamic?",
        _drowned,
        "Steps of 2: all that is smaller than 1 is gone, and in most channels that is nearly everything.",
        (
            "int8-dynamic is symmetric: the largest value becomes code 127.",
            "One step is 254 / 127; half of it.",
        ),
    ),
    Exercise(
        "03-b",
        "Three weights of 0.4 always get equal inputs. Which whole numbers leave the smallest error of the output?",
        _together,
        "One of the three goes up: an error of 0.2 instead of 1.2. GPTQ finds such bargains for every column.",
        (
            "Nearest gives (0, 0, 0): the output is 0 instead of 1.2 times the input.",
            "What must the codes add up to?",
        ),
    ),
)
